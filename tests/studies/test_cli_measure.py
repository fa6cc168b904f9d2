"""``msam-analysis measure``: the library's numbers, of one checkpoint or of many, and nothing of anybody's lost."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis import results
from msam_analysis.checkpoints.naming import distinct_names
from msam_analysis.cli.measure import show
from msam_analysis.measures.summary import RADII, measure
from msam_analysis.objective import progress as bar
from msam_analysis.results import Result
from tests.programs import ended, script_ended

from .bench import CHECKPOINT, GOOD, MODULE, Command, check_numbers, objective, with_option

CHEAP = ("--metrics", "loss,trace")
TABLES = {"metrics.csv", "metrics.json", "metrics.md", "metrics.tex", "report.html", "report.md"}


def folder(bench: Path) -> Path:
    """The one folder with a table."""
    (found,) = (bench / "out").rglob("metrics.csv")
    return found.parent


def same(a: Result, b: Result) -> bool:
    """Whether all fields are, but for the vectors, which the command leaves out."""
    if type(a) is not type(b):
        return False
    names = [field.name for field in dataclasses.fields(a) if field.name not in ("vectors", "displacement")]
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or repr(x) == repr(y) == "nan" for x, y in pairs
    )


# --- one checkpoint


def test_measure(bench: Path, command: Command) -> None:
    outcome = command(*GOOD)
    assert outcome.code == 0
    assert outcome.err == ""
    expected = measure(objective())
    check_numbers(expected.table, outcome.out)
    assert CHECKPOINT in outcome.out
    assert "samples 30" in outcome.out, "the settings are printed with the result"
    files = {path.name for path in (bench / "out").rglob("*") if path.is_file()}
    wanted = {*TABLES, "metrics.png", "record.json", *(f"{name}.safetensors" for name in expected.results)}
    assert files == wanted
    with (folder(bench) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == list(expected.table["metric"])
    assert [float(row["value"]) for row in rows] == list(expected.table["value"])
    for name, result in expected.results.items():
        kept = results.load(folder(bench) / f"{name}.safetensors")
        assert same(kept, result), name
        assert not any(getattr(kept, field, torch.empty(0)).numel() for field in ("vectors", "displacement"))


def test_the_json_has_what_is_needed_to_measure_again(bench: Path, command: Command) -> None:
    command(*GOOD, *CHEAP, "--seed", 3)
    found = json.loads((folder(bench) / "metrics.json").read_text())
    assert found["command"].startswith("msam-analysis measure run/checkpoint.pt --model workbench:model")
    assert (found["model"], found["data"], found["loss"]) == (f"{MODULE}:model", f"{MODULE}:data", None)
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    (source,) = found["checkpoints"].values()
    assert source["path"] == CHECKPOINT
    assert len(source["weights"]) == 16
    values = {row["metric"]: row for row in found["rows"]}
    exact = measure(objective(), metrics=("loss", "trace"), seed=3).table.set_index("metric")
    assert values["trace"]["value"] == exact.loc["trace", "value"], "every digit"
    assert values["loss"]["uncertainty"] is None


def test_names_are_whole_in_a_narrow_terminal(bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns: what a number is takes more lines, its name does not lose its radius."""
    monkeypatch.setenv("COLUMNS", "80")
    out = command(*GOOD, "--metrics", "adaptive").out
    for name in ("adaptive_ball_sharpness@0.05", "adaptive_one_step_sharpness@0.5"):
        assert f"│ {name} " in out
    assert max(map(len, out.split("batchnorm")[0].splitlines())) <= 80


def test_vectors_are_saved_where_they_are_asked_for(bench: Path, command: Command) -> None:
    command(*GOOD, "--metrics", "eigenvalues", "--vectors")
    pairs = results.load(folder(bench) / "eigenvalues.safetensors")
    assert isinstance(pairs, results.Eigenpairs)
    assert torch.equal(pairs.vectors, ma.top_eigenvalues(objective(), 5, max_hvps=200).vectors)


def test_the_same_command_twice_gives_the_same_bytes(bench: Path, command: Command) -> None:
    first = command(*GOOD)
    before = {path.name: path.read_bytes() for path in folder(bench).iterdir()}
    assert command(*GOOD) == first
    assert {path.name: path.read_bytes() for path in folder(bench).iterdir()} == before
    assert not list(bench.rglob("out/**/.*")), "no temporary file stays"


