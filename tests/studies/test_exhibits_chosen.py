"""Exhibits chosen together: they share networks, and each gets what it needs of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from msam_analysis.studies.exhibits import choose
from msam_analysis.studies.runs import Run, gather
from msam_analysis.studies.study import _plan, run_study
from msam_analysis.studies.workloads import Workload

from .finished import finish
from .toy import TOY

FRUGAL = dataclasses.replace(TOY, frugal=True)


@pytest.mark.parametrize("other", ["F2AB", "T3", "A1", "A9", "A10", "A11", "A5"])
@pytest.mark.parametrize("first", [True, False])
def test_a_probe_finds_the_other_perturbations(other: str, first: bool) -> None:
    """F3 looks at SAM's perturbation on the way of SGD and MSAM, which exhibits that vary one perturbation have too."""
    exhibits = choose([other, "F3"])
    runs = _plan(exhibits if first else exhibits[::-1], FRUGAL, 1).values()
    watched = [run for run in runs if "sam_angle" in run.watched]
    assert {run.optimizer for run in watched} == {"SGD", "MSAM"}
    for run in watched:
        assert finish(run).steps["sam_angle/0.5"].notna().any()


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
    page = run_study(toy.name, exhibits=["T2"], seeds=2, out=tmp_path, progress=False)
    words = page.with_suffix(".md").read_text()
    assert "Not asked: there is no vision transformer beside this workload." in words
    assert words.count("not measured") == 3
