"""Exhibits of mechanisms, other models and tasks, and of what is found: on the toy, against computations by hand."""

from __future__ import annotations

import dataclasses
import math
import re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from msam import Jump
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.results.statistics import summarise
from msam_analysis.studies.exhibits import EXHIBITS as ALL
from msam_analysis.studies.exhibits import core, mechanisms, models, schematic, wanted
from msam_analysis.studies.exhibits.base import Exhibit, Finding, find
from msam_analysis.studies.jobs import job
from msam_analysis.studies.measuring import DISTURBANCES, last_block
from msam_analysis.studies.networks import mlp
from msam_analysis.studies.runs import Run, gather
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import train
from msam_analysis.studies.watching import OFFSETS, STRENGTHS
from msam_analysis.studies.workloads import DIGITS, Recipe, Workload

from .finished import unexamined
from .toy import COARSE, TOY

SEEDS = 2
ADAM = Recipe(epochs=2, batch_size=16, lr=0.01, momentum=0.9, weight_decay=0.01, base="adamw", warmup=1, clip=1.0)


def relative(name: str) -> Workload:
    perturbations = {"AdamW": None, "SAM": TOY.perturbations["SAM"], "MSAM": TOY.perturbations["MSAM"]}
    return dataclasses.replace(TOY, name=name, recipe=ADAM, perturbations=perturbations, controls=())


# Some probes are asked at every eighth step, and the first has no momentum.
WORKLOAD = dataclasses.replace(
    wanted.with_recipe(TOY, epochs=3), relatives={name: relative(name) for name in ("transformer", "text")}
)
TRAINING = (*mechanisms.MECHANISMS, *mechanisms.COSINES)
EXHIBITS = (schematic.SCHEMATIC, *TRAINING, *models.MODELS_AND_TASKS, *models.SOLUTIONS)
Finished = dict[str, FinishedRun]
by_name = pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for identity, run in gather(run for exhibit in EXHIBITS for run in exhibit.runs(WORKLOAD, SEEDS)).items():
        one = job(run, folder, COARSE, 4)
        with unexamined():
            one.make(lambda _: None)
        made[identity] = one.read()
    return made


def found_by(exhibit: Exhibit, finished: Finished) -> Finding:
    return find(exhibit, WORKLOAD, SEEDS, finished)


def table_of(exhibit: Exhibit, finished: Finished) -> pd.DataFrame:
    table = found_by(exhibit, finished).table
    assert table is not None
    return table


@by_name
def test_every_exhibit_has_a_table_a_figure_and_its_claims(exhibit: Exhibit, finished: Finished) -> None:
    finding = found_by(exhibit, finished)
    assert finding.table is not None
    assert not finding.table.empty
    assert [claim.claim for claim in finding.claims] == [claim.sentence for claim in exhibit.claims]
    assert all(claim.measured != "not measured" for claim in finding.claims)
    assert finding.draw is not None
    with mpl.rc_context({"backend": "agg"}):
        assert finding.draw is not None
        axes = np.atleast_1d(np.asarray(finding.draw(), dtype=object)).ravel()
        assert all(ax.has_data() and ax.get_xlabel() for ax in axes)
        plt.close(axes[0].figure)


# ------------------------------------------------------------------------------------------------------- A2 and A12


@pytest.mark.parametrize("where", [-0.37, 0.0, 0.08])
def test_minimum_of_a_parabola(where: float) -> None:
    offsets = sorted((*OFFSETS, 0.0))
    assert mechanisms.minimum(offsets, [3 * (a - where) ** 2 - 1 for a in offsets]) == pytest.approx(where)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_minimum_at_an_end(sign: float) -> None:
    offsets = sorted((*OFFSETS, 0.0))
    assert mechanisms.minimum(offsets, [sign * a for a in offsets]) == (-4.0 if sign > 0 else 2.0)


def test_changes_are_means_over_the_recorded_steps(finished: Finished) -> None:
    table = table_of(mechanisms.ALONG, finished)
    run = finished[Run(WORKLOAD, "SAM", 1).identity]
    row = table.query("optimizer == 'SAM' and seed == 1 and offset == -1.0")
    assert float(row["change"].iloc[0]) == pytest.approx(
        np.nanmean(run.steps["loss_along/-1"] - run.steps["loss_along/0"])
    )
    assert (table.loc[table["offset"] == 0, "change"] == 0).all()


def test_a_step_along_the_momentum_is_what_is_recorded() -> None:
    """At the second step of SGD without momentum's past, −v is the last step's direction."""
    one = wanted.with_recipe(TOY, epochs=1, batch_size=60, weight_decay=0.0)
    trained = train(wanted.with_recipe(one, epochs=9), "SGD", 0, every=4, watched=["along_momentum"])
    assert trained.steps["loss_along/-1"].notna().sum() == 1, "every eighth step, and none before there is momentum"


