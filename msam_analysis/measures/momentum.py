"""Read momentum and gradients out of any ``torch.optim`` optimizer, without moving anything."""

from __future__ import annotations

import torch
from torch import Tensor

_BUFFERS = ("momentum_buffer", "exp_avg")


def momentum_buffers(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the momentum buffer ``v`` of every parameter that has one.

    The buffer is ``momentum_buffer`` (SGD and its relatives) or ``exp_avg`` (the Adam family), as the optimizer's last
    step left it; mostly the tensors are the optimizer's own, and must not be written to.

    Parameters
    ----------
    optimizer
        Any optimizer that keeps its buffers under torch's names.

    Returns
    -------
    dict
        Parameter to buffer of the same shape, dense; empty before the first step.

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
    """Return the gradient, in ``.grad`` now, of every parameter of the optimizer that has one.

    It is the gradient of what is minimised: of ``−f``, hence ``−.grad``, in groups with ``maximize=True``, as it enters
    their buffers. Clipping has been done to it, weight decay has not been added, and a loss scale is still on it where
    the optimizer itself takes that off (see :func:`loss_scale`).

    Returns
    -------
    dict
        Parameter to gradient of the same shape, dense; mostly the tensors in ``.grad`` themselves, not to be written
        to.

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
    """Return :func:`gradients`, or nothing where there are none: a step that torch lets pass, and moves nothing in."""
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                grad = _dense(parameter.grad.detach())
                found[parameter] = -grad if group.get("maximize") else grad
    return found


def loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """Return what the gradients in ``.grad`` are multiplied by as :class:`torch.amp.GradScaler` calls ``step``.

    1 unless the optimizer takes the scale off itself (torch's fused kernels), and outside of ``step``.

    Parameters
    ----------
    optimizer
        Any optimizer.
    """
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def true_weights(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the true weights ``w`` of every parameter: a copy where the optimizer holds it displaced, else itself.

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


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _uses_momentum(group: dict[str, object]) -> bool:
    momentum = group.get("momentum", 0)
    return "betas" in group or (isinstance(momentum, int | float) and momentum > 0)
