"""Verdicts on tables whose answer is known by construction."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import pytest

from msam_analysis.report.page import Claim
from msam_analysis.studies.claims import PaperClaim, difference, ratio
from msam_analysis.studies.exhibits.core import CORE, FADED, MUCH
from msam_analysis.studies.tables import Tables

from .finished import numbers, t_interval

CLAIMS = [claim for exhibit in CORE for claim in exhibit.claims]
OPTIMIZERS = ("SGD", "NAG", "SAM", "MSAM")
SEEDS = 4
EPOCHS, STEPS = 9, 6  # epochs 0 to 8, so that the middle half is 2 to 6

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot tell at this scale"

# One row per optimizer, of a world in which everything that the paper says is so.
RUNS = pd.DataFrame(
    {
        "test_accuracy": [0.72, 0.73, 0.79, 0.80],
        "gradients_per_step": [1.0, 1.0, 2.0, 1.0],
        "lambda_1": [15.19, 14.0, 5.18, 4.15],
        "rise_along_gradient": [4.0, 3.8, 1.0, 1.5],
        "rise_along_momentum": [3.0, 2.8, 1.5, 1.0],
        "rise_along_random": [5.0, 4.8, 1.8, 1.2],
        "rise_on_plane": [9.0, 8.8, 3.0, 2.0],
    },
    index=pd.Index(OPTIMIZERS, name="optimizer"),
)
CURVATURE = pd.DataFrame(
    {"momentum": [50.0, 48.0, 30.0, 15.0], "gradient": [60.0, 55.0, 20.0, 25.0], "random": [1.0, 0.95, 0.6, 0.4]},
    index=RUNS.index,
)
# What a seed does to all optimizers alike: far more than they differ, so that only pairs of runs tell them apart.
LUCK = np.array([-0.12, 0.1, 0.06, -0.08])


def wiggle(optimizer: str, seed: int) -> float:
    """A little of a run's own, so that no difference is the same for two seeds."""
    return 0.002 * math.sin(1 + 7 * OPTIMIZERS.index(optimizer) + 3 * seed)


@functools.cache
def make_runs(seeds: int) -> pd.DataFrame:
    rows = []
    for name in OPTIMIZERS:
        for seed in range(seeds):
            row: dict[str, object] = {"optimizer": name, "seed": seed}
            for column, value in RUNS.loc[name].items():
                if column == "test_accuracy":
                    row[str(column)] = value + LUCK[seed] + wiggle(name, seed)
                elif column == "gradients_per_step":
                    row[str(column)] = value
                else:
                    row[str(column)] = value * math.exp(20 * LUCK[seed] + 10 * wiggle(name, seed))
            rows.append(row)
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


@functools.cache
def make_steps(seeds: int) -> pd.DataFrame:
    """Return records in which the cosine of -0.3 fades in the last epoch; every third step has the others."""
    rows = []
    for name in OPTIMIZERS:
        for seed in range(seeds):
            for step in range(EPOCHS * STEPS):
                epoch, own = step // STEPS, wiggle(name, seed)
                row: dict[str, object] = {"optimizer": name, "seed": seed, "step": step, "epoch": epoch}
                fading = 0.01 if epoch == EPOCHS - 1 else 0.3
                # One step in six is positive.
                row["train_batch_loss"] = 1.0
                row["cosine"] = math.nan if step == 0 else -(1 if step % STEPS else -0.5) * fading * (1 + 50 * own)
                slow = step % 3 == 0
                row["rise"] = (0.0 if name == "SGD" else 0.5 + 10 * own) if slow else math.nan
                for direction, value in CURVATURE.loc[name].items():
                    known = slow and not (step == 0 and direction == "momentum")
                    row[f"curvature_{direction}"] = value * math.exp(9 * LUCK[seed] + own) if known else math.nan
                rows.append(row)
    frame: pd.DataFrame = pd.DataFrame(rows)
    return frame


def make_tables(seeds: int = SEEDS, **frames: pd.DataFrame) -> Tables:
    """Return tables of a world in which every claim holds, but for the frames given."""
    steps = make_steps(seeds)
    given = {"runs": make_runs(seeds), "steps": steps, "controls": steps, **frames}
    return Tables(**{field.name: given.get(field.name, pd.DataFrame()) for field in dataclasses.fields(Tables)})


Flip = Callable[[Tables], Tables]


def change(tables: Tables, table: str, edit: Callable[[pd.DataFrame], None]) -> Tables:
    frame = getattr(tables, table).copy()
    edit(frame)
    return dataclasses.replace(tables, **{table: frame})


