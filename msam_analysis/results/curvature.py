"""Results about the spectrum of a symmetric operator."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from msam_analysis.results.base import Reading, Result, numbered, row, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eigenpairs(Result):
    """Eigenvalues of a symmetric operator, each certified by its residual.

    Attributes
    ----------
    values
        Shape ``(k,)``, in the order asked for (largest first by default), in the unit of the operator.
    vectors
        Shape ``(size, k)``, orthonormal columns.
    residuals
        Shape ``(k,)``: ``‖A v − λ v‖₂`` against the original operator. For a symmetric operator an exact eigenvalue
        lies within this distance of the value.
    converged
        Every residual is at most ``tolerance · |λ|``, or at the level of rounding, ``30 eps ‖A‖``; and, unless it was
        not asked for, ``margin`` is finite.
    hvps
        Products with the operator that were spent, certificates included.
    method, which, tolerance
        What was asked for; ``"pyhessian"`` is a method too.
    margin
        How far beyond the last of the values an eigenvalue may lie that is not among them, in the unit of the operator,
        but for a probability of 0.001: 0 as a rule, about 1 % of what is left of the spectrum where that goes on right
        behind. Infinite where it was not looked for.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    hvps: int
    method: str
    which: str
    tolerance: float
    margin: float = math.inf

    _asked: ClassVar = ("method", "which", "tolerance")
    _shapes: ClassVar = {"values": "k", "vectors": "entries k", "residuals": "k"}
    _ranges: ClassVar = {"residuals": "nonnegative", "tolerance": "nonnegative", "margin": "nonnegative"}

    def readings(self) -> list[Reading]:
        """Return the eigenvalues with their residuals."""
        return numbered("eigenvalue", self.values, self.residuals, converged=self.converged)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per eigenvalue: ``index`` (from 1), ``value``, ``residual``, ``method``, ``converged``."""
        known = {"index": range(1, len(self.values) + 1), "value": self.values, "residual": self.residuals}
        return table({**known, "method": self.method, "converged": self.converged})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(Result):
    """A Monte Carlo mean with its standard error.

    Attributes
    ----------
    quantity
        What is estimated.
    value, standard_error
        Mean over the draws and its standard error ``s / sqrt(draws)``.
    draws
        Independent draws used.
    evaluations
        Loss evaluations or Hessian-vector products spent.
    converged
        Whether the precision that was asked for was reached; true where none was.
    resolution
        Size below which a difference of losses is rounding, ``2 ε |L(w)|``; NaN where the value is no difference.
    values
        The draws, float64, shape ``(draws,)``: of two networks with the same seed they are paired. None where the
        estimate is not a mean of its draws.
    """

    quantity: str
    value: float
    standard_error: float
    draws: int
    evaluations: int
    converged: bool = True
    resolution: float = math.nan
    values: Tensor | None = None

    _asked: ClassVar = ("draws",)
    _shapes: ClassVar = {"values": "draws"}
    _ranges: ClassVar = {"standard_error": "nonnegative", "resolution": "nonnegative"}

    def readings(self) -> list[Reading]:
        """Return the mean with its standard error."""
        return [Reading(self.quantity, self.value, self.standard_error, self.converged)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row."""
        return row(self, "quantity", "value", "standard_error", "draws")


