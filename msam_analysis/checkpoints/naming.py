"""Which checkpoints are meant, in which order, and under which names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from msam_analysis.checkpoints import folders
from msam_analysis.checkpoints.reading import existing


def expand(given: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the checkpoints that files, folders and patterns stand for, each once.

    A folder that is a checkpoint itself is one; any other stands for the checkpoints in it. What a folder or a pattern
    stands for is ordered by step, else by epoch, else by name with its numbers as numbers.

    Raises FileNotFoundError: There is no such file, a pattern matches nothing, or a folder holds no checkpoint.
    ValueError: A name is empty.
    """
    if any(os.fspath(one) == "" for one in given):
        raise ValueError("expected the name of a checkpoint, got an empty one: is a variable of the shell unset?")
    found: dict[Path, None] = {}
    for one in given:
        path = Path(one)
        if path.exists():
            several = [path] if not path.is_dir() or folders.is_checkpoint(path) else in_order(folders.within(path))
            what = "the folder"
        else:
            several = in_order([Path(name) for name in glob.glob(os.fspath(one), recursive=True)])  # noqa: PTH207
            what = "the pattern" if re.search(r"[*?\[]", os.fspath(one)) else ""
        if not several and what:
            raise FileNotFoundError(
                f"{what} {one} holds no checkpoint: expected files of weights straight in a folder; check the path, or "
                "pass the folders inside, or a pattern such as 'runs/**/*.ckpt'"
            )
        found |= dict.fromkeys(several or [existing(path)])
    return list(found)


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Return the checkpoints by step, else by epoch, else by name with its numbers as numbers."""
    known = {path: folders.counters(path) for path in paths}
    for counter in ("step", "epoch"):
        if paths and all(known[path][counter] is not None for path in paths):
            return sorted(paths, key=lambda path: (known[path][counter], _natural(path)))
    return sorted(paths, key=_natural)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: folder and file, with more folders or a number if two names are the same."""
    parts = [[part for part in (*path.parts[:-1], path.stem) if part.strip("./\\")] for path in paths]
    names: list[str] = []
    for own in parts:
        depths = (depth for depth in range(2, len(own)) if [p[-depth:] for p in parts].count(own[-depth:]) == 1)
        name = "-".join(own[-next(depths, len(own)) :])
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(free for free in itertools.chain([name], numbered) if free not in names))
    return names


def numbered(path: Path) -> Iterator[Path]:
    """Yield the path, then the same with ``-2``, ``-3``, ... at the end of its name."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
