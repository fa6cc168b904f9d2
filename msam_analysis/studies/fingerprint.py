"""What decides the outcome of a run, as a hash: other settings, data or code have another one, in every process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

import msam
import msam_analysis
from msam_analysis.objective.randomness import RandomStream

# They only read runs that are finished: a change in them leaves those as they are.
_READERS = ("cli", "report.py", "statistics.py", "plots", "claims.py", "exhibits", "tables.py")


def fingerprint(*things: object) -> str:
    """Return a hash of things by value, and of the code that trains and measures."""
    text = json.dumps([_plain(thing) for thing in things] + [_sources()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def untrained(network: Callable[[], nn.Module]) -> object:
    """Return what a network is before training: its layers and its initial weights for one seed."""
    with RandomStream(0):
        model = network()
    return [str(model), model.state_dict()]


def _plain(thing: Any) -> object:
    """Return what decides how a thing behaves, as plain data: no address in it, nor a hash of the day."""
    if isinstance(thing, Tensor):
        content = thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return [str(thing.dtype), list(thing.shape), hashlib.sha256(content).hexdigest()]
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return [type(thing).__qualname__, *((f.name, _plain(getattr(thing, f.name))) for f in _fields(thing))]
    if isinstance(thing, Mapping):
        return [[str(key), _plain(value)] for key, value in thing.items()]
    if isinstance(thing, list | tuple):
        return [_plain(item) for item in thing]
    if isinstance(thing, set | frozenset):
        return sorted(str(_plain(item)) for item in thing)
    if isinstance(thing, functools.partial):
        return _plain([thing.func, thing.args, thing.keywords])
    if isinstance(thing, CodeType):
        return _plain([thing.co_code, thing.co_names, thing.co_consts])
    if hasattr(thing, "__code__"):  # a function
        closed_over = [cell.cell_contents for cell in thing.__closure__ or ()]
        return _plain([thing.__module__, thing.__qualname__, thing.__code__, thing.__defaults__, closed_over])
    if hasattr(thing, "__dict__") and not isinstance(thing, type):
        return [type(thing).__qualname__, _plain(vars(thing))]
    return repr(thing)


def _fields(thing: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(thing) if field.compare]


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for package in (msam, msam_analysis):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            if not set(path.relative_to(root).parts) & set(_READERS):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
