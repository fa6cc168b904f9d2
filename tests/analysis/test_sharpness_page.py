"""The page on sharpness has the figures that were measured, says what they say, and its examples run."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import msam_analysis as ma
from msam_analysis import sharpness

from .cases import MLP

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sharpness.md").read_text(encoding="utf-8")


def figures(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text("utf-8"))
    return found


FOUND, COMPARED = figures("sharpness"), figures("definitions")
VALUES = {row["definition"]: row["values"] for row in COMPARED["table"]}
ORDER = {row["definition"]: row["order"] for row in COMPARED["table"]}


@pytest.mark.parametrize(("script", "results"), [("sharpness", FOUND), ("definitions", COMPARED)])
def test_tables_are_the_ones_generated(script: str, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    markdown: Callable[[dict[str, Any]], str] = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["markdown"]
    assert markdown(results) in PAGE, f"put in what benchmarks/{script}.py --markdown JSON prints"


def test_every_definition_is_on_the_page() -> None:
    for name in sharpness.__all__:
        assert f"ma.{name}(" in PAGE, name
        assert getattr(ma, name) is getattr(sharpness, name)


def test_examples_run() -> None:
    names: dict[str, Any] = {"ma": ma, "o": ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())}
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert examples
    for example in examples:
        exec(example, names)  # noqa: S102 - our own page


# --- what is said about the search


def test_the_search_keeps_to_its_budget() -> None:
    assert {cell["rho"] for cell in FOUND["cells"] if cell["norm"] == "l2"} >= {0.05, 3.0}
    for methods in FOUND["table"].values():
        assert methods["ball_sharpness"]["most_gradients"] <= 40


def test_the_search_finds_nearly_all() -> None:
    """98 % of the long search at the median of every ball and in nine cells of ten; most of it everywhere."""
    fractions = [cell["found"]["ball_sharpness"]["fraction"] for cell in FOUND["cells"]]
    assert sum(fraction >= 0.98 for fraction in fractions) >= 0.9 * len(fractions)
    for methods in FOUND["table"].values():
        ours = methods["ball_sharpness"]
        assert ours["median"] >= 0.98
        for name, other in methods.items():
            assert ours["reached"] >= other["reached"], name
            assert ours["median"] >= other["median"] - 0.002, name


# --- what is said about the definitions


@pytest.mark.parametrize("definition", VALUES)
def test_what_rescaling_does(definition: str) -> None:
    """Measures in units of the weights see the same network, the others another one."""
    plain, rescaled = (sum(VALUES[definition][name]) for name in ("SGD", "SGD, rescaled"))
    unchanged = ("adaptive", "ASAM", "filter", "relative", "Fisher", "test accuracy", "train loss")
    if any(word in definition for word in unchanged):
        assert rescaled == pytest.approx(plain, rel=0.02)
    else:
        assert not 0.95 < rescaled / plain < 1.05
