"""The networks and the data of the tests, as a table.

Every case carries a model, a loss, ragged batches and an independent twin of its forward pass: ``reference`` is
written from the formulas in plain tensor arithmetic, always in float64, and returns a sum over what is counted
(samples or tokens) and the count. Everything is small enough for a dense float64 Hessian.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Params = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    build: Callable[[], nn.Module]
    loss_fn: Callable[..., Any]
    batches: Callable[[], list[Any]]
    reference: Callable[[Params, Any, str], tuple[Tensor, Tensor]]
    policies: tuple[str, ...] = ("eval",)

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:  # Any: tests reach into the layers
        """Return the model with weights drawn from ``seed``, in training mode as users hand it over."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().double()
            for parameter in model.parameters():  # no parameter keeps a special value such as 0 or 1
                parameter.data.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(0.3 * torch.randn(buffer.shape))
                elif name.endswith("running_var"):
                    buffer.copy_(0.5 + torch.rand(buffer.shape))
        return model.to(dtype).train()

    def data(self, dtype: torch.dtype = torch.float64) -> list[Any]:
        """Return the batches, their floating-point tensors as ``dtype``."""
        return [cast(batch, dtype) for batch in self.batches()]


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors of a batch."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: cast(value, dtype) for key, value in batch.items()}
    return tuple(cast(value, dtype) for value in batch)


def concatenate(batches: Sequence[Any]) -> Any:
    """Join batches to one."""
    if isinstance(batches[0], Mapping):
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def generator(seed: int) -> torch.Generator:
    """Return a generator of its own, so that no test reads the global one."""
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    """Return float64 normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def labels(*shape: int, classes: int, seed: int) -> Tensor:
    """Return class indices."""
    return torch.randint(classes, shape, generator=generator(seed))


def split(sizes: Sequence[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors into batches of the given sizes."""
    return [tuple(parts) for parts in zip(*(tensor.split(list(sizes)) for tensor in tensors), strict=True)]


def cross_entropy_sum(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy by its formula, summed over the rows."""
    shifted = logits - logits.max(dim=1, keepdim=True).values.detach()
    return (shifted.exp().sum(1).log() - shifted[torch.arange(len(target)), target]).sum()


def count(number: int) -> Tensor:
    """Return a count as a tensor."""
    return torch.tensor(float(number), dtype=torch.float64)


# --- a perceptron, with dropout that a measurement must not apply


def build_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))


def mlp_batches() -> list[Any]:
    return split([8, 8, 3], normal(19, 4, seed=1), labels(19, classes=3, seed=2))


def mlp_reference(p: Params, batch: Any, policy: str) -> tuple[Tensor, Tensor]:
    x, y = batch
    hidden = torch.tanh(x @ p["0.weight"].T + p["0.bias"])
    return cross_entropy_sum(hidden @ p["3.weight"].T + p["3.bias"], y), count(len(y))


# --- convolutions with BatchNorm


def build_convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.Conv2d(4, 3, 3, stride=2),
        nn.BatchNorm2d(3),
        nn.SiLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(12, 3),
    )


def convnet_batches() -> list[Any]:
    return split([8, 8, 3], normal(19, 1, 6, 6, seed=3), labels(19, classes=3, seed=4))


def batch_norm(x: Tensor, p: Params, prefix: str, policy: str) -> Tensor:
    if policy == "batch":
        mean = x.mean((0, 2, 3))
        variance = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
    else:
        mean, variance = p[f"{prefix}.running_mean"], p[f"{prefix}.running_var"]
    scaled = (x - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
    return scaled * p[f"{prefix}.weight"][:, None, None] + p[f"{prefix}.bias"][:, None, None]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def convnet_reference(p: Params, batch: Any, policy: str) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = silu(batch_norm(F.conv2d(x, p["0.weight"], padding=1), p, "1", policy))
    x = silu(batch_norm(F.conv2d(x, p["3.weight"], p["3.bias"], stride=2), p, "4", policy))
    logits = x.reshape(len(y), -1) @ p["8.weight"].T + p["8.bias"]
    return cross_entropy_sum(logits, y), count(len(y))


# --- tied weights: one tensor is both embedding and decoder


class Tied(nn.Module):
    """Predict a token from the mean of an embedding with that embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.middle = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 6, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.decoder(torch.tanh(self.middle(self.embedding(tokens).mean(1))))
        return out


def tied_batches() -> list[Any]:
    return split([5, 5, 1], labels(11, 3, classes=6, seed=5), labels(11, classes=6, seed=6))


def tied_reference(p: Params, batch: Any, policy: str) -> tuple[Tensor, Tensor]:
    tokens, y = batch
    one_hot = F.one_hot(tokens, 6).to(torch.float64).mean(1)
    hidden = torch.tanh(one_hot @ p["embedding.weight"] @ p["middle.weight"].T + p["middle.bias"])
    return cross_entropy_sum(hidden @ p["embedding.weight"].T, y), count(len(y))


# --- frozen and unused parameters


class Partial(nn.Module):
    """A frozen layer in the middle and a layer that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.frozen = nn.Linear(5, 5)
        self.unused = nn.Linear(3, 2)
        self.head = nn.Linear(5, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.frozen(torch.tanh(self.body(x)))))
        return out


def partial_batches() -> list[Any]:
    return split([6, 6, 2], normal(14, 4, seed=7), normal(14, 2, seed=8))


def partial_reference(p: Params, batch: Any, policy: str) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = torch.tanh(x @ p["body.weight"].T + p["body.bias"])
    x = torch.tanh(x @ p["frozen.weight"].T + p["frozen.bias"])
    errors = (x @ p["head.weight"].T + p["head.bias"] - y) ** 2
    return errors.mean(1).sum(), count(len(y))


# --- dict batches, loss as (sum, count) of tokens; the third batch has one token


class Tagger(nn.Module):
    """Label every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embedding(ids)))
        return out


