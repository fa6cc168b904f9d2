"""What every result can do: become a table, be written to one safe file and be read from it."""

from __future__ import annotations

import abc
import dataclasses
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msam_analysis.results.checking import FieldError, check
from msam_analysis.results.files import write_tensors

Settings = Mapping[str, str | int | float | bool | None]

_HEADER = "result"
_INSIDE = "/"  # between a field's name and the key of a tensor in it
_NESTED = "<results>"  # the key under which a file has the results that a field holds
_COSTS = ("gradients", "hvps", "evaluations")  # fields that say what was spent
_MOST = 3  # readings in a line of text
_MOST_ROWS = 12  # readings in a notebook


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it reached the tolerance it was asked for."""


class ApproximationWarning(UserWarning):
    """A number is coarser than it looks: what was asked for had to be replaced, or was rounded away."""


class Reading(NamedTuple):
    """One number of a result, as texts and pictures show it.

    Attributes
    ----------
    name
        What the number is.
    value
        The number, or a word.
    error
        Its residual, standard error, or farther end of a bracket, in the same unit; NaN where none is known.
    converged
        Whether the iteration that found it converged; true where there was none.
    """

    name: str
    value: float | str
    error: float = math.nan
    converged: bool = True

    def __str__(self) -> str:
        """Return the value with its error."""
        if isinstance(self.value, str):
            return self.value
        return f"{self.value:.5g}" + ("" if math.isnan(self.error) else f" ± {self.error:.2g}")


def numbered(name: str, values: Tensor, errors: Tensor, *, converged: bool) -> list[Reading]:
    """Return a reading for each value, numbered from 1."""
    pairs = zip(values.tolist(), errors.tolist(), strict=True)
    return [Reading(f"{name} {index}", *pair, converged) for index, pair in enumerate(pairs, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Result(abc.ABC):
    """Base of every result.

    Attributes
    ----------
    settings
        What the measurement was made on: BatchNorm policy, number of samples, parameters, data type, device.
    """

    settings: Settings = dataclasses.field(default_factory=dict)

    _kinds: ClassVar[dict[str, type[Result]]] = {}
    _asked: ClassVar[tuple[str, ...]] = ()  # fields that say what was asked for
    _shapes: ClassVar[Mapping[str, str]] = {}  # the dimensions of tensors and tuples by name, see checking.py
    _ranges: ClassVar[Mapping[str, str]] = {}  # what their numbers are, by a word of checking.RANGES

    def __init_subclass__(cls) -> None:
        """Register the kind, so that :func:`load` finds it by name."""
        super().__init_subclass__()
        Result._kinds[cls.__name__] = cls
        cls.__repr__ = Result.__repr__  # type: ignore[method-assign]  # dataclasses would write one that dumps tensors

    def __post_init__(self) -> None:
        """Turn lists, as a file has them, into tuples."""
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, _tupled(value))

    def _disagreement(self) -> str:
        """Return in words what fields of the right types and shapes say against each other; as a rule nothing."""
        return ""

    @abc.abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """Return the result as a tidy table; each kind says what its rows are."""

    @abc.abstractmethod
    def readings(self) -> Sequence[Reading]:
        """Return the numbers that say most, each with its error: texts and pictures show these."""

    def __repr__(self) -> str:
        """Return one line: the first numbers with their errors, and what they were measured on."""
        readings = self.readings()
        parts = [f"{reading.name} = {reading}" for reading in readings[:_MOST]]
        parts += [f"{len(readings) - _MOST} more"] if len(readings) > _MOST else []
        parts += [] if getattr(self, "converged", True) else ["NOT converged"]
        parts += [] if getattr(self, "complete", True) else ["NOT complete"]
        settings = self.settings
        parts += [f"{settings['samples']} samples"] if "samples" in settings else []
        parts += [str(settings[name]) for name in ("batchnorm", "dtype") if name in settings]
        return f"{type(self).__name__}({'; '.join(parts)})"

    def _repr_html_(self) -> str:
        """Return a small table for a notebook: numbers with their errors, whether they converged, cost, settings."""
        readings = self.readings()
        rows: list[tuple[str, object]] = [(reading.name, reading) for reading in readings[:_MOST_ROWS]]
        rows += [("", f"{len(readings) - _MOST_ROWS} more")] if len(readings) > _MOST_ROWS else []
        states = [(name, getattr(self, name)) for name in ("converged", "complete") if hasattr(self, name)]
        rows += [(name, "yes" if state else "NO") for name, state in states]
        rows += [(name, getattr(self, name)) for name in (*_COSTS, *self._asked) if hasattr(self, name)]
        rows += list(self.settings.items())
        cells = (
            f"<tr><th style='text-align: left'>{html.escape(name)}</th>"
            f"<td style='text-align: left'>{html.escape(str(value))}</td></tr>"
            for name, value in rows
        )
        return f"<table><caption>{type(self).__name__}</caption>{''.join(cells)}</table>"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one ``.safetensors`` file, atomically.

        Parameters
        ----------
        path
            Where to write; parents are made. An existing file is replaced only once the new one is complete; a link
            stays, and the file that it points to is replaced.

        Returns
        -------
        pathlib.Path
            The file written.

        Raises
        ------
        PermissionError
            The file is read-only.
        OSError
            The file cannot be written.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        header = json.dumps({"kind": type(self).__name__, "fields": _packed(self, "", tensors)})
        write_tensors(tensors, path, _HEADER, header)
        return path


def load(path: str | os.PathLike[str]) -> Result:
    """Read a result that :meth:`Result.save` wrote.

    Parameters
    ----------
    path
        A ``.safetensors`` file.

    Returns
    -------
    Result
        Of the kind that was saved; tensors on the CPU.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is not a result of this package, or is damaged: a field of another type, shape or range, or fields that
        contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}: expected a file written by Result.save()")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); pass one that Result.save() wrote") from None
    if _HEADER in header:
        header = _mapping(header[_HEADER])
    elif "fields" in header:  # written before version 1.1, with an entry each
        header["fields"] = _mapping(header["fields"])
    name = header.get("kind", "no kind of result")
    kind = Result._kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"{path} holds {name!a:.60}, expected one of {sorted(Result._kinds)}")
    try:
        return _unpacked(kind, header["fields"], tensors)
    except FieldError as error:
        raise ValueError(f"{path} is damaged: {error}; write it anew") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(
            f"{path} is damaged: its header does not describe a {kind.__name__} ({reason}); write it anew"
        ) from None


