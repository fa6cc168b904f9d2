"""Private streams in place of the global random generators, which belong to the caller."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def _global_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda


def _set_global_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.random.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


class RandomStream:
    """A stream of its own behind Python's, NumPy's and torch's global generators.

    Inside ``with stream:`` the global generators continue this stream; outside they are the caller's, bit for bit as
    they were, also after an exception.

    Parameters
    ----------
    seed
        Where the stream starts.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        self._outer = _global_state()
        if self._inner is None:
            random.seed(self._seed)
            np.random.seed(self._seed % 2**32)
            torch.default_generator.manual_seed(self._seed)
            if self._outer[-1] is not None:
                torch.cuda.manual_seed_all(self._seed)
        else:
            _set_global_state(self._inner)

    def __exit__(self, *_: object) -> None:
        self._inner = _global_state()
        _set_global_state(self._outer)
