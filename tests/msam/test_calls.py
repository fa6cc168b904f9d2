"""How many calls of our own functions a step makes: few, and no more where there are more parameters."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import msam

from .workloads import backward, closure_of, network

OURS = str(Path(msam.__file__).parent)
MOST = {"MSAM": 60, "SAM": 85, "SAM, two calls": 75}


def step_of(name: str, model: nn.Module) -> Callable[[], Any]:
    """One step of an optimizer of ours."""
    opt = msam.MSAM(model.parameters()) if name == "MSAM" else msam.SAM(model.parameters())
    closure = closure_of(model, opt, 0)
    if name != "SAM, two calls":
        return lambda: opt.step(closure)

    def act() -> None:
        closure()
        assert isinstance(opt, msam.SAM)
        opt.first_step(zero_grad=True)
        closure()
        opt.second_step()

    return act


def calls(act: Callable[[], Any]) -> int:
    """Python frames of the package during the third of three runs."""
    count, before = 0, sys.getprofile()

    def see(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(OURS)

    act()
    act()
    sys.setprofile(see)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("name", MOST)
def test_a_step_makes_few_calls(name: str) -> None:
    assert 20 < calls(step_of(name, network())) <= MOST[name]


class Deep(nn.Module):
    """One module with any number of parameters."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.eye(3) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(len(self.weights)):
            x = x @ self.weights[i]
        return x


@pytest.mark.parametrize(
    "cls", [msam.MSAM, msam.SAM, msam.NAG, msam.AdamWMSAM, msam.AdamWSAM], ids=lambda c: c.__name__
)
def test_the_calls_do_not_grow_with_the_parameters(cls: Any) -> None:
    counts = []
    for layers in (2, 9):
        model = Deep(layers)
        opt = cls(model.parameters())

        def closure(model: nn.Module = model, opt: Any = opt) -> torch.Tensor:
            opt.zero_grad()
            return backward(model(torch.ones(2, 3)).square().mean())

        counts.append(calls(functools.partial(opt.step, closure)))
    assert counts[0] == counts[1]