def test_measure_writes_under_results_by_default(bench: Path, command: Command) -> None:
    assert command(*GOOD[: GOOD.index("--out")], *CHEAP).code == 0
    assert len(list((bench / "results").rglob("metrics.csv"))) == 1


def test_options(bench: Path, command: Command) -> None:
    outcome = command(*GOOD, "--rho", 0.1, "--rho", 0.3, "--eigenvalues", 2, "--batchnorm", "batch", "--seed", 4)
    assert outcome.code == 0
    expected = measure(objective(batchnorm="batch"), radii=(0.1, 0.3), eigenvalues=2, seed=4)
    check_numbers(expected.table, outcome.out)
    assert "lambda_3" not in outcome.out
    assert "batchnorm batch" in outcome.out


def test_further_options(bench: Path, command: Command) -> None:
    """Samples, precision, parameters and the examination reach the objective; a number says whether they did."""
    options = ("--samples", 7, "--dtype", "float64", "--parameters", "0.*", "--no-examine", "--quiet")
    outcome = command(*GOOD, "--metrics", "loss,eigenvalues", "--eigenvalues", 1, "--tolerance", 1e-8, *options)
    assert outcome.code == 0, outcome.err
    for words in ("samples 7", "dtype float64", "parameters 25", "not examined"):
        assert words in outcome.out
    chosen = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:7].sort().values
    whole = ma.Objective(
        objective().model, nn.CrossEntropyLoss(), objective().batches, dtype=torch.float64, parameters="0.*"
    )
    expected = ma.top_eigenvalues(whole.with_samples(chosen), 1, tolerance=1e-8).values[0]
    row = pd.read_csv(folder(bench) / "metrics.csv").set_index("metric").loc["lambda_1"]
    assert row["value"] == pytest.approx(float(expected), rel=1e-10)
    assert row["uncertainty"] < 1e-8 * row["value"]


