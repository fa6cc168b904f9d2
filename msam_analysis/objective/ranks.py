"""The processes of ``torch.distributed``: each does its share of the work, and all get the whole result.

What only one process knows of, an error or an interrupt, would leave the others waiting for ever. So processes work by
themselves inside :meth:`Ranks.apart` alone, and tell one another at its end how it went.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from msam_analysis.objective.vectors import widest

Item = TypeVar("Item")
Sharing = Literal[False, True, "split"]
"""How processes share the batches of an objective."""

_TOLD = "_told_to_all_processes"  # the mark of an error that all processes know of
_ALIKE = 1e-6  # of their norm: as much may sums differ that processes of unlike hardware take over one vector


@contextlib.contextmanager
def _exchanging() -> Iterator[None]:
    """Inside, processes are busy with one another: what is raised, they all know, or nobody could listen any more."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError) and not known_to_all(error):  # of the backend
            first = (str(error).splitlines() or [""])[0]
            lost = RuntimeError(f"a process has ended while this one waited for it ({first}): see what it said last")
            setattr(lost, _TOLD, True)
            raise lost from error
        setattr(error, _TOLD, True)
        raise


class Ranks:
    """The processes that measure together: those of the default group, or this one alone."""

    def __init__(self, *, together: bool = True) -> None:
        together = together and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        # gloo serves main memory, and GPUs by way of it; nccl serves GPUs alone.
        served = str(dist.get_backend_config()) if together else "cpu"
        self._served = {kind for kind in ("cpu", "cuda") if f"{kind}:" in served}
        self._place = torch.device("cuda" if self._served == {"cuda"} else "cpu")

    # ------------------------------------------------------------------------------------------------ sums over batches

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[list[Tensor]]:
        """Inside, each process works by itself; at the end, all raise what one of them has raised.

        ``what`` says what all of them do, in words. Tensors that are put into the list must be the same in all
        processes, such as the point: ``ValueError`` in all of them if they are not, or if they do different things.
        """
        alike: list[Tensor] = []
        if self.count == 1:
            yield alike
            return
        try:
            yield alike
        except BaseException as error:
            if not known_to_all(error):
                self._meet(what, (), error)
            raise
        self._meet(what, alike, None)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return a tensor, after adding to it in place what it holds in the other processes."""
        if self.count == 1:
            return tensor
        with _exchanging():
            return self._reduced(tensor, dist.ReduceOp.SUM)

    def mean(self, weight: float, *sums: Tensor) -> tuple[Tensor, ...]:
        """Return weighted sums over batches as means, from sums and a weight over this process's; overwrites them."""
        if self.count == 1:
            return tuple(total / weight for total in sums)
        with _exchanging():
            numbers = [total for total in sums if total.ndim == 0]
            together = self.sum(torch.tensor([weight, *map(float, numbers)], dtype=torch.float64))
            for total, whole in zip(numbers, together[1:], strict=True):
                total.copy_(whole)
            for total in sums:
                if total.ndim:
                    self.sum(total)
            weight = float(together[0])
        return tuple(total / weight for total in sums)

    def tensors_of_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as the first process has them; names, shapes and data types are the same in all."""
        if self.count == 1 or not tensors:
            return dict(tensors)
        with self.apart("taking over the tensors of the first process"):
            bytes_of = [tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors.values()]
            packed = torch.cat([each.to(self._place) for each in bytes_of])
        with _exchanging():
            dist.broadcast(packed, src=0)
        parts = packed.split([len(each) for each in bytes_of])
        return {
            name: part.clone().view(tensor.dtype).view(tensor.shape).to(tensor.device)
            for (name, tensor), part in zip(tensors.items(), parts, strict=True)
        }

    # ------------------------------------------------------------------------------------------------ things, and turns

    def everyone(self, value: Item) -> list[Item]:
        """Return what every process has, in their order: anything that can be pickled."""
        if self.count == 1:
            return [value]
        with self.apart("exchanging what each process has"):
            mine = pickle.dumps(value)
        with _exchanging():
            return [_unpacked(one) for one in self._swapped(mine)]

    def anywhere(self, fact: bool) -> bool:
        """Return whether something holds in any process."""
        return any(self.everyone(fact))

    def from_first(self, value: Item) -> Item:
        """Return the value that the first process has."""
        if self.count == 1:
            return value
        with self.apart("taking over what the first process has"):
            values = [pickle.dumps(value) if self.rank == 0 else b""]
        with _exchanging():
            dist.broadcast_object_list(values, src=0)
        received: Item = _unpacked(values[0])
        return received

    def slowest(self, seconds: float) -> float:
        """Return the longest duration among all processes."""
        return max(self.everyone(seconds))

    def share(self, items: Sequence[Item], size: int = 1, rank: int | None = None) -> Sequence[Item]:
        """Return the items of a process, this one by default: every ``count``-th group of ``size`` items."""
        if self.count == 1:
            return items
        groups = [items[start : start + size] for start in range(0, len(items), size)]
        return [item for group in groups[self.rank if rank is None else rank :: self.count] for item in group]

    def gather(self, rows: Tensor, items: int, size: int = 1) -> Tensor:
        """Return the rows of all items in their order, from the rows for this process's share."""
        if self.count == 1:
            return rows
        order = [item for rank in range(self.count) for item in self.share(range(items), size, rank)]
        every = torch.cat(self.everyone(rows))
        return torch.empty_like(every).index_copy_(0, torch.tensor(order), every)

    def check_alike(self, identity: Mapping[str, str], advice: str = "") -> None:
        """Raise ``ValueError`` unless all processes measure the same; ``advice`` ends the sentence."""
        first, *others = self.everyone(dict(identity))
        for rank, other in enumerate(others, start=1):
            names = [name for name in first if other.get(name) != first[name]]
            if names:
                raise ValueError(
                    f"process {rank} measures something else than process 0: they differ in {' and '.join(names)}; "
                    f"expected the same network, data and arguments in every process{advice}"
                )

    # ----------------------------------------------------------------------------------------------------------- inside

    def _reduced(self, tensor: Tensor, how: Any) -> Tensor:
        there = tensor if tensor.device.type in self._served else tensor.to(self._place)
        dist.all_reduce(there, op=how)
        return tensor if there is tensor else tensor.copy_(there)

    def _swapped(self, mine: object) -> list[Any]:
        theirs: list[Any] = [None] * self.count
        dist.all_gather_object(theirs, mine)
        return theirs

    @_exchanging()
    def _meet(self, what: str, alike: Iterable[Tensor], error: BaseException | None) -> None:
        """Tell the others how it went; raise where another process failed, or does something else."""
        doing, (mark, size) = float(zlib.crc32(what.encode())), (0.0, 0.0) if error else _mark(alike)
        told = torch.tensor([error is not None, doing, -doing, mark, -mark, size], dtype=torch.float64)
        failed, most, least, high, low, largest = self._reduced(told, dist.ReduceOp.MAX).tolist()
        if failed:
            self._raise(error)
        elif most != -least:
            doings = self._swapped(what)
            rank, other = next((rank, one) for rank, one in enumerate(doings) if one != doings[0])
            raise ValueError(
                f"process {rank} does something else than process 0 ({other}, not {doings[0]}): expected the same "
                "calls in the same order in every process"
            )
        elif high + low > _ALIKE * largest:
            raise ValueError(
                f"the processes differ in their weights or vectors ({what}): expected the same weights, vectors and "
                "seeds in every process"
            )

    def _raise(self, error: BaseException | None) -> None:
        """Raise the first error of another process, in its words; leave raising to those that have their own."""
        kind = type(error)
        told = None if error is None else (kind.__module__, kind.__qualname__, str(error))
        theirs = self._swapped(told)
        if error is not None:
            setattr(error, _TOLD, True)
            return
        rank, (module, name, text) = next((rank, one) for rank, one in enumerate(theirs) if one is not None)
        found = getattr(sys.modules.get(module), name, None)
        made: BaseException = RuntimeError(f"process {rank}: {name}: {text}")
        with contextlib.suppress(TypeError):  # a class that wants other arguments
            if isinstance(found, type) and issubclass(found, BaseException):
                made = found(f"process {rank}: {text}")
        setattr(made, _TOLD, True)
        raise made


def known_to_all(error: BaseException) -> bool:
    """Return whether there is no use in telling the other processes of an error."""
    return hasattr(error, _TOLD)


def _mark(tensors: Iterable[Tensor]) -> tuple[float, float]:
    """Return a sum over all entries, which tells vectors apart, and their norm; zeros where they are not finite."""
    sums, squares = [], []
    for tensor in tensors:
        plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        wide = plain if plain.is_floating_point() else plain.to(widest(plain.device))
        sums.append(wide.sum(dtype=widest(wide.device)))
        squares.append(torch.linalg.vector_norm(wide, dtype=widest(wide.device)).square())
    if not sums:
        return 0.0, 0.0
    mark, size = torch.stack([torch.stack(sums).sum(), torch.stack(squares).sum().sqrt()]).tolist()
    return (mark, size) if size < float("inf") else (0.0, 0.0)


def _unpacked(packed: bytes) -> Any:
    return pickle.loads(packed)  # noqa: S301 - it comes from a process of this very program, not from a file
