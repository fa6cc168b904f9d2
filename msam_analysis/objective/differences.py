"""Whether gradients and Hessian products are those of the loss: they are compared with differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.examination import Check, Verdict
from msam_analysis.objective.graphs import loss_gradients, mean_gradient, pull_back
from msam_analysis.objective.nested import Batch, count_samples
from msam_analysis.objective.second_derivatives import (
    MissingDerivativeError,
    check_twice_differentiable,
    missing_derivatives,
)
from msam_analysis.objective.space import Space
from msam_analysis.objective.trial import apart, fewer, on, part_of, value_of
from msam_analysis.objective.vectors import widest

_DOUBLE = 32 * 10**6  # parameters up to which derivatives are compared in float64, for its memory
# Relative steps of differences in float64: short ones meet few kinks, long ones serve losses in float32. Then the
# relative difference that neither truncation nor rounding explains. In float32 both are coarse.
_FINE: tuple[Sequence[float], float] = (1e-6, 1e-8, 1e-4, 1e-3), 1e-3
_LONG = 1e-2, 1e-3  # steps for a loss that its model computes in float32, also in float64: short ones are rounding
_COARSE: tuple[Sequence[float], float] = (1e-3, 3e-3), 0.3


def derivatives(trial: Evaluation, part: Batch, value: float) -> tuple[list[Check], str, float]:
    """Compare gradient and Hessian product with differences; say in what precision, and what rounding leaves."""
    wide, resolution = trial, math.nan
    if trial.autocast is None and widest(trial.device) == torch.float64 and trial.space.size <= _DOUBLE:
        try:
            wide = on(trial, [part], torch.float64)
            with wide.deriving() as stream, torch.no_grad():
                resolution = apart(value, value_of(wide, wide.views(None), wide.constants(), stream)[0])
        except (RuntimeError, ValueError, TypeError):  # a model that insists on its own precision
            wide = trial
    if not math.isfinite(value):
        return [_unchecked("the loss is not finite")], "", resolution
    if wide.precision.itemsize < 4:
        return [_unchecked("half precision has too few digits for differences")], "", resolution
    steps, wrong = _FINE if wide.precision == torch.float64 else _COARSE
    # Half of the samples show as much, for half of the price; where they do not, all of them are asked.
    half = part_of(part, math.ceil(count_samples(part) / 2))
    for batch in (half, part):
        try:
            checks, refusal, doubt = _compared(fewer(wide, batch), steps, wrong)
        except ValueError as error:  # said by whoever asks for a gradient
            checks, refusal, doubt = [_unchecked(str(error))], "", ""
        except (RuntimeError, TypeError, IndexError, KeyError, AssertionError):  # a loss that needs whole batches
            if batch is part:
                raise
            continue
        if not any(check.follows for check in checks):
            break
    trial.findings.refusal = refusal
    if doubt and not trial.second_derivatives.central:
        trial.second_derivatives.doubt(doubt)
    return checks, str(wide.dtype).removeprefix("torch."), resolution


def _unchecked(why: str) -> Check:
    return Check("gradient", "the gradient is that of the loss", "not checked", follows=why)


class _Exact(NamedTuple):
    """The gradient, two vectors, the exact products with them, why there are none, and the loss's relative rounding."""

    gradient: Tensor
    vectors: list[Tensor]
    products: list[Tensor]
    reason: str = ""
    rounding: float = 0.0


def _compared(wide: Evaluation, steps: Sequence[float], wrong: float) -> tuple[list[Check], str, str]:
    """Compare along random vectors, at one step after the other until it fits; say what is refused and doubted."""
    leaves, constants = wide.leaves(), wide.constants()
    exact = _exact(wide, leaves, constants)
    if wide.precision == torch.float64 and exact.rounding > torch.finfo(torch.float64).eps:
        steps = _LONG
    point = wide.layout.flatten(leaf.detach() for leaf in leaves.values())
    slope = product = math.inf
    for step in steps:
        now = _distances(wide, exact, point, constants, step)
        slope, product = min(slope, now[0]), min(product, now[1])
        if max(slope, product) <= wrong:
            break
    if slope > wrong:
        refusal = (
            f"the gradient differs from differences of the loss by {slope:.2g} of itself: expected the derivative "
            "of what forward computes; a checkpoint with use_reentrant=True, a straight-through estimator, weights "
            "that forward changes or detaches may be why: use_reentrant=False, or measure values only"
        )
        return [Check("gradient", "the gradient is that of the loss", "refused", slope, refusal)], refusal, ""
    skew, doubt = _skew(exact, wide.space) if exact.products else 0.0, exact.reason
    if product > wrong:
        doubt = f"they differ from differences of gradients by {product:.0%}"
    elif skew > wrong:
        doubt = f"they are not symmetric, by {skew:.0%}"
    checks = [Check("gradient", "the gradient is that of the loss", "holds", slope)]
    if exact.products:
        verdict: Verdict = "adapted" if skew > wrong else "holds"
        checks.append(Check("Hessian", "Hessian products are symmetric", verdict, skew))
    else:
        product = math.nan
    verdict = "adapted" if doubt else "holds" if exact.products else "not checked"
    follows = f"second derivatives are central differences of the gradient: {doubt}" if doubt else ""
    checks.append(Check("Hessian", "Hessian products are those of the gradient", verdict, product, follows))
    return checks, "", doubt


