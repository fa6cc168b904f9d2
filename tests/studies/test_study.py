"""The whole study on a toy: the same tables however it was made, and nothing half-done.

A worker process takes seconds to start, most of them for torch. So only the tests about processes start some.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import nn

from msam import Perturbation
from msam_analysis.report.page import Verdict
from msam_analysis.studies.exhibits import EXHIBITS, choose
from msam_analysis.studies.store import LOCK
from msam_analysis.studies.study import Study, run_study
from msam_analysis.studies.tables import Tables
from msam_analysis.studies.workloads import Workload

from . import toy as toys
from .toy import COARSE, STEPS, TOY, Features

SEEDS = 2
RUNS = SEEDS * (len(TOY.perturbations) + len(TOY.controls))
MAIN = tuple(exhibit for exhibit in EXHIBITS if exhibit.main)
VERDICTS: tuple[Verdict, ...] = ("holds", "does not hold", "cannot tell at this scale")


def study(out: Path, *, jobs: int | None = 1, seeds: int = SEEDS, **options: Any) -> Path:
    """Run the toy's study; one picture, unless more are asked for."""
    settings: dict[str, Any] = {"exhibits": ["T1"], "protocol": COARSE, "every": 4, "progress": False}
    return run_study(options.pop("workload", TOY), out=out, jobs=jobs, seeds=seeds, **settings | options)


def tables(out: Path) -> dict[str, bytes]:
    """The main tables; every exhibit that is chosen adds its own."""
    names = [f"{field.name}.csv" for field in dataclasses.fields(Tables)]
    return {name: (out / "tables" / name).read_bytes() for name in names}


