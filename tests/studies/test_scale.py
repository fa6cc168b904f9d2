"""What long runs need: states to go on from, mixed precision, several processes; and the same bits as without."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from msam import Perturbation
from msam_analysis.studies import jobs as jobs_module
from msam_analysis.studies import processes, store
from msam_analysis.studies.computing import PLAIN, Computing, computing, repeatable
from msam_analysis.studies.jobs import Job, job
from msam_analysis.studies.measuring import MEASURES, Protocol, Subject
from msam_analysis.studies.processes import Members, execute
from msam_analysis.studies.runs import Run
from msam_analysis.studies.study import run_study
from msam_analysis.studies.training import Trained, some, train
from msam_analysis.studies.watching import SLOW, WATCHES
from msam_analysis.studies.workloads import Workload
from tests.programs import together

from .test_study import hidden, networks, study, tables
from .test_training import same, state
from .toy import COARSE, SAMPLES, TOY, samples, split

EPOCHS, BATCHES = 5, 4  # of 16, 16, 16 and 12 samples
LONG = dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, epochs=EPOCHS))
BFLOAT16, FLOAT16 = Computing(amp="bfloat16"), Computing(amp="float16")


class KilledError(Exception):
    """The process was killed."""


def killed(after: int) -> Any:
    """Return a tick that ends the run after so many batches."""
    left = [float(after)]

    def tick(amount: float) -> None:
        left[0] -= amount
        if left[0] <= 0:
            raise KilledError

    return tick


def alike(a: Trained, b: Trained) -> None:
    assert same(state(a), state(b))
    assert a.steps.equals(b.steps)
    assert (a.gradients_per_step, a.skipped) == (b.gradients_per_step, b.skipped)


# --- states of a run


@pytest.mark.parametrize(
    ("name", "after", "how"),
    [
        ("SGD", 9, PLAIN),
        ("NAG", 12, PLAIN),
        ("SAM", 19, PLAIN),
        ("MSAM", 13, PLAIN),
        ("MSAM", 20, PLAIN),
        ("MSAM", 3, PLAIN),
        ("MSAM", 17, FLOAT16),
        ("SAM", 10, BFLOAT16),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(name: str, after: int, how: Computing, tmp_path: Path) -> None:
    """Weights, momentum, statistics, and everything that was recorded, by cheap probes and by slow ones."""
    options: dict[str, Any] = {"every": 3, "watched": SLOW, "replacement": after == 9}
    whole = train(LONG, name, 1, computing=how, **options)
    saving = dataclasses.replace(how, save_every=2)
    file = tmp_path / "state.pt"
    with pytest.raises(KilledError):
        train(LONG, name, 1, computing=saving, state=file, tick=killed(after), **options)
    assert file.exists() == (after > 2 * BATCHES)
    ticks: list[float] = []
    resumed = train(LONG, name, 1, computing=saving, state=file, tick=ticks.append, **options)
    alike(resumed, whole)
    assert sum(ticks) == EPOCHS * BATCHES
    skipped = (after - 1) // (2 * BATCHES) * 2 * BATCHES
    assert ticks == [float(skipped)] * bool(skipped) + [1.0] * (EPOCHS * BATCHES - skipped)
    assert "curvature_random" in whole.steps


def test_every_probe_goes_on_where_it_was(tmp_path: Path) -> None:
    """All that can be watched, also what carries something from one record to the next."""
    short = dataclasses.replace(LONG, recipe=dataclasses.replace(LONG.recipe, epochs=2))
    options: dict[str, Any] = {"every": 2, "watched": sorted(WATCHES)}
    whole = train(short, "MSAM", 1, **options)
    saving, file = Computing(save_every=1), tmp_path / "state.pt"
    with pytest.raises(KilledError):
        train(short, "MSAM", 1, computing=saving, state=file, tick=killed(6), **options)
    alike(train(short, "MSAM", 1, computing=saving, state=file, **options), whole)


def test_killed_again_and_again(tmp_path: Path) -> None:
    whole = train(LONG, "MSAM", 0, every=3)
    file = tmp_path / "state.pt"
    saving = Computing(save_every=1)
    for after in (5, 6, 12, 18):
        with pytest.raises(KilledError):
            train(LONG, "MSAM", 0, every=3, computing=saving, state=file, tick=killed(after))
    alike(train(LONG, "MSAM", 0, every=3, computing=saving, state=file), whole)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"], "nothing half-written beside it"
    ticks: list[float] = []
    alike(train(LONG, "MSAM", 0, every=3, computing=saving, state=file, tick=ticks.append), whole)
    assert ticks == [EPOCHS * BATCHES], "the last state is that of the end"


def test_a_state_is_read_without_running_it_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    train(LONG, "SGD", 0, every=None, state=file)
    assert torch.load(file, weights_only=True)["epochs"] == EPOCHS
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(
        ValueError, match=r"the state of a run in .*state\.pt cannot be read \(.*remove it, and the run"
    ):
        train(LONG, "SGD", 0, every=None, state=file)
    damaged: list[object] = [{"model": {}}, [], {"model": 3}]
    for content in damaged:
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"the state of a run in .*state\.pt cannot be read"):
            train(LONG, "SGD", 0, every=None, state=file)


def test_an_interrupted_study_goes_on_within_a_run(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops while the second network is measured: that one is not trained again, and the tables are the same."""
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    measured: list[int] = []
    balls = MEASURES["balls"]

    def failing(subject: Subject, protocol: Protocol) -> Any:
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return balls.of(subject, protocol)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setitem(MEASURES, "balls", balls._replace(of=failing))
        with pytest.raises(KeyboardInterrupt):
            study(out, seeds=1, computing=Computing(save_every=1))
    assert not list((out / "runs").glob(".unfinished/*")), "a network that is trained is there, without a state"
    half = networks(out)[-1]
    (half / ".partial-0-123.csv").write_text("of a process that was killed")
    (half / ".partial-balls-0-123").mkdir()
    trained = len(log.read_text().splitlines())
    study(out, seeds=1, computing=Computing(save_every=1))
    assert len(log.read_text().splitlines()) == 6, "six networks in all"
    assert trained == 2
    assert tables(out) == tables(alone)
    assert not hidden(out)


