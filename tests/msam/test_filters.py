"""One definition of normalisation layers, for perturbations and for objectives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import msam
import msam_analysis as ma


class LlamaRMSNorm(nn.Module):
    """Written by hand, as in many language models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Norm2d(LlamaRMSNorm):
    """A trailing dimension in its name."""


class Scale(LlamaRMSNorm):
    """Nothing in its name says what it does."""


class Normalizer(LlamaRMSNorm):
    """A name that only begins so."""


LAYERS: dict[str, tuple[nn.Module, bool]] = {
    "BatchNorm1d": (nn.BatchNorm1d(4), True),
    "BatchNorm2d": (nn.BatchNorm2d(4), True),
    "SyncBatchNorm": (nn.SyncBatchNorm(4), True),
    "InstanceNorm1d": (nn.InstanceNorm1d(4, affine=True), True),
    "GroupNorm": (nn.GroupNorm(2, 4), True),
    "LayerNorm": (nn.LayerNorm(4), True),
    "RMSNorm": (nn.RMSNorm(4), True),
    "LlamaRMSNorm": (LlamaRMSNorm(), True),
    "Norm2d": (Norm2d(), True),
    "Scale": (Scale(), False),
    "Normalizer": (Normalizer(), False),
    "Linear": (nn.Linear(4, 4), False),
}
FILTERS = {"msam": msam.normalization_layers, "msam_analysis": ma.normalization_layers}
each_filter = pytest.mark.parametrize("find", FILTERS.values(), ids=FILTERS)


@each_filter
def test_normalisation_layers(find: Callable[[nn.Module], msam.NamedSubset]) -> None:
    model = nn.ModuleDict({name: layer for name, (layer, _) in LAYERS.items()})
    chosen = find(model)
    found = {name for name, parameter in model.named_parameters() if chosen(name, parameter)}
    expected = {
        f"{name}.{own}" for name, (layer, is_norm) in LAYERS.items() if is_norm for own, _ in layer.named_parameters()
    }
    assert found == expected
    assert "RMSNorm.weight" in found


def test_layers_inside_a_normalisation_layer_do_not_count() -> None:
    outer = LlamaRMSNorm()
    outer.add_module("inner", nn.Linear(4, 4))
    assert msam.normalization_layers(nn.Sequential(outer)).names == {"0.weight"}
    assert msam.normalization_layers(outer).names == {"weight"}


def test_classes_may_be_named() -> None:
    model = nn.Sequential(Scale(), nn.LayerNorm(4))
    assert msam.normalization_layers(model, also=[Scale]).names == {"0.weight", "1.weight", "1.bias"}


def test_a_filter_knows_its_parameters_and_their_names() -> None:
    """By identity where an optimizer gives no names, by name for a copy of the model."""
    model, other = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    chosen = msam.normalization_layers(model)
    assert [chosen(None, p) for p in model.parameters()] == [False, False, True, True]
    assert [chosen(None, p) for p in other.parameters()] == [False] * 4
    assert [chosen(name, p) for name, p in other.named_parameters()] == [False, False, True, True]
