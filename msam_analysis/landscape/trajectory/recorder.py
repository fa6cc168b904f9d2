"""A recorder of the true weights while a training loop runs, which never loses a recorded point."""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from msam_analysis.objective.objective import Objective
from msam_analysis.objective.private import unwrap
from msam_analysis.objective.randomness import Alone
from msam_analysis.objective.vectors import Layout, Selection, select
from msam_analysis.results import Trajectory, load_trajectory, points
from msam_analysis.results.files import sweep

if TYPE_CHECKING:
    from typing_extensions import Self


# What a killed run leaves: our own unfinished files, and those of safetensors.
_LEFTOVER = re.compile(r"\.(step-.*|trajectory\..*)\.safetensors|\.tmp[A-Za-z0-9]{6}")


class TrajectoryRecorder:
    """Writes the true weights of a model to a folder, one file for each recorded step, while it is trained.

    A file appears only when it is complete: a run that is killed keeps what it had recorded, and a recorder that is
    made again for the same folder goes on after the last point. Optimizers of :mod:`msam` hold displaced weights
    between steps; with ``optimizer`` given, the true ones are recorded. Threads may share a recorder: points are
    written one after the other, while nobody trains.

    Parameters
    ----------
    path
        Folder for the files; parents are made. Only one recorder may write to it at a time.
    model
        The module that is trained, or an objective of it, whose parameters are then recorded.
    optimizer
        The optimizer that trains the model. Without it the parameters are recorded as they are.
    every
        Record steps that are multiples of this number. Default 1: every step for which :meth:`record` is called.
    dtype
        ``None`` (default): weights are stored exactly. ``torch.float16``: they are stored as differences to the first
        point, scaled to fill float16's range, with half the disk space of float32. The error is then near 2·10⁻⁴ of the
        distance moved; it is measured and reported as ``rounding``.
    parameters
        Selection of parameters, as for :class:`~msam_analysis.objective.objective.Objective`; default: all with
        ``requires_grad``.
    buffers
        Whether to record the model's buffers too (default). A point is then a whole network, with the running
        statistics of BatchNorm at that step.
    max_points
        Largest number of points: when it is reached, the stride doubles and the points in between are deleted. ``None``
        (default): keep all. Points recorded with ``keep=True`` are neither counted nor deleted.
    label
        Name of the trajectory; default: the name of the optimizer's class, or that of the folder.

    Attributes
    ----------
    stride
        Distance between recorded steps: ``every``, doubled each time the recording was thinned.
    step
        Number of optimizer steps since :meth:`attach`, counted from its ``start``.

    Raises
    ------
    TypeError
        ``model`` is neither a module nor an objective.
    ValueError
        ``every``, ``dtype`` or ``max_points`` is out of range, or the folder holds the trajectory of another model.

    Examples
    --------
    >>> recorder = TrajectoryRecorder("runs/msam", model, optimizer, every=10)  # doctest: +SKIP
    >>> for step, batch in enumerate(loader):
    ...     recorder.record(step, loss=train(batch))  # doctest: +SKIP
    >>> recorder.record(step + 1, keep=True)  # the last weights, whatever the stride  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: nn.Module | Objective,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 1,
        dtype: torch.dtype | None = None,
        parameters: Selection = None,
        buffers: bool = True,
        max_points: int | None = None,
        label: str | None = None,
    ) -> None:
        _check_positive("every", every, 1)
        if max_points is not None:
            _check_positive("max_points", max_points, 2)
        if dtype not in (None, torch.float16):
            raise ValueError(f"dtype must be None (exact) or torch.float16, got {dtype}: choose one of the two")
        if isinstance(model, Objective):
            self._model = model.model
            chosen = model.parameters
        elif isinstance(model, nn.Module):
            self._model = unwrap(model)
            chosen = select(self._model, parameters)
        else:
            raise TypeError(f"model must be a module or an Objective, got {type(model).__name__}: pass the network")
        self.path = Path(path)
        self.optimizer = optimizer
        self.label = label or (type(optimizer).__name__ if optimizer is not None else self.path.name)
        self.stride = every
        self.max_points = max_points
        self._names, self._dtype, self._buffers = tuple(chosen), dtype, buffers
        self._layout = Layout(self._names, tuple(parameter.shape for parameter in chosen.values()))
        self._origin: Tensor | None = None
        self._begun = False
        self._steps: list[int] = []
        self._kept: set[int] = set()
        self.step = 0
        self._handle: Any = None
        self._alone = Alone()
        self._told = False  # whether it was said that a point could not be recorded
        if self.path.is_dir():
            self._take_up()

    # ------------------------------------------------------------------------------------------------------- recording

    def record(self, step: int, *, keep: bool = False, **metrics: float) -> bool:
        """Write the current weights, if the step is due.

        Parameters
        ----------
        step
            Number of steps that the optimizer has taken, or any other count that grows.
        keep
            Record the point whatever the stride, and never delete it: for the last weights, or the end of an epoch.
        **metrics
            Numbers to store with the point, such as ``loss=0.3``.

        Returns
        -------
        bool
            Whether the point was written.

        Raises
        ------
        ValueError
            The step is negative, or not after the last one recorded; or a metric is called ``step`` or ``rounding``.
        """
        with self._alone:
            return self._record(step, keep, metrics)

    def _record(self, step: int, keep: bool, metrics: Mapping[str, float]) -> bool:
        last = self._steps[-1] if self._steps else -1
        if step <= last:
            raise ValueError(
                f"expected a step after {last}, the last one in {self.path}, got {step}: choose a new folder for a new "
                "run, or call recorder.rewind(step) to go on from an earlier checkpoint"
                if self._steps
                else f"expected a step of 0 or more, got {step}: count from 0"
            )
        if "rounding" in metrics:
            raise ValueError("a metric cannot be called 'rounding', which is recorded anyway: choose another name")
        if not keep and not self._due(step):
            return False
        # Optimizers of msam return to the true weights inside this context.
        with getattr(self.optimizer, "unperturbed", nullcontext)(), torch.no_grad():
            parameters = dict(self._model.named_parameters())
            vector = self._layout.flatten(parameters[name].detach() for name in self._names).cpu()
            buffers = self._current_buffers()
        if not self._begun:
            self._begin(vector)
        notes = {
            "metrics": {name: float(value) for name, value in metrics.items()},
            "keep": keep,
            "stride": self.stride,
        }
        points.write_point(self.path, step, vector, self._origin, buffers, notes)
        self._steps.append(step)
        if keep:
            self._kept.add(step)
        return True

    def rewind(self, step: int) -> int:
        """Delete the points recorded after ``step``, to go on from a checkpoint of that step.

        Returns
        -------
        int
            Number of deleted points.
        """
        with self._alone:
            return self._delete([recorded for recorded in self._steps if recorded > step])

    def trajectory(self) -> Trajectory:
        """Return the trajectory recorded so far; see :func:`~msam_analysis.landscape.trajectory.load`."""
        return load_trajectory(self.path)

    # ------------------------------------------------------------------------------------------------------- attaching

    def attach(self, start: int = 0) -> Self:
        """Record after every step of the optimizer, by its own hook; the training loop does not change.

        The current weights are recorded as step ``start``, unless that was recorded already. SAM's ``first_step()`` and
        ``second_step()`` count as one step. Where a point cannot be written (a full disk, a folder that is gone), one
        warning says so and the training goes on.

        Parameters
        ----------
        start
            Number of steps that the optimizer has taken: 0 for a new run, the count in the checkpoint for a resumed
            one.

        Returns
        -------
        TrajectoryRecorder
            The recorder itself, for a ``with`` block. At the end of the block it records the last weights with
            ``keep=True``, if they were not recorded, and detaches. :meth:`close` only detaches.

        Raises
        ------
        ValueError
            There is no optimizer, or the folder has steps after ``start``.
        """
        if self.optimizer is None:
            raise ValueError(
                "attach needs an optimizer to listen to: expected optimizer=... when the recorder was made"
            )
        self.close()
        self.step = start
        if start not in self._steps[-1:]:
            self.record(start)
        # The optimizer holds the hook; the hook must not keep the recorder alive.
        this = weakref.ref(self)

        def after_step(*_: object) -> None:
            recorder = this()
            if recorder is not None:
                recorder.step += 1
                recorder._record_safely()

        self._handle = self.optimizer.register_step_post_hook(after_step)
        return self

    def close(self) -> None:
        """Detach from the optimizer; the recorded points stay. Safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> Self:
        """Return the recorder itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Record the last weights if all went well, and detach."""
        attached = self._handle is not None
        self.close()
        if attached and kind is None and self.step not in self._steps[-1:]:
            self.record(self.step, keep=True)

    # --------------------------------------------------------------------------------------------------------- private

    def _record_safely(self) -> None:
        """Record after a step: the weights have moved, and what fails here is no reason to end a training."""
        try:
            self.record(self.step)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the training goes on
            if not self._told:
                self._told = True
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"{self.path}: the weights of step {self.step} were not recorded ({reason}); the training goes on, "
                    "and this is not said again: see what is wrong with the folder",
                    stacklevel=2,
                )

    def _due(self, step: int) -> bool:
        """Return whether to record a step, after making room for it."""
        if step % self.stride:
            return False
        while self.max_points is not None and len(self._steps) - len(self._kept) >= self.max_points:
            self.stride *= 2
            self._delete([old for old in self._steps if old % self.stride and old not in self._kept])
        return step % self.stride == 0

    def _delete(self, steps: Iterable[int]) -> int:
        gone = set(steps)
        for step in sorted(gone, reverse=True):  # the latest first: an interrupted rewind leaves no gap
            points.point_path(self.path, step).unlink(missing_ok=True)
        self._steps = [step for step in self._steps if step not in gone]
        self._kept -= gone
        return len(gone)

    def _current_buffers(self) -> dict[str, Tensor]:
        if not self._buffers:
            return {}
        saved = self._model.state_dict().keys()  # without buffers that the model rebuilds, such as masks
        named = {name: value for name, value in self._model.named_buffers() if name in saved}
        return {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in named.items()
        }

    def _begin(self, vector: Tensor) -> None:
        if self._dtype is not None:
            self._origin = vector
        stored = "exact" if self._dtype is None else "float16 differences to the first point"
        settings = {"recorded with": type(self.optimizer).__name__, "stored as": stored}
        fields = {**self._identity(vector.dtype), "label": self.label, "settings": settings}
        points.write_header(self.path, self._origin, fields)
        self._begun = True

    def _identity(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "names": list(self._names),
            "shapes": [list(shape) for shape in self._layout.shapes],
            "dtype": str(dtype).removeprefix("torch."),
        }

    def _take_up(self) -> None:
        """Go on after the points in the folder."""
        sweep(self.path)
        try:
            fields, origin = points.read_header(self.path)
        except FileNotFoundError:
            return
        parameters = dict(self._model.named_parameters())
        mine = self._identity(reduce(torch.promote_types, (parameters[name].dtype for name in self._names)))
        different = [name for name, value in mine.items() if fields[name] != value]
        if (origin is None) != (self._dtype is None):
            different.append("storage (dtype=...)")
        if different:
            raise ValueError(
                f"{self.path} holds a trajectory with other {' and '.join(different)}: expected one of this model, "
                "recorded in the same way; choose another folder"
            )
        self._origin, self._begun = origin, True
        self._steps = points.stored_steps(self.path)
        for step in self._steps:
            notes, _ = points.read_notes(self.path, step)
            if notes["keep"]:
                self._kept.add(step)
            if self.max_points is not None:
                self.stride = max(self.stride, notes["stride"])


