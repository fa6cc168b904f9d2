"""What every result can do: become a table, be written to one safe file and be read from it."""

from __future__ import annotations

import abc
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msam_analysis.results.files import atomic_path

Settings = Mapping[str, str | int | float | bool | None]

_INSIDE = "/"  # between a field's name and the key of a tensor in it


class ConvergenceWarning(UserWarning):
    """An iteration stopped before it reached the tolerance it was asked for."""


class ApproximationWarning(UserWarning):
    """A number is coarser than it looks: what was asked for had to be replaced, or was rounded away."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result(abc.ABC):
    """Base of every result.

    Attributes
    ----------
    settings
        What the measurement was made on: BatchNorm policy, number of samples, parameters, data type, device.
    """

    settings: Settings = dataclasses.field(default_factory=dict)

    _kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls) -> None:
        """Register the kind, so that :func:`load` finds it by name."""
        Result._kinds[cls.__name__] = cls

    @abc.abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """Return the result as a tidy table; each kind says what its rows are."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to one ``.safetensors`` file, atomically.

        Parameters
        ----------
        path
            Where to write; parents are made. An existing file is replaced only once the new one is complete.

        Returns
        -------
        pathlib.Path
            The file written.
        """
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                # A copy each: safetensors refuses tensors that share memory.
                tensors[field.name] = _plain_copy(value)
            elif isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
                tensors |= {f"{field.name}{_INSIDE}{key}": _plain_copy(item) for key, item in value.items()}
            else:
                plain[field.name] = dict(value) if isinstance(value, Mapping) else value
        header = {"kind": type(self).__name__, "fields": json.dumps(plain)}
        with atomic_path(path) as partial:
            save_file(tensors, partial, metadata=header)
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
        The file is not a result of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}: expected a file written by Result.save()")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); pass one that Result.save() wrote") from None
    kind = Result._kinds.get(header.get("kind", ""))
    if kind is None:
        raise ValueError(
            f"{path} holds {header.get('kind', 'no kind of result')!r}, expected one of {sorted(Result._kinds)}"
        )
    try:
        return kind(**json.loads(header["fields"]), **_nested(tensors))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged: its header does not describe a {kind.__name__} ({type(error).__name__}: {error}); "
            "write it anew"
        ) from None


def _plain_copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors of a file as fields: those of one mapping together."""
    fields: dict[str, Any] = {}
    for name, tensor in tensors.items():
        field, inside, key = name.partition(_INSIDE)
        if inside:
            fields.setdefault(field, {})[key] = tensor
        else:
            fields[field] = tensor
    return fields


def column(values: Tensor) -> Any:
    """Return a tensor as a NumPy column of a table."""
    return values.detach().cpu().numpy()
