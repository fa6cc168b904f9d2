"""Objectives of models whose weights FSDP2 divides among processes, beside those of the same models whole.

What is divided is what one process has: vectors are parts of the whole ones, numbers are equal but for rounding. Shards
are uneven, and some are empty. One group of processes makes all cases, each in a process group of its own: a rank that
fails leaves it, and the other does not wait.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis.objective import vectors
from tests.programs import together

from .sharded import REFUSED, cases, work

EXACT, FLOAT32 = 1e-12, 1e-5


def found_by(world: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        together(work, folder, world, count=world)
        return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4])
def test_processes_that_share_the_weights_find_what_one_finds(world: int) -> None:
    ranks = found_by(world)
    assert all(rank.keys() == cases(world).keys() for rank in ranks)
    troubles = []
    for name in ranks[0]:
        limit = FLOAT32 if name.endswith("float32") else EXACT
        for found in (rank[name] for rank in ranks):
            if name in REFUSED:
                if not re.search(REFUSED[name], str(found)):
                    troubles.append(f"{name}: {found}, not {REFUSED[name]}")
            elif isinstance(found, str):
                troubles.append(f"{name}: {found.splitlines()[0]}")
            else:
                wrong = {key: f"{gap:.1e}" for key, gap in found.items() if not gap <= limit}
                troubles += [f"{name}: off by {wrong}"] if wrong else []
    assert not troubles, "\n".join(troubles)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 65, 79, 80, 81, 1000])
@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_draws_in_parts_are_the_same(size: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch draws 16 numbers at a time, and the last 16 anew: parts must not show."""
    monkeypatch.setattr(vectors, "_DRAWN", 64)
    parts = list(vectors.gaussian_rows(size, columns, seed=3, use="x"))
    whole = vectors.gaussian(size, columns, seed=3, like=torch.zeros(1, dtype=torch.float64), use="x")
    assert torch.equal(torch.cat([rows for _, rows in parts]), whole)
    assert [start for start, _ in parts] == [sum(len(rows) for _, rows in parts[:n]) for n in range(len(parts))]
    assert size * columns < 100 or len(parts) > 1


def test_a_whole_model_has_whole_vectors() -> None:
    objective = ma.Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    assert objective.space.here == objective.space.size == objective.size == len(objective.point()) == 3
    assert "sharded over" not in objective.settings
