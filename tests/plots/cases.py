"""Results and tables with known contents."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msam_analysis import plots
from msam_analysis.results import Projection, Slice1D, Slice2D
from tests.builders import built

OPTIMIZERS = ("SGD", "NAG", "SAM", "MSAM")
SHARPNESS = {"SGD": 12.0, "NAG": 9.0, "SAM": 3.0, "MSAM": 1.6}


def line(scale: float = 1.0, *, center: float = 0.5, points: int = 11, direction: str = "random (filter)") -> Slice1D:
    """A parabola of height ``scale`` at coordinates -1 and 1, with a slope."""
    x = np.linspace(-1.0, 1.0, points)
    loss = torch.tensor(center + scale * (x**2 + 0.1 * x))
    return with_loss(loss, center_loss=center, coordinates=torch.tensor(x), direction=direction, direction_norm=3.0)


def with_loss(loss: Sequence[float] | torch.Tensor, **changes: Any) -> Slice1D:
    fields = {"coordinates": torch.arange(float(len(loss))), "center_loss": float(loss[0])}
    fields |= {"direction": "d", "direction_norm": 1.0, "loss": torch.as_tensor(loss, dtype=torch.float64)}
    return built(Slice1D, **fields | changes)


def plane(
    scale: float = 1.0,
    *,
    floor: float = 0.01,
    shape: tuple[int, int] = (7, 13),
    directions: tuple[str, str] = ("u", "v"),
) -> Slice2D:
    """A tilted bowl, much steeper along the first direction, on a grid that is not square."""
    x, y = np.linspace(-1.0, 1.0, shape[0]), np.linspace(-0.5, 0.5, shape[1])
    loss = floor + scale * (10.0 * x[:, None] ** 2 + y[None, :] ** 2 + 0.5 * x[:, None] * y[None, :])
    return with_surface(x, y, loss, directions)


def with_surface(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], loss: npt.NDArray[np.float64], directions: tuple[str, str]
) -> Slice2D:
    return built(
        Slice2D,
        x=torch.tensor(x),
        y=torch.tensor(y),
        loss=torch.tensor(loss),
        center_loss=float(loss[len(x) // 2, len(y) // 2]),
        directions=directions,
        direction_norms=(1.0, 1.0),
        cosine=0.0,
    )


def projection(label: str = "MSAM", *, turn: float = 1.0, points: int = 9, losses: bool = True) -> Projection:
    """A way in from (0.8, 0.3) on :func:`plane`, ever further from the plane, the true loss above the projected one."""
    time = torch.linspace(0, 1, points, dtype=torch.float64)
    coordinates = torch.stack([0.8 * (1 - time), 0.3 * (1 - turn * time)], dim=1)
    x, y = coordinates.T
    seen = 0.01 + 10.0 * x**2 + y**2 + 0.5 * x * y
    return built(
        Projection,
        label=label,
        steps=10 * torch.arange(points),
        coordinates=coordinates,
        distance=(coordinates.square().sum(1) + time**2).sqrt(),
        off_plane=time,
        rounding=torch.zeros(points, dtype=torch.float64),
        directions=("u", "v"),
        direction_norms=(1.0, 1.0),
        loss=seen + time if losses else None,
        projected_loss=seen if losses else None,
        center_loss=0.01 if losses else None,
    )


def table(
    columns: Sequence[str], *, optimizers: Sequence[str] = OPTIMIZERS, seeds: int = 3, **axes: Sequence[float | str]
) -> pd.DataFrame:
    """A tidy table, one row per optimizer, seed and combination of ``axes``, with positive numbers in ``columns``."""
    generator = np.random.default_rng(0)
    keys = pd.MultiIndex.from_product([optimizers, range(seeds), *axes.values()], names=["optimizer", "seed", *axes])
    frame: pd.DataFrame = keys.to_frame(index=False)
    for column in columns:
        level = frame["optimizer"].map(lambda name: SHARPNESS.get(name, 5.0))
        frame[column] = level.to_numpy(dtype=np.float64) * np.exp(0.2 * generator.standard_normal(len(frame)))
    return frame


def curves(ax: Axes) -> dict[str, npt.NDArray[np.float64]]:
    """Name to vertices, shape ``(points, 2)``, of the labelled lines."""
    found = {str(artist.get_label()): np.asarray(artist.get_xydata()) for artist in ax.lines}
    return {name: vertices for name, vertices in found.items() if not name.startswith("_")}


def check_picture(kinds: Mapping[str, Callable[[], Any]], name: str, folder: Path) -> None:
    """Check that a picture repeats, bit for bit, fits a column or a page, has readable text, and leaves rcParams alone.

    The kinds take turns between the formats, so that every sort of picture is written in both.
    """
    form = ("svg", "png")[list(kinds).index(name) % 2]
    before = dict(mpl.rcParams)
    drawn = np.atleast_1d(kinds[name]())
    (first,) = plots.save(drawn, folder / "first", [form])
    (second,) = plots.save(kinds[name](), folder / "second", [form])
    assert dict(mpl.rcParams) == before
    assert first.read_bytes() == second.read_bytes()
    figure = drawn[0].figure
    assert figure.get_figwidth() == pytest.approx(plots.COLUMN_WIDTH if len(drawn) == 1 else plots.PAGE_WIDTH)
    figure.draw_without_rendering()
    texts = [item for item in figure.findobj(mpl.text.Text) if item.get_text() and item.get_visible()]
    assert min(item.get_fontsize() for item in texts) >= 7
    box = figure.get_tightbbox()
    assert box.x0 >= -0.02
    assert box.y0 >= -0.02
    assert box.x1 <= figure.get_figwidth() + 0.02
    assert box.y1 <= figure.get_figheight() + 0.02


def check_axes(draw: Callable[[Axes], Any]) -> None:
    """Check that a picture is drawn on the axes given, and opens no figure."""
    figure = Figure()
    ax = figure.subplots()
    assert draw(ax) is ax
    assert not plt.get_fignums()
    assert ax.get_legend() is not None or len(figure.axes) > 1
    figure.canvas.draw()
