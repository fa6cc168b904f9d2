"""``msam-analysis landscape``: the library's slices, pictures of them, and files that a second call goes on from."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis import results
from msam_analysis.cli import landscape as cli_landscape
from msam_analysis.cli.processes import own_device
from msam_analysis.landscape.trajectory import TrajectoryRecorder
from msam_analysis.results import Result, Slice1D, Slice2D
from tests.programs import script_ended

from .bench import Command, Outcome, call

MODULE = "lookout"
SOURCE = '''
from pathlib import Path

import torch
from torch import nn

generator = torch.Generator().manual_seed(0)
x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
y = torch.randint(3, (30,), generator=generator)


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def data():
    return [(x[:20], y[:20]), (x[20:], y[20:])]


def fewer():
    return data()[:1]


def label_smoothing():
    return nn.CrossEntropyLoss(label_smoothing=0.1)


def counted(objective, w):
    """Leave a mark for each call; the ninth is interrupted if somebody asked for it."""
    calls = Path("calls").read_text() + "." if Path("calls").exists() else "."
    Path("calls").write_text(calls)
    if Path("stop").exists() and len(calls) == 9:
        raise KeyboardInterrupt
    return float(w[0])
'''
FACTORIES = ("--model", f"{MODULE}:model", "--data", f"{MODULE}:data")
PATHS = ("a.pt", "b.pt", "c.pt")


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        model(torch.randn(50, 4).double())
    return model


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    namespace: dict[str, Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]] = {}
    exec(compile(SOURCE, MODULE, "exec"), namespace)  # noqa: S102 - the text above
    return namespace["data"]()


def objective(seed: int = 0, batchnorm: str = "eval") -> ma.Objective:
    return ma.Objective(network(seed), nn.CrossEntropyLoss(), batches(), batchnorm=batchnorm)  # type: ignore[arg-type]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user: factories, three checkpoints and the trajectory of a short training."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    for seed, path in enumerate(PATHS):
        torch.save(network(seed).state_dict(), tmp_path / path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path


@pytest.fixture
def recorded(bench: Path) -> Path:
    """A trajectory that ends at ``end.pt``."""
    model = network(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    recorder = TrajectoryRecorder(bench / "way", model, label="SGD")
    recorder.record(0)
    for step in range(1, 6):
        for inputs, targets in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        recorder.record(step)
    recorder.close()
    torch.save(model.state_dict(), bench / "end.pt")
    return bench / "way"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bench: Path) -> Command:
    """Call ``msam-analysis landscape`` with arguments and the bench's factories, as the installed script does."""

    def called(*arguments: object) -> Outcome:
        given = [str(argument) for argument in arguments]
        rest = [] if "--model" in given or "--help" in given else list(FACTORIES)
        return call(("landscape", *given, *rest), capsys, monkeypatch, MODULE)

    return called


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same(a: Result, b: Result, *, but: tuple[str, ...] = ("identity", "settings")) -> bool:
    """Whether two results agree bit for bit."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a) if f.name not in but]
    return type(a) is type(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else str(x) == str(y) for x, y in pairs
    )


def row(outcome: Outcome, name: str) -> list[str]:
    """Return the cells of a checkpoint's line in the table."""
    (line,) = [line for line in outcome.out.splitlines() if re.match(rf"│ {re.escape(name)} +│", line)]
    return [cell.strip() for cell in line.strip("│").split("│")]


# --- where to look


def random_line(seed: int) -> Slice1D:
    centre = objective(seed)
    return ma.slice_1d(centre, ma.directions.random(centre, 3), 0.5, 5)


def test_a_line_for_each_checkpoint(command: Command) -> None:
    """The library's numbers, from one seed of the direction, in a file each and in one picture."""
    outcome = command(*PATHS, "--dim", 1, "--points", 5, "--radius", 0.5, "--seed", 3, "--out", "out")
    assert outcome.code == 0, outcome.err
    assert outcome.err == "", "no progress bar where there is no terminal"
    assert files(Path("out")) == {"a.safetensors", "b.safetensors", "c.safetensors", "landscape.png"}
    for seed, name in enumerate("abc"):
        expected = random_line(seed)
        assert same(results.load(f"out/{name}.safetensors"), expected)
        numbers = (expected.center_loss, float(expected.loss.min()), float(expected.loss.max()))
        assert row(outcome, name) == [name, *(f"{number:.5g}" for number in numbers), "5 of 5", "0"]
    assert "written: out/landscape.png" in outcome.out


