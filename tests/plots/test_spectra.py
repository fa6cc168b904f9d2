"""Spectral densities on paper: the numbers of the result, its band, and ticks where the eigenvalues are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from msam_analysis import plots
from msam_analysis.results.statistics import mean_interval
from tests.builders import SIGMA, density


def ticks(ax: Axes) -> list[Line2D]:
    return [line for line in ax.lines if line.get_marker() == "|" and len(np.atleast_1d(line.get_xdata()))]


def words(ax: Axes) -> list[str]:
    figure: Any = ax.figure
    inside = ax.get_legend()
    legends = [*figure.legends, *([] if inside is None else [inside])]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_the_curve_is_the_density_and_the_band_its_interval() -> None:
    result = density()
    ax = plots.spectral_density(result)
    drawn: Any = ax.lines[0].get_xydata()
    np.testing.assert_allclose(drawn, torch.stack([result.values, result.density], dim=1).numpy())
    (band,) = ax.collections
    at = int((result.values - 1.0).abs().argmin())
    expected = mean_interval(result.curves(result.values)[:, at].numpy())
    path = np.asarray(band.get_paths()[0].vertices, dtype=np.float64)
    edges = path[np.isclose(path[:, 0], float(result.values[at]))][:, 1]
    assert edges.min() == pytest.approx(expected.low)
    assert edges.max() == pytest.approx(expected.high)


def test_ticks_stand_at_the_ends_of_the_spectrum() -> None:
    (line,) = ticks(plots.spectral_density(density(0.25)))
    assert sorted(np.asarray(line.get_xdata()).tolist()) == [-0.25, 4.25]
    assert not ticks(plots.spectral_density(density(ends=False)))


def test_the_axes_are_named_and_a_single_eigenvalue_is_seen() -> None:
    ax = plots.spectral_density(density())
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("eigenvalue", "density", "log")
    peak = 0.1 / (SIGMA * np.sqrt(2 * np.pi))
    assert ax.get_ylim()[0] == pytest.approx(0.1 * peak)
    assert ax.get_ylim()[1] > float(density().density.max())
    linear = plots.spectral_density(density(), log=False)
    assert (linear.get_yscale(), linear.get_ylim()[0]) == ("linear", 0.0)


def test_the_legend_says_what_did_not_converge() -> None:
    assert words(plots.spectral_density(density())) == ["top and bottom eigenvalues"]
    assert words(plots.spectral_density(density(converged=False))) == ["top and bottom eigenvalues (not converged)"]
    assert words(plots.spectral_density(density(ends=False))) == []
    assert words(plots.spectral_density(density(), legend=False)) == []


def test_several_are_told_apart() -> None:
    ax = plots.spectral_density({"MSAM": density(), "SGD": density(1.0)})
    assert words(ax) == ["SGD", "MSAM", "top and bottom eigenvalues"]
    low, high = (float(np.asarray(line.get_ydata())[0]) for line in ticks(ax))
    assert low != high
    assert len({line.get_color() for line in ticks(ax)}) == 2


def test_it_draws_on_the_axes_given() -> None:
    ax = Figure().subplots()
    assert plots.spectral_density(density(), ax) is ax
    assert words(ax) == ["top and bottom eigenvalues"]


def test_bytes_repeat_and_rcparams_stay(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    first, second = (plots.save(plots.spectral_density(density()), tmp_path / name)[0] for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert dict(mpl.rcParams) == before


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="nothing to draw: pass a result"):
        plots.spectral_density({})
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        plots.spectral_density(density(), level=2.0)


def test_where_every_eigenvalue_is_known_there_is_no_band() -> None:
    result = density()
    known = dataclasses.replace(result, probe=torch.full_like(result.probe, -1), exhausted=result.exhausted[:0])
    ax = plots.spectral_density(known)
    assert not ax.collections
