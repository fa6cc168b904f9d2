"""Models that are hard to shard, their losses, and how an objective of a sharded one is compared with a whole one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import msam_analysis as ma

from .cases import normal

Found = dict[str, Any]
FOLDER: list[str] = []  # where this process may write


def whole(tensor: Any) -> Any:
    """A tensor that all processes have."""
    return getattr(tensor.detach(), "full_tensor", tensor.detach)().clone()


def shard(model: Any, **options: Any) -> Any:
    """Every child with parameters is a unit, and so is the model."""
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, **options)
    return fully_shard(model, **options)


def root(model: Any) -> Any:
    return fully_shard(model)


def kept_whole(model: Any) -> Any:
    return shard(model, reshard_after_forward=False)


def far(one: Any, other: Any) -> float:
    """Distance of two vectors or numbers, relative to the second; infinite for NaN."""
    gap = float((one - other).norm()) / max(float(other.norm()), 1e-30)
    return float("inf") if math.isnan(gap) else gap


def compare(sharded: ma.Objective, alone: ma.Objective, seed: int = 0) -> dict[str, float]:
    """How far an objective of a sharded model is from that of the whole one, in this process's part."""
    space = sharded.space
    part, like = space.part, alone.point()
    v, mine = (o.space.gaussian(1, seed=seed, like=like)[:, 0] for o in (alone, sharded))
    w = like + 0.05 * v
    second = sharded.with_weights(sharded.point() + 0.05 * mine)
    columns = torch.stack([v, w, v - w, v + w, w * w], dim=1)
    hessian, products = sharded.hessian(), alone.hessian()
    few = sharded.hessian()
    few._room = 0
    found = {
        "size": float(sharded.size != alone.size),
        "point": far(sharded.point(), part(alone.point())),
        "draw": far(mine, part(v)),
        "loss": far(sharded.loss(), alone.loss()),
        "loss at w": far(sharded.loss(part(w)), alone.loss(w)),
        "gradient": far(sharded.gradient(), part(alone.gradient())),
        "gradient at w": far(second.gradient(), part(alone.gradient(w))),
        "hvp": far(sharded.hvp(mine, part(w)), part(alone.hvp(v, w))),
        "together": far(hessian @ part(columns), part(products @ columns)),
        "again": far(hessian @ mine, part(products @ v)),
        "rebuilt": far(few @ mine, part(products @ v)),
        "kept": float(hessian.kept != -(-len(alone.batches) // dist.get_world_size())) + few.kept,
        "verdict": float(sharded.examine().verdict != alone.examine().verdict),
    }
    if not isinstance(alone.loss_fn, Penalty) and alone.loss_fn is not encoding:  # no functions of the output alone
        found["Gauss-Newton"] = far(sharded.gauss_newton() @ mine, part(alone.gauss_newton() @ v))
    return found


def pair(model: Callable[[], Any], divide: Callable[[Any], Any], loss: Any, data: Any, **more: Any) -> Any:
    """Objectives of a sharded model and of its whole twin; the sharded model, too."""
    alone, sharded = model(), divide(model())
    return ma.Objective(sharded, loss, data, ranks=True, **more), ma.Objective(alone, loss, data, **more), sharded


# ----------------------------------------------------------------------------------------------------------- cases here


class Block(nn.Module):
    """A layer that is run again in the backward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 7), nn.Linear(7, width)

    def inner(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return y


class Net(nn.Module):
    """Everything that FSDP makes difficult; options say what of it."""

    def __init__(self, *, blocks: bool = False, reach: bool = False, lstm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.block = Block(5) if blocks else nn.Tanh()
        self.lstm = nn.LSTM(5, 5, batch_first=True) if lstm else None
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.last = nn.Linear(5, 3)
        self.reach = reach

    def encode(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(torch.tanh(self.first(x)))
        return y if self.lstm is None else self.lstm(y[:, None])[0][:, 0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.encode(x))
        if self.reach:  # a parent that uses a child's weight
            y = y + (x @ self.first.weight.T @ self.last.weight.T).sin()
        return y * self.scale


def net(**options: bool) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net(**options).double()


def batches(dtype: torch.dtype = torch.float64) -> list[Any]:
    return [(normal(n, 6, seed=n).to(dtype), normal(n, 3, seed=n + 50).to(dtype)) for n in (8, 8, 5)]


def without_scale(model: Any) -> Any:
    """The scale is left whole, in all processes, as FSDP wants it of 0-dimensional parameters."""
    return shard(model, ignored_params={model.scale})


def kept_without_scale(model: Any) -> Any:
    return shard(model, ignored_params={model.scale}, reshard_after_forward=False)


def in_bfloat16(model: Any) -> Any:
    return shard(model, ignored_params={model.scale}, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def squares(output: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = (output - target).square().mean()
    return loss


class Penalty:
    """A loss that reads the weights of the model that it knows."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return squares(model(batch[0]), batch[1]) + 0.1 * sum(p.square().sum() for p in self.model.parameters())


def encoding(model: Any, batch: Any) -> Tensor:
    """A loss that calls another method than forward."""
    loss: Tensor = model.encode(batch["x"]).square().mean() + model(batch["x"]).sin().mean()
    return loss


class Once(torch.autograd.Function):
    """A sine without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        turned: Tensor = slope * ctx.saved_tensors[0].cos()
        return turned


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Once.apply(x)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return y
