"""Accuracy against the strength ρ: both signs, the way from MSAM to NAG, how sensitive ρ is, and rules to choose it."""

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

from msam import Perturbation
from msam_analysis.results.statistics import mean_interval, summarise
from msam_analysis.studies import pictures
from msam_analysis.studies.cifar100 import Augmented
from msam_analysis.studies.claims import Comparison, PaperClaim, Values, times
from msam_analysis.studies.exhibits.base import Evidence, Exhibit, Finding
from msam_analysis.studies.exhibits.sweeps import (
    SAME_ACCURACY,
    base,
    best,
    best_of_each,
    grid,
    once,
    paired,
    plain,
    plateau,
    scaled,
)
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, of_training, outcomes
from msam_analysis.studies.workloads import Batches, Workload

_POSITIVE = (-9, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6)
_NEGATIVE = (-6, -4, -3, -2, 0)
# NAG's ρ is a factor of the step, and its displacement far shorter than MSAM's: the grid goes to longer ones.
_NAG_POSITIVE = (0, 3, 6, 8, 9, 10, 11, 12, 15)
_NAG_NEGATIVE = (0, 3, 6, 10)
_UNNORMALISED = (0, 3, 6, 8, 9, 10, 11, 12)
_HELD_OUT = (-4, -2, -1, 0, 1, 2, 3, 4)
_COLUMNS = ["optimizer", "seed", "rho", "sign", "normalize"]
_SCORES = ["train_accuracy", "test_accuracy", "train_loss", "test_loss"]

ONE_IN = 5
"""One training sample in so many is held out to choose ρ by."""
GAIN = 2.0
"""The paper's gain of a positive ρ, in points of test accuracy."""
DECADES = 0.5
"""Width of the range of ρ within a point of the best, in decades, from which on ρ is called forgiving."""


# --- F2AB and A15: accuracy against ρ


def strength_runs(problem: Workload, seeds: int) -> list[Run]:
    """Return SGD, and SAM, MSAM and NAG's displacement −ρ η v on grids of ρ with both signs."""
    runs = plain(problem, seeds)
    for name in ("SAM", "MSAM"):
        perturbation = base(problem, name)
        runs += grid(problem, name, perturbation, _POSITIVE, seeds, frozenset({"rise"}))
        runs += grid(problem, name, dataclasses.replace(perturbation, sign=-1), _NEGATIVE, seeds)
    nag = base(problem, "NAG")
    runs += grid(problem, "NAG", nag, _NAG_POSITIVE, seeds)
    runs += grid(problem, "NAG", dataclasses.replace(nag, sign=-1), _NAG_NEGATIVE, seeds)
    return once(runs)


def strength_table(runs: list[FinishedRun]) -> pd.DataFrame:
    """Return one row per run: ρ and its sign, accuracies, losses, and the mean rise L(w + ε) − L(w) where recorded."""
    rises = [
        of_training(run.steps, lambda steps: steps["rise"].mean()) if "rise" in run.steps else math.nan for run in runs
    ]
    table: pd.DataFrame = outcomes(runs)[_COLUMNS + _SCORES].assign(rise=rises)
    return table


def part(table: pd.DataFrame, optimizer: str, sign: int = 1) -> pd.DataFrame:
    """Return an optimizer's rows with one sign of ρ."""
    rows: pd.DataFrame = table[(table["optimizer"] == optimizer) & (table["sign"] == sign)]
    return rows


def _gains(table: pd.DataFrame) -> list[Comparison]:
    sgd = part(table, "SGD")
    return [
        paired(f"{name} at its best ρ − SGD, test accuracy", best(part(table, name)), sgd, above=GAIN)
        for name in ("SAM", "MSAM")
    ]


def _costs(table: pd.DataFrame) -> list[Comparison]:
    sgd = part(table, "SGD")
    return [
        paired(f"SGD − {name} at its best ρ, train accuracy", sgd, best(part(table, name)), "train_accuracy")
        for name in ("SAM", "MSAM")
    ]


