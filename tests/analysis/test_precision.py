"""Half precision, autocast and mixed precision: what is evaluated in which data type, and what is returned."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import CASES, CONVNET, MLP, TAGGER, TRANSFORMER, Case, concatenate, normal
from .oracles import derivatives, flatten, reference_loss

HALF = [torch.bfloat16, torch.float16]
halves = pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# Relative errors of derivatives whose every operation rounds to so many digits.
COARSE = {torch.bfloat16: 0.1, torch.float16: 0.02}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def halved(case: Case, own: torch.dtype, **options: Any) -> tuple[ma.Objective, Any, list[Any]]:
    model, data = case.model(own), case.data(own)
    return ma.Objective(model, case.loss_fn, data, **options), model, data


@halves
@each_case
def test_half_precision_weights_have_float32_vectors(case: Case, dtype: torch.dtype) -> None:
    objective, model, data = halved(case, dtype)
    assert objective.dtype == torch.float32
    reference, point = reference_loss(case, model, data), flatten(model)
    v = normal(objective.size, seed=40)
    gradient, hvp = derivatives(reference, point, v)
    returned = [objective.gradient(), objective.hvp(v), objective.hessian() @ v, objective.gauss_newton() @ v]
    assert {tensor.dtype for tensor in [*returned, objective.point()]} == {torch.float32}
    assert float(objective.loss()) == pytest.approx(float(reference(point)), rel=COARSE[dtype])
    assert relative(returned[0], gradient) < COARSE[dtype]
    assert relative(returned[1], hvp) < 2 * COARSE[dtype]
    assert torch.equal(returned[1], returned[2])


@halves
def test_settings_say_what_weights_are_evaluated_in(dtype: torch.dtype) -> None:
    objective, _, _ = halved(MLP, dtype)
    name = str(dtype).removeprefix("torch.")
    assert (objective.settings["dtype"], objective.settings["weights"]) == ("float32", name)
    assert ma.top_eigenvalues(objective, k=1, tolerance=0.1).settings["weights"] == name
    for plain in (ma.Objective(MLP.model(torch.float32), F.cross_entropy, MLP.data(torch.float32)), in_float32(dtype)):
        assert plain.settings["dtype"] == "float32"
        assert "weights" not in plain.settings


def in_float32(dtype: torch.dtype) -> ma.Objective:
    return halved(MLP, dtype, dtype=torch.float32)[0]


def test_settings_of_mixed_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3).double())
    objective = ma.Objective(model, lambda m, b: m[2](m[1](m[0](b["x"])).double()).mean(), {"x": torch.ones(2, 4)})
    assert objective.settings["dtype"] == "float64"
    assert objective.settings["weights"] == "float32, float64"
    assert objective.precision == torch.float32
    assert objective.with_parameters("2.*").settings["dtype"] == "float64"
    part = objective.with_parameters("0.*")
    assert part.settings["dtype"] == "float32"
    assert "weights" not in part.settings


@halves
def test_the_point_comes_back_exactly(dtype: torch.dtype) -> None:
    objective, model, _ = halved(MLP, dtype)
    point = objective.point()
    assert torch.equal(point.double(), flatten(model))
    for name, view in objective.layout.views(point).items():
        assert torch.equal(view.to(dtype), dict(model.named_parameters())[name])
    assert torch.equal(objective.loss(point), objective.loss())
    assert torch.equal(objective.gradient(point), objective.gradient())


def test_sums_over_batches_are_in_float32() -> None:
    """Three hundred batches of gradient 1: a running sum in bfloat16 would stop at 256."""
    dtype = torch.bfloat16
    model = nn.Linear(1, 1, bias=False).to(dtype)
    batch = (torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype))
    objective = ma.Objective(model, lambda output, target: output.mean() + output.square().mean() / 2, [batch] * 300)
    one = ma.Objective(model, lambda output, target: output.mean() + output.square().mean() / 2, batch)
    v = torch.ones(1)
    assert float(objective.gradient()) == pytest.approx(float(one.gradient()), rel=1e-6)
    assert float(objective.hvp(v)) == pytest.approx(1, rel=1e-6)
    assert float(objective.gauss_newton() @ v) == pytest.approx(1, rel=1e-6)


def test_float32_measures_a_half_precision_checkpoint() -> None:
    """The smooth function through the same weights, to float32's digits."""
    objective, model, data = halved(CONVNET, torch.bfloat16, dtype=torch.float32)
    reference, point = reference_loss(CONVNET, model, data), flatten(model)
    v = normal(objective.size, seed=41)
    w = point + 1e-4 * v
    gradient, hvp = derivatives(reference, w, v)
    assert relative(objective.gradient(w), gradient) < 2e-5
    assert relative(objective.hvp(v, w), hvp) < 1e-4
    # float32 can still tell the two points apart; bfloat16 cannot.
    assert float(objective.loss(w) - objective.loss()) == pytest.approx(
        float(reference(w) - reference(point)), rel=0.05
    )


