"""A slice on disk: whole at every moment, continued to the same bits, refused where it is of something else."""

from __future__ import annotations

import copy
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.landscape import journal, metrics, point_table
from msam_analysis.results import Slice1D, Slice2D, load
from tests.programs import script_ended

from .cases import CONVNET, MLP, TAGGER, normal


class Killed(BaseException):
    """Stands for whatever ends a process from outside."""


class Mortal(nn.Module):
    """A criterion that ends the measurement at its n-th batch."""

    def __init__(self) -> None:
        super().__init__()
        self.lives = -1
        self.reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if LIVES:
            LIVES[0] -= 1
            if LIVES[0] <= 0:
                LIVES.clear()
                raise Killed
        return F.cross_entropy(output, target, reduction=self.reduction)


LIVES: list[int] = []


@pytest.fixture(autouse=True)
def every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write after every point, as it is when each takes a second."""
    monkeypatch.setattr(journal, "INTERVAL", 0.0)
    monkeypatch.setattr(point_table, "_BLOCK_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(journal, "_SHARE", 0)


def same(a: Any, b: Any) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, Tensor):
            assert value.numpy().tobytes() == other.numpy().tobytes(), name
        elif name in ("metrics", "center_metrics"):
            assert all(torch.equal(value[key], other[key]) for key in value)
            assert value.keys() == other.keys()
        elif name != "identity":
            assert value == other, name


def objective() -> ma.Objective:
    return ma.Objective(MLP.model(), Mortal(), MLP.data(), examine=False)  # whose passes are counted


def plane(o: ma.Objective) -> Any:
    return tuple(ma.directions.random(o, seed) for seed in (1, 2))


WAYS: dict[str, Callable[..., Any]] = {
    "line": lambda o, **k: ma.slice_1d(o, plane(o)[0], points=9, **k),
    "plane": lambda o, **k: ma.slice_2d(o, plane(o), points=(3, 7), **k),
    "metrics": lambda o, **k: ma.slice_2d(
        o, plane(o), points=3, metrics={"a": metrics.accuracy, "e": metrics.sample_losses}, **k
    ),
    "refined": lambda o, **k: ma.slice_2d(
        o, plane(o), radius=3.0, points=21, refine=0.05, metrics={"a": metrics.accuracy}, **k
    ),
    "samples": lambda o, **k: ma.slice_1d(o, plane(o)[0], points=9, samples=10, seed=3, **k),
}
PASSES = {"line": 27, "plane": 63, "metrics": 27, "refined": 210, "samples": 18}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_killed_at_any_point_and_continued(way: str, tmp_path: Path, data: st.DataObject) -> None:
    """Bit for bit what one run gives, after any number of ends."""
    path = tmp_path / "slice.safetensors"
    path.unlink(missing_ok=True)
    whole = WAYS[way](objective())
    for _ in range(data.draw(st.integers(1, 3), label="ends")):
        LIVES[:] = [data.draw(st.integers(1, PASSES[way]), label="passes")]
        try:
            WAYS[way](objective(), path=path)
        except Killed:
            continue
        finally:
            LIVES.clear()
    continued = WAYS[way](objective(), path=path)
    same(whole, continued)
    same(load(path), continued)
    assert [item.name for item in tmp_path.iterdir()] == ["slice.safetensors"], "no partial file is left"


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    """Three batches a point: the centre once more, and then only what is missing."""
    path = tmp_path / "slice.safetensors"
    LIVES[:] = [3 * 12]
    with pytest.raises(Killed):
        WAYS["plane"](objective(), path=path)
    partial = load(path)
    assert isinstance(partial, Slice2D)
    assert not partial.complete
    assert not partial.converged
    assert partial.evaluated is not None
    done = partial.evaluations
    assert done == 11, "twelve points, of which the last was not finished"
    assert torch.isnan(partial.loss[~partial.evaluated]).all(), "holes where nothing was measured"
    assert torch.isfinite(partial.loss[partial.evaluated]).all()
    LIVES[:] = [10_000]
    whole = WAYS["plane"](objective(), path=path)
    assert 10_000 - LIVES[0] == 3 * (1 + 21 - done)
    LIVES[:] = [10_000]
    same(WAYS["plane"](objective(), path=path), whole)
    assert 10_000 - LIVES[0] == 3, "a complete file: the centre alone, to see that the loss is the same"
    LIVES.clear()


def test_partial_results_can_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "slice.safetensors"
    for way in ("plane", "refined"):
        LIVES[:] = [3 * 70] if way == "refined" else [3 * 12]
        with pytest.raises(Killed):
            WAYS[way](objective(), path=path)
        partial = load(path)
        assert isinstance(partial, Slice2D)
        ma.plots.slice_2d(partial)
        path.unlink()
    assert isinstance(partial, Slice2D)
    assert torch.isfinite(partial.loss).all(), "refined: a surface from the first round on"


KILL = """
import os, signal, sys
import torch
from torch import nn
import msam_analysis as ma
from msam_analysis.landscape import journal, point_table