def _negative(table: pd.DataFrame) -> list[Comparison]:
    sgd = part(table, "SGD")
    return [
        paired(f"{name} at ρ = −{rho:g}, gain over SGD", rows, sgd, above=-math.inf, below=0.0)
        for name in ("SAM", "MSAM")
        for rho, rows in part(table, name, -1).groupby("rho")
    ]


def _nesterov(table: pd.DataFrame) -> list[Comparison]:
    nag = part(table, "NAG")
    own = nag[nag["rho"] == nag["rho"].min()]
    losses = [_losses(rows) for rows in (part(table, "SGD"), own)]
    return [
        times("train loss of SGD / of NAG at ρ = μ", losses[0], losses[1]),
        paired("best MSAM − NAG at ρ = μ, test accuracy", best(part(table, "MSAM")), own, above=GAIN),
    ]


def _losses(rows: pd.DataFrame) -> Values:
    losses: Values = rows.sort_values("seed")["train_loss"].to_numpy(dtype=np.float64)
    return losses


def ranges(table: pd.DataFrame, optimizer: str) -> pd.DataFrame:
    """Return, for every seed, the range of positive ρ within a point of its best test accuracy."""
    rows = []
    for seed, own in part(table, optimizer).sort_values("rho").groupby("seed"):
        low, high = plateau(own["rho"], own["test_accuracy"], SAME_ACCURACY / 100)
        rows.append({"seed": seed, "low": low, "high": high})
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def _log_middle(found: pd.DataFrame) -> Values:
    middle: Values = np.log((found["low"] * found["high"]).to_numpy(dtype=np.float64)) / 2
    return middle


def _tenfold(table: pd.DataFrame) -> list[Comparison]:
    ratio = _log_middle(ranges(table, "MSAM")) - _log_middle(ranges(table, "SAM"))
    interval = mean_interval(ratio)
    return [Comparison("MSAM / SAM, best ρ", interval, factor=True, above=math.log(5), below=math.log(20))]


def _forgiving(table: pd.DataFrame) -> list[Comparison]:
    comparisons = []
    for name in ("SAM", "MSAM"):
        found = ranges(table, name)
        width = np.log10((found["high"] / found["low"]).to_numpy(dtype=np.float64))
        comparisons.append(Comparison(f"{name}, range of ρ", mean_interval(width), "decades", above=DECADES))
    return comparisons


STRENGTH = (
    PaperClaim(
        "F2AB",
        "A positive ρ raises the test accuracy of SAM and MSAM by more than 2 points.",
        "76.90 % to 79.25 % (SAM) and 79.11 % (MSAM)",
        _gains,
        note="At the ρ with the best mean test accuracy of the grid, which favours the grid a little.",
    ),
    PaperClaim("F2AB", "At that ρ the train accuracy falls.", "falls", _costs),
    PaperClaim(
        "F2AB",
        "A negative ρ never helps.",
        "never above ρ = 0",
        _negative,
        note="Every negative ρ must be below SGD. Where training labels are wrong, whatever keeps a network from "
        "fitting them helps it, and so may a negative ρ of the right size.",
    ),
    PaperClaim(
        "F2AB",
        "NAG helps the training rather than the generalisation.",
        "test 77.09 % against 76.90 % (SGD) and 79.11 % (MSAM)",
        _nesterov,
        note="NAG is the displacement −ρ η v at ρ = μ: its train loss below SGD's, its test accuracy well below "
        "MSAM's.",
    ),
    PaperClaim(
        "A15",
        "MSAM's best ρ is about ten times SAM's.",
        "2 to 3 against 0.2 to 0.3",
        _tenfold,
        note="The best ρ of a seed is the middle, on a logarithmic scale, of the range within a point of its best test "
        "accuracy; about ten is between five and twenty.",
    ),
    PaperClaim(
        "A15",
        "Readers' question, not in the paper: ρ is forgiving, half a decade of it stays within a point of the best.",
        "asked by readers",
        _forgiving,
        note="Range of ρ within one point of a seed's own best test accuracy, interpolated, and cut off at the grid's "
        "ends. The best of one seed is partly luck, so that the range of the mean over seeds is wider.",
        control=True,
    ),
)


