"""Quantities against a setting, drawn where the tables say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.colors import to_hex

from msam_analysis import plots
from msam_analysis.results.statistics import mean_interval
from msam_analysis.studies import pictures
from msam_analysis.studies.pictures import Sweep
from tests.plots.cases import table

STRENGTHS = [0.1, 1.0, 10.0]
GRID = table(["value", "other"], optimizers=["SAM", "MSAM"], rho=STRENGTHS)
SGD = table(["value", "other"], optimizers=["SGD"], rho=[0.0])
ALL = pd.concat([SGD, GRID], ignore_index=True)
SIGNED = pd.concat([ALL.assign(sign=1), GRID.assign(sign=-1, value=GRID["value"] / 40)], ignore_index=True)
PANEL = Sweep(ALL, "rho", "value")


def interval(frame: pd.DataFrame, optimizer: str, rho: float, column: str = "value") -> tuple[float, float]:
    """Return mean and half width, by another way than the plot's."""
    rows = frame[(frame["optimizer"] == optimizer) & (frame["rho"] == rho)]
    found = mean_interval(rows[column].to_numpy())
    return found.mean, found.half_width


def curve(ax: Axes, optimizer: str) -> tuple[list[float], list[float]]:
    """Return the points of the first line with an optimizer's colour."""
    color = to_hex(plots.look([optimizer])[optimizer].color)
    line = next(line for line in ax.lines if to_hex(line.get_color()) == color)
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def draw(panel: Sweep, **options: Any) -> Axes:
    (ax,) = pictures.sweep(panel, **options)
    assert isinstance(ax, Axes)
    return ax


@pytest.mark.parametrize("optimizer", ["SAM", "MSAM"])
def test_curves_are_means(optimizer: str) -> None:
    x, y = curve(draw(PANEL), optimizer)
    assert x == STRENGTHS
    assert y == pytest.approx([interval(ALL, optimizer, rho)[0] for rho in STRENGTHS])


def test_bands_are_intervals() -> None:
    ax = draw(Sweep(GRID[GRID["optimizer"] == "SAM"], "rho", "value"))
    (band,) = (item for item in ax.collections if isinstance(item, FillBetweenPolyCollection))
    heights = {round(float(y), 9) for y in np.asarray(band.get_paths()[0].vertices)[:, 1]}
    expected = [interval(ALL, "SAM", rho) for rho in STRENGTHS]
    assert {round(mean + side * half, 9) for mean, half in expected for side in (-1, 1)} <= heights


def test_what_has_no_perturbation_goes_across() -> None:
    x, y = curve(draw(PANEL), "SGD")
    assert x == [0, 1], "in units of the axes' width"
    assert y == pytest.approx([interval(ALL, "SGD", 0.0)[0]] * 2)


def test_zero_is_a_place_on_a_linear_axis() -> None:
    frame = pd.concat([GRID, GRID[GRID["rho"] == 1.0].assign(rho=0.0)])
    ax = draw(Sweep(frame, "rho", "value", log=False))
    assert ax.get_xscale() == "linear"
    assert curve(ax, "SAM")[0] == [0.0, *STRENGTHS]


def test_one_seed_has_no_band() -> None:
    ax = draw(Sweep(ALL[ALL["seed"] == 0], "rho", "value"))
    assert not ax.collections
    assert not ax.patches


def test_holes() -> None:
    frame = ALL.assign(value=ALL["value"].where((ALL["rho"] != 1.0) | (ALL["seed"] != 0)))
    _, y = curve(draw(Sweep(frame, "rho", "value")), "SAM")
    assert [math.isnan(value) for value in y] == [False, True, False]


def test_no_logarithm_of_what_is_not_positive() -> None:
    frame = ALL.assign(value=ALL["value"].where(ALL["rho"] != 1.0, -1.0))
    ax = draw(Sweep(frame, "rho", "value", log_y=True))
    assert ax.get_yscale() == "log"
    assert [math.isnan(value) for value in curve(ax, "SAM")[1]] == [False, True, False]


def test_nothing_is_drawn_across_where_it_is_unknown() -> None:
    frame = ALL.assign(value=ALL["value"].where(ALL["optimizer"] != "SGD"))
    ax = draw(Sweep(frame, "rho", "value"))
    assert not any(to_hex(line.get_color()) == to_hex(plots.look(["SGD"])["SGD"].color) for line in ax.lines)


def test_a_mirrored_axis_runs_leftwards_with_minus_signs() -> None:
    ax = draw(dataclasses.replace(PANEL, mirrored=True))
    left, right = ax.get_xlim()
    assert left > right
    assert ax.xaxis.get_major_formatter()(1.0) == "−1"


def test_fractions_as_percentages() -> None:
    assert draw(dataclasses.replace(PANEL, percent=True)).yaxis.get_major_formatter()(0.25) == "25"


