"""The page on sharpness has the figures that were measured, says what they say, and its examples run."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import msam_analysis as ma

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sharpness.md").read_text(encoding="utf-8")
DEFINITIONS = [
    "average_sharpness",
    "ball_sharpness",
    "certify",
    "critical_sharpness",
    "directional_sharpness",
    "fisher_rao_norm",
    "m_sharpness",
    "one_step_sharpness",
    "relative_flatness",
]


def figures(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text("utf-8"))
    return found


FOUND, COMPARED = figures("sharpness"), figures("definitions")
CELLS = FOUND["cells"]
VALUES = {row["definition"]: row["values"] for row in COMPARED["table"]}


@pytest.mark.parametrize(("script", "results"), [("sharpness", FOUND), ("definitions", COMPARED)])
def test_tables_are_the_ones_generated(script: str, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    markdown: Callable[[dict[str, Any]], str] = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["markdown"]
    assert markdown(results) in PAGE, f"put in what benchmarks/{script}.py --markdown JSON prints"


def test_every_definition_is_on_the_page() -> None:
    for name in DEFINITIONS:
        assert f"ma.{name}(" in PAGE, name
        assert callable(getattr(ma, name))


def test_examples_run_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for example in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
            exec(example, names)  # noqa: S102 - our own page
    assert len(capsys.readouterr().out.splitlines()) == 7
    hessian, gauss_newton, sampled, empirical = names["tops"]
    assert gauss_newton == pytest.approx(hessian, rel=0.1)
    assert sampled == pytest.approx(gauss_newton, rel=0.3)
    assert empirical < 0.8 * hessian
    assert names["critical"].status == names["update"].status == "one crossing"
    assert names["certificate"].verdict == "local maximum"
    assert names["ball"].sharpness > 2 * names["ball"].one_step
    plain, adaptive = zip(names["before"], names["after"], strict=True)
    assert plain[1] > 2 * plain[0]
    assert adaptive[1] == pytest.approx(adaptive[0], rel=1e-2)


def test_the_search_keeps_to_its_budget() -> None:
    assert {cell["rho"] for cell in CELLS if cell["norm"] == "l2"} >= {0.05, 3.0}
    for methods in FOUND["table"].values():
        assert methods["ball_sharpness"]["most_gradients"] <= 40


def test_every_ball_that_misses_the_target_is_named() -> None:
    named = re.findall(r"^\| (\w[\w, ]+) \| \S+ ≤ ([\d.]+) \| (0\.\d+) \| [a-z ]+ \|$", PAGE, flags=re.MULTILINE)
    missed = [cell for cell in CELLS if cell["found"]["ball_sharpness"]["fraction"] < 0.98]
    assert [(name, float(rho), float(share)) for name, rho, share in named] == [
        (cell["network"], cell["rho"], round(cell["found"]["ball_sharpness"]["fraction"], 3)) for cell in missed
    ]
    assert (len(missed), len(CELLS)) == (10, 85)
    highest = max(cell["found"]["ball_sharpness"]["fraction"] for cell in CELLS)
    assert f"the default finds {highest:.2f} times as much" in " ".join(PAGE.split())
    assert f"as much as {FOUND['cost']['median']:.0f} gradients" in " ".join(PAGE.split())


def test_what_parts_of_the_data_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table: Callable[[list[dict[str, Any]]], str] = runpy.run_path(str(ROOT / "benchmarks" / "sharpness.py"))[
        "parts_table"
    ]
    cells = figures("sharpness_parts")["cells"]
    assert table(cells) in PAGE, "put in what benchmarks/sharpness.py --parts prints"
    reached, before = (
        sum(cell[name] >= 0.98 * cell["reference"] for cell in cells) for name in ("rise", "rise_without_parts")
    )
    text = " ".join(PAGE.split())
    assert f"With parts {reached} of the {len(cells)} balls reach 98 % of the long search, {before} without" in text
    unchanged = [cell for cell in cells if not cell["parts"]]
    assert f"these are {len(unchanged)} of the {len(cells)} balls" in text
    assert all(cell["rise"] == cell["rise_without_parts"] for cell in unchanged)
    assert all(cell["gradients"] == cell["gradients_without_parts"] for cell in unchanged)
    assert max(cell["gradients"] for cell in cells) == 40


def test_no_other_method_finds_more() -> None:
    for methods in FOUND["table"].values():
        ours = methods["ball_sharpness"]
        assert ours["median"] >= 0.98
        for name, other in methods.items():
            assert ours["reached"] >= other["reached"], name
            assert ours["median"] >= other["median"] - 0.002, name


def test_what_is_certified() -> None:
    spheres = [cell for cell in CELLS if cell["norm"] == "l2"]
    boxes = [cell for cell in CELLS if cell["norm"] == "linf"]
    certified = sum(cell["verdict"] == "local maximum" for cell in spheres)
    assert f"in L2 balls {certified} of {len(spheres)} displacements" in " ".join(PAGE.split())
    assert not any(cell["verdict"] == "local maximum" for cell in boxes)
    assert f"at most {100 * max(cell['gain'] for cell in boxes):.1f} %" in " ".join(PAGE.split())


@pytest.mark.parametrize("definition", VALUES)
def test_what_rescaling_does(definition: str) -> None:
    """Measures in units of the weights see the same network, the others another one."""
    plain, rescaled = (sum(VALUES[definition][name]) for name in ("SGD", "SGD, rescaled"))
    unchanged = ("adaptive", "ASAM", "filter", "relative", "Fisher", "test accuracy", "train loss")
    if any(word in definition for word in unchanged):
        assert rescaled == pytest.approx(plain, rel=0.02)
    else:
        assert not 0.95 < rescaled / plain < 1.05
