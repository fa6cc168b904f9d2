"""Operators: products of every form agree, however many vectors there are and whatever is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.objective import graphs
from msam_analysis.objective.operators import ScaledOperator

from .cases import CONVNET, MLP, WITH_POLICY, Case, normal
from .oracles import dense_hessian, dense_symmetric, flatten, reference_loss

policies = pytest.mark.parametrize(("case", "policy"), WITH_POLICY, ids=lambda value: getattr(value, "name", value))

DIAGONAL = torch.linspace(-1, 2, 59, dtype=torch.float64)
MATRICES: dict[str, Callable[[], tuple[ma.SymmetricOperator, Tensor]]] = {
    "explicit": lambda: (ma.MatrixOperator(dense_symmetric(59, 1)), dense_symmetric(59, 1)),
    "scaled": lambda: (
        ScaledOperator(ma.MatrixOperator(dense_symmetric(59, 2)), DIAGONAL),
        DIAGONAL[:, None] * dense_symmetric(59, 2) * DIAGONAL,
    ),
    "hessian": lambda: (mlp().hessian(), dense(mlp().hessian())),
    "gauss-newton": lambda: (mlp().gauss_newton(), dense(mlp().gauss_newton())),
}
each_operator = pytest.mark.parametrize("name", MATRICES)


def mlp(**options: Any) -> ma.Objective:
    return ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), **options)


def dense(operator: ma.SymmetricOperator) -> Tensor:
    """The matrix, one column after another."""
    identity = torch.eye(operator.size, dtype=operator.dtype)
    return torch.stack([operator.matvec(column) for column in identity], dim=1)


@each_operator
@given(columns=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_products_agree(name: str, columns: int, seed: int) -> None:
    operator, matrix = MATRICES[name]()
    block = normal(59, columns, seed=seed)
    before = operator.products
    product = operator.matmat(block)
    assert operator.products == before + columns
    assert product.shape == (59, columns)
    torch.testing.assert_close(product, matrix @ block, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(operator @ block, product, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(operator @ block[:, 0], matrix @ block[:, 0], rtol=1e-10, atol=1e-11)
    assert (operator @ block[:, 0]).shape == (59,)
    left, right = block[:, 0], normal(59, seed=seed + 100)
    assert float(left @ (operator @ right)) == pytest.approx(float(right @ (operator @ left)), rel=1e-9, abs=1e-10)


@each_operator
def test_scipy_sees_the_same_matrix(name: str) -> None:
    operator, matrix = MATRICES[name]()
    linear, expected = operator.to_scipy(), matrix.numpy()
    block = normal(59, 4, seed=3).numpy()
    before = operator.products
    for vector in (block[:, 0], block[:, :1], block.T[0].astype(np.float32)):
        np.testing.assert_allclose(linear @ vector, expected @ vector, rtol=1e-10, atol=1e-10)
        assert (linear @ vector).shape == vector.shape
    np.testing.assert_allclose(linear.matmat(block), expected @ block, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(linear.rmatmat(block), expected @ block, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(linear.rmatvec(block[:, 1]), expected @ block[:, 1], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose((linear.H @ block), expected @ block, rtol=1e-10, atol=1e-10)
    assert operator.products == before + 6 + 4 + 4 + 1 + 4
    top = scipy.sparse.linalg.eigsh(linear, k=1, which="LA", return_eigenvectors=False)
    assert top[0] == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-8)


def test_scipy_takes_columns_to_matmat(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block, not one vector after another."""
    operator, seen = mlp().hessian(), list[Tensor]()

    def apply(matrix: Tensor) -> Tensor:
        seen.append(matrix)
        return matrix

    monkeypatch.setattr(operator, "_apply_columns", apply)
    operator.to_scipy().matmat(np.ones((59, 5)))
    assert [matrix.shape for matrix in seen] == [(59, 5)]


@each_operator
def test_no_columns(name: str) -> None:
    operator, _ = MATRICES[name]()
    before = operator.products
    assert operator.matmat(torch.ones(59, 0)).shape == (59, 0)
    assert operator.products == before


@each_operator
def test_autocast_of_the_caller_has_no_effect(name: str) -> None:
    operator, _ = MATRICES[name]()
    single = ma.MatrixOperator(dense_symmetric(59, 1).float()) if name == "explicit" else operator
    block = normal(59, 5, seed=4).to(single.dtype)
    plain = single @ block
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(single @ block, plain)


def test_settings_of_a_scaled_operator_are_those_it_scales() -> None:
    operator = mlp().hessian()
    assert ScaledOperator(operator, DIAGONAL).settings == operator.settings


# --- several vectors along one graph


