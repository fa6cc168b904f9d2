"""The error that comes from a finite sample: against textbook formulas, and by how often intervals hold the truth."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import msam_analysis as ma
from msam_analysis import results

from .cases import MLP, normal
from .oracles import trust_region_maximum

METHODS = ("jackknife", "bootstrap", "batch_means")
each_method = pytest.mark.parametrize("method", METHODS)
loose: Any = ma  # for mistakes that mypy would find


@dataclass(frozen=True)
class Rows:
    """Samples as rows of an array: what an interval needs to see of an objective, and nothing to pay for it."""

    x: NDArray[np.float64]

    @property
    def samples(self) -> int:
        return len(self.x)

    @property
    def settings(self) -> dict[str, int]:
        return {"samples": self.samples}

    def with_samples(self, indices: Tensor) -> Rows:
        return Rows(self.x[indices.numpy()])


def mean(rows: Rows) -> float:
    return float(rows.x[:, 0].mean())


def variance(rows: Rows) -> float:
    """With divisor m: biased by −σ²/m exactly."""
    return float(rows.x[:, 0].var())


def top(rows: Rows) -> float:
    """λ₁ of the Hessian of the mean of ``(xᵀw)² / 2``."""
    return float(np.linalg.eigvalsh(rows.x.T @ rows.x / rows.samples)[-1])


def exponential(samples: int, seed: int) -> Rows:
    return Rows(np.random.default_rng(seed).exponential(size=(samples, 1)))


def gaussian(samples: int, spectrum: list[float], seed: int) -> Rows:
    draw = np.random.default_rng(seed).standard_normal((samples, len(spectrum)))
    return Rows(draw * np.sqrt(spectrum))


def quiet(*args: Any, **kwargs: Any) -> results.DataInterval:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ma.ConvergenceWarning)
        return ma.data_interval(*args, **kwargs)


# --- formulas


@pytest.mark.parametrize("level", [0.68, 0.95])
def test_the_jackknife_of_a_mean_is_students_interval(level: float) -> None:
    rows = exponential(30, 0)
    result = ma.data_interval(rows, mean, replicates=30, level=level)
    low, high = scipy.stats.t.interval(level, 29, rows.x.mean(), scipy.stats.sem(rows.x[:, 0]))
    assert (float(result.low), float(result.high)) == pytest.approx((low, high), rel=1e-12)
    assert float(result.standard_error) == pytest.approx(scipy.stats.sem(rows.x[:, 0]), rel=1e-12)
    assert float(result.bias) == pytest.approx(0, abs=1e-12)


def test_batch_means_of_a_mean_are_students_interval_of_the_groups() -> None:
    rows = exponential(30, 0)
    result = ma.data_interval(rows, mean, method="batch_means", replicates=6)
    groups = result.replicates.numpy()
    low, high = scipy.stats.t.interval(0.68, 5, rows.x.mean(), scipy.stats.sem(groups))
    assert groups.mean() == pytest.approx(rows.x.mean(), rel=1e-12)  # every sample is in one group
    assert (float(result.low), float(result.high)) == pytest.approx((low, high), rel=1e-12)


def test_the_bootstrap_of_a_mean_has_its_known_error() -> None:
    rows = exponential(30, 0)
    result = ma.data_interval(rows, mean, method="bootstrap", replicates=4000)
    error = rows.x.std() / math.sqrt(30)
    assert float(result.standard_error) == pytest.approx(error, rel=0.05)  # four standard deviations of 4000 draws
    assert abs(float(result.bias)) < 4 * error / math.sqrt(4000)
    half = scipy.stats.t.ppf(0.84, 3999) * float(result.standard_error)
    assert float(result.high - result.low) == pytest.approx(2 * half, rel=1e-12)
    assert float(result.corrected) == pytest.approx(float(result.low + half), rel=1e-12)


def test_the_jackknife_removes_the_bias_of_a_variance_exactly() -> None:
    rows = exponential(30, 1)
    result = quiet(rows, variance, replicates=30)
    assert float(result.corrected) == pytest.approx(rows.x.var(ddof=1), rel=1e-12)
    assert float(result.value) == rows.x.var()


@pytest.mark.parametrize(("method", "replicates"), [("jackknife", 10), ("bootstrap", 50), ("batch_means", 5)])
def test_the_bias_of_a_variance_is_right_on_average(method: Any, replicates: int) -> None:
    biases = [
        float(quiet(exponential(40, seed), variance, method=method, replicates=replicates, seed=seed).bias)
        for seed in range(400)
    ]
    assert np.mean(biases) == pytest.approx(-1 / 40, abs=4 * float(np.std(biases)) / 20)


# --- coverage: 250 data sets each; a share of 0.68 is then known to ± 0.03

SPIKED = [10.0, 5.0, 3.0, *[1.0] * 5]
WIDE = [30.0, 20.0, *[1.0] * 38]
QUADRATIC = ([6.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.5], 0.3)


def rise(rows: Rows) -> float:
    """Largest rise within ρ of the mean of ``(xᵀe)² / 2 + gᵀe``."""
    return trust_region_maximum(rows.x.T @ rows.x / rows.samples, np.asarray(QUADRATIC[1]), QUADRATIC[2])


@dataclass(frozen=True)
class Problem:
    data: Callable[[int], Rows]
    metric: Callable[[Rows], float]
    truth: float


PROBLEMS = {
    "mean loss": Problem(lambda seed: exponential(100, seed), mean, 1.0),
    "top eigenvalue": Problem(lambda seed: gaussian(100, SPIKED, seed), top, 10.0),
    "top eigenvalue, fewer samples than parameters": Problem(lambda seed: gaussian(30, WIDE, seed), top, 30.0),
    "largest rise": Problem(
        lambda seed: gaussian(80, QUADRATIC[0], seed),
        rise,
        trust_region_maximum(np.diag(QUADRATIC[0]), np.asarray(QUADRATIC[1]), QUADRATIC[2]),
    ),
}
COVERAGE = [
    (name, method) for name in PROBLEMS for method in METHODS if (name, method) != ("largest rise", "bootstrap")
]


@pytest.mark.parametrize(("name", "method"), COVERAGE)
def test_intervals_hold_the_truth_as_often_as_they_say(name: str, method: Any) -> None:
    problem = PROBLEMS[name]
    number = 20 if method == "bootstrap" else None
    found = [
        quiet(problem.data(seed), problem.metric, method=method, replicates=number, seed=seed) for seed in range(250)
    ]
    held = np.mean([float(one.low) <= problem.truth <= float(one.high) for one in found])
    assert 0.58 <= held <= 0.78  # 0.68 ± 3 standard deviations; percentile intervals hold the third truth 0.3 times
    if name != "mean loss":
        values, biases = (np.array([float(getattr(one, key)) for one in found]) for key in ("value", "bias"))
        error = values.mean() - problem.truth
        assert error > 0, "a small sample looks sharper"
        assert abs(error - biases.mean()) < 0.5 * error, "most of that is known"


def test_intervals_of_another_level_hold_it_as_often_as_that() -> None:
    problem = PROBLEMS["top eigenvalue"]
    found = [quiet(problem.data(seed), problem.metric, level=0.95) for seed in range(250)]
    assert np.mean([float(one.low) <= 10 <= float(one.high) for one in found]) >= 0.88


def test_a_bias_too_large_to_correct_is_said() -> None:
    """An eigenvalue that occurs ten times is overestimated by the order of 1/√m: no interval here is right."""
    with pytest.warns(ma.ConvergenceWarning, match=r"bias.* 300 samples exceeds two standard errors.*more samples"):
        result = ma.data_interval(gaussian(300, [1.0] * 10, 0), top)
    assert float(result.bias) > 2 * float(result.standard_error)
    assert not result.converged
    assert result.failed == 0


# --- of an objective


def line(weight: float = 1.0, samples: int = 60) -> ma.Objective:
    """The mean of ``(w x)² / 2`` in ragged batches."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, weight)
    x = normal(samples, 1, seed=3)
    batches = list(zip(x.split(25), x.split(25), strict=True))
    return ma.Objective(model, lambda output, _: (output**2).mean() / 2, batches)


