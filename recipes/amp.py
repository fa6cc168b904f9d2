"""Automatic mixed precision with loss scaling: float16 on a GPU, bfloat16 on the CPU.

``scaler.step(optimizer)`` stands where ``step()`` or ``second_step()`` would. An overflow in either of SAM's passes
skips the step and leaves the true weights in place. SAM's normalised displacement sees neither the scale nor a clipped
length: unscale and clip the second gradient, which is the one of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from toy import accuracy, batches, network, report

import msam

EPOCHS = 15
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if torch.cuda.is_available() else torch.bfloat16


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss under autocast."""
    with torch.autocast(DEVICE, DTYPE):
        return cross_entropy(model(x.to(DEVICE)), y.to(DEVICE))


def train_msam() -> float:
    """As any other optimizer, gradient clipping included."""
    model = network().to(DEVICE)
    optimizer = msam.MSAM(model.parameters(), lr=0.05, rho=0.3, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(DEVICE)
    for x, y in batches(EPOCHS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    with optimizer.unperturbed():
        return accuracy(model)


def train_sam() -> float:
    """Both passes scaled by the same factor; the second gradient is clipped."""
    model = network().to(DEVICE)
    optimizer = msam.SAM(model.parameters(), lr=0.05, rho=0.05, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(DEVICE)
    for x, y in batches(EPOCHS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        optimizer.first_step(zero_grad=True)
        with msam.frozen_batchnorm_statistics(model):
            scaler.scale(loss_of(model, x, y)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return accuracy(model)


def main() -> None:
    """Train both."""
    report(f"MSAM, {DTYPE} on {DEVICE}", train_msam())
    report(f"SAM, {DTYPE} on {DEVICE}", train_sam())


if __name__ == "__main__":
    main()
