"""A budget for the metrics, by a clock that the tests set, and metrics that were measured before."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import msam_analysis as ma
from msam_analysis.measures.summary import METRICS, measure
from msam_analysis.results import ConvergenceWarning, Measurement

from .cases import MLP


class Clock:
    """Seconds that pass when a test says so, and one for the gradient by which the prices are known."""

    def __init__(self, objective: ma.Objective, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        original = objective.loss_and_gradient

        def gradient(*arguments: Any) -> Any:
            self.now += not self.now
            return original(*arguments)

        patch.setattr(objective, "loss_and_gradient", gradient)
        module = sys.modules["msam_analysis.measures.summary"]
        patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.fixture
def objective() -> ma.Objective:
    return ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())


@pytest.fixture
def clock(objective: ma.Objective, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(objective, monkeypatch)


@pytest.fixture(autouse=True)
def unconverged() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def row(metrics: Measurement, name: str) -> dict[str, Any]:
    (found,) = [dict(one) for one in metrics.rows if one["metric"] == name]
    return found


def test_draws_are_cut_to_what_the_time_left_pays_for(objective: ma.Objective, clock: Clock) -> None:
    """A gradient takes a second here; a pair of losses is 0.8 of it, a product 2.5."""
    cut = measure(objective, metrics=("average", "trace"), budget=9.0)
    average, trace = row(cut, "average_sharpness@0.01"), row(cut, "trace")
    assert average["value"] == ma.average_sharpness(objective, 0.01, adaptive=True, draws=10).value
    assert average["meaning"].endswith("; the budget ended it after 10 of 50 draws")
    assert trace["value"] == ma.trace(objective, draws=3).value
    assert trace["meaning"].endswith("; the budget ended it after 3 of 30 products")
    assert cut.settings["cut"] == "average, trace"
    assert average["uncertainty"] > row(measure(objective, metrics=("average",)), average["metric"])["uncertainty"]


def test_eigenvalues_that_a_budget_ends_have_their_residuals(objective: ma.Objective, clock: Clock) -> None:
    cut = measure(objective, metrics=("eigenvalues",), budget=16.0)
    expected = ma.top_eigenvalues(objective, 5, max_hvps=6)
    assert not expected.converged
    for index in range(5):
        found = row(cut, f"lambda_{index + 1}")
        assert (found["value"], found["uncertainty"]) == (
            float(expected.values[index]),
            float(expected.residuals[index]),
        )
        assert found["converged"] is False
        assert "after 6 of 200 products" in found["meaning"]


def test_what_converges_within_its_share_is_not_cut(objective: ma.Objective, clock: Clock) -> None:
    """Fewer products than the most, but enough."""
    needed = ma.top_eigenvalues(objective, 1).hvps
    whole = measure(objective, metrics=("eigenvalues",), eigenvalues=1, budget=2.5 * needed + 4)
    assert row(whole, "lambda_1")["converged"]
    assert "budget" not in row(whole, "lambda_1")["meaning"]
    assert "cut" not in whole.settings


@pytest.mark.parametrize(("name", "price"), [("ball", 2.3), ("adaptive", 2.3)])
def test_balls_are_cut_each_for_itself(name: str, price: float, objective: ma.Objective, clock: Clock) -> None:
    cut = measure(objective, metrics=(name,), radii=(0.1, 3.0), budget=1.0 + 6.5 * price)
    adaptive = name == "adaptive"
    for radius in (0.1, 3.0):
        expected = ma.ball_sharpness(objective, radius, adaptive=adaptive, iterations=6, krylov_hvps=3)
        found = row(cut, f"{'adaptive_' if adaptive else ''}ball_sharpness@{radius:g}")
        assert found["value"] == expected.sharpness
        assert (f"after {expected.gradients} of 40 gradients" in found["meaning"]) is not expected.converged


def test_a_whole_second_ball_is_not_said_to_be_cut(
    objective: ma.Objective, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first ball's time was short."""
    short = iter([6, 40])
    module: Any = sys.modules["msam_analysis.measures.summary"]
    monkeypatch.setattr(module._Clock, "affords", lambda *_: next(short))
    cut = measure(objective, metrics=("ball",), radii=(3.0, 0.1), budget=2.0)
    assert "budget" in row(cut, "ball_sharpness@3")["meaning"]
    assert "budget" not in row(cut, "ball_sharpness@0.1")["meaning"]
    assert cut.settings["cut"] == "ball"


