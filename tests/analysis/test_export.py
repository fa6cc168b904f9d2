"""What other programs read is what was measured: every number, at its place, under its name."""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import numpy.typing as npt
import pytest
import torch

from msam_analysis import export, results
from tests.builders import built, by_layer, measurement

xr = pytest.importorskip("xarray")
h5py = pytest.importorskip("h5py")
pytest.importorskip("h5netcdf")

Array = npt.NDArray[Any]
X, Y = torch.arange(-3.0, 4.0).double() / 3, torch.arange(13.0).double() / 4


def plane(**changes: Any) -> results.Slice2D:
    loss = 10 * X[:, None] + Y[None]
    loss[0, 1], loss[6, 12], loss[3, 0] = math.nan, math.inf, -math.inf
    samples = torch.arange(7 * 13 * 2.0).reshape(7, 13, 2)
    fields: dict[str, Any] = {
        "x": X,
        "y": Y,
        "loss": loss,
        "center_loss": 0.5,
        "directions": ('PCA 1 <&"é>', "second"),
        "metrics": {"train/accuracy": X[:, None] * Y[None], "of samples": samples},
        "evaluated": (torch.arange(7)[:, None] + torch.arange(13)[None]) % 2 == 0,
    }
    return built(results.Slice2D, **fields | changes)


def line() -> results.Slice1D:
    loss = torch.tensor([3.0, math.nan, 2.0, 1.0, math.inf, 2.0, 3.0]).double()
    return built(results.Slice1D, coordinates=X, loss=loss)


def projection(**changes: Any) -> results.Projection:
    fields: dict[str, Any] = {
        "steps": torch.tensor([0, 10, 20, 30, 40]),
        "coordinates": torch.arange(10.0).reshape(5, 2).double(),
        "distance": torch.arange(5.0).double(),
        "off_plane": torch.arange(5.0).double() / 3,
        "rounding": torch.zeros(5).double(),
        "loss": torch.tensor([100.0, 10.0, math.nan, 1.0, 0.1]).double(),
        "projected_loss": torch.tensor([90.0, 9.0, 2.0, 0.9, 0.09]).double(),
    }
    return built(results.Projection, **fields | changes)


