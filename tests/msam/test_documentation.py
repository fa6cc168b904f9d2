"""The page on the optimizers says what the code says, its tables are the ones generated, and its examples run."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam
from msam.presets import presets_table

from .workloads import loss, network

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
FIGURES = json.loads((ROOT / "benchmarks" / "results" / "optimizers_cpu.json").read_text(encoding="utf-8"))


def test_table_of_presets() -> None:
    assert presets_table() in PAGE, "put the output of msam.presets.presets_table() into the page"
    assert all(f"| `{name}` |" in PAGE for name in msam.PRESETS)


def test_table_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "optimizers.py"))
    assert script["markdown"](FIGURES) in PAGE, "put in what benchmarks/optimizers.py --markdown JSON prints"


def figure(model: str, name: str) -> float:
    rows: list[dict[str, Any]] = FIGURES["steps"][model]["table"]
    return float(next(row["ratio"] for row in rows if row["optimizer"] == name))


@pytest.mark.parametrize("model", ["WRN-16-4", "ViT-B"])
def test_figures_keep_what_they_promise(model: str) -> None:
    assert figure(model, "MSAM") <= 2.5
    assert figure(model, "AdamWMSAM") <= 2.5
    assert figure(model, "MSAM, not fused") < figure(model, "MSAM, tensor by tensor")
    training = {row["optimizer"]: row["ratio"] for row in FIGURES["training"]["table"]}
    assert training["MSAM"] <= 1.02
    assert training["SAM"] == pytest.approx(2, abs=0.1)
    memory = {row["optimizer"]: row for row in FIGURES["memory"]}
    assert memory["MSAM"]["lasting_per_parameter"] == memory["SGD"]["lasting_per_parameter"]
    assert memory["SAM"]["lasting_per_parameter"] == memory["SGD"]["lasting_per_parameter"] + 1
    assert memory["MSAM, not fused"]["temporary_per_parameter"] <= 1


def test_sizes_of_the_models_are_the_published_ones() -> None:
    sizes = {name: (part["tensors"], round(part["parameters"] / 1e6, 1)) for name, part in FIGURES["steps"].items()}
    assert sizes == {"WRN-16-4": (44, 2.8), "ViT-B": (152, 86.6)}


def test_examples_run() -> None:
    def loss_of(model: nn.Module) -> Tensor:
        return loss(model, 0)

    names: dict[str, Any] = {"torch": torch, "model": network(), "loss_of": loss_of, "evaluate": loss_of}
    for example in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(example, names)  # noqa: S102 - our own page
