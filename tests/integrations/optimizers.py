"""The classes that torch's tests are run against, torch's own inputs for them, and parameters of every kind.

The inputs are those of ``torch.testing._internal.common_optimizers``, which needs the package expecttest. They are read
only where the tests are asked for: the import of torch's test suite freezes flags of torch.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam

ASKED = "MSAM_INTEGRATIONS" in os.environ
opt_in = pytest.mark.skipif(not ASKED, reason="opt-in: set MSAM_INTEGRATIONS=1 to run torch's tests of optimizers")

RHO = 0.1


@dataclass(frozen=True)
class Ours:
    """A class of ours, with what makes it perturb, and the twin of torch that it is without that."""

    name: str
    cls: type[Any]
    base: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)
    two: bool = False  # whether a step needs two gradients
    lacks: tuple[str, ...] = ("nesterov",)  # options of torch that it refuses

    def make(self, params: Any, **more: Any) -> Any:
        """An optimizer that perturbs."""
        return self.cls(params, **{**self.options, **more})

    @property
    def torch(self) -> type[Any]:
        """What it is at ρ = 0."""
        return torch.optim.SGD if self.base == "sgd" else torch.optim.AdamW

    @property
    def keeps_momentum(self) -> bool:
        """Whether it wants μ > 0."""
        return self.base == "sgd" and self.name not in ("PerturbedSGD", "last gradient", "random")


def along(**switches: Any) -> dict[str, Any]:
    """The option of the general classes."""
    return {"perturbation": msam.Perturbation(**{"rho": RHO, **switches})}


MU = {"momentum": 0.9}
CLASSES = [
    Ours("PerturbedSGD", msam.PerturbedSGD),
    Ours("PerturbedAdamW", msam.PerturbedAdamW, "adamw"),
    Ours("MSAM", msam.MSAM, options=dict(rho=RHO)),
    Ours("SAM", msam.SAM, options=dict(rho=RHO), two=True),
    Ours("ASAM", msam.SAM, options=dict(rho=RHO, adaptive=True), two=True),
    Ours("NAG", msam.NAG),
    Ours("AdamWMSAM", msam.AdamWMSAM, "adamw", dict(rho=RHO)),
    Ours("AdamWSAM", msam.AdamWSAM, "adamw", dict(rho=RHO), two=True),
    Ours("last gradient", msam.PerturbedSGD, options=along(direction="last_gradient")),
    Ours("random", msam.PerturbedSGD, options=along(direction="random", seed=2)),
    Ours("adaptive", msam.PerturbedSGD, options=MU | along(direction="momentum", scale="adaptive")),
    Ours("relative", msam.PerturbedAdamW, "adamw", along(direction="momentum", scale="relative")),
    Ours("copies", msam.MSAM, options=dict(rho=RHO, restore="copy")),
]
each_class = pytest.mark.parametrize("ours", CLASSES, ids=lambda ours: ours.name)
IMPLEMENTATIONS: list[dict[str, Any]] = [dict(foreach=False, fused=False), dict(foreach=True), dict(fused=True)]
each_implementation = pytest.mark.parametrize("how", IMPLEMENTATIONS, ids=["loop", "foreach", "fused"])


def infos() -> dict[str, Any]:
    """What torch says of its optimizers, by base; nothing where nobody asked."""
    if not ASKED:
        return {}
    from torch.testing._internal.common_optimizers import optim_db

    return {info.name.lower(): info for info in optim_db if info.name in ("SGD", "AdamW")}


INFOS = infos()


def inputs() -> list[Any]:
    """Every class with every input that torch has for its base, but for options that are not ours and momentum of 0."""
    return [
        pytest.param(ours, given.kwargs, id=f"{ours.name}-{given.desc}")
        for ours in CLASSES
        if ours.base in INFOS
        for given in INFOS[ours.base].optim_inputs_func(device="cpu")
        if not set(ours.lacks) & set(given.kwargs)
    ]


def refused() -> list[Any]:
    """Every class with torch's inputs that it does not take."""
    return [
        pytest.param(ours, given.kwargs, id=f"{ours.name}-{given.desc}")
        for ours in CLASSES
        if ours.base in INFOS
        for given in INFOS[ours.base].optim_inputs_func(device="cpu")
        if set(ours.lacks) & set(given.kwargs)
    ]


def errors() -> list[Any]:
    """Every class with every input that must fail."""
    return [
        pytest.param(ours, error, id=f"{ours.name}-{error.optimizer_error_input.desc}")
        for ours in CLASSES
        if ours.base in INFOS
        for error in INFOS[ours.base].optim_error_inputs_func("cpu", torch.float32)
    ]


