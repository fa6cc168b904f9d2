"""Extreme eigenpairs by the chosen solver, and a check that it missed none."""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.vectors import no_autocast
from msam_analysis.results import ConvergenceWarning, Eigenpairs
from msam_analysis.spectra.beyond import look_beyond
from msam_analysis.spectra.goal import Found, Goal, Which, ordering, random_vectors
from msam_analysis.spectra.lanczos import LanczosSearch
from msam_analysis.spectra.peers import Backend, check_backend, pyhessian_eigenvalues
from msam_analysis.spectra.power import PowerSearch
from msam_analysis.spectra.subspace import wide

Method = Literal["lanczos", "power"]


def as_operator(target: SymmetricOperator | Objective) -> SymmetricOperator:
    """Return the operator itself, or the Hessian of an objective; raise ``TypeError`` for anything else."""
    if isinstance(target, SymmetricOperator):
        return target
    if not isinstance(target, Objective):
        raise TypeError(
            f"expected an Objective or a SymmetricOperator, got {type(target).__name__}: wrap a model and its data in "
            "msam_analysis.Objective, or a matrix in msam_analysis.MatrixOperator"
        )
    return target.hessian()


@numbers
def top_eigenvalues(
    target: SymmetricOperator | Objective,
    k: int = 5,
    *,
    method: Method = "lanczos",
    which: Which = "largest",
    tolerance: float = 1e-4,
    max_hvps: int | None = None,
    start: Tensor | None = None,
    confirm: bool = True,
    memory_bytes: int | None = None,
    basis_dtype: torch.dtype | None = None,
    backend: Backend = "native",
    seed: int = 0,
) -> Eigenpairs:
    r"""Return ``k`` extreme eigenpairs ``A v = λ v`` of a symmetric operator (TA1 of the paper).

    ``"lanczos"`` builds a Krylov space with full re-orthogonalisation, restarted where memory is short (Wu & Simon
    2000). ``"power"`` is power iteration on a block with Rayleigh-Ritz extraction (Rutishauser 1970): one step
    multiplies every vector not yet converged; converged ones are locked and deflated; a few guard vectors beyond ``k``
    make close eigenvalues separate. Where values of the other sign would dominate, the operator is shifted.

    Both methods go on until every residual is small, and then look beyond: a single Krylov space does not show an
    eigenvalue that occurs more than once, or in which the start has no part. So a Lanczos chain starts from a fresh
    random vector on the complement of the pairs that were found. Either it meets a value beyond the wanted ones, and
    the search goes on from there. Or it rules out every such value, unless the value's vector has next to no part in
    the random one, which has a probability below 0.001 in all (``spectra/beyond.py``; van Dorsselaer, Hochstenbach &
    van der Vorst 2000). Where the spectrum goes on right behind the last wanted value, only values that exceed it by
    more than ``margin`` are excluded, about 1 % of the spread of the remaining spectrum.

    Parameters
    ----------
    target
        A symmetric operator, or an objective, which stands for its Hessian at the current weights.
    k
        Number of eigenpairs, at most ``size``. Default 5, as in the paper's table.
    method
        ``"lanczos"`` (default) or ``"power"``.
    which
        ``"largest"`` (default) or ``"smallest"`` algebraic values; ``"magnitude"``: the largest absolute values;
        ``"ends"``, by Lanczos: the ``⌈k/2⌉`` largest, then the ``⌊k/2⌋`` smallest, from one basis.
    tolerance
        A pair has converged when ``‖A v − λ v‖ ≤ tolerance · |λ|``, or when the residual is below the rounding error
        ``30 eps ‖A‖``. The error of the value is at most the residual, and about ``residual² / gap``. Default 1e-4:
        values are then right to more digits than figures show.
    max_hvps
        Largest number of products; default ``40 k + 400`` for Lanczos and ten times that for power iteration.
    start
        Start vectors, shape ``(size,)`` or ``(size, p)``, such as the vectors of an earlier result.
    confirm
        Whether to look beyond. ``False`` leaves it out, and ``margin`` is infinite: every pair is as certain as its
        residual says, but a larger value may exist. This is for following λ₁ through training, from the vector of the
        step before, with a confirmed run from time to time. On the digits network λ₁ takes 16 products from scratch and
        15 from the vector of the step before. Without the look beyond it takes 9 of these, and 5 with
        ``tolerance=1e-2``, which leaves an error of 3e-4.
    memory_bytes
        Bytes that the solver may hold: ``2 c + k + 6`` vectors for a basis of ``c`` columns. Lanczos uses up to ``c =
        4 k + 120``; with fewer columns it restarts, and takes few products more on most Hessians (λ₁ of the digits
        network: 21 with 64 columns, 31 with 3). It needs at least ``k + 2`` columns, that is ``3 k + 10`` vectors (52
        GB for λ₁ of 10⁹ parameters in float32). Default: that of the objective (4 GiB), or the least where that is
        more.
    basis_dtype
        ``torch.float16`` stores the basis of Lanczos in half the memory of float32: ``c + k + 6`` vectors. What it
        takes from the products is part of every residual, which is then at least about ``5e-4 ‖A v‖``: ask for a
        ``tolerance`` of 1e-3 or more. Below it the search ends, not converged, where only the basis's rounding is left.
        On the digits network it takes the same number of products, and λ₁ is right to 1e-5. Default: the operator's
        precision, at least float32.
    backend
        ``"native"`` (default), or ``"pyhessian"``: PyHessian's power iteration with ``tol=tolerance`` and at most
        ``max_hvps // k`` iterations a vector (by default its own 100). Its pairs are sorted, and their residuals come
        from this package's products. It takes an objective, ``which="largest"`` or ``"magnitude"`` and no ``start``,
        and ignores the other arguments. It stops when a value pauses, and finds the largest values in magnitude.
    seed
        Seed of the random vectors; the global generators are neither read nor advanced.

    Returns
    -------
    Eigenpairs
        Values in the order asked for, orthonormal vectors as columns, residuals, whether all converged, and the cost.

    Raises
    ------
    ValueError
        ``k``, ``method``, ``which``, ``tolerance``, ``max_hvps``, ``start`` or ``backend`` is out of range,
        ``memory_bytes`` is too small, or the operator returns NaN or infinity.
    TypeError
        The target is neither an objective nor an operator, or it is an operator with ``backend="pyhessian"``.
    ModuleNotFoundError
        ``backend="pyhessian"`` and PyHessian is not installed.

    Warns
    -----
    ConvergenceWarning
        The budget ended before every residual was small enough, or before a missed value was excluded.
    """
    check_backend(backend)
    operator = as_operator(target)
    check_search(operator.size, k, method, which, tolerance, max_hvps)
    half = _is_half(operator, basis_dtype, method, backend)
    _check_start(operator, start)
    goal = Goal(k, which, tolerance, rounding(operator))
    with no_autocast(operator.device):
        if backend == "pyhessian":
            result = _from_pyhessian(target, operator, goal, max_hvps, start, seed)
        else:
            before = operator.products
            search, found, margin = search_for(
                operator,
                goal,
                method,
                max_hvps,
                start,
                confirm=confirm,
                memory_bytes=memory_bytes,
                half=half,
                seed=seed,
            )
            order = torch.arange(k)
            if which == "ends":  # the two ends alternate
                order = torch.cat([order[::2], order[1::2]])
            result = Eigenpairs(
                values=found.values[order],
                vectors=search.vectors()[:, order.to(operator.device)],
                residuals=found.norms[order],
                converged=found.done and (margin < math.inf or not confirm),
                hvps=operator.products - before,
                margin=margin,
                method=method,
                which=which,
                tolerance=tolerance,
                settings=operator.settings,
            )
    if not result.converged:
        beyond = " and a check that no value was missed" if confirm and backend == "native" else ""
        warnings.warn(
            f"top_eigenvalues: after {result.hvps} Hessian-vector products the residuals are "
            f"{', '.join(f'{r:.1e}' for r in result.residuals.tolist())} for eigenvalues "
            f"{', '.join(f'{v:.4g}' for v in result.values.tolist())}; expected residual/|value| <= {tolerance:g}"
            f"{beyond}: raise max_hvps or tolerance",
            ConvergenceWarning,
            stacklevel=3,
        )
    return result


