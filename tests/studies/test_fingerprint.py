"""One fingerprint: things that behave alike have the same, others another."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msam_analysis.objective.vectors import select
from msam_analysis.results.fingerprint import fingerprint, of_tensors


def compiled(source: str) -> Callable[..., Any]:
    space: dict[str, Any] = {"__name__": "theirs", "torch": torch, "nn": nn}
    exec(source, space)  # noqa: S102 - functions of one name with other texts
    made: Callable[..., Any] = space["made"]
    return made


OUTER = "def outer(n): return lambda: n\nmade = outer({})"
TOLD = "def made(x):\n    '{}'\n    return x"


class Net(nn.Module):
    def __init__(self, width: int = 3, slope: float = 0.1) -> None:
        super().__init__()
        self.linear, self.slope = nn.Linear(2, width), slope

    def forward(self, x: Tensor) -> Tensor:
        return self.bent(self.linear(x))

    def bent(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, self.slope)


class Bent(Net):
    def bent(self, x: Tensor) -> Tensor:
        return x.tanh()


class Keeper:
    def __init__(self, kept: object) -> None:
        self.kept = kept

    def method(self) -> object:
        return self.kept


@dataclasses.dataclass(frozen=True)
class Value:
    one: object
    told: str = dataclasses.field(default="", compare=False)


def array(last: float) -> np.ndarray[Any, Any]:
    values = np.zeros(5000)
    values[2500] = last
    return values


OTHERS: dict[str, tuple[object, object]] = {
    "numbers": (1, 2),
    "a number and its text": (1, "1"),
    "yes and 1": (True, 1),
    "order": ([1, 2], [2, 1]),
    "nesting": ([[1], 2], [1, [2]]),
    "not a number": (math.nan, 0.0),
    "keys": ({"a": 1}, {"b": 1}),
    "a value in the middle of a long array": (array(0.0), array(1.0)),
    "shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "data type": (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    "the order of samples": (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    "code": (compiled("def made(x): return x + 1"), compiled("def made(x): return x - 1")),
    "a constant": (compiled("def made(x): return x + 1"), compiled("def made(x): return x + 2")),
    "a default": (compiled("def made(x=1): return x"), compiled("def made(x=2): return x")),
    "a default by keyword": (compiled("def made(*, x=1): return x"), compiled("def made(*, x=2): return x")),
    "what is closed over": (compiled(OUTER.format(1)), compiled(OUTER.format(2))),
    "partial": (functools.partial(math.pow, 2.0), functools.partial(math.pow, 3.0)),
    "the object of a method": (Keeper(1).method, Keeper(2).method),
    "a field": (Value(1), Value(2)),
    "an attribute": (Net(slope=0.1), Net(slope=0.2)),
    "a method that forward calls": (Net(), Bent()),
    "a layer": (nn.Sequential(nn.Tanh()), nn.Sequential(nn.ReLU())),
    "a layer's setting": (nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2))),
    "behind a cache": (
        functools.lru_cache(compiled("def made(): return 1")),
        functools.lru_cache(compiled("def made(): return 2")),
    ),
    "a class": (int, float),
    "modules of Python": (math, dataclasses),
    "sets": ({1, 2}, {1, 3}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_differs_has_another(case: str) -> None:
    one, other = OTHERS[case]
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


ALIKE: dict[str, tuple[object, object]] = {
    "docstrings": (compiled(TOLD.format("One.")), compiled(TOLD.format("Another."))),
    "comments": (compiled("def made(x): return x"), compiled("def made(x): return x  # as it is")),
    "made anew": (compiled("def made(x): return x"), compiled("def made(x): return x")),
    "fields that are not compared": (Value(1, "a"), Value(1, "b")),
    "weights": (Net(), Net()),
    "the mode": (Net().train(), Net().eval()),
    "sets": ({1, 2, 3}, {3, 2, 1}),
    "copies": (torch.arange(3), torch.arange(6)[:3]),
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_is_alike_has_the_same(case: str) -> None:
    one, other = ALIKE[case]
    assert fingerprint(one) == fingerprint(other)


def test_our_code_counts_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has declared versions; another release of ours leaves finished runs as they are."""
    before = fingerprint(select, torch.nn.functional.relu)
    monkeypatch.setattr(select, "__code__", (lambda *_, **__: None).__code__)
    assert fingerprint(select, torch.nn.functional.relu) == before


def test_a_thing_inside_itself_ends() -> None:
    inside: list[object] = [1]
    inside.append(inside)
    assert fingerprint(inside) != fingerprint([1])


def test_tensors_of_every_kind() -> None:
    kinds = [
        torch.zeros(0),
        torch.tensor(1.0),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, 3).T,
        torch.tensor([math.nan]),
    ]
    assert len({of_tensors([one]) for one in kinds}) == len(kinds)
    assert of_tensors(kinds) == of_tensors([one.clone() for one in kinds])