def swap(table: str, column: str, first: str, second: str) -> Flip:
    """Exchange the values of two optimizers."""

    def edit(frame: pd.DataFrame) -> None:
        a, b = frame["optimizer"] == first, frame["optimizer"] == second
        old = frame[column].copy()
        frame.loc[a, column], frame.loc[b, column] = old[b].to_numpy(), old[a].to_numpy()

    return lambda tables: change(tables, table, edit)


def assign(table: str, column: str, name: str, value: Callable[[pd.DataFrame], pd.Series]) -> Flip:
    """Set a column of one optimizer."""

    def edit(frame: pd.DataFrame) -> None:
        part = frame["optimizer"] == name
        frame.loc[part, column] = value(frame[part])

    return lambda tables: change(tables, table, edit)


def flat_until_the_end(part: pd.DataFrame) -> pd.Series:
    """The cosine is close to 0 before the last epoch, and far from it there."""
    last = part["epoch"] == EPOCHS - 1
    result: pd.Series = part["cosine"].where(last, part["cosine"] / 30).where(~last, part["cosine"] * 30)
    return result


# For every claim, by exhibit and words of its sentence: what makes it false. Each flip alone must.
FLIPS: Mapping[tuple[str, str], Mapping[str, Flip]] = {
    ("T1", "generalises better"): {
        f"{other} generalises better": swap("runs", "test_accuracy", "MSAM", other) for other in ("SGD", "NAG")
    },
    ("T1", "costs twice as much"): {
        "MSAM costs more than SAM": assign("runs", "gradients_per_step", "MSAM", lambda part: part["seed"] * 0 + 3.0),
    },
    ("F2C", "negative for most of training"): {
        f"positive for {name}": assign("steps", "cosine", name, lambda part: -part["cosine"]) for name in OPTIMIZERS
    },
    ("F2C", "drawn with replacement"): {
        f"positive for {name}": assign("controls", "cosine", name, lambda part: -part["cosine"]) for name in OPTIMIZERS
    },
    ("F2C", "goes to 0"): {
        f"not for {name}": assign("steps", "cosine", name, flat_until_the_end) for name in OPTIMIZERS
    },
    ("A12", "raises the loss"): {
        f"lowered by {name}": assign("steps", "rise", name, lambda part: -part["rise"]) for name in ("SAM", "MSAM")
    },
    ("A8", "much larger"): {
        f"not for {name}": assign("steps", "curvature_random", name, lambda part: part["curvature_random"] * 100)
        for name in OPTIMIZERS
    },
    ("A8", "lowest curvature"): {
        f"{other} lower along {direction}": swap("steps", f"curvature_{direction}", "MSAM", other)
        for other in ("SGD", "NAG", "SAM")
        for direction in ("random", "momentum")
    },
    ("TA1", "largest Hessian eigenvalue"): {
        "SAM above SGD": swap("runs", "lambda_1", "SAM", "SGD"),
        "MSAM above SAM": swap("runs", "lambda_1", "SAM", "MSAM"),
    },
    ("F4A", "Along the gradient"): {
        f"{other} flatter": swap("runs", "rise_along_gradient", "SAM", other) for other in ("SGD", "NAG", "MSAM")
    },
    ("F4B", "Along the momentum"): {
        f"{other} flatter": swap("runs", "rise_along_momentum", "MSAM", other) for other in ("SGD", "NAG", "SAM")
    },
    ("F4C", "Along random"): {
        f"{other} flatter": swap("runs", "rise_along_random", "MSAM", other) for other in ("SGD", "NAG", "SAM")
    },
    ("A13", "plane"): {
        "SGD flatter than SAM": swap("runs", "rise_on_plane", "SAM", "SGD"),
        "SAM flatter than MSAM": swap("runs", "rise_on_plane", "SAM", "MSAM"),
    },
}


def find(key: tuple[str, str]) -> PaperClaim:
    exhibit, words = key
    found = [claim for claim in CLAIMS if claim.exhibit == exhibit and words in claim.sentence]
    assert len(found) == 1, f"{len(found)} claims match {key}"
    return found[0]


each_claim = pytest.mark.parametrize("key", FLIPS, ids="-".join)
each_flip = pytest.mark.parametrize(
    ("key", "flip"), [pytest.param(key, flip, id=f"{'-'.join(key)}: {flip}") for key in FLIPS for flip in FLIPS[key]]
)


# --- every claim


def test_every_claim_is_tested() -> None:
    assert [find(key) for key in FLIPS] == list(CLAIMS)


