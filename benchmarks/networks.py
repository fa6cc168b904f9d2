"""Networks whose five largest Hessian eigenvalues are known: what the benchmark of curvature asks.

Every case is a network in evaluation mode, a loss, and batches of real data, some of them ragged. The reference shares
nothing with what is measured: a dense Hessian where it fits, else SciPy's ARPACK, both on products that ``torch.func``
makes in float64 from all samples at once. Training and references take some minutes; they are kept in
``benchmarks/build`` under a name that changes with this file and with torch.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from optimizers import wrn
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad

from msam_analysis.studies import digits

Batch = tuple[Tensor, Tensor]
BUILD = Path(__file__).parent / "build"
VALUES = 5
_DENSE = 3000
_RESIDUAL = 1e-8


# ---------------------------------------------------------------- networks


class Attention(nn.Module):
    """Multi-head self-attention by its formula: fused kernels have no second derivative, and few tools avoid them."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return shape ``(batch, tokens, width)`` for the same shape."""
        batch, tokens, width = x.shape
        split = self.inward(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // self.heads)
        if self.causal:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
        result: Tensor = self.outward(mixed)
        return result


class TransformerBlock(nn.Module):
    """A pre-norm block: attention, then a perceptron four times as wide."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.perceptron(self.norm2(x))
        return result


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929) that classifies by its first token.

    ViT-B/16 is ``VisionTransformer(3, 224, 16, 768, 12, 12, 1000)``.
    """

    def __init__(self, channels: int, side: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(channels, width, patch, patch)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape ``(batch, classes)``."""
        tokens = self.embedding(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        result: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return result


class LanguageModel(nn.Module):
    """A decoder that predicts the next token; ``LanguageModel(32000, 512, 2048, 18, 16)`` has 1.0 G parameters."""

    def __init__(self, vocabulary: int, tokens: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, shape ``(batch, vocabulary, tokens)``, as cross-entropy wants them."""
        result: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions))).transpose(1, 2)
        return result


def mlp() -> nn.Module:
    """A perceptron for 8 × 8 images: 2,410 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def autoencoder() -> nn.Module:
    """64 numbers through 16: 2,128 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 64))


