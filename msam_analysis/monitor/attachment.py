"""Hooks at two moments of every optimizer step: the gradient is ready and nothing has moved; the step is over."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from msam_analysis.monitor.monitor import Monitor


class Attachment:
    """Tells a monitor about every step, through hooks; the optimizer keeps the monitor alive only if asked to.

    ``monitor.before`` is called inside of ``step``, after every pre-hook and after the first call of a closure. So all
    changes to the gradient have been made by then, in whatever order hooks were registered. For this the step gets a
    closure, an empty one if the caller gave none. Optimizers of :mod:`msam` have a hook of their own for that moment.
    ``monitor.after`` is called when the step is over.

    ``optimizer``: Any ``torch.optim`` optimizer, or a wrapper that keeps it as ``optimizer``.
    ``monitor``: The monitor that is told about steps.
    ``scaler``: The :class:`torch.amp.GradScaler` that calls ``step``. It does not call it when a gradient overflowed,
        and only the scaler's own ``step`` shows that.
    ``gradients_stay``: Whether the gradients of a step are still in ``.grad``, without a loss scale, when the step is
        over. Some of torch's kernels write something else there.
    ``keep``: Whether the monitor lives as long as the optimizer, also where nobody else holds it.
    Raises TypeError: ``optimizer`` is not an optimizer.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, monitor: Monitor, scaler: Any = None, *, keep: bool = False
    ) -> None:
        self.optimizer = _inner(optimizer)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"expected a torch.optim optimizer, got {type(optimizer).__name__}: pass the optimizer itself"
            )
        self.gradients_stay = hasattr(self.optimizer, "register_gradient_hook")
        self._ended = 0
        self._steps = -1
        # A subclass whose step calls its parent's step is hooked twice: open, observe and end one step only once.
        self._open = self._observed = False
        self._monitor: Callable[[], Monitor | None] = (lambda: monitor) if keep else weakref.ref(monitor)
        # The optimizer holds the hooks; they must not keep the monitor, or the objectives in it, alive unasked.
        this: Callable[[], Attachment | None] = (lambda: self) if keep else weakref.ref(self)

        takes_closure = "closure" in inspect.signature(self.optimizer.step).parameters
        inside = self.gradients_stay or takes_closure

        def opened(*_: object) -> None:
            attachment = this()
            # If it is observed before the step begins, a second opening comes from the parent's step.
            if attachment is not None and (inside or not (attachment._open and attachment._observed)):
                attachment._open, attachment._observed = True, False

        def before(*_: object) -> None:
            attachment = this()
            if attachment is not None:
                attachment._before()

        def after(*_: object) -> None:
            attachment = this()
            if attachment is not None and attachment._open and not _capturing():
                attachment._open = False
                attachment._after(attachment._taken())

        # This hook comes first, as the other one may observe at once.
        opening = self.optimizer.register_step_pre_hook(opened)
        if self.gradients_stay:
            first = self.optimizer.register_gradient_hook(before)  # type: ignore[attr-defined]  # msam's optimizers have it
        else:
            first = self.optimizer.register_step_pre_hook(_inside_step(before, takes_closure=takes_closure))
        self._ends = [opening.remove, first.remove, self.optimizer.register_step_post_hook(after).remove]
        if scaler is not None:
            self._ends.append(_follow_scaler(scaler, self.optimizer, this))

    def close(self) -> None:
        """Detach; safe to call twice."""
        while self._ends:
            self._ends.pop()()

    def _before(self) -> None:
        if self._observed:
            return
        self._observed = True
        monitor = self._monitor()
        if monitor is not None and not _overflowed(self.optimizer) and not _capturing():
            self._steps = self._count()
            try:
                monitor.before(self.optimizer)
            except BaseException:
                self._open = self._observed = False  # the step ends here, and may be tried again
                raise

    def _after(self, taken: bool) -> None:
        self._ended += 1
        monitor = self._monitor()
        if monitor is not None:
            monitor.after(self.optimizer, taken)

    def _taken(self) -> bool:
        """Return whether the step moved anything; SAM itself finds an overflow of its first gradients."""
        return self._count() != self._steps if self.gradients_stay else not _overflowed(self.optimizer)

    def _count(self) -> int:
        """Return the number of steps that an optimizer of :mod:`msam` has taken; -1 for other optimizers."""
        return int(self.optimizer.param_groups[0]["steps"]) if self.gradients_stay else -1


def _inner(optimizer: Any) -> Any:
    """Return the optimizer behind the wrappers of Lightning and accelerate."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer that removes the loss scale itself was told of an overflow."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _capturing() -> bool:
    """Return whether a CUDA graph is being captured: nothing is computed then, and nothing may be fetched."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _inside_step(observe: Callable[[], None], *, takes_closure: bool) -> Callable[..., tuple[Any, Any] | None]:
    """Return a step pre-hook that observes when the gradient is ready: where the step calls its closure."""

    def hook(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if not takes_closure:
            observe()
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        waiting = True

        def observed() -> Any:
            nonlocal waiting
            loss = None if closure is None else closure()
            if waiting:
                waiting = False
                observe()
            return loss

        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    return hook


def _follow_scaler(
    scaler: Any, optimizer: torch.optim.Optimizer, this: Callable[[], Attachment | None]
) -> Callable[[], None]:
    """Make a gradient scaler's ``step`` report the steps that it leaves out; return a function that ends this."""
    original, previous = scaler.step, vars(scaler).get("step")

    @functools.wraps(original)
    def step(stepped: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = this()
        before = attachment._ended if attachment is not None else 0
        result = original(stepped, *args, **kwargs)
        if attachment is not None and attachment._ends and _inner(stepped) is optimizer and attachment._ended == before:
            attachment._after(taken=False)
        return result

    def end() -> None:
        if vars(scaler).get("step") is step:  # otherwise another wrapper is around it
            del scaler.step
            if previous is not None:
                scaler.step = previous

    scaler.step = step
    return end
