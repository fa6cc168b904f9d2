"""Rows of a monitor on their way out: to functions, to tables, and what is said where that cannot be."""

from __future__ import annotations

import copy
import csv
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis.monitor.records import Row
from tests.programs import ended


def train(monitored: dict[str, Any], steps: int, every: int = 1) -> ma.Monitor:
    """A run with two probes, of which one is asked at every third step; ``state`` is one to go on from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = monitored.pop("state", None)
    asked: list[Any] = [ma.probes.MomentumGradientCosine(), ma.probes.Every(ma.probes.Norms(), 3)]
    monitor = ma.Monitor(optimizer, asked, every, **monitored)
    start = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        monitor.load_state_dict(state["monitor"])
        start = monitor.step
    x = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(1))
    for step in range(start, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[step]), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
        if step == 4:
            STATE.update(
                {
                    "model": {key: value.clone() for key, value in model.state_dict().items()},
                    "optimizer": copy.deepcopy(optimizer.state_dict()),
                    "monitor": monitor.state_dict(),
                }
            )
    monitor.close()
    return monitor


STATE: dict[str, Any] = {}  # of the latest run, after its fifth step


class Kept:
    """A logger that notes all that it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(self, row: Row) -> None:
        self.told.append(row)

    def rewind(self, step: int) -> None:
        self.told.append(step)

    def close(self) -> None:
        self.told.append("closed")


def test_every_row_is_handed_on_and_is_the_loggers_own() -> None:
    kept, rows = Kept(), []

    def spoil(row: Row) -> None:
        rows.append(dict(row))
        row.clear()

    monitor = train({"to": [spoil, kept]}, 7)
    assert kept.told == [*monitor.rows, "closed"]
    assert rows == monitor.rows
    assert len(rows) == 7
    monitor.close()
    assert kept.told.count("closed") == 1


def test_a_logger_is_told_of_going_back() -> None:
    train({}, 7)
    kept = Kept()
    monitor = train({"to": [kept], "state": dict(STATE)}, 7)
    assert kept.told == [5, *monitor.rows, "closed"]


def test_a_table_reads_back_to_the_bit(tmp_path: Path) -> None:
    monitor = train({"to": [ma.loggers.CSV(tmp_path / "deep" / "run.csv")]}, 8)
    with (tmp_path / "deep" / "run.csv").open(newline="") as file:
        read = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    assert list(map(repr, read)) == [repr({n: float(v) for n, v in row.items()}) for row in monitor.rows]  # NaN too
    assert pd.read_csv(tmp_path / "deep" / "run.csv")["weights_norm"].notna().sum() == 3


def test_a_table_has_every_row_while_the_run_goes_on_and_columns_that_come_late(tmp_path: Path) -> None:
    logger = ma.loggers.CSV(tmp_path / "run.csv")
    for step, row in enumerate([{"a": 0.1}, {"a": 0.2, "b": float("nan")}, {"b": float("inf")}]):
        logger({"step": step, **row})
        assert len(pd.read_csv(tmp_path / "run.csv")) == step + 1
    assert (tmp_path / "run.csv").read_text().split() == ["step,a,b", "0,0.1,", "1,0.2,nan", "2,,inf"]


def test_a_table_becomes_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    train({"to": [ma.loggers.CSV(tmp_path / "whole.csv")]}, 9)
    train({"to": [ma.loggers.CSV(tmp_path / "run.csv")]}, 7)  # two rows beyond the checkpoint
    train({"to": [ma.loggers.CSV(tmp_path / "run.csv")], "state": dict(STATE)}, 9)
    assert (tmp_path / "run.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_going_back_before_the_first_row_makes_no_table(tmp_path: Path) -> None:
    ma.loggers.CSV(tmp_path / "run.csv").rewind(3)
    assert not (tmp_path / "run.csv").exists()


def test_a_table_of_an_earlier_run_is_refused(tmp_path: Path) -> None:
    train({"to": [ma.loggers.CSV(tmp_path / "run.csv")]}, 4)
    with pytest.raises(ValueError, match="holds rows up to step 3, got one of step 0: expected a later one"):
        train({"to": [ma.loggers.CSV(tmp_path / "run.csv")]}, 4)


def test_another_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("name,value\nx,1\n")
    with pytest.raises(ValueError, match="expected a column step, got name, value"):
        ma.loggers.CSV(tmp_path / "run.csv")


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (print, "loggers must be a list of loggers, got <built-in function print>"),
        ("run.csv", "loggers must be a list of loggers, got 'run.csv'"),
        ([ma.loggers.CSV], "expected a logger, got the class CSV: make one"),
        (["run.csv"], "expected a logger, got 'run.csv': pass a function"),
    ],
)
def test_what_is_no_logger_is_refused(to: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        train({"to": to}, 1)


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("tensorboard", "ma.loggers.TensorBoard('events')"),
        ("mlflow", "ma.loggers.MLflow()"),
        ("wandb", "ma.loggers.WandB()"),
    ],
)
def test_a_tracker_that_is_missing_is_named(library: str, make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=rf"this logger needs {library}, .*msam-analysis\[tracking\]"):
        eval(make, {"ma": ma})  # noqa: S307 - our own


def test_a_tracker_that_misses_something_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        ma.loggers.WandB()


class Writer:
    """What TensorBoard's writer does, as far as it is used."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def add_scalar(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    def flush(self) -> None:
        self.calls.append("flush")


def test_a_writer_of_ones_own_is_written_to_and_left_open() -> None:
    writer = Writer()
    logger = ma.loggers.TensorBoard(writer, prefix="m/")
    logger({"step": 3, "a": 1.5})
    logger.rewind(2)
    logger.close()
    assert writer.calls == [("m/a", 1.5, 3), "flush"]


def test_import_brings_no_tracker() -> None:
    names = "{'mlflow', 'tensorboard', 'wandb'}"
    done = ended([sys.executable, "-c", f"import sys, msam_analysis; print({names} & sys.modules.keys())"])
    assert done.out.split() == ["set()"]