@each_claim
def test_holds(key: tuple[str, str]) -> None:
    claim = find(key).judge(make_tables())
    assert claim.verdict == HOLDS, claim.measured
    assert claim.exhibit == key[0]
    assert claim.paper


@each_flip
def test_does_not_hold(key: tuple[str, str], flip: str) -> None:
    claim = find(key).judge(FLIPS[key][flip](make_tables()))
    assert claim.verdict == FAILS, claim.measured


@each_flip
def test_a_flip_for_half_of_the_seeds(key: tuple[str, str], flip: str) -> None:
    """Seeds that disagree decide nothing."""
    tables = make_tables()
    flipped = FLIPS[key][flip](tables)
    mixed = {
        table: pd.concat(
            [frame[frame["seed"] < 2] for frame in [getattr(tables, table)]]
            + [frame[frame["seed"] >= 2] for frame in [getattr(flipped, table)]]
        )
        for table in ("runs", "steps", "controls")
    }
    claim = find(key).judge(dataclasses.replace(tables, **mixed))
    # What a step costs is counted, not estimated: that it differs between seeds may well decide against the claim.
    assert claim.verdict in ((UNKNOWN, FAILS) if "costs" in key[1] else (UNKNOWN,)), claim.measured


@each_claim
def test_one_seed_cannot_tell(key: tuple[str, str]) -> None:
    claim = find(key).judge(make_tables(seeds=1))
    assert claim.verdict == UNKNOWN
    assert numbers(claim.measured), "what was measured is shown all the same"
    assert "nan" not in claim.measured


@each_claim
def test_two_seeds_are_enough(key: tuple[str, str]) -> None:
    assert find(key).judge(make_tables(seeds=2)).verdict == HOLDS


@each_claim
def test_the_order_of_the_rows_does_not_matter(key: tuple[str, str]) -> None:
    tables = make_tables()
    # Seeds run backwards for every other optimizer; steps stay in their order.
    mixed = {}
    for table in ("runs", "steps", "controls"):
        frame = getattr(tables, table)
        down = -frame["seed"] if table == "runs" else frame["seed"]
        rank = frame["optimizer"].map({"MSAM": 0, "SGD": 1, "SAM": 2, "NAG": 3})
        turned = frame["seed"].where(rank % 2 == 0, down)
        mixed[table] = frame.assign(rank=rank, turned=turned).sort_values(["turned", "rank"], kind="stable")
        mixed[table] = mixed[table].drop(columns=["rank", "turned"]).reset_index(drop=True)
    assert _sentences(find(key).judge(dataclasses.replace(tables, **mixed))) == _sentences(find(key).judge(tables))


def _sentences(claim: Claim) -> tuple[str, set[str]]:
    return claim.verdict, set(claim.measured.split("; "))


@each_claim
def test_a_run_that_failed_decides_nothing(key: tuple[str, str]) -> None:
    """NaN in one seed of MSAM and SAM leaves every comparison unknown; no warning, no number made up."""

    def spoil(frame: pd.DataFrame) -> None:
        part = (frame["seed"] == 1) & frame["optimizer"].isin(("MSAM", "SAM"))
        frame.loc[part, [c for c in frame.columns if frame[c].dtype == float]] = math.nan

    tables = make_tables()
    for table in ("runs", "steps", "controls"):
        tables = change(tables, table, spoil)
    assert find(key).judge(tables).verdict == UNKNOWN


@pytest.mark.parametrize("key", [key for key in FLIPS if key[0] in ("F2C", "A12", "A8")], ids="-".join)
@pytest.mark.parametrize("last", [EPOCHS * STEPS - 3, 10, 0])
def test_what_came_before_a_run_diverged_decides_nothing(key: tuple[str, str], last: int) -> None:
    """Records that are NaN from a step on are no statistic of training, however the steps before it were."""

    def spoil(frame: pd.DataFrame) -> None:
        part = (frame["seed"] == 1) & (frame["step"] > last)
        frame.loc[part, [c for c in frame.columns if frame[c].dtype == float]] = math.nan

    tables = make_tables()
    for table in ("steps", "controls"):
        tables = change(tables, table, spoil)
    claim = find(key)
    assert all(math.isnan(comparison.interval.half_width) for comparison in claim.compare(tables))
    assert claim.judge(tables).verdict == UNKNOWN


def test_a_cosine_that_is_missing_is_not_skipped() -> None:
    """But that of the first step, at which there is no momentum."""

    def spoil(frame: pd.DataFrame) -> None:
        frame.loc[(frame["seed"] == 1) & (frame["step"] == EPOCHS * STEPS - 1), "cosine"] = math.nan

    tables = change(make_tables(), "steps", spoil)
    for words in ("negative for most", "goes to 0"):
        assert find(("F2C", words)).judge(tables).verdict == UNKNOWN