def strength(evidence: Evidence) -> Finding:
    """Return what F2AB and A15 find."""
    table = strength_table(evidence.of(strength_runs(evidence.problem, evidence.seeds)))
    shown = best_of_each(table, ["optimizer", "sign"])
    shown["within_a_point"] = [
        _range_in_words(part(table, *key)) for key in zip(shown.optimizer, shown.sign, strict=True)
    ]
    return Finding(
        lambda: pictures.both_signs(
            table, {"test_accuracy": "test accuracy (%)", "train_accuracy": "train accuracy (%)"}
        ),
        table,
        [claim.judge(table) for claim in STRENGTH],
        shown.drop(columns="tried"),
        "The best ρ of each sign by mean test accuracy, its accuracies, and the range of ρ in which the mean test "
        "accuracy stays within a point of it. NAG's ρ is the factor of η v, another quantity on the same "
        "axis: Nesterov's method is its smallest positive ρ.",
    )


def _range_in_words(rows: pd.DataFrame) -> str:
    means = summarise(rows, ["rho"], "test_accuracy").sort_values("rho")
    if len(means) == 1:
        return "–"
    low, high = plateau(means["rho"], means["test_accuracy"], SAME_ACCURACY / 100)
    return f"{low:.2g} to {high:.2g}"


# --- A1: from MSAM to NAG


def step_runs(problem: Workload, seeds: int) -> list[Run]:
    """Return the runs of −ρ v/‖v‖, −ρ v and −ρ η v, with positive ρ; the first and the last are those of F2AB."""
    nag = base(problem, "NAG")
    # At the peak learning rate as long as Nesterov's.
    unnormalised = Perturbation(direction="momentum", normalize="none", rho=scaled(nag.rho, 0) * problem.recipe.lr)
    return once(
        [
            *plain(problem, seeds),
            *grid(problem, "MSAM", base(problem, "MSAM"), _POSITIVE, seeds),
            *grid(problem, "MSAM", unnormalised, _UNNORMALISED, seeds),
            *grid(problem, "NAG", nag, _NAG_POSITIVE, seeds),
        ]
    )


_STEPS = {"l2": "−ρ v/‖v‖", "none": "−ρ v", "lr": "−ρ η v"}


def step_table(runs: list[FinishedRun]) -> pd.DataFrame:
    """Return one row per run; ``step`` is the displacement, ``SGD`` for none."""
    table = outcomes(runs)[_COLUMNS + _SCORES]
    step = table["normalize"].map(_STEPS).where(table["optimizer"] != "SGD", "SGD")
    found: pd.DataFrame = table.assign(step=step)
    return found


def _step(table: pd.DataFrame, normalize: str) -> pd.DataFrame:
    rows: pd.DataFrame = table[table["step"] == _STEPS[normalize]]
    return rows


def _only_shifts(table: pd.DataFrame) -> list[Comparison]:
    pair = best(_step(table, "none")), best(_step(table, "l2"))
    return [paired("−ρ v − MSAM, best test accuracy", *pair, above=-SAME_ACCURACY, below=SAME_ACCURACY)]


def _loses(table: pd.DataFrame) -> list[Comparison]:
    tied, free, sgd = best(_step(table, "lr")), best(_step(table, "none")), table[table["step"] == "SGD"]
    losses = [_losses(rows) for rows in (sgd, _lowest(_step(table, "lr")))]
    return [
        paired("−ρ v − (−ρ η v), best test accuracy", free, tied, above=SAME_ACCURACY),
        times("train loss of SGD / lowest of −ρ η v", losses[0], losses[1]),
    ]


def _lowest(rows: pd.DataFrame) -> pd.DataFrame:
    return best(rows.assign(negative=-rows["train_loss"]), y="negative")


STEPS = (
    PaperClaim(
        "A1",
        "Dropping the normalisation only shifts the best ρ.",
        "same best test accuracy",
        _only_shifts,
        note="Best test accuracies within a point of each other.",
    ),
    PaperClaim(
        "A1",
        "Tying ρ to the learning rate turns the gain in generalisation into one in optimisation.",
        "test accuracy falls towards SGD's, train accuracy rises above it",
        _loses,
        note="The best test accuracy is more than a point lower, and at some ρ the train loss is lower than SGD's. "
        "Train loss and not train accuracy, which has no room where every sample is fitted.",
    ),
)


