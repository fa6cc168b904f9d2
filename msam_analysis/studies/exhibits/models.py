"""Other models and tasks, a vision transformer's warm-up, and what the networks found are like."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, cast

import pandas as pd

from msam_analysis.results import Eigenpairs, RobustAccuracy
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import FAR, Compare, Comparison, by_seed, compared, difference, ratio
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.grids import ACCURACIES
from msam_analysis.studies.exhibits.wanted import after_warmup, each, unperturbed
from msam_analysis.studies.measuring import DISTURBANCES, SOME
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import COSINE, FinishedRun, as_table, rows, statistics
from msam_analysis.studies.workloads import Workload

OUTSIDE = ("text", "table")
"""Relatives that have nothing to do with images."""

_PERTURBED = ("SAM", "MSAM")
_THROUGHOUT, _LATE = "throughout", "after warm-up only"


def _scores(run: FinishedRun) -> dict[str, float]:
    percent = {name: 100 * run.scores[name] for name in ("train_accuracy", "test_accuracy")}
    return {**run.whose, **percent, "test_loss": run.scores["test_loss"]}


def _base(table: pd.DataFrame) -> str:
    """Return the name of the optimizer that does not perturb."""
    return next(str(name) for name in table["optimizer"] if name not in _PERTURBED)


# TA2, the warm-up phase
def _warmup_runs(workload: Workload, seeds: int) -> dict[str, list[Run]]:
    """Return the runs of the transformer beside the workload; none where there is none."""
    one = workload.relatives.get("transformer")
    if one is None:
        return {}
    late = [run for name in _PERTURBED for run in each(after_warmup(one, name), (name,), seeds)]
    throughout = each(one, (unperturbed(one), *_PERTURBED), seeds)
    return {_THROUGHOUT: throughout, **({_LATE: late} if one.recipe.warmup else {})}


def _above(table: pd.DataFrame) -> list[Comparison]:
    whole = rows(table, perturbed=_THROUGHOUT)
    pairs = [(name, _base(whole), "{pair}, gain") for name in _PERTURBED]
    return [difference(whole, "test_accuracy", *pair, unit="points", above=FAR) for pair in pairs]


def _later(table: pd.DataFrame, name: str) -> list[Comparison]:
    late, always = (by_seed(table, "test_accuracy", optimizer=name, perturbed=when) for when in (_LATE, _THROUGHOUT))
    label = f"{name} after warm-up only − throughout"
    return [compared(label, late - always, unit="points")] if len(late) else []


WARMUP = Exhibit(
    "warmup",
    wants=_warmup_runs,
    table=lambda evidence: as_table([{"perturbed": when, **_scores(run)} for when, run in evidence.named]),
    draw=lambda table, _: pictures.by_group(table, ACCURACIES, "perturbed"),
    constants={"far": f"{FAR:g}"},
    comparisons={
        "above": _above,
        "msam_later": lambda table: _later(table, "MSAM"),
        "sam_later": lambda table: _later(table, "SAM"),
    },
)


# Outside of vision
def _outside_runs(workload: Workload, seeds: int) -> dict[str, list[Run]]:
    return {
        name: each(one, (unperturbed(one), *_PERTURBED), seeds, measured=("lambda1",))
        for name, one in workload.relatives.items()
        if name in OUTSIDE
    }


def _lambda_1(run: FinishedRun) -> dict[str, object]:
    pairs = cast(Eigenpairs, run.results["lambda1"])
    found = {"lambda_1": float(pairs.values[0]), "lambda_1_residual": float(pairs.residuals[0])}
    return {**found, "lambda_1_converged": pairs.converged}


def _everywhere(compare: Callable[..., Comparison], column: str, name: str, **region: str) -> Compare:
    """Compare every workload's optimizer that does not perturb with another one."""
    return lambda table: [
        compare(part, column, _base(part), name, f"{workload}, {{pair}}", **region)
        for workload, part in table.groupby("problem", sort=False)
    ]