@policies
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("graph_bytes", [0, 2**30], ids=["rebuilt", "kept"])
def test_several_vectors_are_several_single_ones(
    case: Case, policy: Any, kind: str, graph_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = ma.Objective(case.model(), case.loss_fn, case.data(), batchnorm=policy, graph_bytes=graph_bytes)
    block = normal(objective.size, 6, seed=5)
    together = getattr(objective, kind)() @ block
    monkeypatch.setattr(graphs, "_SMALL_GRAPH", -1)
    apart = getattr(objective, kind)() @ block
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)


class Counting(torch.autograd.Function):
    """The identity, which counts its backward passes of the second order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: list[int]) -> Tensor:
        ctx.calls = calls
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.calls.append(grad.ndim)
        return Counting.apply(grad, ctx.calls), None  # type: ignore[no-untyped-call]


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = MLP.model(), list[int]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Counting.apply(self.net(x), self.calls)  # type: ignore[no-untyped-call]
        return out


def walks(columns: int, **limits: int) -> int:
    """How often vectors walk the kept graph of one batch."""
    model = Counted()
    x, y = MLP.data()[0]
    objective = ma.Objective(model, F.cross_entropy, (x, y))
    operator = objective.hessian()
    operator @ torch.ones(objective.size, dtype=torch.float64)
    calls: list[Any] = operator._loss.copy.model.calls  # type: ignore[assignment]  # of the private copy
    calls.clear()
    operator @ normal(objective.size, columns, seed=6)
    one = len(calls)
    calls.clear()
    operator @ torch.ones(objective.size, dtype=torch.float64)
    return one // len(calls)


@pytest.mark.parametrize(
    ("columns", "limits", "expected"),
    [
        (32, {}, 1),
        (4, {}, 1),
        (3, {}, 3),
        (32, {"_SMALL_GRAPH": 100}, 32),
        (32, {"_TOGETHER": 20_000}, 4),
        (6, {"_TOGETHER": 6_000}, 6),
    ],
    ids=["all", "four", "too few", "large graph", "in chunks", "chunks too small"],
)
def test_small_graphs_take_vectors_together(
    columns: int, limits: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(graphs, name, value)
    assert walks(columns) == expected


class OneVectorOnly(torch.autograd.Function):
    """A square whose derivative looks at a number, which only one vector has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        square: Tensor = x.square()
        return square

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad if float(grad.detach().sum()) < 1e300 else grad


class Squares(nn.Module):
    def __init__(self, square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.square = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), square
        for index, parameter in enumerate(self.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=70 + index))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.square(self.body(x)))
        return out


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_layers_that_take_one_vector_get_one(kind: str) -> None:
    def operator(square: Any) -> graphs.GraphOperator:
        built: graphs.GraphOperator = getattr(ma.Objective(Squares(square), F.cross_entropy, MLP.data()), kind)()
        return built

    special, plain = operator(OneVectorOnly.apply), operator(torch.square)
    block = normal(plain.size, 6, seed=7)
    for _ in range(2):
        torch.testing.assert_close(special @ block, plain @ block, rtol=1e-11, atol=1e-12)
    assert (special._together, plain._together) == (False, True)


class WithoutRule(torch.autograd.Function):
    """A square whose derivative takes an operation that torch has no rule for several vectors of, and loops over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        square: Tensor = x.square()
        return square

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = 2 * x * torch.renorm(grad, p=2, dim=0, maxnorm=1e9)
        return gradient


def test_operations_without_a_rule_for_several_vectors() -> None:
    operators = [
        ma.Objective(Squares(square), F.cross_entropy, MLP.data()).hessian()
        for square in (WithoutRule.apply, torch.square)
    ]
    special, plain = operators
    block = normal(plain.size, 6, seed=8)
    torch.testing.assert_close(special @ block, plain @ block, rtol=1e-11, atol=1e-12)
    assert special._together


def test_rebuilt_graphs_are_built_once_for_several_vectors() -> None:
    """What a product costs most is shared by the vectors of a block."""
    calls: list[int] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        calls.append(len(target))
        return F.cross_entropy(output, target)

    objective = ma.Objective(CONVNET.model(), loss_fn, CONVNET.data(), graph_bytes=0)
    objective.examine()
    calls.clear()
    operator = objective.hessian()
    operator @ normal(objective.size, 5, seed=9)
    assert calls == [8, 8, 3]
    operator @ normal(objective.size, seed=10)
    assert calls == 2 * [8, 8, 3]
    assert operator.products == 6


def test_matrix_is_the_one_of_the_loss() -> None:
    """Kept graphs, several vectors and a budget for some of the batches, all at once."""
    model = CONVNET.model()
    objective = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), graph_bytes=120_000)
    operator = objective.hessian()
    expected = dense_hessian(reference_loss(CONVNET, model, CONVNET.data()), flatten(model))
    identity = torch.eye(objective.size, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(operator @ identity, expected, rtol=1e-9, atol=1e-11)
    assert operator.kept == 1
