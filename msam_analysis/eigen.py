"""Extreme eigenpairs of a symmetric operator, each with the residual that certifies it.

The solvers see a :class:`~msam_analysis.operators.SymmetricOperator` and nothing else. Both keep the products ``A Q``
beside their basis ``Q``, so that every Rayleigh-Ritz residual ``‖A v − λ v‖`` is computed from products with the
operator itself: no recurrence has to be believed and no product is spent on the certificate.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from msam_analysis.operators import SymmetricOperator
from msam_analysis.results import ConvergenceWarning, Eigenpairs
from msam_analysis.vectors import gaussian, orthonormalize

Method = Literal["lanczos", "power"]
Which = Literal["largest", "smallest", "magnitude"]

_BASIS_BYTES = 4 * 2**30
# What the second chain must exclude, and how surely: a value beyond the wanted ones by this fraction of the spectrum's
# spread, but for this probability over its random start.
_PROBE_SPREAD = 0.01
_PROBE_FAILURE = 1e-3
# Block steps that power iteration makes from a warm start before it believes it: the random columns must have their
# say.
_WARM_STEPS = 8


class HasHessian(Protocol):
    """Anything with a Hessian, such as an objective."""

    def hessian(self) -> SymmetricOperator:
        """Return the Hessian at the current weights."""
        ...


def as_operator(target: SymmetricOperator | HasHessian) -> SymmetricOperator:
    """Return the operator itself, or the Hessian of an objective; ``TypeError`` for anything else."""
    if isinstance(target, SymmetricOperator):
        return target
    if not hasattr(target, "hessian"):
        raise TypeError(
            f"expected an Objective or a SymmetricOperator, got {type(target).__name__}: wrap a model and its data in "
            "msam_analysis.Objective, or a matrix in msam_analysis.MatrixOperator"
        )
    return target.hessian()


@dataclass
class Subspace:
    """An orthonormal basis ``Q`` with its products ``A Q`` and the projection ``T = Qᵀ A Q``.

    Parameters
    ----------
    operator
        ``A``.
    capacity
        Most columns that will be held.
    """

    operator: SymmetricOperator
    capacity: int

    def __post_init__(self) -> None:
        """Reserve the memory once."""
        shape = (self.operator.size, self.capacity)
        # A basis in half precision would lose its orthogonality, and has no QR.
        wide = torch.promote_types(self.operator.dtype, torch.float32)
        self._q = torch.empty(shape, dtype=wide, device=self.operator.device)
        self._aq = torch.empty_like(self._q)
        self.projection: Tensor = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def columns(self) -> int:
        """Columns held."""
        return self.projection.shape[0]

    @property
    def q(self) -> Tensor:
        """``Q``, shape ``(size, columns)``."""
        columns: Tensor = self._q[:, : self.columns]
        return columns

    @property
    def aq(self) -> Tensor:
        """``A Q``, shape ``(size, columns)``."""
        columns: Tensor = self._aq[:, : self.columns]
        return columns

    def expand(self, vectors: Tensor) -> int:
        """Add the parts of ``vectors`` that are new, at one product each; return how many there were."""
        room = self.capacity - self.columns
        fresh = orthonormalize(vectors, self.q)[:, :room]
        count, old = fresh.shape[1], self.columns
        if count == 0:
            return 0
        self._q[:, old : old + count] = fresh
        self._aq[:, old : old + count] = self.operator.matmat(fresh).to(self._aq)
        grown = torch.zeros(old + count, old + count, dtype=torch.float64)
        grown[:old, :old] = self.projection
        block = (self._q[:, : old + count].T @ self._aq[:, old : old + count]).cpu().double()
        grown[:, old:] = block
        grown[old:, :old] = block[:old].T
        self.projection = (grown + grown.T) / 2
        return count

    def compress(self, coefficients: Tensor) -> None:
        """Keep only the span of ``Q S`` for orthonormal coefficients ``S`` of shape ``(columns, p)``."""
        small = coefficients.to(self._q)
        kept, products = self.q @ small, self.aq @ small
        self._q[:, : small.shape[1]] = kept
        self._aq[:, : small.shape[1]] = products
        self.projection = coefficients.T @ self.projection @ coefficients

    def ritz(self, which: Which, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values (all, ordered), their coefficients, and the residual vectors of the first ``k``.

        Returns
        -------
        values, coefficients, residuals
            Shapes ``(columns,)``, ``(columns, columns)``, ``(size, min(k, columns))``.
        """
        values, coefficients = torch.linalg.eigh(self.projection)
        order = ordering(values, which)
        values, coefficients = values[order], coefficients[:, order]
        lead = coefficients[:, :k].to(self._q)
        residuals = self.aq @ lead - (self.q @ lead) * values[:k].to(self._q)
        return values, coefficients, residuals


