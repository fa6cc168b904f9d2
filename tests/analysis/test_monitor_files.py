"""The file of a monitor: rows as they come, whole after a crash, continued to the byte, and nobody else's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import msam
import msam_analysis as ma
from msam_analysis import probes
from msam_analysis.monitor.probes import Every, MomentumGradientCosine, Norms
from msam_analysis.monitor.records import RecordFile

from .cases import MLP

Kind = Callable[[Any], torch.optim.Optimizer]
KINDS: dict[str, Kind] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "MSAM": lambda p: msam.MSAM(p, lr=0.1, rho=0.3, momentum=0.9),
}


class Run:
    """A training run with every probe that carries something along, and a checkpoint of it."""

    def __init__(self, kind: str, path: Path, checkpoint: Path | None = None) -> None:
        self.model = MLP.model().eval()
        self.optimizer = KINDS[kind](list(self.model.parameters()))
        objective = ma.Objective(self.model, MLP.loss_fn, MLP.data())
        asked: list[Any] = [
            MomentumGradientCosine(after=True),
            Every(probes.HeldOutCosine(objective, in_turn=True), 2),
            Every(probes.TopEigenvalues(objective, confirm=False, seed=3), 3),
            probes.Curvature(objective),
        ]
        self.monitor = ma.Monitor(self.optimizer, asked, every=2, path=path)
        if checkpoint is not None:
            saved = torch.load(checkpoint, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.monitor.load_state_dict(saved["monitor"])

    def train(self, start: int, stop: int) -> None:
        data = MLP.data()
        for step in range(start, stop):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(data[step % 3][0]), data[step % 3][1]).backward()
            self.optimizer.step()

    def save(self, path: Path) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "monitor": self.monitor}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_writes_what_an_uninterrupted_one_does(kind: str, tmp_path: Path) -> None:
    """Saved at 5, killed at 9 with half a line in the file, gone on from 5: the same file, to the byte."""
    whole = Run(kind, tmp_path / "whole.jsonl")
    whole.train(0, 12)
    whole.monitor.close()
    first = Run(kind, tmp_path / "parts.jsonl")
    first.train(0, 5)
    first.save(tmp_path / "checkpoint.pt")
    first.train(5, 9)
    with (tmp_path / "parts.jsonl").open("ab") as file:
        file.write(b'{"step": 10, "cos')
    second = Run(kind, tmp_path / "parts.jsonl", tmp_path / "checkpoint.pt")
    assert second.monitor.frame()["step"].tolist() == [0, 2, 3, 4]
    assert second.monitor.step == 5
    second.train(5, 12)
    second.monitor.close()
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    pd.testing.assert_frame_equal(second.monitor.frame(), whole.monitor.frame(), check_exact=True)
    assert whole.monitor.frame()["lambda_1"].notna().tolist() == [True, False, True, False, True, False, True, False]


def test_resuming_without_a_file() -> None:
    """In one process, or where rows are kept elsewhere: counting goes on, and later rows are dropped."""
    model = MLP.model().eval()
    optimizer = KINDS["SGD"](list(model.parameters()))
    monitor = ma.Monitor(optimizer, [MomentumGradientCosine()], every=1)
    states = []
    for _ in range(4):
        states.append(monitor.state_dict())
        F.cross_entropy(model(MLP.data()[0][0]), MLP.data()[0][1]).backward()
        optimizer.step()
    monitor.load_state_dict(states[2])
    assert monitor.frame()["step"].tolist() == [0, 1]
    assert monitor.step == 2


def step(optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def optimizer_of(momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1, momentum=momentum)


def watched(optimizer: torch.optim.Optimizer, path: Path, every: int = 1) -> ma.Monitor:
    return ma.Monitor(optimizer, [MomentumGradientCosine()], every, path=path)


def test_every_row_is_on_disk_when_its_step_is_over(tmp_path: Path) -> None:
    optimizer = optimizer_of()
    monitor = watched(optimizer, tmp_path / "deep" / "er" / "run.jsonl", every=2)
    for number in range(1, 6):
        step(optimizer)
        assert ma.Monitor.read(tmp_path / "deep" / "er" / "run.jsonl").equals(monitor.frame())
        assert len(monitor.rows) == (number + 1) // 2


@pytest.mark.parametrize("closed", [True, False])
def test_counting_goes_on_where_the_file_ends(closed: bool, tmp_path: Path) -> None:
    """At the step it had if it was closed; behind the last row otherwise."""
    optimizer, path = optimizer_of(), tmp_path / "run.jsonl"
    first = watched(optimizer, path, every=4)
    step(optimizer, 7)
    if closed:
        first.close()
    before = path.read_bytes()
    second = watched(optimizer, path, every=4)
    assert second.step == (7 if closed else 5)
    assert path.read_bytes() == before
    if not closed:
        del first
    step(optimizer, 4)
    assert second.frame()["step"].tolist() == [0, 4, 8]
    assert b"end" not in path.read_bytes()
    second.close()
    assert watched(optimizer, path, every=4).step == second.step


def test_closing_twice_notes_one_end(tmp_path: Path) -> None:
    optimizer, path = optimizer_of(), tmp_path / "run.jsonl"
    monitor = watched(optimizer, path, every=4)
    step(optimizer, 3)
    monitor.close()
    once = path.read_bytes()
    monitor.close()
    assert path.read_bytes() == once
    assert once.count(b"end") == 1


def test_a_new_run_is_not_written_behind_an_old_one(tmp_path: Path) -> None:
    """The file stays as it was, also when the monitor that was refused is closed."""
    old = optimizer_of()
    with watched(old, tmp_path / "run.jsonl", every=4):
        step(old, 7)
    before = (tmp_path / "run.jsonl").read_bytes()
    new = optimizer_of()
    with (
        watched(new, tmp_path / "run.jsonl", every=4),
        pytest.raises(
            ValueError, match=r"holds 2 rows of an earlier run.*not taken a step.*expected.*give another path"
        ),
    ):
        step(new, 2)
    assert (tmp_path / "run.jsonl").read_bytes() == before
    without = optimizer_of(momentum=0.0)  # nothing tells whether this one has taken a step
    monitor = ma.Monitor(without, [Norms(["weights"])], 4, path=tmp_path / "plain.jsonl")
    step(without, 5)
    monitor.close()
    again = ma.Monitor(without, [Norms(["weights"])], 4, path=tmp_path / "plain.jsonl")
    step(without, 4)
    assert again.frame()["step"].tolist() == [0, 4, 8]


class Odd:
    """A probe with numbers that are no numbers."""

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        return {"up": math.inf, "down": -math.inf, "none": math.nan, "tenth": 0.1, "small": 5e-324}


def test_nan_and_infinity_come_back_as_they_are(tmp_path: Path) -> None:
    optimizer, path = optimizer_of(), tmp_path / "run.jsonl"
    monitor = ma.Monitor(optimizer, [Odd()], 1, path=path)
    step(optimizer, 2)
    pd.testing.assert_frame_equal(ma.Monitor.read(path), monitor.frame(), check_exact=True)
    assert ma.Monitor.read(path)["up"].tolist() == [math.inf, math.inf]


IDENTITY = {"probes": ["a"], "periods": [1]}


@settings(max_examples=40)
@given(rows=st.lists(st.floats(), min_size=1, max_size=4), cut=st.integers(0, 400), back=st.integers(0, 4))
def test_a_file_cut_anywhere_keeps_its_whole_lines(
    rows: list[float], cut: int, back: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Where a crash may have ended it: reading gives the whole rows, and appending goes on behind them."""
    path = tmp_path_factory.mktemp("cut") / "run.jsonl"
    file = RecordFile(path, IDENTITY)
    for number, value in enumerate(rows):
        file.append({"step": number, "value": value})
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    lines = path.read_bytes().count(b"\n")
    again = RecordFile(path, IDENTITY)
    assert len(again.rows) == max(0, lines - 1)
    again.rewind(min(back, len(again.rows)))
    assert again.step == 0 or not again.rows or again.rows[-1]["step"] < back
    kept = len(again.rows)
    for number, value in list(enumerate(rows))[kept:]:
        again.append({"step": number, "value": value})
    assert path.read_bytes() == whole


