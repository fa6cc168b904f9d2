"""Where flat vectors lie: whole in every process, or in parts, one in each process of a group.

A solver works on its process's part alone; whatever sums over entries goes through its :class:`Space`, so that every
process gets the same numbers and takes the same decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msam_analysis.objective.vectors import gaussian, gaussian_rows, widest


class Space:
    """The space of flat vectors with ``size`` entries, all of which every process has.

    Attributes
    ----------
    size
        Number of entries of a whole vector.
    here
        Number of entries that this process has; a vector or a column has this length.
    most
        Number of entries of the process that has most, which decides what fits into memory.
    """

    def __init__(self, size: int) -> None:
        self.size = self.here = self.most = size

    def __repr__(self) -> str:
        """Say how many entries a vector has, and how many of them are here."""
        return f"{type(self).__name__}({self.size} entries, {self.here} here)"

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum over the processes of a small tensor that each summed over its own entries."""
        return part

    def any(self, condition: Tensor) -> bool:
        """Return whether any entry of a condition is true, in any process."""
        return bool(condition.any())

    def sign(self, vector: Tensor) -> float:
        """Return the sign of the entry of largest magnitude."""
        return float(vector[vector.abs().argmax()].sign())

    def part(self, whole: Tensor) -> Tensor:
        """Return this process's entries of a whole vector, or rows of a whole matrix."""
        return whole

    def restricted(self, chosen: Tensor) -> Space:
        """Return the space of vectors that have only some of the entries; ``chosen``: the indices of this process's."""
        return Space(len(chosen))

    def first(self) -> bool:
        """Return whether this process has the first entry of a whole vector."""
        return self.here > 0

    def dot(self, one: Tensor, two: Tensor) -> Tensor:
        """Return the inner product of two vectors, 0-dimensional."""
        return self.sum(one.dot(two))

    def product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return ``rows @ columns``, summed over entries: shape ``(p, here)`` by ``(here, q)`` or ``(here,)``."""
        return self.sum(rows @ columns)

    def norm(self, vectors: Tensor, dim: int | None = None) -> Tensor:
        """Return the Euclidean norm of a vector, or of every vector along the dimension ``dim`` of a matrix."""
        length: Tensor = vectors.norm() if dim is None else vectors.norm(dim=dim)
        return length

    def gaussian(self, columns: int, *, seed: int, like: Tensor, use: str = "") -> Tensor:
        """Return standard Gaussian columns, shape ``(here, columns)``; see :func:`.vectors.gaussian`.

        The whole vectors are the same, however they are divided.
        """
        return self.part(gaussian(self.size, columns, seed=seed, like=like, use=use))

    def orthonormalize(self, vectors: Tensor, against: Tensor | None = None) -> Tensor:
        """Return an orthonormal basis of the columns of ``vectors`` without their parts in span(``against``).

        ``against`` has orthonormal columns. Two passes of classical Gram-Schmidt ("twice is enough", Giraud et al.
        2005), then a rank-revealing QR. Directions that are dependent to working precision are dropped.
        """
        scale = self.norm(vectors, dim=0)
        vectors = torch.where(scale > 0, vectors / scale, 0.0)  # zeros are dropped with what depends on others
        known = vectors[:, :0] if against is None else against
        for _ in range(2 if known.shape[1] else 0):
            vectors = vectors - known @ self.product(known.T, vectors)
        if vectors.shape[1] == 0:
            return vectors
        q, r = self._qr(vectors)
        # The singular vectors of the small factor find dependent columns in any order.
        left, singular, _ = torch.linalg.svd(r, full_matrices=False)
        q, keep = q @ left, singular > 100 * torch.finfo(vectors.dtype).eps
        if known.shape[1]:
            # A column that was nearly inside span(against) is mostly rounding error, which QR scaled up.
            q = q - known @ self.product(known.T, q)
            q = q / self.norm(q, dim=0).clamp_min(torch.finfo(q.dtype).tiny)
        kept: Tensor = q[:, keep]
        return kept

    def _qr(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(vectors)
        return q, r


class DividedSpace(Space):
    """The space of vectors of which every process of a group has some entries, and no entry is in two processes.

    Parameters
    ----------
    size
        Number of entries of a whole vector.
    pieces
        The entries that this process has, as slices of a whole vector, in the order in which its part holds them.
    most
        Number of entries of the process that has most.
    group
        The process group; default: all processes.
    """

    def __init__(self, size: int, pieces: Sequence[slice], most: int, group: Any = None) -> None:
        super().__init__(size)
        self.most = most
        self.here = sum(piece.stop - piece.start for piece in pieces)
        self._pieces = tuple(pieces)
        self._group = group

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum over the processes of a small tensor that each summed over its own entries."""
        total = part.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total

    def any(self, condition: Tensor) -> bool:
        """Return whether any entry of a condition is true, in any process."""
        return bool(self.sum(condition.any().float()) > 0)

    def sign(self, vector: Tensor) -> float:
        """Return the sign of the entry of largest magnitude."""
        ends = torch.stack([torch.cat([vector.new_zeros(1), side]).max() for side in (vector, -vector)])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._group)
        return float((ends[0] >= ends[1]).to(ends.dtype) * 2 - 1)

    def part(self, whole: Tensor) -> Tensor:
        """Return this process's entries of a whole vector, or rows of a whole matrix."""
        return torch.cat([whole[piece] for piece in self._pieces]) if self._pieces else whole[:0]

    def gaussian(self, columns: int, *, seed: int, like: Tensor, use: str = "") -> Tensor:
        """Return standard Gaussian columns, shape ``(here, columns)``; see :func:`.vectors.gaussian`.

        Every process draws the whole vectors, a part at a time, and keeps its own entries.
        """
        kept: list[list[Tensor]] = [[] for _ in self._pieces]
        for start, rows in gaussian_rows(self.size, columns, seed=seed, use=use):
            for piece, found in zip(self._pieces, kept, strict=True):
                own = rows[max(piece.start - start, 0) : max(piece.stop - start, 0)]
                if len(own):
                    found.append(own.to(device=like.device, dtype=like.dtype, copy=True))
        return torch.cat([like.new_empty(0, columns), *(rows for found in kept for rows in found)])

    def restricted(self, chosen: Tensor) -> Space:
        """Return the space of vectors that have only some of the entries, those of one process after the other's."""
        rank, counts = dist.get_rank(self._group), chosen.new_zeros(dist.get_world_size(self._group))
        counts[rank] = len(chosen)
        every = self.sum(counts).tolist()
        start = sum(every[:rank])
        return DividedSpace(sum(every), [slice(start, start + len(chosen))], max(every), self._group)

    def first(self) -> bool:
        """Return whether this process has the first entry of a whole vector."""
        return any(piece.start == 0 < piece.stop for piece in self._pieces)

    def norm(self, vectors: Tensor, dim: int | None = None) -> Tensor:
        """Return the Euclidean norm of a vector, or of every vector along the dimension ``dim`` of a matrix."""
        own = super().norm(vectors, dim)
        # In the widest precision, squares of the narrower ones neither overflow nor vanish.
        return self.sum(own.to(widest(own.device)).square()).sqrt().to(own.dtype)

    def _qr(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the QR decomposition of a tall matrix from those of its parts (Demmel et al. 2012, TSQR)."""
        count, width = dist.get_world_size(self._group), vectors.shape[1]
        # A part of fewer rows than columns is filled up with zeros, so that all factors are alike.
        missing = max(width - len(vectors), 0)
        own, factor = torch.linalg.qr(torch.cat([vectors, vectors.new_zeros(missing, width)]))
        factors = [torch.empty_like(factor) for _ in range(count)]
        dist.all_gather(factors, factor.contiguous(), group=self._group)
        joined, r = torch.linalg.qr(torch.cat(factors))
        first = dist.get_rank(self._group) * width
        return (own @ joined[first : first + width])[: len(vectors)], r
