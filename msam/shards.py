"""Parameters that are divided among processes: the part that lies here, and sums over all parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["WHOLE", "Groups", "groups_of", "here", "like", "maker_that_divides", "part_of", "parted", "sum_over"]

WHOLE = frozenset((Tensor, nn.Parameter))
"""Types of tensors that are no DTensors for certain: a look at them costs less than a look at every tensor."""

Groups = tuple[Any, ...]
"""Process groups over which the parts of a tensor are divided, one after the other."""


def here(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of the tensors that lie in this process; what is written to them is written to the tensors."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def parted(tensors: Iterable[Tensor]) -> Callable[[Iterable[Tensor]], list[Tensor]]:
    """Return what makes lists of the parts of such tensors: :func:`here`, or ``list`` where none is a DTensor."""
    return list if WHOLE.issuperset(map(type, tensors)) else here


def like(tensors: Iterable[Tensor], parts: Iterable[Tensor]) -> list[Tensor]:
    """Return DTensors with these parts where the tensors are DTensors, elsewhere the parts themselves."""
    return [_with_part(t, part) if hasattr(t, "to_local") else part for t, part in zip(tensors, parts, strict=True)]


def _with_part(tensor: Tensor, part: Tensor) -> Tensor:
    made = torch.empty_like(tensor, requires_grad=False)
    here([made])[0].copy_(part)
    return made


def part_of(tensor: Any, whole: Tensor) -> Tensor:
    """Return ``whole``, which all processes have, divided as the tensor is."""
    if not hasattr(tensor, "to_local"):
        return whole
    from torch.distributed.tensor import distribute_tensor  # where the tensor is one, it is imported already

    return distribute_tensor(whole, tensor.device_mesh, tensor.placements)


def groups_of(tensor: Any) -> Groups:
    """Return the groups that hold the parts of a tensor.

    Raises
    ------
    ValueError
        If the parts are to be added up first.
    """
    if not hasattr(tensor, "to_local"):
        return ()
    for placement in tensor.placements:
        if placement.is_partial():
            raise ValueError(
                f"expected tensors that are sharded or replicated, got the placements {tensor.placements}; "
                "redistribute them before the step."
            )
    mesh = tensor.device_mesh
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(tensor.placements) if placement.is_shard())


def sum_over(groups: Groups, value: Tensor) -> Tensor:
    """Return the sum of a 0-dimensional tensor over all processes of the groups."""
    for group in groups:
        dist.all_reduce(value, group=group)
    return value


def maker_that_divides() -> Any:
    """Return the process group of the optimizer that is making this one for its own share, or None.

    :class:`torch.distributed.optim.ZeroRedundancyOptimizer` gives each process an optimizer of some parameters, and
    nothing that says so. It is found among the callers: another optimizer that has a process group.
    """
    frame = sys._getframe(1)
    while frame is not None:
        maker = frame.f_locals.get("self")
        group = getattr(maker, "process_group", None) if isinstance(maker, Optimizer) else None
        if group is not None:
            return group
        frame = frame.f_back  # type: ignore[assignment]
    return None
