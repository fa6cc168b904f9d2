"""Gradient accumulation: one step from the mean gradient of several small batches."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import accuracy, batches, network, report

import msam

EPOCHS = 20
PARTS = 4


def accumulate(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Add up the gradients of the parts; the parts are of one size, so their mean is the batch's."""
    for inputs, labels in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True):
        (cross_entropy(model(inputs), labels) / PARTS).backward()


def train_msam() -> float:
    """Step after the last part; all parts see the same perturbed weights."""
    model = network()
    optimizer = msam.MSAM(model.parameters(), lr=0.05, rho=0.3, momentum=0.9, weight_decay=5e-4)
    for x, y in batches(EPOCHS):
        optimizer.zero_grad()
        accumulate(model, x, y)
        optimizer.step()
    with optimizer.unperturbed():
        return accuracy(model)


def train_sam() -> float:
    """All parts at the true weights, then all parts again at the perturbed ones."""
    model = network()
    optimizer = msam.SAM(model.parameters(), lr=0.05, rho=0.05, momentum=0.9, weight_decay=5e-4)
    for x, y in batches(EPOCHS):
        optimizer.zero_grad()
        accumulate(model, x, y)
        optimizer.first_step(zero_grad=True)
        with msam.frozen_batchnorm_statistics(model):
            accumulate(model, x, y)
        optimizer.second_step()
    return accuracy(model)


def main() -> None:
    """Train both."""
    report(f"MSAM, {PARTS} parts a step", train_msam())
    report(f"SAM, {PARTS} parts a step", train_sam())


if __name__ == "__main__":
    main()
