"""One training run, watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from msam import PerturbedOptimizer, frozen_batchnorm_statistics, update_batchnorm_statistics
from msam_analysis.monitor import Monitor
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.results import atomic_path
from msam_analysis.studies.augmentation import stream
from msam_analysis.studies.computing import PLAIN, Computing
from msam_analysis.studies.watching import SLOW, watch
from msam_analysis.studies.workloads import Batches, Recipe, Workload

VERSION = 1
"""Raised by hand when the numbers of a training change, or its scores: every network is then trained anew."""

Tick = Callable[[float], None]

_COUNTED = ("rows", "epochs", "batches", "evaluated")


@dataclass(frozen=True)
class Trained:
    """A trained network at its true weights, and what was recorded on the way.

    ``model``, ``optimizer``: BatchNorm statistics are re-estimated at the true weights; the optimizer is in eval mode.
    ``base``: One row per step: ``step``, ``epoch``, ``lr``, ``train_batch_loss``, ``cosine``, ``cosine_after``.
    ``gradients_per_step``: Gradients that were evaluated, per batch.
    ``skipped``: Batches whose step was left out, because a gradient overflowed in float16; they have no row.
    ``watched``: Name of a slower probe to what it recorded, with the column ``step``.
    """

    model: nn.Module
    optimizer: PerturbedOptimizer
    base: pd.DataFrame
    gradients_per_step: float
    skipped: int = 0
    watched: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    @property
    def steps(self) -> pd.DataFrame:
        """One row per step: ``base``, and at the steps of their records the quantities of the slower probes."""
        return joined(self.base, self.watched.values())


def joined(base: pd.DataFrame, records: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Return what was recorded at every step beside what slower probes recorded; NaN where they were not asked."""
    for recorded in records:
        base = base.merge(recorded, on="step", how="left")
    return base


def train(
    workload: Workload,
    optimizer_name: str,
    seed: int,
    *,
    every: int | None = 32,
    watched: Sequence[str] = SLOW,
    replacement: bool = False,
    tick: Tick | None = None,
    samples: int | None = None,
    computing: Computing = PLAIN,
    state: Path | None = None,
) -> Trained:
    """Train one network; the same arguments give the same bits on the same machine.

    Parameters
    ----------
    workload, optimizer_name
        What to train with which of the workload's optimizers.
    seed
        Of the initial weights, of the order of the batches and of what augments them; all are shared by all optimizers.
    every
        Steps between two records of the slower probes, ``None`` for no record. Default 32, two epochs of the digits
        workload.
    watched
        The slower probes, by their names in :data:`~msam_analysis.studies.watching.WATCHES`.
    replacement
        Draw every sample independently of the others, instead of each once an epoch in random order.
    tick
        Called with 1.0 after every step.
    samples
        Training samples that probes of the whole training loss look at, see :func:`some`; default all.
    computing
        Where, in what precision, and how often the state is saved.
    state
        The file of the run's state, written every ``computing.save_every`` epochs and after the last. If it is there,
        training goes on from it, and ends with the bits of a run that was never interrupted. Default: none.

    Returns
    -------
    Trained
        The network and the records.

    Raises
    ------
    ValueError
        A name is unknown, ``state`` cannot be read, or float16 meets a perturbation that would see its loss scale.
    """
    training = Training(workload, optimizer_name, seed, computing, samples)
    count, drawn = len(training.labels), torch.Generator().manual_seed(seed)
    tick = tick or (lambda _: None)
    with ExitStack() as stack:
        training.monitors = watch(training, watched, every)
        for monitor in training.monitors.values():
            stack.enter_context(monitor)
        if state is not None and state.is_file():
            training.resume(state)
            tick(float(training.batches))
        for epoch in range(workload.recipe.epochs):
            if replacement:
                order = torch.randint(count, (count,), generator=drawn)
            else:
                order = torch.randperm(count, generator=drawn)
            if epoch < training.epochs:
                continue
            for number, index in enumerate(order.split(workload.recipe.batch_size)):
                training.step(epoch, number, index)
                tick(1.0)
            training.epochs = epoch + 1
            due = computing.save_every is not None and training.epochs % computing.save_every == 0
            if state is not None and (due or training.epochs == workload.recipe.epochs):
                training.save(state)
    training.optimizer.eval()
    update_batchnorm_statistics(training.model, workload.train(), training.optimizer, device=training.device)
    base = pd.DataFrame(training.rows, columns=["step", "epoch", "lr", "train_batch_loss"])
    records = {name: monitor.frame() for name, monitor in training.monitors.items()}
    return Trained(
        training.model.eval(),
        training.optimizer,
        joined(base, [records.pop("cosine")]),
        training.evaluated / training.batches,
        training.batches - len(training.rows),
        records,
    )


def some(batches: Batches, samples: int | None) -> Batches:
    """Return so many samples, the same for every network, in their order; all for ``None`` or if there are no more."""
    sizes = [len(labels) for _, labels in batches]
    if samples is None or samples >= sum(sizes):
        return batches
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))[:samples]] = True
    parts = [(x[part], y[part]) for (x, y), part in zip(batches, chosen.split(sizes), strict=True)]
    inputs, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return list(zip(inputs.split(max(sizes)), labels.split(max(sizes)), strict=True))


