"""Weight vectors on disk: a folder with one ``.safetensors`` file for each point, which is complete or absent.

``trajectory.safetensors`` says what the vectors are made of, and holds the first one where the others are stored as
differences to it. ``step-000000000120.safetensors`` holds the point of step 120, the buffers of that moment, and in its
header the numbers recorded with it. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msam_analysis.results.checking import is_count, is_number
from msam_analysis.results.files import write_tensors
from msam_analysis.results.trajectories import Trajectory

_HEADER = "trajectory.safetensors"
_ENTRY = "trajectory"
_FORMAT = "msam-analysis trajectory, format 1"
_BUFFER, _WEIGHTS = "buffer/", "weights"
_LARGEST_EXPONENT = 1000
_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}  # of safetensors
_DTYPES = {str(one).removeprefix("torch."): one for one in _CODES}


def point_path(folder: Path, step: int) -> Path:
    """Return where the point of a step is, or would be."""
    return folder / f"step-{step:012d}.safetensors"


def stored_steps(folder: Path) -> list[int]:
    """Return the steps that have a complete point, in order; files of other names are none of ours."""
    names = (path.stem.removeprefix("step-") for path in folder.glob("step-*.safetensors"))
    return sorted(int(name) for name in names if re.fullmatch(r"[0-9]{12}", name))


def encode(vector: Tensor, origin: Tensor | None) -> tuple[Tensor, int, float]:
    """Return a point as it is stored: the tensor, its exponent, and the L2 distance that is lost.

    Without ``origin`` the point itself. With it ``(w − origin) · 2^exponent`` in float16, the exponent such that the
    largest entry is between 2^14 and 2^15: nothing overflows, and what is 2^29 times smaller keeps its eleven bits.
    """
    if origin is None:
        return vector, 0, 0.0
    difference = vector.double() - origin.double()
    largest = float(difference.abs().where(difference.isfinite(), 0.0).max())
    exponent = min(15 - math.frexp(largest)[1], _LARGEST_EXPONENT) if largest > 0 else 0
    stored = (difference * 2.0**exponent).to(torch.float16)
    lost = decode(stored, origin, exponent, vector.dtype).double() - vector.double()
    return stored, exponent, float(torch.linalg.vector_norm(lost))


def decode(stored: Tensor, origin: Tensor | None, exponent: int, dtype: torch.dtype) -> Tensor:
    """Return the point, or a piece of it, from what is stored and the same piece of the origin."""
    if origin is None:
        return stored
    return (stored.double() * 2.0**-exponent).add_(origin).to(dtype)


class StoredPoints:
    """The points of a folder, read when asked for: a file and an exponent for each, as :func:`encode` stored them."""

    def __init__(
        self, files: Sequence[Path], exponents: Sequence[int], origin: Tensor | None, dtype: torch.dtype
    ) -> None:
        self.files, self.exponents = tuple(files), tuple(exponents)
        self.origin, self.dtype = origin, dtype

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """Return one point, shape ``(size,)``."""
        with _opened(self.files[index]) as file:
            return decode(file.get_tensor(_WEIGHTS), self.origin, self.exponents[index], self.dtype)

    def columns(self, start: int, stop: int) -> Tensor:
        """Return some entries of every point, shape ``(n, stop − start)``; the rest of the files is not read."""
        origin = None if self.origin is None else self.origin[start:stop]
        rows = []
        for path, exponent in zip(self.files, self.exponents, strict=True):
            with _opened(path) as file:
                rows.append(decode(file.get_slice(_WEIGHTS)[start:stop], origin, exponent, self.dtype))
        return torch.stack(rows)

    def select(self, indices: Sequence[int]) -> StoredPoints:
        """Return some of the points."""
        files = [self.files[index] for index in indices]
        return StoredPoints(files, [self.exponents[index] for index in indices], self.origin, self.dtype)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): expected a point that a TrajectoryRecorder wrote; "
            "if the disk lost it, delete the file and the other points can be read"
        ) from None


def write_header(folder: Path, origin: Tensor | None, fields: Mapping[str, Any]) -> None:
    """Begin a folder: ``fields`` are ``label``, ``names``, ``shapes``, ``dtype`` and ``settings``."""
    header = json.dumps({"format": _FORMAT, "fields": dict(fields)})
    write_tensors({} if origin is None else {"origin": origin}, folder / _HEADER, _ENTRY, header)


def write_point(
    folder: Path,
    step: int,
    vector: Tensor,
    origin: Tensor | None,
    buffers: Mapping[str, Tensor],
    notes: Mapping[str, Any],
) -> None:
    """Add a point with the numbers in ``notes``; its file appears under its name only when it is complete."""
    stored, exponent, rounding = encode(vector, origin)
    tensors = {"weights": stored} | {f"{_BUFFER}{name}": values for name, values in buffers.items()}
    header = {**notes, "step": step, "exponent": exponent, "rounding": rounding}
    write_tensors(tensors, point_path(folder, step), "fields", json.dumps(header))


def read_header(folder: Path) -> tuple[dict[str, Any], Tensor | None]:
    """Return the fields of a folder and its origin; raise an error where there is none, or one of another format."""
    path = folder / _HEADER
    if not path.is_file():
        raise FileNotFoundError(f"no trajectory in {folder}: expected a folder that a TrajectoryRecorder wrote to")
    with _opened(path) as file:
        header: dict[str, Any] = file.metadata() or {}
        if _ENTRY in header:
            header = _object(path, header[_ENTRY])
        elif "fields" in header:  # as written before, with an entry each
            header["fields"] = _object(path, header["fields"])
        if header.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is of the format {header.get('format')!r}, expected {_FORMAT!r}: "
                "read it with the version of the package that wrote it"
            )
        origin = file.get_tensor("origin") if "origin" in file.keys() else None  # noqa: SIM118 - not a mapping
    fields = header.get("fields")
    if not isinstance(fields, dict):
        raise _damaged(path, "its header has no fields")
    shapes, dtype = fields.get("shapes"), _DTYPES.get(str(fields.get("dtype")))
    sizes = [_size(shape) for shape in shapes] if isinstance(shapes, list) else [None]
    names = fields.get("names")
    whole = isinstance(names, list) and len(names) == len(sizes) and all(isinstance(name, str) for name in names)
    settings = fields.get("settings")
    plain = isinstance(settings, dict) and not any(isinstance(value, dict | list) for value in settings.values())
    if not (whole and plain and dtype and isinstance(fields.get("label"), str)) or None in sizes:
        raise _damaged(path, "its header does not say label, names, shapes, dtype and settings")
    total = sum(size for size in sizes if size is not None)
    known = origin is None or (origin.is_floating_point() and origin.itemsize > 1)  # float8 computes nothing
    if origin is not None and (origin.shape != (total,) or not known):
        raise _damaged(path, f"its origin has the shape {tuple(origin.shape)}, expected ({total},)")
    return fields, origin


def read_notes(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the numbers and the buffers that were recorded with a point."""
    path = point_path(folder, step)
    with _opened(path) as file:
        names = list(file.keys())
        notes = _object(path, (file.metadata() or {}).get("fields"))
        metrics, exponent = notes.get("metrics"), notes.get("exponent")
        known = isinstance(metrics, dict) and all(map(is_number, [*metrics.values(), notes.get("rounding")]))
        counts = [notes.get("step"), notes.get("stride")]
        if not (known and all(is_count(count) for count in counts)) or notes["step"] != step or notes["stride"] < 1:
            raise _damaged(path, f"its header does not say step {step}, stride, rounding and metrics as numbers")
        if type(exponent) is not int or abs(exponent) > _LARGEST_EXPONENT or type(notes.get("keep")) is not bool:
            raise _damaged(path, "its header does not say exponent and keep")
        if _WEIGHTS not in names:
            raise _damaged(path, "it holds no weights")
        return notes, {n.removeprefix(_BUFFER): file.get_tensor(n) for n in names if n.startswith(_BUFFER)}


