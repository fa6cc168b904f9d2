"""The examination of a model and its loss: five questions, asked once, on a part of the first batch.

Everything is tried on a copy of its own, so that nothing is left behind. What can be mended by evaluating in another
way is mended and noted (:class:`~msam_analysis.objective.evaluation.Findings`); what would give a wrong number is
refused in one sentence.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from msam_analysis.objective.differences import derivatives
from msam_analysis.objective.evaluation import Evaluation, Findings
from msam_analysis.objective.examination import Check, Examination, ExaminationError
from msam_analysis.objective.means import is_mean
from msam_analysis.objective.nested import count_samples
from msam_analysis.objective.private import Attributes
from msam_analysis.objective.second_derivatives import graph_nodes
from msam_analysis.objective.trial import SAMPLES, apart, close, deriving, on, part_of, value_of
from msam_analysis.results import ApproximationWarning

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
    if evaluation.original.changing_hooks:
        warnings.warn(
            f"{evaluation.original.changing_hooks} forward hooks of the model are left out, and a hook can change what "
            "it computes: put what belongs to the function into forward, and remove the hooks",
            ApproximationWarning,
            stacklevel=2,
        )
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
        value, ends = value_of(trial, leaves, constants, stream)
        findings.redirected = copy.reached
        written = {f"model.{name}": leaf for name, leaf in leaves.items()} | constants
        buffers = {name for name, _ in trial.original.named_buffers()}
        findings.written = frozenset(n for n, tensor in written.items() if tensor._version and n not in buffers)
        outside = _outside(leaves, ends)
        if any(id(tensor) in trial._outer for tensor in outside):
            raise ExaminationError(
                "the graph of the loss ends in parameters of the original model: expected a loss of the model's "
                "output; return activations from forward instead of keeping them by a hook or in a global"
            )
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
