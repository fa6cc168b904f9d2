"""The size below which a difference of two losses is rounding."""

from __future__ import annotations

import math
import warnings

import torch

from msam_analysis.objective.objective import Objective
from msam_analysis.results import ApproximationWarning


def resolution(objective: Objective, loss: float) -> float:
    """Return ``2 ε |L|``: what rounding may make of the difference of two losses near ``L``.

    ``ε`` is the spacing of the coarsest precision of an evaluation, or what the examination found if that is more.
    """
    found = objective.evaluation.findings.examination
    relative = 0.0 if found is None or not math.isfinite(found.resolution) else found.resolution
    return 2 * max(relative, torch.finfo(objective.precision).eps) * abs(loss)


def warn_if_below(name: str, value: float, limit: float, *, stacklevel: int = 3) -> None:
    """Warn where the size of a value is below its resolution; an exact 0 is not: nothing rose at all."""
    if 0 < abs(value) < limit:
        warnings.warn(
            f"{name}: {value:.3g} is below the resolution {limit:.2g} of a difference of losses, expected more; "
            "enlarge the displacement, or measure with Objective(..., dtype=torch.float64)",
            ApproximationWarning,
            stacklevel=stacklevel,
        )
