"""Lightning: a callback with which it validates, saves, averages and ends at the true weights, and repeats for SAM.

If the import fails in torchvision, that was built for another torch: ``pip uninstall torchvision``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import ParallelStrategy
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from msam.optimizers import PerturbedOptimizer

from .saving import TrueState, climbs, save_true_weights, to_displaced, to_true, unwrapped

__all__ = ["PerturbationCallback"]


class PerturbationCallback(Callback):
    """Lets Lightning see the true weights everywhere but in a training batch.

    Validation, early stopping, every checkpoint (also of weights alone, in the middle of an epoch, or after an
    exception), averages (``WeightAveraging``, ``EMAWeightAveraging``, ``StochasticWeightAveraging``) and the model that
    ``fit`` leaves are those of w, not of w + ε. ``fit(ckpt_path=...)`` goes on bit for bit.

    SAM's second gradient is taken of all parts that ``accumulate_grad_batches`` adds up: Lightning's own closure knows
    the last one only. Nothing is logged in that pass, so that what ``training_step`` logs is its value at the true
    weights.

    Parameters
    ----------
    every_batch : bool, optional
        Whether the true weights are in place between batches too, for callbacks that read them there. By default they
        are if the trainer has a ``WeightAveraging``. That costs ``optimizer.eval()`` and ``optimizer.train()`` for each
        batch; otherwise they are called where an epoch or a validation ends, and a checkpoint is made of copies.

    Notes
    -----
    The place in the trainer's list does not matter: the callback goes to the front. Optimizers of other packages are
    left alone. With ``precision="16-mixed"`` Lightning steps without a closure, which SAM refuses: use
    ``"bf16-mixed"``, or manual optimization. Metrics objects that ``training_step`` updates see SAM's second pass as
    well.

    Examples
    --------
    >>> trainer = Trainer(callbacks=[PerturbationCallback(), ModelCheckpoint(monitor="loss")])  # doctest: +SKIP
    """

    def __init__(self, every_batch: bool | None = None) -> None:
        self.every_batch = every_batch
        self._optimizers: list[PerturbedOptimizer] = []
        self._state: TrueState | None = None
        self._before_steps: list[RemovableHandle] = []
        self._repeats = False  # whether there is a SAM
        self._parts: list[tuple[Any, int]] = []  # batches whose gradients are being added up, for SAM
        self._between = False

    # ---------------------------------------------------------------- from beginning to end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go to the front of the trainer's callbacks: the others are to find the true weights."""
        trainer.callbacks = [self, *(each for each in trainer.callbacks if each is not self)]  # type: ignore[attr-defined]  # it has them

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizers, and see to what is saved of them and of the model."""
        self._detach()
        self._optimizers = [each for each in map(unwrapped, trainer.optimizers) if each is not None]
        self._state = save_true_weights(pl_module, *self._optimizers)
        self._before_steps = [
            optimizer.register_step_pre_hook(self._before_step(trainer, pl_module)) for optimizer in self._optimizers
        ]
        self._repeats = any(map(climbs, self._optimizers))
        averages = any(isinstance(each, WeightAveraging) for each in trainer.callbacks)  # type: ignore[attr-defined]
        self._between = averages if self.every_batch is None else self.every_batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Displace the weights, as the gradient of the batch wants them; note the batch if SAM may need it again."""
        if not _only_statistics(trainer):
            self._displace()
        if self._repeats:
            if batch_idx % trainer.accumulate_grad_batches == 0:
                self._parts.clear()
            self._parts.append((batch, batch_idx))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Put the true weights in place if somebody may read them now."""
        if self._between:
            self._true()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the true weights in place."""
        self._parts.clear()
        self._true()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the true weights in place; the next batch displaces them again."""
        self._true()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the true weights."""
        self._true()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the true weights."""
        self._true()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the hooks away."""
        self._detach()

    def _true(self) -> None:
        for optimizer in self._optimizers:
            to_true(optimizer)

    def _displace(self) -> None:
        for optimizer in self._optimizers:
            to_displaced(optimizer)

    def _detach(self) -> None:
        if self._state is not None:
            self._state.remove()
        while self._before_steps:
            self._before_steps.pop().remove()
        self._parts.clear()

    # ---------------------------------------------------------------- the closure, and SAM's second gradient

    def _before_step(self, trainer: Trainer, module: LightningModule) -> Callable[..., Any]:
        """Return a step pre-hook that lets the closure's second call add up all parts of the batch."""

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            closure = kwargs.get("closure")
            if closure is None or not module.automatic_optimization:
                return None
            if _only_statistics(trainer):  # a step without gradients, whose last batch is still to be seen here
                loss = closure()
                self._displace()
                return args, {**kwargs, "closure": lambda: loss}
            # of the earlier parts: SAM asks for a closure that adds to nothing, and this one adds to them itself
            held = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if self._parts[:-1]]
            for p, _ in held:
                p.grad = None
            first = True

            def again() -> Any:
                nonlocal first
                if first:
                    first = False
                    for p, gradient in held:
                        p.grad = gradient
                    return closure()
                with _silent(module):
                    self._earlier_parts(trainer, module, optimizer)
                    return closure()

            return args, {**kwargs, "closure": again}

        return hook

    def _earlier_parts(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Clear the gradient, and add up those of all parts but the last, as Lightning did before."""
        earlier = self._parts[:-1]
        if not earlier:  # the closure clears it
            return
        optimizer.zero_grad()
        strategy = trainer.strategy
        alone: AbstractContextManager[Any] = (
            strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        )
        indexed = len(inspect.signature(module.training_step).parameters) > 1
        with alone:
            for batch, index in earlier:
                output = strategy.training_step(*((batch, index) if indexed else (batch,)))
                loss = output["loss"] if isinstance(output, Mapping) else output
                if loss is not None:
                    strategy.backward(loss / trainer.accumulate_grad_batches, optimizer)


def _only_statistics(trainer: Trainer) -> bool:
    """Whether this epoch takes no step, and collects BatchNorm's statistics at averaged weights."""
    return trainer.max_epochs != -1 and any(
        isinstance(each, StochasticWeightAveraging) and trainer.current_epoch > each.swa_end
        for each in trainer.callbacks  # type: ignore[attr-defined]
    )


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Let a module log nothing inside a ``with`` block."""
    names = ("log", "log_dict")
    own = {name: vars(module)[name] for name in names if name in vars(module)}
    for name in names:
        setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
        for name, value in own.items():
            setattr(module, name, value)
