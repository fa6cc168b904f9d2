"""Claims about mechanisms, other models and tasks, and solutions: verdicts on tables whose answer is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from msam import Jump
from msam_analysis.studies.exhibits import Exhibit, mechanisms, models, schematic
from msam_analysis.studies.measuring import DISTURBANCES
from msam_analysis.studies.watching import OFFSETS

EXHIBITS = (
    schematic.SCHEMATIC,
    *mechanisms.MECHANISMS,
    *mechanisms.COSINES,
    *models.MODELS_AND_TASKS,
    *models.SOLUTIONS,
)


# --------------------------------------------------------------------------------------------------------------- F1


def slope(x: float, y: float) -> np.ndarray[Any, Any]:
    valley = y - 0.5 * x**2
    return np.array([-4.0 * x * valley + 0.5 * (x - 0.6), 4.0 * valley])


def test_one_step_of_every_optimizer_by_hand() -> None:
    """The momentum is what led here; every gradient is taken where the equations say, and the step is SGD's."""
    for name in ("SGD", "NAG", "SAM", "MSAM"):
        row = schematic.one_step(name)
        before, at, point, to = (
            np.array([row[f"{key}_x"], row[f"{key}_y"]], dtype=float) for key in ("from", "at", "gradient_at", "to")
        )
        v, g = (before - at) / schematic.LR, slope(*at)
        expected = {
            "SGD": at,
            "NAG": at - schematic.LR * schematic.MOMENTUM * v,
            "SAM": at + 0.45 * g / np.linalg.norm(g),
            "MSAM": at - 0.45 * v / np.linalg.norm(v),
        }[name]
        assert point == pytest.approx(expected), name
        assert to == pytest.approx(at - schematic.LR * (schematic.MOMENTUM * v + slope(*point))), name


