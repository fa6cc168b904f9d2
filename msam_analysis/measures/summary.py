"""The sharpness metrics of one trained network, in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from msam_analysis.measures.average import average_sharpness
from msam_analysis.measures.ball import ball_sharpness
from msam_analysis.measures.invariant import fisher_rao_norm, relative_flatness
from msam_analysis.measures.minibatch import m_sharpness
from msam_analysis.objective.examination import NOT_EXAMINED
from msam_analysis.objective.objective import Objective
from msam_analysis.results import Measurement, Result
from msam_analysis.spectra.top import top_eigenvalues
from msam_analysis.spectra.traces import trace

RADII = (0.05, 0.5)
SIGMA = 0.01
BATCH, FEW_BATCHES, FEW_SAMPLES = 128, 8, 200
DEFAULT_METRICS = ("loss", "eigenvalues", "trace", "ball", "average")
METRICS = (*DEFAULT_METRICS, "adaptive", "batches", "flatness", "fisher-rao")
"""What can be measured; in the order of the table."""

_NAN = math.nan


def measure(
    objective: Objective,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    radii: Sequence[float] = RADII,
    sigma: float = SIGMA,
    eigenvalues: int = 5,
    seed: int = 0,
    tick: Callable[[str], None] | None = None,
) -> Measurement:
    """Measure sharpness metrics on the same data, mode and parameters.

    Parameters
    ----------
    objective
        The loss at the weights to be measured.
    metrics
        Names from :data:`METRICS`, in any order. Default :data:`DEFAULT_METRICS`. The others are
        ``"adaptive"``: the balls again in units of ``|w|``; ``"batches"``: the m-sharpness, with 128 samples a batch
        and at most 8 of the batches; ``"flatness"``: the relative flatness of the last weight matrix;
        ``"fisher-rao"``: the squared Fisher-Rao norm, on at most 200 samples.
    radii
        Radii of the L2 balls; default 0.05 (Foret et al. 2021) and 0.5.
    sigma
        Relative standard deviation of the noise for the average-case sharpness; default 0.01.
    eigenvalues
        Number of largest eigenvalues of the Hessian, at most ``objective.size``.
    seed
        Seed of all random draws.
    tick
        Called with the name of each metric before it is measured.

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
    sheet = _Sheet(objective, tuple(radii), sigma, eigenvalues, seed, tick or (lambda _: None))
    examination = objective.evaluation.findings.examination
    line, apart = (NOT_EXAMINED, _NAN) if examination is None else (examination.line, examination.largest)
    sheet.add("examination", apart, _NAN, line)
    for name in METRICS:
        if name in metrics:
            _MEASUREMENTS[name](sheet)
    settings = {**objective.settings, "examination": line}
    return Measurement(rows=tuple(sheet.rows), results=sheet.results, settings=settings)


@dataclass
class _Sheet:
    """The table while it is filled."""

    objective: Objective
    radii: tuple[float, ...]
    sigma: float
    eigenvalues: int
    seed: int
    say: Callable[[str], None]
    rows: list[dict[str, object]] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)

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
        self.rows.append({**row, "meaning": meaning})


def _loss(sheet: _Sheet) -> None:
    sheet.say("loss and gradient")
    loss, gradient = sheet.objective.loss_and_gradient()
    sheet.add("loss", loss, _NAN, "mean over the samples")
    sheet.add("gradient norm", gradient.norm(), _NAN, "‖∇L(w)‖₂")
    sheet.add("weight norm", sheet.objective.point().norm(), _NAN, "‖w‖₂")


def _eigenvalues(sheet: _Sheet) -> None:
    sheet.say("eigenvalues")
    pairs = top_eigenvalues(sheet.objective, min(sheet.eigenvalues, sheet.objective.size), seed=sheet.seed)
    sheet.results["eigenvalues"] = pairs
    for index, (value, residual) in enumerate(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True), 1):
        meaning = "Hessian eigenvalue; uncertainty is its residual ‖Hv − λv‖"
        sheet.add(f"λ{index}", value, residual, meaning, pairs.converged)


def _trace(sheet: _Sheet) -> None:
    sheet.say("trace")
    traced = trace(sheet.objective, seed=sheet.seed)
    sheet.results["trace"] = traced
    sheet.add("trace", traced.value, traced.standard_error, "Hessian trace (Hutchinson); standard error")


