"""The examination of a model and its loss: five questions, asked once, on a part of the first batch.

Everything is tried on a copy of its own, so that nothing is left behind. What can be mended by evaluating in another
way is mended and noted (:class:`~msam_analysis.objective.evaluation.Findings`); what would give a wrong number is
refused in one sentence.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msam_analysis.objective import weighing as w
from msam_analysis.objective.batches import Batches
from msam_analysis.objective.batchnorm import batchnorm_layers
from msam_analysis.objective.evaluation import Evaluation, Findings
from msam_analysis.objective.examination import Check, Examination, ExaminationError
from msam_analysis.objective.graphs import loss_gradients, mean_gradient, pull_back
from msam_analysis.objective.nested import Batch, count_samples, tensors_of
from msam_analysis.objective.private import Attributes, Redirect
from msam_analysis.objective.randomness import RandomStream, same_state
from msam_analysis.objective.second_derivatives import (
    MissingDerivativeError,
    check_twice_differentiable,
    graph_nodes,
    missing_derivatives,
)
from msam_analysis.objective.vectors import gaussian, no_autocast, widest

_SAMPLES = 32  # of the first batch, spread over it
_FEW, _LARGE = 4, 10**6  # fewer samples of models with more parameters
_DOUBLE = 32 * 10**6  # parameters up to which derivatives are compared in float64, for its memory
# Relative steps of differences in float64: shorter ones meet fewer kinks, longer ones have more digits.
_STEPS = (1e-6, 1e-7, 1e-8)
_WRONG = 1e-3  # a relative difference that neither truncation nor rounding in float64 explains
# In float32, where a model cannot be evaluated in float64.
_COARSE_STEPS, _COARSELY_WRONG = (1e-3, 3e-3), 0.3


def examine(evaluation: Evaluation) -> Examination:
    """Examine an evaluation, and change its findings so that it gives right numbers or refuses.

    Returns
    -------
    Examination
        What was asked and answered.

    Raises
    ------
    ExaminationError
        The loss cannot be evaluated, is no function of the weights, is not this model's, or is not a mean.
    """
    with torch.inference_mode(mode=False):  # whose tensors have no versions and no gradients
        return _examine(evaluation)


def _examine(evaluation: Evaluation) -> Examination:
    findings = evaluation.findings
    batch = _part(next(iter(evaluation.batches)), _SAMPLES if evaluation.layout.size <= _LARGE else _FEW)
    trial = _on(evaluation, [batch])
    checks = [*_function(trial)]
    if findings != Findings():
        trial._copy_anew()
        evaluation._copy_anew()
    checks.append(_mean(evaluation, batch))
    slopes, precision, resolution = _derivatives(trial, batch)
    checks += slopes
    checks.append(_left_alone(findings))
    if findings != Findings():
        evaluation._copy_anew()
    evaluation._weights = None
    found = Examination(tuple(checks), count_samples(batch), precision, resolution)
    findings.examination = found
    return found


def _part(batch: Batch, most: int = _SAMPLES) -> Batch:
    """Return some samples of a batch, spread over it; all of it where its tensors do not share a first dimension."""
    sizes = set(w.leading_sizes(batch))
    size = sizes.pop() if len(sizes) == 1 else 0
    if size <= most:
        return batch
    return w.rows(batch, torch.linspace(0, size - 1, most).long())


def _on(evaluation: Evaluation, batches: Sequence[Batch], dtype: torch.dtype | None = None) -> Evaluation:
    """Return an evaluation on other batches, with a private copy of its own."""
    cast = evaluation.cast if dtype is None else dtype
    held = Batches.of(batches, device=evaluation.device, dtype=cast)
    trial = evaluation.view(batches=held, cast=cast)
    if dtype is not None:
        trial.dtypes = dict.fromkeys(evaluation.dtypes, dtype)
        trial.dtype = dtype
    trial._weights = [1.0] * len(batches)
    trial._copy_anew()
    return trial


def _close(one: float, other: float, dtype: torch.dtype, factor: float = 50) -> bool:
    if math.isnan(one) or math.isnan(other) or math.isinf(one):
        return repr(one) == repr(other)
    return abs(one - other) <= factor * torch.finfo(dtype).eps * max(abs(one), abs(other), 1.0)


# --------------------------------------------------------------------------- is it a function, and is it this model's?


def _function(trial: Evaluation) -> Iterator[Check]:
    """Ask whether the value is one number, with and without gradients, and comes from the private copy alone."""
    findings, copy = trial.findings, trial.copy
    slots = copy.slots()
    copy.redirect = {number: slots[name][0] for number, name in trial._outer.items()}
    leaves, constants = trial.leaves(), {name: tensor.clone() for name, tensor in trial.constants().items()}
    before = Attributes(copy)
    with _deriving(trial) as stream:
        with _explained(trial):
            value, ends = _value(trial, leaves, constants, stream)
        findings.redirected = copy.reached
        written = {f"model.{name}": leaf for name, leaf in leaves.items()} | constants
        buffers = {name for name, _ in trial.original.named_buffers()}
        findings.written = frozenset(n for n, tensor in written.items() if tensor._version and n not in buffers)
        outside = _outside(leaves, ends)
        changed = before.changed()
        again, _ = _value(trial, leaves, constants, stream)
    if not _close(value, again, trial.precision, factor=16):
        raise ExaminationError(
            f"the loss is {value:.6g} and, at the same weights again, {again:.6g}: expected a function of the weights "
            "alone; something is kept from call to call (a recurrent state, a counter, random numbers of its own): "
            "reset it in forward"
        )
    findings.restored = changed
    if changed:
        before.restore()
        copy.fresh = before
    yield Check(
        "one value at the same weights",
        "adapted" if changed else "holds",
        _apart(value, again),
        changed * ("forward writes to attributes of the model, which are put back before every pass"),
    )
    yield from _belongs(findings, outside)
    yield _without_gradients(trial, value)


def _value(
    trial: Evaluation, leaves: dict[str, Tensor], constants: dict[str, Tensor], stream: RandomStream
) -> tuple[float, list[Tensor]]:
    losses = list(trial.batch_losses(leaves, constants, stream))
    return float(losses[0].value.detach()), [loss.value for loss in losses]


@contextmanager
def _deriving(trial: Evaluation) -> Iterator[RandomStream]:
    """Inside, passes run as those for gradients do."""
    with torch.enable_grad(), no_autocast(trial.device), trial.kernels(twice=False), RandomStream(trial.seed) as stream:
        yield stream


@contextmanager
def _explained(trial: Evaluation) -> Iterator[None]:
    """Say in a sentence what went wrong at the first evaluation of a model on somebody's batch."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        if _raised_on_purpose(error):
            raise
        batch = next(iter(trial.batches))
        kind = "(input, target)" if w.is_pair(batch) else _structure(batch)
        call = "loss_fn(model(input), target)" if w.is_pair(batch) else "loss_fn(model, batch)"
        raise ExaminationError(
            f"the loss cannot be evaluated: {call} on a batch of the kind {kind} raised {type(error).__name__} "
            f"({str(error).splitlines()[0] if str(error) else 'without a message'}): expected a model and a loss_fn "
            "that fit the batches; a criterion(output, target) takes batches (input, target), any other batch goes as "
            "a whole to loss_fn(model, batch)"
        ) from error


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether an error comes from a ``raise`` of the user's or of ours, and not from inside of torch."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (last.line or "").startswith("raise") and f"{os.sep}torch{os.sep}" not in last.filename


