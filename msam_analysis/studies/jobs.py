"""A run, its folder, and the making of it: train the network, and measure what is wanted of it and not there yet."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from msam_analysis.objective.randomness import RandomStream
from msam_analysis.results import ConvergenceWarning
from msam_analysis.results.fingerprint import fingerprint
from msam_analysis.studies import store, training, watching
from msam_analysis.studies.computing import PLAIN, Computing, repeatable
from msam_analysis.studies.measuring import MEASURES, Protocol, Subject, scores
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import Tick, train
from msam_analysis.studies.watching import WATCHES


@dataclass(frozen=True)
class Job:
    """A run with its folder and the settings of its probes and measures: what a worker process gets.

    ``run``: Which network, and what is to be known of it.
    ``directory``: The folder of the network, named after what decides it.
    ``watched``, ``measured``: Probe to the name of its file in the folder, measure to that of its folder: named after
        what decides them.
    ``protocol``, ``every``, ``computing``: How finely is measured, the steps between records of slow probes, and where
        and in what precision.
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
        return self._training_cost + sum(MEASURES[name].price(self.protocol) for name in self.measured)

    @property
    def _cost_of_a_step(self) -> float:
        """Rough mean cost of a training step and of what is recorded at it, in steps without records."""
        watches = [WATCHES[name] for name in self.watched]
        return 1.0 + sum(watch.cost / (watch.every or self.every) for watch in watches)

    @property
    def _training_cost(self) -> float:
        return self.run.steps * self._cost_of_a_step

    @property
    def state(self) -> Path:
        """The file of the state of its training, while that is under way."""
        return store.state_file(self.directory, fingerprint(self.watched))

    @property
    def trained(self) -> bool:
        """Whether the network is there, with all that was to be recorded on the way."""
        return store.is_trained(self.directory) and all((self.directory / f).is_file() for f in self.watched.values())

    @property
    def unmeasured(self) -> list[str]:
        """The measures that a trained network lacks; none where its loss is not finite: nothing can be measured."""
        if not math.isfinite(store.read_scores(self.directory)["train_loss"]):
            return []
        return [name for name in MEASURES if name in self.measured and not store.is_measured(self._folder(name))]

    @property
    def finished(self) -> bool:
        """Whether all that is wanted is there."""
        return self.trained and not self.unmeasured

    def _folder(self, measure: str) -> Path:
        return self.directory / self.measured[measure]

    def make(self, tick: Tick) -> None:
        """Train the network unless it is there, and measure what is wanted and missing; each is kept when it is done.

        ``tick``: Called with the cost of every part that is done, :attr:`cost` in all.
        Raises RuntimeError: This process has another release of torch than the one that planned the job.
        """
        if torch.__version__ != self.torch:
            raise RuntimeError(
                f"expected torch {self.torch} in every process, got {torch.__version__} here: install the same release"
            )
        with repeatable():
            if self.trained:
                tick(self._training_cost)
            else:
                self._train(tick)
            store.forget_state(self.state)
            missing = self.unmeasured
            tick(sum(MEASURES[name].price(self.protocol) for name in self.measured if name not in missing))
            if missing:
                self._measure(missing, tick)

    def _train(self, tick: Tick) -> None:
        run = self.run
        trained = train(
            run.workload,
            run.optimizer,
            run.seed,
            every=self.every,
            watched=sorted(run.watched),
            replacement=run.replacement,
            tick=lambda steps: tick(steps * self._cost_of_a_step),
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
        store.load_network(self.directory, model, optimizer, device)
        subject = Subject(workload, model.eval(), optimizer, self.protocol.samples)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is in the result, and so in the tables
            for name in missing:
                store.write_measured(self._folder(name), MEASURES[name].of(subject, self.protocol))
                tick(MEASURES[name].price(self.protocol))

    def read(self) -> FinishedRun:
        """Return the finished run, with what is wanted of it and no more."""
        return store.read_run(
            self.directory,
            self.run,
            [self.watched[name] for name in sorted(self.watched)],
            [self.measured[name] for name in MEASURES if name in self.measured],
        )


def job(run: Run, folder: Path, protocol: Protocol, every: int, computing: Computing = PLAIN) -> Job:
    """Return the job of a run.

    What decides the network gives its folder a name: the run's values, device and precision, torch's release and the
    version of :mod:`~msam_analysis.studies.training`. What decides a record or a measure gives that a name inside.

    ``run``: What is wanted.
    ``folder``: The folder of all runs.
    ``protocol``, ``every``, ``computing``: See :class:`Job`.
    Raises ValueError: There is no probe or measure of a name that the run wants.
    """
    unknown = sorted(run.measured - MEASURES.keys()) + sorted(run.watched - WATCHES.keys())
    if unknown:
        known = sorted([*MEASURES, *WATCHES])
        raise ValueError(f"unknown probe or measure {unknown[0]!r}: expected some of {known}")
    kind = f"control-{run.optimizer}" if run.replacement else run.optimizer
    decides = (run.replacement, computing.identity, torch.__version__, training.VERSION)
    network = run.workload.fingerprint(run.optimizer, *decides)
    watched = {
        name: f"{name}-{watching.identity(name, run.workload, every, protocol.samples)}.csv"
        for name in sorted(run.watched)
    }
    measured = {name: f"{name}-{MEASURES[name].identity(protocol)}" for name in sorted(run.measured)}
    return Job(run, folder / f"{kind}-seed{run.seed}-{network}", watched, measured, protocol, every, computing)
