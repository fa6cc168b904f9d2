"""A small network with BatchNorm, its batches, and the same problem as the twins see it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

BATCHES = 5


def network(dtype: torch.dtype = torch.float64, seed: int = 0, norm: bool = True) -> nn.Sequential:
    """Two linear layers with BatchNorm between them, always the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(8), nn.Tanh()] if norm else [nn.Tanh()]
        return nn.Sequential(nn.Linear(6, 8, bias=False), *middle, nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Batch of a step; they come round again after ``BATCHES`` steps."""
    generator = torch.Generator().manual_seed(100 + step % BATCHES)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (12,), generator=generator)


def loss(model: nn.Module, step: int) -> Tensor:
    """Loss of the model on the batch of a step."""
    x, y = batch(step, next(model.parameters()).dtype)
    return cross_entropy(model(x), y)


class Twin:
    """The problem as a gradient function with weights and BatchNorm buffers of its own.

    Statistics are collected at the first call of a step, not at the second one (SAM's).
    """

    def __init__(self, model: nn.Module, edit: Callable[..., Any] | None = None, parts: int = 1) -> None:
        self.model = model
        self.names = [name for name, _ in model.named_parameters()]
        self.weights = [p.detach().clone() for p in model.parameters()]
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self.edit = edit  # edit(gradients, step, call): what clipping or a missing gradient do to them
        self.parts = parts  # mini-batches accumulated in a step
        self.step = -1
        self.call = 0

    @torch.enable_grad()
    def __call__(self, weights: Sequence[Tensor], step: int) -> list[Tensor | None]:
        self.call = self.call + 1 if step == self.step else 0
        self.step = step
        total: list[Tensor] = [torch.zeros_like(w) for w in weights]
        for part in range(self.parts):
            leaves = [w.detach().clone().requires_grad_() for w in weights]
            buffers = {name: b.clone() for name, b in self.buffers.items()}
            x, y = batch(step * self.parts + part, leaves[0].dtype)
            state = {**dict(zip(self.names, leaves, strict=True)), **buffers}
            value = cross_entropy(functional_call(self.model, state, (x,)), y) / self.parts
            total = [t + g for t, g in zip(total, torch.autograd.grad(value, leaves), strict=True)]
            if self.call == 0:
                self.buffers = buffers
        result: list[Tensor | None] = list(total)
        return self.edit(result, step, self.call) if self.edit else result


def backward(value: Tensor) -> Tensor:
    """Backward from a loss, which is returned."""
    torch.autograd.backward(value)
    return value


def closure_of(model: nn.Module, opt: torch.optim.Optimizer, step: int) -> Callable[[], Tensor]:
    """The ordinary closure: clear, evaluate, backward, return the loss."""

    def closure() -> Tensor:
        opt.zero_grad()
        return backward(loss(model, step))

    return closure


def missing(gradients: list[Any], step: int, call: int) -> list[Any]:
    """Tensor 1 has no gradient in every third step, the first one included: an ``edit`` of the twin."""
    return [None if i == 1 and step % 3 == 0 else g for i, g in enumerate(gradients)]


def hide(model: nn.Module, step: int) -> None:
    """What ``missing`` does, done to a model after backward."""
    if step % 3 == 0:
        list(model.parameters())[1].grad = None


def train(
    model: nn.Module,
    opt: Any,
    steps: Iterable[int],
    closure: bool = False,
    after_backward: Callable[[nn.Module, int], None] | None = None,
) -> list[list[Tensor]]:
    """Several steps, with closures or in the plain form; the stored weights after each."""
    stored = []
    for step in steps:
        evaluate = closure_of(model, opt, step)

        def evaluate_and_edit(step: int = step, evaluate: Callable[[], Tensor] = evaluate) -> Tensor:
            value = evaluate()
            if after_backward:
                after_backward(model, step)
            return value

        if closure:
            opt.step(evaluate_and_edit)
        else:
            evaluate_and_edit()
            opt.step()
        stored.append(snapshot(model.parameters()))
    return stored


def snapshot(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies."""
    return [t.detach().clone() for t in tensors]


def true_weights(opt: Any) -> list[Tensor]:
    """Copies of the weights without perturbation."""
    context: AbstractContextManager[Any] = opt.unperturbed()
    with context:
        return snapshot(p for group in opt.param_groups for p in group["params"])


def furthest(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Largest absolute difference; NaN counts as infinitely far."""
    gaps = [float((x.detach().double() - y.detach().double()).abs().max()) for x, y in zip(a, b, strict=True)]
    return max(float("inf") if math.isnan(g) else g for g in gaps)


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    """Equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_network(model: nn.Module, opt: Any, weights: Sequence[Tensor], twin: Twin, tol: float = 1e-10) -> None:
    """True weights and BatchNorm buffers are the twin's."""
    gaps = {
        "weights": furthest(true_weights(opt), weights),
        "buffers": furthest(model.buffers(), twin.buffers.values()),
    }
    assert max(gaps.values()) < tol, gaps


def saved_state(thing: Any) -> Any:
    """Its state through a file and back, with nothing but plain data in it."""
    file = io.BytesIO()
    torch.save(thing.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)