OUTSIDE_VISION = Exhibit(
    "outside_vision",
    wants=_outside_runs,
    table=lambda evidence: as_table(
        [
            {"problem": name, **_scores(run), **_lambda_1(run), **statistics(run.steps, **COSINE)}
            for name, run in evidence.named
        ]
    ),
    draw=lambda table, _: pictures.by_group(
        table,
        {
            "test_accuracy": "test accuracy (%)",
            "test_loss": "test loss (nats)",
            "lambda_1": r"$\lambda_1$",
            "cosine": r"$\cos(v_{t-1},\, g_t)$",
        },
        "problem",
        log=("lambda_1",),
    ),
    constants={"samples": SOME},
    comparisons={
        "msam_loss": _everywhere(difference, "test_loss", "MSAM", unit="nats"),
        "msam_flat": _everywhere(ratio, "lambda_1", "MSAM"),
        "sam_loss": _everywhere(difference, "test_loss", "SAM", unit="nats"),
        "sam_flat": _everywhere(ratio, "lambda_1", "SAM"),
    },
)

# A6r, rank of features
_RANKS = ("rank", "threshold", "effective_rank", "stable_rank", "numerical_rank", "samples", "dimension")


def _draw_ranks(table: pd.DataFrame, _: Evidence) -> Any:
    quantities = {
        "rank": f"components for {table['threshold'].iloc[0]:.0%} of the variance",
        "effective_rank": "effective rank",
        "stable_rank": "stable rank",
    }
    return pictures.by_group(table.assign(features=f"of {table['dimension'].iloc[0]}"), quantities, "features")


RANK = Exhibit(
    "feature_rank",
    wants=lambda workload, seeds: each(workload, workload.perturbations, seeds, measured=("features",)),
    table=lambda evidence: as_table(
        [{**run.whose, **{name: getattr(run.results["features"], name) for name in _RANKS}} for run in evidence.runs]
    ),
    draw=_draw_ranks,
    facts=lambda table, _: {"dimension": table["dimension"].iloc[0], "samples": f"{table['samples'].iloc[0]:,}"},
    comparisons={"falls": lambda table: [ratio(table, "rank", "SGD", "SAM"), ratio(table, "rank", "SAM", "MSAM")]},
)

# TA4, disturbed inputs
_TITLES: Mapping[str, str] = {attack: "noise" if attack == "noise" else attack.upper() for attack in DISTURBANCES}


def _draw_disturbed(table: pd.DataFrame, _: Evidence) -> Any:
    panels = {}
    for attack, title in _TITLES.items():
        factor, label = (1, r"$\sigma$") if attack == "noise" else (255, r"255 $\epsilon$")
        mine = rows(table, attack=attack)
        sized = mine.assign(size=factor * mine["share"])
        panels[title] = Sweep(sized, "size", "test_accuracy", label, "test accuracy (%)", log=False)
    return pictures.sweep(panels, columns=len(panels), share_y=True)


def _above_sgd(table: pd.DataFrame, size: int, above: float) -> list[Comparison]:
    """Compare MSAM and SAM with SGD, under every disturbance of one size: 0 for the smallest, −1 for the largest."""
    found = []
    for name, (attack, shares) in itertools.product(("MSAM", "SAM"), DISTURBANCES.items()):
        at = f"σ = {shares[size]:g}" if attack == "noise" else f"ε = {255 * shares[size]:.0f}/255"
        own, label = rows(table, attack=attack, share=shares[size]), f"{{pair}} ({_TITLES[attack]} at {at}), gain"
        found.append(difference(own, "test_accuracy", name, "SGD", label, unit="points", above=above))
    return found


DISTURBED = Exhibit(
    "robustness",
    wants=lambda workload, seeds: each(workload, workload.perturbations, seeds, measured=("robustness",)),
    table=lambda evidence: as_table(
        [
            {**run.whose, "attack": attack, "share": share, "test_accuracy": 100 * accuracy}
            for run in evidence.runs
            for attack, shares in DISTURBANCES.items()
            for found in [cast(RobustAccuracy, run.results[f"robustness-{attack}"])]
            for share, accuracy in zip((0.0, *shares), (found.clean, *found.accuracies.tolist()), strict=True)
        ]
    ),
    draw=_draw_disturbed,
    constants={"far": f"{FAR:g}"},
    comparisons={
        "small": lambda table: _above_sgd(table, 0, above=FAR),
        "strong": lambda table: _above_sgd(table, -1, above=0.0),
    },
)

MODELS_AND_TASKS = (WARMUP, OUTSIDE_VISION)
SOLUTIONS = (RANK, DISTURBED)
