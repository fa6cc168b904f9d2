"""The step of an optimizer with a perturbation, whatever its base, and its place among torch's optimizers."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from ._arithmetic import multiply_
from ._displaced import BOOKKEEPING, DisplacedOptimizer, Restore, Way
from .batchnorm import frozen_statistics_of_whatever_runs
from .perturbation import Perturbation
from .schedules import Schedule, as_schedule, require_nonnegative

__all__ = ["PerturbedOptimizer", "Restore", "WeightDecayAt"]

WeightDecayAt = Literal["true", "perturbed"]
Closure = Callable[[], Any]
_FOREIGN_KEYS = ("params", "param_names", "initial_lr")


class PerturbedOptimizer(DisplacedOptimizer, ABC):
    """A base step whose gradient is taken at displaced weights.

    Each parameter group keeps, beside torch's options: ``rho`` (number, 0-dimensional tensor or schedule), ``perturb``
    (bool), ``weight_decay_at``; and as bookkeeping ``displaces`` (which parameters the subset lets move), ``standing``
    (which are displaced as of the last step) and ``applied`` (the scalar c in ε = c · direction; not a number where
    SAM's first gradients overflowed, and then ε = 0). The first group also keeps ``steps`` and ``training``. All of it
    is plain data and travels in ``state_dict``.

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
        group.update(BOOKKEEPING, displaces=chosen, first_lr=float(group["lr"]))
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
            kept = {key: present[key] for key in present if key not in (*BOOKKEEPING, *_FOREIGN_KEYS)}
            if "steps" in present:
                kept |= {"training": True, "steps": torch.zeros_like(present["steps"])}
            group = kept | BOOKKEEPING | saved
            if saved.get("nesterov"):
                raise ValueError("expected a state without nesterov=True, got one with it; load it into torch's SGD.")
            if group.pop("along", None) != self._along and group["standing"] is not None:
                if state_dict["param_groups"][0]["training"]:
                    raise ValueError(
                        f"expected a state displaced along {self._along}, got one along {saved['along']}; "
                        "save it in eval() mode to change the perturbation."
                    )
                group |= BOOKKEEPING
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
            ``direction="gradient"`` it runs twice, the second time at the displaced weights and without collecting
            BatchNorm statistics.

        Returns
        -------
        object
            What the closure returned the first time, or None.

        Raises
        ------
        RuntimeError
            In eval mode; for sparse gradients; without a first gradient where two are needed; with a closure inside
            ``GradScaler.step`` where two are needed.

        Notes
        -----
        Under :class:`torch.amp.GradScaler` call ``scaler.step(optimizer)`` in place of ``step()`` or
        ``second_step()``. If a gradient overflowed, of SAM in either pass, weights and buffers stay as they were
        before the step.
        """
        self._require_training()
        if self._skipped_by_scaler(closure):
            return None
        if self.perturbation is None or self.perturbation.direction != "gradient":
            loss = self._evaluate(closure)
            self._begin()
            self._advance()
            self._remember_gradients()
            self._displace(self._plan())
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
        self._displace(self._plan())
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

    # ---------------------------------------------------------------- private: conditions

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
        applied: Tensor | None = self._head["applied"]
        if found or (applied is not None and applied.isnan()):
            self._restore()
            return True
        scale: Tensor | None = getattr(self, "grad_scale", None)  # None after scaler.unscale_(), as for clipping
        if scale is not None:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            multiply_(grads, scale.double().reciprocal())
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