class Share(NamedTuple):
    """A share of the eigenvalues, between 0 and 1, and how well it is known.

    Attributes
    ----------
    value
        Mean over the random vectors.
    standard_error
        Of that mean; 0 where all eigenvalues are known.
    low, high
        Between these the mean share lies that the random vectors would see, whatever the spectrum does between the
        nodes: the inequalities of Chebyshev, Markov and Stieltjes (Szegő, Orthogonal Polynomials, section 3.41).
    """

    value: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectralDensity(Result):
    """The density of the eigenvalues: of one drawn at random, the probability per unit of ``x``.

    A sum of point masses: eigenvalues that are known exactly have ``1/size`` each; the others are seen by random
    vectors, each as nodes with weights. It is smoothed by a Gaussian kernel; the cumulative share and the moments are
    not.

    Attributes
    ----------
    values
        Shape ``(points,)``, increasing: where the density is given, in the unit of the operator.
    density, standard_error
        Shape ``(points,)``: mean over the random vectors and its standard error, per unit of the operator; see
        :meth:`at`.
    sigma
        Standard deviation of the kernel, in the unit of the operator.
    nodes, weights
        Shape ``(nodes,)``, float64: the point masses. The weights of one random vector and of the known ones sum to 1.
    probe
        Shape ``(nodes,)``: which random vector saw the node; -1 for an eigenvalue that is known.
    exhausted
        Shape ``(probes,)``: whether the nodes of a random vector are all eigenvalues that it has a part in, and their
        weights exact.
    top, bottom
        Eigenvalues at the two ends: the largest, descending, and the smallest, ascending.
    top_residuals, bottom_residuals
        ``‖A v − λ v‖₂`` of each: an exact eigenvalue lies within this distance.
    converged
        Whether the eigenpairs at the ends did (see ``margin``), and ``sigma`` is at least ``resolution``.
    margin
        How far beyond the last of ``top`` or of ``bottom`` an eigenvalue may lie that is not among them, but for a
        probability of 0.001; infinite where that was not excluded, or none was asked for.
    size
        Number of eigenvalues.
    steps
        Products for each random vector.
    hvps
        Products in all.
    resolution
        Kernel width, in the unit of the operator, from which on the quadratures determine the density: the range of the
        seen nodes over ``steps``. A narrower kernel shows single nodes, and the standard error does not cover that.
        0 where every random vector is exhausted.
    """

    values: Tensor
    density: Tensor
    standard_error: Tensor
    sigma: float
    nodes: Tensor
    weights: Tensor
    probe: Tensor
    exhausted: Tensor
    top: Tensor
    top_residuals: Tensor
    bottom: Tensor
    bottom_residuals: Tensor
    converged: bool
    margin: float
    size: int
    steps: int
    hvps: int
    resolution: float = 0.0

    _asked: ClassVar = ("probes", "steps", "sigma", "resolution")
    _shapes: ClassVar = {
        **dict.fromkeys(("values", "density", "standard_error"), "points"),
        **dict.fromkeys(("nodes", "weights", "probe"), "nodes_seen"),
        **dict.fromkeys(("top", "top_residuals"), "largest"),
        **dict.fromkeys(("bottom", "bottom_residuals"), "smallest"),
        "exhausted": "probes",
    }
    _ranges: ClassVar = {
        **dict.fromkeys(("density", "standard_error", "weights", "margin", "resolution"), "nonnegative"),
        **dict.fromkeys(("top_residuals", "bottom_residuals"), "nonnegative"),
        "values": "rising",
        "nodes": "finite",
        "sigma": "positive",
        "size": "positive",
        "probe": "whole",
        "exhausted": "flags",
    }

    @classmethod
    def smoothed(cls, *, sigma: float | None, points: int | None, **fields: Any) -> SpectralDensity:
        """Return the density of point masses on a grid that reaches 4 ``sigma`` beyond both ends.

        Parameters
        ----------
        sigma
            Standard deviation of the kernel; ``None``: 1/200 of the spread of the nodes (where they are all the same,
            of the value, or of 1 if that is 0), but at least the ``resolution``.
        points
            Of the grid; ``None``: four a ``sigma``, at most 10,001.
        **fields
            All other attributes.
        """
        low, high = float(fields["nodes"].min()), float(fields["nodes"].max())
        resolution = _resolution(fields["nodes"], fields["probe"], fields["exhausted"], fields["steps"])
        if sigma is None:
            largest = max(abs(low), abs(high))
            # What differs by rounding only is the same value.
            sigma = max((high - low if high - low > 1e-5 * largest else largest or 1.0) / 200, resolution)
        low, high = low - 4 * sigma, high + 4 * sigma
        points = points if points is not None else min(math.ceil(4 * (high - low) / sigma) + 1, 10_001)
        grid = torch.linspace(low, high, points, dtype=torch.float64)
        draft = cls(values=grid, density=grid, standard_error=grid, sigma=sigma, **fields)
        draft = dataclasses.replace(draft, resolution=resolution, converged=draft.converged and sigma >= resolution)
        density, error = draft.at(grid)
        return dataclasses.replace(draft, density=density, standard_error=error)

    def _disagreement(self) -> str:
        if not len(self.nodes):
            return "it has no nodes, expected one or more"
        if int(self.probe.min()) < -1 or int(self.probe.max()) >= self.probes:
            return f"a node belongs to none of its {self.probes} random vectors"
        return ""

    @property
    def probes(self) -> int:
        """Number of random vectors; 0 where every eigenvalue is known."""
        return len(self.exhausted)

    def curves(self, x: Tensor, sigma: float | None = None) -> Tensor:
        """Return the density as each random vector sees it, ``(probes, len(x))``; one row where every value is known.

        Parameters
        ----------
        x
            Shape ``(points,)``.
        sigma
            Standard deviation of the kernel; default that of the result.

        Raises
        ------
        ValueError
            ``sigma`` is not positive.
        """
        width = self.sigma if sigma is None else sigma
        if not width > 0:
            raise ValueError(f"sigma must be a positive number, in units of the eigenvalues, got {sigma!r}")
        return self._by_probe(self._peaks(x, width) * self.weights[:, None])

    def at(self, x: Tensor, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        r"""Return the density and its standard error at other places, or with another kernel; as in :meth:`curves`.

        For a start that is uniform on the unit sphere of ``N`` dimensions the variance of ``zᵀ f(A) z`` is
        ``2/(N + 2)`` times the variance of ``f(λ)`` over the eigenvalues. The quadratures of all random vectors
        together give it. The standard error is the larger of this one and of that from their scatter, which few of them
        often make too small. It holds for a ``sigma`` of at least ``resolution``.

        Returns
        -------
        density, standard_error
            Shapes ``(points,)``.
        """
        density, error = _mean(self.curves(x, sigma), known=self.probes == 0)
        if self.probes:
            seen = self.probe >= 0
            peaks, weights = self._peaks(x, self.sigma if sigma is None else sigma)[seen], self.weights[seen]
            left = float(weights.sum()) / self.probes  # share of the eigenvalues that are not known
            mean, square = (weights @ peaks**power / (left * self.probes) for power in (1, 2))
            spread = (square - mean**2).clamp_min(0) * 2 / (left * self.size + 2)
            error = torch.maximum(error, left * (spread / self.probes).sqrt())
        return density, error

    def cumulative(self, x: Tensor | float) -> Share:
        """Return the share of the eigenvalues that are at most ``x``, with no kernel.

        Parameters
        ----------
        x
            A number, or shape ``(points,)``.

        Returns
        -------
        Share
            Of the shape of ``x``.
        """
        places = torch.atleast_1d(torch.as_tensor(x, dtype=torch.float64)).contiguous()
        known = self.probe < 0
        base = self.weights[known] @ (self.nodes[known][:, None] <= places).double()
        shares = [base.expand(3, -1)] if self.probes == 0 else []
        for probe, exhausted in enumerate(self.exhausted.tolist()):
            mine = self.probe == probe
            steps = torch.cat([torch.zeros(1, dtype=torch.float64), self.weights[mine].cumsum(0)])
            count = torch.searchsorted(self.nodes[mine], places, right=True)
            reach = 0 if exhausted else 1
            between = [(count - reach).clamp_min(0), (count + reach).clamp_max(len(steps) - 1)]
            shares.append(base + torch.stack([steps[index] for index in (count, *between)]))
        value, error = _mean(torch.stack([share[0] for share in shares]), known=self.probes == 0)
        low, high = torch.stack([share[1:] for share in shares]).mean(dim=0)
        shape = torch.as_tensor(x).shape
        return Share(*(part.reshape(shape) for part in (value, error, low, high)))

    def share_above(self, x: Tensor | float) -> Share:
        """Return the share of the eigenvalues that are larger than ``x``; otherwise as :meth:`cumulative`."""
        below = self.cumulative(x)
        return Share(1 - below.value, below.standard_error, 1 - below.high, 1 - below.low)

    def moment(self, order: int) -> Estimate:
        """Return the mean of ``λ^order`` over the eigenvalues: for 1, ``tr(A)/n``; for 2, ``‖A‖²/n`` (Frobenius)."""
        value, error = _mean(self._by_probe((self.weights * self.nodes**order)[:, None]), known=self.probes == 0)
        known: dict[str, Any] = {"draws": self.probes, "evaluations": self.hvps, "settings": self.settings}
        return Estimate(quantity=f"moment {order}", value=float(value), standard_error=float(error), **known)

    def readings(self) -> list[Reading]:
        """Return the eigenvalues at the two ends with their residuals; where there are none, the ends of the nodes."""
        largest = numbered("largest", self.top, self.top_residuals, converged=self.converged)
        smallest = numbered("smallest", self.bottom, self.bottom_residuals, converged=self.converged)
        nodes = {"largest node": self.nodes.max(), "smallest node": self.nodes.min()}
        return largest + smallest or [Reading(name, float(node)) for name, node in nodes.items()]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point of the grid: ``value``, ``density``, ``standard_error``."""
        return table({"value": self.values, "density": self.density, "standard_error": self.standard_error})

    def _peaks(self, x: Tensor, width: float) -> Tensor:
        """Return the kernel about every node, shape ``(nodes, len(x))``."""
        x = torch.as_tensor(x, dtype=torch.float64)
        return torch.exp(-0.5 * ((x - self.nodes[:, None]) / width) ** 2) / (width * math.sqrt(2 * math.pi))

    def _by_probe(self, contributions: Tensor) -> Tensor:
        """Sum what nodes contribute, shape ``(nodes, ...)``, over each random vector's own and the known ones."""
        known = self.probe < 0
        rows = contributions.new_zeros(max(self.probes, 1), contributions.shape[1])
        rows.index_add_(0, self.probe[~known], contributions[~known])
        return rows + contributions[known].sum(dim=0)


def _resolution(nodes: Tensor, probe: Tensor, exhausted: Tensor, steps: int) -> float:
    """Return the range of the nodes of the random vectors that are not exhausted, over the steps.

    A Gaussian of this width on that range is a polynomial of degree ``2 steps − 1`` but for ``exp(−8)`` of its height.
    """
    if bool(exhausted.all()):
        return 0.0
    seen = nodes[torch.isin(probe, (~exhausted).nonzero()[:, 0])]
    return float(seen.max() - seen.min()) / steps


def _mean(rows: Tensor, *, known: bool) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over the rows, which is 0 for what is ``known``."""
    error = torch.zeros_like(rows[0]) if known else rows.std(dim=0) / math.sqrt(len(rows))
    return rows.mean(dim=0), error
