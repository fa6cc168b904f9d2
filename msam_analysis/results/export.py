"""Results for other programs: labelled arrays as NetCDF, HDF5 and NumPy files, surfaces and paths for ParaView.

Arrays keep the names of a result's fields, and dimensions say what they run over. All else (settings, names and norms
of directions, errors) goes along as attributes; an entry of a mapping is ``field.key``. For pandas, every result has
``to_frame()``. NaN and infinity stay what they are, and a file appears only when it is complete.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msam_analysis.results import Projection, Result, Slice1D, Slice2D, atomic_path

if TYPE_CHECKING:
    import xarray

Array = npt.NDArray[Any]

# Fields that are the axes of a grid, with the names of its dimensions. Other arrays of that shape lie on the grid.
_AXES: dict[str, dict[str, str]] = {
    "Slice1D": {"coordinates": "coordinate"},
    "Slice2D": {"x": "x", "y": "y"},
    "Trajectory": {"steps": "step"},
    "Projection": {"steps": "step"},
}
# What further dimensions are, by field.
_FURTHER: dict[str, tuple[str, ...]] = {
    "coordinates": ("direction",),
    "displacement": ("parameter",),
    "center": ("parameter",),
    "points": ("parameter",),
    "values": ("index",),
    "residuals": ("index",),
    "singular_values": ("component",),
}
_COLUMNS = {"Eigenpairs": ("parameter", "index"), "PrincipalPlane": ("parameter", "axis")}  # of the field `vectors`


# ------------------------------------------------------------------------------------------------------ labelled arrays


def to_xarray(result: Result) -> xarray.Dataset:
    """Return a result as labelled arrays.

    Parameters
    ----------
    result
        Any result of this package. Of a trajectory on disk all points are read.

    Returns
    -------
    xarray.Dataset
        A slice has its coordinates as dimensions (``coordinate``; ``x`` and ``y``), labelled with the directions, so
        that ``dataset.loss.sel(x=0, method="nearest")`` and ``dataset.loss.plot()`` do what they say.

    Raises
    ------
    TypeError
        Not a result.
    ImportError
        xarray is not installed.
    """
    xr = _imported("xarray")
    arrays, attributes = _labelled(result)
    axes = _AXES.get(type(result).__name__, {})
    coordinates = {axes[name]: values for name, (_, values) in arrays.items() if name in axes}
    data = {name: (dims, values) for name, (dims, values) in arrays.items() if name not in axes}
    dataset = xr.Dataset(data, coords=coordinates, attrs=attributes)
    named: dict[str, tuple[str, float]] = {}
    if isinstance(result, Slice1D):
        named = {"coordinate": (result.direction, result.direction_norm)}
    elif isinstance(result, Slice2D):
        named = dict(zip("xy", zip(result.directions, result.direction_norms, strict=True), strict=True))
    for dimension, (name, norm) in named.items():
        dataset[dimension].attrs.update(long_name=name, units="1", direction=name, direction_norm=norm)
    return dataset  # type: ignore[no-any-return]  # imported by its name


def to_netcdf(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write a result to a netCDF-4 file, as :func:`to_xarray` labels it; ``xarray.open_dataset`` reads it.

    Parameters
    ----------
    result
        See :func:`to_xarray`.
    path
        Where to write; parents are made. The suffix, here ``.nc``, is added unless it is there.

    Returns
    -------
    pathlib.Path
        The file written.

    Raises
    ------
    TypeError, ImportError
        As :func:`to_xarray`; h5netcdf must be installed too.
    """
    _imported("h5netcdf")
    dataset = to_xarray(result)
    path = _with_suffix(path, ".nc")
    with atomic_path(path) as partial:
        dataset.to_netcdf(partial, engine="h5netcdf")
    return path


