"""Variants and other directions: tables against runs, verdicts on tables whose answer is known."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from msam import Perturbation, normalization_layers
from msam_analysis.studies.exhibits import strengths
from msam_analysis.studies.exhibits.base import Exhibit, find
from msam_analysis.studies.exhibits.strengths import KINDS, VARIANTS
from msam_analysis.studies.measuring import scores
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import train

from .finished import finished_of, judged
from .toy import TOY

HOLDS, FAILS = "holds", "does not hold"
VARIANT, OTHER = strengths.VARIANT.claims, strengths.OTHER.claims
Finished = dict[str, FinishedRun]


@pytest.fixture(scope="module")
def finished() -> Finished:
    return finished_of(TOY, 2, VARIANTS)


def table_of(exhibit: Exhibit, finished: Finished) -> pd.DataFrame:
    table: pd.DataFrame = exhibit.table(exhibit.evidence(TOY, 2, finished))
    return table


# --- tables against runs


@pytest.mark.parametrize("exhibit", VARIANTS, ids=lambda exhibit: exhibit.name)
def test_findings_are_whole(exhibit: Exhibit, finished: Finished) -> None:
    finding = find(exhibit, TOY, 2, finished)
    assert len(finding.claims) == len(exhibit.claims)
    assert finding.table is not None
    assert finding.shown is not None
    assert finding.table.notna().all(axis=None)
    assert finding.draw is not None
    assert all(ax.has_data() for ax in finding.draw())
    plt.close("all")


def test_every_variant_of_both_families_is_there(finished: Finished) -> None:
    table = table_of(strengths.VARIANT, finished)
    kinds = list(dict.fromkeys(zip(table["optimizer"], table["variant"], strict=True)))
    assert kinds == [("SGD", ""), *((family, name) for family in ("SAM", "MSAM") for name in KINDS)]


@pytest.mark.parametrize(
    ("family", "name", "switches"),
    [
        ("SAM", "adaptive", {"direction": "gradient", "scale": "adaptive"}),
        ("MSAM", "relative", {"direction": "momentum", "scale": "relative"}),
        ("MSAM", "normalisation layers", {"direction": "momentum", "subset": normalization_layers(TOY.network())}),
    ],
)
def test_a_row_trained_again(family: str, name: str, switches: dict[str, str], finished: Finished) -> None:
    table = table_of(strengths.VARIANT, finished)
    row = table[(table["optimizer"] == family) & (table["variant"] == name) & (table["seed"] == 1)].iloc[-1]
    perturbation = Perturbation(rho=row["rho"], **switches)  # type: ignore[arg-type]  # words of the table
    workload = dataclasses.replace(TOY, perturbations={family: perturbation})
    reached = scores(workload, train(workload, family, 1, every=None).model)
    assert {key: row[key] for key in reached} == pytest.approx(reached)


def test_other_directions_are_told_apart(finished: Finished) -> None:
    table = table_of(strengths.OTHER, finished)
    others = table[~table["optimizer"].isin(("SGD", "MSAM"))]
    assert set(zip(others["kind"], others["scale"], strict=True)) == {
        (kind, scale) for kind in ("random", "+ last gradient", "− last gradient") for scale in ("absolute", "relative")
    }
    row = others[(others["kind"] == "− last gradient") & (others["scale"] == "relative")].iloc[-1]
    perturbation = Perturbation(direction="last_gradient", sign=-1, scale="relative", rho=row["rho"])
    workload = dataclasses.replace(TOY, perturbations={"last gradient": perturbation})
    reached = scores(workload, train(workload, "last gradient", int(row["seed"]), every=None).model)
    assert {key: row[key] for key in reached} == pytest.approx(reached)


def test_the_subset_is_one_value_and_draws_from_no_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    one, two = strengths.normalization_subset(TOY), strengths.normalization_subset(TOY)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    assert one == two
    assert one.names == {"2.weight", "2.bias"}, "the BatchNorm layer of the toy"
    assert one.parameters == (), "no network of one seed is carried into the others"


# --- verdicts on tables whose answer is known

World = Callable[[pd.DataFrame], pd.DataFrame]
GAINS = {"vanilla": 0.05, "adaptive": 0.06, "relative": 0.052, "normalisation layers": 0.055}


def variant_world() -> pd.DataFrame:
    """Return a table in which every variant helps SAM and MSAM alike, best at ρ = 1."""
    rows = []
    for seed in range(3):
        luck = 0.03 * math.sin(1 + 5 * seed)
        plain: dict[str, object] = {"optimizer": "SGD", "variant": "", "seed": seed, "rho": 0.0}
        rows.append(plain | {"test_accuracy": 0.8 + luck})
        for family in ("SAM", "MSAM"):
            for name, gain in GAINS.items():
                for rho in (0.1, 1.0, 10.0):
                    own = 0.0005 * math.sin(3 * seed + 40 * rho + gain * 1000)
                    accuracy = 0.8 + luck + gain - 0.02 * abs(math.log10(rho)) + own
                    common: dict[str, object] = {"optimizer": family, "variant": name, "seed": seed, "rho": rho}
                    rows.append(common | {"test_accuracy": accuracy})
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


OTHER_GAINS = {"MSAM": 0.05, "random": 0.02, "+ last gradient": 0.01, "− last gradient": 0.0}


def other_world() -> pd.DataFrame:
    """Return a table in which MSAM is the best and noise helps."""
    rows = []
    for seed in range(3):
        luck = 0.03 * math.sin(1 + 5 * seed)
        common = {"seed": seed, "scale": "absolute"}
        rows.append({"optimizer": "SGD", "kind": "SGD", "rho": 0.0, "test_accuracy": 0.8 + luck, **common})
        for kind, gain in OTHER_GAINS.items():
            for scale in ("absolute", "relative")[: 1 if kind == "MSAM" else 2]:
                for rho in (0.1, 1.0):
                    own = 0.0005 * math.sin(3 * seed + 40 * rho + gain * 1000)
                    accuracy = 0.8 + luck + gain * (1 if rho == 1.0 else 0.5) + own
                    optimizer = "last gradient" if "last" in kind else kind
                    row = {"optimizer": optimizer, "kind": kind, "seed": seed, "scale": scale, "rho": rho}
                    rows.append(row | {"test_accuracy": accuracy})
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


def change(value: float, **where: str) -> World:
    def changed(frame: pd.DataFrame) -> pd.DataFrame:
        chosen = pd.Series(True, index=frame.index)
        for name, wanted in where.items():
            chosen &= frame[name] == wanted
        assert chosen.any()
        other: pd.DataFrame = frame.assign(test_accuracy=frame["test_accuracy"] + value * chosen)
        return other

    return changed


VARIANT_FLIPS: list[tuple[str, World]] = [
    *(
        ("better than SGD", change(-0.1, optimizer=family, variant=name))
        for family in ("SAM", "MSAM")
        for name in KINDS
    ),
    *(("carry over", change(-0.03, optimizer="MSAM", variant=name)) for name in KINDS[1:]),
    ("carry over", change(0.03, optimizer="MSAM", variant="vanilla")),
]
OTHER_FLIPS: list[tuple[str, World]] = [
    *(
        ("as good as MSAM", change(0.1, kind=kind, scale=scale))
        for kind in ("random", "+ last gradient", "− last gradient")
        for scale in ("absolute", "relative")
    ),
    ("better than none", change(-0.1, kind="random", scale="absolute")),
    ("better than none", change(-0.1, kind="random", scale="relative")),
]


def test_claims_hold_where_they_should() -> None:
    assert [claim.judge(variant_world()).verdict for claim in VARIANT] == [HOLDS] * len(VARIANT)
    assert [claim.judge(other_world()).verdict for claim in OTHER] == [HOLDS] * len(OTHER)


@pytest.mark.parametrize(("words", "flip"), VARIANT_FLIPS)
def test_claims_about_variants_flip(words: str, flip: World) -> None:
    assert judged(VARIANT, words, flip(variant_world())).verdict == FAILS


@pytest.mark.parametrize(("words", "flip"), OTHER_FLIPS)
def test_claims_about_other_directions_flip(words: str, flip: World) -> None:
    assert judged(OTHER, words, flip(other_world())).verdict == FAILS


def test_controls_are_marked() -> None:
    assert all(claim.control == ("not in the paper" in claim.sentence) for claim in (*VARIANT, *OTHER))
