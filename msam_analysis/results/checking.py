"""Whether the fields of a result that was read from a file have their types, shapes and ranges, and agree.

Types are those that its class declares. A class adds ``_shapes``, the dimensions of its tensors and tuples by name (the
same name is the same number, that of a field or property of this name, or a literal one; ``...`` is any further
dimensions, the same in all fields; ``*`` any at all), and ``_ranges``, a word of :data:`RANGES` by field.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_MOST = 2**63  # whole numbers beyond are none that tables can hold
_SHOWN = 60  # characters of a value that an error shows
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


class FieldError(ValueError):
    """A field is not what its class says."""


def _each(holds: Callable[[Tensor], Tensor]) -> Callable[[Tensor], bool]:
    """Ask of every entry; one that is NaN was not known, and is kept."""
    return lambda values: bool((holds(values) | values.isnan()).all())


def _rising(values: Tensor) -> bool:
    return values.ndim == 1 and bool(values.isfinite().all()) and bool((values.diff() >= 0).all())


RANGES: dict[str, tuple[str, Callable[[Tensor], bool]]] = {
    "positive": ("finite and above 0", lambda values: bool((values.isfinite() & (values > 0)).all())),
    "finite": ("finite", lambda values: bool(values.isfinite().all())),
    "nonnegative": ("0 or more", _each(lambda values: values >= 0)),
    "share": ("between 0 and 1", _each(lambda values: (values >= 0) & (values <= 1))),
    "rising": ("finite and in increasing order", _rising),
    "whole": ("whole numbers", lambda values: values.dtype in _INTEGERS),
    "counts": ("whole numbers, 0 or more", lambda values: values.dtype in _INTEGERS and bool((values >= 0).all())),
    "steps": ("whole numbers in increasing order", lambda values: values.dtype in _INTEGERS and _rising(values)),
    "flags": ("true or false", lambda values: values.dtype == torch.bool),
}
_OF_OTHER_TYPE = ("whole", "counts", "steps", "flags")


def check(result: Any) -> None:
    """Raise :class:`FieldError`, which says what is wrong, unless a result is whole and agrees with itself."""
    kind = type(result)
    ranges: Mapping[str, str] = kind._ranges
    for name, hint in _hints(kind).items():
        value = getattr(result, name)
        if not _fits(value, hint):
            raise FieldError(f"its {name} is {_shown(value)}, expected {_said(hint)}")
        if isinstance(value, Tensor) and ranges.get(name) not in _OF_OTHER_TYPE and value.dtype not in _FLOATS:
            raise FieldError(f"its {name} is a tensor of {value.dtype}, expected floating-point numbers")
    for name, word in ranges.items():
        value = getattr(result, name)
        said, holds = RANGES[word]
        if value is not None and not holds(value if isinstance(value, Tensor) else torch.tensor(value).double()):
            raise FieldError(f"its {name} is {_shown(value)}, expected to be {said}")
    _check_shapes(result, kind._shapes)
    if told := result._disagreement():
        raise FieldError(told)


def _hints(kind: Any) -> dict[str, Any]:
    # points of a trajectory on disk are no part of a file
    found = typing.get_type_hints(kind, localns={"StoredPoints": Tensor, "Tensor": Tensor})
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a declared type, down to what containers hold."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inside) == 2 and inside[1] is Ellipsis:
            return all(_fits(item, inside[0]) for item in value)
        return len(value) == len(inside) and all(map(_fits, value, inside))
    if origin is not None:  # a mapping: no other container is declared
        return isinstance(value, Mapping) and all(
            _fits(key, inside[0]) and _fits(item, inside[1]) for key, item in value.items()
        )
    return _is(value, hint)


def _is(value: Any, hint: Any) -> bool:
    if hint is typing.Any:
        return True
    if isinstance(hint, typing.TypeVar):
        return isinstance(value, hint.__bound__ or object)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST
    if hint is float:
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST
        return whole or isinstance(value, float)
    if hint is str:
        return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)
    if hint is Tensor:
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        return plain and value.dtype in (*_FLOATS, *_INTEGERS, torch.bool)
    return isinstance(value, hint)


def _check_shapes(result: Any, shapes: Mapping[str, str]) -> None:
    known: dict[str, int] = {}
    tail: tuple[int, ...] | None = None
    for name, names in shapes.items():
        field = getattr(result, name)
        values = list(field.values()) if isinstance(field, Mapping) else [field]
        for value in values:
            if value is None:
                continue
            shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
            wanted = names.split()
            more = wanted.pop() if wanted[-1:] in (["..."], ["*"]) else ""
            rest, shape = shape[len(wanted) :], shape[: len(wanted)]
            tail = rest if more == "..." and tail is None else tail
            fits = len(shape) == len(wanted) and (more == "*" or rest == (tail if more else ()))
            for size, dimension in zip(shape, wanted, strict=False):
                fits = fits and size == known.setdefault(dimension, _declared(result, dimension, size))
            if not fits:
                raise FieldError(
                    f"its {name} has the shape {(*shape, *rest)}, which does not agree with the other fields: expected "
                    f"({', '.join(names.split())})"
                )


def _declared(result: Any, dimension: str, size: int) -> int:
    """Return the number of a dimension: a literal one, that of a field of its name, or else the first one seen."""
    if dimension.isdigit():
        return int(dimension)
    found = getattr(result, dimension, None)
    return found if isinstance(found, int) else size


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _MOST:
        return "a whole number beyond all limits"
    text = " ".join(ascii(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _said(hint: Any) -> str:
    """Say a declared type in words."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(one) for one in inside)
    if origin is tuple:
        several = len(inside) == 2 and inside[1] is Ellipsis
        return f"a list of {_said(inside[0])}" if several else f"{len(inside)} of {_said(inside[0])}"
    if origin is not None:
        return f"a mapping of names to {_said(inside[1])}"
    words = {int: "a whole number of 0 or more", float: "a number", str: "a text", bool: "true or false"}
    words |= {Tensor: "a tensor of real numbers", type(None): "null"}
    return words.get(hint, getattr(hint, "__name__", "anything"))


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number of 0 or more, within what tables can hold."""
    return _is(value, int)


def is_number(value: Any) -> bool:
    """Tell whether a value is a number that a table can hold; NaN and infinity are."""
    return _is(value, float)