journal.INTERVAL = journal._SHARE = 0
point_table._BLOCK_SECONDS = (0, 0)
calls = 0

def loss(output, target):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return (output - target).square().mean()

generator = torch.Generator().manual_seed(0)
model = nn.Linear(3, 2)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
data = (torch.randn(8, 3, generator=generator), torch.randn(8, 2, generator=generator))
objective = ma.Objective(model, loss, data, examine=False)
direction = ma.directions.random(objective)
ma.slice_1d(objective, direction, points=41, path=sys.argv[1])
ma.slice_1d(objective, direction, points=41).save(sys.argv[1] + ".whole")
"""


def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, which no process can answer: the file is there, and this process ends it in the same bits."""
    path, script = tmp_path / "slice", tmp_path / "script.py"
    script.write_text(KILL, encoding="utf-8")
    assert script_ended(script, str(path), "30", folder=tmp_path).code == -signal.SIGKILL
    partial = load(path)
    assert isinstance(partial, Slice1D)
    assert not partial.complete
    assert partial.evaluations == 29, "thirty passes: the centre, the others, and the one that was its end"
    for name, module in (("INTERVAL", journal), ("_SHARE", journal), ("_BLOCK_SECONDS", point_table)):
        monkeypatch.setattr(module, name, getattr(module, name))  # what the script sets is taken back
    monkeypatch.setattr(sys, "argv", [str(script), str(path), "0"])
    runpy.run_path(str(script), run_name="__main__")
    same(load(path), load(tmp_path / "slice.whole"))


# --- refusals


def other_weights() -> ma.Objective:
    return ma.Objective(MLP.model(seed=5), Mortal(), MLP.data())


def other_data() -> ma.Objective:
    data = MLP.data()
    data[1][0][2, 3] += 1e-9
    return ma.Objective(MLP.model(), Mortal(), data)


def other_loss() -> ma.Objective:
    return ma.Objective(MLP.model(), nn.CrossEntropyLoss(label_smoothing=0.1), MLP.data())


def other_network() -> ma.Objective:
    model = MLP.model()
    model[1] = nn.ReLU()
    return ma.Objective(model, Mortal(), MLP.data())


def other_parameters() -> ma.Objective:
    return ma.Objective(MLP.model(), Mortal(), MLP.data(), parameters="3.*")


def line(o: ma.Objective, direction: Any = None, **options: Any) -> Any:
    direction = torch.linspace(-1, 1, o.size) if direction is None else direction
    return ma.slice_1d(o, direction, **{"points": 5, **options})


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (lambda path: line(other_weights(), path=path), r"differs in its weights: expected"),
    "data": (lambda path: line(other_data(), path=path), r"differs in its data: expected"),
    "loss": (lambda path: line(other_loss(), path=path), r"differs in its loss function: expected"),
    "network": (lambda path: line(other_network(), path=path), r"differs in its network: expected"),
    "parameters": (
        lambda path: line(other_parameters(), path=path),
        r"its weights.*its direction x.*parameters \(59 there",
    ),
    "direction": (
        lambda path: line(objective(), normal(59, seed=1), path=path),
        r"differs in its direction x: expected",
    ),
    "radius": (lambda path: line(objective(), radius=2.0, path=path), r"differs in its coordinates of x: expected"),
    "points": (lambda path: line(objective(), points=7, path=path), r"differs in its coordinates of x: expected"),
    "policy": (
        lambda path: line(ma.Objective(MLP.model(), Mortal(), MLP.data(), dtype=torch.float32), path=path),
        r"dtype \(float64 there, float32 here\)",
    ),
    "refine": (
        lambda path: line(objective(), refine=0.01, path=path),
        r"its refine \(none there, 0.01 here\): expected",
    ),
    "samples": (lambda path: line(objective(), samples=12, path=path), r"samples \(19 there, 12 here\)"),
    "metrics": (lambda path: line(objective(), metrics={"a": metrics.accuracy}, path=path), r"its metrics"),
    "chunk": (lambda path: line(objective(), chunk=2, path=path), r"points at once \(None there, 2 here\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_of_another_measurement_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "slice.safetensors"
    line(objective(), path=path)
    before = path.read_bytes()
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"slice\.safetensors belongs to another measurement, which .*{message}"):
        call(path)
    assert path.read_bytes() == before


