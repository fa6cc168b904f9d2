"""Scores by hand; metrics and measurements of a run against the library's own calls."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.measures.summary import RADII, SIGMA, measure
from msam_analysis.results import (
    BallSharpness,
    ConvergenceWarning,
    CriticalSharpness,
    Eigenpairs,
    Estimate,
    Measurement,
    Result,
    Slice1D,
    Slice2D,
)
from msam_analysis.studies import measuring
from msam_analysis.studies.measuring import scores
from msam_analysis.studies.study import _examined as examined
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import Trained, train

from .toy import CLASSES, COARSE, FEATURES, TOY, Features


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(TOY, "MSAM", 0, every=10**9)


@pytest.fixture(scope="module")
def objective(trained: Trained) -> ma.Objective:
    return ma.Objective(trained.model, nn.CrossEntropyLoss(), TOY.train())


@pytest.fixture(scope="module")
def metrics(objective: ma.Objective) -> Measurement:
    return measure(objective)


# --- scores


class Fixed(nn.Module):
    """Logits that follow from the inputs alone; one parameter, without effect on the ranking."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1 : 1 + CLASSES] * self.scale


def test_scores_by_hand() -> None:
    """Means over samples, not over the ragged batches."""
    measured = scores(TOY, Fixed())
    for name, batches in (("train", TOY.train()), ("test", TOY.test())):
        right, loss, count = 0, 0.0, 0
        for x, y in batches:
            for sample, label in zip(x.double(), y.tolist(), strict=True):
                logits = [2.0 * float(value) for value in sample[1 : 1 + CLASSES]]
                loss += math.log(sum(math.exp(value) for value in logits)) - logits[label]
                right += logits.index(max(logits)) == label
                count += 1
        assert 0 < right < count
        assert measured[f"{name}_accuracy"] == pytest.approx(right / count, abs=1e-7)
        assert measured[f"{name}_loss"] == pytest.approx(loss / count, rel=1e-6)
    assert set(measured) == {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}


def test_scores_are_of_the_network_in_eval_mode(trained: Trained) -> None:
    """BatchNorm's running statistics are used, and stay as they are."""
    model = trained.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = scores(TOY, model)
    with torch.no_grad():
        logits = model.eval()(torch.cat([x for x, _ in TOY.test()]))
    labels = torch.cat([y for _, y in TOY.test()])
    assert measured["test_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert measured["test_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()), abs=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- the metrics of one network


def value(metrics: Measurement, name: str, column: str = "value") -> float:
    found = metrics.table.loc[metrics.table["metric"] == name, column]
    assert len(found) == 1, name
    return float(found.iloc[0])


def test_loss_and_norms(metrics: Measurement, objective: ma.Objective) -> None:
    for name, expected in (
        ("loss", objective.loss()),
        ("gradient_norm", objective.gradient().norm()),
        ("weight_norm", objective.point().norm()),
    ):
        assert value(metrics, name) == pytest.approx(float(expected), rel=1e-6)
        assert math.isnan(value(metrics, name, "uncertainty"))


def test_critical_sharpness(metrics: Measurement, objective: ma.Objective) -> None:
    expected = ma.critical_sharpness(objective)
    assert value(metrics, "critical_sharpness") == expected.value
    assert value(metrics, "critical_sharpness", "uncertainty") == expected.error
    assert metrics.table.set_index("metric").loc["critical_sharpness", "converged"]
    assert list(metrics.table["metric"])[4] == "critical_sharpness", "after the loss, before what costs more"
    assert isinstance(metrics.results["critical_sharpness"], CriticalSharpness)


def test_eigenvalues(metrics: Measurement, objective: ma.Objective) -> None:
    pairs = ma.top_eigenvalues(objective, 5)
    for index in range(5):
        assert value(metrics, f"lambda_{index + 1}") == float(pairs.values[index])
        assert value(metrics, f"lambda_{index + 1}", "uncertainty") == float(pairs.residuals[index])
    assert isinstance(metrics.results["eigenvalues"], Eigenpairs)


