"""What the frameworks train: points in three sectors of a plane, and a small network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import msam

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "MSAM": lambda p: msam.MSAM(p, lr=0.1, rho=0.5, momentum=0.9, weight_decay=1e-3),
    "SAM": lambda p: msam.SAM(p, lr=0.1, rho=0.2, momentum=0.9, weight_decay=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
}


def samples(seed: int = 0, count: int = 96) -> tuple[Tensor, Tensor]:
    """Points on a plane, and which of three sectors each is in."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return x, ((torch.atan2(x[:, 1], x[:, 0]) + math.pi) / (2 * math.pi) * 3).long().clamp(0, 2)


def network(norm: bool = False) -> nn.Sequential:
    """Always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(nn.Linear(2, 16), *middle, nn.Tanh(), nn.Linear(16, 3))


@torch.no_grad()
def validation_loss(model: nn.Module) -> float:
    """Mean over the validation points, in eval mode."""
    x, y = samples(seed=1)
    mode = model.training
    model.eval()
    value = cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)
    model.train(mode)
    return float(value)


def now(model: nn.Module) -> list[Tensor]:
    """Copies of the weights as they are."""
    return [p.detach().clone() for p in model.parameters()]


def true_ones(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Copies of the true weights."""
    if not isinstance(optimizer, msam.PerturbedOptimizer):
        return now(model)
    with torch.inference_mode(False), optimizer.unperturbed():
        return now(model)


def windows(accumulate: int, epochs: int = 3) -> list[list[range]]:
    """The parts of 16 samples that are added up for each step; the last ones of an epoch may be fewer."""
    parts = [range(start, start + 16) for start in range(0, 96, 16)]
    return [parts[i : i + accumulate] for i in range(0, 6, accumulate)] * epochs


def by_hand(
    name: str, steps: list[list[range]], divisor: int | None = None, edit: Callable[[nn.Module], Any] = lambda _: None
) -> nn.Module:
    """A plain loop over the training points: every step takes the mean over its parts, SAM's two gradients alike.

    ``divisor`` is what the sum over the parts is divided by, if not their number; ``edit(model)`` is what happens to a
    gradient before a step, as clipping.
    """
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    x, y = samples()
    parts: list[range] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        values = [cross_entropy(model(x[list(part)]), y[list(part)]) for part in parts]
        value = torch.stack(values).sum() / (divisor or len(parts))
        torch.autograd.backward(value)
        edit(model)
        return value

    for parts[:] in steps:
        optimizer.step(closure)  # type: ignore[arg-type]  # torch says float, and takes what has one
    if isinstance(optimizer, msam.PerturbedOptimizer):
        optimizer.eval()
    return model
