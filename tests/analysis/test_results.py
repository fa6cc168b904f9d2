"""Results survive a file unchanged, and a failing save leaves nothing."""

from __future__ import annotations

import copy
import html
import json
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import msam_analysis as ma
from msam_analysis import results
from tests.builders import KINDS, MEASURES, built, by_layer, comparison, measurement, objective

each_kind = pytest.mark.parametrize("kind", KINDS)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        same_type = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same_type and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    if isinstance(a, results.Result):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
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
    public = {name for name in results.__all__ if not name.endswith(("Result", "Reading", "Warning", "Settings"))}
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


@pytest.fixture(scope="module")
def tiny() -> ma.Objective:
    return objective()


@pytest.mark.parametrize("name", MEASURES)
def test_what_measures_return(name: str, tiny: ma.Objective, tmp_path: Path) -> None:
    """A frozen result that survives a file, with the tensors as they come, and says itself in a line and a table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", results.ConvergenceWarning)
        result = MEASURES[name](tiny)
    assert isinstance(result, results.Result)
    check_same(ma.results.load(result.save(tmp_path / "a.safetensors")), result)
    assert len(result.to_frame()) > 0
    check_texts(result)
    with pytest.raises(AttributeError):
        result.settings = {}  # type: ignore[misc]


def test_other_ways_to_measure(tiny: ma.Objective, tmp_path: Path) -> None:
    direction = ma.directions.random(tiny)
    for result in (
        ma.top_eigenvalues(tiny, k=1, method="power"),
        ma.ball_sharpness(tiny, 0.1, norm="linf", adaptive=True),
        ma.slice_2d(tiny, (direction, direction), points=(3, 5)),
        ma.curvature_along(tiny, [direction, ma.directions.gradient(tiny)]),
        ma.by_layer(tiny, lambda part: ma.by_layer(part, ma.trace, groups="tensor")),
    ):
        check_same(ma.results.load(result.save(tmp_path / "a.safetensors")), result)
        check_texts(result)


# --- texts


def check_texts(result: results.Result) -> None:
    """A line and a small table with the readings, and no tensors."""
    line, page = repr(result), result._repr_html_()
    assert line.startswith(f"{type(result).__name__}(")
    assert "\n" not in line
    assert len(line) < 400
    ET.fromstring(page)  # noqa: S314 - written two lines above; it parses: every text is escaped
    first = result.readings()[0]
    assert f"{first.name} = {first}" in line
    assert html.escape(first.name) in page
    assert len(page) < 6000
    for text in (line, page):
        assert not re.search(r"tensor|array|Tensor", text)


@each_kind
def test_texts_of_every_kind(kind: str) -> None:
    check_texts(KINDS[kind]())


def test_a_line_says_value_error_and_what_it_was_measured_on() -> None:
    assert repr(built(results.Estimate, standard_error=0.0123)) == ("Estimate(trace = 0.3 ± 0.012; 19 samples; eval)")
    assert repr(built(results.Eigenpairs, values=torch.arange(5.0), residuals=torch.full((5,), 0.5))) == (
        "Eigenpairs(eigenvalue 1 = 0 ± 0.5; eigenvalue 2 = 1 ± 0.5; eigenvalue 3 = 2 ± 0.5; 2 more; NOT converged; "
        "19 samples; eval)"
    )
    assert "NOT complete" in repr(built(results.Slice1D, complete=False))
    assert repr(built(results.Scalar, settings={})) == "Scalar(curvature along <gradient> = 0.3)"


def test_a_table_in_a_notebook_has_numbers_state_cost_and_settings() -> None:
    pairs = built(results.Eigenpairs, values=torch.arange(20.0), residuals=torch.zeros(20))
    rows = {
        row[0].text: row[1].text
        for row in ET.fromstring(pairs._repr_html_()).iter("tr")  # noqa: S314 - our own text
    }
    assert rows["eigenvalue 12"] == "11 ± 0"
    assert "eigenvalue 13" not in rows
    assert rows[None] == "8 more"
    assert (rows["converged"], rows["hvps"], rows["method"]) == ("NO", "17", "lanczos")
    assert (rows["batchnorm"], rows["samples"]) == ("eval", "19")
    assert "&lt;gradient&gt;" in built(results.Scalar)._repr_html_()


# --- numbers


def test_a_scalar_is_a_number() -> None:
    one = built(results.Scalar, value=0.25)
    assert isinstance(one, float)
    assert (one, one + 1, f"{one:.1f}", math.sqrt(one), json.dumps(one)) == (0.25, 1.25, "0.2", 0.5, "0.25")
    assert pd.DataFrame({"a": [one]})["a"].dtype == float
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301 - our own bytes
        check_same(again, one)
        assert again == one


def test_by_layer_is_a_mapping() -> None:
    layers = by_layer()
    assert list(layers) == list(layers.results) == ["0/<a>", "head"]
    assert layers["head"].converged
    assert not layers.converged
    assert layers.to_frame()["layer"].tolist() == ["0/<a>", "0/<a>", "head", "head"]


def test_a_measurement_keeps_its_table() -> None:
    frame = measurement().to_frame()
    assert list(frame.columns) == ["metric", "value", "uncertainty", "converged", "meaning"]
    assert frame["converged"].isna().tolist() == [True, False, False]
    assert not measurement().converged
    pd.testing.assert_frame_equal(frame, measurement().table)


def test_a_comparison_is_a_mapping_with_a_tidy_table_and_a_wide_one() -> None:
    """One row per checkpoint and number with differences from the first; checkpoints down and metrics across."""
    result = comparison(3)
    assert list(result) == list(result.measurements) == ["<a> [b]", "net-1", "net-2"]
    assert len(result) == 3
    assert not result.converged
    assert result.steps == [0.0, 10.0, 20.0]
    frame = result.to_frame()
    assert list(frame.columns) == [
        *("label", "step", "epoch", "metric", "value", "uncertainty", "converged", "meaning"),
        *("difference", "difference_uncertainty"),
    ]
    assert len(frame) == 12
    assert frame["step"].tolist() == [step for step in (0, 10, 20) for _ in range(4)]
    assert frame["epoch"].isna().all()
    third = frame[(frame["label"] == "net-2") & (frame["metric"] == "trace")].iloc[0]
    assert (third["value"], third["difference"]) == (1.5, 1.0)
    assert third["difference_uncertainty"] == pytest.approx(float(np.std(np.linspace(0, 2, 5), ddof=1)) / math.sqrt(5))
    table = result.to_table()
    assert list(table.columns) == ["loss", "ball_sharpness@0.05", "lambda_1", "trace"]
    assert list(table.index) == list(result)
    assert table["trace"].tolist() == [0.5, 1.0, 1.5]
    assert result.readings()[0].name == "<a> [b]: loss"


def test_steps_of_a_comparison() -> None:
    """Epochs where not all have a step; NaN where neither is known of all."""
    whole = comparison(2)
    cases: list[tuple[dict[str, dict[str, Any]], list[float]]] = [
        ({"<a> [b]": {"step": 1, "epoch": 3}, "net-1": {"step": None, "epoch": 4}}, [3.0, 4.0]),
        ({"<a> [b]": {"step": 1, "epoch": 3}}, [math.nan, math.nan]),
    ]
    for sources, expected in cases:
        other = results.Comparison(measurements=whole.measurements, sources=sources, baseline="<a> [b]")
        assert repr(other.steps) == repr(expected)


@pytest.mark.parametrize("nested", [[["a", "NoSuchKind", {}]], [["a"]], [["a", "Estimate", {"no": 1}]]])
def test_damaged_nested_results(nested: Any, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    fields = json.dumps({"settings": {}, "results": {"<results>": nested}})
    save_file({}, path, metadata={"kind": "ByLayer", "fields": fields})
    with pytest.raises(ValueError, match=r"result\.safetensors is damaged"):
        ma.results.load(path)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    """A square grid has one tensor for both axes; rows of one array are no copies."""
    axis = torch.tensor([-1.0, 0.0, 1.0]).double()
    square = built(results.Slice2D, x=axis, y=axis, loss=torch.zeros(3, 3).double())
    check_same(ma.results.load(square.save(tmp_path / "a.safetensors")), square)
    rows = torch.arange(6.0).reshape(2, 3).double()
    shared = built(results.Slice1D, coordinates=rows[0], loss=rows[1])
    check_same(ma.results.load(shared.save(tmp_path / "b.safetensors")), shared)
    transposed = built(results.Eigenpairs, vectors=torch.arange(10.0).reshape(2, 5).T)
    check_same(ma.results.load(transposed.save(tmp_path / "c.safetensors")), transposed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    result = built(results.BallSharpness, displacement=torch.linspace(0, 1, 5).to(dtype))
    loaded = ma.results.load(result.save(tmp_path / "a.safetensors"))
    assert isinstance(loaded, results.BallSharpness)
    assert loaded.displacement.dtype == dtype
    assert torch.equal(loaded.displacement, result.displacement)


# --- frames


def test_eigenpairs_frame() -> None:
    frame = built(results.Eigenpairs).to_frame()
    assert list(frame.columns) == ["index", "value", "residual", "method", "converged"]
    assert frame["index"].tolist() == [1, 2]
    assert frame["value"].tolist() == [3.0, -1.0]


def test_line_frame() -> None:
    frame = built(results.Slice1D).to_frame()
    assert frame["coordinate"].tolist() == [-1.0, 0.0, 1.0]
    assert frame["distance"].tolist() == [-2.0, 0.0, 2.0]
    np.testing.assert_array_equal(frame["loss"], [math.nan, 1 / 3, -math.inf])


def test_surface_frame_pairs_x_and_y_with_their_loss() -> None:
    result = built(results.Slice2D)
    frame = result.to_frame().set_index(["x", "y"])["loss"]
    assert len(frame) == 15
    for i, x in enumerate(result.x.tolist()):
        for j, y in enumerate(result.y.tolist()):
            assert frame[x, y] == float(result.loss[i, j])


def test_one_row_frames() -> None:
    assert built(results.Estimate).to_frame()["value"].tolist() == [0.1 + 0.2]
    frame = built(results.BallSharpness).to_frame()
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
        built(results.Estimate, value=1.0).save(path)

    def full(tensors: Any, filename: Any, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half a file")
        raise error("no space left on device")

    monkeypatch.setattr(results.files, "save_file", full)
    with pytest.raises(error, match="no space"):
        built(results.Estimate, value=2.0).save(path)
    assert files(tmp_path) == (["result.safetensors"] if exists else [])
    if exists:
        loaded = ma.results.load(path)
        assert isinstance(loaded, results.Estimate)
        assert loaded.value == 1.0


def test_saved_files_are_as_readable_as_others(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("")
    saved = built(results.Estimate).save(tmp_path / "result.safetensors")
    assert saved.stat().st_mode == other.stat().st_mode


def test_saving_over_replaces(tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    built(results.Estimate, value=1.0).save(path)
    built(results.Slice1D).save(path)
    check_same(ma.results.load(path), built(results.Slice1D))


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
    path = built(results.Slice1D).save(tmp_path / "result.safetensors")
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