def token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(ids=batch["ids"])
    losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    mask = batch["mask"].flatten()
    return (losses * mask).sum(), mask.sum()


def tagger_batches() -> list[Any]:
    ids, tags = labels(9, 4, classes=5, seed=9), labels(9, 4, classes=3, seed=10)
    mask = torch.ones(9, 4, dtype=torch.float64)
    mask[:4, 2:] = 0
    mask[8, 1:] = 0
    names = ("ids", "labels", "mask")
    return [dict(zip(names, batch, strict=True)) for batch in split([4, 4, 1], ids, tags, mask)]


def tagger_reference(p: Params, batch: Any, policy: str) -> tuple[Tensor, Tensor]:
    total, number = count(0), count(0)
    for row in range(len(batch["ids"])):
        for column in range(4):
            if batch["mask"][row, column]:
                hidden = torch.tanh(p["embedding.weight"][batch["ids"][row, column]])
                logits = (p["head.weight"] @ hidden + p["head.bias"])[None]
                total = total + cross_entropy_sum(logits, batch["labels"][row, column][None])
                number = number + 1
    return total, number


# --- a transformer whose attention goes through torch's fused kernel


class Transformer(nn.Module):
    """One block: attention with two heads, LayerNorm, a linear head on the mean over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(3, 8)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.head(self.norm(x + attended.transpose(1, 2).flatten(2)).mean(1))
        return out


def transformer_batches() -> list[Any]:
    return split([6, 6, 1], normal(13, 4, 3, seed=11), labels(13, classes=3, seed=12))


def transformer_reference(p: Params, batch: Any, policy: str) -> tuple[Tensor, Tensor]:
    x, y = batch
    x = x @ p["inputs.weight"].T + p["inputs.bias"]
    projected = x @ p["qkv.weight"].T + p["qkv.bias"]
    heads = []
    for head in range(2):
        q, k, v = (projected[..., 8 * part + 4 * head : 8 * part + 4 * head + 4] for part in range(3))
        scores = torch.exp(q @ k.transpose(1, 2) / math.sqrt(4))
        heads.append(scores / scores.sum(-1, keepdim=True) @ v)
    x = x + torch.cat(heads, -1)
    centered = x - x.mean(-1, keepdim=True)
    x = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-5)
    x = x * p["norm.weight"] + p["norm.bias"]
    return cross_entropy_sum(x.mean(1) @ p["head.weight"].T + p["head.bias"], y), count(len(y))


MLP = Case("mlp", build_mlp, F.cross_entropy, mlp_batches, mlp_reference)
CONVNET = Case("convnet", build_convnet, F.cross_entropy, convnet_batches, convnet_reference, ("eval", "batch"))
TIED = Case("tied", Tied, F.cross_entropy, tied_batches, tied_reference)
PARTIAL = Case("partial", Partial, F.mse_loss, partial_batches, partial_reference)
TAGGER = Case("tagger", Tagger, token_loss, tagger_batches, tagger_reference)
TRANSFORMER = Case("transformer", Transformer, F.cross_entropy, transformer_batches, transformer_reference)

CASES = (MLP, CONVNET, TIED, PARTIAL, TAGGER, TRANSFORMER)
WITH_POLICY = tuple((case, policy) for case in CASES for policy in case.policies)


# --- losses with a closed form


class Quadratic(nn.Module):
    """A model whose output for the sample ``a`` is ``a · (½ wᵀHw + gᵀw + c)``."""

    H: Tensor
    g: Tensor

    def __init__(self, H: Tensor, g: Tensor, c: float = 0.0, w: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros_like(g) if w is None else w.clone())
        self.register_buffer("H", H.clone())
        self.register_buffer("g", g.clone())
        self.c = c

    def forward(self, scale: Tensor) -> Tensor:
        return scale * (0.5 * self.w @ self.H @ self.w + self.g @ self.w + self.c)


def mean_output(output: Tensor, target: Tensor) -> Tensor:
    """Criterion for models that put out losses."""
    return output.mean()


ONE_SAMPLE = (torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
