"""Data as batches: in which forms they may come, in which order, and what reading them leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

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


@dataclass
class Pair:
    """One batch with names."""

    x: Tensor
    y: Tensor


@dataclass
class Folder:
    """Batches in an object that is a data class, but no batch."""

    name: str

    def __iter__(self) -> Iterator[Any]:
        return iter(MLP.data())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(MLP.data())


def named(model: nn.Module, batch: Any) -> Tensor:
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch.x, batch.y)
    return F.cross_entropy(model(x), y)


SOURCES: dict[str, tuple[Callable[[], Any], Any, int]] = {
    "one batch": (lambda: concatenate(MLP.data()), MLP.loss_fn, 1),
    "one batch, a mapping": (lambda: dict(zip("xy", concatenate(MLP.data()), strict=True)), named, 1),
    "one batch, a data class": (lambda: Pair(*concatenate(MLP.data())), named, 1),
    "a list of data classes": (lambda: [Pair(*batch) for batch in MLP.data()], named, 3),
    "a data class of batches": (lambda: Folder("training"), MLP.loss_fn, 3),
    "an iterable data set of batches": (Stream, MLP.loss_fn, 3),
    "a loader without batches of its own": (lambda: DataLoader(Stream(), batch_size=None), MLP.loss_fn, 3),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_samples_in_another_form_have_the_same_loss(source: str) -> None:
    make, loss_fn, batches = SOURCES[source]
    objective = ma.Objective(MLP.model(), loss_fn, make())
    expected = F.cross_entropy(MLP.model().eval()(concatenate(MLP.data())[0]), concatenate(MLP.data())[1])
    assert float(objective.loss()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert len(objective.batches) == batches


def test_reading_a_loader_draws_from_no_generator_of_the_callers() -> None:
    """A loader takes a seed for its workers from torch's generator, or from its own, at every pass."""
    own = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(*concatenate(MLP.data())), batch_size=8, generator=own)
    others = DataLoader(TensorDataset(*concatenate(MLP.data())), batch_size=8)
    before, states = own.get_state(), torch.get_rng_state()
    for data in (loader, others):
        ma.Objective(MLP.model(), MLP.loss_fn, data, cache_bytes=0).loss()
    assert torch.equal(own.get_state(), before)
    assert torch.equal(torch.get_rng_state(), states)
