"""The loss as a function of the weights, with its derivatives, for any model and any data.

An objective never touches the model it was given. It evaluates a private skeleton of the model (same parameters, own
modes, no hooks) through :func:`torch.func.functional_call` on views of one flat vector, with copies of the buffers; so
nothing has to be restored afterwards, whatever is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from msam_analysis.batches import Batch, Batches, count_samples
from msam_analysis.batchnorm import (
    Policy,
    blank_statistics,
    check_policy,
    collect_statistics,
    describe_policy,
    use_batch_statistics,
)
from msam_analysis.hessian import HessianOperator, loss_gradients, no_autocast
from msam_analysis.randomness import RandomStream
from msam_analysis.results import Settings
from msam_analysis.skeleton import LossFunction, LossModule, unwrap
from msam_analysis.vectors import Layout, Selection, select, widest

_GRAPH_BYTES = 2 * 2**30


class Objective:
    r"""The full-data loss ``L(w) = Σ_b n_b ℓ_b(w) / Σ_b n_b`` of a model, seen as a function of a flat vector.

    ``ℓ_b`` is the mean loss of batch ``b`` and ``n_b`` its number of samples, so that a ragged last batch weighs what
    it holds. Sums are accumulated in float64 (float32 where a device has no float64).

    Parameters
    ----------
    model
        Any module; it is not modified. Wrappers of ``torch.compile`` and ``DistributedDataParallel`` are looked
        through. It is evaluated in evaluation mode, without the hooks that were registered on it (except those of
        :mod:`torch.nn.utils`, which compute weights): an operation that belongs to the function belongs in
        ``forward``. ``torch.autocast`` around a measurement has no effect; inside ``forward`` it has.
    loss_fn
        ``criterion(output, target)`` for batches ``(input, target)``; ``loss_fn(model, batch)`` for batches of any
        other kind. It returns a mean over the batch's samples, or a pair ``(sum, count)``, for example over tokens.
        If it is a module, its tensors follow ``device`` and ``dtype``.
    data
        A loader that does not shuffle, a list of batches, or one batch; see :class:`~msam_analysis.batches.Batches`.
    batchnorm
        ``"eval"`` (default: the running statistics), ``"batch"`` or ``"recalibrate"``;
        see :mod:`msam_analysis.batchnorm`.
    parameters
        Which parameters the vector holds: ``None`` for every one with ``requires_grad``, name patterns, or a predicate.
        All others stay at their current values.
    device, dtype
        Where and in what precision to evaluate; default: those of the model's parameters. ``torch.float64`` is the
        way to reference values. When ``dtype`` is given, everything of floating point is cast to it; otherwise every
        parameter is evaluated in its own precision, and the flat vector has the widest of them.
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
        self.model = unwrap(model)
        self.loss_fn = loss_fn
        self.batchnorm = batchnorm
        chosen = select(self.model, parameters)
        self.layout = Layout(tuple(chosen), tuple(p.shape for p in chosen.values()))
        self._dtypes = {name: dtype or p.dtype for name, p in chosen.items()}
        self.device = torch.device(device) if device is not None else next(iter(chosen.values())).device
        self.dtype = reduce(torch.promote_types, self._dtypes.values())
        self._cast = dtype
        self._graph_bytes = graph_bytes
        self._seed = seed
        self.batches = Batches(data, device=self.device, dtype=dtype)
        self._original = LossModule(self.model, unwrap(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn)
        self._skeleton = self._original.private_copy().eval()
        if batchnorm == "batch":
            use_batch_statistics(self._skeleton)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The selected parameters, by name, that the model has now."""
        current = dict(self.model.named_parameters())
        return {name: current[name] for name in self.layout.names}

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
        hooks = self._original.foreign_hooks
        left_out: Settings = {"hooks left out": hooks} if hooks else {}
        return {
            "batchnorm": describe_policy(self._skeleton, self.batchnorm),
            "samples": self.samples,
            "batches": len(self.batches),
            "parameters": self.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            **left_out,
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
        total = torch.zeros((), dtype=widest(self.device), device=self.device)
        weight_sum = 0.0
        with torch.no_grad(), no_autocast(self.device), RandomStream(self._seed) as stream:
            for value, weight in self._batch_losses(self._views(w), stream):
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
        total = torch.zeros((), dtype=widest(self.device), device=self.device)
        wide = torch.promote_types(self.dtype, torch.float32)
        gradient = torch.zeros(self.size, dtype=wide, device=self.device)
        weight_sum = 0.0
        with torch.enable_grad(), no_autocast(self.device), RandomStream(self._seed) as stream:
            for value, weight in self._batch_losses(leaves, stream):
                gradient.add_(self.layout.flatten(loss_gradients(value, leaves)), alpha=weight)
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

        Raises
        ------
        ValueError
            Also if a function in the model is marked ``once_differentiable``.
        """
        self.layout.check(v, "direction v")
        return self._hessian(w, keep_bytes=0).matvec(v)

    def hessian(self, w: Tensor | None = None) -> HessianOperator:
        """Return ``∇²L(w)`` as an operator that keeps the gradient's graph within ``graph_bytes``.

        The operator is a snapshot: it does not follow later changes of the weights.
        """
        return self._hessian(w, keep_bytes=self._graph_bytes)

    def _hessian(self, w: Tensor | None, keep_bytes: int) -> HessianOperator:
        leaves = self._leaves(w)
        return HessianOperator(
            lambda stream, skip: self._batch_losses(leaves, stream, skip=skip),
            leaves,
            layout=self.layout,
            batches=len(self.batches),
            seed=self._seed,
            keep_bytes=keep_bytes,
            dtype=self.dtype,
            device=self.device,
            settings=self.settings,
        )

    def _flat(self, w: Tensor | None) -> Tensor:
        if w is None:
            return self.point()
        self.layout.check(w, "point w")
        return w.detach().to(device=self.device, dtype=self.dtype)

    def _views(self, w: Tensor | None) -> dict[str, Tensor]:
        return {name: view.to(self._dtypes[name]) for name, view in self.layout.views(self._flat(w)).items()}

    def _leaves(self, w: Tensor | None) -> dict[str, Tensor]:
        # Views of one vector would each send back a vector of full length; leaves send back their own piece.
        return {name: view.detach().clone().requires_grad_() for name, view in self._views(w).items()}

    def _converted(self, tensor: Tensor) -> Tensor:
        dtype = self._cast if self._cast is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device=self.device, dtype=dtype)

    def _batch_losses(
        self, point: dict[str, Tensor], stream: RandomStream, *, skip: int = 0
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield the mean loss and the weight of every batch after the first ``skip``, drawing from ``stream``."""
        point = {f"model.{name}": tensor for name, tensor in point.items()}
        # The parameters outside the selection, and those of the criterion, are constants.
        fixed = {name: self._converted(p) for name, p in self._original.named_parameters() if name not in point}
        buffers = {name: self._converted(buffer) for name, buffer in self._original.named_buffers()}
        if self.batchnorm == "recalibrate":
            buffers = self._recalibrated(point | fixed, buffers, stream)
        for index, batch in enumerate(self.batches):
            if index >= skip:
                # Every batch has its own seed and fresh buffers: none sees what another drew or wrote.
                stream.restart(self._seed + index)
                yield self._evaluate(point | fixed | _copied(buffers), batch)

    def _evaluate(self, tensors: dict[str, Tensor], batch: Batch) -> tuple[Tensor, float]:
        samples = count_samples(batch)  # before loss_fn, which may take it apart
        returned = functional_call(self._skeleton, tensors, (batch,))
        if isinstance(returned, tuple):
            total, count = _sum_and_count(returned)
            return total / count, count
        return _scalar(returned, "a mean loss"), float(samples)

    def _recalibrated(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], stream: RandomStream
    ) -> dict[str, Tensor]:
        fresh = blank_statistics(self._skeleton, _copied(buffers))
        constants = {name: tensor.detach() for name, tensor in parameters.items()} | fresh
        stream.restart(self._seed)
        seen = 0
        try:
            with torch.no_grad():
                for batch, size in zip(self.batches, self.batches.sizes, strict=True):
                    seen += size
                    collect_statistics(self._skeleton, share=size / seen if seen else 0.0)
                    self._evaluate(constants, batch)
        finally:
            collect_statistics(self._skeleton, share=None)
        return fresh


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _sum_and_count(returned: tuple[Any, ...]) -> tuple[Tensor, float]:
    count = returned[1] if len(returned) == 2 else None
    if not (isinstance(count, int | float) or (isinstance(count, Tensor) and count.numel() == 1)):
        came = f"a tensor of shape {tuple(count.shape)}" if isinstance(count, Tensor) else type(count).__name__
        raise ValueError(
            f"loss_fn returned a tuple of {len(returned)}"
            + (f" with {came} as its second item" if len(returned) == 2 else "")
            + ": expected a mean loss alone, or (sum, count) with a number; drop what else it returns, e.g. the logits"
        )
    weight = float(count)
    if not weight > 0:
        raise ValueError(f"loss_fn returned (sum, count) with count {weight:g}: expected a positive count")
    return _scalar(returned[0], "a sum"), weight


def _scalar(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss_fn must return {what} as one number, got {came}: use reduction='mean', or return (sum, count)"
        )
    return value.reshape(())
