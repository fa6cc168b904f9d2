"""Accuracy against the strength ρ: both signs, the way from MSAM to NAG, variants, and other directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from msam import NamedSubset, Perturbation, normalization_layers
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.results.statistics import summarise
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import NEGATIVE, SAME, SAME_ACCURACY, Comparison, by_seed, compared, times
from msam_analysis.studies.exhibits.base import Evidence, Exhibit
from msam_analysis.studies.exhibits.grids import ACCURACIES, against, best, best_of_each, gains, paired, plateau
from msam_analysis.studies.exhibits.wanted import base, grid, plain, scaled
from msam_analysis.studies.runs import Run, variant
from msam_analysis.studies.tables import FinishedRun, as_table, mean_of, of_training, outcomes, rows
from msam_analysis.studies.workloads import Workload

# Grids of ρ, in sixths of a decade around the workload's own.
POSITIVE = (-9, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6)
_NEGATIVE = (-6, -4, -3, -2, 0)
# NAG's ρ is a factor of the step, and its displacement far shorter than MSAM's: the grid goes to longer ones.
_NAG_POSITIVE = (0, 3, 6, 8, 9, 10, 11, 12, 15)
_NAG_NEGATIVE = (0, 3, 6, 10)
_UNNORMALISED = (0, 3, 6, 8, 9, 10, 11, 12)
_HALF_DECADES = (-6, -3, 0, 3, 6)
_COARSE = (-6, -3, 0, 3)
# T² d / ‖T d‖ is about as long as a typical weight, and normalisation layers have few: both grids go further up.
_LONGER = (0, 3, 4, 6, 9)
# A random direction hardly has a component along which the loss is steep: the same rise takes a longer step.
_NOISE = (0, 3, 6, 9)

GAIN = 2.0
"""The paper's gain of a positive ρ, in points of test accuracy."""
DECADES = 0.5
"""Width of the range of ρ within a point of the best, in decades, from which on ρ is called forgiving."""

_FAMILIES = ("SAM", "MSAM")
_SGD, _MSAM = {"optimizer": "SGD"}, {"optimizer": "MSAM"}
_POSITIVE = {name: {"optimizer": name, "sign": 1} for name in _FAMILIES}
_SCORES = ["train_accuracy", "test_accuracy", "train_loss", "test_loss"]
_RHO = r"$\rho$"


# F2AB and A15: both signs
def strength_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SGD, and SAM, MSAM and NAG's displacement −ρ η v on grids of ρ with both signs."""
    runs = plain(workload, seeds)
    for name in _FAMILIES:
        runs += grid(workload, name, POSITIVE, seeds, watched=("rise",))
        runs += grid(workload, name, _NEGATIVE, seeds, sign=-1)
    runs += grid(workload, "NAG", _NAG_POSITIVE, seeds)
    return runs + grid(workload, "NAG", _NAG_NEGATIVE, seeds, sign=-1)


def _table(runs: Sequence[FinishedRun], *columns: str) -> pd.DataFrame:
    return as_table(outcomes(runs)[["optimizer", "seed", "rho", "sign", *columns, *_SCORES]])


def strength_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Return one row per run: ρ and its sign, accuracies, losses, and the mean rise L(w + ε) − L(w) where recorded."""
    rises = [of_training(run.steps, mean_of("rise")) if "rise" in run.steps else math.nan for run in runs]
    return as_table(_table(runs, "normalize").assign(rise=rises))


def part(table: pd.DataFrame, optimizer: str, sign: int = 1) -> pd.DataFrame:
    """Return an optimizer's rows with one sign of ρ."""
    return rows(table, optimizer=optimizer, sign=sign)


def _negative(table: pd.DataFrame) -> list[Comparison]:
    tried = [(name, *both) for name in _FAMILIES for both in part(table, name, -1).groupby("rho")]
    sgd = part(table, "SGD")
    return [paired(f"{name} at ρ = −{rho:g}, gain over SGD", own, sgd, **NEGATIVE) for name, rho, own in tried]


def _faster(label: str, other: pd.DataFrame, table: pd.DataFrame) -> Comparison:
    return times(label, by_seed(table, "train_loss", optimizer="SGD"), by_seed(other, "train_loss"))


def _nesterov(table: pd.DataFrame) -> list[Comparison]:
    own = {"optimizer": "NAG", "sign": 1, "rho": part(table, "NAG")["rho"].min()}
    better = gains([("best MSAM − NAG at ρ = μ, test accuracy", _POSITIVE["MSAM"], own)], above=GAIN)
    return [_faster("train loss of SGD / of NAG at ρ = μ", rows(table, **own), table), *better(table)]