# --- displacements that rounding takes away


@halves
def test_displacements_below_the_spacing_vanish_and_it_is_told(dtype: torch.dtype) -> None:
    objective, _, _ = halved(MLP, dtype)
    d = normal(objective.size, seed=42).float()
    near = objective.point() * (1 + torch.finfo(dtype).eps / 10)
    with pytest.warns(ma.ApproximationWarning, match=r"rounding moves the point by .*dtype=torch\.float32"):
        loss = objective.loss(near)
    assert torch.equal(loss, objective.loss()), "the same weights, once rounded"
    assert torch.equal(objective.loss(near), loss), "told once"
    far, _, _ = halved(MLP, dtype)
    far.loss(far.point() + d)
    with pytest.warns(ma.ApproximationWarning, match="rounding moves the point"):
        far.gradient(far.point() + 1e-3 * d)


def test_nothing_is_told_where_nothing_is_lost() -> None:
    """The weights themselves, and precisions with digits enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective, _, _ = halved(MLP, torch.bfloat16)
        objective.loss(objective.point())
        objective.hessian(objective.point())
        in_float32(torch.bfloat16).loss(objective.point() * 1.0001)


# --- autocast


@pytest.mark.parametrize("case", [MLP, CONVNET, TAGGER, TRANSFORMER], ids=lambda case: case.name)
@halves
def test_autocast_is_that_of_training(case: Case, dtype: torch.dtype) -> None:
    model, data = case.model(torch.float32), case.data(torch.float32)
    objective = ma.Objective(model, case.loss_fn, data, autocast=dtype)
    assert objective.settings["autocast"] == str(dtype).removeprefix("torch.")
    assert objective.precision == dtype
    total, count, gradient = 0.0, 0.0, torch.zeros(objective.size)
    model.eval()
    for batch in data:
        with torch.autocast("cpu", dtype=dtype):
            returned = (
                case.loss_fn(model, batch) if isinstance(batch, dict) else case.loss_fn(model(batch[0]), batch[1])
            )
        value, weight = returned if isinstance(returned, tuple) else (len(batch[1]) * returned, len(batch[1]))
        pieces = torch.autograd.grad(value, list(model.parameters()))
        gradient += torch.cat([piece.float().flatten() for piece in pieces])
        total, count = total + float(value.detach()), count + float(weight)
    assert float(objective.loss()) == pytest.approx(total / count, rel=1e-2)
    assert float(objective.loss()) != float(ma.Objective(model, case.loss_fn, data).loss())
    assert relative(objective.gradient(), gradient / count) < 1e-2
    v = normal(objective.size, seed=43)
    exact = ma.Objective(model, case.loss_fn, data, dtype=torch.float64)
    for product, expected in (
        (objective.hvp(v), exact.hvp(v)),
        (objective.hessian() @ v, exact.hvp(v)),
        (objective.gauss_newton() @ v, exact.gauss_newton() @ v),
    ):
        assert product.dtype == torch.float32
        assert 0 < relative(product, expected) < 2 * COARSE[dtype]


def test_autocast_does_not_tie_batches_to_each_other() -> None:
    """A product from kept graphs is one from graphs built anew, again and again."""
    model, data = MLP.model(torch.float32), MLP.data(torch.float32)
    kept, anew = (
        ma.Objective(model, F.cross_entropy, data, autocast=torch.bfloat16, graph_bytes=size).hessian()
        for size in (2**30, 0)
    )
    v = normal(kept.size, seed=44).float()
    products = [kept @ v, anew @ v, kept @ v, anew @ v]
    assert all(torch.equal(product, products[0]) for product in products)


def test_autocast_belongs_to_the_objective_not_to_the_caller() -> None:
    model, data = MLP.model(torch.float32), MLP.data(torch.float32)
    objective = ma.Objective(model, F.cross_entropy, data, autocast=torch.bfloat16)
    inside = objective.loss()
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(objective.loss(), inside)


@pytest.mark.parametrize("autocast", [torch.float32, torch.float64, torch.int8, "bfloat16"])
def test_autocast_to_another_type(autocast: Any) -> None:
    with pytest.raises(ValueError, match=r"autocast must be None, torch\.bfloat16 or torch\.float16, got"):
        ma.Objective(MLP.model(), F.cross_entropy, MLP.data(), autocast=autocast)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}], ids=["model", "dtype"])
def test_autocast_of_float64(options: Any) -> None:
    model = MLP.model(torch.float32 if options else torch.float64)
    with pytest.raises(ValueError, match="autocast leaves float64 alone: expected a float32 model"):
        ma.Objective(model, F.cross_entropy, concatenate(MLP.data()), autocast=torch.bfloat16, **options)
