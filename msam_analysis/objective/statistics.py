"""Running statistics at the weights of another network, to which they do not belong."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.batchnorm import _NormBase

from msam_analysis.objective.batchnorm import batchnorm_layers
from msam_analysis.results import ApproximationWarning

if TYPE_CHECKING:  # an objective warns of its own statistics
    from msam_analysis.objective.objective import Objective


def warn_of_statistics(objective: Objective, place: str, *, stacklevel: int = 3) -> bool:
    """Warn if running statistics of the current weights are used at a place (in words) of others; return whether."""
    layers = batchnorm_layers(objective.model)
    kept = objective.batchnorm == "eval" and any(layer.running_mean is not None for layer in layers.values())
    others = _others(objective, list(layers))
    if not kept and not others:
        return False
    advice = "make the objective with batchnorm='recalibrate', which re-estimates them at every point"
    if others:
        advice = f"make an objective of that network, as no policy re-estimates those of {others[0] or 'the model'!r}"
    warnings.warn(
        f"the running statistics of the objective's own network (batchnorm={objective.batchnorm!r}) are used {place}, "
        f"although they do not belong to the weights of another network: {advice}",
        ApproximationWarning,
        stacklevel=stacklevel + 1,
    )
    return True


def _others(objective: Objective, batchnorm: list[str]) -> list[str]:
    """Return the modules other than BatchNorm that collect statistics: they write to buffers in training mode."""
    owners = {
        name: owner
        for name, owner in objective.model.named_modules()
        if name not in batchnorm and any(b is not None and b.is_floating_point() for b in owner._buffers.values())
    }
    known = [name for name, owner in owners.items() if isinstance(owner, _NormBase)]
    return known if len(known) == len(owners) else [name for name in owners if name in _written(objective, known)]


def _written(objective: Objective, known: list[str]) -> set[str]:
    """Return the modules whose buffers one pass in training mode changes, and those that are known to be such."""
    evaluation = objective.evaluation
    trial = evaluation.private_copy(own=True)
    before = {name: buffer.clone() for name, buffer in trial.model.named_buffers()}
    for module in trial.modules():
        module.training = True
    batch = objective.batches.first()
    try:
        with evaluation.evaluating() as stream:
            stream.restart(objective.seed)
            trial(batch)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError):  # no pass in training mode
        return set(known)
    after = dict(trial.model.named_buffers())
    changed = [name for name, buffer in before.items() if name in after and not torch.equal(buffer, after[name])]
    return {name.rpartition(".")[0] for name in changed} | set(known)