KINDS: dict[str, Callable[[], results.Result]] = {
    "plane": plane,
    "line": line,
    "projection": projection,
    "bare projection": lambda: projection(loss=None, projected_loss=None),
    "trajectory": lambda: built(results.Trajectory, points=torch.arange(6.0).reshape(2, 3).bfloat16()),
    "eigenpairs": lambda: built(results.Eigenpairs),
    "by layer": by_layer,
    "measurement": measurement,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


# ------------------------------------------------------------------------------------------------------ labelled arrays


def test_a_plane_has_its_coordinates_as_dimensions() -> None:
    result = plane()
    data = export.to_xarray(result)
    assert dict(data.sizes)["x"] == 7
    assert dict(data.sizes)["y"] == 13
    assert data.loss.dims == ("x", "y")
    # by label, not by position
    for x, y in ((-1.0, 0.0), (1.0, 0.25), (-1.0, 3.0)):
        assert float(data.loss.sel(x=x, y=y)) == pytest.approx(10 * x + y)
    assert math.isnan(float(data.loss.sel(x=-1.0, y=0.25)))
    assert float(data.loss.sel(x=1.0, y=3.0)) == math.inf
    assert float(data.loss.isel(x=3).sel(y=0.0)) == -math.inf
    assert float(data["metrics.train.accuracy"].sel(x=1.0, y=3.0)) == 3.0
    assert data["metrics.of samples"].dims[:2] == ("x", "y")
    assert data.evaluated.dtype == bool
    assert data.x.attrs["direction"] == data.x.attrs["long_name"] == 'PCA 1 <&"é>'
    assert data.y.attrs["direction_norm"] == 0.1 + 0.2


def test_what_was_applied_and_where_goes_along() -> None:
    attributes = export.to_xarray(plane()).attrs
    assert attributes["kind"] == "Slice2D"
    assert attributes["directions"] == ['PCA 1 <&"é>', "second"]
    assert attributes["settings.batchnorm"] == "eval"
    assert attributes["settings.fraction"] == 0.1 + 0.2
    assert attributes["settings.cached"] == "true"
    assert attributes["settings.subset"] == "none"
    assert attributes["center_loss"] == 0.5
    assert "standard_error" not in attributes


def test_dimensions_of_the_other_kinds() -> None:
    dims = {
        kind: {str(name): item.dims for name, item in export.to_xarray(make()).variables.items()}
        for kind, make in KINDS.items()
    }
    assert dims["line"] == {"coordinate": ("coordinate",), "loss": ("coordinate",)}
    assert dims["projection"]["coordinates"] == ("step", "direction")
    assert dims["projection"]["off_plane"] == ("step",)
    assert "loss" not in dims["bare projection"]
    assert dims["trajectory"]["points"] == ("step", "parameter")
    assert dims["trajectory"]["metrics.loss"] == ("step",)
    assert dims["trajectory"]["buffers.bn.mean"] == ("step", "buffers.bn.mean_0")
    assert dims["eigenpairs"] == {
        "values": ("index",), "residuals": ("index",), "vectors": ("parameter", "index"),
    }  # fmt: skip


def test_a_line_is_labelled() -> None:
    data = export.to_xarray(line())
    assert float(data.loss.sel(coordinate=0.0)) == 1.0
    assert data.coordinate.attrs["direction_norm"] == 2.0


def test_a_square_plane_does_not_mix_up_its_axes() -> None:
    square = plane(y=X, loss=10 * X[:, None] + X[None], metrics={}, evaluated=None)
    assert float(export.to_xarray(square).loss.sel(x=1.0, y=-1.0)) == 9.0


def test_a_result_without_arrays_is_all_attributes(tmp_path: Path) -> None:
    made = results.Estimate(quantity="trace", value=1.0, standard_error=math.nan, draws=3, evaluations=3)
    data = export.to_xarray(made)
    assert not data.variables
    assert math.isnan(data.attrs["standard_error"])
    with xr.open_dataset(export.to_netcdf(made, tmp_path / "a.nc"), engine="h5netcdf") as back:
        assert back.attrs["quantity"] == "trace"


# ---------------------------------------------------------------------------------------------------------------- files


@each_kind
@pytest.mark.parametrize("write", [export.to_netcdf, export.to_hdf5])
def test_netcdf_and_hdf5_return_everything(kind: str, write: Callable[..., Path], tmp_path: Path) -> None:
    result = KINDS[kind]()
    path = write(result, tmp_path / "new" / "ball_rho0.5")
    assert path.name in ("ball_rho0.5.nc", "ball_rho0.5.h5")
    assert list(path.parent.iterdir()) == [path]
    with xr.open_dataset(path, engine="h5netcdf") as back:
        xr.testing.assert_identical(back.load(), export.to_xarray(result))
    assert write(result, tmp_path / path.name).read_bytes() == path.read_bytes()


def test_hdf5_read_without_any_convention(tmp_path: Path) -> None:
    with h5py.File(export.to_hdf5(plane(), tmp_path / "a.hdf5")) as file:
        np.testing.assert_array_equal(file["loss"][:], plane().loss)
        assert [scale[0].name for scale in file["loss"].dims] == ["/x", "/y"]
        np.testing.assert_array_equal(file["y"][:], Y)
        assert file.attrs["settings.samples"] == 19
        assert file["y"].attrs["direction"] == "second"


@each_kind
def test_numpy_archives_need_no_pickle(kind: str, tmp_path: Path) -> None:
    result = KINDS[kind]()
    path = export.to_npz(result, tmp_path / "a")
    labelled = export.to_xarray(result)
    with np.load(path, allow_pickle=False) as archive:
        attributes = json.loads(str(archive["attributes"]))
        names = {"coordinates": "coordinate"} if kind == "line" else {"steps": "step"}
        assert len(archive.files) == len(labelled.variables) + 1
        for name in set(archive.files) - {"attributes"}:
            item = labelled[names.get(name, name)]
            np.testing.assert_array_equal(archive[name], item.values)
            assert tuple(attributes["dimensions"][name]) == item.dims
    assert attributes["kind"] == type(result).__name__
    assert export.to_npz(result, tmp_path / "b.npz").read_bytes() == path.read_bytes()


def test_an_export_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: tuple[Callable[..., Path], ...] = (export.to_netcdf, export.to_hdf5, export.to_npz, export.to_vtk)
    old = [write(plane(), tmp_path / "a") for write in writers]
    contents = [path.read_bytes() for path in old]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", fail)
    monkeypatch.setattr(np, "savez_compressed", fail)
    monkeypatch.setattr(ET.ElementTree, "write", fail)
    for write in writers:
        with pytest.raises(OSError, match="disk full"):
            write(line() if write is export.to_netcdf else plane(), tmp_path / "a")
    assert sorted(tmp_path.iterdir()) == sorted(old)
    assert [path.read_bytes() for path in old] == contents


# ------------------------------------------------------------------------------------------------------------- ParaView

VTK_TYPES = {"Float64": np.float64, "Int64": np.int64, "UInt8": np.uint8, "Float32": np.float32}


def arrays(parent: ET.Element) -> dict[str, Array]:
    """Decode the arrays of an element as VTK's XML format defines them."""
    found = {}
    for item in parent.iter("DataArray"):
        assert item.get("format") == "binary"
        raw = base64.b64decode(item.text or "")
        length = int.from_bytes(raw[:8], sys.byteorder)
        assert length == len(raw) - 8
        values = np.frombuffer(raw[8:], VTK_TYPES[item.attrib["type"]])
        width = int(item.get("NumberOfComponents", "1"))
        found[item.attrib["Name"]] = values.reshape(-1, width) if width > 1 else values
    return found


def words(parent: ET.Element) -> Mapping[str, list[str]]:
    found = {}
    for item in parent.iter("Array"):
        assert (item.get("type"), item.get("format")) == ("String", "ascii")
        codes = bytes(int(code) for code in (item.text or "").split())
        found[item.attrib["Name"]] = codes.decode().split("\0")[:-1]
        assert len(found[item.attrib["Name"]]) == int(item.attrib["NumberOfTuples"])
    return found


def read(path: Path, kind: str) -> tuple[ET.Element, ET.Element]:
    """Return the data set and its piece."""
    root = ET.parse(path).getroot()  # noqa: S314 - written two lines above
    assert (root.tag, root.get("type"), root.get("header_type")) == ("VTKFile", kind, "UInt64")
    assert root.get("byte_order") == {"little": "LittleEndian", "big": "BigEndian"}[sys.byteorder]
    body = root[0]
    piece = body.find("Piece")
    assert piece is not None
    return body, piece


def part(parent: ET.Element, name: str) -> ET.Element:
    found = parent.find(name)
    assert found is not None
    return found


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("limits", [None, (0.5, 8.0)])
def test_a_surface_for_paraview(log: bool, limits: tuple[float, float] | None, tmp_path: Path) -> None:
    result = plane()
    path = export.to_vtk(result, tmp_path / "surface", log=log, limits=limits)
    assert path == tmp_path / "surface.vts"
    body, piece = read(path, "StructuredGrid")
    assert body.get("WholeExtent") == piece.get("Extent") == "0 6 0 12 0 0"
    points = arrays(part(piece, "Points"))["Points"].reshape(13, 7, 3)  # x runs fastest
    data = {name: values.reshape(13, 7) for name, values in arrays(part(piece, "PointData")).items()}
    assert part(piece, "PointData").get("Scalars") == "loss"
    np.testing.assert_array_equal(data["loss"].T, result.loss)
    np.testing.assert_array_equal(data["metrics.train.accuracy"].T, result.metrics["train/accuracy"])
    np.testing.assert_array_equal(data["evaluated"].T, result.evaluated)
    np.testing.assert_array_equal(points[:, :, 0], np.broadcast_to(X, (13, 7)))
    np.testing.assert_array_equal(points[:, :, 1].T, np.broadcast_to(Y, (7, 13)))
    with np.errstate(invalid="ignore"):
        height = result.loss.numpy() if limits is None else np.clip(result.loss.numpy(), *limits)
        height = np.log10(height) if log else height
    shown = np.isfinite(result.loss.numpy()) & np.isfinite(height)
    np.testing.assert_array_equal(data["vtkGhostType"].T == 0, shown)
    np.testing.assert_array_equal(points[:, :, 2].T[shown], height[shown])
    assert np.isfinite(points).all()
    fields = part(body, "FieldData")
    assert words(fields)["directions"] == ['PCA 1 <&"é>', "second"]
    assert words(fields)["settings.batchnorm"] == ["eval"]
    np.testing.assert_array_equal(arrays(fields)["direction_norms"], [1.0, 0.1 + 0.2])


@pytest.mark.parametrize("kind", ["line", "projection"])
def test_a_path_for_paraview_has_a_gap_where_the_loss_is_not_finite(kind: str, tmp_path: Path) -> None:
    result: Any = KINDS[kind]()
    path = export.to_vtk(result, tmp_path / "path.vtp", log=True)
    assert path == tmp_path / "path.vtp"
    body, piece = read(path, "PolyData")
    points = arrays(part(piece, "Points"))["Points"]
    lines = arrays(part(piece, "Lines"))
    expected = {"line": [[2, 3], [5, 6]], "projection": [[0, 1], [3, 4]]}[kind]
    assert [int(piece.attrib[f"NumberOf{what}"]) for what in ("Points", "Lines")] == [len(points), 2]
    assert np.split(lines["connectivity"], lines["offsets"][:-1])[0].tolist() == expected[0]
    assert np.split(lines["connectivity"], lines["offsets"][:-1])[1].tolist() == expected[1]
    joined = np.concatenate(expected)
    np.testing.assert_array_equal(points[joined, 2], np.log10(result.loss.numpy())[joined])
    data = arrays(part(piece, "PointData"))
    np.testing.assert_array_equal(data["loss"], result.loss)
    if kind == "projection":
        np.testing.assert_array_equal(points[:, :2], result.coordinates)
        np.testing.assert_array_equal(data["off_plane"], result.off_plane)
        np.testing.assert_array_equal(data["projected_loss"], result.projected_loss)
        assert words(part(body, "FieldData"))["label"] == ["MSAM"]
    else:
        np.testing.assert_array_equal(points[:, 0], result.coordinates)


# ------------------------------------------------------------------------------------------------------------- mistakes

loose: Any = export


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda p: loose.to_xarray({"loss": 1}), TypeError, "expected a result of this package, got dict"),
        (lambda p: loose.to_npz([1], p), TypeError, "got list"),
        (
            lambda p: loose.to_vtk(built(results.Eigenpairs), p),
            TypeError,
            "expected Slice1D, Slice2D or Projection, got Eigenpairs",
        ),
        (lambda p: export.to_vtk(plane(), p, limits=(2.0, 1.0)), ValueError, "the lower first"),
        (lambda p: export.to_vtk(plane(loss=torch.full((7, 13), math.nan)), p), ValueError, "no loss has a finite"),
        (lambda p: export.to_vtk(plane(loss=-torch.ones(7, 13)), p, log=True), ValueError, "set log=False"),
        (lambda p: export.to_vtk(projection(loss=None), p), ValueError, r"'MSAM' needs two coordinates and losses"),
        (lambda p: export.to_vtk(projection(coordinates=torch.ones(5, 1)), p), ValueError, "needs two coordinates"),
    ],
)
def test_refuses(call: Callable[[Path], object], kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        call(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["xarray", "h5netcdf"])
def test_a_missing_package_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf"needs {name}, which is not installed: pip install .msam-analysis\[export\]"
    ):
        export.to_hdf5(line(), tmp_path / "a")
    assert not list(tmp_path.iterdir())
    assert export.to_npz(line(), tmp_path / "a").exists()
