"""How momentum and gradient point to one another, and what a perturbation does to the loss."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from msam_analysis.momentum import gradients, momentum_buffers
from msam_analysis.vectors import widest


def momentum_gradient_cosine(optimizer: torch.optim.Optimizer) -> float:
    r"""Return ``cos(v_{t−1}, g_t) = ⟨v, g⟩ / (‖v‖ ‖g‖)`` over all parameters together (exhibit F2C).

    Call it after ``loss.backward()`` and before ``optimizer.step()``: then ``.grad`` holds the new gradient and the
    buffer is still the one that the last step was taken along. A negative value says that the last step overshot: going
    on along ``−v`` raises the loss of the new batch.

    Parameters
    ----------
    optimizer
        Any optimizer of :mod:`msam`, or of torch's SGD and Adam families. Nothing is changed.

    Returns
    -------
    float
        In [−1, 1]; NaN before the first step, when there is no momentum yet, or if either vector is zero.

    Raises
    ------
    RuntimeError
        No parameter has a gradient, or the optimizer keeps no momentum.

    Notes
    -----
    Parameters without a gradient, or without a buffer, count as zeros.
    """
    grads, buffers = gradients(optimizer), momentum_buffers(optimizer)
    if not buffers:
        return math.nan
    shared = [(buffers[parameter], grad) for parameter, grad in grads.items() if parameter in buffers]
    pairs = (shared, [(v, v) for v in buffers.values()], [(g, g) for g in grads.values()])
    # One transfer in all: a training loop that is watched must not wait for the device at every parameter.
    device = next(iter(grads.values())).device
    dot, vv, gg = torch.stack([_dot(pair, device) for pair in pairs]).tolist()
    norms = math.sqrt(vv) * math.sqrt(gg)
    return max(-1.0, min(1.0, dot / norms)) if norms > 0 else math.nan


def _dot(pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Sum of the dot products of pairs, on ``device``, accumulated in float64 (float32 where a device has none)."""
    total = torch.zeros((), dtype=widest(device), device=device)
    for a, b in pairs:
        wide = widest(a.device)
        dot = a.detach().reshape(-1).to(wide) @ b.detach().reshape(-1).to(device=a.device, dtype=wide)
        total += dot.to(total)
    return total
