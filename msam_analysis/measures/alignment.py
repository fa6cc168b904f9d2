"""Angles between momentum and gradients: the overshooting cosine, and the angle between MSAM's gradient and SAM's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from msam.shards import Groups, groups_of, here, parted, sum_over
from msam_analysis.measures.momentum import gradients, momentum_buffers
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import read, widest
from msam_analysis.results import SamMsamAngle, Scalar

_BLOCK = 2**15

Products = tuple[float, float, float]
"""``⟨a, b⟩``, ``‖a‖²`` and ``‖b‖²``."""


def momentum_gradient_cosine(optimizer: torch.optim.Optimizer) -> Scalar:
    r"""Return ``cos(v_{t−1}, g_t) = ⟨v, g⟩ / (‖v‖ ‖g‖)`` over all parameters together (exhibit F2C).

    Call it after ``loss.backward()`` and before ``optimizer.step()``: then ``.grad`` holds the new gradient, and the
    buffer is still the direction of the last step. A negative value says that the last step overshot: a further step
    along ``−v`` raises the loss of the new batch.

    Parameters
    ----------
    optimizer
        Any optimizer of :mod:`msam`, or of torch's SGD and Adam families. Nothing is changed.

    Returns
    -------
    Scalar
        A number in [−1, 1], which is a ``float`` too; NaN before the first step, when there is no momentum yet, if
        either vector is zero, or if one is not finite.

    Raises
    ------
    RuntimeError
        No parameter has a gradient, or the optimizer keeps no momentum.

    Notes
    -----
    A parameter without a gradient or without a buffer counts as zeros. In groups with ``maximize=True`` the gradient is
    that of ``−f``, as in their buffers.
    """
    grads, buffers = gradients(optimizer), momentum_buffers(optimizer)
    value = cosine([total_products(buffers, grads)]) if buffers else math.nan
    return Scalar(
        quantity="cosine of momentum and gradient", value=value, settings={"optimizer": type(optimizer).__name__}
    )


def inner_products(first: Mapping[Tensor, Tensor], second: Mapping[Tensor, Tensor]) -> dict[Tensor, Products]:
    """Return the inner products of two vectors, one row for each parameter of either.

    They are accumulated in float64 (float32 where a device has none) and fetched all at once, so that a training loop
    does not wait for the device at every parameter.

    Parameters
    ----------
    first, second
        The vectors: a tensor for each parameter, of its shape. A missing parameter counts as zeros.
    """
    parameters = list(dict.fromkeys((*first, *second)))
    numbers = _numbers(parameters, first, second, apart=True)
    return dict(zip(parameters, zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True), strict=True))


def total_products(first: Mapping[Tensor, Tensor], second: Mapping[Tensor, Tensor]) -> Products:
    """Return the sum of :func:`inner_products` over all parameters, which is cheaper for many small parameters."""
    numbers = _numbers(list(dict.fromkeys((*first, *second))), first, second, apart=False)
    return sum(numbers[::3]), sum(numbers[1::3]), sum(numbers[2::3])


def cosine(products: Iterable[Products]) -> float:
    """Return the cosine of two vectors from the inner products of their parts; NaN if one is zero or not finite."""
    rows = list(products)
    ab, aa, bb = (sum(row[column] for row in rows) for column in range(3))
    norms = math.sqrt(aa) * math.sqrt(bb)
    if not 0 < norms < math.inf:
        return math.nan
    return max(-1.0, min(1.0, ab / norms))


def _numbers(
    parameters: Sequence[Tensor], first: Mapping[Tensor, Tensor], second: Mapping[Tensor, Tensor], *, apart: bool
) -> list[float]:
    """Return three inner products for every parameter, or (not ``apart``) for every few of them."""
    if not parameters:
        return []
    zero = torch.zeros((), dtype=widest(parameters[0].device), device=parameters[0].device)
    if parted(parameters) is here:
        return _sharded_numbers(parameters, first, second, zero)
    numbers: list[Tensor] = []
    for together in _packs(parameters):
        if together[0].numel() > _BLOCK:
            numbers += _products(first.get(together[0]), second.get(together[0]), zero)
            continue
        a, b = (_packed(together, vector, zero) for vector in (first, second))
        sizes = [len(_flat(parameter)) for parameter in together] if apart else [len(a)]
        for x, y in zip(a.split(sizes), b.split(sizes), strict=True):
            numbers += (x @ y, x @ x, y @ y)
    found: list[float] = torch.stack(numbers).tolist()
    return found


def _sharded_numbers(
    parameters: Sequence[Tensor], first: Mapping[Tensor, Tensor], second: Mapping[Tensor, Tensor], zero: Tensor
) -> list[float]:
    """Return three inner products for every parameter, of which processes may have parts."""
    table = zero.new_empty(len(parameters), 3)
    together: dict[Groups, list[int]] = {}
    for index, parameter in enumerate(parameters):
        a, b = (here([vector[parameter]])[0] if parameter in vector else None for vector in (first, second))
        table[index] = torch.stack(_products(a, b, zero))
        together.setdefault(groups_of(parameter), []).append(index)
    for groups, rows in together.items():
        table[rows] = sum_over(groups, table[rows])
    found: list[float] = table.flatten().tolist()
    return found


def _packs(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters in their order: small ones in groups on one device, large ones each by itself."""
    together: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if together and (size + parameter.numel() > _BLOCK or parameter.device != together[0].device):
            yield together
            together, size = [], 0
        together.append(parameter)
        size += parameter.numel()
    yield together


