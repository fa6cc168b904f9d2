"""Gradients far from one: the perturbation has the length that it has in float64, where no square leaves the range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam

from . import reference
from .cases import ADAMW, SGD, Case, adamw_case, each_implementation, general, sgd_case
from .workloads import furthest, true_weights

RHO = 0.5
SIZES = ((40, 20), (200,), ())  # of 1,001 squares of 1e18 the sum is beyond float32, and one of 1e-23 below it
SCALES = [1e-30, 1e-23, 1e-19, 1.0, 1e15, 1e18]
FAR = [scale for scale in SCALES if scale != 1.0]

CASES = [
    sgd_case("MSAM", "MSAM", dict(rho=RHO), direction="momentum", rho=RHO),
    sgd_case("SAM", "SAM", dict(rho=RHO), direction="gradient", rho=RHO),
    sgd_case("ASAM", "SAM", dict(rho=RHO, adaptive=True), direction="gradient", rho=RHO, scale="adaptive"),
    adamw_case("AdamWMSAM", "AdamWMSAM", dict(rho=RHO), direction="momentum", rho=RHO),
    adamw_case("AdamWSAM", "AdamWSAM", dict(rho=RHO), direction="gradient", rho=RHO),
    general("sgd", dict(direction="last_gradient", rho=RHO)),
    general("sgd", dict(direction="last_gradient", rho=RHO, sign=-1)),
    *(general("sgd", dict(direction="momentum", rho=RHO, scale=scale)) for scale in ("adaptive", "relative")),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_scale = pytest.mark.parametrize("scale", SCALES)


def draws(seed: int) -> list[Tensor]:
    """Noise of size 1 for every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES]


def displaced(case: Case, scale: float, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[Any, list[Tensor]]:
    """An optimizer whose weights stand displaced along noise of a scale, and ε by hand in float64.

    The learning rate and the decay are zero: the true weights stay, and the direction is the noise as it came.
    """
    gradients = [(scale * g).to(dtype) for g in draws(1)]
    weights = [nn.Parameter(w.to(dtype)) for w in draws(0)]
    held = [w.detach().double().clone() for w in weights]
    opt = case.make(weights, lr=0.0, weight_decay=0.0, **more)
    for p, g in zip(weights, gradients, strict=True):
        p.grad = g.clone()
    (opt.first_step if case.closure else opt.step)()
    exact = reference.displacement(
        [g.double() / scale for g in gradients],  # of every positive multiple the displacement is the same
        held,
        rho=RHO,
        sign=-case.twin.get("sign", 1) if case.twin["direction"] == "momentum" else case.twin.get("sign", 1),
        scale=case.twin.get("scale", "none"),
    )
    return opt, exact


def length(tensors: Any) -> float:
    """Norm over all tensors together."""
    return float(torch.cat([t.detach().double().flatten() for t in tensors]).norm())


def test_the_hand_computed_length_is_rho() -> None:
    for case in CASES:
        _, exact = displaced(case, 1.0)
        if case.twin.get("scale", "none") != "adaptive":  # whose T ε has that length
            assert length(exact) == pytest.approx(RHO, rel=1e-12)


@each_implementation
@each_scale
@each_case
def test_perturbation_of_any_gradient(case: Case, scale: float, how: dict[str, Any]) -> None:
    """A thousand roundings of float32 stay below 1e-5 of the length; ε is read and seen in the weights."""
    opt, exact = displaced(case, scale, **how)
    weights = [p for group in opt.param_groups for p in group["params"]]
    shift = opt.displacement()
    found = [shift.get(p, torch.zeros_like(p)) for p in weights]
    assert length(found) == pytest.approx(length(exact), rel=1e-5)
    assert length([f - e for f, e in zip(found, exact, strict=True)]) < 1e-5 * length(exact)
    stored = [p.detach().double() for p in weights]
    moved = [s - w.double() for s, w in zip(stored, true_weights(opt), strict=True)]
    assert length([m - e for m, e in zip(moved, exact, strict=True)]) < 1e-4 * length(exact)
    opt.eval()
    assert furthest(weights, draws(0)) < 1e-6


@each_scale
@each_case
def test_perturbation_of_any_gradient_in_bfloat16(case: Case, scale: float) -> None:
    """Its exponents are those of float32; a thousand roundings of weights of size 1 stay below 3 % of the length."""
    opt, exact = displaced(case, scale, torch.bfloat16)
    assert length(opt.displacement().values()) == pytest.approx(length(exact), rel=3e-2)


@pytest.mark.parametrize("scale", FAR)
@each_case
def test_float64_needs_no_care(case: Case, scale: float) -> None:
    """The same code in the precision in which nothing overflows: what the others are compared with is right."""
    opt, exact = displaced(case, scale, torch.float64)
    assert furthest([opt.displacement()[p] for p in opt.param_groups[0]["params"]], exact) < 1e-11


@pytest.mark.parametrize("name", ["SAM", "AdamWSAM"])
@pytest.mark.parametrize("scale", [2.0**-70, 2.0**63])
def test_scaled_loss_far_from_one(name: str, scale: float) -> None:
    """A normalised ε does not see the scale of a loss, however large: no gradient overflows here."""
    weights = [nn.Parameter(w.float()) for w in draws(0)]
    cls: Any = getattr(msam, name)
    opt = cls(weights, rho=RHO, **{**(SGD if name == "SAM" else ADAMW), "lr": 0.0})
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    total = torch.stack([(w * g.float()).sum() for w, g in zip(weights, draws(1), strict=True)]).sum()
    torch.autograd.backward(scaler.scale(total))
    opt.first_step()
    exact = reference.displacement(draws(1), draws(0), rho=RHO)
    assert length(opt.displacement().values()) == pytest.approx(RHO, rel=1e-5)
    assert furthest([opt.displacement()[w] for w in weights], exact) < 1e-6


@each_case
@pytest.mark.parametrize("scale", [1e-23, 1e18])
def test_tensors_of_very_different_sizes(case: Case, scale: float) -> None:
    """One tensor's gradient at 1, another's far away: the larger alone gives the length."""
    weights = [nn.Parameter(w.float()) for w in draws(0)[:2]]
    opt = case.make(weights, lr=0.0, weight_decay=0.0)
    for p, g, factor in zip(weights, draws(1)[:2], (1.0, scale), strict=True):
        p.grad = (factor * g).float()
    (opt.first_step if case.closure else opt.step)()
    large = weights[0] if scale < 1 else weights[1]
    exact = reference.displacement(
        [draws(1)[0 if scale < 1 else 1]], [large.detach().double()], rho=RHO, scale=case.twin.get("scale", "none")
    )
    if case.twin.get("scale", "none") == "none":
        assert length([opt.displacement()[large]]) == pytest.approx(length(exact), rel=1e-5)
    small = weights[1] if scale < 1 else weights[0]
    assert bool(torch.isfinite(opt.displacement()[small]).all())
    assert length([opt.displacement()[small]]) < 1e-12
