"""Names: of the files of a checkpoint, and those that a user lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msam_analysis.cli import checks
from msam_analysis.results.text import printable

_LONGEST = 200  # bytes; file systems take 255, with what is put before and behind


def check_own(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise ``FileExistsError`` if a folder has files but none of the names, which an earlier command wrote.

    Hidden files do not count: a command that was killed while it wrote leaves one.
    """
    others = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if others and not any((folder / name).is_file() for name in names):
        raise FileExistsError(f"{folder} holds something else than {what}: choose another --out")


def file_names(names: Sequence[str]) -> list[str]:
    """Return names as those of files, without suffix: on one line, in one folder, short enough, all different."""
    whole = (printable(name, None).replace("/", "-").replace("\0", "-") for name in names)
    return checks.distinct([name.encode()[:_LONGEST].decode(errors="ignore") or "checkpoint" for name in whole])


def listed(text: str) -> list[str]:
    """Return the names in a text, between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