def test_batches_and_flatness_are_cut(objective: ma.Objective, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["msam_analysis.measures.summary"], "BATCH", 4)
    price = 2.3 * 40 * 4 / objective.samples
    cut = measure(objective, metrics=("batches", "flatness"), radii=(0.3,), budget=1.0 + 2.5 * price)
    assert row(cut, "m_sharpness@0.3")["value"] == ma.m_sharpness(objective, 0.3, 4, batches=2).value
    draws = int(2.5 * price / 2.5)
    assert row(cut, "relative_flatness")["value"] == ma.relative_flatness(objective, "3.weight", draws=draws).value
    assert cut.settings["cut"] == "batches, flatness"


def test_no_metric_is_begun_after_the_end(objective: ma.Objective, clock: Clock) -> None:
    def keep(name: str, _: Measurement) -> None:
        clock.now += 1000.0 * (name == "average")

    told: list[str] = []
    found = measure(objective, metrics=("trace", "loss", "average"), budget=500.0, keep=keep, tick=told.append)
    assert told == ["loss", "average"]
    assert found.settings["not measured"] == "trace"
    assert "cut" not in found.settings
    assert [one["metric"] for one in found.rows][-1] == "average_sharpness@0.01"


def test_the_examination_is_no_part_of_the_price(
    objective: ma.Objective, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes with the first evaluation, and costs many gradients."""
    original = objective.loss

    def examined(*arguments: Any) -> Any:
        clock.now += 30.0
        return original(*arguments)

    gradient = objective.loss_and_gradient

    def timed(*arguments: Any) -> Any:
        clock.now += 1.0
        return gradient(*arguments)

    monkeypatch.setattr(objective, "loss", examined)
    monkeypatch.setattr(objective, "loss_and_gradient", timed)
    cut = measure(objective, metrics=("trace",), budget=30.0 + 1.0 + 2.5 * 7)
    assert "after 7 of 30 products" in row(cut, "trace")["meaning"]


def test_without_a_budget_nothing_is_timed(objective: ma.Objective, clock: Clock) -> None:
    measure(objective, metrics=("average", "trace"))
    assert clock.now == 0.0


# --- known and kept


def test_each_metric_is_kept_as_soon_as_it_is_measured(objective: ma.Objective) -> None:
    kept: list[str] = []
    events: list[str] = []
    parts: dict[str, Measurement] = {}

    def keep(name: str, part: Measurement) -> None:
        events.append(f"kept {name}")
        kept.append(name)
        parts[name] = part

    chosen = ("eigenvalues", "loss", "trace")
    whole = measure(objective, metrics=chosen, keep=keep, tick=lambda name: events.append(f"begun {name}"))
    order = [name for name in METRICS if name in chosen]
    assert events == [f"{what} {name}" for name in order for what in ("begun", "kept")]
    assert [one for part in parts.values() for one in part.rows] == list(whole.rows)[1:]  # after the examination


@pytest.mark.parametrize("stop", range(4))
def test_what_is_known_is_taken_as_it_is(stop: int, objective: ma.Objective) -> None:
    """After a stop at any metric the end is that of one go, and nothing is measured twice."""
    chosen = ("loss", "average", "trace", "flatness")
    parts: dict[str, Measurement] = {}
    whole = measure(objective, metrics=chosen, keep=parts.__setitem__)
    known = {name: parts[name] for name in chosen[:stop]}
    told: list[str] = []
    again = measure(objective, metrics=chosen, known={**known, "fisher-rao": parts["loss"]}, tick=told.append)
    assert told == list(chosen[stop:])
    assert again.rows == whole.rows
    assert again.settings == whole.settings
    assert list(again.results) == list(whole.results)


def test_a_metric_that_was_cut_is_measured_again(objective: ma.Objective, clock: Clock) -> None:
    parts: dict[str, Measurement] = {}
    before = measure(objective, metrics=("trace",), budget=1.0 + 2.5 * 3, keep=parts.__setitem__)
    kept: dict[str, Measurement] = {}
    longer = measure(objective, metrics=("trace",), known=parts, keep=kept.__setitem__)
    assert row(longer, "trace")["value"] == ma.trace(objective).value
    assert list(kept) == ["trace"]
    assert row(before, "trace") == row(parts["trace"], "trace")


def test_a_shorter_budget_does_not_replace_what_a_longer_one_found(objective: ma.Objective, clock: Clock) -> None:
    parts: dict[str, Measurement] = {}
    longer = measure(objective, metrics=("trace",), budget=1.0 + 2.5 * 9, keep=parts.__setitem__)
    kept: dict[str, Measurement] = {}
    clock.now = 0.0
    shorter = measure(objective, metrics=("trace",), budget=1.0 + 2.5 * 3, known=parts, keep=kept.__setitem__)
    assert row(shorter, "trace") == row(longer, "trace")
    assert not kept

    def late(_: str) -> None:
        clock.now += 1000.0

    over = measure(objective, metrics=("loss", "trace"), budget=10.0, known=parts, tick=late)
    assert row(over, "trace") == row(longer, "trace"), "what is known stands where no time is left"
    assert "not measured" not in over.settings


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget must be a number of seconds above 0, or None; got 0"),
        ({"budget": -1.0}, r"got -1\.0"),
        ({"radii": (0.1, -0.1)}, r"rho must be a number >= 0, got -0\.1"),
        ({"sigma": float("nan")}, r"sigma must be a number >= 0, got nan"),
        ({"eigenvalues": 0}, r"k must be between 1"),
        ({"max_hvps": 4}, r"max_hvps must be at least k = 5, got 4"),
        ({"tolerance": 0.0}, r"tolerance must be a positive number"),
    ],
)
def test_options_out_of_range_are_told_before_anything_is_measured(
    options: dict[str, Any], message: str, objective: ma.Objective
) -> None:
    told: list[str] = []
    with pytest.raises(ValueError, match=message):
        measure(objective, tick=told.append, **options)
    assert not told


def test_options_of_metrics_that_are_not_asked_for_do_not_matter(objective: ma.Objective) -> None:
    assert measure(objective, metrics=("loss",), radii=(-1.0,), sigma=-1.0, max_hvps=0).rows


def test_a_large_network_has_a_krylov_start_within_memory(
    objective: ma.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its basis keeps two vectors a product; where not even twelve products fit, the gradient is the only start."""
    module = sys.modules["msam_analysis.measures.summary"]
    nbytes = 2 * objective.point().nbytes
    for products, options in ((13, {"krylov_hvps": 13}), (11, {"starts": ("gradient",)})):
        monkeypatch.setattr(module, "_BASIS_BYTES", products * nbytes)
        found = measure(objective, metrics=("ball",), radii=(0.5,))
        assert row(found, "ball_sharpness@0.5")["value"] == ma.ball_sharpness(objective, 0.5, **options).sharpness


def test_a_large_network_has_fewer_draws(objective: ma.Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number where it begins is set below this one's size."""
    monkeypatch.setattr(sys.modules["msam_analysis.measures.summary"], "_LARGE", objective.size)
    found = measure(objective, metrics=("average", "trace", "ball", "eigenvalues"), radii=(0.5,), tolerance=1e-12)
    assert row(found, "average_sharpness@0.01")["value"] == (
        ma.average_sharpness(objective, 0.01, adaptive=True, draws=16).value
    )
    assert row(found, "trace")["value"] == ma.trace(objective, draws=10).value
    assert row(found, "ball_sharpness@0.5")["value"] == ma.ball_sharpness(objective, 0.5, iterations=20).sharpness
    pairs = ma.top_eigenvalues(objective, 5, max_hvps=60, tolerance=1e-12)
    assert row(found, "lambda_5")["uncertainty"] == float(pairs.residuals[4])
    assert "cut" not in found.settings