def test_states_that_are_of_no_use_any_more_go(alone: Path, tmp_path: Path) -> None:
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    (one,) = (tmp_path / "runs").glob("SAM-seed0-*")
    run = Run(TOY, "SAM", 0, watched=frozenset(SLOW))
    left = job(run, tmp_path / "runs", COARSE, 4).state
    left.parent.mkdir()
    left.write_text("of a process that was killed before it removed it")
    (left.parent / ".partial-0-123.pt").write_text("of a process that was killed")
    assert left.name.startswith(one.name)
    study(tmp_path, seeds=1)
    assert not hidden(tmp_path)


def test_no_state_is_kept_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[object] = []

    def spy(*arguments: Any, **options: Any) -> Trained:
        states.append(options["state"])
        return train(*arguments, **options)

    monkeypatch.setattr(jobs_module, "train", spy)
    run = Run(TOY, "SGD", 0)
    execute(job(run, tmp_path / "one", COARSE, 4))
    often = job(run, tmp_path / "two", COARSE, 4, Computing(save_every=3))
    execute(often)
    assert states == [None, often.state]
    assert often.finished
    assert not often.state.parent.exists()


# --- precision and device


@pytest.mark.parametrize("name", ["SGD", "SAM", "MSAM"])
@pytest.mark.parametrize("how", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
def test_mixed_precision_is_training_to_its_accuracy(name: str, how: Computing) -> None:
    """Other bits than float32, near to it; weights, buffers and all else in float32."""
    exact, mixed = train(TOY, name, 0, every=3), train(TOY, name, 0, every=3, computing=how)
    lost = mixed.skipped
    for key, value in state(mixed).items():
        assert value.dtype == state(exact)[key].dtype
    if lost == 0:
        for a, b in zip(mixed.model.parameters(), exact.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.03)
    assert not same(state(exact), state(mixed))
    assert mixed.gradients_per_step == exact.gradients_per_step
    first, expected = mixed.steps.iloc[0], exact.steps.iloc[0]
    assert first["train_batch_loss"] == pytest.approx(expected["train_batch_loss"], rel=2e-2)
    if lost == 0:
        assert first["loss_before"] == expected["loss_before"], "what is recorded is in float32"


class Loud(nn.Module):
    """The toy's linear classifier with a first gradient that overflows under the first loss scales."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 8 * self.linear(x[:, 1:])
        return out


@pytest.mark.parametrize("name", ["SGD", "SAM", "MSAM"])
def test_steps_that_overflow_are_left_out_and_told(name: str) -> None:
    """They have no row; the schedule goes on by batches, and steps are counted through."""
    loud = dataclasses.replace(LONG, network=Loud)
    found = train(loud, name, 0, every=3, computing=FLOAT16)
    assert found.skipped > 0
    assert list(found.steps["step"]) == list(range(EPOCHS * BATCHES - found.skipped))
    all_lr = train(loud, name, 0, every=None).steps["lr"]
    assert list(found.steps["lr"]) == list(all_lr)[found.skipped :], "the first ones, until the scale is low enough"
    assert found.gradients_per_step == (2 if name == "SAM" else 1)
    assert set(found.steps.loc[found.steps["rise"].notna(), "step"]) == set(range(0, len(found.steps), 3))
    assert all(parameter.isfinite().all() for parameter in found.model.parameters())


def test_skipped_steps_are_a_score(tmp_path: Path) -> None:
    for how, told in ((FLOAT16, True), (BFLOAT16, False)):
        one = job(Run(TOY, "SGD", 0), tmp_path, COARSE, 4, how)
        execute(one)
        assert ("skipped_steps" in one.read().scores) is told


def test_clipping_with_a_loss_scale_is_clipping() -> None:
    """The largest norm acts on the gradients and not on their multiples by 65,536."""
    clipped = dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, clip=0.05, weight_decay=0.0))
    start = train(clipped, "SGD", 0, every=None).model
    found = train(clipped, "SGD", 0, every=None, computing=FLOAT16).model
    for a, b in zip(found.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=5e-3)


def test_a_perturbation_that_sees_the_loss_scale_is_refused() -> None:
    bare = dataclasses.replace(
        TOY, perturbations={"SAM": Perturbation(direction="gradient", rho=0.1, normalize="none")}
    )
    with pytest.raises(ValueError, match=r"SAM perturbs along the gradient without normalising it.*use bfloat16"):
        train(bare, "SAM", 0, computing=FLOAT16)
    train(bare, "SAM", 0, every=None, computing=BFLOAT16)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"device": "tpu"}, r"expected the device auto, cpu or cuda, got 'tpu'"),
    "precision": ({"device": "cpu", "amp": "int8"}, r"\(amp\) of none, bfloat16, float16, got 'int8'"),
    "interval": ({"device": "cpu", "save_every": 0}, r"saved every 1 or more epochs, got 0"),
    "no GPU": ({"device": "cuda"}, r"torch finds no GPU here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_computing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        computing(**options)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Auto takes a GPU where there is one, and each process of torchrun's its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert computing() == PLAIN
    assert PLAIN.torch_device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert computing().device == "cuda"
    assert computing().torch_device == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert computing().torch_device == torch.device("cuda:2")
    assert str(computing()) == "on a GPU in float32"
    assert str(computing("cpu", "bfloat16")).endswith("training steps, in bfloat16 (autocast)")


def test_convolutions_are_exact_and_repeatable_inside_alone() -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic

    before = flags()
    with repeatable():
        assert flags() == (False, True)
    assert flags() == before


def test_device_and_precision_have_networks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = Run(TOY, "MSAM", 0)
    ways = [PLAIN, BFLOAT16, FLOAT16, Computing("cuda"), Computing("cuda", "bfloat16")]
    assert len({job(run, tmp_path, COARSE, 4, how).directory for how in ways}) == len(ways)
    often = Computing(save_every=3)
    assert job(run, tmp_path, COARSE, 4, often).directory == job(run, tmp_path, COARSE, 4).directory


# --- a part of the samples


def test_some_samples() -> None:
    """Different ones, of all batches, in their order with their labels; the same at every call."""
    batches = split(*samples(SAMPLES, seed=1), 25)
    part = some(batches, 31)
    assert [len(labels) for _, labels in part] == [25, 6]
    inputs, labels = (torch.cat(column) for column in zip(*part, strict=True))
    numbers = inputs[:, 0].long()
    assert (numbers.diff() > 0).all()
    all_inputs, all_labels = (torch.cat(column) for column in zip(*batches, strict=True))
    assert torch.equal(inputs, all_inputs[numbers])
    assert torch.equal(labels, all_labels[numbers])
    assert numbers.max() >= 50, "of the last batch too"
    again = some(batches, 31)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(part, again, strict=True))
    assert some(batches, None) is some(batches, SAMPLES) is some(batches, 10**6) is batches


def test_curvature_while_training_is_of_these_samples() -> None:
    """As if the training set's probe had been given them by hand."""
    found = train(TOY, "SGD", 0, every=4, samples=31).steps["curvature_random"].dropna()
    small = dataclasses.replace(TOY, train=lambda: some(TOY.train(), 31))
    by_hand = train(small, "SGD", 0, every=4).steps["curvature_random"].dropna()
    assert found.iloc[0] == by_hand.iloc[0], "at the initial weights, which both share"
    assert found.iloc[0] != train(TOY, "SGD", 0, every=4).steps["curvature_random"].dropna().iloc[0]


def test_bad_numbers_of_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samples must be a positive number to measure on, got 0"):
        run_study(TOY, out=tmp_path / "out", protocol=Protocol(samples=0))
    assert not (tmp_path / "out").exists()


# --- several processes


def lasting_jobs(costs: list[int], folder: Path) -> list[Job]:
    def lasting(epochs: int) -> Workload:
        return dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, epochs=epochs))

    return [job(Run(lasting(cost), "SGD", number), folder, COARSE, 4) for number, cost in enumerate(costs)]


