"""Figures of mechanisms: what is drawn is what the tables hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("agg")
from matplotlib import pyplot as plt

from msam_analysis.studies import pictures

POINTS = ("from", "at", "gradient_at", "to")
STEPS = pd.DataFrame(
    [
        {
            "optimizer": name,
            **{f"{point}_{xy}": 0.1 * i + 0.05 * j for i, point in enumerate(POINTS) for j, xy in enumerate("xy")},
        }
        for name in ("MSAM", "SGD")
    ]
)
GRID = pd.DataFrame(
    [{"x": x, "y": y, "loss": x * x + 2 * y * y} for x in np.linspace(-1, 1, 7) for y in np.linspace(-2, 2, 9)]
)
ALONG = pd.DataFrame(
    [
        {"optimizer": name, "seed": seed, "offset": a, "change": (1 + seed) * (a - 0.1) ** 2}
        for name in ("SGD", "MSAM")
        for seed in range(2)
        for a in (-1.0, 0.0, 0.1, 1.0)
    ]
)
ANGLES = pd.DataFrame(
    [
        {"optimizer": "SGD", "seed": seed, "rho": rho, "angle": 10.0 - rho + seed}
        for seed in range(2)
        for rho in (0, 1, 2)
    ]
)
ROOTS = pd.DataFrame(
    [
        {"optimizer": "SGD", "seed": seed, "epoch": e, "rho_0": 2.0 + e if seed else np.nan}
        for seed in range(2)
        for e in range(3)
    ]
)
GROUPS = pd.DataFrame(
    [
        {"optimizer": name, "seed": seed, "task": task, "score": len(task) + seed, "size": 2.0 + seed}
        for name in ("SGD", "MSAM")
        for seed in range(3)
        for task in ("text", "table")
        if (name, task) != ("SGD", "table")
    ]
)


def test_one_step() -> None:
    axes = pictures.one_step(STEPS, GRID)
    assert [ax.get_title() for ax in axes] == ["SGD", "MSAM"]
    for ax in axes:
        (weights,) = [line for line in ax.lines if line.get_marker() == "o"]
        (star,) = [line for line in ax.lines if line.get_marker() == "*"]
        assert weights.get_xydata().ravel() == pytest.approx([0.1, 0.15])
        assert star.get_xydata().ravel() == pytest.approx([0.2, 0.25])
        assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 1), (-2, 2))


def test_along_momentum() -> None:
    ax = pictures.along_momentum(ALONG)
    curve = next(line for line in ax.lines if line.get_label() == "SGD")
    assert curve.get_xdata() == pytest.approx([-1.0, 0.0, 0.1, 1.0])
    assert curve.get_ydata() == pytest.approx([1.5 * (a - 0.1) ** 2 for a in (-1.0, 0.0, 0.1, 1.0)])


def test_zero_angle() -> None:
    left, right = pictures.zero_angle(ANGLES, ROOTS, 3.0)
    assert left.lines[0].get_ydata() == pytest.approx([10.5, 9.5, 8.5])
    (points,) = [line for line in right.lines if line.get_linestyle() == "None"]
    assert points.get_xydata() == pytest.approx(np.array([[0, 2.0], [1, 3.0], [2, 4.0]])), "no point without a root"
    assert "MSAM's ρ = 3" in [line.get_label() for line in right.lines]


def test_by_group() -> None:
    score, size = pictures.by_group(GROUPS, {"score": "score (%)", "size": "size"}, "task", log=["size"])
    assert [label.get_text() for label in score.get_yticklabels()] == ["text", "table"]
    assert (score.get_xlabel(), size.get_xscale()) == ("score (%)", "log")
    means = {bar.get_label(): bar.lines[0].get_xdata() for bar in score.containers}
    assert means["SGD"] == pytest.approx([5.0]), "nothing where there is nothing"
    assert means["MSAM"] == pytest.approx([5.0, 6.0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda: pictures.one_step(STEPS.drop(columns="to_x"), GRID),
        lambda: pictures.one_step(STEPS, GRID.drop(columns="loss")),
        lambda: pictures.along_momentum(ALONG.drop(columns="change")),
        lambda: pictures.zero_angle(ANGLES.drop(columns="angle"), ROOTS, 3.0),
        lambda: pictures.zero_angle(ANGLES, ROOTS.drop(columns="rho_0"), 3.0),
        lambda: pictures.by_group(GROUPS, {"colour": "colour"}, "task"),
    ],
)
def test_missing_columns(draw: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="the table has no column"):
        draw()


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: pictures.one_step(STEPS, GRID, [ax]),
        lambda ax: pictures.zero_angle(ANGLES, ROOTS, 3.0, [ax]),
        lambda ax: pictures.by_group(GROUPS, {"score": "", "size": ""}, "task", [ax]),
    ],
)
def test_too_few_axes(draw: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match="2 panels need 2 axes, got 1"):
        draw(plt.figure().add_subplot())
