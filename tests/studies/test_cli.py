"""The command line: the library's numbers, one sentence for every mistake, and nothing left half-written.

:func:`command` calls the command's own entry point in this process; a few tests at the end run the installed command.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis import cli, results
from msam_analysis.checkpoints.loading import load_model
from msam_analysis.cli import measure as cli_measure
from msam_analysis.cli import study as cli_study
from msam_analysis.cli.names import distinct_names
from msam_analysis.measures.summary import RADII, measure
from msam_analysis.results import Result
from msam_analysis.studies import study
from tests.programs import ended

MODULE = "workbench"
SOURCE = '''
"""Factories as a user writes them."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

generator = torch.Generator().manual_seed(0)
x = torch.randn(30, 4, generator=generator)
y = torch.randint(3, (30,), generator=generator)
a_number = 5


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def other_model():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def no_model():
    return 3


def frozen_model():
    return model().requires_grad_(False)


def failing_model():
    raise RuntimeError("the model is unwell\\nand says so in two lines")


def needs_an_argument(path):
    return model()


def data():
    return [(x[:20], y[:20]), (x[20:], y[20:])]


def loader():
    return DataLoader(TensorDataset(x, y), batch_size=20)


def shuffling_loader():
    return DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True)


def empty_loader():
    return DataLoader(TensorDataset(x[:0], y[:0]), batch_size=20)


def no_batches():
    return []


def data_set():
    return TensorDataset(x, y)


def failing_data():
    raise RuntimeError("the disk is on fire\\nand so is the other one")


def missing_data():
    return open("no such file")


def incomplete_data():
    return {"a": 1}["b"]


def misshapen_data():
    return [(x[:, :3], y)]


def data_and_squares():
    return data(), squares()


def squares():
    return lambda output, target: (output - F.one_hot(target, 3)).square().mean()


def not_a_scalar():
    return nn.CrossEntropyLoss(reduction="none")


def detached():
    return lambda output, target: output.detach().square().mean()


def failing_loss():
    def loss(output, target):
        raise ArithmeticError("the loss is lost")

    return loss


class Nested:
    data = staticmethod(data)
