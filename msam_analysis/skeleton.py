"""A private copy of a network and its criterion: batch in, loss out, at whatever tensors are put in their place."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

LossFunction = Callable[..., Tensor | tuple[Tensor, Tensor | float]]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LossModule(nn.Module):
    """Batch in, loss out: so that a point can be put in place of every tensor of the model while the loss runs.

    Parameters
    ----------
    model
        The network; its tensors are named ``model.*``.
    loss_fn
        The criterion; if it is a module, its tensors are named ``loss_fn.*``.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor | tuple[Tensor, Tensor | float]:
        """Return what ``loss_fn`` returns."""
        if isinstance(batch, list | tuple) and len(batch) == 2:
            return self.loss_fn(self.model(batch[0]), batch[1])
        return self.loss_fn(self.model, batch)

    def private_copy(self) -> LossModule:
        """Return a copy of the modules that shares every parameter and buffer with the originals.

        A criterion that is no module is the same object. Hooks are not copied: they are the owner's, who did not ask to
        see these passes. Those of :mod:`torch.nn.utils` are, since they compute weights (weight norm, pruning).

        Raises
        ------
        ValueError
            Something in the modules cannot be copied.
        """
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        if not isinstance(self.loss_fn, nn.Module):
            memo[id(self.loss_fn)] = self.loss_fn
        for module in self.modules():
            for hooks in _hooks(module):
                memo[id(hooks)] = OrderedDict((key, hook) for key, hook in hooks.items() if _computes_weights(hook))
            for value in vars(module).values():
                if isinstance(value, Tensor):  # a weight that such a hook computed has a history: deepcopy refuses it
                    memo[id(value)] = value.detach().clone()
        try:
            return copy.deepcopy(self, memo)
        except Exception as error:
            raise ValueError(
                f"the model cannot be copied ({type(error).__name__}: {error}): expected modules that copy.deepcopy "
                "accepts; remove attributes that hold open files, locks or tensors with a history"
            ) from error

    @property
    def foreign_hooks(self) -> int:
        """Number of hooks that :meth:`private_copy` leaves out."""
        return sum(
            not _computes_weights(hook)
            for module in self.modules()
            for hooks in _hooks(module)
            for hook in hooks.values()
        )


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside any nesting of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _hooks(module: nn.Module) -> Iterator[dict[int, Any]]:
    return (vars(module)[kind] for kind in _HOOKS if kind in vars(module))


def _computes_weights(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")
