"""AdamW whose gradient is taken at perturbed weights, and the methods that stand on it: AdamWMSAM, AdamWSAM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from .conventions import without_base
from .displacement import Restore
from .filters import Subset
from .optimizers import BaseOptions, PerturbedOptimizer, WeightDecayAt
from .perturbation import Perturbation, along_gradient, along_momentum
from .schedules import Schedule, require_nonnegative
from .shards import parted

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdamWMSAM", "AdamWSAM", "PerturbedAdamW"]


class PerturbedAdamW(PerturbedOptimizer):
    r"""AdamW that takes its gradient at ``w + ε``. The momentum direction is its first moment, ``exp_avg``.

    Without a perturbation, or at ρ = 0, it is :class:`torch.optim.AdamW` to the bit.

    Parameters
    ----------
    params : iterable
        Parameters, named parameters or groups, as torch takes them. A group may have its own ``rho``, and
        ``perturb=False`` leaves its parameters where they are.
    lr, betas, eps, weight_decay, amsgrad : float, (float, float), float, float, bool
        Options of :class:`torch.optim.AdamW`, with its defaults.
    perturbation : Perturbation, optional
        The rule for ε. None takes the gradient at w.
    weight_decay_at : {"true", "perturbed", "updated"}
        Point at which weight decay reads the weights. "true" is w before the step, as in torch. "perturbed" is w + ε.
        "updated" is w after the step, as in the authors' AdamW variants of MSAM and SAM.
    restore : {"auto", "subtract", "copy"}
        Way back to the true weights, explained at :class:`PerturbedSGD`.
    maximize, foreach, capturable, fused : bool
        Options of :class:`torch.optim.AdamW`, with its defaults.

    Raises
    ------
    TypeError
        If an option has the wrong type.
    ValueError
        If an option is out of range, or a tensor ``lr`` meets ``foreach=True`` without ``capturable``.
    """

    _momentum_key: ClassVar[str] = "exp_avg"
    _buffer_keys: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _method: ClassVar[str] = "AdamW"
    _method_key: ClassVar[str] = "betas"

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
        parts = parted(weights)
        later = weight_decay if group["weight_decay_at"] == "updated" else 0.0
        adamw(
            parts(weights),
            parts(grads),
            parts(exp_avgs),
            parts(exp_avg_sqs),
            parts(maxima[0]) if maxima else [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            capturable=group["capturable"],
            fused=group["fused"],
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=weight_decay - later,
            eps=group["eps"],
            maximize=group["maximize"],
        )

        if later:
            torch._foreach_mul_(parts(weights), 1 - group["lr"] * later)

    def _decay_at_perturbed(
        self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], decayed: list[Tensor]
    ) -> list[Tensor]:
        # w − lr λ w̃ with w = w̃ − ε is w̃ (1 − lr λ) − ε: shrink before ε is subtracted
        torch._foreach_sub_(decayed, torch._foreach_mul(weights, group["lr"] * group["weight_decay"]))
        return grads


class AdamWOptions(BaseOptions, total=False):
    """Keywords of :class:`PerturbedAdamW` that :class:`AdamWMSAM` and :class:`AdamWSAM` hand on."""

    weight_decay_at: WeightDecayAt
    capturable: bool


class AdamWMSAM(PerturbedAdamW):
    """AdamW with MSAM's perturbation along its first moment: ``ε = −ρ m / ‖m‖``.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, **options
        Options of :class:`PerturbedAdamW`.
    rho : float or Schedule
        Strength ρ. The default is 3.0, that of :class:`MSAM`.
    subset : "all" or ParameterFilter
        Parameters that move.
    """

    @without_base
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
        perturbation = along_momentum(rho, subset)
        super().__init__(params, lr, betas, eps, weight_decay, perturbation=perturbation, **options)


class AdamWSAM(PerturbedAdamW):
    """AdamW with SAM's perturbation: ``ε = ρ g / ‖g‖`` with two gradients a step.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, **options
        Options of :class:`PerturbedAdamW`.
    rho, adaptive, subset
        Options of :class:`SAM`, with its defaults.
    """

    @without_base
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
        perturbation = along_gradient(rho, adaptive, subset)
        super().__init__(params, lr, betas, eps, weight_decay, perturbation=perturbation, **options)
