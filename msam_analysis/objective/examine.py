"""The examination of a model and its loss: five questions, asked once, on a part of the first batch.

Everything is tried on a copy of its own, so that nothing is left behind. What can be mended by evaluating in another
way is mended and noted (:class:`~msam_analysis.objective.evaluation.Findings`); what would give a wrong number is
refused in one sentence.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from msam_analysis.objective.differences import derivatives
from msam_analysis.objective.evaluation import Evaluation, Findings
from msam_analysis.objective.examination import Check, Examination, ExaminationError
from msam_analysis.objective.means import is_mean
from msam_analysis.objective.nested import Batch, count_samples, tensors_of
from msam_analysis.objective.private import Attributes, is_pair
from msam_analysis.objective.second_derivatives import graph_nodes
from msam_analysis.objective.trial import SAMPLES, apart, close, deriving, on, part_of, value_of

_FEW, _LARGE = 4, 10**6  # fewer samples of models with more parameters


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
    batch = part_of(next(iter(evaluation.batches)), SAMPLES if evaluation.layout.size <= _LARGE else _FEW)
    trial = on(evaluation, [batch])
    checks = [*_function(trial)]
    if findings != Findings():
        trial.renew()
        evaluation.renew()
    checks.append(is_mean(evaluation, batch))
    slopes, precision, resolution = derivatives(trial, batch)
    checks += slopes
    checks.append(_left_alone(findings))
    if findings != Findings():
        evaluation.renew()
    evaluation._weights = None
    found = Examination(tuple(checks), count_samples(batch), precision, resolution)
    findings.examination = found
    return found


def _function(trial: Evaluation) -> Iterator[Check]:
    """Ask whether the value is one number, with and without gradients, and comes from the private copy alone."""
    findings, copy = trial.findings, trial.copy
    slots = copy.slots()
    copy.redirect = {number: slots[name][0] for number, name in trial._outer.items()}
    leaves, constants = trial.leaves(), {name: tensor.clone() for name, tensor in trial.constants().items()}
    before = Attributes(copy)
    with deriving(trial) as stream:
        with _explained(trial):
            value, ends = value_of(trial, leaves, constants, stream)
        findings.redirected = copy.reached
        written = {f"model.{name}": leaf for name, leaf in leaves.items()} | constants
        buffers = {name for name, _ in trial.original.named_buffers()}
        findings.written = frozenset(n for n, tensor in written.items() if tensor._version and n not in buffers)
        outside = _outside(leaves, ends)
        changed = before.changed()
        again, _ = value_of(trial, leaves, constants, stream)
    if not close(value, again, trial.precision, factor=16):
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
        apart(value, again),
        changed * ("forward writes to attributes of the model, which are put back before every pass"),
    )
    yield from _belongs(findings, outside)
    yield _without_gradients(trial, value)


@contextmanager
def _explained(trial: Evaluation) -> Iterator[None]:
    """Say in a sentence what went wrong at the first evaluation of a model on somebody's batch."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        if _raised_on_purpose(error):
            raise
        batch = next(iter(trial.batches))
        kind = "(input, target)" if is_pair(batch) else _structure(batch)
        call = "loss_fn(model(input), target)" if is_pair(batch) else "loss_fn(model, batch)"
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
            plain, _ = value_of(trial, trial.views(None), trial.constants(), stream)
    except (RuntimeError, ValueError, TypeError):
        alike = False
    else:
        alike = close(value, plain, trial.precision)
    if alike:
        return Check(question, "holds", apart(value, plain))
    trial.findings.with_gradients = True
    return Check(
        question, "adapted", apart(value, plain), "values are computed with gradients enabled, as derivatives are"
    )


def _left_alone(findings: Findings) -> Check:
    question = "evaluating leaves everything alone"
    if findings.written:
        names = ", ".join(sorted(name.partition(".")[2] for name in findings.written)[:3])
        return Check(question, "adapted", follows=f"forward writes to {names}: it gets copies")
    return Check(question, "holds")
