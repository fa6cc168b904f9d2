"""Other hyper-parameters and equal compute: tables against runs, verdicts on tables whose answer is known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from msam_analysis.studies.exhibits import stability
from msam_analysis.studies.exhibits.base import Evidence, Exhibit, find
from msam_analysis.studies.exhibits.stability import COMPUTE, COSINE, GAIN, STABILITY
from msam_analysis.studies.measuring import scores
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import train

from .finished import finished_of, judged
from .toy import STEPS, TOY

HOLDS, FAILS = "holds", "does not hold"
COSINES, GAINS, BUDGETS = COSINE.claims, GAIN.claims, COMPUTE.claims
Finished = dict[str, FinishedRun]


@pytest.fixture(scope="module")
def finished() -> Finished:
    return finished_of(TOY, 2, STABILITY)


def table_of(exhibit: Exhibit, finished: Finished) -> pd.DataFrame:
    table: pd.DataFrame = exhibit.table(exhibit.evidence(TOY, 2, finished))
    return table


# --- tables against runs


@pytest.mark.parametrize("exhibit", STABILITY, ids=lambda exhibit: exhibit.name)
def test_findings_are_whole(exhibit: Exhibit, finished: Finished) -> None:
    finding = find(exhibit, TOY, 2, finished)
    assert len(finding.claims) == len(exhibit.claims)
    assert finding.table is not None
    assert finding.shown is not None
    assert len(finding.shown)
    assert finding.draw is not None
    assert all(ax.has_data() for ax in finding.draw())
    plt.close("all")


def test_what_is_varied() -> None:
    found = stability.values(TOY)
    assert found["lr"][0] == pytest.approx(1e-3 * TOY.recipe.lr)
    assert found["momentum"] == pytest.approx([0.5, 0.8, 0.9, 0.95])
    assert found["batch_size"] == [8, 16, 32, 64]
    for name, column in found.items():
        assert getattr(TOY.recipe, name) in column, "the recipe's own run is in every sweep"
        assert column == sorted(column)


@pytest.mark.parametrize(("setting", "value"), [("lr", 0.01), ("momentum", 0.5), ("batch_size", 8)])
@pytest.mark.parametrize("replacement", [False, True])
def test_the_cosine_of_a_run_made_again(setting: str, value: Any, replacement: bool, finished: Finished) -> None:
    table = table_of(COSINE, finished)
    rows = table[(table["setting"] == setting) & (table["value"] == value) & (table["replacement"] == replacement)]
    assert list(rows["seed"]) == [0, 1]
    # Half the batch size, half the epochs: as many steps.
    epochs = TOY.recipe.epochs // (2 if setting == "batch_size" else 1)
    workload = dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, epochs=epochs, **{setting: value}))
    cosines = train(workload, "SGD", 1, every=None, replacement=replacement).steps["cosine"].to_numpy()
    expected = np.nanmean(cosines[len(cosines) // 4 : math.ceil(3 * len(cosines) / 4)])
    assert rows["cosine"].iloc[1] == pytest.approx(expected)


def test_the_middle_of_training() -> None:
    steps = pd.DataFrame({"cosine": [math.nan, 9.0, 9.0, 0.0, 2.0, 3.0, 4.0, 5.0, 10.0, 9.0, 9.0, 9.0]})
    assert stability.mid_training(steps) == 4.0


def test_a_run_that_diverged_has_no_cosine(finished: Finished) -> None:
    runs = COSINE.evidence(TOY, 2, finished).runs
    last = runs[-1].steps
    records = ["train_batch_loss", "cosine"]
    broken = dataclasses.replace(runs[-1], steps=last.assign(**last[records].where(last["step"] < len(last) - 1)))
    table = COSINE.table(Evidence(TOY, 2, {"": [*runs[:-1], broken]}))
    assert table["cosine"].isna().sum() == 1, "though the middle of training is there"
    assert [claim.judge(table).verdict for claim in COSINES[-2:]][1] != HOLDS


def test_every_setting_has_the_recipe_s_own_run(finished: Finished) -> None:
    table = table_of(GAIN, finished)
    own = [
        table[(table["setting"] == name) & (table["value"] == getattr(TOY.recipe, name))] for name in ("lr", "momentum")
    ]
    assert own[0]["test_accuracy"].tolist() == own[1]["test_accuracy"].tolist()
    assert not table.duplicated(["optimizer", "seed", "setting", "value"]).any()
    reached = scores(TOY, train(TOY, "MSAM", 1, every=None).model)
    row = own[0][(own[0]["optimizer"] == "MSAM") & (own[0]["seed"] == 1)].iloc[0]
    assert row["test_accuracy"] == pytest.approx(reached["test_accuracy"])


@pytest.mark.parametrize(
    ("epochs", "expected"), [(40, [10, 20, 40, 80]), (10, [2, 4, 10, 20]), (6, [2, 4, 6, 12]), (30, [8, 16, 30, 60])]
)
def test_every_budget_is_compared(epochs: int, expected: list[int]) -> None:
    """SAM's half of it is whole, so that none is dropped for want of a partner."""
    workload = dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, epochs=epochs))
    spent: dict[str, set[int]] = {}
    for run in COMPUTE.runs(workload, 1):
        cost = 2 if run.optimizer == "SAM" else 1
        spent.setdefault(run.optimizer, set()).add(cost * run.workload.recipe.epochs)
    assert spent == {name: set(expected) for name in ("SGD", "MSAM", "SAM")}


