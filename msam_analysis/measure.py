"""The sharpness metrics of one trained network, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from msam_analysis.eigen import top_eigenvalues
from msam_analysis.objective import Objective
from msam_analysis.results import Result
from msam_analysis.sharpness import average_sharpness, ball_sharpness
from msam_analysis.spectrum import trace

RADII = (0.05, 0.5)
SIGMA = 0.01


@dataclass(frozen=True, eq=False)
class Metrics:
    """What was measured.

    Attributes
    ----------
    table
        One row per number: ``metric``, ``value``, ``uncertainty`` (a residual or a standard error; NaN for exact or
        lower-bound values), ``converged`` (of an iterative solver; else missing), ``meaning``.
    results
        The results behind it, by name.
    """

    table: pd.DataFrame
    results: dict[str, Result]


def measure(
    objective: Objective,
    *,
    radii: Sequence[float] = RADII,
    sigma: float = SIGMA,
    eigenvalues: int = 5,
    seed: int = 0,
    tick: Callable[[str], None] | None = None,
) -> Metrics:
    """Measure every sharpness metric on the same data, mode and parameters.

    Parameters
    ----------
    objective
        The loss at the weights to be measured.
    radii
        Radii of the L2 balls; default 0.05 (Foret et al. 2021) and 0.5.
    sigma
        Relative standard deviation of the noise for the average-case sharpness; default 0.01.
    eigenvalues
        How many of the Hessian's largest; at most ``objective.size`` are asked for.
    seed
        Of everything random.
    tick
        Called with the name of each metric before it is measured.

    Returns
    -------
    Metrics
        A table for reading and the full results.
    """
    say = tick or (lambda _: None)
    rows: list[dict[str, object]] = []
    results: dict[str, Result] = {}

    def add(
        metric: str, value: float | Tensor, uncertainty: float, meaning: str, converged: bool | None = None
    ) -> None:
        row = {"metric": metric, "value": float(value), "uncertainty": uncertainty, "converged": converged}
        rows.append({**row, "meaning": meaning})

    say("loss and gradient")
    loss, gradient = objective.loss_and_gradient()
    nan = float("nan")
    add("loss", loss, nan, "mean over the samples")
    add("gradient norm", gradient.norm(), nan, "‖∇L(w)‖₂")
    add("weight norm", objective.point().norm(), nan, "‖w‖₂")
    say("eigenvalues")
    pairs = top_eigenvalues(objective, min(eigenvalues, objective.size), seed=seed)
    results["eigenvalues"] = pairs
    for index, (value, residual) in enumerate(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True), 1):
        meaning = "Hessian eigenvalue; uncertainty is its residual ‖Hv − λv‖"
        add(f"λ{index}", value, residual, meaning, pairs.converged)
    say("trace")
    traced = trace(objective, seed=seed)
    results["trace"] = traced
    add("trace", traced.value, traced.standard_error, "Hessian trace (Hutchinson); standard error")
    for radius in radii:
        say(f"ball of radius {radius:g}")
        ball = ball_sharpness(objective, radius, seed=seed)
        results[f"ball-{radius:g}"] = ball
        meaning = f"largest loss rise found in ‖e‖₂ ≤ {radius:g}"
        add(f"sharpness ρ={radius:g}", ball.sharpness, nan, meaning, ball.converged)
        add(f"one-step ρ={radius:g}", ball.one_step, nan, "loss rise after SAM's single ascent step")
    say("average sharpness")
    average = average_sharpness(objective, sigma, adaptive=True, seed=seed)
    results["average"] = average
    add(
        f"average σ={sigma:g}", average.value, average.standard_error, "mean loss rise under noise σ|w|; standard error"
    )
    return Metrics(pd.DataFrame(rows).astype({"converged": "boolean"}), results)