def test_a_plane(command: Command) -> None:
    assert command("a.pt", "--points", 3, "--out", "out", "--normalize", "layer", "--one-d").code == 0
    centre = objective(0)
    lines = [ma.directions.random(centre, seed, "layer", one_d=True) for seed in (0, 1)]
    assert same(results.load("out/a.safetensors"), ma.slice_2d(centre, (lines[0], lines[1]), 1.0, 3))
    assert files(Path("out")) == {"a.safetensors", "landscape.png", "surface.png"}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("gradient", ("gradient, filter-normalised", "random 1, filter-normalised")),
        ("eigenvectors", ("eigenvector 1", "eigenvector 2")),
    ],
)
def test_directions_of_ones_own(kind: str, names: tuple[str, str], command: Command) -> None:
    arguments = ("a.pt", "--directions", kind, "--points", 3, "--parameters", "3.weight", "--out", "out")
    outcome = command(*arguments, "--formats", "csv")
    assert outcome.code == 0, outcome.err
    found = results.load("out/a.safetensors")
    assert isinstance(found, Slice2D)
    assert found.directions == names
    assert found.settings["parameters"] == 15
    if kind == "eigenvectors":
        assert found.direction_norms == pytest.approx((1.0, 1.0))
        assert found.cosine == pytest.approx(0.0, abs=1e-6)
    else:
        assert found.direction_norms[0] == pytest.approx(float(network(0).get_parameter("3.weight").detach().norm()))


def test_between_two_checkpoints(command: Command) -> None:
    """The loss at 0 and at 1 is that of either checkpoint, by statistics that belong to it."""
    outcome = command("a.pt", "b.pt", "--directions", "interpolation", "--points", 7, "--out", "out")
    assert outcome.code == 0, outcome.err
    line = results.load("out/interpolation.safetensors")
    assert isinstance(line, Slice1D)
    assert line.coordinates.tolist() == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    for place, seed in ((1, 0), (5, 1)):
        assert float(line.loss[place]) == pytest.approx(float(objective(seed, "recalibrate").loss()), rel=1e-12)
    assert row(outcome, "interpolation")[0] == "interpolation"


@pytest.mark.parametrize("points", [2, 3, 4, 5, 8, 51, 52])
def test_an_axis_between_two_points_holds_both(points: int) -> None:
    grid = ma.landscape.between(points)
    assert len(grid) == points
    assert {0.0, 1.0} <= set(grid.tolist())
    assert float(grid[0]) + float(grid[-1]) == pytest.approx(1.0)
    assert ma.landscape.between(points, 0.0)[[0, -1]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("points", "margin"), [(1, 0.25), (5.0, 0.25), (5, -0.1), (5, float("inf"))])
def test_an_axis_between_two_points_that_is_none(points: int, margin: float) -> None:
    with pytest.raises(ValueError, match="expected at least 2 points and a margin"):
        ma.landscape.between(points, margin)


def test_through_three_checkpoints(command: Command) -> None:
    """Where the picture marks a checkpoint, the plane has its loss; distances are those between weights."""
    labels = [part for label in ("SGD", "SAM", "MSAM") for part in ("--label", label)]
    outcome = command(*PATHS, *labels, "--directions", "plane", "--points", 5, "--out", "out")
    assert outcome.code == 0, outcome.err
    plane = results.load("out/plane.safetensors")
    assert isinstance(plane, Slice2D)
    assert plane.directions == ("to SAM", "to MSAM, orthogonal to x")
    first, second, third = (objective(seed, "recalibrate") for seed in range(3))
    expected = ma.directions.plane_through(first, second.point(), third.point())
    x, y = expected.coordinates(5)
    assert same(plane, ma.slice_2d(first, expected.directions, coordinates=(x, y)), but=("identity", "directions"))
    assert plane.center_loss == pytest.approx(float(first.loss()))


def test_in_the_plane_of_a_trajectory(recorded: Path, command: Command) -> None:
    """Centred on the checkpoint, with the trajectory on it, its true losses beside, and both as files."""
    arguments = ("end.pt", "--directions", "pca", "--trajectory", recorded, "--points", 5, "--out", "out")
    outcome = command(*arguments, "--formats", "png,html,gif,vtk,csv")
    assert outcome.code == 0, outcome.err
    plane = results.load("out/end.safetensors")
    assert isinstance(plane, Slice2D)
    assert plane.directions[0].startswith("PCA 1")
    stems = {"landscape.png", "surface.png", "landscape.html", "trajectory.gif", "end.vts", "end.csv"}
    assert files(Path("out")) == {"end.safetensors", "trajectory-SGD.vtp", "trajectory-SGD.csv", *stems}
    way = np.genfromtxt("out/trajectory-SGD.csv", delimiter=",", names=True)
    assert np.hypot(way["x"][-1], way["y"][-1]) == pytest.approx(0.0, abs=1e-6)
    assert way["loss"][-1] == pytest.approx(plane.center_loss, rel=1e-6)
    assert float(plane.x[0]) <= way["x"].min() <= way["x"].max() <= float(plane.x[-1])


