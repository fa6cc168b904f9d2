"""What the recipes train on: two noisy spirals, drawn from a seed, and a small network with BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

BATCH = 32

torch.set_num_threads(1)  # threads would wait for one another longer than they would work on networks this small


def spirals(count: int = 640, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points of two intertwined spirals, shape (count, 2), and which of the two each belongs to, shape (count,)."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 2
    turn = 2 * math.pi * torch.rand(count, generator=generator).sqrt()
    angle = turn + math.pi * label
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 4
    return points + 0.05 * torch.randn(count, 2, generator=generator), label


def network(seed: int = 0) -> nn.Sequential:
    """Two hidden layers with BatchNorm; the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Linear(64, 2),
        )  # fmt: skip


def batches(epochs: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of the training points."""
    x, y = spirals()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            yield x[rows], y[rows]


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of fresh points classified rightly in eval mode; chance is 0.5."""
    x, y = spirals(seed=1)
    mode = model.training
    model.eval()
    device = next(model.parameters()).device
    right = (model(x.to(device)).argmax(1).cpu() == y).float().mean()
    model.train(mode)
    return float(right)


def report(name: str, reached: float, losses: Sequence[float] = ()) -> None:
    """Print what was reached, and where the validation loss went if it was kept; insist that it was worth training."""
    fall = f", validation loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
    print(f"{name:32s} accuracy {reached:.3f}{fall}")
    if reached < 0.9:
        raise RuntimeError(f"expected an accuracy of 0.9 at least from {name}, got {reached:.3f}; something is broken.")
