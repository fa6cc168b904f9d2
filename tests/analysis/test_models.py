"""Kinds of models: adapters on frozen weights, recurrent and attention layers, dropout that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import msam_analysis as ma

from .cases import CONVNET, MLP, TRANSFORMER, concatenate, cross_entropy_sum, normal
from .oracles import dense_hessian


def filled(model: Any) -> Any:
    """The model in float64 with weights drawn from generators of their own."""
    model.double()
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(0.5 * normal(*parameter.shape, seed=200 + index))
    return model


def difference(objective: ma.Objective, v: Tensor) -> Tensor:
    """The product from gradients, which shares nothing with second derivatives."""
    point, step = objective.point(), 1e-5 / float(v.norm())
    ahead, behind = objective.gradient(point + step * v), objective.gradient(point - step * v)
    return (ahead - behind) / (2 * step)


# --- adapters of low rank on frozen weights


class LoRA(nn.Module):
    """``y = (W + B A) x + b`` with frozen ``W`` and ``b``."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.lora_A.T @ self.lora_B.T
        return out


def adapted() -> Any:
    return filled(nn.Sequential(LoRA(nn.Linear(4, 6), 2), nn.Tanh(), LoRA(nn.Linear(6, 3), 1)))


@pytest.mark.parametrize("selection", [None, "*lora_*"], ids=["requires_grad", "pattern"])
def test_adapters_on_frozen_weights(selection: Any) -> None:
    """Their Hessian is that of the merged network, through ``W + B A``."""
    model, (x, y) = adapted(), concatenate(MLP.data())
    objective = ma.Objective(model, F.cross_entropy, MLP.data(), parameters=selection)
    assert objective.layout.names == ("0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B")
    frozen = {name: tensor.detach() for name, tensor in model.named_parameters() if "base" in name}

    def loss(w: Tensor) -> Tensor:
        p = objective.layout.views(w)
        first = frozen["0.base.weight"] + p["0.lora_B"] @ p["0.lora_A"]
        second = frozen["2.base.weight"] + p["2.lora_B"] @ p["2.lora_A"]
        hidden = torch.tanh(x @ first.T + frozen["0.base.bias"])
        return cross_entropy_sum(hidden @ second.T + frozen["2.base.bias"], y) / len(y)

    expected = dense_hessian(loss, objective.point())
    identity = torch.eye(objective.size, dtype=torch.float64)
    torch.testing.assert_close(objective.hessian() @ identity, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(objective.gradient(), torch.func.grad(loss)(objective.point()))
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "base" in name)


def test_one_block_and_norm_layers_only() -> None:
    objective = ma.Objective(TRANSFORMER.model(), F.cross_entropy, TRANSFORMER.data())
    norms = objective.with_parameters(ma.normalization_layers(objective.model))
    assert norms.layout.names == ("norm.weight", "norm.bias")
    H = objective.hessian() @ torch.eye(objective.size, dtype=torch.float64)
    names = [name for name, view in objective.parameters.items() for _ in range(view.numel())]
    inside = torch.tensor([name.startswith("norm.") for name in names])
    got = norms.hessian() @ torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(got, H[inside][:, inside], rtol=1e-10, atol=1e-13)


# --- layers with kernels of their own


class Recurrent(nn.Module):
    seen: ClassVar[list[bool]] = []  # of the class: what a forward writes to an instance is put back

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cells, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cudnn.enabled)
        out: Tensor = self.head(self.cells(x)[0][:, -1])
        return out


