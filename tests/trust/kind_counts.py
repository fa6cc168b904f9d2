"""Counts guessed from shapes: the first dimension is not the sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import msam_analysis as ma

from .cases import Answer, Ask, Truth, case, labels, mlp, normal, seeded


def weighted(ask: Ask, net: nn.Module, f: Any, batches: Sequence[Any], counts: Sequence[int]) -> Answer:
    """Ask for loss and gradient of batches whose true counts are known; ``f(model, batch)`` or a criterion."""
    two = isinstance(batches[0], tuple)

    def of(batch: Any) -> Any:
        return f(net(batch[0]), batch[1]) if two else f(net, batch)

    def mean() -> Any:
        return sum(n * of(batch) for n, batch in zip(counts, batches, strict=True)) / sum(counts)

    truth = Truth(mean, net.parameters())
    want = torch.cat([truth.loss.reshape(1), truth.gradient])

    def question() -> Tensor:
        objective = ma.Objective(net, f, batches)
        return torch.cat([objective.loss().reshape(1).double(), objective.gradient().double()])

    return ask(question), want, 1e-6


def graphs(sizes: Sequence[int], seed: int) -> dict[str, Tensor]:
    nodes = sum(sizes)
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    edges = torch.stack([torch.arange(nodes), torch.arange(nodes).roll(1)])
    return {"x": normal(nodes, 3, seed=seed), "edge_index": edges, "batch": owner, "y": labels(len(sizes), seed=seed)}


def graph_loss(model: Any, b: Any) -> Any:
    nodes = model(b["x"])
    if "edge_index" in b:
        nodes = nodes + nodes[b["edge_index"][0]]
    pooled = torch.zeros(len(b["y"]), 2, dtype=torch.float64).index_add(0, b["batch"], nodes)
    return F.cross_entropy(pooled, b["y"])


@case("counts", "right", "refused")
def graph_batches(ask: Ask) -> Answer:
    """Batches of graphs: nodes come first, targets count graphs."""
    batches = [graphs([3, 4, 2, 5], 1), graphs([9, 8], 2)]
    return weighted(ask, mlp(), graph_loss, batches, [4, 2])


@case("counts", "right", "refused")
def edges_first(ask: Ask) -> Answer:
    """Batches of graphs whose first tensor is edge_index, of shape (2, edges)."""
    batches = [graphs([3, 4, 2, 5], 1), graphs([9, 8], 2)]
    order = ("edge_index", "x", "batch", "y")
    return weighted(ask, mlp(), graph_loss, [{key: b[key] for key in order} for b in batches], [4, 2])


@dataclasses.dataclass
class Graph:
    """A batch as graph libraries have it: an object with attributes."""

    x: Tensor
    batch: Tensor
    y: Tensor

    def __contains__(self, key: str) -> bool:
        return hasattr(self, key)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


@case("counts", "right", "refused")
def graphs_as_objects(ask: Ask) -> Answer:
    """Batches of graphs as objects with attributes."""
    batches = []
    for sizes, seed in (([3, 4, 2, 5], 1), ([9, 8], 2)):
        whole = graphs(sizes, seed)
        batches.append(Graph(whole["x"], whole["batch"], whole["y"]))
    return weighted(ask, mlp(), graph_loss, batches, [4, 2])


@case("counts", "right", "refused")
def node_targets(ask: Ask) -> Answer:
    """One graph with a mask of training nodes: the loss is a mean over the masked ones."""

    def f(model: Any, b: Any) -> Any:
        return F.cross_entropy(model(b["x"])[b["mask"]], b["y"][b["mask"]])

    masks = [torch.arange(9) < 2, torch.arange(6) < 5]
    batches = [{"x": normal(len(m), 3, seed=i), "mask": m, "y": labels(len(m), seed=i)} for i, m in enumerate(masks)]
    return weighted(ask, mlp(), f, batches, [2, 5])


class Recurrent(nn.Module):
    """A recurrent network in torch's own layout (T, B, C), or on packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor | PackedSequence) -> Any:
        return self.head(self.recurrent(x)[1][-1])


@case("counts", "right", "refused")
def time_first(ask: Ask) -> Answer:
    """Sequences of shape (T, B, C), the default layout of nn.GRU, with labels of shape (B,)."""
    batches = [(normal(5, 8, 3), labels(8)), (normal(7, 2, 3), labels(2))]
    return weighted(ask, seeded(Recurrent), F.cross_entropy, batches, [8, 2])


@case("counts", "right", "refused")
def time_first_in_a_dictionary(ask: Ask) -> Answer:
    """Dictionaries with sequences of shape (T, B, C) before labels of shape (B,)."""

    def f(model: Any, b: Any) -> Any:
        return F.cross_entropy(model(b["x"]), b["y"])

    batches = [{"x": normal(5, 8, 3), "y": labels(8)}, {"x": normal(7, 2, 3), "y": labels(2)}]
    return weighted(ask, seeded(Recurrent), f, batches, [8, 2])


