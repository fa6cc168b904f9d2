"""Traces and densities of operators that are degenerate, and the parts of them that theory fixes exactly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import msam_analysis as ma
from msam_analysis.results import ConvergenceWarning, SpectralDensity

from . import cases
from .oracles import symmetric

HESSIAN_LIKE = [20.0, 8.0, 7.0, 5.0, *np.linspace(0.5, -0.5, 115), -4.0]


def distance(found: SpectralDensity, spectrum: Any) -> float:
    """Return the 1-Wasserstein distance to the eigenvalues, relative to their spread."""
    weights = torch.where(found.probe < 0, found.weights, found.weights / max(found.probes, 1))
    apart = scipy.stats.wasserstein_distance(found.nodes.numpy(), spectrum, weights.numpy())
    return float(apart) / max(float(np.ptp(spectrum)), 1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nodes_and_weights_are_close_to_the_eigenvalues(dtype: torch.dtype) -> None:
    operator = ma.MatrixOperator(symmetric(HESSIAN_LIKE, seed=1).to(dtype))
    taken_out = ma.spectral_density(operator)
    plain = ma.spectral_density(operator, extremes=0)
    assert distance(taken_out, HESSIAN_LIKE) < 1e-3
    assert distance(taken_out, HESSIAN_LIKE) < distance(plain, HESSIAN_LIKE) / 5
    assert plain.hvps == 400


def test_steps_have_the_moments_that_quadrature_promises() -> None:
    """Four steps give the first seven moments of what a probe sees; the weights are squared *first* components."""
    matrix = symmetric([3.0, 1.0, 0.5, -0.2, -1.0, *np.linspace(1, 2, 15)], seed=2)
    found = ma.spectral_density(ma.MatrixOperator(matrix), probes=3, steps=4, extremes=0, seed=5)
    more = ma.spectral_density(ma.MatrixOperator(matrix), probes=3, steps=20, extremes=0, seed=5)
    for probe in range(3):
        few, many = found.probe == probe, more.probe == probe
        for order in range(8):
            expected = float((more.weights * more.nodes**order)[many].sum())
            got = float((found.weights * found.nodes**order)[few].sum())
            assert got == pytest.approx(expected, rel=1e-9)
        eighth = float((more.weights * more.nodes**8)[many].sum())
        assert float((found.weights * found.nodes**8)[few].sum()) != pytest.approx(eighth, rel=1e-9)
    assert bool(more.exhausted.all())


def test_a_share_lies_within_its_bracket() -> None:
    """For each probe's own measure the inequalities are theorems: more steps of the same probes fall inside."""
    operator = ma.MatrixOperator(symmetric(HESSIAN_LIKE, seed=3))
    few = ma.spectral_density(operator, probes=4, steps=8, extremes=0)
    all_of_it = ma.spectral_density(operator, probes=4, steps=120, extremes=0)
    places = torch.linspace(-5, 21, 300, dtype=torch.float64)
    rough, exact = few.cumulative(places), all_of_it.cumulative(places)
    assert bool((rough.low <= exact.value + 1e-9).all())
    assert bool((exact.value <= rough.high + 1e-9).all())
    above = few.share_above(places)
    torch.testing.assert_close(above.value + rough.value, torch.ones(300).double())
    torch.testing.assert_close(above.low + rough.high, torch.ones(300).double())


def test_the_error_of_a_share_is_honest() -> None:
    operator = ma.MatrixOperator(symmetric(HESSIAN_LIKE, seed=4))
    truth = float(np.mean(np.array(HESSIAN_LIKE) > 0.2))
    errors = []
    for seed in range(40):
        share = ma.spectral_density(operator, extremes=1, steps=60, seed=seed).share_above(0.2)
        errors.append((float(share.value) - truth) / float(share.standard_error))
    assert (np.abs(errors) < 2).mean() > 0.8
    assert abs(np.mean(errors)) < 0.6


def test_little_memory_gives_the_same_density() -> None:
    operator = ma.MatrixOperator(symmetric(HESSIAN_LIKE, seed=5))
    full = ma.spectral_density(operator)
    short = ma.spectral_density(operator, memory_bytes=45 * 120 * 8)
    assert (full.settings["reorthogonalised"], short.settings["reorthogonalised"]) == (True, False)
    assert distance(short, HESSIAN_LIKE) < 2e-3
    torch.testing.assert_close(short.top, full.top, rtol=1e-6, atol=0)


SPECTRA: dict[str, list[float]] = {
    "one": [-2.5],
    "zero": [0.0] * 12,
    "identity": [1.0] * 30,
    "rank one": [3.0] + [0.0] * 30,
    "two values": [1.0] * 10 + [-1.0] * 10,
    "indefinite": [5.0, 1.0, 0.5, -0.5, -8.0],
    "tiny": [1e-12 * value for value in (5, 4, 3, 2, 1, 0)],
}


