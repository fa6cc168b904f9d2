"""The spectral density of a symmetric operator by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import torch

from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.progress import told
from msam_analysis.objective.vectors import no_autocast
from msam_analysis.results import ApproximationWarning, ConvergenceWarning, SpectralDensity
from msam_analysis.spectra.beyond import Inside, require_finite
from msam_analysis.spectra.chain import Chain, advance
from msam_analysis.spectra.goal import Goal
from msam_analysis.spectra.peers import Backend, check_backend
from msam_analysis.spectra.subspace import wide
from msam_analysis.spectra.top import as_operator, rounding, search_for

_TOGETHER = 16  # chains whose products are made at once, where memory is enough


@numbers
def spectral_density(
    target: SymmetricOperator | Objective,
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

    First Lanczos finds the eigenpairs at both ends, with certified residuals. They, and every other Ritz pair ``W, Θ``
    that converged on the way, enter with their own value and weight ``1/n``. The rest of the spectrum is that of
    ``P A P``, ``P = I − W Wᵀ``; stochastic Lanczos quadrature finds it (Lin, Saad & Yang 2016; Ubaru, Chen & Saad 2017;
    for Hessians Ghorbani, Krishnan & Xiao 2019). From each random start ``z``, uniform on the unit sphere of the
    complement of ``W``, ``steps`` products make a tridiagonal ``T`` with eigenvalues ``θ_j`` and eigenvectors ``y_j``.
    Then ``Σ_j (y_j)_1² δ(x − θ_j)``, with the squared *first* components, has the first ``2 steps − 1`` moments of the
    spectral measure of ``z``, whose mean over ``z`` is the density of the rest. Most of the accuracy comes from taking
    the outliers out. The error here is the 1-Wasserstein distance to the eigenvalues of the dense Hessian, relative to
    their spread. On two digits networks of 1030 parameters the defaults reach 7e-5 and 9e-5 with 540 and 710 products;
    without outliers taken out (``extremes=0``) it is 7e-4 and 9e-4 with 400 products, and hardly less with 800.

    Parameters
    ----------
    target
        A symmetric operator, or an objective, which stands for its Hessian.
    probes
        Number of random start vectors, at least 2; the band shows how they differ. Default 10.
    steps
        Products for each start vector. Default 40; twice as many reduce the error above by a third.
    extremes
        Number of eigenpairs found exactly at each end. Default 5. With 0 no outliers are taken out.
    sigma
        Standard deviation of the kernel, in units of the eigenvalues; default 1/200 of their spread, but at least the
        ``resolution`` of the result: the range of what is not taken out, over ``steps``. A narrower kernel shows single
        nodes, not the density. Another one needs no new products: :meth:`~msam_analysis.results.SpectralDensity.at`.
    points
        Number of grid points, from 4 ``sigma`` below the smallest value to 4 ``sigma`` above the largest; default four
        for each ``sigma``.
    tolerance, max_hvps
        Tolerance and budget of the search for the eigenpairs at the ends; see :func:`~msam_analysis.top_eigenvalues`.
    memory_bytes
        Bytes that may be held; default that of the objective, 4 GiB. If ``steps`` vectors fit, every chain is
        re-orthogonalised in full; otherwise only against ``W`` and its last two vectors, which moves nodes and their
        weights, but hardly the sums over them (Knizhnerman 1996). The settings say which.
    backend
        ``"native"``. PyHessian's ``density()`` calls ``torch.eig``, which torch has removed.
    seed
        Seed of the random start vectors; the global generators are neither read nor advanced.

    Returns
    -------
    SpectralDensity
        Grid, density and its standard error, nodes and weights, the eigenpairs at both ends with their residuals.

    Raises
    ------
    ValueError
        An argument is out of range, ``memory_bytes`` is too small, ``backend="pyhessian"``, or the operator returns NaN
        or infinity.
    TypeError
        The target is neither an objective nor an operator.

    Warns
    -----
    ConvergenceWarning
        The eigenpairs at the ends did not converge within the budget, or it was not excluded that one was missed.
    ApproximationWarning
        ``sigma`` is below the ``resolution``: raise it, or raise ``steps``. The result has ``converged`` false then.
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
    k = min(2 * extremes, operator.size)
    with no_autocast(operator.device):
        exact, margin = _ends(operator, Goal(k, "ends", tolerance, rounding(operator)), max_hvps, memory_bytes, seed)
        spent = operator.products - before
        chains, remembered = _chains(operator, exact, probes, steps, memory_bytes, seed)
    top, bottom = torch.arange(k)[::2], torch.arange(k)[1::2]
    converged = extremes == 0 or margin < math.inf
    if not converged:
        warnings.warn(
            f"spectral_density: after {spent} Hessian-vector products the residuals at the ends are "
            f"{', '.join(f'{r:.1e}' for r in exact.norms[:k].tolist())}; expected at most {tolerance:g} "
            "of the value and a check that none was missed: raise max_hvps or tolerance, or lower extremes",
            ConvergenceWarning,
            stacklevel=3,
        )
    pairs = [chain.ritz() for chain in chains]
    counts = torch.tensor([len(exact.values), *(len(levels) for levels, _ in pairs)])
    alike = torch.full_like(exact.values, 1 / operator.size)
    left = (operator.size - len(exact.values)) / operator.size
    found = SpectralDensity.smoothed(
        sigma=sigma,
        points=points,
        nodes=torch.cat([exact.values, *(levels for levels, _ in pairs)]),
        weights=torch.cat([alike, *(left * vectors[0] ** 2 for _, vectors in pairs)]),
        probe=torch.arange(-1, len(chains)).repeat_interleave(counts),
        exhausted=torch.tensor([chain.exhausted for chain in chains], dtype=torch.bool),
        top=exact.values[top],
        top_residuals=exact.norms[top],
        bottom=exact.values[bottom],
        bottom_residuals=exact.norms[bottom],
        converged=converged,
        margin=margin,
        size=operator.size,
        steps=steps,
        hvps=operator.products - before,
        settings={**operator.settings, "reorthogonalised": remembered},
    )
    if found.sigma < found.resolution:
        warnings.warn(
            f"spectral_density: a kernel of sigma = {found.sigma:g} is narrower than the {found.resolution:.3g} that "
            f"{steps} steps resolve: expected a larger sigma or more steps; the density shows single nodes",
            ApproximationWarning,
            stacklevel=2,
        )
    return found


def _ends(
    operator: SymmetricOperator, goal: Goal, max_hvps: int | None, memory_bytes: int | None, seed: int
) -> tuple[Inside, float]:
    """Return the eigenpairs at the ends and all others that converged; the margin is infinite if the ends did not."""
    if goal.k == 0:
        none = torch.zeros(0, dtype=torch.float64)
        vectors = torch.zeros(operator.space.here, 0, dtype=wide(operator), device=operator.device)
        return Inside(vectors, none, none, none, 0.0), math.inf
    search, _, margin = search_for(operator, goal, max_hvps=max_hvps, memory_bytes=memory_bytes, seed=seed)
    inside = search.inside()
    return dataclasses.replace(inside, vectors=inside.vectors.clone()), margin


def _chains(
    operator: SymmetricOperator, exact: Inside, probes: int, steps: int, memory_bytes: int | None, seed: int
) -> tuple[list[Chain], bool]:
    """Return one chain for each random start, and whether they were re-orthogonalised in full."""
    if len(exact.values) == operator.size:
        return [], True
    known = exact.vectors
    vector = operator.space.most * torch.finfo(known.dtype).bits // 8
    room = (operator.memory_bytes if memory_bytes is None else memory_bytes) // vector - known.shape[1] - 6
    remember = steps if room >= steps + 4 else 0
    group = max(1, min(_TOGETHER, room // (remember + 4)))
    norm = float(exact.values.abs().max()) if len(exact.values) else 0.0
    chains: list[Chain] = []
    most = operator.products + probes * steps
    for first in range(0, probes, group):
        numbers = range(first, min(first + group, probes))
        starts = [operator.space.gaussian(1, seed=seed, like=known, use=f"density {number}") for number in numbers]
        started = [Chain(start[:, 0], known, norm=norm, remember=remember, space=operator.space) for start in starts]
        _run(operator, started, steps, most)
        chains += started
    return chains, remember > 0


def _run(operator: SymmetricOperator, chains: Sequence[Chain], steps: int, most: int) -> None:
    """Advance all chains by ``steps`` products, of ``most`` in all, made together; let go of their vectors."""
    for _ in range(steps):
        going = [chain for chain in chains if not chain.exhausted]
        if not going:
            break
        products = operator.matmat(torch.stack([chain.current for chain in going], dim=1))
        told("products", operator.products, most)  # no budget ends a density
        advance(going, products.unbind(1))
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
        raise ValueError(f"points must be at least 2, got {points!r}: leave it out for four for each sigma")
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}: 1e-4 is the default")