def test_trajectories_on_another_plane(recorded: Path, command: Command) -> None:
    """Two of one label are told apart by their folders."""
    arguments = ("end.pt", "--trajectory", recorded, "--trajectory", recorded, "--points", 3, "--out", "out")
    assert command(*arguments, "--formats", "npz").code == 0
    written = {name for name in files(Path("out")) if name.startswith("trajectory")}
    assert len(written) == 2
    assert {str(np.load(Path("out") / name)["off_plane"].shape) for name in written} == {"(6,)"}


# --- how to measure


def test_refined(command: Command) -> None:
    outcome = command("a.pt", "--points", 25, "--refine", 0.02, "--out", "out")
    found = results.load("out/a.safetensors")
    assert isinstance(found, Slice2D)
    assert found.evaluations < 625 / 2
    assert row(outcome, "a")[-2:] == [f"{found.evaluations} of 625", f"{found.error:.2g}"]


def test_other_numbers_at_the_points(command: Command) -> None:
    options = ("--metrics", f"loss, accuracy, {MODULE}:counted", "--samples", 12, "--loss", f"{MODULE}:label_smoothing")
    outcome = command("a.pt", "b.pt", "--dim", 1, "--points", 3, "--batchnorm", "batch", *options, "--out", "out")
    assert outcome.code == 0, outcome.err
    found = results.load("out/a.safetensors")
    assert isinstance(found, Slice1D)
    assert set(found.metrics) == {"accuracy", "counted"}
    assert (found.settings["samples"], found.settings["batchnorm"]) == (12, "batch")
    assert found.standard_error is not None
    assert {"landscape.png", "accuracy.png", "counted.png"} <= files(Path("out"))
    assert command("b.pt", "--points", 3, "--metrics", "accuracy", "--out", "plane").code == 0
    assert files(Path("plane")) == {"b.safetensors", "landscape.png", "surface.png", "accuracy.png"}


def test_formats(command: Command) -> None:
    """Every file is there and is what its name says."""
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("plotly")
    formats = ("png", "pdf", "svg", "html", "nc", "h5", "vtk", "npz", "csv")
    outcome = command("a.pt", "b.pt", "--points", 3, "--formats", ",".join(formats), "--out", "out")
    assert outcome.code == 0, outcome.err
    for path in files(Path("out")):
        assert f"written: {Path('out') / path}" in outcome.out
    found = results.load("out/a.safetensors")
    assert isinstance(found, Slice2D)
    loss = found.loss.numpy()
    for name in ("a.nc", "a.h5"):
        with xarray.open_dataset(Path("out") / name, engine="h5netcdf") as dataset:
            assert np.array_equal(dataset.loss.values, loss)
    assert np.array_equal(np.load("out/a.npz")["loss"], loss)
    assert np.allclose(np.genfromtxt("out/a.csv", delimiter=",", names=True)["loss"], loss.ravel(), rtol=1e-15)
    starts = {"landscape.png": b"\x89PNG", "landscape.pdf": b"%PDF", "landscape.svg": b"<?xml", "b.vts": b"<?xml"}
    assert all((Path("out") / name).read_bytes().startswith(start) for name, start in starts.items())
    page = Path("out/landscape.html").read_text(encoding="utf-8")
    assert page.count('"type":"surface"') >= 2


# --- stopping and going on


