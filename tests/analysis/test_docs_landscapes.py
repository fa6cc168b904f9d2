"""The page on landscapes: its examples run in their order, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from matplotlib import pyplot as plt

import msam_analysis as ma
from msam_analysis.landscape.directions import Normalization

PAGE = Path(__file__).parents[2] / "docs" / "landscapes.md"
TEXT = PAGE.read_text(encoding="utf-8")
# What the examples write, by kind.
WRITTEN = {
    ".gif": {"trajectory"},
    ".h5": {"plane"},
    ".html": {"surface"},
    ".nc": {"plane"},
    ".npz": {"plane"},
    ".png": {"line", "plane", "surface", "trajectory"},
    ".safetensors": {"plane"},
    ".vts": {"plane"},
}


def test_examples_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("plotly", "xarray", "h5netcdf", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for example in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
            exec(example, names)  # noqa: S102 - our own page
    plt.close("all")
    written = {
        suffix: {path.stem for path in tmp_path.iterdir() if path.is_file() and path.suffix == suffix}
        for suffix in WRITTEN
    }
    assert written == WRITTEN
    assert names["refined"].evaluations < names["refined"].loss.numel()
    assert names["refined"].error <= 0.01 * (names["refined"].loss.max() - names["refined"].loss.min())
    # Along the line back, 0 is the network that was trained and 1 the first that was recorded.
    assert float(names["projection"].loss[-1]) == pytest.approx(names["back"].center_loss, rel=1e-5)
    assert float(names["projection"].loss[0]) == pytest.approx(float(names["back"].loss[-1]), rel=1e-5)


def test_every_direction_and_normalisation_is_in_the_tables() -> None:
    assert set(re.findall(r'^\| `"(\w+)"`', TEXT, flags=re.MULTILINE)) == set(get_args(Normalization))
    named = set(re.findall(r"`(\w+)\((?:objective|optimizer)[^`]*\)`", TEXT.split("## How to read")[0]))
    assert named == {"random", "eigenvector", "gradient", "momentum", "last_update", "interpolation", "plane_through"}
    assert all(hasattr(ma.directions, name) for name in named)


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("https://")]
    assert links
    assert all((PAGE.parent / link).exists() for link in links)
