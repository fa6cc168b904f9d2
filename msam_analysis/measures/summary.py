"""The sharpness metrics of one trained network, in one table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from msam_analysis.measures.average import average_sharpness, check_sigma
from msam_analysis.measures.ball import ball_sharpness
from msam_analysis.measures.critical import critical_sharpness
from msam_analysis.measures.geometry import check_radius
from msam_analysis.measures.invariant import fisher_rao_norm, relative_flatness
from msam_analysis.measures.minibatch import m_sharpness
from msam_analysis.objective.examination import NOT_EXAMINED
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.progress import LINE, Bar, Step, listening
from msam_analysis.results import Measurement, Result
from msam_analysis.results.together import EXAMINATION
from msam_analysis.spectra.top import check_search, top_eigenvalues
from msam_analysis.spectra.traces import trace

RADII = (0.05, 0.5)
SIGMA = 0.01
EIGENVALUES = 5
TOLERANCE = 1e-4
MAX_HVPS, MAX_HVPS_LARGE = 200, 60
BATCH, FEW_BATCHES, FEW_SAMPLES = 128, 8, 200
METRICS = (
    "loss", "critical_sharpness", "average", "trace", "ball", "adaptive", "eigenvalues", "batches", "flatness",
    "fisher-rao",
)  # fmt: skip
"""What can be measured; in the order of price, which is that of the table."""
DEFAULT_METRICS = METRICS[:7]

_NAN = math.nan
_DRAWS, _SIGNS = 50, 30  # the defaults of the measures: pairs of losses, random signs
_GRADIENTS, _HVPS = 40, 100  # and those of a ball
_FEWEST_HVPS = 12  # products without which a Krylov start is no better than the gradient
_LARGE = 10**7  # parameters from which on fewer draws say as much, and vectors cost more than passes
_BASIS_BYTES = 2**29  # for the Krylov start of a ball, which keeps two vectors a product
_PAIR, _PRODUCT, _STEP = 0.8, 2.5, 2.3  # prices in gradients: two losses, a product, a step in a ball with its products


def measure(
    objective: Objective,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    radii: Sequence[float] = RADII,
    sigma: float = SIGMA,
    eigenvalues: int = EIGENVALUES,
    tolerance: float = TOLERANCE,
    max_hvps: int | None = None,
    seed: int = 0,
    budget: float | None = None,
    known: Mapping[str, Measurement] | None = None,
    keep: Callable[[str, Measurement], None] | None = None,
    tick: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Measurement:
    """Measure sharpness metrics on the same data, mode and parameters, the cheapest first.

    Numbers of draws are those of the measures' own defaults. From 10 million parameters on vectors cost more than
    passes over a few samples, and random draws agree better: there are 16 draws of noise in place of 50, 10 of signs in
    place of 30, and 20 gradients in a ball in place of 40. Where the basis of 12 products does not fit into 0.5 GiB
    (beyond 5.6 million parameters in float32) the ascent in a ball starts from the gradient alone. Memory: up to 4 GiB
    for the eigenvalues' basis (see :func:`~msam_analysis.top_eigenvalues`), 0.5 GiB for that of a ball, 2 GiB for kept
    graphs, and the results.

    Parameters
    ----------
    objective
        The loss at the weights to be measured.
    metrics
        Names from :data:`METRICS`, in any order. Default :data:`DEFAULT_METRICS`: ``"loss"``; ``"critical_sharpness"``,
        ``2/η`` with the smallest step ``η`` along the gradient that raises the loss; ``"average"``, the rise under
        noise in proportion to the weights; ``"ball"`` and ``"adaptive"``, the largest rise in balls in units of the
        weights and of ``|w|``; ``"trace"``; ``"eigenvalues"``. The others are ``"batches"``: the m-sharpness, with 128
        samples a batch and at most 8 of the batches; ``"flatness"``: the relative flatness of the last weight matrix;
        ``"fisher-rao"``: the squared Fisher-Rao norm, on at most 200 samples.
    radii
        Radii of the balls; default 0.05 (Foret et al. 2021) and 0.5.
    sigma
        Relative standard deviation of the noise for the average-case sharpness; default 0.01.
    eigenvalues
        Number of largest eigenvalues of the Hessian, at most ``objective.size``.
    tolerance, max_hvps
        Relative residual of the eigenvalues, default 1e-4, and the most Hessian-vector products spent on them, default
        200, from 10 million parameters on 60: most networks need 30 to 80. What is not converged then is given with its
        residual.
    seed
        Seed of all random draws.
    budget
        Seconds after which no metric is begun; default unlimited. Draws, products and gradients are cut to what it pays
        for by the price of a gradient, and end with it: after the product, draw or sample that runs then, and at least
        2 draws, 5 gradients of a ball, and a product for each eigenvalue. What was cut says so, with its error; what
        was not begun is named in ``settings["not measured"]``.
    known
        Metrics that were measured before, by name: they are taken as they are. One that a budget cut is measured again,
        and stays where the new budget cuts it shorter.
    keep
        Called with the name and the rows of each metric as soon as it is measured, for storing.
    tick
        Called with the name of each metric before it is measured.
    progress
        Show on one line the metric, how far its solver is, and the residual or standard error so far.

    Returns
    -------
    Measurement
        A table for reading and the full results. The first row, ``examination``, says what the examination of the
        objective found, see :meth:`Objective.examine`; its value is the largest relative difference of two numbers that
        should be equal. The settings have the same words.

    Raises
    ------
    ValueError
        A name is not among the metrics, or an option of a metric is out of range.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics must be of {', '.join(METRICS)}; got {unknown[0] if unknown else 'none'!r}")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be a number of seconds above 0, or None; got {budget!r}")
    if max_hvps is None:
        max_hvps = max(MAX_HVPS if objective.size < _LARGE else MAX_HVPS_LARGE, eigenvalues)
    ask = _Ask(tuple(radii), sigma, eigenvalues, tolerance, max_hvps, seed)
    ask.check(objective, metrics)
    clock = _Clock(objective, math.inf if budget is None else time.perf_counter() + budget)
    before = {name: part for name, part in (known or {}).items() if name in metrics}
    parts = {name: part for name, part in before.items() if not part.settings.get("cut")}
    late: list[str] = []
    examination = objective.evaluation.findings.examination
    line, apart = (NOT_EXAMINED, _NAN) if examination is None else (examination.line, examination.largest)
    examined = {"metric": EXAMINATION, "value": apart, "uncertainty": _NAN, "converged": None, "meaning": line}
    for name in METRICS:
        if name not in metrics or name in parts:
            continue
        if clock.left() > 0:
            if tick is not None:
                tick(name)
            sheet = _Sheet(objective, ask, clock)
            with Bar(None, name, shown=progress, form=LINE, leave=False), listening(clock.over):
                _MEASUREMENTS[name](sheet)
            parts[name] = sheet.measurement()
            if name in before and 0 < _steps(parts[name]) <= _steps(before[name]):
                parts[name] = before[name]
            elif keep is not None:
                keep(name, parts[name])
        elif name in before:
            parts[name] = before[name]
        else:
            late.append(name)
    ordered = [parts[name] for name in METRICS if name in parts]
    cut = [name for name in METRICS if name in parts and parts[name].settings.get("cut")]
    settings = {**objective.settings, "examination": line}
    settings |= {what: ", ".join(names) for what, names in (("cut", cut), ("not measured", late)) if names}
    return Measurement(
        rows=(examined, *(row for part in ordered for row in part.rows)),
        results={name: result for part in ordered for name, result in part.results.items()},
        settings=settings,
    )