def drawn(**changes: dict[str, Any]) -> pd.DataFrame:
    """Return the steps, with switches of some perturbations changed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, switches in changes.items():
            perturbation = schematic.PERTURBATIONS[name]
            assert perturbation is not None
            patch.setitem(schematic.PERTURBATIONS, name, dataclasses.replace(perturbation, **switches))
        steps: pd.DataFrame = pd.DataFrame([schematic.one_step(name) for name in schematic.PERTURBATIONS])
        return steps


LATE = schematic.BEFORE


@pytest.mark.parametrize(
    "changes",
    [
        *({name: {"sign": -1}} for name in ("NAG", "SAM", "MSAM")),
        *({name: {"rho": Jump(0.4, LATE)}} for name in ("NAG", "SAM", "MSAM")),
        {"SAM": {"direction": "momentum"}},
        {"MSAM": {"direction": "gradient"}},
        {"MSAM": {"normalize": "none"}},
        {"NAG": {"normalize": "none"}},
        {"NAG": {"rho": Jump(0.0, LATE)}},
    ],
    ids=str,
)
def test_where_the_gradient_is_taken_is_judged_by_the_steps_drawn(changes: dict[str, dict[str, Any]]) -> None:
    (claim,) = schematic.SCHEMATIC.claims
    assert claim.judge(drawn()).verdict == "holds"
    assert claim.judge(drawn(**changes)).verdict != "holds"
    if "sign" in str(changes):
        assert claim.judge(drawn(**changes)).verdict == "does not hold"


def test_a_gradient_of_sgd_away_from_its_weights() -> None:
    (claim,) = schematic.SCHEMATIC.claims
    steps = drawn()
    moved = steps["gradient_at_x"] + 0.1 * (steps["optimizer"] == "SGD")
    assert claim.judge(steps.assign(gradient_at_x=moved)).verdict == "does not hold"


# -------------------------------------------------------------------------------------------------------- claims


def table(**columns: list[Any]) -> pd.DataFrame:
    """Three seeds, that differ a little, for every value that a row has."""
    frame = pd.DataFrame(columns)
    parts = [frame.assign(seed=seed) for seed in range(3)]
    for seed, part in enumerate(parts):
        for name in part.select_dtypes("float"):
            if name not in ("offset", "share", "best_rho"):
                part[name] += 1e-3 * seed * part[name].abs()
    whole: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return whole


def ranks(sgd: float, sam: float, msam: float) -> pd.DataFrame:
    return table(optimizer=["SGD", "SAM", "MSAM"], rank=[sgd, sam, msam])


def disturbed(sgd: float, other: float) -> pd.DataFrame:
    rows = [
        (name, attack, share, value)
        for name, value in (("SGD", sgd), ("SAM", other), ("MSAM", other))
        for attack, shares in DISTURBANCES.items()
        for share in shares
    ]
    names, attacks, shares, values = (list(column) for column in zip(*rows, strict=True))
    return table(optimizer=names, attack=attacks, share=shares, test_accuracy=values)


def conditions(quantity: str, value: float, schedule: str = "decay") -> pd.DataFrame:
    return table(
        optimizer=["SGD", "MSAM"],
        schedule=[schedule] * 2,
        quantity=[quantity] * 2,
        mean=[value] * 2,
        last_quarter=[value] * 2,
    )


def valley(where: float) -> pd.DataFrame:
    offsets = sorted((*OFFSETS, 0.0))
    parts = [
        table(optimizer=[name] * len(offsets), offset=offsets).assign(
            change=lambda frame: (frame["offset"] - where - 1e-3 * frame["seed"]) ** 2
        )
        for name in ("SGD", "NAG", "SAM", "MSAM")
    ]
    whole: pd.DataFrame = pd.concat(parts)
    return whole


def warmup(late: float, msam: float = 66.0) -> pd.DataFrame:
    return table(
        perturbed=["throughout"] * 3 + ["after warm-up only"] * 2,
        optimizer=["AdamW", "SAM", "MSAM", "SAM", "MSAM"],
        test_accuracy=[60.0, 65.0, msam, 65.5 + late, 66.5 + late],
    )


def other_tasks(loss: float, eigenvalue: float) -> pd.DataFrame:
    return table(
        problem=["text"] * 3,
        optimizer=["AdamW", "SAM", "MSAM"],
        test_loss=[2.0, loss, loss],
        lambda_1=[9.0, eigenvalue, eigenvalue],
    )


def rises(value: float) -> pd.DataFrame:
    return table(optimizer=["SGD"], learning_rate=["η = 0.1"], virtual_rise=[value], small_rise=[value])


def roots(value: float) -> pd.DataFrame:
    frame = pd.concat(
        [
            table(optimizer=["SGD"], rho_0=[value], best_rho=[3.0], finished=[True]).assign(epoch=epoch)
            for epoch in range(9)
        ]
    )
    lost = (frame["epoch"] == 0) & (frame["seed"] == 1)
    whole: pd.DataFrame = frame.assign(rho_0=frame["rho_0"].where(~lost))
    return whole


def cosine_rows(negative: float, after: float) -> pd.DataFrame:
    return table(problem=["toy", "text"], optimizer=["SGD"] * 2, negative=[negative] * 2, after_update=[after] * 2)


CASES: list[tuple[Exhibit, int, Callable[[], pd.DataFrame], Callable[[], pd.DataFrame]]] = [
    (schematic.SCHEMATIC, 0, drawn, lambda: drawn(MSAM={"sign": -1})),
    (mechanisms.ANGLE, 0, lambda: roots(2.5), lambda: roots(7.0)),
    (mechanisms.ANGLE, 0, lambda: roots(1.6), lambda: roots(1.4)),
    (mechanisms.ALONG, 0, lambda: valley(0.2), lambda: valley(-0.2)),
    (mechanisms.ALONG, 1, lambda: valley(0.2), lambda: valley(-0.2)),
    (mechanisms.MODELS, 0, lambda: cosine_rows(80.0, 0.4), lambda: cosine_rows(40.0, 0.4)),
    (mechanisms.MODELS, 1, lambda: cosine_rows(80.0, 0.4), lambda: cosine_rows(80.0, 0.6)),
    (mechanisms.MODELS, 1, lambda: cosine_rows(80.0, 0.4), lambda: cosine_rows(80.0, -0.1)),
    (
        mechanisms.CONDITIONS,
        0,
        lambda: conditions("cosine", -0.1, "constant"),
        lambda: conditions("cosine", 0.1, "constant"),
    ),
    (
        mechanisms.CONDITIONS,
        1,
        lambda: conditions("own_cosine_fresh", 0.4),
        lambda: conditions("own_cosine_fresh", -0.4),
    ),
    (
        mechanisms.CONDITIONS,
        2,
        lambda: conditions("own_cosine_fixed", 0.9),
        lambda: conditions("own_cosine_fixed", 0.7),
    ),
    (
        mechanisms.CONDITIONS,
        3,
        lambda: conditions("held_out_cosine_fresh", -0.1),
        lambda: conditions("held_out_cosine_fresh", 0.1),
    ),
    (mechanisms.RISE_RATES, 0, lambda: rises(0.1), lambda: rises(-0.1)),
    (mechanisms.RISE_RATES, 1, lambda: rises(0.1), lambda: rises(-0.1)),
    (models.WARMUP, 0, lambda: warmup(1.0), lambda: warmup(1.0).replace({"AdamW": "MSAM", "MSAM": "AdamW"})),
    (models.WARMUP, 0, lambda: warmup(1.0, 62.5), lambda: warmup(1.0, 61.5)),
    (models.WARMUP, 1, lambda: warmup(1.0), lambda: warmup(-1.0)),
    (models.WARMUP, 2, lambda: warmup(1.0), lambda: warmup(-1.0)),
    *((models.OUTSIDE_VISION, i, lambda: other_tasks(1.0, 3.0), lambda: other_tasks(3.0, 30.0)) for i in range(4)),
    (models.RANK, 0, lambda: ranks(90.0, 60.0, 50.0), lambda: ranks(90.0, 50.0, 60.0)),
    (models.RANK, 0, lambda: ranks(90.0, 60.0, 50.0), lambda: ranks(50.0, 60.0, 40.0)),
    (models.DISTURBED, 0, lambda: disturbed(20.0, 30.0), lambda: disturbed(30.0, 20.0)),
    (models.DISTURBED, 0, lambda: disturbed(20.0, 22.5), lambda: disturbed(20.0, 21.5)),
    (models.DISTURBED, 1, lambda: disturbed(20.0, 30.0), lambda: disturbed(30.0, 20.0)),
]


@pytest.mark.parametrize(("exhibit", "index", "holds", "fails"), CASES)
def test_claims_follow_their_tables(
    exhibit: Exhibit, index: int, holds: Callable[[], pd.DataFrame], fails: Callable[[], pd.DataFrame]
) -> None:
    claim = exhibit.claims[index]
    assert claim.judge(holds()).verdict == "holds"
    assert claim.judge(fails()).verdict == "does not hold"


def test_every_claim_is_tested() -> None:
    tested = {(exhibit.name, index) for exhibit, index, _, _ in CASES}
    assert tested == {(exhibit.name, index) for exhibit in EXHIBITS for index in range(len(exhibit.claims))}


def test_without_a_warmup_nothing_is_told() -> None:
    bare = warmup(1.0).query("perturbed == 'throughout'")
    assert [claim.judge(bare).measured for claim in models.WARMUP.claims[1:]] == ["not measured"] * 2


def test_how_far_is_far_is_said() -> None:
    for claim, found in (
        (models.WARMUP.claims[0], warmup(1.0)),
        (models.DISTURBED.claims[0], disturbed(20.0, 30.0)),
    ):
        assert claim.judge(found).measured.endswith("required: gain more than 2 points")


def test_what_is_required_of_every_model_is_said_once() -> None:
    required = mechanisms.MODELS.claims[1].judge(cosine_rows(80.0, 0.4)).measured.partition("; required: ")[2]
    assert required == "mean cos(v_t, g_t) between 0.25 and 0.5"