def _object(path: Path, text: Any) -> dict[str, Any]:
    """Return the object in the text of a header."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _damaged(path, "its header is no JSON object")
    return found


def _size(shape: Any) -> int | None:
    """Return the number of entries of a shape; None if it is no shape."""
    return math.prod(shape) if isinstance(shape, list) and all(map(is_count, shape)) else None


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {what}; if the disk lost it, delete the file, and the points in the others can be read"
    )


def load_trajectory(folder: str | os.PathLike[str]) -> Trajectory:
    """Open a trajectory that a :class:`~msam_analysis.TrajectoryRecorder` wrote, also while it still does.

    Parameters
    ----------
    folder
        The recorder's ``path``.

    Returns
    -------
    Trajectory
        With the points recorded so far; each is read from disk when it is asked for.

    Raises
    ------
    FileNotFoundError
        There is no trajectory in this folder.
    ValueError
        A file in it is damaged or of another format.
    """
    folder = Path(folder)
    fields, origin = read_header(folder)
    steps = stored_steps(folder)
    files = [point_path(folder, step) for step in steps]
    read = [read_notes(folder, step) for step in steps]
    notes, buffers = [item[0] for item in read], [item[1] for item in read]
    shapes = [[(name, value.dtype, value.shape) for name, value in sorted(item.items())] for item in buffers]
    if unlike := next((file for file, one in zip(files, shapes, strict=True) if one != shapes[0]), None):
        raise _damaged(unlike, f"its buffers are not those of {files[0].name}")
    size = sum(math.prod(shape) for shape in fields["shapes"])
    kind = _CODES[_DTYPES[fields["dtype"]] if origin is None else torch.float16]
    for path in files:
        with _opened(path) as file:
            weights = file.get_slice(_WEIGHTS)
            shape, code = weights.get_shape(), weights.get_dtype()
        if shape != [size] or code != kind:
            raise _damaged(path, f"its weights are {code} of the shape {tuple(shape)}, expected {kind} of ({size},)")
    metrics = dict.fromkeys(name for item in notes for name in item["metrics"])
    dtype = _DTYPES[fields["dtype"]]
    return Trajectory(
        label=fields["label"],
        steps=torch.tensor(steps, dtype=torch.int64),
        points=StoredPoints(files, [item["exponent"] for item in notes], origin, dtype),
        rounding=_numbers(item["rounding"] for item in notes),
        names=fields["names"],
        shapes=fields["shapes"],
        metrics={name: _numbers(item["metrics"].get(name, math.nan) for item in notes) for name in metrics},
        buffers={name: torch.stack([item[name] for item in buffers]) for name in (buffers[0] if buffers else ())},
        settings=fields["settings"],
    )


def _numbers(values: Any) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
