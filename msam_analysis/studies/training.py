"""One training run, watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from msam import PerturbedOptimizer, update_batchnorm_statistics
from msam_analysis.objective import Objective
from msam_analysis.randomness import RandomStream
from msam_analysis.studies.watching import SLOW, Scene, watch
from msam_analysis.studies.workloads import Recipe, Workload

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Trained:
    """A trained network at its true weights, and what was recorded on the way.

    Attributes
    ----------
    model, optimizer
        BatchNorm statistics are re-estimated at the true weights; the optimizer is in eval mode.
    steps
        One row per step: ``step``, ``epoch``, ``lr``, ``train_batch_loss``, ``cosine``; every ``every``-th row also has
        the quantities of the slower probes.
    gradients_per_step
        Gradients that were evaluated, per optimizer step.
    """

    model: nn.Module
    optimizer: PerturbedOptimizer
    steps: pd.DataFrame
    gradients_per_step: float


def train(
    workload: Workload,
    optimizer_name: str,
    seed: int,
    *,
    every: int | None = 32,
    watched: Sequence[str] = SLOW,
    replacement: bool = False,
    tick: Tick | None = None,
) -> Trained:
    """Train one network; the same arguments give the same bits on the same machine.

    Parameters
    ----------
    workload, optimizer_name
        What to train with which of the workload's optimizers.
    seed
        Of the initial weights and of the order of the batches; both are shared by all optimizers.
    every
        Steps between two records of the slower probes, ``None`` for no record. Default 32, two epochs of the digits
        workload.
    watched
        The slower probes, by their names in :data:`~msam_analysis.studies.watching.WATCHES`.
    replacement
        Draw every sample independently of the others, instead of each once an epoch in random order.
    tick
        Called with 1.0 after every step.

    Returns
    -------
    Trained
        The network and the records.
    """
    recipe, batches = workload.recipe, workload.train()
    inputs = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    with RandomStream(seed):
        model = workload.network()
    optimizer = workload.optimizer(optimizer_name, model)
    criterion = workload.criterion()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.lr_factor(step, len(labels)))
    current: tuple[Tensor, Tensor] = (inputs, labels)
    evaluated = 0

    def closure() -> Tensor:
        nonlocal evaluated
        evaluated += 1
        optimizer.zero_grad()
        loss: Tensor = criterion(model(current[0]), current[1])
        loss.backward()
        if recipe.clip < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        return loss

    # Batch statistics: the running ones of a perturbed optimizer belong to its perturbed weights while it trains.
    scene = Scene(
        workload=workload,
        seed=seed,
        everything=Objective(model, criterion, batches, batchnorm="batch"),
        batch=lambda: Objective(model, criterion, [current], batchnorm="batch"),
    )
    rows: list[dict[str, float]] = []
    with ExitStack() as stack:
        monitors = [stack.enter_context(monitor) for monitor in watch(optimizer, scene, watched, every)]
        for epoch, index in _order(len(labels), recipe, seed, replacement):
            current = (inputs[index], labels[index])
            lr = scheduler.get_last_lr()[0]
            loss = optimizer.step(closure)
            scheduler.step()
            rows.append({"step": len(rows), "epoch": epoch, "lr": float(lr), "train_batch_loss": float(loss.detach())})
            if tick is not None:
                tick(1.0)
    optimizer.eval()
    update_batchnorm_statistics(model, batches, optimizer)
    steps = pd.DataFrame(rows)
    for monitor in monitors:
        steps = steps.merge(monitor.frame(), on="step", how="left")
    return Trained(model.eval(), optimizer, steps, evaluated / len(rows))


def _order(samples: int, recipe: Recipe, seed: int, replacement: bool) -> Iterator[tuple[int, Tensor]]:
    """Yield epoch and sample indices of every batch."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(recipe.epochs):
        if replacement:
            order = torch.randint(samples, (samples,), generator=generator)
        else:
            order = torch.randperm(samples, generator=generator)
        for index in order.split(recipe.batch_size):
            yield epoch, index
