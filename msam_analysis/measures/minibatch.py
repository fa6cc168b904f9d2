"""The mean of the largest loss rises of single batches."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from msam_analysis.measures.ball import ball_sharpness
from msam_analysis.measures.geometry import Adaptive, Norm
from msam_analysis.measures.starts import Start
from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.progress import told
from msam_analysis.objective.rounding import warn_if_below
from msam_analysis.results import ApproximationWarning, BatchSharpness, ConvergenceWarning


@numbers
def m_sharpness(
    objective: Objective,
    rho: float,
    m: int,
    *,
    batches: int | None = None,
    norm: Norm = "l2",
    adaptive: Adaptive = False,
    starts: Sequence[Start | Tensor] = ("gradient", "krylov", "eigenvector"),
    iterations: int = 40,
    krylov_hvps: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> BatchSharpness:
    r"""Return the m-sharpness, ``Σ_b n_b max_{‖e‖ ≤ ρ} [L_b(w + e) − L_b(w)] / Σ_b n_b`` over batches of ``m`` samples.

    Every batch has a maximum of its own. So the m-sharpness exceeds the sharpness on all data, and the more the smaller
    ``m`` is. SAM minimises the m-sharpness for ``m`` equal to its batch size (per device). Sources: Foret et al.
    (2021), section 4.1; with ball maxima in place of single steps, Andriushchenko et al. (2023).

    Parameters
    ----------
    objective
        The loss; its samples are cut into consecutive batches of ``m`` in the order of its data. The last batch holds
        the remainder and is weighted by its size. Data sorted by class make batches of one class: shuffle them once
        beforehand.
    rho
        Radius of each ball.
    m
        Number of samples in a batch.
    batches
        Number of batches to measure, drawn at random without replacement; default: all.
    norm, adaptive, starts, iterations, krylov_hvps, tolerance
        Options of every ball; see :func:`ball_sharpness`. All batches together cost as much as one ball on all data.
    seed
        Seed of the choice of batches and of the balls.

    Returns
    -------
    BatchSharpness
        Mean and standard error over the batches, and the maximum for every batch.

    Raises
    ------
    ValueError
        ``m`` or ``batches`` is out of range; otherwise as :func:`ball_sharpness`.

    Warns
    -----
    ConvergenceWarning
        The ball of some batches did not converge; the one warning gives their number.
    """
    if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m <= objective.samples:
        raise ValueError(f"m must be between 1 and the number of samples ({objective.samples}), got {m!r}")
    parts = torch.arange(objective.samples).split(m)
    if batches is not None and not 1 <= batches <= len(parts):
        raise ValueError(f"batches must be between 1 and {len(parts)}, the batches of {m} samples; got {batches}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(parts), generator=generator)[:batches].sort().values if batches else range(len(parts))
    sharpness = functools.partial(
        ball_sharpness, norm=norm, adaptive=adaptive, starts=starts, iterations=iterations, krylov_hvps=krylov_hvps
    )
    balls, sizes = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", ".* below the resolution", ApproximationWarning)
        for index in order:  # one part at a time is held
            part = objective.with_samples(parts[int(index)], batch_size=m)
            balls.append(sharpness(part, rho, tolerance=tolerance, seed=seed))
            sizes.append(part.samples)
            if told("batches", len(sizes), len(order)):
                break
    unconverged = sum(not ball.converged for ball in balls)
    if unconverged:
        warnings.warn(
            f"m_sharpness: {unconverged} of {len(balls)} batches reached no maximum in their ball; measure one with "
            "ball_sharpness(objective.with_samples(...)) to see why, or raise iterations",
            ConvergenceWarning,
            stacklevel=3,
        )
    rises = torch.tensor([ball.sharpness for ball in balls], dtype=torch.float64)
    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    mean = float(weights @ rises)
    limit = max(ball.resolution for ball in balls)
    warn_if_below("m_sharpness", mean, limit)
    return BatchSharpness(
        value=mean,
        standard_error=_standard_error(rises, weights, mean),
        rises=rises,
        one_steps=torch.tensor([ball.one_step for ball in balls], dtype=torch.float64),
        sizes=torch.tensor(sizes),
        m=m,
        rho=float(rho),
        norm=norm,
        adaptive=adaptive,
        batches=len(parts),
        converged=not unconverged,
        gradients=sum(ball.gradients for ball in balls),
        hvps=sum(ball.hvps for ball in balls),
        resolution=limit,
        settings=objective.settings,
    )


def _standard_error(rises: Tensor, weights: Tensor, mean: float) -> float:
    count = len(rises)
    if count < 2:
        return math.nan
    variance = float(weights @ (rises - mean) ** 2) * count / (count - 1)
    return math.sqrt(variance / count) if math.isfinite(variance) else math.nan
