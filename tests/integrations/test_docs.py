"""The pages' examples that need a framework run, in their order."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from .test_lightning import pytestmark

__all__ = ["pytestmark"]

PAGES = Path(__file__).parents[2] / "docs"


def test_integrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text = (PAGES / "integrations.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a loader without workers, of a logger that is missing
        torch.manual_seed(0)
        for example in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(example, names)  # noqa: S102 - our own page
    assert Path(names["saving"].best_model_path).is_file()
    assert Path(names["trainer"].state.best_model_checkpoint).is_dir()
    assert {"checkpoints", "trained", "checkpoint.pt"} <= {path.name for path in tmp_path.iterdir()}
