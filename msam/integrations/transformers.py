"""Hugging Face Trainer: a callback with which it saves and ends at the true weights, and a Trainer that can do SAM.

If the import of ``Trainer`` fails, there may be a torchvision built for another torch: ``pip uninstall torchvision``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from msam.batchnorm import frozen_batchnorm_statistics

from .saving import TrueState, climbs, save_true_weights, to_true, unwrapped

__all__ = ["PerturbationCallback", "PerturbedTrainer"]


class PerturbationCallback(TrainerCallback):
    """Lets Trainer save the true weights, load them as such, and end with them.

    Trainer itself evaluates at the true weights, as it calls ``optimizer.eval()`` before and ``optimizer.train()`` in
    the next training step. With this callback every checkpoint and ``save_model`` hold w too, not w + ε, also between
    evaluations; ``load_best_model_at_end`` and the model that ``train`` leaves are those that were evaluated; and
    ``train(resume_from_checkpoint=...)`` goes on bit for bit.

    Optimizers of other packages are left alone.

    Examples
    --------
    >>> Trainer(model, args, optimizers=(optimizer, None), callbacks=[PerturbationCallback()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._state: TrueState | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See to what is saved of the model and the optimizer."""
        if self._state is not None:
            self._state.remove()
        self._state = save_true_weights(kwargs["model"], kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the true weights."""
        found = unwrapped(kwargs["optimizer"])
        if found is not None:
            to_true(found)


class PerturbedTrainer(Trainer):
    """Trainer with :class:`PerturbationCallback` that takes SAM's two gradients, and any other optimizer as it is.

    SAM's second gradient is taken of all parts that ``gradient_accumulation_steps`` adds up, with BatchNorm's
    statistics frozen. The loss that is logged is the first one, at the true weights. Clipping acts on the second
    gradient.

    Parameters
    ----------
    args, kwargs
        As for ``transformers.Trainer``. Another subclass of it joins in by
        ``class Mine(PerturbedTrainer, ThatTrainer): ...``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(PerturbationCallback())
        self._parts: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take the gradient of a part of the batch; after the last part, for SAM, take those of all parts again.

        Parameters
        ----------
        model, inputs, args, kwargs
            As for ``transformers.Trainer``.

        Returns
        -------
        Tensor
            The loss of the part, at the true weights.
        """
        step = super().training_step
        loss = step(model, inputs, *args, **kwargs)
        optimizer = unwrapped(self.optimizer)
        if optimizer is None or not climbs(optimizer):
            return loss
        self._parts.append(((inputs, *args), kwargs))
        if self.accelerator.sync_gradients:
            parts, self._parts = self._parts, []
            optimizer.first_step(zero_grad=True)
            with frozen_batchnorm_statistics(model):
                for position, (arguments, options) in enumerate(parts, start=1):
                    alone: AbstractContextManager[Any] = (
                        self.accelerator.no_sync(model) if position < len(parts) else nullcontext()
                    )
                    with alone:
                        step(model, *arguments, **options)
        return loss
