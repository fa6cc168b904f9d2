"""Arithmetic on lists of tensors: one norm over all of them, and ``w ← w + c d`` without reading ``c`` on the host."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

_PIECE = 1 << 17  # elements a sum in float32 may run over on the CPU before it loses digits

__all__ = ["add_scaled_", "global_norm", "multiply_", "scaled", "widest_dtype"]


def widest_dtype(tensors: list[Tensor]) -> torch.dtype:
    """Return the dtype of scalars that belong to all the tensors: float64 if one of them has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Return ``sqrt(Σ ‖t‖²)`` as a 0-dimensional tensor on the first tensor's device.

    Sums run in float32 at least, whatever the tensors' dtype; an empty list has norm 0.
    """
    if not tensors:
        return torch.zeros(())
    squares: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    others: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        whole = tensor.detach()
        if whole.is_cpu and whole.is_contiguous() and whole.dtype in (torch.float32, torch.float64):
            # a dot product is faster than a norm, most of all where the tensor is in the cache
            squares[whole.dtype] += [torch.dot(part, part) for part in _parts(whole)]
        else:
            others[whole.dtype].append(whole)
    norms = [torch.stack(same).sum(dtype=torch.float64).sqrt() for same in squares.values()]
    for same in others.values():
        norms += torch._foreach_norm(same, 2, dtype=widest_dtype(same))
    device, dtype = tensors[0].device, widest_dtype(tensors)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device, dtype, non_blocking=True) for n in norms]))
    return norm


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a contiguous tensor as flat views of ``_PIECE`` elements at most."""
    flat = tensor.view(-1)
    return (flat,) if flat.numel() <= _PIECE else torch.split(flat, _PIECE)


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
