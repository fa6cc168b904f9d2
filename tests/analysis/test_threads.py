"""Objectives, checkpoints, recorders and loggers in several threads: the numbers of one thread, and no deadlock."""

from __future__ import annotations

import argparse
import contextvars
import os
import pickle
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import msam_analysis as ma
from msam_analysis.objective.examination import ExaminationError
from msam_analysis.objective.randomness import ALONE, Alone, RandomStream

THREADS, ROUNDS = 4, 6


def together(work: Callable[[int], Any]) -> list[Any]:
    """Run a function in several threads that begin at once; return what it returned, or raise what it raised."""
    barrier = threading.Barrier(THREADS)
    found: list[Any] = [None] * THREADS

    def run(number: int) -> None:
        barrier.wait()
        try:
            found[number] = work(number)
        except BaseException as error:  # noqa: BLE001 -- it is raised below
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


class Checkpointed(nn.Module):
    """Its first layer runs again in the backward pass, and reads its weights then."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(3, 8), nn.Linear(8, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.first, x, use_reentrant=self.reentrant)
        found: Tensor = self.last(torch.tanh(hidden))
        return found


def network(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: dict[str, Callable[[], nn.Module]] = {
            "plain": lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)),
            "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
            "statistics": lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
            "checkpointed": lambda: Checkpointed(reentrant=False),
            "attention": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), attention(), nn.Flatten(), nn.Linear(3, 2)),
        }
        return made[kind]().double()


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(3, 1, 8, batch_first=True)


OPTIONS: dict[str, dict[str, Any]] = {"dropout": {"dropout": True}, "statistics": {"batchnorm": "recalibrate"}}


def objective(kind: str, **options: Any) -> ma.Objective:
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = list(zip(x.split(8), (x[:, 0] > 0).long().split(8), strict=True))
    return ma.Objective(network(kind), F.cross_entropy, batches, **OPTIONS.get(kind, {}), **options)


def questions(o: ma.Objective) -> list[Callable[[], Tensor]]:
    """What is asked at different points of the weights."""
    w = o.point()
    v = torch.linspace(-1, 1, o.size, dtype=torch.float64)
    return [
        lambda: o.loss(w + v),
        lambda: torch.cat([part.reshape(-1) for part in o.loss_and_gradient(w - v)]),
        lambda: o.hessian() @ v,
        lambda: o.hvp(v, w + 2 * v),
        lambda: o.gauss_newton() @ v,
        lambda: o.with_samples(torch.arange(5)).gradient(),
        lambda: ma.slice_1d(o, ma.directions.random(o, 0), points=3).loss,
    ]


@pytest.mark.parametrize("kind", ["plain", "dropout", "statistics", "checkpointed", "attention"])
@pytest.mark.parametrize("examined", [False, True])
def test_threads_get_the_numbers_of_one(kind: str, examined: bool) -> None:
    """Also where all of them are the first to ask; torch's flags and random states are what they were."""
    alone = [question() for question in questions(objective(kind))]
    shared = objective(kind)
    if examined:
        shared.examine()
    asked = questions(shared)
    flags = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]

    def work(number: int) -> list[tuple[int, Tensor]]:
        order = [(number + step) % len(asked) for step in range(ROUNDS)]
        return [(which, asked[which]()) for which in order]

    for answers in together(work):
        for which, got in answers:
            torch.testing.assert_close(got, alone[which], rtol=1e-12, atol=1e-12)
    assert flags == (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled())
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # type: ignore[index]
    assert states[2] == random.getstate()


def test_several_objectives_of_one_model() -> None:
    """Each has a copy of its own; the flags and random states are one for all."""
    model = network("plain")
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    batch = (x, (x[:, 0] > 0).long())
    made = [ma.Objective(model, F.cross_entropy, [batch]) for _ in range(THREADS)]
    want = ma.Objective(model, F.cross_entropy, [batch]).gradient()
    for got in together(lambda number: made[number].gradient()):
        assert torch.equal(got, want)


def test_a_thread_in_a_copied_context() -> None:
    """As asyncio.to_thread starts it inside of a monitor's record: examined once, for all, without a deadlock."""
    from msam_analysis.objective.handing_on import Examinations

    o = objective("plain")
    want = objective("plain").loss()
    with Examinations().handed_on():
        contexts = [contextvars.copy_context() for _ in range(THREADS)]
        found = together(lambda number: contexts[number].run(o.loss))
    assert all(torch.equal(one, want) for one in found)


