"""Whether second derivatives are exact or differences, and how that is found out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msam_analysis.results import ApproximationWarning, Settings

Wish = Literal["auto", "exact", "central"]

_ONCE = once_differentiable(len).__code__  # of the wrapper, the same for every function
_MISSING = re.compile(
    r"derivative for .* not implemented|once_differentiable|[Dd]ouble[ -]backward|not .*twice differentiable"
)
# The factor of the step before eps^(1/3) of the weights' norm. It is small, as the third derivative along the stiffest
# directions of trained networks is large: in float32 it balances their truncation and the rounding along random ones.
_STEP = 0.03


class SecondDerivatives:
    """Whether second derivatives are exact or differences: one finding for an objective and all its operators."""

    def __init__(self, wish: Wish) -> None:
        if wish not in get_args(Wish):
            raise ValueError(f"second_derivatives must be one of {get_args(Wish)}, got {wish!r}")
        self.wish, self._reason = wish, ""
        self.central = wish == "central"  # whether they are central differences
        self.error: float | None = None  # how far the first difference was from one of twice the step, relatively
        self.refusal = ""  # why there are none, although the gradient is right

    @property
    def settings(self) -> Settings:
        """What results are labelled with; nothing for exact derivatives."""
        if not self.central:
            return {}
        error: Settings = {} if self.error is None else {"error of differences": self.error}
        return {"second derivatives": "central differences", **error}

    def give_up(self, reason: str) -> None:
        """Turn to central differences; ``ValueError`` where exact derivatives were asked for."""
        if self.wish == "exact":
            raise ValueError(
                f"the loss cannot be differentiated twice ({reason}): expected layers with second derivatives; use "
                "another version of that layer, or second_derivatives='auto'"
            )
        self.central, self._reason = True, reason

    def doubt(self, reason: str) -> None:
        """Turn to central differences where exact derivatives are wrong; where those were asked for, refuse them."""
        if self.wish != "exact":
            self.give_up(reason)
            return
        self.refusal = (
            f"exact second derivatives are wrong here ({reason}): expected a layer whose double backward is right; "
            "use second_derivatives='auto', which takes differences of the gradient"
        )

    def found(self, error: float) -> None:
        """Keep the error of the first difference, and warn of it where differences were not asked for."""
        self.error = error
        if self._reason:
            warnings.warn(
                f"second derivatives are central differences of the gradient, since exact ones are missing or wrong "
                f"({self._reason}): two steps differ by {error:.1e} of the product; use a layer with a second "
                "derivative, or dtype=torch.float64, or accept them by second_derivatives='central'",
                ApproximationWarning,
                stacklevel=2,
            )


class MissingDerivativeError(RuntimeError):
    """A layer has no second derivative."""


def difference_step(precision: torch.dtype) -> float:
    """Return the step of a central difference, relative to ``1 + ‖w‖``: ``0.03 eps^(1/3)``.

    ``eps^(1/3)`` balances the rounding of a difference against its truncation if the third derivative is of the order
    of the first; along the stiffest directions of trained networks it is far larger.
    """
    eps = torch.finfo(precision).eps
    if eps > torch.finfo(torch.float32).eps:
        raise ValueError(
            f"central differences of a gradient in {str(precision).removeprefix('torch.')} are all rounding error: "
            "expected at least float32; make the objective with dtype=torch.float32 and without autocast"
        )
    return float(_STEP * eps ** (1 / 3))


@contextmanager
def missing_derivatives() -> Iterator[None]:
    """Tell a layer without a second derivative from other errors."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MissingDerivativeError) or not _MISSING.search(str(error)):
            raise
        raise MissingDerivativeError(str(error).split("\n", maxsplit=1)[0]) from error


def check_twice_differentiable(ends: Iterable[Tensor]) -> None:
    """Raise if a function marked ``once_differentiable`` took part; autograd would leave it out."""
    for node in graph_nodes(ends):
        function = getattr(node, "_forward_cls", type(node))  # of functions written in Python
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            raise MissingDerivativeError(f"{function.__name__} is marked once_differentiable")


def graph_nodes(ends: Iterable[Tensor]) -> Iterator[Any]:
    """Yield every node of the graph behind some tensors, once."""
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn for tensor in ends]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(parent for parent, _ in node.next_functions)