def test_rates(finished: Finished) -> None:
    table = table_of(mechanisms.RISE_RATES, finished)
    assert sorted(set(table["lr"])) == pytest.approx([0.01, 0.1, 0.3])
    assert set(table["rho"]) == {0.2}, "the recorded distance nearest to the toy's ρ of 0.3, by ratio"
    assert (table.loc[table["optimizer"] == "SGD", "own_rise"] == 0).all()
    run = finished[Run(WORKLOAD, "SGD", 0).identity]
    mine = table[(table["optimizer"] == "SGD") & (table["seed"] == 0) & np.isclose(table["lr"], 0.1)]
    along = run.steps["loss_along/-0.2"] - run.steps["loss_along/0"]
    assert float(mine["virtual_rise"].iloc[0]) == pytest.approx(along.mean())


# --------------------------------------------------------------------------------------------------- A3, A4 and F3


def test_cosines_of_models(finished: Finished) -> None:
    table = table_of(mechanisms.MODELS, finished)
    assert set(table["problem"]) == {"toy", "transformer", "text"}
    assert set(table.loc[table["problem"] == "text", "optimizer"]) == {"AdamW", "MSAM"}
    run = finished[Run(WORKLOAD.relatives["text"], "AdamW", 1).identity]
    row = table.query("problem == 'text' and optimizer == 'AdamW' and seed == 1").iloc[0]
    cosine = run.steps["cosine"].to_numpy()[1:]
    assert row["cosine"] == pytest.approx(cosine.mean())
    assert row["negative"] == pytest.approx(100 * (cosine < 0).mean())
    assert row["after_update"] == pytest.approx(run.steps["cosine_after"].mean())


def test_a_momentum_of_held_out_gradients_by_hand() -> None:
    """Without a learning rate the weights stay, so that the same batch has the same gradient every time."""
    still = wanted.with_recipe(TOY, lr=0.0, batch_size=7)
    steps = train(still, "SGD", 3, every=4, watched=["held_out_momentum"]).steps
    assert steps["own_cosine_fixed"].iloc[1:].to_numpy() == pytest.approx(1.0)
    with RandomStream(3):
        model = still.network()
    inputs, labels = (torch.cat(part) for part in zip(*still.test(), strict=True))
    gradients = [
        Objective(model, still.criterion(), [(inputs[i : i + 7], labels[i : i + 7])], batchnorm="batch").gradient()
        for i in (0, 7, 14)
    ]
    momentum = torch.zeros_like(gradients[0])
    expected = []
    for step in range(len(steps)):
        gradient = gradients[step % 3]
        expected.append(float(torch.nn.functional.cosine_similarity(momentum, gradient, dim=0)))
        momentum = 0.9 * momentum + gradient
    assert steps["own_cosine_fresh"].iloc[1:].to_numpy() == pytest.approx(expected[1:], abs=1e-5)
    assert math.isnan(steps["own_cosine_fresh"].iloc[0])


def test_the_trainings_momentum_on_held_out_batches() -> None:
    steps = train(wanted.with_recipe(TOY, epochs=3, batch_size=7), "SGD", 0, every=4, watched=["held_out"]).steps
    asked = steps.dropna(subset=["held_out_cosine_fresh"])
    assert asked["step"].to_list() == [8, 16, 24], "every eighth step"
    assert not asked["held_out_cosine_fresh"].equals(asked["held_out_cosine_fixed"])


def test_angles(finished: Finished) -> None:
    table = table_of(mechanisms.ANGLE, finished)
    assert set(table["best_rho"]) == {0.3}
    per_run = table.groupby(["optimizer", "seed"])["step"].apply(list)
    assert per_run.to_list() == [[4, 8]] * 2 * SEEDS, "every record, and none before there is momentum"
    assert set(table["optimizer"]) == {"SGD", "MSAM"}


# ------------------------------------------------------------------------------------------ TA2, text and table


def test_nothing_is_perturbed_in_the_warmup() -> None:
    one = WORKLOAD.relatives["transformer"]
    late = wanted.after_warmup(one, "MSAM")
    perturbation = late.perturbations["MSAM"]
    assert perturbation is not None
    assert perturbation.rho == Jump(0.3, 4), "one epoch of 16, 16, 16 and 12 samples"
    assert wanted.after_warmup(one, "AdamW") is one
    runs = {
        name: train(tried, name, 0, every=1, watched=["rise"]).steps for tried, name in ((late, "MSAM"), (one, "AdamW"))
    }
    lengths = runs["MSAM"]["epsilon_norm"].to_numpy()
    assert (lengths[:4] == 0).all()
    assert lengths[4:] == pytest.approx(0.3, rel=1e-4)
    same = runs["MSAM"]["train_batch_loss"] == runs["AdamW"]["train_batch_loss"]
    assert same[:4].all()
    assert not same[4:].any()


