"""Slow textbook twins of the optimizers: the oracle their tests are compared with.

Everything here is written out from the equations, one tensor at a time, over explicit *true* weights ``w``. No twin
stores perturbed weights, except :func:`algorithm1`, which is the paper's Algorithm 1 and does. Nothing is shared with
``torch.optim`` or with the optimizers of msam: a twin sees a function that returns gradients, and numbers.

Notation (Becker, Altrock, Risse, *Momentum-SAM*, arXiv 2401.12033): ``w`` weights, ``v`` momentum buffer, ``g``
mini-batch gradient, ``η`` learning rate, ``μ`` momentum factor, ``ρ`` perturbation strength, ``ε`` displacement. Every
optimizer evaluates ``g`` at ``w + ε`` and takes the step of its base from ``w``:

=================  ====================  ===========================================================================
optimizer          ``ε``                 arguments of :func:`trajectory`
=================  ====================  ===========================================================================
SGD, AdamW         ``0``                 ``direction=None``
SAM                ``+ρ g/‖g‖``          ``direction="gradient"``
MSAM               ``-ρ v/‖v‖``          ``direction="momentum"``
NAG                ``-η μ v``            ``direction="momentum", normalize="lr", rho=μ, weight_decay_at="perturbed"``
ASAM               ``+ρ T²g/‖Tg‖``       ``direction="gradient", scale="adaptive"``, with ``T = |w|``
relative (A.7)     ``-ρ |w|v/‖|w|v‖``    ``direction="momentum", scale="relative"``
last gradient      ``±ρ g₋₁/‖g₋₁‖``      ``direction="last_gradient", sign=±1``, with ``g₋₁`` of the step before
random             ``+ρ z/‖z‖``          ``direction="random", directions=lambda step: z``
=================  ====================  ===========================================================================

Examples
--------
>>> import torch
>>> def gradient(weights, step):  # of the loss ½‖w‖²
...     return [w.clone() for w in weights]
>>> states = trajectory(gradient, [torch.ones(3)], 2, lr=0.1, momentum=0.9, direction="momentum", rho=0.05)
>>> len(states), sorted(states[-1].buffers)
(2, ['displacement', 'last_gradient', 'momentum_buffer'])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["State", "adamw_step", "algorithm1", "displacement", "sgd_step", "trajectory"]

GradientFn: TypeAlias = Callable[[list[Tensor], int], Sequence[Tensor | None]]
"""``gradient_fn(weights, step)``: one gradient for each tensor, ``None`` where a tensor has none in this step."""

Number: TypeAlias = float | Sequence[float] | Callable[[int], "float | Sequence[float]"]
"""A number, one number for each tensor (parameter groups), or either as a function of the step (counted from 0)."""

Direction: TypeAlias = Literal["momentum", "gradient", "last_gradient", "random"]
Buffers: TypeAlias = dict[str, list[Tensor]]


class State(NamedTuple):
    """What a twin holds after a step.

    Attributes
    ----------
    weights
        The true weights ``w`` (in :func:`algorithm1`: the weights the algorithm stores).
    buffers
        One tensor for each weight under every name: the base's own (``"momentum_buffer"``, or ``"exp_avg"``,
        ``"exp_avg_sq"`` and ``"step"``), and in :func:`trajectory` also ``"last_gradient"`` and ``"displacement"``,
        the ``ε`` at which this step's gradient was evaluated.
    """

    weights: list[Tensor]
    buffers: Buffers


def displacement(
    direction: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    *,
    rho: float | Sequence[float],
    lr: float | Sequence[float] = 1.0,
    sign: int = 1,
    normalize: Literal["l2", "none", "lr"] = "l2",
    scale: Literal["none", "adaptive", "relative"] = "none",
    mask: Sequence[bool] | None = None,
) -> list[Tensor]:
    r"""Displacement ``ε`` along a direction ``d``, tensor by tensor.

    With ``s`` the sign and ``‖·‖`` the norm over all tensors together::

        scale      normalize="l2"           "none"      "lr"
        none       s ρ d / ‖d‖              s ρ d       s ρ η d
        adaptive   s ρ T² d / ‖T d‖         s ρ T² d    s ρ η T² d      T = |w|
        relative   s ρ |w| d / ‖ |w| d ‖    s ρ |w| d   s ρ η |w| d

    A zero norm gives ``ε = 0``.

    Parameters
    ----------
    direction
        ``d``; ``None`` counts as zero.
    weights
        The true weights, for the two scalings.
    rho, lr
        ``ρ`` and ``η``, one number or one for each tensor. The norm does not depend on them.
    sign
        ``s``, with which ``d`` enters: the minus of MSAM and NAG is the caller's.
    normalize, scale
        The row and the column of the table above.
    mask
        Tensors that are ``False`` here are dropped before the norm is taken.

    Returns
    -------
    list of Tensor
        ``ε``, zero where a tensor is not displaced.

    References
    ----------
    ``scale="none"``: Becker et al., arXiv 2401.12033, section 3 (the norm is global). ``"adaptive"``: Kwon et al.,
    *ASAM*, arXiv 2102.11600, equation 7. ``"relative"``: Becker et al., appendix A.7.
    """
    kept = [w.new_zeros(w.shape) if d is None else d.clone() for d, w in zip(direction, weights, strict=True)]
    if mask is not None:
        kept = [d if keep else torch.zeros_like(d) for d, keep in zip(kept, mask, strict=True)]

    scaled, normed = [], []  # the numerator and what the norm is taken of
    for d, w in zip(kept, weights, strict=True):
        t = w.abs()
        if scale == "adaptive":
            scaled.append(t * t * d)
            normed.append(t * d)
        elif scale == "relative":
            scaled.append(t * d)
            normed.append(t * d)
        elif scale == "none":
            scaled.append(d)
            normed.append(d)
        else:
            raise ValueError(f"scale must be 'none', 'adaptive' or 'relative', got {scale!r}")

    result = []
    norm = math.sqrt(sum(float((n.double() ** 2).sum()) for n in normed))
    for d, r, eta in zip(scaled, _each(rho, len(scaled)), _each(lr, len(scaled)), strict=True):
        if normalize == "l2":
            factor = r / norm if norm > 0 else 0.0
        elif normalize == "none":
            factor = r
        elif normalize == "lr":
            factor = r * eta
        else:
            raise ValueError(f"normalize must be 'l2', 'none' or 'lr', got {normalize!r}")
        result.append(sign * factor * d)
    return result


def sgd_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    buffers: Buffers,
    *,
    lr: Sequence[float],
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: Sequence[float],
    decayed_at: Sequence[Tensor],
) -> tuple[list[Tensor], Buffers]:
    """One step of SGD with momentum from the true weights.

    ``g ← g + λ w``, ``v ← μ v + (1 - τ) g`` (the first time ``v ← g``), ``w ← w - η v``; with ``λ`` the weight decay
    and ``τ`` the dampening, as in ``torch.optim.SGD``. A tensor without gradient is left alone, and so is its buffer.

    Parameters
    ----------
    weights, gradients
        ``w`` and ``g``.
    buffers
        ``{}`` at first, afterwards what the previous step returned.
    lr, weight_decay
        ``η`` and ``λ``, one for each tensor.
    momentum, dampening
        ``μ`` and ``τ``.
    decayed_at
        The point whose weights decay: the true weights, or the perturbed ones.

    Returns
    -------
    (weights, buffers)
        New tensors; ``buffers["momentum_buffer"]`` is ``v``.
    """
    new_weights = [w.clone() for w in weights]
    velocities = [v.clone() for v in buffers.get("momentum_buffer", [torch.zeros_like(w) for w in weights])]
    started = [s.clone() for s in buffers.get("started", [torch.zeros(()) for _ in weights])]
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        g = gradient + weight_decay[i] * decayed_at[i]
        velocities[i] = momentum * velocities[i] + (1 - dampening) * g if started[i] else g.clone()
        started[i] = torch.ones(())
        new_weights[i] = weights[i] - lr[i] * velocities[i]
    return new_weights, {"momentum_buffer": velocities, "started": started}


def adamw_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    buffers: Buffers,
    *,
    lr: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Sequence[float],
    decayed_at: Sequence[Tensor],
) -> tuple[list[Tensor], Buffers]:
    """One step of AdamW from the true weights.

    ``m ← β₁ m + (1 - β₁) g``, ``u ← β₂ u + (1 - β₂) g²``, ``w ← w - η λ w - η m̂ / (√û + ϵ)`` with
    ``m̂ = m / (1 - β₁ᵗ)`` and ``û = u / (1 - β₂ᵗ)``; ``t`` counts the steps in which this tensor had a gradient.

    Parameters
    ----------
    weights, gradients
        ``w`` and ``g``.
    buffers
        ``{}`` at first, afterwards what the previous step returned.
    lr, weight_decay
        ``η`` and ``λ``, one for each tensor.
    betas, eps
        ``(β₁, β₂)`` and ``ϵ``.
    decayed_at
        The point whose weights decay: the true weights, or the perturbed ones.

    Returns
    -------
    (weights, buffers)
        New tensors; ``m``, ``u`` and ``t`` are ``buffers["exp_avg"]``, ``["exp_avg_sq"]`` and ``["step"]``.

    References
    ----------
    Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, arXiv 1711.05101, algorithm 2, with the decay
    multiplied by ``η`` as in ``torch.optim.AdamW``.
    """
    beta1, beta2 = betas
    new_weights = [w.clone() for w in weights]
    first = [m.clone() for m in buffers.get("exp_avg", [torch.zeros_like(w) for w in weights])]
    second = [u.clone() for u in buffers.get("exp_avg_sq", [torch.zeros_like(w) for w in weights])]
    counts = [t.clone() for t in buffers.get("step", [torch.zeros(()) for _ in weights])]
    for i, g in enumerate(gradients):
        if g is None:
            continue
        counts[i] = counts[i] + 1
        t = int(counts[i])
        first[i] = beta1 * first[i] + (1 - beta1) * g
        second[i] = beta2 * second[i] + (1 - beta2) * g * g
        corrected = first[i] / (1 - beta1**t)
        root = (second[i] / (1 - beta2**t)).sqrt()
        new_weights[i] = weights[i] - lr[i] * weight_decay[i] * decayed_at[i] - lr[i] * corrected / (root + eps)
    return new_weights, {"exp_avg": first, "exp_avg_sq": second, "step": counts}


def trajectory(
    gradient_fn: GradientFn,
    w0: Sequence[Tensor],
    steps: int,
    *,
    base: Literal["sgd", "adamw"] = "sgd",
    lr: Number = 0.1,
    momentum: float = 0.0,
    dampening: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Number = 0.0,
    weight_decay_at: Literal["true", "perturbed"] = "true",
    maximize: bool = False,
    direction: Direction | None = None,
    rho: Number = 0.0,
    sign: int = 1,
    normalize: Literal["l2", "none", "lr"] = "l2",
    scale: Literal["none", "adaptive", "relative"] = "none",
    mask: Sequence[bool] | Callable[[int], Sequence[bool]] | None = None,
    directions: Callable[[int], Sequence[Tensor | None]] | None = None,
) -> list[State]:
    """Trajectory of true weights, by definition: the gradient at ``w + ε``, the base's step from ``w``.

    In step ``t = 0, 1, ...``::

        d    momentum: v (exp_avg for AdamW)    gradient: g(w)    last_gradient: g of step t-1    random: directions(t)
        ε    = displacement(d, w)               along -d for the momentum, along +d for the others; times ``sign``
        g    = gradient_fn(w + ε, t)
        w, v = base step from w with g

    Parameters
    ----------
    gradient_fn
        ``gradient_fn(weights, step)`` returns the gradients of step ``step`` at ``weights``. It is called once a step,
        and twice with the same ``step`` for ``direction="gradient"``: at ``w``, then at ``w + ε``.
    w0
        Weights before the first step; they are not changed.
    steps
        Number of steps.
    base
        ``"sgd"`` (:func:`sgd_step`) or ``"adamw"`` (:func:`adamw_step`).
    lr
        ``η``. Where ``normalize="lr"`` meets a direction that the previous step left behind (momentum, last gradient,
        random), ``ε`` takes the ``η`` of that previous step: it looks further along the step just taken.
    momentum, dampening
        Of the SGD base.
    betas, eps
        Of the AdamW base.
    weight_decay, weight_decay_at
        ``λ``, and whether it acts at ``w`` or at ``w + ε``.
    maximize
        Ascend: every gradient is negated as it arrives, for the direction as for the step.
    direction, rho, sign, normalize, scale, mask
        The displacement; see :func:`displacement`. ``rho(t)`` is the ``ρ``, and ``mask(t)`` the mask, at which the
        gradient of step ``t`` is taken.
    directions
        The directions of ``direction="random"``, step by step.

    Returns
    -------
    list of State
        ``(weights, buffers)`` after every step.

    References
    ----------
    Becker et al., arXiv 2401.12033, section 3 and appendix A.1. SAM: Foret et al., arXiv 2010.01412, algorithm 1.
    """
    count = len(w0)
    weights = [w.clone() for w in w0]
    zeros = [torch.zeros_like(w) for w in w0]
    buffers: Buffers = {}
    last: list[Tensor] = zeros
    result: list[State] = []

    def gradients(at: list[Tensor], step: int) -> list[Tensor | None]:
        got = gradient_fn(at, step)
        return [g if g is None or not maximize else -g for g in got]

    for step in range(steps):
        lr_now = _at(lr, step, count)
        lr_direction = lr_now if direction == "gradient" else _at(lr, max(step - 1, 0), count)
        outward = sign
        along: Sequence[Tensor | None]
        if direction is None:
            along = zeros
        elif direction == "momentum":
            along = buffers.get("momentum_buffer" if base == "sgd" else "exp_avg", zeros)
            outward = -sign
        elif direction == "gradient":
            along = gradients([w.clone() for w in weights], step)
        elif direction == "last_gradient":
            along = last
        elif direction == "random":
            if directions is None:
                raise ValueError("direction='random' needs directions(step), the tensors to perturb along")
            along = directions(step)
        else:
            raise ValueError(f"unknown direction {direction!r}")

        shift = displacement(
            along,
            weights,
            rho=_at(rho, step, count),
            lr=lr_direction,
            sign=outward,
            normalize=normalize,
            scale=scale,
            mask=mask(step) if callable(mask) else mask,
        )
        perturbed = [w + e for w, e in zip(weights, shift, strict=True)]
        g = gradients([p.clone() for p in perturbed], step)
        decay = _at(weight_decay, step, count)
        decayed_at = perturbed if weight_decay_at == "perturbed" else weights
        if base == "sgd":
            weights, buffers = sgd_step(
                weights,
                g,
                buffers,
                lr=lr_now,
                momentum=momentum,
                dampening=dampening,
                weight_decay=decay,
                decayed_at=decayed_at,
            )
        elif base == "adamw":
            weights, buffers = adamw_step(
                weights, g, buffers, lr=lr_now, betas=betas, eps=eps, weight_decay=decay, decayed_at=decayed_at
            )
        else:
            raise ValueError(f"base must be 'sgd' or 'adamw', got {base!r}")
        last = [torch.zeros_like(w) if x is None else x.clone() for x, w in zip(g, weights, strict=True)]
        shown = {name: tensors for name, tensors in buffers.items() if name != "started"}
        result.append(State(weights, {**shown, "last_gradient": last, "displacement": shift}))
    return result


def algorithm1(
    gradient_fn: GradientFn,
    w0: Sequence[Tensor],
    steps: int,
    *,
    lr: float,
    momentum: float,
    rho: float,
    weight_decay: float = 0.0,
) -> list[State]:
    """Efficient MSAM, the paper's Algorithm 1, line by line: the one twin that stores perturbed weights ``w̃``.

    ::

        w̃ ← w₀, v ← 0
        for every step:
            g ← gradient at w̃
            w ← w̃ + ρ v/‖v‖               remove the old perturbation
            v ← μ v + (g + λ w)           update the momentum
            w ← w - η v                   step
            w̃ ← w - ρ v/‖v‖               perturb along the new momentum
        w ← w̃ + ρ v/‖v‖                   remove the last perturbation for good

    Parameters
    ----------
    gradient_fn, w0, steps
        As in :func:`trajectory`.
    lr, momentum, rho, weight_decay
        ``η``, ``μ``, constant ``ρ``, and ``λ``, which acts at the true weights.

    Returns
    -------
    list of State
        The stored weights ``w̃`` and ``v`` after every step; in the last one the perturbation has been removed.

    References
    ----------
    Becker et al., arXiv 2401.12033, Algorithm 1. ``0/‖0‖`` counts as zero.
    """
    stored = [w.clone() for w in w0]
    velocity = [torch.zeros_like(w) for w in w0]

    def unit(v: list[Tensor]) -> list[Tensor]:
        norm = math.sqrt(sum(float((x.double() ** 2).sum()) for x in v))
        return [x / norm if norm > 0 else torch.zeros_like(x) for x in v]

    result: list[State] = []
    for step in range(steps):
        g = gradient_fn([w.clone() for w in stored], step)
        for i, direction in enumerate(unit(velocity)):
            stored[i] = stored[i] + rho * direction
        for i, gradient in enumerate(g):
            if gradient is not None:
                velocity[i] = momentum * velocity[i] + (gradient + weight_decay * stored[i])
                stored[i] = stored[i] - lr * velocity[i]
        for i, direction in enumerate(unit(velocity)):
            stored[i] = stored[i] - rho * direction
        result.append(State([w.clone() for w in stored], {"momentum_buffer": [v.clone() for v in velocity]}))
    for i, direction in enumerate(unit(velocity)):
        stored[i] = stored[i] + rho * direction
    if result:
        result[-1] = State([w.clone() for w in stored], result[-1].buffers)
    return result


def _each(value: float | Sequence[float], count: int) -> list[float]:
    """One number for each of ``count`` tensors."""
    if isinstance(value, Sequence):
        if len(value) != count:
            raise ValueError(f"expected one number for each of the {count} tensors, got {len(value)}")
        return [float(x) for x in value]
    return [float(value)] * count


def _at(value: Number, step: int, count: int) -> list[float]:
    """The value at a step, one number for each tensor."""
    return _each(value(step) if callable(value) else value, count)
