"""A run, its folder, and the making of it: train the network, and measure what is wanted of it and not there yet."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from msam_analysis.objective.randomness import RandomStream
from msam_analysis.results import ConvergenceWarning
from msam_analysis.results.fingerprint import fingerprint
from msam_analysis.studies import store, training
from msam_analysis.studies.computing import PLAIN, Computing, repeatable
from msam_analysis.studies.measuring import MEASURES, Protocol, Subject, scores
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import Tick, train
from msam_analysis.studies.watching import WATCHES


@dataclass(frozen=True)
class Job:
    """A run with its folder and the settings of its probes and measures: what a worker process gets.

    ``directory``: The folder of the network, named after what decides it.
    ``watched``, ``measured``: Probe to its file in the folder, measure to its folder there: named after what decides
        them.
    ``protocol``, ``every``, ``computing``: As of the :class:`.Study`.
    ``torch``: The release of torch that the names stand for.
    """

    run: Run
    directory: Path
    watched: Mapping[str, str]
    measured: Mapping[str, str]
    protocol: Protocol
    every: int
    computing: Computing
    torch: str = torch.__version__

    @property
    def cost(self) -> float:
        """Rough cost in training steps, for the progress bar and the order of the jobs alone."""
        return self.run.steps * self._cost_of_a_step + self._price(self.measured)

    @property
    def _cost_of_a_step(self) -> float:
        """Rough mean cost of a training step and of what is recorded at it, in steps without records."""
        watches = [WATCHES[name] for name in self.watched]
        return 1.0 + sum(watch.cost / (watch.every or self.every) for watch in watches)

    def _price(self, measures: Iterable[str]) -> float:
        return sum(MEASURES[name].price(self.protocol) for name in measures)

    @property
    def state(self) -> Path:
        """The file of the state of its training, which is of no use once that is over."""
        return self.directory.parent / store.UNFINISHED / f"{self.directory.name}-{fingerprint(self.watched)}.pt"

    @property
    def trained(self) -> bool:
        """Whether the network is there, with all that was to be recorded on the way."""
        return store.is_trained(self.directory) and all((self.directory / f).is_file() for f in self.watched.values())

    @property
    def unmeasured(self) -> list[str]:
        """The measures that a trained network lacks; none where its loss is not finite: nothing can be measured."""
        if not math.isfinite(store.read_scores(self.directory)["train_loss"]):
            return []
        folders = {name: self.directory / self.measured[name] for name in MEASURES if name in self.measured}
        return [name for name, folder in folders.items() if not store.is_measured(folder)]

    @property
    def finished(self) -> bool:
        """Whether all that is wanted is there."""
        return self.trained and not self.unmeasured

    def make(self, tick: Tick) -> None:
        """Train the network unless it is there, and measure what is missing; each is kept when it is done.

        ``tick``: Called with the cost of every part that is done, :attr:`cost` in all.
        """
        if torch.__version__ != self.torch:
            raise RuntimeError(
                f"expected torch {self.torch} in every process, got {torch.__version__} here: install the same release"
            )
        with repeatable():
            if self.trained:
                tick(self.run.steps * self._cost_of_a_step)
            else:
                self._train(tick)
            store.forget_state(self.state)
            missing = self.unmeasured
            tick(self._price(self.measured.keys() - missing))
            if missing:
                self._measure(missing, tick)

    def _train(self, tick: Tick) -> None:
        run, cost = self.run, self._cost_of_a_step
        trained = train(
            run.workload,
            run.optimizer,
            run.seed,
            every=self.every,
            watched=sorted(run.watched),
            replacement=run.replacement,
            tick=lambda steps: tick(steps * cost),
            samples=self.protocol.samples,
            computing=self.computing,
            state=None if self.computing.save_every is None else self.state,
        )
        reached = scores(run.workload, trained.model) | {"gradients_per_step": trained.gradients_per_step}
        if self.computing.amp == "float16":
            reached["skipped_steps"] = trained.skipped
        watched = {self.watched[name]: recorded for name, recorded in trained.watched.items()}
        store.write_trained(self.directory, trained, reached, watched)

    def _measure(self, missing: list[str], tick: Tick) -> None:
        """Measure the network in the folder: whoever trained it, the numbers are those of this network."""
        workload, device = self.run.workload, self.computing.torch_device
        with RandomStream(self.run.seed):
            model = workload.network().to(device)
        optimizer = workload.optimizer(self.run.optimizer, model)
        saved = store.read_checkpoint(self.directory, device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        subject = Subject(workload, model.eval(), optimizer, self.protocol.samples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the result, and so in the tables
            for name in missing:
                found = MEASURES[name].of(subject, self.protocol)
                store.write_measured(self.directory / self.measured[name], found)
                tick(self._price([name]))

    def read(self) -> FinishedRun:
        """Return the finished run, with what is wanted of it and no more."""
        watched = [self.watched[name] for name in sorted(self.watched)]
        measured = [self.measured[name] for name in MEASURES if name in self.measured]
        return store.read_run(self.directory, self.run, watched, measured)


def job(run: Run, folder: Path, protocol: Protocol, every: int, computing: Computing = PLAIN) -> Job:
    """Return the job of a run in a folder of runs; ValueError: it wants a probe or measure that there is not.

    What decides the network gives its folder a name: the run's values, device and precision, torch's release and the
    version of :mod:`~msam_analysis.studies.training`. What decides a record or a measure gives that a name inside.
    """
    unknown = sorted(run.measured - MEASURES.keys()) + sorted(run.watched - WATCHES.keys())
    if unknown:
        known = sorted([*MEASURES, *WATCHES])
        raise ValueError(f"unknown probe or measure {unknown[0]!r}: expected some of {known}")
    kind = f"control-{run.optimizer}" if run.replacement else run.optimizer
    decides = (run.replacement, (computing.device, computing.amp), torch.__version__, training.VERSION)
    network = run.workload.fingerprint(run.optimizer, *decides)
    watched = {
        name: f"{name}-{WATCHES[name].identity(run.workload, every, protocol.samples)}.csv"
        for name in sorted(run.watched)
    }
    measured = {name: f"{name}-{MEASURES[name].identity(protocol)}" for name in sorted(run.measured)}
    return Job(run, folder / f"{kind}-seed{run.seed}-{network}", watched, measured, protocol, every, computing)