def samples_of(objective: ma.Objective) -> list[float]:
    return torch.cat([x for x, _ in objective.batches])[:, 0].tolist()


@each_method
def test_every_resample_is_made_of_the_data(method: Any) -> None:
    objective, seen = line(), []

    def spy(one: ma.Objective) -> Tensor:
        seen.append(samples_of(one))
        return one.loss()

    result = ma.data_interval(objective, spy, method=method, replicates=6)
    everything = samples_of(objective)
    assert seen[0] == everything
    assert len(seen) == 7
    places = [[everything.index(x) for x in one] for one in seen[1:]]
    assert all(one == sorted(one) for one in places), "in the order of the data"
    counts = np.bincount(np.concatenate(places), minlength=60)
    if method == "jackknife":
        assert [len(one) for one in places] == [50] * 6
        assert (counts == 5).all()
    elif method == "batch_means":
        assert [len(one) for one in places] == [10] * 6
        assert (counts == 1).all()
    else:
        assert [len(one) for one in places] == [60] * 6
        assert all(0.5 < len(set(one)) / 60 < 0.75 for one in places), "about 1 − 1/e of them differ"
    losses = [np.mean(np.square(one)) / 2 for one in seen[1:]]
    np.testing.assert_allclose(result.replicates, losses, rtol=1e-12)
    assert (result.samples, result.settings["samples"]) == (60, 60)


