"""The page on scale: its example runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import msam_analysis as ma

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_example_runs_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        names: dict[str, object] = {}
        for example in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
            exec(example, names)  # noqa: S102 - our own page
    assert "lambda_1" in capsys.readouterr().out


def test_what_it_names_exists() -> None:
    for name in ("m_sharpness", "fisher_rao_norm", "data_interval", "compare", "feature_rank", "robust_accuracy"):
        assert f"`{name}" in TEXT
        assert hasattr(ma, name)
