"""Private streams in place of the global random generators, which belong to the caller."""

from __future__ import annotations

import os
import random
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Alone:
    """A lock that a thread may take again, and that a forked process gets rid of if a thread that is not there held it.

    ``with ALONE:`` Threads that share a private copy, the global random state or torch's flags pass one by one.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _LOCKS.add(self)

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; return whether it was taken."""
        return self._lock.acquire(blocking)

    def release(self) -> None:
        """Give the lock back, once for each time that it was taken."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def forked(self) -> None:
        """Look, in the child, whether the lock is free or the only thread's own; it is nobody's to give back else."""
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


_LOCKS: weakref.WeakSet[Alone] = weakref.WeakSet()
ALONE = Alone()


def _after_fork() -> None:
    for lock in list(_LOCKS):
        lock.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _global_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if _cuda() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda, mps


def _set_global_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda, mps = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.random.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
    if mps is not None:
        torch.mps.set_rng_state(mps)


def same_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Tell whether nothing was drawn from a stream between two of its states."""
    python, numpy, cpu, cuda, mps = zip(a, b, strict=True)
    tensors = [cpu, *zip(cuda[0] or (), cuda[1] or (), strict=True), *([mps] if mps[0] is not None else [])]
    return (
        python[0] == python[1]
        and all(np.array_equal(x, y) for x, y in zip(*numpy, strict=True))
        and all(torch.equal(x, y) for x, y in tensors)
    )


def drawn_indices(available: int, count: int, seed: int) -> Tensor:
    """Return ``count`` of the numbers below ``available``, drawn without replacement, in increasing order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:count].sort().values


def _cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


class RandomStream:
    """A stream of its own behind Python's, NumPy's and torch's global generators.

    Inside ``with stream:`` the global generators continue this stream. Outside they are the caller's, bit for bit as
    they were, also after an exception. The generators are everybody's: inside, :data:`ALONE` is held.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner: tuple[Any, ...] | None = None

    def __enter__(self) -> Self:
        """Put the stream in place of the global generators."""
        ALONE.acquire()
        try:
            self._outer = _global_state()
            if self._inner is None:
                self.restart(self._seed)
            else:
                _set_global_state(self._inner)
        except BaseException:
            ALONE.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._inner = _global_state()
            _set_global_state(self._outer)
        finally:
            ALONE.release()

    @property
    def state(self) -> tuple[Any, ...]:
        """The state of the stream, inside ``with stream:``; see :func:`same_state`."""
        return _global_state()

    def restart(self, seed: int) -> None:
        """Start anew from a seed, inside ``with stream:``; this is much cheaper than another stream."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        if _cuda():
            torch.cuda.manual_seed_all(seed)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(seed)
