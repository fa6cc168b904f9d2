"""Optimizers whose weights stand displaced, writers that know nothing of it, and what may come next.

The twin is torch's own optimizer in float64, whose weights are overwritten as well: gradients are fixed in advance, so
that no displacement reaches it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import msam

from .workloads import furthest, saved_state, snapshot, true_weights

LR, MU, WD = 0.05, 0.9, 0.01
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": dict(lr=LR, momentum=MU, weight_decay=WD),
    "adamw": dict(lr=LR, betas=(0.8, 0.95), eps=1e-3, weight_decay=WD),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.04}  # at weights of size 1
LENGTH = 3.0  # of ε, over 13 weights: each moves by about 0.8
STEPS = 3


class Weights(nn.Module):
    """Two tensors, the first of which every preset displaces."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        first, second = draws(0)
        self.first = nn.Parameter(first.to(dtype))
        self.second = nn.Parameter(second.to(dtype))


def draws(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 3), (4,))]


def give(parameters: Any, step: int, dtype: torch.dtype) -> None:
    """Set the gradients of a step as they are in a precision."""
    for p, g in zip(parameters, draws(10 + step), strict=True):
        p.grad = g.to(dtype).to(p.dtype)


def strength(preset: msam.Preset) -> float:
    """The ρ that displaces by about ``LENGTH``, whatever ε is multiplied with."""
    if preset.normalize == "l2":
        return LENGTH
    return LENGTH / 5 if preset.normalize == "none" else LENGTH / 5 / LR


class Trained:
    """A preset's optimizer and its twin, after some steps and with the weights displaced."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, restore: str = "auto", **how: Any) -> None:
        preset = msam.PRESETS[name]
        self.name, self.dtype, self.base = name, dtype, preset.optimizer
        self.two = preset.direction == "gradient"
        fits = preset.scale == "none" and preset.direction in ("momentum", "last_gradient")
        self.how = dict(how, restore=restore if fits or restore != "subtract" else "auto")
        self.model = Weights(dtype)
        self.opt = self.made(self.model)
        self.twin = [w.to(dtype).double().requires_grad_() for w in draws(0)]
        cls: Any = torch.optim.SGD if self.base == "sgd" else torch.optim.AdamW
        self.plain = cls(self.twin, **OPTIONS[self.base])
        for step in range(STEPS):
            self.step(step)
        if self.two:
            give(self.weights, STEPS, dtype)
            self.opt.first_step()

    def made(self, model: nn.Module) -> Any:
        """An optimizer of the preset for another model."""
        preset = msam.PRESETS[self.name]
        only: dict[str, Any] = dict(subset=lambda name, p: name == "first") if preset.normalization_only else {}
        cls: Any = msam.PerturbedSGD if self.base == "sgd" else msam.PerturbedAdamW
        perturbation = preset(rho=strength(preset), **only)
        return cls(model.named_parameters(), perturbation=perturbation, **OPTIONS[self.base], **self.how)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters."""
        return list(self.model.parameters())

    def step(self, step: int) -> None:
        """One step along fixed gradients, of the optimizer and of the twin."""
        if self.two and not self.opt.perturbed:
            give(self.weights, step, self.dtype)
            self.opt.first_step()
        self.last_pass(step)

    def last_pass(self, step: int) -> None:
        """The pass that ends a step."""
        give(self.weights, step, self.dtype)
        if self.two:
            self.opt.second_step()
        else:
            self.opt.step()
        give(self.twin, step, self.dtype)
        self.plain.step()

    def written(self, write: Callable[[nn.Module], None]) -> list[bool]:
        """Let somebody write; the twin follows where a tensor changed, and says where."""
        before = snapshot(self.weights)
        write(self.model)
        changed = [not torch.equal(p, b) for p, b in zip(self.weights, before, strict=True)]
        for w, p, wrote in zip(self.twin, self.weights, changed, strict=True):
            if wrote:
                w.data.copy_(p.detach())
        return changed

    def gap(self, opt: Any = None) -> float:
        """How far the true weights are from the twin's."""
        return furthest(true_weights(opt or self.opt), self.twin)

    @property
    def tolerance(self) -> float:
        """What the roundings of the precision add up to."""
        return TOLERANCE[self.dtype]


