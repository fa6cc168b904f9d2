"""What loops written for other packages do, and the answers to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.optim import Optimizer

from .shards import parted

__all__ = ["Closure", "evaluate_anew", "without_base"]

Closure = Callable[[], Any]
P = ParamSpec("P")


def without_base(init: Callable[P, None]) -> Callable[P, None]:
    """Let a constructor answer those who give it a base optimizer, as other packages want it."""

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for given in (*args[2:3], *(kwargs[key] for key in ("base_optimizer", "lr") if key in kwargs)):
            if isinstance(given, Optimizer | type):
                name = given.__name__ if isinstance(given, type) else type(given).__name__
                raise TypeError(
                    f"expected no base optimizer, got {name}; MSAM and SAM have SGD inside, AdamWMSAM and AdamWSAM "
                    "have AdamW: leave it out and pass lr, rho and the base's options."
                )
        init(*args, **kwargs)

    return checked


def evaluate_anew(closure: Closure, parameters: list[Tensor]) -> Any:
    """Return what a closure returns, if the gradients that it leaves are its own and hold none that were there before.

    The smallest gradient that is there is marked by NaN, and the mark has to go.

    Raises
    ------
    RuntimeError
        If the mark stays: the closure adds to what was there.
    """
    given, parts = [p for p in parameters if p.grad is not None], parted(parameters)
    sizes = list(map(Tensor.numel, parts(given)))
    smallest = min(filter(None, sizes), default=None)  # one without elements here holds no mark
    if smallest is None:
        return closure()
    left = given[sizes.index(smallest)]
    kept, mark = left.grad, torch.full_like(left, math.nan)
    left.grad = mark
    try:
        loss = closure()
        if left.grad is mark and parts([mark])[0].isnan().all():
            raise RuntimeError(
                "expected a closure that clears the gradients before it computes its own, got one that adds to those "
                "that were there; call zero_grad() first in the closure, or before step(closure), and for an "
                "accumulated gradient use first_step() and second_step()."
            )
    except BaseException:
        if left.grad is mark:
            left.grad = kept
        raise
    return loss
