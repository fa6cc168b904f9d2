"""The one place where a perturbation meets an optimizer: bookkeeping shared by every base step."""

from __future__ import annotations

import difflib
import hashlib
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from ._arithmetic import add_scaled_, global_norm, scaled, widest_dtype
from .batchnorm import frozen_statistics_of_whatever_runs
from .perturbation import Perturbation
from .schedules import Number, Schedule, as_schedule, require_nonnegative

__all__ = ["PerturbedOptimizer", "Restore", "WeightDecayAt"]

Restore = Literal["auto", "subtract", "copy"]
WeightDecayAt = Literal["true", "perturbed"]
Closure = Callable[[], Any]
Way = Literal["stay", "subtract", "copy"]

_FOREIGN_KEYS = ("params", "param_names", "initial_lr")
# what a group keeps beside torch's options, and its value while nothing is displaced
_BOOKKEEPING: dict[str, Any] = {"standing": None, "applied": None}


class PerturbedOptimizer(Optimizer, ABC):
    """A base step whose gradient is taken at displaced weights.

    Each parameter group keeps, beside torch's options: ``rho`` (number, 0-dimensional tensor or schedule), ``perturb``
    (bool), ``weight_decay_at``; and as bookkeeping ``displaces`` (which parameters the subset lets move), ``standing``
    (which are displaced as of the last step) and ``applied`` (the scalar c in ε = c · direction; not a number where
    SAM's first gradients overflowed, and then ε = 0). The first group
    also keeps ``steps`` and ``training``. All of it is plain data and travels in ``state_dict``.

    Parameters
    ----------
    params : iterable
        As for every torch optimizer.
    defaults : dict
        Options of the base step.
    perturbation : Perturbation or None
        Where the gradient is taken; None for the bare base step.
    weight_decay_at : {"true", "perturbed"}
        Point at which weight decay reads the weights.
    restore : {"auto", "subtract", "copy"}
        How the true weights come back.
    """

    _momentum_key: ClassVar[str]
    perturbation: Perturbation | None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        perturbation: Perturbation | None,
        weight_decay_at: WeightDecayAt,
        restore: Restore,
    ) -> None:
        if perturbation is not None and not isinstance(perturbation, Perturbation):
            raise TypeError(
                f"perturbation must be a Perturbation or None, got {type(perturbation).__name__}; "
                "build one with msam.Perturbation(direction=..., rho=...)."
            )
        if restore not in get_args(Restore):
            raise ValueError(f"restore must be one of {', '.join(get_args(Restore))}, got {restore!r}; use 'auto'.")
        if restore == "subtract" and perturbation is not None and not perturbation.lasts:
            raise ValueError(
                "restore='subtract' needs the direction unchanged until the next step and no scaling by weights, "
                f"got direction={perturbation.direction!r}, scale={perturbation.scale!r}; use restore='auto'."
            )
        self.perturbation = perturbation
        self._restore_policy = restore
        self._gradient_hooks: OrderedDict[int, Callable[[PerturbedOptimizer], None]] = OrderedDict()
        options = {
            "rho": 0.0 if perturbation is None else perturbation.rho,
            "perturb": perturbation is not None,
            "weight_decay_at": weight_decay_at,
        }
        super().__init__(params, defaults | options)

    # ---------------------------------------------------------------- the base step, given by subclasses

    @abstractmethod
    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], weight_decay: float) -> None:
        """Take torch's step at the true weights."""

    @abstractmethod
    def _decay_at_perturbed(
        self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], decayed: list[Tensor]
    ) -> list[Tensor]:
        """Account for weight decay while ``weights`` are perturbed and return the gradients to step with.

        A decay that is a change of the weights goes into ``decayed``: their copies, or the weights themselves.
        """

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise unless the options of a group make sense."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"a tensor lr must hold one element, got shape {tuple(lr.shape)}; pass a scalar.")
            lr = float(lr)
        require_nonnegative("lr", lr)
        require_nonnegative("weight_decay", group["weight_decay"])
        if not isinstance(group["rho"], Tensor):
            as_schedule(group["rho"])
        if group["weight_decay_at"] not in get_args(WeightDecayAt):
            raise ValueError(
                f"weight_decay_at must be 'true' or 'perturbed', got {group['weight_decay_at']!r}; choose."
            )
        if group["foreach"] and group["fused"]:
            raise ValueError("at most one of foreach and fused may be True, got both; drop one.")
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(f"expected real floating-point parameters, got {p.dtype}; view complex ones as real.")

    # ---------------------------------------------------------------- torch.optim citizenship

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises
        ------
        ValueError
            If an option has a bad value or is a misspelt one of ours.
        TypeError
            If a parameter is not real floating-point.
        """
        known = (*self.defaults, *_FOREIGN_KEYS)
        for key in param_group:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            if key not in known and close:
                raise ValueError(f"expected {close[0]!r} in a parameter group, got {key!r}; correct the name.")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            names = group.get("param_names", [None] * len(group["params"]))
            subset = "all" if self.perturbation is None else self.perturbation.subset
            chosen = [subset == "all" or bool(subset(n, p)) for n, p in zip(names, group["params"], strict=True)]
        except Exception:
            self.param_groups.pop()
            raise
        group.update(_BOOKKEEPING, displaces=chosen, first_lr=float(group["lr"]))
        if len(self.param_groups) == 1:
            group.update(training=True, steps=torch.zeros((), dtype=torch.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Return what deepcopy and pickle keep: torch's part, the perturbation and the way back."""
        return super().__getstate__() | {"perturbation": self.perturbation, "_restore_policy": self._restore_policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied, unpickled or loaded state."""
        super().__setstate__(state)
        self.__dict__.setdefault("_gradient_hooks", OrderedDict())

    def state_dict(self) -> dict[str, Any]:
        """Return the state, perturbation's bookkeeping included, as plain numbers and tensors.

        It belongs to the model's weights as they are now, displaced or not: save the two together.
        """
        state = super().state_dict()
        for group in state["param_groups"]:
            group["along"] = self._along
            if isinstance(group["rho"], Schedule):
                group["rho"] = group["rho"].to_plain()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class, or by torch's optimizer of the same base step.

        The weights are not touched: load those saved together with the state, in either mode. A state of torch's own
        optimizer means that nothing is displaced.

        Raises
        ------
        ValueError
            If the state was saved while displaced along another direction, or by Nesterov's method of torch.
        """
        groups = []
        for present, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            kept = {key: present[key] for key in present if key not in (*_BOOKKEEPING, *_FOREIGN_KEYS)}
            if "steps" in present:
                kept |= {"training": True, "steps": torch.zeros_like(present["steps"])}
            group = kept | _BOOKKEEPING | saved
            if saved.get("nesterov"):
                raise ValueError("expected a state without nesterov=True, got one with it; load it into torch's SGD.")
            if group.pop("along", None) != self._along and group["standing"] is not None:
                if state_dict["param_groups"][0]["training"]:
                    raise ValueError(
                        f"expected a state displaced along {self._along}, got one along {saved['along']}; "
                        "save it in eval() mode to change the perturbation."
                    )
                group |= _BOOKKEEPING
            if isinstance(group["rho"], dict):
                group["rho"] = Schedule.from_plain(group["rho"])
            groups.append(group)
        groups += state_dict["param_groups"][len(groups) :]
        super().load_state_dict(state_dict | {"param_groups": groups})

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes the loss, calls ``backward`` and returns the loss. With
            ``direction="gradient"`` it runs twice, unless :meth:`first_step` was called before.

        Returns
        -------
        object
            What the closure returned the first time, or None.

        Raises
        ------
        RuntimeError
            In eval mode; for sparse gradients; without a first gradient where two are needed.
        """
        self._require_training()
        if self._skipped_by_scaler(closure):
            return None
        if self.perturbation is None or self.perturbation.direction != "gradient":
            loss = self._evaluate(closure)
            self._begin()
            self._advance()
            self._remember_gradients()
            self._displace()
            return loss
        loss = None
        if closure is not None:
            self._restore()
            loss = self._evaluate(closure)
            self.first_step()
            try:
                with frozen_statistics_of_whatever_runs():
                    self._evaluate(closure)
            except BaseException:
                self._restore()
                raise
        elif not self._displacement_stands:
            raise RuntimeError(
                "direction='gradient' needs two gradients, got step() after one; pass a closure, step(closure), or "
                "call first_step() after the first backward() and second_step() after the second."
            )
        self._refuse_sparse()
        self._advance()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Displace the weights along the gradient now in ``.grad`` (direction "gradient" only).

        Parameters without a gradient stay. Called twice, the first displacement is taken back beforehand.

        Parameters
        ----------
        zero_grad : bool
            Whether to clear the gradients afterwards.

        Raises
        ------
        RuntimeError
            In eval mode, for sparse gradients, or with another direction.
        """
        self._require_two_gradients("first_step")
        self._require_training()
        self._restore()
        self._begin()
        self._displace()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Return to the true weights and step with the gradient now in ``.grad``; ``step()`` does the same.

        Parameters
        ----------
        zero_grad : bool
            Whether to clear the gradients afterwards.

        Raises
        ------
        RuntimeError
            Without :meth:`first_step` before it, or as there.
        """
        self._require_two_gradients("second_step")
        self.step()
        if zero_grad:
            self.zero_grad()

    def register_gradient_hook(self, hook: Callable[[PerturbedOptimizer], None]) -> RemovableHandle:
        """Call ``hook(optimizer)`` once a step, when its first gradient is in ``.grad`` and before any weight moves.

        Returns
        -------
        RemovableHandle
            Its ``remove()`` ends the calls.
        """
        handle = RemovableHandle(self._gradient_hooks)
        self._gradient_hooks[handle.id] = hook
        return handle

    # ---------------------------------------------------------------- true weights

    @property
    def perturbed(self) -> bool:
        """Whether parameters are displaced right now."""
        return bool(self._head["training"]) and any(any(group["standing"] or ()) for group in self.param_groups)

    @torch.no_grad()
    def eval(self) -> None:
        """Switch to the true weights, to evaluate or save them; :meth:`train` switches back. Idempotent."""
        if not self._head["training"]:
            return
        for group, way, members in self._displaced():
            states = [self.state[p] for p in members]
            if way == "subtract":
                # adding back in train() need not return the very bits, so they are kept
                for p, state in zip(members, states, strict=True):
                    state["perturbed_weight"] = p.detach().clone()
                self._bring_back(group, way, members)
            elif self._direction_name == "gradient":
                _swap(members, [state["true_weight"] for state in states])
            else:
                self._bring_back(group, way, members)
                for state in states:
                    del state["true_weight"]
        self._head["training"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Switch back to the perturbed weights. Idempotent.

        Weights changed since :meth:`eval` are displaced from where they are now; unchanged ones return bit for bit.
        Between ``first_step()`` and ``second_step()`` all return to where they were.
        """
        if self._head["training"]:
            return
        for group, way, members in self._displaced():
            if way == "copy" and self._direction_name == "gradient":
                _swap(members, [self.state[p]["true_weight"] for p in members])
            elif way == "copy":
                self._keep_copies(members)
                add_scaled_(members, self._shaped(members), group["applied"])
            else:
                kept = [self.state[p].pop("perturbed_weight") for p in members]
                were = [before.clone() for before in kept]
                add_scaled_(were, self._directions(members), -group["applied"])
                unchanged = [p == w for p, w in zip(members, were, strict=True)]
                add_scaled_(members, self._directions(members), group["applied"])
                for p, same, before in zip(members, unchanged, kept, strict=True):
                    p.copy_(torch.where(same, before, p))
        self._head["training"] = True

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Hold the true weights inside a ``with`` block; nests, and survives exceptions."""
        was_training = self._head["training"]
        self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    @torch.no_grad()
    def displacement(self) -> dict[Tensor, Tensor]:
        """Return ε at which this step's training gradient is, or for "gradient" will be, evaluated.

        Returns
        -------
        dict of Tensor to Tensor
            ε relative to the true weights, by parameter; parameters that are not displaced are absent.
        """
        result: dict[Tensor, Tensor] = {}
        if self._direction_name == "gradient" and not self._displacement_stands:
            for _, members, factor in self._plan():
                result |= zip(members, scaled(self._shaped(members), factor), strict=True)
            return result
        for group, way, members in self._displaced():
            copies = [self.state[p].get("true_weight") for p in members]
            if way == "copy" and copies[0] is not None:
                here, there = (members, copies) if self._head["training"] else (copies, members)
                result |= zip(members, torch._foreach_sub(here, there), strict=True)
            else:
                result |= zip(members, scaled(self._shaped(members), group["applied"]), strict=True)
        return result

    # ---------------------------------------------------------------- private: conditions

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

    @property
    def _displacement_stands(self) -> bool:
        return any(group["standing"] is not None for group in self.param_groups)

    def _require_training(self) -> None:
        if not self._head["training"]:
            raise RuntimeError("expected train mode, got eval mode with the true weights in place; call train() first.")

    def _require_two_gradients(self, name: str) -> None:
        if self._direction_name != "gradient":
            raise RuntimeError(
                f"{name}() is for direction='gradient', got {self._direction_name!r} with one gradient; call step()."
            )
        if name == "second_step" and not self._displacement_stands:
            raise RuntimeError("expected first_step() before second_step(), got none; call it after a backward().")

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"expected dense gradients, got one of layout {p.grad.layout}; use sparse=False in embeddings."
                    )

    # ---------------------------------------------------------------- private: the parts of a step

    @staticmethod
    def _evaluate(closure: Closure | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Ask :class:`torch.amp.GradScaler` to call ``step()`` after an overflow too, as SAM has to go back then."""
        return self._direction_name == "gradient"

    def _skipped_by_scaler(self, closure: Closure | None) -> bool:
        """Do what GradScaler leaves to optimizers that ask for it; return whether one of the passes overflowed.

        The flag is read on the host where GradScaler itself would read it.
        """
        found: Tensor | int | None = getattr(self, "found_inf", None)
        if found is None:
            return False
        if closure is not None:
            raise RuntimeError(
                "a GradScaler sees the gradients before step(), got a closure that makes them inside it; call "
                "first_step() after the first backward() and scaler.step(optimizer) after the second."
            )
        applied = self._head["applied"]
        if applied is not None:
            found = found + applied.isnan().to(getattr(found, "device", None), non_blocking=True)
        if found:
            self._restore()
            return True
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None:
            inverse = scale.double().reciprocal().float()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(inverse.to(p.device, non_blocking=True))
        return False

    def _begin(self) -> None:
        """Check the first gradients and show them to the hooks."""
        self._refuse_sparse()
        for hook in tuple(self._gradient_hooks.values()):
            hook(self)

    def _advance(self) -> None:
        """Take the base step; afterwards the weights are the true ones, or stand at a multiple that is noted."""
        for group in self.param_groups:
            if self._advance_in_place(group):
                continue
            for way, members in self._ways(group):
                self._bring_back(group, way, [p for p in members if p.grad is None])
                self._advance_members(group, way, [p for p in members if p.grad is not None])
            self._forget(group)
        self._head["steps"].add_(1)

    def _advance_in_place(self, group: dict[str, Any]) -> bool:
        """Step from where the weights stand, if the base step knows how; return whether it did."""
        return False

    def _advance_members(self, group: dict[str, Any], way: Way, members: list[Tensor]) -> None:
        """Return to the true weights and take the base step there."""
        if not members:
            return
        grads = [p.grad for p in members if p.grad is not None]
        decay = group["weight_decay"]
        if decay and way != "stay" and group["weight_decay_at"] == "perturbed":
            decayed = self._sources(way, members) if way == "copy" else members
            grads = self._decay_at_perturbed(group, members, grads, decayed)
            decay = 0.0
        self._bring_back(group, way, members)
        self._update(group, members, grads, decay)

    def _remember_gradients(self) -> None:
        """Keep this step's gradients where they are the next step's direction."""
        if self._direction_name != "last_gradient":
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    self.state[p].pop("last_gradient", None)
                elif "last_gradient" in self.state[p]:
                    self.state[p]["last_gradient"].copy_(p.grad)
                else:
                    self.state[p]["last_gradient"] = p.grad.detach().clone()

    def _displace(self) -> None:
        """Move to w + ε, from the true weights or from what still stands, and note what was done."""
        plan = self._plan()
        if not plan:
            self._restore()
        for group, members, factor in plan:
            moved = set(map(id, members))
            standing = [id(p) in moved for p in group["params"]]
            copied = [p for p in members if self._needs_copy(p)]
            change = factor
            if group["standing"] is not None:
                if standing == group["standing"] and not copied:
                    change = factor - group["applied"]
                else:
                    self._restore_group(group)
            self._keep_copies(copied)
            for p in members:
                if not self._needs_copy(p):
                    self.state[p].pop("true_weight", None)  # left by a state saved under another policy
            add_scaled_(members, self._shaped(members), change, finite=self._direction_name != "gradient")
            group["standing"] = standing
            if group["applied"] is None:
                group["applied"] = factor.clone()
            else:
                group["applied"].copy_(factor)  # in place, so that a captured graph finds it again

    def _plan(self) -> list[tuple[dict[str, Any], list[Tensor], Tensor]]:
        """Return, group by group, the parameters to displace and the scalar c; empty where nothing moves."""
        perturbation = self.perturbation
        if perturbation is None:
            return []
        rhos = [self._rho(group) for group in self.param_groups]
        if all(not isinstance(rho, Tensor) and rho == 0 for rho in rhos):
            if perturbation.direction == "gradient":
                return [(group, [], torch.zeros(())) for group in self.param_groups]
            return []
        everyone = [self._members(group) for group in self.param_groups]
        flat = [p for members in everyone for p in members]
        climbs = perturbation.direction == "gradient"
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
            plan.append((group, members, factor))
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

    # ---------------------------------------------------------------- private: the way back

    def _needs_copy(self, p: Tensor) -> bool:
        """Whether adding and subtracting would lose digits, or cannot be repeated."""
        if self._restore_policy != "auto":
            return self._restore_policy == "copy"
        lasts = self.perturbation is not None and self.perturbation.lasts
        return not lasts or p.dtype not in (torch.float32, torch.float64)

    def _keep_copies(self, members: list[Tensor]) -> None:
        for p in members:
            state = self.state[p]
            if "true_weight" in state:
                state["true_weight"].copy_(p)
            else:
                state["true_weight"] = p.detach().clone()

    def _ways(self, group: dict[str, Any]) -> list[tuple[Way, list[Tensor]]]:
        """Sort a group's parameters by how they come back to the true weights; "stay" are those already there."""
        ways: dict[Way, list[Tensor]] = {"stay": [], "subtract": [], "copy": []}
        standing = group["standing"] or [False] * len(group["params"])
        for p, stands in zip(group["params"], standing, strict=True):
            if not stands:
                ways["stay"].append(p)
            elif self._head["training"]:
                ways["copy" if "true_weight" in self.state[p] else "subtract"].append(p)
            else:
                ways["subtract" if "perturbed_weight" in self.state[p] else "copy"].append(p)
        return [(way, members) for way, members in ways.items() if members]

    def _displaced(self) -> Iterator[tuple[dict[str, Any], Way, list[Tensor]]]:
        """Yield the parameters whose displacement stands, by group and way back."""
        for group in self.param_groups:
            for way, members in self._ways(group):
                if way != "stay":
                    yield group, way, members

    def _sources(self, way: Way, members: list[Tensor]) -> list[Tensor]:
        """Return what brings each parameter back: its copy, or its direction."""
        return [self.state[p]["true_weight"] for p in members] if way == "copy" else self._directions(members)

    def _bring_back(self, group: dict[str, Any], way: Way, members: list[Tensor]) -> None:
        """Take away exactly what stands."""
        if not members or way == "stay":
            return
        if way == "copy":
            torch._foreach_copy_(members, self._sources(way, members))
        else:
            add_scaled_(members, self._sources(way, members), -group["applied"])

    def _forget(self, group: dict[str, Any]) -> None:
        """Note that nothing stands any more."""
        group["standing"] = None
        if self._direction_name == "gradient":
            for p in group["params"]:
                self.state[p].pop("true_weight", None)

    def _restore_group(self, group: dict[str, Any]) -> None:
        for way, members in self._ways(group):
            self._bring_back(group, way, members)
        self._forget(group)

    def _restore(self) -> None:
        """Return to the true weights for good."""
        for group in self.param_groups:
            self._restore_group(group)


def _swap(these: list[Tensor], those: list[Tensor]) -> None:
    for a, b in zip(these, those, strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
