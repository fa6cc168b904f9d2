"""The loss on a random part of the data, the same part at every point, and its error against the loss on all data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from torch import Tensor

from msam_analysis.objective.objective import Objective
from msam_analysis.objective.private import LossFunction
from msam_analysis.objective.randomness import drawn_indices
from msam_analysis.objective.weighing import with_reduction

Criterion = Callable[[Tensor, Tensor], Tensor]


def drawn(objective: Objective, samples: int, seed: int) -> Objective:
    """Return the objective on ``samples`` samples, drawn without replacement, in the order of the data.

    Raises
    ------
    ValueError
        ``samples`` is not between 2 and the number of samples.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or not 2 <= samples <= objective.samples:
        raise ValueError(
            f"samples must be an integer from 2 to the {objective.samples} that there are, got {samples!r}: "
            "leave it out to use all"
        )
    return objective.with_samples(drawn_indices(objective.samples, samples, seed))


def per_sample(loss_fn: LossFunction) -> Criterion | None:
    """Return a criterion that gives every sample's loss, or ``None`` if ``loss_fn`` offers no ``reduction``."""
    return cast("Criterion | None", with_reduction(loss_fn, "none"))


def standard_error(values: Tensor, weights: Tensor, fraction: float) -> float:
    r"""Return the standard error of ``Σ w x / Σ w`` over units drawn without replacement.

    ``SE² = (1 − f) · n/(n − 1) · Σ w² (x − x̄)² / (Σ w)²`` for the ratio estimator (Cochran, *Sampling Techniques*,
    1977, section 6.3), with ``f`` the fraction drawn; ``s²/n · (1 − f)`` for equal weights. NaN for a single unit.

    Parameters
    ----------
    values, weights
        Values ``x`` and weights ``w`` of the units, shape ``(n,)``, float64.
    fraction
        Fraction ``f`` of the data that was drawn.
    """
    if len(values) < 2:
        return math.nan
    mean = (weights * values).sum() / weights.sum()
    spread = (weights * (values - mean)).square().sum() / weights.sum().square()
    return math.sqrt((1 - fraction) * len(values) / (len(values) - 1) * float(spread))
