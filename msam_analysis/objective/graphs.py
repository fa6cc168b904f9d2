"""Symmetric operators that are sums over batches, with products along graphs that are built once and kept.

A second derivative costs most where its graph is built. An eigensolver asks for dozens of products at one point; so the
graph of every batch is kept as long as a stated budget of memory lasts, and rebuilt at every product beyond it. Several
vectors share what is rebuilt, and small graphs take them all at once.
"""

from __future__ import annotations

import abc
import re
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msam_analysis.objective.operators import SymmetricOperator
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.objective.vectors import Layout, no_autocast, widest
from msam_analysis.results import ApproximationWarning, Settings

Wish = Literal["auto", "exact", "central"]
Product = Callable[[list[Tensor], bool, bool], list[Tensor]]

_ONCE = once_differentiable(len).__code__  # of the wrapper, the same for every function
_MISSING = re.compile(
    r"derivative for .* not implemented|once_differentiable|[Dd]ouble[ -]backward|not .*twice differentiable"
)
# Vectors go through a graph together where its nodes are so small that their number is what costs. On a CPU, graphs of
# 14 KiB to 5 MiB (perceptrons, a convolutional network, transformers) with 4 to 32 vectors were 1.1 to 8 times faster
# within these limits; beyond them anything from twice as fast to 1.6 times slower. Not measured on a GPU.
_SMALL_GRAPH, _TOGETHER, _FEWEST = 512 * 2**10, 4 * 2**20, 4
# Of the step, relative to eps^(1/3) of the weights' norm: the third derivative along the stiffest directions of trained
# networks is large. Measured in float32, it balances their truncation against the rounding along random directions.
_STEP = 0.03


class BatchLoss(NamedTuple):
    """The loss of one batch, as a function of the leaves.

    Attributes
    ----------
    value
        Mean loss, 0-dimensional.
    weight
        What the batch weighs in the mean over all.
    outputs, cuts
        If asked for: the tensors that the model put out, and the leaves that took their place in the loss.
    """

    value: Tensor
    weight: float
    outputs: tuple[Tensor, ...] = ()
    cuts: tuple[Tensor, ...] = ()


class SecondDerivatives:
    """Whether second derivatives are exact or differences: one finding for an objective and all its operators.

    Parameters
    ----------
    wish
        ``"exact"``, ``"central"``, or ``"auto"``: exact, and central differences once a layer turns out to have none.

    Attributes
    ----------
    central
        Whether they are central differences.
    error
        Of the first difference: how far it was from one of twice the step, relative to itself.

    Raises
    ------
    ValueError
        ``wish`` is none of these.
    """

    def __init__(self, wish: Wish) -> None:
        if wish not in get_args(Wish):
            raise ValueError(f"second_derivatives must be one of {get_args(Wish)}, got {wish!r}")
        self._wish = wish
        self._reason = ""
        self.central = wish == "central"
        self.error: float | None = None

    @property
    def settings(self) -> Settings:
        """What results are labelled with; nothing for exact derivatives."""
        if not self.central:
            return {}
        error: Settings = {} if self.error is None else {"error of differences": self.error}
        return {"second derivatives": "central differences", **error}

    def give_up(self, reason: str) -> None:
        """Turn to central differences; ``ValueError`` where exact derivatives were asked for."""
        if self._wish == "exact":
            raise ValueError(
                f"the loss cannot be differentiated twice ({reason}): expected layers with second derivatives; use "
                "another version of that layer, or second_derivatives='auto'"
            )
        self.central, self._reason = True, reason

    def found(self, error: float) -> None:
        """Keep the error of the first difference, and warn of it where differences were not asked for."""
        self.error = error
        if self._reason:
            warnings.warn(
                f"second derivatives are central differences of the gradient, since there are no others "
                f"({self._reason}): two steps differ by {error:.1e} of the product; use a layer with a second "
                "derivative, or dtype=torch.float64, or accept them by second_derivatives='central'",
                ApproximationWarning,
                stacklevel=2,
            )


class MissingDerivativeError(RuntimeError):
    """A layer has no second derivative."""