def test_a_budget_that_is_over_leaves_out_what_was_not_begun(
    bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = sys.modules["msam_analysis.measures.summary"]
    ticks = iter(range(10**6))
    monkeypatch.setattr(summary, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    outcome = command(*GOOD, "--budget", 0.05)
    assert outcome.code == 0
    assert "not measured " in outcome.out
    table = pd.read_csv(folder(bench) / "metrics.csv")
    assert 0 < len(table) < len(measure(objective()).table)


def test_a_loss_of_ones_own(bench: Path, command: Command) -> None:
    """As an option, or beside the data."""

    def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - torch.eye(3)[target]).square().mean()

    expected = measure(objective(squares), metrics=("loss", "trace")).table
    check_numbers(expected, command(*GOOD, *CHEAP, "--loss", f"{MODULE}:squares").out)
    check_numbers(expected, command(*with_option("--data", f"{MODULE}:data_and_squares"), *CHEAP).out)
    assert not math.isclose(expected["value"][0], float(objective().loss()), rel_tol=1e-2)


@pytest.mark.parametrize("data", [f"{MODULE}:loader", f"{MODULE}:Nested.data"])
def test_other_data(data: str, bench: Path, command: Command) -> None:
    outcome = command(*with_option("--data", data), *CHEAP)
    assert outcome.code == 0, outcome.err
    check_numbers(measure(objective(), metrics=("loss", "trace")).table, outcome.out)


def test_what_did_not_converge_is_said(bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(*arguments: Any, **options: Any) -> results.BallSharpness:
        return dataclasses.replace(ma.ball_sharpness(*arguments, **options), converged=False)

    monkeypatch.setattr(sys.modules["msam_analysis.measures.summary"], "ball_sharpness", impatient)
    outcome = command(*GOOD, "--metrics", "loss,ball,eigenvalues")
    assert outcome.out.count("NOT converged") == len(RADII)
    table = pd.read_csv(folder(bench) / "metrics.csv").set_index("metric")["converged"]
    assert not table[f"ball_sharpness@{RADII[0]:g}"]
    assert table["lambda_1"]
    assert math.isnan(table["loss"])


def test_files_of_other_kinds(bench: Path, command: Command) -> None:
    """A safetensors file, one of a training, a module saved whole, a folder, and a factory that loads by itself."""
    from safetensors.torch import save_file

    state = torch.load(bench / CHECKPOINT, weights_only=True)
    save_file(state, bench / "weights.safetensors")
    torch.save({"model": state, "epoch": 3}, bench / "training.pt")
    expected = measure(objective(), metrics=("loss", "trace")).table
    for path in ("weights.safetensors", "training.pt", "whole.pt", "run"):
        outcome = command("measure", path, *GOOD[2:], *CHEAP)
        assert outcome.code == 0, outcome.err
        check_numbers(expected, outcome.out)
    check_numbers(expected, command(*with_option("--model", f"{MODULE}:loaded"), *CHEAP).out)


def test_which_of_two_sets_and_which_names(bench: Path, command: Command) -> None:
    state = torch.load(bench / CHECKPOINT, weights_only=True)
    half = {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    torch.save({"net": state, "ema": half, "extra": {"x": torch.ones(2)}}, bench / "two.pt")
    torch.save({**state, "head.weight": torch.ones(2)}, bench / "more.pt")
    asked = command("measure", "two.pt", *GOOD[2:], *CHEAP)
    assert asked.code == 2
    assert "'net.'" in asked.err
    assert "'ema.'" in asked.err
    expected = measure(objective(), metrics=("loss", "trace")).table
    for options in (("--key", "net"), ("--prefix", "net.")):
        check_numbers(expected, command("measure", "two.pt", *GOOD[2:], *CHEAP, *options).out)
    assert command("measure", "more.pt", *GOOD[2:], *CHEAP).code == 2
    check_numbers(expected, command("measure", "more.pt", *GOOD[2:], *CHEAP, "--ignore", "head.*").out)


# --- many checkpoints


@pytest.fixture
def many(bench: Path) -> Path:
    """Ten checkpoints of a run, whose names order wrongly as text."""
    state = torch.load(bench / CHECKPOINT, weights_only=True)
    (bench / "many").mkdir()
    for step in range(2, 12):
        scaled = {
            name: value * (1 + step / 10) if value.is_floating_point() else value for name, value in state.items()
        }
        torch.save({"state_dict": scaled, "global_step": step}, bench / "many" / f"step={step}.ckpt")
    return bench


def test_many_checkpoints(many: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = command("measure", "many", *GOOD[2:], *CHEAP)
    assert outcome.code == 0, outcome.err
    assert max(map(len, outcome.out.split("saved in")[0].split("batchnorm")[0].splitlines())) <= 80
    home = many / "out" / "comparison"
    table = pd.read_csv(home / "metrics.csv")
    assert list(dict.fromkeys(table["step"])) == list(range(2, 12)), "by step, and not by name"
    names = {path.name for path in home.iterdir()}
    assert names == {*TABLES, *(f"{metric}.png" for metric in ("loss", "gradient_norm", "weight_norm", "trace"))}
    state = torch.load(many / "many" / "step=11.ckpt", weights_only=True)["state_dict"]
    model = objective().model
    model.load_state_dict(state)
    whole = ma.Objective(model, nn.CrossEntropyLoss(), objective().batches)
    assert table[table["step"] == 11].set_index("metric").loc["trace", "value"] == ma.trace(whole).value
    markdown = (home / "metrics.md").read_text().splitlines()
    assert markdown[0] == "| checkpoint | loss | gradient_norm | weight_norm | trace |"
    assert len(markdown) == 12
    assert r"gradient\_norm" in (home / "metrics.tex").read_text()


def test_a_checkpoint_that_fails_is_named_and_the_others_are_measured(many: Path, command: Command) -> None:
    (many / "many" / "step=5.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    outcome = command("measure", "many", *GOOD[2:], *CHEAP)
    assert outcome.code == 1
    assert outcome.err == ""
    assert "FAILED many-step=5: ValueError: many/step=5.ckpt is a git-lfs pointer" in outcome.out
    table = pd.read_csv(many / "out" / "comparison" / "metrics.csv")
    assert sorted(dict.fromkeys(table["step"].dropna())) == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    found = json.loads((many / "out" / "comparison" / "metrics.json").read_text())
    assert list(found["failures"]) == ["many-step=5"]


def test_labels(many: Path, command: Command) -> None:
    options = ("--label", "before", "--label", "after[/b] & more")
    outcome = command("measure", "many/step=2.ckpt", "many/step=3.ckpt", *GOOD[2:], *CHEAP, *options)
    assert outcome.code == 0, outcome.err
    assert "after[/b] & more" in outcome.out
    table = pd.read_csv(many / "out" / "comparison" / "metrics.csv")
    assert list(dict.fromkeys(table["label"])) == ["before", "after[/b] & more"]
    assert "after[/b] &amp; more" in (many / "out" / "comparison" / "report.html").read_text()


def test_several_checkpoints_are_all_saved(bench: Path, command: Command) -> None:
    """Also where their names are alike, as those of two studies are."""
    for place in ("a/run", "b/run"):
        (bench / place).mkdir(parents=True)
        shutil.copy(bench / CHECKPOINT, bench / place / "checkpoint.pt")
    paths = [CHECKPOINT, "a/run/checkpoint.pt", "b/run/checkpoint.pt"]
    outcome = command("measure", *paths, *GOOD[2:], *CHEAP)
    assert outcome.code == 0
    assert {path.parent.name for path in (bench / "out").rglob("record.json")} == set(
        distinct_names([Path(path) for path in paths])
    )


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["run/c.pt"], ["run-c"]),
        (["c.pt"], ["c"]),
        (["p/run/c.pt", "q/run/c.pt"], ["p-run-c", "q-run-c"]),
        (["p/run/c.pt", "q/run/d.pt"], ["run-c", "run-d"]),
        (["run/c.pt", "run/c.safetensors", "./run/c.pt"], ["run-c", "run-c-2", "run-c-3"]),
        (["/a/p/run/c.pt", "/b/p/run/c.pt", "e/f.pt"], ["a-p-run-c", "b-p-run-c", "e-f"]),
        (["../c.pt", "c.pt"], ["c", "c-2"]),
    ],
)
def test_names_of_result_folders(paths: list[str], names: list[str]) -> None:
    assert distinct_names([Path(path) for path in paths]) == names


# --- nothing is lost


def test_results_of_other_settings_stay(bench: Path, command: Command) -> None:
    assert command(*GOOD, "--metrics", "ball", "--rho", 0.1).code == 0
    before = {path: path.read_bytes() for path in (bench / "out").rglob("*") if path.is_file()}
    assert command(*GOOD, "--metrics", "ball", "--rho", 0.3).code == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(path.name for path in (bench / "out").iterdir()) == ["run-checkpoint", "run-checkpoint-2"]


def test_files_of_the_user_stay(bench: Path, command: Command) -> None:
    """In the folder that the results would have, and in one that they have."""
    mine = bench / "out" / "run-checkpoint"
    mine.mkdir(parents=True)
    (mine / "metrics.csv").write_text("mine")
    assert command(*GOOD, *CHEAP).code == 0
    assert (mine / "metrics.csv").read_text() == "mine"
    assert [path.name for path in mine.iterdir()] == ["metrics.csv"]
    ours = bench / "out" / "run-checkpoint-2"
    (ours / "thesis.tex").write_text("mine")
    assert command(*GOOD, *CHEAP).code == 0
    assert (ours / "thesis.tex").read_text() == "mine"


def test_an_interrupted_measurement_goes_on(bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is not measured again, and the end is what it is without the interrupt, byte for byte."""
    summary: Any = sys.modules["msam_analysis.measures.summary"]
    original: Callable[..., Any] = summary.trace
    calls: list[str] = []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append("trace")
        if len(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(summary, "trace", stopping)
    options = ("--metrics", "loss,average,trace")
    outcome = command(*GOOD, *options)
    assert outcome.code == 130
    assert outcome.err.splitlines() == [
        "msam-analysis: interrupted; what is finished is kept, and the same command goes on from there"
    ]
    assert "average.safetensors" in {path.name for path in (bench / "out" / "run-checkpoint").iterdir()}
    monkeypatch.setattr(summary, "average_sharpness", None)  # would fail if it were called
    assert command(*GOOD, *options).code == 0
    found = {path.name: path.read_bytes() for path in folder(bench).iterdir()}
    monkeypatch.undo()
    shutil.rmtree(bench / "out")
    monkeypatch.chdir(bench)
    monkeypatch.setattr(sys, "path", [str(bench), *sys.path])
    assert command(*GOOD, *options).code == 0
    assert {path.name: path.read_bytes() for path in folder(bench).iterdir()} == found


@pytest.mark.parametrize("where", ["closed", "full", "ascii"])
def test_results_are_saved_before_they_are_printed(where: str, bench: Path) -> None:
    """To a reader that is gone, a full disk, a terminal that has no letters but ASCII's."""
    if where == "full" and not Path("/dev/full").exists():
        pytest.skip("a device of Linux")
    program = [sys.executable, "-m", "msam_analysis", *GOOD, *CHEAP]
    quoted = " ".join(f"'{part}'" for part in program)
    line = {"closed": f"{quoted} | true", "full": f"{quoted} > /dev/full", "ascii": quoted}[where]
    variables = {"PYTHONPATH": str(Path(ma.__file__).parents[1]), "MPLBACKEND": "Agg"}
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"} if where == "ascii" else {}
    outcome = ended(["sh", "-c", line], bench, {**variables, **ascii_only})
    assert (bench / "out" / "run-checkpoint" / "metrics.csv").is_file(), outcome.err
    assert "Traceback" not in outcome.err
    assert "yours" not in outcome.err


def test_progress_in_a_log_is_sparse(bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of seven seconds a look there are few lines, with what the solver has told; none with --quiet."""
    clock = iter(range(0, 10**6, 7))
    monkeypatch.setattr(bar, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    said = command(*GOOD, "--metrics", "loss,average,trace,flatness,fisher-rao").err.splitlines()
    looks = next(clock) // 7
    assert 5 < len(said) < looks / 5
    assert re.fullmatch(r"run-checkpoint 1/1: average, \d+/50 draws \[.*\]", said[0])
    assert command(*with_option("--out", "again"), *CHEAP, "--quiet").err == ""


def test_what_a_budget_ended_is_marked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In the table of many, where what a number is has no room."""
    row = {"metric": "trace", "value": 2.0, "uncertainty": 0.5, "converged": None, "meaning": "a trace"}
    rows = {"whole": row, "cut": {**row, "meaning": "a trace; the budget ended it after 3 of 30 products"}}
    measured = {label: results.Measurement(rows=(one,), results={}) for label, one in rows.items()}
    sources = {label: {"folder": label, "taken": "weights"} for label in rows}
    show(results.Comparison(measurements=measured, sources=sources, baseline="whole"), tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"whole +│ +2 ±0\.5 │", said)
    assert re.search(r"cut +│ +2 ±0\.5† │", said)
    assert "† ended by the budget" in said


# --- several processes

ILL = f"""
import os
from {MODULE} import loaded


def model(path):
    if "ill" in str(path) and os.environ.get("RANK") == "1":
        raise OSError("this machine cannot read it")
    return loaded(path)
"""


def test_two_processes_measure_what_one_does(bench: Path, command: Command) -> None:
    """One of them prints, draws and writes; a checkpoint that one process cannot load is left out by both."""
    shutil.copy(bench / CHECKPOINT, bench / "ill.pt")
    (bench / "machines.py").write_text(ILL, encoding="utf-8")
    asked = ("measure", CHECKPOINT, "ill.pt", "--model", "machines:model", "--data", f"{MODULE}:data", *CHEAP)
    assert command(*asked, "--out", "one").code == 0
    start = bench / "torchrun.py"
    start.write_text("from torch.distributed.run import main\n\nmain()\n", encoding="utf-8")
    how = ("--standalone", "--nproc-per-node", "2", "-m", "msam_analysis")
    done = script_ended(start, *how, *asked, "--out", "two", folder=bench)
    assert done.code == 1, "what failed says so by the code"
    assert done.out.count("saved in two/") == 1
    assert "FAILED ill: OSError: process 1: this machine cannot read it" in done.out
    assert "processes 2" in done.out
    (table,) = (bench / "two").rglob("metrics.csv")
    found = pd.read_csv(table).set_index("metric")["value"]
    for metric, value in measure(objective(), metrics=("loss", "trace")).table.set_index("metric")["value"].items():
        assert found[metric] == pytest.approx(value, rel=1e-5, nan_ok=True), metric


@pytest.mark.parametrize(("rank", "code"), [("0", 1), ("1", 0)])
def test_what_failed_is_the_code_of_the_first_process(
    rank: str, code: int, bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first one that ends ill torchrun ends all, while the first one still draws and writes."""
    (bench / "ill.pt").write_bytes(b"no weights")
    monkeypatch.setenv("RANK", rank)
    ways = ("--model", f"{MODULE}:loaded", "--data", f"{MODULE}:data")
    assert command("measure", CHECKPOINT, "ill.pt", *ways, *CHEAP, "--out", "one").code == code
