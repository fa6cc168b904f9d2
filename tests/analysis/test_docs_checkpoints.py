"""The page on checkpoints: its examples run in their order, are short, and what it names exists."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt

import msam_analysis as ma
from msam_analysis.cli.landscape import landscape_command
from msam_analysis.cli.measure import measure_command
from msam_analysis.measures import summary

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_examples_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    library = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    shape = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    library.GPT2LMHeadModel(library.GPT2Config(**shape)).save_pretrained("gpt", max_shard_size="2KB")
    names: dict[str, Any] = {"__name__": "a_page"}
    monkeypatch.setitem(sys.modules, "a_page", type(sys)("a_page"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for example in EXAMPLES:
            exec(example, names)  # noqa: S102 - our own page
    plt.close("all")
    said = capsys.readouterr().out
    for words in (
        "prefix 'net.'",
        "not read: torch.nn",
        "'module._orig_mod.'",
        "'state_dict_ema.'",
        "'state_dict.model.'",
    ):
        assert words in said, words
    assert "gpt, loaded by GPT2LMHeadModel" in said
    assert list(names["result"]) == ["first", "other"]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"first", "other"}


def test_a_format_takes_three_lines_at_most() -> None:
    formats = EXAMPLES[1:-1]
    assert len(formats) >= 8
    lines = [[line for line in example.splitlines() if line.strip()] for example in formats]
    assert max(map(len, lines)) <= 3


def test_options_exist() -> None:
    known = {
        name if name.startswith("--") else f"--{name.replace('_', '-')}"
        for command in (measure_command, landscape_command)
        for name in inspect.signature(command).parameters
    }
    asked = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - {"--label"}
    assert asked <= known


def test_numbers_on_the_page_are_those_of_the_code() -> None:
    order = re.search(r"in order of price: (.*?)\.", TEXT)
    assert order is not None
    words = ["loss", "critical sharpness", "average", "trace", "balls", "adaptive balls", "eigenvalues"]
    assert order[1].split(", ") == words
    names = [word.removesuffix(" balls").removesuffix("s") for word in words]
    assert [name.replace(" ", "_") for name in names] == [name.removesuffix("s") for name in summary.DEFAULT_METRICS]
    assert summary._LARGE == 10**7
    assert "0.5 GiB" in TEXT
    assert summary._BASIS_BYTES == 2**29
    assert hasattr(ma, "compare")
