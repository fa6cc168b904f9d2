"""Everything public on a device that is not the CPU: its numbers are the CPU's, and the host seldom waits for them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.programs import alone, together

from .counts import COUNTS
from .measured import measure, measure_in_single
from .second import COMPILER, NAME, compiled
from .table import TABLE, public_names

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++, or what CXX names) to build a device with"),
    pytest.mark.skipif(sys.platform != "linux", reason="the device is built as a library for Linux"),
]

ROWS = [name for name, row in TABLE.items() if callable(row)]


def shared(factory: pytest.TempPathFactory, work: Callable[..., None], name: str) -> Any:
    """What a process with the device saved: one for all workers, as a device registers for good."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "second_device"
    folder.mkdir(exist_ok=True)
    with alone(folder):
        if not (folder / name).exists():
            together(work, compiled(), folder, count=1)
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = shared(tmp_path_factory, measure, "measured.pt")
    return found


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = shared(tmp_path_factory, measure_in_single, "single.pt")
    return found


READS = {
    **dict.fromkeys(("x + x", "x @ x.T", "x.sum()", "x[[0]]"), 0),
    **dict.fromkeys(("x.cpu()", "float(x.sum())", "x.tolist()", "bool(mask.any())"), 1),
    **dict.fromkeys(("torch.equal(x, x)", "x[mask]", "mask.nonzero()"), 1),
}


def test_the_device_counts_what_makes_the_host_wait_and_refuses_the_cpu(seen: dict[str, Any]) -> None:
    device = dict(seen["device"])
    assert "expected all tensors on one device, got one of shape [2, 3] on cpu" in device.pop("refused")
    assert device == READS


def test_every_public_name_has_a_row() -> None:
    named = {name.partition("/")[0] for name in TABLE}
    assert named == set(public_names())


@pytest.mark.parametrize("name", ROWS)
def test_the_device_gives_the_numbers_of_the_cpu(name: str, seen: dict[str, Any]) -> None:
    here, there = (seen["found"][device][name] for device in ("cpu", NAME))
    assert "raised" not in here, here["raised"]
    assert "raised" not in there, there["raised"]
    assert here.keys() == there.keys()
    for key, expected in here.items():
        if isinstance(expected, Tensor):
            # Kernels are the CPU's, but sums over blocks and copies with other strides are not.
            torch.testing.assert_close(there[key], expected, rtol=1e-8, atol=1e-11, equal_nan=True, msg=key)
        else:
            assert there[key] == expected, key


@pytest.mark.parametrize("name", COUNTS)
def test_the_host_reads_few_numbers(name: str, seen: dict[str, Any]) -> None:
    counted = seen["counted"][name]
    assert "raised" not in counted, counted["raised"]
    assert counted["reads"] <= counted["allowed"]


# Tells how small a remainder is, which is rounding's, or is known in float64 only.
REMAINDERS = ("/stationarity", "/residual", "/relative_residual", "/resolution")


@pytest.mark.parametrize("name", [name for name in ROWS if not name.startswith("plots.")])
def test_a_device_without_float64(name: str, single: dict[str, Any]) -> None:
    here, there = (single[device][name] for device in ("cpu", NAME))
    assert "raised" not in there, there["raised"]
    for key, expected in here.items():
        if isinstance(expected, Tensor) and not key.endswith(REMAINDERS):
            # Sums are in float32 there, and searches end a step earlier or later.
            found, wide = there[key], expected.double()
            torch.testing.assert_close(found.double(), wide, rtol=1e-3, atol=1e-4, equal_nan=True, msg=key)
