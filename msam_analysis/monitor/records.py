"""The file of a monitor: one line for each record, whole lines after a crash, and only records of the same probes.

The first line says what is recorded; every other one is a JSON object with the step and the numbers of that step, as
Python writes them (``NaN`` and ``Infinity`` included), so that they are read again to the bit.
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
    """Rows on disk, appended one by one; nothing is held open in between.

    Parameters
    ----------
    path
        The file; parents are made. One writer at a time.
    identity
        What is recorded and how often, in words. A file of something else is refused.

    Attributes
    ----------
    rows
        What the file holds.
    step
        How many steps had been seen when it was last written to, as far as the file says.

    Raises
    ------
    ValueError
        The file is of something else, or damaged.
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
                    f"{self.path} is of another monitor, with the {name} {there.get(name)}: expected {mine}; give "
                    "another path, or move the file away"
                )

    def append(self, row: Row) -> None:
        """Add a row; it is in the file when this returns."""
        line = _line(row)
        self._write(line)
        self._size += len(line)
        self.rows.append(row)

    def end(self, step: int) -> None:
        """Note how many steps were seen, where the rows do not say it, so that counting goes on there."""
        self._write(b"" if step == _next(self.rows) else _line({_END: step}))

    def rewind(self, step: int) -> None:
        """Forget the rows of ``step`` and later ones; the file changes at once, whole."""
        self.rows[:] = [row for row in self.rows if row["step"] < step]
        text = self._header + b"".join(map(_line, self.rows))
        with atomic_path(self.path) as partial:
            partial.write_bytes(text)
        self._size = len(text)

    def _write(self, line: bytes) -> None:
        """Write behind the last row: over the note of an end, and over half a line that a crash has left."""
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
    """Return header, rows, how many steps were seen, and the length of all that in bytes."""
    lines = content.split(b"\n")[:-1]  # what follows the last newline is half a line
    header = _decoded(lines[0]) if lines else {}
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} is no file of a Monitor ({_FORMAT}): give another path, or move the file away")
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
    """Return the object in a line, empty for one that holds something else."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
