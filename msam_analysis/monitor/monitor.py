"""The monitor: asks the probes that are due, and keeps their numbers and their cost."""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from msam_analysis.measures.momentum import loss_scale, momentum_buffers, present_gradients
from msam_analysis.monitor.attachment import Attachment
from msam_analysis.monitor.loggers import Logger
from msam_analysis.monitor.probes import Every, Finish, Probe, StepProbe
from msam_analysis.monitor.probes.base import check_period
from msam_analysis.monitor.records import RecordFile, Row, frame_of, read_records
from msam_analysis.objective.handing_on import Examinations

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

# The monitors that write to files, by optimizer and path.
_WRITING: weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.WeakValueDictionary[Path, Monitor]] = (
    weakref.WeakKeyDictionary()
)


@dataclass
class _Entry:
    """A probe, its period, and its calls and seconds so far."""

    probe: Probe
    period: int
    name: str
    calls: int = 0
    seconds: float = 0.0
    answered: bool = False  # whether it has answered once, so that its failure is none of the setting

    def timed(self, call: Callable[..., T], *arguments: Any) -> T:
        """Make a call, and add up its time."""
        start = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


@dataclass
class _Pending:
    """The row of a step that is not over yet."""

    row: Row
    finishes: list[tuple[_Entry, Finish]] = field(default_factory=list)
    gradients: Mapping[Tensor, Tensor] | None = None