'''


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def begin(*_: object, **__: object) -> None:
    raise AssertionError("a study begins to train")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a user: a module with factories, and a checkpoint."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def model(:\n")
    (tmp_path / "raising.py").write_text("raise RuntimeError('this module cannot be imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(study, "make", begin)
    modules = [name for name in (MODULE, "broken", "raising") if sys.modules.pop(name, None)]
    assert not modules
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        model(torch.randn(50, 4))
    (tmp_path / "run").mkdir()
    torch.save(model.state_dict(), tmp_path / "run" / "checkpoint.pt")
    (tmp_path / "damaged.pt").write_bytes((tmp_path / "run" / "checkpoint.pt").read_bytes()[:700])
    (tmp_path / "notes.pt").write_text("not weights")
    torch.save(model, tmp_path / "whole.pt")
    torch.save({name: tensor * math.nan for name, tensor in model.state_dict().items()}, tmp_path / "nan.pt")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call the command with arguments, as the installed script does."""

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["msam-analysis", *map(str, arguments)])
        capsys.readouterr()
        try:
            code: object = cli.main()  # type: ignore[func-returns-value]  # None, as a script that ended well
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.modules.pop(MODULE, None)
        captured = capsys.readouterr()
        return Outcome(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return call


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


CHECKPOINT = "run/checkpoint.pt"
GOOD = ("measure", CHECKPOINT, "--model", f"{MODULE}:model", "--data", f"{MODULE}:data", "--out", "out")


def with_option(name: str, value: str) -> list[str]:
    """Return the good command with one option replaced, or added."""
    arguments = list(GOOD)
    if name in arguments:
        arguments[arguments.index(name) + 1] = value
        return arguments
    return [*arguments, name, value]


def objective(loss_fn: Callable[..., torch.Tensor] | None = None, **options: str) -> ma.Objective:
    """Build what the good command measures, from the same module, by the library's calls."""
    namespace: dict[str, object] = {}
    exec(compile(SOURCE, MODULE, "exec"), namespace)  # noqa: S102 - the text above
    factory, data = namespace["model"], namespace["data"]
    assert callable(factory)
    assert callable(data)
    return ma.Objective(load_model(CHECKPOINT, factory), loss_fn or nn.CrossEntropyLoss(), data(), **options)  # type: ignore[arg-type]


def check_numbers(table: pd.DataFrame, out: str) -> None:
    """Every metric is printed, in a line of its own, with its value."""
    for row in table.to_dict("records"):
        lines = [line for line in out.splitlines() if re.search(rf"(?<!\S){re.escape(row['metric'])}(?!\S)", line)]
        values = [float(n) for line in lines for n in re.findall(r"(?<![\w.=])-?\d+\.?\d*(?:e[-+]\d+)?(?![\w.])", line)]
        assert any(math.isclose(value, row["value"], rel_tol=1e-3) for value in values), (row, lines)


# --- measure


def test_measure(bench: Path, command: Command) -> None:
    outcome = command(*GOOD)
    assert outcome.code == 0
    assert outcome.err == ""
    expected = measure(objective())
    check_numbers(expected.table, outcome.out)
    assert CHECKPOINT in outcome.out
    assert "30" in outcome.out, "the settings are printed with the result"
    files = {path.name for path in (bench / "out").rglob("*") if path.is_file()}
    assert files == {"metrics.csv", *(f"{name}.safetensors" for name in expected.results)}
    folder = next((bench / "out").rglob("metrics.csv")).parent
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows] == list(expected.table["metric"])
    assert [float(row["value"]) for row in rows] == list(expected.table["value"])
    for name, result in expected.results.items():
        assert same(results.load(folder / f"{name}.safetensors"), result), name


def same(a: Result, b: Result) -> bool:
    if type(a) is not type(b):
        return False
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)]
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y or repr(x) == repr(y) == "nan" for x, y in pairs
    )


def test_the_same_command_twice_gives_the_same_numbers(bench: Path, command: Command) -> None:
    first = command(*GOOD)
    table = next((bench / "out").rglob("metrics.csv"))
    before = table.read_bytes(), [results.load(path) for path in sorted(table.parent.glob("*.safetensors"))]
    assert command(*GOOD) == first
    assert table.read_bytes() == before[0]
    again = [results.load(path) for path in sorted(table.parent.glob("*.safetensors"))]
    assert all(same(a, b) for a, b in zip(again, before[1], strict=True))
    assert not list(bench.rglob("out/**/.*")), "no temporary file stays"


def test_measure_writes_under_results_by_default(bench: Path, command: Command) -> None:
    assert command(*GOOD[: GOOD.index("--out")]).code == 0
    assert len(list((bench / "results").rglob("metrics.csv"))) == 1


def test_options(bench: Path, command: Command) -> None:
    outcome = command(*GOOD, "--rho", 0.1, "--rho", 0.3, "--eigenvalues", 2, "--batchnorm", "batch", "--seed", 4)
    assert outcome.code == 0
    expected = measure(objective(batchnorm="batch"), radii=(0.1, 0.3), eigenvalues=2, seed=4)
    check_numbers(expected.table, outcome.out)
    assert "λ3" not in outcome.out
    assert "batchnorm batch" in outcome.out


def test_a_loss_of_ones_own(bench: Path, command: Command) -> None:
    """As an option, or beside the data."""

    def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output - torch.eye(3)[target]).square().mean()

    expected = measure(objective(squares)).table
    check_numbers(expected, command(*GOOD, "--loss", f"{MODULE}:squares").out)
    check_numbers(expected, command(*with_option("--data", f"{MODULE}:data_and_squares")).out)
    assert not math.isclose(expected["value"][0], float(objective().loss()), rel_tol=1e-2)


@pytest.mark.parametrize("data", [f"{MODULE}:loader", f"{MODULE}:Nested.data"])
def test_other_data(data: str, bench: Path, command: Command) -> None:
    outcome = command(*with_option("--data", data))
    assert outcome.code == 0, outcome.err
    check_numbers(measure(objective()).table, outcome.out)


def test_several_checkpoints_are_all_saved(bench: Path, command: Command) -> None:
    """Also where their names are alike, as those of two studies are."""
    for place in ("a/run", "b/run"):
        (bench / place).mkdir(parents=True)
        shutil.copy(bench / CHECKPOINT, bench / place / "checkpoint.pt")
    paths = [CHECKPOINT, "a/run/checkpoint.pt", "b/run/checkpoint.pt"]
    outcome = command("measure", *paths, *GOOD[2:])
    assert outcome.code == 0
    assert all(path in outcome.out for path in paths)
    assert len(list((bench / "out").rglob("metrics.csv"))) == 3


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


def test_nothing_stale_beside_new_numbers(bench: Path, command: Command) -> None:
    """A folder of results is replaced as a whole; one with something else in it is not touched."""
    assert command(*GOOD, "--rho", 0.1).code == 0
    assert command(*GOOD, "--rho", 0.3).code == 0
    folder = bench / "out" / "run-checkpoint"
    assert {path.name for path in folder.glob("ball*")} == {"ball-0.3.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (folder / "metrics.csv").rename(folder / "thesis.txt")
    before = contents(bench)
    outcome = command(*GOOD)
    assert outcome.code == 2
    assert "run-checkpoint holds something else" in outcome.err
    assert contents(bench) == before


def test_what_did_not_converge_is_said(bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(*arguments: Any, **options: Any) -> results.BallSharpness:
        return dataclasses.replace(ma.ball_sharpness(*arguments, **options), converged=False)

    monkeypatch.setattr(sys.modules["msam_analysis.measures.summary"], "ball_sharpness", impatient)
    outcome = command(*GOOD)
    assert outcome.out.count("NOT converged") == len(RADII)
    table = pd.read_csv(next((bench / "out").rglob("metrics.csv"))).set_index("metric")["converged"]
    assert not table[f"sharpness ρ={RADII[0]:g}"]
    assert table["λ1"]
    assert math.isnan(table["loss"])


def test_safetensors_and_training_checkpoints(bench: Path, command: Command) -> None:
    from safetensors.torch import save_file

    state = torch.load(bench / CHECKPOINT, weights_only=True)
    save_file(state, bench / "weights.safetensors")
    torch.save({"model": state, "epoch": 3}, bench / "training.pt")
    expected = measure(objective()).table
    for path in ("weights.safetensors", "training.pt"):
        outcome = command("measure", path, *GOOD[2:])
        assert outcome.code == 0, outcome.err
        check_numbers(expected, outcome.out)


# --- mistakes

# What is wrong, the command, and words of the one sentence.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing file": (["measure", "gone.pt", *GOOD[2:]], r"no checkpoint at gone\.pt"),
    "a second file missing": (["measure", CHECKPOINT, "gone.pt", *GOOD[2:]], r"no checkpoint at gone\.pt"),
    "a folder": (["measure", "run", *GOOD[2:]], r"no checkpoint at run"),
    "damaged file": (["measure", "damaged.pt", *GOOD[2:]], r"damaged\.pt"),
    "another kind of file": (["measure", "notes.pt", *GOOD[2:]], r"notes\.pt"),
    "a file that would run code": (["measure", "whole.pt", *GOOD[2:]], r"whole\.pt"),
    "weights that are NaN": (["measure", "nan.pt", *GOOD[2:]], r"(?i)nan"),
    "keys that do not fit": (with_option("--model", f"{MODULE}:other_model"), r"does not fit"),
    "a model that is none": (with_option("--model", f"{MODULE}:no_model"), r"int"),
    "a frozen model": (with_option("--model", f"{MODULE}:frozen_model"), r"requires_grad|parameter"),
    "a model factory that raises": (with_option("--model", f"{MODULE}:failing_model"), r"the model is unwell"),
    "a factory that needs arguments": (with_option("--model", f"{MODULE}:needs_an_argument"), r"argument"),
    "reference without colon": (with_option("--model", MODULE), rf"package\.module:factory, got '{MODULE}'"),
    "reference without module": (with_option("--model", ":model"), r"package\.module:factory"),
    "reference without name": (with_option("--data", f"{MODULE}:"), r"package\.module:factory"),
    "missing module": (with_option("--model", "nowhere:model"), r"cannot import 'nowhere'"),
    "missing submodule": (with_option("--model", f"{MODULE}.models:model"), rf"cannot import '{MODULE}\.models'"),
    "relative module": (with_option("--model", ".models:model"), r"\.models"),
    "missing name": (with_option("--data", f"{MODULE}:nothing"), rf"'{MODULE}' has no 'nothing'"),
    "a name that is no function": (with_option("--data", f"{MODULE}:a_number"), r"int"),
    "a module with a syntax error": (with_option("--model", "broken:model"), r"broken"),
    "a module that raises": (with_option("--model", "raising:model"), r"cannot be imported"),
    "a loader that shuffles": (with_option("--data", f"{MODULE}:shuffling_loader"), r"shuffle"),
    "an empty loader": (with_option("--data", f"{MODULE}:empty_loader"), r"empty"),
    "no batches": (with_option("--data", f"{MODULE}:no_batches"), r"empty"),
    "a data set": (with_option("--data", f"{MODULE}:data_set"), r"DataLoader"),
    "data of the wrong shape": (with_option("--data", f"{MODULE}:misshapen_data"), r"."),
    "data that raise": (with_option("--data", f"{MODULE}:failing_data"), r"the disk is on fire"),
    "data that are not there": (with_option("--data", f"{MODULE}:missing_data"), r"no such file"),
    "data that miss a key": (with_option("--data", f"{MODULE}:incomplete_data"), r"b"),
    "a loss that is no scalar": (with_option("--loss", f"{MODULE}:not_a_scalar"), r"one number"),
    "a loss without gradient": (with_option("--loss", f"{MODULE}:detached"), r"depends on none"),
    "a loss that is no function": (with_option("--loss", f"{MODULE}:no_model"), r"callable|int"),
    "a loss that raises": (with_option("--loss", f"{MODULE}:failing_loss"), r"the loss is lost"),
    "rho negative": (with_option("--rho", "-0.5"), r"rho must be .*-0\.5"),
    "rho NaN": (with_option("--rho", "nan"), r"rho must be .*nan"),
    "rho infinite": (with_option("--rho", "inf"), r"rho must be .*inf"),
    "one rho of two": ([*GOOD, "--rho", "0.1", "--rho", "-1"], r"rho must be"),
    "rho no number": (with_option("--rho", "much"), r"much|--rho"),
    "no eigenvalues": (with_option("--eigenvalues", "0"), r"k must be|eigenvalues"),
    "eigenvalues negative": (with_option("--eigenvalues", "-2"), r"-2"),
    "unknown policy": (with_option("--batchnorm", "train"), r"batchnorm.*'train'"),
    "unknown device": (with_option("--device", "abacus"), r"abacus"),
    "no model": ([*GOOD[:2], *GOOD[4:]], r"model"),
    "no data": ([*GOOD[:4], *GOOD[6:]], r"data"),
    "no checkpoint": (["measure", *GOOD[2:]], r"(?i)checkpoint"),
    "unknown option": ([*GOOD, "--sharp"], r"--sharp"),
    "an option without value": ([*GOOD, "--rho"], r"--rho"),
    "unknown command": (["mesure", *GOOD[1:]], r"mesure"),
    "unknown workload": (["study", "--workload", "imagenet", "--out", "out"], r"unknown workload 'imagenet'"),
    "unknown exhibit": (["study", "--exhibits", "T1,F99", "--out", "out"], r"unknown exhibit 'F99'"),
    "no exhibit": (["study", "--exhibits", "", "--out", "out"], r"exhibit"),
    "no seeds": (["study", "--seeds", "0", "--out", "out"], r"seeds"),
    "seeds negative": (["study", "--seeds", "-1", "--out", "out"], r"seeds"),
    "seeds no number": (["study", "--seeds", "many", "--out", "out"], r"many|--seeds"),
    "no jobs": (["study", "--jobs", "0", "--out", "out"], r"jobs"),
    "a word too many": (["study", "digits"], r"digits"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, bench: Path, command: Command) -> None:
    """A non-zero exit, one line that starts with the command's name, and no file or folder that was not there."""
    arguments, words = MISTAKES[mistake]
    before = contents(bench)
    outcome = command(*arguments)
    assert outcome.code not in (0, None)
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("msam-analysis: ")
    assert re.search(words, outcome.err), outcome.err
    assert len(outcome.err) < 1000
    assert "\x1b" not in outcome.err
    assert contents(bench) == before


def test_an_output_folder_that_is_a_file(bench: Path, command: Command) -> None:
    (bench / "out").write_text("a file of the user's")
    before = contents(bench)
    for arguments in (GOOD, ("study", "--out", "out")):
        outcome = command(*arguments)
        assert outcome.code != 0
        assert len(outcome.err.splitlines()) == 1, outcome.err
        assert outcome.err.startswith("msam-analysis: ")
    assert contents(bench) == before
    assert (bench / "out").read_text() == "a file of the user's"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is full")])
def test_an_interrupted_study(
    error: BaseException, bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli_study, "run_study", fail)
    outcome = command("study")
    assert outcome.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("msam-analysis: ")


def test_an_interrupted_measurement_leaves_nothing(
    bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = contents(bench)
    monkeypatch.setattr(cli_measure, "measure", fail)
    outcome = command(*GOOD)
    assert outcome.code == 130
    assert len(outcome.err.splitlines()) == 1
    assert contents(bench) == before


# --- study


def test_study_arguments(bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is typed is what the study is asked for; where it wrote is printed."""
    asked: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def run_study(*arguments: object, **options: object) -> Path:
        asked.append((arguments, options))
        return Path("elsewhere") / "report.html"

    monkeypatch.setattr(cli_study, "run_study", run_study)
    outcome = command(
        *("study", "--workload", "digits", "--seeds", 4, "--out", "there", "--figures", "pictures"),
        *("--exhibits", "F2C, TA1", "--jobs", 2, "--quiet"),
    )
    assert outcome.code == 0
    for name in ("report.html", "report.md", "tables"):
        assert str(Path("elsewhere") / name) in outcome.out
    (arguments, options) = asked[0]
    assert "digits" in (*arguments, options.get("name"))
    assert (options["seeds"], options["jobs"], options["progress"]) == (4, 2, False)
    assert (options["out"], options["figures"]) == (Path("there"), Path("pictures"))
    assert options["exhibits"] == ["F2C", "TA1"]
    for given, meant in (((), None), (("--exhibits", "all"), ["all"])):
        assert command("study", *given).code == 0
        assert asked[-1][1]["exhibits"] == meant
    assert command("study", "--cluster", "tcp://host:8786").code == 0
    assert (asked[-1][1]["cluster"], asked[-1][1]["jobs"]) == ("tcp://host:8786", None)


# --- help


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["study", "measure", "landscape"]),
        (["study", "--help"], ["--workload", "--seeds", "--out", "--exhibits", "--figures", "--jobs"]),
        (["measure", "--help"], ["checkpoint", "--model", "--data", "--out", "--rho", "package.module:factory"]),
    ],
)
def test_help(arguments: list[str], words: list[str], bench: Path, command: Command) -> None:
    outcome = command(*arguments)
    assert outcome.code == 0
    assert outcome.err == ""
    for word in words:
        assert word.lower() in outcome.out.lower()


def test_without_arguments(command: Command) -> None:
    """The list of commands, as for --help."""
    outcome = command()
    assert "measure" in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


# --- the installed command


def installed() -> str:
    """The command that stands beside this interpreter."""
    script = shutil.which("msam-analysis", path=str(Path(sys.executable).parent))
    assert script is not None, "the package is not installed"
    return script


def test_the_installed_command_measures(bench: Path) -> None:
    """It finds a module in the working directory, which is on no path."""
    outcome = ended([installed(), *GOOD], bench)
    assert outcome.code == 0, outcome.err
    check_numbers(measure(objective()).table, outcome.out)
    assert outcome.err == ""


def test_the_installed_command_refuses(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its script passes the exit code on; the script itself is run here, which spares a start."""
    before = contents(bench)
    monkeypatch.setattr(sys, "argv", ["msam-analysis", "measure", "gone.pt", *GOOD[2:]])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(installed(), run_name="__main__")
    assert isinstance(stop.value.code, int)
    outcome = Outcome(stop.value.code, *capsys.readouterr())
    assert outcome.code == 2
    assert outcome.out == ""
    assert re.fullmatch(r"msam-analysis: no checkpoint at gone\.pt[^\n]*\n", outcome.err)
    assert {name for name in contents(bench) if "__pycache__" not in name} == before
