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

from msam_analysis.results import atomic_path

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
        The file; parents are made. Only one process may write to it at a time.
    identity
        The probes and their periods, in words. A file with others is refused.

    Attributes
    ----------
    rows
        The rows in the file.
    step
        Number of steps at the last writing, as far as the file says.

    Raises
    ------
    ValueError
        The file has other probes or periods, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._header = _line({"format": _FORMAT, **identity})
        found = self.path.read_bytes() if self.path.exists() else b""
        if b"\n" not in found and self._header.startswith(found):  # new, or a crash in its first line
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(self._header)
            found = self._header
        there, self.rows, self.step, self._size = _parsed(self.path, found)
        for name, mine in identity.items():
            if there.get(name) != mine:
                raise ValueError(
                    f"{self.path} belongs to another monitor, with the {name} {there.get(name)}: expected {mine}; give "
                    "another path, or move the file away"
                )

    def append(self, row: Row) -> None:
        """Add a row to the file at once."""
        line = _line(row)
        self._write(line)
        self._size += len(line)
        self.rows.append(row)

    def end(self, step: int) -> None:
        """Note the number of steps if the rows do not say it, so that counting goes on there."""
        self._write(b"" if step == _next(self.rows) else _line({_END: step}))

    def rewind(self, step: int) -> None:
        """Delete the rows of ``step`` and later ones; the file is replaced as a whole."""
        self.rows[:] = [row for row in self.rows if row["step"] < step]
        text = self._header + b"".join(map(_line, self.rows))
        with atomic_path(self.path) as partial:
            partial.write_bytes(text)
        self._size = len(text)

    def _write(self, line: bytes) -> None:
        """Write after the last row, over the note of an end or half a line from a crash."""
        with self.path.open("r+b") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(line)


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
        if _END in entry:
            end = int(entry[_END])
        elif "step" in entry:
            rows.append(entry)
            size += len(line) + 1
        else:
            raise ValueError(f"{path} is damaged in line {number}: remove that line, or give another path")
    return header, rows, _next(rows) if end is None else end, size


def _decoded(line: bytes) -> dict[str, Any]:
    """Return the object in a line; an empty one if the line holds something else."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
