"""The file of a monitor after a crash in the middle of a line, written to without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from msam_analysis.monitor.records import RecordFile, read_records

IDENTITY = {"probes": ["a"], "periods": [1]}
HALF = b'{"step": 2, "value": 0.12345678901234'  # longer than any line that is written over it


def one_row(file: RecordFile) -> None:
    file.append({"step": 2, "value": 1.0})


def two_rows(file: RecordFile) -> None:
    one_row(file)
    file.append({"step": 3, "value": 1.0})


def an_end_and_a_row(file: RecordFile) -> None:
    file.end(7)
    one_row(file)


NEXT: dict[str, Callable[[RecordFile], None]] = {
    "a row": one_row,
    "two rows": two_rows,
    "an end": lambda file: file.end(7),
    "an end that the rows say": lambda file: file.end(2),
    "an end, and a row over it": an_end_and_a_row,
}


@pytest.mark.parametrize("following", NEXT)
def test_half_a_line_is_cut_off(following: str, tmp_path: Path) -> None:
    """What comes next is written as if the crash had never been: the same bytes, and readable."""
    whole, crashed = tmp_path / "whole.jsonl", tmp_path / "crashed.jsonl"
    for path in (whole, crashed):
        file = RecordFile(path, IDENTITY)
        for step in range(2):
            file.append({"step": step, "value": 0.5})
    with crashed.open("ab") as end:
        end.write(HALF)
    for path in (whole, crashed):
        NEXT[following](RecordFile(path, IDENTITY))
    assert crashed.read_bytes() == whole.read_bytes()
    assert read_records(crashed)["step"].tolist()[:2] == [0, 1]