def steps(evidence: Evidence) -> Finding:
    """Return what A1 finds."""
    table = step_table(evidence.of(step_runs(evidence.problem, evidence.seeds)))
    drawn = table.assign(optimizer=table["step"])
    panels = {
        name: Sweep(
            drawn, "rho", name, r"$\rho$", label, percent=name.endswith("accuracy"), log_y=name.endswith("loss")
        )
        for name, label in (
            ("test_accuracy", "test accuracy (%)"),
            ("train_accuracy", "train accuracy (%)"),
            ("train_loss", "train loss"),
        )
    }
    return Finding(
        lambda: pictures.sweep(list(panels.values())),
        table,
        [claim.judge(table) for claim in STEPS],
        best_of_each(table, ["step"]),
        "η v is the step itself, so that −ρ η v shrinks with the learning rate's decay while −ρ v shrinks with "
        "the momentum alone.",
    )


# --- a rule to choose ρ


def held_out(problem: Workload) -> Workload:
    """Return a workload that trains on four fifths of the training samples and tests on the fifth, labels as given."""
    trained, tested = _folds(problem.train)
    augmented = None if problem.augmented is None else _thinned(problem.augmented)
    name = f"{problem.name}, a fifth held out"
    return dataclasses.replace(problem, name=name, train=trained, test=tested, augmented=augmented)


# The same two functions for the same data, by which their fingerprint is known.
@functools.lru_cache
def _folds(train: Callable[[], Batches]) -> tuple[Callable[[], Batches], Callable[[], Batches]]:
    return functools.partial(_fold, train, False), functools.partial(_fold, train, True)


@functools.lru_cache
def _thinned(augmented: Callable[[], Augmented]) -> Callable[[], Augmented]:
    return functools.partial(_others, augmented)


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


def held_out_runs(problem: Workload, seeds: int) -> list[Run]:
    """Return MSAM on a grid of ρ, trained without a fifth of the samples."""
    return grid(held_out(problem), "MSAM", base(problem, "MSAM"), _HELD_OUT, seeds)


def rule_runs(problem: Workload, seeds: int) -> list[Run]:
    """Return the runs of F2AB with positive ρ of SAM and MSAM, and those with samples held out."""
    watched = frozenset({"rise"})
    grids = [grid(problem, name, base(problem, name), _POSITIVE, seeds, watched) for name in ("SAM", "MSAM")]
    return once([*grids[0], *grids[1], *held_out_runs(problem, seeds)])


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
    """Return what every rule chooses for every seed, and what that costs.

    Parameters
    ----------
    table
        Of :func:`strength_table`, for SAM and MSAM with positive ρ.
    validation
        MSAM with samples held out: ``seed``, ``rho`` and, of the samples held out, ``test_accuracy``.

    Returns
    -------
    pandas.DataFrame
        ``rule``, ``seed``, ``rho``, its ``test_accuracy`` and ``lost``: the points to the ρ that is best in the mean
        over seeds, on the same seed.
    """
    msam, sam = part(table, "MSAM"), best(part(table, "SAM"))
    accuracy = msam.pivot_table(index="seed", columns="rho", values="test_accuracy")
    losses, rises = (msam.pivot(index="seed", columns="rho", values=name) for name in ("train_loss", "rise"))
    held = validation.pivot_table(index="seed", columns="rho", values="test_accuracy")
    goal = sam.set_index("seed")["rise"]
    tenfold = np.abs(np.log(accuracy.columns.to_numpy(dtype=np.float64) / (10 * sam["rho"].iloc[0])))
    rows: list[dict[str, Any]] = []
    for seed in accuracy.index:
        chosen = {
            "held out": held.loc[seed].idxmax(),
            "held out, all seeds": held.mean().idxmax(),
            "rise": _least((rises.loc[seed] - goal[seed]).abs()),
            "tenfold": accuracy.columns[int(tenfold.argmin())],
            "train loss": _least(losses.loc[seed]),
        }
        others = accuracy.drop(index=seed)
        if len(others):
            chosen["other seeds"] = others.mean().idxmax()
        for rule in (rule for rule in RULES if rule in chosen):
            rho, best_rho = float(chosen[rule]), accuracy.mean().idxmax()
            reached = math.nan if math.isnan(rho) else float(accuracy.loc[seed, rho])
            lost = 100 * (float(accuracy.loc[seed, best_rho]) - reached)
            rows.append({"rule": rule, "seed": seed, "rho": rho, "test_accuracy": reached, "lost": lost})
    found: pd.DataFrame = pd.DataFrame(rows)
    return found


