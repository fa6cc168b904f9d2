"""The page on frameworks: examples without one run here, the others in ``make integrations``; figures are measured."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import msam

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
TEXT = PAGE.read_text(encoding="utf-8")
FIGURES = json.loads((ROOT / "benchmarks" / "results" / "integrations_cpu.json").read_text(encoding="utf-8"))


def test_examples_of_plain_loops_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    names: dict[str, Any] = {"torch": torch, "nn": nn, "msam": msam, "x": x, "loader": loader}
    examples = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    plain = [text for text in examples if "lightning" not in text and "transformers" not in text]
    assert len(plain) == len(examples) - 3 == 2
    for example in plain:
        exec(example, names)  # noqa: S102 - our own page
    assert names["optimizer"].perturbed
    assert names["average"].n_averaged == 4


def test_table_of_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "integrations.py"))
    assert script["markdown"](FIGURES) in TEXT, "put in what benchmarks/integrations.py --markdown JSON prints"


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("https://")]
    assert links
    assert all((PAGE.parent / link).exists() for link in links)