def _structure(batch: Batch) -> str:
    inside = ", ".join(map(str, batch)) if isinstance(batch, dict) else f"{len(list(tensors_of(batch)))} tensors"
    return f"{type(batch).__name__} ({inside})"


def _outside(leaves: dict[str, Tensor], ends: Iterable[Tensor]) -> list[Tensor]:
    """Return the trainable tensors in which the graph of the loss ends and that are no leaves of ours."""
    own = {id(leaf) for leaf in leaves.values()}
    found = [node.variable for node in graph_nodes(ends) if hasattr(node, "variable")]
    return [tensor for tensor in found if id(tensor) not in own]


def _belongs(findings: Findings, outside: list[Tensor]) -> Iterator[Check]:
    if findings.redirected:
        yield Check(
            "the loss is that of the private copy",
            "adapted",
            follows="the loss or a forward uses the original's tensors, in whose place those of the private copy are "
            "put",
        )
    elif outside:
        yield Check(
            "the loss is that of the private copy",
            "holds",
            follows=f"{len(outside)} trainable tensors outside of the model are constants",
        )
    else:
        yield Check("the loss is that of the private copy", "holds")


def _without_gradients(trial: Evaluation, value: float) -> Check:
    """Compare the value with that of a pass without gradients, in which values are computed if they agree."""
    question = "one value with gradients and without"
    plain = math.nan
    try:
        with trial.evaluating() as stream:
            plain, _ = _value(trial, trial.views(None), trial.constants(), stream)
    except (RuntimeError, ValueError, TypeError):
        alike = False
    else:
        alike = _close(value, plain, trial.precision)
    if alike:
        return Check(question, "holds", _apart(value, plain))
    trial.findings.with_gradients = True
    return Check(
        question, "adapted", _apart(value, plain), "values are computed with gradients enabled, as derivatives are"
    )


