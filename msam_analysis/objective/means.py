"""Whether a loss over batches is a mean over samples, and what its batches weigh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msam_analysis.objective import weighing as w
from msam_analysis.objective.batchnorm import batchnorm_layers
from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.examination import Check, ExaminationError
from msam_analysis.objective.nested import Batch
from msam_analysis.objective.randomness import same_state
from msam_analysis.objective.trial import apart, close, on, part_of


def is_mean(evaluation: Evaluation, part: Batch) -> Check:
    """Find out what batches weigh: the value of a batch is the weighted mean of the values of its halves."""
    question = "a mean over samples"
    loss_fn = evaluation.copy.loss_fn
    batches = list(evaluation.batches) if evaluation.batches.fits else [part]
    if all(w.is_pair(batch) for batch in batches):
        reduction = w.reduction_of(loss_fn)
        if reduction == "sum":
            evaluation.findings.weighing = w.Weighing("samples, the loss being their sum", w.SAMPLES.count, sums=True)
            return Check(question, "adapted", follows="sums of the criterion are divided by the number of samples")
        sizes_differ = any(len(set(w.leading_sizes(batch))) > 1 for batch in batches)
        if reduction == "mean" and (sizes_differ or w.needs_counting(loss_fn, batches)):
            found = _criterion(evaluation)
            if found is not None:
                return found
    sizes = [w.leading_sizes(batch) for batch in batches]
    compared = _halved(evaluation, batches)
    if compared is None:
        if w.contradict(sizes):
            raise ExaminationError(
                f"the tensors of a batch disagree about the number of samples (first dimensions {sizes[0]} in one "
                f"batch, {sizes[1]} in another): expected one number of samples; return (sum, count) from loss_fn"
            )
        return Check(question, "not checked", follows="the batch cannot be halved")
    return _judged(evaluation, question, compared, several=len(evaluation.batches) > 1)


def _criterion(evaluation: Evaluation) -> Check | None:
    """Weigh batches by what the criterion counts, where this is not samples."""
    counts = evaluation.criterion_counts()
    if any(math.isnan(count) for count in counts):
        return None
    sizes = evaluation.batches.sizes
    rates = [count / size for count, size in zip(counts, sizes, strict=True)]
    if max(rates) - min(rates) <= 1e-5 * max(rates):
        return Check("a mean over samples", "holds")
    evaluation.findings.weighing = w.Weighing("what the criterion counts", None)
    return Check(
        "a mean over samples",
        "adapted",
        follows="batches weigh what the criterion counts (labels, class weights, elements), not their samples",
    )


Halved = tuple[Batch, Batch, Batch, tuple[Any, Any, Any]]


def _halved(evaluation: Evaluation, batches: Sequence[Batch]) -> Halved | None:
    """Return a batch, its halves, and what the loss returned on them; that batch whose halves are the least alike."""
    best: tuple[float, Batch, Batch, Batch] | None = None
    for batch in batches:
        pair = w.halves(batch)
        if pair is not None:
            shares = [count(pair[0]) / max(count(pair[0]) + count(pair[1]), 1.0) for _, count in w.candidates(batch)]
            uneven = max(shares) - min(shares)
            if best is None or uneven > best[0]:
                best = (uneven, _shortened(batch, uneven), *pair)
    if best is None:
        return None
    whole = best[1]
    first, second = w.halves(whole) or (best[2], best[3])
    # What couples samples on purpose is left out: statistics of a batch, and random numbers.
    fixed = evaluation.view(batchnorm="eval", dropout=False, findings=replace(evaluation.findings, drawing=None))
    trial = on(fixed, [whole, first, second])
    with trial.evaluating() as stream:
        point = trial.leaves() if trial.findings.with_gradients else trial.views(None)
        constants, returned, before = trial.constants(), [], stream.state
        try:
            for batch in trial.batches:
                trial.settle(point, constants)
                returned.append(_detached(trial.copy(batch)))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError):  # a loss that needs whole batches
            return None
        if not same_state(before, stream.state) or _uses_batch_statistics(trial):
            return None
    return whole, first, second, (returned[0], returned[1], returned[2])


def _uses_batch_statistics(trial: Evaluation) -> bool:
    return any(layer.running_mean is None for layer in batchnorm_layers(trial.copy).values())


def _shortened(batch: Batch, uneven: float) -> Batch:
    """Return a part of a batch, where its halves are alike in all that may be counted; else all of it."""
    return batch if uneven > 0 else part_of(batch)


def _detached(returned: Any) -> Any:
    if isinstance(returned, tuple):
        return tuple(item.detach() if isinstance(item, Tensor) else item for item in returned)
    if isinstance(returned, Tensor):
        return returned.detach()
    return returned


def _judged(evaluation: Evaluation, question: str, halved: Halved, *, several: bool) -> Check:
    whole, first, second, returned = halved
    own = isinstance(returned[0], tuple)
    try:
        values = [w.mean_and_weight(item, 1.0) for item in returned]
    except ValueError:
        return Check(question, "not checked", follows="what loss_fn returns is neither a mean nor (sum, count)")
    (mean, count), (one, n_one), (two, n_two) = ((float(value), weight) for value, weight in values)
    if not all(map(math.isfinite, (mean, one, two))):
        return Check(question, "not checked", follows="the loss is not finite")
    # Some models compute their loss in float32, whatever they are in.
    dtype = max(evaluation.precision, torch.float32, key=lambda kind: torch.finfo(kind).eps)

    def fits(a: float, b: float) -> bool:
        return close(mean, (a * one + b * two) / (a + b), dtype) if a + b > 0 else False

    if own:
        if close(count, n_one + n_two, torch.float32) and fits(n_one, n_two):
            return Check(question, "holds", follows="batches weigh the counts that loss_fn returns")
        raise ExaminationError(
            f"loss_fn returns a pair that is no (sum, count): {count:.6g} on a batch, {n_one:.6g} and {n_two:.6g} on "
            "its halves, and sums that do not add up: expected a sum over samples and their number; return the mean "
            "loss alone, without a metric beside it"
        )
    for words, counted in w.candidates(whole):
        if fits(counted(first), counted(second)):
            if words == "samples":
                return Check(question, "holds", apart(mean, (one + two) / 2))
            evaluation.findings.weighing = w.Weighing(words, counted)
            return Check(question, "adapted", follows=f"batches weigh their {words}, not their samples")
    if close(mean, one + two, dtype):
        evaluation.findings.weighing = w.Weighing("samples, the loss being their sum", w.SAMPLES.count, sums=True)
        return Check(question, "adapted", follows="sums of loss_fn are divided by the number of samples")
    if not several:
        return Check(question, "not checked", follows="the only batch is no mean of its halves; its size matters")
    raise ExaminationError(
        f"the loss of a batch, {mean:.6g}, is no mean over its samples: its halves have {one:.6g} and {two:.6g}: "
        "expected a mean, so that batches can be weighed; return (sum, count) from loss_fn, over tokens say, or "
        "give one batch, or examine=False if the loss couples the samples of a batch on purpose"
    )