def test_a_zero_line() -> None:
    drawn = draw(dataclasses.replace(PANEL, zero_line=True)).lines
    assert [np.asarray(line.get_ydata()).tolist() for line in drawn].count([0.0, 0.0]) == 1


def test_labels_of_neighbours_are_not_repeated() -> None:
    same = pictures.sweep([PANEL, PANEL])
    assert [ax.get_ylabel() for ax in same] == ["value", ""]
    assert [ax.get_xlabel() for ax in same] == ["rho", "rho"]
    stacked = pictures.sweep([PANEL, dataclasses.replace(PANEL, y="other", label_x="ρ")], columns=1)
    assert [ax.get_ylabel() for ax in stacked] == ["value", "other"]
    assert [ax.get_xlabel() for ax in stacked] == ["rho", "ρ"]
    stacked = pictures.sweep([PANEL, PANEL], columns=1)
    assert [ax.get_xlabel() for ax in stacked] == ["", "rho"]


def test_titles_and_one_look_in_all_panels() -> None:
    axes = pictures.sweep({"left": dataclasses.replace(PANEL, frame=GRID), "right": PANEL}, share_y=True)
    assert [ax.get_title() for ax in axes] == ["left", "right"]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    names = [f"setting {index}" for index in range(2)]
    left, right = (
        Sweep(GRID.assign(optimizer=GRID["optimizer"].map(dict(zip(order, names, strict=True)))), "rho", "value")
        for order in (("SAM", "MSAM"), ("MSAM", "SAM"))
    )
    looks = [
        {line.get_label(): to_hex(line.get_color()) for line in ax.lines if line.get_label() in names}
        for ax in pictures.sweep([left, right])
    ]
    assert looks[0] == looks[1]
    assert len(set(looks[0].values())) == 2


@pytest.mark.parametrize("legend", [True, False])
def test_the_legend_names_every_curve_once(legend: bool) -> None:
    figure = draw(PANEL, legend=legend).figure
    texts = [text.get_text() for item in figure.legends for text in item.get_texts()]
    assert sorted(texts) == (["MSAM", "SAM", "SGD"] if legend else [])


def test_a_user_s_axes() -> None:
    _, ax = plt.subplots()
    settings = mpl.rcParams.copy()
    assert pictures.sweep(PANEL, ax)[0] is ax
    assert mpl.rcParams == settings
    assert ax.get_legend() is not None


# --- both signs


def test_both_signs_meet_in_the_middle() -> None:
    negative, positive, *_ = axes = pictures.both_signs(SIGNED, {"value": "v", "other": "o"}, percent=False)
    assert len(axes) == 4
    assert curve(positive, "MSAM")[1] == pytest.approx([interval(ALL, "MSAM", rho)[0] for rho in STRENGTHS])
    assert curve(negative, "MSAM")[1] == pytest.approx([interval(ALL, "MSAM", rho)[0] / 40 for rho in STRENGTHS])
    assert negative.get_xlim()[0] > negative.get_xlim()[1]
    assert positive.get_xlim()[0] < positive.get_xlim()[1]
    assert negative.get_ylim() == positive.get_ylim()
    assert [ax.get_ylabel() for ax in axes] == ["v", "", "o", ""]
    assert [ax.get_xlabel() for ax in axes] == ["", "", r"$\rho$", r"$\rho$"]
    for ax in axes[:2]:
        assert curve(ax, "SGD")[1] == pytest.approx([interval(ALL, "SGD", 0.0)[0]] * 2)


def test_both_signs_on_given_axes() -> None:
    _, given = plt.subplots(1, 2)
    axes = pictures.both_signs(SIGNED, {"value": "v"}, given, legend=False)
    assert list(axes) == list(given)
    assert given[0].get_legend() is None


# --- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pictures.sweep([]), "at least one panel"),
        (lambda: pictures.sweep(Sweep(ALL, "rho", "colour")), r"no column \['colour'\]"),
        (lambda: pictures.sweep(Sweep(ALL.iloc[:0], "rho", "value")), "no rows"),
        (lambda: pictures.sweep(Sweep(pd.concat([GRID, GRID]), "rho", "value")), "one seed several times"),
        (lambda: pictures.sweep(Sweep(SGD, "rho", "value")), r"needs values of 'rho' above 0, got \[0.0\]"),
        (lambda: pictures.sweep([PANEL, PANEL], plt.subplots()[1]), "2 panels need 2 axes, got 1"),
        (lambda: pictures.both_signs(ALL, {"value": "v"}), r"no column \['sign'\]"),
        (lambda: pictures.both_signs(SIGNED[SIGNED["sign"] == 1], {"value": "v"}), r"both signs of 'rho' .* has \[1\]"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
