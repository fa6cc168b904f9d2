"""What an exhibit is: the runs it needs, and what it finds in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from msam_analysis.report.page import Claim
from msam_analysis.studies.claims import PaperClaim
from msam_analysis.studies.measuring import SHARPNESS
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, Tables, tabulate
from msam_analysis.studies.watching import SLOW
from msam_analysis.studies.workloads import Workload


@dataclass(frozen=True, eq=False)
class Evidence:
    """The finished runs of a study.

    Attributes
    ----------
    problem
        The workload.
    seeds
        How many there are of every network.
    finished
        Runs by :attr:`~msam_analysis.studies.runs.Run.identity`.
    """

    problem: Workload
    seeds: int
    finished: Mapping[str, FinishedRun]

    def of(self, wanted: Iterable[Run]) -> list[FinishedRun]:
        """Return the finished runs, in the order they are wanted in."""
        return [self.finished[run.identity] for run in wanted]

    @functools.cached_property
    def networks(self) -> list[FinishedRun]:
        """The networks of the main table, by optimizer and seed."""
        return self.of(networks(self.problem, self.seeds))

    @functools.cached_property
    def tables(self) -> Tables:
        """The tables of the main runs and of their controls."""
        return tabulate(self.networks, self.of(controls(self.problem, self.seeds)))


@dataclass(frozen=True, eq=False)
class Finding:
    """What an exhibit found.

    Attributes
    ----------
    draw
        Makes the figure; returns its axes. None where there is nothing to show.
    table
        Tidy: one row per run and quantity, or as the exhibit's page says. None where the main tables have it.
    claims
        The claims about it, with their verdicts.
    shown
        A short table for the report.
    note
        What a reader must know to read it, for the report.
    """

    draw: Callable[[], Any] | None
    table: pd.DataFrame | None = None
    claims: Sequence[Claim] = ()
    shown: pd.DataFrame | None = None
    note: str = ""


@dataclass(frozen=True)
class Exhibit:
    """A figure of the report, the runs behind it, and the claims about it.

    Attributes
    ----------
    ids
        The paper's exhibits that it answers to; empty for an addition of ours.
    name
        Of its files.
    title, caption
        For the report.
    runs
        Workload and number of seeds to the networks it needs.
    study
        The evidence to the finding.
    main
        Whether it is part of the study that is made when none is chosen.
    claims
        What is tested, in the order of the finding's claims.
    """

    ids: tuple[str, ...]
    name: str
    title: str
    caption: str
    runs: Callable[[Workload, int], list[Run]]
    study: Callable[[Evidence], Finding]
    main: bool = False
    claims: tuple[PaperClaim, ...] = field(default=(), compare=False)


def untold(claims: Iterable[PaperClaim], why: str = "", measured: str = "not measured") -> Finding:
    """Return what is found where there is nothing that an exhibit could be about: nothing, and why."""
    judged = [replace(claim, compare=lambda _: []).judge(None) for claim in claims]
    return Finding(None, claims=[replace(claim, measured=measured) for claim in judged], note=why)


def networks(problem: Workload, seeds: int) -> list[Run]:
    """Return the networks of the main table: every optimizer, fully watched and measured."""
    return [
        Run(problem, name, seed, watched=frozenset(SLOW), measured=SHARPNESS)
        for name in problem.perturbations
        for seed in range(seeds)
    ]


def controls(problem: Workload, seeds: int) -> list[Run]:
    """Return the controls, on samples drawn with replacement."""
    return [Run(problem, name, seed, replacement=True) for name in problem.controls for seed in range(seeds)]
