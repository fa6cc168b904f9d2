"""Arguments of public functions: numbers that came as something else are told in one sentence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_NUMBERS = {"int", "float", "int | None", "float | None"}


def numbers(function: Callable[P, T]) -> Callable[P, T]:
    """Refuse text, classes and lists where a function's annotations ask for a number: its ``TypeError`` says so."""
    signature = inspect.signature(function)
    names = [name for name, parameter in signature.parameters.items() if parameter.annotation in _NUMBERS]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        given: dict[str, Any] = dict(zip(signature.parameters, args, strict=False)) | kwargs
        for name in names:
            value = given.get(name)
            if value is not None and (isinstance(value, type | str | bytes | list | tuple | dict)):
                raise TypeError(
                    f"{function.__name__} expected a number for {name!r}, got {value!r} ({type(value).__name__}): pass "
                    f"a number without quotes or brackets"
                )
        return function(*args, **kwargs)

    return checked


def device_of(wanted: torch.device | str | None, own: torch.device) -> torch.device:
    """Return the device that is wanted, or the model's own; ``ValueError`` where there is no such device."""
    try:
        device = own if wanted is None else torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(
            f"device must be one that torch knows, got {wanted!r}: pass 'cpu', 'cuda' or 'mps', or leave it out"
        ) from error
    if device.type == "meta":
        raise ValueError("the parameters are on the meta device, without values: load weights before measuring")
    return device


def check_autocast(autocast: torch.dtype | None, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` unless autocast is a half precision, or none, and fits the precision of evaluation."""
    if autocast not in {None, torch.bfloat16, torch.float16}:
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast}")
    if autocast is not None and dtype == torch.float64:
        raise ValueError(
            "autocast leaves float64 alone: expected a float32 model under autocast; drop autocast, or dtype=float64"
        )
