"""Measures of a loss whose weights are divided among processes: the numbers of one process.

One process has most of the rows, the second one row and the biases, the third nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import msam_analysis as ma
from msam_analysis.measures.geometry import Ball
from msam_analysis.objective.direction import Direction
from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.space import DividedSpace, Space
from msam_analysis.objective.vectors import Layout
from tests.programs import together

from .cases import normal
from .oracles import symmetric

SIZE = 40
# A weight of ten filters of three entries, and ten biases.
PIECES = [[slice(3, 30)], [slice(0, 3), slice(30, 40)], []]
SHAPES = [((9, 3), (0,)), ((1, 3), (10,)), ((0, 3), (0,))]
SPECTRUM = np.concatenate([[9.0, 7.0, 5.0], np.linspace(1, -0.5, 35), [-1.0, -2.0]])


class Curved(SymmetricOperator):
    """The Hessian of :class:`Divided` at a point."""

    def __init__(self, loss: Divided, w: Tensor) -> None:
        super().__init__(loss.space, dtype=w.dtype, device=w.device)
        self.loss, self.w = loss, w

    def _apply(self, vector: Tensor) -> Tensor:
        return self.loss.times(vector) + 0.3 * self.w.square() * vector


class Divided:
    """``½ wᵀHw + gᵀw + Σ w⁴/40``, of which a process has some entries of all vectors: what measures ask a loss for."""

    dtype, precision, device = torch.float64, torch.float64, torch.device("cpu")
    samples, seed, batchnorm, size = 3, 0, "eval", SIZE
    evaluation = SimpleNamespace(findings=SimpleNamespace(examination=None))  # not examined

    def __init__(self, space: Space, shapes: tuple[tuple[int, ...], ...], shift: float = 0.0) -> None:
        self.space = space
        self.layout = Layout(("weight", "bias"), tuple(torch.Size(shape) for shape in shapes))
        matrix = symmetric(SPECTRUM, seed=1)
        self.columns = space.part(matrix.T)
        self.linear = space.part(0.3 * normal(SIZE, seed=2) + shift)
        self.at = space.part(0.5 * normal(SIZE, seed=3))
        self.settings = {"batchnorm": "no BatchNorm"}

    def times(self, vector: Tensor) -> Tensor:
        return self.space.part(self.space.sum(self.columns.T @ vector))

    def point(self) -> Tensor:
        return self.at.clone()

    def loss(self, w: Tensor) -> Tensor:
        own = (w * self.times(w) / 2 + self.linear * w + w**4 / 40).sum()
        return self.space.sum(own)

    def gradient(self, w: Tensor | None = None) -> Tensor:
        w = self.at if w is None else w
        return self.times(w) + self.linear + w**3 / 10

    def loss_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(w), self.gradient(w)

    def hessian(self, w: Tensor | None = None) -> Curved:
        return Curved(self, self.at if w is None else w)

    def with_samples(self, indices: Tensor, *, batch_size: int) -> Divided:
        """A sample has another slope."""
        shapes: Any = self.layout.shapes
        return Divided(self.space, shapes, shift=0.1 * float(indices[0]))


def direction(o: Any) -> Direction:
    return Direction(o.space.part(normal(SIZE, seed=4)), "drawn")


def ball(**options: Any) -> Callable[[Any], Any]:
    starts = ("gradient", "krylov", "eigenvector", "random")
    return lambda o: ma.ball_sharpness(o, **{"rho": 0.5, "starts": starts, **options})


def certified(**options: Any) -> Callable[[Any], Any]:
    return lambda o: ma.certify(ball(**options)(o), o)


def rescaled(kind: Any) -> Callable[[Any], Any]:
    return lambda o: direction(o).normalized(o, kind, one_d=True)


BALLS: dict[str, dict[str, Any]] = {
    "l2": {},
    "l2, wide": {"rho": 3.0},
    "linf": {"norm": "linf", "rho": 0.1},
    "adaptive": {"adaptive": True, "rho": 1.0},
    "filter": {"adaptive": "filter", "rho": 1.0},
    "linf, adaptive": {"norm": "linf", "adaptive": True, "rho": 0.3},
}
MEASURES: dict[str, Callable[[Any], Any]] = {
    **{f"ball, {name}": ball(**options) for name, options in BALLS.items()},
    **{f"certificate, {name}": certified(**options) for name, options in BALLS.items()},
    "a given start": lambda o: ma.ball_sharpness(o, 0.5, starts=[direction(o).vector]),
    "one step": lambda o: ma.one_step_sharpness(o, 0.5),
    "one step, linf": lambda o: ma.one_step_sharpness(o, 0.1, norm="linf", adaptive="filter"),
    "along": lambda o: ma.directional_sharpness(o, direction(o), 0.5, points=5),
    "average": lambda o: ma.average_sharpness(o, 0.1, draws=4, adaptive="filter"),
    "curvature": lambda o: ma.curvature_along(o.hessian(), [direction(o), Direction(o.at, "w")]),
    "angle": lambda o: ma.sam_msam_angle(o, direction(o).vector, [0.5, 2.0], rho_sam=0.1),
    "angle without momentum": lambda o: ma.sam_msam_angle(o, 0 * o.at, [0.5], rho_sam=0.1),
    "Fisher-Rao": ma.fisher_rao_norm,
    "multiplier": lambda o: float(Ball.around(o, 0.5, "l2", adaptive=False).multiplier(o.at, o.at)),
    **{f"direction, {kind}": rescaled(kind) for kind in ("filter", "layer", "weight", "l2")},
}


ROUGH = ("curvature", "curvature_residual", "hvps", "gain")
"""A certificate's search has a tolerance of 5 %, and another start where the entries have another order."""
RESIDUALS = ("residual", "relative_residual", "stationarity")
"""They are small because a search went on to the end."""


