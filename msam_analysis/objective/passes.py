"""The batches that go through the network in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from msam_analysis.objective.nested import Batch, map_tensors

if TYPE_CHECKING:  # which makes passes
    from msam_analysis.objective.evaluation import Evaluation


class Pass(NamedTuple):
    """A batch that goes through the network."""

    number: int
    batch: Batch
    weight: float
    counts: bool = True


def passes(evaluation: Evaluation, weights: list[float]) -> Iterator[Pass]:
    """Yield this process's batches that weigh anything, and those of :func:`repeats`."""
    more = repeats(evaluation, weights)
    for index, batch, weight in zip(evaluation.batches.own, evaluation.batches, weights, strict=True):
        if weight:
            yield Pass(index, batch, weight)
    yield from more


def repeats(evaluation: Evaluation, weights: list[float]) -> Iterator[Pass]:
    """Return a batch that does not count, as often as other processes have more batches than this one.

    Processes that share the weights gather them together, so they make equally many passes. They agree on their number
    before the first.
    """
    if not evaluation.spread:
        return iter(())
    most, filler = _filler(evaluation, weights)
    missing = most - sum(weight != 0 for weight in weights)
    return (filler._replace(batch=map_tensors(filler.batch, _same)) for _ in range(missing))


def _filler(evaluation: Evaluation, weights: list[float]) -> tuple[int, Pass]:
    """Return the largest number of passes that a process makes, and the one that is repeated."""
    key, batches = tuple(weights), evaluation.batches
    if key not in evaluation.fillers:
        mine = [(index, weight) for index, weight in zip(batches.own, weights, strict=True) if weight]
        every = evaluation.ranks.everyone(mine)
        most, (index, weight) = max(map(len, every)), next(own[0] for own in every if own)
        (batch,) = batches.gathered([index])
        evaluation.fillers[key] = most, Pass(index, batch, weight, counts=False)
    return evaluation.fillers[key]


def _same(tensor: Tensor) -> Tensor:
    return tensor
