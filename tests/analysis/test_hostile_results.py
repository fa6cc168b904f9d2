"""Files of our own results, damaged or made by somebody else: one sentence of ours, or a result that works."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import msam_analysis as ma
from msam_analysis import results
from msam_analysis.results import export
from msam_analysis.results.checking import FieldError, check
from tests.builders import KINDS, MEASURES, SETTINGS, built, comparison, density, measurement, objective
from tests.trust.cases import is_sentence

from . import hostile

PART = 9  # of all hostile files, one in so many is tried here; `make faults` tries all


@functools.cache
def whole(kind: str) -> results.Result:
    return KINDS[kind]() if kind in KINDS else MEASURES[kind](objective())


def use(result: results.Result, folder: Path) -> None:
    """Do with a result what anybody does."""
    repr(result)
    result._repr_html_()
    result.readings()
    result.to_frame()
    export.to_npz(result, folder / "exported.npz")
    result.save(folder / "again.safetensors")


def fate(read: Callable[[], Any], path: Path) -> str:
    """Read a file and use what is read: how that ends."""
    try:
        found = read()
    except ValueError as error:
        assert str(error).startswith(str(path.parent)), error  # noqa: PT017 -- it is about a file there
        assert is_sentence(str(error)), error  # noqa: PT017
        return "refused"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about numbers that are not finite
        use(found, path.parent)
    return "usable"


@pytest.mark.parametrize("kind", [*KINDS, "pca_plane", "slice_2d"])
def test_a_file_is_refused_or_works(kind: str, tmp_path: Path) -> None:
    path = whole(kind).save(tmp_path / "result.safetensors")
    ends = []
    every = list(hostile.files(path))
    for what, write in every[:: max(PART, len(every) // 150)]:
        write()
        try:
            ends.append(fate(lambda: ma.results.load(path), path))
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert ends.count("refused") > len(ends) / 3, "it was read at all"


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("name", ["trajectory", "step-000000000000"])
def test_a_recorded_trajectory_is_refused_or_works(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    folder = tmp_path / "path"
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    recorder = ma.TrajectoryRecorder(folder, model, dtype=dtype)
    for step in (0, 7):
        recorder.record(step, loss=0.5)
    path = folder / f"{name}.safetensors"
    for number, (what, write) in enumerate(
        hostile.files(path, entry="trajectory" if name == "trajectory" else "fields")
    ):
        if number % 3 == 0:
            write()
            try:
                fate(lambda: ma.trajectory.load(folder), path)
                fate(lambda: ma.TrajectoryRecorder(folder, model, dtype=dtype).trajectory(), path)
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


# what fields say against each other: changes of a whole result, and the sentence
AGAINST: dict[str, tuple[Callable[[], results.Result], str]] = {
    "no nodes": (
        lambda: replaced(density(), nodes=none(), weights=none(), probe=none().long()),
        "it has no nodes, expected one or more",
    ),
    "a node of no vector": (
        lambda: replaced(density(), probe=torch.tensor([-1, -1, 0, 0, 1, 1, 2, 3])),
        "belongs to none of its 3 random vectors",
    ),
    "too few singular values": (
        lambda: built(results.FeatureRank, singular_values=torch.ones(2)),
        r"2 singular values, expected min\(samples, dimension\) = 3",
    ),
    "a rank too high": (lambda: built(results.FeatureRank, rank=4), "a rank of it exceeds 3"),
    "no rho of 0": (lambda: built(results.SamMsamAngle, rhos=torch.tensor([0.1, 0.2, 0.3])), "its rhos lack 0"),
    "more batches than there are": (
        lambda: built(results.BatchSharpness, batches=2),
        "rises of 3 batches, where there",
    ),
    "another verdict": (lambda: built(results.Certificate, verdict="flat"), "its verdict is 'flat', expected one of"),
    "a slice without points": (
        lambda: built(results.Slice1D, coordinates=none(), loss=none()),
        "it has no points, expected one or more",
    ),
    "an error of no metric": (
        lambda: built(results.Slice1D, metric_errors={"accuracy": 0.1}),
        "of the metric 'accuracy', and not the metric",
    ),
    "another centre": (
        lambda: built(results.Slice1D, metrics={"a": torch.ones(3, 2)}, center_metrics={"a": torch.tensor(1.0)}),
        "the metric 'a' has another shape at the centre",
    ),
    "no results": (lambda: results.ByLayer(results={}), "it has no results, expected one or more"),
    "no rows": (lambda: replaced(measurement(), rows=()), "it lacks rows"),
    "another column": (lambda: replaced(measurement(), rows=({"metric": "a"},)), "has not the columns metric, value"),
    "a row with a text": (
        lambda: replaced(measurement(), rows=({**measurement().rows[0], "value": "x"},)),
        "a row of it has the value 'x'",
    ),
    "no measurements": (lambda: replaced(comparison(), measurements={}), "it has no measurements"),
    "another baseline": (lambda: replaced(comparison(), baseline="x"), "its baseline 'x' is none of its labels"),
    "a step of text": (
        lambda: replaced(comparison(), sources={"net-1": {"step": "1"}}),
        "the step or epoch of 'net-1'",
    ),
    "a type": (lambda: built(results.Estimate, draws=-1), "its draws is -1, expected a whole number of 0 or more"),
    "a list": (lambda: built(results.Curvatures, directions=("a", 1)), "expected a list of a text"),
    "a pair": (lambda: built(results.SamMsamAngle, bracket=(1.0, 2.0, 3.0)), "expected 2 of a number"),
    "a mapping": (lambda: built(results.BallSharpness, starts={"a": "b"}), "expected a mapping of names to a number"),
    "a choice": (lambda: built(results.BallSharpness, adaptive=None), "expected true or false or a text"),
    "settings": (lambda: built(results.Scalar, settings={"a": [1]}), "its settings is"),
    "a tensor of whole numbers": (lambda: built(results.Eigenpairs, values=torch.tensor([1, 2])), "floating-point"),
    "a range": (lambda: built(results.RobustAccuracy, clean=1.5), "its clean is 1.5, expected to be between 0 and 1"),
    "an order": (
        lambda: built(results.Slice1D, coordinates=torch.tensor([0.0, -1.0, 1.0])),
        "its coordinates is a tensor .* expected to be finite and in increasing order",
    ),
    "a shape": (
        lambda: built(results.Eigenpairs, residuals=torch.ones(3)),
        r"its residuals has the shape \(3,\), which does not agree with the other fields: expected \(k\)",
    ),
    "a literal shape": (lambda: replaced(whole("pca_plane"), vectors=torch.ones(22, 3)), r"expected \(size, 2\)"),
    "one component": (
        lambda: replaced(whole("pca_plane"), singular_values=torch.ones(1)),
        "it has fewer than two singular values",
    ),
}


def replaced(result: results.Result, **changes: Any) -> results.Result:
    return type(result)(**{**vars(result), **changes})


def none() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.float64)


@pytest.mark.parametrize("what", AGAINST)
def test_fields_that_do_not_agree(what: str, tmp_path: Path) -> None:
    make, message = AGAINST[what]
    with pytest.raises(FieldError, match=message):
        check(make())
    path = make().save(tmp_path / "result.safetensors")
    with pytest.raises(ValueError, match=rf"result\.safetensors is damaged: .*{message}.*; write it anew"):
        ma.results.load(path)


@pytest.mark.parametrize("name", MEASURES)
def test_what_measures_return_is_whole(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", results.ConvergenceWarning)
        check(MEASURES[name](objective()))


def test_unknown_numbers_are_kept() -> None:
    """NaN is a number that was not known, infinity one that has no end: neither is damage."""
    check(built(results.Estimate, value=math.nan, standard_error=math.inf, settings=SETTINGS))
    check(built(results.RobustAccuracy, accuracies=torch.full((2,), math.nan), clean=math.nan))


@pytest.mark.parametrize("text", ["[]", "null", "3", "{", '{"kind": ["Estimate"]}', "[" * 10**5, '{"kind": 1e400}'])
def test_headers_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    save_file({}, path, metadata={"result": text})
    with pytest.raises(ValueError, match=r"result\.safetensors holds .*, expected one of \['BallSharpness'") as told:
        ma.results.load(path)
    assert is_sentence(str(told.value))


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    path = tmp_path / "result.safetensors"
    for size in (10, 10**18, 2**62):
        hostile.claims(path, size)
        with pytest.raises(ValueError, match="is not a safetensors file"):
            ma.results.load(path)


# --- the file of a slice that goes on


@pytest.mark.parametrize("harm", ["another grid", "no loss of a metric", "wider"])
def test_a_slice_whose_file_is_not_what_its_identity_says(harm: str, tmp_path: Path) -> None:
    o = objective()
    metrics = {"norm": lambda objective, w: w.norm()}
    path = tmp_path / "slice.safetensors"

    def go(points: int = 5) -> Any:
        return ma.slice_1d(o, ma.directions.random(o), points=points, metrics=metrics, path=path)

    whole = go()
    changes: dict[str, dict[str, Any]] = {
        "another grid": {"coordinates": whole.coordinates[:3], "loss": whole.loss[:3], "metrics": {}},
        "no loss of a metric": {"metrics": {}, "center_metrics": {}},
        "wider": {"metrics": {"norm": torch.ones(5, 2)}, "center_metrics": {}},
    }
    replaced(whole, **{"center_metrics": {}, **changes[harm]}).save(path)
    with pytest.raises(ValueError, match=r"slice\.safetensors is damaged: expected values of '(loss|norm)'"):
        go()


def test_headers_of_points(tmp_path: Path) -> None:
    """Names and numbers of another point, or none: said with the file."""
    recorder = ma.TrajectoryRecorder(tmp_path, torch.nn.Linear(2, 2))
    for step in (0, 1):
        recorder.record(step)
    (tmp_path / "step-final.safetensors").write_bytes(b"somebody's own")  # none of ours
    assert len(ma.trajectory.load(tmp_path)) == 2
    path = tmp_path / "step-000000000001.safetensors"
    metadata, tensors = hostile.opened(path)
    notes = json.loads(metadata["fields"])
    cases: list[tuple[Any, dict[str, torch.Tensor], str]] = [
        ({**notes, "step": 2}, tensors, "does not say step 1, stride, rounding and metrics as numbers"),
        ({**notes, "exponent": 10**6}, tensors, "does not say exponent and keep"),
        ([], tensors, "its header is no JSON object"),
        (notes, {}, "it holds no weights"),
        (notes, {"weights": torch.ones(5)}, r"its weights are F32 of the shape \(5,\), expected F32 of \(6,\)"),
        (notes, {**tensors, "buffer/a": torch.ones(1)}, "its buffers are not those of step-000000000000"),
    ]
    for header, those, message in cases:
        save_file(those, path, metadata={"fields": json.dumps(header)})
        with pytest.raises(ValueError, match=rf"step-000000000001\.safetensors is damaged: .*{message}"):
            ma.trajectory.load(tmp_path)
    metadata, tensors = hostile.opened(tmp_path / "trajectory.safetensors")
    header = json.loads(metadata["trajectory"])
    for changed, more, message in (
        ({"dtype": "load"}, {}, "does not say label, names, shapes, dtype and settings"),
        ({"shapes": [[2, 2], [-1]]}, {}, "does not say label"),
        ({}, {"origin": torch.ones(5)}, r"its origin has the shape \(5,\), expected \(6,\)"),
    ):
        text = json.dumps({**header, "fields": header["fields"] | changed})
        save_file(more, tmp_path / "trajectory.safetensors", metadata={"trajectory": text})
        with pytest.raises(ValueError, match=rf"trajectory\.safetensors is damaged: .*{message}"):
            ma.trajectory.load(tmp_path)