def _balls(sheet: _Sheet) -> None:
    for radius in sheet.radii:
        sheet.say(f"ball of radius {radius:g}")
        ball = ball_sharpness(sheet.objective, radius, seed=sheet.seed)
        sheet.results[f"ball-{radius:g}"] = ball
        meaning = f"largest loss rise found in ‖e‖₂ ≤ {radius:g}"
        sheet.add(f"sharpness ρ={radius:g}", ball.sharpness, _NAN, meaning, ball.converged, ball.resolution)
        meaning = "loss rise after SAM's single ascent step"
        sheet.add(f"one-step ρ={radius:g}", ball.one_step, _NAN, meaning, resolution=ball.resolution)


def _average(sheet: _Sheet) -> None:
    sheet.say("average sharpness")
    average = average_sharpness(sheet.objective, sheet.sigma, adaptive=True, seed=sheet.seed)
    sheet.results["average"] = average
    meaning = "mean loss rise under noise σ|w|; standard error"
    sheet.add(
        f"average σ={sheet.sigma:g}", average.value, average.standard_error, meaning, resolution=average.resolution
    )


def _adaptive(sheet: _Sheet) -> None:
    for radius in sheet.radii:
        sheet.say(f"adaptive ball of radius {radius:g}")
        ball = ball_sharpness(sheet.objective, radius, adaptive=True, seed=sheet.seed)
        sheet.results[f"adaptive-ball-{radius:g}"] = ball
        meaning = f"largest loss rise found in ‖e/|w|‖₂ ≤ {radius:g}"
        sheet.add(f"adaptive ρ={radius:g}", ball.sharpness, _NAN, meaning, ball.converged, ball.resolution)
        meaning = "loss rise after ASAM's single ascent step"
        sheet.add(f"adaptive one-step ρ={radius:g}", ball.one_step, _NAN, meaning, resolution=ball.resolution)


def _batches(sheet: _Sheet) -> None:
    m = min(BATCH, sheet.objective.samples)
    batches = min(FEW_BATCHES, math.ceil(sheet.objective.samples / m))
    for radius in sheet.radii:
        sheet.say(f"balls of radius {radius:g} of single batches")
        result = m_sharpness(sheet.objective, radius, m, batches=batches, seed=sheet.seed)
        sheet.results[f"batches-{radius:g}"] = result
        meaning = f"mean of largest loss rises of batches of {m}, each in its ‖e‖₂ ≤ {radius:g}; standard error"
        name = f"m-sharpness ρ={radius:g}"
        sheet.add(name, result.value, result.standard_error, meaning, result.converged, result.resolution)


def _flatness(sheet: _Sheet) -> None:
    matrices = [name for name, p in sheet.objective.model.named_parameters() if p.ndim == 2]
    if not matrices:
        raise ValueError("flatness needs a weight matrix, and the model has none: leave it out of metrics")
    sheet.say(f"relative flatness of {matrices[-1]}")
    flatness = relative_flatness(sheet.objective, matrices[-1], seed=sheet.seed)
    sheet.results["flatness"] = flatness
    meaning = f"Σ ⟨w_s, w_s'⟩ tr H_ss' of {matrices[-1]}; standard error"
    sheet.add("relative flatness", flatness.value, flatness.standard_error, meaning)


def _fisher_rao(sheet: _Sheet) -> None:
    sheet.say("Fisher-Rao norm")
    samples = FEW_SAMPLES if sheet.objective.samples > FEW_SAMPLES else None
    norm = fisher_rao_norm(sheet.objective, samples=samples, seed=sheet.seed)
    sheet.results["fisher-rao"] = norm
    sheet.add("Fisher-Rao", norm.value, norm.standard_error, "squared norm wᵀFw over single samples; standard error")


_MEASUREMENTS: dict[str, Callable[[_Sheet], None]] = {
    "loss": _loss,
    "eigenvalues": _eigenvalues,
    "trace": _trace,
    "ball": _balls,
    "average": _average,
    "adaptive": _adaptive,
    "batches": _batches,
    "flatness": _flatness,
    "fisher-rao": _fisher_rao,
}
