"""Why momentum is an ascent direction: the loss along it, its cosine with the next gradient, and its angle to SAM's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from msam_analysis.results.statistics import mean_interval
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Comparison, PaperClaim
from msam_analysis.studies.exhibits.base import Evidence, Exhibit, Finding
from msam_analysis.studies.exhibits.wanted import RATES, constant, each, unperturbed, with_recipe
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, cosines, mean_cosine, negative_share, of_training
from msam_analysis.studies.watching import OFFSETS, STRENGTHS
from msam_analysis.studies.workloads import Workload

Region = dict[str, Any]


def _compared(table: pd.DataFrame, what: str, column: str, by: Sequence[str], **region: Any) -> list[Comparison]:
    """Return one comparison of a column's values over seeds for every group of a table."""
    found = []
    for group, part in table.groupby([*by], sort=False):
        whose = " ".join(str(name) for name in group)
        values = part.sort_values("seed")[column].to_numpy(dtype=np.float64)
        found.append(Comparison(f"{whose}, {what}", mean_interval(values), **region))
    return found


# ------------------------------------------------------------------------------------------ A2, the loss along momentum


def _rise_from(steps: pd.DataFrame, offset: float, *, after: float = -math.inf) -> float:
    """Return the mean change of the loss at an offset, of a whole run or after an epoch."""

    def rise(whole: pd.DataFrame) -> float:
        # At the first step there is no momentum, and at most of the others nothing was asked.
        later = whole.iloc[1:]
        asked = later[(later["epoch"] > after) & later.filter(like="loss_along/").notna().any(axis=1)]
        return float((asked[f"loss_along/{offset:g}"] - asked["loss_along/0"]).mean(skipna=False))

    return of_training(steps, rise)


