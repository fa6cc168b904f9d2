"""Trajectories: what is recorded is what was there, and a projection says what it leaves out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import msam
import msam_analysis as ma
from msam_analysis import plots, results
from msam_analysis.landscape.trajectory import grid, load, planes
from msam_analysis.results import files
from msam_analysis.results import points as storage

from . import cases
from .cases import CONVNET, MLP, Quadratic, mean_output, normal
from .oracles import symmetric
from .test_untouched import untouched

Optimizers = dict[str, Callable[[Any], torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "MSAM": lambda p: msam.MSAM(p, lr=0.1, momentum=0.9, rho=0.5),
    "MSAM copy": lambda p: msam.MSAM(p, lr=0.1, momentum=0.9, rho=0.5, restore="copy"),
    "SAM": lambda p: msam.SAM(p, lr=0.1, momentum=0.9, rho=0.5),
    "AdamWMSAM": lambda p: msam.AdamWMSAM(p, lr=0.01, rho=0.5),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    data = MLP.data()
    for step in count():
        yield data[step % len(data)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    if isinstance(optimizer, msam.SAM):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def flat(model: nn.Module, optimizer: Any = None) -> Tensor:
    """The true weights, as the optimizer itself shows them."""
    was_training = getattr(optimizer, "perturbed", False)
    if was_training:
        optimizer.eval()
    vector = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    if was_training:
        optimizer.train()
    return vector


def train(name: str, steps: int, record: Callable[[int, nn.Module, torch.optim.Optimizer], object]) -> nn.Module:
    model: nn.Module = MLP.model().eval()  # no dropout: runs are to be compared
    optimizer = OPTIMIZERS[name](model.parameters())
    record(0, model, optimizer)
    for number, batch in zip(range(1, steps + 1), batches(), strict=False):
        step(model, optimizer, batch)
        record(number, model, optimizer)
    return model


def still(size: int = 6) -> tuple[nn.Linear, Callable[[Tensor], None]]:
    """A model of ``size`` weights, and what moves it."""
    model = nn.Linear(size, 1, bias=False).double()

    def move(w: Tensor) -> None:
        with torch.no_grad():
            model.weight.copy_(w[None])

    return model, move


# ------------------------------------------------------------------------------------------------------------ recording


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_true_weights_are_recorded_to_the_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    seen, stood = [], []
    model: nn.Module = MLP.model(dtype).eval()
    optimizer = OPTIMIZERS[name](model.parameters())
    recorder = ma.TrajectoryRecorder(tmp_path / "run", model, optimizer)
    for number, (x, y) in zip(range(4), batches(), strict=False):
        step(model, optimizer, (x.to(dtype), y))
        recorder.record(number)
        seen.append(flat(model, optimizer))
        stood.append(flat(model))
    trajectory = load(tmp_path / "run")
    assert trajectory.label == name.removesuffix(" copy")
    assert trajectory.steps.tolist() == [0, 1, 2, 3]
    assert trajectory.rounding.tolist() == [0.0] * 4
    for index, weights in enumerate(seen):
        assert torch.equal(trajectory.points[index], weights)
    displaced = isinstance(optimizer, msam.MSAM | msam.AdamWMSAM)
    assert displaced == any(not torch.equal(a, b) for a, b in zip(seen, stood, strict=True))


@each_optimizer
def test_recording_does_not_change_the_run(name: str, tmp_path: Path) -> None:
    recorders: list[ma.TrajectoryRecorder] = []

    def record(number: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not recorders:
            recorders.append(ma.TrajectoryRecorder(tmp_path / "run", model, optimizer, dtype=torch.float16))
        recorders[0].record(number)

    watched = train(name, 5, record)
    alone = train(name, 5, lambda *_: None)
    assert torch.equal(flat(watched), flat(alone))


def test_a_model_in_use_is_left_as_it_was(tmp_path: Path) -> None:
    model = CONVNET.model()
    with untouched(model):
        recorder = ma.TrajectoryRecorder(tmp_path, model, dtype=torch.float16)
        recorder.record(0, loss=1.0)
        recorder.record(1)
        load(tmp_path).state_dict(1)


@each_optimizer
def test_attached_it_counts_steps(name: str, tmp_path: Path) -> None:
    model: nn.Module = MLP.model().eval()
    optimizer = OPTIMIZERS[name](model.parameters())
    with ma.TrajectoryRecorder(tmp_path, model, optimizer, every=3).attach() as recorder:
        for _, batch in zip(range(7), batches(), strict=False):
            step(model, optimizer, batch)
    step(model, optimizer, next(batches()))  # after it was detached
    assert recorder.step == 7
    trajectory = recorder.trajectory()
    assert trajectory.steps.tolist() == [0, 3, 6, 7]
    expected: dict[int, Tensor] = {}
    train(name, 7, lambda number, model, optimizer: expected.update({number: flat(model, optimizer)}))
    for index, number in enumerate(trajectory.steps.tolist()):
        assert torch.equal(trajectory.points[index], expected[number])


def test_two_passes_of_sam_are_one_step(tmp_path: Path) -> None:
    model: nn.Module = MLP.model().eval()
    optimizer = msam.SAM(model.parameters(), lr=0.1, rho=0.5)
    with ma.TrajectoryRecorder(tmp_path, model, optimizer).attach() as recorder:
        for _, (x, y) in zip(range(3), batches(), strict=False):
            F.cross_entropy(model(x), y).backward()
            optimizer.first_step(zero_grad=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)
    assert recorder.trajectory().steps.tolist() == [0, 1, 2, 3]


def test_attached_to_a_run_that_goes_on(tmp_path: Path) -> None:
    model: nn.Module = MLP.model().eval()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with ma.TrajectoryRecorder(tmp_path, model, optimizer).attach() as recorder:
        for _, batch in zip(range(3), batches(), strict=False):
            step(model, optimizer, batch)
    second = ma.TrajectoryRecorder(tmp_path, model, optimizer)
    assert second.rewind(2) == 1
    with second.attach(start=2):
        step(model, optimizer, next(batches()))
    assert recorder.trajectory().steps.tolist() == [0, 1, 2, 3]


def test_an_exception_detaches_and_records_no_last_weights(tmp_path: Path) -> None:
    model: nn.Module = MLP.model().eval()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    recorder = ma.TrajectoryRecorder(tmp_path, model, optimizer, every=10)

    def interrupted() -> None:
        with recorder.attach():
            step(model, optimizer, next(batches()))
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        interrupted()
    step(model, optimizer, next(batches()))
    assert recorder.trajectory().steps.tolist() == [0]


def test_a_recorder_that_is_gone_no_longer_records(tmp_path: Path) -> None:
    model: nn.Module = MLP.model().eval()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    recorder = ma.TrajectoryRecorder(tmp_path, model, optimizer).attach()
    del recorder
    step(model, optimizer, next(batches()))
    assert load(tmp_path).steps.tolist() == [0]


def test_metrics_go_along_and_what_was_not_given_is_nan(tmp_path: Path) -> None:
    model, _ = still()
    recorder = ma.TrajectoryRecorder(tmp_path, model, label="mine")
    recorder.record(0, loss=2.0)
    recorder.record(5, loss=torch.tensor(math.inf), accuracy=0.5)  # type: ignore[arg-type]
    trajectory = recorder.trajectory()
    frame = trajectory.to_frame()
    assert trajectory.label == "mine"
    assert list(frame.columns) == ["step", "rounding", "loss", "accuracy"]
    np.testing.assert_array_equal(frame["loss"], [2.0, math.inf])
    np.testing.assert_array_equal(frame["accuracy"], [math.nan, 0.5])


def test_a_point_is_a_whole_network_with_its_statistics(tmp_path: Path) -> None:
    model = CONVNET.model()
    model.register_buffer("mask", torch.ones(3), persistent=False)
    recorder = ma.TrajectoryRecorder(tmp_path, model)
    data = CONVNET.data()
    recorded = []
    for number, batch in enumerate(data):
        model(batch[0])  # moves the running statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        recorder.record(number)
        recorded.append(float(ma.Objective(model, CONVNET.loss_fn, data).loss()))
    trajectory = recorder.trajectory()
    assert "mask" not in trajectory.buffers
    assert len(set(recorded)) == len(recorded)
    for index, expected in enumerate(recorded):
        fresh = CONVNET.model(seed=1)
        fresh.load_state_dict(trajectory.state_dict(index))
        assert float(ma.Objective(fresh, CONVNET.loss_fn, data).loss()) == expected


def test_buffers_can_be_left_out(tmp_path: Path) -> None:
    recorder = ma.TrajectoryRecorder(tmp_path, CONVNET.model(), buffers=False)
    recorder.record(0)
    assert not recorder.trajectory().buffers


def test_some_parameters_by_name_or_by_an_objective(tmp_path: Path) -> None:
    model = MLP.model()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data(), parameters="3.*")
    for folder, recorder in (
        ("name", ma.TrajectoryRecorder(tmp_path / "name", model, parameters="3.*")),
        ("objective", ma.TrajectoryRecorder(tmp_path / "objective", objective)),
    ):
        recorder.record(0)
        trajectory = load(tmp_path / folder)
        assert trajectory.names == ("3.weight", "3.bias")
        assert trajectory.size == objective.size
        assert trajectory.label == folder
        assert torch.equal(trajectory.points[0], objective.point())
        assert trajectory.state_dict(0)["3.weight"].shape == model[3].weight.shape


# ------------------------------------------------------------------------------------------------------------- thinning


@pytest.mark.parametrize(("every", "most", "steps"), [(1, 2, 100), (1, 5, 100), (3, 4, 200), (7, 8, 50), (1, 100, 30)])
def test_thinning_keeps_an_even_grid(every: int, most: int, steps: int, tmp_path: Path) -> None:
    model, move = still()
    recorder = ma.TrajectoryRecorder(tmp_path, model, every=every, max_points=most)
    for number in range(steps):
        move(torch.full((6,), float(number)).double())
        recorder.record(number)
        trajectory = recorder.trajectory()
        stride = recorder.stride
        assert trajectory.steps.tolist() == list(range(0, number + 1, stride))
        assert len(trajectory) <= most
    assert stride % every == 0
    assert stride == every or 2 * len(trajectory) >= most
    assert [float(trajectory.points[index][0]) for index in range(len(trajectory))] == trajectory.steps.tolist()


def test_points_to_keep_are_not_thinned(tmp_path: Path) -> None:
    model, _ = still()
    recorder = ma.TrajectoryRecorder(tmp_path, model, max_points=3)
    written = [recorder.record(number, keep=number in (5, 11)) for number in range(20)]
    assert recorder.trajectory().steps.tolist() == [0, 5, 8, 11, 16]
    assert written[5]
    assert not written[6]


def test_a_recorder_made_again_goes_on_with_the_same_stride(tmp_path: Path) -> None:
    model, _ = still()
    for start, stop, stride in ((0, 9, 2), (9, 21, 4)):
        recorder = ma.TrajectoryRecorder(tmp_path, model, every=2, max_points=3)
        assert recorder.stride == stride
        for number in range(start, stop):
            recorder.record(number, keep=number == 7)
    assert recorder.stride == 8
    assert recorder.trajectory().steps.tolist() == [0, 7, 8, 16]


# --------------------------------------------------------------------------------------------------- crashes, resuming


def test_what_was_recorded_before_a_crash_stays_and_recording_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, move = still()
    recorder = ma.TrajectoryRecorder(tmp_path, model, dtype=torch.float16)
    for number in range(3):
        move(torch.full((6,), float(number)).double())
        recorder.record(number)

    def killed(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            recorder.record(3)
    (tmp_path / f"{files.PARTIAL}{files._machine()}-4194305-1.safetensors").write_bytes(
        b"left by a process that is gone"
    )
    assert load(tmp_path).steps.tolist() == [0, 1, 2]
    again = ma.TrajectoryRecorder(tmp_path, model, dtype=torch.float16)
    assert not list(tmp_path.glob(".*"))
    move(torch.full((6,), 3.0).double())
    again.record(3)
    trajectory = load(tmp_path)
    assert trajectory.steps.tolist() == [0, 1, 2, 3]
    assert [float(trajectory.points[index][0]) for index in range(4)] == [0.0, 1.0, 2.0, 3.0]


def test_going_back_to_a_checkpoint_forgets_what_came_after(tmp_path: Path) -> None:
    model, move = still()
    recorder = ma.TrajectoryRecorder(tmp_path, model)
    for number in range(6):
        recorder.record(number)
    assert recorder.rewind(2) == 3
    move(torch.full((6,), 9.0).double())
    recorder.record(3)
    trajectory = recorder.trajectory()
    assert trajectory.steps.tolist() == [0, 1, 2, 3]
    assert float(trajectory.points[3][0]) == 9.0
    assert recorder.rewind(3) == 0


def test_files_hold_tensors_and_plain_words_only(tmp_path: Path) -> None:
    recorder = ma.TrajectoryRecorder(tmp_path, CONVNET.model(), dtype=torch.float16)
    recorder.record(0, loss=1.5)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["step-000000000000.safetensors", "trajectory.safetensors"]
    for path in files:
        with safe_open(path, framework="numpy") as file:
            (header,) = file.metadata().values()  # one entry: several would come in any order
            assert json.loads(header)


# -------------------------------------------------------------------------------------------------------------- float16


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e7])
def test_half_precision_is_relative_to_the_way_and_says_so(scale: float, tmp_path: Path) -> None:
    model, move = still(400)
    recorder = ma.TrajectoryRecorder(tmp_path, model, dtype=torch.float16)
    start = normal(400, seed=1) if scale > 1e-20 else torch.zeros(400).double()
    ways = [torch.zeros(400).double(), *(scale * normal(400, seed=seed) for seed in (2, 3))]
    for number, way in enumerate(ways):
        move(start + way)
        recorder.record(number)
    trajectory = recorder.trajectory()
    assert torch.equal(trajectory.points[0], start)
    for index, way in enumerate(ways):
        error = float((trajectory.points[index] - (start + way)).norm())
        assert error == pytest.approx(float(trajectory.rounding[index]), rel=1e-9, abs=1e-300)
        # eleven bits: each entry is off by at most 2^-12 of itself, as a rule by half of that
        assert error <= 2**-12 * float(way.norm())
        assert error >= 0.2 * 2**-12 * float(way.norm())
    sizes = [path.stat().st_size for path in tmp_path.glob("step-*")]
    assert max(sizes) < 2 * 400 + 500


@pytest.mark.parametrize("largest", [1.0, 1 - 2**-13, 1 + 2**-10, 65519.0, 3e38])
def test_half_precision_neither_overflows_nor_loses_small_changes(largest: float, tmp_path: Path) -> None:
    model, move = still(4)
    recorder = ma.TrajectoryRecorder(tmp_path, model, dtype=torch.float16)
    ways = torch.tensor([0.0, 0.0, 0.0, 0.0]), largest * torch.tensor([1.0, -1.0, 1.2345 * 2.0**-20, 2.0**-28])
    for number, way in enumerate(ways):
        move(way.double())
        recorder.record(number)
    np.testing.assert_allclose(recorder.trajectory().points[1], ways[1].double(), rtol=2**-11)


def test_what_is_not_finite_stays_so(tmp_path: Path) -> None:
    model, move = still(4)
    recorder = ma.TrajectoryRecorder(tmp_path, model, dtype=torch.float16)
    move(torch.zeros(4).double())
    recorder.record(0)
    move(torch.tensor([1.0, math.nan, math.inf, -math.inf]).double())
    recorder.record(1)
    trajectory = recorder.trajectory()
    np.testing.assert_array_equal(trajectory.points[1], [1.0, math.nan, math.inf, -math.inf])
    assert math.isnan(float(trajectory.rounding[1]))


# ---------------------------------------------------------------------------------------------------- the trajectory


def trajectory(points: Tensor, label: str = "SGD", **changes: Any) -> results.Trajectory:
    fields: dict[str, Any] = {
        "label": label,
        "steps": torch.arange(len(points)),
        "points": points,
        "rounding": torch.zeros(len(points)).double(),
        "names": ("weight",),
        "shapes": ((1, points.shape[1]),),
    }
    return results.Trajectory(**fields | changes)


def on_disk(points: Tensor, folder: Path) -> results.Trajectory:
    model, move = still(points.shape[1])
    recorder = ma.TrajectoryRecorder(folder, model)
    for number, point in enumerate(points):
        move(point)
        recorder.record(number, loss=number)
    return recorder.trajectory()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_some_of_the_points(where: str, tmp_path: Path) -> None:
    whole = normal(8, 5, seed=1)
    full = on_disk(whole, tmp_path) if where == "disk" else trajectory(whole)
    for choice in (slice(None, None, 3), [0, 3, 6], full.steps % 3 == 0):
        some = full.select(choice)
        assert some.steps.tolist() == [0, 3, 6]
        assert torch.equal(torch.stack([some.points[index] for index in range(3)]), whole[::3])
        assert torch.equal(planes._columns(some, 1, 4), whole[::3, 1:4])
        assert [len(values) for values in some.metrics.values()] == [3] * len(full.metrics)


def test_a_trajectory_on_disk_becomes_one_file(tmp_path: Path) -> None:
    full = on_disk(normal(3, 5, seed=1), tmp_path / "folder")
    back = results.load(full.save(tmp_path / "one.safetensors"))
    assert isinstance(back, results.Trajectory)
    assert isinstance(back.points, Tensor)
    assert torch.equal(back.points, normal(3, 5, seed=1))
    assert (back.label, back.names, back.shapes, back.settings) == (full.label, full.names, full.shapes, full.settings)
    assert torch.equal(back.metrics["loss"], full.metrics["loss"])


def test_from_vectors_and_state_dicts() -> None:
    models = [MLP.model(seed=seed) for seed in range(3)]
    objective = ma.Objective(models[0], MLP.loss_fn, MLP.data())
    for weights in ([flat(model) for model in models], [model.state_dict() for model in models]):
        made = ma.trajectory.from_weights(objective, weights, steps=[1, 5, 9], label="epochs")
        assert (made.steps.tolist(), made.label) == ([1, 5, 9], "epochs")
        assert all(torch.equal(made.points[index], flat(model)) for index, model in enumerate(models))


# ------------------------------------------------------------------------------------------------------ principal plane

Centers = {
    "final": lambda points: points[-1],
    "mean": lambda points: points.mean(0),
    "given": lambda points: points[2] + 1.0,
}


@pytest.mark.parametrize("center", Centers)
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("budget", [2**27, 8 * 9 * 4])  # all at once; a few columns at a time
def test_principal_components_are_the_singular_vectors(
    center: str, where: str, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "_CHUNK_BYTES", budget)
    points = normal(9, 30, seed=5).cumsum(0)
    origin = Centers[center](points)
    run = on_disk(points, tmp_path) if where == "disk" else trajectory(points)
    plane = ma.pca_plane(run, origin if center == "given" else center)  # type: ignore[arg-type]
    _, singular, right = np.linalg.svd((points - origin).numpy(), full_matrices=False)
    torch.testing.assert_close(plane.center, origin, rtol=0, atol=1e-13)
    np.testing.assert_allclose(plane.singular_values, singular, atol=1e-6 * singular[0])
    np.testing.assert_allclose(plane.singular_values[:4], singular[:4], rtol=1e-12)
    np.testing.assert_allclose(plane.shares, singular**2 / (singular**2).sum(), atol=1e-12)
    for index in range(2):
        vector = plane.vectors[:, index].numpy()
        assert abs(vector @ right[index]) == pytest.approx(1.0, abs=1e-12)
        assert vector[np.abs(vector).argmax()] > 0
    np.testing.assert_allclose(plane.vectors.T @ plane.vectors, np.eye(2), atol=1e-14)


def test_several_trajectories_share_one_plane_about_their_mean() -> None:
    one, two = normal(6, 20, seed=1).cumsum(0), normal(4, 20, seed=2).cumsum(0)
    plane = ma.pca_plane({"SGD": trajectory(one), "MSAM": trajectory(two)})
    together = torch.cat([one, two])
    assert (plane.through, plane.labels) == ("mean", ("SGD", "MSAM"))
    torch.testing.assert_close(plane.center, together.mean(0))
    np.testing.assert_allclose(plane.singular_values[:3], np.linalg.svd(together - together.mean(0))[1][:3])
    final = ma.pca_plane([trajectory(one), trajectory(two)], "final")
    torch.testing.assert_close(final.center, (one[-1] + two[-1]) / 2)
    assert ma.pca_plane(trajectory(one)).through == "final"


def test_no_other_plane_through_the_centre_is_closer() -> None:
    run = trajectory(normal(9, 30, seed=5).cumsum(0))
    plane = ma.pca_plane(run)
    left = ma.project(run, plane).off_plane.square().sum()
    np.testing.assert_allclose(left, plane.singular_values[2:].square().sum(), rtol=1e-10)
    for seed in range(20):
        tilted = plane.vectors + 0.1 * normal(30, 2, seed=seed)
        assert ma.project(run, list(tilted.T), plane.center).off_plane.square().sum() > left


def test_a_plane_is_named_by_its_shares_and_survives_a_file(tmp_path: Path) -> None:
    coordinates = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1], [0, 0]]).double()
    basis = torch.linalg.qr(normal(7, 2, seed=3))[0]
    plane = ma.pca_plane(trajectory(coordinates @ basis.T))
    assert [direction.name for direction in plane.directions] == ["PCA 1 (90.0 %)", "PCA 2 (10.0 %)"]
    np.testing.assert_allclose([direction.norm for direction in plane.directions], 1.0)
    frame = plane.to_frame()
    np.testing.assert_allclose(frame["share"][:3], [0.9, 0.1, 0.0], atol=1e-12)
    np.testing.assert_allclose(frame["cumulative"].iloc[-1], 1.0)
    back = results.load(plane.save(tmp_path / "plane.safetensors"))
    assert isinstance(back, ma.trajectory.PrincipalPlane)
    assert torch.equal(back.vectors, plane.vectors)
    assert back.labels == plane.labels


# ----------------------------------------------------------------------------------------------------------- projection

H = symmetric([5.0, 2.0, 1.0, -1.0, 0.5], seed=20)
G = normal(5, seed=110)
W = normal(5, seed=111)


@pytest.fixture
def objective() -> ma.Objective:
    data = cases.split([2, 2, 1], torch.ones(5).double(), torch.zeros(5))
    return ma.Objective(Quadratic(H, G, 0.5, W), mean_output, data)


def closed_form(w: Tensor) -> float:
    return float(0.5 * w @ H @ w + G @ w + 0.5)


def of_objective(points: Tensor) -> results.Trajectory:
    return trajectory(points, names=("w",), shapes=((5,),))


def test_points_in_the_plane_are_where_they_seem_to_be(objective: ma.Objective) -> None:
    directions = normal(2, 5, seed=1) * torch.tensor([[3.0], [0.1]])  # neither orthogonal nor of length 1
    coordinates = normal(6, 2, seed=2)
    points = W + coordinates @ directions
    seen = ma.project(of_objective(points), list(directions), objective=objective)
    torch.testing.assert_close(seen.coordinates, coordinates, rtol=1e-10, atol=1e-11)
    assert float(seen.off_plane.max()) < 1e-13
    torch.testing.assert_close(seen.loss, seen.projected_loss)
    np.testing.assert_allclose(seen.distance, (points - W).norm(dim=1))
    np.testing.assert_allclose(seen.direction_norms, directions.norm(dim=1))
    assert seen.center_loss == pytest.approx(closed_form(W))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), directions=st.integers(1, 4), tilt=st.floats(1e-3, 1.0))
def test_any_point_and_any_directions_as_by_least_squares(seed: int, directions: int, tilt: float) -> None:
    D = normal(5, directions, seed=seed)
    D[:, 1:] = D[:, :1] + tilt * D[:, 1:]  # nearly parallel for a small tilt
    points, center = normal(3, 5, seed=seed + 1), normal(5, seed=seed + 2)
    seen = ma.project(of_objective(points), list(D.T), center)
    for index, point in enumerate(points):
        expected, *_ = np.linalg.lstsq(D.numpy(), (point - center).numpy(), rcond=None)
        left = (point - center).numpy() - D.numpy() @ expected
        np.testing.assert_allclose(seen.coordinates[index], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(seen.off_plane[index], np.linalg.norm(left), rtol=1e-8, atol=1e-9)
        share = float(seen.off_plane_share[index])
        assert share == pytest.approx(np.linalg.norm(left) ** 2 / float((point - center).norm()) ** 2, abs=1e-9)


def test_losses_are_those_of_the_point_and_of_its_picture(objective: ma.Objective) -> None:
    points, directions, center = normal(4, 5, seed=1), normal(2, 5, seed=2), normal(5, seed=3)
    seen = ma.project(of_objective(points), list(directions), center, objective=objective)
    assert seen.loss is not None
    assert seen.projected_loss is not None
    for index, point in enumerate(points):
        picture = center + seen.coordinates[index] @ directions
        assert float(seen.loss[index]) == pytest.approx(closed_form(point))
        assert float(seen.projected_loss[index]) == pytest.approx(closed_form(picture))
    assert not torch.allclose(seen.loss, seen.projected_loss)


def test_a_slice_shows_the_projected_loss_at_the_projected_coordinates(objective: ma.Objective) -> None:
    directions = ma.Direction(normal(5, seed=1), "a"), ma.Direction(normal(5, seed=2), "b")
    seen = ma.project(of_objective(normal(3, 5, seed=4)), directions, objective=objective)
    assert seen.projected_loss is not None
    x, y = (values.sort().values for values in seen.coordinates.T)
    surface = ma.slice_2d(objective, directions, coordinates=(x, y))
    for index, (a, b) in enumerate(seen.coordinates):
        there = surface.loss[int((x == a).nonzero()), int((y == b).nonzero())]
        torch.testing.assert_close(there, seen.projected_loss[index])
    assert seen.directions == surface.directions
    assert seen.direction_norms == surface.direction_norms


def test_nan_stays_where_it_is(objective: ma.Objective, tmp_path: Path) -> None:
    points = normal(3, 5, seed=1)
    points[1, 2] = math.nan
    seen = ma.project(of_objective(points), list(normal(2, 5, seed=2)), objective=objective)
    frame = seen.to_frame()
    assert list(frame.columns) == ["step", "x", "y", "off_plane", "distance", "rounding", "loss", "projected_loss"]
    assert frame.drop(columns=["step", "rounding"]).isna().all(axis=1).tolist() == [False, True, False]
    back = results.load(seen.save(tmp_path / "a.safetensors"))
    assert isinstance(back, results.Projection)
    np.testing.assert_array_equal(back.coordinates, seen.coordinates)
    assert (back.directions, back.direction_norms) == (seen.directions, seen.direction_norms)


def test_without_an_objective_there_are_no_losses() -> None:
    seen = ma.project(of_objective(normal(3, 5, seed=1)), list(normal(3, 5, seed=2)), W)
    assert (seen.loss, seen.projected_loss, seen.center_loss) == (None, None, None)
    assert list(seen.to_frame().columns)[:4] == ["step", "x1", "x2", "x3"]


def test_the_statistics_of_today_are_not_those_of_the_points(tmp_path: Path) -> None:
    model = CONVNET.model()
    recorder = ma.TrajectoryRecorder(tmp_path, model)
    recorder.record(0)
    directions = list(normal(2, recorder.trajectory().size, seed=1))
    with pytest.warns(results.ApproximationWarning, match="batchnorm='recalibrate'"):
        wrong = ma.project(
            recorder.trajectory(), directions, objective=ma.Objective(model, CONVNET.loss_fn, CONVNET.data())
        )
    assert wrong.settings["statistics"] == "of other weights"
    right = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), batchnorm="recalibrate")
    seen = ma.project(recorder.trajectory(), directions, objective=right)
    assert seen.settings["batchnorm"] == "recalibrate"
    torch.testing.assert_close(seen.loss, right.loss().reshape(1))


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), points=st.integers(3, 30), margin=st.floats(0, 2), square=st.booleans())
def test_a_grid_holds_every_point_and_the_centre(seed: int, points: int, margin: float, square: bool) -> None:
    seen = [
        ma.project(of_objective(normal(4, 5, seed=seed + k)), list(normal(2, 5, seed=seed + 9)), W) for k in range(2)
    ]
    axes = grid(seen, points, margin=margin, square=square)
    coordinates = torch.cat([item.coordinates for item in seen] + [torch.zeros(1, 2).double()])
    for axis, values in zip(axes, coordinates.T, strict=True):
        extent = float(values.max() - values.min())
        slack = 1e-9 * extent
        assert len(axis) == points
        assert int((axis == 0).sum()) == 1
        assert float(axis[0]) <= float(values.min()) - margin * extent + slack
        assert float(axis[-1]) >= float(values.max()) + margin * extent - slack
        np.testing.assert_allclose(axis.diff(), axis.diff()[0], rtol=1e-9)
    if square:
        lengths = [float(axis[-1] - axis[0]) * norm for axis, norm in zip(axes, seen[0].direction_norms, strict=True)]
        assert lengths[0] == pytest.approx(lengths[1])


def test_a_grid_around_one_point() -> None:
    seen = ma.project(of_objective(W[None]), list(normal(2, 5, seed=1)), W)
    for axis in grid(seen, 5):
        assert 0.0 in axis.tolist()
        assert float(axis.diff().min()) > 0


@pytest.mark.parametrize("case", [MLP, CONVNET], ids=lambda case: case.name)
@pytest.mark.parametrize("parameters", [None, "*.bias"])
def test_an_objective_with_other_weights_is_centred_there(case: cases.Case, parameters: str | None) -> None:
    model = case.model()
    here = ma.Objective(model, case.loss_fn, case.data(), parameters=parameters)
    w = here.point() + 0.1 * normal(here.size, seed=1)
    with untouched(model):
        if case is CONVNET:  # BatchNorm's statistics stay behind, and everyone is told
            with pytest.warns(results.ApproximationWarning, match="do not belong to the weights of another network"):
                there = here.with_weights(w)
        else:
            there = here.with_weights(w)
        assert torch.equal(there.point(), w)
        assert float(there.loss()) == float(here.loss(w)) != float(here.loss())
        assert torch.equal(there.gradient(), here.gradient(w))
        foreign = {"statistics": "of other weights"} if case is CONVNET else {}
        assert there.settings == {**here.settings, **foreign}
        line = ma.directions.Direction(normal(here.size, seed=2), "random")
        assert ma.slice_1d(there, line, points=3).center_loss == float(here.loss(w))
        with torch.no_grad():
            next(iter(there.parameters.values())).zero_()  # a copy: the model keeps its own


# ----------------------------------------------------------------------------------------------------------- end to end


def test_two_optimizers_on_one_surface_of_real_data(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data[:200] / 16).float(), torch.tensor(digits.target[:200])

    def network() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))

    runs = {}
    for name in ("SGD", "MSAM"):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        with ma.TrajectoryRecorder(
            tmp_path / name, model, optimizer, every=5, dtype=torch.float16
        ).attach() as recorder:
            for _ in range(40):
                step(model, optimizer, (x, y))
        runs[name] = recorder.trajectory()
    plane = ma.pca_plane(runs)
    objective = ma.Objective(network(), nn.CrossEntropyLoss(), (x, y)).with_weights(plane.center)
    seen = {name: ma.project(run, plane, objective=objective) for name, run in runs.items()}
    surface = ma.slice_2d(objective, plane.directions, coordinates=grid(seen, 7))
    axes = plots.trajectory_panels(surface, seen)
    plots.save(axes, tmp_path / "picture", close=True)
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    for item in seen.values():
        assert item.loss is not None
        assert float(item.loss[0]) > 1.3 * float(item.loss[-1])
        assert float(item.rounding.max()) < 1e-3 * float(item.distance.max())
    # both began at one point, and took different ways
    torch.testing.assert_close(seen["SGD"].coordinates[0], seen["MSAM"].coordinates[0])
    assert float((seen["SGD"].coordinates[-1] - seen["MSAM"].coordinates[-1]).norm()) > 0.1


# ------------------------------------------------------------------------------------------------------------- mistakes

loose: Any = ma


def recorded(folder: Path, *steps: int, **options: Any) -> ma.TrajectoryRecorder:
    recorder = ma.TrajectoryRecorder(folder, still()[0], **options)
    for number in steps:
        recorder.record(number)
    return recorder


def with_nan() -> results.Trajectory:
    points = normal(4, 5, seed=1)
    points[2, 0] = math.nan
    return of_objective(points)


def broken(folder: Path) -> Path:
    recorded(folder, 0, 1)
    storage.point_path(folder, 1).write_bytes(b"no tensors")
    return folder


def of_another_format(folder: Path) -> Path:
    recorded(folder, 0)
    save_file({}, folder / "trajectory.safetensors", metadata={"format": "0", "fields": "{}"})
    return folder


RUN = of_objective(normal(4, 5, seed=1))
MISTAKES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no model": (lambda p: loose.TrajectoryRecorder(p, "net"), TypeError, "module or an Objective, got str"),
    "every": (lambda p: recorded(p, every=0), ValueError, "every must be an integer of 1 or more, got 0"),
    "every is a flag": (lambda p: recorded(p, every=True), ValueError, "every must be an integer"),
    "max_points": (lambda p: recorded(p, max_points=1), ValueError, "max_points must be an integer of 2 or more"),
    "dtype": (lambda p: recorded(p, dtype=torch.bfloat16), ValueError, r"None \(exact\) or torch.float16"),
    "negative step": (lambda p: recorded(p, -1), ValueError, "a step of 0 or more, got -1"),
    "step again": (lambda p: recorded(p, 3, 3), ValueError, r"a step after 3, .* got 3.*rewind"),
    "step before": (lambda p: (recorded(p, 3), recorded(p, 2)), ValueError, "a step after 3"),
    "rounding": (lambda p: recorded(p).record(0, rounding=1.0), ValueError, "cannot be called 'rounding'"),
    "attach to nothing": (lambda p: recorded(p).attach(), ValueError, "attach needs an optimizer"),
    "another model": (
        lambda p: (recorded(p, 0), ma.TrajectoryRecorder(p, MLP.model())),
        ValueError,
        "with other names and shapes",
    ),
    "another storage": (lambda p: (recorded(p, 0), recorded(p, dtype=torch.float16)), ValueError, "other storage"),
    "no trajectory": (load, FileNotFoundError, "no trajectory in"),
    "broken point": (lambda p: load(broken(p)), ValueError, "cannot be read.*delete the file"),
    "another format": (lambda p: load(of_another_format(p)), ValueError, "is of the format '0'"),
    "no weights": (lambda _: ma.trajectory.from_weights(quadratic(), []), ValueError, "at least one vector"),
    "too few steps": (lambda _: ma.trajectory.from_weights(quadratic(), [W, W], [1]), ValueError, "2 increasing"),
    "falling steps": (lambda _: ma.trajectory.from_weights(quadratic(), [W, W], [1, 1]), ValueError, "increasing"),
    "short vector": (lambda _: ma.trajectory.from_weights(quadratic(), [W, W[:2]]), ValueError, "point number 1"),
    "missing name": (lambda _: ma.trajectory.from_weights(quadratic(), [{"v": W}]), ValueError, "number 0 has no 'w'"),
    "no trajectories": (lambda _: ma.pca_plane([]), ValueError, "at least one trajectory"),
    "empty trajectory": (lambda _: ma.pca_plane(of_objective(W[None][:0])), ValueError, "at least one point"),
    "different models": (lambda _: ma.pca_plane([RUN, trajectory(W[None])]), ValueError, "of different parameters"),
    "one point": (lambda _: ma.pca_plane(of_objective(W[None])), ValueError, "lie on one line"),
    "a line": (
        lambda _: ma.pca_plane(of_objective(torch.arange(4.0).double()[:, None] * W)),
        ValueError,
        "4 points lie on one line",
    ),
    "not finite": (lambda _: ma.pca_plane(with_nan(), "mean"), ValueError, r"step 2 of 'SGD'.*trajectory.steps < 2"),
    "center word": (lambda _: loose.pca_plane(RUN, "middle"), ValueError, "'final', 'mean' or a point"),
    "center shape": (lambda _: ma.pca_plane(RUN, W[:2]), ValueError, r"of shape \(5,\), got shape \(2,\)"),
    "no centre": (lambda _: ma.project(RUN, [W]), ValueError, "a centre or an objective"),
    "bad centre": (lambda _: ma.project(RUN, [W], W[:2]), ValueError, "the center must be finite and of shape"),
    "no direction": (lambda _: ma.project(RUN, [], W), ValueError, "at least one direction"),
    "bad direction": (lambda _: ma.project(RUN, [W * math.nan], W), ValueError, "direction 'direction' must be finite"),
    "zero direction": (lambda _: ma.project(RUN, [W, 0 * W], W), ValueError, "are dependent, or one is zero"),
    "dependent": (lambda _: ma.project(RUN, [W, 2 * W], W), ValueError, "are dependent"),
    "another objective": (
        lambda _: ma.project(RUN, [G], W, objective=ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())),
        ValueError,
        "not those of the trajectory 'SGD'",
    ),
    "grid of lines": (lambda _: grid(ma.project(RUN, [W], W)), ValueError, "onto a plane"),
    "grid of none": (lambda _: grid([]), ValueError, "onto a plane"),
    "grid of nan": (lambda _: grid(ma.project(with_nan().select([2]), [W, G], W)), ValueError, "no projected point"),
    "grid too small": (lambda _: grid(ma.project(RUN, [W, G], W), 2), ValueError, "3 points or more"),
    "weights of another size": (lambda _: quadratic().with_weights(W[:2]), ValueError, "expected a flat point w"),
    "grid too tight": (lambda _: grid(ma.project(RUN, [W, G], W), margin=-1.0), ValueError, "margin of 0 or more"),
}


def quadratic() -> ma.Objective:
    return ma.Objective(Quadratic(H, G, 0.5, W), mean_output, cases.ONE_SAMPLE)


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_gets_one_sentence(name: str, tmp_path: Path) -> None:
    mistake, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        mistake(tmp_path)


def test_dependent_directions_are_told_from_nearly_dependent_ones() -> None:
    seen = ma.project(RUN, [W, W + 1e-5 * G], W)
    assert bool(torch.isfinite(seen.coordinates).all())


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    ma.project(RUN, [W], W, progress=True)
    assert "projecting SGD" in capsys.readouterr().err