def test_scores_of_other_tasks(finished: Finished) -> None:
    table = table_of(models.OUTSIDE_VISION, finished)
    assert set(table["problem"]) == {"text"}, "this workload has no table beside it"
    row = table.query("optimizer == 'MSAM' and seed == 0").iloc[0]
    workload = WORKLOAD.relatives["text"]
    trained = train(workload, "MSAM", 0, every=None)
    objective = Objective(trained.model, workload.criterion(), workload.train())
    hessian = torch.stack([objective.hvp(unit) for unit in torch.eye(objective.size)])
    assert row["lambda_1"] == pytest.approx(float(torch.linalg.eigvalsh(hessian.double()).max()), rel=1e-2)
    assert row["test_loss"] == pytest.approx(
        float(Objective(trained.model, workload.criterion(), workload.test()).loss())
    )


# ----------------------------------------------------------------------------------------------- A6r and TA4


def test_ranks(finished: Finished) -> None:
    table = table_of(models.RANK, finished)
    row = table.query("optimizer == 'SAM' and seed == 0").iloc[0]
    model = train(WORKLOAD, "SAM", 0, every=None).model
    assert isinstance(model, torch.nn.Sequential)
    with torch.no_grad():
        features = model[:4](torch.cat([inputs for inputs, _ in WORKLOAD.train()])).double().numpy()
    shares = np.sort(np.linalg.eigvalsh(np.cov(features.T)))[::-1]
    assert row["rank"] == 1 + int((np.cumsum(shares) < 0.99 * shares.sum()).sum())
    assert (row["samples"], row["dimension"]) == (60, 6)


def test_last_blocks() -> None:
    assert last_block(DIGITS.network()) == "8", "the last ReLU, before pooling"
    assert last_block(TOY.network()) == "3"
    assert last_block(mlp([3, 4, 2])) == "features"


def test_accuracies_begin_at_the_clean_one(finished: Finished) -> None:
    table = table_of(models.DISTURBED, finished)
    for run in models.DISTURBED.evidence(WORKLOAD, SEEDS, finished).runs:
        mine = table[(table["optimizer"] == run.optimizer) & (table["seed"] == run.seed)]
        clean = mine.loc[mine["share"] == 0, "test_accuracy"]
        assert clean.to_numpy() == pytest.approx(100 * run.scores["test_accuracy"])
        assert len(mine) == sum(1 + len(shares) for shares in DISTURBANCES.values())


# -------------------------------------------------------------------------------------- runs that diverged


def spoiled(finished: Finished, share: float) -> Finished:
    """Return the runs with all that is recorded after a part of training NaN, for the runs of seed 1."""

    def spoil(run: FinishedRun) -> FinishedRun:
        known = run.steps["step"] <= share * run.steps["step"].max()
        recorded = [name for name in run.steps if name not in ("step", "epoch", "lr")]
        steps = run.steps.assign(**{str(name): run.steps[name].where(known) for name in recorded})
        return dataclasses.replace(run, steps=steps) if run.seed == 1 else run

    return {identity: spoil(run) for identity, run in finished.items()}


@pytest.mark.parametrize("share", [0.9, 0.4, 0.0])
@pytest.mark.parametrize("exhibit", TRAINING, ids=lambda exhibit: exhibit.name)
def test_what_came_before_it_diverged_tells_nothing(exhibit: Exhibit, share: float, finished: Finished) -> None:
    finding = found_by(exhibit, spoiled(finished, share))
    table = finding.table
    assert table is not None
    assert finding.draw is not None
    with mpl.rc_context({"backend": "agg"}):
        plt.close(np.atleast_1d(np.asarray(finding.draw(), dtype=object)).ravel()[0].figure)
    for claim in exhibit.claims:
        comparisons = claim.compare(table)
        assert comparisons
        assert all(math.isnan(comparison.interval.half_width) for comparison in comparisons), claim.sentence
        assert {comparison.interval.n for comparison in comparisons} == {SEEDS}, "no seed is left out"
        assert claim.judge(table).verdict == "cannot tell at this scale"


