"""SGD with momentum whose gradient is taken at perturbed weights, and the methods that stand on it: MSAM, SAM, NAG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from .conventions import without_base
from .displacement import Restore
from .filters import Subset
from .optimizers import BaseOptions, PerturbedOptimizer, WeightDecayAt
from .perturbation import Perturbation, along_gradient, along_momentum
from .schedules import Schedule, require_nonnegative
from .shards import like, parted

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MSAM", "NAG", "SAM", "PerturbedSGD"]

_LONGEST = 1e4  # |c| / lr up to which the fused step is taken in place: see PerturbedSGD._update_in_place


class PerturbedSGD(PerturbedOptimizer):
    r"""SGD with momentum that takes its gradient at ``w + ε``.

    The step is ``v ← μ v + (1 − τ)(g(w + ε) + λ w)``, then ``w ← w − lr v``, by torch's own kernels. Without a
    perturbation, or at ρ = 0, it is :class:`torch.optim.SGD` to the bit.

    Parameters
    ----------
    params : iterable
        Parameters, named parameters or groups, as torch takes them. A group may have its own ``rho``, and
        ``perturb=False`` leaves its parameters where they are.
    lr : float or Tensor
        Learning rate. The default is torch's, 1e-3.
    momentum : float
        Momentum μ, zero or more.
    dampening : float
        Dampening τ of the gradient in the momentum, zero or more.
    weight_decay : float
        Weight decay λ, zero or more.
    perturbation : Perturbation, optional
        The rule for ε. None takes the gradient at w.
    weight_decay_at : {"true", "perturbed"}
        Point at which weight decay reads the weights. "true" is w, as in SAM. "perturbed" is w + ε, as in the authors'
        MSAM and in torch's Nesterov.
    restore : {"auto", "subtract", "copy"}
        Way back to the true weights. "subtract" takes away exactly what was added: no memory, one rounding a step.
        "copy" keeps the true weights: exact, one tensor a parameter. "auto" subtracts where the direction lasts until
        the next step and is not scaled, and the weights are float32 or float64; it copies elsewhere.
    maximize, foreach, fused : bool
        Options of :class:`torch.optim.SGD`, with its defaults.

    Raises
    ------
    TypeError
        If an option has the wrong type.
    ValueError
        If an option is negative or not finite, or the momentum is perturbed along and is 0.

    Notes
    -----
    Between steps the parameters hold ``w + ε`` for every direction but "gradient" (the paper's Algorithm 1). Evaluate
    and save inside :meth:`unperturbed`, or save model and optimizer together.
    """

    _momentum_key: ClassVar[str] = "momentum_buffer"
    _buffer_keys: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    _method: ClassVar[str] = "SGD"
    _method_key: ClassVar[str] = "momentum"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        *,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        perturbation: Perturbation | None = None,
        weight_decay_at: WeightDecayAt = "true",
        restore: Restore = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, options, perturbation, weight_decay_at, restore)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        require_nonnegative("momentum", group["momentum"])
        require_nonnegative("dampening", group["dampening"])
        if group["weight_decay_at"] == "updated":
            raise ValueError(
                "weight_decay_at='updated' is for AdamW, got it for SGD, whose decay enters the gradient; "
                "choose 'true' or 'perturbed'."
            )
        if self._displacement.key == "momentum_buffer" and group["perturb"] and not group["momentum"]:
            raise ValueError(
                "direction='momentum' needs a momentum buffer, got momentum=0; set a momentum, or use "
                "direction='last_gradient'."
            )

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], weight_decay: float) -> None:
        momentum, parts = group["momentum"], parted(weights)
        rows: tuple[list[int], list[int]] = ([], [])  # without and with a buffer: the fused kernel takes all or none
        for i, p in enumerate(weights):
            rows[bool(momentum) and "momentum_buffer" in self.state[p]].append(i)
        for known, some in enumerate(rows):
            if not some:
                continue
            members = [weights[i] for i in some]
            buffers: list[Any] = [self.state[p]["momentum_buffer"] if known else None for p in members]
            if known:
                buffers = parts(buffers)
            sgd(
                parts(members),
                parts([grads[i] for i in some]),
                buffers,
                weight_decay=weight_decay,
                momentum=momentum,
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=False,
                maximize=group["maximize"],
                has_sparse_grad=False,
                foreach=group["foreach"],
                fused=group["fused"],
            )
            if momentum and not known:
                for p, buffer in zip(members, like(members, buffers), strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    def _update_in_place(self, group: dict[str, Any]) -> bool:
        """Step without going back first, in one pass of torch's fused kernel.

        At ``w̃ = w + c v`` let ``g' = g + λ w̃``. The new buffer is ``v' = m v + g'`` with ``m = μ − λ c`` for decay at
        the true weights and ``m = μ`` at the perturbed ones. Nesterov's kernel with factor m and learning rate
        ``−c / m`` leaves ``w̃ + (c / m) g' + c v'``, and as ``v = (v' − g') / m`` this is the new true weight plus
        ``(c + c / m + lr) v'``: displaced along the new buffer by a known multiple, where the next displacement starts.

        ``g'`` enters scaled by ``c / m`` and leaves again, so that rounding v' costs ``2⁻²⁴ |c| / (m lr)`` of this
        step's length in float32. Up to 1e4 that is below 0.07 %; beyond (the last 0.9 % of a cosine schedule from
        lr = 0.5 at ρ / ‖v‖ = 1) the step is taken from the true weights.
        """
        weights, standing, lr = group["params"], group["standing"], group["lr"]
        if (
            self._displacement.key != "momentum_buffer"
            or not group["fused"]
            or group["dampening"]
            or standing is None
            or isinstance(lr, Tensor)
            or torch.compiler.is_compiling()
        ):
            return False
        grads, buffers = [], []
        for p, stands in zip(weights, standing, strict=True):
            state = self.state[p]
            exact = p.is_cpu and p.dtype in (torch.float32, torch.float64)
            if not (stands and exact) or p.grad is None or "true_weight" in state:
                return False
            grads.append(p.grad)
            buffers.append(state["momentum_buffer"])
        c, factor = group["applied"].item(), group["momentum"]
        if group["weight_decay_at"] == "true":
            factor -= group["weight_decay"] * c
        if factor < 0.5 or abs(c) > _LONGEST * lr:
            return False
        parts = parted(weights)
        sgd(
            parts(weights),
            parts(grads),
            [*parts(buffers)],
            weight_decay=group["weight_decay"],
            momentum=factor,
            lr=-c / factor,
            dampening=0.0,
            nesterov=True,
            maximize=group["maximize"],
            has_sparse_grad=False,
            fused=True,
        )
        self._displacement.moved_to(group, c + c / factor + lr)
        return True

    def _decay_at_perturbed(
        self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], decayed: list[Tensor]
    ) -> list[Tensor]:
        decay = group["weight_decay"]
        return list(torch._foreach_add(grads, weights, alpha=-decay if group["maximize"] else decay))


class NAGOptions(BaseOptions, total=False):
    """Keywords of :class:`PerturbedSGD` that :class:`NAG` hands on."""

    dampening: float


class SGDOptions(NAGOptions, total=False):
    """Keywords of :class:`PerturbedSGD` that :class:`MSAM` and :class:`SAM` hand on."""

    weight_decay_at: WeightDecayAt


class MSAM(PerturbedSGD):
    """Momentum-SAM: ``ε = −ρ v / ‖v‖`` with one gradient a step (the paper's Algorithm 1).

    Parameters
    ----------
    params, lr, momentum, weight_decay, **options
        Options of :class:`PerturbedSGD`.
    rho : float or Schedule
        Strength ρ. The default is 3.0, as the paper's search (A15) finds the optimum at 2 to 3 for convolutional nets
        on CIFAR-100.
    subset : "all" or ParameterFilter
        Parameters that move.
    """

    @without_base
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rho: float | Schedule = 3.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        subset: Subset = "all",
        **options: Unpack[SGDOptions],
    ) -> None:
        perturbation = along_momentum(rho, subset)
        super().__init__(params, lr, momentum, weight_decay=weight_decay, perturbation=perturbation, **options)


class SAM(PerturbedSGD):
    """Sharpness-aware minimisation: ``ε = ρ g / ‖g‖`` with two gradients a step (Foret et al., arXiv 2010.01412).

    Parameters
    ----------
    params, lr, momentum, weight_decay, **options
        Options of :class:`PerturbedSGD`.
    rho : float or Schedule
        Strength ρ. The default is 0.05, as in Foret et al. The MSAM paper finds 0.2 to 0.3 for CIFAR-100 (A15), and
        ASAM wants about 10 times more.
    adaptive : bool
        True for ASAM: ``ε = ρ T² g / ‖T g‖`` with ``T = |w|`` (Kwon et al., arXiv 2102.11600).
    subset : "all" or ParameterFilter
        Parameters that move.

    Notes
    -----
    Call ``step(closure)``, or call ``first_step()`` and ``second_step()``, each after a ``backward()``. Under data
    parallelism the first ``backward`` may run inside the model's ``no_sync()``. Each process then climbs its own
    batch's gradient (m-sharpness), and only the second gradient is averaged. Without ``no_sync()`` both are.
    """

    @without_base
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rho: float | Schedule = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        adaptive: bool = False,
        subset: Subset = "all",
        **options: Unpack[SGDOptions],
    ) -> None:
        perturbation = along_gradient(rho, adaptive, subset)
        super().__init__(params, lr, momentum, weight_decay=weight_decay, perturbation=perturbation, **options)


class NAG(PerturbedSGD):
    """Nesterov's accelerated gradient: ``ε = −lr μ v``.

    At a constant learning rate its perturbed parameters are those of ``torch.optim.SGD(nesterov=True)`` at every step,
    up to rounding. That is why weight decay acts at the perturbed weights here.

    Parameters
    ----------
    params, lr, momentum, weight_decay, weight_decay_at, **options
        Options of :class:`PerturbedSGD`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        weight_decay_at: WeightDecayAt = "perturbed",
        **options: Unpack[NAGOptions],
    ) -> None:
        require_nonnegative("momentum", momentum)
        perturbation = Perturbation(direction="momentum", rho=momentum, normalize="lr")
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay=weight_decay,
            perturbation=perturbation,
            weight_decay_at=weight_decay_at,
            **options,
        )
