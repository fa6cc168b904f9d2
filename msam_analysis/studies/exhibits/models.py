"""Other models and other tasks: a vision transformer's warm-up, and what holds outside vision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd

from msam_analysis.results import Eigenpairs
from msam_analysis.results.statistics import mean_interval
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import FAR, Comparison, PaperClaim, difference, ratio
from msam_analysis.studies.exhibits.base import Evidence, Exhibit, Finding, untold
from msam_analysis.studies.exhibits.wanted import OUTSIDE, after_warmup, each, unperturbed
from msam_analysis.studies.measuring import SOME
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, cosines, mean_cosine, negative_share, of_training
from msam_analysis.studies.workloads import Workload

_PERTURBED = ("SAM", "MSAM")
_CHOSEN = "Learning rate and ρ were chosen by the test accuracy of two other seeds."

# ----------------------------------------------------------------------------------------------- TA2, the warm-up phase


def _warmup_parts(problem: Workload, seeds: int) -> dict[str, list[Run]]:
    """Return the runs of the transformer beside the problem; none where there is none."""
    one = problem.relatives.get("transformer")
    if one is None:
        return {}
    parts = {"throughout": each(one, (unperturbed(one), *_PERTURBED), seeds)}
    if one.recipe.warmup:
        parts["after warm-up only"] = [
            run for name in _PERTURBED for run in each(after_warmup(one, name), (name,), seeds)
        ]
    return parts


def _warmup_runs(problem: Workload, seeds: int) -> list[Run]:
    return [run for part in _warmup_parts(problem, seeds).values() for run in part]


def _scores(run: FinishedRun) -> dict[str, float | str | int]:
    return {
        "optimizer": run.optimizer,
        "seed": run.seed,
        "train_accuracy": 100 * run.scores["train_accuracy"],
        "test_accuracy": 100 * run.scores["test_accuracy"],
        "test_loss": run.scores["test_loss"],
    }


def _warmup_study(evidence: Evidence) -> Finding:
    parts = _warmup_parts(evidence.problem, evidence.seeds)
    if not parts:
        return untold(_TA2, "Not asked: there is no vision transformer beside this workload.")
    table = pd.DataFrame(
        [{"perturbed": when, **_scores(run)} for when, part in parts.items() for run in evidence.of(part)]
    )
    quantities = {"test_accuracy": "test accuracy (%)", "train_accuracy": "train accuracy (%)"}
    return Finding(
        lambda: pictures.by_group(table, quantities, "perturbed"),
        table=table,
        claims=[claim.judge(table) for claim in _TA2],
        note=f"AdamW has no perturbation and stands in the first row only. {_CHOSEN} {_THROUGHOUT}",
    )


_THROUGHOUT = "ρ is the one chosen for perturbing throughout, which favours that over starting after warm-up."


def _later_is_better(name: str) -> PaperClaim:
    late, always = {"MSAM": (69.1, 66.1), "SAM": (69.8, 69.2)}[name]

    def compare(table: pd.DataFrame) -> list[Comparison]:
        mine = table[table["optimizer"] == name].sort_values("seed")
        late, always = (
            mine.loc[mine["perturbed"] == when, "test_accuracy"].to_numpy(dtype=np.float64)
            for when in ("after warm-up only", "throughout")
        )
        if not len(late):
            return []
        return [Comparison(f"{name} after warm-up only − throughout", mean_interval(late - always), "points")]

    return PaperClaim(
        "TA2",
        f"{name} does better on a vision transformer where it starts after warm-up.",
        f"{late} % after warm-up only, {always} % throughout",
        compare,
        note=f"{_CHOSEN} {_THROUGHOUT}",
    )


def _above_base(table: pd.DataFrame) -> list[Comparison]:
    whole = table[table["perturbed"] == "throughout"]
    base = next(name for name in whole["optimizer"] if name not in _PERTURBED)
    gains = (difference(whole, "test_accuracy", name, base, unit="points") for name in _PERTURBED)
    return [dataclasses.replace(gain, label=f"{gain.label}, gain", above=FAR) for gain in gains]


_TA2 = (
    PaperClaim(
        "T2",
        "On a vision transformer SAM and MSAM are far above AdamW.",
        "69.1 % and 69.1 % against 67.0 % (ViT-S/32, ImageNet)",
        _above_base,
        note=f"Perturbed throughout, here; far above is by more than {FAR:g} points. {_CHOSEN}",
    ),
    *(_later_is_better(name) for name in ("MSAM", "SAM")),
)

WARMUP = Exhibit(
    ("T2", "TA2"),
    "warmup",
    "A vision transformer, and its warm-up",
    "Test and train accuracy of a small vision transformer with AdamW's step, perturbed throughout or after warm-up.",
    _warmup_runs,
    _warmup_study,
    claims=_TA2,
)

# -------------------------------------------------------------------------------------------------- outside of vision


def _outside(problem: Workload) -> dict[str, Workload]:
    return {name: problem.relatives[name] for name in OUTSIDE if name in problem.relatives}


def _outside_part(one: Workload, seeds: int) -> list[Run]:
    return each(one, (unperturbed(one), *_PERTURBED), seeds, measured=("lambda1",))


def _outside_runs(problem: Workload, seeds: int) -> list[Run]:
    return [run for one in _outside(problem).values() for run in _outside_part(one, seeds)]


def _outside_study(evidence: Evidence) -> Finding:
    problems = _outside(evidence.problem)
    if not problems:
        return untold(_OUTSIDE, "Not asked: there is no problem outside of vision beside this workload.")
    rows = []
    for name, one in problems.items():
        for run in evidence.of(_outside_part(one, evidence.seeds)):
            pairs = cast(Eigenpairs, run.results["lambda1"])
            rows.append(
                {
                    "problem": name,
                    **_scores(run),
                    "lambda_1": float(pairs.values[0]),
                    "lambda_1_residual": float(pairs.residuals[0]),
                    "lambda_1_converged": pairs.converged,
                    "cosine": of_training(run.steps, mean_cosine),
                    "negative": of_training(run.steps, lambda steps: negative_share(cosines(steps))),
                }
            )
    table: pd.DataFrame = pd.DataFrame(rows)
    quantities = {
        "test_accuracy": "test accuracy (%)",
        "test_loss": "test loss (nats)",
        "lambda_1": r"$\lambda_1$",
        "cosine": r"$\cos(v_{t-1},\, g_t)$",
    }
    return Finding(
        lambda: pictures.by_group(table, quantities, "problem", log=("lambda_1",)),
        table=table,
        claims=[claim.judge(table) for claim in _OUTSIDE],
        note=f"λ₁ is of the loss on the first {SOME} training samples. {_CHOSEN}",
    )


def _bases(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Return the problems with the name of their optimizer that does not perturb, and their rows."""
    return [
        (str(name), next(one for one in part["optimizer"] if one not in _PERTURBED), part)
        for name, part in table.groupby("problem", sort=False)
    ]


