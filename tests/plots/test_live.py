"""Pictures of what a monitor records: what is drawn is what was recorded, and live ones are bounded and harmless."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from msam_analysis import plots

FRAME = pd.DataFrame(
    {
        "step": [0, 2, 3, 4],
        "cosine": [math.nan, -0.5, -0.25, 0.125],
        "cosine_after": [1.0, 0.5, 0.5, 0.75],
        "cosine/layer": [math.nan, 0.1, 0.1, 0.1],
        "gradient_norm": [1.0, 2.0, 4.0, math.inf],
        "lambda_1": [10.0, math.nan, math.nan, 20.0],
        "lambda_residual": [0.1, math.nan, math.nan, 0.2],
    }
)


def curves(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """The points of every curve by its label; of one that has none by its panel."""
    found = {}
    for ax in axes:
        for line in ax.lines:
            x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
            known = np.isfinite(y)
            if line.get_linestyle() != "None" and len(x) and line.get_transform() == ax.transData:
                label = str(line.get_label())
                name = ax.get_ylabel() if label.startswith("_") else label
                found[name] = list(zip(x[known].tolist(), y[known].tolist(), strict=True))
    return found


def test_what_is_drawn_is_what_was_recorded() -> None:
    """One panel a kind, rows without a value left out, no panel for single layers."""
    axes = plots.recorded(FRAME)
    assert [ax.get_ylabel() for ax in axes] == ["cosine", "norm", "lambda 1"]
    assert curves(axes) == {
        "cosine": [(2, -0.5), (3, -0.25), (4, 0.125)],
        "after": [(0, 1.0), (2, 0.5), (3, 0.5), (4, 0.75)],
        "norm": [(0, 1.0), (2, 2.0), (3, 4.0)],
        "lambda 1": [(0, 10.0), (4, 20.0)],
    }
    assert [ax.get_yscale() for ax in axes] == ["linear", "log", "linear"]
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ("lambda_1", ["lambda 1"]),
        (["cosine/layer", "gradient_norm"], ["cosine/layer", "gradient norm"]),
        ({"angles": ["cosine", "cosine/layer"]}, ["angles"]),
    ],
)
def test_columns_that_are_asked_for(columns: Any, labels: list[str]) -> None:
    assert [ax.get_ylabel() for ax in plots.recorded(FRAME, columns)] == labels


def test_at_most_eight_panels_by_themselves() -> None:
    frame = pd.DataFrame({"step": [0], **{f"q{number}": [1.0] for number in range(12)}})
    assert len(plots.recorded(frame)) == 8
    assert len(plots.recorded(frame, [f"q{number}" for number in range(12)])) == 12


def test_the_axes_of_the_caller() -> None:
    _, given = plt.subplots(1, 3)
    assert [*plots.recorded(FRAME, axes=given)] == [*given]


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no rows": (lambda: plots.recorded(FRAME[:0]), "the table has no rows"),
    "no column": (lambda: plots.recorded(FRAME, ["rise"]), r"the table has no column \['rise'\]"),
    "nothing": (lambda: plots.recorded(FRAME[["step"]]), "there is nothing to draw: expected"),
    "few axes": (lambda: plots.recorded(FRAME, axes=plt.figure().subplots()), "3 panels need 3 axes, got 1"),
    "interval": (lambda: plots.live(Recording(), interval=-1.0), r"interval must be seconds, 0 or more, got -1\.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


# --- live


class Recording:
    """A monitor played by hand."""

    def __init__(self) -> None:
        self.rows = 0
        self.listeners: list[Callable[[Any], None]] = []

    def frame(self) -> pd.DataFrame:
        frame: pd.DataFrame = FRAME.head(self.rows)
        return frame

    def on_record(self, listener: Callable[[Any], None]) -> Any:
        self.listeners.append(listener)
        return SimpleNamespace(remove=lambda: self.listeners.remove(listener))

    def record(self) -> None:
        self.rows += 1
        for listener in self.listeners:
            listener(self)


class Notebook:
    """IPython as it is in a notebook, with a clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
        self.shown: list[bytes] = []
        self.places = 0
        self.now = 100.0
        module: Any = ModuleType("IPython")
        module.get_ipython = lambda: shell
        module.display = SimpleNamespace(Image=lambda png: png, display=self.display)
        monkeypatch.setitem(sys.modules, "IPython", module)
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def display(self, image: bytes, display_id: bool) -> Any:
        assert display_id
        self.places += 1
        self.shown.append(image)
        return SimpleNamespace(update=self.shown.append)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    with monkeypatch.context() as patch:
        yield Notebook(patch, SimpleNamespace(kernel=object()))


def test_a_picture_follows_the_rows_at_a_bounded_rate(notebook: Notebook) -> None:
    """The first at once, the next when the interval is over, the last when it is closed; all in one place."""
    monitor = Recording()
    plot = plots.live(monitor, interval=2.0)
    assert not notebook.shown
    for pause in (0.0, 1.0, 0.9, 0.2):
        notebook.now += pause
        monitor.record()
    assert plot.drawn == 2
    plot.close()
    plot.close()
    assert (plot.drawn, notebook.places, len(notebook.shown)) == (3, 1, 3)
    assert all(png.startswith(b"\x89PNG") for png in notebook.shown)
    assert len(set(notebook.shown)) == 3 - (notebook.shown[1] == notebook.shown[2])
    assert not monitor.listeners
    assert not plt.get_fignums()


def test_columns_are_drawn_once_they_are_there(notebook: Notebook) -> None:
    monitor = Recording()
    with plots.live(monitor, ["rise", "lambda_1"], interval=0.0) as plot:
        monitor.record()
    assert plot.drawn == 2
    with plots.live(Recording(), ["rise"]) as nothing:
        pass
    assert nothing.drawn == 0


def test_a_picture_that_fails_ends_no_training(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = Recording()
    plot = plots.live(monitor, interval=0.0)
    monkeypatch.setattr(monitor, "frame", lambda: FRAME.rename(columns={"step": "time"}))
    with pytest.warns(RuntimeWarning, match=r"the live plot stopped: ValueError: the table has no column"):
        monitor.record()
    monitor.record()
    plot.close()
    assert plot.drawn == 0


@pytest.mark.parametrize("shell", [None, SimpleNamespace()], ids=["a script", "IPython in a terminal"])
def test_nothing_happens_outside_of_a_notebook(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        notebook = Notebook(patch, shell)
        monitor = Recording()
        with plots.live(monitor, interval=0.0) as plot:
            monitor.record()
        assert (plot.drawn, notebook.shown, monitor.listeners) == (0, [], [])


def test_nothing_happens_without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "IPython", None)
        with plots.live(Recording()) as plot:
            pass
        assert plot.drawn == 0
