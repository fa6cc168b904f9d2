"""What is saved, and what is loaded: the true weights, whoever asks a model or an optimizer for its state."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from msam.optimizers import PerturbedOptimizer

__all__ = [
    "TrueState", "climbs", "save_true_weights", "to_displaced", "to_true", "unwrapped", "warn_if_displacing",
]  # fmt: skip

_attended: WeakSet[PerturbedOptimizer] = WeakSet()  # those whose true weights are saved
_attached: WeakKeyDictionary[nn.Module, TrueState] = WeakKeyDictionary()


class TrueState:
    """Keeps ``state_dict`` of a model and its optimizers at the true weights; see :func:`save_true_weights`.

    Parameters
    ----------
    optimizers : PerturbedOptimizer
        The optimizers that move the model's weights.

    Notes
    -----
    A deep copy of the model (an average of its weights) shares this object, which does nothing for it. Where a module
    is pickled as a whole, no hook of torch is asked: that warns if the weights are displaced, and the copy that is read
    back has hooks that do nothing.
    """

    def __init__(self, *optimizers: PerturbedOptimizer) -> None:
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]  # they are freed with the loop
        self._modules: WeakSet[nn.Module] = WeakSet()
        self._handles: list[RemovableHandle] = []
        self._outermost: nn.Module | None = None  # whose state is being asked for now
        self._switched: list[PerturbedOptimizer] = []  # to the true weights, while it is
        self._members: set[Tensor] = set()  # the parameters of those
        self._copies: dict[Tensor, Tensor] = {}
        self._asked: WeakSet[Optimizer] = WeakSet()  # switched while its own state is being asked for

    @property
    def optimizers(self) -> list[PerturbedOptimizer]:
        """The optimizers that are still there."""
        return [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]

    def attach(self, model: nn.Module) -> None:
        """Place the hooks on every module of a model and on the optimizers.

        Parameters
        ----------
        model : Module
            The model.
        """
        earlier = _attached.get(model)
        if earlier is not None:
            earlier.remove()
        _attached[model] = self
        for module in model.modules():
            self._modules.add(module)
            self._handles += [
                module.register_state_dict_pre_hook(functools.partial(_begin, self)),
                module.register_state_dict_post_hook(functools.partial(_end, self)),
                module.register_load_state_dict_pre_hook(functools.partial(_before_loading, self)),
            ]
        for optimizer in self.optimizers:
            _attended.add(optimizer)
            self._handles += [
                optimizer.register_state_dict_pre_hook(self._before_optimizer),
                optimizer.register_state_dict_post_hook(self._after_optimizer),
            ]

    def remove(self) -> None:
        """Take the hooks away; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        _attended.difference_update(self.optimizers)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrueState:
        """Return the object itself: it belongs to modules that are not copied."""
        return self

    def __reduce__(self) -> tuple[type[TrueState], tuple[()]]:
        """Pickle as an object without optimizers."""
        if any(optimizer.perturbed for optimizer in self.optimizers):
            warnings.warn(
                "expected the true weights where a whole module is pickled, got the perturbed ones; save its "
                "state_dict(), or pickle it inside optimizer.unperturbed().",
                stacklevel=2,
            )
        return TrueState, ()

    # ---------------------------------------------------------------- the model's state

    def begin(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Switch to the true weights where the outermost module is asked for its state."""
        nested = self._outermost not in (None, module) and prefix
        if keep_vars or nested or module not in self._modules:
            return
        self._outermost, self._copies = module, {}
        self._switched = [optimizer for optimizer in self.optimizers if optimizer.perturbed]
        self._members = {p for optimizer in self._switched for group in optimizer.param_groups for p in group["params"]}
        for optimizer in self._switched:
            to_true(optimizer)

    def end(self, module: nn.Module, state: dict[str, Any], prefix: str) -> None:
        """Copy a module's true weights into the state, and switch back after the outermost one."""
        if self._outermost is None or module not in self._modules:
            return
        if self._switched:
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                if p in self._members and prefix + name in state:
                    if p not in self._copies:  # tied weights stay tied
                        self._copies[p] = p.detach().clone()
                    state[prefix + name] = self._copies[p]
        if module is self._outermost:
            for optimizer in self._switched:
                to_displaced(optimizer)
            self._outermost, self._switched, self._members, self._copies = None, [], set(), {}

    def before_loading(self, module: nn.Module) -> None:
        """Switch to the true weights, which those in the file are to replace."""
        if module in self._modules:
            for optimizer in self.optimizers:
                to_true(optimizer)

    # ---------------------------------------------------------------- the optimizer's state

    def _before_optimizer(self, optimizer: Optimizer) -> None:
        """Switch to the true weights where the optimizer is asked for its state."""
        self._asked.discard(optimizer)
        if isinstance(optimizer, PerturbedOptimizer) and optimizer.perturbed:
            to_true(optimizer)
            self._asked.add(optimizer)

    def _after_optimizer(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
        """Take what is kept in eval mode out of the optimizer's reach, and switch back."""
        if not isinstance(optimizer, PerturbedOptimizer) or optimizer not in self._asked:
            return None
        self._asked.discard(optimizer)
        kept = {key: dict(entry) for key, entry in state["state"].items()}
        for entry in kept.values():
            if "true_weight" in entry:  # along the gradient, where train() swaps in place
                entry["true_weight"] = entry["true_weight"].clone()
        to_displaced(optimizer)
        return state | {"state": kept}


# torch marks a hook by an attribute, which methods cannot have and partial functions can


def _begin(this: TrueState, module: nn.Module, prefix: str, keep_vars: bool) -> None:
    this.begin(module, prefix, keep_vars)


def _end(this: TrueState, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    this.end(module, state, prefix)


def _before_loading(this: TrueState, module: nn.Module, *_: Any) -> None:
    this.before_loading(module)


def unwrapped(optimizer: Any) -> PerturbedOptimizer | None:
    """Return the optimizer of this package behind a framework's wrappers.

    Parameters
    ----------
    optimizer : object
        An optimizer, or a wrapper that keeps it as ``optimizer``, as those of Lightning and accelerate do.

    Returns
    -------
    PerturbedOptimizer or None
        None where there is another one.
    """
    while not isinstance(optimizer, PerturbedOptimizer) and isinstance(
        getattr(optimizer, "optimizer", None), Optimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, PerturbedOptimizer) else None


def to_true(optimizer: PerturbedOptimizer) -> None:
    """Call ``eval()``; what is kept inside ``torch.inference_mode`` could not be written to when training goes on."""
    with torch.inference_mode(False):
        optimizer.eval()


def to_displaced(optimizer: PerturbedOptimizer) -> None:
    """Call ``train()`` in the same way."""
    with torch.inference_mode(False):
        optimizer.train()


def climbs(optimizer: PerturbedOptimizer) -> bool:
    """Whether an optimizer takes two gradients a step, and leaves the true weights between steps."""
    return optimizer.perturbation is not None and optimizer.perturbation.direction == "gradient"


def warn_if_displacing(optimizers: Iterable[Any], advice: str) -> None:
    """Warn if an optimizer leaves the weights displaced between steps, and nothing sees to what is saved of them.

    Parameters
    ----------
    optimizers : iterable of Optimizer
        Those of a training loop, also inside wrappers.
    advice : str
        What is to be done.

    Warns
    -----
    UserWarning
        Once for all of them.
    """
    for optimizer in map(unwrapped, optimizers):
        if optimizer is None or optimizer in _attended or optimizer.perturbation is None or climbs(optimizer):
            continue
        warnings.warn(
            f"{type(optimizer).__name__} leaves the weights displaced between steps, and so will checkpoints hold "
            f"them; {advice}.",
            stacklevel=3,
        )
        return


def save_true_weights(model: nn.Module, *optimizers: Any) -> TrueState:
    """Let ``state_dict`` of a model and of its optimizers hold the true weights, at any time and whoever asks.

    Between steps MSAM keeps the weights displaced, ``w + ε``. From this call on ``model.state_dict()``, also that of a
    module in it, returns copies of w, and ``optimizer.state_dict()`` the state of eval mode, to which ε belongs: the
    two are saved together or apart. ``model.load_state_dict()`` takes what it loads for the true weights, and leaves
    the optimizers in eval mode. Training goes on, bit for bit, after both are loaded and ``optimizer.train()`` is
    called. The training itself is not changed by a bit.

    Parameters
    ----------
    model : Module
        The model; layers that are added later are not seen.
    optimizers : Optimizer
        All that move its weights, also inside a wrapper of accelerate or Lightning; others than those of this package
        are left alone. A later call for the same model takes the place of this one.

    Returns
    -------
    TrueState
        Its ``remove()`` ends this.

    Notes
    -----
    A state costs one copy of the weights while it is held, and ``optimizer.eval()`` and ``optimizer.train()`` once
    each. ``state_dict(keep_vars=True)``, which asks for the parameters themselves, is left as it is.

    Examples
    --------
    >>> import torch, msam
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = msam.MSAM(model.parameters(), lr=0.1, rho=1.0)
    >>> _ = save_true_weights(model, optimizer)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> with optimizer.unperturbed():
    ...     true = model.weight.detach().clone()
    >>> torch.equal(model.state_dict()["weight"], true), torch.equal(model.weight, true)
    (True, False)
    """
    state = TrueState(*(found for found in map(unwrapped, optimizers) if found is not None))
    state.attach(model)
    return state
