"""Whether a loss over batches is a mean over samples, and what its batches weigh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msam_analysis.objective import weighing as w
from msam_analysis.objective.batchnorm import batchnorm_layers
from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.examination import Check, ExaminationError
from msam_analysis.objective.nested import Batch, tensors_of
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
    divided = _divided(evaluation, batches)
    if divided is None:
        if w.contradict(sizes) and not isinstance(next(_returned(evaluation, [part]), None), tuple):
            raise ExaminationError(
                f"the tensors of a batch disagree about the number of samples (first dimensions {sizes[0]} in one "
                f"batch, {sizes[1]} in another): expected one number of samples; return (sum, count) from loss_fn"
            )
        return Check(question, "not checked", follows="the batch cannot be halved")
    return _judged(evaluation, question, divided, several=len(evaluation.batches) > 1)


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


Part = tuple[Batch, Any]
"""A batch, and what the loss returned on it."""
Divided = tuple[Part, list[tuple[Part, Part]]]
"""A batch, and its halves in every order that was tried."""


def _divided(evaluation: Evaluation, batches: Sequence[Batch]) -> Divided | None:
    """Return a batch and its halves, in its own order and in that of its last tensor, labels as a rule.

    It is that batch whose halves differ most in all that may be counted.
    """
    best: tuple[float, Batch] | None = None
    for batch in batches:
        pair = w.halves(batch)
        if pair is not None:
            shares = [count(pair[0]) / max(count(pair[0]) + count(pair[1]), 1.0) for _, count in w.candidates(batch)]
            uneven = max(shares) - min(shares)
            if best is None or uneven > best[0]:
                best = (uneven, batch)
    if best is None:
        return None
    whole = best[1] if best[0] > 0 else part_of(best[1])
    last = [tensor for tensor in tensors_of(whole) if tensor.ndim][-1]
    order = last.detach().reshape(len(last), -1).double().sum(1).argsort(stable=True)
    pieces = [piece for batch in (whole, w.rows(whole, order)) for piece in w.halves(batch) or ()]
    returned = list(_returned(evaluation, [whole, *pieces]))
    if len(returned) < 5:
        return None
    parts = list(zip([whole, *pieces], returned, strict=True))
    return parts[0], [(parts[1], parts[2]), (parts[3], parts[4])]


def _returned(evaluation: Evaluation, batches: Sequence[Batch]) -> Iterator[Any]:
    """Yield what the loss returns on batches; nothing more once it fails, or couples samples on purpose."""
    # Statistics of a batch, and random numbers.
    fixed = evaluation.view(batchnorm="eval", dropout=False, findings=replace(evaluation.findings, drawing=None))
    trial = on(fixed, batches)
    if any(layer.running_mean is None for layer in batchnorm_layers(trial.copy).values()):
        return
    with trial.evaluating() as stream:
        point = trial.leaves() if trial.findings.with_gradients else trial.views(None)
        constants, before = trial.constants(), stream.state
        for batch in trial.batches:
            trial.settle(point, constants)
            try:
                returned = trial.copy(batch)
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError):  # a loss that needs whole batches
                return
            if not same_state(before, stream.state):
                return
            yield _detached(returned)


def _detached(returned: Any) -> Any:
    if isinstance(returned, tuple):
        return tuple(item.detach() if isinstance(item, Tensor) else item for item in returned)
    if isinstance(returned, Tensor):
        return returned.detach()
    return returned


def _judged(evaluation: Evaluation, question: str, divided: Divided, *, several: bool) -> Check:
    (whole, returned), pairs = divided
    try:
        mean, count = _number(returned)
        numbers = [(*_number(first[1]), *_number(second[1])) for first, second in pairs]
    except ValueError:
        return Check(question, "not checked", follows="what loss_fn returns is neither a mean nor (sum, count)")
    if not all(math.isfinite(number) for row in numbers for number in (mean, row[0], row[2])):
        return Check(question, "not checked", follows="the loss is not finite")
    # Some models compute their loss in float32, whatever they are in.
    dtype = max(evaluation.precision, torch.float32, key=lambda kind: torch.finfo(kind).eps)

    def fits(weights: Sequence[tuple[float, float]]) -> bool:
        return all(
            a + b > 0 and close(mean, (a * one + b * two) / (a + b), dtype)
            for (a, b), (one, _, two, _) in zip(weights, numbers, strict=True)
        )

    one, _, two, _ = numbers[0]
    if isinstance(returned, tuple):
        counts = [(row[1], row[3]) for row in numbers]
        if all(close(count, a + b, torch.float32) for a, b in counts) and fits(counts):
            return Check(question, "holds", follows="batches weigh the counts that loss_fn returns")
        raise ExaminationError(
            f"loss_fn returns a pair that is no (sum, count): {count:.6g} on a batch, {counts[0][0]:.6g} and "
            f"{counts[0][1]:.6g} on its halves, and sums that do not add up: expected a sum over samples and their "
            "number; return the mean loss alone, without a metric beside it"
        )
    for words, counted in w.candidates(whole):
        if fits([(counted(first[0]), counted(second[0])) for first, second in pairs]):
            if words == "samples":
                return Check(question, "holds", apart(mean, (one + two) / 2))
            evaluation.findings.weighing = w.Weighing(words, counted)
            return Check(question, "adapted", follows=f"batches weigh their {words}, not their samples")
    if all(close(mean, row[0] + row[2], dtype) for row in numbers):
        evaluation.findings.weighing = w.Weighing("samples, the loss being their sum", w.SAMPLES.count, sums=True)
        return Check(question, "adapted", follows="sums of loss_fn are divided by the number of samples")
    if not several:
        return Check(question, "not checked", follows="the only batch is no mean of its halves; its size matters")
    raise ExaminationError(
        f"the loss of a batch, {mean:.6g}, is no mean over its samples: its halves have {one:.6g} and {two:.6g}: "
        "expected a mean, so that batches can be weighed; return (sum, count) from loss_fn, over tokens say, or "
        "give one batch, or examine=False if the loss couples the samples of a batch on purpose"
    )


def _number(returned: Any) -> tuple[float, float]:
    value, weight = w.mean_and_weight(returned, 1.0)
    return float(value), weight
