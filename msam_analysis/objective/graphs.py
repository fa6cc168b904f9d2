"""Symmetric operators that are sums over batches, with products along graphs that are built once and kept.

A second derivative costs most where its graph is built. An eigensolver asks for dozens of products at one point; so the
graph of every batch is kept as long as a stated budget of memory lasts, and rebuilt at every product beyond it. Several
vectors share what is rebuilt, and small graphs take them all at once.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msam_analysis.objective.evaluation import BatchLoss, Evaluation
from msam_analysis.objective.examination import ExaminationError
from msam_analysis.objective.memory import Memory
from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.randomness import ALONE
from msam_analysis.objective.second_derivatives import (
    MissingDerivativeError,
    check_twice_differentiable,
    difference_step,
    missing_derivatives,
)
from msam_analysis.objective.vectors import no_autocast, widest
from msam_analysis.results import Settings

Product = Callable[[list[Tensor], bool, bool], list[Tensor]]

# Vectors go through a graph together where its nodes are so small that their number is what costs. On a CPU, graphs of
# 14 KiB to 5 MiB (perceptrons, a convolutional network, transformers) with 4 to 32 vectors were 1.1 to 8 times faster
# within these limits. Beyond them they were up to twice as fast or up to 1.6 times slower. No GPU was measured.
_SMALL_GRAPH, _TOGETHER, _FEWEST = 512 * 2**10, 4 * 2**20, 4


class _Graph(NamedTuple):
    """The products with one batch."""

    product: Product
    weight: float  # of the batch in the mean
    scale: float  # by what products are multiplied in the sum
    nbytes: int


class GraphOperator(SymmetricOperator):
    """``Σ_b n_b A_b / Σ_b n_b`` with symmetric ``A_b``, whose products go along one graph for each batch."""

    _cut = False  # whether the graph is that of a loss cut off from the model's output

    def __init__(self, loss: Evaluation, w: Tensor | None, *, memory: Memory, settings: Settings) -> None:
        super().__init__(loss.space, dtype=loss.dtype, device=loss.device, settings=settings)
        for refusal in (loss.findings.refusal, loss.second_derivatives.refusal):
            if refusal:
                raise ExaminationError(refusal)
        self._loss = loss
        with loss.ranks.apart("an operator at a point"):
            self._leaves = loss.leaves(w)
            self._constants = loss.constants(w)
        self._room, self.memory_bytes = memory.graphs, memory.vectors
        self._graphs: list[_Graph] = []
        self._full = False
        self._complete = False  # whether every batch's graph is kept
        self._checked = False
        self._passed = False
        self._together = loss.shards is None  # collectives take one vector at a time
        self._central = loss.second_derivatives.central

    @abc.abstractmethod
    def _product(self, loss: BatchLoss) -> Product:
        """Build a graph; return products along it: (pieces, of many vectors?, keep the graph?) to pieces."""

    @abc.abstractmethod
    def _difference(self, ahead: Tensor, behind: Tensor) -> Tensor:
        """Return ``A (ahead - behind)`` from first derivatives at these two points around ``w``."""

    @property
    def kept(self) -> int:
        """Number of batches whose graph is kept (0 before the first product)."""
        return len(self._graphs)

    def _apply(self, vector: Tensor) -> Tensor:
        return self._apply_columns(vector[:, None])[:, 0]

    def _apply_columns(self, matrix: Tensor) -> Tensor:
        with ALONE:  # what is in place when a checkpointed part runs again must be this point's
            return self._products(matrix)

    def _products(self, matrix: Tensor) -> Tensor:
        rows = matrix.T.contiguous()
        if not self._central:
            try:
                with missing_derivatives(), no_autocast(self.device):  # the caller's autocast reaches kept graphs, too
                    return self._along_graphs(rows).T
            except MissingDerivativeError as missing:
                self._loss.second_derivatives.give_up(str(missing))
                self._central = True
                self._graphs.clear()
        products = torch.stack([self._by_differences(row) for row in rows], dim=1)
        self.settings.update(self._loss.second_derivatives.settings)
        return products

    def _along_graphs(self, rows: Tensor) -> Tensor:
        total = torch.zeros(rows.shape, dtype=self.dtype, device=self.device)
        pieces = [list(self._loss.layout.views(row).values()) for row in rows]
        weight_sum = 0.0

        def add(graph: _Graph, *, keep: bool = True) -> None:
            nonlocal weight_sum
            width = self._width(len(rows), graph.nbytes)
            for start in range(0, len(rows), width):
                part = total[start : start + width]
                part.add_(self._walk(graph.product, pieces[start : start + width], keep=keep), alpha=graph.scale)
            weight_sum += graph.weight

        kept = self.kept
        with self._loss.apart("products of second derivatives") as alike:
            alike.extend([rows] if self._passed else [rows, *self._leaves.values()])
            # A checkpointed part of the model is run again at every product: it must find this point's tensors.
            self._loss.settle(self._leaves, self._constants)
            for graph in self._graphs:
                add(graph)
            if not self._complete:
                with self._loss.deriving(twice=True) as stream:
                    losses = self._loss.batch_losses(self._leaves, self._constants, stream, skip=kept, cut=self._cut)
                    for graph in self._build(losses, together=len(rows) >= _FEWEST):
                        # A graph that serves one vector is freed on the way.
                        add(graph, keep=len(rows) > 1 or not self._full)
                        del graph  # before the next is built, or two would be in memory
        if self._loss.shards is not None:
            self._loss.shards.gatherer.release()
        (mean,) = self._loss.mean(weight_sum, total)
        return mean

    def _build(self, losses: Iterator[BatchLoss], *, together: bool) -> Iterator[_Graph]:
        """Yield the products with batches, their weights and the bytes of their graphs; keep, at first, what fits."""
        shards = self._loss.shards
        meter = _GraphMeter() if shards is None else _GraphMeter(shards.gatherer.pack, shards.gatherer.unpack)
        # Metering slows graphs of small nodes down, and nobody asks for the size of one that serves a single vector.
        metered = meter if together or not self._full else nullcontext()
        total = torch.zeros((), device=self.device)
        while True:
            with metered:
                loss = next(losses, None)
                if loss is None:
                    break
                total = total + loss.value.detach()
                if not self._checked:
                    check_twice_differentiable((loss.value, *loss.outputs))
                    self._checked = True
                product = self._product(loss)
            # Processes that share the weights keep the same graphs, or they would wait for each other.
            nbytes = meter.bytes if shards is None else shards.mesh.most(meter.bytes, self.device)
            graph = _Graph(product, loss.weight, loss.scale, nbytes)
            if not self._full and nbytes <= self._room:
                self._room -= nbytes
                self._graphs.append(graph)
            else:
                # Only a prefix is kept, so that a later pass knows which batches to skip.
                self._full = True
            yield graph
            del graph, product, loss
        first, self._passed = not self._passed, True
        self._full, self._complete = True, not self._full
        if first and not bool(torch.isfinite(total)):
            raise ValueError(
                "the loss is NaN or infinite at these weights: expected a finite one, which has derivatives; look for "
                "the batch that makes it so"
            )

    def _width(self, count: int, nbytes: int) -> int:
        """Return how many vectors go through a graph of this size together."""
        width = min(count, _TOGETHER // max(nbytes, 1)) if self._together and nbytes <= _SMALL_GRAPH else 1
        return width if width >= _FEWEST else 1

    def _walk(self, product: Product, pieces: list[list[Tensor]], *, keep: bool) -> Tensor:
        """Return the products with some vectors, given in pieces, as rows."""
        layout = self._loss.layout
        if len(pieces) == 1:
            return layout.flatten(product(pieces[0], False, keep))
        try:
            walked = product([torch.stack(column) for column in zip(*pieces, strict=True)], True, keep)
        except RuntimeError:  # a layer that takes one vector only
            self._together = False
            return torch.stack([self._walk(product, [piece], keep=keep) for piece in pieces])
        return torch.cat([part.flatten(1) if part.ndim > 1 else part[:, None] for part in walked], dim=1)

    def _by_differences(self, vector: Tensor) -> Tensor:
        length = float(self.space.norm(vector))
        if length == 0:
            return torch.zeros_like(vector)
        point = self._loss.layout.flatten(leaf.detach().to(self.dtype) for leaf in self._leaves.values())
        step = difference_step(self._loss.precision) * (1 + float(self.space.norm(point))) / length

        def product(step: float) -> Tensor:
            return self._difference(point + step * vector, point - step * vector) / (2 * step)

        narrow, finding = product(step), self._loss.second_derivatives
        if finding.error is None:
            norm = self.space.norm
            size = max(float(norm(narrow)), torch.finfo(self.dtype).tiny)
            finding.found(float(norm(product(2 * step) - narrow)) / size)
        return narrow


def mean_loss(loss: Evaluation, w: Tensor | None) -> Tensor:
    """Return the mean loss at a point, from one forward pass over every batch."""
    total, weight_sum = torch.zeros((), dtype=widest(loss.device), device=loss.device), 0.0
    with loss.apart("a loss") as alike:
        point, constants = loss.pieces(w), loss.constants(w)
        alike.extend(point.values())
        with loss.evaluating() as stream:
            for batch in loss.batch_losses(point, constants, stream):
                total += batch.value.detach().to(total.dtype) * batch.weight
                weight_sum += batch.weight
    (mean,) = loss.mean(weight_sum, total)
    return mean


def mean_gradient(loss: Evaluation, leaves: dict[str, Tensor], constants: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean loss and its gradient, from one forward and one backward pass over every batch."""
    if loss.findings.refusal:
        raise ExaminationError(loss.findings.refusal)
    total = torch.zeros((), dtype=widest(loss.device), device=loss.device)
    gradient = torch.zeros(loss.space.here, dtype=loss.dtype, device=loss.device)
    weight_sum = 0.0
    with loss.apart("a gradient") as alike, loss.deriving() as stream:
        alike.extend(leaves.values())
        for batch in loss.batch_losses(leaves, constants, stream):
            gradient.add_(loss.layout.flatten(loss_gradients(batch.term, leaves)), alpha=batch.scale)
            total += batch.value.detach().to(total.dtype) * batch.weight
            weight_sum += batch.weight
    value, slope = loss.mean(weight_sum, total, gradient)
    return value, slope


