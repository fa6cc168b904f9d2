"""The examination of a model and its loss: five questions, asked once, on a part of the first batch.

Everything is tried on a copy of its own, so that nothing is left behind. What can be mended by evaluating in another
way is mended and noted (:class:`~msam_analysis.objective.evaluation.Findings`); what would give a wrong number is
refused in one sentence.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from msam_analysis.objective.differences import derivatives
from msam_analysis.objective.evaluation import Evaluation, Findings
from msam_analysis.objective.examination import Check, Examination, ExaminationError
from msam_analysis.objective.means import is_mean
from msam_analysis.objective.nested import Batch, count_samples
from msam_analysis.objective.private import Attributes
from msam_analysis.objective.second_derivatives import graph_nodes
from msam_analysis.objective.trial import SAMPLES, apart, close, on, part_of, value_of
from msam_analysis.results import ApproximationWarning

_FEW, _LARGE = 4, 10**6  # fewer samples of models with more parameters


def examine(evaluation: Evaluation) -> Examination:
    """Examine an evaluation, and change its findings so that it gives right numbers; ``ExaminationError`` if none."""
    ranks, findings = evaluation.ranks, evaluation.findings
    # Tensors that are made in inference mode have no versions and no gradients.
    with torch.inference_mode(mode=False), ranks.apart("examining the loss"):
        evaluation.find_randomness()
        batch = looked_at(evaluation)
        trial = on(evaluation, [batch])
        checks, value = _function(trial)
        if findings != Findings():
            trial.renew()
            evaluation.renew()
        if evaluation.original.changing_hooks:
            warnings.warn(
                f"{evaluation.original.changing_hooks} forward hooks of the model are left out, and a hook can change "
                "what it computes: put what belongs to the function into forward, and remove the hooks",
                ApproximationWarning,
                stacklevel=2,
            )
        checks.append(is_mean(evaluation, batch))
        slopes, precision, resolution = derivatives(trial, batch, value)
        checks += [*slopes, _left_alone(findings)]
        examination = Examination(tuple(checks), count_samples(batch), precision, resolution)
        if ranks.count > 1:  # rounding may lead to another verdict elsewhere
            first = ranks.from_first((vars(findings), vars(evaluation.second_derivatives), examination))
            vars(findings).update(first[0])
            vars(evaluation.second_derivatives).update(first[1])
            examination = first[2]
        if findings != Findings():
            evaluation.renew()
        evaluation._weights = None
        findings.examination = examination
        return examination


def looked_at(evaluation: Evaluation) -> Batch:
    """Return the part of the first batch that an examination looks at."""
    return part_of(evaluation.batches.first(), SAMPLES if evaluation.space.size <= _LARGE else _FEW)


def _function(trial: Evaluation) -> tuple[list[Check], float]:
    """Ask whether the value is one number, with and without gradients, and the private copy's own; return it, too."""
    findings, copy = trial.findings, trial.copy
    slots = copy.slots()
    copy.redirect = {number: slots[name][0] for number, name in trial.outer.items()}
    leaves, constants = trial.leaves(), {name: tensor.clone() for name, tensor in trial.constants().items()}
    before = Attributes(copy)
    with trial.deriving() as stream:
        value, end = value_of(trial, leaves, constants, stream)
        findings.redirected = copy.reached
        written = {f"model.{name}": leaf for name, leaf in leaves.items()} | constants
        buffers = {name for name, _ in trial.original.named_buffers()}
        findings.written = frozenset(n for n, tensor in written.items() if tensor._version and n not in buffers)
        outside = _outside(leaves, end)
        if any(id(tensor) in trial.outer for tensor in outside):
            raise ExaminationError(
                "the graph of the loss ends in parameters of the original model: expected a loss of the model's "
                "output; return activations from forward instead of keeping them by a hook or in a global"
            )
    changed = before.changed()
    # A pass without gradients that agrees is the second call as well.
    plain = again = None if changed else _plain(trial)
    if again is None or not close(value, again, trial.precision, factor=16):
        with trial.deriving() as stream:
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
        plain = _plain(trial)
    repeated = Check(
        "value",
        "one value at the same weights",
        "adapted" if changed else "holds",
        apart(value, again),
        changed * "forward writes to attributes of the model, which are put back before every pass",
    )
    own = plain if plain is not None and close(value, plain, trial.precision) else None
    findings.with_gradients = own is None
    pure = Check(
        "value",
        "one value with gradients and without",
        "holds" if own is not None else "adapted",
        math.nan if plain is None else apart(value, plain),
        "" if own is not None else "values are computed with gradients enabled, as derivatives are",
    )
    return [repeated, _belongs(findings, outside), pure], value if own is None else own


def _outside(leaves: dict[str, Tensor], end: Tensor) -> list[Tensor]:
    """Return the trainable tensors in which the graph of the loss ends and that are no leaves of ours."""
    own = {id(leaf) for leaf in leaves.values()}
    found = [node.variable for node in graph_nodes([end]) if hasattr(node, "variable")]
    return [tensor for tensor in found if id(tensor) not in own]


def _belongs(findings: Findings, outside: list[Tensor]) -> Check:
    """Say whether the loss reads tensors of anybody else."""
    question = "the loss is that of the private copy"
    if findings.redirected:
        follows = "the loss or a forward uses the original's tensors, which those of the private copy replace"
        return Check("copy", question, "adapted", follows=follows)
    follows = f"{len(outside)} trainable tensors outside of the model are constants" if outside else ""
    return Check("copy", question, "holds", follows=follows)


def _plain(trial: Evaluation) -> float | None:
    """Return the value of a pass without gradients; ``None`` where there is none."""
    try:
        with trial.evaluating() as stream:
            return value_of(trial, trial.views(None), trial.constants(), stream)[0]
    except (RuntimeError, ValueError, TypeError):
        return None


def _left_alone(findings: Findings) -> Check:
    """Say whether forward passes write to parameters."""
    question = "evaluating leaves everything alone"
    if findings.written:
        names = ", ".join(sorted(name.partition(".")[2] for name in findings.written)[:3])
        return Check("no writes", question, "adapted", follows=f"forward writes to {names}: it gets copies")
    return Check("no writes", question, "holds")
