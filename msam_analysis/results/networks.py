"""Results about a network's outputs, and not about its loss: the rank of its features, its accuracy when disturbed."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import pandas as pd
from torch import Tensor

from msam_analysis.results.base import Reading, Result, column, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureRank(Result):
    r"""Ranks of a matrix of features, one row for each sample, by its singular values :math:`\sigma_i`.

    Attributes
    ----------
    rank
        Fewest principal components that explain the share ``threshold`` of the variance: least k with
        :math:`\sum_{i \le k} \sigma_i^2 \ge \text{threshold} \sum_i \sigma_i^2`, of features centred over the samples.
        0 where they do not vary.
    threshold
        Share of the variance.
    effective_rank
        :math:`\exp(-\sum_i p_i \ln p_i)` of :math:`p_i = \sigma_i / \sum_j \sigma_j` (Roy and Vetterli 2007), over the
        singular values above ``resolution``.
    stable_rank
        :math:`\sum_i \sigma_i^2 / \sigma_1^2`.
    numerical_rank
        How many :math:`\sigma_i` exceed what rounding can make of a zero: ``resolution``.
    resolution
        :math:`\sigma_1 \sqrt{\varepsilon \max(N, D)}` in float64, below which a singular value that was found through
        the Gram matrix is not known.
    singular_values
        Shape ``(min(N, D),)``, decreasing, float64, of the centred features.
    samples, dimension
        N and D.
    """

    rank: int
    threshold: float
    effective_rank: float
    stable_rank: float
    numerical_rank: int
    resolution: float
    singular_values: Tensor
    samples: int
    dimension: int

    _asked: ClassVar = ("threshold", "samples", "dimension")
    _shapes: ClassVar = {"singular_values": "components"}
    _ranges: ClassVar = {
        **dict.fromkeys(("effective_rank", "stable_rank", "resolution", "singular_values"), "nonnegative"),
        "threshold": "share",
    }

    def _disagreement(self) -> str:
        components = min(self.samples, self.dimension)
        if len(self.singular_values) != components:
            return (
                f"it has {len(self.singular_values)} singular values, expected min(samples, dimension) = {components}"
            )
        if max(self.rank, self.numerical_rank) > components:
            return f"a rank of it exceeds {components}, the smaller of samples and dimension"
        return ""

    def readings(self) -> list[Reading]:
        """Return the four ranks."""
        names = ("rank", "effective_rank", "stable_rank", "numerical_rank")
        return [Reading(name.replace("_", " "), getattr(self, name)) for name in names]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per component: ``component`` from 1, ``singular_value``, ``explained`` (share up to it)."""
        squares = self.singular_values.square()
        explained = squares.cumsum(0) / squares.sum()
        components = range(1, len(squares) + 1)
        return table({"component": components, "singular_value": self.singular_values, "explained": explained})


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustAccuracy(Result):
    r"""Accuracy over the size of a disturbance of the inputs (exhibit TA4).

    Attributes
    ----------
    attack
        ``"noise"``, ``"fgsm"``, ``"pgd"`` or ``"apgd"``.
    sizes
        Shape ``(n,)``, in the units of the inputs: σ of the noise, or the largest change ε of a single entry.
    accuracies
        Shape ``(n,)``: share of right predictions, in [0, 1]. For an attack an upper bound on the accuracy in the worst
        case, as a better attack may exist.
    clean
        Accuracy on the inputs as they are.
    errors
        Shape ``(n,)``: standard errors :math:`\sqrt{a (1 - a) / N}` of the accuracies, over the choice of samples.
    samples
        N.
    steps
        Gradients for each sample.
    """

    attack: str
    sizes: Tensor
    accuracies: Tensor
    clean: float
    errors: Tensor
    samples: int
    steps: int

    _asked: ClassVar = ("attack", "samples", "steps")
    _shapes: ClassVar = dict.fromkeys(("sizes", "accuracies", "errors"), "n")
    _ranges: ClassVar = {
        **dict.fromkeys(("sizes", "errors"), "nonnegative"),
        **dict.fromkeys(("accuracies", "clean"), "share"),
        "samples": "positive",
    }

    @property
    def clean_error(self) -> float:
        """Standard error of the accuracy on the inputs as they are."""
        return math.sqrt(self.clean * (1 - self.clean) / self.samples)

    def readings(self) -> list[Reading]:
        """Return the accuracy at every size of the disturbance, the clean one first."""
        rows = zip(self.sizes.tolist(), self.accuracies.tolist(), self.errors.tolist(), strict=True)
        known = [Reading(f"accuracy, {self.attack} of {size:.3g}", value, error) for size, value, error in rows]
        return [Reading("clean accuracy", self.clean, self.clean_error), *known]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per size: ``attack``, ``size``, ``accuracy``, ``error``; first the clean one, of size 0."""
        known = {"size": (0.0, self.sizes), "accuracy": (self.clean, self.accuracies)}
        known |= {"error": (self.clean_error, self.errors)}
        columns = {name: [clean, *column(values)] for name, (clean, values) in known.items()}
        return table({"attack": self.attack, **columns})
