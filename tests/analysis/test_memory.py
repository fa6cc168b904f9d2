"""One budget of memory: what it is divided into, and who keeps to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis.measures import starts
from msam_analysis.objective.memory import Memory
from msam_analysis.objective.operators import ScaledOperator
from msam_analysis.spectra.subspace import Subspace

from .cases import normal

N = 2**20


def objective(**options: Any) -> ma.Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    data = [(normal(16, 30, seed=n), normal(16, 5, seed=n)) for n in range(3)]
    return ma.Objective(model, nn.MSELoss(), data, **options)


def test_shares() -> None:
    assert Memory.of(None, None, None) == Memory(2**30, 2 * 2**30, 4 * 2**30)
    assert Memory.of(8 * N, None, None) == Memory(N, 3 * N, 4 * N)
    assert Memory.of(8 * N, 5, 7) == Memory(7, 5, 4 * N)


@pytest.mark.parametrize("name", ["memory_bytes", "graph_bytes", "cache_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_no_number_of_bytes(name: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{name} must be a number of bytes, a whole number of at least 0, got {value}"
    ):
        objective(**{name: value})


def test_everybody_keeps_to_it() -> None:
    small, usual = objective(memory_bytes=8000), objective()
    assert usual.batches.fits
    assert not small.batches.fits
    v = normal(usual.size, seed=1)
    operators = [o.hessian() for o in (small, usual)]
    torch.testing.assert_close(operators[0] @ v, operators[1] @ v, rtol=1e-10, atol=1e-12)
    assert operators[0].kept < operators[1].kept == 3
    assert operators[0].memory_bytes == 4000
    assert ScaledOperator(operators[0], v).memory_bytes == 4000
    assert small.fisher().memory_bytes == small.gauss_newton().memory_bytes == 4000


def test_solvers_take_their_vectors_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[int] = []
    reserve = Subspace.__post_init__

    def noted(self: Subspace) -> None:
        columns.append(self.capacity)
        reserve(self)

    monkeypatch.setattr(Subspace, "__post_init__", noted)
    for share, basis, found in ((40, (40 - 7) // 2, 17), (1, 3, 8)):
        o = objective(memory_bytes=2 * share * 8 * objective().size)
        columns.clear()
        ma.top_eigenvalues(o, 1)
        assert columns == [basis]
        columns.clear()
        ball = ma.ball_sharpness(o, 0.3)
        assert columns == [found]
        assert ball.sharpness == pytest.approx(ma.ball_sharpness(objective(), 0.3).sharpness, rel=1e-3)
    assert starts._FEWEST == 8


def test_a_budget_of_its_own_counts_more() -> None:
    o = objective(memory_bytes=0)
    wide = ma.top_eigenvalues(o, 1, memory_bytes=100 * 8 * o.size)
    assert wide.hvps < ma.top_eigenvalues(o, 1).hvps
    density = ma.spectral_density(o, probes=2, steps=5, extremes=1)
    assert dict(density.settings)["reorthogonalised"] is False
    assert dict(ma.spectral_density(objective(), probes=2, steps=5, extremes=1).settings)["reorthogonalised"] is True