def _along(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Return the mean change of the next batch's loss at every offset: one row per run and offset."""
    rows = [
        {
            "optimizer": run.optimizer,
            "seed": run.seed,
            "lr": run.settings["lr"],
            "offset": offset,
            "change": _rise_from(run.steps, offset),
        }
        for run in runs
        for offset in sorted((*OFFSETS, 0.0))
    ]
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


def minimum(offsets: Sequence[float], changes: Sequence[float]) -> float:
    """Return where a curve is lowest: the vertex of the parabola through the lowest point and its two neighbours.

    NaN where a change is not a number or infinite: the curve may be lower there.
    """
    if not np.isfinite(changes).all():
        return math.nan
    at = int(np.argmin(changes))
    if at in (0, len(offsets) - 1):
        return float(offsets[at])
    a, b, _ = np.polyfit(offsets[at - 1 : at + 2], changes[at - 1 : at + 2], 2)
    return float(-b / (2 * a))


def _minima(table: pd.DataFrame, *names: str) -> list[Comparison]:
    found = []
    for optimizer, runs in table[table["optimizer"].isin(names)].groupby("optimizer", sort=False):
        values = [minimum(run["offset"].to_list(), run["change"].to_list()) for _, run in runs.groupby("seed")]
        found.append(Comparison(f"{optimizer}, minimum at a", mean_interval(values)))
    return found


_A2 = (
    PaperClaim(
        "A2",
        "Along the last step, the loss of the next batch has its minimum behind the weights: the step overshot.",
        "overshoots",
        lambda table: _minima(table, "SGD"),
        note="The step went towards negative a; the change of the loss at each a is averaged over training, and its "
        "minimum is found by a parabola through three points.",
    ),
    PaperClaim(
        "A2",
        "Control, not in the paper: so it has for the other optimizers, at their true weights.",
        "shown for one optimizer",
        lambda table: _minima(table, "NAG", "SAM", "MSAM"),
        note="MSAM takes its gradient further along the step, and sees the overshoot of that point.",
        control=True,
    ),
)


def _along_runs(problem: Workload, seeds: int) -> list[Run]:
    return each(problem, problem.perturbations, seeds, watched=("along_momentum", "rise"))


def _along_study(evidence: Evidence) -> Finding:
    table = _along(evidence.of(_along_runs(evidence.problem, evidence.seeds)))
    return Finding(lambda: pictures.along_momentum(table), table=table, claims=[claim.judge(table) for claim in _A2])


ALONG = Exhibit(
    ("A2",),
    "along_momentum",
    "The loss along the last step",
    "Change of the next batch's loss along the unit momentum, averaged over training. Both axes are linear near 0.",
    _along_runs,
    _along_study,
    claims=_A2,
)


# --------------------------------------------------------------------------- A12, the change of the loss itself, for η


def _rates_runs(problem: Workload, seeds: int) -> list[Run]:
    return [
        run
        for factor in RATES
        for run in each(
            with_recipe(problem, lr=factor * problem.recipe.lr),
            ("SGD", "MSAM"),
            seeds,
            watched=("along_momentum", "rise"),
        )
    ]


def _rates_table(runs: Sequence[FinishedRun], rho: float) -> pd.DataFrame:
    rows = []
    for run in runs:
        last = run.steps["epoch"].max()
        rows.append(
            {
                "optimizer": run.optimizer,
                "seed": run.seed,
                "lr": run.settings["lr"],
                "learning_rate": f"η = {run.settings['lr']:g}",
                "rho": rho,
                "virtual_rise": _rise_from(run.steps, -rho),
                "virtual_rise_last_quarter": _rise_from(run.steps, -rho, after=0.75 * last),
                "own_rise": of_training(run.steps, lambda steps: steps["rise"].mean()),
                "small_rise": _rise_from(run.steps, -0.1),
                "cosine": of_training(run.steps, mean_cosine),
                "test_accuracy": 100 * run.scores["test_accuracy"],
            }
        )
    table: pd.DataFrame = pd.DataFrame(rows)
    return table


_A12 = (
    PaperClaim(
        "A12",
        "The perturbation raises the loss of the batch for every learning rate.",
        "raises, for several η",
        lambda table: _compared(table, "mean L(w − ρ v/‖v‖) − L(w)", "virtual_rise", ["optimizer", "learning_rate"]),
        note="For SGD the perturbation that MSAM would make is evaluated and not used.",
    ),
    PaperClaim(
        "A12",
        "Control, not in the paper: a small move further along the last step, by 0.1, also raises the batch's loss.",
        "not tested",
        lambda table: _compared(table, "mean L(w − 0.1 v/‖v‖) − L(w)", "small_rise", ["optimizer", "learning_rate"]),
        note="A long perturbation may raise any loss, by curvature alone; a short one tells the slope.",
        control=True,
    ),
)


def _strength(problem: Workload, among: Sequence[float]) -> float:
    """Return the value among those recorded that is nearest to MSAM's ρ, by ratio."""
    rho = constant(problem.perturbations["MSAM"])
    return min(among, key=lambda value: abs(math.log(value / rho)))


def _rates_study(evidence: Evidence) -> Finding:
    rho = _strength(evidence.problem, [-offset for offset in OFFSETS if offset < 0])
    table = _rates_table(evidence.of(_rates_runs(evidence.problem, evidence.seeds)), rho)
    quantities = {
        "virtual_rise": f"$L(w+\\epsilon) - L(w)$ (nats), ρ = {rho:g}",
        "small_rise": "the same at ρ = 0.1",
        "cosine": r"$\cos(v_{t-1},\, g_t)$",
    }
    return Finding(
        lambda: pictures.by_group(table, quantities, "learning_rate"),
        table=table,
        claims=[claim.judge(table) for claim in _A12],
    )


RISE_RATES = Exhibit(
    ("A12",),
    "rise_by_learning_rate",
    "The change of the loss itself, for several learning rates",
    "Mean over training of the change of the batch's loss under MSAM's perturbation, which for SGD is only evaluated, "
    "at two lengths; and of the cosine of momentum and the next gradient.",
    _rates_runs,
    _rates_study,
    claims=_A12,
)


# ------------------------------------------------------------------------- A3 and A4, the cosine: models and conditions


def _problems(problem: Workload) -> dict[str, Workload]:
    return {problem.name: problem, **problem.relatives}


def _conditions(problem: Workload) -> dict[str, Workload]:
    return {"decay": problem, "constant": with_recipe(problem, schedule="constant")}


def _models_runs(problem: Workload, seeds: int) -> list[Run]:
    return [
        run
        for one in _problems(problem).values()
        for run in each(one, dict.fromkeys((unperturbed(one), "MSAM")), seeds)
    ]


def _models_study(evidence: Evidence) -> Finding:
    rows = [
        {
            "optimizer": run.optimizer,
            "seed": run.seed,
            "problem": name,
            "cosine": of_training(run.steps, mean_cosine),
            "negative": of_training(run.steps, lambda steps: negative_share(cosines(steps))),
            "after_update": of_training(run.steps, lambda steps: steps["cosine_after"].mean(skipna=False)),
        }
        for name, one in _problems(evidence.problem).items()
        for run in evidence.of(each(one, dict.fromkeys((unperturbed(one), "MSAM")), evidence.seeds))
    ]
    table: pd.DataFrame = pd.DataFrame(rows)
    quantities = {
        "cosine": r"$\cos(v_{t-1},\, g_t)$, mean",
        "negative": "steps with a negative cosine (%)",
        "after_update": r"$\cos(v_t,\, g_t)$, mean",
    }
    return Finding(
        lambda: pictures.by_group(table, quantities, "problem"),
        table=table,
        claims=[claim.judge(table) for claim in _A3],
        note=". ".join(f"{name}: {one.description}" for name, one in _problems(evidence.problem).items()) + ".",
    )


def _of_all(table: pd.DataFrame) -> list[Comparison]:
    return _compared(table, "steps with a negative cosine", "negative", ["problem", "optimizer"], unit="%", above=50.0)


_A3 = (
    PaperClaim(
        "A3",
        "The cosine is negative for most of training whatever the model and the task.",
        "negative for all models",
        lambda table: _of_all(table) if table["problem"].nunique() > 1 else [],
        note="Networks and tasks: see the table; one of them alone tells nothing. The paper's are all of images.",
    ),
    PaperClaim(
        "A4",
        "After the buffer has taken in the gradient, their cosine is positive, just below 0.5.",
        "just below 0.5",
        lambda table: _compared(
            table, "mean cos(v_t, g_t)", "after_update", ["problem", "optimizer"], above=0.25, below=0.5
        ),
        note="Between 0.25 and 0.5 is required here. Of independent gradients it would be √(1 − μ²) = 0.44 at μ = 0.9.",
    ),
)

MODELS = Exhibit(
    ("A3", "A4"),
    "cosine_models",
    "The cosine across models and tasks",
    "Cosine of momentum and the next gradient, of this workload and of the other networks and tasks that there are "
    "beside it.",
    _models_runs,
    _models_study,
    claims=_A3,
)


def _conditions_runs(problem: Workload, seeds: int) -> list[Run]:
    return [
        run
        for name, one in _conditions(problem).items()
        for run in each(
            one, ("SGD", "MSAM"), seeds, watched=("held_out", "held_out_momentum") if name == "decay" else ()
        )
    ]


_SERIES = {
    "cosine": "next batch",
    "cosine_after": "after the update",
    "held_out_cosine_fresh": "unseen batches",
    "held_out_cosine_fixed": "one unseen batch",
    "own_cosine_fresh": "unseen, momentum of their own",
    "own_cosine_fixed": "one unseen batch, momentum of its own",
}


def _means(steps: pd.DataFrame, column: str) -> dict[str, float]:
    return {
        "mean": of_training(steps, lambda whole: whole[column].mean()),
        "negative": of_training(steps, lambda whole: negative_share(whole[column].dropna())),
        "last_quarter": of_training(
            steps, lambda whole: whole.loc[whole["epoch"] > 0.75 * whole["epoch"].max(), column].mean()
        ),
    }


def _conditions_study(evidence: Evidence) -> Finding:
    rows: list[dict[str, Any]] = []
    for schedule, one in _conditions(evidence.problem).items():
        for run in evidence.of(each(one, ("SGD", "MSAM"), evidence.seeds)):
            recorded = [name for name in _SERIES if name in run.steps]
            rows += [
                {
                    "optimizer": run.optimizer,
                    "seed": run.seed,
                    "schedule": schedule,
                    "quantity": name,
                    **_means(run.steps, name),
                }
                for name in recorded
            ]
    table: pd.DataFrame = pd.DataFrame(rows)
    shown = table.assign(
        where=[
            _SERIES[name] + (", constant η" if kind == "constant" else "")
            for name, kind in zip(table["quantity"], table["schedule"], strict=True)
        ]
    )
    return Finding(
        lambda: pictures.by_group(
            shown, {"mean": "cosine, mean over training", "last_quarter": "in the last quarter"}, "where"
        ),
        table=table,
        claims=[claim.judge(table) for claim in _A4],
        note="Unseen batches are of the test set, whose labels are right also where some of those trained on are "
        "wrong, and come again after the last. Two momenta "
        "are asked: that of the training, and one that is made of gradients of unseen batches alone, along which no "
        "step is taken.",
    )


def _of(quantity: str, schedule: str = "decay") -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda table: table[(table["quantity"] == quantity) & (table["schedule"] == schedule)]


_A4 = (
    PaperClaim(
        "A4",
        "With a constant learning rate the cosine stays negative to the end of training.",
        "negative without decay",
        lambda table: _compared(
            _of("cosine", "constant")(table),
            "cosine in the last quarter",
            "last_quarter",
            ["optimizer"],
            above=-math.inf,
            below=0.0,
        ),
    ),
    PaperClaim(
        "A4",
        "On fresh held-out batches, along whose momentum no step is taken, it is positive.",
        "positive",
        lambda table: _compared(_of("own_cosine_fresh")(table), "mean cosine", "mean", ["optimizer"]),
    ),
    PaperClaim(
        "A4",
        "On one fixed held-out batch it is near 1.",
        "near 1",
        lambda table: _compared(_of("own_cosine_fixed")(table), "mean cosine", "mean", ["optimizer"], above=0.8),
        note="More than 0.8 is required here.",
    ),
    PaperClaim(
        "A4",
        "Control, not in the paper: the training's momentum is an ascent direction on unseen batches as well.",
        "not tested",
        lambda table: _compared(
            _of("held_out_cosine_fresh")(table), "mean cosine", "mean", ["optimizer"], above=-math.inf, below=0.0
        ),
        note="If so, the negative cosine is no property of the batches that are still to come in an epoch.",
        control=True,
    ),
)

CONDITIONS = Exhibit(
    ("A4",),
    "cosine_conditions",
    "What makes the cosine negative",
    "Cosine of momentum and gradient: of the next batch, after the update, on unseen batches, and with momenta along "
    "which no step is taken.",
    _conditions_runs,
    _conditions_study,
    claims=_A4,
)


# ---------------------------------------------------------------------------------- F3, the angle between MSAM and SAM


def _angle_runs(problem: Workload, seeds: int) -> list[Run]:
    return each(problem, ("SGD", "MSAM"), seeds, watched=("sam_angle",))


def _angle_study(evidence: Evidence) -> Finding:
    best = constant(evidence.problem.perturbations["MSAM"])
    angles, roots = [], []
    for run in evidence.of(_angle_runs(evidence.problem, evidence.seeds)):
        # At the first step there is no momentum.
        later = run.steps.iloc[1:]
        recorded = later[later.filter(like="sam_angle/").notna().any(axis=1)]
        whose = {"optimizer": run.optimizer, "seed": run.seed}
        whole = math.isfinite(of_training(run.steps, lambda _: 0.0)) and not recorded.empty
        angles += [
            {**whose, "rho": rho, "angle": recorded[f"sam_angle/{rho:g}"].median() if whole else math.nan}
            for rho in (0.0, *STRENGTHS)
        ]
        # A run without a record is not left out.
        rows = (run.steps.iloc[-1:] if recorded.empty else recorded)[["step", "epoch", "rho_0"]]
        roots.append(rows.assign(**whose, best_rho=best, finished=whole))
    table: pd.DataFrame = pd.concat(roots, ignore_index=True)
    per_epoch = table.groupby(["optimizer", "seed", "epoch"], sort=False)["rho_0"].mean().reset_index()
    return Finding(
        lambda: pictures.zero_angle(pd.DataFrame(angles), per_epoch, best),
        table=table,
        claims=[claim.judge(table) for claim in _F3],
        note=f"Angles at ρ = 0 to {max(STRENGTHS):g}, by the batch trained on; where the angle has no zero there, "
        "there is no ρ₀. Drawn is the mean ρ₀ of every epoch that has a record, a point a seed. The recipe's ρ, "
        f"{best:g}, stands for the best one.",
    )


def _near_best(table: pd.DataFrame) -> list[Comparison]:
    near = table["rho_0"].between(table["best_rho"] / CLOSE, table["best_rho"] * CLOSE)
    # Of a run that diverged, what came before is no share of training.
    known = table.assign(near=(100.0 * near).where(table["finished"]))
    shares = known.groupby(["optimizer", "seed"], sort=False)["near"].mean().reset_index()
    label = f"records with ρ₀ within a factor {CLOSE:g} of the best ρ"
    return _compared(shares, label, "near", ["optimizer"], unit="%", above=50.0)


CLOSE = 2.0
"""Within this factor a strength counts as close."""

_F3 = (
    PaperClaim(
        "F3",
        "The strength ρ₀ at which MSAM's gradient points where SAM's does lies close to the best ρ for most epochs.",
        "close for most epochs",
        _near_best,
        note="A record without a root counts as not close.",
    ),
)

ANGLE = Exhibit(
    ("F3",),
    "sam_angle",
    "MSAM's gradient seen from SAM's",
    "Left: angle of MSAM's gradient, in the plane of SAM's and the plain one, to SAM's, median over training. Right: "
    "the strength at which it is 0, over training, and MSAM's ρ (dashed).",
    _angle_runs,
    _angle_study,
    claims=_F3,
)

MECHANISMS = (ANGLE, ALONG, MODELS, CONDITIONS, RISE_RATES)