def other_probes(path: Path) -> Any:
    return ma.Monitor(optimizer_of(), [Norms()], path=path)


REFUSED: dict[str, tuple[bytes | None, Callable[[Path], Any], type[Exception], str]] = {
    "other probes": (
        None,
        other_probes,
        ValueError,
        r"belongs to another monitor, with the probes \[.MomentumGradientCosine\(",
    ),
    "another period": (
        None,
        lambda path: watched(optimizer_of(), path, every=3),
        ValueError,
        r"belongs to another monitor, with the periods \[1\]: expected \[3\]",
    ),
    "text": (b"step,cosine\n", lambda path: watched(optimizer_of(), path), ValueError, "is not a file of a Monitor"),
    "half a text": (b"step", lambda path: watched(optimizer_of(), path), ValueError, "is not a file of a Monitor"),
    "a number": (b"3\n", ma.Monitor.read, ValueError, "is not a file of a Monitor"),
    "another format": (b'{"format": "2"}\n', ma.Monitor.read, ValueError, "is not a file of a Monitor"),
    "nothing": (b"", ma.Monitor.read, ValueError, "is not a file of a Monitor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_of_something_else_is_refused_and_stays(case: str, tmp_path: Path) -> None:
    content, call, kind, message = REFUSED[case]
    path = tmp_path / "run.jsonl"
    if content is None:
        optimizer = optimizer_of()
        with watched(optimizer, path):
            step(optimizer, 2)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(kind, match=message):
        call(path)
    assert path.read_bytes() == before


def test_a_damaged_line_is_told(tmp_path: Path) -> None:
    optimizer, path = optimizer_of(), tmp_path / "run.jsonl"
    with watched(optimizer, path):
        step(optimizer, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\x00\x00\n", *lines[3:]]))
    with pytest.raises(ValueError, match=r"is damaged in line 3: remove that line"):
        ma.Monitor.read(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no records at .*nowhere: expected a file"):
        ma.Monitor.read(tmp_path / "nowhere")


def test_the_state_of_other_probes() -> None:
    state = ma.Monitor(optimizer_of(), [Norms()]).state_dict()
    with pytest.raises(ValueError, match=r"expected the state of a monitor with .*Cosine.*got one with .*Norms"):
        ma.Monitor(optimizer_of(), [MomentumGradientCosine()]).load_state_dict(state)


@pytest.mark.parametrize("lacking", ["step", "skipped", "identity", "probes"])
def test_a_state_that_is_none(lacking: str) -> None:
    state = ma.Monitor(optimizer_of(), [Norms()]).state_dict()
    del state[lacking]
    with pytest.raises(ValueError, match=rf"expected what Monitor.state_dict\(\) returned, got '{lacking}' missing"):
        ma.Monitor(optimizer_of(), [Norms()]).load_state_dict(state)


def test_what_tells_monitors_apart_is_in_the_first_line(tmp_path: Path) -> None:
    """Names and plain settings; of a network its class, of an objective nothing, as both are made anew in every run."""
    model = MLP.model()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    asked: list[Any] = [
        Norms(["step"], model=model),
        probes.LossAlongMomentum(objective, [0.5]),
        Odd(),
        Every(lambda optimizer, step: {}, 7),
    ]
    ma.Monitor(optimizer_of(), asked, path=tmp_path / "run.jsonl")
    header = json.loads((tmp_path / "run.jsonl").read_text(encoding="utf-8"))
    assert header["periods"] == [50, 50, 50, 7]
    assert header["probes"][:3] == [
        "Norms(of=['step'], model=Sequential, by='parameter')",
        "LossAlongMomentum(offsets=(0.0, 0.5))",
        "Odd",
    ]
    assert "lambda" in header["probes"][3]