def test_trace(metrics: Measurement, objective: ma.Objective) -> None:
    expected = ma.trace(objective)
    assert value(metrics, "trace") == expected.value
    assert value(metrics, "trace", "uncertainty") == expected.standard_error
    # Against the trace itself: 5 standard errors.
    columns = [objective.hvp(column) for column in torch.eye(objective.size)]
    exact = sum(float(column[index]) for index, column in enumerate(columns))
    assert abs(expected.value - exact) < 5 * expected.standard_error + 1e-4 * abs(exact)


@pytest.mark.parametrize("radius", RADII)
def test_balls(radius: float, metrics: Measurement, objective: ma.Objective) -> None:
    expected = ma.ball_sharpness(objective, radius)
    assert value(metrics, f"ball_sharpness@{radius:g}") == expected.sharpness
    assert value(metrics, f"one_step_sharpness@{radius:g}") == expected.one_step
    assert expected.sharpness >= expected.one_step > 0
    ball = metrics.results[f"ball-{radius:g}"]
    assert isinstance(ball, BallSharpness)
    assert torch.equal(ball.displacement, expected.displacement)


def test_average(metrics: Measurement, objective: ma.Objective) -> None:
    expected = ma.average_sharpness(objective, SIGMA, adaptive=True)
    assert value(metrics, f"average_sharpness@{SIGMA:g}") == expected.value
    assert value(metrics, f"average_sharpness@{SIGMA:g}", "uncertainty") == expected.standard_error
    assert isinstance(metrics.results["average"], Estimate)


def test_choices(objective: ma.Objective) -> None:
    chosen = measure(objective, radii=(0.1, 0.2, 0.3), sigma=0.02, eigenvalues=2, seed=1)
    assert value(chosen, "ball_sharpness@0.3") == ma.ball_sharpness(objective, 0.3, seed=1).sharpness
    assert value(chosen, "average_sharpness@0.02") == ma.average_sharpness(objective, 0.02, adaptive=True, seed=1).value
    assert value(chosen, "trace") == ma.trace(objective, seed=1).value
    names = list(chosen.table["metric"])
    assert [name for name in names if name.startswith("lambda")] == ["lambda_1", "lambda_2"]
    assert len([name for name in names if name.startswith("ball_sharpness")]) == 3
    assert len(set(names)) == len(names)


def test_the_same_seed_gives_the_same_table(metrics: Measurement, objective: ma.Objective) -> None:
    pd.testing.assert_frame_equal(measure(objective).table, metrics.table, check_exact=True)


def test_every_number_has_a_meaning(metrics: Measurement) -> None:
    assert list(metrics.table.columns) == ["metric", "value", "uncertainty", "converged", "meaning"]
    assert metrics.table["meaning"].str.len().gt(0).all()
    assert metrics.table["value"].notna().all()


def test_fewer_parameters_than_eigenvalues() -> None:
    objective = ma.Objective(Fixed(), nn.CrossEntropyLoss(), TOY.train())
    names = list(measure(objective, eigenvalues=5).table["metric"])
    assert [name for name in names if name.startswith("lambda")] == ["lambda_1"]


def test_progress_is_told_before_each_metric(objective: ma.Objective) -> None:
    told: list[str] = []
    measure(objective, radii=(0.1,), metrics=("trace", "loss", "average"), tick=told.append)
    assert told == ["loss", "average", "trace"], "in the order of price"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radii": (-0.1,)}, "rho must be a number >= 0"),
        ({"radii": (math.nan,)}, "rho must be a number >= 0"),
        ({"sigma": -1.0}, "sigma must be a number >= 0"),
        ({"eigenvalues": 0}, "k must be between 1"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str, objective: ma.Objective) -> None:
    with pytest.raises(ValueError, match=message):
        measure(objective, **options)


# --- what a study measures on every run


