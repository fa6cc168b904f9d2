"""Writing that is never half done: a file or a folder takes its place whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"
"""How the name of a folder begins that is being written."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that replaces it on success and vanishes on failure.

    Parameters
    ----------
    path
        The final path; its parents are made.

    Yields
    ------
    pathlib.Path
        Where to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # mkstemp makes files private; a result is as readable as any other file of the user's.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its place, whole, on success and vanishes on failure.

    Parameters
    ----------
    path
        The final folder; its parents are made. What was in it before is gone afterwards.

    Yields
    ------
    pathlib.Path
        Where to write.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")
    old = partial.with_name(f"{partial.name}-old")
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.replace(old)
        partial.replace(path)
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