def test_what_is_random_in_a_stream_is_not_seen_by_another_thread() -> None:
    """A thread waits outside until the global states are the caller's again."""
    inside, free = threading.Event(), []

    def other() -> None:
        inside.wait()
        free.append(ALONE.acquire(blocking=False))

    thread = threading.Thread(target=other)
    thread.start()
    with RandomStream(3):
        inside.set()
        thread.join()
    assert free == [False]
    assert ALONE.acquire(blocking=False)
    ALONE.release()


def test_a_stream_that_cannot_begin_gives_the_lock_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ArithmeticError("no state today")

    monkeypatch.setattr("msam_analysis.objective.randomness._global_state", broken)
    with pytest.raises(ArithmeticError, match="no state today"), RandomStream(0):
        pass
    free: list[bool] = []
    thread = threading.Thread(target=lambda: free.append(ALONE.acquire(blocking=False)) or ALONE.release())  # type: ignore[func-returns-value]
    thread.start()
    thread.join()
    assert free == [True]


# --- a loss that comes back to its objective


@pytest.mark.parametrize("examine", [True, False])
@pytest.mark.parametrize("call", ["loss", "gradient", "a view", "a slice"])
def test_a_loss_that_evaluates_its_own_objective_is_refused(call: str, examine: bool) -> None:
    made: list[ma.Objective] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        own = made[0]
        calls: dict[str, Callable[[], object]] = {
            "loss": own.loss,
            "gradient": own.gradient,
            "a view": lambda: own.with_samples(torch.arange(3)).loss(),
            "a slice": lambda: ma.slice_1d(own, ma.directions.random(own), points=3),
        }
        calls[call]()
        return F.cross_entropy(model(batch[0]), batch[1])

    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    made.append(ma.Objective(network("plain"), loss_fn, [(x, (x[:, 0] > 0).long())], examine=examine))
    with pytest.raises(ExaminationError, match="the loss evaluates an objective of itself: expected a function"):
        made[0].loss()
    assert ALONE.acquire(blocking=False)
    ALONE.release()


def test_a_loss_that_evaluates_another_objective() -> None:
    """Each is evaluated with its own tensors and its own draws."""
    other = objective("dropout")
    shift = other.loss()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + other.loss()

    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    batch = (x, (x[:, 0] > 0).long())
    plain = ma.Objective(network("plain"), F.cross_entropy, [batch])
    torch.testing.assert_close(ma.Objective(network("plain"), loss_fn, [batch]).loss(), plain.loss() + shift)


# --- fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_a_fork_is_not_locked_out() -> None:
    """Another thread holds the lock while the process forks: in the child that thread is not there."""
    lock, taken, done = Alone(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child == 0:  # pragma: no cover -- it ends here
        os._exit(0 if lock.acquire(blocking=False) else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_forked_by_the_thread_that_holds_the_lock_goes_on_with_it() -> None:
    lock = Alone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        lock.acquire()
        child = os.fork()
        if child == 0:  # pragma: no cover
            try:
                lock.release()  # the end of its own block
                os._exit(0 if lock.acquire(blocking=False) else 2)
            finally:
                os._exit(1)
    lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- checkpoints, recorders


def test_threads_that_load_checkpoints(tmp_path: Path) -> None:
    """Torch's list of what is safe is one for all: each thread finds its own stand-ins in it."""

    def write(number: int) -> Path:
        path = tmp_path / f"{number}.pt"
        content = {"state_dict": {"w": torch.full((3,), float(number))}, "args": argparse.Namespace(n=number)}
        torch.save(content, path)
        return path

    paths = [write(number) for number in range(THREADS)]

    def work(number: int) -> list[Tensor]:
        return [ma.checkpoints.load_weights(paths[number])["w"] for _ in range(20)]

    for number, found in enumerate(together(work)):
        assert all(bool((one == number).all()) for one in found)
    assert "StandIn" not in str(torch.serialization.get_safe_globals())


def test_threads_share_a_recorder(tmp_path: Path) -> None:
    recorder = ma.TrajectoryRecorder(tmp_path / "path", nn.Linear(2, 2))

    def work(number: int) -> int:
        refused = 0
        for step in range(number, 40, THREADS):
            try:
                recorder.record(step)
            except ValueError:  # noqa: PERF203 -- a later step of another thread was first
                refused += 1
        return refused

    refused = sum(together(work))
    steps = recorder.trajectory().steps.tolist()
    assert steps == sorted(set(steps))
    assert len(steps) + refused == 40


def test_a_table_can_be_copied_to_another_process(tmp_path: Path) -> None:
    table = ma.loggers.CSV(tmp_path / "run.csv")
    table({"step": 0, "a": 1.0})
    again = pickle.loads(pickle.dumps(table))  # noqa: S301 -- written in the same line
    again({"step": 1, "a": 2.0})
    assert (tmp_path / "run.csv").read_text().split() == ["step,a", "0,1.0", "1,2.0"]
