"""What the command prints: after the results are in their files, and whatever becomes of the screen.

A standard output that is full, closed or left by its reader takes nothing from a result: it is remembered, and
:func:`lost` tells it at the end.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from msam_analysis.results.text import printable

_NARROWEST, _USUAL = 20, 80  # columns
_lost: list[Exception] = []


@contextmanager
def prepared() -> Iterator[None]:
    """Let the screen show every character, as an escape where its encoding has none, and standard error never fail."""
    _lost.clear()
    before = sys.stderr
    for stream in (sys.stdout, before):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    sys.stderr = _Patient(before)
    try:
        yield
    finally:
        sys.stderr = before


class _Patient(io.TextIOBase):
    """A stream for progress and warnings, whoever writes them: what it cannot take is lost, and ends nothing."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        """Write if the stream takes it."""
        with suppress(OSError, ValueError, AttributeError):  # full, closed, or None
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Send it if the stream takes it."""
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether somebody sees it now."""
        with suppress(ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def fileno(self) -> int:
        """The stream's number."""
        if self._stream is None:
            raise io.UnsupportedOperation("standard error is closed: expected one to have a number; open it")
        return int(self._stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only here
        """The stream's encoding."""
        return getattr(self._stream, "encoding", None) or "utf-8"


def say(*what: Any, err: bool = False) -> None:
    """Print lines of text as they are, with escapes for control characters, and tables; never raise."""
    if _lost and not err:
        return
    with _listening(err):
        page = _Page(sys.stderr if err else sys.stdout)
        console = console_of(err, page)
        for one in what:
            if isinstance(one, str):
                try:
                    console.print(Text(printable(one, None)), soft_wrap=True)
                except Exception:  # noqa: BLE001 -- a fault of rich: a line needs none of it
                    page.write(f"{printable(one, None)}\n")
            else:
                console.print(one)
        _send(page.getvalue(), err)


def lost() -> Exception | None:
    """Return why standard output did not take all, after what is left was sent to it; ``None``: it did."""
    with _listening(err=False):
        _send("", err=False)
    return _lost[0] if _lost else None


class _Page(io.StringIO):
    """What is to be said, put together for a stream: rich would end the program where the stream is left."""

    encoding = "utf-8"

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self._seen = stream is not None and stream.isatty()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._seen


def console_of(err: bool = False, file: Any = None) -> Console:
    """Return a console as wide as the screen, or as usual where that is no width to read in."""
    console = Console(stderr=err, file=file)
    return console if console.width >= _NARROWEST else Console(stderr=err, file=file, width=_USUAL)


def watched() -> bool:
    """Tell whether somebody sees what is written to standard error now."""
    return _Patient(sys.stderr).isatty()


def _send(text: str, err: bool) -> None:
    stream = sys.stderr if err else sys.stdout
    if stream is not None:  # it is None where the program was started with it closed
        stream.write(text)
        stream.flush()


@contextmanager
def _listening(err: bool) -> Iterator[None]:
    """Note that standard output takes nothing more, and write no more to it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 -- no reader, a full disk, closed by a user's function, a fault of rich
        if not err:
            _lost.append(error)
            # Python would try again when it ends, and change the exit code.
            sys.stdout = io.StringIO()