@case("counts", "right", "refused")
def time_equals_batch(ask: Ask) -> Answer:
    """Sequences (T, B, C) that have as many steps as there are labels in one batch, and not in the other."""
    batches = [(normal(8, 8, 3), labels(8)), (normal(8, 2, 3), labels(2))]
    return weighted(ask, seeded(Recurrent), F.cross_entropy, batches, [8, 2])


@case("counts", "right", "refused")
def packed_sequences(ask: Ask) -> Answer:
    """PackedSequence inputs: data first, of all steps of all sequences."""
    batches = []
    for lengths, seed in (([5, 3, 3, 1], 1), ([6, 2], 2)):
        packed = pack_sequence([normal(n, 3, seed=seed + n) for n in lengths])
        batches.append((packed, labels(len(lengths), seed=seed)))
    return weighted(ask, seeded(Recurrent), F.cross_entropy, batches, [4, 2])


@case("counts", "right", "refused")
def lengths_beside_sequences(ask: Ask) -> Answer:
    """Padded sequences (T, B, C) with lengths, packed inside the loss."""

    def f(model: Any, b: Any) -> Any:
        packed = pack_padded_sequence(b["x"], b["lengths"], enforce_sorted=False)
        return F.cross_entropy(model(packed), b["y"])

    batches = [
        {"x": normal(6, 4, 3), "lengths": torch.tensor([6, 2, 3, 4]), "y": labels(4)},
        {"x": normal(3, 2, 3), "lengths": torch.tensor([3, 1]), "y": labels(2)},
    ]
    return weighted(ask, seeded(Recurrent), f, batches, [4, 2])


@case("counts", "right", "refused")
def query_and_documents(ask: Ask) -> Answer:
    """Ranking: queries, and four documents for each, flattened."""

    def f(model: Any, b: Any) -> Any:
        query, documents = model(b["query"]), model(b["documents"]).view(len(b["query"]), 4, 2)
        scores = (documents * query[:, None]).sum(2)
        return F.cross_entropy(scores, b["best"])

    batches = [
        {"documents": normal(4 * n, 3, seed=n), "query": normal(n, 3, seed=n + 9), "best": labels(n, 4)} for n in (5, 2)
    ]
    return weighted(ask, mlp(), f, batches, [5, 2])


@case("counts", "right", "refused")
def shared_table_first(ask: Ask) -> Answer:
    """Dictionaries whose first tensor is shared (class prototypes), the same in every batch."""
    prototypes = normal(2, 2, seed=9)

    def f(model: Any, b: Any) -> Any:
        return F.cross_entropy(model(b["x"]) @ b["prototypes"].T, b["y"])

    batches = [{"prototypes": prototypes, "x": normal(n, 3, seed=n), "y": labels(n, seed=n)} for n in (7, 3)]
    return weighted(ask, mlp(), f, batches, [7, 3])


@case("counts", "right", "refused")
def contrastive_views(ask: Ask) -> Answer:
    """Two views concatenated to 2 N rows, with N labels (SimCLR)."""

    def f(model: Any, b: Any) -> Any:
        first, second = model(b["views"]).chunk(2)
        return F.cross_entropy(first + second, b["y"])

    batches = [{"views": normal(2 * n, 3, seed=n), "y": labels(n, seed=n)} for n in (6, 2)]
    return weighted(ask, mlp(), f, batches, [6, 2])


class Detector(nn.Module):
    """Scores of the boxes of images, given as lists of tensors of different length."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, boxes: Sequence[Tensor]) -> Any:
        return torch.stack([self.net(box).mean(0) for box in boxes])


@case("counts", "right", "refused")
def lists_of_tensors(ask: Ask) -> Answer:
    """Images as lists of tensors of different length, as detection loaders give them."""
    batches = [
        {"boxes": [normal(k, 3, seed=k) for k in sizes], "y": labels(len(sizes), seed=len(sizes))}
        for sizes in ([2, 7, 4, 1], [3, 3])
    ]
    return weighted(ask, seeded(Detector), lambda model, b: F.cross_entropy(model(b["boxes"]), b["y"]), batches, [4, 2])


@case("counts", "right")
def ragged_rows(ask: Ask) -> Answer:
    """Plain rows, with a ragged last batch: nothing contradicts."""
    batches = [(normal(n, 3, seed=n), labels(n, seed=n)) for n in (8, 8, 3)]
    return weighted(ask, mlp(), F.cross_entropy, batches, [8, 8, 3])


@case("counts", "right")
def graphs_with_counts(ask: Ask) -> Answer:
    """Graphs whose loss_fn returns (sum, count): nothing is guessed."""
    batches = [graphs([3, 4, 2, 5], 1), graphs([9, 8], 2)]
    net = mlp()
    truth = Truth(lambda: (4 * graph_loss(net, batches[0]) + 2 * graph_loss(net, batches[1])) / 6, net.parameters())
    want = torch.cat([truth.loss.reshape(1), truth.gradient])

    def f(model: Any, b: Any) -> tuple[Tensor, int]:
        return graph_loss(model, b) * len(b["y"]), len(b["y"])

    def question() -> Tensor:
        objective = ma.Objective(net, f, batches)
        return torch.cat([objective.loss().reshape(1), objective.gradient()])

    return ask(question), want, 1e-9
