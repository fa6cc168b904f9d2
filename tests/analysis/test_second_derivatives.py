"""Layers without a second derivative: differences of the gradient in its place, and they say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import msam_analysis as ma
from msam_analysis.objective.second_derivatives import difference_step

from . import cases
from .cases import CONVNET, MLP, TRANSFORMER, concatenate, normal
from .oracles import dense_hessian, flatten, reference_loss

Square = Callable[[Tensor], Tensor]
Maker = Callable[[str], nn.Module]

# Relative errors that the documentation states.
ACCURACY = {torch.float32: 1e-3, torch.float64: 1e-7}
dtypes = pytest.mark.parametrize("dtype", list(ACCURACY), ids=["float32", "float64"])
missing = pytest.mark.filterwarnings("ignore:second derivatives are central differences")


class Once(torch.autograd.Function):
    """A square whose derivative is marked as not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        square: Tensor = x.square()
        return square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = 2 * x * grad
        return gradient


class OnceLeaky(torch.autograd.Function):
    """A leaky ReLU whose derivative is marked as not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = torch.where(x > 0, torch.ones_like(x), 0.1)
        ctx.save_for_backward(slope)
        return x * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        gradient: Tensor = grad * slope
        return gradient


class TwiceLeaky(torch.autograd.Function):
    """The same with a derivative that can be differentiated: it is linear in what comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = torch.where(x > 0, torch.ones_like(x), 0.1)
        ctx.save_for_backward(slope)
        return x * slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        gradient: Tensor = grad * slope
        return gradient


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


class Network(nn.Module):
    """Two layers around a function, and a branch beside it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inside, self.head, self.beside = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(4, 3)
        self.function = function
        for index, parameter in enumerate(self.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=40 + index))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.function(self.inside(x))) + self.beside(x)
        return out


class Attention(cases.Transformer):
    """Insists on a kernel of its own choice."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self.kernel = kernel
        for index, parameter in enumerate(self.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=60 + index))

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(self.kernel):
            return super().forward(x)


class Pairs(nn.Module):
    """A network that ends in distances, of whose derivative torch has none."""

    def __init__(self, distance: Square) -> None:
        super().__init__()
        self.net, self.distance = Network(torch.tanh), distance

    def forward(self, x: Tensor) -> Tensor:
        return self.distance(self.net(x))


def pairwise(x: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    return (x[i] - x[j]).square().sum(1).sqrt()


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return output.square().mean()


# Each a layer without a second derivative, its twin that has one, and what they are measured on.
TWINS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Any, cases.Case]] = {
    "once differentiable": (lambda: Network(Once.apply), lambda: Network(torch.square), F.cross_entropy, MLP),
    "piecewise linear": (lambda: Network(OnceLeaky.apply), lambda: Network(leaky), F.cross_entropy, MLP),
    "attention kernel": (
        lambda: Attention(SDPBackend.FLASH_ATTENTION),
        lambda: Attention(SDPBackend.MATH),
        F.cross_entropy,
        TRANSFORMER,
    ),
    "function of torch": (lambda: Pairs(F.pdist), lambda: Pairs(pairwise), mean_square, MLP),
}
twins = pytest.mark.parametrize("name", TWINS)


def both(name: str, dtype: torch.dtype, **options: Any) -> tuple[ma.Objective, ma.Objective]:
    """The objective of the layer in a precision, and that of its twin in float64."""
    special, twin, loss_fn, case = TWINS[name]
    data = case.data(dtype)
    exact = ma.Objective(
        twin().to(dtype), loss_fn, data, dtype=torch.float64, second_derivatives="exact", examine=False
    )
    # The pairs of a batch are no mean over its samples.
    return ma.Objective(special().to(dtype), loss_fn, data, examine=name != "function of torch", **options), exact


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@twins
@dtypes
@pytest.mark.parametrize("kind", ["hvp", "hessian", "gauss_newton"])
def test_differences_are_the_second_derivative_of_the_twin(name: str, dtype: torch.dtype, kind: str) -> None:
    objective, exact = both(name, dtype)
    v = normal(objective.size, seed=30)

    def product(objective: ma.Objective) -> Tensor:
        u = v.to(objective.dtype)
        return objective.hvp(u) if kind == "hvp" else getattr(objective, kind)() @ u

    expected = product(exact)
    with pytest.warns(ma.ApproximationWarning, match=r"central differences .* two steps differ by \d\.\de-\d\d of"):
        got = product(objective)
    assert got.dtype == dtype
    assert relative(got, expected) < ACCURACY[dtype]
    assert objective.settings["second derivatives"] == "central differences"
    assert torch.equal(product(objective), got), "the same at every product, and no second warning"


