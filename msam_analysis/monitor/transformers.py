"""A monitor as a callback of the Hugging Face Trainer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from msam.integrations import warn_if_displacing
from msam_analysis.monitor.loggers import Logger
from msam_analysis.monitor.monitor import Monitor
from msam_analysis.monitor.probes import Every, Probe

__all__ = ["MonitorCallback"]

_FILE = "monitor.pt"


class MonitorCallback(TrainerCallback):
    """Attaches a :class:`~msam_analysis.monitor.Monitor` to Trainer's optimizer.

    The monitor's state is a file ``monitor.pt`` in every checkpoint: ``train(resume_from_checkpoint=...)`` goes on, and
    the file of rows becomes that of an uninterrupted run. In data-parallel training every process asks the probes, and
    only the first one writes.

    Parameters
    ----------
    probes, every, path, to
        As for :class:`~msam_analysis.monitor.Monitor`.

    Attributes
    ----------
    monitor
        The monitor; None before the training. It stays after it, detached, with its rows.

    Warns
    -----
    UserWarning
        The optimizer is one of :mod:`msam` that leaves the weights displaced between steps, a checkpoint is made, and
        there is no ``msam.integrations.transformers.PerturbationCallback``.

    Examples
    --------
    >>> Trainer(model, args, callbacks=[MonitorCallback([probes.Norms()], every=10)])  # doctest: +SKIP
    """

    def __init__(
        self,
        probes: Sequence[Probe | Every],
        every: int = 50,
        *,
        path: str | os.PathLike[str] | None = None,
        to: Sequence[Logger] = (),
    ) -> None:
        self.probes, self.every, self.path, self.to = probes, every, path, to
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the monitor, and let it go on where the training does."""
        optimizer = kwargs["optimizer"]
        first = state.is_world_process_zero
        self.monitor = Monitor(
            optimizer,
            self.probes,
            self.every,
            path=self.path if first else None,
            scaler=getattr(optimizer, "scaler", None),
            to=self.to if first else (),
        )
        saved = _folder(args, state) / _FILE
        if state.global_step and saved.is_file():
            self.monitor.load_state_dict(torch.load(saved, weights_only=True))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the monitor's state into the checkpoint, and warn of displaced weights in it."""
        warn_if_displacing(
            [kwargs["optimizer"]],
            "add msam.integrations.transformers.PerturbationCallback() to the trainer's callbacks",
        )
        if self.monitor is not None and state.is_world_process_zero:
            torch.save(self.monitor.state_dict(), _folder(args, state) / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the monitor."""
        if self.monitor is not None:
            self.monitor.close()


def _folder(args: Any, state: Any) -> Path:
    """Return the checkpoint's folder of the step that the training is at."""
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