each_input = pytest.mark.parametrize(("ours", "given"), inputs())
each_refused = pytest.mark.parametrize(("ours", "given"), refused())
each_error = pytest.mark.parametrize(("ours", "error"), errors())


# ---------------------------------------------------------------------------------------------------------- parameters


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ordinary(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(noise(shape, i).to(dtype)) for i, shape in enumerate([(4, 3), (3,)])]


def every_kind(dtype: torch.dtype = torch.float32, fused: bool = False) -> list[nn.Parameter]:
    """Parameters of shapes and layouts that nobody thinks of.

    torch's fused kernels take a parameter with gaps in memory for one without: there it has none.
    """
    return [
        nn.Parameter(noise((4, 3), 0).to(dtype)),
        nn.Parameter(noise((), 1).to(dtype)),  # one number
        nn.Parameter(torch.zeros(0, dtype=dtype)),  # none
        nn.Parameter(torch.zeros((0, 3), dtype=dtype)),
        nn.Parameter(noise((3, 4), 2).to(dtype).T),  # not contiguous
        nn.Parameter(noise((2, 3, 4, 4), 3).to(dtype).contiguous(memory_format=torch.channels_last)),
        nn.Parameter(noise((8,), 4).to(dtype)[:4] if fused else noise((8,), 4).to(dtype)[::2]),  # with gaps
        nn.Parameter(noise((1, 1), 5).to(dtype)),
    ]


def mixed() -> list[nn.Parameter]:
    """Four precisions in one group."""
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float32]
    return [nn.Parameter(noise((3, 2), i).to(dtype)) for i, dtype in enumerate(kinds)]


def give(params: Any, seed: int, factor: float = 1.0) -> None:
    """Set gradients that depend on the seed and the place alone."""
    for i, p in enumerate(params):
        gradient = factor * noise(tuple(p.shape), 1000 * seed + i).to(p.dtype)
        p.grad = torch.empty_like(p).copy_(gradient)


def closure_of(params: Any, seed: int, factor: float = 1.0) -> Callable[[], Tensor]:
    """A closure that sets gradients, others at its second call, and returns what stands for a loss."""
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        give(params, seed + 500 * (len(calls) - 1), factor)
        return torch.tensor(float(seed + len(calls)))

    return closure


def step(ours: Ours, opt: Any, params: Any, seed: int, factor: float = 1.0) -> None:
    """One step along gradients fixed in advance."""
    if ours.two:
        opt.step(closure_of(params, seed, factor))
    else:
        give(params, seed, factor)
        opt.step()


def plain_step(ours: Ours, opt: Any, params: Any, seed: int, factor: float = 1.0) -> None:
    """The same for torch's own optimizer: with the gradient that ends the step."""
    give(params, seed + (500 if ours.two else 0), factor)
    opt.step()


def options_of(ours: Ours, given: dict[str, Any]) -> dict[str, Any]:
    """A copy of torch's input, with the momentum that the class wants."""
    return {**(MU if ours.keeps_momentum else {}), **copy.deepcopy(given)}


def at_rest(ours: Ours) -> Ours:
    """The same class at ρ = 0, which is torch's own optimizer."""
    if ours.name == "NAG":  # which has no ρ but its momentum
        return Ours("NAG", msam.PerturbedSGD, options=along(direction="momentum", normalize="lr", rho=0.0))
    options = dict(ours.options)
    if "rho" in options:
        options["rho"] = 0.0
    if "perturbation" in options:
        old = options["perturbation"]
        switches = {name: getattr(old, name) for name in ("direction", "normalize", "scale", "sign", "subset")}
        options["perturbation"] = msam.Perturbation(**switches, rho=0.0)
    return Ours(ours.name, ours.cls, ours.base, options, ours.two, ours.lacks)


def values(params: Any) -> list[Tensor]:
    """Copies."""
    return [p.detach().clone() for p in params]


def same(a: Any, b: Any) -> bool:
    """Equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def furthest(a: Any, b: Any) -> float:
    """Largest difference relative to numbers of size 1; empty tensors are equal."""
    gaps = [
        float(((x.detach().double() - y.detach().double()).abs() / (1 + y.detach().double().abs())).max())
        for x, y in zip(a, b, strict=True)
        if x.numel()
    ]
    return max((float("inf") if math.isnan(gap) else gap for gap in gaps), default=0.0)


def true_weights(opt: Any) -> list[Tensor]:
    """The weights without perturbation."""
    with opt.unperturbed():
        return values(p for group in opt.param_groups for p in group["params"])