def _apart(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), torch.finfo(torch.float64).tiny)


# ---------------------------------------------------------------------------------------- is it a mean over samples?


def _mean(evaluation: Evaluation, part: Batch) -> Check:
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
    trial = _on(fixed, [whole, first, second])
    with trial.evaluating() as stream:
        trial.settle(trial.leaves() if trial.findings.with_gradients else trial.views(None), trial.constants())
        before = stream.state
        try:
            returned = [_detached(trial.copy(batch)) for batch in trial.batches]
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError):  # a loss that needs whole batches
            return None
        if not same_state(before, stream.state) or _uses_batch_statistics(trial):
            return None
    return whole, first, second, (returned[0], returned[1], returned[2])


def _uses_batch_statistics(trial: Evaluation) -> bool:
    return any(layer.running_mean is None for layer in batchnorm_layers(trial.copy).values())


def _shortened(batch: Batch, uneven: float) -> Batch:
    """Return a part of a batch, where its halves are alike in all that may be counted; else all of it."""
    return batch if uneven > 0 else _part(batch)


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
    dtype = evaluation.precision

    def fits(a: float, b: float) -> bool:
        return _close(mean, (a * one + b * two) / (a + b), dtype, factor=200) if a + b > 0 else False

    if own:
        if _close(count, n_one + n_two, torch.float32) and fits(n_one, n_two):
            return Check(question, "holds", follows="batches weigh the counts that loss_fn returns")
        raise ExaminationError(
            f"loss_fn returns a pair that is no (sum, count): {count:.6g} on a batch, {n_one:.6g} and {n_two:.6g} on "
            "its halves, and sums that do not add up: expected a sum over samples and their number; return the mean "
            "loss alone, without a metric beside it"
        )
    for words, counted in w.candidates(whole):
        if fits(counted(first), counted(second)):
            if words == "samples":
                return Check(question, "holds", _apart(mean, (one + two) / 2))
            evaluation.findings.weighing = w.Weighing(words, counted)
            return Check(question, "adapted", follows=f"batches weigh their {words}, not their samples")
    if _close(mean, one + two, dtype, factor=200):
        evaluation.findings.weighing = w.Weighing("samples, the loss being their sum", w.SAMPLES.count, sums=True)
        return Check(question, "adapted", follows="sums of loss_fn are divided by the number of samples")
    if not several:
        return Check(question, "not checked", follows="the only batch is no mean of its halves; its size matters")
    raise ExaminationError(
        f"the loss of a batch, {mean:.6g}, is no mean over its samples: its halves have {one:.6g} and {two:.6g}: "
        "expected a mean, so that batches can be weighed; return (sum, count) from loss_fn, over tokens say, or "
        "give one batch, or examine=False if the loss couples the samples of a batch on purpose"
    )


# --------------------------------------------------------------------------------------- are its derivatives right?


def _derivatives(trial: Evaluation, batch: Batch) -> tuple[list[Check], str, float]:
    """Compare gradient and Hessian product with differences; say in what precision, and what rounding leaves."""
    wide = trial
    resolution = math.nan
    double = trial.autocast is None and widest(trial.device) == torch.float64 and trial.layout.size <= _DOUBLE
    if double:
        try:
            wide = _on(trial, [batch], torch.float64)
            with _deriving(wide) as stream, torch.no_grad():
                value, _ = _value(wide, wide.views(None), wide.constants(), stream)
            with trial.evaluating() as stream:
                own, _ = _value(
                    trial,
                    trial.leaves() if trial.findings.with_gradients else trial.views(None),
                    trial.constants(),
                    stream,
                )
            resolution = _apart(own, value)
            if not math.isfinite(value):
                return [Check("derivatives", "not checked", follows="the loss is not finite")], "", resolution
        except (RuntimeError, ValueError, TypeError):  # a model that insists on its own precision
            wide, double = trial, False
    if not double and trial.precision.itemsize < 4:
        follows = "half precision has too few digits for differences"
        return [Check("derivatives", "not checked", follows=follows)], "", resolution
    name = str(wide.dtype).removeprefix("torch.")
    steps, wrong = (_STEPS, _WRONG) if double else (_COARSE_STEPS, _COARSELY_WRONG)
    if trial.precision == torch.float64:
        steps, wrong = _STEPS, _WRONG
    try:
        checks = list(_compared(wide, steps, wrong))
    except ValueError as error:  # said by whoever asks for a gradient
        checks = [Check("derivatives", "not checked", follows=str(error))]
    if trial.findings.refusal:
        return checks, name, resolution
    return checks, name, resolution


