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
from msam_analysis.studies.tables import Tables, cosines, negative_share, of_training

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A quantity and where a claim says it lies.

    Attributes
    ----------
    label
        What it is: "whose, what".
    interval
        Mean over seeds, with its 68 % interval; of the logarithm, for a factor.
    unit
        Shown after the number.
    factor
        The quantity is a ratio.
    above, below
        The claim's region, on the interval's scale; by default the numbers above 0 (ratios above 1).
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

    Raises
    ------
    ValueError
        There is nothing to compare.
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

    Attributes
    ----------
    exhibit
        Id of the paper's figure or table.
    sentence
        The claim in our words.
    paper
        The paper's number.
    compare
        What was found (the main tables, or an exhibit's own table) to comparisons.
    note
        How the test was set up, where that matters.
    control
        Not a claim of the paper, but what one of them must be read beside.
    """

    exhibit: str
    sentence: str
    paper: str
    compare: Callable[[Any], list[Comparison]]
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


def by_seed(frame: pd.DataFrame, optimizer: str, column: str) -> Values:
    """Return a column for one optimizer, ordered by seed."""
    part = frame[frame["optimizer"] == optimizer].sort_values("seed")
    values: Values = part[column].to_numpy(dtype=np.float64)
    return values


def difference(
    frame: pd.DataFrame, column: str, larger: str, smaller: str, *, scale: float = 1.0, unit: str = ""
) -> Comparison:
    """Compare ``column`` of two optimizers, paired by seed."""
    values = by_seed(frame, larger, column) - by_seed(frame, smaller, column)
    return Comparison(f"{larger} − {smaller}", mean_interval(scale * values), unit)


def ratio(frame: pd.DataFrame, column: str, larger: str, smaller: str) -> Comparison:
    """Compare the ratio of ``column`` of two optimizers, paired by seed; see :func:`times`."""
    return times(f"{larger} / {smaller}", by_seed(frame, larger, column), by_seed(frame, smaller, column))


def times(label: str, larger: Values, smaller: Values, at_least: float = 1.0) -> Comparison:
    """Compare the logarithm of ``larger / smaller`` with that of ``at_least``.

    Where a number is not positive there is no such logarithm: then ``larger − smaller`` must exceed
    ``(at_least − 1) · |smaller|``, which for positive numbers is the same.
    """
    if (larger <= 0).any() or (smaller <= 0).any():
        excess = larger - smaller - (at_least - 1) * np.abs(smaller)
        multiple = "" if at_least == 1 else f" − {at_least - 1:g} · |second|"
        return Comparison(f"{label} (not all positive: first − second{multiple})", mean_interval(excess))
    values = np.log(larger) - np.log(smaller)
    return Comparison(label, mean_interval(values), factor=True, above=math.log(at_least))


def over_seeds(
    what: str, column: str, *by: str, where: Mapping[str, object] | None = None, **region: Any
) -> Callable[[pd.DataFrame], list[Comparison]]:
    """Return a function that makes one :class:`Comparison` of a column's values for every group of a table.

    Parameters
    ----------
    what
        What the numbers are, for the label.
    column
        Column with one number a seed.
    *by
        Columns whose values make the groups, and name them in the label.
    where
        Columns to the value that a row must have there to be looked at; default all rows.
    **region
        Unit and bounds of the comparisons.
    """

    def compare(table: pd.DataFrame) -> list[Comparison]:
        found = []
        for name, value in (where or {}).items():
            table = table[table[name] == value]
        for group, part in table.groupby([*by], sort=False):
            values = part.sort_values("seed")[column].to_numpy(dtype=np.float64)
            found.append(Comparison(f"{' '.join(map(str, group))}, {what}", mean_interval(values), **region))
        return found

    return compare


def _per_seed(steps: pd.DataFrame, optimizer: str, statistic: Callable[[pd.DataFrame], float]) -> Values:
    part = steps[steps["optimizer"] == optimizer]
    return np.array([of_training(run, statistic) for _, run in part.groupby("seed")], dtype=np.float64)


def _accuracy(tables: Tables) -> list[Comparison]:
    return [
        difference(tables.runs, "test_accuracy", "MSAM", other, scale=100, unit="points") for other in ("SGD", "NAG")
    ]


def _same_cost(tables: Tables) -> list[Comparison]:
    sgd, sam, msam = (by_seed(tables.runs, name, "gradients_per_step") for name in ("SGD", "SAM", "MSAM"))
    return [
        Comparison(f"{label}, gradients a step", mean_interval(values), above=-SAME_COST, below=SAME_COST)
        for label, values in (("MSAM − SGD", msam - sgd), ("SAM − 2 SGD", sam - 2 * sgd))
    ]


def _each(
    steps: pd.DataFrame, what: str, statistic: Callable[[pd.DataFrame], float], **region: Any
) -> list[Comparison]:
    """Compare a statistic of every run's records, one comparison per optimizer."""
    names = dict.fromkeys(steps["optimizer"])
    return [Comparison(f"{name}, {what}", mean_interval(_per_seed(steps, name, statistic)), **region) for name in names]


def _mostly_negative(steps: pd.DataFrame) -> list[Comparison]:
    return _each(steps, "steps with a negative cosine", lambda run: negative_share(cosines(run)), unit="%", above=50.0)


def _fades_out(tables: Tables) -> list[Comparison]:
    last = int(tables.steps["epoch"].max())

    def size(run: pd.DataFrame, first: float, end: float) -> float:
        return abs(float(cosines(run)[run["epoch"].between(first, end)].mean(skipna=False)))

    def left(run: pd.DataFrame) -> float:
        return size(run, last, last)

    def fall(run: pd.DataFrame) -> float:
        return size(run, 0.25 * last, 0.75 * last) - left(run)

    return [
        *_each(tables.steps, "|cosine| mid-training − last epoch", fall),
        *_each(tables.steps, "|cosine| in the last epoch", left, above=-math.inf, below=FADED),
    ]


def _rises(tables: Tables) -> list[Comparison]:
    perturbed = tables.steps[tables.steps["optimizer"].isin(("SAM", "MSAM"))]
    return _each(perturbed, "mean L(w + ε) − L(w)", lambda run: float(run["rise"].mean()))


def _curvature(steps: pd.DataFrame, optimizer: str, direction: str) -> Values:
    return _per_seed(steps, optimizer, lambda run: float(run[f"curvature_{direction}"].mean()))


def _momentum_curvature(tables: Tables) -> list[Comparison]:
    return [
        times(
            f"{name}, momentum / random",
            _curvature(tables.steps, name, "momentum"),
            _curvature(tables.steps, name, "random"),
            MUCH,
        )
        for name in dict.fromkeys(tables.steps["optimizer"])
    ]


def _msam_lowest_curvature(tables: Tables) -> list[Comparison]:
    return [
        times(
            f"{other} / MSAM along {direction}",
            _curvature(tables.steps, other, direction),
            _curvature(tables.steps, "MSAM", direction),
        )
        for direction in ("random", "momentum")
        for other in ("SGD", "NAG", "SAM")
    ]


def _flattest(column: str, best: str) -> Callable[[Tables], list[Comparison]]:
    return lambda tables: [
        ratio(tables.runs, column, other, best) for other in ("SGD", "NAG", "SAM", "MSAM") if other != best
    ]


def _ordered(column: str) -> Callable[[Tables], list[Comparison]]:
    return lambda tables: [
        ratio(tables.runs, column, "SGD", "SAM"),
        ratio(tables.runs, column, "SAM", "MSAM"),
    ]


MUCH = 3.0
"""How many times larger counts as "much larger" where the paper gives no number."""
FAR = 2.0
"""So many points of accuracy count as "far above" where the paper gives no bound."""
FADED = 0.05
"""A cosine smaller than this counts as gone to 0."""
SAME_COST = 0.05
"""A difference of fewer gradients per step counts as none."""

CLAIMS: tuple[PaperClaim, ...] = (
    PaperClaim(
        "T1",
        "MSAM generalises better than SGD and NAG.",
        "79.11 % test accuracy against 76.90 % and 77.09 % (WRN-16-4, CIFAR-100)",
        _accuracy,
    ),
    PaperClaim(
        "T1",
        "MSAM costs what SGD costs; SAM costs twice as much.",
        "speed 0.99 against 0.52 (SGD: 1)",
        _same_cost,
        note="Gradients evaluated per step were counted: SAM's second one is the whole difference.",
    ),
    PaperClaim(
        "F2C",
        "The cosine between momentum and the next gradient is negative for most of training.",
        "negative",
        lambda tables: _mostly_negative(tables.steps),
    ),
    PaperClaim(
        "F2C",
        "Control, not in the paper: it is also negative where batches are drawn with replacement.",
        "not tested; an epoch there has 196 batches, drawn without replacement",
        lambda tables: _mostly_negative(tables.controls),
        note="Within an epoch every sample is shown once, so that the batches still to come are those that the "
        "momentum lacks: with few batches an epoch this alone makes the cosine negative.",
        control=True,
    ),
    PaperClaim(
        "F2C",
        "The cosine goes to 0 as the learning rate decays to 0.",
        "→ 0",
        _fades_out,
        note="|Mean cosine| over the last epoch: small, and smaller than over the middle half of the epochs.",
    ),
    PaperClaim(
        "A12",
        "The perturbation raises the loss of the batch on which the gradient is taken.",
        "raises",
        _rises,
    ),
    PaperClaim(
        "A8",
        "During training the curvature along momentum is much larger than along random directions, for every "
        "optimizer.",
        "momentum ≫ random",
        _momentum_curvature,
        note=f"The paper gives no number; a factor of {MUCH:g} is required here.",
    ),
    PaperClaim(
        "A8",
        "MSAM has the lowest curvature along random directions and along momentum.",
        "lowest",
        _msam_lowest_curvature,
        note="Means over training.",
    ),
    PaperClaim(
        "TA1",
        "The largest Hessian eigenvalue falls from SGD over SAM to MSAM.",
        "λ1: 15.19 > 5.18 > 4.15",
        _ordered("lambda_1"),
    ),
    PaperClaim(
        "F4A",
        "Along the gradient, SAM's minimum is the flattest.",
        "SAM flattest",
        _flattest("rise_along_gradient", "SAM"),
        note="Mean loss rise over the slice along the unit gradient.",
    ),
    PaperClaim(
        "F4B",
        "Along the momentum vector, MSAM's minimum is the flattest.",
        "MSAM flattest",
        _flattest("rise_along_momentum", "MSAM"),
        note="Mean loss rise over the slice along the unit momentum.",
    ),
    PaperClaim(
        "F4C",
        "Along random filter-normalised directions, MSAM's minimum is the flattest.",
        "MSAM flattest",
        _flattest("rise_along_random", "MSAM"),
        note="Mean loss rise over the slice; one direction, normalised by each network's own filters.",
    ),
    PaperClaim(
        "A13",
        "On a random filter-normalised plane SAM is flatter than SGD, and MSAM the flattest.",
        "MSAM flattest",
        _ordered("rise_on_plane"),
        note="Mean loss rise over the plane.",
    ),
)
