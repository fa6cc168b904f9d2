"""Which way an optimizer's perturbation points, and how far: the tensors d and the scalar c in ε = c d."""

from __future__ import annotations

import hashlib
import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._arithmetic import global_norm, widest_dtype
from .perturbation import Perturbation
from .schedules import Number, Schedule

__all__ = ["DirectedOptimizer", "Move"]


class Move(NamedTuple):
    """The displacement of one parameter group: ``factor`` times what ``_shaped(members)`` returns."""

    group: dict[str, Any]
    members: list[Tensor]
    factor: Tensor  # 0-dimensional; NaN where the gradients overflowed, and then nothing moves


class DirectedOptimizer(Optimizer):
    """Knows the displacement its perturbation asks for; moves nothing.

    Reads from each group ``rho``, ``lr``, ``maximize``, ``perturb``, ``displaces`` and ``first_lr``, and from the
    first one ``steps``; see :class:`~msam.PerturbedOptimizer`.
    """

    _momentum_key: ClassVar[str]
    perturbation: Perturbation | None

    @property
    def _head(self) -> dict[str, Any]:
        return self.param_groups[0]

    @property
    def _direction_name(self) -> str | None:
        return None if self.perturbation is None else self.perturbation.direction

    @property
    def _along(self) -> str | None:
        """What a saved displacement is a multiple of, in words."""
        perturbation = self.perturbation
        return None if perturbation is None else f"{perturbation.direction}, scaled {perturbation.scale}"

    def _plan(self) -> list[Move]:
        """Return the displacement, group by group; empty where nothing moves."""
        perturbation = self.perturbation
        if perturbation is None:
            return []
        climbs = perturbation.direction == "gradient"
        rhos = [self._rho(group) for group in self.param_groups]
        if all(not isinstance(rho, Tensor) and rho == 0 for rho in rhos):
            return [Move(group, [], torch.zeros(())) for group in self.param_groups] if climbs else []
        everyone = [self._members(group) for group in self.param_groups]
        flat = [p for members in everyone for p in members]
        norm = None
        if perturbation.normalize == "l2" or climbs:
            norm = global_norm(perturbation.measured(self._directions(flat), flat))
        plan = []
        for group, members, rho in zip(self.param_groups, everyone, rhos, strict=True):
            factor = perturbation.factor(norm, rho, group["lr"])
            if group["maximize"] and perturbation.direction in ("gradient", "last_gradient"):
                factor = -factor
            if not isinstance(factor, Tensor):
                factor = torch.full((), factor, dtype=widest_dtype(flat), device=flat[0].device if flat else None)
            if climbs and norm is not None:
                factor = torch.where(norm.isfinite(), factor, math.nan)  # an overflow under loss scaling, say
            plan.append(Move(group, members, factor))
        return plan

    def _rho(self, group: dict[str, Any]) -> Number:
        rho: Number | Schedule = group["rho"]
        if not isinstance(rho, Schedule):
            return rho
        if rho.varies and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a captured graph repeats one rho, got a schedule that varies by step; set the group's 'rho' to a "
                "tensor and fill it before each replay."
            )
        ratio = group["lr"] / group["first_lr"] if rho.follows_lr else 1.0
        return rho(int(self._head["steps"]) if rho.varies else 0, ratio)

    def _members(self, group: dict[str, Any]) -> list[Tensor]:
        """Return the parameters of a group that move now: chosen, trainable, and with a direction."""
        if not group["perturb"]:
            return []
        chosen = [p for p, c in zip(group["params"], group["displaces"], strict=True) if c and p.requires_grad]
        if self._direction_name == "random":
            return chosen
        if self._direction_name == "gradient":
            return [p for p in chosen if p.grad is not None]
        key = self._direction_key
        return [p for p in chosen if self.state[p].get(key) is not None]

    @property
    def _direction_key(self) -> str:
        return self._momentum_key if self._direction_name == "momentum" else "last_gradient"

    def _directions(self, members: list[Tensor]) -> list[Tensor]:
        """Return the raw directions d of parameters that have one."""
        if self._direction_name == "gradient":
            return [p.grad for p in members if p.grad is not None]
        if self._direction_name != "random":
            return [self.state[p][self._direction_key] for p in members]
        order = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        return [self._noise(p, order[p]) for p in members]

    def _noise(self, p: Tensor, index: int) -> Tensor:
        """Return the Gaussian noise of this step for the parameter of this index."""
        key = f"{self.perturbation and self.perturbation.seed} {int(self._head['steps'])} {index}"
        generator = torch.Generator(p.device)
        digest = hashlib.blake2b(key.encode(), digest_size=7).digest()  # generators seeded by counters would correlate
        generator.manual_seed(int.from_bytes(digest, "big"))
        return torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)

    def _shaped(self, members: list[Tensor]) -> list[Tensor]:
        """Return what ε is a multiple of, at weights that are the true ones if they matter."""
        if self.perturbation is None or not members:
            return []
        return self.perturbation.shaped(self._directions(members), members)
