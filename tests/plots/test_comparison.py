"""Metrics of checkpoints against their steps or labels: values, bars, what did not converge, and labels that fit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from msam_analysis import plots, results
from tests.builders import comparison


def checkpoints(count: int, *, steps: bool = True, name: str = "net-{}", changes: Any = None) -> results.Comparison:
    """λ1 with an error, the second not converged, and a rise without error; values are 1, 2, 3, ..."""
    measurements, sources = {}, {}
    for index in range(count):
        label = name.format(index)
        known = {"value": 1.0 + index, "uncertainty": 0.25, "converged": index != 1, "meaning": ""}
        rise = {"value": 10.0**index, "uncertainty": math.nan, "converged": None, "meaning": ""}
        rows = (
            {"metric": "lambda_1", **known, **(changes or {}).get(label, {})},
            {"metric": "one_step_sharpness@0.05", **rise},
        )
        measurements[label] = results.Measurement(rows=rows, results={})
        sources[label] = {"step": 100 * index if steps else None, "epoch": None}
    return results.Comparison(measurements=measurements, sources=sources, baseline=name.format(0))


def curve(ax: Axes) -> tuple[list[float], list[float]]:
    """The points of the line that joins them."""
    line = next(line for line in ax.lines if line.get_linestyle() == "-")
    return [float(x) for x in np.asarray(line.get_xdata())], [float(y) for y in np.asarray(line.get_ydata())]


def faces(ax: Axes) -> list[str]:
    return [str(line.get_markerfacecolor()) for line in ax.lines if line.get_marker() not in ("None", "", "_")]


def ticks(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_xticklabels()]


def test_against_the_step() -> None:
    first, second = plots.compare(checkpoints(4))
    assert not second.containers[0].has_yerr, "no cap where nothing is uncertain"
    assert curve(first) == ([0.0, 100.0, 200.0, 300.0], [1.0, 2.0, 3.0, 4.0])
    (bars,) = first.containers[0].lines[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[v - 0.25, v + 0.25] for v in (1, 2, 3, 4)]
    assert [face == "white" for face in faces(first)] == [False, True, False, False]
    assert (first.get_xlabel(), first.get_ylabel()) == ("step", "lambda 1")
    assert (first.get_yscale(), second.get_yscale()) == ("linear", "log")
    assert second.get_ylabel().replace("\n", " ") == "one step sharpness@0.05"
    figure: Any = first.figure
    assert [text.get_text() for item in figure.legends for text in item.get_texts()] == ["not converged"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_hole(value: float) -> None:
    first = plots.compare(checkpoints(4, changes={"net-2": {"value": value}}))[0]
    assert np.isnan(curve(first)[1]).tolist() == [False, False, True, False]
    all_of_them = {f"net-{index}": {"value": value} for index in range(3)}
    plots.compare(checkpoints(3, changes=all_of_them))[0].figure.canvas.draw()
    labelled = plots.compare(checkpoints(3, steps=False, changes=all_of_them))[0]
    assert [text.get_text() for text in labelled.texts] == [f"{value:g}"] * 3


def test_against_the_label_where_not_all_have_a_step() -> None:
    first = plots.compare(checkpoints(3, steps=False))[0]
    assert ticks(first) == ["0", "1", "2"], "without what is the same in all"
    assert not first.get_xlabel()
    assert ticks(plots.compare(checkpoints(1))[0]) == ["net-0"], "one has no curve"


def test_labels_do_not_overlap() -> None:
    """Twenty long ones, in panels of a page: upright, without what is the same in all, cut where they are endless."""
    name = "resnet18-cifar10-lr0.1-seed{}-epoch=199"
    for long, expected in ((name, "seed0"), ("{}" + "x" * 200, "0" + "x" * 26 + "…")):
        axes = plots.compare(checkpoints(20, steps=False, name=long))
        figure: Any = axes[0].figure
        figure.canvas.draw()
        assert ticks(axes[0])[0] == expected
        for ax in axes:
            boxes = [text.get_window_extent() for text in ax.get_xticklabels()]
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
            assert all(figure.bbox.contains(box.x0, box.y0) for box in boxes)


def test_several_runs_on_one_scale() -> None:
    looks = plots.look(["SGD", "MSAM"])
    first = plots.compare({"SGD": checkpoints(3), "MSAM": checkpoints(4)}, metrics=["lambda_1"])[0]
    lines = [line for line in first.lines if line.get_linestyle() == "-"]
    assert [line.get_color() for line in lines] == [looks["SGD"].color, looks["MSAM"].color]
    assert [len(np.asarray(line.get_xdata())) for line in lines] == [3, 4]
    figure: Any = first.figure
    assert [text.get_text() for item in figure.legends for text in item.get_texts()] == ["SGD", "MSAM", "not converged"]


def test_which_metrics() -> None:
    assert len(plots.compare(comparison(3))) == 4
    (only,) = plots.compare(comparison(3), metrics=["trace"])
    assert only.get_ylabel() == "trace"
    assert curve(only) == ([0.0, 10.0, 20.0], [0.5, 1.0, 1.5])
    _, given = plt.subplots()
    assert plots.compare(comparison(3), given, metrics=["trace"])[0] is given
    with pytest.raises(ValueError, match=r"metrics must be of loss, .*trace; got 'sharp'"):
        plots.compare(comparison(3), metrics=["sharp"])
    with pytest.raises(ValueError, match=r"(?i)axes|panel"):
        plots.compare(comparison(3), given)


def test_epochs_and_steps_that_are_the_same() -> None:
    whole = checkpoints(3)
    epochs = {label: {"step": None, "epoch": n} for n, label in enumerate(whole)}
    by_epoch = results.Comparison(measurements=whole.measurements, sources=epochs, baseline="net-0")
    assert plots.compare(by_epoch)[0].get_xlabel() == "epoch"
    same = {label: {"step": 3, "epoch": None} for label in whole}
    by_label = results.Comparison(measurements=whole.measurements, sources=same, baseline="net-0")
    assert ticks(plots.compare(by_label)[0]) == ["0", "1", "2"]


def test_the_runs_of_several_folders_are_curves() -> None:
    """Steps that begin anew in each folder; labels take their place where one folder's do not rise."""
    whole = checkpoints(4)
    for paths, names in (
        (["runs/v_0/last/x", "runs/v_0/last/y", "runs/v_1/last/x", "runs/v_1/last/y"], ["v_0", "v_1"]),
        (["a/x", "b/y", "b/z", "b/w"], []),
    ):
        sources = {
            label: {"step": 100 * (index % 2), "epoch": None, "path": path}
            for index, (label, path) in enumerate(zip(whole, paths, strict=True))
        }
        first, _ = plots.compare(dataclasses.replace(whole, sources=sources))
        figure: Any = first.figure
        drawn = [text.get_text() for item in figure.legends for text in item.get_texts()]
        assert drawn == [*names, "not converged"]
        lines = [np.asarray(line.get_ydata()).tolist() for line in first.lines if line.get_linestyle() == "-"]
        assert lines == ([[1.0, 2.0], [3.0, 4.0]] if names else [])
        assert first.get_xlabel() == ("step" if names else "")
