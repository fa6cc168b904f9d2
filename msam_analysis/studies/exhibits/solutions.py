"""The networks that are found: the rank of their features, and their accuracy on disturbed inputs."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import pandas as pd

from msam_analysis.measures.features import FeatureRank
from msam_analysis.measures.robustness import RobustAccuracy
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import FAR, Comparison, PaperClaim, difference, ratio
from msam_analysis.studies.exhibits.base import Evidence, Exhibit, Finding
from msam_analysis.studies.exhibits.wanted import each
from msam_analysis.studies.measuring import DISTURBANCES
from msam_analysis.studies.pictures import Sweep
from msam_analysis.studies.runs import Run
from msam_analysis.studies.workloads import Workload

# ------------------------------------------------------------------------------------------------ A6r, rank of features


def _rank_runs(problem: Workload, seeds: int) -> list[Run]:
    return each(problem, problem.perturbations, seeds, measured=("features",))


def _rank_study(evidence: Evidence) -> Finding:
    rows = []
    for run in evidence.of(_rank_runs(evidence.problem, evidence.seeds)):
        found = cast(FeatureRank, run.results["features"])
        names = ("rank", "threshold", "effective_rank", "stable_rank", "numerical_rank", "samples", "dimension")
        rows.append({"optimizer": run.optimizer, "seed": run.seed, **{name: getattr(found, name) for name in names}})
    table: pd.DataFrame = pd.DataFrame(rows)
    dimension, samples = int(table["dimension"].iloc[0]), int(table["samples"].iloc[0])
    quantities = {
        "rank": f"components for {table['threshold'].iloc[0]:.0%} of the variance",
        "effective_rank": "effective rank",
        "stable_rank": "stable rank",
    }
    drawn = table.assign(features=f"of {dimension}")
    return Finding(
        lambda: pictures.by_group(drawn, quantities, "features"),
        table=table,
        claims=[claim.judge(table) for claim in _A6R],
        note=f"Features of the last block before pooling, {dimension} numbers of each of {samples:,} training samples.",
    )


_A6R = (
    PaperClaim(
        "A6r",
        "The rank of the last block's features falls from SGD over SAM to MSAM.",
        "5019 > 4775 > 3791",
        lambda table: [ratio(table, "rank", "SGD", "SAM"), ratio(table, "rank", "SAM", "MSAM")],
        note="Fewest principal components that explain 99 % of the variance.",
    ),
)

RANK = Exhibit(
    ("A6r",),
    "feature_rank",
    "The rank of the features",
    "In how many directions the last block's features vary over the training set, by three definitions of rank.",
    _rank_runs,
    _rank_study,
    claims=_A6R,
)

# ------------------------------------------------------------------------------------------------ TA4, disturbed inputs


def _robust_runs(problem: Workload, seeds: int) -> list[Run]:
    return each(problem, problem.perturbations, seeds, measured=("robustness",))


def _robust_study(evidence: Evidence) -> Finding:
    rows = []
    for run in evidence.of(_robust_runs(evidence.problem, evidence.seeds)):
        for attack, shares in DISTURBANCES.items():
            found = cast(RobustAccuracy, run.results[f"robustness-{attack}"])
            for share, accuracy in zip((0.0, *shares), [found.clean, *found.accuracies.tolist()], strict=True):
                rows.append(
                    {
                        "optimizer": run.optimizer,
                        "seed": run.seed,
                        "attack": attack,
                        "share": share,
                        "test_accuracy": 100 * accuracy,
                    }
                )
    table: pd.DataFrame = pd.DataFrame(rows)
    panels = {_title(attack): _against_size(table, attack) for attack in DISTURBANCES}
    return Finding(
        lambda: pictures.sweep(panels, columns=len(panels), share_y=True),
        table=table,
        claims=[claim.judge(table) for claim in _TA4],
        note="Sizes are shares of the range of the training pixels: σ of Gaussian noise, ε of the largest change of a "
        "pixel. The fewer pixels an image has, the less the same ε does; the paper's have 32×32. PGD and APGD make ten "
        "steps each.",
    )


def _title(attack: str) -> str:
    return "noise" if attack == "noise" else attack.upper()


def _against_size(table: pd.DataFrame, attack: str) -> Sweep:
    mine = table[table["attack"] == attack]
    x, label, factor = ("sigma", r"$\sigma$", 1) if attack == "noise" else ("epsilon", r"255 $\epsilon$", 255)
    return Sweep(mine.assign(**{x: factor * mine["share"]}), x, "test_accuracy", label, "test accuracy (%)", log=False)


def _words(attack: str, share: float) -> str:
    return f"{_title(attack)} at " + (f"σ = {share:g}" if attack == "noise" else f"ε = {255 * share:.0f}/255")


def _at(table: pd.DataFrame, attack: str, share: float) -> pd.DataFrame:
    part: pd.DataFrame = table[(table["attack"] == attack) & np.isclose(table["share"], share)]
    return part


def _above_sgd(table: pd.DataFrame, place: int, by: float) -> list[Comparison]:
    """Compare MSAM and SAM with SGD, under every disturbance of one size."""
    found = []
    for name in ("MSAM", "SAM"):
        for attack, shares in DISTURBANCES.items():
            gain = difference(_at(table, attack, shares[place]), "test_accuracy", name, "SGD", unit="points")
            label = f"{gain.label} ({_words(attack, shares[place])}), gain"
            found.append(dataclasses.replace(gain, label=label, above=by))
    return found


_TA4 = (
    PaperClaim(
        "TA4",
        "Under Gaussian noise, FGSM, PGD and APGD, MSAM and SAM are well above SGD.",
        "noise 26.9 and 25.8 against 22.6 %, PGD 28.9 and 30.2 against 24.1 %, FGSM 35.5 and 35.3 against 31.8 %, "
        "APGD 27.1 and 26.1 against 20.7 %",
        lambda table: _above_sgd(table, 0, by=FAR),
        note=f"σ = 0.1 and ε = 1/255 of the range of the pixels; well above is by more than {FAR:g} points.",
    ),
    PaperClaim(
        "TA4",
        "Control, not in the paper: the order is the same where the attacks are strong.",
        "not tested",
        lambda table: _above_sgd(table, -1, by=0.0),
        note="At the largest disturbances tried. An accuracy that is higher without any disturbance may be higher "
        "under a small one for that reason alone.",
        control=True,
    ),
)

DISTURBED = Exhibit(
    ("TA4",),
    "robustness",
    "Disturbed inputs",
    "Test accuracy with Gaussian noise, and under attacks that know the network.",
    _robust_runs,
    _robust_study,
    claims=_TA4,
)

SOLUTIONS = (RANK, DISTURBED)
