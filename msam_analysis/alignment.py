"""How momentum and gradient point to one another, and what a perturbation does to the loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msam_analysis.momentum import gradients, momentum_buffers


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
    dot = sum((_dot(buffer, grad) for buffer, grad in shared), start=0.0)
    norms = math.sqrt(sum(_dot(v, v) for v in buffers.values())) * math.sqrt(sum(_dot(g, g) for g in grads.values()))
    return max(-1.0, min(1.0, dot / norms)) if norms > 0 else math.nan


def _dot(a: Tensor, b: Tensor) -> float:
    """Dot product accumulated in float64 (float32 where a device has no float64)."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    return float(a.detach().reshape(-1).to(wide) @ b.detach().reshape(-1).to(device=a.device, dtype=wide))
