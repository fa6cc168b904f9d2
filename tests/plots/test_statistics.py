import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from msam_analysis.results.statistics import bands, mean_interval, paired_interval, quantile_bands, summarise

GENERATOR = np.random.default_rng(1)


@pytest.mark.parametrize("level", [0.5, 0.68, 0.95])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_interval_is_scipys(count: int, level: float) -> None:
    values = GENERATOR.standard_normal(count) * 7 + 3
    expected = scipy.stats.t.interval(level, count - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    interval = mean_interval(values, level)
    np.testing.assert_allclose((interval.low, interval.high), expected, rtol=1e-12)
    assert interval.n == count


def test_default_level_is_the_papers() -> None:
    assert mean_interval([1.0, 2.0, 4.0]) == mean_interval([1.0, 2.0, 4.0], 0.68)


def test_one_value_has_a_mean_and_no_interval() -> None:
    mean, half_width, n = mean_interval([2.5])
    assert (mean, n) == (2.5, 1)
    assert math.isnan(half_width)


@pytest.mark.parametrize(
    ("values", "mean"), [([1.0, np.nan], np.nan), ([1.0, np.inf], np.inf), ([np.inf, -np.inf], np.nan)]
)
def test_nothing_is_dropped(values: list[float], mean: float) -> None:
    interval = mean_interval(values)
    np.testing.assert_equal(interval.mean, mean)
    assert math.isnan(interval.half_width)


def test_paired_interval_is_that_of_the_differences() -> None:
    shared = GENERATOR.standard_normal(5) * 100
    a, b = shared + GENERATOR.standard_normal(5), shared
    assert paired_interval(a, b) == mean_interval(a - b)
    assert paired_interval(a, b).half_width < 0.1 * mean_interval(a).half_width


def test_bands_are_the_intervals_point_by_point() -> None:
    values = GENERATOR.standard_normal((4, 3, 2))
    mean, half_width = bands(values, 0.9)
    for index in np.ndindex(3, 2):
        expected = mean_interval(values[:, index[0], index[1]], 0.9)
        np.testing.assert_allclose((mean[index], half_width[index]), expected[:2])


@pytest.mark.parametrize("level", [0.1, 0.68, 0.95])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_quantile_bands_are_numpys(count: int, level: float) -> None:
    values = GENERATOR.standard_normal((count, 4))
    median, low, high = quantile_bands(values, level)
    expected = np.quantile(values, [0.5, 0.5 - level / 2, 0.5 + level / 2], axis=0)
    np.testing.assert_allclose([median, low, high], expected, rtol=1e-12, atol=1e-14)


def test_quantile_bands_know_infinity_and_keep_nan() -> None:
    values = np.array([[1.0, 1.0], [np.inf, np.nan], [2.0, 2.0]])
    median, low, high = quantile_bands(values)
    np.testing.assert_array_equal(median, [2.0, np.nan])
    np.testing.assert_array_equal(high, [np.inf, np.nan])
    assert low[0] == pytest.approx(1.32)
    median, low, high = quantile_bands([[3.0]])
    np.testing.assert_array_equal([median, low, high], [[3.0], [np.nan], [np.nan]])


def test_summarise_gives_each_group_its_interval_in_order_of_appearance() -> None:
    frame = pd.DataFrame(
        {
            "optimizer": ["SGD", "SGD", "MSAM", "MSAM", "MSAM"],
            "seed": [0, 1, 0, 1, 2],
            "loss": [1.0, 3.0, 5.0, 5.0, 8.0],
            "rank": [1, 2, 3, 4, 5],
        }
    )
    table = summarise(frame, "optimizer", ["loss", "rank"])
    assert list(table.columns) == ["optimizer", "loss", "loss_half_width", "rank", "rank_half_width", "count"]
    assert table["optimizer"].tolist() == ["SGD", "MSAM"]
    assert table["count"].tolist() == [2, 3]
    for row, values in zip(table.itertuples(), ([1.0, 3.0], [5.0, 5.0, 8.0]), strict=True):
        expected = mean_interval(values)
        assert (row.loss, row.loss_half_width) == pytest.approx(expected[:2])


def test_summarise_groups_by_several_columns() -> None:
    frame = pd.DataFrame({"optimizer": ["A", "A", "A", "A"], "seed": [0, 1, 0, 1], "step": [0, 0, 1, 1], "q": range(4)})
    assert summarise(frame, ["optimizer", "step"], "q")["q"].tolist() == [0.5, 2.5]


def test_summarise_of_an_empty_table_has_the_columns() -> None:
    frame = pd.DataFrame({"optimizer": [], "q": []})
    assert list(summarise(frame, "optimizer", "q").columns) == ["optimizer", "q", "q_half_width", "count"]


REPEATED = pd.DataFrame({"optimizer": ["A", "A"], "seed": [0, 0], "q": [1.0, 2.0]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "at least one number"),
        (lambda: mean_interval([[1.0]]), "at least one number"),
        (lambda: mean_interval([1.0, 2.0], 68), "between 0 and 1"),
        (lambda: mean_interval([1.0, 2.0], math.nan), "between 0 and 1"),
        (lambda: bands(np.empty((0, 3))), "at least one seed"),
        (lambda: bands([[1.0]], 1.0), "between 0 and 1"),
        (lambda: quantile_bands(np.empty((0, 3))), "at least one seed"),
        (lambda: quantile_bands([[1.0]], 0.0), "between 0 and 1"),
        (lambda: paired_interval([1.0, 2.0], [1.0]), "seed by seed"),
        (lambda: summarise(REPEATED, "optimizer", "loss"), r"no column \['loss'\]"),
        (lambda: summarise(REPEATED, "optimizer", "q"), "one seed several times"),
        (lambda: summarise(REPEATED, ["optimizer", "seed"], "q", 0.0), "between 0 and 1"),
    ],
)
def test_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
