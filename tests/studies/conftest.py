"""Fixtures of the studies' tests."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from msam_analysis.studies import study
from msam_analysis.studies.workloads import Workload

from .bench import MODULE, Command, call, furnish
from .toy import TOY


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Workload:
    """The small workload, importable in worker processes."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return TOY


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one seed, made in this process: what other ways are compared with; not to be written to."""
    from .test_study import study

    out = tmp_path_factory.mktemp("alone")
    study(out, seeds=1)
    return out


@pytest.fixture
def generators() -> Callable[[], tuple[object, ...]]:
    """A function that takes down the state of all global generators."""

    def state() -> tuple[object, ...]:
        numpy_state = np.random.get_state(legacy=False)
        return torch.get_rng_state().numpy().tobytes(), repr(numpy_state), random.getstate()

    return state


def begin(*_: object, **__: object) -> None:
    raise AssertionError("a study begins to train")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user: a module with factories, and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(study, "make", begin)
    modules = [name for name in (MODULE, "broken", "raising") if sys.modules.pop(name, None)]
    assert not modules
    furnish(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call the command with arguments, as the installed script does."""
    return lambda *arguments: call(arguments, capsys, monkeypatch)
