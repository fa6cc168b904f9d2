"""Arguments of public functions: numbers that came as something else are told in one sentence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NUMBERS = {"int", "float", "int | None", "float | None"}


def numbers(function: Callable[P, T]) -> Callable[P, T]:
    """Refuse text, classes and lists where a function's annotations ask for a number.

    Raises
    ------
    TypeError
        Said by the function: the argument, what came, and what to pass.
    """
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
