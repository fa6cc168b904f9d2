"""Answers computed without the package: dense Hessians, eigendecompositions, secular equations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor, nn

from .cases import Case, cast, concatenate

with warnings.catch_warnings():
    # torch loads this at the first forward-mode derivative; it still decorates functions with torch.jit.script.
    warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)
    import torch._decomp.decompositions_for_jvp


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad, tied ones once, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def flatten(model: nn.Module) -> Tensor:
    """Return the trainable weights as one float64 vector."""
    return torch.cat([parameter.detach().double().flatten() for parameter in trainable(model).values()])


def reference_loss(
    case: Case, model: nn.Module, batches: list[Any], policy: str = "eval", names: list[str] | None = None
) -> Callable[[Tensor], Tensor]:
    """Return the loss of the concatenated data as a function of one flat float64 vector."""
    fixed = {name: value.detach().double() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    chosen = list(trainable(model)) if names is None else names
    shapes = [fixed[name].shape for name in chosen]
    batches = [cast(batch, torch.float64) for batch in batches]
    parts = batches if policy == "batch" else [concatenate(batches)]

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        values = dict(fixed) | {
            name: piece.reshape(shape) for name, piece, shape in zip(chosen, pieces, shapes, strict=True)
        }
        sums, counts = zip(*(case.reference(values, part, policy) for part in parts), strict=True)
        return torch.stack(sums).sum() / torch.stack(counts).sum()

    return loss


def derivatives(loss: Callable[[Tensor], Tensor], point: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient and the Hessian-vector product, forward over reverse."""
    gradient, hvp = torch.func.jvp(torch.func.grad(loss), (point,), (v,))  # type: ignore[misc]
    return gradient, hvp


def dense_hessian(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Return the dense float64 Hessian."""
    hessian: Tensor = torch.func.hessian(loss)(point)
    return (hessian + hessian.T) / 2


def rotation(size: int, seed: int) -> np.ndarray:
    """Return an orthogonal matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)))


def symmetric(spectrum: Any, seed: int = 0) -> Tensor:
    """Return a dense symmetric float64 matrix with the given eigenvalues."""
    spectrum = np.asarray(spectrum, dtype=float)
    q = rotation(len(spectrum), seed)
    matrix = (q * spectrum) @ q.T
    return torch.from_numpy((matrix + matrix.T) / 2)


def trust_region_maximum(H: Any, g: Any, rho: float) -> float:
    """Return the maximum of ``½ eᵀHe + gᵀe`` over ``‖e‖ ≤ rho`` (Moré and Sorensen 1983).

    With ``H = QΛQᵀ`` a boundary maximum solves ``(μI − H) e = g`` for ``μ ≥ max(λ_max, 0)``. The multiplier is the
    root of the secular equation ``‖(μI − H)⁻¹ g‖ = rho``, unless g has no part in the top eigenspace and the
    equation has no root there (the hard case), when the top eigenvector fills up the radius.
    """
    values, vectors = scipy.linalg.eigh(np.asarray(H, dtype=float))
    c = vectors.T @ np.asarray(g, dtype=float)
    top = values[-1]
    scale = max(np.abs(values).max(), np.linalg.norm(c) / rho, np.finfo(float).tiny)

    def value(z: np.ndarray) -> float:
        return float(0.5 * np.sum(values * z * z) + np.sum(c * z))

    if top < 0:
        interior = -c / values
        if np.linalg.norm(interior) <= rho:
            return value(interior)
    if np.linalg.norm(c) == 0:
        return 0.5 * max(float(top), 0.0) * rho**2

    floor = max(top, 0.0)
    # Work with the excess s = μ − floor, so that μ − λ keeps its digits near the pole.
    gaps = floor - values

    def excess_norm(s: float) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(c == 0, 0.0, c / (s + gaps))
        return float(np.linalg.norm(z))

    if excess_norm(0.0) <= rho:  # hard case: no root above the floor
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where((c == 0) | (gaps == 0), 0.0, c / gaps)
        z[-1] += np.sqrt(max(rho**2 - np.linalg.norm(z) ** 2, 0.0))
        return value(z)
    upper = np.linalg.norm(c) / rho
    lower = upper / 2
    while excess_norm(lower) < rho:
        lower /= 2
        if lower < 1e-300 * scale:
            break
    root = scipy.optimize.brentq(
        lambda log_s: np.log(excess_norm(np.exp(log_s)) / rho),
        np.log(lower),
        np.log(2 * upper),
        xtol=1e-15,
        rtol=8.9e-16,
        maxiter=500,
    )
    z = c / (np.exp(root) + gaps)
    z *= rho / np.linalg.norm(z)
    return value(z)


def dense_gauss_newton(
    forward: Callable[[Tensor, Any], Tensor],
    loss_sum: Callable[[Tensor, Any], tuple[Tensor, Tensor | int]],
    point: Tensor,
    batches: list[Any],
) -> Tensor:
    """Return ``Σ JᵀHJ / Σ n`` from dense Jacobians and Hessians; ``loss_sum`` returns a sum over the batch and n."""
    total, count = torch.zeros(len(point), len(point), dtype=torch.float64), 0.0
    for batch in batches:
        output = forward(point, batch)
        J = torch.func.jacrev(lambda w, batch=batch: forward(w, batch).flatten())(point)
        H = torch.func.hessian(lambda z, batch=batch, like=output: loss_sum(z.view_as(like), batch)[0])(
            output.detach().flatten()
        )
        total += J.T @ H @ J
        count += float(loss_sum(output, batch)[1])
    return total / count


def dense_symmetric(size: int, seed: int) -> Tensor:
    """Return a symmetric float64 matrix with numbers of order one."""
    matrix = torch.from_numpy(np.random.default_rng(seed).standard_normal((size, size)))
    return (matrix + matrix.T) / 2
