"""The average rise of the loss under noise."""

from __future__ import annotations

import math

import torch

from msam_analysis.measures.geometry import Adaptive, adaptive_scale
from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.progress import told
from msam_analysis.objective.rounding import resolution, warn_if_below
from msam_analysis.objective.vectors import read
from msam_analysis.results import Estimate


@numbers
def average_sharpness(
    objective: Objective, sigma: float, *, adaptive: Adaptive = False, draws: int = 50, seed: int = 0
) -> Estimate:
    r"""Return the mean loss rise under Gaussian noise, ``E[L(w + σ D ε)] − L(w)`` with ``ε ~ N(0, I)``.

    Each draw is antithetic (``±ε``), which cancels the gradient term; to second order the mean is ``σ²/2 tr(D H D)``.
    ``D = 1``, or as ``adaptive`` says. Source: Andriushchenko et al., *A Modern Look at the Relationship
    between Sharpness and Generalization* (2023), average-case sharpness, where ``ρ`` is the ``σ`` here.

    Memory: five vectors (the weights, their scale, a draw, a point, a sum) and no graph.

    Parameters
    ----------
    objective
        The loss.
    sigma
        Standard deviation of the noise per entry, in the unit of the weights; if adaptive, as a fraction of ``D``.
    adaptive
        Scale ``D`` of the noise: 1 for ``False`` (default), ``|w|`` for ``True``, the norm of every filter for
        ``"filter"``.
    draws
        Pairs of loss evaluations. Default 50.
    seed
        Seed of the noise.

    Returns
    -------
    Estimate
        Mean and standard error over the pairs; NaN or infinite if the loss is.

    Raises
    ------
    ValueError
        ``sigma`` is negative or not finite, there are fewer than 2 draws, or ``adaptive`` is unknown.

    Warns
    -----
    ApproximationWarning
        The value is below its resolution: it is rounding.
    """
    check_sigma(sigma)
    if draws < 2:
        raise ValueError(f"draws must be at least 2, so that an error can be given; got {draws}")
    center = objective.point()
    scale = adaptive_scale(objective, adaptive)
    losses = [objective.loss(center)]
    for draw in range(draws):
        noise = sigma * objective.space.gaussian(1, seed=seed, like=center, use=f"noise {draw}")[:, 0]
        step = noise if scale is None else scale * noise
        losses += (objective.loss(center + step), objective.loss(center - step))
        if told("draws", draw + 1, draws) and draw > 0:
            break
    base, *values = read(*losses)
    rises = [(ahead + behind) / 2 - base for ahead, behind in zip(values[::2], values[1::2], strict=True)]
    sample = torch.tensor(rises, dtype=torch.float64)
    value, limit = float(sample.mean()), resolution(objective, base)
    warn_if_below("average_sharpness", value, limit)
    return Estimate(
        quantity="average sharpness (adaptive)" if adaptive else "average sharpness",
        value=value,
        standard_error=float(sample.std() / math.sqrt(len(sample))),
        draws=len(sample),
        evaluations=2 * len(sample) + 1,
        settings={**objective.settings, "sigma": float(sigma)},
        resolution=limit,
        values=sample,
    )


def check_sigma(sigma: float) -> None:
    """Raise ``ValueError`` unless ``sigma`` is the size of a noise."""
    if not (isinstance(sigma, int | float) and math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be a number >= 0, got {sigma!r}")