class SelfAttention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inputs = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(attended.mean(1))
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.head = nn.Linear(3, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.3, activation="gelu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.inputs(x)).mean(1))
        return out


KINDS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "attention layer": SelfAttention,
    "encoder layer": Encoder,
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_layers_with_kernels_of_their_own(name: str, dropout: bool) -> None:
    """Exact second derivatives, of several vectors, too."""
    objective = ma.Objective(
        filled(KINDS[name]()), F.cross_entropy, TRANSFORMER.data(), dropout=dropout, second_derivatives="exact"
    )
    block = normal(objective.size, 4, seed=210)
    expected = torch.stack([difference(objective, column) for column in block.T], dim=1)
    torch.testing.assert_close(objective.hessian() @ block, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(objective.hvp(block[:, 0]), expected[:, 0], rtol=1e-6, atol=1e-8)


def test_recurrent_layers_do_without_cudnn() -> None:
    """Its kernels have no gradient in evaluation mode; whoever else uses it keeps it."""
    before = torch.backends.cudnn.enabled
    objective = ma.Objective(filled(Recurrent(nn.GRU)), F.cross_entropy, TRANSFORMER.data())
    objective.examine()
    Recurrent.seen.clear()
    objective.gradient()
    assert Recurrent.seen == [False] * 3
    assert torch.backends.cudnn.enabled == before


# --- dropout that is asked for


def drawn(objective: ma.Objective, batch: int, shape: tuple[int, ...], p: float) -> Tensor:
    """The mask that the first dropout layer of a batch draws, scaled."""
    generator = torch.Generator().manual_seed(objective.seed + batch)
    return torch.empty(shape, dtype=torch.float64).bernoulli_(1 - p, generator=generator) / (1 - p)


@pytest.mark.parametrize("seed", [0, 5])
def test_dropout_drops_what_the_private_stream_says(seed: int) -> None:
    model = MLP.model()
    objective = ma.Objective(model, F.cross_entropy, MLP.data(), dropout=True, seed=seed)
    p = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sums = []
    for index, (x, y) in enumerate(MLP.data()):
        hidden = torch.tanh(x @ p["0.weight"].T + p["0.bias"]) * drawn(objective, index, (len(x), 7), 0.5)
        sums.append(cross_entropy_sum(hidden @ p["3.weight"].T + p["3.bias"], y))
    assert float(objective.loss()) == pytest.approx(float(torch.stack(sums).sum() / 19), rel=1e-12)


@pytest.mark.parametrize("graph_bytes", [0, 2000, 2**30])
def test_every_evaluation_sees_the_same_draw(graph_bytes: int) -> None:
    objective = ma.Objective(MLP.model(), F.cross_entropy, MLP.data(), dropout=True, graph_bytes=graph_bytes)
    v = normal(objective.size, seed=211)
    assert torch.equal(objective.loss(), objective.loss())
    assert torch.equal(objective.gradient(), objective.gradient())
    operator = objective.hessian()
    for product in (operator @ v, operator @ v, objective.hvp(v)):
        torch.testing.assert_close(product, difference(objective, v), rtol=1e-6, atol=1e-8)
    other = ma.Objective(MLP.model(), F.cross_entropy, MLP.data(), dropout=True, seed=1)
    assert not torch.equal(other.loss(), objective.loss())


def test_dropout_is_off_unless_asked_for() -> None:
    off, on = (ma.Objective(MLP.model(), F.cross_entropy, MLP.data(), dropout=dropout) for dropout in (False, True))
    assert not torch.equal(off.loss(), on.loss())
    assert on.settings == {**off.settings, "dropout": True}
    assert "dropout" not in off.settings


@pytest.mark.parametrize("policy", ["eval", "batch", "recalibrate"])
def test_dropout_leaves_batchnorm_alone(policy: Any) -> None:
    """With nothing to drop, the loss is the one without dropout, whatever the policy."""
    model = CONVNET.model()
    plain = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), batchnorm=policy)
    dropped = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), batchnorm=policy, dropout=True)
    assert not torch.equal(plain.loss(), dropped.loss())
    model[7].p = 0.0
    still = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), batchnorm=policy, dropout=True)
    assert torch.equal(plain.loss(), still.loss())
    assert still.settings["batchnorm"] == policy


class NormWithDrop(nn.BatchNorm1d):
    """BatchNorm that holds a dropout layer, as some libraries fuse them."""

    def __init__(self) -> None:
        super().__init__(3)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(super().forward(x))
        return out


def test_dropout_leaves_batchnorm_alone_that_holds_it() -> None:
    data = (normal(8, 4, seed=212), torch.zeros(8, dtype=torch.long))
    model = filled(nn.Sequential(nn.Linear(4, 3), NormWithDrop()))
    off, on = (ma.Objective(model, F.cross_entropy, data, dropout=dropout) for dropout in (False, True))
    assert torch.equal(off.loss(), on.loss())


