"""The loss as a function of the weights, with its derivatives, for any model and any data.

An objective never touches the model it was given. It evaluates a private skeleton of the model (same parameters, own
modes, no hooks) through :func:`torch.func.functional_call` on views of one flat vector, with copies of the buffers; so
nothing has to be restored afterwards, whatever is raised.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from msam_analysis.objective.batches import CACHE_BYTES, Batches
from msam_analysis.objective.batchnorm import (
    Policy,
    blank_statistics,
    check_policy,
    collect_statistics,
    describe_policy,
    use_batch_statistics,
)
from msam_analysis.objective.gauss_newton import GaussNewtonOperator
from msam_analysis.objective.graphs import BatchLoss, SecondDerivatives, Wish, mean_gradient
from msam_analysis.objective.hessian import HessianOperator
from msam_analysis.objective.nested import Batch, count_samples
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.objective.skeleton import LossFunction, LossModule, mean_and_weight, unwrap, use_dropout
from msam_analysis.objective.vectors import Layout, Selection, select, widest
from msam_analysis.results import ApproximationWarning, Settings

_GRAPH_BYTES = 2 * 2**30
# The part of a displacement that rounding may take before it is told.
_ROUNDED = 0.1


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
        A loader that does not shuffle, a list of batches, or one batch; see
        :class:`~msam_analysis.objective.batches.Batches`.
    batchnorm
        ``"eval"`` (default: the running statistics), ``"batch"`` or ``"recalibrate"``;
        see :mod:`msam_analysis.objective.batchnorm`.
    parameters
        Which parameters the vector holds: ``None`` for every one with ``requires_grad``, name patterns, or a predicate.
        All others stay at their current values. The row of an embedding's ``padding_idx``, which is never trained,
        moves with the vector but has no derivatives.
    device, dtype
        Where and in what precision to evaluate; default: those of the model's parameters. When ``dtype`` is given,
        everything of floating point is cast to it, and ``torch.float64`` is the way to reference values; otherwise
        every parameter is evaluated in its own precision. The flat vectors have the widest of them, but at least
        float32, in which gradients and products are also accumulated. See Notes for weights in half precision.
    autocast
        ``torch.bfloat16`` or ``torch.float16``: evaluate forward passes under ``torch.autocast``, as in training with
        mixed precision. Default: without. A float16 gradient may underflow; it is not scaled.
    dropout
        Whether dropout layers drop, and whatever else has "drop" in its name (stochastic depth, the rate of an
        attention layer). They draw from the private stream: every evaluation sees the same draw, one for each batch.
        Default: not. BatchNorm follows its policy either way.
    second_derivatives
        ``"exact"``: by automatic differentiation, and an error where a layer has none. ``"central"``: central
        differences of the gradient, two gradients a product. ``"auto"`` (default): exact, and central differences with
        an :class:`~msam_analysis.results.ApproximationWarning` once a layer turns out to have none; settings then say
        so. Fused attention kernels, which have none, give way to the plain one first.
        See :class:`~msam_analysis.objective.hessian.HessianOperator`.
    graph_bytes
        Memory that kept gradient graphs may take in :meth:`hessian` and :meth:`gauss_newton`; default 2 GiB. More
        batches kept means faster products (about 2.1 gradients instead of 3.5); the others are rebuilt every time.
    cache_bytes
        Memory that copies of the batches may take on the device; default 1 GiB. Data that is larger is read again at
        every pass.
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
        The data is empty or not repeatable, the policy unknown, nothing is selected, or ``autocast`` is no half
        precision or meets float64, which it leaves alone.

    Notes
    -----
    Weights in half precision are evaluated as such, and :meth:`point` returns them exactly. But a displacement that is
    smaller than their spacing (for bfloat16 up to 1/128 of the weight) vanishes, or is rounded up to it: sharpness,
    slices and differences near ``w`` are then those of a staircase. An evaluation at a point of whose distance from
    the weights rounding takes more than a tenth warns. ``dtype=torch.float32`` measures the smooth function through
    the same weights, and is the way to measure a bfloat16 checkpoint.
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
        autocast: torch.dtype | None = None,
        dropout: bool = False,
        second_derivatives: Wish = "auto",
        graph_bytes: int = _GRAPH_BYTES,
        cache_bytes: int = CACHE_BYTES,
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
        self.autocast = autocast
        self.dropout = dropout
        self.seed = seed
        self.second_derivatives = SecondDerivatives(second_derivatives)
        self._cast = dtype
        chosen = self._choose(parameters)
        self.device = torch.device(device) if device is not None else next(iter(chosen.values())).device
        self._graph_bytes = graph_bytes
        _check_autocast(autocast, self.dtype)
        self.batches = Batches(data, device=self.device, dtype=dtype, cache_bytes=cache_bytes)
        self._original = LossModule(self.model, unwrap(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn)
        self._skeleton = self._original.private_copy().eval()
        if batchnorm == "batch":
            use_batch_statistics(self._skeleton)
        if dropout:
            use_dropout(self._skeleton)
        # cuDNN's recurrent layers have no gradient in evaluation mode, and no second derivative in any.
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self._skeleton.modules())

    def _choose(self, parameters: Selection) -> dict[str, nn.Parameter]:
        chosen = select(self.model, parameters)
        self.layout = Layout(tuple(chosen), tuple(p.shape for p in chosen.values()))
        self._dtypes = {name: self._cast or p.dtype for name, p in chosen.items()}
        self.dtype = reduce(torch.promote_types, self._dtypes.values(), torch.float32)
        self._warned = False
        return chosen

    def with_parameters(self, selection: Selection) -> Objective:
        """Return the same loss on the same data as a function of other parameters; all others are constants.

        Neither the model nor the data is copied.

        Parameters
        ----------
        selection
            As ``parameters`` of :class:`Objective`: ``None``, name patterns, or a predicate.

        Returns
        -------
        Objective
            On the same device, in the same precision, with the same policy and seed.

        Raises
        ------
        ValueError
            Nothing is selected.
        TypeError
            The selection is of another kind.
        """
        other = copy.copy(self)
        other._choose(selection)
        return other

    def with_samples(self, indices: Tensor, *, batch_size: int | None = None) -> Objective:
        """Return the same loss on some samples of the data.

        The model is not copied, and nothing is checked to repeat again. With the BatchNorm policies ``"batch"`` and
        ``"recalibrate"`` the statistics are those of the new batches: another function, on purpose.

        Parameters
        ----------
        indices
            Shape ``(n,)``, integers; samples are counted over all batches in order. They come in this order, as often
            as they occur here: a bootstrap sample is ``torch.randint(objective.samples, (n,), generator=...)``.
        batch_size
            Default: the size of the data's largest batch. The last batch holds what is left.

        Returns
        -------
        Objective
            Of the same parameters. Tensors of a batch are taken by their first dimension; what is 0-dimensional or no
            tensor is kept.

        Raises
        ------
        TypeError
            ``indices`` are no tensor of integers.
        ValueError
            They are empty or not flat; ``batch_size`` is not positive; a tensor's first dimension does not count the
            batch's samples, or batches differ in what is not rows of a tensor.
        IndexError
            There is no such sample.
        """
        other = copy.copy(self)
        other.batches = self.batches.take(indices, batch_size)
        return other

    def with_weights(self, w: Tensor) -> Objective:
        """Return the same loss with ``w`` as its current weights: the centre of its slices, the point of its measures.

        The model is copied, not moved; buffers and data are shared.

        Parameters
        ----------
        w
            Shape ``(size,)``.

        Returns
        -------
        Objective
            Of the same parameters.

        Raises
        ------
        ValueError
            ``w`` has another shape.
        """
        self.layout.check(w, "point w")
        views = self.layout.views(w.detach())
        moved = {
            id(parameter): nn.Parameter(views[name].to(parameter, copy=True), requires_grad=parameter.requires_grad)
            for name, parameter in self.parameters.items()
        }
        other = copy.copy(self)
        other._original = self._original.private_copy(lambda tensor: moved.get(id(tensor), tensor))
        other.model = other._original.model
        return other

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
        own = sorted({str(dtype).removeprefix("torch.") for dtype in self._dtypes.values()})
        name = str(self.dtype).removeprefix("torch.")
        special: dict[str, str | int | float | bool | None] = {}
        if own != [name]:
            special["weights"] = ", ".join(own)
        if self.autocast is not None:
            special["autocast"] = str(self.autocast).removeprefix("torch.")
        if self.dropout:
            special["dropout"] = True
        if hooks:
            special["hooks left out"] = hooks
        return {
            "batchnorm": describe_policy(self._skeleton, self.batchnorm),
            "samples": self.samples,
            "batches": len(self.batches),
            "parameters": self.size,
            "dtype": name,
            "device": self.device.type,
            **special,
            **self.second_derivatives.settings,
        }

    def __repr__(self) -> str:
        """Name the model's class and the settings."""
        settings = ", ".join(f"{name.replace(' ', '_')}={value!r}" for name, value in self.settings.items())
        return f"Objective({type(self.model).__name__}, {settings})"

    @property
    def precision(self) -> torch.dtype:
        """The coarsest data type that takes part in an evaluation."""
        own = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        taking_part = ({self._cast} if self._cast is not None else own) | ({self.autocast} if self.autocast else set())
        coarsest: torch.dtype = max(taking_part, key=lambda dtype: torch.finfo(dtype).eps)
        return coarsest

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
        with self.evaluating() as stream:
            for batch in self.batch_losses(self._views(w), self.constants(w), stream):
                total += batch.value.to(total.dtype) * batch.weight
                weight_sum += batch.weight
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
        return mean_gradient(self, self.leaves(w), self.constants(w))

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
            Also if a layer has no second derivative, and ``second_derivatives="exact"`` was asked for.
        """
        self.layout.check(v, "direction v")
        return HessianOperator(self, w, keep_bytes=0).matvec(v)

    def hessian(self, w: Tensor | None = None) -> HessianOperator:
        """Return ``∇²L(w)`` as an operator that keeps the gradient's graph within ``graph_bytes``.

        The operator is a snapshot of the selected parameters: it does not follow their later changes.

        Parameters
        ----------
        w
            Shape ``(size,)``; default: the current weights.

        Returns
        -------
        HessianOperator
            With ``@``, ``matmat`` and ``to_scipy()``.
        """
        return HessianOperator(self, w, keep_bytes=self._graph_bytes)

    def gauss_newton(self, w: Tensor | None = None) -> GaussNewtonOperator:
        """Return the generalised Gauss-Newton matrix at ``w`` as an operator; otherwise as :meth:`hessian`.

        The Hessian without the curvature of the model: ``Jᵀ H J`` with the Hessian of the loss in what the model puts
        out, which is intercepted on its way to ``loss_fn``.

        Parameters
        ----------
        w
            Shape ``(size,)``; default: the current weights.

        Returns
        -------
        GaussNewtonOperator
            Its first product raises if the loss is no function of the model's output;
            see :class:`~msam_analysis.objective.gauss_newton.GaussNewtonOperator`.
        """
        return GaussNewtonOperator(self, w, keep_bytes=self._graph_bytes)

    def scratch(self) -> LossModule:
        """Return the loss as a module, batch in and loss out, with tensors of its own that may be written to.

        Called inside :meth:`evaluating` it computes what this objective does, in the same modes and precision. Its
        tensors are named ``model.*`` and ``loss_fn.*``.
        """

        def own(tensor: Tensor) -> Tensor:
            copied = self._converted(tensor).clone()
            return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied

        module = self._original.private_copy(own).eval()
        if self.batchnorm == "batch":
            use_batch_statistics(module)
        if self.dropout:
            use_dropout(module)
        return module

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[RandomStream]:
        """Inside, forward passes without gradients run as this objective's do.

        Yields
        ------
        RandomStream
            To be restarted with ``seed + index`` before batch number ``index``.
        """
        half = self.autocast
        autocast = torch.autocast(self.device.type, dtype=half, enabled=half is not None, cache_enabled=False)
        with torch.no_grad(), autocast, RandomStream(self.seed) as stream, self.kernels(twice=False):
            yield stream

    def _flat(self, w: Tensor | None) -> Tensor:
        if w is None:
            return self.point()
        self.layout.check(w, "point w")
        return w.detach().to(device=self.device, dtype=self.dtype)

    def _views(self, w: Tensor | None) -> dict[str, Tensor]:
        flat = self._flat(w)
        views = {name: view.to(self._dtypes[name]) for name, view in self.layout.views(flat).items()}
        if w is not None and not self._warned and any(dtype.itemsize < 4 for dtype in self._dtypes.values()):
            self._warn_of_rounding(flat, views)
        return views

    def _warn_of_rounding(self, flat: Tensor, views: dict[str, Tensor]) -> None:
        lost, distance = (self.layout.flatten(views.values()) - flat).norm(), (flat - self.point()).norm()
        if bool(lost > _ROUNDED * distance):
            self._warned = True
            warnings.warn(
                f"the weights are evaluated in half precision, whose rounding moves the point by {float(lost):.1e}, "
                f"where it is {float(distance):.1e} away from the current weights: measure a smooth function with "
                "dtype=torch.float32",
                ApproximationWarning,
                stacklevel=2,
            )

    def leaves(self, w: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors that make up a point, by name, in the precision of evaluation, requiring gradients.

        Parameters
        ----------
        w
            Shape ``(size,)``; default: the current weights.
        """
        # Views of one vector would each send back a vector of full length; leaves send back their own piece.
        return {name: view.detach().clone().requires_grad_() for name, view in self._views(w).items()}

    def constants(self, w: Tensor | None = None) -> dict[str, Tensor]:
        """Return everything else that the loss depends on at a point, by its name in the skeleton.

        Parameters outside the selection, those of the criterion, and buffers; with the policy ``"recalibrate"``, the
        statistics of BatchNorm at ``w``, for which the data is read once.

        Parameters
        ----------
        w
            Shape ``(size,)``; default: the current weights.
        """
        selected = {f"model.{name}" for name in self.layout.names}
        fixed = {name: self._converted(p) for name, p in self._original.named_parameters() if name not in selected}
        buffers = {name: self._converted(buffer) for name, buffer in self._original.named_buffers()}
        if self.batchnorm == "recalibrate":
            point = {f"model.{name}": view for name, view in self._views(w).items()}
            buffers = self._recalibrated(point | fixed, buffers)
        return fixed | buffers

    def _converted(self, tensor: Tensor) -> Tensor:
        dtype = self._cast if self._cast is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(device=self.device, dtype=dtype)

    def batch_losses(
        self,
        point: dict[str, Tensor],
        constants: dict[str, Tensor],
        stream: RandomStream,
        *,
        skip: int = 0,
        cut: bool = False,
    ) -> Iterator[BatchLoss]:
        """Yield the mean loss and the weight of every batch after the first ``skip``.

        Parameters
        ----------
        point, constants
            Tensors in place of the selected parameters, and what :meth:`constants` returned.
        stream
            What a stochastic forward pass draws from; entered by the caller.
        skip
            Number of batches to leave out.
        cut
            Whether to cut the loss off from the parameters where the model puts out its tensors, and return both ends.
        """
        tensors = {f"model.{name}": tensor for name, tensor in point.items()} | constants
        buffers = [name for name, _ in self._skeleton.named_buffers()]
        for index, batch in enumerate(self.batches):
            if index < skip:
                continue
            # Every batch has its own seed and fresh buffers: none sees what another drew or wrote.
            stream.restart(self.seed + index)
            fresh = {name: tensors[name].clone() for name in buffers}
            if cut:
                with self._skeleton.cut_outputs() as pairs:
                    value, weight = self._evaluate(tensors | fresh, batch)
                yield BatchLoss(value, weight, *(zip(*pairs, strict=True) if pairs else ((), ())))
            else:
                yield BatchLoss(*self._evaluate(tensors | fresh, batch))

    @contextlib.contextmanager
    def kernels(self, *, twice: bool) -> Iterator[None]:
        """Return the context in which passes avoid kernels that lack derivatives.

        Parameters
        ----------
        twice
            Whether what is evaluated is differentiated twice.
        """
        with contextlib.ExitStack() as stack:
            if twice or self.dropout:  # fused attention has no second derivative, and draws its dropout differently
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def _evaluate(self, tensors: dict[str, Tensor], batch: Batch) -> tuple[Tensor, float]:
        samples = count_samples(batch)  # before loss_fn, which may take it apart
        if self.autocast is None:
            return mean_and_weight(functional_call(self._skeleton, tensors, (batch,)), samples)
        # Without its cache, which would tie the graphs of batches to each other.
        with torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=False):
            return mean_and_weight(functional_call(self._skeleton, tensors, (batch,)), samples)

    def _recalibrated(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        fresh = blank_statistics(self._skeleton, {name: tensor.clone() for name, tensor in buffers.items()})
        constants = {name: tensor.detach() for name, tensor in parameters.items()} | fresh
        seen = 0
        try:
            with self.evaluating() as stream:
                for index, (batch, size) in enumerate(zip(self.batches, self.batches.sizes, strict=True)):
                    stream.restart(self.seed + index)
                    seen += size
                    collect_statistics(self._skeleton, share=size / seen if seen else 0.0)
                    self._evaluate(constants, batch)
        finally:
            collect_statistics(self._skeleton, share=None)
        return fresh


def _check_autocast(autocast: torch.dtype | None, dtype: torch.dtype) -> None:
    if autocast not in {None, torch.bfloat16, torch.float16}:
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast}")
    if autocast is not None and dtype == torch.float64:
        raise ValueError(
            "autocast leaves float64 alone: expected a float32 model under autocast; drop autocast, or dtype=float64"
        )
