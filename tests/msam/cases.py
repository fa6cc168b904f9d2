"""The optimizers under test as data: how each is made, and the arguments of its twin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import msam

LR, MU, WD, RHO = 0.05, 0.9, 5e-3, 0.3
ADAM_LR = 0.01
SGD: dict[str, Any] = dict(lr=LR, momentum=MU, weight_decay=WD)
ADAMW: dict[str, Any] = dict(lr=ADAM_LR, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    """An optimizer and its twin."""

    name: str
    make: Callable[..., Any]  # make(params, **more) -> optimizer
    twin: dict[str, Any]

    @property
    def closure(self) -> bool:
        """Whether a step needs two gradients."""
        return bool(self.twin["direction"] == "gradient")

    @property
    def between(self) -> bool:
        """Whether the weights stay perturbed between steps, along what the previous step left."""
        return self.twin["direction"] in ("momentum", "last_gradient")


def made(cls: str, **options: Any) -> Callable[..., Any]:
    """``make`` of a class of msam."""
    return lambda params, **more: getattr(msam, cls)(params, **{**options, **more})


def sgd_case(name: str, cls: str, options: dict[str, Any], **twin: Any) -> Case:
    return Case(name, made(cls, **SGD, **options), {**SGD, **twin})


def adamw_case(name: str, cls: str, options: dict[str, Any], **twin: Any) -> Case:
    return Case(name, made(cls, **ADAMW, **options), {"base": "adamw", **ADAMW, **twin})


NAG_TWIN: dict[str, Any] = dict(direction="momentum", normalize="lr", rho=MU)

NAMED = [
    sgd_case("MSAM", "MSAM", dict(rho=RHO), direction="momentum", rho=RHO),
    sgd_case("SAM", "SAM", dict(rho=RHO), direction="gradient", rho=RHO),
    sgd_case("ASAM", "SAM", dict(rho=RHO, adaptive=True), direction="gradient", rho=RHO, scale="adaptive"),
    sgd_case("NAG", "NAG", {}, weight_decay_at="perturbed", **NAG_TWIN),
    sgd_case("NAG-true-decay", "NAG", dict(weight_decay_at="true"), **NAG_TWIN),
    sgd_case(
        "MSAM-perturbed-decay",
        "MSAM",
        dict(rho=RHO, weight_decay_at="perturbed"),
        direction="momentum",
        rho=RHO,
        weight_decay_at="perturbed",
    ),
    adamw_case("AdamWMSAM", "AdamWMSAM", dict(rho=RHO), direction="momentum", rho=RHO),
    adamw_case("AdamWSAM", "AdamWSAM", dict(rho=RHO), direction="gradient", rho=RHO),
]
BY_NAME = {case.name: case for case in NAMED}


def general(base: str, perturbation: dict[str, Any], **options: Any) -> Case:
    """The general optimizer of a base with a perturbation given by its switches."""
    cls, defaults = ("PerturbedSGD", SGD) if base == "sgd" else ("PerturbedAdamW", ADAMW)
    every = {**defaults, **options}
    values = [base, *perturbation.values(), *options.values()]

    def make(params: Any, **more: Any) -> Any:
        return getattr(msam, cls)(params, **{**every, **more}, perturbation=msam.Perturbation(**perturbation))

    return Case("-".join(map(str, values)), make, {"base": base, **every, **perturbation})


# A strength that moves the small network visibly and leaves it stable, for each normalisation and base.
STRENGTH = {
    ("sgd", "l2"): 0.3,
    ("sgd", "none"): 0.1,
    ("sgd", "lr"): 0.9,
    ("adamw", "l2"): 0.3,
    ("adamw", "none"): 0.5,
    ("adamw", "lr"): 9.0,
}


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows in which every pair of values of two factors occurs: the next row always has most of the pairs left."""
    rows = list(itertools.product(*(range(len(values)) for values in factors)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    left: set[Any] = set().union(*pairs.values())
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(pairs[row] & left))
        left -= pairs[best]
        chosen.append(tuple(values[i] for values, i in zip(factors, best, strict=True)))
    return chosen


SWITCHES: tuple[Sequence[Any], ...] = (
    ("sgd", "adamw"),
    ("momentum", "gradient", "last_gradient"),
    ("l2", "none", "lr"),
    ("none", "adaptive", "relative"),
    (1, -1),
    ("true", "perturbed"),
)
# Three switches meet in the decay at perturbed weights: it goes into the copies, or into the weights themselves.
DECAY = [
    (base, direction, "l2", scale, 1, "perturbed")
    for base in ("sgd", "adamw")
    for direction, scale in (("momentum", "none"), ("momentum", "relative"), ("gradient", "none"))
]
PAIRS = [
    general(base, dict(direction=d, normalize=n, scale=s, sign=sign, rho=STRENGTH[base, n]), weight_decay_at=at)
    for base, d, n, s, sign, at in dict.fromkeys([*pairwise(*SWITCHES), *DECAY])
]


IMPLEMENTATIONS: list[dict[str, Any]] = [{}, dict(foreach=True), dict(foreach=False), dict(fused=True)]
each_implementation = pytest.mark.parametrize("how", IMPLEMENTATIONS, ids=str)


def torch_twin(base: str) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer of torch that a base is."""
    cls: Any = torch.optim.SGD if base == "sgd" else torch.optim.AdamW
    options = SGD if base == "sgd" else ADAMW
    return lambda params, **more: cls(params, **{**options, **more})
