"""Record probes while a training loop runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from msam_analysis.probes import Probe

if TYPE_CHECKING:
    from typing_extensions import Self


class Monitor:
    """Calls probes at every ``every``-th step of an optimizer and keeps what they return.

    It attaches to the optimizer's own hooks: the loop does not change. With the optimizers of :mod:`msam` it uses their
    gradient hook, so that SAM too is observed once a step, after its first gradient.

    Parameters
    ----------
    optimizer
        Any ``torch.optim`` optimizer.
    probes
        Functions of ``(optimizer, step)`` that return named numbers, see :mod:`msam_analysis.probes`.
    every
        Record at steps ``0, every, 2 every, ...``. Default 50, the paper's choice for exhibit A8.

    Raises
    ------
    ValueError
        ``every`` is not a positive integer, or there is no probe. Two probes that record the same name are found out
        at the first recorded step, in which the optimizer's ``step`` then raises.

    Examples
    --------
    >>> monitor = Monitor(optimizer, probes=[probes.MomentumGradientCosine()], every=10)  # doctest: +SKIP
    >>> for batch in loader:
    ...     ...  # doctest: +SKIP
    >>> monitor.frame()  # doctest: +SKIP
    """

    def __init__(self, optimizer: torch.optim.Optimizer, probes: Sequence[Probe], every: int = 50) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a positive integer, got {every!r}: 50 records every fiftieth step")
        if not probes:
            raise ValueError(
                "probes is empty: expected at least one, e.g. msam_analysis.probes.MomentumGradientCosine()"
            )
        self.probes = tuple(probes)
        self.every = every
        self.step = 0
        self.rows: list[dict[str, float]] = []
        # The optimizer holds the hook; the hook must not keep the monitor, or the objectives in it, alive.
        this = weakref.ref(self)

        def observe(observed: torch.optim.Optimizer) -> None:
            monitor = this()
            if monitor is not None:
                monitor.observe(observed)

        if hasattr(optimizer, "register_gradient_hook"):
            self._handle = optimizer.register_gradient_hook(observe)
        else:
            self._handle = optimizer.register_step_pre_hook(_before_step(observe))

    def observe(self, optimizer: torch.optim.Optimizer) -> None:
        """Count one step and record it if it is due; called by the optimizer's hook."""
        if self.step % self.every == 0:
            row: dict[str, float] = {"step": self.step}
            for probe in self.probes:
                values = probe(optimizer, self.step)
                clash = row.keys() & values.keys()
                if clash:
                    raise ValueError(f"two probes record {min(clash)!r}: expected every name once; remove one of them")
                row.update(values)
            self.rows.append(row)
        self.step += 1

    def frame(self) -> pd.DataFrame:
        """Return what was recorded so far: one row per recorded step, column ``step`` and one per quantity."""
        frame: pd.DataFrame = pd.DataFrame(self.rows) if self.rows else pd.DataFrame({"step": pd.Series(dtype=int)})
        return frame

    def close(self) -> None:
        """Detach from the optimizer; what was recorded stays. Safe to call twice."""
        self._handle.remove()

    def __enter__(self) -> Self:
        """Return the monitor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.close()


def _before_step(observe: Callable[[torch.optim.Optimizer], None]) -> Callable[..., tuple[Any, Any] | None]:
    """Return a step pre-hook that observes once the gradient is there: at once, or after the closure has made it."""

    def hook(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            observe(optimizer)
            return None
        waiting = True

        def observed() -> Any:
            nonlocal waiting
            loss = closure()
            if waiting:
                waiting = False
                observe(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": observed}
        return (args[0], observed, *args[2:]), kwargs

    return hook