def _packed(parameters: Sequence[Tensor], vector: Mapping[Tensor, Tensor], zero: Tensor) -> Tensor:
    """Return parts of a vector as one tensor, converted at once: for small parts calls cost more than numbers."""
    parts = [
        _flat(vector[p].to(p.device)) if p in vector else zero.new_zeros(len(_flat(p)), device=p.device)
        for p in parameters
    ]
    return torch.cat(parts).to(zero)


def _flat(tensor: Tensor) -> Tensor:
    """Return the numbers in a tensor; for a complex one its real and imaginary parts."""
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _products(first: Tensor | None, second: Tensor | None, zero: Tensor) -> list[Tensor]:
    """Return the three inner products of a pair on the device of ``zero``; a missing tensor counts as zeros."""
    sums = [zero, zero, zero]
    for a, b in zip(_blocks(first, second), _blocks(second, first), strict=True):
        pairs = ((a, b), (a, a), (b, b))
        sums = [
            total if x is None or y is None else total + (x @ y.to(x)).to(zero)
            for total, (x, y) in zip(sums, pairs, strict=True)
        ]
    return sums


def _blocks(tensor: Tensor | None, other: Tensor | None) -> Iterator[Tensor | None]:
    """Yield a tensor in pieces of the widest precision; yield ``None`` as often if only the other tensor exists."""
    parts = [None if each is None else _flat(each) for each in (tensor, other)]
    size = max(1, *(len(each) for each in parts if each is not None))
    # On a CPU the pieces fit into its cache; a GPU takes the whole, as each launch costs.
    length = _BLOCK if all(each is None or each.device.type == "cpu" for each in (tensor, other)) else size
    flat = parts[0]
    for start in range(0, size, length):
        yield None if flat is None else flat[start : start + length].to(widest(flat.device))


