"""The loss as a function of the weights, with its derivatives, for any model and any data.

An objective never touches the model it was given. It evaluates a private skeleton of the model (same parameters, own
modes and hooks) through :func:`torch.func.functional_call` on views of one flat vector, with copies of the buffers; so
nothing has to be restored afterwards, whatever is raised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from msam_analysis.batches import Batch, Batches, count_samples
from msam_analysis.batchnorm import (
    Policy,
    batchnorm_layers,
    blank_statistics,
    check_policy,
    collect_statistics,
    use_batch_statistics,
)
from msam_analysis.operators import SymmetricOperator
from msam_analysis.randomness import RandomStream
from msam_analysis.results import Settings
from msam_analysis.vectors import Layout, Selection, select

LossFunction = Callable[..., Tensor | tuple[Tensor, Tensor | float]]

_GRAPH_BYTES = 2 * 2**30


class Objective:
    r"""The full-data loss ``L(w) = Σ_b n_b ℓ_b(w) / Σ_b n_b`` of a model, seen as a function of a flat vector.

    ``ℓ_b`` is the mean loss of batch ``b`` and ``n_b`` its number of samples, so that a ragged last batch weighs what
    it holds. Sums are accumulated in float64 (float32 where a device has no float64).

    Parameters
    ----------
    model
        Any module; it is not modified. Wrappers of ``torch.compile`` and ``DistributedDataParallel`` are looked
        through.
    loss_fn
        ``criterion(output, target)`` for batches ``(input, target)``; ``loss_fn(model, batch)`` for batches of any
        other kind. It returns a mean over the batch's samples, or a pair ``(sum, count)``, for example over tokens.
    data
        A loader that does not shuffle, a list of batches, or one batch.
    batchnorm
        ``"eval"`` (default: the running statistics), ``"batch"`` or ``"recalibrate"``;
        see :mod:`msam_analysis.batchnorm`.
    parameters
        Which parameters the vector holds: ``None`` for every one with ``requires_grad``, name patterns, or a predicate.
        All others stay at their current values.
    device, dtype
        Where and in what precision to evaluate; default: those of the model's parameters. ``torch.float64`` is the
        way to reference values. Floating-point inputs are cast to ``dtype`` when it is given.
    graph_bytes
        Memory that kept gradient graphs may take in :meth:`hessian`; default 2 GiB. More batches kept means faster
        Hessian-vector products (about 2.2 gradients instead of 3.8); the others are rebuilt at every product.
    seed
        Of the private random stream that a stochastic forward pass draws from, the same at every evaluation.

    Attributes
    ----------
    layout
        Names and shapes behind the flat vector.
    batches
        The data.
    settings
        The choices above in plain values; printed with every result.

    Raises
    ------
    TypeError
        The model is no module, or the data is not batches.
    ValueError
        The data is empty or not repeatable, the policy unknown, or nothing is selected.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: object,
        *,
        batchnorm: Policy = "eval",
        parameters: Selection = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        graph_bytes: int = _GRAPH_BYTES,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass the network itself")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}: pass e.g. nn.CrossEntropyLoss()")
        check_policy(batchnorm)
        self.model = _unwrap(model)
        self.loss_fn = loss_fn
        self.batchnorm = batchnorm
        self.parameters = select(self.model, parameters)
        first = next(iter(self.parameters.values()))
        self.device = torch.device(device) if device is not None else first.device
        self.dtype = dtype if dtype is not None else first.dtype
        self._cast = dtype
        self._graph_bytes = graph_bytes
        self._seed = seed
        self.layout = Layout(tuple(self.parameters), tuple(p.shape for p in self.parameters.values()))
        self.batches = Batches(data, device=self.device, dtype=dtype)
        self._skeleton = _private_copy(self.model)
        self._skeleton.eval()
        if batchnorm == "batch":
            use_batch_statistics(self._skeleton)
        self._loss_module = _LossModule(self._skeleton, loss_fn)
        self._sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64

    @property
    def size(self) -> int:
        """Number of entries of the flat vector."""
        return self.layout.size

    @property
    def samples(self) -> int:
        """Number of samples the loss is a mean over."""
        return self.batches.samples

    @property
    def settings(self) -> Settings:
        """What every result made from this objective is labelled with."""
        return {
            "batchnorm": self.batchnorm if batchnorm_layers(self._skeleton) else "no BatchNorm",
            "samples": self.samples,
            "batches": len(self.batches),
            "parameters": self.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
        }

    def point(self) -> Tensor:
        """Return a copy of the model's current weights, shape ``(size,)``."""
        flat = self.layout.flatten(p.detach() for p in self.parameters.values())
        return flat.to(device=self.device, dtype=self.dtype)

    def vector(self, tensors: Mapping[Any, Tensor]) -> Tensor:
        """Return the flat vector of tensors keyed by parameter (the object) or by its name; zeros where there is none.

        Parameters
        ----------
        tensors
            Parameter, or parameter name, to a tensor of the parameter's shape.

        Returns
        -------
        Tensor
            Shape ``(size,)``.

        Raises
        ------
        ValueError
            A tensor's shape differs from its parameter's, or none of the keys belongs to this objective.
        """
        pieces, found = [], 0
        for name, parameter in self.parameters.items():
            tensor = next((tensors[key] for key in (parameter, name) if key in tensors), None)
            if tensor is None:
                tensor = torch.zeros_like(parameter)
            elif tensor.shape != parameter.shape:
                raise ValueError(f"expected shape {tuple(parameter.shape)} for {name!r}, got {tuple(tensor.shape)}")
            else:
                found += 1
            pieces.append(tensor.detach().to(device=self.device, dtype=self.dtype))
        if tensors and not found:
            raise ValueError(
                "none of the tensors belongs to a parameter of this objective: expected the same model's parameters; "
                "build the objective and the optimizer from one model"
            )
        return self.layout.flatten(pieces)

    def loss(self, w: Tensor | None = None) -> Tensor:
        """Return ``L(w)``.

        Parameters
        ----------
        w
            Shape ``(size,)``; default: the current weights.

        Returns
        -------
        Tensor
            0-dimensional, float64. NaN and infinity are returned as they are.

        Raises
        ------
        ValueError
            ``w`` has another shape, or the loss is not a scalar.
        """
        with torch.no_grad():
            views = self._views(w)
            total = torch.zeros((), dtype=self._sum_dtype, device=self.device)
            weight_sum = 0.0
            for value, weight in self._batch_losses(views, views):
                total += value.to(total.dtype) * weight
                weight_sum += weight
        return total / weight_sum

    def gradient(self, w: Tensor | None = None) -> Tensor:
        """Return ``∇L(w)``, shape ``(size,)``, zeros for parameters that the loss does not use; see :meth:`loss`."""
        return self.loss_and_gradient(w)[1]

    def loss_and_gradient(self, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return ``L(w)`` and ``∇L(w)`` from one forward and one backward pass; otherwise as :meth:`loss`.

        Raises
        ------
        ValueError
            Also if the loss depends on none of the selected parameters.
        """
        leaves = self._leaves(w)
        total = torch.zeros((), dtype=self._sum_dtype, device=self.device)
        gradient = torch.zeros(self.size, dtype=self._accumulator, device=self.device)
        weight_sum = 0.0
        with torch.enable_grad():
            for value, weight in self._batch_losses(leaves, leaves):
                pieces = _gradients(value, leaves)
                gradient.add_(self.layout.flatten(pieces), alpha=weight)
                total += value.detach().to(total.dtype) * weight
                weight_sum += weight
        return total / weight_sum, (gradient / weight_sum).to(self.dtype)

    def hvp(self, v: Tensor, w: Tensor | None = None) -> Tensor:
        """Return the Hessian-vector product ``∇²L(w) v``.

        For many products at one point use :meth:`hessian`, which keeps the gradient's graph.

        Parameters
        ----------
        v
            Shape ``(size,)``.
        w
            Shape ``(size,)``; default: the current weights.

        Returns
        -------
        Tensor
            Shape ``(size,)``.
        """
        self.layout.check(v, "direction v")
        return HessianOperator(self, w, keep_bytes=0).matvec(v)

    def hessian(self, w: Tensor | None = None) -> HessianOperator:
        """Return ``∇²L(w)`` as an operator that keeps the gradient's graph within ``graph_bytes``.

        The operator is a snapshot: it does not follow later changes of the weights.
        """
        return HessianOperator(self, w, keep_bytes=self._graph_bytes)

    @property
    def _accumulator(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _flat(self, w: Tensor | None) -> Tensor:
        if w is None:
            return self.point()
        self.layout.check(w, "point w")
        return w.detach().to(device=self.device, dtype=self.dtype)

    def _views(self, w: Tensor | None) -> dict[str, Tensor]:
        return self.layout.views(self._flat(w))

    def _leaves(self, w: Tensor | None) -> dict[str, Tensor]:
        # Views of one vector would each send back a vector of full length; leaves send back their own piece.
        return {name: view.detach().clone().requires_grad_() for name, view in self._views(w).items()}

    def _constants(self) -> dict[str, Tensor]:
        """Return copies of the buffers, and the parameters outside the selection, as constants."""
        fixed = {
            name: parameter.detach() for name, parameter in self.model.named_parameters() if name not in self.parameters
        }
        buffers = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        return {name: self._converted(tensor) for name, tensor in (fixed | buffers).items()}

    def _converted(self, tensor: Tensor) -> Tensor:
        dtype = self._cast if self._cast is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=self.device, dtype=dtype)

    def _batch_losses(
        self, point: dict[str, Tensor], leaves: dict[str, Tensor], *, skip: int = 0
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield the mean loss and the weight of every batch after the first ``skip``."""
        constants = self._constants()
        if self.batchnorm == "recalibrate":
            constants = self._recalibrated(point, constants)
        for index, batch in enumerate(self.batches):
            if index < skip:
                continue
            # Buffers are fresh for every batch, so that no batch sees what another wrote.
            own = {name: tensor.clone() for name, tensor in constants.items()} if len(self.batches) > 1 else constants
            with RandomStream(self._seed + index):
                yielded = self._evaluate(leaves | own, batch)
            yield yielded

    def _evaluate(self, tensors: dict[str, Tensor], batch: Batch) -> tuple[Tensor, float]:
        returned = functional_call(self._loss_module, {f"model.{name}": t for name, t in tensors.items()}, (batch,))
        if isinstance(returned, tuple):
            total, count = returned
            weight = float(count)
            if not weight > 0:
                raise ValueError(f"loss_fn returned (sum, count) with count {weight:g}: expected a positive count")
            return _scalar(total, "a sum") / weight, weight
        return _scalar(returned, "a mean loss"), float(count_samples(batch))

    def _recalibrated(self, point: dict[str, Tensor], constants: dict[str, Tensor]) -> dict[str, Tensor]:
        fresh = blank_statistics(self._skeleton, constants)
        fixed = {name: tensor.detach() for name, tensor in point.items()} | fresh
        collect_statistics(self._skeleton, collect=True)
        try:
            with torch.no_grad(), RandomStream(self._seed):
                for batch in self.batches:
                    self._evaluate(fixed, batch)
        finally:
            collect_statistics(self._skeleton, collect=False)
        return fresh


class HessianOperator(SymmetricOperator):
    """``∇²L(w)`` of an objective; products with it reuse the gradient's graph batch by batch.

    Products cost about 2.2 gradients for every batch whose graph is kept, 3.8 for the others (measured on a small
    convolutional network on a CPU).

    Parameters
    ----------
    objective
        The objective.
    w
        Shape ``(size,)``; default: the current weights.
    keep_bytes
        Memory for kept graphs.

    Attributes
    ----------
    kept
        Number of batches whose graph is kept.
    """

    def __init__(self, objective: Objective, w: Tensor | None = None, *, keep_bytes: int = _GRAPH_BYTES) -> None:
        super().__init__(objective.size, dtype=objective.dtype, device=objective.device, settings=objective.settings)
        self._objective = objective
        self._leaves = objective._leaves(w)
        self._room = keep_bytes
        self._graphs: list[tuple[list[Tensor], float]] = []
        self._complete = False

    @property
    def kept(self) -> int:
        """Number of batches whose graph is kept (0 before the first product)."""
        return len(self._graphs)

    def _apply(self, vector: Tensor) -> Tensor:
        layout, leaves = self._objective.layout, list(self._leaves.values())
        total = torch.zeros(self.size, dtype=self._objective._accumulator, device=self.device)
        pieces = list(layout.views(vector).values())
        weight_sum = 0.0
        for gradients, weight in self._batch_gradients():
            product = _vector_product(gradients, leaves, pieces)
            total.add_(layout.flatten(product), alpha=weight)
            weight_sum += weight
        return (total / weight_sum).to(self.dtype)

    def _batch_gradients(self) -> Iterator[tuple[list[Tensor], float]]:
        """Yield every batch's gradient with its graph; keep, on the first pass, those that fit."""
        kept = len(self._graphs)
        yield from self._graphs[:kept]
        if kept == len(self._objective.batches):
            return
        point = {name: leaf.detach() for name, leaf in self._leaves.items()}
        # Fused attention kernels have no second derivative; the math kernel has.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            meter = _GraphMeter()
            losses = self._objective._batch_losses(point, self._leaves, skip=kept)
            while True:
                with meter:
                    value, weight = next(losses, (None, 0.0))
                    if value is None:
                        break
                    gradients = _gradients(value, self._leaves, create_graph=True)
                if not self._complete and meter.bytes <= self._room:
                    self._room -= meter.bytes
                    self._graphs.append((gradients, weight))
                else:
                    # Only a prefix is kept, so that a later pass knows which batches to skip.
                    self._complete = True
                yield gradients, weight
        self._complete = True


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


class _LossModule(nn.Module):
    """Batch in, loss out: so that a point can be put in place of every tensor of the model while the loss runs."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor | float]:
        """Return what ``loss_fn`` returns."""
        if isinstance(batch, list | tuple) and len(batch) == 2:
            return self.loss_fn(self.model(batch[0]), batch[1])
        return self.loss_fn(self.model, batch)


def _unwrap(model: nn.Module) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else model


def _private_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the modules that shares every parameter and buffer with the original."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise ValueError(
            f"the model cannot be copied ({type(error).__name__}: {error}): expected a module that copy.deepcopy "
            "accepts; remove attributes that hold open files, locks or tensors with a history"
        ) from error


def _scalar(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss_fn must return {what} as one number, got {came}: use reduction='mean', or return (sum, count)"
        )
    return value.reshape(())


def _gradients(value: Tensor, leaves: dict[str, Tensor], *, create_graph: bool = False) -> list[Tensor]:
    if not value.requires_grad:
        raise ValueError(
            f"the loss depends on none of the {len(leaves)} selected parameters ({', '.join(list(leaves)[:3])}, "
            "...): expected "
            "a differentiable loss of them; select other parameters, and check that nothing detaches or runs "
            "under no_grad"
        )
    return list(
        torch.autograd.grad(
            value, list(leaves.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
    )


def _vector_product(gradients: list[Tensor], leaves: list[Tensor], pieces: list[Tensor]) -> list[Tensor]:
    """Return ``∂(gradients · pieces)/∂leaves``; a gradient that is constant contributes nothing."""
    varying = [(gradient, piece) for gradient, piece in zip(gradients, pieces, strict=True) if gradient.requires_grad]
    if not varying:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, weights = zip(*varying, strict=True)
    return list(
        torch.autograd.grad(
            outputs, leaves, grad_outputs=weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )
