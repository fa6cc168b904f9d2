"""Fixtures of the studies' tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from msam_analysis.studies.workloads import Workload

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
