"""The page on monitors: its examples run in their order, its names exist, its figures are those that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

import msam_analysis as ma

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "monitor.md"
TEXT = PAGE.read_text(encoding="utf-8")
MEASURED = json.loads((ROOT / "benchmarks" / "results" / "monitor_cpu.json").read_text(encoding="utf-8"))


def test_examples_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for example in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL):
            exec(example, names)  # noqa: S102 - our own page
    plt.close("all")
    assert {path.name for path in tmp_path.iterdir()} == {"run.jsonl", "checkpoint.pt", "run.csv", "run.png"}
    assert names["table"].equals(names["monitor"].frame())
    assert names["table"]["step"].tolist() == list(range(0, 16, 2))
    watched: pd.DataFrame = names["watch"].frame()
    counts = {"cosine/2": 12, "cosine_after/0": 12, "held_out_cosine": 3, "sam_angle/4": 2}
    assert {name: int(watched[name].notna().sum()) for name in counts} == counts
    assert names["again"].step == names["scaled"].step == 16
    assert names["scaled"].skipped == 0
    assert (names["scaled"].frame()["gradient_norm"] <= 1 + 1e-5).all()
    assert names["kept"] == names["told"].rows
    assert pd.read_csv(tmp_path / "run.csv")["step"].tolist() == [0, 4, 8, 12]
    written = capsys.readouterr().out
    assert "share" in written
    assert len(re.findall(r"^step \d+: \d+\.\d{3}$", written, flags=re.MULTILINE)) == 4


def test_every_probe_has_a_row_with_its_columns() -> None:
    rows = set(re.findall(r"^\| `(\w+)\(", TEXT, flags=re.MULTILINE)) - {*ma.loggers.__all__}
    assert rows == {name for name in ma.probes.__all__ if name not in ("By", "Every", "Finish", "Probe", "StepProbe")}


def test_every_logger_has_a_row() -> None:
    rows = set(re.findall(r"^\| `(\w+)\([^|]*`[^|]*\|[^|]*\|[^|]*\|$", TEXT, flags=re.MULTILINE))
    assert rows >= {name for name in ma.loggers.__all__ if name != "Logger"}


def test_figures_are_those_that_were_measured() -> None:
    for network in ("WRN-16-4", "digits network"):
        for name, row in MEASURED[network]["probes"].items():
            shown = f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
            pattern = rf"^\| {re.escape(network)} \| {re.escape(name)} \| {re.escape(shown)} \|"
            assert re.search(pattern, TEXT, flags=re.MULTILINE), pattern
    assert f"{MEASURED['WRN-16-4']['probes']['cosine']['without']['median_ms'] / 1e3:.1f} s" in TEXT
    assert f"{MEASURED['digits network']['probes']['cosine']['without']['median_ms']:.1f} ms" in TEXT


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("https://")]
    assert all((PAGE.parent / link.split("#")[0]).exists() for link in links)
