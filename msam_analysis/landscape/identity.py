"""What a measurement is of, as content hashes: two that agree in all of them give the same numbers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from msam_analysis.objective.direction import Direction
from msam_analysis.objective.nested import tensors_of
from msam_analysis.objective.objective import Objective

_DIGITS = 16
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def identity(
    objective: Objective, directions: Sequence[Direction], axes: Mapping[str, Tensor], settings: Mapping[str, object]
) -> dict[str, str]:
    """Return what decides the numbers of a slice, by a name that a person understands.

    Parameters
    ----------
    objective
        The loss: its weights, its other tensors, its code and its data are read.
    directions, axes
        Where the points are.
    settings
        What else was chosen, in plain values.

    Returns
    -------
    dict
        Name to the value where it is short, else to the beginning of its SHA-256.
    """
    selected = set(objective.layout.names)
    frozen = [tensor for name, tensor in objective.model.named_parameters() if name not in selected]
    criterion = objective.loss_fn
    tensors = [*criterion.parameters(), *criterion.buffers()] if isinstance(criterion, nn.Module) else []
    return {
        "kind of slice": f"{len(axes)}-D",
        "weights": of_tensors([objective.point()]),
        "frozen parameters and buffers": of_tensors([*frozen, *objective.model.buffers(), *tensors]),
        "parameter names": _digest(json.dumps(objective.layout.names)),
        "network": of_code(objective.model),
        "loss function": of_code(criterion),
        "data": of_tensors(tensor for batch in objective.batches for tensor in tensors_of(batch)),
        **{f"direction {name}": of_tensors([line.vector]) for name, line in zip(axes, directions, strict=True)},
        **{f"coordinates of {name}": of_tensors([axis]) for name, axis in axes.items()},
        **{name: str(value) for name, value in {**objective.settings, **settings}.items()},
    }


def of_code(thing: object) -> str:
    """Return a hash of how a function or a module behaves: its code, its constants, what it closes over."""
    return _digest(json.dumps(_plain(thing, set())))


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """Return a hash of the contents, shapes and data types of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _plain(thing: Any, seen: set[int]) -> object:
    """Return what decides how a thing behaves, as plain data: no address in it, and nothing twice."""
    if thing is None or isinstance(thing, str | int | float | bool):
        return thing
    if id(thing) in seen:
        return "seen"
    seen = seen | {id(thing)}
    if isinstance(thing, Tensor):
        return of_tensors([thing])
    if isinstance(thing, functools.partial):
        parts: list[Any] = [thing.func, thing.args, thing.keywords]
    elif isinstance(thing, CodeType):
        parts = [thing.co_code.hex(), thing.co_names, thing.co_consts]
    elif isinstance(thing, FunctionType):
        parts = [thing.__qualname__, thing.__code__, thing.__defaults__, thing.__kwdefaults__, *_enclosed(thing)]
    elif isinstance(thing, nn.Module):
        # The mode is the objective's choice.
        public = {k: value for k, value in vars(thing).items() if not k.startswith("_") and k != "training"}
        parts = [type(thing).__qualname__, type(thing).forward, public, dict(thing.named_children())]
    elif isinstance(thing, Mapping):
        parts = [part for item in thing.items() for part in item]
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    elif isinstance(getattr(thing, "__dict__", None), dict) and not isinstance(thing, type | ModuleType):
        parts = [type(thing).__qualname__, vars(type(thing)).get("__call__"), vars(thing)]
    else:
        return _ADDRESS.sub("", repr(thing))
    return [_plain(part, seen) for part in parts]


def _enclosed(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not yet assigned
            yield cell.cell_contents
