"""Curvature along momentum, gradient, random and eigenvectors, one at a time or together, against the dense Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import msam_analysis as ma

from .cases import CONVNET, normal
from .oracles import dense_hessian, flatten, reference_loss, symmetric


def test_every_direction_of_the_exhibit() -> None:
    model, data = CONVNET.model(), CONVNET.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        CONVNET.loss_fn(model(x), y).backward()
        optimizer.step()
    objective = ma.Objective(model, CONVNET.loss_fn, data)
    hessian = dense_hessian(reference_loss(CONVNET, model, data), flatten(model))
    directions: list[ma.Direction | Tensor] = [
        ma.directions.momentum(optimizer, objective),
        ma.directions.gradient(objective),
        ma.directions.random(objective, 3),
        ma.directions.eigenvector(objective),
        normal(objective.size, seed=8),
    ]
    together = ma.curvature_along(objective, directions).values
    assert together.shape == (5,)
    for direction, found in zip(directions, together.tolist(), strict=True):
        d = direction.vector if isinstance(direction, ma.Direction) else direction
        assert found == pytest.approx(float(d @ hessian @ d / (d @ d)), rel=1e-8)
        assert ma.curvature_along(objective, direction) == pytest.approx(found, rel=1e-12)
    assert float(together[3]) == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-6)


def test_a_direction_without_length_has_no_curvature() -> None:
    operator = ma.MatrixOperator(symmetric([3.0, 2.0, 1.0]))
    ones = torch.ones(3).double()
    found = ma.curvature_along(operator, [0 * ones, ones, math.nan * ones, -7 * ones, math.inf * ones]).values
    assert found.isnan().tolist() == [True, False, True, False, True]
    assert float(found[1]) == pytest.approx(float(found[3]))
    assert operator.products == 2
    assert math.isnan(ma.curvature_along(operator, 0 * ones))
    assert ma.curvature_along(operator, []).values.shape == (0,)