@dataclass(frozen=True)
class _Ask:
    """What is asked for."""

    radii: tuple[float, ...]
    sigma: float
    eigenvalues: int
    tolerance: float
    max_hvps: int
    seed: int

    def check(self, objective: Objective, metrics: Sequence[str]) -> None:
        """Refuse what is out of range before anything is measured, in the words of the measure that would."""
        if not {"ball", "adaptive", "batches"}.isdisjoint(metrics):
            for radius in self.radii:
                check_radius(radius)
        if "average" in metrics:
            check_sigma(self.sigma)
        if "eigenvalues" in metrics:
            # The default asks a tiny network for all it has; who names a number is told that there are not so many.
            k = min(self.eigenvalues, objective.size) if self.eigenvalues <= EIGENVALUES else self.eigenvalues
            check_search(objective.size, k, tolerance=self.tolerance, max_hvps=self.max_hvps)


class _Clock:
    """The time left, and what it pays for."""

    def __init__(self, objective: Objective, end: float) -> None:
        self._objective, self._end, self._ranks = objective, end, objective.batches.ranks
        self._prices: tuple[float, float] | None = None
        self.ended = False

    def left(self) -> float:
        """Return the seconds left, by the clock of the first process."""
        return self._end if math.isinf(self._end) else self._ranks.from_first(self._end - time.perf_counter())

    def over(self, _: Step) -> bool:
        """Tell whether a solver must end, since no time is left."""
        self.ended = self.ended or (self._end < math.inf and self.left() <= 0)
        return self.ended

    def affords(self, gradients: float, vectors: int, most: int) -> int:
        """Return how many steps the time left pays for, at most ``most``; each costs gradients and random vectors."""
        if math.isinf(self._end):
            return most
        if self._prices is None:
            self._objective.loss()  # examines the objective, which is no part of the price
            times = [time.perf_counter()]
            for priced in (self._objective.loss_and_gradient, self._vector):
                priced()
                times.append(time.perf_counter())
            self._prices = self._ranks.from_first((times[1] - times[0], times[2] - times[1]))
        price = gradients * self._prices[0] + vectors * self._prices[1]
        return most if price <= 0 else min(most, int(max(self.left(), 0.0) / price))

    def _vector(self) -> Tensor:
        return self._objective.space.gaussian(1, seed=0, like=self._objective.point())