@pytest.mark.parametrize("extremes", [0, 1, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_degenerate_spectra(name: str, extremes: int) -> None:
    spectrum = SPECTRA[name]
    found = ma.spectral_density(ma.MatrixOperator(symmetric(spectrum, seed=6)), extremes=extremes)
    scale = max(np.abs(spectrum).max(), 1e-30)
    below = np.unique(np.round(np.array(spectrum) / scale, 9))
    assert np.isin(np.round(found.nodes.numpy() / scale, 6), np.round(below, 6)).all()
    assert float(found.cumulative(2 * scale).value) == pytest.approx(1.0)
    assert float(found.cumulative(-2 * scale).value) == 0.0
    area = float(found.density.sum() * (found.values[1] - found.values[0]))
    assert area == pytest.approx(1.0, abs=1e-3)
    moment = found.moment(1)
    assert moment.value == pytest.approx(np.mean(spectrum), abs=5 * moment.standard_error + 1e-9 * scale)
    operator = ma.MatrixOperator(symmetric(spectrum, seed=6))
    for estimate in (ma.trace(operator), ma.trace(operator, method="hutch++")):
        assert estimate.value == pytest.approx(sum(spectrum), abs=5 * estimate.standard_error + 1e-9 * scale)


def test_a_sketch_of_everything_is_exact() -> None:
    found = ma.trace(ma.MatrixOperator(symmetric([3.0, -1.0, 0.5, 0.25])), method="hutch++", draws=30)
    assert found.value == pytest.approx(2.75)
    assert (found.standard_error, found.draws, found.evaluations) == (0.0, 0, 14)


class Broken(ma.MatrixOperator):
    def _apply_columns(self, matrix: Tensor) -> Tensor:
        return super()._apply_columns(matrix) * math.nan


def test_nan_stays_nan_or_is_an_error() -> None:
    methods: tuple[Any, ...] = ("hutchinson", "hutch++")
    for method in methods:
        found = ma.trace(Broken(torch.eye(9)), method=method, target_error=0.1)
        assert math.isnan(found.value)
        assert math.isnan(found.standard_error)
        assert found.evaluations <= 46
    for extremes in (0, 2):
        with pytest.raises(ValueError, match="the operator returned NaN or infinity: expected a finite Hessian"):
            ma.spectral_density(Broken(torch.eye(9)), extremes=extremes)


def test_ends_that_do_not_converge_are_flagged() -> None:
    operator = ma.MatrixOperator(symmetric(np.linspace(1, -1, 200), seed=7))
    with pytest.warns(ConvergenceWarning, match="spectral_density: after 15 .*raise max_hvps or tolerance") as caught:
        found = ma.spectral_density(operator, extremes=3, max_hvps=15, steps=10)
    assert caught[0].filename == __file__
    assert not found.converged
    assert distance(found, np.linspace(1, -1, 200)) < 0.05


def test_a_target_that_is_not_reached_is_flagged() -> None:
    operator = ma.MatrixOperator(symmetric([1.0, -1.0] * 30, seed=8))
    with pytest.warns(ConvergenceWarning, match=r"after 64 .*expected at most 0\.01 of it.*hutch\+\+") as caught:
        found = ma.trace(operator, target_error=0.01, max_draws=64)
    assert caught[0].filename == __file__
    assert (found.converged, found.evaluations, found.draws) == (False, 64, 64)
    assert ma.trace(operator).converged


def test_the_caller_s_autocast_has_no_effect() -> None:
    operator = ma.MatrixOperator(symmetric(HESSIAN_LIKE, seed=9).float())
    plain = ma.trace(operator, method="hutch++"), ma.spectral_density(operator, steps=5, extremes=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ma.trace(operator, method="hutch++"), ma.spectral_density(operator, steps=5, extremes=1)
    assert cast[0].value == plain[0].value
    assert torch.equal(cast[1].nodes, plain[1].nodes)


def test_a_linear_model_and_a_model_of_one_weight() -> None:
    linear = cases.Quadratic(torch.zeros(4, 4).double(), torch.ones(4).double())
    found = ma.spectral_density(ma.Objective(linear, cases.mean_output, cases.ONE_SAMPLE))
    assert float(found.nodes.abs().max()) == 0.0
    single = cases.Quadratic(torch.full((1, 1), -3.0).double(), torch.ones(1).double())
    objective = ma.Objective(single, cases.mean_output, cases.ONE_SAMPLE)
    assert ma.spectral_density(objective).nodes.tolist() == [-3.0]
    assert ma.trace(objective, method="hutch++").value == pytest.approx(-3.0)


def test_smoothing_again_is_smoothing_so_from_the_start() -> None:
    operator = ma.MatrixOperator(symmetric(HESSIAN_LIKE, seed=10))
    first = ma.spectral_density(operator)
    again = ma.spectral_density(operator, sigma=1.0, points=50)
    density, error = first.at(again.values, sigma=1.0)
    torch.testing.assert_close(density, again.density)
    torch.testing.assert_close(error, again.standard_error)
    assert len(again.values) == 50
    assert dataclasses.replace(first, sigma=1.0).at(again.values)[0].allclose(density)
