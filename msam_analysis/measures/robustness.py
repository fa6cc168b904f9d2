"""Accuracy on disturbed inputs: by noise, or by an attack on the network."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.batches import Batches
from msam_analysis.objective.private import unwrap
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.objective.vectors import gaussian
from msam_analysis.results import RobustAccuracy

Attack = Literal["noise", "fgsm", "pgd", "apgd"]


@numbers
def robust_accuracy(
    model: nn.Module,
    data: object,
    attack: Attack,
    sizes: Sequence[float],
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    bounds: tuple[float, float] | None = None,
    steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
) -> RobustAccuracy:
    r"""Return a classifier's accuracy on disturbed inputs, in evaluation mode.

    ========= ==========================================================================================
    attack    inputs
    ========= ==========================================================================================
    "noise"   :math:`x + \sigma \xi`, ξ standard normal, one draw
    "fgsm"    :math:`x + \epsilon\, \mathrm{sign} \nabla_x \ell(x)` (Goodfellow et al. 2015)
    "pgd"     ``steps`` such steps of ``step_size``, each followed by the projection on
              :math:`\|x' - x\|_\infty \le \epsilon`, from a uniform random start in it (Madry et al. 2018)
    "apgd"    ``steps`` steps in the same ball with momentum, from a random start; the step length is halved where
              there is no progress (Auto-PGD, Croce and Hein 2020), by the Adversarial Robustness Toolbox
    ========= ==========================================================================================

    The inputs are then cut to ``bounds``.

    Memory: a few copies of a batch and the graph of its loss; no vector of weights.

    Parameters
    ----------
    model
        Any classifier with outputs ``(N, C)`` or ``(N, C, ...)``; it is not modified.
    data
        Batches ``(input, label)`` of floating-point inputs; the same samples in the same order at every pass.
    attack
        Kind of disturbance, as above. An attack knows the network: its gradients are exact.
    sizes
        Sizes σ or ε of the disturbance, in the units of the inputs: for images in [0, 1] that were divided by a
        standard deviation s, the paper's ε = 1/255 is 1/255/s.
    loss_fn
        Loss that an attack raises, ``loss_fn(output, label)``. Default: cross-entropy, the only one for "apgd".
    bounds
        Smallest and largest value that an input can have. Default: none.
    steps
        Number of steps of "pgd" and "apgd". Default 10 for both, so that they cost the same; Croce and Hein use 100.
    step_size
        Step size of "pgd", and first step size of "apgd". Default ``2.5 * epsilon / steps`` (Madry et al. 2018) and
        ``2 * epsilon`` (Croce and Hein 2020).
    seed
        Seed of noise and random starts. They are the same for every size and for every network with inputs of the same
        shape; those of "apgd" differ between networks.

    Returns
    -------
    RobustAccuracy
        One accuracy for every size, and the accuracy on undisturbed inputs.

    Raises
    ------
    ValueError
        The attack is unknown, ``sizes`` is empty, negative or not finite, ``steps`` is not positive, ``bounds`` are not
        in order, inputs are not floating-point numbers, or "apgd" gets another loss or labels that are not of shape
        ``(N,)``.
    ModuleNotFoundError
        The attack is "apgd", and the Adversarial Robustness Toolbox is not installed.

    Notes
    -----
    An accuracy under one attack does not show that a network is robust. For "apgd" the last point of the search counts,
    as in that package, and not the worst point on the way: it is a little weaker than published. Its start is drawn for
    the samples that are classified right, so it differs between networks.
    """
    _check(attack, sizes, bounds, steps)
    if attack == "apgd" and loss_fn is not nn.functional.cross_entropy:
        raise ValueError("attack 'apgd' raises the cross-entropy only: leave loss_fn out, or choose 'pgd'")
    private = copy.deepcopy(unwrap(model)).eval().requires_grad_(requires_grad=False)
    device = next((tensor.device for tensor in private.parameters()), torch.device("cpu"))
    batches = Batches(data, device=device, dtype=None)
    attacker = _Attacker(private, loss_fn, attack, bounds or (-math.inf, math.inf), steps, step_size, seed)
    right = torch.zeros(len(sizes) + 1, dtype=torch.float64)
    counted = 0
    with torch.no_grad():
        for (x, label), draw in zip(batches, _draws(batches, seed), strict=True):
            if not x.is_floating_point():
                raise ValueError(f"expected inputs of floating-point numbers, got {x.dtype}: these cannot be disturbed")
            counted += label.numel()
            for column, size in enumerate((None, *sizes)):
                at = x if size is None else attacker.disturbed(x, label, draw, float(size))
                right[column] += int((private(at).argmax(dim=1) == label).sum())
    clean, *found = (right / counted).tolist()
    accuracies = torch.tensor(found, dtype=torch.float64)
    return RobustAccuracy(
        attack=attack,
        sizes=torch.tensor([float(size) for size in sizes], dtype=torch.float64),
        accuracies=accuracies,
        clean=clean,
        errors=(accuracies * (1 - accuracies) / counted).sqrt(),
        samples=counted,
        steps={"noise": 0, "fgsm": 1, "pgd": steps, "apgd": steps}[attack],
        settings={
            "bounds": None if bounds is None else f"{bounds[0]:g} to {bounds[1]:g}",
            "step_size": step_size if attack in {"pgd", "apgd"} else None,
            "seed": seed,
        },
    )


def _check(attack: str, sizes: Sequence[float], bounds: tuple[float, float] | None, steps: int) -> None:
    if attack not in get_args(Attack):
        raise ValueError(f"attack must be one of {get_args(Attack)}, got {attack!r}: choose one of them")
    if not sizes or not all(0 <= size < math.inf for size in sizes):
        raise ValueError(f"sizes must be finite, not negative, and at least one, got {list(sizes)}: pass e.g. [0.1]")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}: pass e.g. 10")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be a smaller and a larger number, got {bounds}: pass the range of the inputs")


@dataclasses.dataclass(frozen=True)
class _Attacker:
    """Disturbs the inputs of a network that it knows."""

    network: nn.Module
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    attack: Attack
    bounds: tuple[float, float]
    steps: int
    step_size: float | None
    seed: int

    def disturbed(self, x: Tensor, label: Tensor, draw: Tensor, size: float) -> Tensor:
        if self.attack == "noise":
            return (x + size * draw).clamp(*self.bounds)
        if self.attack == "fgsm":
            return (x + size * self._uphill(x, label)).clamp(*self.bounds)
        if self.attack == "apgd":
            return self._auto_pgd(x, label, size) if size > 0 else x
        length = 2.5 * size / self.steps if self.step_size is None else self.step_size
        # The normal distribution function maps the draw to a uniform start.
        moved = (x + size * torch.erf(draw / math.sqrt(2.0))).clamp(*self.bounds)
        for _ in range(self.steps):
            further = moved + length * self._uphill(moved, label)
            moved = torch.clamp(further, x - size, x + size).clamp(*self.bounds)
        return moved

    @functools.cached_property
    def _movable(self) -> nn.Module:
        """A copy for the toolbox, which moves it to a device of its own choice."""
        return copy.deepcopy(self.network)

    def _auto_pgd(self, x: Tensor, label: Tensor, size: float) -> Tensor:
        if label.ndim != 1:
            raise ValueError(f"attack 'apgd' needs labels of shape (N,), got {tuple(label.shape)}: choose 'pgd'")
        evasion, classification = _toolbox()
        bounded = all(math.isfinite(bound) for bound in self.bounds)
        # It draws from the global generators, and switches gradients on by itself.
        here = torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
        with RandomStream(self.seed), torch.enable_grad(), here:
            classifier = classification.PyTorchClassifier(
                _InSinglePrecision(self._movable, x.dtype),
                nn.CrossEntropyLoss(),
                input_shape=tuple(x.shape[1:]),
                nb_classes=self.network(x[:1]).shape[1],
                clip_values=self.bounds if bounded else None,
                device_type="cpu" if x.device.type == "cpu" else "gpu",
            )
            attack = evasion.AutoProjectedGradientDescent(
                classifier,
                eps=size,
                eps_step=2 * size if self.step_size is None else self.step_size,
                max_iter=self.steps,
                nb_random_init=1,
                batch_size=len(x),
                verbose=False,
            )
            found = attack.generate(x.float().cpu().numpy(), label.cpu().numpy())
        # Single precision may end outside of the ball by a rounding error.
        moved = torch.from_numpy(found).to(x)
        return torch.clamp(moved, x - size, x + size).clamp(*self.bounds)

    def _uphill(self, at: Tensor, label: Tensor) -> Tensor:
        """Return the signs of the gradient of the loss with respect to the inputs."""
        with torch.enable_grad():
            leaf = at.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.loss_fn(self.network(leaf), label), leaf)
        return slope.sign()


class _InSinglePrecision(nn.Module):
    """A network of any precision for float32 inputs, the only ones that the toolbox knows."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.network(x.to(self.dtype))
        return outputs.float()


def _toolbox() -> tuple[Any, Any]:
    """Return the Adversarial Robustness Toolbox' attacks and classifiers."""
    try:
        from art.attacks import evasion
        from art.estimators import classification
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "attack 'apgd' needs the Adversarial Robustness Toolbox: pip install 'msam-analysis[study]', or choose "
            "'pgd'"
        ) from error
    return evasion, classification


def _draws(batches: Batches, seed: int) -> Iterator[Tensor]:
    """Yield standard normal numbers of the shape of every batch's inputs."""
    for number, batch in enumerate(batches):
        x = batch[0]
        yield gaussian(x.numel(), 1, seed=seed, like=x, use=f"disturbance {number}").view(x.shape)
