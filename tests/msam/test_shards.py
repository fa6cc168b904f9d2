"""Parameters that are divided among two processes give the trajectory of one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

import msam

from .sharded import HOW, alone, work
from .workloads import furthest, same

Found = tuple[dict[str, Any], dict[str, Any]]
each_preset = pytest.mark.parametrize("name", msam.PRESETS)
each_way = pytest.mark.parametrize("how", HOW)


@pytest.fixture(scope="module")
def found() -> Iterator[Found]:
    """What both processes saved."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(folder,), nprocs=2, daemon=True)
        yield tuple(torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1))


@each_way
@each_preset
def test_fully_shard(found: Found, name: str, how: str) -> None:
    """Weights, ε, true weights and buffers; in both processes the same to the bit, as one process has them."""
    first, second = (rank[f"fsdp {name} {how}"] for rank in found)
    assert same(first, second)
    assert furthest(first, alone(name, how)) < 1e-12


@each_way
@each_preset
def test_zero_redundancy(found: Found, name: str, how: str) -> None:
    """The norm is over all shares. SAM would climb with one share in each process, and is refused."""
    first, second = (rank[f"zero {name} {how}"] for rank in found)
    if msam.PRESETS[name].direction == "gradient":
        assert first == second
        assert first.startswith("RuntimeError: expected all parameters in every process")
        return
    assert same(first, second)
    expected = alone(name, how)[: len(first)]
    if msam.PRESETS[name].direction != "random":  # each process draws the noise of its own share
        assert furthest(first, expected) < 1e-12
    else:
        assert 0 < furthest(first, expected) < 1


@pytest.mark.parametrize("name", ["msam", "random"])
def test_length_of_the_shares(found: Found, name: str) -> None:
    """The squares of all shares add up to ρ², and no two shares draw the same noise."""
    (first,), (second,) = (rank[f"epsilon {name}"] for rank in found)
    assert float(first.square().sum() + second.square().sum()) == pytest.approx(0.3**2, rel=1e-12)
    size = min(len(first), len(second))
    assert not torch.equal(first[:size] * second.norm(), second[:size] * first.norm())


@pytest.mark.parametrize("write", ["whole", "part"])
def test_writes_to_sharded_weights(found: Found, write: str) -> None:
    assert [rank[f"write {write}"] for rank in found] == [[1, True], [1, True]]


def test_norms_of_each_placement(found: Found) -> None:
    """What all have counts once. What is to be added up first is refused."""
    expected = (6 * 2.0**2 + 4 * 3.0**2 + 4.0**2) ** 0.5
    for rank in found:
        assert float(rank["replicated"][0]) == pytest.approx(expected)
        assert rank["partial"].startswith("ValueError: expected tensors that are sharded or replicated")