class DifferentiableLoss(Protocol):
    """A loss over batches, such as an objective."""

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    second_derivatives: SecondDerivatives

    @property
    def settings(self) -> Settings:
        """What operators are labelled with."""

    @property
    def seed(self) -> int:
        """Where the stream that a stochastic forward pass draws from starts."""

    @property
    def precision(self) -> torch.dtype:
        """The coarsest data type that takes part in an evaluation."""

    @property
    def batches(self) -> Sized:
        """The data."""

    def leaves(self, w: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors that make up a point, requiring gradients."""

    def constants(self, w: Tensor | None = None) -> dict[str, Tensor]:
        """Return everything else that the loss depends on, at a point."""

    def kernels(self, *, twice: bool) -> AbstractContextManager[object]:
        """Return the context that avoids kernels without the derivatives that are asked for."""

    def batch_losses(
        self,
        point: dict[str, Tensor],
        constants: dict[str, Tensor],
        stream: RandomStream,
        *,
        skip: int = 0,
        cut: bool = False,
    ) -> Iterator[BatchLoss]:
        """Yield the loss of every batch after the first ``skip``."""


class GraphOperator(SymmetricOperator):
    """``Σ_b n_b A_b / Σ_b n_b`` with symmetric ``A_b`` that are products along one graph a batch.

    Parameters
    ----------
    loss
        The loss over batches.
    w
        The point, shape ``(size,)``; ``None``: the current weights.
    keep_bytes
        Memory for kept graphs.

    Attributes
    ----------
    kept
        Number of batches whose graph is kept.
    """

    _cut = False  # whether the graph is that of a loss cut off from the model's output

    def __init__(self, loss: DifferentiableLoss, w: Tensor | None, *, keep_bytes: int) -> None:
        super().__init__(loss.layout.size, dtype=loss.dtype, device=loss.device, settings=loss.settings)
        self._loss = loss
        self._leaves = loss.leaves(w)
        self._constants = loss.constants(w)
        self._room = keep_bytes
        self._graphs: list[tuple[Product, float, int]] = []
        self._full = False
        self._checked = False
        self._together = True
        self._central = loss.second_derivatives.central

    @abc.abstractmethod
    def _product(self, loss: BatchLoss) -> Product:
        """Return the product with ``A_b`` along a graph that it builds: pieces to pieces, of one vector or of many.

        The second argument says whether they are of many, the third whether the graph is still needed afterwards.
        """

    @abc.abstractmethod
    def _difference(self, ahead: Tensor, behind: Tensor) -> Tensor:
        """Return ``A (ahead - behind)`` from first derivatives at these two points on either side of ``w``."""

    @property
    def kept(self) -> int:
        """Number of batches whose graph is kept (0 before the first product)."""
        return len(self._graphs)

    def _apply(self, vector: Tensor) -> Tensor:
        return self._apply_columns(vector[:, None])[:, 0]

    def _apply_columns(self, matrix: Tensor) -> Tensor:
        rows = matrix.T.contiguous()
        if not self._central:
            try:
                with missing_derivatives(), no_autocast(self.device):
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

        def add(product: Product, weight: float, nbytes: int, *, keep: bool = True) -> None:
            nonlocal weight_sum
            width = self._width(len(rows), nbytes)
            for start in range(0, len(rows), width):
                part = total[start : start + width]
                part.add_(self._walk(product, pieces[start : start + width], keep=keep), alpha=weight)
            weight_sum += weight

        kept = self.kept
        for graph in self._graphs:
            add(*graph)
        if kept < len(self._loss.batches):
            with torch.enable_grad(), self._loss.kernels(twice=True), RandomStream(self._loss.seed) as stream:
                losses = self._loss.batch_losses(self._leaves, self._constants, stream, skip=kept, cut=self._cut)
                for graph in self._build(losses, together=len(rows) >= _FEWEST):
                    # Freed on the way where it serves one vector.
                    add(*graph, keep=len(rows) > 1 or not self._full)
                    del graph  # before the next is built, or two would be in memory
        return total / weight_sum

    def _build(self, losses: Iterator[BatchLoss], *, together: bool) -> Iterator[tuple[Product, float, int]]:
        """Yield the products with batches, their weights and the bytes of their graphs; keep, at first, what fits."""
        meter = _GraphMeter()
        # Metering slows graphs of small nodes down, and nobody asks for the size of one that serves a single vector.
        metered = meter if together or not self._full else nullcontext()
        while True:
            with metered:
                loss = next(losses, None)
                if loss is None:
                    break
                if not self._checked:
                    check_twice_differentiable(loss)
                    self._checked = True
                product = self._product(loss)
            graph = (product, loss.weight, meter.bytes)
            if not self._full and meter.bytes <= self._room:
                self._room -= meter.bytes
                self._graphs.append(graph)
            else:
                # Only a prefix is kept, so that a later pass knows which batches to skip.
                self._full = True
            yield graph
            del graph, product, loss
        self._full = True

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
        length = float(vector.norm())
        if length == 0:
            return torch.zeros_like(vector)
        point = self._loss.layout.flatten(leaf.detach().to(self.dtype) for leaf in self._leaves.values())
        step = difference_step(self._loss.precision) * (1 + float(point.norm())) / length

        def product(step: float) -> Tensor:
            return self._difference(point + step * vector, point - step * vector) / (2 * step)

        narrow, finding = product(step), self._loss.second_derivatives
        if finding.error is None:
            finding.found(_relative(product(2 * step) - narrow, narrow))
        return narrow


def difference_step(precision: torch.dtype) -> float:
    """Return the step of a central difference, relative to ``1 + ‖w‖``: ``0.03 eps^(1/3)``.

    ``eps^(1/3)`` balances the rounding of a difference against its truncation if the third derivative is of the order
    of the first; along the stiffest directions of trained networks it is far larger.

    Raises
    ------
    ValueError
        In half precision, which has too few digits for differences.
    """
    eps = torch.finfo(precision).eps
    if eps > torch.finfo(torch.float32).eps:
        raise ValueError(
            f"central differences of a gradient in {str(precision).removeprefix('torch.')} are all rounding error: "
            "expected at least float32; make the objective with dtype=torch.float32 and without autocast"
        )
    return float(_STEP * eps ** (1 / 3))


def mean_gradient(
    loss: DifferentiableLoss, leaves: dict[str, Tensor], constants: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and its gradient, from one forward and one backward pass over every batch."""
    total = torch.zeros((), dtype=widest(loss.device), device=loss.device)
    gradient = torch.zeros(loss.layout.size, dtype=loss.dtype, device=loss.device)
    weight_sum = 0.0
    derivatives = loss.kernels(twice=False)
    with torch.enable_grad(), no_autocast(loss.device), derivatives, RandomStream(loss.seed) as stream:
        for batch in loss.batch_losses(leaves, constants, stream):
            gradient.add_(loss.layout.flatten(loss_gradients(batch.value, leaves)), alpha=batch.weight)
            total += batch.value.detach().to(total.dtype) * batch.weight
            weight_sum += batch.weight
    return total / weight_sum, gradient / weight_sum


def loss_gradients(value: Tensor, leaves: dict[str, Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Return ``∂value/∂leaf`` for every leaf, zeros for those that the loss does not use.

    Raises
    ------
    ValueError
        It uses none of them, or gradients are switched off for good by ``torch.inference_mode``.
    """
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
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(found, leaves.values(), strict=True)
    ]


def pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], *, together: bool, keep: bool = True
) -> list[Tensor]:
    """Return ``∂(outputs · weights)/∂inputs``, zeros where there is no dependence.

    Parameters
    ----------
    outputs, inputs
        Ends and beginnings of a graph; outputs that are constant contribute nothing.
    weights
        One for each output, of its shape, behind a leading dimension if ``together``.
    together
        Whether the weights are those of several vectors.
    keep
        Whether the graph stays.

    Returns
    -------
    list
        One tensor for each input, of its shape, behind the same leading dimension.
    """
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


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.norm()) / max(float(reference.norm()), torch.finfo(reference.dtype).tiny)


@contextmanager
def missing_derivatives() -> Iterator[None]:
    """Tell a layer without a second derivative from other errors."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, MissingDerivativeError) or not _MISSING.search(str(error)):
            raise
        raise MissingDerivativeError(str(error).split("\n", maxsplit=1)[0]) from error


def check_twice_differentiable(loss: BatchLoss) -> None:
    """Raise if a function marked ``once_differentiable`` took part; autograd would leave it out."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in (loss.value, *loss.outputs)]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", type(node))  # of functions written in Python
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            raise MissingDerivativeError(f"{function.__name__} is marked once_differentiable")
        waiting.extend(parent for parent, _ in node.next_functions)


class _GraphMeter:
    """Counts the bytes that autograd saves inside ``with meter:``."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}

    def __enter__(self) -> None:
        self._storages = {}
        # Packing must not hold the tensor itself, or the graph would keep itself alive.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    @property
    def bytes(self) -> int:
        """Bytes of distinct storages saved since the last entry; 0 before the first."""
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()