@twins
def test_the_stated_error_is_of_the_order_of_the_error(name: str) -> None:
    objective, exact = both(name, torch.float32, second_derivatives="central")
    v = normal(objective.size, seed=31)
    actual = relative(objective.hvp(v.float()), exact.hvp(v))
    stated = objective.settings["error of differences"]
    assert isinstance(stated, float)
    assert actual / 10 < stated < 30 * actual


@missing
@dtypes
def test_operators_label_their_results(dtype: torch.dtype) -> None:
    """The settings of a product say what it is, of an operator made before the layer was found out, too."""
    objective, exact = both("once differentiable", dtype)
    operator = objective.hessian()
    assert "second derivatives" not in operator.settings
    pairs = ma.top_eigenvalues(operator, k=3, tolerance=1e-3)
    assert pairs.converged
    assert pairs.settings["second derivatives"] == "central differences"
    assert objective.settings == pairs.settings
    assert ma.top_eigenvalues(objective, k=3, tolerance=1e-3).settings == pairs.settings
    assert objective.with_parameters("head.*").settings["second derivatives"] == "central differences"
    expected = ma.top_eigenvalues(exact, k=3).values
    np.testing.assert_allclose(pairs.values.double(), expected.double(), rtol=2e-3)


@missing
@pytest.mark.parametrize("name", ["once differentiable", "attention kernel"], ids=["at the graph", "at the product"])
def test_graphs_of_no_use_are_not_kept(name: str) -> None:
    """Wherever it turns out that there is no second derivative."""
    operator = both(name, torch.float64)[0].hessian()
    operator @ torch.ones(operator.size)
    assert operator.kept == 0


@missing
def test_differences_are_nearly_symmetric() -> None:
    objective, _ = both("once differentiable", torch.float64)
    matrix = objective.hessian() @ torch.eye(objective.size, dtype=torch.float64)
    assert 0 < float((matrix - matrix.T).norm() / matrix.norm()) < 1e-7
    operator = objective.hessian()
    assert operator.products == 0
    operator @ torch.ones(objective.size, 3, dtype=torch.float64)
    assert operator.products == 3


@missing
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_step_is_scaled_to_vector_and_weights(length: float, size: float) -> None:
    """Of a function without a scale of its own, the error is the same for long and short vectors and weights."""
    x = normal(6, 3, seed=32)
    model = nn.Linear(3, 2, bias=False).double()
    model.weight.data.copy_(size * normal(2, 3, seed=33))

    def quartic(output: Tensor, target: Tensor) -> Tensor:
        return (output / size).square().square().mean()

    def loss(w: Tensor) -> Tensor:
        return ((x @ w.view(2, 3).T) / size).square().square().mean()

    objective = ma.Objective(model, quartic, (x, torch.zeros(6)), second_derivatives="central")
    v = length * normal(6, seed=34)
    expected = dense_hessian(loss, objective.point()) @ v
    # With weights far below 1 the step is as for weights of norm 1, and too long for such a function.
    assert relative(objective.hvp(v), expected) < (1e-7 if size >= 1 else 0.3)


def test_a_step_cancels_the_third_derivative() -> None:
    """Differences to both sides: for a cubic loss they are exact but for rounding, which one side would not be."""
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(2.0)
    data = (torch.ones(1, 1).double(), torch.zeros(1))
    objective = ma.Objective(model, lambda out, _: out.pow(3).mean(), data, second_derivatives="central")
    assert float(objective.hvp(torch.ones(1).double())) == pytest.approx(12, rel=1e-10)


def test_asked_for_they_are_taken_without_a_warning() -> None:
    model, data = CONVNET.model(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data, second_derivatives="central")
    v = normal(objective.size, seed=35)
    exact = dense_hessian(reference_loss(CONVNET, model, data), flatten(model)) @ v
    assert 0 < relative(objective.hvp(v), exact) < ACCURACY[torch.float64]
    assert objective.settings["second derivatives"] == "central differences"
    assert ma.curvature_along(objective, v) == pytest.approx(float(v @ exact / (v @ v)), rel=1e-6)


def test_exact_ones_are_the_default_and_not_labelled() -> None:
    model, data = MLP.model(), MLP.data()
    objective = ma.Objective(model, MLP.loss_fn, data)
    v = normal(objective.size, seed=36)
    exact = ma.Objective(model, MLP.loss_fn, data, second_derivatives="exact")
    assert torch.equal(objective.hvp(v), exact.hvp(v))
    assert "second derivatives" not in {**objective.settings, **objective.hessian().settings, **exact.settings}


