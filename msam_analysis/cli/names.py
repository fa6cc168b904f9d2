"""Names and folders for the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def check_own(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise ``FileExistsError`` if a folder has files but none of the names, which an earlier command wrote."""
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in names):
        raise FileExistsError(f"{folder} holds something else than {what}: choose another --out")
