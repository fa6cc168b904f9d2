"""Results survive a file unchanged, and a failing save leaves nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import msam_analysis as ma
from msam_analysis import results

SETTINGS = {"batchnorm": "eval", "samples": 19, "fraction": 0.5, "cached": True, "subset": None}


def eigenpairs(**changes: Any) -> results.Eigenpairs:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "values": torch.tensor([3.0, -1.0]).double(),
        "vectors": torch.eye(5, 2).double(),
        "residuals": torch.tensor([1e-7, math.nan], dtype=torch.float64),
        "converged": False,
        "hvps": 17,
        "method": "lanczos",
        "which": "largest",
        "tolerance": 1e-4,
    }
    return results.Eigenpairs(**fields | changes)


def ball(**changes: Any) -> results.BallSharpness:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "sharpness": 0.1 + 0.2,
        "one_step": 0.1,
        "loss": math.inf,
        "displacement": torch.linspace(0, 1, 5),
        "rho": 0.05,
        "norm": "l2",
        "adaptive": True,
        "starts": {"gradient": 0.3, "random": 0.2},
        "spread": 1 / 3,
        "stationarity": math.nan,
        "converged": True,
        "gradients": 40,
        "hvps": 0,
    }
    return results.BallSharpness(**fields | changes)


def line(**changes: Any) -> results.Slice1D:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "coordinates": torch.linspace(-1, 1, 3).double(),
        "loss": torch.tensor([math.nan, 1 / 3, -math.inf], dtype=torch.float64),
        "center_loss": 1 / 3,
        "direction": "random (filter)",
        "direction_norm": 2.0,
    }
    return results.Slice1D(**fields | changes)


def surface(**changes: Any) -> results.Slice2D:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "x": torch.tensor([-1.0, 0.0, 1.0]).double(),
        "y": torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).double(),
        "loss": torch.arange(15.0).reshape(3, 5).double(),
        "center_loss": 7.0,
        "directions": ("first", "second"),
        "direction_norms": (1.0, 0.1 + 0.2),
        "cosine": 1e-17,
    }
    return results.Slice2D(**fields | changes)


def estimate(**changes: Any) -> results.Estimate:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "quantity": "trace",
        "value": 0.1 + 0.2,
        "standard_error": math.nan,
        "draws": 3,
        "evaluations": 3,
    }
    return results.Estimate(**fields | changes)


def interval(**changes: Any) -> results.DataInterval:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        **{
            name: torch.tensor([0.1 + 0.2, math.nan], dtype=torch.float64)
            for name in ("value", "bias", "standard_error", "low", "high")
        },
        "replicates": torch.eye(3, 2).double(),
        "samples": 19,
        "method": "jackknife",
        "level": 0.68,
        "failed": 1,
        "converged": False,
    }
    return results.DataInterval(**fields | changes)


def batch_sharpness(**changes: Any) -> results.BatchSharpness:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "value": 0.1 + 0.2,
        "standard_error": math.nan,
        "rises": torch.tensor([0.1, math.inf, 1 / 3], dtype=torch.float64),
        "one_steps": torch.tensor([0.05, math.nan, -0.1], dtype=torch.float64),
        "sizes": torch.tensor([8, 8, 3]),
        "m": 8,
        "rho": 0.05,
        "norm": "linf",
        "adaptive": "filter",
        "batches": 5,
        "converged": False,
        "gradients": 90,
        "hvps": 36,
    }
    return results.BatchSharpness(**fields | changes)


def certificate(**changes: Any) -> results.Certificate:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "verdict": "local maximum",
        "multiplier": 1 / 3,
        "residual": 1e-17,
        "relative_residual": math.nan,
        "curvature": -math.inf,
        "curvature_residual": 0.0,
        "gain": 0.1 + 0.2,
        "on_surface": True,
        "dimensions": 0,
        "converged": True,
        "tolerance": 1e-2,
        "hvps": 0,
    }
    return results.Certificate(**fields | changes)


def directional(**changes: Any) -> results.DirectionalSharpness:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "sharpness": 1 / 3,
        "largest": math.inf,
        "at": -0.5,
        "coordinates": torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64),
        "rises": torch.tensor([math.inf, 0.0, 1 / 3], dtype=torch.float64),
        "resolution": 1e-17,
        "loss": 0.1,
        "displacement": torch.linspace(0, 1, 5),
        "direction": "random (filter)",
        "rho": 0.5,
        "evaluations": 3,
    }
    return results.DirectionalSharpness(**fields | changes)


def projection(**changes: Any) -> results.Projection:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "label": "MSAM",
        "steps": torch.tensor([0, 10]),
        "coordinates": torch.tensor([[0.1 + 0.2, math.nan], [1.0, -0.0]]).double(),
        "distance": torch.tensor([1.0, math.inf]).double(),
        "off_plane": torch.tensor([0.5, math.nan]).double(),
        "rounding": torch.zeros(2).double(),
        "directions": ("PCA 1 (90.0 %)", "PCA 2 (9.0 %)"),
        "direction_norms": (1.0, 0.1 + 0.2),
        "loss": torch.tensor([1 / 3, math.inf]).double(),
        "projected_loss": None,
        "center_loss": 1e-17,
    }
    return results.Projection(**fields | changes)


def trajectory(**changes: Any) -> results.Trajectory:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "label": "SGD",
        "steps": torch.tensor([0, 5]),
        "points": torch.tensor([[1.0, 2.0, 3.0], [math.nan, 0.5, -math.inf]]),
        "rounding": torch.tensor([0.0, math.nan]).double(),
        "names": ("a", "b"),
        "shapes": ((2, 1), (1,)),
        "metrics": {"loss": torch.tensor([1 / 3, math.nan]).double()},
        "buffers": {"bn.mean": torch.arange(4.0).reshape(2, 2), "bn.count": torch.tensor([3, 4])},
    }
    return results.Trajectory(**fields | changes)


def density() -> results.Result:
    return ma.spectral_density(ma.MatrixOperator(torch.diag(torch.arange(6.0).double())), extremes=1)


def angles(**changes: Any) -> results.SamMsamAngle:
    fields: dict[str, Any] = {
        "settings": SETTINGS,
        "rhos": torch.tensor([0.0, 0.1 + 0.2, 1.0]).double(),
        "angles": torch.tensor([20.0, 1 / 3, math.nan]).double(),
        "shares": torch.tensor([1.0, 0.9, 0.0]).double(),
        "rho_0": math.nan,
        "bracket": (0.1 + 0.2, 1.0),
        "rho_sam": 0.05,
    }
    return results.SamMsamAngle(**fields | changes)


KINDS: dict[str, Callable[..., results.Result]] = {
    "Eigenpairs": eigenpairs,
    "BallSharpness": ball,
    "BatchSharpness": batch_sharpness,
    "Certificate": certificate,
    "DirectionalSharpness": directional,
    "DataInterval": interval,
    "Slice1D": line,
    "Slice2D": surface,
    "SpectralDensity": density,
    "Estimate": estimate,
    "Projection": projection,
    "SamMsamAngle": angles,
    "Trajectory": trajectory,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        same_type = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same_type and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def check_same(a: results.Result, b: results.Result) -> None:
    assert type(a) is type(b)
    assert vars(a).keys() == vars(b).keys()
    assert [name for name in vars(a) if not same(vars(a)[name], vars(b)[name])] == []


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_every_kind_is_in_the_table() -> None:
    public = {name for name in results.__all__ if not name.endswith(("Result", "Warning", "Settings"))}
    kinds = {name for name in public if name[0].isupper()}
    assert kinds == set(KINDS)


@each_kind
def test_round_trip(kind: str, tmp_path: Path) -> None:
    result = KINDS[kind]()
    path = result.save(tmp_path / "deep" / "er" / "result.safetensors")
    assert path == tmp_path / "deep" / "er" / "result.safetensors"
    assert files(path.parent) == ["result.safetensors"]
    check_same(ma.results.load(path), result)
    check_same(ma.results.load(str(path)), result)
    pd.testing.assert_frame_equal(ma.results.load(path).to_frame(), result.to_frame())


@each_kind
def test_results_are_frozen(kind: str) -> None:
    result = KINDS[kind]()
    with pytest.raises(AttributeError):
        result.settings = {}  # type: ignore[misc]


def test_measured_results_round_trip(tmp_path: Path) -> None:
    """What the package itself makes, with the tensors as they come: shared, strided or transposed."""
    model = torch.nn.Linear(3, 2).double()
    objective = ma.Objective(model, torch.nn.functional.mse_loss, (torch.eye(3).double(), torch.ones(3, 2).double()))
    direction = ma.directions.random(objective)
    for index, result in enumerate(
        [
            ma.top_eigenvalues(objective, k=2),
            ma.top_eigenvalues(objective, k=1, method="power"),
            ma.trace(objective, draws=4),
            ma.ball_sharpness(objective, 0.1),
            ma.ball_sharpness(objective, 0.1, norm="linf", adaptive=True),
            ma.average_sharpness(objective, 0.1, draws=4),
            ma.slice_1d(objective, direction, points=3),
            ma.slice_2d(objective, (direction, ma.directions.gradient(objective)), points=3),
            ma.slice_2d(objective, (direction, direction), points=(3, 5)),
        ]
    ):
        path = result.save(tmp_path / f"{index}.safetensors")
        check_same(ma.results.load(path), result)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    """A square grid has one tensor for both axes; rows of one array are no copies."""
    axis = torch.tensor([-1.0, 0.0, 1.0]).double()
    square = surface(x=axis, y=axis, loss=torch.zeros(3, 3).double())
    check_same(ma.results.load(square.save(tmp_path / "a.safetensors")), square)
    rows = torch.arange(6.0).reshape(2, 3).double()
    shared = line(coordinates=rows[0], loss=rows[1])
    check_same(ma.results.load(shared.save(tmp_path / "b.safetensors")), shared)
    transposed = eigenpairs(vectors=torch.arange(10.0).reshape(2, 5).T)
    check_same(ma.results.load(transposed.save(tmp_path / "c.safetensors")), transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    result = ball(displacement=torch.linspace(0, 1, 5).to(dtype))
    loaded = ma.results.load(result.save(tmp_path / "a.safetensors"))
    assert isinstance(loaded, results.BallSharpness)
    assert loaded.displacement.dtype == dtype
    assert torch.equal(loaded.displacement, result.displacement)


# --- frames


def test_eigenpairs_frame() -> None:
    frame = eigenpairs().to_frame()
    assert list(frame.columns) == ["index", "value", "residual", "method", "converged"]
    assert frame["index"].tolist() == [1, 2]
    assert frame["value"].tolist() == [3.0, -1.0]


def test_line_frame() -> None:
    frame = line().to_frame()
    assert frame["coordinate"].tolist() == [-1.0, 0.0, 1.0]
    assert frame["distance"].tolist() == [-2.0, 0.0, 2.0]
    np.testing.assert_array_equal(frame["loss"], [math.nan, 1 / 3, -math.inf])


def test_surface_frame_pairs_x_and_y_with_their_loss() -> None:
    result = surface()
    frame = result.to_frame().set_index(["x", "y"])["loss"]
    assert len(frame) == 15
    for i, x in enumerate(result.x.tolist()):
        for j, y in enumerate(result.y.tolist()):
            assert frame[x, y] == float(result.loss[i, j])


def test_one_row_frames() -> None:
    assert estimate().to_frame()["value"].tolist() == [0.1 + 0.2]
    frame = ball().to_frame()
    assert frame["sharpness"].tolist() == [0.1 + 0.2]
    assert frame["rho"].tolist() == [0.05]


# --- failures


def unwritable(result: results.Result) -> results.Result:
    object.__setattr__(result, "settings", {"model": object()})
    return result


@each_kind
@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_leaves_nothing(kind: str, exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    if exists:
        path.write_bytes(b"what was there")
    with pytest.raises(TypeError, match="JSON"):
        unwritable(KINDS[kind]()).save(path)
    assert files(tmp_path) == (["result.safetensors"] if exists else [])
    assert not exists or path.read_bytes() == b"what was there"


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_disk_that_fills_up_leaves_nothing(
    exists: bool, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.safetensors"
    if exists:
        estimate(value=1.0).save(path)

    def full(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half a file")
        raise error("no space left on device")

    monkeypatch.setattr(results.base, "save_file", full)
    with pytest.raises(error, match="no space"):
        estimate(value=2.0).save(path)
    assert files(tmp_path) == (["result.safetensors"] if exists else [])
    if exists:
        loaded = ma.results.load(path)
        assert isinstance(loaded, results.Estimate)
        assert loaded.value == 1.0


def test_saved_files_are_as_readable_as_others(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("")
    saved = estimate().save(tmp_path / "result.safetensors")
    assert saved.stat().st_mode == other.stat().st_mode


def test_saving_over_replaces(tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    estimate(value=1.0).save(path)
    line().save(path)
    check_same(ma.results.load(path), line())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no result at .*gone\.safetensors.*expected"):
        ma.results.load(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="no result at"):
        ma.results.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"\x80\x02}q\x00."])
def test_file_of_another_format(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)not a safetensors file.*pass one"):
        ma.results.load(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = line().save(tmp_path / "result.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"(?s)not a safetensors file.*pass one"):
        ma.results.load(path)


def test_weights_are_no_result(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"'no kind of result', expected one of .*Eigenpairs"):
        ma.results.load(path)


@pytest.mark.parametrize("name", ["object", "Result", "os.system", "ConvergenceWarning"])
def test_unknown_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    save_file({}, path, metadata={"kind": name, "fields": json.dumps({})})
    with pytest.raises(ValueError, match=f"'{name}', expected one of"):
        ma.results.load(path)


@pytest.mark.parametrize(
    "fields", [None, "{}", "not json", '{"quantity": "trace"}', '{"settings": {}, "no_such_field": 1}', "[1, 2]"]
)
def test_damaged_header(fields: str | None, tmp_path: Path) -> None:
    """A file of another version, or one that was tampered with, is refused by name and not by a stray TypeError."""
    path = tmp_path / "result.safetensors"
    header = {"kind": "Estimate"} | ({} if fields is None else {"fields": fields})
    save_file({}, path, metadata=header)
    with pytest.raises(ValueError, match=r"result\.safetensors"):
        ma.results.load(path)
