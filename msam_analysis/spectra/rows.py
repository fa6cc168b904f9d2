"""Vectors as rows of one reserved block of memory, in full or in half precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 2**20  # entries in which rows are combined, so that results need no second copy
_HALF_BLOCK = 2**18  # the same for rows that are widened for it
ROUNDED = 2.0**-11
"""The largest part of an entry that rounding to float16 takes."""


class Rows:
    """Up to ``capacity`` vectors, each a row.

    In float16 a row is stored times a factor that makes its entries about 1, since those of a unit vector of many
    entries are too small for the format. It is widened piece by piece wherever it takes part.

    Parameters
    ----------
    capacity, size
        Rows, and entries of each.
    dtype, device
        Of the vectors that go in and come out.
    half
        Whether rows are stored in float16.
    """

    def __init__(self, capacity: int, size: int, *, dtype: torch.dtype, device: torch.device, half: bool) -> None:
        self._stored = torch.empty(capacity, size, dtype=torch.float16 if half else dtype, device=device)
        self._factors = torch.ones(capacity, 1, dtype=dtype, device=device) if half else None
        self.dtype, self.half = dtype, half

    def write(self, first: int, vectors: Tensor) -> Tensor:
        """Store vectors, shape ``(p, size)``, as rows from ``first`` on; return them as they are stored."""
        last = first + len(vectors)
        if self._factors is None:
            self._stored[first:last] = vectors
            return self._stored[first:last]
        length, one = vectors.norm(dim=1, keepdim=True), torch.ones((), dtype=self.dtype, device=vectors.device)
        factors = torch.where(length > 0, length / max(vectors.shape[1], 1) ** 0.5, one)
        self._stored[first:last] = vectors / factors
        # A row of few large entries would get another length, and its vector another value.
        own = torch.linalg.vector_norm(self._stored[first:last], dim=1, keepdim=True, dtype=self.dtype)
        self._factors[first:last] = torch.where(own > 0, length / own, one)
        return self.piece(first, last)

    def piece(self, first: int, last: int, entries: slice = slice(None)) -> Tensor:
        """Return some rows, or some entries of each, in full precision: a view where they are stored so."""
        stored = self._stored[first:last, entries]
        return stored if self._factors is None else stored.to(self.dtype) * self._factors[first:last]

    def blocks(self) -> Iterator[slice]:
        """Iterate over pieces of all entries that are small enough to be combined on the side."""
        step = _BLOCK if self._factors is None else _HALF_BLOCK
        return (slice(first, first + step) for first in range(0, max(self._stored.shape[1], 1), step))

    def times(self, count: int, vectors: Tensor) -> Tensor:
        """Return the inner products of the first rows with a vector or with columns, over this process's entries."""
        if self._factors is None:
            return self._stored[:count] @ vectors
        total = torch.zeros((count, *vectors.shape[1:]), dtype=self.dtype, device=vectors.device)
        for entries in self.blocks():
            total += self.piece(0, count, entries) @ vectors[entries]
        return total

    def combined(self, coefficients: Tensor) -> Tensor:
        """Return combinations of the first rows: coefficients of shape ``(count,)`` or ``(p, count)`` times them."""
        count = coefficients.shape[-1]
        if self._factors is None:
            return coefficients @ self._stored[:count]
        return torch.cat([coefficients @ self.piece(0, count, entries) for entries in self.blocks()], dim=-1)

    def replace(self, coefficients: Tensor) -> None:
        """Put combinations of the first rows, ``coefficients`` of shape ``(p, count)`` times them, in their place."""
        if self._factors is not None:
            self.write(0, self.combined(coefficients))
            return
        new, count = coefficients.shape
        for entries in self.blocks():
            self._stored[:new, entries] = coefficients @ self._stored[:count, entries]

    def squared_lengths(self, count: int) -> Tensor:
        """Return about the squares of the lengths of the first rows in this process, where they are in float16."""
        factors = torch.zeros(count, 1) if self._factors is None else self._factors[:count]
        return factors[:, 0].square() * self._stored.shape[1]
