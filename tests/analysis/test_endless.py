"""Data that do not end are told, and not read for ever."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import msam_analysis as ma
from msam_analysis.objective import batches


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat((torch.ones(3), torch.ones(2)))


class Longer:
    """Says three, and gives without end."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat((torch.ones(4, 3), torch.ones(4, 2)))


class Ends(Longer):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(super().__iter__(), 3)


def objective(data: Any) -> ma.Objective:
    return ma.Objective(nn.Linear(3, 2), nn.MSELoss(), data)


def test_without_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_ENDLESS", 50)
    with pytest.raises(ValueError, match="the data does not end after 50 batches"):
        objective(DataLoader(Endless(), batch_size=4))


def test_more_than_its_length() -> None:
    with pytest.raises(ValueError, match="the data does not end after 3 batches, the most that it says"):
        objective(Longer())


def test_exactly_its_length() -> None:
    assert objective(Ends()).samples == 12
    assert batches._ENDLESS == 2**20