# ------------------------------------------------------------------------------------------------ what others write


@torch.no_grad()
def load_best(model: Any) -> None:
    """Early stopping: the best weights so far."""
    model.load_state_dict(dict(zip(("first", "second"), draws(50), strict=True)))


@torch.no_grad()
def clip(model: Any) -> None:
    """A constraint on the weights of one layer."""
    model.first.clamp_(-0.1, 0.1)


@torch.no_grad()
def mask(model: Any) -> None:
    """Pruning by a mask of zeros and ones."""
    model.first.mul_(torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=model.first.dtype))


def initialise(model: Any) -> None:
    """A layer made anew."""
    nn.init.constant_(model.second, 0.25)


def initialise_first(model: Any) -> None:
    nn.init.zeros_(model.first)


@torch.no_grad()
def average(model: Any) -> None:
    """The exponential average put in the weights' place."""
    torch._foreach_copy_(list(model.parameters()), [w.to(model.first.dtype) for w in draws(51)])


@torch.no_grad()
def one_element(model: Any) -> None:
    model.first[1, 1] = 5.0


def another_optimizer(model: Any) -> None:
    """A step of torch's own, of another loss."""
    model.first.grad = torch.ones_like(model.first)
    torch.optim.SGD([model.first], lr=0.5).step()


@torch.inference_mode()
def in_inference_mode(model: Any) -> None:
    model.first.add_(1.0)


WRITES: list[Callable[[Any], None]] = [
    load_best, clip, mask, initialise, initialise_first, average, one_element, another_optimizer, in_inference_mode,
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what comes next


def then_eval(run: Trained, changed: list[bool]) -> None:
    left = snapshot(run.weights)
    run.opt.eval()
    assert all(torch.equal(p, was) for p, was, wrote in zip(run.weights, left, changed, strict=True) if wrote)
    for _ in range(2):
        gap = furthest(run.weights, run.twin)
        assert gap < run.tolerance
        run.opt.train()
        run.opt.eval()


def then_unperturbed(run: Trained, changed: list[bool]) -> None:
    """In the context the true weights; outside ε is what separates the weights from them."""
    for _ in range(2):
        with run.opt.unperturbed():
            gap = furthest(run.weights, run.twin)
        assert gap < run.tolerance
    shift = run.opt.displacement()
    moved = [w + shift.get(p, torch.zeros_like(p)) for w, p in zip(true_weights(run.opt), run.weights, strict=True)]
    gap = furthest(run.weights, moved)
    assert gap < run.tolerance


def then_step(run: Trained, changed: list[bool]) -> None:
    """The gradient of the step is that of the weights as they are: the first pass of two has been."""
    run.last_pass(STEPS)
    gap = run.gap()
    assert gap < 2 * run.tolerance
    run.step(STEPS + 1)
    gap = run.gap()
    assert gap < 3 * run.tolerance


def then_save(run: Trained, changed: list[bool]) -> None:
    """The state saved after the write belongs to the weights saved after it."""
    weights, state = saved_state(run.model), saved_state(run.opt)
    run.model = Weights(run.dtype)
    run.opt = run.made(run.model)
    run.model.load_state_dict(weights)
    run.opt.load_state_dict(state)
    gap = run.gap()
    assert gap < run.tolerance
    then_step(run, changed)


def then_everything(run: Trained, changed: list[bool]) -> None:
    run.opt.state_dict()
    then_unperturbed(run, changed)
    then_step(run, changed)
    gap = run.gap()
    assert gap < 3 * run.tolerance
    run.opt.eval()
    gap = furthest(run.weights, run.twin)
    assert gap < 3 * run.tolerance


THEN: list[Callable[[Trained, list[bool]], None]] = [then_eval, then_unperturbed, then_step, then_save, then_everything]
