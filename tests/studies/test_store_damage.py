"""Files of finished runs that a disk or a person has damaged: one sentence that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msam_analysis.studies import store
from tests.trust.cases import is_sentence

STATE = {"model": {"w": torch.ones(2)}, "optimizer": {"state": {}}}
SCORES = {"train_loss": 0.5, "test_accuracy": 0.9}


def checkpoint(content: Any) -> Callable[[Path], object]:
    return lambda folder: torch.save(content, folder / "checkpoint.pt")


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


READ: dict[str, Callable[[Path], object]] = {
    "checkpoint.pt": store.read_checkpoint,
    "scores.json": store.read_scores,
    "contents.json": store._contents,
    "steps.csv": lambda folder: store._read_numbers(folder / "steps.csv"),
}
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no weights": ("checkpoint.pt", checkpoint({"optimizer": {}})),
    "weights that are none": ("checkpoint.pt", checkpoint({"model": {"w": 3}, "optimizer": {}})),
    "a list": ("checkpoint.pt", checkpoint([1, 2])),
    "half a checkpoint": ("checkpoint.pt", text("checkpoint.pt", "PK")),
    "an empty checkpoint": ("checkpoint.pt", text("checkpoint.pt", "")),
    "another class": ("checkpoint.pt", checkpoint(Path("x"))),
    "no scores": ("scores.json", text("scores.json", "[]")),
    "scores without the loss": ("scores.json", text("scores.json", '{"test_loss": 1.0}')),
    "scores of text": ("scores.json", text("scores.json", '{"train_loss": "low"}')),
    "half of the scores": ("scores.json", text("scores.json", '{"train_loss": ')),
    "deep scores": ("scores.json", text("scores.json", "[" * 100_000)),
    "no contents": ("contents.json", text("contents.json", "{}")),
    "contents of elsewhere": ("contents.json", text("contents.json", '["../../other.safetensors"]')),
    "half of the contents": ("contents.json", text("contents.json", '["a.safetens')),
    "an empty table": ("steps.csv", text("steps.csv", "")),
    "words in a table": ("steps.csv", text("steps.csv", "step,loss\n0,low\n")),
    "a long row": ("steps.csv", text("steps.csv", "step,loss\n0,1\n0,1,2,3\n")),
    "a quote without end": ("steps.csv", text("steps.csv", 'step,loss\n0,"1\n')),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_named(what: str, tmp_path: Path) -> None:
    name, harm = DAMAGE[what]
    harm(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.+\): expected what a study wrote; delete") as told:
        READ[name](tmp_path)
    assert is_sentence(str(told.value))


def test_whole_files_are_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "checkpoint.pt")
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    (tmp_path / "steps.csv").write_text("step,loss\n0,0.1\n1,\n")
    assert store.read_checkpoint(tmp_path)["model"].keys() == {"w"}
    assert store.read_scores(tmp_path) == SCORES
    assert store._read_numbers(tmp_path / "steps.csv")["step"].tolist() == [0, 1]


@pytest.mark.parametrize("content", ["{}", '["a.safetens', '["gone.safetensors"]', "[" * 100_000])
def test_a_measure_with_damaged_contents_is_measured_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "contents.json").write_text(content)
    assert not store.is_measured(tmp_path)