@dataclass
class _Sheet:
    """The table of one metric while it is filled."""

    objective: Objective
    ask: _Ask
    clock: _Clock
    rows: list[dict[str, object]] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    cut: str = ""
    steps: int = 0
    short: bool = False
    most: int = 0
    paid: int = 0

    def afford(self, gradients: float, vectors: int, most: int, least: int = 2) -> int:
        """Return how many steps the budget pays for, at most ``most``."""
        self.most, self.paid = most, max(self.clock.affords(gradients, vectors, most), min(least, most))
        return self.paid

    def made(self, number: int, what: str, converged: bool = False) -> None:
        """Note after how many steps the budget ended them, if it did."""
        ended = not converged and number < self.most and (self.paid < self.most or self.clock.ended)
        self.cut = f"; the budget ended it after {number} of {self.most} {what}" if ended else ""
        self.steps += number

    def usual(self, number: int, large: int) -> int:
        """Return how many steps there are without a budget, for a network of this size."""
        return number if self.objective.size < _LARGE else large

    def measurement(self) -> Measurement:
        """Return the table, with the number of steps if the budget cut it."""
        cut = {"cut": self.steps} if self.short else {}
        return Measurement(rows=tuple(self.rows), results=self.results, settings={**self.objective.settings, **cut})

    def add(
        self,
        metric: str,
        value: float | Tensor,
        uncertainty: float,
        meaning: str,
        converged: bool | None = None,
        resolution: float = 0.0,
    ) -> None:
        if abs(float(value)) < resolution:
            meaning += f"; below resolution ({resolution:.1e})"
        self.short = self.short or bool(self.cut)
        row = {"metric": metric, "value": float(value), "uncertainty": uncertainty, "converged": converged}
        self.rows.append({**row, "meaning": meaning + self.cut})


def _steps(part: Measurement) -> int:
    """Return after how many steps the budget cut a metric; 0: it did not."""
    return int(part.settings.get("cut") or 0)


def _loss(sheet: _Sheet) -> None:
    loss, gradient = sheet.objective.loss_and_gradient()
    sheet.add("loss", loss, _NAN, "mean over the samples")
    norm = sheet.objective.space.norm
    sheet.add("gradient_norm", norm(gradient), _NAN, "‖∇L(w)‖₂")
    sheet.add("weight_norm", norm(sheet.objective.point()), _NAN, "‖w‖₂")


def _critical(sheet: _Sheet) -> None:
    critical = critical_sharpness(sheet.objective)
    sheet.results["critical_sharpness"] = critical
    found = "" if critical.status == "one crossing" else f"; {critical.status}"
    meaning = f"2/η where the step −η∇L first raises L; bracket{found}"
    known = critical.converged if len(critical.steps) else None
    sheet.add("critical_sharpness", critical.value, critical.error, meaning, known)


def _average(sheet: _Sheet) -> None:
    sigma, draws = sheet.ask.sigma, sheet.afford(_PAIR, 1, sheet.usual(_DRAWS, 16))
    average = average_sharpness(sheet.objective, sigma, adaptive=True, draws=draws, seed=sheet.ask.seed)
    sheet.made(average.draws, "draws")
    sheet.results["average"] = average
    meaning = "mean loss rise under noise σ|w|; standard error"
    sheet.add(
        f"average_sharpness@{sigma:g}",
        average.value,
        average.standard_error,
        meaning,
        resolution=average.resolution,
    )