def _skew(exact: _Exact, space: Space) -> float:
    """Return how far the matrix of the exact products is from symmetric, relatively."""
    (v, u), (hv, hu) = exact.vectors, exact.products
    size = max(float(space.norm(u * hv)), float(space.norm(v * hu)), torch.finfo(hv.dtype).tiny)
    return abs(float(space.dot(u, hv)) - float(space.dot(v, hu))) / size


def _distances(
    wide: Evaluation, exact: _Exact, point: Tensor, constants: dict[str, Tensor], step: float
) -> tuple[float, float]:
    """Return how far slope and product along the first vector are from differences, beyond rounding, relatively."""
    eps = torch.finfo(wide.dtype).eps
    vector, rounding = exact.vectors[0], (64 * eps if exact.rounding <= eps else 2 * exact.rounding) / step
    tiny, norm = torch.finfo(wide.dtype).tiny, wide.space.norm
    (ahead, g_ahead), (behind, g_behind) = (
        mean_gradient(wide, wide.leaves(point + sign * step * vector), constants) for sign in (1, -1)
    )
    slope = float(wide.space.dot(exact.gradient, vector))
    off = abs(float(ahead - behind) / (2 * step) - slope) - rounding * max(abs(float(ahead)), 1e-8)
    size = max(float(norm(exact.gradient * vector)), abs(slope), tiny)
    if not exact.products:
        return max(off, 0.0) / size, 0.0
    curved = (g_ahead - g_behind) / (2 * step)
    bent = float(norm(exact.products[0] - curved)) - rounding * float(norm(exact.gradient))
    return max(off, 0.0) / size, max(bent, 0.0) / max(float(norm(exact.products[0])), float(norm(curved)), tiny)


def _exact(wide: Evaluation, leaves: dict[str, Tensor], constants: dict[str, Tensor]) -> _Exact:
    """Return the gradient and exact products with two random vectors that move every entry by its tensor's size."""
    layout, tensors = wide.layout, list(leaves.values())
    sizes = _sizes(tensors, wide)
    with wide.deriving(twice=True) as stream:
        _, loss = value_of(wide, leaves, constants, stream)
        gradients = loss_gradients(loss, leaves, create_graph=True)
        flat = layout.flatten(gradient.detach() for gradient in gradients)
        moving = _moving([gradient.detach() for gradient in gradients], wide.space)
        moves = layout.flatten(moved * size for moved, size in zip(moving, sizes, strict=True))
        vectors = [wide.space.gaussian(1, seed=seed, like=flat)[:, 0] * moves for seed in (1, 2)]
        rounding = torch.finfo(loss.dtype).eps
        if wide.second_derivatives.central:
            return _Exact(flat, vectors, [], rounding=rounding)
        try:
            with missing_derivatives():
                check_twice_differentiable([loss])
                found = [
                    layout.flatten(pull_back(gradients, tensors, list(layout.views(vector).values()), together=False))
                    for vector in vectors
                ]
        except MissingDerivativeError:  # the operators find it, too, each in its own way
            return _Exact(flat, vectors, [], rounding=rounding)
        except RuntimeError as error:
            return _Exact(flat, vectors, [], str(error).split("\n", maxsplit=1)[0], rounding)
    wild = wide.space.any(~torch.stack(found).isfinite())
    return _Exact(flat, vectors, [] if wild else found, rounding=rounding)


def _sizes(tensors: Sequence[Tensor], wide: Evaluation) -> list[float]:
    """Return the root mean square of every tensor, but at least 1e-3."""
    if wide.shards is None:
        return [max(float(t.detach().square().mean().sqrt()) if t.numel() else 0.0, 1e-3) for t in tensors]
    sums = [torch.stack([t.detach().double().square().sum(), t.new_tensor(t.numel()).double()]) for t in tensors]
    return [max((square / max(count, 1)) ** 0.5, 1e-3) for square, count in wide.space.sum(torch.stack(sums)).tolist()]


def _moving(gradients: Sequence[Tensor], space: Space) -> list[Tensor]:
    """Return 1 for entries that may be moved, 0 for rows without a derivative among rows that have one.

    Such a row, as the padding of an embedding, is held on purpose.
    """
    uses = [g.flatten(1).any(1) if g.ndim > 1 else g.new_ones(1).bool() for g in gradients]
    used = space.sum(torch.stack([rows.any() for rows in uses]).float()).bool()
    held = [~rows & any_used for rows, any_used in zip(uses, used, strict=True)]
    return [
        torch.ones_like(g).masked_fill_(rows.reshape(-1, *[1] * (g.ndim - 1)), 0.0)
        if g.ndim > 1
        else torch.ones_like(g)
        for g, rows in zip(gradients, held, strict=True)
    ]