def test_a_stopped_measurement_goes_on(command: Command) -> None:
    arguments = ("a.pt", "--dim", 1, "--points", 41, "--metrics", f"{MODULE}:counted")
    assert command(*arguments, "--out", "whole").code == 0
    everything = len(Path("calls").read_text())
    Path("calls").unlink()
    Path("stop").touch()
    outcome = command(*arguments, "--out", "out")
    assert outcome.code == 130
    assert outcome.out == ""
    assert re.fullmatch(r"msam-analysis: interrupted; what is finished is kept[^\n]*goes on[^\n]*\n", outcome.err)
    stopped = results.load("out/a.safetensors")
    assert isinstance(stopped, Slice1D)
    assert 0 < stopped.evaluations < 9
    assert files(Path("out")) == {"a.safetensors"}
    Path("stop").unlink()
    Path("calls").unlink()
    assert command(*arguments, "--out", "out").code == 0
    assert len(Path("calls").read_text()) <= everything - stopped.evaluations + 1, "one more: the centre is checked"
    assert same(results.load("out/a.safetensors"), results.load("whole/a.safetensors"), but=())
    Path("calls").unlink()
    assert command(*arguments, "--out", "out").code == 0, "and once it is complete, it is only drawn"
    assert Path("calls").read_text() == ".", "the centre, to be sure"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--points", 5), "coordinates of x"),
        (("--seed", 1), "direction x"),
        (("--batchnorm", "batch"), r"batchnorm \(eval there, batch here\)"),
        (("--data", f"{MODULE}:fewer", "--model", f"{MODULE}:model"), "data"),
        (("--loss", f"{MODULE}:label_smoothing"), "loss function"),
        (("--metrics", "accuracy"), "metrics"),
    ],
)
def test_the_file_of_another_measurement(options: tuple[object, ...], words: str, command: Command) -> None:
    start = ("a.pt", "--dim", 1, "--out", "out")
    assert command(*start, "--points", 3, "--formats", "csv").code == 0
    before = {name: (Path("out") / name).read_bytes() for name in files(Path("out"))}
    outcome = command(*start, *({"--points": ()}.get(str(options[0]), ("--points", 3))), *options)
    assert outcome.code == 2
    assert re.fullmatch(rf"msam-analysis: [^\n]*belongs to another measurement[^\n]*{words}[^\n]*\n", outcome.err)
    assert {name: (Path("out") / name).read_bytes() for name in files(Path("out"))} == before


def test_another_checkpoint_under_the_same_name(command: Command) -> None:
    assert command("a.pt", "--dim", 1, "--points", 3, "--out", "out").code == 0
    Path("b.pt").replace("a.pt")
    outcome = command("a.pt", "--dim", 1, "--points", 3, "--out", "out")
    assert outcome.code == 2
    assert "weights" in outcome.err


def test_somebody_elses_folder(command: Command) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("a")
    outcome = command("a.pt", "--out", "out")
    assert outcome.code == 2
    assert re.fullmatch(r"msam-analysis: out holds something else[^\n]*choose another --out\n", outcome.err)
    assert files(Path("out")) == {"thesis.txt"}
    Path("out/thesis.txt").unlink()
    assert command("a.pt", "--dim", 1, "--points", 3, "--out", "out").code == 0
    assert command("a.pt", "b.pt", "--dim", 1, "--points", 3, "--out", "out").code == 0, "one more beside the first"


# --- mistakes

MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "unknown directions": (("a.pt", "--directions", "uphill"), r"--directions must be one of .*'uphill'"),
    "three dimensions": (("a.pt", "--dim", 3), r"--dim must be 1 .* got 3"),
    "one end": (("a.pt", "--directions", "interpolation"), r"interpolation takes 2 checkpoint\(s\), got 1"),
    "two of three": (("a.pt", "b.pt", "--directions", "plane"), r"plane takes 3 checkpoint\(s\), got 2"),
    "a plane between two": (("a.pt", "b.pt", "--directions", "interpolation", "--dim", 2), r"has no --dim 2"),
    "a line through three": ((*PATHS, "--directions", "plane", "--dim", 1), r"has no --dim 1"),
    "a radius between two": (("a.pt", "b.pt", "--directions", "interpolation", "--radius", 2), r"leave out --radius"),
    "normalised between two": (("a.pt", "b.pt", "--directions", "interpolation", "--one-d"), r"leave out --radius"),
    "pca of nothing": (("a.pt", "--directions", "pca"), r"at least 3 checkpoints .* --trajectory FOLDER; got 1"),
    "pca of two": (("a.pt", "b.pt", "--directions", "pca"), r"at least 3 checkpoints .* got 2"),
    "a trajectory on a line": (("a.pt", "--trajectory", "way", "--dim", 1), r"--trajectory is drawn on a plane"),
    "a trajectory on two planes": (("a.pt", "b.pt", "--trajectory", "way"), r"--trajectory is drawn on a plane"),
    "no trajectory there": (("a.pt", "--trajectory", "way"), r"no trajectory in way"),
    "the same point three times": (("a.pt",) * 3 + ("--directions", "plane"), r"lie on one line"),
    "unknown format": (("a.pt", "--formats", "png,docx"), r"--formats must be among .*'docx'"),
    "no format": (("a.pt", "--formats", ""), r"--formats must be among"),
    "a line to turn": (("a.pt", "--dim", 1, "--formats", "html"), r"expected --dim 2"),
    "a film of nothing": (("a.pt", "--formats", "gif"), r"expected --trajectory"),
    "unknown metric": (("a.pt", "--metrics", "acuracy"), r"unknown metric 'acuracy'"),
    "one label of two": (("a.pt", "b.pt", "--label", "SGD"), r"--label for each of the 2 checkpoint"),
    "the same label twice": (("a.pt", "b.pt", "--label", "A", "--label", "A"), r"all different"),
    "an even number of points": (("a.pt", "--points", 4), r"points must be odd"),
    "a radius of nothing": (("a.pt", "--radius", 0), r"radius must be"),
    "unknown normalisation": (("a.pt", "--normalize", "batch"), r"normalize must be one of .*'batch'"),
    "unknown policy": (("a.pt", "--batchnorm", "train"), r"batchnorm.*'train'"),
    "refine too much": (("a.pt", "--refine", 1.5), r"refine must be"),
    "one sample": (("a.pt", "--samples", 1), r"samples must be"),
    "no such parameter": (("a.pt", "--parameters", "layer9.*"), r"layer9"),
    "no such file": (("a.pt", "gone.pt"), r"no checkpoint at gone\.pt"),
    "no such device": (("a.pt", "--device", "abacus"), r"abacus"),
    "no number": (("a.pt", "--points", "many"), r"--points"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, bench: Path, command: Command) -> None:
    """Exit code 2, one sentence, and nothing written."""
    arguments, words = MISTAKES[mistake]
    before = files(bench)
    outcome = command(*arguments, "--out", "out")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert re.search(rf"^msam-analysis: .*{words}", outcome.err), outcome.err
    assert outcome.out == ""
    assert files(bench) == before


