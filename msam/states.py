"""What a saved state must hold to be taken over, and the state that a fresh optimizer shows to those who ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .displacement import BOOKKEEPING, COPIES
from .perturbation import global_norm
from .schedules import Schedule

if TYPE_CHECKING:
    from .optimizers import PerturbedOptimizer

__all__ = ["FOREIGN_KEYS", "adopted", "is_asked_for_state", "make_state"]

FOREIGN_KEYS = ("params", "param_names", "initial_lr")
"""Entries of a group that belong to torch or to its schedulers."""


def adopted(optimizer: PerturbedOptimizer, loaded: dict[str, Any]) -> dict[str, Any]:
    """Return a state that torch has loaded, completed by what the optimizer has itself; the argument is unchanged.

    Raises
    ------
    ValueError
        If it is of another method, of Nesterov's method of torch, or displaced along another direction; if an option is
        one that the constructor refuses; if a buffer is missing, unknown or of another shape.
    """
    along = optimizer.param_groups[0]["along"]
    groups = [
        _group(optimizer, present, saved)
        for present, saved in zip(optimizer.param_groups, loaded["param_groups"], strict=True)
    ]
    training = groups[0]["training"]
    state = loaded["state"].copy()
    for group in groups:
        if group["along"] != along and group["standing"] is not None:
            if training:
                raise ValueError(
                    f"expected a state displaced along {along}, got one along {group['along']}; "
                    "save it in eval() mode to change the perturbation."
                )
            group.update(BOOKKEEPING)
        group["along"] = along
        for p, stands in zip(group["params"], group["standing"] or [False] * len(group["params"]), strict=True):
            if p in state:
                state[p] = dict(_buffers(optimizer, group, p, state[p], keep=stands))
            if stands:
                optimizer._displacement.require_way_back(state.get(p, {}), training)
    return loaded | {"state": state, "param_groups": groups}


def _group(optimizer: PerturbedOptimizer, present: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved group, completed and checked."""
    coupled = saved.get("decoupled_weight_decay") is False and saved["weight_decay"]  # of Adam, not AdamW
    if optimizer._method_key not in saved or coupled:
        raise ValueError(
            f"expected a state of {type(optimizer).__name__} or of torch's {optimizer._method}, got one of another "
            f"method, with {', '.join(sorted(saved.keys() - set(FOREIGN_KEYS)))}; start from the weights alone."
        )
    if saved.get("nesterov"):
        raise ValueError("expected a state without nesterov=True, got one with it; load it into torch's SGD.")
    kept = {key: present[key] for key in present if key not in FOREIGN_KEYS}
    if "steps" in present:
        kept |= {"training": True, "steps": torch.zeros_like(present["steps"])}
    group = kept | BOOKKEEPING | saved
    if isinstance(group["rho"], dict):
        group["rho"] = Schedule.from_plain(group["rho"])
    optimizer._check_group(group)
    return group


def _buffers(
    optimizer: PerturbedOptimizer, group: dict[str, Any], p: Tensor, saved: dict[str, Any], *, keep: bool
) -> Iterator[tuple[str, Any]]:
    """Yield the buffers of a parameter as they are to be, without those of a displacement that does not stand."""
    for key, value in saved.items():
        if value is None or value == {} or (key in COPIES and not keep):
            continue  # SGD without momentum saves None, and torch's flat checkpoints {} for what they do not have
        if key == "step":
            yield key, value if isinstance(value, Tensor) else _as_step(value, group, p)
        elif key not in (*optimizer._buffer_keys, "last_gradient", *COPIES):
            known = ", ".join(optimizer._buffer_keys)
            raise ValueError(
                f"expected buffers of {type(optimizer).__name__} ({known}), got {key!r}; "
                "load the state of the same method."
            )
        elif not isinstance(value, Tensor) or value.shape != p.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"expected a buffer {key!r} of the parameter's shape {tuple(p.shape)}, got {got}; "
                "give the optimizer its parameters in the order in which they were saved."
            )
        else:
            yield key, value


def _as_step(value: float, group: dict[str, Any], p: Tensor) -> Tensor:
    """Return AdamW's count of steps, a number in files of older torch and of the authors, as torch has it now."""
    device = p.device if group["capturable"] or group["fused"] else "cpu"
    return torch.tensor(float(value), dtype=torch.float32, device=device)


def is_asked_for_state(optimizer: PerturbedOptimizer) -> bool:
    """Whether the step of a fresh optimizer is the one by which torch's checkpoints find out which buffers there are.

    They take it with gradients of 0 and at a learning rate of 0, which is not the first one. A number is read on the
    host only where every learning rate is 0.
    """
    for group in optimizer.param_groups:
        lr = group["lr"]
        if (isinstance(lr, Tensor) and not lr.is_cpu) or lr != 0 or not group["first_lr"]:
            return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return bool(grads) and float(global_norm(grads)) == 0


def make_state(optimizer: PerturbedOptimizer) -> None:
    """Make all buffers that a step would make, and change nothing else."""
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if p.grad is not None]
        optimizer._update(group, weights, [p.grad for p in weights], 0.0)
        for p in weights:
            if "step" in optimizer.state[p]:
                optimizer.state[p]["step"].zero_()
    optimizer._displacement.make_state()
