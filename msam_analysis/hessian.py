"""Derivatives of a loss over batches: gradients that may keep their graph, and the Hessian as an operator on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from msam_analysis.operators import SymmetricOperator
from msam_analysis.randomness import RandomStream
from msam_analysis.results import Settings
from msam_analysis.vectors import Layout

BatchLosses = Callable[[RandomStream, int], Iterator[tuple[Tensor, float]]]

_ONCE = once_differentiable(len).__code__  # of the wrapper, the same for every function


class HessianOperator(SymmetricOperator):
    """``∇²L(w)`` of a loss over batches; products with it reuse the gradient's graph batch by batch.

    Products cost about 2.2 gradients for every batch whose graph is kept, 3.8 for the others (measured on a small
    convolutional network on a CPU).

    Parameters
    ----------
    losses
        ``losses(stream, skip)`` yields the mean loss, as a function of ``leaves``, and the weight of every batch after
        the first ``skip``.
    leaves
        The tensors that make up ``w``, requiring gradients.
    layout
        Their places in the flat vector.
    batches
        Number of batches.
    seed
        Of the stream that a stochastic forward pass draws from.
    keep_bytes
        Memory for kept graphs.
    dtype, device, settings
        See :class:`~msam_analysis.operators.SymmetricOperator`.

    Attributes
    ----------
    kept
        Number of batches whose graph is kept.

    Raises
    ------
    ValueError
        At the first product, if the loss depends on none of the leaves, or cannot be differentiated twice.
    """

    def __init__(
        self,
        losses: BatchLosses,
        leaves: dict[str, Tensor],
        *,
        layout: Layout,
        batches: int,
        seed: int,
        keep_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        settings: Settings,
    ) -> None:
        super().__init__(layout.size, dtype=dtype, device=device, settings=settings)
        self._losses = losses
        self._leaves = leaves
        self._layout = layout
        self._batches = batches
        self._seed = seed
        self._room = keep_bytes
        self._graphs: list[tuple[list[Tensor], float]] = []
        self._full = False
        self._checked = False

    @property
    def kept(self) -> int:
        """Number of batches whose graph is kept (0 before the first product)."""
        return len(self._graphs)

    def _apply(self, vector: Tensor) -> Tensor:
        leaves, pieces = list(self._leaves.values()), list(self._layout.views(vector).values())
        total = torch.zeros(self.size, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        weight_sum = 0.0

        def add(gradients: list[Tensor], weight: float) -> None:
            nonlocal weight_sum
            total.add_(self._layout.flatten(_vector_product(gradients, leaves, pieces)), alpha=weight)
            weight_sum += weight

        kept = self.kept
        with no_autocast(self.device):
            for gradients, weight in self._graphs:
                add(gradients, weight)
            if kept < self._batches:
                # Fused attention kernels have no second derivative; the math kernel has.
                with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), RandomStream(self._seed) as stream:
                    for gradients, weight in self._build(self._losses(stream, kept)):
                        add(gradients, weight)
        return (total / weight_sum).to(self.dtype)

    def _build(self, losses: Iterator[tuple[Tensor, float]]) -> Iterator[tuple[list[Tensor], float]]:
        """Yield the gradients of batches with their graphs; keep, on the first pass, those that fit."""
        meter = _GraphMeter()
        while True:
            with meter:
                value, weight = next(losses, (None, 0.0))
                if value is None:
                    break
                if not self._checked:
                    _check_twice_differentiable(value)
                    self._checked = True
                gradients = loss_gradients(value, self._leaves, create_graph=True)
            if not self._full and meter.bytes <= self._room:
                self._room -= meter.bytes
                self._graphs.append((gradients, weight))
            else:
                # Only a prefix is kept, so that a later pass knows which batches to skip.
                self._full = True
            yield gradients, weight
        self._full = True


def no_autocast(device: torch.device) -> torch.autocast:
    """Return the context in which a caller's autocast does not reach forward and backward passes."""
    return torch.autocast(device.type, enabled=False)


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


def _vector_product(gradients: list[Tensor], leaves: list[Tensor], pieces: list[Tensor]) -> list[Tensor]:
    """Return ``∂(gradients · pieces)/∂leaves``; a gradient that is constant contributes nothing."""
    varying = [
        (gradient, piece.to(gradient.dtype))
        for gradient, piece in zip(gradients, pieces, strict=True)
        if gradient.requires_grad
    ]
    if not varying:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, weights = zip(*varying, strict=True)
    return list(
        torch.autograd.grad(
            outputs, leaves, grad_outputs=weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def _check_twice_differentiable(value: Tensor) -> None:
    """Raise ``ValueError`` if a function marked ``once_differentiable`` took part; autograd would leave it out."""
    seen: set[Any] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", type(node))  # of functions written in Python
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            raise ValueError(
                f"the loss cannot be differentiated twice: {function.__name__} is marked once_differentiable, and its "
                "curvature would be left out; use a version of that layer with a second derivative"
            )
        waiting.extend(parent for parent, _ in node.next_functions)


class _GraphMeter:
    """Counts the bytes that autograd saves inside ``with meter:``."""

    def __enter__(self) -> None:
        self._storages: dict[int, int] = {}
        # Packing must not hold the tensor itself, or the graph would keep itself alive.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()

    def __exit__(self, *_: object) -> None:
        self._hooks.__exit__()

    @property
    def bytes(self) -> int:
        """Bytes of distinct storages saved since the last entry."""
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()
