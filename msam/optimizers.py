"""The step of every optimizer here: torch's base step, and a displacement that stands while gradients are taken."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypedDict, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from .batchnorm import frozen_statistics_of_whatever_runs
from .conventions import Closure, evaluate_anew
from .displacement import BOOKKEEPING, Displacement, Restore
from .perturbation import Perturbation
from .schedules import Schedule, require_nonnegative, require_strength
from .shards import here, maker_that_divides
from .states import FOREIGN_KEYS, adopted, is_asked_for_state, make_state

__all__ = ["BaseOptions", "PerturbedOptimizer", "WeightDecayAt"]

_LARGEST_GROWTH = 8.0  # of a gradient from SAM's first pass to its second: beyond, one of them has a scaler's factor

WeightDecayAt = Literal["true", "perturbed", "updated"]


class BaseOptions(TypedDict, total=False):
    """Keywords that every named method hands on."""

    restore: Restore
    maximize: bool
    foreach: bool | None
    fused: bool | None


class PerturbedOptimizer(Optimizer, ABC):
    """A base step whose gradient is taken at displaced weights.

    Each parameter group keeps, beside torch's options: ``rho`` (number, 0-dimensional tensor or schedule), ``perturb``
    (bool), ``weight_decay_at``; and as bookkeeping ``displaces`` (which parameters the subset lets move), ``standing``
    (which ones are displaced now) and ``applied`` (the scalar c in ε = c · direction; NaN where SAM's first gradients
    overflowed, and then ε = 0), ``along`` (the direction in words), ``first_lr`` and ``largest_lr`` (for schedules that
    follow the learning rate). The first group also keeps ``steps`` and ``training``. All of it is plain data and
    travels in ``state_dict``. One thread at a time may step or read an optimizer, as it is with torch's.

    Parameters
    ----------
    params : iterable
        As for every torch optimizer.
    defaults : dict
        Options of the base step.
    perturbation : Perturbation or None
        Where the gradient is taken; None for the bare base step.
    weight_decay_at : {"true", "perturbed", "updated"}
        Point at which weight decay reads the weights.
    restore : {"auto", "subtract", "copy"}
        How the true weights come back.
    """

    _momentum_key: ClassVar[str]
    _buffer_keys: ClassVar[tuple[str, ...]]
    _method: ClassVar[str]
    _method_key: ClassVar[str]

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        perturbation: Perturbation | None,
        weight_decay_at: WeightDecayAt,
        restore: Restore,
    ) -> None:
        self._displacement = Displacement(self, perturbation, restore, self._momentum_key)
        self._gradient_hooks: OrderedDict[int, Callable[[PerturbedOptimizer], None]] = OrderedDict()
        options = {
            "rho": 0.0 if perturbation is None else perturbation.rho,
            "perturb": perturbation is not None,
            "weight_decay_at": weight_decay_at,
        }
        self._divide_among(maker_that_divides())
        super().__init__(params, defaults | options)

    def _divide_among(self, group: Any) -> None:
        """Take the norm over the processes of a group among which the parameters are divided; None for no group."""
        if group is not None and self._displacement.climbs:
            raise RuntimeError(
                "expected all parameters in every process for direction='gradient', got an optimizer of a share of "
                "them, which can displace no more than its share; use DistributedDataParallel alone, or fully_shard."
            )
        self._displacement.among = () if group is None else (group,)

    # ---------------------------------------------------------------- the base step, given by subclasses

    @abstractmethod
    def _update(self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], weight_decay: float) -> None:
        """Take torch's step at the true weights."""

    @abstractmethod
    def _decay_at_perturbed(
        self, group: dict[str, Any], weights: list[Tensor], grads: list[Tensor], decayed: list[Tensor]
    ) -> list[Tensor]:
        """Account for weight decay while ``weights`` are perturbed, and return the gradients to step with.

        A decay that changes the weights goes into ``decayed``: their copies, or the weights themselves.
        """

    def _update_in_place(self, group: dict[str, Any]) -> bool:
        """Take torch's step where the displaced weights stand, if the base can do that; return whether it did."""
        return False

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes the loss, calls ``backward`` and returns the loss. With
            ``direction="gradient"`` it runs twice, the second time at the displaced weights and without collecting
            BatchNorm statistics. It need not clear the gradients there if none are left when ``step`` is called.

        Returns
        -------
        object
            What the closure returned the first time, or None.

        Raises
        ------
        RuntimeError
            In eval mode; for sparse gradients. Where two gradients are needed: without a first one; with a closure
            inside ``GradScaler.step``; with a closure that adds to gradients that were there before; with
            ``GradScaler.unscale_`` before the first pass.

        Notes
        -----
        Under :class:`torch.amp.GradScaler` call ``scaler.step(optimizer)`` in place of ``step()`` or
        ``second_step()``. If a gradient overflowed, in either of SAM's passes, weights and buffers stay as they were
        before the step.
        """
        displacement, loss = self._displacement, None
        self._require_training()
        if closure is None and not self.state and is_asked_for_state(self):
            make_state(self)
            return None
        if self._skipped_by_scaler(closure):
            return None
        if closure is not None:
            if displacement.climbs:
                displacement.take_back_all()
                loss = self._evaluate_twice(closure)
            else:
                with torch.enable_grad():
                    loss = closure()
        elif displacement.climbs and not displacement.stands:
            raise RuntimeError(
                "direction='gradient' needs two gradients, got step() after one; pass a closure, step(closure), or "
                "call first_step() after the first backward() and second_step() after the second."
            )
        self._refuse_sparse()
        if not displacement.climbs:
            self._show_gradients()
        displacement.notice_writes()
        for group in self.param_groups:
            if not self._update_in_place(group):
                self._update_at_true_weights(group)
        self.param_groups[0]["steps"].add_(1)
        if not displacement.climbs:
            displacement.apply()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Displace the weights along the gradient now in ``.grad`` (direction "gradient" only).

        Parameters without a gradient stay. Called twice, it takes the first displacement back beforehand.

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
        self._displacement.take_back_all()
        self._refuse_sparse()
        self._show_gradients()
        self._displacement.apply()
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
            Without :meth:`first_step` before it, or for the reasons given there.
        """
        self._require_two_gradients("second_step")
        if not self._displacement.stands:
            raise RuntimeError("expected first_step() before second_step(), got none; call it after a backward().")
        self.step()
        if zero_grad:
            self.zero_grad()

    def _evaluate_twice(self, closure: Closure) -> Any:
        """Take SAM's two gradients; where the second one fails, the weights are back at the true ones."""
        with torch.enable_grad():
            loss = evaluate_anew(closure, [p for group in self.param_groups for p in group["params"]])
        self.first_step(zero_grad=True)
        try:
            with frozen_statistics_of_whatever_runs(), torch.enable_grad():
                closure()
        except BaseException:
            self._displacement.take_back_all()
            raise
        return loss

    def _update_at_true_weights(self, group: dict[str, Any]) -> None:
        """Return to the true weights, and take torch's step there."""
        displacement, decay = self._displacement, group["weight_decay"]
        weights = [p for p in group["params"] if p.grad is not None]
        if decay and group["weight_decay_at"] == "perturbed" and group["standing"] is not None:
            copied, subtracted = displacement.copied_and_subtracted(group)
            copied = [p for p in copied if p.grad is not None]
            displaced = copied + [p for p in subtracted if p.grad is not None]
            if displaced:
                decayed = displacement.copies(copied) + displaced[len(copied) :]
                grads = self._decay_at_perturbed(group, displaced, _gradients(displaced), decayed)
                displacement.take_back(group)
                self._update(group, displaced, grads, 0.0)
                done = set(map(id, displaced))
                weights = [p for p in weights if id(p) not in done]
        displacement.take_back(group)
        if weights:
            self._update(group, weights, _gradients(weights), decay)

    # ---------------------------------------------------------------- the true weights, and the displacement

    @property
    def perturbation(self) -> Perturbation | None:
        """Where the gradient is taken; None for the bare base step."""
        return self._displacement.perturbation

    @property
    def perturbed(self) -> bool:
        """Whether parameters are displaced right now."""
        self._displacement.notice_writes()
        groups = self.param_groups
        return bool(groups[0]["training"]) and any(any(group["standing"] or ()) for group in groups)

    @torch.no_grad()
    def eval(self) -> None:
        """Switch to the true weights, to evaluate or save them; :meth:`train` switches back. Idempotent."""
        if self.param_groups[0]["training"]:
            self._displacement.suspend()

    @torch.no_grad()
    def train(self) -> None:
        """Switch back to the perturbed weights. Idempotent.

        Weights changed since :meth:`eval` are displaced from where they are now; unchanged ones return bit for bit.
        Between ``first_step()`` and ``second_step()`` all return to where they were.
        """
        if not self.param_groups[0]["training"]:
            self._displacement.resume()

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Hold the true weights inside a ``with`` block; nests, and survives exceptions."""
        was_training = self.param_groups[0]["training"]
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
            ε relative to the true weights, by parameter and of its shape; parameters that are not displaced are absent.
        """
        self._displacement.notice_writes()
        return self._displacement.tensors()

    # ---------------------------------------------------------------- gradients: hooks, loss scaling, conditions

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

    def _show_gradients(self) -> None:
        for hook in tuple(self._gradient_hooks.values()):
            hook(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Ask :class:`torch.amp.GradScaler` to call ``step()`` after an overflow too, as SAM has to go back then."""
        return self._displacement.climbs

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
        applied: Tensor | None = self.param_groups[0]["applied"]
        if found or (applied is not None and applied.isnan()):
            self._displacement.take_back_all()
            return True
        scale: Tensor | None = getattr(self, "grad_scale", None)  # None after scaler.unscale_(), as for clipping
        if scale is None and self._displacement.growth() > _LARGEST_GROWTH:
            self._displacement.take_back_all()
            raise RuntimeError(
                "expected scaler.unscale_(optimizer) after the second backward(), got it before first_step(), which "
                "leaves the second gradient scaled; unscale and clip the second one, as the first one is normalised."
            )
        if scale is not None:
            grads = here(grad for group in self.param_groups for grad in _gradients(group["params"]))
            inverse = scale.double().reciprocal()
            for device in {grad.device for grad in grads}:
                local = [grad for grad in grads if grad.device == device]
                torch._foreach_mul_(local, inverse.to(device, non_blocking=True))
        return False

    def _require_training(self) -> None:
        if not self.param_groups[0]["training"]:
            raise RuntimeError("expected train mode, got eval mode with the true weights in place; call train() first.")
        for group in self.param_groups:
            if not isinstance(group["rho"], Schedule):
                require_strength(group["rho"])

    def _require_two_gradients(self, name: str) -> None:
        if not self._displacement.climbs:
            direction = None if self.perturbation is None else self.perturbation.direction
            raise RuntimeError(
                f"{name}() is for direction='gradient', got {direction!r} with one gradient; call step()."
            )

    def _refuse_sparse(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"expected dense gradients, got one of layout {p.grad.layout}; use sparse=False in embeddings."
                    )

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
        known = (*self.defaults, *FOREIGN_KEYS)
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
        along = self._displacement.along
        group.update(BOOKKEEPING, displaces=chosen, along=along, first_lr=float(group["lr"]), largest_lr=0.0)
        if len(self.param_groups) == 1:
            group.update(training=True, steps=torch.zeros((), dtype=torch.int64))

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise unless the options of a group make sense."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"a tensor lr must hold one element, got shape {tuple(lr.shape)}; pass a scalar.")
            lr = float(lr)
        require_nonnegative("lr", lr)
        require_nonnegative("weight_decay", group["weight_decay"])
        if not isinstance(group["rho"], Schedule):
            require_strength(group["rho"])
        if group["weight_decay_at"] not in get_args(WeightDecayAt):
            raise ValueError(
                f"weight_decay_at must be 'true', 'perturbed' or (AdamW) 'updated', got {group['weight_decay_at']!r}; "
                "choose one of them."
            )
        if group["foreach"] and group["fused"]:
            raise ValueError("at most one of foreach and fused may be True, got both; drop one.")
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(f"expected real floating-point parameters, got {p.dtype}; view complex ones as real.")

    def __getstate__(self) -> dict[str, Any]:
        """Return what deepcopy and pickle keep: torch's part, the perturbation and the way back."""
        self._displacement.notice_writes()
        ours = {"perturbation": self.perturbation, "_restore_policy": self._displacement.restore}
        return super().__getstate__() | ours

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied, unpickled or loaded state."""
        rest = dict(state)
        if "_restore_policy" in rest:
            perturbation, restore = rest.pop("perturbation"), rest.pop("_restore_policy")
            self._displacement = Displacement(self, perturbation, restore, self._momentum_key)
            self._gradient_hooks = OrderedDict()
            super().__setstate__(rest)
            self._displacement.look()
        else:  # torch's load_state_dict, after its hooks
            super().__setstate__(adopted(self, rest))
            self._displacement.forget()  # the weights that belong to the state may be loaded before it or after it

    def state_dict(self) -> dict[str, Any]:
        """Return the state, perturbation's bookkeeping included, as plain numbers and tensors.

        It belongs to the model's weights as they are now, displaced or not: save the two together.
        """
        self._displacement.notice_writes()
        self._displacement.hand_out()
        state = super().state_dict()
        for group in state["param_groups"]:
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
            If the state is of another method or of Nesterov's method of torch, was saved while displaced along another
            direction, has an option that the constructor refuses, or lacks a buffer. Nothing has changed then.
        """
        super().load_state_dict(state_dict)


def _gradients(weights: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in weights if p.grad is not None]
