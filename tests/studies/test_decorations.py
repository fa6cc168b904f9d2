"""What is shown takes nothing from what is measured: progress, tables on the screen, rows of LaTeX, empty names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import rich.console
import torch
import tqdm.std

import msam_analysis as ma
from msam_analysis.cli.measure import _latex
from msam_analysis.objective.progress import Bar, counted

from .bench import CHECKPOINT, GOOD, Command

LOSS = ("--metrics", "loss")


def fail(*_: object, **__: object) -> Any:
    raise KeyError("the painter")


@pytest.mark.parametrize("method", ["__init__", "update", "set_description_str", "__str__"])
def test_progress_that_fails_takes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = ma.MatrixOperator(torch.diag(torch.tensor([1.0, 2.0])))
    alone = ma.top_eigenvalues(matrix, 1)
    monkeypatch.setattr(tqdm.std.tqdm, method, fail)
    assert list(counted([1, 2, 3], "work", "part", shown=True)) == [1, 2, 3]
    with Bar(2, "work") as bar:
        bar.say("more", "of it")
        assert torch.equal(ma.top_eigenvalues(matrix, 1).values, alone.values)
    with ma.progress():
        assert torch.equal(ma.top_eigenvalues(matrix, 1).values, alone.values)


def test_an_error_inside_of_progress_stays() -> None:
    with pytest.raises(KeyError, match="mine"), Bar(2, "work"):
        raise KeyError("mine")


def test_a_screen_that_cannot_be_drawn_on_takes_nothing(
    bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich.console.Console, "print", fail)
    outcome = command(*GOOD, *LOSS)
    assert outcome.code == 1
    assert "all results are in their files; standard output did not take the rest" in outcome.err
    assert {"metrics.csv", "report.html"} <= {path.name for path in (bench / "out").rglob("*")}


def test_rows_of_latex_do_not_belong_to_the_row_before() -> None:
    table = pd.DataFrame({"loss": [1.0, 2.0, 3.0]}, index=["a", "[red]", "*b"])
    assert _latex(table).splitlines()[4:7] == [r"a & 1 \\", r"{}[red] & 2 \\", r"{}*b & 3 \\"]


def test_an_empty_name_is_no_folder(bench: Path, command: Command) -> None:
    shutil.copy(bench / CHECKPOINT, bench / "other.pt")
    outcome = command("measure", "", *GOOD[2:], *LOSS)
    assert outcome.code == 2
    assert "expected the name of a checkpoint, got an empty one" in outcome.err


def test_metrics_without_names() -> None:
    objective = ma.Objective(
        torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))]
    )
    metrics: Any = [ma.landscape.metrics.accuracy]
    with pytest.raises(TypeError, match="metrics must be names to functions"):
        ma.landscape.slice_1d(objective, torch.ones(6), points=3, metrics=metrics)
