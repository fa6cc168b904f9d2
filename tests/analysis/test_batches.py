"""Data that differ between two passes in their order alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import msam_analysis as ma

from .cases import MLP, concatenate


class Reordered:
    """Batches whose samples come in another order at every second pass."""

    def __init__(self, change: Callable[[int], Tensor]) -> None:
        self.change = change
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        x, y = concatenate(MLP.data())
        rows = self.change(len(x)) if self.passes % 2 == 0 else torch.arange(len(x))
        return iter([(x[rows], y[rows])])


def swapped(first: int, second: int) -> Callable[[int], Tensor]:
    def rows(size: int) -> Tensor:
        order = torch.arange(size)
        order[[first, second]] = order[[second, first]]
        return order

    return rows


ORDERS: dict[str, Callable[[int], Tensor]] = {
    "backwards": lambda size: torch.arange(size - 1, -1, -1),
    "moved on by one": lambda size: torch.arange(size).roll(1),
    "the first two change places": swapped(0, 1),
    "the last two change places": swapped(-2, -1),
}


@pytest.mark.parametrize("order", ORDERS)
def test_samples_in_another_order_are_other_data(order: str) -> None:
    """Their sum is the same, and so is the loss; but chosen samples, and weights of samples, would be others."""
    with pytest.raises(ValueError, match=r"differs between two passes.*expected the same batches"):
        ma.Objective(MLP.model(), MLP.loss_fn, Reordered(ORDERS[order])).loss()


def test_the_same_order_is_the_same_data() -> None:
    data: Any = Reordered(torch.arange)
    objective = ma.Objective(MLP.model(), MLP.loss_fn, data)
    assert torch.equal(objective.loss(), ma.Objective(MLP.model(), MLP.loss_fn, concatenate(MLP.data())).loss())


@pytest.mark.parametrize(("missing", "read"), [(0, 0), (1, 3)])
def test_data_are_kept_up_to_the_size_that_they_may_take(missing: int, read: int) -> None:
    """At that size still, so that evaluations read nothing; a byte less, and every one reads all of them."""
    data: Any = Reordered(torch.arange)
    nbytes = sum(tensor.nbytes for tensor in concatenate(MLP.data()))
    objective = ma.Objective(MLP.model(), MLP.loss_fn, data, cache_bytes=nbytes - missing)
    objective.loss()
    before = data.passes
    for _ in range(3):
        objective.loss()
    assert data.passes - before == read