def _named(problem: str, comparison: Comparison) -> Comparison:
    return dataclasses.replace(comparison, label=f"{problem}, {comparison.label}")


def _generalises(name: str) -> Sequence[PaperClaim]:
    return (
        PaperClaim(
            "T2",
            f"Outside of vision, too, {name} lowers the test loss.",
            "not in the paper; asked by its readers",
            lambda table: [
                _named(problem, difference(part, "test_loss", base, name, unit="nats"))
                for problem, base, part in _bases(table)
            ],
            note=_CHOSEN,
            control=True,
        ),
        PaperClaim(
            "TA1",
            f"Outside of vision, too, {name}'s minimum is flatter.",
            "not in the paper; asked by its readers",
            lambda table: [
                _named(problem, ratio(part, "lambda_1", base, name)) for problem, base, part in _bases(table)
            ],
            note=f"Largest eigenvalue of the Hessian of the loss on the first {SOME} training samples. {_CHOSEN}",
            control=True,
        ),
    )


_OUTSIDE = (*_generalises("MSAM"), *_generalises("SAM"))

OUTSIDE_VISION = Exhibit(
    (),
    "outside_vision",
    "Does anything hold outside vision?",
    "Test accuracy and loss, largest Hessian eigenvalue and the cosine of momentum and gradient, on text and on a "
    "table.",
    _outside_runs,
    _outside_study,
    claims=_OUTSIDE,
)

MODELS_AND_TASKS = (WARMUP, OUTSIDE_VISION)