def test_the_value_is_the_metric_itself() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    pairs = ma.top_eigenvalues(objective, 2)
    result = quiet(objective, lambda one: ma.top_eigenvalues(one, 2), method="batch_means", replicates=2)
    assert torch.equal(result.value, pairs.values.double())
    assert result.low.shape == result.bias.shape == (2,)
    assert result.replicates.shape == (2, 2)


RESULTS: dict[str, tuple[Callable[[ma.Objective], Any], Callable[[Any], Any]]] = {
    "ball": (lambda one: ma.ball_sharpness(one, 0.1), lambda found: found.sharpness),
    "eigenvalues": (lambda one: ma.top_eigenvalues(one, 1), lambda found: found.values),
    "estimate": (lambda one: ma.trace(one, draws=3), lambda found: found.value),
    "float": (lambda one: float(one.loss()), lambda found: found),
    "array": (lambda one: one.hessian().matvec(torch.ones(1)).numpy(), lambda found: found),
    "list": (lambda one: [one.loss(), one.gradient().norm()], lambda found: found),
    "matrix": (lambda one: torch.ones(2, 3, dtype=torch.float32) * one.loss(), lambda found: found),
    "with a gradient": (lambda one: one.loss().requires_grad_(), lambda found: found.detach()),
}


@pytest.mark.parametrize("name", RESULTS)
def test_numbers_are_found_in_what_a_metric_returns(name: str) -> None:
    metric, number = RESULTS[name]
    result = quiet(line(), metric, method="batch_means", replicates=2)
    expected = np.asarray(number(metric(line())), dtype=np.float64)
    assert np.array_equal(result.value.numpy(), expected)
    assert result.value.dtype == result.low.dtype == result.replicates.dtype == torch.float64
    assert not result.value.requires_grad
    assert len(result.to_frame()) == expected.size


@each_method
def test_several_objectives_see_the_same_resamples(method: Any) -> None:
    """Losses of proportional weights: their ratio is the same on any samples, however much each varies."""
    result = ma.data_interval([line(1.0), line(2.0)], lambda a, b: b.loss() / a.loss(), method=method)
    np.testing.assert_allclose(result.replicates, 4.0, rtol=1e-12)
    assert result.converged
    assert float(result.high - result.low) < 1e-10
    assert result.settings["samples"] == 60


