"""Trials of an evaluation: on other batches, in another precision, on a private copy of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from msam_analysis.objective.batches import Batches
from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.nested import Batch
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.objective.weighing import leading_sizes, rows

SAMPLES = 32
"""Samples of the first batch that are looked at, spread over it."""


def part_of(batch: Batch, most: int = SAMPLES) -> Batch:
    """Return some samples of a batch, spread over it; all of it where its tensors do not share a first dimension."""
    sizes = set(leading_sizes(batch))
    size = sizes.pop() if len(sizes) == 1 else 0
    return batch if size <= most else rows(batch, torch.linspace(0, size - 1, most).long())


def on(evaluation: Evaluation, batches: Sequence[Batch], dtype: torch.dtype | None = None) -> Evaluation:
    """Return an evaluation on other batches, with a private copy of its own."""
    cast = evaluation.cast if dtype is None else dtype
    held = Batches.of(batches, device=evaluation.device, dtype=cast)
    trial = evaluation.view(batches=held, cast=cast)
    if dtype is not None:
        trial.dtypes = dict.fromkeys(evaluation.dtypes, dtype)
        trial.dtype = dtype
    trial._weights = [1.0] * len(batches)
    trial.renew()
    return trial


def fewer(trial: Evaluation, batch: Batch) -> Evaluation:
    """Return a trial on another batch, with the same private copy."""
    other = trial.view(batches=Batches.of([batch], device=trial.device, dtype=trial.cast))
    other._weights = [1.0]
    return other


def value_of(
    trial: Evaluation, point: dict[str, Tensor], constants: dict[str, Tensor], stream: RandomStream
) -> tuple[float, Tensor]:
    """Return the loss of the trial's only batch as a number, and as it is."""
    loss = next(trial.batch_losses(point, constants, stream)).value
    return float(loss.detach()), loss


def close(one: float, other: float, dtype: torch.dtype, factor: float = 50) -> bool:
    """Whether two numbers are the same but for rounding; NaN is like NaN."""
    if math.isnan(one) or math.isnan(other) or math.isinf(one):
        return repr(one) == repr(other)
    return abs(one - other) <= factor * torch.finfo(dtype).eps * max(abs(one), abs(other), 1.0)


def apart(one: float, other: float) -> float:
    """Return the relative distance of two numbers."""
    return abs(one - other) / max(abs(one), abs(other), torch.finfo(torch.float64).tiny)