class StochasticDepth(nn.Module):
    """A residual branch that is left out at random, as libraries write it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, dtype=x.dtype) < 0.5) / 0.5 if self.training else x


class Rate(nn.Module):
    """A layer that hands a rate of its own to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.attention_dropout, self.training)


class DropPath(StochasticDepth):
    pass


class Switch(nn.Module):
    """A layer that answers differently in training, and drops nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 100 if self.training else x


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, DropPath, Rate, lambda: nn.Sequential(nn.Dropout())])
def test_what_counts_as_dropout(kind: Any) -> None:
    def loss(dropout: bool, *more: nn.Module) -> Tensor:
        model = filled(nn.Sequential(nn.Linear(4, 3), kind(), *more))
        return ma.Objective(model, F.mse_loss, (torch.ones(8, 4).double(), torch.ones(8, 3)), dropout=dropout).loss()

    assert not torch.equal(loss(False), loss(True))
    assert torch.equal(loss(True), loss(True, Switch())), "other modes stay"


def test_dropout_inside_attention() -> None:
    model = filled(SelfAttention(dropout=0.5))
    off, on = (ma.Objective(model, F.cross_entropy, TRANSFORMER.data(), dropout=dropout) for dropout in (False, True))
    assert not torch.equal(off.loss(), on.loss())
    assert torch.equal(on.loss(), on.loss_and_gradient()[0])


class Kernels(nn.Module):
    """Notes whether attention may take a fused kernel."""

    seen: ClassVar[list[bool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch.backends.cuda.flash_sdp_enabled())
        out: Tensor = self.body(x).mean(1)
        return out


@pytest.mark.parametrize(("dropout", "fused"), [(False, True), (True, False)])
def test_the_kernel_that_draws_is_the_same_for_all_derivatives(dropout: bool, fused: bool) -> None:
    """Fused attention has no second derivative, and draws its dropout in another order."""
    objective = ma.Objective(filled(Kernels()), F.cross_entropy, TRANSFORMER.data()[:1], dropout=dropout)
    objective.examine()
    Kernels.seen.clear()
    objective.loss()
    objective.gradient()
    objective.hvp(torch.ones(objective.size))
    assert Kernels.seen == [fused, fused, False]


def test_the_model_keeps_its_modes() -> None:
    model = CONVNET.model().eval()
    ma.Objective(model, CONVNET.loss_fn, CONVNET.data(), dropout=True).gradient()
    assert not any(module.training for module in model.modules())


# --- losses beside a criterion


def test_a_causal_model_of_ragged_sequences() -> None:
    """A sum over tokens and their count: padding counts for nothing, wherever it stands and however samples lie."""
    with torch.random.fork_rng(devices=[]):
        model = filled(nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 7)))
    ids = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([5, 2, 3, 5, 1, 4])
    labels = torch.where(torch.arange(5) < lengths[:, None], ids.roll(-1, 1), -100)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, labels = model(batch["ids"]).flatten(0, 1), batch["labels"].flatten()
        return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), (labels != -100).sum()

    whole = ma.Objective(model, loss_fn, {"ids": ids, "labels": labels})
    ragged = whole.with_samples(torch.tensor([4, 1, 0, 5, 3, 2]), batch_size=4)
    alone = [{"ids": ids[i : i + 1, :n], "labels": labels[i : i + 1, :n]} for i, n in enumerate(lengths.tolist())]

    def loss(w: Tensor) -> Tensor:
        point = whole.layout.views(w)
        sums = [cross_entropy_sum(functional_call(model, point, b["ids"])[0], b["labels"][0]) for b in alone]
        return torch.stack(sums).sum() / lengths.sum()

    H, point = dense_hessian(loss, whole.point()), whole.point()
    for objective in (whole, ragged, ma.Objective(model, loss_fn, alone)):
        assert float(objective.loss()) == pytest.approx(float(loss(point)), rel=1e-12)
        identity = torch.eye(whole.size, dtype=torch.float64)
        torch.testing.assert_close(objective.hessian() @ identity, H, rtol=1e-9, atol=1e-12)