def test_epochs_of_a_run_that_diverged_are_holes() -> None:
    """Those after a seed diverged are no mean over the other seeds; those without a record are no holes."""
    rows = np.arange(12)
    whole = pd.DataFrame({"optimizer": "SGD", "seed": 0, "epoch": rows // 2, "step": rows, "train_batch_loss": 1.0})
    whole["cosine"] = np.where(rows % 4 == 0, -0.5, math.nan)
    broken = whole.assign(seed=1, **whole[["train_batch_loss", "cosine"]].where(whole["step"] < 7))
    epochs = core._per_epoch(pd.concat([whole, broken]), "cosine")
    assert epochs.loc[epochs["seed"] == 0, "epoch"].to_list() == [0, 2, 4]
    table = summarise(epochs, ["optimizer", "epoch"], "cosine").set_index("epoch")["cosine"]
    assert table[[0, 2]].to_list() == [-0.5, -0.5]
    assert math.isnan(table[4])


def test_cosines_of_a_run_that_diverged_outside_vision(finished: Finished) -> None:
    table = table_of(models.OUTSIDE_VISION, spoiled(finished, 0.6))
    known = table.groupby("seed")[["cosine", "negative"]].apply(lambda part: part.notna().all(axis=None))
    assert known.to_dict() == {0: True, 1: False}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("hole", [0, 3, -1])
def test_no_minimum_of_a_curve_with_a_hole(bad: float, hole: int) -> None:
    offsets = sorted((*OFFSETS, 0.0))
    changes = [(a - 0.5) ** 2 for a in offsets]
    changes[hole] = bad
    assert math.isnan(mechanisms.minimum(offsets, changes))


# -------------------------------------------------------------------------------------------------------- claims


def test_how_other_workloads_were_tuned_is_said(finished: Finished) -> None:
    for exhibit in (models.WARMUP, models.OUTSIDE_VISION):
        words = "chosen by the test accuracy of two other seeds"
        assert all(words in claim.note for claim in exhibit.claims)
        assert words in found_by(exhibit, finished).note
    assert all("favours" in claim.note for claim in models.WARMUP.claims[1:])


# ------------------------------------------------------------------------------------------- other workloads


ALONE = dataclasses.replace(WORKLOAD, relatives={})
"""A workload that has no others beside it."""


@pytest.mark.parametrize("exhibit", models.MODELS_AND_TASKS, ids=lambda exhibit: exhibit.name)
def test_a_workload_without_relatives_is_not_taken_for_one(exhibit: Exhibit, finished: Finished) -> None:
    assert exhibit.runs(ALONE, SEEDS) == []
    finding = find(exhibit, ALONE, SEEDS, finished)
    assert finding.draw is None
    assert finding.table is None
    assert "beside this workload" in finding.note
    assert [claim.claim for claim in finding.claims] == [claim.sentence for claim in exhibit.claims]
    assert {(claim.measured, claim.verdict) for claim in finding.claims} == {
        ("not measured", "cannot tell at this scale")
    }


def test_one_model_is_not_every_model(finished: Finished) -> None:
    finding = find(mechanisms.MODELS, ALONE, SEEDS, finished)
    assert finding.table is not None
    assert set(finding.table["problem"]) == {"toy"}
    assert [claim.measured != "not measured" for claim in finding.claims] == [False, True]
    assert finding.draw is not None


def test_no_exhibit_speaks_of_another_workload(finished: Finished) -> None:
    words = re.compile(
        "digit|8[x×]8|here: a train|1,000|whose labels are as often|wrong labels included|labels are right,",
        re.IGNORECASE,
    )
    for exhibit in ALL:
        for text in (
            exhibit.prose.title,
            exhibit.prose.caption,
            *(claim.sentence + claim.note for claim in exhibit.claims),
        ):
            assert not words.search(text), text
    for exhibit in EXHIBITS:
        assert not words.search(find(exhibit, ALONE, SEEDS, finished).note), exhibit.name


# ------------------------------------------------------------------------------------------------ F3, by records


def test_the_share_of_the_angle_is_over_records(finished: Finished) -> None:
    """Of four records an epoch one has a root, and that is close: an epoch's mean of roots would be."""
    rows = np.arange(40)
    rho_0 = np.where(rows % 4 == 1, 0.3, math.nan)
    steps = pd.DataFrame({"step": rows, "epoch": rows // 4, "rho_0": rho_0, "train_batch_loss": 1.0})
    steps = steps.assign(**{f"sam_angle/{rho:g}": 10.0 for rho in (0.0, *STRENGTHS)})
    changed = {
        identity: dataclasses.replace(run, steps=steps.assign(rho_0=rho_0 + 0.001 * run.seed))
        for identity, run in finished.items()
    }
    finding = found_by(mechanisms.ANGLE, changed)
    (comparison, _) = mechanisms.ANGLE.claims[0].compare(finding.table)
    assert comparison.interval.mean == pytest.approx(100 * 10 / 39)
    assert finding.claims[0].verdict != "holds"