class Monitor:
    """Asks probes at every ``every``-th step of an optimizer and keeps their numbers.

    It attaches to the optimizer's own hooks: the loop does not change, whether it is a plain one, Lightning's or the
    Hugging Face Trainer's. Probes are asked inside of ``step``, before anything moves. The gradient is then the one of
    the step: clipped, unscaled, and gathered from all parts of a batch and all processes. SAM is observed once in a
    step, after its first gradient. A row is complete, and written, when the step is over.

    Parameters
    ----------
    optimizer
        Any ``torch.optim`` optimizer, also inside a wrapper of Lightning or accelerate.
    probes
        Functions of ``(optimizer, step)`` that return named numbers, see :mod:`msam_analysis.monitor.probes`. A probe
        inside :class:`~msam_analysis.monitor.probes.Every` has a period of its own.
    every
        Period in steps: rows are recorded at steps ``0, every, 2 every, ...``. Default 50, as in exhibit A8.
    path
        A file to which every row is appended as soon as it is complete. An existing file is continued after its last
        row; see Notes. Default: no file.
    scaler
        The :class:`torch.amp.GradScaler` that calls the optimizer's ``step``. It is needed only to count the steps that
        it leaves out because of an overflow (:attr:`skipped`). Until :meth:`close` its ``step`` is replaced by one that
        reports them.
    to
        Loggers: functions to which every row is handed, as a dict, when it is complete, see
        :mod:`msam_analysis.monitor.loggers`. Their time does not count. Default: none.

    Attributes
    ----------
    step
        Number of steps taken so far, and number of the next step, as steps count from 0. Steps left out because of an
        overflow do not count.
    skipped
        Number of steps left out because of an overflow. With ``scaler`` all of them count, otherwise those that the
        optimizer itself notices (torch's fused kernels, SAM).
    rows
        The recorded rows, one dict for each recorded step.

    Raises
    ------
    TypeError
        ``optimizer`` is not an optimizer, or a probe or logger is something else.
    ValueError
        ``every`` is not a positive integer, there is no probe, or the file belongs to other probes. At the first
        recorded step the optimizer's ``step`` raises it if two probes record the same name, or if the file holds an
        earlier run and the optimizer has not taken a step.

    Notes
    -----
    To resume, save :meth:`state_dict` in the checkpoint, beside the optimizer's, and load it into a monitor with the
    same probes and path. Rows of steps after the checkpoint are dropped, and the file becomes that of an uninterrupted
    run. Without it, counting goes on where the file ends: after :meth:`close` at the step that was reached, after a
    crash at the step after the last row.

    A log is not the training. A file of ``path`` that somebody empties, moves or deletes is begun anew; one that cannot
    be written, or that somebody else writes to, ends in one warning, and its rows stay in :attr:`rows` and are written
    when it can be. A probe that fails at its first question is a mistake of the setting: the optimizer's ``step``
    raises its error before anything has moved, and can be called again. One that fails later costs its own numbers, as
    does one whose second half fails after the step: one warning says so and the training goes on. So it does where a
    logger or a listener fails.

    A monitor with a ``path`` lives as long as the optimizer, also where nobody holds it, until another one for the same
    optimizer and path takes its place. One thread at a time steps an optimizer, as torch's optimizers have it, and so
    one thread at a time is in its monitor; monitors of several optimizers may run in threads of their own, with loggers
    in common.

    Steps inside a captured CUDA graph call no hooks and cannot be recorded. In data-parallel training every process may
    have its own monitor: the gradients that it sees are already averaged. Give ``path`` to only one of them.

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
        to: Sequence[Logger] = (),
    ) -> None:
        check_period("every", every)
        _check_kind("probe", probes)
        _check_kind("logger", to)
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
        self._loggers = tuple(to)
        self._listeners: OrderedDict[int, Callable[[Monitor], None]] = OrderedDict()
        self._first: float | None = None
        self._elapsed = 0.0
        self._told: set[str] = set()  # what has been warned about
        self._troubles: list[str] = []  # warnings that wait for the end of the step
        self._checked = False  # whether loggers can take the rows that come
        self._file = None if path is None else RecordFile(path, self._identity())
        self._continues = False  # whether the file has rows of a run that may be another one
        if self._file is not None:
            self.rows, self.step = self._file.rows, self._file.step
            self._continues = bool(self.rows)
        self._examinations = Examinations()  # sources that make an objective at every record have it examined once
        # A file is written whether or not somebody holds the monitor; one that goes on with it takes its place.
        self._attachment = Attachment(optimizer, self, scaler, keep=self._file is not None)
        if self._file is not None:
            writing = _WRITING.setdefault(self._attachment.optimizer, weakref.WeakValueDictionary())
            if (older := writing.get(self._file.path.absolute())) is not None:
                older._attachment.close()
            writing[self._file.path.absolute()] = self

    def frame(self) -> pd.DataFrame:
        """Return the recorded rows as a table: column ``step``, and one column for each quantity.

        NaN where a probe was not asked at a step or had no number.
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
            The same table as :meth:`frame`. Half a line at the end, which a crash can leave, is ignored.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file was not written by a monitor, or is damaged.
        """
        return read_records(path)

    def cost(self) -> pd.DataFrame:
        """Return the time of each probe in this process, one row for each; no file has it.

        Returns
        -------
        pandas.DataFrame
            Columns ``probe``, ``period``, ``calls``, ``seconds`` of wall-clock time in all, seconds ``per_call``, and
            ``share`` of the time since the first observed step. On a GPU a probe that fetches its numbers waits for the
            work before it, and this time counts as well.
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
        """Call ``listener(monitor)`` after every row; its time does not count.

        A listener sees the monitor, with all rows so far, and can be removed: a live picture, a stop at a condition.
        For a way out of each row there is ``to=``.

        Parameters
        ----------
        listener
            Function of the monitor.

        Returns
        -------
        torch.utils.hooks.RemovableHandle
            A handle whose ``remove()`` ends the calls.
        """
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = listener
        return handle

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: the step, and the states of the probes, without the rows.

        It holds tensors and plain values only, so that ``torch.load(..., weights_only=True)`` reads it.
        """
        states: list[dict[str, Any]] = [getattr(entry.probe, "state_dict", dict)() for entry in self._entries]
        return {"step": self.step, "skipped": self.skipped, "identity": self._identity(), "probes": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; rows of later steps are dropped, also in the file.

        Parameters
        ----------
        state
            A state that :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            The state belongs to other probes, or is none.
        """
        if lacking := {"step", "skipped", "identity", "probes"} - set(state):
            raise ValueError(
                f"expected what Monitor.state_dict() returned, got {min(lacking)!r} missing: load what was saved"
            )
        if state["identity"] != self._identity():
            raise ValueError(
                f"expected the state of a monitor with {self._identity()}, got one with {state['identity']}: give this "
                "monitor the same probes and periods"
            )
        self.step, self.skipped = int(state["step"]), int(state["skipped"])
        for entry, saved in zip(self._entries, state["probes"], strict=True):
            if saved:
                entry.probe.load_state_dict(saved)  # type: ignore[attr-defined]  # it saved a state
        if self._file is None:
            self.rows = [row for row in self.rows if row["step"] < self.step]
        else:
            self._file.rewind(self.step)
        for logger in self._loggers:
            if hasattr(logger, "rewind"):
                logger.rewind(self.step)
        self._pending = None
        self._continues = self._checked = False

    def close(self) -> None:
        """Detach from the optimizer and close the loggers; the rows stay. Safe to call twice."""
        if self._file is not None and not self._continues:
            self._safely(f"the file {self._file.path}", self._file.end, self.step)
        self._attachment.close()
        loggers, self._loggers = self._loggers, ()
        for logger in loggers:
            if hasattr(logger, "close"):
                self._safely(f"the logger {_called(logger)}", logger.close)
        self._say_troubles()

    def __enter__(self) -> Self:
        """Return the monitor itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.close()

    # ---------------------------------------------------------------- called by the hooks

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Ask the probes that are due: the step's gradient is in ``.grad``, and no weight has moved."""
        if self._first is None:
            self._first = time.perf_counter()
        self._pending = None
        self._check_run(optimizer)
        due = [entry for entry in self._entries if self.step % entry.period == 0]
        if not due:
            return
        if not self._checked:
            for logger in self._loggers:
                getattr(logger, "check", _nothing)(self.step)
            self._checked = True
        pending = _Pending({"step": self.step})
        with torch.no_grad(), self._examinations.handed_on():
            for entry in due:
                entry.calls += 1
                if entry.answered:
                    self._safely(f"the probe {entry.name}", self._ask, entry, pending, optimizer)
                else:
                    self._ask(entry, pending, optimizer)
                    entry.answered = True
            if pending.finishes and not self._attachment.gradients_stay:
                pending.gradients = pending.finishes[0][0].timed(_copied, optimizer)
        self._pending = pending

    def after(self, optimizer: torch.optim.Optimizer, taken: bool) -> None:
        """Count the step and complete its row; ``taken`` is false if an overflow was found and nothing moved.

        The weights have moved: what fails here is warned about, and the training goes on.
        """
        pending, self._pending = self._pending, None
        if not taken:
            self.skipped += 1
            return
        if pending is not None and pending.finishes:
            with torch.no_grad(), self._examinations.handed_on():
                grads = present_gradients(optimizer) if pending.gradients is None else pending.gradients
                for entry, finish in pending.finishes:
                    self._safely(f"the probe {entry.name}", self._finish, entry, pending, finish, grads)
        self.step += 1
        self._elapsed = time.perf_counter() - (self._first or 0.0)
        if pending is not None:
            if self._file is not None:
                self._safely(f"the file {self._file.path}", self._file.append, pending.row)
            else:
                self.rows.append(pending.row)
            for logger in self._loggers:
                self._safely(f"the logger {_called(logger)}", logger, dict(pending.row))
            for listener in tuple(self._listeners.values()):
                self._safely(f"the listener {_called(listener)}", listener, self)
        self._say_troubles()

    # ---------------------------------------------------------------- private

    def _ask(self, entry: _Entry, pending: _Pending, optimizer: torch.optim.Optimizer) -> None:
        """Add the numbers of a probe before the step, and keep what it does after it."""
        numbers = _numbers(entry, entry.timed(entry.probe, optimizer, self.step), pending.row)
        if isinstance(entry.probe, StepProbe):
            finish = entry.timed(entry.probe.across, optimizer, self.step)
            pending.finishes += [] if finish is None else [(entry, finish)]
        pending.row.update(numbers)

    def _finish(self, entry: _Entry, pending: _Pending, finish: Finish, gradients: Mapping[Tensor, Tensor]) -> None:
        """Add the numbers of a probe that the step has made."""
        pending.row.update(_numbers(entry, entry.timed(finish, gradients), pending.row))

    def _safely(self, what: str, call: Callable[..., object], *arguments: Any) -> None:
        """Make a call whose failure is no reason to end a training; each thing is warned about once."""
        try:
            call(*arguments)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the training goes on
            if what not in self._told:
                self._told.add(what)
                self._troubles.append(
                    f"{what} failed at step {self.step} ({type(error).__name__}: {error}): the training goes on, and "
                    "this is not said again; see what is wrong with it"
                )

    def _say_troubles(self) -> None:
        troubles, self._troubles = self._troubles, []
        for trouble in troubles:
            warnings.warn(trouble, stacklevel=3)

    def _identity(self) -> dict[str, Any]:
        return {"probes": [entry.name for entry in self._entries], "periods": [entry.period for entry in self._entries]}

    def _check_run(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse to write a new run after the rows of an older one."""
        if not self._continues:
            return
        try:
            new = not momentum_buffers(optimizer)
        except RuntimeError:  # without momentum a new optimizer looks like an old one
            new = False
        if new:
            raise ValueError(
                f"the file holds {len(self.rows)} rows of an earlier run, and the optimizer has not taken a step: "
                "expected one that goes on; load the checkpoint with the monitor's state_dict, or give another path"
            )
        self._continues = False


def _copied(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return copies of the gradients, without a loss scale, as the step may overwrite ``.grad``."""
    scale = loss_scale(optimizer)
    return {parameter: grad / scale for parameter, grad in present_gradients(optimizer).items()}


def _check_kind(what: str, given: object) -> None:
    """Refuse one probe or logger where a list is wanted, and classes and other things in the list."""
    if callable(given) or isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{what}s must be a list of {what}s, got {given!r}: pass [{type(given).__name__}(...)]")
    for each in given:
        if isinstance(each, type):
            raise TypeError(f"expected a {what}, got the class {each.__name__}: make one, {each.__name__}(...)")
        if not callable(each) and not isinstance(each, Every):
            raise TypeError(f"expected a {what}, got {each!r}: pass a function")


def _numbers(entry: _Entry, values: Any, row: Row) -> Row:
    """Return what a probe recorded as plain numbers, under names that the row does not have."""
    if not isinstance(values, Mapping):
        raise TypeError(f"the probe {entry.name} returned {values!r:.60}: expected a mapping of names to numbers")
    clash = (row.keys() | {"step", "end"}) & values.keys()
    if clash:
        raise ValueError(
            f"two probes record {min(clash)!r}, or it is a name of the monitor's own: expected every name once; rename "
            "or remove one of them"
        )
    return {str(name): _plain(entry, name, value) for name, value in values.items()}


def _plain(entry: _Entry, name: object, value: Any) -> float:
    if value is None or isinstance(value, int | float):
        return value  # type: ignore[return-value]  # None is no number, and a table says NaN
    try:
        return float(value)
    except Exception:  # noqa: BLE001 -- whatever a foreign thing raises
        raise TypeError(
            f"the probe {entry.name} recorded {name!r} as a {type(value).__name__}: expected a number; return one"
        ) from None


def _called(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _nothing(*_: object) -> None:
    pass


def _described(probe: Probe) -> str:
    """Return the name of a probe, with the settings that are plain values."""
    if not is_dataclass(probe):
        return str(getattr(probe, "__qualname__", type(probe).__qualname__))
    settings = {each.name: getattr(probe, each.name) for each in fields(probe) if each.init}
    told = {
        name: type(value).__name__ if isinstance(value, nn.Module) else repr(value)
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str | tuple | list | nn.Module)
    }
    return f"{type(probe).__qualname__}({', '.join(f'{name}={value}' for name, value in told.items())})"
