"""Runs of a small workload, trained in this process: what an exhibit's functions are given."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from unittest import mock

import numpy as np
import pandas as pd
from scipy import stats

from msam_analysis.objective.objective import Objective
from msam_analysis.report.page import Claim
from msam_analysis.studies.claims import PaperClaim
from msam_analysis.studies.exhibits.base import Exhibit
from msam_analysis.studies.measuring import scores
from msam_analysis.studies.runs import Run, gather
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import train
from msam_analysis.studies.workloads import Workload


def unexamined() -> AbstractContextManager[object]:
    """Objectives that are not examined: of hundreds of networks and batches, all of one model and one criterion.

    The numbers are the same, as a test of this says; a study examines them.
    """
    defaults = Objective.__init__.__kwdefaults__
    assert defaults is not None
    return mock.patch.dict(defaults, examine=False)


def finish(run: Run, every: int = 4) -> FinishedRun:
    """Train one network and score it."""
    with unexamined():
        trained = train(
            run.workload,
            run.optimizer,
            run.seed,
            every=every,
            watched=sorted(run.watched),
            replacement=run.replacement,
        )
        reached = scores(run.workload, trained.model) | {"gradients_per_step": trained.gradients_per_step}
    return FinishedRun(run.optimizer, run.seed, reached, trained.steps, {}, run.settings)


def finished_of(workload: Workload, seeds: int, exhibits: Iterable[Exhibit]) -> dict[str, FinishedRun]:
    """Train what exhibits need, each network once."""
    wanted = gather(run for exhibit in exhibits for run in exhibit.runs(workload, seeds))
    return {identity: finish(run) for identity, run in wanted.items()}


def judged(claims: Iterable[PaperClaim], words: str, table: pd.DataFrame) -> Claim:
    """Return the row of the one claim whose sentence contains some words."""
    (claim,) = (claim for claim in claims if words in claim.sentence)
    return claim.judge(table)


def numbers(text: str) -> list[float]:
    return [float(found.replace("−", "-")) for found in re.findall(r"[-−]?\d+\.?\d*(?:e[-+]?\d+)?", text)]


def t_interval(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    """Return mean and half width of a 68 % interval, by scipy."""
    low, high = stats.t.interval(0.68, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return float(values.mean()), float(high - low) / 2
