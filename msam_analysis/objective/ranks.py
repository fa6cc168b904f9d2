"""The processes of ``torch.distributed``: each does its share of the work, and all get the whole result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


class Ranks:
    """The processes that measure together: those of the default group, or this one alone."""

    def __init__(self, *, together: bool = True) -> None:
        together = together and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    def share(self, items: Sequence[Item], size: int = 1, rank: int | None = None) -> Sequence[Item]:
        """Return the items of a process, this one by default: every ``count``-th group of ``size`` items."""
        if self.count == 1:
            return items
        groups = [items[start : start + size] for start in range(0, len(items), size)]
        return [item for group in groups[self.rank if rank is None else rank :: self.count] for item in group]

    def gather(self, rows: Tensor, items: int, size: int = 1) -> Tensor:
        """Return the rows of all items in their order, from the rows for this process's share."""
        if self.count == 1:
            return rows
        order = [item for rank in range(self.count) for item in self.share(range(items), size, rank)]
        every = torch.cat(self._all(rows))
        return torch.empty_like(every).index_copy_(0, torch.tensor(order), every)

    def slowest(self, seconds: float) -> float:
        """Return the longest duration among all processes."""
        return max(self._all(seconds))

    def from_first(self, value: Item) -> Item:
        """Return the value that the first process has."""
        if self.count == 1:
            return value
        values = [value if self.rank == 0 else None]
        dist.broadcast_object_list(values, src=0)
        received: Any = values[0]
        return received  # type: ignore[no-any-return]

    def check_alike(self, identity: Mapping[str, str]) -> None:
        """Raise ``ValueError`` unless all processes measure the same."""
        first, *others = self._all(dict(identity))
        for rank, other in enumerate(others, start=1):
            names = [name for name in first if other.get(name) != first[name]]
            if names:
                raise ValueError(
                    f"process {rank} measures something else than process 0: they differ in {' and '.join(names)}; "
                    "expected the same network, data and arguments in every process"
                )

    def _all(self, value: Item) -> list[Item]:
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values