def loss_gradients(value: Tensor, leaves: dict[str, Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return ``∂value/∂leaf`` for every leaf, zeros where there is none; ``ValueError`` if there is none at all."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "gradients do not exist inside torch.inference_mode(): expected to be called outside of it; leave it, or "
            "use torch.no_grad(), which is no obstacle"
        )
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if value.requires_grad:
        found = torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ValueError(
            f"the loss depends on none of the {len(leaves)} selected parameters ({', '.join(list(leaves)[:3])}, "
            "...): expected "
            "a differentiable loss of them; select other parameters, and check that loss_fn uses the model it is given "
            "and that nothing detaches or runs under no_grad"
        )
    return [
        torch.zeros_like(leaf)
        if gradient is None
        else gradient
        if gradient.layout == leaf.layout
        else gradient.to_dense()
        for gradient, leaf in zip(found, leaves.values(), strict=True)
    ]


def pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], *, together: bool, keep: bool = True
) -> list[Tensor]:
    """Return ``∂(outputs · weights)/∂inputs``, zeros where there is none; ``together``: of many weights at once."""
    varying = [
        (output, weight.to(output.dtype))
        for output, weight in zip(outputs, weights, strict=True)
        if output.requires_grad
    ]
    found: tuple[Tensor | None, ...] = (None,) * len(inputs)
    if varying:
        ends, cotangents = zip(*varying, strict=True)
        found = torch.autograd.grad(
            ends, inputs, grad_outputs=cotangents, retain_graph=keep, allow_unused=True, is_grads_batched=together
        )
    lead = weights[0].shape[:1] if together else ()
    return [
        start.new_zeros((*lead, *start.shape)) if piece is None else piece
        for piece, start in zip(found, inputs, strict=True)
    ]


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _GraphMeter:
    """Counts the bytes of tensors that autograd saves inside ``with meter:``, as ``pack`` makes them."""

    def __init__(self, pack: Callable[[Tensor], Any] = Tensor.detach, unpack: Callable[[Any], Tensor] = _same) -> None:
        self._storages: dict[int, int] = {}
        self._kept, self._unpack = pack, unpack

    def __enter__(self) -> None:
        self._storages = {}
        # Packing must not hold the tensor itself, or the graph would keep itself alive.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    @property
    def bytes(self) -> int:
        """Bytes of distinct storages saved since the last entry; 0 before the first."""
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Any:
        kept = self._kept(tensor)
        if isinstance(kept, Tensor):
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return kept