def test_shares(tmp_path: Path) -> None:
    """Every run is made once, and nobody has much more to do than another."""
    wanted = lasting_jobs([1, 9, 2, 4, 4, 3, 7, 1], tmp_path)
    members = [Members() for _ in range(3)]
    for rank, member in enumerate(members):
        member.rank, member.count = rank, 3
    shares = [member.share(wanted) for member in members]
    assert sorted(one.run.seed for share in shares for one in share) == list(range(8))
    loads = [sum(one.run.workload.recipe.epochs for one in share) for share in shares]
    assert max(loads) - min(loads) <= 2
    assert sorted(one.run.seed for one in Members().share(wanted)) == list(range(8)), "alone"


TOGETHER: dict[str, Any] = {"exhibits": ["T1"], "protocol": COARSE, "every": 4, "progress": False, "jobs": 1}


def told(*, out: Path, seeds: int) -> str:
    try:
        return str(run_study(TOY, out=out, seeds=seeds, **TOGETHER))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def trouble(*_: object, **__: object) -> None:
    raise RuntimeError("trouble with the toy")


def work(rank: int, folder: str) -> None:
    """Be one of two processes: share a study, disagree about one, and fail in one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=2)
    out = Path(folder) / "out"
    lines = [told(out=out, seeds=1), told(out=out, seeds=2 + rank)]
    with mock.patch.object(processes, "execute", trouble if rank == 1 else lambda *_, **__: None):
        lines.append(told(out=out, seeds=2))
    (Path(folder) / f"told{rank}").write_text("\n".join(lines))


def test_two_processes_give_what_one_does(toy: Workload, alone: Path) -> None:
    """Byte for byte; they refuse to make different studies; and one that fails ends both, with finished runs kept."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        together(work, name)
        assert tables(folder / "out") == tables(alone)
        first, second = ((folder / f"told{rank}").read_text().splitlines() for rank in (0, 1))
        assert first[0] == second[0] == str(folder / "out" / "report.html")
        assert first[1] == second[1] == first[1]
        assert first[1].startswith("ValueError: process 1 plans other runs than process 0")
        assert second[2].startswith(
            "RuntimeError: a run failed (RuntimeError: trouble with the toy): finished runs are"
        )
        assert first[2].startswith("RuntimeError: another process of this study has ended, see what it says")
        finished = [path for path in networks(folder / "out") if store.is_trained(path)]
        assert len(finished) >= 6, "those of the first study"
