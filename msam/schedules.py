"""The perturbation strength ρ as a function of the step.

A schedule is a frozen value that can be pickled. It is a pure function of two things: the number of completed steps,
and the present learning rate over the one that the parameter group began with. It has no counter of its own. The
optimizer saves the count, and the schedule as plain numbers, in its ``state_dict``.

Schedules multiply with each other and with numbers::

    rho = msam.Jump(3.0, steps=500) * msam.FollowLR(1.0)  # nothing in warm-up, then along with the learning rate
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

__all__ = ["Constant", "Cosine", "FollowLR", "Jump", "Product", "Ramp", "Schedule", "as_schedule"]

Number = float | Tensor


def require_nonnegative(name: str, value: float, hint: str = "") -> None:
    """Raise unless ``value`` is a finite real number, zero or more.

    Parameters
    ----------
    name : str
        What the value is called in the message.
    value : float
        The value to check.
    hint : str
        What to do instead, appended to the message.

    Raises
    ------
    TypeError
        If ``value`` is no real number.
    ValueError
        If it is negative, infinite or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}; pass a float.")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}; {hint or 'pass 0 or more'}.")


def require_strength(rho: Number) -> None:
    """Raise unless ``rho`` is a tensor of one element, whose value is not read, or a finite number, zero or more.

    Raises
    ------
    TypeError
        If ``rho`` is no real number.
    ValueError
        If it is negative, infinite or not a number, or a tensor of more elements.
    """
    if isinstance(rho, Tensor):
        if rho.numel() != 1:
            raise ValueError(f"a tensor rho must hold one element, got shape {tuple(rho.shape)}; pass a scalar.")
    elif not (type(rho) is float and 0 <= rho < math.inf):
        require_nonnegative("rho", rho, "for the opposite direction pass sign=-1 and a positive rho")


