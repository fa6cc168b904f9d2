"""A file to which lines are added while other people may empty it, move it, cut it, or write to it as well.

The file is not held open. Before every writing it is compared with what was left there:

- it is empty or gone, as after a log rotation: it is begun anew, with its first line;
- it was cut: what is missing at its end is written again;
- it holds something else: nothing is written, and an error says so.

Lines are appended, never put at a position that was remembered, so that no hole of NULs can arise.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from msam_analysis.results import atomic_path

Text = Callable[[], bytes]


class ForeignFileError(ValueError):
    """The file holds what this process did not write."""


class GrowingFile:
    """A file of lines that one process adds to.

    ``head``: Returns the first line, with which an empty file begins.
    ``own``: Returns all that this process wrote to the file as it is now; asked only where the file has changed.
    ``size``: Bytes of the whole lines in it; what stands behind them (half a line, a note) is written over.
    """

    def __init__(self, path: str | os.PathLike[str], head: Text, own: Text) -> None:
        self.path = Path(path)
        self.size = 0
        self._head, self._own = head, own
        self._left: tuple[int, int, int] | None = None  # device, inode and size after the last look

    def read(self) -> bytes:
        """Return the content, empty where there is no file.

        Raises ValueError: It is no regular file.
        """
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return b""
        self._require_regular(found)
        content = self.path.read_bytes()
        self._left = found.st_dev, found.st_ino, len(content)
        return content

    def append(self, lines: bytes, note: bytes = b"") -> bool:
        """Add lines, and a note that the next lines are written over; return whether the file was begun anew.

        Raises ForeignFileError: It holds something else. OSError: It cannot be written.
        """
        anew, missing = self._make_ready()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self.path, flags, 0o666)
        try:
            base = 0 if anew else self.size
            text = (self._head() if anew else missing) + lines
            os.ftruncate(descriptor, base)
            try:
                _write(descriptor, text + note)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, base)
                text = note = b""
                raise
            finally:
                found = os.fstat(descriptor)
                self.size = base + len(text)
                self._left = found.st_dev, found.st_ino, found.st_size
        finally:
            os.close(descriptor)
        if found.st_size != self.size + len(note):
            self._left = found.st_dev, found.st_ino, self.size + len(note)  # the next look finds it as well
            raise self._foreign()
        return anew

    def replace(self, content: Callable[[bool], bytes]) -> None:
        """Put another content in place, whole; ``content`` is told whether the file was emptied or is gone.

        Raises ForeignFileError: It holds something else. OSError: It cannot be written.
        """
        text = content(self._make_ready()[0])
        with atomic_path(self.path) as partial:
            partial.write_bytes(text)
        found = self.path.stat()
        self.size = len(text)
        self._left = found.st_dev, found.st_ino, len(text)

    def _make_ready(self) -> tuple[bool, bytes]:
        """Compare the file with what was left there: return whether it is to be begun anew, and what it lacks."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return True, b""
        self._require_regular(found)
        if found.st_size == 0:
            return True, b""
        if (found.st_dev, found.st_ino, found.st_size) == self._left:
            return self.size == 0, b""
        own = self._own()
        content = self.path.read_bytes() if found.st_size <= len(own) else None
        if content is None or not own.startswith(content):
            raise self._foreign()
        self.size = len(content)
        return False, own[len(content) :]

    def _require_regular(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, a pipe or a socket"
            raise ForeignFileError(f"{self.path} is {what}: expected a file to add rows to; give another path")

    def _foreign(self) -> ForeignFileError:
        return ForeignFileError(
            f"{self.path} holds what this monitor did not write, as where two write to one file: expected it to be "
            "left alone; give each its own path, or move the file away"
        )


def _write(descriptor: int, content: bytes) -> None:
    """Write all of a text."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
