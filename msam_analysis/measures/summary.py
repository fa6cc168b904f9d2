"""The sharpness metrics of one trained network, in one table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from msam_analysis.measures.average import average_sharpness
from msam_analysis.measures.ball import ball_sharpness
from msam_analysis.measures.invariant import fisher_rao_norm, relative_flatness
from msam_analysis.measures.minibatch import m_sharpness
from msam_analysis.objective.objective import Objective
from msam_analysis.results import Measurement, Result
from msam_analysis.spectra.top import top_eigenvalues
from msam_analysis.spectra.traces import trace

RADII = (0.05, 0.5)
SIGMA = 0.01
TOLERANCE, MAX_HVPS = 1e-4, 200
BATCH, FEW_BATCHES, FEW_SAMPLES = 128, 8, 200
METRICS = ("loss", "average", "ball", "adaptive", "trace", "eigenvalues", "batches", "flatness", "fisher-rao")
"""What can be measured; in the order of price, which is that of the table."""
DEFAULT_METRICS = METRICS[:6]

_NAN = math.nan
_DRAWS, _SIGNS, _GRADIENTS = 50, 30, 40  # the defaults of the measures: pairs of losses, random signs, gradients
_PRODUCT = 2.5  # of a Hessian-vector product, in gradients


def measure(
    objective: Objective,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    radii: Sequence[float] = RADII,
    sigma: float = SIGMA,
    eigenvalues: int = 5,
    tolerance: float = TOLERANCE,
    max_hvps: int = MAX_HVPS,
    seed: int = 0,
    budget: float | None = None,
    known: Mapping[str, Measurement] | None = None,
    keep: Callable[[str, Measurement], None] | None = None,
    tick: Callable[[str], None] | None = None,
    start: Tensor | None = None,
) -> Measurement:
    """Measure sharpness metrics on the same data, mode and parameters, the cheapest first.

    Parameters
    ----------
    objective
        The loss at the weights to be measured.
    metrics
        Names from :data:`METRICS`, in any order. Default :data:`DEFAULT_METRICS`: ``"loss"``; ``"average"``, the rise
        under noise in proportion to the weights; ``"ball"`` and ``"adaptive"``, the largest rise in balls in units of
        the weights and of ``|w|``; ``"trace"``; ``"eigenvalues"``. The others are ``"batches"``: the m-sharpness, with
        128 samples a batch and at most 8 of the batches; ``"flatness"``: the relative flatness of the last weight
        matrix; ``"fisher-rao"``: the squared Fisher-Rao norm, on at most 200 samples.
    radii
        Radii of the balls; default 0.05 (Foret et al. 2021) and 0.5.
    sigma
        Relative standard deviation of the noise for the average-case sharpness; default 0.01.
    eigenvalues
        Number of largest eigenvalues of the Hessian, at most ``objective.size``.
    tolerance, max_hvps
        Relative residual of the eigenvalues, default 1e-4, and the most Hessian-vector products spent on them, default
        200: most networks need 30 to 80. What is not converged then is given with its residual.
    seed
        Seed of all random draws.
    budget
        Seconds after which no metric is begun, and to which draws, products and gradients are cut; default unlimited.
        What was cut says so, with its error; what was not begun is named in ``settings["not measured"]``.
    known
        Metrics that were measured before, by name: they are taken as they are.
    keep
        Called with the name and the rows of each metric as soon as it is measured, for storing.
    tick
        Called with the name of each metric before it is measured.
    start
        Where the eigenvalues' search begins, such as the eigenvectors of a similar network; shape ``(size, k)``.

    Returns
    -------
    Measurement
        A table for reading and the full results.

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
    ask = _Ask(tuple(radii), sigma, eigenvalues, tolerance, max_hvps, seed, start)
    clock = _Clock(objective, math.inf if budget is None else time.perf_counter() + budget)
    parts: dict[str, Measurement] = {name: part for name, part in (known or {}).items() if name in metrics}
    left = [name for name in METRICS if name in metrics and name not in parts]
    late: list[str] = []
    for name in left:
        if clock.left() <= 0:
            late.append(name)
            continue
        if tick is not None:
            tick(name)
        sheet = _Sheet(objective, ask, clock)
        _MEASUREMENTS[name](sheet)
        parts[name] = Measurement(rows=tuple(sheet.rows), results=sheet.results, settings=sheet.settings())
        if keep is not None:
            keep(name, parts[name])
    ordered = [parts[name] for name in METRICS if name in parts]
    cut = [name for name in METRICS if name in parts and parts[name].settings.get("cut")]
    settings = dict(objective.settings)
    settings |= {what: ", ".join(names) for what, names in (("cut", cut), ("not measured", late)) if names}
    return Measurement(
        rows=tuple(row for part in ordered for row in part.rows),
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
    start: Tensor | None


class _Clock:
    """The time left, and what it pays for."""

    def __init__(self, objective: Objective, end: float) -> None:
        self._objective, self._end, self._gradient = objective, end, 0.0

    def left(self) -> float:
        """Return the seconds left."""
        return self._end - time.perf_counter()

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Return loss and gradient, and time them."""
        begun = time.perf_counter()
        found = self._objective.loss_and_gradient()
        self._gradient = time.perf_counter() - begun
        return found

    def affords(self, price: float, most: int) -> int:
        """Return how many steps of ``price`` gradients the time left pays for, at most ``most``, at least 2."""
        if math.isinf(self._end):
            return most
        if not self._gradient:
            self.gradient()
        return max(2, min(most, int(max(self.left(), 0.0) / (price * self._gradient))))


@dataclass
class _Sheet:
    """The table of one metric while it is filled."""

    objective: Objective
    ask: _Ask
    clock: _Clock
    rows: list[dict[str, object]] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    cut: str = ""

    def afford(self, price: float, most: int, what: str, least: int = 2) -> int:
        """Return how many steps the budget pays for, and note it if these are fewer than ``most``."""
        number = max(self.clock.affords(price, most), min(least, most))
        if number < most:
            self.cut = f"; the budget ended it after {number} of {most} {what}"
        return number

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """Return what the metric was measured on, and whether the budget cut it."""
        return {**self.objective.settings, **({"cut": True} if self.cut else {})}

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
        row = {"metric": metric, "value": float(value), "uncertainty": uncertainty, "converged": converged}
        self.rows.append({**row, "meaning": meaning + self.cut})


def _loss(sheet: _Sheet) -> None:
    loss, gradient = sheet.clock.gradient()
    sheet.add("loss", loss, _NAN, "mean over the samples")
    sheet.add("gradient_norm", gradient.norm(), _NAN, "‖∇L(w)‖₂")
    sheet.add("weight_norm", sheet.objective.point().norm(), _NAN, "‖w‖₂")


def _average(sheet: _Sheet) -> None:
    sigma, draws = sheet.ask.sigma, sheet.afford(0.8, _DRAWS, "draws")
    average = average_sharpness(sheet.objective, sigma, adaptive=True, draws=draws, seed=sheet.ask.seed)
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
        iterations = sheet.afford(2.0, _GRADIENTS, "gradients", 5)
        ball = ball_sharpness(sheet.objective, radius, adaptive=adaptive, iterations=iterations, seed=sheet.ask.seed)
        sheet.results[f"{prefix.replace('_', '-')}ball-{radius:g}"] = ball
        meaning = f"largest loss rise found in ‖{sign}‖₂ ≤ {radius:g}"
        name = f"{prefix}ball_sharpness@{radius:g}"
        sheet.add(name, ball.sharpness, _NAN, meaning, ball.converged, ball.resolution)
        meaning = f"loss rise after {'ASAM' if adaptive else 'SAM'}'s single ascent step"
        name = f"{prefix}one_step_sharpness@{radius:g}"
        sheet.add(name, ball.one_step, _NAN, meaning, resolution=ball.resolution)


def _adaptive(sheet: _Sheet) -> None:
    _balls(sheet, adaptive=True)


def _trace(sheet: _Sheet) -> None:
    draws = sheet.afford(_PRODUCT, _SIGNS, "products")
    traced = trace(sheet.objective, draws=draws, seed=sheet.ask.seed)
    sheet.results["trace"] = traced
    sheet.add("trace", traced.value, traced.standard_error, "Hessian trace (Hutchinson); standard error")


def _eigenvalues(sheet: _Sheet) -> None:
    ask, k = sheet.ask, min(sheet.ask.eigenvalues, sheet.objective.size)
    most = sheet.afford(_PRODUCT, max(ask.max_hvps, k), "products", k)
    pairs = top_eigenvalues(sheet.objective, k, tolerance=ask.tolerance, max_hvps=most, seed=ask.seed, start=ask.start)
    if pairs.converged:
        sheet.cut = ""
    sheet.results["eigenvalues"] = pairs
    for index, (value, residual) in enumerate(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True), 1):
        meaning = "Hessian eigenvalue; uncertainty is its residual ‖Hv − λv‖"
        sheet.add(f"lambda_{index}", value, residual, meaning, pairs.converged)


def _batches(sheet: _Sheet) -> None:
    m = min(BATCH, sheet.objective.samples)
    batches = min(FEW_BATCHES, math.ceil(sheet.objective.samples / m))
    for radius in sheet.ask.radii:
        result = m_sharpness(sheet.objective, radius, m, batches=batches, seed=sheet.ask.seed)
        sheet.results[f"batches-{radius:g}"] = result
        meaning = f"mean of largest loss rises of batches of {m}, each in its ‖e‖₂ ≤ {radius:g}; standard error"
        name = f"m_sharpness@{radius:g}"
        sheet.add(name, result.value, result.standard_error, meaning, result.converged, result.resolution)


def _flatness(sheet: _Sheet) -> None:
    matrices = [name for name, p in sheet.objective.model.named_parameters() if p.ndim == 2]
    if not matrices:
        raise ValueError("flatness needs a weight matrix, and the model has none: leave it out of metrics")
    flatness = relative_flatness(sheet.objective, matrices[-1], seed=sheet.ask.seed)
    sheet.results["flatness"] = flatness
    meaning = f"Σ ⟨w_s, w_s'⟩ tr H_ss' of {matrices[-1]}; standard error"
    sheet.add("relative_flatness", flatness.value, flatness.standard_error, meaning)


def _fisher_rao(sheet: _Sheet) -> None:
    samples = FEW_SAMPLES if sheet.objective.samples > FEW_SAMPLES else None
    norm = fisher_rao_norm(sheet.objective, samples=samples, seed=sheet.ask.seed)
    sheet.results["fisher-rao"] = norm
    sheet.add(
        "fisher_rao_norm", norm.value, norm.standard_error, "squared norm wᵀFw over single samples; standard error"
    )


_MEASUREMENTS: dict[str, Callable[[_Sheet], None]] = {
    "loss": _loss,
    "average": _average,
    "ball": _balls,
    "adaptive": _adaptive,
    "trace": _trace,
    "eigenvalues": _eigenvalues,
    "batches": _batches,
    "flatness": _flatness,
    "fisher-rao": _fisher_rao,
}
