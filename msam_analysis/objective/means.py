"""Whether a loss over batches is a mean over samples, and what its batches weigh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from msam_analysis.objective import weighing as w
from msam_analysis.objective.batchnorm import batchnorm_layers
from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.examination import Check, ExaminationError, Verdict
from msam_analysis.objective.nested import Batch, map_tensors, tensors_of
from msam_analysis.objective.private import is_pair
from msam_analysis.objective.randomness import same_state
from msam_analysis.objective.trial import SAMPLES, close, on, part_of

Item = TypeVar("Item")
Part = tuple[Batch, Any]
"""A batch, and what the loss returned on it."""
Divided = list[tuple[Part, Part, Part]]
"""Batches and their halves."""

_SUMS = w.Weighing("samples, the loss being their sum", w.SAMPLES.count, sums=True)


def is_mean(evaluation: Evaluation, part: Batch) -> Check:
    """Find out what batches weigh: the value of a batch is the weighted mean of the values of its halves."""
    loss_fn, ranks = evaluation.copy.loss_fn, evaluation.ranks
    batches = list(evaluation.batches) if evaluation.batches.fits else [part]
    if ranks.count > 1:  # what differs between batches of two processes differs from this one
        batches.insert(0, evaluation.batches.first())
    if not ranks.anywhere(not all(is_pair(batch) for batch in batches)):
        reduction = w.reduction_of(loss_fn)
        if reduction == "sum":
            evaluation.findings.weighing = _SUMS
            return _said("adapted", "sums of the criterion are divided by the number of samples")
        sizes_differ = any(len(set(w.leading_sizes(batch))) > 1 for batch in batches)
        if reduction == "mean" and ranks.anywhere(sizes_differ or w.needs_counting(loss_fn, batches)):
            found = _criterion(evaluation)
            if found is not None:
                return found
    sizes = _of_all(evaluation, [w.leading_sizes(batch) for batch in batches])
    # Halves of a loss in half precision look alike, whatever is counted.
    wide = torch.float32 if evaluation.precision.itemsize < 4 else None
    if wide is not None and next(_returned(evaluation, [part], wide), None) is None:
        wide = None  # a model that insists on its own precision
    divided = _divided(evaluation, batches, wide)
    if divided is None:
        if isinstance(next(_returned(evaluation, [part]), None), tuple):
            return _said("not checked", "batches weigh the counts that loss_fn returns")
        if w.contradict(sizes):
            raise ExaminationError(
                f"the tensors of a batch disagree about the number of samples (first dimensions {sizes[0]} in one "
                f"batch, {sizes[1]} in another): expected one number of samples; return (sum, count) from loss_fn"
            )
        if ranks.anywhere(len(batches) > 1 and _ambiguous(batches)):
            raise ExaminationError(
                "a mask or labels to be left out say another number of samples than the first tensor of a batch, and "
                "halves of a batch cannot tell which counts: expected no guess; return (sum, count) from loss_fn"
            )
        return _said("not checked", "the batch cannot be halved")
    return _judged(evaluation, divided, wide or evaluation.precision, several=len(evaluation.batches) > 1)


def _said(verdict: Verdict, follows: str = "") -> Check:
    return Check("mean", "a mean over samples", verdict, follows=follows)


def _ambiguous(batches: Sequence[Batch]) -> bool:
    """Whether what may be counted is not proportional from batch to batch."""
    (_, samples), *others = w.candidates(batches[0])
    rates = [[count(batch) / samples(batch) for batch in batches] for _, count in others]
    return any(max(row) - min(row) > 1e-6 * max(row) for row in rates)


def _criterion(evaluation: Evaluation) -> Check | None:
    """Weigh batches by what the criterion counts, where this is not samples."""
    counts = _of_all(evaluation, evaluation.criterion_counts())
    if any(math.isnan(count) for count in counts):
        return None
    sizes = _of_all(evaluation, evaluation.batches.own_sizes)
    rates = [count / size for count, size in zip(counts, sizes, strict=True)]
    if max(rates) - min(rates) <= 1e-5 * max(rates):
        return _said("holds")
    evaluation.findings.weighing = w.Weighing("what the criterion counts", None)
    return _said("adapted", "batches weigh what the criterion counts (labels, class weights, elements), not samples")


def _divided(evaluation: Evaluation, batches: Sequence[Batch], wide: torch.dtype | None) -> Divided | None:
    """Return samples of all batches and their halves, in their own order and in that of the last tensor (labels).

    The batch whose halves differ most in what may be counted comes first, unless these samples tell as much.
    """
    halved = [batch for batch in batches if w.halves(batch) is not None]
    spread = _spread(evaluation) if evaluation.batches.fits else None
    if spread is None:
        any_half = _largest(evaluation, [(0.0, batch) for batch in halved])
        spread = None if any_half is None else part_of(any_half)
    best = _largest(evaluation, [(unlike, batch) for batch in halved if (unlike := _unlike(batch)) > 0])
    wholes = [spread]
    if best is not None and not _tells(spread, best):
        part = part_of(best)
        wholes.insert(0, part if _tells(part, best) else best)
    divided: Divided = []
    for whole in wholes:
        if whole is None or w.halves(whole) is None:
            continue
        pieces = [piece for batch in (whole, _sorted(whole)) for piece in w.halves(batch) or ()]
        returned = list(_returned(evaluation, [whole, *pieces], wide))
        if len(returned) < 5:
            return None
        parts = list(zip([whole, *pieces], returned, strict=True))
        divided += [(parts[0], parts[1], parts[2]), (parts[0], parts[3], parts[4])]
    return divided or None


def _of_all(evaluation: Evaluation, mine: list[Item]) -> list[Item]:
    """Return what is known of the batches of this process, for those of all."""
    return [one for each in evaluation.ranks.everyone(mine) for one in each]


def _largest(evaluation: Evaluation, scored: list[tuple[float, Batch]]) -> Batch | None:
    """Return the batch with the largest score, the first of several, among those of all processes."""
    best = max(scored, key=lambda one: one[0], default=None)
    if best is not None and evaluation.ranks.count > 1:
        best = best[0], map_tensors(best[1], Tensor.cpu)
    best = max((one for one in evaluation.ranks.everyone(best) if one), key=lambda one: one[0], default=None)
    return None if best is None else map_tensors(best[1], lambda tensor: tensor.to(evaluation.device))


def _unlike(batch: Batch) -> float:
    """Return how much the halves of a batch differ in what may be counted: 0 where every count is cut alike."""
    one, two = w.halves(batch) or (batch, batch)
    shares = [count(one) / max(count(one) + count(two), 1.0) for _, count in w.candidates(batch)]
    return max(shares) - min(shares)


def _tells(samples: Batch, batch: Batch) -> bool:
    """Whether samples tell what is counted as well as a whole batch: the same may be, and differs in their halves."""
    if samples is None or [words for words, _ in w.candidates(samples)] != [words for words, _ in w.candidates(batch)]:
        return False
    return max(_unlike(samples), _unlike(_sorted(samples))) >= _unlike(batch) / 2


def _sorted(batch: Batch) -> Batch:
    """Return a batch in the order of its last tensor."""
    last = [tensor for tensor in tensors_of(batch) if tensor.ndim][-1]
    return w.rows(batch, last.detach().reshape(len(last), -1).cpu().double().sum(1).argsort(stable=True))


def _spread(evaluation: Evaluation) -> Batch | None:
    """Return a batch of samples spread over all batches; ``None`` where they cannot be in one."""
    count = evaluation.batches.samples
    chosen = torch.linspace(0, count - 1, min(count, SAMPLES)).long()
    try:
        return evaluation.batches.take(chosen, len(chosen)).first()
    except (ValueError, TypeError, IndexError, RuntimeError):
        return None


def _returned(evaluation: Evaluation, batches: Sequence[Batch], wide: torch.dtype | None = None) -> Iterator[Any]:
    """Yield what the loss returns on batches; nothing more once it fails, or couples samples on purpose.

    ``wide``: the precision to evaluate in instead of its own.
    """
    # Statistics of a batch and random numbers would couple samples.
    fixed = evaluation.view(batchnorm="eval", dropout=False, findings=replace(evaluation.findings, drawing=None))
    if wide is not None:
        fixed.autocast = None
    trial = on(fixed, batches, wide)
    if any(layer.running_mean is None for layer in batchnorm_layers(trial.copy).values()):
        return
    with trial.evaluating() as stream:
        point, constants, before = trial.pieces(), trial.constants(), stream.state
        for batch in trial.batches:
            trial.settle(point, constants)
            try:
                returned = trial.copy(batch)
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError):  # a loss that needs whole batches
                return
            if not same_state(before, stream.state):
                return
            yield map_tensors(returned, Tensor.detach) if isinstance(returned, tuple | Tensor) else returned


def _judged(evaluation: Evaluation, divided: Divided, precision: torch.dtype, *, several: bool) -> Check:
    """Say what batches weigh, from the values of batches and of their halves."""
    try:
        numbers = [tuple(_number(returned) for _, returned in row) for row in divided]
    except ValueError:
        return _said("not checked", "what loss_fn returns is neither a mean nor (sum, count)")
    if not all(math.isfinite(row[0][0]) for row in numbers):
        return _said("not checked", "the loss is not finite")
    # Some models compute their loss in float32, whatever they are in.
    dtype = max(precision, torch.float32, key=lambda kind: torch.finfo(kind).eps)

    def fits(weights: Sequence[tuple[float, float]]) -> bool:
        # A half where nothing counts has no mean.
        sums = [
            sum(n * value for n, (value, _) in zip(pair, row[1:], strict=True) if n)
            for pair, row in zip(weights, numbers, strict=True)
        ]
        return all(
            sum(pair) > 0 and close(row[0][0], total / sum(pair), dtype)
            for pair, row, total in zip(weights, numbers, sums, strict=True)
        )

    if isinstance(divided[0][0][1], tuple):
        counts = [(row[1][1], row[2][1]) for row in numbers]
        total = all(close(row[0][1], row[1][1] + row[2][1], torch.float32) for row in numbers)
        if total and fits(counts):
            return _said("holds", "batches weigh the counts that loss_fn returns")
        raise ExaminationError(
            f"loss_fn returns a pair that is no (sum, count): {numbers[0][0][1]:.6g} on a batch, {counts[0][0]:.6g} "
            f"and {counts[0][1]:.6g} on its halves, and sums that do not add up: expected a sum over samples and their "
            "number; return the mean loss alone, without a metric beside it"
        )
    for words, counted in w.candidates(divided[0][0][0]):
        if fits([(counted(first[0]), counted(second[0])) for _, first, second in divided]):
            if words == "samples":
                return _said("holds")
            evaluation.findings.weighing = w.Weighing(words, counted)
            return _said("adapted", f"batches weigh their {words}, not their samples")
    if all(close(row[0][0], row[1][0] + row[2][0], dtype) for row in numbers):
        evaluation.findings.weighing = _SUMS
        return _said("adapted", "sums of loss_fn are divided by the number of samples")
    (mean, _), (one, _), (two, _) = numbers[0]
    if not several:
        return _said("not checked", "the only batch is no mean of its halves; its size matters")
    raise ExaminationError(
        f"the loss of a batch, {mean:.6g}, is no mean over its samples: its halves have {one:.6g} and {two:.6g}: "
        "expected a mean, so that batches can be weighed; return (sum, count) from loss_fn, over tokens say, or "
        "give one batch, or examine=False if the loss couples the samples of a batch on purpose"
    )


def _number(returned: Any) -> tuple[float, float]:
    if isinstance(returned, tuple) and len(returned) == 2 and not float(returned[1]):
        return math.nan, 0.0  # nothing counts on this half
    value, weight = w.mean_and_weight(returned, 1.0)
    return float(value), weight