def test_what_a_metric_does_is_part_of_the_measurement(tmp_path: Path) -> None:
    path = tmp_path / "slice.safetensors"
    for _ in range(2):
        line(objective(), metrics={"m": lambda _o, w: 2.0 * float(w.sum())}, path=path)
    with pytest.raises(ValueError, match=r"its metric m: expected"):
        line(objective(), metrics={"m": lambda _o, w: 3.0 * float(w.sum())}, path=path)


def test_buffers_are_part_of_the_measurement(tmp_path: Path) -> None:
    path = tmp_path / "slice.safetensors"
    model = CONVNET.model()
    o = ma.Objective(model, F.cross_entropy, CONVNET.data())
    direction = ma.directions.random(o)
    ma.slice_1d(o, direction, points=3, path=path)
    model[1].running_mean += 1e-6
    with pytest.raises(ValueError, match=r"differs in its frozen parameters and buffers: expected"):
        ma.slice_1d(o, direction, points=3, path=path)


def test_files_that_cannot_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "slice.safetensors"
    o = objective()
    line(o, path=path)
    with pytest.raises(ValueError, match=r"holds a Slice1D that cannot be continued: expected a Slice2D"):
        ma.slice_2d(o, plane(o), points=3, path=path)
    line(o).save(path)
    with pytest.raises(ValueError, match=r"holds a Slice1D that cannot be continued.*measured with path"):
        line(o, path=path)
    ma.trace(o, draws=3).save(path)
    with pytest.raises(ValueError, match=r"that cannot be continued: expected a Slice1D"):
        line(o, path=path)


class Changed(nn.Module):
    """Its forward calls a function that is not part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = ACTIVATION["f"](self.linear(x))
        return out


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {"f": torch.tanh}


def test_code_that_no_hash_sees_shows_in_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "slice.safetensors"
    o = ma.Objective(Changed(), F.cross_entropy, MLP.data())
    line(o, torch.ones(o.size), path=path)
    monkeypatch.setitem(ACTIVATION, "f", torch.relu)
    with pytest.raises(
        ValueError, match=r"has the loss [\d.]+ at the centre, where it is [\d.]+ now: expected the same"
    ):
        line(o, torch.ones(o.size), path=path)


def test_a_copy_is_the_same_measurement(tmp_path: Path) -> None:
    """Identity is content: another object, another order of construction, batches of the same values."""
    path = tmp_path / "slice.safetensors"
    o = ma.Objective(TAGGER.model(), TAGGER.loss_fn, TAGGER.data())
    direction = torch.ones(o.size).double()
    first = line(o, direction, path=path)
    again = ma.Objective(copy.deepcopy(o.model).eval(), TAGGER.loss_fn, tuple(TAGGER.data()))
    same(line(again, direction, path=path), first)
    assert first.identity
    assert line(o, direction).identity == {}, "nothing is hashed where nothing is written"


LENGTH = {"numbers": 2, "value": 1}


def test_a_metric_that_changed_shows_at_the_centre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a grid without the centre, too: the file keeps the metrics there."""
    o = ma.Objective(MLP.model(), F.cross_entropy, MLP.data())
    path = tmp_path / "slice.safetensors"

    def measured() -> Slice1D:
        given = {"own": lambda _, w: torch.full((LENGTH["numbers"],), float(LENGTH["value"]))}
        return ma.slice_1d(o, torch.ones(o.size), coordinates=[0.5, 1.0], metrics=given, path=path)

    assert measured().center_metrics["own"].tolist() == [1.0, 1.0]
    measured()
    monkeypatch.setitem(LENGTH, "value", 3)
    with pytest.raises(ValueError, match="has the metric 'own' 1 at the centre, where it is 3 now"):
        measured()
    monkeypatch.setitem(LENGTH, "numbers", 5)
    with pytest.raises(ValueError, match="holds 2 numbers of the metric 'own' at a point, where it returns 5 now"):
        measured()
