"""The paper's claims, each tested by differences paired over seeds, with a verdict that no hand writes.

A claim is a list of :class:`Comparison`: a quantity, one value per seed, and the region in which the claim says it
lies. :func:`verdict` is the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from msam_analysis.report.page import Claim, Verdict, plus_minus
from msam_analysis.results.statistics import LEVEL, Interval, mean_interval
from msam_analysis.studies.tables import rows

FAR = 2.0
"""So many points of accuracy count as "far above" where the paper gives no bound."""
SAME_ACCURACY = 1.0
"""A difference of fewer points of test accuracy counts as none."""

NEGATIVE: Mapping[str, Any] = {"above": -math.inf, "below": 0.0}
SAME: Mapping[str, Any] = {"above": -SAME_ACCURACY, "below": SAME_ACCURACY}
"""Regions of claims that something is negative, and that accuracies are the same."""

Compare = Callable[[Any], list["Comparison"]]
"""What was found to what is compared."""


@dataclass(frozen=True)
class Comparison:
    """A quantity and where a claim says it lies.

    ``label``: Name of the quantity: "whose, what".
    ``interval``: Mean over seeds with its 68 % interval; for a factor, that of the logarithm.
    ``unit``: Shown after the number.
    ``factor``: The quantity is a ratio.
    ``above``, ``below``: Bounds of the claim's region, on the interval's scale; by default all numbers above 0 (ratios
        above 1).
    """

    label: str
    interval: Interval
    unit: str = ""
    factor: bool = False
    above: float = 0.0
    below: float = math.inf

    def side(self, level: float = LEVEL) -> int:
        """Return 1 where the interval lies in the region, −1 where it lies outside, 0 where neither or unknown."""
        interval = self.interval.at(level)
        if not np.isfinite(interval.half_width):
            return 0
        inside = interval.low > self.above and interval.high < self.below
        return int(inside) - int(interval.high < self.above or interval.low > self.below)

    def text(self) -> str:
        """Return "label: number ± half width", for a factor with its interval in brackets."""
        if not self.factor or np.isnan(self.interval.mean):
            return f"{self.label}: {plus_minus(self.interval.mean, self.interval.half_width, unit=self.unit)}"
        low, middle, high = np.exp([self.interval.low, self.interval.mean, self.interval.high])
        known = f" ({low:.3g} to {high:.3g})" if np.isfinite(self.interval.half_width) else ""
        return f"{self.label}: {middle:.3g} times{known}"

    @property
    def effect(self) -> float:
        """Effect size: the mean's distance from the nearer bound of the region over the seeds' standard deviation.

        Cohen's d of paired differences, positive inside the region; NaN where one seed leaves the spread unknown.
        """
        spread = self.interval.deviation
        margin = min(self.interval.mean - self.above, self.below - self.interval.mean)
        # Seeds that agree, up to rounding, have no spread to measure by.
        return margin / spread if spread > 1e-12 * abs(self.interval.mean) else math.nan

    def requirement(self) -> str:
        """Return the region in words, with what the label says after its comma; empty for the obvious one."""
        if (self.above, self.below) == (0.0, math.inf):
            return ""
        low, high = np.exp([self.above, self.below]) if self.factor else (self.above, self.below)
        if math.isinf(high):
            region = f"more than {low:g}"
        else:
            region = f"less than {high:g}" if math.isinf(low) else f"between {low:g} and {high:g}"
        unit = "times" if self.factor else self.unit
        return f"{self.label.partition(', ')[2]} {region.replace('-', '−')} {unit}".strip()


def verdict(comparisons: Sequence[Comparison]) -> Verdict:
    """Return the verdict on a claim that every quantity lies in its region.

    The claim holds where every 68 % interval lies in its region. It does not hold where some interval lies outside
    even at the level ``1 − 0.32 / comparisons`` (Bonferroni): of many quantities one is easily found on the wrong side
    by chance. Otherwise it cannot be told.

    Raises ValueError: There is nothing to compare.
    """
    if not comparisons:
        raise ValueError("a verdict needs at least one comparison, got none")
    if all(comparison.side() > 0 for comparison in comparisons):
        return "holds"
    strict = 1.0 - (1.0 - LEVEL) / len(comparisons)
    return "does not hold" if any(c.side(strict) < 0 for c in comparisons) else "cannot tell at this scale"


@dataclass(frozen=True)
class PaperClaim:
    """A sentence of the paper and how it is tested.

    ``exhibit``: Id of the paper's figure or table.
    ``sentence``: The claim in our words.
    ``paper``: The paper's number.
    ``compare``: Function that makes comparisons of the exhibit's table; those of the main exhibits get the main tables.
    ``note``: How the test was set up, where that matters.
    ``control``: Whether it is no claim of the paper, but must be read beside one.
    """

    exhibit: str
    sentence: str
    paper: str
    compare: Compare
    note: str = ""
    control: bool = False

    def judge(self, found: Any) -> Claim:
        """Return the row of the claims table; without anything to compare, the claim cannot be told."""
        comparisons = self.compare(found)
        required = ", ".join(dict.fromkeys(filter(None, (comparison.requirement() for comparison in comparisons))))
        measured = [comparison.text() for comparison in comparisons]
        effects = [comparison.effect for comparison in comparisons if np.isfinite(comparison.effect)]
        if effects:
            measured.append(f"{'least ' * (len(effects) > 1)}effect size d = {min(effects):.2g}".replace("-", "−"))
        if required:
            measured.append(f"required: {required}")
        return Claim(
            exhibit=self.exhibit,
            claim=self.sentence,
            paper=self.paper,
            measured="; ".join(measured) or "not measured",
            verdict=verdict(comparisons) if comparisons else "cannot tell at this scale",
            note=self.note,
            control=self.control,
        )


def compared(label: str, values: npt.ArrayLike, **region: Any) -> Comparison:
    """Compare numbers, one a seed; ``region``: unit and bounds of the comparison."""
    return Comparison(label, mean_interval(values), **region)


def by_seed(table: pd.DataFrame, column: str, **where: object) -> pd.Series[float]:
    """Return a column by seed, of the rows that :func:`~msam_analysis.studies.tables.rows` finds."""
    values: pd.Series[float] = rows(table, **where).set_index("seed")[column].sort_index()
    return values


def difference(
    frame: pd.DataFrame, column: str, larger: str, smaller: str, label: str = "{pair}", scale: float = 1, **region: Any
) -> Comparison:
    """Compare ``column`` of two optimizers, paired by seed; in the label ``{pair}`` stands for their names."""
    values = by_seed(frame, column, optimizer=larger) - by_seed(frame, column, optimizer=smaller)
    return compared(label.replace("{pair}", f"{larger} − {smaller}"), scale * values, **region)


def ratio(frame: pd.DataFrame, column: str, larger: str, smaller: str, label: str = "{pair}") -> Comparison:
    """Compare the ratio of ``column`` of two optimizers, paired by seed; see :func:`times` and :func:`difference`."""
    first, second = (by_seed(frame, column, optimizer=name) for name in (larger, smaller))
    return times(label.replace("{pair}", f"{larger} / {smaller}"), first, second)


def times(label: str, larger: pd.Series[float], smaller: pd.Series[float], at_least: float = 1.0) -> Comparison:
    """Compare the logarithm of ``larger / smaller`` with that of ``at_least``.

    Where a number is not positive there is no such logarithm: then ``larger − smaller`` must exceed
    ``(at_least − 1) · |smaller|``, which for positive numbers is the same.
    """
    if (larger <= 0).any() or (smaller <= 0).any():
        excess = larger - smaller - (at_least - 1) * np.abs(smaller)
        multiple = "" if at_least == 1 else f" − {at_least - 1:g} · |second|"
        return compared(f"{label} (not all positive: first − second{multiple})", excess)
    return compared(label, np.log(larger) - np.log(smaller), factor=True, above=math.log(at_least))


def over_seeds(what: str, column: str, *by: str, where: Mapping[str, object] | None = None, **region: Any) -> Compare:
    """Return a function that compares a column's values, one a seed, for every group ``by`` columns of a table.

    The label is the group's name and ``what``; ``where`` tells which :func:`~msam_analysis.studies.tables.rows` count.
    """
    return lambda table: [
        compared(f"{' '.join(map(str, group))}, {what}", by_seed(part, column), **region)
        for group, part in rows(table, **(where or {})).groupby([*by], sort=False)
    ]