def test_budgets_are_gradients(finished: Finished) -> None:
    runs = COMPUTE.evidence(TOY, 2, finished).runs
    table = table_of(COMPUTE, finished)
    for run, budget, short in zip(runs, table["budget"], table["short"], strict=True):
        epochs = len(run.steps) // (STEPS // TOY.recipe.epochs)
        assert budget == epochs * (2 if run.optimizer == "SAM" else 1)
        assert short == (budget < TOY.recipe.epochs)
    assert set(table.loc[table["optimizer"] == "SAM", "budget"]) == set(
        table.loc[table["optimizer"] == "MSAM", "budget"]
    )


# --- verdicts on tables whose answer is known

World = Callable[[pd.DataFrame], pd.DataFrame]


def cosine_world() -> pd.DataFrame:
    """Return a table in which the cosine is what the paper says, in both kinds of batches."""
    slopes = {"lr": (0.001, 0.01, 0.1), "momentum": (0.5, 0.9, 0.95), "batch_size": (32.0, 64.0, 128.0)}
    rows = []
    for name, column in slopes.items():
        for place, value in enumerate(column):
            for seed in range(3):
                own = 0.002 * math.sin(seed + 10 * value)
                cosine = {"lr": -0.1, "momentum": 0.1 * place - 0.4, "batch_size": -0.1 * place - 0.1}[name] + own
                row = {"setting": name, "value": value, "seed": seed, "cosine": cosine}
                rows += [row | {"replacement": replacement} for replacement in (False, True)]
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


def gain_world() -> pd.DataFrame:
    rows = [
        {"setting": name, "value": value, "seed": seed, "optimizer": optimizer, "test_accuracy": accuracy + seed / 100}
        | {"near": value > 0.001}
        for name, column in {"lr": (0.001, 0.01, 0.1), "momentum": (0.5, 0.9)}.items()
        for value in column
        for seed in range(3)
        for optimizer, accuracy in (("SGD", 0.8), ("MSAM", 0.85 + 0.001 * math.sin(seed + value)))
    ]
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


def budget_world() -> pd.DataFrame:
    """Return a table in which MSAM is ahead for budgets below 40, and as good from there."""
    rows = []
    for budget in (10, 20, 40, 80):
        for seed in range(3):
            own = 0.001 * math.sin(seed + budget)
            ahead = 0.03 if budget < 40 else 0.002
            common = {"budget": budget, "short": budget < 40, "seed": seed}
            rows += [
                {"optimizer": "SAM", "test_accuracy": 0.8 + seed / 100, **common},
                {"optimizer": "MSAM", "test_accuracy": 0.8 + seed / 100 + ahead + own, **common},
            ]
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


def change(column: str, amount: float, /, **where: Any) -> World:
    def changed(frame: pd.DataFrame) -> pd.DataFrame:
        chosen = pd.Series(True, index=frame.index)
        for name, wanted in where.items():
            chosen &= frame[name] == wanted
        assert chosen.any()
        other: pd.DataFrame = frame.assign(**{column: frame[column] + amount * chosen})
        return other

    return changed


def cosine_flips(replacement: bool) -> list[tuple[str, World]]:
    common = {"replacement": replacement}
    return [
        ("small learning rates", change("cosine", 0.3, setting="lr", value=0.001, **common)),
        ("small learning rates", change("cosine", 0.3, setting="lr", value=0.01, **common)),
        ("smaller μ overshoots", change("cosine", 0.5, setting="momentum", value=0.5, **common)),
        ("arger batches", change("cosine", 0.5, setting="batch_size", value=128.0, **common)),
    ]


@pytest.mark.parametrize(
    ("claims", "table"), [(COSINES, cosine_world()), (GAINS, gain_world()), (BUDGETS, budget_world())]
)
def test_claims_hold_where_they_should(claims: Any, table: pd.DataFrame) -> None:
    assert [claim.judge(table).verdict for claim in claims] == [HOLDS] * len(claims)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("index", range(4))
def test_claims_about_the_cosine_flip(replacement: bool, index: int) -> None:
    """Each by its own kind of batches, and by no other."""
    words, flip = cosine_flips(replacement)[index]
    claims = [claim for claim in COSINES if words in claim.sentence]
    verdicts = {claim.control: claim.judge(flip(cosine_world())).verdict for claim in claims}
    assert verdicts == {replacement: FAILS, not replacement: HOLDS}


@pytest.mark.parametrize(("setting", "value"), [("lr", 0.01), ("lr", 0.1), ("momentum", 0.5)])
def test_the_gain_must_hold_everywhere(setting: str, value: float) -> None:
    flip = change("test_accuracy", -0.1, setting=setting, value=value, optimizer="MSAM")
    assert [claim.judge(flip(gain_world())).verdict for claim in GAINS] == [FAILS, HOLDS]


def test_the_gain_far_away_is_a_matter_of_its_own() -> None:
    flip = change("test_accuracy", -0.1, setting="lr", value=0.001, optimizer="MSAM")
    assert [claim.judge(flip(gain_world())).verdict for claim in GAINS] == [HOLDS, FAILS]


def test_what_is_near(finished: Finished) -> None:
    table = table_of(GAIN, finished)
    rates = table[table["setting"] == "lr"]
    assert sorted(set(rates.loc[rates["near"], "value"])) == pytest.approx([0.01, 0.0316, 0.1, 0.316])
    assert table.loc[table["setting"] == "momentum", "near"].all()


@pytest.mark.parametrize(
    ("words", "flip"),
    [
        ("short budgets", change("test_accuracy", -0.1, optimizer="MSAM", budget=10)),
        ("short budgets", change("test_accuracy", -0.1, optimizer="MSAM", budget=20)),
        ("long ones", change("test_accuracy", 0.1, optimizer="MSAM", budget=40)),
        ("long ones", change("test_accuracy", -0.1, optimizer="MSAM", budget=80)),
    ],
)
def test_claims_about_budgets_flip(words: str, flip: World) -> None:
    assert judged(BUDGETS, words, flip(budget_world())).verdict == FAILS