def test_custom_functions_with_a_second_derivative_stay_exact() -> None:
    v = normal(58, seed=37)
    ours, twin = (ma.Objective(Network(f).double(), F.cross_entropy, MLP.data()) for f in (TwiceLeaky.apply, leaky))
    torch.testing.assert_close(ours.hvp(v), twin.hvp(v), rtol=1e-12, atol=1e-13)
    assert "second derivatives" not in ours.settings


@pytest.mark.parametrize("policy", ["eval", "batch", "recalibrate"])
def test_batchnorm_statistics_are_those_of_the_point(policy: Any) -> None:
    """Held constant where the exact derivative holds them constant."""
    model, data = CONVNET.model(), CONVNET.data()
    v = normal(ma.Objective(model, CONVNET.loss_fn, data).size, seed=38)
    exact, central = (
        ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy, second_derivatives=wish)
        for wish in ("exact", "central")
    )
    for w in (None, exact.point() + 0.1 * v):
        assert relative(central.hvp(v, w), exact.hvp(v, w)) < ACCURACY[torch.float64]
        assert relative(central.gauss_newton(w) @ v, exact.gauss_newton(w) @ v) < ACCURACY[torch.float64]


def test_random_layers_draw_the_same_on_both_sides() -> None:
    model = MLP.model()
    exact, central = (
        ma.Objective(model, MLP.loss_fn, MLP.data(), dropout=True, second_derivatives=wish)
        for wish in ("exact", "central")
    )
    v = normal(exact.size, seed=39)
    assert relative(central.hvp(v), exact.hvp(v)) < ACCURACY[torch.float64]
    assert relative(central.gauss_newton() @ v, exact.gauss_newton() @ v) < ACCURACY[torch.float64]


def test_no_direction_has_no_curvature() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), second_derivatives="central")
    assert not objective.hvp(torch.zeros(objective.size)).any()


def test_nan_stays() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), second_derivatives="central")
    assert objective.hvp(torch.full((objective.size,), float("nan"))).isnan().all()


# --- errors


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("once differentiable", "Once is marked once_differentiable"),
        ("attention kernel", "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
        ("function of torch", "derivative for '_pdist_backward' is not implemented"),
    ],
)
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_exact_ones_asked_for_and_missing(name: str, reason: str, kind: str) -> None:
    objective, _ = both(name, torch.float64, second_derivatives="exact")
    operator = getattr(objective, kind)()
    with pytest.raises(ValueError, match=rf"cannot be differentiated twice \(.*{reason}.*second_derivatives='auto'"):
        operator @ torch.ones(objective.size)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, {}), (torch.float16, {}), (torch.float32, {"autocast": torch.bfloat16})],
    ids=["bfloat16", "float16", "autocast"],
)
def test_half_precision_has_no_digits_for_differences(dtype: torch.dtype, options: dict[str, Any]) -> None:
    objective = ma.Objective(MLP.model(dtype), MLP.loss_fn, MLP.data(dtype), second_derivatives="central", **options)
    with pytest.raises(ValueError, match=r"central differences .* rounding error.*dtype=torch.float32 and without"):
        objective.hvp(torch.ones(objective.size))


def test_steps() -> None:
    assert difference_step(torch.float64) == pytest.approx(0.03 * 2 ** (-52 / 3))
    assert difference_step(torch.float32) == pytest.approx(0.03 * 2 ** (-23 / 3))


def test_unknown_wish() -> None:
    wish: Any = "forward"
    with pytest.raises(ValueError, match=r"second_derivatives must be one of \('auto', 'exact', 'central'\), got 'for"):
        ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), second_derivatives=wish)


@missing
def test_a_loss_without_a_second_derivative_has_no_gauss_newton_matrix() -> None:
    """Of the output's Hessian there is no difference of gradients; the whole Hessian has one."""
    x, y = concatenate(MLP.data())

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.multi_margin_loss(output, target, p=2)

    objective = ma.Objective(MLP.model(), loss_fn, (x, y))
    assert objective.hvp(torch.ones(objective.size)).isfinite().all()
    with pytest.raises(ValueError, match="the loss has no second derivative in the model's output"):
        objective.gauss_newton() @ torch.ones(objective.size)


def test_other_errors_of_a_model_are_not_taken_for_missing_derivatives() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = MLP.model(), 0

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("the sensor is not connected")

    objective = ma.Objective(Failing(), F.cross_entropy, MLP.data())
    with pytest.raises(RuntimeError, match="the sensor is not connected"):
        objective.hvp(torch.ones(objective.size))
    assert "second derivatives" not in objective.settings
