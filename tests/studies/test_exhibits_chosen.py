"""Exhibits chosen together: they share networks, and each gets what it needs of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest

from msam_analysis.studies.exhibits import EXHIBITS, Exhibit, choose
from msam_analysis.studies.jobs import job
from msam_analysis.studies.runs import Run, gather
from msam_analysis.studies.study import run_study
from msam_analysis.studies.workloads import Workload

from .finished import finish
from .toy import COARSE, TOY


def _plan(exhibits: Iterable[Exhibit], workload: Workload, seeds: int) -> dict[str, Run]:
    return gather(run for exhibit in exhibits for run in exhibit.runs(workload, seeds))


@pytest.mark.parametrize("other", ["F2AB", "T3", "A1", "A9", "A10", "A11", "A5"])
@pytest.mark.parametrize("first", [True, False])
def test_a_probe_finds_the_other_perturbations(other: str, first: bool) -> None:
    """F3 looks at SAM's perturbation on the way of SGD and MSAM, which exhibits that vary one perturbation have too."""
    exhibits = choose([other, "F3"])
    runs = _plan(exhibits if first else exhibits[::-1], TOY, 1).values()
    watched = [run for run in runs if "sam_angle" in run.watched]
    assert {run.optimizer for run in watched} == {"SGD", "MSAM"}
    for run in watched:
        assert finish(run).steps["sam_angle/0.5"].notna().any()


@pytest.mark.parametrize("optimizer", ["SGD", "MSAM"])
def test_networks_of_exhibits_are_those_of_a_study(optimizer: str, tmp_path: Path) -> None:
    """Bit for bit: :func:`finish` leaves out the examinations, and a study does not."""
    run = Run(TOY, optimizer, 1, watched=frozenset({"rise", "along_momentum", "sam_angle"}))
    ours, one = finish(run), job(run, tmp_path, COARSE, 4)
    one.make(lambda _: None)
    theirs = one.read()
    assert ours.scores == theirs.scores
    pd.testing.assert_frame_equal(ours.steps, theirs.steps[ours.steps.columns], check_exact=True)


@pytest.mark.parametrize("key", ["F2AB", "T3", "A1", "A9", "A10", "A11", "A5"])
def test_what_is_kept_beside_a_perturbation_decides_nothing(key: str) -> None:
    (exhibit,) = choose([key])
    for run in exhibit.runs(TOY, 1):
        alone = {run.optimizer: run.workload.perturbations[run.optimizer]}
        bare = dataclasses.replace(run, workload=dataclasses.replace(run.workload, perturbations=alone))
        assert bare.identity == run.identity
        assert bare.settings == run.settings
        assert set(run.workload.perturbations) >= set(TOY.perturbations)


def test_a_network_of_two_exhibits_is_one() -> None:
    own = gather(Run(TOY, name, 0) for name in ("SGD", "MSAM"))
    assert own.keys() <= _plan(choose(["F2AB"]), TOY, 1).keys()


def test_a_report_without_anything_to_draw(toy: Workload, tmp_path: Path) -> None:
    """The toy has no transformer beside it."""
    assert not toy.relatives
    page = run_study(toy, exhibits=["T2"], seeds=2, out=tmp_path, progress=False)
    words = page.with_suffix(".md").read_text()
    assert "Not asked: there is no vision transformer beside this workload." in words
    assert words.count("not measured") == 3


ANSWERED = {
    "one_step": ("F1",),
    "accuracy": ("T1",),
    "warmup": ("T2", "TA2"),
    "variants": ("T3",),
    "strength": ("F2AB", "A15"),
    "cosine": ("F2C",),
    "sam_angle": ("F3",),
    "slices": ("F4A", "F4B", "F4C"),
    "normalisation": ("A1",),
    "along_momentum": ("A2",),
    "cosine_models": ("A3", "A4"),
    "cosine_conditions": ("A4",),
    "cosine_settings": ("A5", "A6", "A7"),
    "curvature": ("A8",),
    "eigenvalues": ("TA1",),
    "feature_rank": ("A6r",),
    "other_directions": ("A9",),
    "stability": ("A10",),
    "equal_compute": ("A11",),
    "perturbation_rise": ("A12",),
    "rise_by_learning_rate": ("A12",),
    "surface": ("A13",),
    "robustness": ("TA4",),
    "ball_sharpness": (),
    "relief": (),
    "outside_vision": (),
    "choosing_rho": (),
}
"""The paper's figures and tables, by the exhibit that answers them; controls beside a claim answer none."""


def test_an_exhibit_of_the_paper_is_found_by_its_claims() -> None:
    """Whoever asks for one gets all that is tested about it; what is not in the paper may stand beside anything."""
    assert {exhibit.name: exhibit.ids for exhibit in EXHIBITS} == ANSWERED


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("A12", ["perturbation_rise", "rise_by_learning_rate"]),
        ("A3", ["cosine_models"]),
        ("A4", ["cosine_models", "cosine_conditions"]),
        ("F1", ["one_step"]),
    ],
)
def test_what_an_id_chooses(key: str, names: list[str]) -> None:
    assert [exhibit.name for exhibit in choose([key])] == names


def test_what_is_not_in_the_main_study_stays_out_of_it() -> None:
    assert "rise_by_learning_rate" not in {exhibit.name for exhibit in choose(None)}


def test_exhibits_are_in_the_report_s_order() -> None:
    firsts = [exhibit.ids[0] for exhibit in EXHIBITS if exhibit.ids]
    assert firsts[:3] == ["F1", "T1", "T2"]
    assert firsts.index("A3") + 1 == firsts.index("A4") < firsts.index("A5") < firsts.index("A12") < firsts.index("A13")
    assert all(not exhibit.ids for exhibit in EXHIBITS[len(firsts) :]), "those of no figure come last"
