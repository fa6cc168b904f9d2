"""Measure grid points, each once: over the processes, into the file, under the eyes of whoever waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from msam_analysis.landscape.ranks import Ranks

_BLOCK_SECONDS = (0.2, 0.8)  # a block of points takes about this long: short enough to be written, long enough to pay


class Rows(Protocol):
    """What gives a row of numbers for each of some points."""

    def rows(self, coordinates: Sequence[Sequence[float]]) -> Tensor:
        """Return one row for each point."""


class Sweep:
    """The grid's points and what was measured at them.

    Parameters
    ----------
    source
        Gives the rows.
    coordinates
        Of every grid point, shape ``(points, dimensions)``.
    width
        Numbers in a row.
    size
        Points that the source computes at once.
    seconds
        What a point takes, about.
    ranks
        The processes that share the work.
    written
        Called after every block of points, by the first process.

    Attributes
    ----------
    table
        Shape ``(points, width)``, NaN where nothing was measured yet.
    measured
        Shape ``(points,)``.
    """

    def __init__(
        self,
        source: Rows,
        coordinates: Tensor,
        width: int,
        *,
        size: int,
        seconds: float,
        ranks: Ranks,
        written: Callable[[], None],
    ) -> None:
        self.source = source
        self.coordinates = coordinates.tolist()
        self.table = torch.full((len(coordinates), width), torch.nan, dtype=torch.float64)
        self.measured = torch.zeros(len(coordinates), dtype=torch.bool)
        self._size = size
        self._ranks = ranks
        self._written = written
        # Groups of one process in a block.
        self._together = max(1, int(_BLOCK_SECONDS[0] / max(ranks.slowest(seconds) * size, 1e-6)))
        self.bar: Any = None

    def put(self, place: int, row: Tensor) -> None:
        """Enter a row that is known already."""
        self.table[place] = row
        self.measured[place] = True

    def measure(self, places: Sequence[int]) -> None:
        """Measure those of some points that are still to be measured."""
        measured = self.measured.tolist()
        wanted = [place for place in places if not measured[place]]
        begin = 0
        while begin < len(wanted):
            start = time.monotonic()
            block = wanted[begin : begin + self._together * self._size * self._ranks.count]
            rows = self._rows(self._ranks.share(block, self._size))
            self.table[block] = self._ranks.gather(rows, len(block), self._size)
            self.measured[block] = True
            begin += len(block)
            self._adapt(self._ranks.slowest(time.monotonic() - start))
            self._written()
            if self.bar is not None:
                self.bar.update(len(block))

    def _rows(self, places: Sequence[int]) -> Tensor:
        if not places:  # a process without a share of the last block
            return self.table[:0]
        return self.source.rows([self.coordinates[place] for place in places])

    def _adapt(self, seconds: float) -> None:
        shortest, longest = _BLOCK_SECONDS
        if seconds < shortest:
            self._together *= 2
        elif seconds > longest:
            self._together = max(1, self._together // 2)

    @contextmanager
    def shown(self, *, progress: bool, total: int | None) -> Iterator[None]:
        """Show a progress bar inside; its rate counts what is measured now, not what a file already held."""
        if not progress or self._ranks.rank:
            yield
            return
        # Imported where it is used: in a notebook without widgets the import alone warns.
        from tqdm.auto import tqdm

        with tqdm(total=total, initial=int(self.measured.sum()), desc="loss slice", unit="point") as self.bar:
            yield
        self.bar = None
