"""The command line: one sentence for every mistake, and nothing left half-written.

:func:`command` calls the command's own entry point in this process; a few tests at the end run the installed command.
"""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from msam_analysis.cli import study as cli_study
from msam_analysis.measures.summary import measure
from tests.programs import ended

from .bench import CHECKPOINT, GOOD, MODULE, Command, Outcome, check_numbers, contents, objective, with_option

# --- mistakes

# What is wrong, the command, and words of the one sentence.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing file": (["measure", "gone.pt", *GOOD[2:]], r"no checkpoint at gone\.pt"),
    "a second file missing": (["measure", CHECKPOINT, "gone.pt", *GOOD[2:]], r"no checkpoint at gone\.pt"),
    "a folder without weights": (["measure", "empty", *GOOD[2:]], r"the folder empty holds no checkpoint"),
    "a pattern without files": (["measure", "*.ckpt", *GOOD[2:]], r"the pattern \*\.ckpt holds no checkpoint"),
    "damaged file": (["measure", "damaged.pt", *GOOD[2:]], r"damaged\.pt"),
    "another kind of file": (["measure", "notes.pt", *GOOD[2:]], r"notes\.pt"),
    "a pickle of code": (["measure", "code.pt", *GOOD[2:]], r"code\.pt is a plain pickle"),
    "weights that are NaN": (["measure", "nan.pt", *GOOD[2:]], r"(?i)nan"),
    "keys that do not fit": (with_option("--model", f"{MODULE}:other_model"), r"does not fit"),
    "a model that is none": (with_option("--model", f"{MODULE}:no_model"), r"int"),
    "a frozen model": (with_option("--model", f"{MODULE}:frozen_model"), r"requires_grad|parameter"),
    "a model factory that raises": (with_option("--model", f"{MODULE}:failing_model"), r"the model is unwell"),
    "a factory that needs arguments": (with_option("--model", f"{MODULE}:needs_arguments"), r"argument"),
    "a factory that ends the program": (
        with_option("--model", f"{MODULE}:leaves"),
        r"ended the program \(exit code 0\)",
    ),
    "data that end the program": (with_option("--data", f"{MODULE}:leaves"), r"ended the program"),
    "a module that ends the program": (with_option("--model", "leaving:model"), r"ended the program \(exit code 3\)"),
    "no samples": (with_option("--samples", "0"), r"samples must be at least 1, got 0"),
    "no budget": (with_option("--budget", "0"), r"budget must be a positive number.* got 0.0"),
    "a metric that is none": (with_option("--metrics", "loss,sharp"), r"metrics must be of .*'sharp'"),
    "no metric": (with_option("--metrics", ","), r"metrics must be of"),
    "labels that are too few": (["measure", CHECKPOINT, "nan.pt", *GOOD[2:], "--label", "a"], r"a --label for each of"),
    "labels alike": (["measure", CHECKPOINT, "nan.pt", *GOOD[2:], "--label", "a", "--label", "a"], r"all different"),
    "a precision that is none": (with_option("--dtype", "int8"), r"dtype must be one of float16.*'int8'"),
    "a key that is not there": (with_option("--key", "ema"), r"holds no state dict that fits"),
    "no products": (with_option("--max-hvps", "0"), r"max_hvps must be at least k = 5, got 0"),
    "a tolerance of nothing": (with_option("--tolerance", "0"), r"tolerance must be a positive number"),
    "parameters that are none": (with_option("--parameters", "conv*"), r"conv\*"),
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
