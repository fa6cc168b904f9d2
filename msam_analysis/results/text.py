"""Text of users, as others can show it: names, labels and messages are text, and nothing in them is obeyed."""

from __future__ import annotations

import unicodedata

LONGEST = 200
"""Characters of a name that are shown."""


def printable(text: str, longest: int | None = LONGEST) -> str:
    r"""Return a text on one line, with escapes for what no screen or page shows as it is, and cut where it is long.

    Escaped are control characters, bytes of another encoding in a file's name, and marks that change the direction of
    writing: the byte 27 becomes ``\x1b``.
    """
    if longest is not None and len(text) > longest:
        text = f"{text[: longest - 1]}…"
    if text.isprintable():
        return text
    return "".join(char if _shown(char) else char.encode("unicode_escape").decode() for char in text)


def _shown(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"  # spaces that do not break, too
