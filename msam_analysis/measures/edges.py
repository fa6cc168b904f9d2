r"""The edge of stability: the largest curvature at which an optimizer's step does not grow along the top eigenvector.

Along an eigenvector of the Hessian with eigenvalue λ, full-batch training is a linear recurrence of the weight ``w``
and the momentum buffer ``v``. All optimizers here take their gradient at a displaced point, so that

    v ← (μ − s λ κ) v + s (λ + d) w,   w ← w − η v

with the learning rate η, the momentum μ, ``s = 1 −`` dampening, the weight decay d, and the displacement ``−κ v``. It
is stable while both roots of ``z² − (1 + m − η a) z + m``, with ``m = μ − s λ κ`` and ``a = s (λ + d)``, lie in the
unit circle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from msam_analysis.measures.alignment import total_products
from msam_analysis.measures.momentum import momentum_buffers, present_gradients
from msam_analysis.objective.arguments import numbers
from msam_analysis.results import Scalar


@numbers
def stability_edge(
    lr: float,
    momentum: float = 0.0,
    *,
    lookahead: float = 0.0,
    ascent: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    decays_ahead: bool = False,
) -> float:
    r"""Return the largest stable eigenvalue of the Hessian for SGD with momentum and a displaced gradient.

    ================================= ==================== ===========================================
    optimizer                         arguments            edge (without dampening and weight decay)
    ================================= ==================== ===========================================
    SGD                                                    ``2 (1 + μ) / η``
    NAG, Nesterov                     ``lookahead = η μ``  ``2 (1 + μ) / (η (1 + 2 μ))``
    MSAM                              ``= ρ / ‖v‖``        ``2 (1 + μ) / (η + 2 ρ / ‖v‖)``
    MSAM without normalisation        ``= ρ``              ``2 (1 + μ) / (η + 2 ρ)``
    MSAM by the learning rate         ``= ρ η``            ``2 (1 + μ) / (η (1 + 2 ρ))``
    SAM                               ``ascent = ρ / ‖g‖`` the λ with ``λ + λ² ρ / ‖g‖ = 2 (1 + μ) / η``
    ================================= ==================== ===========================================

    The edge of SGD is that of Cohen et al. (2021), equation 1 and appendix B; SAM's with μ = 0 is that of Long &
    Bartlett (2024, arXiv 2309.12488). The others follow from the recurrence of this module. A negative ``lookahead``
    (MSAM with ρ < 0) is also stable only while ``λ < (1 − μ) / |κ|``.

    Parameters
    ----------
    lr
        Learning rate η > 0.
    momentum
        Momentum μ in [0, 1).
    lookahead
        κ: the gradient is taken at ``w − κ v``. Default 0.
    ascent
        r: the gradient is taken at ``w + r g``. Default 0.
    dampening, weight_decay
        τ < 1, and d, of torch's SGD. Default 0.
    decays_ahead
        Whether weight decay reads the displaced weights, as in torch's Nesterov. Default: the true ones.

    Returns
    -------
    float
        In the unit of the Hessian's eigenvalues. Infinite where no curvature is too large.

    Raises
    ------
    ValueError
        An argument is out of range, or ``lookahead`` and ``ascent`` are both given.
    """
    checks = (
        ("lr", lr, 0 < lr < math.inf, "a positive number"),
        ("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1"),
        ("dampening", dampening, dampening < 1, "below 1"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a number of at least 0"),
        ("lookahead", lookahead, math.isfinite(lookahead), "a number"),
        ("ascent", ascent, math.isfinite(ascent), "a number"),
    )
    for name, value, holds, wanted in checks:
        if not holds:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    if lookahead and ascent:
        raise ValueError(
            "the gradient is taken at w − κ v or at w + r g: expected lookahead or ascent, got "
            f"{lookahead} and {ascent}: leave one out"
        )
    scale = 1 - dampening
    most = 2 * (1 + momentum) / scale
    if not lookahead:
        level = most / lr - weight_decay
        if not ascent:
            return level
        # λ + r λ² = level, whose smaller positive root is where the growth begins; written so that r = 0 is the limit.
        inside = 1 + 4 * ascent * level
        return 2 * level / (1 + math.sqrt(inside)) if inside >= 0 else math.inf
    reach = lr + 2 * lookahead
    taken = weight_decay * (reach if decays_ahead else lr)
    edge = (most - taken) / reach if reach > 0 else math.inf
    if lookahead < 0:
        edge = min(edge, (1 - momentum) / (scale * -lookahead) - (weight_decay if decays_ahead else 0.0))
    return edge


def edge_of_stability(optimizer: torch.optim.Optimizer) -> Scalar:
    r"""Return the edge of stability of a running optimizer, at its present learning rate, momentum and gradient.

    ``κ`` and ``r`` of :func:`stability_edge` are those of the displacement at which the optimizer takes its next
    gradient. For the Adam family the edge ``2 (1 + β₁) / ((1 − β₁) η)`` is that of the preconditioned Hessian
    ``P^{-1/2} H P^{-1/2}``, ``P = √v̂ + ε`` (Cohen et al. 2022, arXiv 2207.14484, section 3).

    Parameters
    ----------
    optimizer
        SGD of torch (also with Nesterov's momentum), Adam or AdamW of torch, or one of :mod:`msam`; call it when the
        gradient of the step is there, which SAM's edge depends on.

    Returns
    -------
    Scalar
        The edge; NaN where SAM has no gradient yet.

    Raises
    ------
    ValueError
        Groups differ in what decides the edge, or there is no formula: for another optimizer, a displacement that is
        scaled by the weights, along noise or the last gradient, or of a subset of the parameters, or one of AdamW.
    """
    found = {_edge_of(optimizer, group) for group in optimizer.param_groups}
    if len(found) > 1:
        raise ValueError(
            f"the groups of the optimizer have different edges ({', '.join(f'{edge:.4g}' for edge in sorted(found))}): "
            "expected one learning rate, momentum and weight decay; measure a group as an optimizer of its own"
        )
    kind = "preconditioned Hessian" if preconditions(optimizer) else "Hessian"
    return Scalar(quantity=f"edge of stability, {kind}", value=found.pop())


def preconditions(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer divides its steps by second moments of the gradient, as Adam does."""
    return all("betas" in group and "eps" in group for group in optimizer.param_groups)


def preconditioner(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    r"""Return ``P = √v̂ + ε`` of every parameter that has taken a step of Adam, with its correction of the bias.

    Parameters
    ----------
    optimizer
        Of the Adam family.

    Returns
    -------
    dict
        Parameter to a tensor of its shape.
    """
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
            if second is not None:
                grown = 1 - group["betas"][1] ** float(state["step"])
                found[parameter] = (second / grown).sqrt() + group["eps"]
    return found


def _edge_of(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> float:
    perturbation = getattr(optimizer, "perturbation", None)
    lr = float(group["lr"])
    if preconditions(optimizer):
        if perturbation is not None:
            raise ValueError(
                f"no edge is known for {type(optimizer).__name__} with a displacement: expected AdamW without one"
            )
        beta = group["betas"][0]
        return stability_edge(lr, float(beta), dampening=float(beta))
    if "momentum" not in group or "dampening" not in group:
        raise ValueError(
            f"no edge is known for {type(optimizer).__name__}: expected SGD, NAG, MSAM, SAM or the Adam family"
        )
    momentum = float(group["momentum"])
    options: dict[str, Any] = {"dampening": group["dampening"] if momentum else 0.0}
    options["weight_decay"] = group["weight_decay"]
    if group.get("nesterov"):
        return stability_edge(lr, momentum, lookahead=lr * momentum, decays_ahead=True, **options)
    if perturbation is None or not group.get("perturb", True):
        return stability_edge(lr, momentum, **options)
    if perturbation.scale != "none" or perturbation.subset != "all":
        raise ValueError(
            "no edge is known for a displacement that is scaled by the weights or of some parameters only: expected "
            "scale='none' and subset='all'"
        )
    if perturbation.direction not in ("momentum", "gradient"):
        raise ValueError(
            f"no edge is known for a displacement along {perturbation.direction!r}: expected momentum or gradient"
        )
    along = perturbation.direction == "momentum"
    direction = momentum_buffers(optimizer) if along else present_gradients(optimizer)
    displacement = optimizer.displacement()  # type: ignore[attr-defined]
    inner, _, length = total_products(displacement, direction)
    if along:
        share = inner / length if length else 0.0
        decays_ahead = group["weight_decay_at"] == "perturbed"
        return stability_edge(lr, momentum, lookahead=-share, decays_ahead=decays_ahead, **options)
    return stability_edge(lr, momentum, ascent=inner / length, **options) if length else math.nan
