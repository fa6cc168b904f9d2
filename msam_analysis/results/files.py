"""Writing that is never half done: a file takes its place whole, or not at all, and what is not ours stays.

Every file of this package is written here. What is being written has a name that begins with :data:`PARTIAL`, the
machine and the process, so that a later run knows what a killed one left, see :func:`sweep`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial-"
"""How the name of a file or folder begins that is being written."""

SPACE = 2**23
"""Bytes that must be free where results are to be written: tables and pictures, without vectors, are smaller."""

_LONGEST_SUFFIX = 12  # a longer one names no format, and could make a name too long for a file system
_NAME = re.compile(re.escape(PARTIAL) + r"(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-\d+")
_OPEN: set[str] = set()  # what this process is writing


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that replaces it on success and vanishes on failure.

    A link stays a link: the file that it points to is replaced. A file keeps its permissions.

    Parameters
    ----------
    path
        The final path; its parents are made.

    Yields
    ------
    pathlib.Path
        Where to write.

    Raises
    ------
    PermissionError
        The file is read-only.
    IsADirectoryError
        There is a folder of that name.
    OSError
        The file cannot be written; the error names it.
    """
    path = Path(path)
    with _named(path):
        target = _behind(path)
        mode = _mode(path, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target.parent, target.suffix)
        try:
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield partial
            partial.chmod(mode)
            partial.replace(target)
        finally:
            with suppress(OSError):  # the error that led here says more
                partial.unlink()
            _OPEN.discard(partial.name)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], mark: str | None = None) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its place on success and vanishes on failure.

    Where there is a folder already, it stays, and its files are replaced one by one: what others put there is kept. A
    link to a folder stays a link.

    Parameters
    ----------
    path
        The final folder; its parents are made.
    mark
        Name of the file without which the folder counts as unfinished. It is removed first and comes last, so that
        old and new files together are never taken for a whole.

    Yields
    ------
    pathlib.Path
        Where to write.

    Raises
    ------
    OSError
        As for :func:`atomic_path`.
    """
    path = Path(path)
    with _named(path):
        target = _behind(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target.parent)
        try:
            partial.mkdir()
            yield partial
            if not target.is_dir():
                partial.replace(target)
                return
            if mark is not None:
                (target / mark).unlink(missing_ok=True)
            for file in sorted(partial.iterdir(), key=lambda file: (file.name == mark, file.name)):
                file.replace(target / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _OPEN.discard(partial.name)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8 with lines that end in a line feed, see :func:`atomic_path`.

    A character that UTF-8 does not have, as in file names of another encoding, is written as its escape, which JSON
    reads back.
    """
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: str | os.PathLike[str], content: object) -> None:
    """Write plain values as JSON for readers: one line each, letters as they are, all that is not shown as escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():
        text = "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)
    write_text(path, f"{text}\n")


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], name: str, header: str) -> None:
    """Write a ``.safetensors`` file, see :func:`atomic_path`.

    The header is one entry: safetensors writes several in any order, and the same content is to be the same bytes.
    """
    with atomic_path(path) as partial:
        own = _partial(partial.parent)  # safetensors has temporary files of its own, which go with this folder
        try:
            own.mkdir()
            save_file(dict(tensors), own / "tensors", metadata={name: header})
            (own / "tensors").replace(partial)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({error}): is there space on the disk?") from None
        finally:
            shutil.rmtree(own, ignore_errors=True)
            _OPEN.discard(own.name)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes of this machine left in a folder while they wrote; nothing else is touched."""
    with suppress(OSError):  # there is no folder, or it cannot be read
        for entry in os.scandir(folder):
            if is_debris(entry.name):
                with suppress(OSError):
                    shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else Path(entry).unlink()


def is_debris(name: str) -> bool:
    """Tell whether a name is that of a temporary file or folder whose process is no more."""
    found = _NAME.match(name)
    if found is None or name in _OPEN or found["machine"] != _machine():
        return False
    return int(found["process"]) == os.getpid() or not _runs(int(found["process"]))


def _partial(folder: Path, suffix: str = "") -> Path:
    """Return a new temporary name in a folder; many libraries see a format in its suffix."""
    name = f"{PARTIAL}{_machine()}-{os.getpid()}-{int.from_bytes(os.urandom(4), 'big')}"
    name += suffix if len(suffix) <= _LONGEST_SUFFIX else ""
    _OPEN.add(name)
    return folder / name


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _runs(process: int) -> bool:
    """Tell whether a process may be running; where signals cannot ask, it may."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _behind(path: Path) -> Path:
    """Return what a link points to, or the path itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _mode(path: Path, target: Path) -> int:
    """Return the permissions that a file gets; refuse one that must not be replaced."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, expected a file or nothing: move it away, or choose another name")
    if not mode & 0o222:
        raise PermissionError(f"{path} is read-only and stays as it is: make it writable, or choose another name")
    return stat.S_IMODE(mode)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error of the system name the file that was to be written, and not the temporary one."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or PARTIAL in os.fspath(error.filename)
        if error.errno is None or not ours:
            raise
        reason = "there is no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise type(error)(error.errno, f"cannot be written: {reason}", os.fspath(path)) from error


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raise an error unless files can be written into a folder, which need not be there; leave all as it was.

    Raises
    ------
    NotADirectoryError
        There is a file of that name, or on the way to it.
    OSError
        The folder or a file in it cannot be made, or the disk is full.
    """
    folder = Path(folder)
    made: list[Path] = []
    try:
        for part in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
            part.mkdir()
            made.append(part)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except (NotADirectoryError, FileExistsError):
        raise NotADirectoryError(f"a file is in the way of the folder {folder} for results: choose another") from None
    except OSError as error:
        why = f"no results can be written there ({error.strerror}), choose another folder"
        raise type(error)(error.errno, why, os.fspath(folder)) from error
    finally:
        for part in reversed(made):
            with suppress(OSError):
                part.rmdir()
    if free < SPACE:
        raise OSError(
            f"the disk of {folder} has {free / 2**20:.1f} MiB left, expected at least {SPACE // 2**20}: make room, or "
            "choose another folder"
        )
