"""The file of a monitor: one line for each row, whole lines after a crash, and only rows of the same probes.

The first line names the probes. Every other line is a JSON object with the step and the numbers of that step, as Python
writes them (``NaN`` and ``Infinity`` included), so that they are read again to the bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from msam_analysis.monitor.growing import GrowingFile

Row = dict[str, float]

_FORMAT = "msam-analysis monitor, format 1"
_END = "end"


def frame_of(rows: list[Row]) -> pd.DataFrame:
    """Return rows as a table: column ``step`` and one for each quantity, NaN where it was not recorded."""
    frame: pd.DataFrame = pd.DataFrame(rows) if rows else pd.DataFrame({"step": pd.Series(dtype=int)})
    return frame


class RecordFile:
    """Rows on disk, appended one by one; the file is not held open in between.

    Parameters
    ----------
    path
        The file; parents are made. Only one monitor may write to it at a time.
    identity
        The probes and their periods, in words. A file with others is refused.

    Attributes
    ----------
    rows
        The rows: those that were in the file, and all that came since, also where the file has been emptied.
    step
        Number of steps at the last writing, as far as the file says.

    Raises
    ------
    ValueError
        The file has other probes or periods, is damaged, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._header = _line({"format": _FORMAT, **identity})
        self._first = self._written = 0  # the file has the rows from the first one on, up to what is written
        self._file = GrowingFile(path, lambda: self._header, self._own)
        found = self._file.read()
        if b"\n" not in found and self._header.startswith(found):  # new, or a crash in its first line
            self.rows: list[Row] = []
            self.step = 0
            self._file.append(b"")
            return
        there, self.rows, self.step, self._file.size = _parsed(self.path, found)
        self._written = len(self.rows)
        for name, mine in identity.items():
            if there.get(name) != mine:
                raise ValueError(
                    f"{self.path} belongs to another monitor, with the {name} {there.get(name)}: expected {mine}; give "
                    "another path, or move the file away"
                )

    def append(self, row: Row) -> None:
        """Add a row to the file at once, after those that could not be written before.

        Raises ValueError: Somebody else has written to the file. OSError: It cannot be written. The row is kept.
        """
        self.rows.append(row)
        self._write()

    def end(self, step: int) -> None:
        """Note the number of steps if the rows do not say it, so that counting goes on there; errors as in append."""
        self._write(b"" if step == _next(self.rows) else _line({_END: step}))

    def rewind(self, step: int) -> None:
        """Delete the rows of ``step`` and later ones; the file is replaced as a whole; raise as :meth:`append`."""
        kept = [row for row in self.rows if row["step"] < step]
        first = min(self._first, len(kept))

        def content(anew: bool) -> bytes:
            nonlocal first
            first = min(self._written, len(kept)) if anew else first
            return self._header + b"".join(map(_line, kept[first:]))

        self._file.replace(content)
        self.rows[:] = kept
        self._first, self._written = first, len(kept)

    def _own(self) -> bytes:
        return self._header + b"".join(map(_line, self.rows[self._first : self._written]))

    def _write(self, note: bytes = b"") -> None:
        """Write the rows that are not in the file, over the note of an end or half a line from a crash."""
        if self._file.append(b"".join(map(_line, self.rows[self._written :])), note):
            self._first = self._written
        self._written = len(self.rows)


def _next(rows: list[Row]) -> int:
    return int(rows[-1]["step"]) + 1 if rows else 0


def read_records(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Return the table in a monitor's file; see :meth:`Monitor.read`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no records at {path}: expected a file that a Monitor with path=... wrote")
    return frame_of(_parsed(path, path.read_bytes())[1])


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _parsed(path: Path, content: bytes) -> tuple[dict[str, Any], list[Row], int, int]:
    """Return the header, the rows, the number of steps, and the length of header and rows in bytes."""
    lines = content.split(b"\n")[:-1]  # the text after the last newline is half a line
    header = _decoded(lines[0]) if lines else {}
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a file of a Monitor ({_FORMAT}): give another path, or move the file away")
    rows: list[Row] = []
    size = len(lines[0]) + 1
    end: int | None = None
    for number, line in enumerate(lines[1:], start=2):
        entry = _decoded(line)
        if _is_count(entry.get(_END)) and len(entry) == 1:
            end = int(entry[_END])
        elif _is_row(entry, _next(rows)):
            rows.append(entry)
            size += len(line) + 1
        else:
            raise ValueError(f"{path} is damaged in line {number}: remove that line, or give another path")
    return header, rows, _next(rows) if end is None else end, size


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_row(entry: Mapping[str, Any], least: int) -> bool:
    """Tell whether an entry has a step after the last one, and numbers only."""
    numbers = all(value is None or isinstance(value, int | float) for value in entry.values())
    return numbers and _is_count(entry.get("step")) and entry["step"] >= least


def _decoded(line: bytes) -> dict[str, Any]:
    """Return the object in a line; an empty one if the line holds something else."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}
