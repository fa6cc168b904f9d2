"""The fingerprint of a thing: a hash of what it is by value, the same in every process and on every day.

Studies know finished runs by it, and slices what they were computed from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DIGITS = 16
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Their code is known by a number: that of their release, or the version that we declare beside ours.
_KNOWN_BY_VERSION = ("msam", "msam_analysis", "torch", "numpy", "builtins")


def fingerprint(*things: object) -> str:
    """Return 16 hexadecimal digits of a SHA-256 of things by value.

    Data classes count by the fields that are compared, modules by what they are made of without parameters and buffers,
    other objects by their attributes. A function counts by its code, its constants, its defaults and what it closes
    over, a class by its methods; comments and docstrings do not count. The code of ``msam``, ``msam_analysis``, torch
    and NumPy counts by its name alone. What a function calls counts by its name.
    """
    text = json.dumps([_plain(thing, frozenset()) for thing in things])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def release(package: str) -> str:
    """Return the release of a package, or that it is not installed, as where the sources are used in place."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the contents, shapes and data types of tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def _plain(thing: Any, above: frozenset[int]) -> object:
    """Return what decides how a thing behaves, as plain data: no address in it, and nothing inside itself."""
    if thing is None or isinstance(thing, str | int | float | bool):
        return thing
    if id(thing) in above:
        return "the same again"
    above |= {id(thing)}
    if isinstance(thing, Tensor):
        return of_tensors([thing])
    if isinstance(thing, np.ndarray) and not thing.dtype.hasobject:
        content = hashlib.sha256(np.ascontiguousarray(thing).tobytes()).hexdigest()
        return [str(thing.dtype), list(thing.shape), content]
    if isinstance(thing, set | frozenset):
        return sorted(json.dumps(_plain(item, above)) for item in thing)
    parts = _parts(thing)
    return _ADDRESS.sub("", repr(thing)) if parts is None else [_plain(part, above) for part in parts]


def _parts(thing: Any) -> list[Any] | None:
    """Return the parts of a thing; none where its text says what it is."""
    if isinstance(thing, list | tuple):
        return list(thing)
    if isinstance(thing, Mapping):
        return [part for item in thing.items() for part in item]
    if isinstance(thing, ModuleType | type | BuiltinFunctionType):
        return [getattr(thing, "__module__", None), getattr(thing, "__qualname__", thing.__name__)]
    return _parts_of_code(thing) or _parts_of_object(thing)


def _parts_of_code(thing: Any) -> list[Any] | None:
    if isinstance(thing, functools.partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, CodeType):
        return [thing.co_code.hex(), thing.co_names, thing.co_consts]
    if isinstance(thing, MethodType):
        return [thing.__func__, thing.__self__]
    if not isinstance(thing, FunctionType):
        return [thing.__wrapped__] if hasattr(thing, "__wrapped__") else None  # a function with a cache
    own = [] if _known(thing) else [*_code(thing), thing.__defaults__, thing.__kwdefaults__, *_enclosed(thing)]
    return [thing.__module__, thing.__qualname__, *own]


def _parts_of_object(thing: Any) -> list[Any] | None:
    if isinstance(thing, nn.Module):
        # The mode is the objective's choice.
        public = {k: value for k, value in vars(thing).items() if not k.startswith("_") and k != "training"}
        return [*_class(thing), public, dict(thing.named_children())]
    if dataclasses.is_dataclass(thing):
        compared = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing) if field.compare}
        return [*_class(thing), compared]
    return [*_class(thing), vars(thing)] if isinstance(getattr(thing, "__dict__", None), dict) else None


def _known(thing: Any) -> bool:
    return str(thing.__module__).partition(".")[0] in _KNOWN_BY_VERSION


def _class(thing: object) -> list[Any]:
    """Return the name of a thing's class, and all methods that have no version."""
    lineage = [one for one in type(thing).__mro__ if not _known(one)]
    methods = {name: method for one in lineage for name, method in vars(one).items() if type(method) is FunctionType}
    return [type(thing).__module__, type(thing).__qualname__, methods]


def _code(function: FunctionType) -> list[Any]:
    """Return a function's code without its docstring."""
    code = function.__code__
    constants = [one for one in code.co_consts if one is None or one != function.__doc__]
    return [code.co_code.hex(), code.co_names, constants]


def _enclosed(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not yet assigned
            yield cell.cell_contents