def numbers(result: Any, space: Space) -> dict[str, Any]:
    """The fields of a result; of a vector whose entries are divided, products with three others."""
    if isinstance(result, float):
        return {"value": result}
    found: dict[str, Any] = {}
    for name, value in vars(result).items():
        if isinstance(value, Tensor) and value.shape == (space.here,) and name in ("displacement", "vector"):
            found[name] = space.product(space.part(normal(SIZE, 3, seed=9)).T, value).tolist()
        elif isinstance(value, Tensor):
            found[name] = value.tolist()
        elif isinstance(value, dict):
            found |= {f"{name} {key}": each for key, each in value.items() if isinstance(each, float)}
        elif isinstance(value, bool | int | float | str):
            found[name] = value
    return found


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=len(PIECES))
    mine = Divided(DividedSpace(SIZE, PIECES[rank], most=27), SHAPES[rank])
    whole = Divided(Space(SIZE), ((10, 3), (10,)))
    for name, measure in MEASURES.items():
        found, expected = (numbers(measure(o), o.space) for o in (mine, whole))
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            if isinstance(value, str):
                assert found[key] == value, (name, key)
            elif key not in ROUGH or not name.startswith("certificate"):
                small = 1e-7 if key in RESIDUALS else 1e-9
                np.testing.assert_allclose(found[key], value, rtol=1e-6, atol=small, err_msg=f"{name}: {key}")
            elif key == "curvature":
                np.testing.assert_allclose(found[key], value, rtol=0.05, err_msg=name)
    dist.destroy_process_group()


def test_measures_of_divided_vectors() -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(work, folder, count=len(PIECES))


def optimizer_of(tensors: list[Tensor], slopes: list[list[Tensor]]) -> torch.optim.Optimizer:
    """An optimizer that has taken a step, with new gradients."""
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for number, gradients in enumerate(slopes):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if number == 0:
            optimizer.step()
    return optimizer


def with_sharded_parameters(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    shapes, count = ((3, 2), (1,), (40000,)), 3
    whole = [[normal(*shape, seed=10 * k + n) for n, shape in enumerate(shapes)] for k in range(count)]
    # The last is in both processes.
    places: list[Any] = [[Shard(0)], [Shard(0)], [Replicate()]]
    parts: list[list[Any]] = [
        [distribute_tensor(tensor, mesh, place) for tensor, place in zip(row, places, strict=True)] for row in whole
    ]
    mine, alone = (optimizer_of(row[0], row[1:]) for row in (parts, whole))
    found, expected = (float(ma.momentum_gradient_cosine(one)) for one in (mine, alone))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    found_norms, norms = (ma.probes.Norms(of=("momentum",))(one, 1) for one in (mine, alone))
    np.testing.assert_allclose(list(found_norms.values()), list(norms.values()), rtol=1e-12)
    dist.destroy_process_group()


def test_inner_products_of_an_optimizers_sharded_parameters() -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(with_sharded_parameters, folder)


def test_the_loss_of_the_whole_vector_is_the_objective_of_a_model() -> None:
    """The stand-in asks for what an objective has: sizes and products agree with automatic differentiation."""
    whole = Divided(Space(SIZE), ((10, 3), (10,)))
    w = whole.at.clone().requires_grad_()
    matrix = symmetric(SPECTRUM, seed=1)
    value = w @ matrix @ w / 2 + whole.linear @ w + (w**4).sum() / 40
    (slope,) = torch.autograd.grad(value, w)
    torch.testing.assert_close(whole.gradient(), slope)
    torch.testing.assert_close(whole.loss(whole.at), value.detach())
    exact: Any = torch.autograd.functional.hessian(
        lambda w: w @ matrix @ w / 2 + whole.linear @ w + (w**4).sum() / 40, whole.at
    )
    torch.testing.assert_close(whole.hessian() @ torch.eye(SIZE).double(), exact)
