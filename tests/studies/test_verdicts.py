"""The rule that makes verdicts of comparisons, and how comparisons are written."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from msam_analysis.results.statistics import Interval, mean_interval
from msam_analysis.studies.claims import Comparison, difference, ratio, verdict

from .finished import numbers, t_interval

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot tell at this scale"


# --- numbers and words


def table_of(**columns: list[float]) -> pd.DataFrame:
    """Return a table of two optimizers, A and B."""
    rows = [(name, seed, value) for name, values in columns.items() for seed, value in enumerate(values)]
    frame: pd.DataFrame = pd.DataFrame(rows, columns=["optimizer", "seed", "value"])
    return frame


def test_a_difference_in_words() -> None:
    comparison = difference(
        table_of(A=[0.5, 0.62, 0.7], B=[0.4, 0.5, 0.6]), "value", "A", "B", scale=100, unit="points"
    )
    mean, half = t_interval(np.array([10.0, 12.0, 10.0]))
    assert comparison.text() == f"A − B: {mean:.2f} ± {half:.2f} points"


def test_a_label_with_the_names_of_the_pair() -> None:
    table = table_of(A=[0.5, 0.62, 0.7], B=[0.4, 0.5, 0.6])
    assert difference(table, "value", "A", "B", "text, {pair}").label == "text, A − B"
    assert ratio(table, "value", "A", "B", "{pair} along momentum").label == "A / B along momentum"


def test_an_effect_size_is_cohens_d_of_the_paired_differences() -> None:
    """Mean over standard deviation, positive where the claim says; toward the nearer bound of a region."""
    comparison = difference(table_of(A=[0.5, 0.62, 0.7], B=[0.4, 0.5, 0.6]), "value", "A", "B", scale=100)
    differences = np.array([10.0, 12.0, 10.0])
    assert comparison.effect == pytest.approx(differences.mean() / differences.std(ddof=1))
    within = dataclasses.replace(comparison, above=5.0, below=11.0)
    assert within.effect == pytest.approx((11.0 - differences.mean()) / differences.std(ddof=1))
    assert dataclasses.replace(comparison, above=20.0).effect < 0


def test_an_effect_size_needs_a_spread() -> None:
    assert math.isnan(difference(table_of(A=[0.3] * 3, B=[0.1] * 3), "value", "A", "B").effect)
    assert math.isnan(difference(table_of(A=[0.3], B=[0.1]), "value", "A", "B").effect)


@pytest.mark.parametrize("value", [0.1, 0.3, 7.0, 1e-9, 1e9])
def test_seeds_that_agree_in_words(value: float) -> None:
    """Three equal differences, whose standard deviation is 0 up to rounding."""
    comparison = difference(table_of(A=[value] * 3, B=[0.0] * 3), "value", "A", "B")
    assert comparison.side() == 1
    assert comparison.text().startswith("A − B: ")


def test_a_ratio_in_words() -> None:
    """Ratios of 2 and 8 have the geometric mean 4; their interval is that of the logarithms."""
    comparison = ratio(table_of(A=[2.0, 80.0], B=[1.0, 10.0]), "value", "A", "B")
    mean, half = t_interval(np.log([2.0, 8.0]))
    text = comparison.text()
    assert text.startswith("A / B: 4 times")
    assert numbers(text)[-2:] == pytest.approx([math.exp(mean - half), math.exp(mean + half)], rel=5e-3)


def test_a_ratio_of_one_seed_in_words() -> None:
    text = ratio(table_of(A=[3.0], B=[1.5]), "value", "A", "B").text()
    assert "2 times" in text
    assert "nan" not in text


# --- the rule


def comparison(low: float, high: float, **options: Any) -> Comparison:
    return Comparison("x", Interval((low + high) / 2, (high - low) / 2, 3), **options)


ABOVE, BELOW, ACROSS = comparison(0.1, 2.0), comparison(-2.0, -0.1), comparison(-0.1, 2.0)
FAR_BELOW = comparison(-2.0, -1.0)
UNDECIDED = Comparison("x", Interval(5.0, math.nan, 1))


@pytest.mark.parametrize(
    ("comparisons", "expected"),
    [
        ([ABOVE], HOLDS),
        ([BELOW], FAILS),
        ([ACROSS], UNKNOWN),
        ([UNDECIDED], UNKNOWN),
        ([comparison(0.0, 2.0)], UNKNOWN),
        ([comparison(-2.0, 0.0)], UNKNOWN),
        ([comparison(0.0, 0.0)], UNKNOWN),
        ([comparison(1.0, 1.0)], HOLDS),
        ([comparison(51.0, 60.0, above=50)], HOLDS),
        ([comparison(40.0, 49.0, above=50)], FAILS),
        ([comparison(49.0, 60.0, above=50)], UNKNOWN),
        ([comparison(math.log(1.1), math.log(2.9), factor=True)], HOLDS),
        ([comparison(math.log(0.5), math.log(0.9), factor=True)], FAILS),
        ([comparison(math.log(3.1), math.log(5.0), factor=True, above=math.log(3))], HOLDS),
        ([comparison(math.log(1.1), math.log(2.9), factor=True, above=math.log(3))], FAILS),
        ([comparison(math.log(2.9), math.log(3.1), factor=True, above=math.log(3))], UNKNOWN),
        ([Comparison("x", Interval(math.nan, math.nan, 3))], UNKNOWN),
        ([Comparison("x", Interval(math.inf, math.nan, 3))], UNKNOWN),
        ([ABOVE, ABOVE], HOLDS),
        ([ABOVE, ACROSS], UNKNOWN),
        ([ABOVE, UNDECIDED], UNKNOWN),
        # One of many is easily on the wrong side by chance: then it must be there at a higher level.
        ([ABOVE, BELOW], UNKNOWN),
        ([ABOVE, FAR_BELOW], FAILS),
        ([ACROSS, FAR_BELOW], FAILS),
        ([UNDECIDED, FAR_BELOW], FAILS),
        ([ABOVE] * 5 + [FAR_BELOW], UNKNOWN),
        # A region with two ends.
        ([comparison(-0.04, 0.04, above=-0.05, below=0.05)], HOLDS),
        ([comparison(-0.06, 0.04, above=-0.05, below=0.05)], UNKNOWN),
        ([comparison(0.06, 0.08, above=-0.05, below=0.05)], FAILS),
        ([comparison(-0.08, -0.06, above=-0.05, below=0.05)], FAILS),
    ],
)
def test_verdicts(comparisons: list[Comparison], expected: str) -> None:
    assert verdict(comparisons) == expected
    assert verdict(comparisons[::-1]) == expected


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="at least one comparison, got none"):
        verdict([])


@pytest.mark.parametrize("count", [1, 3, 6])
def test_chance_decides_seldom(count: int) -> None:
    """Where nothing differs, a claim is refused in 16 % of the studies at most, however much it compares."""
    rng = np.random.default_rng(0)
    studies: list[str] = [
        verdict([Comparison("x", mean_interval(rng.normal(size=3))) for _ in range(count)]) for _ in range(2000)
    ]
    assert studies.count(FAILS) < 0.18 * len(studies)
    assert studies.count(HOLDS) < 0.18 * len(studies)


def test_an_interval_at_another_level() -> None:
    values = np.array([1.0, 2.5, 2.0, 4.0])
    wide = mean_interval(values).at(0.95)
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert (wide.low, wide.high) == pytest.approx((low, high))
    assert math.isnan(mean_interval([1.0]).at(0.95).half_width)
