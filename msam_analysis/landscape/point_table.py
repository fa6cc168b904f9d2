"""The points of a grid and the rows of numbers measured there: each point once, shared by the processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from msam_analysis.objective.ranks import Ranks

_BLOCK_SECONDS = (0.2, 0.8)  # least and most time for a block of points: the file is up to date, and writing is cheap


class PointTable:
    """The points of a grid, with the rows that were measured there so far.

    Parameters
    ----------
    measure
        Returns one row for each of some coordinates.
    coordinates
        Coordinates of every grid point, shape ``(points, dimensions)``.
    width
        Numbers in a row.
    size
        Points that ``measure`` computes at once.
    seconds
        Approximate duration of a point.
    ranks
        The processes that measure.
    together
        Whether all of them measure every point together; otherwise they share the points.
    written
        Called after every block of points.

    Attributes
    ----------
    rows
        The rows, shape ``(points, width)``; NaN where nothing was measured yet.
    measured
        Whether each point was measured, shape ``(points,)``.
    """

    def __init__(
        self,
        measure: Callable[[Sequence[Sequence[float]]], Tensor],
        coordinates: Tensor,
        width: int,
        *,
        size: int,
        seconds: float,
        ranks: Ranks,
        together: bool,
        written: Callable[[], None],
    ) -> None:
        self.coordinates = coordinates.tolist()
        self.rows = torch.full((len(coordinates), width), torch.nan, dtype=torch.float64)
        self.measured = torch.zeros(len(coordinates), dtype=torch.bool)
        self._measure = measure
        self._size = size
        self._ranks = ranks
        self._sharing = Ranks(together=False) if together else ranks
        self._written = written
        # Groups of `size` points for each process in a block.
        self._groups = max(1, int(_BLOCK_SECONDS[0] / max(ranks.slowest(seconds) * size, 1e-6)))
        self.bar: Any = None

    def measure(self, points: Sequence[int]) -> None:
        """Measure those of some points, given by their index, that are not measured yet."""
        measured = self.measured.tolist()
        wanted = [point for point in points if not measured[point]]
        begin, (shortest, longest) = 0, _BLOCK_SECONDS
        while begin < len(wanted):
            start = time.monotonic()
            block = wanted[begin : begin + self._groups * self._size * self._sharing.count]
            mine = [self.coordinates[point] for point in self._sharing.share(block, self._size)]
            rows = self._measure(mine) if mine else self.rows[:0]  # the last block may leave a process without a share
            self.rows[block] = self._sharing.gather(rows, len(block), self._size)
            self.measured[block] = True
            begin += len(block)
            seconds = self._ranks.slowest(time.monotonic() - start)
            if seconds < shortest:
                self._groups *= 2
            elif seconds > longest:
                self._groups = max(1, self._groups // 2)
            self._written()
            if self.bar is not None:
                self.bar.update(len(block))

    @contextmanager
    def shown(self, *, progress: bool, total: int | None) -> Iterator[None]:
        """Show a progress bar inside; its rate counts the points measured now, not those from a file."""
        if not progress or self._ranks.rank:
            yield
            return
        # Imported where it is used: in a notebook without widgets the import alone warns.
        from tqdm.auto import tqdm

        with tqdm(total=total, initial=int(self.measured.sum()), desc="loss slice", unit="point") as self.bar:
            yield
        self.bar = None