def to_hdf5(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write a result to an HDF5 file: a data set for each array with its dimension scales, the rest as attributes.

    It follows the netCDF-4 conventions, so that ``h5py``, MATLAB and Julia's HDF5 read it like any other, and netCDF
    readers too.

    Parameters, return value and errors as for :func:`to_netcdf`; the suffix is ``.h5``, ``.hdf5`` where that is given.
    """
    path = _with_suffix(path, ".h5", ".hdf5")
    with atomic_path(path) as partial:
        to_netcdf(result, partial.with_suffix(".nc")).replace(partial)
    return path


def to_npz(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write a result to a NumPy archive; ``numpy.load(path)`` reads it, without pickle.

    Parameters
    ----------
    result, path
        As for :func:`to_netcdf`; the suffix is ``.npz``.

    Returns
    -------
    pathlib.Path
        The file written: every array under its field's name, and as ``attributes`` one string of JSON with the rest
        and, under ``dimensions``, what each axis of each array is.

    Raises
    ------
    TypeError
        Not a result.
    """
    arrays, attributes = _labelled(result)
    attributes |= {"dimensions": {name: dims for name, (dims, _) in arrays.items()}}
    path = _with_suffix(path, ".npz")
    with atomic_path(path) as partial, partial.open("wb") as file:
        known: dict[str, Any] = {name: values for name, (_, values) in arrays.items()}
        np.savez_compressed(file, attributes=np.array(json.dumps(attributes)), **known)
    return path


def _labelled(result: Result) -> tuple[dict[str, tuple[tuple[str, ...], Array]], dict[str, Any]]:
    """Return every array of a result with its dimensions, and all else in values that every format knows."""
    if not isinstance(result, Result):
        raise TypeError(
            f"expected a result of this package, got {type(result).__name__}: export what a function returned"
        )
    kind = type(result).__name__
    axes = _AXES.get(kind, {})
    grid = tuple(len(getattr(result, name)) for name in axes)
    arrays: dict[str, tuple[tuple[str, ...], Array]] = {}
    attributes: dict[str, Any] = {}
    for name, value in _entries(result):
        if not isinstance(value, Tensor):
            attributes[name] = _plain(value)
            continue
        array = _numpy(value)
        if name in axes and array.ndim == 1:
            arrays[name] = (axes[name],), array
            continue
        known = tuple(axes.values()) if grid and array.shape[: len(grid)] == grid else ()
        rest = array.ndim - len(known)
        further = _COLUMNS.get(kind, ()) if name == "vectors" else _FURTHER.get(name, ())
        if len(further) != rest:
            further = tuple(f"{name}_{axis}" for axis in range(rest))
        arrays[name] = (*known, *further), array
    return arrays, attributes


def _entries(result: Result) -> Iterator[tuple[str, Any]]:
    """Give what a result holds, and the results in it: its kind, and ``field`` or ``field.key`` with the value."""
    yield "kind", type(result).__name__
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if field.name == "points":
            yield field.name, torch.stack([value[index] for index in range(len(value))])
        elif isinstance(value, Mapping):
            for key, item in value.items():
                entry = f"{field.name}.{key}".replace("/", ".")  # a slash in a name is a folder in an HDF5 file
                if isinstance(item, Result):
                    yield from ((f"{entry}.{name}", part) for name, part in _entries(item))
                else:
                    yield entry, item
        elif value is not None:
            yield field.name, value


def _numpy(values: Tensor) -> Array:
    values = values.detach().cpu()
    array: Array = (values.float() if values.dtype is torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    return array


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]  # attributes of netCDF are numbers or text
    if isinstance(value, str | int | float):
        return value
    items = list(value)
    if items and (all(isinstance(item, str) for item in items) or all(type(item) is float for item in items)):
        return items
    return json.dumps(items)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this export needs {name}, which is not installed: pip install 'msam-analysis[export]'"
        ) from error


def _with_suffix(path: str | os.PathLike[str], *suffixes: str) -> Path:
    path = Path(path)
    return path if path.suffix in suffixes else path.with_name(path.name + suffixes[0])


# ------------------------------------------------------------------------------------------------------------- ParaView


