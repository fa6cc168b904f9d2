"""Which metrics of a checkpoint are measured, and what the rows are."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis import cli
from msam_analysis.measures.summary import DEFAULT_METRICS, METRICS, measure
from msam_analysis.results import Measurement

from .cases import MLP, ONE_SAMPLE, Quadratic, mean_output


@pytest.fixture(scope="module")
def objective() -> ma.Objective:
    return ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())


def value(metrics: Measurement, name: str, column: str = "value") -> float:
    found = metrics.table.loc[metrics.table["metric"] == name, column]
    assert len(found) == 1, name
    return float(found.iloc[0])


@pytest.fixture(scope="module")
def everything(objective: ma.Objective) -> Measurement:
    return measure(objective, metrics=METRICS, radii=(0.3,))


def test_the_further_metrics(everything: Measurement, objective: ma.Objective) -> None:
    ball = ma.ball_sharpness(objective, 0.3, adaptive=True)
    batches = ma.m_sharpness(objective, 0.3, 19)
    flatness, norm = ma.relative_flatness(objective, "3.weight"), ma.fisher_rao_norm(objective)
    for name, expected, error in (
        ("adaptive_ball_sharpness@0.3", ball.sharpness, None),
        ("adaptive_one_step_sharpness@0.3", ball.one_step, None),
        ("m_sharpness@0.3", batches.value, None),
        ("relative_flatness", flatness.value, flatness.standard_error),
        ("fisher_rao_norm", norm.value, norm.standard_error),
    ):
        assert value(everything, name) == expected
        if error is not None:
            assert value(everything, name, "uncertainty") == error
    assert {"adaptive-ball-0.3", "batches-0.3", "flatness", "fisher-rao"} <= set(everything.results)
    assert everything.table["metric"].is_unique
    assert everything.table["meaning"].str.len().gt(0).all()


def test_the_default_is_a_part_of_everything(everything: Measurement, objective: ma.Objective) -> None:
    default = measure(objective, radii=(0.3,))
    names = list(default.table["metric"])
    assert list(everything.table["metric"])[: len(names)] == names
    assert list(everything.results)[: len(default.results)] == list(default.results)
    again = measure(objective, metrics=DEFAULT_METRICS[::-1], radii=(0.3,))
    assert list(again.table["metric"]) == names


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_alone(name: str, everything: Measurement, objective: ma.Objective) -> None:
    told: list[str] = []
    alone = measure(objective, metrics=(name,), radii=(0.3,), tick=told.append)
    rows = alone.table["metric"].tolist()
    assert 0 < len(rows) < len(everything.table)
    assert [value(alone, row) for row in rows] == [value(everything, row) for row in rows]
    assert len(told) == 1


def test_many_samples_are_drawn_from(monkeypatch: pytest.MonkeyPatch, objective: ma.Objective) -> None:
    module = sys.modules["msam_analysis.measures.summary"]
    for constant, size in (("BATCH", 4), ("FEW_BATCHES", 2), ("FEW_SAMPLES", 5)):
        monkeypatch.setattr(module, constant, size)
    few = measure(objective, metrics=("batches", "fisher-rao"), radii=(0.3,), seed=3)
    assert value(few, "m_sharpness@0.3") == ma.m_sharpness(objective, 0.3, 4, batches=2, seed=3).value
    assert value(few, "fisher_rao_norm") == ma.fisher_rao_norm(objective, samples=5, seed=3).value


@pytest.mark.parametrize(
    ("metrics", "message"),
    [((), "got 'none'"), (("loss", "flat"), r"metrics must be of loss, .*fisher-rao; got 'flat'")],
)
def test_unknown_metrics(metrics: Any, message: str, objective: ma.Objective) -> None:
    with pytest.raises(ValueError, match=message):
        measure(objective, metrics=metrics)


@pytest.mark.parametrize(
    ("curvature", "slope", "value_", "words"),
    [
        (2.0, 1.0, 2.0, "raises L; bracket"),
        (0.0, 1.0, 0.0, "raises L; bracket; no crossing"),
        (0.0, 0.0, math.nan, "raises L; bracket; zero direction"),
    ],
)
def test_the_row_says_what_was_found(curvature: float, slope: float, value_: float, words: str) -> None:
    matrix, vector = torch.full((1, 1), curvature).double(), torch.full((1,), slope).double()
    model = Quadratic(matrix, vector, 1.0)
    found = measure(ma.Objective(model, mean_output, ONE_SAMPLE), metrics=("critical_sharpness",))
    (row,) = [dict(one) for one in found.rows if one["metric"] == "critical_sharpness"]
    assert row["value"] == pytest.approx(value_, nan_ok=True)
    assert row["meaning"].endswith(words)
    assert row["converged"] is (True if slope else None)
    assert math.isnan(row["uncertainty"]) is not bool(slope)


def test_a_model_without_a_matrix_has_no_relative_flatness() -> None:
    model = Quadratic(torch.eye(2).double(), torch.ones(2).double())
    objective = ma.Objective(model, mean_output, (torch.ones(1).double(), torch.zeros(1).double()))
    with pytest.raises(ValueError, match=r"needs a weight matrix, and the model has none: leave it out"):
        measure(objective, metrics=("flatness",))


# --- the command


FACTORIES = """
import torch
from torch import nn


def model():
    return nn.Linear(3, 2)


def data():
    return [(torch.eye(3), torch.tensor([0, 1, 1]))]
"""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("loss, flatness", ["examination", "loss", "gradient_norm", "weight_norm", "relative_flatness"]),
        ("all", None),
    ],
)
def test_the_command_measures_what_is_named(
    chosen: str, expected: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chosen_metrics.py").write_text(FACTORIES, encoding="utf-8")
    torch.save(nn.Linear(3, 2).state_dict(), "weights.pt")
    factories = ["--model", "chosen_metrics:model", "--data", "chosen_metrics:data"]
    monkeypatch.setattr(sys, "argv", ["msam-analysis", "measure", "weights.pt", *factories, "--metrics", chosen])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "chosen_metrics", raising=False)
    cli.main()
    with next(tmp_path.rglob("metrics.csv")).open(encoding="utf-8") as file:
        rows = [row["metric"] for row in csv.DictReader(file)]
    assert rows == expected or (
        expected is None and {"loss", "trace", "fisher_rao_norm", "m_sharpness@0.5"} <= set(rows)
    )
