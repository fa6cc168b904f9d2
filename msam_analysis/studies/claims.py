"""The paper's claims, each tested by differences paired over seeds, with a verdict that no hand writes.

A claim is a list of :class:`Comparison`: a quantity that the claim says exceeds a bound, one value per seed. It holds
where every 68 % Student-t interval lies above the bound, does not hold where any lies below, and cannot be told
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from msam_analysis.report import Claim, Verdict, plus_minus
from msam_analysis.statistics import Interval, mean_interval
from msam_analysis.studies.tables import Tables

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A quantity that a claim says is large enough.

    Attributes
    ----------
    label
        What it is.
    interval
        Mean over seeds, with its 68 % interval; of the logarithm, for a factor.
    unit
        Shown after the number.
    factor
        The quantity is a ratio.
    beyond
        The claim says that the quantity (the ratio itself, for a factor) exceeds this. Default 0, or 1 for a factor.
    """

    label: str
    interval: Interval
    unit: str = ""
    factor: bool = False
    beyond: float | None = None

    @property
    def bound(self) -> float:
        """What the interval must exceed, on the interval's scale."""
        if self.factor:
            return math.log(1.0 if self.beyond is None else self.beyond)
        return self.beyond or 0.0

    @property
    def sign(self) -> int:
        """1 where the interval lies above the bound, −1 where it lies below, 0 where it holds it or is unknown."""
        if not np.isfinite(self.interval.half_width):
            return 0
        return int(self.interval.low > self.bound) - int(self.interval.high < self.bound)

    def text(self) -> str:
        """Return "label: number ± half width", with the bound where it is not the obvious one."""
        if self.factor:
            low, middle, high = np.exp([self.interval.low, self.interval.mean, self.interval.high])
            known = f" ({low:.3g} to {high:.3g})" if np.isfinite(self.interval.half_width) else ""
            number = f"{middle:.3g} times{known}"
        else:
            number = plus_minus(self.interval.mean, self.interval.half_width, unit=self.unit)
        required = (
            "" if self.beyond is None else f", required: more than {self.beyond:g}{self.unit and ' ' + self.unit}"
        )
        return f"{self.label}: {number}{required}"


def verdict(comparisons: Sequence[Comparison]) -> Verdict:
    """Return the verdict on a claim that every comparison exceeds its bound.

    Raises
    ------
    ValueError
        There is nothing to compare.
    """
    if not comparisons:
        raise ValueError("a verdict needs at least one comparison, got none")
    signs = [comparison.sign for comparison in comparisons]
    if min(signs) < 0:
        return "does not hold"
    return "holds" if min(signs) > 0 else "cannot tell at this scale"


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
        Tables to comparisons.
    note
        How the test was set up, where that matters.
    """

    exhibit: str
    sentence: str
    paper: str
    compare: Callable[[Tables], list[Comparison]]
    note: str = ""

    def judge(self, tables: Tables) -> Claim:
        """Return the row of the claims table."""
        comparisons = self.compare(tables)
        return Claim(
            exhibit=self.exhibit,
            claim=self.sentence,
            paper=self.paper,
            measured="; ".join(comparison.text() for comparison in comparisons),
            verdict=verdict(comparisons),
            note=self.note,
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


def ratio(frame: pd.DataFrame, column: str, larger: str, smaller: str, label: str = "") -> Comparison:
    """Compare the logarithm of a positive ``column`` of two optimizers, paired by seed."""
    with np.errstate(all="ignore"):
        values = np.log(by_seed(frame, larger, column)) - np.log(by_seed(frame, smaller, column))
    return Comparison(label or f"{larger} / {smaller}", mean_interval(values), factor=True)


def _per_seed(steps: pd.DataFrame, optimizer: str, statistic: Callable[[pd.DataFrame], float]) -> Values:
    part = steps[steps["optimizer"] == optimizer]
    return np.array([statistic(run) for _, run in part.groupby("seed")], dtype=np.float64)


def _accuracy(tables: Tables) -> list[Comparison]:
    return [
        difference(tables.runs, "test_accuracy", "MSAM", other, scale=100, unit="points") for other in ("SGD", "NAG")
    ]


def _same_cost(tables: Tables) -> list[Comparison]:
    sam, msam = (by_seed(tables.runs, name, "gradients_per_step") for name in ("SAM", "MSAM"))
    return [Comparison("gradients a step, SAM − MSAM", mean_interval(sam - msam))]


def _mostly_negative(steps: pd.DataFrame) -> list[Comparison]:
    def share(run: pd.DataFrame) -> float:
        return 100 * float((run["cosine"].dropna() < 0).mean())

    return [
        Comparison(
            f"{name}, steps with a negative cosine", mean_interval(_per_seed(steps, name, share)), "%", beyond=50
        )
        for name in dict.fromkeys(steps["optimizer"])
    ]


def _fades_out(tables: Tables) -> list[Comparison]:
    last = int(tables.steps["epoch"].max())

    def fall(run: pd.DataFrame) -> float:
        middle = run[(run["epoch"] >= 0.25 * last) & (run["epoch"] <= 0.75 * last)]["cosine"].mean()
        end = run[run["epoch"] == last]["cosine"].mean()
        return abs(float(middle)) - abs(float(end))

    names = list(dict.fromkeys(tables.steps["optimizer"]))
    return [
        Comparison(f"{name}, |cosine| mid-training − last epoch", mean_interval(_per_seed(tables.steps, name, fall)))
        for name in names
    ]


def _rises(tables: Tables) -> list[Comparison]:
    return [
        Comparison(
            f"{name}, mean L(w + ε) − L(w)",
            mean_interval(_per_seed(tables.steps, name, lambda run: float(run["rise"].mean()))),
        )
        for name in ("SAM", "MSAM")
    ]


def _mean_curvature(run: pd.DataFrame, direction: str) -> float:
    return float(run[f"curvature_{direction}"].mean())


def _momentum_curvature(tables: Tables) -> list[Comparison]:
    def log_ratio(run: pd.DataFrame) -> float:
        with np.errstate(all="ignore"):
            return float(np.log(_mean_curvature(run, "momentum") / _mean_curvature(run, "random")))

    names = list(dict.fromkeys(tables.steps["optimizer"]))
    return [
        Comparison(
            f"{name}, momentum / random",
            mean_interval(_per_seed(tables.steps, name, log_ratio)),
            factor=True,
            beyond=MUCH,
        )
        for name in names
    ]


def _msam_lowest_curvature(tables: Tables) -> list[Comparison]:
    def log_mean(direction: str) -> Callable[[pd.DataFrame], float]:
        def value(run: pd.DataFrame) -> float:
            with np.errstate(all="ignore"):
                return float(np.log(_mean_curvature(run, direction)))

        return value

    return [
        Comparison(
            f"{other} / MSAM along {direction}",
            mean_interval(
                _per_seed(tables.steps, other, log_mean(direction))
                - _per_seed(tables.steps, "MSAM", log_mean(direction))
            ),
            factor=True,
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
        note="Gradients evaluated per step were counted: the difference is the whole cost of SAM's first pass.",
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
    ),
    PaperClaim(
        "F2C",
        "The cosine goes to 0 as the learning rate decays to 0.",
        "→ 0",
        _fades_out,
        note="|Mean cosine| over the middle half of the epochs against that over the last epoch.",
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
