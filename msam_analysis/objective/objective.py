"""The loss as a function of the weights, with its derivatives, for any model and any data.

An objective never touches the model it was given. It evaluates a private copy of the model (own modes, no hooks) at
tensors that are put in place of its parameters, with copies of the buffers; so nothing has to be restored afterwards,
whatever is raised.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from msam_analysis.objective.batches import Batches
from msam_analysis.objective.batchnorm import Policy
from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.examination import NOT_EXAMINED, Examination
from msam_analysis.objective.examine import examine as examination_of
from msam_analysis.objective.fisher import DrawLabels, FisherOperator, Kind
from msam_analysis.objective.gauss_newton import GaussNewtonOperator
from msam_analysis.objective.graphs import mean_gradient, mean_loss
from msam_analysis.objective.handing_on import made_ready
from msam_analysis.objective.hessian import HessianOperator
from msam_analysis.objective.making import evaluation_of
from msam_analysis.objective.memory import Memory
from msam_analysis.objective.private import LossFunction, own_class
from msam_analysis.objective.ranks import Sharing
from msam_analysis.objective.second_derivatives import Wish
from msam_analysis.objective.sharded import moved
from msam_analysis.objective.space import Space
from msam_analysis.objective.statistics import warn_of_statistics
from msam_analysis.objective.vectors import Layout, Selection, flat_of
from msam_analysis.results import Settings


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
        A loader that does not shuffle, a list of batches, or a single batch: a tuple or list of tensors such as
        ``(x, y)``, or a mapping or data class of tensors. Any other collection that can be read again also works, as do
        the ``batches`` of another objective, which both then share.
    batchnorm
        ``"eval"`` (default: the running statistics), ``"batch"`` or ``"recalibrate"``;
        see :mod:`msam_analysis.objective.batchnorm`.
    parameters
        Which parameters the vector holds: ``None`` for every one with ``requires_grad``, shell patterns of names
        (``"layer1.*"``), or a predicate ``f(name, parameter) -> bool``; these may name frozen parameters. All others
        stay at their current values. The row of an embedding's ``padding_idx`` moves but has no derivatives.
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
    memory_bytes
        Memory that measures may take beside the network and the graph of one batch: an eighth of it for
        ``cache_bytes``, three eighths for ``graph_bytes``, half for the vectors of a solver. Default: 1, 2 and 4 GiB.
    graph_bytes
        Memory that kept gradient graphs may take in :meth:`hessian`, :meth:`gauss_newton` and :meth:`fisher`. More
        batches kept means faster products (about 2.1 gradients instead of 3.5); the others are rebuilt every time.
    cache_bytes
        Memory that copies of the batches may take on the device. Larger data is read at every pass.
    seed
        Seed of the private random stream that a stochastic forward pass draws from, the same at every evaluation.
    examine
        Whether the loss is examined at its first use; see :meth:`examine`. Default: it is. Without it results say so.
    ranks
        Whether the processes of :mod:`torch.distributed` share the batches. Default ``False``: this one measures alone.
        ``True``: all have the same ``data`` and take its batches in turn. ``"split"``: each has other data, as from a
        ``DistributedSampler``. In both cases all make the same calls in the same order; else they wait. See Notes.

    Attributes
    ----------
    settings
        The choices above in plain values; printed with every result.

    Raises
    ------
    TypeError
        The model is no module, or the data is not batches.
    ValueError
        The data is empty or not repeatable, the policy unknown, nothing is selected, or ``autocast`` is no half
        precision or meets float64, which it leaves alone; weights are not sharded by rows over all ``ranks``.

    Notes
    -----
    Weights in half precision are evaluated as such, and :meth:`point` returns them exactly. But a displacement that is
    smaller than their spacing (for bfloat16 up to 1/128 of the weight) vanishes, or is rounded up to it: sharpness,
    slices and differences near ``w`` are then those of a staircase. An evaluation at a point of whose distance from
    the weights rounding takes more than a tenth warns. ``dtype=torch.float32`` measures the smooth function through
    the same weights, and is the way to measure a bfloat16 checkpoint.

    With ``ranks`` every process gets the result of one, but for rounding. Samples count over the data of all; buffers
    are those of the first process, as in ``DistributedDataParallel``. What one raises is raised by all. Weights that
    FSDP2 shards need ``ranks``: every process has its part of a flat vector, and ``space`` sums over entries.

    Threads that share an objective evaluate one after the other. A loss that evaluates its own objective is refused;
    one that waits for another thread to evaluate an objective would wait for ever.
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
        memory_bytes: int | None = None,
        graph_bytes: int | None = None,
        cache_bytes: int | None = None,
        seed: int = 0,
        examine: bool = True,
        ranks: Sharing = False,
    ) -> None:
        self.loss_fn, self._examines = loss_fn, examine
        self._memory = Memory.of(memory_bytes, graph_bytes, cache_bytes)
        self._evaluation = evaluation_of(
            model,
            loss_fn,
            data,
            parameters=parameters,
            device=device,
            cast=dtype,
            cache_bytes=self._memory.batches,
            examine=examine,
            ranks=ranks,
            second_derivatives=second_derivatives,
            options={"batchnorm": batchnorm, "autocast": autocast, "dropout": dropout, "seed": seed},
        )

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
        other = self._viewed()
        other._evaluation.choose(selection)
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
            The loss as a function of the same parameters. Tensors of a batch are taken by their first dimension; what
            is 0-dimensional or no tensor is kept.

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
        return self._viewed(batches=self.batches.take(indices, batch_size))

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
            The loss as a function of the same parameters.

        Raises
        ------
        ValueError
            ``w`` has another shape.

        Warns
        -----
        ApproximationWarning
            ``w`` is not the current weights, and running statistics belong to these: with the policy ``"eval"`` those
            of BatchNorm. Settings then say so.
        """
        self.layout.check(w, "point w")
        other = self.space.any(w.detach().to(self.point()) != self.point())
        foreign = other and warn_of_statistics(self, "at the point of with_weights")
        return self._viewed(original=moved(self._evaluation, w.detach()), foreign=foreign or self._evaluation.foreign)

    def _viewed(self, **changes: object) -> Objective:
        other = copy.copy(self)
        other._evaluation = self.evaluation.view(**changes)  # views are not examined again
        return other

    @property
    def model(self) -> nn.Module:
        """The network, without wrappers."""
        return self._evaluation.original.model

    @property
    def batches(self) -> Batches:
        """The data."""
        return self._evaluation.batches

    @property
    def layout(self) -> Layout:
        """Names and shapes behind the flat vector."""
        return self._evaluation.layout

    @property
    def device(self) -> torch.device:
        """Where the loss is evaluated."""
        return self._evaluation.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of flat vectors."""
        return self._evaluation.dtype

    @property
    def batchnorm(self) -> Policy:
        """The policy for BatchNorm."""
        return self._evaluation.batchnorm

    @property
    def seed(self) -> int:
        """Seed of the private random stream."""
        return self._evaluation.seed

    @property
    def evaluation(self) -> Evaluation:
        """How the loss is evaluated, examined at the first use: for solvers and landscapes that need its parts."""
        return made_ready(self._evaluation, examines=self._examines)

    def examine(self) -> Examination:
        """Say whether the loss is a function, this model's, and a mean, and whether its derivatives are right.

        It is examined once, at the first use, on a part of the first batch: the value twice, and with gradients and
        without; where its graph ends; a batch against its halves; gradient and Hessian product against differences in
        float64. What can be evaluated rightly in another way is, and the examination says how.

        Returns
        -------
        Examination
            The checks with their answers, and what rounding leaves of a digit.

        Raises
        ------
        ExaminationError
            The loss cannot be evaluated, is no function of the weights, or is no mean over samples.
        """
        found = self.evaluation.findings.examination
        return examination_of(self._evaluation) if found is None else found

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The selected parameters, by name, that the model has now."""
        return self._evaluation.parameters

    @property
    def size(self) -> int:
        """Number of entries of the flat vector, of which each process has some where weights are sharded."""
        return self.space.size

    @property
    def space(self) -> Space:
        """Where flat vectors lie: whole in every process, or divided among them."""
        return self._evaluation.space

    @property
    def samples(self) -> int:
        """Number of samples the loss is a mean over."""
        return self.batches.samples

    @property
    def settings(self) -> Settings:
        """What every result made from this objective is labelled with."""
        found = dict(self._evaluation.labels)
        if not self._examines:
            found.setdefault("examination", NOT_EXAMINED)
        return found

    def __repr__(self) -> str:
        """Name the model's class and the settings."""
        settings = ", ".join(f"{name.replace(' ', '_')}={value!r}" for name, value in self.settings.items())
        return f"Objective({own_class(self.model).__name__}, {settings})"

    @property
    def precision(self) -> torch.dtype:
        """The coarsest data type that takes part in an evaluation."""
        return self._evaluation.precision

    def point(self) -> Tensor:
        """Return a copy of the model's current weights, shape ``(size,)``."""
        return self._evaluation.point()

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
        own = self._evaluation.part
        return flat_of(
            self.layout, tensors, self.parameters, lambda name, tensor: own(name, tensor).to(self.device, self.dtype)
        )

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
        return mean_loss(self.evaluation, w)

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
        loss = self.evaluation
        with loss.apart("a gradient at a point"):
            return mean_gradient(loss, loss.leaves(w), loss.constants(w))

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
        return HessianOperator(
            self.evaluation, w, memory=replace(self._memory, graphs=0), settings=self.settings
        ).matvec(v)

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
        return HessianOperator(self.evaluation, w, memory=self._memory, settings=self.settings)

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
        return GaussNewtonOperator(self.evaluation, w, memory=self._memory, settings=self.settings)

    def fisher(
        self,
        w: Tensor | None = None,
        *,
        kind: Kind = "empirical",
        draws: int = 1,
        draw: DrawLabels | None = None,
        seed: int = 0,
    ) -> FisherOperator:
        """Return the empirical or the sampled Fisher matrix at ``w`` as an operator; otherwise as :meth:`hessian`.

        For the arguments, and ``ValueError`` where one is out of range or it is not known how labels are drawn for
        ``loss_fn``, see :class:`~msam_analysis.objective.fisher.FisherOperator`.
        """
        labels = {"kind": kind, "draws": draws, "draw": draw, "seed": seed}
        return FisherOperator(self.evaluation, w, **labels, memory=self._memory, settings=self.settings)  # type: ignore[arg-type]
