"""A private copy of a network and its criterion: batch in, loss out, at whatever tensors are put in their place."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msam_analysis.objective.nested import map_tensors

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

    def private_copy(self, own: Callable[[Tensor], Tensor] | None = None) -> LossModule:
        """Return a copy of the modules that shares every parameter and buffer with the originals.

        A criterion that is no module is the same object. Hooks are not copied: they are the owner's, who did not ask to
        see these passes. Those of :mod:`torch.nn.utils` are, since they compute weights (weight norm, pruning).

        Parameters
        ----------
        own
            What to put in place of a parameter or a buffer, instead of itself.

        Raises
        ------
        ValueError
            Something in the modules cannot be copied.
        """
        tensors = (*self.parameters(), *self.buffers())
        memo: dict[int, Any] = {id(tensor): own(tensor) if own is not None else tensor for tensor in tensors}
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

    @contextlib.contextmanager
    def cut_outputs(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Inside, cut the loss off from the parameters: what the model puts out reaches ``loss_fn`` as leaves.

        Yields
        ------
        list
            Grows with every call of the model: each tensor that it puts out and that depends on parameters, and the
            leaf that takes its place.
        """
        pairs: list[tuple[Tensor, Tensor]] = []

        def cut(tensor: Tensor) -> Tensor:
            if not (tensor.requires_grad and tensor.is_floating_point()):
                return tensor
            leaf = tensor.detach().requires_grad_()
            pairs.append((tensor, leaf))
            return leaf.clone()  # a loss may work in place, which a leaf forbids

        handle = self.model.register_forward_hook(lambda _module, _inputs, output: map_tensors(output, cut))
        try:
            yield pairs
        finally:
            handle.remove()

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


def mean_and_weight(returned: object, samples: int) -> tuple[Tensor, float]:
    """Return the mean loss of a batch and its weight, from what its ``loss_fn`` returned.

    Raises
    ------
    ValueError
        It is neither one number nor a sum and a positive count.
    """
    if isinstance(returned, tuple):
        total, count = _sum_and_count(returned)
        return total / count, count
    return _scalar(returned, "a mean loss"), float(samples)


def _sum_and_count(returned: tuple[Any, ...]) -> tuple[Tensor, float]:
    count = returned[1] if len(returned) == 2 else None
    if not (isinstance(count, int | float) or (isinstance(count, Tensor) and count.numel() == 1)):
        came = f"a tensor of shape {tuple(count.shape)}" if isinstance(count, Tensor) else type(count).__name__
        raise ValueError(
            f"loss_fn returned a tuple of {len(returned)}"
            + (f" with {came} as its second item" if len(returned) == 2 else "")
            + ": expected a mean loss alone, or (sum, count) with a number; drop what else it returns, e.g. the logits"
        )
    weight = float(count)
    if not weight > 0:
        raise ValueError(f"loss_fn returned (sum, count) with count {weight:g}: expected a positive count")
    return _scalar(returned[0], "a sum"), weight


def _scalar(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"loss_fn must return {what} as one number, got {came}: use reduction='mean', or return (sum, count)"
        )
    return value.reshape(())


def use_dropout(model: nn.Module) -> None:
    """Make what drops at random in a private copy do so; BatchNorm stays as it is.

    That is every module with "drop" in the name of its class, of an attribute or of a child: dropout layers, stochastic
    depth, and attention that hands a rate of its own to a function.
    """
    for module in model.modules():
        names = (type(module).__name__, *vars(module), *(name for name, _ in module.named_children()))
        if any("drop" in name.lower() for name in names) and not isinstance(module, _BatchNorm):
            module.training = True  # of this module alone: train() would reach the BatchNorm layers inside


def _hooks(module: nn.Module) -> Iterator[dict[int, Any]]:
    return (vars(module)[kind] for kind in _HOOKS if kind in vars(module))


def _computes_weights(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")