def _mapping(text: str) -> dict[str, Any]:
    """Return the object in a text of JSON; an empty one if the text holds something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _packed(result: Result, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the plain fields of a result, and add its tensors to ``tensors`` under names that begin with a prefix."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(result):
        value, name = getattr(result, field.name), f"{prefix}{field.name}"
        items = list(value.values()) if isinstance(value, Mapping) else []
        if isinstance(value, Tensor):
            tensors[name] = _plain_copy(value)
        elif any(isinstance(item, Result) for item in items):
            packed = (_packed(item, f"{name}{_INSIDE}{index}{_INSIDE}", tensors) for index, item in enumerate(items))
            kinds = (type(item).__name__ for item in items)
            plain[field.name] = {_NESTED: list(zip(value, kinds, packed, strict=True))}
        elif any(isinstance(item, Tensor) for item in items):
            tensors |= {f"{name}{_INSIDE}{key}": _plain_copy(item) for key, item in value.items()}
        else:
            plain[field.name] = dict(value) if isinstance(value, Mapping) else value
    return plain


def _plain_copy(value: Tensor) -> Tensor:
    # A copy each: safetensors refuses tensors that share memory.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _unpacked(kind: type[Result], plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Result:
    """Return the result of which :func:`_packed` returned the plain fields and the tensors, without their prefix."""
    fields = dict(plain)
    inner: dict[str, Any] = {}
    for name, tensor in tensors.items():
        field, inside, key = name.partition(_INSIDE)
        if inside:
            inner.setdefault(field, {})[key] = tensor
        else:
            fields[field] = tensor
    for field, value in plain.items():
        if isinstance(value, dict) and set(value) == {_NESTED}:
            parts: dict[str, dict[str, Tensor]] = {}
            for name, tensor in inner.pop(field, {}).items():
                index, _, key = name.partition(_INSIDE)
                parts.setdefault(index, {})[key] = tensor
            fields[field] = {
                key: _unpacked(Result._kinds[name], inside, parts.get(str(index), {}))
                for index, (key, name, inside) in enumerate(value[_NESTED])
            }
    result = kind(**fields, **inner)
    check(result)
    return result


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list) else value


def column(values: Tensor) -> Any:
    """Return a tensor as a NumPy column of a table."""
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()  # NumPy has no bfloat16


def table(columns: Mapping[str, object]) -> pd.DataFrame:
    """Return a table of columns by name; a column is a tensor, a sequence, or one value for all rows."""
    frame: pd.DataFrame = pd.DataFrame(
        {name: column(values) if isinstance(values, Tensor) else values for name, values in columns.items()}
    )
    return frame


def row(result: Result, *names: str) -> pd.DataFrame:
    """Return some fields of a result as a table of one row."""
    frame: pd.DataFrame = pd.DataFrame([{name: getattr(result, name) for name in names}])
    return frame
