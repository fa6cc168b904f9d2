"""BatchNorm's running statistics: not collected twice, and collected anew at the true weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

if TYPE_CHECKING:
    from .optimizers import PerturbedOptimizer

__all__ = ["frozen_batchnorm_statistics", "update_batchnorm_statistics"]


class _Pause:
    """Layers that normalise by their batch without recording it, until :meth:`end`."""

    def __init__(self) -> None:
        self._layers: list[tuple[_NormBase, str, Any]] = []
        self._seen: set[int] = set()

    def add(self, model: nn.Module, _: Any = None) -> None:
        """Pause the layers of a model; as a hook, of one that is about to run."""
        if id(model) in self._seen:
            return
        for module in model.modules():
            if id(module) in self._seen:
                continue
            self._seen.add(id(module))
            if isinstance(module, _NormBase) and module.training and module.track_running_stats:
                # instance norm reads its buffers whatever the flag says, but leaves them as they are at momentum 0
                name, value = ("track_running_stats", False) if isinstance(module, _BatchNorm) else ("momentum", 0.0)
                self._layers.append((module, name, getattr(module, name)))
                setattr(module, name, value)

    def end(self) -> None:
        for module, name, value in self._layers:
            setattr(module, name, value)


@contextmanager
def frozen_batchnorm_statistics(model: nn.Module) -> Iterator[None]:
    """Let ``model`` run in training mode without collecting running statistics.

    Use it for SAM's second pass between ``first_step()`` and ``second_step()``; ``step(closure)`` does it by itself.
    Batches are still normalised by their own statistics. The layers are as before afterwards, also after an exception.

    Parameters
    ----------
    model : Module
        Model with the layers of batch and instance norm.
    """
    pause = _Pause()
    pause.add(model)
    try:
        yield
    finally:
        pause.end()


@contextmanager
def frozen_statistics_of_whatever_runs() -> Iterator[None]:
    """Let every module that is called inside the block run without collecting running statistics."""
    pause = _Pause()
    handle = register_module_forward_pre_hook(pause.add)
    try:
        yield
    finally:
        handle.remove()
        pause.end()


@torch.no_grad()
def update_batchnorm_statistics(
    model: nn.Module,
    data: Iterable[Any],
    optimizer: PerturbedOptimizer | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Estimate BatchNorm's running statistics anew, at the true weights.

    The running mean and variance become averages of the batches' own ones over all of ``data``. Each batch weighs what
    it holds, while :func:`torch.optim.swa_utils.update_bn` weighs a smaller last batch as a full one. Only the
    BatchNorm layers are in training mode meanwhile. Modes and momenta are as before afterwards.

    Parameters
    ----------
    model : Module
        Model whose statistics are estimated.
    data : iterable
        Batches. A batch is a tensor, or a list or tuple whose first item is the input.
    optimizer : PerturbedOptimizer, optional
        Optimizer of the model. Its true weights are in place meanwhile.
    forward : callable, optional
        Function ``forward(model, batch)`` that runs the model on any other kind of batch. The sizes of such batches are
        unknown, and all weigh alike.
    device : device, optional
        Device to which inputs are moved.

    Raises
    ------
    ValueError
        If ``data`` holds no batch.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    seen = 0
    with nullcontext() if optimizer is None else optimizer.unperturbed():
        try:
            model.eval()
            for layer in layers:
                layer.reset_running_stats()
                layer.train()
            for batch in data:
                inputs = batch[0] if forward is None and isinstance(batch, list | tuple) else batch
                count = len(inputs) if forward is None else 1
                seen += count
                for layer in layers:
                    layer.momentum = count / seen
                if forward is not None:
                    forward(model, batch)
                else:
                    model(inputs.to(device) if device is not None and isinstance(inputs, Tensor) else inputs)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
            for module, mode in modes:
                module.training = mode
    if not seen:
        raise ValueError("expected at least one batch, got none; pass a loader that is not spent.")
