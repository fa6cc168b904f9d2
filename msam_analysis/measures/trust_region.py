"""The largest value of a small dense quadratic in a ball, exactly.

Moré & Sorensen, *Computing a trust region step* (1983), with the signs turned from a minimum to a maximum.
"""

from __future__ import annotations

import torch
from scipy.optimize import brentq
from torch import Tensor


def maximize_quadratic(matrix: Tensor, linear: Tensor, radius: float) -> tuple[Tensor, float]:
    r"""Return the maximiser of ``m(y) = ½ yᵀ T y + cᵀ y`` over ``‖y‖₂ ≤ radius``, and its multiplier.

    The multiplier ``μ ≥ max(λ_max(T), 0)`` solves ``(μ I − T) y = c`` with ``μ (radius − ‖y‖) = 0``. Three cases: an
    interior maximum (``T`` negative definite and ``‖T⁻¹c‖ ≤ radius``), the regular one (``‖y(μ)‖ = radius`` for one
    ``μ`` beyond the spectrum), and the hard one (``c`` has no part along the top eigenvector, which then supplies the
    length that is missing to the radius).

    Parameters
    ----------
    matrix
        ``T``, shape ``(m, m)``, symmetric, float64.
    linear
        ``c``, shape ``(m,)``, float64.
    radius
        Radius of the ball, positive.

    Returns
    -------
    tuple
        ``y`` of shape ``(m,)``, and ``μ``.
    """
    values, vectors = torch.linalg.eigh(matrix)
    c = vectors.T @ linear
    top = float(values[-1])
    floor = max(top, 0.0)

    def norm(delta: float) -> float:
        return float((c / (delta + (floor - values))).norm())

    scale = max(float(values.abs().max()), float(c.norm()) / radius, torch.finfo(torch.float64).tiny)
    smallest = 1e-14 * scale
    if top < 0 and norm(0.0) <= radius:
        return vectors @ (-c / values), 0.0
    if norm(smallest) <= radius:
        # Hard case (or c = 0): the top eigenspace supplies the rest of the length.
        regular = floor - values > 1e-12 * scale
        y = torch.where(regular, c / torch.where(regular, floor - values, torch.ones_like(values)), torch.zeros_like(c))
        rest = max(radius**2 - float(y @ y), 0.0) ** 0.5
        if top >= 0:
            y[-1] = rest if float(c[-1]) >= 0 else -rest
        return vectors @ y, floor
    delta = brentq(
        lambda d: norm(d) / radius - 1, smallest, float(c.norm()) / radius + smallest, xtol=1e-300, rtol=1e-14
    )
    y = c / (delta + (floor - values))
    return vectors @ (y * (radius / y.norm())), floor + delta
