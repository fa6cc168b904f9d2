"""Whether gradients and Hessian products are those of the loss: they are compared with differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.examination import Check
from msam_analysis.objective.graphs import loss_gradients, mean_gradient, pull_back
from msam_analysis.objective.nested import Batch
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.objective.second_derivatives import (
    MissingDerivativeError,
    check_twice_differentiable,
    missing_derivatives,
)
from msam_analysis.objective.trial import apart, deriving, on, value_of
from msam_analysis.objective.vectors import gaussian, no_autocast, widest

_DOUBLE = 32 * 10**6  # parameters up to which derivatives are compared in float64, for its memory
# Relative steps of differences in float64: short ones meet few kinks, long ones serve losses in float32.
_STEPS = (1e-6, 1e-8, 1e-4, 1e-3)
_WRONG = 1e-3  # a relative difference that neither truncation nor rounding in float64 explains
# In float32, where a model cannot be evaluated in float64.
_COARSE_STEPS, _COARSELY_WRONG = (1e-3, 3e-3), 0.3


def derivatives(trial: Evaluation, batch: Batch) -> tuple[list[Check], str, float]:
    """Compare gradient and Hessian product with differences; say in what precision, and what rounding leaves."""
    wide = trial
    resolution = math.nan
    double = trial.autocast is None and widest(trial.device) == torch.float64 and trial.layout.size <= _DOUBLE
    if double:
        try:
            wide = on(trial, [batch], torch.float64)
            with deriving(wide) as stream, torch.no_grad():
                value, _ = value_of(wide, wide.views(None), wide.constants(), stream)
            with trial.evaluating() as stream:
                own, _ = value_of(
                    trial,
                    trial.leaves() if trial.findings.with_gradients else trial.views(None),
                    trial.constants(),
                    stream,
                )
            resolution = apart(own, value)
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
    return checks, name, resolution


def _compared(wide: Evaluation, steps: Sequence[float], wrong: float) -> Iterator[Check]:
    findings, layout = wide.findings, wide.layout
    leaves, constants = wide.leaves(), wide.constants()
    point = layout.flatten(leaf.detach() for leaf in leaves.values())
    sizes = layout.flatten(
        torch.full_like(leaf, max(float(leaf.detach().square().mean().sqrt()) if leaf.numel() else 0.0, 1e-3))
        for leaf in leaves.values()
    ).detach()
    draws = [gaussian(layout.size, 1, seed=number, like=point)[:, 0] * sizes for number in (1, 2)]
    gradient, (along, across), products, reason = _exact(wide, leaves, constants, draws)
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
    wide: Evaluation, leaves: dict[str, Tensor], constants: dict[str, Tensor], draws: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor], str]:
    """Return the gradient, the vectors where it moves, its exact products with them, and why there are none.

    A row without a derivative in a tensor that has some, such as the padding of an embedding, is held on purpose.
    """
    tensors = list(leaves.values())
    with torch.enable_grad(), no_autocast(wide.device), wide.kernels(twice=True), RandomStream(wide.seed) as stream:
        loss = next(wide.batch_losses(leaves, constants, stream))
        gradients = loss_gradients(loss.value, leaves, create_graph=True)
        flat = wide.layout.flatten(piece.detach() for piece in gradients)
        moves = wide.layout.flatten(_moving(piece.detach()) for piece in gradients)
        vectors = [draw * moves for draw in draws]
        if wide.second_derivatives.central:
            return flat, vectors, [], ""
        try:
            with missing_derivatives():
                check_twice_differentiable([loss.value])
                pieces = [list(wide.layout.views(vector).values()) for vector in vectors]
                products = [pull_back(gradients, tensors, piece, together=False) for piece in pieces]
        except MissingDerivativeError:  # the operators find it, too, each in its own way
            return flat, vectors, [], ""
        except RuntimeError as error:
            return flat, vectors, [], str(error).split("\n", maxsplit=1)[0]
    found = [wide.layout.flatten(product) for product in products]
    finite = all(bool(product.isfinite().all()) for product in found)
    return flat, vectors, found if finite else [], ""


def _moving(gradient: Tensor) -> Tensor:
    """Return 1 for entries that may be moved, 0 for rows without a derivative among rows that have one."""
    if gradient.ndim < 2:
        return torch.ones_like(gradient)
    rows = gradient.flatten(1).any(1)
    held = ~rows if bool(rows.any()) else torch.zeros_like(rows)
    return torch.ones_like(gradient).masked_fill_(held.reshape(-1, *[1] * (gradient.ndim - 1)), 0.0)
