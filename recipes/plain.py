"""The plain loop: MSAM is a swap of one line, SAM takes the same step with a closure."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy import accuracy, batches, network, report, spirals

import msam

EPOCHS = 15


def train_msam() -> float:
    """One gradient a step; between steps the parameters are the perturbed ones."""
    model = network()
    optimizer = msam.MSAM(model.parameters(), lr=0.05, rho=0.3, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * 20)
    for x, y in batches(EPOCHS):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    # BatchNorm has seen perturbed weights: estimate its statistics anew, at the true ones
    msam.update_batchnorm_statistics(model, spirals()[0].split(128), optimizer)
    with optimizer.unperturbed():
        return accuracy(model)


def train_sam() -> float:
    """Two gradients a step, from a closure; BatchNorm collects statistics in the first pass only."""
    model = network()
    optimizer = msam.SAM(model.parameters(), lr=0.05, rho=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * 20)
    for x, y in batches(EPOCHS):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    return accuracy(model)  # between SAM's steps the parameters are the true ones


def main() -> None:
    """Train both."""
    report("MSAM", train_msam())
    report("SAM", train_sam())


if __name__ == "__main__":
    main()
