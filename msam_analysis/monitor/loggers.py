"""Loggers: what a :class:`~msam_analysis.monitor.Monitor` hands its rows to, as soon as each is complete.

A logger is any function of a row, a dict of the step and the numbers of that step: ``print`` is one. Those here write
a table (:class:`CSV`) or send rows to a tracker (:class:`TensorBoard`, :class:`MLflow`, :class:`WandB`). A logger that
has ``rewind(step)`` is told when the monitor goes back to a checkpoint, and one that has ``close()`` when it is closed.

A tracker's library is imported when its logger is made (extra ``tracking``).
"""

from __future__ import annotations

import csv
import importlib
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msam_analysis.monitor.records import Row
from msam_analysis.results import atomic_path

__all__ = ["CSV", "Logger", "MLflow", "TensorBoard", "WandB"]

Logger = Callable[[Row], object]


class CSV:
    """Writes rows as a table of comma-separated values, with all digits: numbers are read again to the bit.

    A row is in the file when its step is over. A column that appears later (of a probe with a period of its own) makes
    the file be written anew; earlier rows are empty there.

    Parameters
    ----------
    path
        The file; parents are made. An existing one is continued.

    Raises
    ------
    ValueError
        The file has no column ``step``. Where a row comes whose step is in the file already, as of an earlier run.

    Examples
    --------
    >>> monitor = Monitor(optimizer, [probes.Norms()], to=[loggers.CSV("run.csv")])  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []  # as text where they were read
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self._columns = list(reader.fieldnames or [])
                self._rows = list(reader)
            if self._columns and "step" not in self._columns:
                raise ValueError(
                    f"{self.path} is not a table of a Monitor: expected a column step, got {', '.join(self._columns)}; "
                    "give another path"
                )

    def __call__(self, row: Row) -> None:
        """Add a row."""
        if self._rows and int(self._rows[-1]["step"]) >= row["step"]:
            raise ValueError(
                f"{self.path} holds rows up to step {self._rows[-1]['step']}, got one of step {row['step']}: expected "
                "a later one; load the checkpoint with the monitor's state_dict, or give another path"
            )
        self._rows.append(dict(row))
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write_all()
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def rewind(self, step: int) -> None:
        """Delete the rows of ``step`` and later ones."""
        self._rows = [row for row in self._rows if int(row["step"]) < step]
        if self._columns:
            self._write_all()

    def _write_all(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(self._rows)


class TensorBoard:
    """Writes rows as scalars for TensorBoard, in single precision.

    Parameters
    ----------
    to
        A folder for the event files, or a ``torch.utils.tensorboard.SummaryWriter`` of yours, which is left open.
    prefix
        What the names begin with. Default ``"monitor/"``.

    Raises
    ------
    ModuleNotFoundError
        TensorBoard is not installed.

    Notes
    -----
    Where the monitor goes back to a checkpoint, events of its step and of later ones in the folder are declared void,
    and TensorBoard shows them no more.
    """

    def __init__(self, to: str | os.PathLike[str] | Any, prefix: str = "monitor/") -> None:
        self.prefix = prefix
        self._folder = to if isinstance(to, str | os.PathLike) else None
        self._make: Any = None
        self._writer: Any
        if self._folder is None:
            self._writer = to
        else:
            _library("tensorboard")
            self._make = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self._writer = self._make(os.fspath(self._folder))

    def __call__(self, row: Row) -> None:
        """Write a row."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(self.prefix + name, value, int(row["step"]))
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Declare the events of ``step`` and of later ones void."""
        if self._folder is not None:
            self._writer.close()
            self._writer = self._make(os.fspath(self._folder), purge_step=step)

    def close(self) -> None:
        """Close the event file, if it is our own."""
        if self._folder is not None:
            self._writer.close()


class MLflow:
    """Sends rows to an MLflow run, as metrics.

    Parameters
    ----------
    run
        Id of the run. By default the active one (``mlflow.start_run()``), or if there is none a new one, which
        ``close`` ends.
    experiment
        Name of the experiment that a new run is for. Default: MLflow's own, ``"Default"``.
    prefix
        What the names begin with. Default ``"monitor/"``. A slash in a name becomes a dot, as in MLflow's files
        ``cosine`` and ``cosine/weight`` cannot be side by side; characters that MLflow has not in names become ``_``.

    Raises
    ------
    ModuleNotFoundError
        MLflow is not installed.

    Notes
    -----
    Where runs are stored is MLflow's own matter: ``mlflow.set_tracking_uri``, or the variable ``MLFLOW_TRACKING_URI``.
    Rows of steps that the run has already are left out, as after going back to a checkpoint.
    """

    def __init__(self, run: str | None = None, experiment: str = "Default", prefix: str = "monitor/") -> None:
        mlflow = _library("mlflow")
        self.prefix = prefix
        self._client = mlflow.MlflowClient()
        self._metric = importlib.import_module("mlflow.entities").Metric
        active = mlflow.active_run()
        self._ours = run is None and active is None
        if self._ours:
            found = self._client.get_experiment_by_name(experiment)
            identity = self._client.create_experiment(experiment) if found is None else found.experiment_id
            self.run = str(self._client.create_run(identity).info.run_id)
        else:
            self.run = active.info.run_id if run is None else run
        self._last = max(
            (
                entry.step
                for name in self._client.get_run(self.run).data.metrics
                if name.startswith(prefix)
                for entry in self._client.get_metric_history(self.run, name)
            ),
            default=-1,
        )

    def __call__(self, row: Row) -> None:
        """Send a row."""
        step = int(row["step"])
        if step > self._last:
            self._last, now = step, int(1000 * time.time())
            self._client.log_batch(
                self.run,
                [
                    self._metric(self.prefix + re.sub(r"[^\w\-.: ]", "_", name.replace("/", ".")), value, now, step)
                    for name, value in _numbers(row).items()
                ],
            )

    def close(self) -> None:
        """End the run, if it is our own."""
        if self._ours:
            self._client.set_terminated(self.run)


class WandB:
    """Sends rows to a run of Weights & Biases, drawn over ``<prefix>step``.

    Parameters
    ----------
    run
        The run. By default the one of ``wandb.init()``, or if there is none a new one, which ``close`` ends.
    prefix
        What the names begin with. Default ``"monitor/"``.
    options
        For ``wandb.init``, if a run is made: ``project``, ``dir``, ``mode="offline"``, ...

    Raises
    ------
    ModuleNotFoundError
        W&B is not installed.

    Notes
    -----
    Rows of steps that the run has already are left out, as after going back to a checkpoint.
    """

    def __init__(self, run: Any = None, prefix: str = "monitor/", **options: Any) -> None:
        wandb = _library("wandb")
        self.prefix = prefix
        self._ours = run is None and wandb.run is None
        self.run = (wandb.run or wandb.init(**options)) if run is None else run
        # a step of its own: the run's counts whatever else the loop logs
        self.run.define_metric(f"{prefix}step", hidden=True)
        self.run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        self._last = int(self.run.summary.get(f"{prefix}step", -1))

    def __call__(self, row: Row) -> None:
        """Send a row."""
        if row["step"] > self._last:
            self._last = int(row["step"])
            self.run.log({self.prefix + name: value for name, value in row.items()})

    def close(self) -> None:
        """End the run, if it is our own."""
        if self._ours:
            self.run.finish()


def _numbers(row: Mapping[str, float]) -> dict[str, float]:
    """Return a row without its step."""
    return {name: float(value) for name, value in row.items() if name != "step"}


def _library(name: str) -> Any:
    """Import the library of a tracker."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"this logger needs {name}, which is not installed: pip install 'msam-analysis[tracking]'", name=name
        ) from error


def __dir__() -> list[str]:
    return list(__all__)
