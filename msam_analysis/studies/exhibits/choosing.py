"""Rules to choose ρ: what each chooses, and what it loses to the best ρ."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from msam_analysis.studies import pictures
from msam_analysis.studies.cifar100 import Augmented
from msam_analysis.studies.claims import SAME_ACCURACY, Compare, by_seed, compared
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.grids import against, best, summary
from msam_analysis.studies.exhibits.strengths import POSITIVE, part, strength_table
from msam_analysis.studies.exhibits.wanted import grid
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import as_table, outcomes
from msam_analysis.studies.workloads import Batches, Workload

_HELD_OUT = (-4, -2, -1, 0, 1, 2, 3, 4)

ONE_IN = 5
"""One training sample in so many is held out to choose ρ by."""


def held_out(workload: Workload) -> Workload:
    """Return a workload that trains on four fifths of the training samples and tests on the fifth, labels as given."""
    train, test = (_part(_fold, workload.train, tested) for tested in (False, True))
    augmented = None if workload.augmented is None else _part(_others, workload.augmented)
    name = f"{workload.name}, a fifth held out"
    return dataclasses.replace(workload, name=name, train=train, test=test, augmented=augmented)


# The same function for the same data, by which their fingerprint is known.
_part = functools.lru_cache(functools.partial)


# Its images are those of the training batches, in their order.
def _others(augmented: Callable[[], Augmented]) -> Augmented:
    whole = augmented()
    chosen = ~_is_held_out(len(whole.labels))
    return dataclasses.replace(whole, images=whole.images[chosen], labels=whole.labels[chosen])


def _fold(train: Callable[[], Batches], tested: bool) -> Batches:
    batches = train()
    inputs, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    chosen = _is_held_out(len(labels)) == tested
    size = len(batches[0][1])
    return list(zip(inputs[chosen].split(size), labels[chosen].split(size), strict=True))


def _is_held_out(samples: int) -> Tensor:
    return torch.arange(samples) % ONE_IN == ONE_IN - 1


def _runs(workload: Workload, seeds: int) -> dict[str, list[Run]]:
    """Return the runs of F2AB with positive ρ of SAM and MSAM, and those of MSAM with samples held out."""
    sam, msam = (grid(workload, name, POSITIVE, seeds, watched=("rise",)) for name in ("SAM", "MSAM"))
    return {"whole": sam + msam, "held out": grid(held_out(workload), "MSAM", _HELD_OUT, seeds)}


RULES = {
    "held out": "best accuracy on a held-out fifth of the training samples, with its labels as given",
    "held out, all seeds": "best mean accuracy over the seeds on that fifth",
    "rise": "mean rise L(w + ε) − L(w) closest to SAM's at SAM's best ρ",
    "tenfold": "ten times SAM's best ρ",
    "other seeds": "best mean test accuracy of the other seeds (uses the test labels)",
    "train loss": "lowest train loss",
}
"""How ρ is chosen, by name."""


def rule_table(table: pd.DataFrame, validation: pd.DataFrame) -> pd.DataFrame:
    """Return what every rule chooses for every seed, and the points ``lost`` to the ρ that is best in the mean.

    ``table`` is that of the strengths, for positive ρ; ``validation`` has MSAM's accuracy on the samples held out.
    """
    msam, sam = part(table, "MSAM"), best(part(table, "SAM"))
    accuracy = msam.pivot_table(index="seed", columns="rho", values="test_accuracy")
    losses, rises = (msam.pivot(index="seed", columns="rho", values=name) for name in ("train_loss", "rise"))
    held = validation.pivot_table(index="seed", columns="rho", values="test_accuracy")
    goal, best_rho = by_seed(sam, "rise"), accuracy.mean().idxmax()
    tenfold = np.abs(np.log(accuracy.columns.to_numpy(dtype=np.float64) / (10 * sam["rho"].iloc[0])))
    rows: list[dict[str, Any]] = []
    for seed in accuracy.index:
        others = accuracy.drop(index=seed)
        chosen = {
            "held out": held.loc[seed].idxmax(),
            "held out, all seeds": held.mean().idxmax(),
            "rise": _least((rises.loc[seed] - goal[seed]).abs()),
            "tenfold": accuracy.columns[int(tenfold.argmin())],
            **({"other seeds": others.mean().idxmax()} if len(others) else {}),
            "train loss": _least(losses.loc[seed]),
        }
        for rule, rho in chosen.items():
            reached = math.nan if math.isnan(rho) else float(accuracy.loc[seed, rho])
            lost = 100 * (float(accuracy.loc[seed, best_rho]) - reached)
            rows.append({"rule": rule, "seed": seed, "rho": float(rho), "test_accuracy": reached, "lost": lost})
    return as_table(rows)


def _least(values: pd.Series[float]) -> float:
    """Return where values are least; NaN where none is known."""
    known = values.dropna()
    return float(known.index[int(known.to_numpy().argmin())]) if len(known) else math.nan


def _sources(evidence: Evidence) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of the strengths, and that of the runs with samples held out."""
    return strength_table(evidence.groups["whole"]), outcomes(evidence.groups["held out"])


def _draw(_: pd.DataFrame, evidence: Evidence) -> Any:
    table, validation = _sources(evidence)
    whole, held = part(table, "MSAM"), validation[["seed", "rho", "test_accuracy"]]
    curves = pd.concat([whole.assign(optimizer="test set"), held.assign(optimizer="held out, labels as given")])
    rise = {"rise": r"mean rise $L(w+\varepsilon) - L(w)$"}
    return pictures.sweep(
        [
            *against(curves, "rho", r"$\rho$ of MSAM", {"test_accuracy": "accuracy (%)"}),
            *against(table, "rho", r"$\rho$", rise, log_y=True),
        ]
    )


def _shown(found: pd.DataFrame) -> pd.DataFrame:
    shown = summary(found, ["rule"], ["rho", "test_accuracy", "lost"])
    return as_table(shown.assign(rule=shown["rule"].map(RULES)))


def _lost(rule: str) -> Compare:
    where, region = {"rule": rule}, {"above": -math.inf, "below": SAME_ACCURACY}
    return lambda found: [compared("MSAM, lost", by_seed(found, "lost", **where), unit="points", **region)]


CHOOSING = Exhibit(
    "choosing_rho",
    wants=_runs,
    table=lambda evidence: rule_table(*_sources(evidence)),
    draw=_draw,
    shown=_shown,
    constants={"rules": RULES},
    comparisons={
        "held_out": _lost("held out"),
        "held_out_all": _lost("held out, all seeds"),
        "rise": _lost("rise"),
        "tenfold": _lost("tenfold"),
    },
)
"""For readers: part of no figure of the paper."""
