"""Loggers: what a :class:`~msam_analysis.monitor.Monitor` hands its rows to, as soon as each is complete.

A logger is any function of a row, a dict of the step and the numbers of that step: ``print`` is one. Those here write
a table (:class:`CSV`) or send rows to a tracker (:class:`TensorBoard`, :class:`MLflow`, :class:`WandB`). A logger that
has ``rewind(step)`` is told when the monitor goes back to a checkpoint, and one that has ``close()`` when it is closed.
One that has ``check(step)`` is asked before a step whose row it will get, and may raise: nothing has moved then. A
logger that raises later, when the weights have moved, does not end the training: the monitor warns once and goes on.

A tracker's library is imported when its logger is made (extra ``tracking``).
"""

from __future__ import annotations

import csv
import importlib
import io
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msam_analysis.monitor.growing import GrowingFile
from msam_analysis.monitor.records import Row
from msam_analysis.objective.randomness import Alone

__all__ = ["CSV", "Logger", "MLflow", "TensorBoard", "WandB"]

Logger = Callable[[Row], object]


class CSV:
    """Writes rows as a table of comma-separated values, with all digits: numbers are read again to the bit.

    A row is in the file when its step is over. A column that appears later (of a probe with a period of its own) makes
    the file be written anew; earlier rows are empty there. A file that somebody empties or moves away, as log rotation
    does, is begun anew with the line of columns.

    Parameters
    ----------
    path
        The file; parents are made. An existing one is continued; half a line at its end is dropped.

    Raises
    ------
    ValueError
        The file is no such table, or no regular file. Where a row comes whose step is in the file already, as of an
        earlier run, and where somebody else has written to the file.
    OSError
        Where a row cannot be written. It is kept, and written with the next one.

    Examples
    --------
    >>> monitor = Monitor(optimizer, [probes.Norms()], to=[loggers.CSV("run.csv")])  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []  # as text where they were read
        self._first = self._written = 0  # the file has the rows from the first one on, up to what is written
        self._alone = Alone()  # monitors of several threads may share a table
        self._file = GrowingFile(path, lambda: self._text([]), self._own)
        content = self._file.read()
        self._file.size = content.rfind(b"\n") + 1
        self._columns, self._rows = _table(self.path, content[: self._file.size])
        self._written = len(self._rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a copy in another process is made of: it reads the file again."""
        return type(self), (self.path,)

    def __call__(self, row: Row) -> None:
        """Add a row."""
        with self._alone:
            self.check(int(row["step"]))
            self._rows.append(dict(row))
            late = dict.fromkeys(name for row in self._rows[self._written :] for name in row)
            columns = list(dict.fromkeys([*self._columns, *late]))
            if columns != self._columns:
                self._write_all(self._rows, columns)
            else:
                lines = self._text(self._rows[self._written :], head=False)
                self._first = self._written if self._file.append(lines) else self._first
                self._written = len(self._rows)

    def check(self, step: int) -> None:
        """Raise ``ValueError`` if the file has rows of this step or of later ones; a monitor asks before the step."""
        last = int(self._rows[-1]["step"]) if self._rows else -1
        if last >= step:
            raise ValueError(
                f"{self.path} holds rows up to step {last}, got one of step {step}: expected a later one; load the "
                "checkpoint with the monitor's state_dict, or give another path"
            )

    def rewind(self, step: int) -> None:
        """Delete the rows of ``step`` and later ones."""
        with self._alone:
            kept = [row for row in self._rows if int(row["step"]) < step]
            if self._columns:
                self._write_all(kept, self._columns)

    def _own(self) -> bytes:
        return self._text(self._rows[self._first : self._written])

    def _text(self, rows: list[dict[str, Any]], columns: Sequence[str] | None = None, *, head: bool = True) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns if columns is None else columns)
        if head:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    def _write_all(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        first = min(self._first, len(rows))

        def content(anew: bool) -> bytes:
            nonlocal first
            first = min(self._written, len(rows)) if anew else first
            return self._text(rows[first:], columns)

        self._file.replace(content)
        self._rows, self._columns, self._first, self._written = rows, columns, first, len(rows)


def _table(path: Path, content: bytes) -> tuple[list[str], list[dict[str, Any]]]:
    """Return columns and rows of a table that a monitor wrote; both empty where there is nothing.

    Raises ValueError: It is another table, or damaged.
    """
    try:
        reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        columns = list(reader.fieldnames or [])
        rows: list[dict[str, Any]] = list(reader)
        steps = [int(row.get("step") or -1) for row in rows]
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a table of a Monitor ({error}): expected lines of numbers behind one of "
            "columns; give another path"
        ) from None
    if content and "step" not in columns:
        raise ValueError(
            f"{path} is not a table of a Monitor: expected a column step, got {', '.join(columns)}; give another path"
        )
    whole = b"\0" not in content and all(None not in row and None not in row.values() for row in rows)
    if not whole or len(set(columns)) < len(columns) or min(steps, default=0) < 0 or sorted(set(steps)) != steps:
        raise ValueError(
            f"{path} is damaged: expected columns of different names, rows with all of them, and steps that increase; "
            "give another path"
        )
    return columns, rows


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
