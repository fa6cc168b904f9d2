"""SGD with momentum and AdamW whose gradient is taken at perturbed weights, and the methods of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from ._base import PerturbedOptimizer, Restore, WeightDecayAt
from .filters import ParameterFilter
from .perturbation import Perturbation
from .schedules import Schedule, require_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MSAM", "NAG", "SAM", "AdamWMSAM", "AdamWSAM", "PerturbedAdamW", "PerturbedSGD"]


_LONGEST = 1e4  # |c| / lr up to which the fused step is taken in place: see PerturbedSGD._advance_in_place


class PerturbedSGD(PerturbedOptimizer):
    r"""SGD with momentum, its gradient taken at ``w + ε``.

    ``v ← μ v + (1 − τ)(g(w + ε) + λ w)``, then ``w ← w − lr v``, by torch's own kernels; without a perturbation, or at
    ρ = 0, it is :class:`torch.optim.SGD` to the bit.

    Parameters
    ----------
    params : iterable
        Parameters, named parameters or groups, as for torch. Groups may override ``rho`` and set ``perturb=False``.
    lr : float or Tensor
        Learning rate; default 1e-3 as torch's.
    momentum : float
        μ ≥ 0.
    dampening : float
        τ.
    weight_decay : float
        λ ≥ 0.
    perturbation : Perturbation, optional
        Where the gradient is taken.
    weight_decay_at : {"true", "perturbed"}
        Where weight decay reads the weights: w as in SAM, or w + ε as in the authors' MSAM and torch's Nesterov.
    restore : {"auto", "subtract", "copy"}
        How the true weights come back: by subtracting exactly what was added (no memory, one rounding a step), or from
        a copy (exact, one tensor a parameter). "auto" subtracts where the direction lasts until the next step, is not
        scaled, and the weights are float32 or float64; everything else is copied.
    maximize, foreach, fused : bool
        As for torch.

    Raises
    ------
    ValueError
        For negative or non-finite options, and a momentum perturbation without momentum.

    Notes
    -----
    Between steps the parameters hold ``w + ε`` for every direction but "gradient" (the paper's Algorithm 1): evaluate
    and save inside :meth:`unperturbed`, or save model and optimizer together.
    """

    _momentum_key: ClassVar[str] = "momentum_buffer"

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
        if self._direction_name == "momentum" and group["perturb"] and not group["momentum"]:
            raise ValueError(
                "direction='momentum' needs a momentum buffer, got momentum=0; set a momentum, or use "
                "direction='last_gradient'."
            )

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], weight_decay: float) -> None:
        buffers = [self.state[p].get("momentum_buffer") if group["momentum"] else None for p in weights]
        # torch's fused kernel takes buffers for all or for none
        for fresh in {b is None for b in buffers}:
            rows = [i for i, b in enumerate(buffers) if (b is None) == fresh]
            updated = [buffers[i] for i in rows]
            sgd(
                [weights[i] for i in rows],
                [grads[i] for i in rows],
                updated,
                weight_decay=weight_decay,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=False,
                maximize=group["maximize"],
                has_sparse_grad=False,
                foreach=group["foreach"],
                fused=group["fused"],
            )
            if group["momentum"] and fresh:
                for i, buffer in zip(rows, updated, strict=True):
                    self.state[weights[i]]["momentum_buffer"] = buffer

    def _advance_in_place(self, group: dict[str, Any]) -> bool:
        """Step without going back first, in one pass of torch's fused kernel.

        At ``w̃ = w + c v`` let ``g' = g + λ w̃``. The new buffer is ``v' = m v + g'`` with ``m = μ − λ c`` for decay at
        the true weights and ``m = μ`` at the perturbed ones. Nesterov's kernel with factor m and learning rate
        ``−c / m`` leaves ``w̃ + (c / m) g' + c v'``, and as ``v = (v' − g') / m`` this is the new true weight plus
        ``(c + c / m + lr) v'``: displaced along the new buffer by a known multiple, where the next displacement starts.

        ``g'`` enters scaled by ``c / m`` and leaves again, so that rounding v' costs ``2⁻²⁴ |c| / (m lr)`` of this
        step's length in float32. Up to 1e4 that is below 0.07 %; beyond (the last 0.9 % of a cosine schedule from
        lr = 0.5 at ρ / ‖v‖ = 1) the step is taken from the true weights.
        """
        standing = group["standing"]
        if (
            self._direction_name != "momentum"
            or not group["fused"]
            or group["dampening"]
            or standing is None
            or isinstance(group["lr"], Tensor)
            or torch.compiler.is_compiling()
        ):
            return False
        weights = group["params"]
        grads = [p.grad for p in weights if p.grad is not None]
        exact = (torch.float32, torch.float64)
        if not all(standing) or len(grads) < len(weights):
            return False
        if not all(p.is_cpu and p.dtype in exact and "true_weight" not in self.state[p] for p in weights):
            return False
        buffers = self._directions(weights)
        c = group["applied"].item()
        factor = group["momentum"]
        if group["weight_decay_at"] == "true":
            factor -= group["weight_decay"] * c
        if factor < 0.5 or abs(c) > _LONGEST * group["lr"]:
            return False
        sgd(
            weights,
            grads,
            [*buffers],
            weight_decay=group["weight_decay"],
            momentum=factor,
            lr=-c / factor,
            dampening=0.0,
            nesterov=True,
            maximize=group["maximize"],
            has_sparse_grad=False,
            fused=True,
        )
        group["applied"].fill_(c + c / factor + group["lr"])
        return True

    def _decay_at_perturbed(
        self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], decayed: list[Tensor]
    ) -> list[Tensor]:
        decay = group["weight_decay"]
        return list(torch._foreach_add(grads, weights, alpha=-decay if group["maximize"] else decay))


class PerturbedAdamW(PerturbedOptimizer):
    r"""AdamW, its gradient taken at ``w + ε``; the momentum direction is ``exp_avg``.

    Parameters
    ----------
    params : iterable
        As for :class:`PerturbedSGD`.
    lr, betas, eps, weight_decay, amsgrad : float, (float, float), float, float, bool
        As for :class:`torch.optim.AdamW`, whose defaults they have.
    perturbation, weight_decay_at, restore
        As for :class:`PerturbedSGD`.
    maximize, foreach, capturable, fused : bool
        As for torch.

    Raises
    ------
    ValueError
        For options out of range, and a momentum perturbation at β₁ = 0.
    """

    _momentum_key: ClassVar[str] = "exp_avg"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        perturbation: Perturbation | None = None,
        weight_decay_at: WeightDecayAt = "true",
        restore: Restore = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "fused": fused,
        }
        super().__init__(params, options, perturbation, weight_decay_at, restore)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        require_nonnegative("eps", group["eps"])
        for beta in group["betas"]:
            require_nonnegative("betas", beta)
            if beta >= 1:
                raise ValueError(f"betas must lie in [0, 1), got {beta}; use 0.9 and 0.999, say.")
        if isinstance(group["lr"], Tensor) and group["foreach"] and not group["capturable"]:
            raise ValueError("a tensor lr with foreach=True needs capturable=True, got False; set it, or fused=True.")

    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], weight_decay: float) -> None:
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        states = [self.state[p] for p in weights]
        for p, state in zip(weights, states, strict=True):
            if "exp_avg" not in state:
                on_device = group["capturable"] or group["fused"]
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu")
                for key in keys:
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        exp_avgs, exp_avg_sqs, *maxima = [[state[key] for state in states] for key in keys]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            grads,
            exp_avgs,
            exp_avg_sqs,
            maxima[0] if maxima else [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            capturable=group["capturable"],
            fused=group["fused"],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=weight_decay,
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def _decay_at_perturbed(
        self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], decayed: list[Tensor]
    ) -> list[Tensor]:
        # w − lr λ w̃ with w = w̃ − ε is w̃ (1 − lr λ) − ε: shrink before ε is subtracted
        torch._foreach_sub_(decayed, torch._foreach_mul(weights, group["lr"] * group["weight_decay"]))
        return grads


class NAGOptions(TypedDict, total=False):
    """Keywords of :class:`PerturbedSGD` that :class:`NAG` hands on."""

    dampening: float
    restore: Restore
    maximize: bool
    foreach: bool | None
    fused: bool | None


class SGDOptions(NAGOptions, total=False):
    """Keywords of :class:`PerturbedSGD` that :class:`MSAM` and :class:`SAM` hand on."""

    weight_decay_at: WeightDecayAt


class AdamWOptions(TypedDict, total=False):
    """Keywords of :class:`PerturbedAdamW` that :class:`AdamWMSAM` and :class:`AdamWSAM` hand on."""

    weight_decay_at: WeightDecayAt
    restore: Restore
    maximize: bool
    foreach: bool | None
    capturable: bool
    fused: bool | None


Subset = Literal["all"] | ParameterFilter


class MSAM(PerturbedSGD):
    """Momentum-SAM: ``ε = −ρ v / ‖v‖``, one gradient a step (the paper's Algorithm 1).

    Parameters
    ----------
    params, lr, momentum, weight_decay, **options
        As for :class:`PerturbedSGD`.
    rho : float or Schedule
        Default 3.0: the paper's search (A15) finds the optimum at 2 to 3 for convolutional nets on CIFAR-100.
    subset : "all" or ParameterFilter
        Which parameters move.
    """

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
        perturbation = Perturbation(direction="momentum", rho=rho, subset=subset)
        super().__init__(params, lr, momentum, weight_decay=weight_decay, perturbation=perturbation, **options)


class SAM(PerturbedSGD):
    """Sharpness-aware minimisation: ``ε = ρ g / ‖g‖``, two gradients a step (Foret et al., arXiv 2010.01412).

    Parameters
    ----------
    params, lr, momentum, weight_decay, **options
        As for :class:`PerturbedSGD`.
    rho : float or Schedule
        Default 0.05 as Foret et al.; the MSAM paper finds 0.2 to 0.3 for CIFAR-100 (A15), and ASAM wants about 10 times
        more.
    adaptive : bool
        ASAM: ``ε = ρ T² g / ‖T g‖`` with ``T = |w|`` (Kwon et al., arXiv 2102.11600).
    subset : "all" or ParameterFilter
        Which parameters move.

    Notes
    -----
    ``step(closure)``, or ``first_step()`` and ``second_step()`` each after a ``backward()``. Under data parallelism
    the first ``backward`` may run inside the model's ``no_sync()``: each process then climbs its own batch's gradient
    (m-sharpness) and only the second gradient is averaged; without it both are.
    """

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
        perturbation = Perturbation(
            direction="gradient", rho=rho, scale="adaptive" if adaptive else "none", subset=subset
        )
        super().__init__(params, lr, momentum, weight_decay=weight_decay, perturbation=perturbation, **options)


class NAG(PerturbedSGD):
    """Nesterov's accelerated gradient: ``ε = −lr μ v``.

    At a constant learning rate its (perturbed) parameters are those of ``torch.optim.SGD(nesterov=True)`` at every
    step, up to rounding; that is why weight decay acts at the perturbed weights here.

    Parameters
    ----------
    params, lr, momentum, weight_decay, weight_decay_at, **options
        As for :class:`PerturbedSGD`.
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


class AdamWMSAM(PerturbedAdamW):
    """AdamW with MSAM's perturbation along its first moment: ``ε = −ρ m / ‖m‖``.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, **options
        As for :class:`PerturbedAdamW`.
    rho : float or Schedule
        Default 3.0, as for :class:`MSAM`.
    subset : "all" or ParameterFilter
        Which parameters move.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rho: float | Schedule = 3.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        subset: Subset = "all",
        **options: Unpack[AdamWOptions],
    ) -> None:
        perturbation = Perturbation(direction="momentum", rho=rho, subset=subset)
        super().__init__(params, lr, betas, eps, weight_decay, perturbation=perturbation, **options)


class AdamWSAM(PerturbedAdamW):
    """AdamW with SAM's perturbation: ``ε = ρ g / ‖g‖``, two gradients a step.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, **options
        As for :class:`PerturbedAdamW`.
    rho, adaptive, subset
        As for :class:`SAM`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rho: float | Schedule = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adaptive: bool = False,
        subset: Subset = "all",
        **options: Unpack[AdamWOptions],
    ) -> None:
        perturbation = Perturbation(
            direction="gradient", rho=rho, scale="adaptive" if adaptive else "none", subset=subset
        )
        super().__init__(params, lr, betas, eps, weight_decay, perturbation=perturbation, **options)
