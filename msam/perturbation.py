"""A perturbation is six switches; this is the displacement that they stand for, and its arithmetic."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from operator import attrgetter
from typing import Literal, get_args

import torch
from torch import Tensor

from .filters import Subset
from .schedules import Number, Schedule, as_schedule
from .shards import WHOLE, Groups, groups_of, here, sum_over

__all__ = ["Direction", "Normalization", "Perturbation", "Scale", "global_norm", "has_float64", "scaled"]

Direction = Literal["momentum", "gradient", "last_gradient", "random"]
Normalization = Literal["l2", "none", "lr"]
Scale = Literal["none", "adaptive", "relative"]

_IS_CPU, _DTYPE = attrgetter("is_cpu"), attrgetter("dtype")
_SMALL = 1e-10  # down to this norm, squares of float32 that underflow are less than its rounding
_PIECE = 1 << 17  # elements a sum in float32 may run over on the CPU before it loses digits


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}; choose one of them.")


@dataclass(frozen=True)
class Perturbation:
    r"""Where the training gradient is evaluated: at ``w + ε`` instead of ``w``.

    With the raw direction ``d`` over all displaced parameters together, ``T = |w|`` taken elementwise at the true
    weights, and the sign ``s = −sign`` for the momentum direction, ``s = +sign`` for every other:

    ============  =========================  ====================  =====================
    scale         normalize="l2"             normalize="none"      normalize="lr"
    ============  =========================  ====================  =====================
    "none"        ``s ρ d / ‖d‖``            ``s ρ d``             ``s ρ lr d``
    "adaptive"    ``s ρ T² d / ‖T d‖``       ``s ρ T² d``          ``s ρ lr T² d``
    "relative"    ``s ρ T d / ‖T d‖``        ``s ρ T d``           ``s ρ lr T d``
    ============  =========================  ====================  =====================

    and ``ε = 0`` where the norm is zero. The norm is one number over all parameters of all groups. The momentum
    buffer adds gradients, so ``−v`` points along the step just taken, beyond it: upwards on the next batch (Becker,
    Altrock & Risse, arXiv 2401.12033, equation of MSAM and appendix A.7 for "relative"; "adaptive" is ASAM's).
    Under ``maximize`` every direction is that of the negated objective.

    Parameters
    ----------
    direction : {"momentum", "gradient", "last_gradient", "random"}
        ``d``: the momentum buffer (``exp_avg`` of AdamW), this batch's gradient (costs a second gradient), the gradient
        used in the step before, or standard Gaussian noise drawn anew each step.
    rho : float or Schedule
        Strength ρ ≥ 0: with "l2" and no scaling the length of ε, in the weights' units.
    sign : {1, -1}
        +1 is the paper's positive ρ, −1 its negative one.
    normalize : {"l2", "none", "lr"}
        What the direction is divided or multiplied by; ``"lr"`` with ρ = μ along the momentum is Nesterov's method.
    scale : {"none", "adaptive", "relative"}
        Elementwise scaling by the weights' sizes.
    subset : "all" or ParameterFilter
        Which parameters move; the others' directions are dropped before the norm. See
        :func:`msam.normalization_layers`.
    seed : int
        Seed of the noise; the noise of step t depends on the seed and t alone and no global generator is touched.

    Raises
    ------
    ValueError
        If a switch has an unknown position, ρ is negative or not finite, or two switches contradict each other.
    TypeError
        If ρ is neither number nor schedule, or the subset no filter.
    """

    _: KW_ONLY
    direction: Direction
    rho: float | Schedule
    sign: int = 1
    normalize: Normalization = "l2"
    scale: Scale = "none"
    subset: Subset = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choice("direction", self.direction, get_args(Direction))
        _require_choice("normalize", self.normalize, get_args(Normalization))
        _require_choice("scale", self.scale, get_args(Scale))
        _require_choice("sign", self.sign, (1, -1))
        schedule = as_schedule(self.rho)
        if self.normalize == "lr" and schedule.follows_lr:
            raise ValueError(
                "normalize='lr' already ties the displacement to the learning rate, got a rho that follows it as well, "
                "which would square it; use one of the two."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}; pass a whole number.")
        if self.seed and self.direction != "random":
            raise ValueError(
                f"seed belongs to direction='random', got seed={self.seed} with direction={self.direction!r}, which "
                "draws nothing; leave it out."
            )
        if self.subset != "all" and not callable(self.subset):
            raise TypeError(
                f"subset must be 'all' or a filter (name, parameter) -> bool, got {self.subset!r}; "
                "see msam.normalization_layers."
            )

    @property
    def toward(self) -> int:
        """The sign ``s`` in front of the direction: −sign for the momentum, +sign otherwise."""
        return -self.sign if self.direction == "momentum" else self.sign

    @property
    def lasts(self) -> bool:
        """Whether ε is one scalar times tensors that stay until the next step, so that it can be subtracted."""
        return self.direction in ("momentum", "last_gradient") and self.scale == "none"

    def measured(self, directions: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """Return what the norm is taken of: ``d``, or ``T d`` when scaled; shapes as given."""
        if self.scale == "none" or not directions:
            return directions
        return list(torch._foreach_mul(torch._foreach_abs(weights), directions))

    def shaped(self, directions: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """Return what ε is a multiple of: ``d``, ``T² d`` or ``T d``; shapes as given."""
        along = self.measured(directions, weights)
        if self.scale != "adaptive" or not directions:
            return along
        return list(torch._foreach_mul(torch._foreach_abs(weights), along))

    def factor(self, norm: Tensor | None, rho: Number, lr: Number) -> Number:
        """Return the multiple: ``s ρ / ‖·‖``, ``s ρ`` or ``s ρ lr``.

        It is 0 where the norm is 0, or so small that the multiple would overflow.

        Parameters
        ----------
        norm : Tensor or None
            Norm of :meth:`measured`, 0-dimensional; only "l2" needs it.
        rho, lr : float or Tensor
            Strength and learning rate of the parameter group.

        Returns
        -------
        float or Tensor
            The multiple; a tensor is 0-dimensional and is never read on the host.

        Raises
        ------
        ValueError
            If ``normalize="l2"`` gets no norm.
        """
        if self.normalize == "lr":
            return self.toward * rho * lr
        if self.normalize == "none":
            return self.toward * rho
        if norm is None:
            raise ValueError("normalize='l2' needs the norm of the measured directions, got None; compute it first.")
        smallest = rho / torch.finfo(norm.dtype).max
        return torch.where(norm > smallest, self.toward * rho / norm, torch.zeros_like(norm))

    def norm(self, directions: list[Tensor], weights: list[Tensor], groups: Groups = ()) -> Tensor | None:
        """Return the norm of :meth:`measured` over all parameters, or None where nothing is done with it.

        Parameters
        ----------
        directions, weights : list of Tensor
            Raw directions d and true weights of all displaced parameters, whatever their group.
        groups : tuple
            Process groups among which the parameters are divided, each process having some of them.

        Returns
        -------
        Tensor or None
            0-dimensional. Along "gradient" it is always there, because it tells whether the gradients are finite.
        """
        if self.direction != "gradient" and self.normalize != "l2":
            return None
        return global_norm(self.measured(directions, weights), groups)

    def factors(
        self,
        directions: list[Tensor],
        weights: list[Tensor],
        rhos: Sequence[Number],
        lrs: Sequence[Number],
        norm: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the multiple for each parameter group, from one norm over the parameters of all groups.

        Parameters
        ----------
        directions, weights : list of Tensor
            Raw directions d and true weights of all displaced parameters, whatever their group.
        rhos, lrs : sequence of float or Tensor
            Strength and learning rate of each group.
        norm : Tensor, optional
            What :meth:`norm` returned, where it is known already.

        Returns
        -------
        list of Tensor
            One 0-dimensional tensor for each group. Along "gradient" it is NaN where a gradient is not finite (as after
            an overflow under loss scaling): then nothing is displaced.
        """
        if norm is None:
            norm = self.norm(directions, weights)
        result = []
        for rho, lr in zip(rhos, lrs, strict=True):
            factor = self.factor(norm, rho, lr)
            if not isinstance(factor, Tensor):
                device = directions[0].device if directions else None
                factor = torch.full((), factor, dtype=widest_dtype(directions), device=device)
            if self.direction == "gradient" and norm is not None:
                factor = torch.where(norm.isfinite(), factor, math.nan)
            result.append(factor)
        return result

    def displacement(
        self, directions: list[Tensor], weights: list[Tensor], *, rho: Number, lr: Number = 1.0
    ) -> list[Tensor]:
        """Return ε, the formula of the table above, for one parameter group.

        The optimizers displace the weights by the same two factors: :meth:`factors` times :meth:`shaped`.

        Parameters
        ----------
        directions : list of Tensor
            Raw directions d of the displaced parameters.
        weights : list of Tensor
            The true weights, of the same shapes.
        rho, lr : float or Tensor
            Strength ρ and learning rate (only ``normalize="lr"`` uses it).

        Returns
        -------
        list of Tensor
            ε, one tensor for each weight, in its direction's dtype.

        Examples
        --------
        >>> p = Perturbation(direction="momentum", rho=2.0)
        >>> p.displacement([torch.tensor([3.0, 4.0])], [torch.zeros(2)], rho=2.0)
        [tensor([-1.2000, -1.6000])]
        """
        (factor,) = self.factors(directions, weights, [rho], [lr])
        return scaled(self.shaped(directions, weights), factor)


def along_momentum(rho: float | Schedule, subset: Subset) -> Perturbation:
    """Return MSAM's perturbation."""
    return Perturbation(direction="momentum", rho=rho, subset=subset)


def along_gradient(rho: float | Schedule, adaptive: bool, subset: Subset) -> Perturbation:
    """Return SAM's perturbation, or ASAM's."""
    return Perturbation(direction="gradient", rho=rho, scale="adaptive" if adaptive else "none", subset=subset)


def widest_dtype(tensors: list[Tensor]) -> torch.dtype:
    """Return the dtype of scalars that belong to all the tensors: float64 if one of them has it, else float32."""
    return torch.float64 if torch.float64 in map(_DTYPE, tensors) else torch.float32


def global_norm(tensors: list[Tensor], groups: Groups = ()) -> Tensor:
    """Return ``sqrt(Σ ‖t‖²)`` as a 0-dimensional tensor on the first tensor's device.

    Parameters
    ----------
    tensors : list of Tensor
        Any shapes; DTensors count with the parts of all processes. An empty list has norm 0.
    groups : tuple
        Process groups among which the list itself is divided.

    Returns
    -------
    Tensor
        The norm in float64 if one of the tensors has it, else in float32. Squares neither underflow nor overflow: on
        the CPU they are summed again in float64 if the norm is next to nothing or too large, elsewhere always.
    """
    if groups or not WHOLE.issuperset(map(type, tensors)):
        return _norm_of_shards(tensors, groups)
    if not tensors:
        return torch.zeros(())
    device, dtype = tensors[0].device, widest_dtype(tensors)
    if all(map(_IS_CPU, tensors)) and not torch.compiler.is_compiling():
        norms = _fast_norms(tensors)
        norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device, dtype) for n in norms]))
        if _SMALL < norm.item() < math.inf:
            return norm
    return _norm_in_float64(tensors).to(device, dtype)