def small_cnn() -> nn.Module:
    """Two convolutions with BatchNorm: 868 parameters."""
    first = [nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    second = [nn.Conv2d(6, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


def small_wrn() -> nn.Module:
    """WRN-10-1: 77,850 parameters."""
    return wrn(depth=10, width=1, classes=10)


def small_transformer() -> nn.Module:
    """Two blocks on 16 patches of 2 × 2 pixels: 26,538 parameters."""
    return VisionTransformer(channels=1, side=8, patch=2, width=32, depth=2, heads=4, classes=10)


# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Spec:
    """How a case is made."""

    build: Callable[[], nn.Module]
    epochs: int  # of training; 0 leaves the initial weights
    samples: int  # to measure on; training sees all 1000
    batch: int  # samples in a batch; the last one holds what is left
    target: str = "labels"
    channels: int = 1
    learning_rate: float = 0.05


SPECS: dict[str, Spec] = {
    "MLP, initial": Spec(mlp, 0, 1000, 1000),
    "MLP, trained, ragged": Spec(mlp, 60, 1000, 300),
    "autoencoder, trained, ragged": Spec(autoencoder, 60, 1000, 300, target="inputs", learning_rate=0.5),
    "small CNN, trained, ragged": Spec(small_cnn, 60, 250, 83),
    "CNN, initial, ragged": Spec(digits.network, 0, 200, 70),
    "CNN, trained": Spec(digits.network, 40, 200, 200),
    "WRN-10-1, initial": Spec(small_wrn, 0, 64, 64, channels=3),
    "WRN-10-1, trained, ragged": Spec(small_wrn, 12, 64, 25, channels=3),
    "transformer, initial, ragged": Spec(small_transformer, 0, 100, 40),
    "transformer, trained": Spec(small_transformer, 30, 100, 100, learning_rate=0.02),
}


@dataclass(frozen=True)
class Reference:
    """The eigenvalues, in float64.

    Attributes
    ----------
    largest
        The five largest, in descending order.
    magnitude
        The five largest in magnitude, in descending order of it.
    method
        How they were computed.
    """

    largest: Tensor
    magnitude: Tensor
    method: str


@dataclass(frozen=True)
class Case:
    """A network with everything that a tool needs, and the answer."""

    name: str
    model: nn.Module
    criterion: nn.Module
    batches: list[Batch]
    reference: Reference

    @property
    def parameters(self) -> int:
        """How many parameters it has."""
        return sum(p.numel() for p in self.model.parameters())


@lru_cache(maxsize=1)
def _images() -> Batch:
    inputs, labels, _, _ = digits.load()
    return inputs, labels


def batches(spec: Spec, samples: int) -> list[Batch]:
    """The first samples as the case wants them."""
    inputs, labels = (tensor[:samples] for tensor in _images())
    target = inputs.flatten(1) if spec.target == "inputs" else labels
    inputs = inputs.expand(-1, spec.channels, -1, -1).contiguous()
    return list(zip(inputs.split(spec.batch), target.split(spec.batch), strict=True))


def criterion(spec: Spec) -> nn.Module:
    """The loss of a case."""
    return nn.MSELoss() if spec.target == "inputs" else nn.CrossEntropyLoss()


def trained(spec: Spec, epochs: int) -> nn.Module:
    """The network with its weights, in evaluation mode: stochastic gradient descent with a cosine schedule."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.build()
        loss_fn = criterion(spec)
        inputs, target = (torch.cat(parts) for parts in zip(*batches(spec, 1000), strict=True))
        optimizer = torch.optim.SGD(model.parameters(), spec.learning_rate, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs)).split(64):
                optimizer.zero_grad()
                loss_fn(model(inputs[chosen]), target[chosen]).backward()
                optimizer.step()
            schedule.step()
    return model.eval()


def case(name: str, *, tiny: bool = False) -> Case:
    """Build a case, or read it from ``benchmarks/build``; ``tiny``: few samples and steps, to try the code."""
    spec = SPECS[name]
    state = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    path = BUILD / f"{name.replace(', ', '-').replace(' ', '_')}{'-tiny' if tiny else ''}-{state}.pt"
    model, data, loss_fn = (
        spec.build().eval(),
        batches(spec, min(41, spec.samples) if tiny else spec.samples),
        criterion(spec),
    )
    if path.exists():
        kept: dict[str, Any] = torch.load(path, weights_only=True)
        model.load_state_dict(kept["model"])
    else:
        model = trained(spec, min(spec.epochs, 1) if tiny else spec.epochs)
        kept = {"model": model.state_dict(), "reference": vars(reference(model, loss_fn, data))}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, path)
    return Case(name, model, loss_fn, data, Reference(**kept["reference"]))


# ---------------------------------------------------------------- references


def product(model: nn.Module, loss_fn: nn.Module, data: list[Batch]) -> tuple[Callable[[Tensor], Tensor], int]:
    """``v → ∇²L v`` of the mean over all samples in float64, and the number of parameters."""
    model = copy.deepcopy(model).double().eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [p.shape for p in weights.values()]
    inputs, target = (torch.cat(parts) for parts in zip(*data, strict=True))
    inputs, target = inputs.double(), target.double() if target.is_floating_point() else target

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        value: Tensor = loss_fn(functional_call(model, parameters, (inputs,)), target)
        return value

    def apply(v: Tensor) -> Tensor:
        pieces = v.split([shape.numel() for shape in shapes])
        tangent = {name: piece.view(shape) for name, piece, shape in zip(weights, pieces, shapes, strict=True)}

        def slope(parameters: dict[str, Tensor]) -> Tensor:
            return torch.stack([(part * tangent[name]).sum() for name, part in grad(loss)(parameters).items()]).sum()

        found = grad(slope)(weights)
        return torch.cat([found[name].reshape(-1) for name in weights])

    return apply, sum(shape.numel() for shape in shapes)


def reference(model: nn.Module, loss_fn: nn.Module, data: list[Batch]) -> Reference:
    """The eigenvalues that tools are asked for, by size and by magnitude."""
    apply, size = product(model, loss_fn, data)
    if size <= _DENSE:
        matrix = torch.stack([apply(column) for column in torch.eye(size, dtype=torch.float64)])
        assert (matrix - matrix.T).abs().max() <= 1e-10 * matrix.abs().max()
        values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)
        return Reference(values[:VALUES], by_magnitude(values)[:VALUES], "dense Hessian in float64")
    magnitude = by_magnitude(arpack(apply, size, "LM"))
    # Five positive ones that are the largest in magnitude are the largest.
    largest = magnitude if bool((magnitude > 0).all()) else arpack(apply, size, "LA")
    return Reference(largest, magnitude, f"ARPACK on products in float64, residuals below {_RESIDUAL:g} of the largest")


def by_magnitude(values: Tensor) -> Tensor:
    """The same values, largest in magnitude first."""
    return values[values.abs().argsort(descending=True)]


def arpack(apply: Callable[[Tensor], Tensor], size: int, which: Literal["LM", "LA"]) -> Tensor:
    """Five eigenvalues, descending, once every residual has been seen to be small: the error is about its square."""

    def matvec(v: Any) -> Any:
        return apply(torch.from_numpy(np.asarray(v).reshape(-1))).numpy()

    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
    values, vectors = eigsh(operator, k=VALUES, which=which, tol=_RESIDUAL / 10, ncv=40, rng=np.random.default_rng(0))
    for value, vector in zip(values, vectors.T, strict=True):
        assert np.linalg.norm(matvec(vector) - value * vector) <= _RESIDUAL * np.abs(values).max()
    return torch.from_numpy(values[::-1].copy())
