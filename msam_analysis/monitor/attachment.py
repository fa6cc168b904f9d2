"""The two moments of every step of an optimizer: the gradient is there and nothing has moved, and all has moved."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Listener(Protocol):
    """What is told about steps."""

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """The step's gradient is in ``.grad``, and no weight has moved."""
        ...

    def after(self, optimizer: torch.optim.Optimizer, taken: bool) -> None:
        """The step is over; ``taken`` is false where a gradient scaler found an overflow and nothing moved."""
        ...


class Attachment:
    """Tells a listener about every step, through hooks; the optimizer does not keep the listener alive.

    ``before`` is called inside of ``step``, behind every pre-hook and behind the first call of a closure: whatever
    somebody does to the gradient has been done by then, in whatever order hooks were registered. For this the step is
    handed a closure, an empty one where the caller gave none. Optimizers of :mod:`msam` have a hook of their own for
    that moment.

    Parameters
    ----------
    optimizer
        Any ``torch.optim`` optimizer, or a wrapper that keeps it as ``optimizer``.
    listener
        Who is told.
    scaler
        The :class:`torch.amp.GradScaler` that calls ``step``: it does not when a gradient overflowed, and only its own
        ``step`` shows that.

    Attributes
    ----------
    gradients_stay
        Whether the gradients a step was taken with are still in ``.grad``, without a loss scale, once it is over. Some
        of torch's kernels write something else there.

    Raises
    ------
    TypeError
        There is no optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, listener: Listener, scaler: Any = None) -> None:
        self.optimizer = _inner(optimizer)
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"expected a torch.optim optimizer, got {type(optimizer).__name__}: pass the optimizer itself"
            )
        self.gradients_stay = hasattr(self.optimizer, "register_gradient_hook")
        self._ended = 0
        self._steps = -1
        # A subclass whose step calls its parent's is hooked twice: one step is opened, observed and ended once.
        self._open = self._observed = False
        self._listener = weakref.ref(listener)
        # The optimizer holds the hooks; they must not keep the listener, or the objectives in it, alive.
        this = weakref.ref(self)

        takes_closure = "closure" in inspect.signature(self.optimizer.step).parameters
        inside = self.gradients_stay or takes_closure

        def opened(*_: object) -> None:
            attachment = this()
            # Where it is observed before its step begins, a second opening is that of its parent's.
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

        # First: the other hook may observe at once.
        opening = self.optimizer.register_step_pre_hook(opened)
        if self.gradients_stay:
            first = self.optimizer.register_gradient_hook(before)  # type: ignore[attr-defined]  # of msam's optimizers
        else:
            first = self.optimizer.register_step_pre_hook(_inside_step(before, takes_closure=takes_closure))
        self._ends = [opening.remove, first.remove, self.optimizer.register_step_post_hook(after).remove]
        if scaler is not None:
            self._ends.append(_watch(scaler, self.optimizer, this))

    def close(self) -> None:
        """Detach; safe to call twice."""
        while self._ends:
            self._ends.pop()()

    def _before(self) -> None:
        if self._observed:
            return
        self._observed = True
        listener = self._listener()
        if listener is not None and not _overflowed(self.optimizer) and not _capturing():
            self._steps = self._count()
            listener.before(self.optimizer)

    def _after(self, taken: bool) -> None:
        self._ended += 1
        listener = self._listener()
        if listener is not None:
            listener.after(self.optimizer, taken)

    def _taken(self) -> bool:
        """Whether the step that is over moved anything; SAM finds an overflow of its first gradients by itself."""
        return self._count() != self._steps if self.gradients_stay else not _overflowed(self.optimizer)

    def _count(self) -> int:
        """Return the steps that an optimizer of :mod:`msam` has taken."""
        return int(self.optimizer.param_groups[0]["steps"]) if self.gradients_stay else -1


def _inner(optimizer: Any) -> Any:
    """Return the optimizer behind the wrappers of Lightning and accelerate."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _overflowed(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer that takes the loss scale off itself was told of an overflow."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _capturing() -> bool:
    """Tell whether a CUDA graph is being captured: then nothing is computed, and nothing may be fetched."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _inside_step(observe: Callable[[], None], *, takes_closure: bool) -> Callable[..., tuple[Any, Any] | None]:
    """Return a step pre-hook that observes once the gradient is there: where the step calls its closure."""

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


def _watch(scaler: Any, optimizer: torch.optim.Optimizer, this: weakref.ref[Attachment]) -> Callable[[], None]:
    """Let a gradient scaler's ``step`` tell of the steps that it leaves out; return what ends that."""
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
        if vars(scaler).get("step") is step:  # otherwise somebody else's stands on it
            del scaler.step
            if previous is not None:
                scaler.step = previous

    scaler.step = step
    return end