def measured(trained: Trained) -> dict[str, Result]:
    subject = measuring.Subject(TOY, trained.model, trained.optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        parts = [row.of(subject, COARSE) for name, row in measuring.MEASURES.items() if name in measuring.SHARPNESS]
    return {name: result for part in parts for name, result in part.items()}


def test_a_report_says_for_how_many_networks_the_examination_passed(trained: Trained) -> None:
    results = measured(trained)
    without = {
        name: dataclasses.replace(result, settings={k: v for k, v in result.settings.items() if k != "examination"})
        for name, result in results.items()
    }
    runs = [
        FinishedRun("SGD", seed, {}, pd.DataFrame(), found) for seed, found in enumerate((results, results, without))
    ]
    head = "Examined before measuring: value, copy, mean, gradient, Hessian, no writes; "
    assert examined(runs[:2]) == f"{head}passed on 2 networks."
    assert examined(runs) == f"{head}passed on 2 networks, not recorded on 1 network."
    assert examined([]) == ""


def test_measurements_of_a_run(trained: Trained) -> None:
    """Every result is what the library's own call returns, on the training set, in eval mode, at the true weights."""
    results = measured(trained)
    assert list(results) == [
        "lanczos",
        "power",
        "ball-0.05",
        "ball-0.5",
        *(f"line-{name}" for name in measuring.LINES),
        "plane",
    ]
    objective = ma.Objective(trained.model, nn.CrossEntropyLoss(), TOY.train())
    objective.examine()  # its settings say so afterwards
    assert {tuple(result.settings.items()) for result in results.values()} == {tuple(objective.settings.items())}

    lanczos, power = results["lanczos"], results["power"]
    assert isinstance(lanczos, Eigenpairs)
    assert isinstance(power, Eigenpairs)
    assert torch.equal(lanczos.values, ma.top_eigenvalues(objective, 2).values)
    assert power.method == "power"
    torch.testing.assert_close(power.values, lanczos.values, rtol=1e-2, atol=0)

    previous = 0.0
    for radius in COARSE.radii:
        ball = results[f"ball-{radius:g}"]
        assert isinstance(ball, BallSharpness)
        assert ball.rho == radius
        assert float(ball.displacement.norm()) <= radius * (1 + 1e-5)
        rise = float(objective.loss(objective.point() + ball.displacement) - objective.loss())
        assert ball.sharpness == pytest.approx(rise, rel=1e-4)
        assert ball.sharpness >= previous, "a larger ball holds the smaller one"
        previous = ball.sharpness

    along = {
        "gradient": objective.gradient(),
        "momentum": ma.directions.momentum(trained.optimizer, objective).vector,
        "random": ma.directions.random(objective, COARSE.random_seed).vector,
    }
    for name, vector in along.items():
        line = results[f"line-{name}"]
        assert isinstance(line, Slice1D)
        assert len(line.coordinates) == COARSE.line_points
        assert line.center_loss == float(objective.loss())
        length = float(vector.norm()) if name == "random" else 1.0
        assert line.direction_norm == pytest.approx(length, rel=1e-5)
        step = float(line.coordinates[-1]) * length
        assert float(line.loss[-1]) == pytest.approx(
            float(objective.loss(objective.point() + step * vector / vector.norm())), rel=1e-4
        )

    plane = results["plane"]
    assert isinstance(plane, Slice2D)
    assert plane.loss.shape == (COARSE.plane_points, COARSE.plane_points)
    corner = float(plane.x[-1]) * along["random"]
    corner = corner + float(plane.y[-1]) * ma.directions.random(objective, COARSE.random_seed + 1).vector
    assert float(plane.loss[-1, -1]) == pytest.approx(float(objective.loss(objective.point() + corner)), rel=1e-4)


def test_measuring_leaves_the_network_as_it_was(trained: Trained) -> None:
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    measured(trained)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.model.state_dict().items())
    assert not trained.model.training


def test_error_rate() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(measuring.error_rate(logits, torch.tensor([1, 0, 0, 1]))) == 0.25


def test_a_single_layer_can_be_measured() -> None:
    """No BatchNorm, and biases whose filters are none."""
    model = nn.Sequential(Features(), nn.Linear(FEATURES - 1, CLASSES))
    objective = ma.Objective(model, nn.CrossEntropyLoss(), TOY.train())
    assert measure(objective).table["value"].notna().all()
