"""Measurements of groups of parameters, against the diagonal blocks of the dense Hessian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import CONVNET, MLP, PARTIAL, Case
from .oracles import dense_hessian, flatten, reference_loss


def blocks(case: Case, groups: dict[str, list[str]]) -> dict[str, Tensor]:
    """Cut the diagonal blocks of the given tensors out of the dense Hessian."""
    model = case.model()
    hessian = dense_hessian(reference_loss(case, model, case.data()), flatten(model))
    where, first = {}, 0
    for name, parameter in model.named_parameters():
        where[name] = range(first, first + parameter.numel())
        first += parameter.numel()
    indices = {group: [i for name in names for i in where[name]] for group, names in groups.items()}
    return {group: hessian[rows][:, rows] for group, rows in indices.items()}


GROUPS: dict[str, dict[str, list[str]]] = {
    "tensor": {name: [name] for name in ("0.weight", "0.bias", "3.weight", "3.bias")},
    "layer": {"0": ["0.weight", "0.bias"], "3": ["3.weight", "3.bias"]},
    "block": {"0": ["0.weight", "0.bias"], "3": ["3.weight", "3.bias"]},
}


@pytest.mark.parametrize("groups", GROUPS)
def test_eigenvalues_are_those_of_the_diagonal_blocks(groups: Any) -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    found = ma.by_layer(objective, lambda part: ma.top_eigenvalues(part, min(2, part.size)), groups=groups)
    expected = blocks(MLP, GROUPS[groups])
    assert list(found) == list(expected)
    for name, block in expected.items():
        values = torch.linalg.eigvalsh(block).flip(0)[:2]
        np.testing.assert_allclose(found[name].values.numpy(), values.numpy(), rtol=1e-6)


def test_trace_and_density_are_those_of_the_diagonal_blocks() -> None:
    objective = ma.Objective(CONVNET.model(), CONVNET.loss_fn, CONVNET.data())
    groups = {"first": ["0.weight"], "head": ["8.weight", "8.bias"]}
    traces = ma.by_layer(objective, ma.trace, groups=groups)
    densities = ma.by_layer(objective, ma.spectral_density, groups=groups)
    for name, block in blocks(CONVNET, groups).items():
        assert abs(traces[name].value - float(block.trace())) < 4 * traces[name].standard_error
        mean = float(block.trace()) / len(block)
        moment = densities[name].moment(1)
        assert moment.value == pytest.approx(mean, abs=4 * moment.standard_error + 1e-6 * abs(mean))
        assert float(densities[name].top[0]) == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6)


def test_sharpness_of_a_group_is_that_of_an_objective_with_its_parameters() -> None:
    model, data = MLP.model(), MLP.data()
    found = ma.by_layer(ma.Objective(model, MLP.loss_fn, data), lambda part: ma.ball_sharpness(part, rho=0.1))
    alone = ma.ball_sharpness(ma.Objective(model, MLP.loss_fn, data, parameters="3.*"), rho=0.1)
    assert found["3"].sharpness == alone.sharpness
    assert found["0"].sharpness != alone.sharpness


class Residual(nn.Module):
    """Names as in networks at large: numbered blocks within a trunk, and parts without a number."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)))
        self.model = nn.Sequential()
        self.model.stem, self.model.layers, self.model.head = nn.Linear(3, 3), layers, nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


def test_a_block_is_what_has_one_number() -> None:
    data = (torch.eye(3).double(), torch.ones(3, 1).double())
    objective = ma.Objective(Residual().double(), F.mse_loss, data)
    found = ma.by_layer(objective, lambda part: ma.trace(part, draws=2), groups="block")
    assert list(found) == ["model.stem", "model.layers.0", "model.layers.1", "model.head"]
    layers = ma.by_layer(objective, lambda part: ma.trace(part, draws=2), groups="layer")
    assert "model.layers.0.1" in layers
    assert len(layers) == 6


def test_only_what_the_objective_holds_is_grouped() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), parameters="*.weight")
    found = ma.by_layer(objective, lambda part: ma.trace(part, draws=2))
    assert [estimate.settings["parameters"] for estimate in found.values()] == [28, 21]


def test_the_table_names_the_group_first() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    frame = ma.layer_frame(ma.by_layer(objective, lambda part: ma.top_eigenvalues(part, 2)))
    assert list(frame.columns) == ["layer", "index", "value", "residual", "method", "converged"]
    assert frame["layer"].tolist() == ["0", "0", "3", "3"]
    assert frame.index.tolist() == [0, 1, 2, 3]
    assert next(iter(ma.layer_frame({"all": ma.trace(objective)}, name="group").columns)) == "group"


def test_an_error_names_the_group() -> None:
    objective = ma.Objective(PARTIAL.model(), PARTIAL.loss_fn, PARTIAL.data())
    with pytest.raises(ValueError, match=r"in the group 'unused': the loss depends on none of the 2 selected"):
        ma.by_layer(objective, ma.trace)
    groups = {"used": ["body.*", "head.*"]}
    assert list(ma.by_layer(objective, ma.trace, groups=groups)) == ["used"]


@pytest.mark.parametrize(
    ("groups", "said"),
    [("module", r"groups must be one of .*'layer'.* or a mapping .*got 'module'"), ({}, "groups is empty: expected")],
)
def test_groups_that_are_none(groups: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ma.by_layer(ma.Objective(MLP.model(), MLP.loss_fn, MLP.data()), ma.trace, groups=groups)


def test_an_empty_table() -> None:
    with pytest.raises(ValueError, match="no results to put into a table: expected those of by_layer"):
        ma.layer_frame({})