def test_settings_that_differ_are_left_out() -> None:
    x = normal(60, 1, seed=3)
    single = ma.Objective(line().model, lambda output, _: (output**2).mean() / 2, (x, x))
    result = ma.data_interval([line(), single], lambda a, b: a.loss() + b.loss())
    assert "batches" not in result.settings
    assert result.settings["samples"] == 60


# --- samples, seeds, and what stays as it was


def test_a_subset_is_drawn_without_replacement_and_counted() -> None:
    seen: list[list[float]] = []

    def spy(one: ma.Objective) -> Tensor:
        seen.append(samples_of(one))
        return one.loss()

    result = ma.data_interval(line(), spy, samples=24)
    assert result.samples == result.settings["samples"] == 24
    assert len(set(seen[0])) == 24
    assert set(seen[0]) < set(samples_of(line()))
    assert all(set(one) < set(seen[0]) for one in seen[1:]), "resamples are of the subset"
    assert float(result.value) == pytest.approx(np.mean(np.square(seen[0])) / 2, rel=1e-12)


@each_method
@pytest.mark.parametrize("samples", [None, 40])
def test_the_seed_decides(method: Any, samples: int | None) -> None:
    a, again, b = (
        ma.data_interval(line(), lambda one: one.loss(), method=method, samples=samples, seed=seed)
        for seed in (0, 0, 2**32)
    )
    assert torch.equal(a.replicates, again.replicates)
    assert not torch.equal(a.replicates.sort().values, b.replicates.sort().values)
    assert (float(a.value) == float(b.value)) == (samples is None)


@each_method
def test_global_generators_and_the_model_stay(method: Any) -> None:
    objective = line()
    state = (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())
    weights = objective.point()
    ma.data_interval(objective, lambda one: one.loss(), method=method, samples=30)
    assert (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()) == state
    assert torch.equal(objective.point(), weights)
    assert all(parameter.grad is None for parameter in objective.model.parameters())
    assert objective.samples == 60


def test_more_samples_make_it_narrower() -> None:
    """Four times the samples, half the standard error."""
    few, many = (ma.data_interval(exponential(m, 0), mean, replicates=50) for m in (500, 2000))
    assert float(few.standard_error / many.standard_error) == pytest.approx(2, rel=0.3)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    ma.data_interval(line(), lambda one: one.loss())
    assert capsys.readouterr().err == ""
    ma.data_interval(line(), lambda one: one.loss(), progress=True)
    assert "20/20" in capsys.readouterr().err


# --- what goes wrong


class Faulty:
    """A metric whose third measurement differs."""

    def __init__(self, third: Any) -> None:
        self.calls = 0
        self.third = third

    def __call__(self, one: Rows) -> Any:
        self.calls += 1
        if self.calls != 3:
            return mean(one)
        return self.third() if callable(self.third) else self.third


@each_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_failure_is_kept_and_counted(method: Any, bad: float) -> None:
    with pytest.warns(ma.ConvergenceWarning, match=r"NaN or infinite on 1 of \d+ resamples"):
        result = ma.data_interval(exponential(30, 0), Faulty(bad), method=method)
    assert result.failed == 1
    assert not result.converged
    assert torch.isfinite(result.replicates).sum() == len(result.replicates) - 1
    assert torch.isnan(result.low)
    assert torch.isnan(result.high)
    assert torch.isfinite(result.value)


def test_a_failure_leaves_the_other_numbers() -> None:
    metric = Faulty(lambda: [math.nan, 1.0])
    with pytest.warns(ma.ConvergenceWarning, match="NaN"):
        result = ma.data_interval(exponential(30, 0), lambda one: torch.as_tensor(metric(one)).expand(2))
    assert torch.isnan(result.low).tolist() == [True, False]
    assert result.failed == 1


