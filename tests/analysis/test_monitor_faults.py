"""Probes, loggers and listeners that fail: an error before anything moves, or one warning and the training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam
import msam_analysis as ma


class Failing:
    """A probe that fails at some of its questions, counted from 0."""

    def __init__(self, at: set[int], answer: Any = None) -> None:
        self.at, self.asked, self.answer = at, -1, answer

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Any:
        self.asked += 1
        if self.asked in self.at:
            if self.answer is None:
                raise ArithmeticError("the probe went off")
            return self.answer
        return {"fine": 1.0}


def run(monitored: Callable[[torch.optim.Optimizer], object], steps: int = 3) -> tuple[Tensor, Tensor]:
    """Return the weights before and after."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    monitored(optimizer)
    before = weight.detach().clone()
    for _ in range(steps):
        weight.grad = torch.ones(3)
        optimizer.step()
    return before, weight.detach()


ANSWERS: dict[str, tuple[Any, type[Exception], str]] = {
    "an error": (None, ArithmeticError, "went off"),
    "a list": ([1.0], TypeError, r"returned \[1.0\]: expected a mapping of names to numbers"),
    "nothing to see": (3.0, TypeError, "expected a mapping of names to numbers"),
    "text": ({"fine": "x"}, TypeError, "recorded 'fine' as a str: expected a number"),
    "a vector": ({"fine": torch.ones(2)}, TypeError, "recorded 'fine' as a Tensor: expected a number"),
    "a name of the monitor's own": ({"end": 1.0}, ValueError, "two probes record 'end', or it is a name"),
    "the step": ({"step": 1.0}, ValueError, "two probes record 'step', or it is a name"),
}


@pytest.mark.parametrize("what", ANSWERS)
@pytest.mark.parametrize("kind", ["SGD", "MSAM", "SAM"])
def test_a_probe_that_fails_at_its_first_question_ends_the_step_before_anything_moves(what: str, kind: str) -> None:
    """It is a mistake of the setting; the same step can be taken again."""
    answer, error, message = ANSWERS[what]
    weight = nn.Parameter(torch.ones(3))
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "SGD": lambda: torch.optim.SGD([weight], lr=0.1, momentum=0.9),
        "MSAM": lambda: msam.MSAM([weight], lr=0.1, rho=0.3, momentum=0.9),
        "SAM": lambda: msam.SAM([weight], lr=0.1, rho=0.3, momentum=0.9),
    }
    optimizer = kinds[kind]()
    monitor = ma.Monitor(optimizer, [Failing({0}, answer)], every=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    with pytest.raises(error, match=message):
        optimizer.step(closure)  # type: ignore[arg-type]  # torch's stubs want a float
    assert torch.equal(weight.detach(), torch.ones(3))
    optimizer.step(closure)  # type: ignore[arg-type]
    assert [row["step"] for row in monitor.rows] == [0]
    assert not torch.equal(weight.detach(), torch.ones(3))


@pytest.mark.parametrize("what", ANSWERS)
def test_a_probe_that_fails_later_costs_its_numbers(what: str) -> None:
    answer, _, message = ANSWERS[what]
    monitors: list[ma.Monitor] = []
    probe = Failing({1, 2}, answer)
    with pytest.warns(UserWarning, match=message) as said:
        before, after = run(
            lambda o: monitors.append(ma.Monitor(o, [probe, ma.probes.Norms(["weights"])], every=1)), steps=4
        )
    assert len(said) == 1
    assert "the training goes on" in str(said[0].message)
    assert [sorted(row) for row in monitors[0].rows] == [
        sorted(["step", "weights_norm", *["fine"] * (step in (0, 3))]) for step in range(4)
    ]
    assert not torch.equal(before, after)


@pytest.mark.parametrize("where", ["logger", "listener", "logger's end"])
def test_a_logger_or_listener_that_fails_is_said_once(where: str) -> None:
    kept: list[Any] = []
    monitors: list[ma.Monitor] = []

    class Broken:
        def __call__(self, row: Any) -> None:
            if where != "logger's end":
                raise KeyError("the tracker is away")

        def close(self) -> None:
            raise OSError("the tracker is away")

    def attach(optimizer: torch.optim.Optimizer) -> None:
        to = [Broken()] if where != "listener" else []
        monitors.append(ma.Monitor(optimizer, [ma.probes.Norms()], every=1, to=[*to, kept.append]))
        if where == "listener":
            monitors[0].on_record(Broken())

    def train() -> None:
        run(attach)
        monitors[0].close()

    with pytest.warns(UserWarning, match="Broken failed at step .*the tracker is away.*the training goes on") as said:
        train()
    assert len(said) == 1
    assert len(kept) == len(monitors[0].rows) == 3
