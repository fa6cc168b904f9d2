"""No step reads a number back from the device: on the meta device, which has none, it would raise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import msam

# A meta device has no random generator to draw a direction from.
NAMES = [name for name in msam.PRESETS if "random" not in name]


def perturbation(name: str, model: nn.Module) -> msam.Perturbation:
    preset = msam.PRESETS[name]
    return preset(subset=msam.normalization_layers(model)) if name.startswith("bn_only") else preset()


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_reads_a_number_on_the_host(name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).to("meta")
    chosen = perturbation(name, model)
    optimizer: msam.PerturbedSGD | msam.PerturbedAdamW
    if name.startswith("adamw"):
        optimizer = msam.PerturbedAdamW(model.named_parameters(), lr=1e-3, perturbation=chosen)
    else:
        optimizer = msam.PerturbedSGD(
            model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, perturbation=chosen
        )
    for _ in range(3):
        give_gradients(model)
        if chosen.direction == "gradient":
            optimizer.first_step()
            give_gradients(model)
            optimizer.second_step()
        else:
            optimizer.step()
    optimizer.eval()
    optimizer.train()


def test_a_read_on_the_host_raises_here() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()
