"""The recipes run as they stand and reach what they insist on. Those of optional packages have `make recipes`."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "recipes"


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
    command = [sys.executable, "-W", "error", str(RECIPES / "ddp.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0].rstrip(",") for line in done.stdout.splitlines()] == ["MSAM", "SAM", "SAM"]


def test_every_recipe_has_a_line_in_the_documentation() -> None:
    page = (RECIPES.parent / "docs" / "optimizers.md").read_text(encoding="utf-8")
    assert all(f"recipes/{path.name}" in page for path in RECIPES.glob("*.py") if path.stem != "toy")