def stamps(out: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again; folders that are half written do not count."""
    files = [path for path in (out / "runs").rglob("*") if path.is_file() and "/.partial-" not in path.as_posix()]
    return {str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def networks(out: Path) -> list[Path]:
    """The folders of networks, by name."""
    return sorted(path for path in (out / "runs").iterdir() if not path.name.startswith("."))


def hidden(out: Path) -> list[Path]:
    return [path for path in out.rglob(".*") if path.name != LOCK]


@dataclasses.dataclass
class Trainings:
    """Counts the networks trained, in all processes."""

    log: Path

    def count(self) -> int:
        """Return how many there were since the last call."""
        made = len(self.log.read_text().splitlines()) if self.log.exists() else 0
        self.log.unlink(missing_ok=True)
        return made


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    log = tmp_path / "trainings.log"
    monkeypatch.setenv("TOY_LOG", str(log))
    return Trainings(log)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that went through at once, in one worker process, with all its pictures."""
    out = tmp_path_factory.mktemp("study") / "new" / "out"
    page = study(out, exhibits=None, figures=out.parent / "pictures")
    assert page == out / "report.html"
    return out


def test_the_toy_is_importable_by_workers() -> None:
    assert toys.__name__ == "tests.studies.toy"


# --- what it leaves


def test_what_is_written(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("runs", "networks", "tables", "figures"),
        *("report.html", "report.md"),
    }
    names = {*(field.name for field in dataclasses.fields(Tables)), *(exhibit.name for exhibit in MAIN)}
    assert {path.stem for path in (finished / "tables").iterdir()} == names
    pictures = {f"{exhibit.name}.png" for exhibit in MAIN}
    assert {path.name for path in (finished / "figures").iterdir()} == pictures
    copies = finished.parent / "pictures"
    assert {path.name for path in copies.iterdir()} == {*pictures, *(f"{e.name}.csv" for e in MAIN), "report.md"}
    assert all(f"]({name})" in (copies / "report.md").read_text() for name in pictures)
    assert all((copies / name).read_bytes() == (finished / "figures" / name).read_bytes() for name in pictures)
    assert len(networks(finished)) == RUNS
    assert len(list((finished / "runs").glob("*/checkpoint.pt"))) == RUNS
    named = {f"{name}-seed{seed}.pt" for name in TOY.perturbations for seed in range(SEEDS)}
    assert {path.name for path in (finished / "networks").iterdir()} == named
    (own,) = (finished / "runs").glob("MSAM-seed1-*")
    assert (finished / "networks" / "MSAM-seed1.pt").read_bytes() == (own / "checkpoint.pt").read_bytes()
    assert hidden(finished) == []


def test_tables(finished: Path) -> None:
    runs = pd.read_csv(finished / "tables" / "runs.csv")
    assert list(zip(runs["optimizer"], runs["seed"], strict=True)) == [
        (name, seed) for name in ("SGD", "NAG", "SAM", "MSAM") for seed in range(SEEDS)
    ]
    assert list(runs["gradients_per_step"]) == [1, 1, 1, 1, 2, 2, 1, 1]
    assert runs.notna().all(axis=None)
    assert {"lambda_2", "sharpness_0.05", "sharpness_0.5", "rise_along_random", "rise_on_plane"} <= set(runs.columns)
    steps = pd.read_csv(finished / "tables" / "steps.csv")
    assert len(steps) == 4 * SEEDS * STEPS
    assert set(steps.loc[steps["rise"].notna(), "step"]) == {0, 4}
    controls = pd.read_csv(finished / "tables" / "controls.csv")
    assert set(controls["optimizer"]) == set(TOY.controls)
    assert len(controls) == len(TOY.controls) * SEEDS * STEPS
    optimizers = pd.read_csv(finished / "tables" / "optimizers.csv")
    means = runs.groupby("optimizer", sort=False)["test_accuracy"].mean()
    assert list(optimizers["test_accuracy"]) == pytest.approx(list(means))


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_the_report(name: str, finished: Path) -> None:
    text = (finished / name).read_text()
    assert "toy" in text
    assert TOY.description[1:] in text
    claims = [claim for exhibit in MAIN for claim in exhibit.claims]
    assert sum(text.lower().count(verdict) for verdict in VERDICTS) >= len(claims)
    for exhibit in MAIN:
        assert exhibit.prose.title.split("'")[0] in text
    assert "nan" not in text.lower().split()
    if name == "report.md":
        assert all(f"figures/{exhibit.name}.png" in text for exhibit in MAIN)


# --- the same tables


def test_jobs_do_not_change_a_byte(toy: Workload, finished: Path, tmp_path: Path, trainings: Trainings) -> None:
    """Worker processes get the workload by value, also with functions that no module has."""

    def network() -> nn.Module:
        return toys.network()

    study(tmp_path / "out", jobs=2, workload=dataclasses.replace(TOY, network=network))
    assert trainings.count() == RUNS
    assert tables(tmp_path / "out") == tables(finished)
    assert hidden(tmp_path / "out") == []


def test_a_finished_study_trains_nothing(finished: Path, tmp_path: Path, trainings: Trainings) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before, files = stamps(out), tables(out)
    page = study(out)
    assert trainings.count() == 0
    assert stamps(out) == before
    assert tables(out) == files
    assert page.is_file()


def test_more_seeds_add_to_those_that_are_there(finished: Path, tmp_path: Path, trainings: Trainings) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for directory in (out / "runs").glob("*-seed1-*"):
        shutil.rmtree(directory)
    study(out, seeds=1)
    assert trainings.count() == 0, "seed 0 is there"
    before = stamps(out)
    study(out)
    assert trainings.count() == RUNS // SEEDS
    assert stamps(out).items() >= before.items()
    assert tables(out) == tables(finished)


@pytest.mark.parametrize(("jobs", "kind"), [(1, KeyboardInterrupt), (2, RuntimeError)])
def test_an_interrupted_study_goes_on(
    jobs: int,
    kind: type[BaseException],
    toy: Workload,
    finished: Path,
    tmp_path: Path,
    trainings: Trainings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No process trains a third network; what was finished stays, and nothing else does."""
    out = tmp_path / "out"
    before = set(multiprocessing.active_children())
    with monkeypatch.context() as patch:
        patch.setenv("TOY_TROUBLE", f"3:{kind.__name__}")
        with pytest.raises(kind, match="trouble with the toy" if kind is RuntimeError else None):
            study(out, jobs=jobs)
    assert set(multiprocessing.active_children()) == before, "no process is left behind"
    done = networks(out)
    assert 0 < len(done) < RUNS
    assert all((path / "scores.json").is_file() and (path / "checkpoint.pt").is_file() for path in done)
    if jobs == 1:
        assert len(done) == 2
        assert hidden(out) == [], "nothing partial remains"
    assert [path.name for path in out.iterdir()] == ["runs"], "no table or report of half a study"

    kept = stamps(out)
    trainings.count()
    study(out)
    assert trainings.count() == RUNS - len(done)
    assert stamps(out).items() >= kept.items(), "finished runs are not made again"
    assert tables(out) == tables(finished)
    assert hidden(out) == []


def test_what_is_missing_or_partial_is_made_again(finished: Path, tmp_path: Path, trainings: Trainings) -> None:
    """One run's folder is gone, one is empty, and a process that was killed left a partial one."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    gone, emptied, killed = networks(out)[:3]
    shutil.rmtree(gone)
    shutil.rmtree(emptied)
    emptied.mkdir()
    killed.rename(out / "runs" / f".partial-{killed.name}-0123abcd")
    (out / "runs" / f".partial-{killed.name}-0123abcd" / "scores.json").unlink()
    before = stamps(out)
    study(out)
    assert trainings.count() == 3
    assert tables(out) == tables(finished)
    assert hidden(out) == []
    still = {name: stamp for name, stamp in before.items() if not name.startswith("runs/.partial")}
    assert stamps(out).items() >= still.items()


def test_a_run_that_lost_a_file_is_made_again(finished: Path, tmp_path: Path, trainings: Trainings) -> None:
    """However a folder came to be incomplete: the study goes on from what is whole."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (networks(out)[-1] / "scores.json").unlink()
    study(out)
    assert trainings.count() == 1
    assert tables(out) == tables(finished)


def test_a_damaged_run_is_not_silently_used(finished: Path, tmp_path: Path) -> None:
    """A result is gone: the run is made again, or the sentence says what is missing where."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    directory = next((out / "runs").glob("SGD-seed0-*"))
    next(directory.glob("*/plane.safetensors")).unlink()
    try:
        study(out)
    except (ValueError, OSError) as error:
        assert directory.name in str(error)  # noqa: PT017 - either is right
    else:
        assert tables(out) == tables(finished)


# --- other settings


def test_other_settings_have_other_runs(
    finished: Path, tmp_path: Path, trainings: Trainings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finer protocol is measured, another learning rate is trained, and what was there stays for later."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = stamps(out)
    finer = dataclasses.replace(COARSE, line_points=7)
    study(out, seeds=1, protocol=finer)
    assert trainings.count() == 0, "the networks are there: their slices are measured anew"
    assert len(pd.read_csv(out / "tables" / "lines.csv")) == len(TOY.perturbations) * 3 * 7
    assert stamps(out).items() >= before.items()

    recipe = dataclasses.replace(TOY.recipe, lr=0.05)
    study(out, seeds=1, workload=dataclasses.replace(TOY, recipe=recipe))
    assert trainings.count() == RUNS // SEEDS
    steps = pd.read_csv(out / "tables" / "steps.csv")
    assert steps["lr"].max() == pytest.approx(0.05)

    study(out)
    assert trainings.count() == 0, "the first settings' runs are still there"
    assert tables(out) == tables(finished)


def test_the_recording_interval_is_a_setting(finished: Path, tmp_path: Path) -> None:
    """Several records in an epoch are as good as one."""
    out = tmp_path / "out"
    study(out, seeds=1, every=3, exhibits=["A12", "A8"])
    steps = pd.read_csv(out / "tables" / "steps.csv")
    assert set(steps.loc[steps["rise"].notna(), "step"]) == {0, 3, 6}
    assert (out / "report.html").is_file()


def test_without_controls(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workload need not name any."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    page = study(out, exhibits=["F2C"], workload=dataclasses.replace(TOY, controls=()))
    assert "cosine" in page.read_text()


# --- whatever is chosen

ATTACKED = next(e for e in EXHIBITS if any("robustness" in run.measured for run in e.runs(TOY, 1)))


def test_an_exhibit_gets_what_it_needs_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no chosen exhibit wants is not measured; its packages are asked for before anything runs, or not at all."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "art" else find(name))
    with pytest.raises(
        ModuleNotFoundError, match=r"needs adversarial-robustness-toolbox: .*msam-analysis\[study\]', or choose other"
    ):
        study(tmp_path / "out", exhibits=["T1", ATTACKED.name])
    assert list(tmp_path.iterdir()) == []
    study(tmp_path, seeds=1)
    assert not list(tmp_path.rglob("robustness*"))
    steps = pd.read_csv(tmp_path / "tables" / "steps.csv")
    assert "rise" in steps
    assert "loss_along/1" not in steps


def test_a_workload_of_ones_own(tmp_path: Path) -> None:
    """By value, from functions that no module has; its name is that of its runs."""
    width = 6

    def network() -> nn.Module:
        return nn.Sequential(Features(), nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))

    mine = dataclasses.replace(TOY, name="mine", network=network, controls=(), relatives={})
    page = Study(mine, choose(["T1"]), seeds=1, protocol=COARSE, every=4).run(tmp_path, jobs=1, progress=False)
    assert "on mine" in page.read_text()
    assert len(networks(tmp_path)) == len(mine.perturbations)
    again = dataclasses.replace(mine, description="other words")
    before = stamps(tmp_path)
    run_study(again, out=tmp_path, exhibits=["T1"], seeds=1, protocol=COARSE, every=4, jobs=1, progress=False)
    assert stamps(tmp_path) == before


# --- bad settings

BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "workload": (lambda out: run_study("imagenet", out=out), r"unknown workload 'imagenet': expected one of"),
    "exhibit": (lambda out: study(out, exhibits=["F99"]), r"unknown exhibit 'F99': expected some of"),
    "one bad exhibit of two": (lambda out: study(out, exhibits=["T1", "X"]), r"unknown exhibit 'X'"),
    "seeds": (lambda out: study(out, seeds=0), r"seeds must be at least 1, got 0"),
    "fewer seeds": (lambda out: study(out, seeds=-3), r"seeds must be at least 1, got -3"),
    "jobs": (lambda out: study(out, jobs=0), r"jobs must be at least 1, got 0"),
    "every": (lambda out: study(out, every=0), r"every must be a positive integer, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings(name: str, toy: Workload, tmp_path: Path) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing was begun"


def test_no_folder_for_the_output(toy: Workload, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file of the user's")
    with pytest.raises(OSError, match="out"):
        study(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file of the user's"


def test_a_diverged_network_is_named_and_the_rest_is_reported(
    toy: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strong = Perturbation(direction="momentum", normalize="none", rho=1e30)
    diverging = dataclasses.replace(toy, perturbations={**toy.perturbations, "NAG": strong}, controls=())
    page = study(tmp_path, exhibits=["A6r", "F1"], workload=diverging)
    text = page.with_suffix(".md").read_text()
    assert "Diverged, with a loss that is not finite, and nothing measured but accuracies: toy NAG at ρ = 1e+30" in text
    assert "1e+30, seed 0, 1." in text
    rank = next(line for line in text.splitlines() if line.startswith("| A6r"))
    assert "not measured: NAG, seed 0, diverged: its loss is not finite" in rank
    assert "Cannot tell" in rank
    assert (tmp_path / "figures" / "one_step.png").is_file()
    assert not (tmp_path / "figures" / "feature_rank.png").exists()