def _norm_of_shards(tensors: list[Tensor], groups: Groups) -> Tensor:
    """Return the norm over all processes: one sum over them for each way in which tensors are divided."""
    parts: dict[Groups, list[Tensor]] = {groups: []}
    for tensor, part in zip(tensors, here(tensors), strict=True):
        parts.setdefault((*groups_of(tensor), *groups), []).append(part)
    squares = [sum_over(among, global_norm(some).double().square()) for among, some in parts.items() if some or among]
    dtype = widest_dtype(tensors)
    if not squares:
        return torch.zeros((), dtype=dtype)
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt().to(dtype)


def _fast_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return norms on the CPU, of some tensors or pieces together; squares may underflow or overflow."""
    squares: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    others: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        whole = tensor.detach()
        if whole.is_contiguous() and whole.dtype in (torch.float32, torch.float64):
            # a dot product is faster than a norm, most of all where the tensor is in the cache
            flat = whole.view(-1)
            for part in (flat,) if flat.numel() <= _PIECE else flat.split(_PIECE):
                squares[whole.dtype].append(torch.dot(part, part))
        else:
            others[whole.dtype].append(whole)
    norms = [torch.stack(same).sum(dtype=torch.float64).sqrt() for same in squares.values()]
    for same in others.values():
        norms += torch._foreach_norm(same, 2, dtype=widest_dtype(same))
    return norms


def has_float64(kind: str) -> bool:
    """Return whether devices of a type have float64."""
    return kind in ("cpu", "cuda") or _takes_float64(kind)


@functools.cache
def _takes_float64(kind: str) -> bool:
    try:
        torch.empty(0, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):  # such as Apple's GPUs
        return False
    return True


def _norm_in_float64(tensors: list[Tensor]) -> Tensor:
    """Return the norm on the first tensor's device, with every square in float64 where the device has it."""
    by_dtype: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.device, tensor.dtype].append(tensor.detach())
    norms: list[Tensor] = []
    for (device, _), same in by_dtype.items():
        norms += torch._foreach_norm(same, 2, dtype=torch.float64 if has_float64(device.type) else torch.float32)
    first = norms[0]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(first.device, first.dtype) for n in norms]))
    return norm


def scaled(directions: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Return ``factor · direction`` for each direction, in its dtype; a 0-dimensional ``factor`` of NaN gives zeros."""
    factors = {device: factor.to(device, non_blocking=True) for device in {d.device for d in directions}}
    return [(d * factors[d.device]).masked_fill_(factors[d.device].isnan(), 0.0) for d in directions]