def _ranges(table: pd.DataFrame) -> Iterator[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Yield SAM's and MSAM's names, and the ends of the range of positive ρ within a point of each seed's best."""
    for name in _FAMILIES:
        seeds = part(table, name).sort_values("rho").groupby("seed")
        ends = [plateau(own["rho"], own["test_accuracy"], SAME_ACCURACY / 100) for _, own in seeds]
        yield name, *np.array(ends).T


def _tenfold(table: pd.DataFrame) -> list[Comparison]:
    sam, msam = (np.log(low * high) / 2 for _, low, high in _ranges(table))
    return [compared("MSAM / SAM, best ρ", msam - sam, factor=True, above=math.log(5), below=math.log(20))]


def _best_strengths(table: pd.DataFrame) -> pd.DataFrame:
    shown = best_of_each(table, "optimizer", "sign").drop(columns="tried")
    keys = zip(shown["optimizer"], shown["sign"], strict=True)
    return as_table(shown.assign(within_a_point=[_range_in_words(part(table, *key)) for key in keys]))


def _range_in_words(tried: pd.DataFrame) -> str:
    means = summarise(tried, ["rho"], "test_accuracy").sort_values("rho")
    if len(means) == 1:
        return "–"
    return "{:.2g} to {:.2g}".format(*plateau(means["rho"], means["test_accuracy"], SAME_ACCURACY / 100))


STRENGTH = Exhibit(
    "strength",
    wants=strength_runs,
    table=lambda evidence: strength_table(evidence.runs),
    draw=lambda table, _: pictures.both_signs(table, ACCURACIES),
    shown=_best_strengths,
    comparisons={
        "gains": gains(
            [(f"{name} at its best ρ − SGD, test accuracy", own, _SGD) for name, own in _POSITIVE.items()], above=GAIN
        ),
        "costs": gains(
            [(f"SGD − {name} at its best ρ, train accuracy", _SGD, own) for name, own in _POSITIVE.items()],
            "train_accuracy",
        ),
        "negative": _negative,
        "nesterov": _nesterov,
        "tenfold": _tenfold,
        "forgiving": lambda table: [
            compared(f"{name}, range of ρ", np.log10(high / low), unit="decades", above=DECADES)
            for name, low, high in _ranges(table)
        ],
    },
)

# A1: from MSAM to NAG
_STEPS = {"l2": "−ρ v/‖v‖", "none": "−ρ v", "lr": "−ρ η v"}
_NORMALISED, _FREE, _TIED = ({"step": step} for step in _STEPS.values())


def step_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return the runs of −ρ v/‖v‖, −ρ v and −ρ η v, with positive ρ; the first and the last are those of F2AB."""
    # At the peak learning rate as long as Nesterov's.
    rho = scaled(base(workload, "NAG").rho, 0) * workload.recipe.lr
    unnormalised = variant(workload, "MSAM", Perturbation(direction="momentum", normalize="none", rho=rho))
    runs = plain(workload, seeds) + grid(workload, "MSAM", POSITIVE, seeds)
    runs += grid(unnormalised, "MSAM", _UNNORMALISED, seeds)
    return runs + grid(workload, "NAG", _NAG_POSITIVE, seeds)


def _step_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per run; ``step`` is the displacement, ``SGD`` for none."""
    table = _table(evidence.runs, "normalize")
    return as_table(table.assign(step=table["normalize"].map(_STEPS).where(table["optimizer"] != "SGD", "SGD")))


def _draw_steps(table: pd.DataFrame, _: Evidence) -> Any:
    drawn = table.assign(optimizer=table["step"])
    losses = against(drawn, "rho", _RHO, {"train_loss": "train loss"}, log_y=True)
    return pictures.sweep([*against(drawn, "rho", _RHO, ACCURACIES), *losses])


def _loses(table: pd.DataFrame) -> list[Comparison]:
    tied = rows(table, **_TIED)
    lowest = best(tied.assign(negative=-tied["train_loss"]), y="negative")
    worse = gains([("−ρ v − (−ρ η v), best test accuracy", _FREE, _TIED)], above=SAME_ACCURACY)
    return [*worse(table), _faster("train loss of SGD / lowest of −ρ η v", lowest, table)]


NORMALISATION = Exhibit(
    "normalisation",
    wants=step_runs,
    table=_step_table,
    draw=_draw_steps,
    shown=lambda table: best_of_each(table, "step"),
    comparisons={
        "shifts": gains([("−ρ v − MSAM, best test accuracy", _FREE, _NORMALISED)], **SAME),
        "loses": _loses,
    },
)

# T3 and A9: variants and other directions
KINDS = ("vanilla", "adaptive", "relative", "normalisation layers")
"""The variants."""
_VARIED = [{"optimizer": family, "variant": name} for family in _FAMILIES for name in KINDS]
_OTHERS = {
    f"{kind}, {scale}": {"kind": kind, "scale": scale}
    for scale in ("absolute", "relative")
    for kind in ("random", "+ last gradient", "− last gradient")
}


def normalization_subset(workload: Workload) -> NamedSubset:
    """Return the normalisation layers' parameters by name: the same for every seed, and for every process."""
    with RandomStream(0):
        return dataclasses.replace(normalization_layers(workload.network()), parameters=())


def _variant_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return SAM and MSAM as they are, adaptive, relative and of the normalisation layers alone, on grids of ρ."""
    runs, subset = plain(workload, seeds), normalization_subset(workload)
    for name in _FAMILIES:
        runs += grid(workload, name, _HALF_DECADES, seeds)
        runs += grid(workload, name, _LONGER, seeds, scale="adaptive")
        runs += grid(workload, name, _COARSE, seeds, scale="relative")
        runs += grid(workload, name, _LONGER, seeds, subset=subset)
    return runs


def _variant_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per run; ``variant`` is one of :data:`KINDS`, and empty for SGD."""
    table = _table(evidence.runs, "scale", "subset")
    name = table["scale"].replace("none", "vanilla").mask(table["subset"] == "some", "normalisation layers")
    return as_table(table.assign(variant=name.mask(table["optimizer"] == "SGD", "")).drop(columns="subset"))


def _panels(curves: Mapping[str, Sequence[pd.DataFrame]]) -> Any:
    """Draw test accuracy against ρ: the curves of every panel, by its title."""
    accuracy = {"test_accuracy": ACCURACIES["test_accuracy"]}
    panels = {title: against(pd.concat(frames), "rho", _RHO, accuracy)[0] for title, frames in curves.items()}
    return pictures.sweep(panels, share_y=True)


def _draw_variants(table: pd.DataFrame, _: Evidence) -> Any:
    named = table.assign(family=table["optimizer"], optimizer=table["variant"])
    return _panels({name: [rows(table, **_SGD), rows(named, family=name)] for name in _FAMILIES})


def _carries_over(table: pd.DataFrame) -> list[Comparison]:
    def change(family: str, name: str) -> pd.Series[float]:
        to, of = (best(rows(table, optimizer=family, variant=which)) for which in (name, "vanilla"))
        return by_seed(to, "test_accuracy") - by_seed(of, "test_accuracy")

    changes = {name: 100 * (change("MSAM", name) - change("SAM", name)) for name in KINDS[1:]}
    return [
        compared(f"{name}, its change of MSAM − that of SAM", values, unit="points", above=-SAME_ACCURACY)
        for name, values in changes.items()
    ]


VARIANT = Exhibit(
    "variants",
    wants=_variant_runs,
    table=_variant_table,
    draw=_draw_variants,
    shown=lambda table: best_of_each(table, "optimizer", "variant"),
    comparisons={
        "better": gains([(f"{own['optimizer']} {own['variant']} − SGD", own, _SGD) for own in _VARIED]),
        "carry_over": _carries_over,
    },
)


def _other_runs(workload: Workload, seeds: int) -> list[Run]:
    """Return MSAM, and displacements along noise and along the last gradient with both signs, on grids of ρ."""
    runs = plain(workload, seeds) + grid(workload, "MSAM", _HALF_DECADES, seeds)
    for scale in ("none", "relative"):
        noise = Perturbation(direction="random", rho=base(workload, "MSAM").rho, scale=scale)
        last = dataclasses.replace(noise, direction="last_gradient")
        runs += grid(variant(workload, "random", noise), "random", _NOISE, seeds)
        for sign in (1, -1):
            runs += grid(variant(workload, "last gradient", last), "last gradient", _COARSE, seeds, sign=sign)
    return runs


def _other_table(evidence: Evidence) -> pd.DataFrame:
    """Return one row per run; ``kind`` tells the sign, and ``scale`` absolute from relative."""
    table = _table(evidence.runs, "scale")
    signs = table["sign"].map({1: "+ last gradient", -1: "− last gradient"})
    kind = table["optimizer"].mask(table["optimizer"] == "last gradient", signs)
    return as_table(table.assign(kind=kind, scale=table["scale"].replace("none", "absolute")))


def _draw_others(table: pd.DataFrame, _: Evidence) -> Any:
    known = rows(table, optimizer=("SGD", "MSAM"))
    others = table.drop(known.index).assign(optimizer=table["kind"])
    titles = {"absolute": "absolute", "relative": "relative to the weights"}
    return _panels({title: [known, rows(others, scale=scale)] for scale, title in titles.items()})


OTHER = Exhibit(
    "other_directions",
    wants=_other_runs,
    table=_other_table,
    draw=_draw_others,
    shown=lambda table: best_of_each(table, "kind", "scale"),
    comparisons={
        "none_as_good": gains([(f"MSAM − ({name})", _MSAM, other) for name, other in _OTHERS.items()]),
        "noise": gains([(f"({name}) − SGD", _OTHERS[name], _SGD) for name in ("random, absolute", "random, relative")]),
    },
)

STRENGTHS = (STRENGTH, NORMALISATION)
VARIANTS = (VARIANT, OTHER)
