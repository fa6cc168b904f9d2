"""The loss of a private copy over batches, at whatever tensors are put in place of the model's own."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from msam_analysis.objective.batches import Batches
from msam_analysis.objective.batchnorm import (
    Policy,
    averaged_statistics,
    blank_statistics,
    collect_statistics,
    describe_policy,
    use_batch_statistics,
)
from msam_analysis.objective.examination import Examination
from msam_analysis.objective.explaining import explained
from msam_analysis.objective.nested import Batch
from msam_analysis.objective.passes import Pass, passes
from msam_analysis.objective.private import Attributes, LossModule, use_randomness
from msam_analysis.objective.randomness import ALONE, RandomStream
from msam_analysis.objective.ranks import Ranks
from msam_analysis.objective.second_derivatives import SecondDerivatives
from msam_analysis.objective.sharded import Rows, Units, find_shards, resharded
from msam_analysis.objective.space import Space
from msam_analysis.objective.vectors import Layout, Selection, no_autocast, select
from msam_analysis.objective.weighing import SAMPLES, Weighing, counted, mean_and_weight, with_reduction
from msam_analysis.results import ApproximationWarning, Settings

# The part of a displacement that rounding may take before it is told.
_ROUNDED = 0.1


class BatchLoss(NamedTuple):
    """The mean loss of one batch, as a function of the leaves."""

    value: Tensor  # 0-dimensional
    weight: float  # the weight of the batch in the mean over all
    outputs: tuple[Tensor, ...] = ()  # if asked for: the tensors that the model put out
    cuts: tuple[Tensor, ...] = ()  # the leaves that took their place in the loss
    number: int = 0  # of the batch, among all
    batch: Batch = None
    # What is differentiated, and what its derivatives are multiplied by in the sum over batches: the loss and its
    # weight, or the product and 1 where the way back to the parameters adds up what processes have.
    term: Tensor = torch.zeros(())
    scale: float = 1.0


@dataclass
class Findings:
    """How a model and its loss have to be evaluated: found once, at the first use, and shared by all views."""

    weighing: Weighing = SAMPLES
    with_gradients: bool = False  # values need gradients enabled: without them the model computes something else
    redirected: bool = False  # the loss or a forward reaches past the private copy to the original, and is led back
    restored: bool = False  # forward passes write to attributes, which are put back
    written: frozenset[str] = frozenset()  # names of the parameters that forward passes write to
    drawing: list[str] | None = None  # names of the modules that draw random numbers, where they are wanted
    refusal: str = ""  # why there are no derivatives; empty where there are
    examination: Examination | None = None

    @property
    def manner(self) -> tuple[object, ...]:
        """What decides how a private copy is made."""
        return self.redirected, self.restored, tuple(self.drawing or ())


@dataclass(eq=False)
class Evaluation:
    """The loss over batches at given tensors; see :class:`~msam_analysis.Objective`, whose options these are."""

    original: LossModule  # the user's network and criterion; never run
    batches: Batches
    device: torch.device
    cast: torch.dtype | None
    batchnorm: Policy
    autocast: torch.dtype | None
    dropout: bool
    seed: int
    second_derivatives: SecondDerivatives
    findings: Findings = field(default_factory=Findings)
    foreign: bool = False  # whether the running statistics belong to other weights than the current ones

    def __post_init__(self) -> None:
        """Make the private copy."""
        # cuDNN's recurrent layers have no gradient in evaluation mode, and no second derivative in any.
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self.original.modules())
        self.shards = find_shards(self.original)
        # The user's closures know these tensors, also where this evaluation becomes a view of another original.
        self.outer = {id(tensor): name for name, tensor in _tensors(self.original).items()}
        with self.held():
            self.outer |= {id(tensor): name for name, tensor in _tensors(self.original).items()}
        self._weights: list[float] | None = None
        self.fillers: dict[tuple[float, ...], tuple[int, Pass]] = {}
        self._told = False
        self.renew()

    def choose(self, parameters: Selection) -> None:
        """Select the parameters that the flat vector holds."""
        with self.held():
            chosen = select(self.original.model, parameters)
        self.rows: dict[str, Rows] = {}  # of all tensors that are divided, by their names in the private copy
        shapes = [parameter.shape for parameter in chosen.values()]
        if self.shards is not None:
            # Whole parameters are divided, too: no entry of a vector is in two processes.
            own = {f"model.{name}": self.shards.mesh.rows(parameter.shape) for name, parameter in chosen.items()}
            self.rows = self.shards.rows | own
            shapes = [rows.part for rows in own.values()]
        self.layout = Layout(tuple(chosen), tuple(shapes))
        self.space = Space(self.layout.size) if self.shards is None else self.shards.space(list(own.values()))
        self.dtypes = {name: self.cast or p.dtype for name, p in chosen.items()}
        self.dtype = reduce(torch.promote_types, self.dtypes.values(), torch.float32)
        self._told = False

    def view(self, **changes: object) -> Evaluation:
        """Return the same evaluation with other ``batches`` or another ``original``; the private copy is shared."""
        other = copy.copy(self)
        for name, value in changes.items():
            setattr(other, name, value)
        if "batches" in changes:
            other._weights, other.fillers = None, {}
        if "original" in changes:
            other._attributes = Attributes(other.original)
        return other

    @property
    def ranks(self) -> Ranks:
        """The processes that share the batches; whatever is a sum over batches is a sum over them."""
        return self.batches.ranks

    @property
    def spread(self) -> bool:
        """Whether processes that share the weights have batches of their own."""
        return self.shards is not None and self.ranks.count > 1

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[list[Tensor]]:
        """Return a context in which processes work by themselves; see :meth:`.ranks.Ranks.apart`."""
        with self.ranks.apart(what) as alike:
            yield alike if self.shards is None else []  # points and vectors are divided

    def mean(self, weight: float, *sums: Tensor) -> tuple[Tensor, ...]:
        """Return weighted sums over batches as means, from numbers and vectors over this process's; overwrites them."""
        if self.shards is None or not self.spread:
            return self.ranks.mean(weight, *sums)
        weights = torch.tensor([weight], dtype=torch.float64)
        whole = float(self.ranks.sum(weights))
        for total in sums:
            if total.ndim:  # the way back to the shards has added up what their holders have
                self.shards.mesh.over_copies(total)
            else:
                self.ranks.sum(total)
        return tuple(total / whole for total in sums)

    # ------------------------------------------------------------------------------------------------ the private copy

    def renew(self) -> None:
        """Make a new private copy."""
        self._attributes = Attributes(self.original)
        self._manner = self.findings.manner
        self.copy = self.private_copy()
        self._slots = self.copy.slots()

    def follow(self) -> None:
        """Make a new private copy if attributes of the model have changed since the last, such as a temperature."""
        if self._manner != self.findings.manner or self._attributes.changed():
            self.renew()

    def private_copy(self, *, own: bool = False) -> LossModule:
        """Return a private copy in the modes of this evaluation; ``own``: with tensors of its own, to be written to."""

        def owned(tensor: Tensor) -> Tensor:
            copied = self.converted(tensor).clone()
            if not isinstance(tensor, nn.Parameter):
                return copied
            return nn.Parameter(copied, requires_grad=self.findings.with_gradients and copied.is_floating_point())

        with self.held():
            module = self.original.private_copy(owned if own else None).eval()
        if self.shards is not None:
            module.units = Units(module, self.shards)
            if own:
                module.units.divide(dict(module.named_parameters()), self.rows)
        if self.batchnorm == "batch":
            use_batch_statistics(module)
        for name in self.findings.drawing or ():
            module.get_submodule(name).training = True
        if self.findings.redirected:
            slots = module.slots()
            module.redirect = {number: slots[name][0] for number, name in self.outer.items()}
        if self.findings.restored:
            module.fresh = Attributes(module)
        return module

    def place(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors in place of the private copy's, where they stay: a backward pass may run a part of it again."""
        with ALONE:
            if self.copy.units is not None:
                self.copy.units.place(tensors, self.rows, alike=not self.spread)
            for name, tensor in tensors.items():
                for owner, key in self._slots[name]:
                    owner[key] = tensor

    def settle(self, point: dict[str, Tensor], constants: dict[str, Tensor]) -> None:
        """Put a point and its constants in place, with fresh copies of what a pass may write to."""
        tensors = {f"model.{name}": tensor for name, tensor in point.items()} | constants
        touched = [name for name, _ in self.original.named_buffers()]
        touched += [name for name in self.findings.written if not tensors[name].requires_grad]
        self.place(tensors | {name: tensors[name].clone() for name in touched})

    # ------------------------------------------------------------------------------------------------------ the tensors

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The selected parameters, by name, that the model has now."""
        with self.held():
            current = dict(self.original.model.named_parameters())
        return {name: current[name] for name in self.layout.names}

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a sharded model holds its shards, which it may not after a forward pass."""
        return contextlib.nullcontext() if self.shards is None else resharded(self.original)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return this process's part of a tensor of the shape of a parameter, or of one that is divided as it is."""
        if self.shards is None:
            return tensor
        if hasattr(tensor, "to_local"):
            own: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]  # torch does not annotate detach
            return own
        return self.rows[f"model.{name}"].of(tensor)

    @property
    def precision(self) -> torch.dtype:
        """The coarsest data type that takes part in an evaluation."""
        with self.held():
            own = {parameter.dtype for parameter in self.original.model.parameters() if parameter.is_floating_point()}
        taking_part = ({self.cast} if self.cast is not None else own) | ({self.autocast} if self.autocast else set())
        coarsest: torch.dtype = max(taking_part, key=lambda dtype: torch.finfo(dtype).eps)
        return coarsest

    @property
    def labels(self) -> Settings:
        """The choices, and what was found, in plain values."""
        findings, hooks = self.findings, self.original.foreign_hooks
        own = sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes.values()})
        name = str(self.dtype).removeprefix("torch.")
        random = "nothing draws random numbers" if findings.drawing == [] else True
        special = {
            "sharded over": self.shards is not None and f"{self.shards.mesh.count} processes",
            "weights": own != [name] and ", ".join(own),
            "autocast": str(self.autocast or "").removeprefix("torch."),
            "dropout": self.dropout and random,
            "hooks left out": hooks,
            "weighed by": findings.weighing != SAMPLES and findings.weighing.counts,
            "values": findings.with_gradients and "with gradients enabled",
            "statistics": self.foreign and "of other weights",
            "processes": self.ranks.count > 1 and self.ranks.count,
            "examination": findings.examination and findings.examination.verdict,
        }
        return {
            "batchnorm": describe_policy(self.copy, self.batchnorm),
            "samples": self.batches.samples,
            "batches": len(self.batches),
            "parameters": self.space.size,
            "dtype": name,
            "device": self.device.type,
            **{key: value for key, value in special.items() if value},
            **self.second_derivatives.settings,
        }

    def point(self) -> Tensor:
        """Return a copy of the model's current weights, shape ``(size,)``."""
        flat = self.layout.flatten(self.part(name, p.detach()) for name, p in self.parameters.items())
        return flat.to(device=self.device, dtype=self.dtype)

    def views(self, w: Tensor | None) -> dict[str, Tensor]:
        """Return a point in pieces by name, each in the precision it is evaluated in; ``None``: the current weights."""
        if w is None:
            flat = self.point()
        else:
            self.layout.check(w, "point w")
            flat = w.detach().to(device=self.device, dtype=self.dtype)
        views = {name: view.to(self.dtypes[name]) for name, view in self.layout.views(flat).items()}
        if w is not None and not self._told and any(dtype.itemsize < 4 for dtype in self.dtypes.values()):
            self._warn_of_rounding(flat, views)
        return views

    def _warn_of_rounding(self, flat: Tensor, views: dict[str, Tensor]) -> None:
        norm = self.space.norm
        lost, distance = norm(self.layout.flatten(views.values()) - flat), norm(flat - self.point())
        if bool(lost > _ROUNDED * distance):
            self._told = True
            warnings.warn(
                f"the weights are evaluated in half precision, whose rounding moves the point by {float(lost):.1e}, "
                f"where it is {float(distance):.1e} away from the current weights: measure a smooth function with "
                "dtype=torch.float32",
                ApproximationWarning,
                stacklevel=2,
            )

    def leaves(self, w: Tensor | None = None) -> dict[str, Tensor]:
        """Return a point in pieces by name that require gradients; ``None``: the current weights."""
        # Views of one vector would each send back a vector of full length; leaves send back their own piece.
        return {name: view.detach().clone().requires_grad_() for name, view in self.views(w).items()}

    def pieces(self, w: Tensor | None = None) -> dict[str, Tensor]:
        """Return a point in pieces by name as values are computed: they require gradients only where values need it."""
        return self.leaves(w) if self.findings.with_gradients else self.views(w)

    def constants(self, w: Tensor | None = None) -> dict[str, Tensor]:
        """Return all else that the loss depends on at a point, by its name in the private copy.

        It is the other parameters, those of the criterion, and buffers. The policy ``"recalibrate"`` reads the data
        once for the statistics of BatchNorm at ``w``. Several processes all take the buffers of the first, as
        ``DistributedDataParallel`` does: in training each has its own running statistics.
        """
        selected = {f"model.{name}" for name in self.layout.names}
        with self.held():
            fixed = {name: self.converted(p) for name, p in self.original.named_parameters() if name not in selected}
        buffers = {name: self.converted(buffer) for name, buffer in self.original.named_buffers()}
        buffers = (self.ranks if self.shards is None else Ranks()).tensors_of_first(buffers)
        if self.batchnorm == "recalibrate":
            pieces = {f"model.{name}": piece for name, piece in self.pieces(w).items()}
            buffers = self._recalibrated(pieces | fixed, buffers)
        return fixed | buffers

    def converted(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the model on the device and in the precision of evaluation, detached; its shard here."""
        dtype = self.cast if self.cast is not None and tensor.is_floating_point() else tensor.dtype
        own = tensor.detach()
        return (own.to_local() if hasattr(own, "to_local") else own).to(device=self.device, dtype=dtype)

    def _recalibrated(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        with ALONE:
            return self._collected(parameters, buffers)

    def _collected(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        fresh = blank_statistics(self.copy, {name: tensor.clone() for name, tensor in buffers.items()})
        seen = 0.0
        try:
            with self.apart("statistics of BatchNorm"), self.evaluating() as stream:
                self.place(parameters | fresh)
                for index, batch, size, counts in passes(self, [float(size) for size in self.batches.own_sizes]):
                    stream.restart(self.seed + index)
                    weight = size if counts else 0.0
                    seen += weight
                    collect_statistics(self.copy, share=weight / seen if seen else 0.0)
                    self.copy(batch)
        finally:
            collect_statistics(self.copy, share=None)
        # A layer may have put another tensor in place of the one that it was given.
        found = {name: self._slots[name][0][0][self._slots[name][0][1]].detach() for name in fresh}
        return averaged_statistics(self.copy, found, seen, self.ranks)

    # ------------------------------------------------------------------------------------------------------ the batches

    @property
    def weights(self) -> list[float]:
        """Weight of every batch of this process in the mean."""
        if self._weights is None:
            weighing = self.findings.weighing
            with self.ranks.apart("weighing batches"):
                if weighing == SAMPLES:
                    weights = [float(size) for size in self.batches.own_sizes]
                elif weighing.count is not None:
                    weights = [weighing.count(batch) for batch in self.batches]
                else:
                    weights = self.criterion_counts()
            self._weights = weights
            if not float(self.ranks.sum(torch.tensor(sum(weights), dtype=torch.float64))) > 0:
                raise ValueError(
                    f"no batch holds anything that the loss counts ({weighing.counts}): expected at least one; "
                    "check the labels"
                )
        return self._weights

    def criterion_counts(self) -> list[float]:
        """Return what the criterion counts on this process's batches: its sum over its mean, at the current weights."""
        total, mean = (with_reduction(self.copy.loss_fn, reduction) for reduction in ("sum", "mean"))
        counts = []
        with self.ranks.apart("counting what the criterion counts"), self.evaluating() as stream:
            self.settle(self.pieces(), self.constants())
            for index, batch, _, own in passes(self, [1.0] * len(self.batches.own)):
                stream.restart(self.seed + index)
                output = self.copy.model(batch[0])
                if own:
                    counts.append(counted(*(float(c(output, batch[1])) for c in (mean, total) if c is not None)))
        return counts

    def batch_losses(
        self,
        point: dict[str, Tensor],
        constants: dict[str, Tensor],
        stream: RandomStream,
        *,
        skip: int = 0,
        cut: bool = False,
    ) -> Iterator[BatchLoss]:
        """Yield the loss of every batch of this process that weighs anything, after the first ``skip`` of them.

        With ``cut`` the loss is cut off from the parameters where the model puts out its tensors; both ends come, too.
        """
        for one in passes(self, self.weights):
            if skip:
                skip -= 1
                continue
            yield self._batch_loss(one, point, constants, stream, cut=cut)  # held by nothing here

    def _batch_loss(
        self,
        one: Pass,
        point: dict[str, Tensor],
        constants: dict[str, Tensor],
        stream: RandomStream,
        *,
        cut: bool,
    ) -> BatchLoss:
        cutting: contextlib.AbstractContextManager[list[tuple[Tensor, Tensor]]]
        cutting = self.copy.cut_outputs() if cut else contextlib.nullcontext([])
        with ALONE, cutting as pairs:
            # Every batch has its own seed: none sees what another drew.
            stream.restart(self.seed + one.number)
            self.settle(point, constants)
            value, weight = self.evaluate(one.batch, one.weight)
        weight = weight if one.counts else 0.0
        term, scale = (value * weight, 1.0) if self.spread else (value, weight)
        outputs, cuts = zip(*pairs, strict=True) if pairs else ((), ())
        return BatchLoss(value, weight, outputs, cuts, one.number, one.batch if cut else None, term, scale)

    def evaluate(
        self, batch: Batch, weight: float, forward: Callable[[Batch], Any] | None = None
    ) -> tuple[Tensor, float]:
        """Return the mean loss of a batch and its weight, at the tensors in place, or by another forward pass."""
        half = self.autocast
        # Without its cache, which would tie the graphs of batches to each other.
        cast = torch.autocast(self.device.type, dtype=half, cache_enabled=False) if half else contextlib.nullcontext()
        with cast, explained(batch):
            return mean_and_weight((forward or self.copy)(batch), weight, sums=self.findings.weighing.sums)

    # ----------------------------------------------------------------------------------------------------- the contexts

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[RandomStream]:
        """Inside, forward passes for values run; restart the stream with ``seed + index`` before batch ``index``."""
        half = self.autocast
        autocast = torch.autocast(self.device.type, dtype=half, enabled=half is not None, cache_enabled=False)
        gradients = torch.set_grad_enabled(self.findings.with_gradients)
        with gradients, autocast, RandomStream(self.seed) as stream, self.kernels(twice=False), self.packing():
            yield stream

    @contextlib.contextmanager
    def deriving(self, *, twice: bool = False) -> Iterator[RandomStream]:
        """Inside, passes for derivatives run; ``twice``: for second ones."""
        # The stream comes first: with it comes the lock under which torch's flags are set.
        with (
            torch.enable_grad(),
            no_autocast(self.device),
            RandomStream(self.seed) as stream,
            self.kernels(twice=twice),
            self.packing(),
        ):
            yield stream

    def packing(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which autograd keeps shards instead of whole weights."""
        return contextlib.nullcontext() if self.shards is None else self.shards.gatherer.packing()

    @contextlib.contextmanager
    def kernels(self, *, twice: bool) -> Iterator[None]:
        """Inside, passes avoid kernels that compute something else without gradients, or lack derivatives."""
        fast = torch.backends.mha.get_fastpath_enabled()
        with contextlib.ExitStack() as stack:
            if twice or self.dropout:  # fused attention has no second derivative, and other draws of dropout
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # The path without gradients of nn.TransformerEncoder leaves padded positions zero.
            stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
            yield

    def find_randomness(self) -> None:
        """Find the modules that draw random numbers in training mode, and put them into it, once and where wanted."""
        if not self.dropout or self.findings.drawing is not None:
            return
        batch = self.batches.first()
        with self.ranks.apart("looking for what draws random numbers"), self.evaluating() as stream:
            stream.restart(self.seed)
            self.settle(self.views(None), self.constants())
            self.findings.drawing = use_randomness(self.copy, lambda: self.copy(batch), stream)


def _tensors(module: LossModule) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())