def test_a_workload_without_controls() -> None:
    """The claim about them cannot be told; the others are judged as ever."""
    tables = make_tables(controls=pd.DataFrame(columns=["optimizer", "seed"]))
    verdicts = {key: find(key).judge(tables).verdict for key in FLIPS}
    assert {key for key, value in verdicts.items() if value != HOLDS} == {("F2C", "drawn with replacement")}
    assert verdicts[("F2C", "drawn with replacement")] == UNKNOWN


@pytest.mark.parametrize(("msam", "sam"), [(2.0, 2.0), (2.0, 3.0), (1.5, 2.0), (1.0, 1.5)])
def test_the_claim_about_cost_is_about_sgd(msam: float, sam: float) -> None:
    """What SGD costs, and twice as much: neither follows from SAM being dearer than MSAM."""
    tables = make_tables()
    for name, cost in (("MSAM", msam), ("SAM", sam)):
        tables = assign("runs", "gradients_per_step", name, lambda part, c=cost: part["seed"] * 0 + c)(tables)  # type: ignore[misc]
    claim = find(("T1", "costs twice as much")).judge(tables)
    assert claim.verdict != HOLDS, claim.measured


def test_sgd_does_not_perturb() -> None:
    """Its rise of 0 says nothing against the claim that perturbations raise the loss."""
    claim = find(("A12", "raises the loss")).judge(make_tables())
    assert claim.verdict == HOLDS
    assert "SGD" not in claim.measured


def test_much_larger_is_a_stated_factor() -> None:
    key = ("A8", "much larger")
    for factor, expected in ((1.1 * MUCH, HOLDS), (0.9 * MUCH, FAILS)):
        tables = make_tables()
        for name in OPTIMIZERS:
            tables = assign(
                "steps",
                "curvature_momentum",
                name,
                lambda part, f=factor: f * part["curvature_random"],  # type: ignore[misc]
            )(tables)
        assert find(key).judge(tables).verdict == expected
    assert f"{MUCH:g}" in find(key).note


# --- pairing


def test_pairing_decides() -> None:
    """Accuracies that luck spreads by 20 points, and a difference of one point: told apart pair by pair only."""
    runs = make_runs(SEEDS).copy()
    values = {name: runs.loc[runs["optimizer"] == name, "test_accuracy"].to_numpy() for name in OPTIMIZERS}
    (nag, nag_half), (msam, msam_half) = (t_interval(values[name]) for name in ("NAG", "MSAM"))
    assert nag + nag_half > msam - msam_half, "unpaired intervals overlap"
    comparison = difference(runs, "test_accuracy", "MSAM", "NAG")
    assert comparison.side() == 1
    mean, half = t_interval(values["MSAM"] - values["NAG"])
    assert comparison.interval.mean == pytest.approx(mean)
    assert comparison.interval.half_width == pytest.approx(half)
    # With the seeds of one of the two in another order the pairs are wrong, and the answer is gone.
    part = runs["optimizer"] == "NAG"
    runs.loc[part, "seed"] = np.roll(runs.loc[part, "seed"], 1)
    assert difference(runs, "test_accuracy", "MSAM", "NAG").side() == 0


def test_pairing_decides_ratios() -> None:
    runs = make_runs(SEEDS).copy()
    assert ratio(runs, "lambda_1", "SAM", "MSAM").side() == 1
    part = runs["optimizer"] == "SAM"
    runs.loc[part, "seed"] = np.roll(runs.loc[part, "seed"], 1)
    assert ratio(runs, "lambda_1", "SAM", "MSAM").side() == 0


# --- numbers and words


def test_the_least_effect_size_is_in_the_claim() -> None:
    tables = make_tables()
    compared = find(("TA1", "largest Hessian eigenvalue"))
    least = min(comparison.effect for comparison in compared.compare(tables))
    assert f"least effect size d = {least:.2g}".replace("-", "−") in compared.judge(tables).measured


