"""A monitor in Lightning, in the Hugging Face Trainer, and in data-parallel training."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.programs import script_ended

from . import monitored

WATCHED = Path(__file__).parents[1] / "msam" / "watched.py"  # hides a torchvision that was built for another torch
FRAMEWORKS = [name for name in ("lightning", "transformers") if find_spec(name) is not None]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all frameworks show, from a Python of its own, with warnings as errors and no network."""
    folder = tmp_path_factory.mktemp("frameworks")
    arguments = ["monitored.py", str(folder / "found.json"), *FRAMEWORKS]
    (folder / "recipe.py").write_text(
        f"import runpy, sys; sys.argv = {arguments}; runpy.run_path({monitored.__file__!r}, run_name='__main__')\n",
        encoding="utf-8",
    )
    home = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    done = script_ended(
        WATCHED, str(folder / "recipe.py"), str(folder / "passes.pt"), folder=folder, environment=home, strict=True
    )
    assert done.code == 0, done.err
    read: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return read


def check(runs: dict[str, Any], limit: float) -> None:
    """One row a step, whatever was accumulated and clipped; the cosines are those seen from the framework."""
    for run in runs.values():
        frame = pd.DataFrame(run["rows"])
        assert frame["step"].tolist() == list(range(6))
        np.testing.assert_allclose(frame["cosine"], run["seen"], atol=1e-6)
        assert frame["cosine"][1:].abs().min() > 1e-3
        assert frame["held_out_cosine"].notna().tolist() == [False, False, False, True, False, False]
        assert (frame["step_norm"] > 0).all()
        assert (frame["gradient_norm"] <= limit * (1 + 1e-5)).all()
        assert {"cosine/0", "cosine_after/2"} <= {*frame.columns}


@pytest.mark.parametrize(
    ("name", "limit"),
    [("lightning", 0.1), ("transformers", 1.0)],  # Trainer clips at 1 by default, the Lightning run at 0.1
)
def test_the_loop_of_a_framework(name: str, limit: float, found: dict[str, Any]) -> None:
    if name not in FRAMEWORKS:
        pytest.skip(f"{name} is not installed")
    check(found[name], limit)


def test_data_parallel_training() -> None:
    with torch.random.fork_rng(devices=[]):
        check(monitored.train("parallel"), np.inf)
