"""Bases from vectors that depend on one another, wherever the dependent ones stand."""

from __future__ import annotations

import pytest
import torch

from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import gaussian


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 2, 1]])
def test_no_span_is_lost_to_dependent_columns(order: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    independent = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    columns = independent[:, order] * torch.tensor([1.0, -2.0, 0.5, 3.0, 1e-3], dtype=torch.float64)[: len(order)]
    basis = Space(len(columns)).orthonormalize(columns)
    assert basis.shape[1] == len(set(order))
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    torch.testing.assert_close(basis @ (basis.T @ columns), columns)


def test_what_is_orthogonalised_against_stays_out() -> None:
    generator = torch.Generator().manual_seed(1)
    against = torch.linalg.qr(torch.randn(30, 4, generator=generator, dtype=torch.float64))[0]
    inside = against @ torch.randn(4, 2, generator=generator, dtype=torch.float64)
    fresh = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    basis = Space(len(inside)).orthonormalize(torch.cat([inside, fresh], dim=1), against)
    assert basis.shape[1] == 1
    assert float((against.T @ basis).abs().max()) < 1e-14


def test_zero_columns_are_dropped() -> None:
    assert Space(5).orthonormalize(torch.zeros(5, 2)).shape == (5, 0)


def test_draws_for_other_uses_and_seeds_are_independent() -> None:
    like = torch.empty(0, dtype=torch.float64)
    keys = [(seed, use) for seed in range(5) for use in ("", "start", *(f"noise {draw}" for draw in range(40)))]
    draws = torch.cat([gaussian(2000, 1, seed=seed, like=like, use=use) for seed, use in keys], dim=1)
    cosines = draws.T @ draws / (draws.norm(dim=0)[:, None] * draws.norm(dim=0))
    assert float((cosines - torch.eye(len(keys), dtype=torch.float64)).abs().max()) < 0.12
    again = gaussian(2000, 1, seed=3, like=like, use="start")
    assert torch.equal(again[:, 0], draws[:, keys.index((3, "start"))])
