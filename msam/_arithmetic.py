"""Arithmetic on lists of tensors: one norm over all of them, and ``w ← w + c d`` without reading ``c`` on the host."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

_PIECE = 1 << 17  # elements a sum in float32 may run over on the CPU before it loses digits

__all__ = ["add_scaled_", "global_norm", "scaled", "widest_dtype"]


def widest_dtype(tensors: list[Tensor]) -> torch.dtype:
    """Return the dtype of scalars that belong to all the tensors: float64 if one of them has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Return ``sqrt(Σ ‖t‖²)`` as a 0-dimensional tensor on the first tensor's device.

    Sums run in float32 at least, whatever the tensors' dtype; an empty list has norm 0.
    """
    if not tensors:
        return torch.zeros(())
    kinds: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        whole = tensor.detach()
        pieces = whole.view(-1).split(_PIECE) if whole.is_cpu and whole.is_contiguous() else (whole,)
        kinds[tensor.dtype].extend(pieces)
    device = tensors[0].device
    norms = [
        norm.to(device, widest_dtype(tensors), non_blocking=True)
        for same in kinds.values()
        for norm in torch._foreach_norm(same, 2, dtype=widest_dtype(same))
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
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