def _compared(wide: Evaluation, steps: Sequence[float], wrong: float) -> Iterator[Check]:
    findings, layout = wide.findings, wide.layout
    leaves, constants = wide.leaves(), wide.constants()
    point = layout.flatten(leaf.detach() for leaf in leaves.values())
    sizes = layout.flatten(
        torch.full_like(leaf, max(float(leaf.detach().square().mean().sqrt()) if leaf.numel() else 0.0, 1e-3))
        for leaf in leaves.values()
    ).detach()
    along, across = (gaussian(layout.size, 1, seed=number, like=point)[:, 0] * sizes for number in (1, 2))
    gradient, products, reason = _exact(wide, leaves, constants, [along, across])
    scale = max(float((gradient * along).norm()), abs(float(gradient @ along)))
    best_slope, best_product = math.inf, math.inf
    for step in steps:
        (ahead, g_ahead), (behind, g_behind) = (
            mean_gradient(wide, wide.leaves(point + sign * step * along), constants) for sign in (1, -1)
        )
        noise = 64 * torch.finfo(wide.dtype).eps * max(abs(float(ahead)), 1e-8) / step
        off = abs(float(ahead - behind) / (2 * step) - float(gradient @ along))
        best_slope = min(best_slope, max(off - noise, 0.0) / max(scale, torch.finfo(wide.dtype).tiny))
        if products:
            curved = (g_ahead - g_behind) / (2 * step)
            size = max(float(products[0].norm()), float(curved.norm()))
            floor = 64 * torch.finfo(wide.dtype).eps * float(gradient.norm()) / step
            off = max(float((products[0] - curved).norm()) - floor, 0.0)
            best_product = min(best_product, off / max(size, torch.finfo(wide.dtype).tiny))
        if best_slope <= wrong and (not products or best_product <= wrong):
            break
    if best_slope > wrong:
        findings.refusal = (
            f"the gradient differs from differences of the loss by {best_slope:.0%} of itself: expected the derivative "
            "of what forward computes; a checkpoint with use_reentrant=True, a straight-through estimator, weights "
            "that forward changes or detaches may be why: use_reentrant=False, or measure values only"
        )
        yield Check("the gradient is that of the loss", "refused", best_slope, findings.refusal)
        return
    yield Check("the gradient is that of the loss", "holds", best_slope)
    if products:
        u, v = across, along
        sides = float(u @ products[0]), float(v @ products[1])
        spread = max(float((u * products[0]).norm()), float((v * products[1]).norm()), torch.finfo(wide.dtype).tiny)
        skew = abs(sides[0] - sides[1]) / spread
        if best_product > wrong:
            reason = f"they differ from differences of gradients by {best_product:.0%}"
        elif skew > wrong:
            reason = f"they are not symmetric, by {skew:.0%}"
        yield Check("Hessian products are symmetric", "adapted" if skew > wrong else "holds", skew)
    if reason and not wide.second_derivatives.central:
        wide.second_derivatives.doubt(reason)
    yield Check(
        "Hessian products are those of the gradient",
        "adapted" if reason else "holds" if products else "not checked",
        best_product if products else math.nan,
        reason and f"second derivatives are central differences of the gradient: {reason}",
    )


def _exact(
    wide: Evaluation, leaves: dict[str, Tensor], constants: dict[str, Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], str]:
    """Return the gradient, its exact products with vectors, and why there are none."""
    tensors = list(leaves.values())
    with torch.enable_grad(), no_autocast(wide.device), wide.kernels(twice=True), RandomStream(wide.seed) as stream:
        loss = next(wide.batch_losses(leaves, constants, stream))
        gradients = loss_gradients(loss.value, leaves, create_graph=True)
        flat = wide.layout.flatten(piece.detach() for piece in gradients)
        if wide.second_derivatives.central:
            return flat, [], ""
        try:
            with missing_derivatives():
                check_twice_differentiable([loss.value])
                pieces = [list(wide.layout.views(vector).values()) for vector in vectors]
                products = [pull_back(gradients, tensors, piece, together=False) for piece in pieces]
        except MissingDerivativeError:  # the operators find it, too, each in its own way
            return flat, [], ""
        except RuntimeError as error:
            return flat, [], str(error).split("\n", maxsplit=1)[0]
    return flat, [wide.layout.flatten(product) for product in products], ""


def _left_alone(findings: Findings) -> Check:
    question = "evaluating leaves everything alone"
    if findings.written:
        names = ", ".join(sorted(name.partition(".")[2] for name in findings.written)[:3])
        return Check(question, "adapted", follows=f"forward writes to {names}: it gets copies")
    return Check(question, "holds")


__all__ = ["Redirect", "examine"]
