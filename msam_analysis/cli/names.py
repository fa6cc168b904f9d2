"""Names: of the files of a checkpoint, and those that a user lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def check_own(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise ``FileExistsError`` if a folder has files but none of the names, which an earlier command wrote.

    Hidden files do not count: a command that was killed while it wrote leaves one.
    """
    others = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if others and not any((folder / name).is_file() for name in names):
        raise FileExistsError(f"{folder} holds something else than {what}: choose another --out")


def listed(text: str) -> list[str]:
    """Return the names in a text, between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