@pytest.mark.parametrize(("name", "package"), [("html", "plotly"), ("nc", "h5netcdf")])
def test_a_package_that_is_missing(
    name: str, package: str, command: Command, monkeypatch: pytest.MonkeyPatch, bench: Path
) -> None:
    """Said before anything is measured."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else real(wanted))
    outcome = command("a.pt", "--formats", name, "--out", "out")
    assert outcome.code == 2
    assert re.search(rf"needs {package}, which is not installed: pip install", outcome.err)
    assert not Path("out").exists()


def test_help(command: Command) -> None:
    outcome = command("--help")
    assert outcome.code == 0
    for word in ("--directions", "--refine", "--trajectory", "eigenvectors", "torchrun", "-m msam_analysis"):
        assert word in outcome.out


# --- several processes


def test_two_processes_measure_what_one_does(bench: Path, command: Command) -> None:
    """Bit for bit; one of them prints, draws and writes."""
    arguments = [
        "a.pt",
        "b.pt",
        "--points",
        "9",
        "--refine",
        "0.05",
        "--metrics",
        "accuracy",
        "--directions",
        "gradient",
    ]
    start = bench / "torchrun.py"
    start.write_text("from torch.distributed.run import main\n\nmain()\n", encoding="utf-8")
    how = ["--standalone", "--nproc-per-node", "2", "-m", "msam_analysis"]
    done = script_ended(start, *how, "landscape", *arguments, *FACTORIES, "--out", "two", folder=bench)
    assert done.code == 0, done.err
    assert done.out.count("written: two/landscape.png") == 1
    alone = command(*arguments, "--out", "one")
    assert alone.code == 0, alone.err
    assert done.out == alone.out.replace("one/", "two/")
    assert files(bench / "two") == files(bench / "one")
    for name in ("a.safetensors", "b.safetensors"):
        assert same(results.load(bench / "two" / name), results.load(bench / "one" / name), but=())
    assert (bench / "two" / "landscape.png").read_bytes() == (bench / "one" / "landscape.png").read_bytes()


def test_only_the_first_process_speaks(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is something that only this one knows."""
    monkeypatch.setenv("RANK", "1")
    refused = command("gone.pt")
    assert (refused.code, refused.err) == (2, "")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cli_landscape, "load_objectives", fail)
    assert command("a.pt").err.startswith("msam-analysis: process 1: out of memory")


@pytest.mark.parametrize(
    ("device", "local", "own"),
    [
        ("cuda", "3", "cuda:1"),
        ("cuda:0", "3", "cuda:0"),
        ("cuda", None, "cuda"),
        (None, "3", None),
        ("cpu", "1", "cpu"),
    ],
)
def test_every_process_has_a_gpu_in_turn(
    device: str | None, local: str | None, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert own_device(device) == own
