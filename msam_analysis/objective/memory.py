"""One budget for what measures hold beside a network: copies of batches, kept graphs, vectors of solvers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from msam_analysis.objective.batches import CACHE_BYTES

GRAPH_BYTES = 2 * 2**30
VECTOR_BYTES = 4 * 2**30
"""Bytes of vectors that a solver may hold by default, unless its smallest basis needs more."""


@dataclass(frozen=True)
class Memory:
    """Bytes that copies of the batches, kept graphs, and the vectors of one solver may take."""

    batches: int = CACHE_BYTES
    graphs: int = GRAPH_BYTES
    vectors: int = VECTOR_BYTES

    @classmethod
    def of(cls, total: int | None, graphs: int | None, batches: int | None) -> Memory:
        """Divide a budget: an eighth for batches, three eighths for graphs, half for vectors; what is given counts.

        Raises ValueError: One of them is no number of bytes.
        """
        for name, value in (("memory_bytes", total), ("graph_bytes", graphs), ("cache_bytes", batches)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be a number of bytes, a whole number of at least 0, got {value!r}")
        whole = cls() if total is None else cls(total // 8, 3 * total // 8, total // 2)
        return cls(
            whole.batches if batches is None else batches, whole.graphs if graphs is None else graphs, whole.vectors
        )


def vectors_in(memory: int, like: Tensor, size: int) -> int:
    """Return how many vectors of ``size`` entries of a tensor's type fit into so many bytes."""
    return memory // max(size * like.element_size(), 1)