def search_for(
    operator: SymmetricOperator,
    goal: Goal,
    method: Method = "lanczos",
    max_hvps: int | None = None,
    start: Tensor | None = None,
    *,
    confirm: bool = True,
    memory_bytes: int | None = None,
    half: bool = False,
    seed: int = 0,
) -> tuple[LanczosSearch | PowerSearch, Found, float]:
    """Search, look beyond, and go on from a value that was missed, until none is left or the budget ends.

    Returns
    -------
    search, found, margin
        The search as it stands, the wanted pairs (the two ends alternate), and the margin; margin and arguments are
        those of :func:`top_eigenvalues`.
    """
    vectors = _affordable(operator, goal.k, method, memory_bytes, half=half)
    budget = max_hvps if max_hvps is not None else (40 * goal.k + 400) * (1 if method == "lanczos" else 10)
    stop = operator.products + budget
    like = torch.empty(0, dtype=wide(operator), device=operator.device)
    draw = random_vectors(operator.space, like, seed)
    guess = draw(1) if start is None else start.detach().reshape(operator.space.here, -1).to(like)[:, :budget]
    search: LanczosSearch | PowerSearch
    if method == "lanczos":
        columns = (vectors - goal.k - 6) // (1 if half else 2)
        capacity = min(max(goal.k + 2, min(4 * goal.k + 120, columns)), operator.size)
        search = LanczosSearch(operator, goal, capacity, guess, draw, half=half)
    else:
        width = min(goal.k + max(goal.k, 4) + guess.shape[1] - 1, operator.size, budget)
        search = PowerSearch(operator, goal, max(goal.k, min(width, (vectors - goal.k - 6) // 8)), guess, draw)
    del guess
    while True:
        found = search.run(stop)
        if found.whole or not found.done or not confirm:
            return search, found, 0.0 if found.whole else math.inf
        margin, vector = look_beyond(operator, search.inside(), goal, draw(1)[:, 0], stop)
        if vector is None:
            return search, found, margin
        search.include(vector)


def _from_pyhessian(
    target: object, operator: SymmetricOperator, goal: Goal, max_hvps: int | None, start: Tensor | None, seed: int
) -> Eigenpairs:
    """Return PyHessian's pairs, sorted, with their residuals by products of ``operator``."""
    if goal.which not in ("largest", "magnitude") or start is not None:
        raise ValueError(
            "PyHessian finds the largest values in magnitude from random vectors: expected which='magnitude' or "
            f"'largest' without start, got which={goal.which!r}{'' if start is None else ' and a start'}; use "
            "backend='native' for more"
        )
    before = operator.products
    iterations = None if max_hvps is None else max_hvps // goal.k
    values, vectors, products = pyhessian_eigenvalues(
        target, goal.k, iterations=iterations, tolerance=goal.tolerance, seed=seed
    )
    order = ordering(values, goal.which)
    values, vectors = values[order], vectors[:, order.to(vectors.device)].to(wide(operator))
    norms = operator.space.norm(operator.matmat(vectors) - vectors * values.to(vectors), dim=0).cpu().double()
    small = norms <= goal.limits(values, float(values.abs().max()))
    # It finds the largest in magnitude: a negative one is not among the largest.
    asked_for = goal.which == "magnitude" or bool((values >= 0).all())
    return Eigenpairs(
        values=values,
        vectors=vectors,
        residuals=norms,
        converged=bool(small.all()) and asked_for,
        hvps=products + operator.products - before,
        margin=math.inf,
        method="pyhessian",
        which=goal.which,
        tolerance=goal.tolerance,
        settings=operator.settings,
    )


def rounding(operator: SymmetricOperator) -> float:
    """Return the rounding error of a residual, relative to ``‖A‖``."""
    return 30 * torch.finfo(operator.dtype).eps


def _is_half(operator: SymmetricOperator, basis_dtype: torch.dtype | None, method: Method, backend: Backend) -> bool:
    """Return whether the basis is stored in float16; ``ValueError`` for what cannot be."""
    if basis_dtype is None or basis_dtype == wide(operator):
        return False
    if basis_dtype != torch.float16 or method != "lanczos" or backend != "native":
        raise ValueError(
            f"basis_dtype must be torch.float16, for the basis of Lanczos, got {basis_dtype} with method={method!r}, "
            f"backend={backend!r}: leave it out for the operator's own precision"
        )
    return True


def _affordable(
    operator: SymmetricOperator, k: int, method: Method, memory_bytes: int | None, *, half: bool = False
) -> int:
    """Return how many vectors fit into the memory; raise ``ValueError`` if the solver needs more."""
    vector = operator.space.most * torch.finfo(wide(operator)).bits // 8
    least = (2 * k + 8 if half else 3 * k + 10) if method == "lanczos" else 9 * k + 6
    vectors = (operator.memory_bytes if memory_bytes is None else memory_bytes) // vector
    # No basis is larger than the space.
    if memory_bytes is not None and vectors < min(least, 3 * operator.size + 6):
        raise ValueError(
            f"memory_bytes must be at least {least * vector} ({least * vector / 1e9:.3g} GB) for k = {k} by {method}: "
            f"{least} vectors of {operator.space.most} entries; got {memory_bytes}: raise it, ask for fewer "
            "eigenvalues, or select fewer parameters"
        )
    return vectors


def check_search(
    size: int,
    k: int,
    method: str = "lanczos",
    which: str = "largest",
    tolerance: float = 1e-4,
    max_hvps: int | None = None,
) -> None:
    """Raise ``ValueError`` if an argument of :func:`top_eigenvalues` is out of range, for an operator of a size."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= size:
        raise ValueError(
            f"k must be between 1 and the number of parameters ({size}), got {k!r}: ask for fewer eigenvalues"
        )
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {get_args(Which)}, got {which!r}")
    if which == "ends" and method == "power":
        raise ValueError("power iteration follows one end at a time: for both expected method='lanczos', got 'power'")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}: 1e-4 is the default")
    if max_hvps is not None and max_hvps < k:
        raise ValueError(f"max_hvps must be at least k = {k}, got {max_hvps}: each eigenvector needs one product")


def _check_start(operator: SymmetricOperator, start: Tensor | None) -> None:
    """Raise ``ValueError`` unless start vectors are of the right shape and finite."""
    if start is None:
        return
    here = operator.space.here
    if start.ndim not in (1, 2) or start.shape[0] != here:
        raise ValueError(f"start must have shape ({here},) or ({here}, p), got {tuple(start.shape)}")
    if operator.space.any(~torch.isfinite(start)):
        raise ValueError("start must be finite, got NaN or infinity in it: leave it out for a random start")