def _least(values: pd.Series[float]) -> float:
    """Return where values are least; NaN where none is known."""
    known = values.dropna()
    return float(known.index[int(known.to_numpy().argmin())]) if len(known) else math.nan


def _loses_little(rule: str) -> PaperClaim:
    def compare(found: pd.DataFrame) -> list[Comparison]:
        lost = found.loc[found["rule"] == rule, "lost"].to_numpy(dtype=np.float64)
        return [Comparison("MSAM, lost", mean_interval(lost), "points", above=-math.inf, below=SAME_ACCURACY)]

    return PaperClaim(
        "A15",
        f"Readers' question, not in the paper: MSAM's ρ is within a point of the best when chosen by: {RULES[rule]}.",
        "asked by readers",
        compare,
        note="Test accuracy lost to the ρ with the best mean over seeds.",
        control=True,
    )


CHOICES = tuple(_loses_little(rule) for rule in ("held out", "held out, all seeds", "rise", "tenfold"))


def rules(evidence: Evidence) -> Finding:
    """Return what the rules to choose ρ find."""
    problem, seeds = evidence.problem, evidence.seeds
    watched = [run for run in rule_runs(problem, seeds) if run.workload.name == problem.name]
    table = strength_table(evidence.of(watched))
    validation = outcomes(evidence.of(held_out_runs(problem, seeds)))
    found = rule_table(table, validation)
    curves = pd.concat(
        [
            part(table, "MSAM").assign(optimizer="test set"),
            validation[["seed", "rho", "test_accuracy"]].assign(optimizer="held out, labels as given"),
        ]
    )
    panels = [
        Sweep(curves, "rho", "test_accuracy", r"$\rho$ of MSAM", "accuracy (%)", percent=True),
        Sweep(table, "rho", "rise", r"$\rho$", r"mean rise $L(w+\varepsilon) - L(w)$", log_y=True),
    ]
    percent = found.assign(test_accuracy=100 * found["test_accuracy"])
    shown = summarise(percent, ["rule"], ["rho", "test_accuracy", "lost"]).drop(columns="count")
    return Finding(
        lambda: pictures.sweep(panels),
        found,
        [claim.judge(found) for claim in CHOICES],
        shown.assign(rule=shown["rule"].map(RULES)),
        "A rule must not look at the test set. The first two train on four fifths of the samples and ask the last "
        "fifth, with its labels as given: where some are wrong, they are as often so there. The rise and the factor of "
        "ten need no labels, but SAM's best ρ. That of the other seeds is what luck with the seeds leaves to gain or "
        "lose; the last is what the training loss would choose.",
    )


STRENGTHS: tuple[Exhibit, ...] = (
    Exhibit(
        ("F2AB", "A15"),
        "strength",
        "Accuracy against the strength",
        "Test and train accuracy against ρ, negative on the left. Mean and 68 % interval over seeds.",
        strength_runs,
        strength,
        claims=STRENGTH,
    ),
    Exhibit(
        ("A1",),
        "normalisation",
        "From MSAM to NAG",
        "MSAM, MSAM without the normalisation, and that times the learning rate, which is NAG's displacement.",
        step_runs,
        steps,
        claims=STEPS,
    ),
)

RULE = Exhibit(
    (),
    "choosing_rho",
    "How to choose ρ",
    "Left: MSAM's test accuracy, and that on a fifth of the training samples held out. Right: mean loss rise, which "
    "tells the ρ of SAM and of MSAM that climb alike.",
    rule_runs,
    rules,
    claims=CHOICES,
)
"""For readers: part of no figure of the paper."""
