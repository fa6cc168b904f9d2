"""Arithmetic on lists of tensors: one norm over all of them, and ``w ← w + c d`` without reading ``c`` on the host."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE = 1 << 17  # elements a sum in float32 may run over on the CPU before it loses digits

_CACHED = 1 << 17  # elements of three float32 tensors that fit a processor's own cache

__all__ = ["add_scaled_", "global_norm", "multiply_", "pieces", "scaled", "widest_dtype"]


def widest_dtype(tensors: list[Tensor]) -> torch.dtype:
    """Return the dtype of scalars that belong to all the tensors: float64 if one of them has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Return ``sqrt(Σ ‖t‖²)`` as a 0-dimensional tensor on the first tensor's device.

    Sums run in float32 at least, whatever the tensors' dtype; an empty list has norm 0.
    """
    if not tensors:
        return torch.zeros(())
    squares, others = defaultdict(list), defaultdict(list)
    for tensor in tensors:
        whole = tensor.detach()
        if whole.is_cpu and whole.is_contiguous() and whole.dtype in (torch.float32, torch.float64):
            # a dot product reads twice as fast as a norm does
            squares[whole.dtype] += [torch.dot(part, part) for part in whole.view(-1).split(_PIECE)]
        else:
            others[whole.dtype].append(whole)
    norms = [torch.stack(same).sum(dtype=torch.float64).sqrt() for same in squares.values()]
    for same in others.values():
        norms += torch._foreach_norm(same, 2, dtype=widest_dtype(same))
    device, dtype = tensors[0].device, widest_dtype(tensors)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device, dtype, non_blocking=True) for n in norms]))
    return norm


def add_scaled_(weights: list[Tensor], directions: list[Tensor], factor: Tensor, *, finite: bool = True) -> None:
    """Add ``factor · direction`` to each weight in place; ``factor`` is 0-dimensional.

    With ``finite=False`` a factor that is not a number adds nothing, whatever the directions hold.
    """
    if not weights:
        return
    if weights[0].is_cpu and factor.is_cpu and not torch.compiler.is_compiling():
        # on the CPU a scalar is free to read and spares the product its own memory
        multiple = factor.item()
        if finite or not math.isnan(multiple):
            torch._foreach_add_(weights, directions, alpha=multiple)
        return
    factors = {device: factor.to(device, non_blocking=True) for device in {w.device for w in weights}}
    for device, local in factors.items():
        here = [i for i, w in enumerate(weights) if w.device == device]
        along = [directions[i] for i in here]
        product = list(torch._foreach_mul(along, local)) if finite else scaled(along, local)
        torch._foreach_add_([weights[i] for i in here], product)


def scaled(directions: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Return ``factor · direction`` for each direction, in its dtype; a 0-dimensional ``factor`` of NaN gives zeros."""
    factors = {device: factor.to(device, non_blocking=True) for device in {d.device for d in directions}}
    return [(d * factors[d.device]).masked_fill_(factors[d.device].isnan(), 0.0) for d in directions]


def multiply_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor in place by a 0-dimensional ``factor``."""
    for device in {t.device for t in tensors}:
        torch._foreach_mul_([t for t in tensors if t.device == device], factor.to(device, non_blocking=True))


def pieces(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Cut lists of contiguous tensors, of the same shapes in each list, into runs that fit the processors' caches.

    Yields
    ------
    tuple of lists
        Flat views, one list for each list given: all that is done to a run before the next one finds it in the cache.
    """
    size = _CACHED * torch.get_num_threads()
    run: list[tuple[Tensor, ...]] = []
    length = 0
    for tensors in zip(*lists, strict=True):
        for part in zip(*(t.detach().view(-1).split(size) for t in tensors), strict=True):
            if run and length + part[0].numel() > size:
                yield tuple(map(list, zip(*run, strict=True)))
                run, length = [], 0
            run.append(part)
            length += part[0].numel()
    if run:
        yield tuple(map(list, zip(*run, strict=True)))
