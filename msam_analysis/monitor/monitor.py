"""The monitor: which probes are due, what they returned, what they cost."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from msam_analysis.measures.momentum import loss_scale, momentum_buffers, present_gradients
from msam_analysis.monitor.attachment import Attachment
from msam_analysis.monitor.probes import Every, Finish, Probe, StepProbe
from msam_analysis.monitor.probes.base import check_period
from msam_analysis.monitor.records import RecordFile, Row, frame_of, read_records

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


@dataclass
class _Entry:
    """A probe, its period, and what it has taken so far."""

    probe: Probe
    period: int
    name: str
    calls: int = 0
    seconds: float = 0.0

    def timed(self, call: Callable[..., T], *arguments: Any) -> T:
        """Return what a call returns, and add up its time."""
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


@dataclass
class _Pending:
    """A row of a step that is not over yet."""

    row: Row
    finishes: list[tuple[_Entry, Finish]] = field(default_factory=list)
    gradients: Mapping[Tensor, Tensor] | None = None


class Monitor:
    """Asks probes at every ``every``-th step of an optimizer and keeps what they return.

    It attaches to the optimizer's own hooks: the loop does not change, whether it is a plain one, Lightning's or the
    Hugging Face Trainer's. Probes are asked inside of ``step``, when the gradient is what it will be stepped with
    (clipped, unscaled, gathered from all parts of a batch and all processes) and before anything moves; SAM is observed
    once a step, after its first gradient. A row is complete, and written, when the step is over.

    Parameters
    ----------
    optimizer
        Any ``torch.optim`` optimizer; wrappers of Lightning and accelerate are looked through.
    probes
        Functions of ``(optimizer, step)`` that return named numbers, see :mod:`msam_analysis.monitor.probes`; one in
        :class:`~msam_analysis.monitor.probes.Every` has a period of its own.
    every
        Record at steps ``0, every, 2 every, ...``. Default 50, the paper's choice for exhibit A8.
    path
        A file that every row is appended to as soon as it is complete. If it exists, it is continued behind its last
        row; see Notes. Default: none.
    scaler
        The :class:`torch.amp.GradScaler` that calls the optimizer's ``step``. It is needed only to count the steps that
        it leaves out because of an overflow (:attr:`skipped`): its ``step`` is replaced by one that tells of them,
        until :meth:`close`.

    Attributes
    ----------
    step
        Steps taken so far; the number of the next one, as steps count from 0. One left out because of an overflow is
        not counted.
    skipped
        Steps left out because of an overflow, as far as they were seen: with ``scaler`` all of them, otherwise those of
        optimizers that a scaler leaves it to (torch's fused kernels, SAM).
    rows
        What was recorded, one dict for each recorded step.

    Raises
    ------
    TypeError
        ``optimizer`` is none.
    ValueError
        ``every`` is not a positive integer, there is no probe, or the file is of other probes. Found out at the first
        recorded step, in which the optimizer's ``step`` then raises: two probes record the same name, or a file that
        holds an earlier run is given to an optimizer that has not taken a step.

    Notes
    -----
    To resume, save :meth:`state_dict` in the checkpoint, beside the optimizer's, and load it into a monitor of the same
    probes and path: rows of steps after the checkpoint are dropped, and the file becomes what an uninterrupted run
    writes. Without it, counting goes on where the file ends: after :meth:`close` at the step that was reached, after a
    crash behind the last row.

    Steps inside a captured CUDA graph call no hooks and cannot be recorded. In data-parallel training every process may
    have its monitor: the gradients that it sees are averaged already; give ``path`` to one of them.

    Examples
    --------
    >>> monitor = Monitor(optimizer, [probes.MomentumGradientCosine()], every=10, path="run.jsonl")  # doctest: +SKIP
    >>> for batch in loader:
    ...     ...  # doctest: +SKIP
    >>> monitor.frame()  # doctest: +SKIP
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        probes: Sequence[Probe | Every],
        every: int = 50,
        *,
        path: str | os.PathLike[str] | None = None,
        scaler: Any = None,
    ) -> None:
        check_period("every", every)
        if not probes:
            raise ValueError(
                "probes is empty: expected at least one, e.g. msam_analysis.monitor.probes.MomentumGradientCosine()"
            )
        self._entries = [
            _Entry(each.probe, each.period, _described(each.probe))
            if isinstance(each, Every)
            else _Entry(each, every, _described(each))
            for each in probes
        ]
        self.probes = tuple(entry.probe for entry in self._entries)
        self.every = every
        self.step = 0
        self.skipped = 0
        self.rows: list[Row] = []
        self._pending: _Pending | None = None
        self._listeners: OrderedDict[int, Callable[[Monitor], None]] = OrderedDict()
        self._first: float | None = None
        self._elapsed = 0.0
        self._file = None if path is None else RecordFile(path, self._identity())
        self._continues = False  # whether an earlier run's rows are there, and nobody has said that they are ours
        if self._file is not None:
            self.rows, self.step = self._file.rows, self._file.step
            self._continues = bool(self.rows)
        self._attachment = Attachment(optimizer, self, scaler)

    # ---------------------------------------------------------------- what users see

    def frame(self) -> pd.DataFrame:
        """Return what was recorded so far: one row per recorded step, column ``step`` and one per quantity.

        NaN where a probe was not asked at a step, or had no answer.
        """
        return frame_of(self.rows)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> pd.DataFrame:
        """Return the table in a file that a monitor wrote, or is writing.

        Parameters
        ----------
        path
            The ``path`` of the monitor.

        Returns
        -------
        pandas.DataFrame
            As :meth:`frame` returns it. Half a line at the end, which a crash can leave, does not count.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            It is no file of a monitor, or damaged.
        """
        return read_records(path)

    def cost(self) -> pd.DataFrame:
        """Return what the probes have taken in this process: one row for each, and nothing of it in files.

        Returns
        -------
        pandas.DataFrame
            ``probe``, its ``period``, how often it was asked (``calls``), ``seconds`` of wall-clock time in all and
            ``per_call``, and their ``share`` of the time since the first observed step. On a GPU a probe that fetches
            its numbers waits for what was under way, and that is counted as well.
        """
        elapsed = self._elapsed
        frame: pd.DataFrame = pd.DataFrame(
            [
                {
                    "probe": entry.name,
                    "period": entry.period,
                    "calls": entry.calls,
                    "seconds": entry.seconds,
                    "per_call": entry.seconds / entry.calls if entry.calls else float("nan"),
                    "share": entry.seconds / elapsed if elapsed > 0 else float("nan"),
                }
                for entry in self._entries
            ]
        )
        return frame

    def on_record(self, listener: Callable[[Monitor], None]) -> RemovableHandle:
        """Call ``listener(monitor)`` after every row, outside of what is timed.

        Returns
        -------
        torch.utils.hooks.RemovableHandle
            Its ``remove()`` ends the calls.
        """
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = listener
        return handle

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold: the step, and what probes carry from one record to the next.

        Tensors and plain values only, so that ``torch.load(..., weights_only=True)`` reads it. Rows are in the file.
        """
        states: list[dict[str, Any]] = [getattr(entry.probe, "state_dict", dict)() for entry in self._entries]
        return {"step": self.step, "skipped": self.skipped, "identity": self._identity(), "probes": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; rows of later steps are dropped, from the file as well.

        Parameters
        ----------
        state
            What :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            It is of other probes.
        """
        if state["identity"] != self._identity():
            raise ValueError(
                f"expected the state of a monitor of {self._identity()}, got one of {state['identity']}: give this one "
                "the same probes and periods"
            )
        self.step, self.skipped = int(state["step"]), int(state["skipped"])
        for entry, saved in zip(self._entries, state["probes"], strict=True):
            if saved:
                entry.probe.load_state_dict(saved)  # type: ignore[attr-defined]  # it had a state to save
        if self._file is None:
            self.rows = [row for row in self.rows if row["step"] < self.step]
        else:
            self._file.rewind(self.step)
        self._pending = None
        self._continues = False

    def close(self) -> None:
        """Detach from the optimizer; what was recorded stays. Safe to call twice."""
        if self._file is not None and not self._continues:
            self._file.end(self.step)
        self._attachment.close()

    def __enter__(self) -> Self:
        """Return the monitor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.close()

    # ---------------------------------------------------------------- what the hooks call

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Ask the probes that are due, before the step; called by the optimizer's hook."""
        if self._first is None:
            self._first = time.perf_counter()
        self._pending = None
        self._check_run(optimizer)
        due = [entry for entry in self._entries if self.step % entry.period == 0]
        if not due:
            return
        pending = _Pending({"step": self.step})
        with torch.no_grad():
            for entry in due:
                entry.calls += 1
                _add(pending.row, entry.timed(entry.probe, optimizer, self.step))
                if isinstance(entry.probe, StepProbe):
                    finish = entry.timed(entry.probe.across, optimizer, self.step)
                    pending.finishes += [] if finish is None else [(entry, finish)]
            if pending.finishes and not self._attachment.gradients_stay:
                pending.gradients = pending.finishes[0][0].timed(_copied, optimizer)
        self._pending = pending

    def after(self, optimizer: torch.optim.Optimizer, taken: bool) -> None:
        """Count the step and complete its row; called by the optimizer's hook."""
        pending, self._pending = self._pending, None
        if not taken:
            self.skipped += 1
            return
        if pending is not None and pending.finishes:
            with torch.no_grad():
                grads = present_gradients(optimizer) if pending.gradients is None else pending.gradients
                for entry, finish in pending.finishes:
                    _add(pending.row, entry.timed(finish, grads))
        self.step += 1
        self._elapsed = time.perf_counter() - (self._first or 0.0)
        if pending is None:
            return
        if self._file is not None:
            self._file.append(pending.row)
        else:
            self.rows.append(pending.row)
        for listener in tuple(self._listeners.values()):
            listener(self)

    # ---------------------------------------------------------------- private

    def _identity(self) -> dict[str, Any]:
        return {"probes": [entry.name for entry in self._entries], "periods": [entry.period for entry in self._entries]}

    def _check_run(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse to write a new run behind the rows of an older one."""
        if not self._continues:
            return
        try:
            new = not momentum_buffers(optimizer)
        except RuntimeError:  # without momentum nothing tells a new optimizer from an old one
            new = False
        if new:
            raise ValueError(
                f"the file holds {len(self.rows)} rows of an earlier run, and the optimizer has not taken a step: "
                "expected one that goes on; load the checkpoint with the monitor's state_dict, or give another path"
            )
        self._continues = False


def _copied(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return copies of the gradients, without a loss scale: the step may write something else into ``.grad``."""
    scale = loss_scale(optimizer)
    return {parameter: grad / scale for parameter, grad in present_gradients(optimizer).items()}


def _add(row: Row, values: Mapping[str, float]) -> None:
    clash = row.keys() & values.keys()
    if clash:
        raise ValueError(f"two probes record {min(clash)!r}: expected every name once; remove one of them")
    row.update(values)


def _described(probe: Probe) -> str:
    """Return a probe in words: its name, and those of its settings that are plain values."""
    if not is_dataclass(probe):
        return str(getattr(probe, "__qualname__", type(probe).__qualname__))
    settings = {each.name: getattr(probe, each.name) for each in fields(probe) if each.init}
    told = {
        name: type(value).__name__ if isinstance(value, nn.Module) else repr(value)
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str | tuple | list | nn.Module)
    }
    return f"{type(probe).__qualname__}({', '.join(f'{name}={value}' for name, value in told.items())})"