def unsettled() -> float:
    warnings.warn("residuals are large", ma.ConvergenceWarning, stacklevel=2)
    return 1.0


def test_a_metric_that_does_not_converge_is_counted_in_one_warning() -> None:
    with pytest.warns(ma.ConvergenceWarning) as caught:
        result = ma.data_interval(exponential(30, 0), Faulty(unsettled), method="bootstrap")
    assert len(caught) == 1
    assert "1 of 51 measurements did not converge, the first: residuals are large" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert not result.converged


def test_other_warnings_are_passed_on() -> None:
    def old() -> float:
        warnings.warn("old", DeprecationWarning, stacklevel=2)
        return 1.0

    with pytest.warns(DeprecationWarning, match="old"):
        quiet(exponential(30, 0), Faulty(old), method="bootstrap")


def test_a_metric_that_raises_is_heard() -> None:
    def broken() -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        ma.data_interval(exponential(30, 0), Faulty(broken))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "method": (
        lambda: loose.data_interval(line(), mean, method="magic"),
        ValueError,
        "method must be one of.*'jackknife', 'bootstrap', 'batch_means'.*got 'magic'",
    ),
    "too many samples": (
        lambda: ma.data_interval(line(), mean, samples=61),
        ValueError,
        "samples must be an integer from 2 to the 60 that there are, got 61",
    ),
    "one sample": (lambda: ma.data_interval(line(), mean, samples=1), ValueError, "samples must be .* got 1"),
    "a fraction": (lambda: loose.data_interval(line(), mean, samples=0.5), ValueError, "samples must be .* got 0.5"),
    "one replicate": (
        lambda: ma.data_interval(line(), mean, method="bootstrap", replicates=1),
        ValueError,
        "replicates must be an integer of at least 2.*got 1",
    ),
    "more groups than samples": (
        lambda: ma.data_interval(line(), mean, samples=10, replicates=11),
        ValueError,
        "at most the 10 samples, got 11",
    ),
    "level": (
        lambda: ma.data_interval(line(), lambda one: one.loss(), level=68),
        ValueError,
        "level must lie between 0 and 1",
    ),
    "other data": (
        lambda: ma.data_interval([line(), line(samples=50)], lambda a, b: a.loss() - b.loss()),
        ValueError,
        r"on the same data, got numbers of samples \[50, 60\]",
    ),
    "no objective": (lambda: ma.data_interval([], mean), ValueError, r"expected one objective or several.*got .* \[\]"),
    "no number": (
        lambda: ma.data_interval(line(), lambda one: None),
        TypeError,
        "the metric returned NoneType: expected a number.*BallSharpness, Eigenpairs, Estimate; return a number",
    ),
    "another result": (
        lambda: ma.data_interval(line(), lambda one: ma.slice_1d(one, one.point(), points=3)),
        TypeError,
        "the metric returned Slice1D",
    ),
    "shapes": (
        lambda: ma.data_interval(exponential(30, 0), Faulty([1.0, 2.0])),
        ValueError,
        r"shape \(2,\) on a resample, \(\) on all samples: expected as many numbers",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_get_a_sentence(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


# --- the result


def test_the_result_survives_a_file(tmp_path: Path) -> None:
    result = ma.data_interval(line(), lambda one: [one.loss(), one.loss() * 2])
    loaded = ma.results.load(result.save(tmp_path / "interval.safetensors"))
    assert isinstance(loaded, results.DataInterval)
    assert torch.equal(loaded.replicates, result.replicates)
    frame = loaded.to_frame()
    assert frame.equals(result.to_frame())
    assert frame["index"].tolist() == [1, 2]
    assert frame.loc[0, ["samples", "replicates", "method", "failed"]].tolist() == [60, 20, "jackknife", 0]
    assert (frame["low"] < frame["value"]).all()
    assert (frame["value"] < frame["high"]).all()