class Training:
    """A training under way: all that changes from step to step, the step, and what a probe may look at.

    ``everything``: The training loss over all samples, or a part of them; BatchNorm with each batch's own statistics,
        as in the training step: the running ones of a perturbed optimizer belong to its perturbed weights.
    """

    def __init__(
        self, workload: Workload, optimizer_name: str, seed: int, computing: Computing, samples: int | None
    ) -> None:
        self.workload: Workload = workload
        self.recipe: Recipe = workload.recipe
        self.seed: int = seed
        self.computing, self.device = computing, computing.torch_device
        self.augmentation = None
        if workload.augmented is None:
            inputs, labels = (torch.cat(column) for column in zip(*workload.train(), strict=True))
        else:
            data = workload.augmented()
            inputs, labels, self.augmentation = data.images, data.labels, data.augmentation
        self.inputs, self.labels = inputs.to(self.device), labels.to(self.device)
        with RandomStream(seed):
            self.model = workload.network()
        self.model.to(self.device)
        self.optimizer = workload.optimizer(optimizer_name, self.model)
        self.criterion = workload.criterion()
        chosen = some(workload.train(), samples)
        self.everything: Objective = Objective(self.model, self.criterion, chosen, batchnorm="batch")
        self.scaler = computing.scaler()
        perturbation = workload.perturbations[optimizer_name]
        self.climbs = perturbation is not None and perturbation.direction == "gradient"
        if self.scaler is not None and perturbation is not None and self.climbs and perturbation.normalize != "l2":
            raise ValueError(
                f"{optimizer_name} perturbs along the gradient without normalising it, and would see the loss scale of "
                "float16: use bfloat16"
            )
        self.monitors: dict[str, Monitor] = {}
        self.rows: list[dict[str, float]] = []
        self.epochs = self.batches = self.evaluated = 0
        self.current: tuple[Tensor, Tensor] = (self.inputs[:0], self.labels[:0])

    def batch(self) -> Objective:
        """Return the loss of the batch that is being trained on."""
        return self.loss_of(self.current)

    def loss_of(self, batch: tuple[Tensor, Tensor]) -> Objective:
        """Return the loss of a batch, with BatchNorm as in the training step."""
        return Objective(self.model, self.criterion, [batch], batchnorm="batch")

    def step(self, epoch: int, number: int, index: Tensor) -> None:
        """Train on one batch, given by the indices of its samples."""
        index = index.to(self.device)
        inputs = self.inputs[index]
        if self.augmentation is not None:
            inputs = self.augmentation(inputs, stream(self.seed, epoch, number))
        self.current = (inputs, self.labels[index])
        lr = self.recipe.lr * self.recipe.lr_factor(self.batches, len(self.labels))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.batches += 1
        loss = self.optimizer.step(self._closure) if self.scaler is None else self._scaled_step(self.scaler)
        # A monitor sees no step where a gradient overflowed.
        if self.monitors["cosine"].step > len(self.rows):
            row = {"step": len(self.rows), "epoch": epoch, "lr": lr, "train_batch_loss": float(loss.detach())}
            self.rows.append(row)

    def _closure(self) -> Tensor:
        loss = self._loss()
        loss.backward()
        self._clip()
        return loss

    def _scaled_step(self, scaler: torch.amp.GradScaler) -> Tensor:
        loss = self._loss()
        scaler.scale(loss).backward()
        if self.climbs:
            self.optimizer.first_step()
            with frozen_batchnorm_statistics(self.model):
                scaler.scale(self._loss()).backward()
        if self.recipe.clip < math.inf:
            scaler.unscale_(self.optimizer)
            self._clip()
        scaler.step(self.optimizer)
        scaler.update()
        return loss

    def _loss(self) -> Tensor:
        self.evaluated += 1
        self.optimizer.zero_grad()
        inputs, labels = self.current
        with self.computing.autocast():
            loss: Tensor = self.criterion(self.model(inputs), labels)
        return loss

    def _clip(self) -> None:
        if self.recipe.clip < math.inf:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)

    def save(self, path: Path) -> None:
        """Write all that the rest of the run depends on, whole or not at all; seed, epoch, batch decide the draws."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "monitors": {name: monitor.state_dict() for name, monitor in self.monitors.items()},
            "records": {name: [_plain(row) for row in monitor.rows] for name, monitor in self.monitors.items()},
            **{name: getattr(self, name) for name in _COUNTED},
        }
        with atomic_path(path) as partial:
            write_state(state, partial)

    def resume(self, path: Path) -> None:
        """Go on from the state in a file, without running anything in it."""
        try:
            self._take(torch.load(path, map_location=self.device, weights_only=True))
        except Exception as error:  # noqa: BLE001 - of half a dozen kinds, by where the damage is
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"the state of a run in {path} cannot be read ({reason}): remove it, and the run begins anew"
            ) from None

    def _take(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for name, monitor in self.monitors.items():
            monitor.rows = state["records"][name]
            monitor.load_state_dict(state["monitors"][name])
        for name in _COUNTED:
            setattr(self, name, state[name])


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write weights and states: the same bytes for the same content, as the archive does not name its file."""
    with path.open("wb") as file:
        torch.save(state, file)


def _plain(row: dict[str, float]) -> dict[str, float]:
    """Return a record without NumPy's numbers, which are not read back as plain values."""
    return {name: value if isinstance(value, int) else float(value) for name, value in row.items()}
