"""Trials of an evaluation: on other batches, in another precision, on a private copy of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from msam_analysis.objective.batches import Batches
from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.nested import Batch
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.objective.vectors import no_autocast
from msam_analysis.objective.weighing import leading_sizes, rows

SAMPLES = 32
"""Samples of the first batch that are looked at, spread over it."""


def part_of(batch: Batch, most: int = SAMPLES) -> Batch:
    """Return some samples of a batch, spread over it; all of it where its tensors do not share a first dimension."""
    sizes = set(leading_sizes(batch))
    size = sizes.pop() if len(sizes) == 1 else 0
    if size <= most:
        return batch
    return rows(batch, torch.linspace(0, size - 1, most).long())


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


def close(one: float, other: float, dtype: torch.dtype, factor: float = 50) -> bool:
    """Whether two numbers are the same but for rounding; NaN is like NaN."""
    if math.isnan(one) or math.isnan(other) or math.isinf(one):
        return repr(one) == repr(other)
    return abs(one - other) <= factor * torch.finfo(dtype).eps * max(abs(one), abs(other), 1.0)


def value_of(
    trial: Evaluation, leaves: dict[str, Tensor], constants: dict[str, Tensor], stream: RandomStream
) -> tuple[float, list[Tensor]]:
    """Return the value of the first batch, and the losses with their graphs."""
    losses = list(trial.batch_losses(leaves, constants, stream))
    return float(losses[0].value.detach()), [loss.value for loss in losses]


@contextmanager
def deriving(trial: Evaluation) -> Iterator[RandomStream]:
    """Inside, passes run as those for gradients do."""
    with torch.enable_grad(), no_autocast(trial.device), trial.kernels(twice=False), RandomStream(trial.seed) as stream:
        yield stream


def apart(one: float, other: float) -> float:
    """Return the relative distance of two numbers."""
    return abs(one - other) / max(abs(one), abs(other), torch.finfo(torch.float64).tiny)
