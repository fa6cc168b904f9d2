"""Metrics that can be measured at the points of a slice, beside the loss.

A metric is any function ``f(objective, w)`` that returns a number or a flat tensor. A metric of the model's output
costs no forward pass of its own: an :class:`OutputMetric` sees the forward pass from which the loss is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msam_analysis.objective.objective import Objective
from msam_analysis.objective.vectors import widest
from msam_analysis.spectra.top import top_eigenvalues


@dataclass(frozen=True)
class OutputMetric:
    """A quantity of every sample, read off the output from which the loss is computed.

    Attributes
    ----------
    per_sample
        Function ``per_sample(output, target)`` that returns one number for each sample of a batch, shape ``(n,)``.
        ``None``: the loss of each sample.
    each
        Keep the values of all samples, shape ``(*grid, samples)``, instead of their mean.
    """

    per_sample: Callable[[Tensor, Tensor], Tensor] | None
    each: bool = False


Metric = OutputMetric | Callable[[Objective, Tensor], float | Tensor]


def _hits(output: Tensor, target: Tensor) -> Tensor:
    scores = isinstance(output, Tensor) and output.ndim >= 2
    if not scores or target.shape not in (output.shape, output.shape[:1] + output.shape[2:]):
        shapes = [tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__ for item in (output, target)]
        raise ValueError(
            "accuracy needs scores of shape (samples, classes, ...) and targets that are class indices or "
            f"probabilities; got {shapes[0]} and {shapes[1]}: write your own OutputMetric"
        )
    classes = target.argmax(1) if target.shape == output.shape else target
    hits = output.argmax(1) == classes
    return hits.to(widest(hits.device)).flatten(1).mean(1) if output.ndim > 2 else hits


accuracy = OutputMetric(_hits)
"""Fraction of samples whose class has the highest score."""

sample_losses = OutputMetric(None, each=True)
"""The loss of every sample, shape ``(*grid, samples)``."""


def top_eigenvalue(objective: Objective, w: Tensor) -> float:
    """Return ``λ1``, the largest eigenvalue of the Hessian at ``w``; see :func:`msam_analysis.top_eigenvalues`."""
    return float(top_eigenvalues(objective.hessian(w), 1).values[0])


def gradient_norm(objective: Objective, w: Tensor) -> float:
    """Return ``‖∇L(w)‖``, the L2 norm."""
    return float(torch.linalg.vector_norm(objective.gradient(w)))