def to_vtk(
    result: Slice2D | Slice1D | Projection,
    path: str | os.PathLike[str],
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
) -> Path:
    """Write a slice as a surface, or a line or projected trajectory as a path, for ParaView and other readers of VTK.

    The format is VTK's XML, version 1.0, with the arrays in base64.

    Parameters
    ----------
    result
        A plane becomes a structured grid (``.vts``); a line, or a projection with measured losses, a path (``.vtp``).
    path
        The suffix is added unless it is there.
    log
        Height ``log10(loss)`` instead of the loss.
    limits
        Losses beyond are drawn at the nearer limit, so that one spike does not dwarf the rest; the arrays keep what
        was measured.

    Returns
    -------
    pathlib.Path
        The file written. ``z`` is the loss; of a projection the true one. The loss and everything else measured at the
        points are its point arrays, settings and names its field data. A point without a finite height is blanked
        on a surface and leaves a gap in a path.

    Raises
    ------
    TypeError
        A result of another kind.
    ValueError
        A projection without losses or not on a plane, no finite height, or limits that are not two increasing numbers.
    """
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(f"limits must be two numbers, the lower first, got {limits!r}: swap them")
    if isinstance(result, Slice2D):
        kind, suffix = "StructuredGrid", ".vts"
        x, y = np.meshgrid(_numpy(result.x), _numpy(result.y), indexing="ij")
    elif isinstance(result, Slice1D):
        kind, suffix = "PolyData", ".vtp"
        x = _numpy(result.coordinates)
        y = np.zeros_like(x)
    elif isinstance(result, Projection):
        kind, suffix = "PolyData", ".vtp"
        if result.loss is None or result.coordinates.shape[1] != 2:
            raise ValueError(
                f"the projection of {result.label!r} needs two coordinates and losses to have a height: "
                "project it onto a plane with objective=..."
            )
        x, y = _numpy(result.coordinates).T
    else:
        raise TypeError(
            f"expected Slice1D, Slice2D or Projection, got {type(result).__name__}: nothing else has a shape"
        )
    labelled, attributes = _labelled(result)
    on_grid = tuple(_AXES[type(result).__name__].values())
    arrays = {name: values for name, (dims, values) in labelled.items() if dims == on_grid}
    z, finite = _height(arrays["loss"], log, limits)
    # VTK's first index runs fastest
    points = np.stack([part.ravel(order="F") for part in (x, y, z)], axis=1)
    root = ET.Element("VTKFile", type=kind, version="1.0", byte_order=_ORDER, header_type="UInt64")
    body = ET.SubElement(root, kind)
    _write_fields(body, attributes)
    if isinstance(result, Slice2D):
        extent = f"0 {x.shape[0] - 1} 0 {x.shape[1] - 1} 0 0"
        body.set("WholeExtent", extent)
        piece = ET.SubElement(body, "Piece", Extent=extent)
        arrays["vtkGhostType"] = np.where(finite, 0, _HIDDEN_POINT).astype(np.uint8)
    else:
        runs = _runs(finite)
        counts = {"NumberOfPoints": len(points), "NumberOfVerts": 0, "NumberOfLines": len(runs)}
        counts |= {"NumberOfStrips": 0, "NumberOfPolys": 0}
        piece = ET.SubElement(body, "Piece", {name: str(count) for name, count in counts.items()})
        lines = ET.SubElement(piece, "Lines")
        _write_array(lines, "connectivity", np.concatenate([np.zeros(0, dtype=np.int64), *runs]))
        _write_array(lines, "offsets", np.cumsum([len(run) for run in runs], dtype=np.int64))
    at_points = ET.SubElement(piece, "PointData", Scalars="loss")
    for name, values in arrays.items():
        _write_array(at_points, name, values.ravel(order="F"))
    _write_array(ET.SubElement(piece, "Points"), "Points", points)
    path = _with_suffix(path, suffix)
    with atomic_path(path) as partial:
        ET.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=True)
    return path


_ORDER = "LittleEndian" if sys.byteorder == "little" else "BigEndian"
_HIDDEN_POINT = 2  # vtkDataSetAttributes::HIDDENPOINT
_VTK_TYPES = {"f": "Float", "i": "Int", "u": "UInt"}


def _height(loss: Array, log: bool, limits: tuple[float, float] | None) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the height of every point, and where there is one; elsewhere it is that of the highest."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(np.isfinite(loss), loss, np.nan).astype(np.float64)
        z = z if limits is None else np.clip(z, *limits)
        z = np.log10(z) if log else z
    finite = np.isfinite(z)
    if not finite.any():
        raise ValueError(
            "no loss has a finite height, so there is nothing to write: look at the losses, or set log=False"
        )
    return np.where(finite, z, z[finite].max()), finite


def _runs(finite: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
    """Return the indices of consecutive points that can be joined."""
    indices = np.flatnonzero(finite).astype(np.int64)
    return [run for run in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if len(run) > 1]


def _write_array(parent: ET.Element, name: str, values: Array) -> None:
    values = values.astype(np.uint8) if values.dtype == np.bool_ else np.ascontiguousarray(values)
    kind = f"{_VTK_TYPES[values.dtype.kind]}{8 * values.dtype.itemsize}"
    components = str(values.shape[1] if values.ndim > 1 else 1)
    element = ET.SubElement(parent, "DataArray", type=kind, Name=name, NumberOfComponents=components)
    element.set("format", "binary")
    element.text = base64.b64encode(np.uint64(values.nbytes).tobytes() + values.tobytes()).decode()


def _write_fields(parent: ET.Element, attributes: Mapping[str, Any]) -> None:
    fields = ET.SubElement(parent, "FieldData")
    for name, value in attributes.items():
        items: Sequence[Any] = value if isinstance(value, list) else [value]
        count = str(len(items))
        if isinstance(items[0], str):
            codes = " ".join(str(byte) for item in items for byte in (*item.encode(), 0))
            array = ET.SubElement(fields, "Array", type="String", Name=name, NumberOfTuples=count)
            array.set("format", "ascii")
            array.text = codes
        else:
            _write_array(fields, name, np.asarray(items, dtype=np.float64))
            fields[-1].set("NumberOfTuples", count)


__all__ = ["to_hdf5", "to_netcdf", "to_npz", "to_vtk", "to_xarray"]


def __dir__() -> list[str]:
    return list(__all__)
