"""The processes that torchrun starts for a study: each makes its share of the runs, the first one all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from msam_analysis.studies.jobs import Job

T = TypeVar("T")

# The others' runs may take days; a process that ends is noticed at once.
_PATIENCE = timedelta(days=365)


class Members:
    """The members of the default process group, or this process alone.

    ``rank``, ``count``: Which this one is, and how many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.count > 1 else None

    def share(self, jobs: Sequence[Job]) -> list[Job]:
        """Return this process's jobs: each goes, the dearest first, to who has least to do."""
        loads = [0.0] * self.count
        mine = []
        for job in sorted(jobs, key=lambda job: (-job.cost, job.directory.name)):
            who = loads.index(min(loads))
            loads[who] += job.cost
            mine += [job] if who == self.rank else []
        return mine

    def from_first(self, value: T) -> T:
        """Return the first process's value, to all."""
        if self.count == 1:
            return value
        first: T = self._all(value)[0]
        return first

    def check_alike(self, plan: object) -> None:
        """Make sure that all processes are about to make the same runs.

        Raises ValueError: One of them is not.
        """
        if self.count == 1:
            return
        first, *others = self._all(plan)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(
                    f"process {rank} plans other runs than process 0: expected the same command, data and versions in "
                    "every process"
                )

    def meet(self) -> None:
        """Wait for the others.

        Raises RuntimeError: One of them has ended.
        """
        if self.count > 1:
            self._all(None)

    def _all(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                "another process of this study has ended, see what it says: finished runs are kept, and the same "
                "command goes on from them"
            ) from error
        return values
