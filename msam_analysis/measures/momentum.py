"""Momentum, gradients, updates and true weights of any ``torch.optim`` optimizer, read without moving anything."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

_BUFFERS = ("momentum_buffer", "exp_avg")


def momentum_buffers(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the momentum buffer ``v`` of every parameter that has one.

    The buffer is ``momentum_buffer`` (SGD and its relatives) or ``exp_avg`` (the Adam family), as the optimizer's last
    step left it. Dense buffers are the optimizer's own tensors and must not be written to.

    Parameters
    ----------
    optimizer
        Any optimizer that keeps its buffers under torch's names.

    Returns
    -------
    dict
        The buffer of each parameter, dense and of its shape; empty before the first step.

    Raises
    ------
    RuntimeError
        The optimizer has taken a step and keeps no momentum.
    """
    found: dict[Tensor, Tensor] = {}
    stepped = False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            stepped = stepped or bool(state)
            buffer = next((state[key] for key in _BUFFERS if isinstance(state.get(key), Tensor)), None)
            if buffer is not None:
                found[parameter] = _dense(buffer)
    if not found and (stepped or not any(_uses_momentum(group) for group in optimizer.param_groups)):
        raise RuntimeError(
            f"{type(optimizer).__name__} keeps no momentum buffer (looked for {' and '.join(_BUFFERS)}): "
            "give it momentum > 0, or use an optimizer of the SGD or Adam family"
        )
    return found


def gradients(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the present gradient, from ``.grad``, of every parameter of the optimizer that has one.

    It is the gradient of the function that is minimised: in groups with ``maximize=True`` that is ``−f``, hence
    ``−.grad``, as it enters their buffers. It is clipped if the loop clips, and has no weight decay in it. It still has
    a loss scale if the optimizer itself removes that (see :func:`loss_scale`).

    Returns
    -------
    dict
        The gradient of each parameter, dense and of its shape. Most are the tensors in ``.grad`` themselves and must
        not be written to.

    Raises
    ------
    RuntimeError
        No parameter has a gradient.
    """
    found = present_gradients(optimizer)
    if not found:
        raise RuntimeError(
            "no parameter of the optimizer has a gradient: call this after loss.backward() and before optimizer.step()"
        )
    return found


def present_gradients(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return :func:`gradients`, or an empty dict if there are none: torch allows such a step, which moves nothing."""
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                grad = _dense(parameter.grad.detach())
                found[parameter] = -grad if group.get("maximize") else grad
    return found


def loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """Return the factor on the gradients in ``.grad`` while :class:`torch.amp.GradScaler` calls ``step``.

    It is 1 outside of ``step``, and unless the optimizer itself removes the scale (torch's fused kernels).

    Parameters
    ----------
    optimizer
        Any optimizer.
    """
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def true_weights(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the true weights ``w`` of every parameter: a copy if the optimizer displaced it, otherwise itself.

    Parameters
    ----------
    optimizer
        One of :mod:`msam` (whose parameters may hold ``w + ε``), or any other.
    """
    weights: dict[Tensor, Tensor] = {
        parameter: parameter.detach() for group in optimizer.param_groups for parameter in group["params"]
    }
    if getattr(optimizer, "perturbed", False):
        for parameter, displacement in optimizer.displacement().items():  # type: ignore[attr-defined]
            weights[parameter] = weights[parameter] - displacement
    return weights


def coming_updates(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the ``d`` of the coming step ``w ← w − lr d`` for every parameter, with ``lr`` of the first group.

    The step is taken on a copy of the optimizer and its parameters, with the present gradients: so ``d`` is what the
    optimizer itself makes of them, with weight decay, preconditioning and the learning rates of further groups. Nothing
    of the optimizer moves. It takes the memory of such a copy.

    Parameters
    ----------
    optimizer
        Any optimizer whose step needs no closure.

    Returns
    -------
    dict
        A new tensor for each parameter; zeros where the step moves nothing.

    Raises
    ------
    RuntimeError
        No parameter has a gradient, the learning rate of the first group is 0, or the step needs a closure (SAM).
    """
    gradients(optimizer)  # raises where there are none
    rate = float(optimizer.param_groups[0]["lr"])
    if rate == 0:
        raise RuntimeError("the learning rate is 0: expected a positive one, as the update is the step over it")
    twin = copy.deepcopy(optimizer)  # without hooks, which belong to the loop
    own, copied = ([p for group in each.param_groups for p in group["params"]] for each in (optimizer, twin))
    for parameter, other in zip(own, copied, strict=True):
        other.grad = None if parameter.grad is None else parameter.grad.detach().clone()
    try:
        twin.step()
    except (TypeError, RuntimeError) as error:
        raise RuntimeError(
            f"a copy of {type(optimizer).__name__} cannot step from the gradients in .grad alone ({error}): expected "
            "an optimizer without a closure; use directions.last_update after the step"
        ) from error
    before, after = true_weights(optimizer), true_weights(twin)
    return {parameter: (before[parameter] - after[other]) / rate for parameter, other in zip(own, copied, strict=True)}


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _uses_momentum(group: dict[str, object]) -> bool:
    momentum = group.get("momentum", 0)
    return "betas" in group or (isinstance(momentum, int | float) and momentum > 0)
