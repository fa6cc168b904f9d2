"""A Python that has just started: what the import of the library brings, and that values keep their fingerprints.

One such start serves all tests here. It has hashes of strings of its own.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from msam_analysis.results.fingerprint import fingerprint

from .programs import ended
from .studies.test_fingerprint import Value

THINGS = (Value({"a": {1.5, 2.5}, "b": None, "c": {"one", "two", "three"}}), torch.arange(3), np.arange(3))
SCRIPT = """
import pathlib, pickle, sys
import msam, msam_analysis
print(*sorted({"accelerate", "lightning", "torchmetrics", "torchvision", "transformers"} & sys.modules.keys()))
from msam_analysis.results.fingerprint import fingerprint
print(fingerprint(*pickle.loads(pathlib.Path("things").read_bytes())))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What it says, line by line; warnings are errors."""
    folder: Path = tmp_path_factory.mktemp("fresh")
    (folder / "things").write_bytes(pickle.dumps(THINGS))
    program = ended(
        [sys.executable, "-W", "error", "-c", SCRIPT], folder, {"PYTHONPATH": str(Path(__file__).parents[1])}
    )
    assert program.code == 0, program.err
    return program.out.splitlines()


def test_import_brings_no_framework(told: list[str]) -> None:
    assert told[0] == ""


def test_another_process_finds_the_same(told: list[str]) -> None:
    assert told[1] == fingerprint(*THINGS)