def sam_msam_angle(
    objective: Objective, momentum: Tensor, rhos: Sequence[float], *, rho_sam: float, w: Tensor | None = None
) -> SamMsamAngle:
    r"""Return the angle between MSAM's gradient and SAM's, over the strength of MSAM's perturbation (exhibit F3).

    The gradients are ``g_SGD = ∇L(w)``, ``g_SAM = ∇L(w + ρ_SAM g_SGD/‖g_SGD‖)`` and ``g_MSAM(ρ) = ∇L(w − ρ v/‖v‖)``.
    The last one is projected into ``span(g_SAM, g_SGD)``. Its angle there is counted from ``g_SAM``, positive on the
    side of ``g_SGD``. At ρ = 0 it is the angle between SAM's gradient and the plain one. Where it is 0, at ``ρ_0``,
    MSAM's gradient points in this plane where SAM's does.

    It costs one gradient, one more for SAM, and one for each ρ other than 0.

    Memory: eight vectors, half of them in float64.

    Parameters
    ----------
    objective
        The loss, usually that of the batch of a training step.
    momentum
        The momentum buffer ``v``, shape ``(size,)``; its length does not matter.
    rhos
        Strengths of MSAM's perturbation; 0 is added. Negative ones perturb along ``+v``.
    rho_sam
        Radius of SAM's displacement, positive.
    w
        The weights, shape ``(size,)``; default: the current ones.

    Returns
    -------
    SamMsamAngle
        Angles in degrees, and ``rho_0`` with a bracket that contains it.

    Raises
    ------
    ValueError
        ``rho_sam`` is not positive, ``rhos`` is empty or not finite, or a vector has another shape.

    Notes
    -----
    Becker et al., arXiv 2401.12033, figure 3. Gradients that differ by less than 100 units of rounding count as
    parallel; the plane is then unknown and the angles are NaN.
    """
    if not (math.isfinite(rho_sam) and rho_sam > 0):
        raise ValueError(f"rho_sam must be a positive number, got {rho_sam!r}: pass the radius SAM would be run with")
    if not rhos or not all(math.isfinite(rho) for rho in rhos):
        raise ValueError(f"rhos must be finite and at least one, got {list(rhos)}: pass e.g. [0.5, 1, 2, 4]")
    objective.layout.check(momentum, "momentum")
    w = objective.point() if w is None else w
    at = sorted({0.0, *(float(rho) for rho in rhos)})
    space, wide = objective.space, widest(objective.device)
    unit = _unit(momentum.to(w), space)
    undefined = space.any(~unit.isfinite())
    plain = objective.gradient(w)
    sam = _unit(objective.gradient(w + rho_sam * _unit(plain, space)).to(wide), space)
    beside = plain.to(wide) - space.dot(sam, plain.to(wide)) * sam
    beside = beside - space.dot(sam, beside) * sam  # once more, as the remainder may be mostly rounding
    known = space.norm(beside) > 100 * torch.finfo(objective.precision).eps * space.norm(plain.to(wide))
    beside = torch.where(known, _unit(beside, space), math.nan)
    numbers = []
    for rho in at:
        gradient = plain
        if rho != 0:
            gradient = plain * math.nan if undefined else objective.gradient(w - rho * unit)
        numbers += [space.dot(gradient.to(wide), sam), space.dot(gradient.to(wide), beside), space.norm(gradient)]
    found = read(*numbers)
    angles, shares = [], []
    for x, y, length in zip(found[::3], found[1::3], found[2::3], strict=True):
        finite = math.isfinite(x) and math.isfinite(y)
        angles.append(math.degrees(math.atan2(y, x)) if finite else math.nan)
        shares.append(min(1.0, math.hypot(x, y) / length) if finite else math.nan)
    root, bracket = _root(at, angles)
    return SamMsamAngle(
        rhos=torch.tensor(at, dtype=torch.float64),
        angles=torch.tensor(angles, dtype=torch.float64),
        shares=torch.tensor(shares, dtype=torch.float64),
        rho_0=root,
        bracket=bracket,
        rho_sam=float(rho_sam),
        settings=objective.settings,
    )


def _unit(vector: Tensor, space: Space) -> Tensor:
    """Return the vector with unit length; NaN for a zero vector."""
    return vector / space.norm(vector)


def _root(at: Sequence[float], angles: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the first zero of the piecewise linear curve and the two points around it; NaN if there is none."""
    for low, high, a, b in zip(at, at[1:], angles, angles[1:], strict=False):
        # Through ±180 degrees the sign changes as well: there the gradient points the other way.
        if a * b <= 0 and abs(a - b) < 180:
            return low + (high - low) * (a / (a - b) if a != b else 0.0), (low, high)
    return math.nan, (math.nan, math.nan)
