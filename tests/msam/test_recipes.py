"""The recipes run as they stand and reach what they insist on; in those of a framework the perturbation is there."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.programs import script_ended

RECIPES = Path(__file__).parents[2] / "recipes"
WATCHED = Path(__file__).with_name("watched.py")


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules beside the recipes are found, and the number of threads stays as it was."""
    monkeypatch.syspath_prepend(str(RECIPES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.modules.pop("toy", None)


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("name", ["plain", "amp", "accumulation"])
def test_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].rstrip(",") for line in lines] == ["MSAM", "SAM"]


def test_recipe_of_two_processes() -> None:
    """A process of its own: the ranks it starts import it by its path."""
    lines = lines_of(RECIPES / "ddp.py", folder=RECIPES)
    assert [line.split()[0].rstrip(",") for line in lines] == ["MSAM", "SAM", "SAM"]


def lines_of(script: Path, *arguments: str, folder: Path) -> list[str]:
    """What a script prints, in a folder and a process of its own; warnings are errors."""
    home = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    done = script_ended(script, *arguments, folder=folder, environment=home, strict=True)
    assert done.code == 0, done.err
    return done.out.splitlines()


def distances(passes: list[tuple[bool, Tensor]], before: bool, after: bool) -> list[float]:
    """How far the weights move from a pass in one mode to the next in the other; True is training."""
    pairs = [(v, w) for (mode, v), (other, w) in pairwise(passes) if (mode, other) == (before, after)]
    return [float((w.double() - v.double()).norm()) for v, w in pairs]


needs_lightning = pytest.mark.skipif(find_spec("lightning") is None, reason="Lightning is not installed")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.mark.parametrize(
    ("name", "framework"),
    [
        pytest.param("lightning_loop", "Lightning", marks=needs_lightning),
        pytest.param("hf_trainer", "Trainer", marks=needs_transformers),
    ],
)
def test_recipe_of_a_framework(name: str, framework: str, tmp_path: Path) -> None:
    """From outside: the weights that each forward pass sees. The tolerance is the rounding of float32 weights."""
    (folder := tmp_path / "empty").mkdir()
    lines = lines_of(WATCHED, str(RECIPES / f"{name}.py"), str(tmp_path / "passes.pt"), folder=folder)
    assert list(folder.iterdir()) == []

    for optimizer, line in zip(["MSAM", "SAM"], lines, strict=True):
        number = r"(\d\.\d{3})"
        found = re.fullmatch(
            rf"{optimizer} in {framework} +accuracy {number}, validation loss {number} to {number}", line
        )
        assert found, line
        _, first, last = map(float, found.groups())
        assert first > 0.5  # chance is log 2
        assert last < 0.1

    seen = torch.load(tmp_path / "passes.pt", weights_only=True)
    of_msam, of_sam = (
        passes for passes in seen if any(training for training, _ in passes)
    )  # not a network from a file
    for passes in (of_msam, of_sam):
        assert max(distances(passes, False, False)) < 1e-5  # validation, and the accuracy after the last one
        assert min(distances(passes, True, False)) > 0.01  # there is a step between
    # MSAM: from the true weights to ε of the step before, which the first step lacks
    assert distances(of_msam, False, True) == pytest.approx([0.0] + 14 * [0.3], abs=1e-5)
    # SAM: every gradient twice, at the true weights and at a distance ρ
    training = [weights for mode, weights in of_sam if mode]
    ascents = [float((b.double() - a.double()).norm()) for a, b in zip(training[::2], training[1::2], strict=True)]
    assert ascents == pytest.approx(len(ascents) * [0.05], abs=1e-5)
    assert distances(of_sam, False, True) == pytest.approx(15 * [0.0], abs=1e-5)


def test_every_recipe_has_a_line_in_the_documentation() -> None:
    page = (RECIPES.parent / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert all(f"recipes/{path.name}" in page for path in RECIPES.glob("*.py") if path.stem != "toy")