def test_the_numbers_are_in_the_claim() -> None:
    """Each claim's sentence holds the mean of every comparison, recomputed here from the tables."""
    tables = make_tables()
    runs = tables.runs.pivot_table(index="seed", columns="optimizer")

    def shown(key: tuple[str, str]) -> str:
        return find(key).judge(tables).measured

    accuracy = runs["test_accuracy"]
    for other in ("SGD", "NAG"):
        mean, half = t_interval((accuracy["MSAM"] - accuracy[other]).to_numpy() * 100)
        words = next(part for part in shown(("T1", "generalises better")).split("; ") if f"MSAM − {other}" in part)
        assert numbers(words) == [pytest.approx(mean, abs=0.1 * half), pytest.approx(half, rel=0.05)]
        assert words.endswith("points")
    for key, column, pairs in (
        (("TA1", "largest Hessian eigenvalue"), "lambda_1", [("SGD", "SAM"), ("SAM", "MSAM")]),
        (("F4A", "Along the gradient"), "rise_along_gradient", [(o, "SAM") for o in ("SGD", "NAG", "MSAM")]),
        (("F4B", "Along the momentum"), "rise_along_momentum", [(o, "MSAM") for o in ("SGD", "NAG", "SAM")]),
        (("F4C", "Along random"), "rise_along_random", [(o, "MSAM") for o in ("SGD", "NAG", "SAM")]),
        (("A13", "plane"), "rise_on_plane", [("SGD", "SAM"), ("SAM", "MSAM")]),
    ):
        for large, small in pairs:
            factor = math.exp(float(np.log(runs[column][large] / runs[column][small]).mean()))
            assert f"{large} / {small}: {factor:.3g} times" in shown(key)
    # 8 of 53 steps have a positive cosine, in all runs.
    words = shown(("F2C", "negative for most"))
    assert words.count(f"{100 * 45 / 53:.2f}") == len(OPTIMIZERS)
    assert words.count("50 %") == 1, "what is required stands once, beside what was measured"
    words = shown(("A8", "much larger"))
    for name in OPTIMIZERS:
        factor = CURVATURE.loc[name, "momentum"] / CURVATURE.loc[name, "random"]
        assert f"{name}, momentum / random: {factor:.3g} times" in words
    assert words.count(f"more than {MUCH:g}") == 1
    assert f"SAM / MSAM along momentum: {2:.3g} times" in shown(("A8", "lowest curvature"))


# --- sentences and their tests


@pytest.mark.parametrize(
    ("momentum", "random", "expected"),
    [(-6.0, -1.0, FAILS), (-1.0, -6.0, FAILS), (6.0, -1.0, HOLDS), (-6.0, 1.0, FAILS), (6.0, 0.0, HOLDS)],
)
def test_curvatures_that_are_not_positive(momentum: float, random: float, expected: str) -> None:
    """They have no ratio: two negatives make none that is large, and a number is shown all the same."""
    tables = make_tables()
    for name in OPTIMIZERS:
        for column, value in (("curvature_momentum", momentum), ("curvature_random", random)):
            tables = assign("steps", column, name, lambda part, v=value: part["cosine"] * 0 + v)(tables)  # type: ignore[misc]
    claim = find(("A8", "much larger")).judge(tables)
    assert claim.verdict == expected, claim.measured
    assert "not all positive" in claim.measured
    assert "nan" not in claim.measured
    assert "times" not in claim.measured.partition("required")[0]


@pytest.mark.parametrize(
    ("before", "after", "expected"), [(0.3, 0.29, FAILS), (0.3, 0.02, HOLDS), (0.01, 0.02, FAILS), (0.06, 0.04, HOLDS)]
)
def test_going_to_zero_is_more_than_falling(before: float, after: float, expected: str) -> None:
    tables = make_tables()
    for name in OPTIMIZERS:
        tables = assign(
            "steps",
            "cosine",
            name,
            lambda part: (part["epoch"] < EPOCHS - 1).map({True: -before, False: -after}),
        )(tables)
    claim = find(("F2C", "goes to 0")).judge(tables)
    assert claim.verdict == expected, claim.measured


@each_claim
def test_what_is_required_is_said_once(key: tuple[str, str]) -> None:
    assert find(key).judge(make_tables()).measured.count("required") <= 1


def test_requirements_in_words() -> None:
    def required(*key: str) -> str:
        return find((key[0], key[1])).judge(make_tables()).measured.partition("; required: ")[2]

    assert required("F2C", "negative for most") == "steps with a negative cosine more than 50 %"
    assert required("A8", "much larger") == f"momentum / random more than {MUCH:g} times"
    assert required("F2C", "goes to 0") == f"|cosine| in the last epoch less than {FADED:g}"
    assert required("T1", "costs twice") == "gradients a step between −0.05 and 0.05"
    assert required("TA1", "eigenvalue") == ""


def test_controls_are_marked() -> None:
    assert [claim.control for claim in CLAIMS] == ["not in the paper" in claim.sentence for claim in CLAIMS]
    assert [find(key).judge(make_tables()).control for key in FLIPS].count(True) == 1