def _balls(sheet: _Sheet, adaptive: bool = False) -> None:
    sign, prefix = ("e/|w|", "adaptive_") if adaptive else ("e", "")
    for radius in sheet.ask.radii:
        iterations = sheet.afford(_STEP, 0, sheet.usual(_GRADIENTS, 20), 5)
        most = _BASIS_BYTES // (2 * sheet.objective.point().nbytes)
        hvps = min(_HVPS, most, iterations // 2 if sheet.paid < sheet.most else _HVPS)
        searched: dict[str, Any] = {"starts": ("gradient",)} if most < _FEWEST_HVPS else {"krylov_hvps": max(2, hvps)}
        ball = ball_sharpness(
            sheet.objective, radius, adaptive=adaptive, iterations=iterations, seed=sheet.ask.seed, **searched
        )
        sheet.made(ball.gradients, "gradients", ball.converged)
        sheet.results[f"{prefix.replace('_', '-')}ball-{radius:g}"] = ball
        meaning = f"largest loss rise found in ‖{sign}‖₂ ≤ {radius:g}"
        name = f"{prefix}ball_sharpness@{radius:g}"
        sheet.add(name, ball.sharpness, _NAN, meaning, ball.converged, ball.resolution)
        sheet.cut = ""  # a single step is whole
        meaning = f"loss rise after {'ASAM' if adaptive else 'SAM'}'s single ascent step"
        name = f"{prefix}one_step_sharpness@{radius:g}"
        sheet.add(name, ball.one_step, _NAN, meaning, resolution=ball.resolution)


def _adaptive(sheet: _Sheet) -> None:
    _balls(sheet, adaptive=True)


def _trace(sheet: _Sheet) -> None:
    draws = sheet.afford(_PRODUCT, 1, sheet.usual(_SIGNS, 10))
    traced = trace(sheet.objective, draws=draws, seed=sheet.ask.seed)
    sheet.made(traced.draws, "products")
    sheet.results["trace"] = traced
    sheet.add("trace", traced.value, traced.standard_error, "Hessian trace (Hutchinson); standard error")


def _eigenvalues(sheet: _Sheet) -> None:
    ask, k = sheet.ask, min(sheet.ask.eigenvalues, sheet.objective.size)
    most = sheet.afford(_PRODUCT, 1, ask.max_hvps, k)
    pairs = top_eigenvalues(sheet.objective, k, tolerance=ask.tolerance, max_hvps=most, seed=ask.seed)
    sheet.made(pairs.hvps, "products", pairs.converged)
    sheet.results["eigenvalues"] = pairs
    for index, (value, residual) in enumerate(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True), 1):
        meaning = "Hessian eigenvalue; residual ‖Hv − λv‖"
        sheet.add(f"lambda_{index}", value, residual, meaning, pairs.converged)


def _batches(sheet: _Sheet) -> None:
    m = min(BATCH, sheet.objective.samples)
    most = min(FEW_BATCHES, math.ceil(sheet.objective.samples / m))
    price = _STEP * _GRADIENTS * m / sheet.objective.samples
    for radius in sheet.ask.radii:
        batches = sheet.afford(price, 0, most, 1)
        result = m_sharpness(sheet.objective, radius, m, batches=batches, seed=sheet.ask.seed)
        sheet.made(len(result.rises), "batches")
        sheet.results[f"batches-{radius:g}"] = result
        meaning = f"mean of largest loss rises of batches of {m}, each in its ‖e‖₂ ≤ {radius:g}; standard error"
        name = f"m_sharpness@{radius:g}"
        sheet.add(name, result.value, result.standard_error, meaning, result.converged, result.resolution)


def _flatness(sheet: _Sheet) -> None:
    matrices = [name for name, p in sheet.objective.model.named_parameters() if p.ndim == 2]
    if not matrices:
        raise ValueError("flatness needs a weight matrix, and the model has none: leave it out of metrics")
    draws = sheet.afford(_PRODUCT, 0, _SIGNS)
    flatness = relative_flatness(sheet.objective, matrices[-1], draws=draws, seed=sheet.ask.seed)
    sheet.made(flatness.draws, "products")
    sheet.results["flatness"] = flatness
    meaning = f"Σ ⟨w_s, w_s'⟩ tr H_ss' of {matrices[-1]}; standard error"
    sheet.add("relative_flatness", flatness.value, flatness.standard_error, meaning)


def _fisher_rao(sheet: _Sheet) -> None:
    samples = min(FEW_SAMPLES, sheet.objective.samples)
    sheet.afford(0, 0, samples)  # what a gradient of one sample costs is not known before
    few = samples if samples < sheet.objective.samples else None
    norm = fisher_rao_norm(sheet.objective, samples=few, seed=sheet.ask.seed)
    sheet.made(norm.draws, "samples")
    sheet.results["fisher-rao"] = norm
    sheet.add(
        "fisher_rao_norm", norm.value, norm.standard_error, "squared norm wᵀFw over single samples; standard error"
    )


_MEASUREMENTS: dict[str, Callable[[_Sheet], None]] = {
    "loss": _loss,
    "critical_sharpness": _critical,
    "average": _average,
    "ball": _balls,
    "adaptive": _adaptive,
    "trace": _trace,
    "eigenvalues": _eigenvalues,
    "batches": _batches,
    "flatness": _flatness,
    "fisher-rao": _fisher_rao,
}
