"""A monitor as a callback of Lightning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from msam.integrations import warn_if_displacing
from msam_analysis.monitor.loggers import Logger
from msam_analysis.monitor.monitor import Monitor
from msam_analysis.monitor.probes import Every, Probe
from msam_analysis.monitor.records import Row

__all__ = ["MonitorCallback"]


class MonitorCallback(Callback):
    """Attaches a :class:`~msam_analysis.monitor.Monitor` to the optimizer of a fit.

    Rows go to the trainer's own loggers, and to a file and loggers that are named. The state is part of every
    checkpoint: ``fit(ckpt_path=...)`` goes on, and the file becomes that of an uninterrupted run. In data-parallel
    training every process asks the probes, and only the first one writes.

    Parameters
    ----------
    probes, every, path, to
        As for :class:`~msam_analysis.monitor.Monitor`.
    log
        Whether rows go to the trainer's loggers too, at the monitor's step, under ``prefix``. Default True.
    prefix
        What their names begin with there. Default ``"monitor/"``.
    optimizer
        Which of the trainer's optimizers is watched. Default the first, 0.

    Attributes
    ----------
    monitor
        The monitor; None before the fit. It stays after it, detached, with its rows.

    Warns
    -----
    UserWarning
        The optimizer is one of :mod:`msam` that leaves the weights displaced between steps, and the trainer saves
        checkpoints and has no ``msam.integrations.lightning.PerturbationCallback``: they would hold displaced weights.

    Examples
    --------
    >>> Trainer(callbacks=[MonitorCallback([probes.Norms()], every=10)])  # doctest: +SKIP
    """

    def __init__(
        self,
        probes: Sequence[Probe | Every],
        every: int = 50,
        *,
        path: str | os.PathLike[str] | None = None,
        to: Sequence[Logger] = (),
        log: bool = True,
        prefix: str = "monitor/",
        optimizer: int = 0,
    ) -> None:
        self.probes, self.every, self.path, self.to = probes, every, path, to
        self.log, self.prefix, self.optimizer = log, prefix, optimizer
        self.monitor: Monitor | None = None
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the monitor."""
        first = trainer.is_global_zero
        self.monitor = Monitor(
            trainer.optimizers[self.optimizer],
            self.probes,
            self.every,
            path=self.path if first else None,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            to=[*self.to, *([self._log(trainer)] if self.log else [])] if first else [],
        )
        if self._loaded is not None:
            self.monitor.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of displaced weights in checkpoints."""
        if trainer.checkpoint_callbacks:
            warn_if_displacing(
                trainer.optimizers, "add msam.integrations.lightning.PerturbationCallback() to the trainer's callbacks"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the monitor, also after an exception."""
        if self.monitor is not None:
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state for a checkpoint."""
        return {} if self.monitor is None else self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until the fit starts."""
        self._loaded = state_dict

    def _log(self, trainer: Trainer) -> Logger:
        """Return a logger that hands rows to those of the trainer."""

        def log(row: Row) -> None:
            numbers = {self.prefix + name: value for name, value in row.items() if name != "step"}
            for each in trainer.loggers:
                each.log_metrics(numbers, step=int(row["step"]))

        return log
