"""Two processes over gloo, in Lightning and in Trainer, with accumulation, against a plain loop in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.programs import ended

from .toy import by_hand, windows

PROGRAM = Path(__file__).with_name("parallel.py")


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_two_processes(framework: str, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {"PYTHONPATH": str(PROGRAM.parents[2]), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = ended([sys.executable, *launcher, str(PROGRAM), framework, str(tmp_path)], tmp_path, variables)
    assert done.code == 0, done.err
    told = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    for name in ("MSAM", "SAM"):
        assert told[name]["found"] == pytest.approx(told[name]["reported"], rel=1e-6)
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        expected = by_hand(name, windows(2))  # each process has half of every part
        for first, second, e in zip(*ranks, expected.parameters(), strict=True):
            assert torch.equal(first, second)
            torch.testing.assert_close(first, e, rtol=0, atol=2e-6)
