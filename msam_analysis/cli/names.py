"""Names: of the files of a checkpoint, and those that a user lists."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path


def check_own(folder: Path, names: Sequence[str], what: str) -> None:
    """Raise ``FileExistsError`` if a folder has files but none of the names, which an earlier command wrote."""
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).is_file() for name in names):
        raise FileExistsError(f"{folder} holds something else than {what}: choose another --out")


def distinct_names(checkpoints: Sequence[Path]) -> list[str]:
    """Return a name for each checkpoint: folder and file, with more folders or a number if two names are the same."""
    parts = [[part for part in (*path.parts[:-1], path.stem) if part.strip("./\\")] for path in checkpoints]
    names: list[str] = []
    for own in parts:
        depths = (depth for depth in range(2, len(own)) if [p[-depth:] for p in parts].count(own[-depth:]) == 1)
        name = "-".join(own[-next(depths, len(own)) :])
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(free for free in itertools.chain([name], numbered) if free not in names))
    return names


def listed(text: str) -> list[str]:
    """Return the names in a text, between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