def _check_positive(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of {least} or more, got {value!r}: choose another")


def from_weights(
    objective: Objective,
    weights: Iterable[Tensor | Mapping[str, Tensor]],
    steps: Sequence[int] | None = None,
    *,
    label: str = "",
) -> Trajectory:
    """Return the trajectory through existing weights, such as the checkpoints of a run.

    Parameters
    ----------
    objective
        The loss, whose parameters make up a point.
    weights
        The weights in order: flat vectors of shape ``(size,)``, or state dicts as returned by
        :func:`~msam_analysis.checkpoints.loading.load_weights`. All are held in memory.
    steps
        Step of each of the weights, increasing. Default: 0, 1, 2, ...
    label
        Name for legends.

    Returns
    -------
    Trajectory
        The trajectory, exact and without buffers.

    Raises
    ------
    ValueError
        There are no weights, a vector or a tensor in a state dict has another shape or is missing, or the steps do not
        increase or do not match the weights in number.
    """
    vectors = [_flat(objective, item, number) for number, item in enumerate(weights)]
    if not vectors:
        raise ValueError("expected at least one vector or state dict, got none: pass the weights in order")
    at = torch.arange(len(vectors)) if steps is None else torch.as_tensor(list(steps), dtype=torch.int64)
    if len(at) != len(vectors) or bool((at.diff() <= 0).any()):
        raise ValueError(
            f"steps must be {len(vectors)} increasing integers, one for each of the weights, got {at.tolist()}: "
            "sort the weights by their step"
        )
    return Trajectory(
        label=label,
        steps=at,
        points=torch.stack(vectors),
        rounding=torch.zeros(len(vectors), dtype=torch.float64),
        names=objective.layout.names,
        shapes=tuple(tuple(shape) for shape in objective.layout.shapes),
        settings=objective.settings,
    )


def _flat(objective: Objective, weights: Tensor | Mapping[str, Tensor], number: int) -> Tensor:
    if isinstance(weights, Tensor):
        objective.layout.check(weights, f"point number {number}")
        return weights.detach().cpu().clone()
    missing = [name for name in objective.layout.names if name not in weights]
    if missing:
        raise ValueError(
            f"state dict number {number} has no {missing[0]!r}: expected every parameter of the objective; "
            "pass state dicts of the same model"
        )
    return objective.vector({name: weights[name] for name in objective.layout.names}).cpu()
