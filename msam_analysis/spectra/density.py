"""The spectral density of a symmetric operator by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.vectors import gaussian, no_autocast
from msam_analysis.results import ConvergenceWarning, SpectralDensity
from msam_analysis.spectra.beyond import require_finite
from msam_analysis.spectra.chain import Chain
from msam_analysis.spectra.goal import Goal
from msam_analysis.spectra.peers import Backend, check_backend
from msam_analysis.spectra.subspace import wide
from msam_analysis.spectra.top import MEMORY_BYTES, HasHessian, as_operator, rounding, search_for

_TOGETHER = 16  # probes whose products are made at once, where memory is enough


def spectral_density(
    target: SymmetricOperator | HasHessian,
    *,
    probes: int = 10,
    steps: int = 40,
    extremes: int = 5,
    sigma: float | None = None,
    points: int | None = None,
    tolerance: float = 1e-4,
    max_hvps: int | None = None,
    memory_bytes: int | None = None,
    backend: Backend = "native",
    seed: int = 0,
) -> SpectralDensity:
    r"""Return the density of the eigenvalues, ``φ(x) = (1/n) Σ_i δ(x − λ_i)``, smoothed by a Gaussian kernel.

    First the eigenpairs at both ends, by Lanczos, to certified residuals. They, and every other Ritz pair ``W, Θ`` that
    converged on the way, enter with weight ``1/n`` each at their own place. What is left of the spectrum is that of
    ``P A P``, ``P = I − W Wᵀ``, and is found by stochastic Lanczos quadrature (Lin, Saad & Yang 2016; Ubaru, Chen &
    Saad 2017; for Hessians Ghorbani, Krishnan & Xiao 2019): from each random start ``z``, uniform on the unit sphere of
    the complement of ``W``, ``steps`` products make a tridiagonal ``T`` with eigenvalues ``θ_j`` and eigenvectors
    ``y_j``, and ``Σ_j (y_j)_1² δ(x − θ_j)``, with the squared *first* components, has the first ``2 steps − 1`` moments
    of the measure that ``z`` sees, whose mean over ``z`` is the density of what is left. Most of the accuracy comes
    from taking the outliers out: as the 1-Wasserstein distance to the eigenvalues of the dense Hessian, relative to
    their spread, on two digits networks of 1030 parameters, the defaults reach 7e-5 and 9e-5 with 540 and 710 products;
    without (``extremes=0``) it is 7e-4 and 9e-4 with 400 products, and hardly less with 800.

    Parameters
    ----------
    target
        A symmetric operator, or an objective (its Hessian).
    probes
        Random starts, at least 2: the band is over them. Default 10.
    steps
        Products of each. Default 40; twice as many bring the distance above down by a third.
    extremes
        Eigenpairs at each end that are found exactly. Default 5. With 0, none are, and nothing is taken out.
    sigma
        Standard deviation of the kernel, in units of the eigenvalues; default 1/200 of their spread. Another one needs
        no new products: :meth:`~msam_analysis.results.SpectralDensity.at`.
    points
        Of the grid, which reaches 4 ``sigma`` beyond both ends; default four a ``sigma``.
    tolerance, max_hvps
        Of the search for the eigenpairs at the ends, as in :func:`~msam_analysis.top_eigenvalues`.
    memory_bytes
        What may be held, default 4 GiB. Where it is enough for ``steps`` vectors, every probe is re-orthogonalised in
        full; otherwise against ``W`` and the last two, which moves nodes and their weights, but hardly the sums over
        them (Knizhnerman 1996). The settings say which.
    backend
        ``"native"``. PyHessian's ``density()`` calls ``torch.eig``, which torch has no more.
    seed
        Of the starts; the global generators are neither read nor advanced.

    Returns
    -------
    SpectralDensity
        Grid, density and its standard error, nodes and weights, the eigenpairs at both ends with their residuals.

    Raises
    ------
    ValueError
        An argument is out of range, ``memory_bytes`` too small, ``backend="pyhessian"``, or the operator returns NaN or
        infinity.
    TypeError
        The target is neither an objective nor an operator.

    Warns
    -----
    ConvergenceWarning
        The eigenpairs at the ends did not converge within the budget, or it was not excluded that one was missed.
    """
    check_backend(backend)
    if backend == "pyhessian":
        raise ValueError(
            "PyHessian 0.1 has no density on this torch: its density() calls torch.eig, which torch removed; expected "
            "backend='native'"
        )
    operator = as_operator(target)
    _check(probes, steps, extremes, sigma, points, tolerance)
    before = operator.products
    with no_autocast(operator.device):
        exact = _ends(operator, extremes, tolerance, max_hvps, memory_bytes, seed)
        chains, remembered = _chains(operator, exact, probes, steps, memory_bytes, seed)
    left = (operator.size - len(exact.values)) / operator.size
    nodes, weights, owners = (
        [exact.values],
        [torch.full_like(exact.values, 1 / operator.size)],
        [-1] * len(exact.values),
    )
    for index, chain in enumerate(chains):
        levels, vectors = chain.ritz()
        nodes.append(levels)
        weights.append(left * vectors[0] ** 2)
        owners += [index] * len(levels)
    if not exact.converged:
        warnings.warn(
            f"spectral_density: after {exact.products} Hessian-vector products the residuals at the ends are "
            f"{', '.join(f'{r:.1e}' for r in exact.residuals[exact.wanted].tolist())}; expected at most {tolerance:g} "
            "of the value and a check that none was missed: raise max_hvps or tolerance, or lower extremes",
            ConvergenceWarning,
            stacklevel=2,
        )
    top, bottom = exact.wanted[::2], exact.wanted[1::2]
    return SpectralDensity.smoothed(
        sigma=sigma,
        points=points,
        nodes=torch.cat(nodes),
        weights=torch.cat(weights),
        probe=torch.tensor(owners, dtype=torch.int64),
        exhausted=torch.tensor([chain.exhausted for chain in chains], dtype=torch.bool),
        top=exact.values[top],
        top_residuals=exact.residuals[top],
        bottom=exact.values[bottom],
        bottom_residuals=exact.residuals[bottom],
        converged=exact.converged,
        margin=exact.margin,
        size=operator.size,
        steps=steps,
        hvps=operator.products - before,
        settings={**operator.settings, "reorthogonalised": remembered},
    )


class _Exact(NamedTuple):
    """Eigenpairs that are known: vectors (columns), values, residuals; which are the ends, taking turns."""

    vectors: Tensor
    values: Tensor
    residuals: Tensor
    wanted: Tensor
    converged: bool
    margin: float
    products: int


def _ends(
    operator: SymmetricOperator,
    extremes: int,
    tolerance: float,
    max_hvps: int | None,
    memory_bytes: int | None,
    seed: int,
) -> _Exact:
    if extremes == 0:
        none = torch.zeros(0, dtype=torch.float64)
        vectors = torch.zeros(operator.size, 0, dtype=wide(operator), device=operator.device)
        return _Exact(vectors, none, none, torch.zeros(0, dtype=torch.int64), True, math.inf, 0)
    before = operator.products
    k = min(2 * extremes, operator.size)
    goal = Goal(k, "ends", tolerance, rounding(operator))
    search, found, margin = search_for(operator, goal, max_hvps=max_hvps, memory_bytes=memory_bytes, seed=seed)
    known = search.inside()
    return _Exact(
        vectors=known.vectors.clone(),
        values=known.values,
        residuals=known.norms,
        wanted=torch.arange(k),
        converged=found.done and margin < math.inf,
        margin=margin,
        products=operator.products - before,
    )


def _chains(
    operator: SymmetricOperator, exact: _Exact, probes: int, steps: int, memory_bytes: int | None, seed: int
) -> tuple[list[Chain], bool]:
    """Return the chains of all probes, and whether they were re-orthogonalised in full."""
    if len(exact.values) == operator.size:
        return [], True
    vector = operator.size * torch.finfo(exact.vectors.dtype).bits // 8
    room = (MEMORY_BYTES if memory_bytes is None else memory_bytes) // vector - exact.vectors.shape[1] - 6
    remember = steps if room >= steps + 4 else 0
    group = max(1, min(_TOGETHER, room // (remember + 4)))
    norm = float(exact.values.abs().max()) if len(exact.values) else 0.0
    chains: list[Chain] = []
    for first in range(0, probes, group):
        started = [
            Chain(
                gaussian(operator.size, 1, seed=seed, like=exact.vectors, use=f"density {index}")[:, 0],
                exact.vectors,
                norm=norm,
                remember=remember,
            )
            for index in range(first, min(first + group, probes))
        ]
        _run(operator, started, steps)
        chains += started
    return chains, remember > 0


def _run(operator: SymmetricOperator, chains: Sequence[Chain], steps: int) -> None:
    """Take all chains their steps, with their products made together, and let go of their vectors."""
    for _ in range(steps):
        going = [chain for chain in chains if not chain.exhausted]
        if not going:
            break
        products = operator.matmat(torch.stack([chain.current for chain in going], dim=1))
        for chain, product in zip(going, products.unbind(1), strict=True):
            chain.advance(product)
        require_finite(torch.tensor([chain.last for chain in going]))
    for chain in chains:
        chain.forget()


def _check(probes: int, steps: int, extremes: int, sigma: float | None, points: int | None, tolerance: float) -> None:
    for name, number, least in (("probes", probes, 2), ("steps", steps, 1), ("extremes", extremes, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be a positive number, in units of the eigenvalues, got {sigma!r}")
    if points is not None and points < 2:
        raise ValueError(f"points must be at least 2, got {points!r}: leave it out for four a sigma")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}: 1e-4 is the default")