@dataclass(frozen=True)
class Schedule(ABC):
    """ρ as a pure function of the step and the learning-rate ratio.

    Attributes
    ----------
    varies : bool
        Whether the value depends on the step number.
    follows_lr : bool
        Whether the value depends on the learning rate.
    """

    varies: ClassVar[bool] = True
    follows_lr: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, step: int, lr_ratio: Number = 1.0) -> Number:
        """Return ρ.

        Parameters
        ----------
        step : int
            Number of optimizer steps completed so far; 0 before the first.
        lr_ratio : float or Tensor
            Present learning rate over the first one of the parameter group.

        Returns
        -------
        float or Tensor
            Strength ρ in units of the weights' norm. It is a tensor only if ``lr_ratio`` is one and the schedule
            follows it.
        """

    def __mul__(self, other: Schedule | float) -> Product:
        """Return the pointwise product with another schedule or a number."""
        return Product((self, as_schedule(other)))

    __rmul__ = __mul__

    def to_plain(self) -> dict[str, Any]:
        """Return the schedule as a dict of plain numbers, fit for ``torch.load(weights_only=True)``."""
        return {"schedule": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Schedule:
        """Rebuild the schedule that :meth:`to_plain` wrote.

        Raises
        ------
        ValueError
            If the dict names no schedule of this module.
        """
        arguments = dict(plain)
        name = arguments.pop("schedule", None)
        if name not in _SCHEDULES:
            raise ValueError(f"expected a saved schedule, one of {sorted(_SCHEDULES)}, got {name!r}; set 'rho' anew.")
        if name == "Product":
            return Product(tuple(Schedule.from_plain(factor) for factor in arguments["factors"]))
        return _SCHEDULES[name](**arguments)


@dataclass(frozen=True)
class Constant(Schedule):
    """A constant strength: ``rho(t) = value``.

    Parameters
    ----------
    value : float
        Strength ρ at every step, zero or more.
    """

    value: float
    varies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_strength(self.value)

    def __call__(self, step: int, lr_ratio: Number = 1.0) -> Number:  # noqa: D102
        return self.value


@dataclass(frozen=True)
class _Over(Schedule):
    """A value and the number of steps its course takes."""

    value: float
    steps: int

    def __post_init__(self) -> None:
        require_nonnegative("value", self.value, "for the opposite direction give the Perturbation sign=-1")
        require_nonnegative("steps", self.steps)


@dataclass(frozen=True)
class Jump(_Over):
    """A jump from nothing, when warm-up ends: ``rho(t) = value if t >= steps else 0`` (table TA2).

    Parameters
    ----------
    value : float
        Strength ρ after the jump.
    steps : int
        Number of steps at ρ = 0.
    """

    def __call__(self, step: int, lr_ratio: Number = 1.0) -> Number:  # noqa: D102
        return self.value if step >= self.steps else 0.0


@dataclass(frozen=True)
class Ramp(_Over):
    """A straight line from 0 that ends level: ``rho(t) = value · min(1, t / steps)``.

    Parameters
    ----------
    value : float
        Strength ρ at the top.
    steps : int
        Number of steps until the top is reached.
    """

    def __call__(self, step: int, lr_ratio: Number = 1.0) -> Number:  # noqa: D102
        return self.value * min(1.0, step / self.steps) if self.steps else self.value


@dataclass(frozen=True)
class Cosine(_Over):
    """Half a cosine from ``value`` to ``final`` that ends level.

    ``rho(t) = final + (value − final) · (1 + cos(π · min(1, t / steps))) / 2``

    Parameters
    ----------
    value : float
        Strength ρ at the first step.
    steps : int
        Number of steps until ``final`` is reached.
    final : float
        Strength ρ from there on.
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_nonnegative("final", self.final)

    def __call__(self, step: int, lr_ratio: Number = 1.0) -> Number:  # noqa: D102
        done = min(1.0, step / self.steps) if self.steps else 1.0
        return self.final + (self.value - self.final) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class FollowLR(Schedule):
    """A strength in proportion to the learning rate: ``rho = value · lr / lr_first``.

    Where the parameter group was added with ``lr = 0``, the largest learning rate so far stands for ``lr_first``.

    Parameters
    ----------
    value : float
        Strength ρ at the learning rate with which the parameter group was added.
    """

    value: float
    varies: ClassVar[bool] = False
    follows_lr: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_nonnegative("value", self.value, "for the opposite direction give the Perturbation sign=-1")

    def __call__(self, step: int, lr_ratio: Number = 1.0) -> Number:  # noqa: D102
        return self.value * lr_ratio


@dataclass(frozen=True)
class Product(Schedule):
    """The pointwise product of schedules, written ``a * b``.

    Parameters
    ----------
    factors : tuple of Schedule
        Schedules whose values are multiplied.
    """

    factors: tuple[Schedule, ...]

    @property
    def varies(self) -> bool:  # type: ignore[override]  # a product depends on what its factors depend on
        """Whether a factor depends on the step number."""
        return any(factor.varies for factor in self.factors)

    @property
    def follows_lr(self) -> bool:  # type: ignore[override]  # a product depends on what its factors depend on
        """Whether a factor depends on the learning rate."""
        return any(factor.follows_lr for factor in self.factors)

    def __call__(self, step: int, lr_ratio: Number = 1.0) -> Number:  # noqa: D102
        result: Number = 1.0
        for factor in self.factors:
            result = result * factor(step, lr_ratio)
        return result

    def to_plain(self) -> dict[str, Any]:  # noqa: D102
        return {"schedule": "Product", "factors": [factor.to_plain() for factor in self.factors]}


_SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (Constant, Cosine, FollowLR, Jump, Product, Ramp)
}


def as_schedule(rho: Schedule | float) -> Schedule:
    """Return ``rho`` as a schedule; a number becomes :class:`Constant`.

    Raises
    ------
    TypeError
        If ``rho`` is neither.
    ValueError
        If the number is negative, infinite or not a number.
    """
    return rho if isinstance(rho, Schedule) else Constant(rho)
