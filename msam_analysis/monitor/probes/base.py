"""The shape of a probe, its period, and functions that probes share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from msam_analysis.objective.objective import Objective
from msam_analysis.objective.private import unwrap

Finish = Callable[[Mapping[Tensor, Tensor]], Mapping[str, float]]
"""A function that is called after the step with the step's gradients, by parameter, and returns named numbers."""

By = Literal["parameter", "module"]

ObjectiveSource = Objective | Callable[[], Objective]
"""An objective, or a function that returns it, for example an objective over the current training batch."""


class Probe(Protocol):
    """A function that returns named numbers about one training step."""

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return the numbers; ``step`` counts optimizer steps from 0."""
        ...


@runtime_checkable
class StepProbe(Protocol):
    """A probe that also sees the effect of the step.

    A probe that keeps a state between records has ``state_dict()`` and ``load_state_dict(state)`` too, with tensors and
    plain numbers, so that a resumed run records the same as an uninterrupted one.
    """

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return the numbers that are known before the step."""
        ...

    def across(self, optimizer: torch.optim.Optimizer, step: int) -> Finish | None:
        """Return a function to call after the step, or ``None``; called before the step, right after ``__call__``.

        That function gets the gradients of the step: without a loss scale, of the function that is minimised, and for
        SAM the second ones.
        """
        ...


@dataclass(frozen=True)
class Every:
    """A probe with a period of its own: ``Monitor(optimizer, [MomentumGradientCosine(), Every(Curvature(o), 100)])``.

    Parameters
    ----------
    probe
        The probe.
    period
        Period in steps: it records at steps ``0, period, 2 period, ...``; other rows have NaN in its columns.

    Raises
    ------
    ValueError
        ``period`` is not a positive integer.
    """

    probe: Probe
    period: int

    def __post_init__(self) -> None:
        """Check the period."""
        check_period("period", self.period)


def check_period(name: str, period: object) -> None:
    """Raise ``ValueError`` unless a period is a positive integer."""
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
        raise ValueError(f"{name} must be a positive integer, got {period!r}: 50 records every fiftieth step")


def current(objective: ObjectiveSource) -> Objective:
    """Return the objective, or the one that the function returns now."""
    return objective if isinstance(objective, Objective) else objective()


def layers_of(model: nn.Module, by: By, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Return the parameters that the optimizer holds, by the layer's name, in the model's order.

    Parameters
    ----------
    model
        Model that gives the names, without its wrappers.
    by
        ``"parameter"``: each parameter is a layer. ``"module"``: the parameters that one module holds itself are a
        layer with the module's name; for the outermost module, with the name of its class.
    optimizer
        Optimizer of the parameters; others are left out.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    whole = unwrap(model)
    found: dict[str, list[Tensor]] = {}
    for name, parameter in whole.named_parameters():
        if parameter in held:
            layer = name if by == "parameter" else name.rpartition(".")[0] or type(whole).__name__
            found.setdefault(layer, []).append(parameter)
    if not found:
        raise ValueError(
            "none of the optimizer's parameters belongs to the model: expected the model that is trained; build the "
            "probe and the optimizer from one model"
        )
    return found


def check_by(by: str) -> None:
    """Raise ``ValueError`` unless ``by`` is a known kind of layer."""
    if by not in get_args(By):
        raise ValueError(f"by must be one of {get_args(By)}, got {by!r}: choose one of them")