def ordering(values: Tensor, which: Which) -> Tensor:
    """Return the permutation that puts the wanted end of the spectrum first."""
    if which == "magnitude":
        return values.abs().argsort(descending=True, stable=True)
    return values.argsort(descending=which == "largest", stable=True)


def top_eigenvalues(
    target: SymmetricOperator | HasHessian,
    k: int = 5,
    *,
    method: Method = "lanczos",
    which: Which = "largest",
    tolerance: float = 1e-4,
    max_hvps: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> Eigenpairs:
    r"""Return ``k`` extreme eigenpairs ``A v = λ v`` of a symmetric operator (TA1 of the paper).

    ``"lanczos"`` builds a Krylov space with full re-orthogonalisation and thick restarts (Wu & Simon 2000), then
    starts a short second chain from a fresh random vector: an eigenvalue that occurs more than once is invisible to a
    single Krylov space, and is found there. The result counts as converged once a missed value that exceeds the last
    wanted one by more than 1 % of the spectrum's spread has a probability below 0.001. ``"power"`` is power iteration
    on a block with Rayleigh-Ritz extraction (Rutishauser's simultaneous iteration): one step multiplies every vector
    not yet converged; converged ones are locked and deflated; a few guard vectors beyond ``k`` make close eigenvalues
    separate. Where negative eigenvalues would dominate, the operator is shifted by the most negative Ritz value and
    the values are shifted back.

    Parameters
    ----------
    target
        A symmetric operator, or an objective (then its Hessian at the current weights).
    k
        Number of pairs, at most ``size``. Default 5, as in the paper's table.
    method
        ``"lanczos"`` (default) or ``"power"``.
    which
        ``"largest"`` (default) and ``"smallest"`` algebraic values, or ``"magnitude"``.
    tolerance
        A pair has converged when ``‖A v − λ v‖ ≤ tolerance · |λ|``, or below what rounding allows
        (``30 eps ‖A‖``). The error of the value is at most the residual, and about ``residual² / gap``.
        Default 1e-4, so that values are right to more digits than figures show.
    max_hvps
        Budget of products; default ``min(40 k + 400, ...)`` for Lanczos and ten times that for power iteration.
    start
        Shape ``(size,)`` or ``(size, p)``: a warm start, such as the vectors of an earlier result.
    seed
        Seed of the random start; the global generators are neither read nor advanced.

    Returns
    -------
    Eigenpairs
        Values in the order asked for, orthonormal vectors as columns, residuals, whether all converged, the cost.

    Raises
    ------
    ValueError
        ``k``, ``method``, ``which``, ``tolerance`` or ``start`` is out of range, or the operator returns NaN or
        infinity.

    Warns
    -----
    ConvergenceWarning
        The budget ended before every residual was small enough.
    """
    operator = as_operator(target)
    _check(operator, k, method, which, tolerance, max_hvps, start)
    before = operator.products
    like = torch.empty(0, dtype=torch.promote_types(operator.dtype, torch.float32), device=operator.device)
    guess = gaussian(operator.size, 1, seed=seed, like=like, use="start")
    if start is not None:
        # The random vector stays in: a warm start that lost an eigenvector must be able to find it again.
        warm = start.reshape(operator.size, -1).to(guess)
        guess = torch.cat([warm / warm.norm(dim=0).clamp_min(torch.finfo(warm.dtype).tiny), guess], dim=1)
    solver = _lanczos if method == "lanczos" else _power
    budget = max_hvps if max_hvps is not None else (40 * k + 400) * (1 if method == "lanczos" else 10)
    found = solver(operator, k, which, tolerance, budget, guess, seed)
    values, vectors, residuals, converged = found.values, found.vectors, found.residuals, found.converged
    hvps = operator.products - before
    if not converged:
        warnings.warn(
            f"top_eigenvalues: after {hvps} Hessian-vector products the residuals are "
            f"{', '.join(f'{r:.1e}' for r in residuals.tolist())} for eigenvalues "
            f"{', '.join(f'{v:.4g}' for v in values.tolist())}; expected residual/|value| <= {tolerance:g} and a check "
            "that no value was missed: raise max_hvps or tolerance",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Eigenpairs(
        values=values,
        vectors=vectors,
        residuals=residuals,
        converged=converged,
        hvps=hvps,
        method=method,
        which=which,
        tolerance=tolerance,
        settings=operator.settings,
    )


def _check(
    operator: SymmetricOperator,
    k: int,
    method: str,
    which: str,
    tolerance: float,
    max_hvps: int | None,
    start: Tensor | None,
) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= operator.size:
        raise ValueError(
            f"k must be between 1 and the number of parameters ({operator.size}), got {k!r}: ask for fewer eigenvalues"
        )
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {get_args(Which)}, got {which!r}")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}: 1e-4 is the default")
    if max_hvps is not None and max_hvps < k:
        raise ValueError(f"max_hvps must be at least k = {k}, got {max_hvps}: each eigenvector needs one product")
    if start is not None and (start.ndim not in (1, 2) or start.shape[0] != operator.size):
        raise ValueError(f"start must have shape ({operator.size},) or ({operator.size}, p), got {tuple(start.shape)}")


def _threshold(values: Tensor, norm: float, tolerance: float, dtype: torch.dtype) -> Tensor:
    """Return the residual at which each value has converged; ``norm`` estimates ``‖A‖``, the scale of rounding."""
    return (tolerance * values.abs()).clamp_min(30 * torch.finfo(dtype).eps * norm)


def _finite(basis: Subspace) -> None:
    if not bool(torch.isfinite(basis.projection).all()):
        raise ValueError(
            "the operator returned NaN or infinity: expected a finite Hessian at these weights; "
            "check that the loss and its gradient are finite there"
        )


def _lanczos(
    operator: SymmetricOperator, k: int, which: Which, tolerance: float, budget: int, guess: Tensor, seed: int
) -> _Found:
    affordable = _BASIS_BYTES // (2 * operator.size * torch.finfo(operator.dtype).bits // 8)
    capacity = min(operator.size, max(k + guess.shape[1] + 10, min(4 * k + 60, affordable)))
    basis = Subspace(operator, capacity)
    spent = operator.products
    basis.expand(guess[:, -budget:])
    probes = _Probes(guess, seed)
    chain = 0  # vectors of the second chain so far
    believed: Tensor | None = None  # the wanted values when it began
    norm = 0.0
    stuck = False
    while True:
        _finite(basis)
        values, coefficients, residuals = basis.ritz(which, k)
        norms = residuals.norm(dim=0).cpu().double()
        wanted = values[:k]
        norm = max(norm, float(values.abs().max()))
        limits = _threshold(wanted, norm, tolerance, operator.dtype)
        done = len(wanted) == k and bool((norms <= limits).all())
        confirmed = (
            done
            and believed is not None
            and bool(((wanted - believed).abs() <= limits).all())
            and _nothing_beyond(basis, chain, coefficients[:, :k], wanted[-1], which)
        )
        complete = done and basis.columns == operator.size
        exhausted = stuck or basis.columns == operator.size or operator.products - spent >= budget
        if confirmed or complete or exhausted:
            return _Found(wanted, basis.q @ coefficients[:, :k].to(basis.q), norms, confirmed or complete)
        if basis.columns == capacity:
            basis.compress(coefficients[:, : min(capacity - 2, k + 8)])
            chain, believed = 0, None
            direction = residuals[:, norms.argmax() : norms.argmax() + 1]
        elif done and (believed is None or bool(((wanted - believed).abs() > limits).any())):
            direction = probes.next()
            chain, believed = 0, wanted
        else:
            direction = basis.aq[:, -1:]
        # Nothing new in an invariant subspace: what is left of the spectrum lies outside it. If no random vector leads
        # there either, going on would never end.
        stuck = not basis.expand(direction) and not basis.expand(probes.next())
        chain += 1


def _nothing_beyond(basis: Subspace, steps: int, wanted: Tensor, last: Tensor, which: Which) -> bool:
    """Tell whether the newest ``steps`` vectors, cleared of the wanted ones, make a value beyond the last one unlikely.

    They are a Lanczos run from a random start on what the earlier basis cannot see. Kuczynski & Wozniakowski (1992):
    after ``m`` steps the best Ritz value ``θ`` falls short of the largest eigenvalue by more than ``ε (λmax − λmin)``
    with probability at most ``1.648 √n exp(−√ε (2m − 1))``.
    """
    cleared = orthonormalize(torch.eye(basis.columns, dtype=torch.float64)[:, -steps:], wanted)
    if steps == 0 or cleared.shape[1] == 0:
        return False
    levels = torch.linalg.eigvalsh(cleared.T @ basis.projection @ cleared)
    seen = torch.linalg.eigvalsh(basis.projection)
    for sign in {"largest": (1,), "smallest": (-1,), "magnitude": (1, -1)}[which]:
        bound = abs(float(last)) if which == "magnitude" else sign * float(last)
        spread = bound - float((sign * seen).min())
        short = (bound - float((sign * levels).max())) / spread if spread > 0 else 0.0
        decay = math.sqrt(max(short, _PROBE_SPREAD)) * (2 * steps - 1)
        if 1.648 * math.sqrt(basis.operator.size) * math.exp(-decay) > _PROBE_FAILURE:
            return False
    return True


@dataclass(frozen=True)
class _Found:
    """What a solver ends with; ``converged``: small residuals, and reason to believe that nothing was missed."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool


class _Probes:
    """Fresh random vectors like a given one, each a draw of its own."""

    def __init__(self, like: Tensor, seed: int) -> None:
        self.like = like
        self.seed = seed
        self.drawn = 0

    def next(self) -> Tensor:
        self.drawn += 1
        return gaussian(self.like.shape[0], 1, seed=self.seed, like=self.like, use=f"probe {self.drawn}")


def _power(
    operator: SymmetricOperator, k: int, which: Which, tolerance: float, budget: int, guess: Tensor, seed: int
) -> _Found:
    width = min(operator.size, k + max(k, 4) + guess.shape[1] - 1, budget)
    fill = gaussian(operator.size, width, seed=seed, like=guess, use="block")
    block = orthonormalize(torch.cat([guess, fill], dim=1)[:, :width])
    patience = _WARM_STEPS if guess.shape[1] > 1 else 0
    sign = -1.0 if which == "smallest" else 1.0
    shift = norm = 0.0
    spares = 0
    locked = guess[:, :0]
    locked_values = locked_norms = torch.zeros(0, dtype=torch.float64)
    spent = operator.products
    while True:
        basis = Subspace(operator, block.shape[1])
        basis.expand(block)
        _finite(basis)
        values, coefficients, residuals = basis.ritz(which, k - locked.shape[1])
        norms = residuals.norm(dim=0).cpu().double()
        norm = max(norm, float(values.abs().max()))
        limits = _threshold(values, norm, tolerance, operator.dtype)
        vectors = basis.q @ coefficients.to(basis.q)
        small = norms <= limits[: len(norms)]
        ready = int(small.long().cumprod(0).sum()) if patience <= 0 else 0
        patience -= 1
        done = ready == len(norms)
        if done or operator.products - spent + block.shape[1] - ready > budget:
            every = torch.cat([locked_values, values[: len(norms)]])
            order = ordering(every, which)
            stacked = torch.cat([locked, vectors[:, : len(norms)]], dim=1)
            return _Found(
                every[order], stacked[:, order.to(stacked.device)], torch.cat([locked_norms, norms])[order], done
            )
        locked = torch.cat([locked, vectors[:, :ready]], dim=1)
        locked_values = torch.cat([locked_values, values[:ready]])
        locked_norms = torch.cat([locked_norms, norms[:ready]])
        if which != "magnitude":
            shift = max(shift, float((-sign * values).max()))
        products = sign * (basis.aq @ coefficients.to(basis.q)) + shift * vectors
        block = orthonormalize(products[:, ready:], locked)
        missing = width - locked.shape[1] - block.shape[1]
        if missing > 0:
            # Vectors the operator sends to zero are replaced, so that a low-rank operator cannot starve the block.
            spares += 1
            spare = gaussian(operator.size, missing, seed=seed, like=guess, use=f"spare {spares}")
            block = torch.cat([block, orthonormalize(spare, torch.cat([locked, block], dim=1))], dim=1)
