"""The command under fire: full disks, readers that leave, hostile names, functions of users that misbehave."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pandas as pd
import pytest
from tqdm import tqdm

from msam_analysis import cli, plots
from msam_analysis.cli import checks, saying
from msam_analysis.cli.names import file_names
from msam_analysis.results import files, fingerprint
from tests.programs import ended

from .bench import CHECKPOINT, GOOD, MODULE, Command

ROOT = Path(__file__).parents[2]
LOSS = ("--metrics", "loss")
LINE = ("--dim", "1", "--points", "3")
MEASURED = {"metrics.csv", "metrics.json", "metrics.md", "metrics.tex", "metrics.png", "report.html", "report.md"}


def landscape(*options: str, model: str = "model", data: str = "data", module: str = MODULE) -> tuple[str, ...]:
    return (
        "landscape",
        CHECKPOINT,
        "--model",
        f"{module}:{model}",
        "--data",
        f"{module}:{data}",
        "--out",
        "out",
        *options,
    )


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# --- files first, then the screen


class Gone(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, _: str) -> int:
        raise self.error


ENDS: dict[str, tuple[Callable[[], io.TextIOBase | None], int, str]] = {
    "a reader who left": (lambda: Gone(BrokenPipeError(32, "Broken pipe")), 0, "Broken pipe"),
    "a full disk": (lambda: Gone(OSError(28, "No space left on device")), 1, "No space left"),
    "closed by a function": (lambda: Gone(ValueError("I/O operation on closed file.")), 1, "closed file"),
    "closed from the beginning": (lambda: None, 0, ""),
    "an ASCII terminal": (lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"), 0, ""),
}


@pytest.mark.parametrize("what", ["measure", "landscape"])
@pytest.mark.parametrize(("stream", "code", "says"), ENDS.values(), ids=ENDS)
def test_what_was_measured_is_in_its_files(
    what: str,
    stream: Callable[[], io.TextIOBase | None],
    code: int,
    says: str,
    bench: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", stream())
    outcome = command(*((*GOOD, *LOSS) if what == "measure" else landscape(*LINE)))
    assert outcome.code == code, outcome.err
    wanted = MEASURED | {"record.json"} if what == "measure" else {"run-checkpoint.safetensors", "landscape.png"}
    assert written(bench / "out") == wanted
    if says:
        assert outcome.err.count("\n") == 1
        assert outcome.err.startswith("msam-analysis: all results are in ")
        assert says in outcome.err
    else:
        assert outcome.err == ""


@pytest.mark.parametrize("stream", [None, Gone(OSError(28, "No space left on device")), Gone(ValueError("closed"))])
def test_standard_error_that_is_gone_takes_nothing(
    stream: io.StringIO | None, bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert command(*GOOD, *LOSS).code == 0
    assert written(bench / "out") >= MEASURED
    assert command(*GOOD, "--metrics", "sharp").code == 2


@pytest.mark.parametrize("columns", ["0", "1", "-5", "wide"])
def test_widths_that_are_none(columns: str, bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    outcome = command(*GOOD, *LOSS)
    assert outcome.code == 0
    assert "gradient_norm" in outcome.out


def test_an_ascii_terminal_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with saying.prepared():
        saying.say("1 ± 2 [red]x[/b] \x1b[31m")
    assert raw.getvalue() == rb"1 \xb1 2 [red]x[/b] \x1b[31m" + b"\n"


def test_nobody_watches_a_closed_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert not saying.watched()


@pytest.mark.parametrize("stream", [None, Gone(OSError(28, "No space left on device")), Gone(ValueError("closed"))])
def test_progress_and_warnings_of_anybody_end_nothing(
    stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with saying.prepared():
        with tqdm(total=2, mininterval=0) as bar:
            bar.update()
        print("a line", file=sys.stderr, flush=True)  # noqa: T201 - as a library would
        assert sys.stderr.encoding == "utf-8"
        with pytest.raises(io.UnsupportedOperation):
            sys.stderr.fileno()
    assert sys.stderr is stream


def fail(*_: object, **__: object) -> None:
    raise KeyError("the painter")


@pytest.mark.parametrize(
    ("arguments", "broken", "missing", "says"),
    [
        ((*GOOD, *LOSS), "measure", {"metrics.png"}, "the picture of the metrics could not be made"),
        ((*GOOD, *LOSS), "save", {"metrics.png"}, "the picture of the metrics could not be made"),
        (landscape("--points", "3"), "surface_3d", {"surface.png"}, "the picture surface could not be made"),
        (landscape("--points", "3"), "slice_2d", {"landscape.png"}, "the picture landscape could not be made"),
    ],
)
def test_a_picture_that_fails_takes_nothing_with_it(
    arguments: tuple[str, ...],
    broken: str,
    missing: set[str],
    says: str,
    bench: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = MEASURED | {"record.json"} if arguments[0] == "measure" else {"landscape.png", "surface.png"}
    monkeypatch.setattr(plots, broken, fail)
    outcome = command(*arguments)
    assert outcome.code == 1
    assert f"msam-analysis: {says}, all else is there: KeyError: 'the painter'" in outcome.err
    assert whole - missing <= written(bench / "out")
    assert not missing & written(bench / "out")
    assert "loss" in outcome.out


def test_a_report_that_fails(bench: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msam_analysis.report.write", fail)
    assert command(*GOOD, *LOSS).code == 1
    assert {"metrics.csv", "metrics.json", "metrics.png"} <= written(bench / "out")


# --- text of users is text

NAMES = {
    "markup": "d[/b][red]",
    "a formula": r"$\frac$",
    "half a formula": "a$b_c^d",
    "HTML": "<script>alert(1)</script>",
    "Markdown": "*a*`b`|c_d_",
    "LaTeX": r"\input{x}%&#",
    "a private name": "_hidden",
    "escape": "\x1b[31mred\x07",
    "lines": "a\r\nb",
    "another encoding": "caf\udce9",
    "direction": "a\u202egnp.b",
    "places": "{x}%{y}%s{0}",
    "letters": "模型",
    "long": "x" * 100_000,
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_labels(name: str, bench: Path, command: Command) -> None:
    """On the screen, in every file and picture: as they are, but for what no screen shows."""
    shown = checks.labelled([name, "b"], ["1", "2"])[0]
    labels = ("--label", name, "--label", "b")
    (bench / "b.pt").write_bytes((bench / CHECKPOINT).read_bytes())
    outcome = command("measure", CHECKPOINT, "b.pt", *GOOD[2:], *LOSS, *labels)
    assert (outcome.code, outcome.err) == (0, "")
    table = pd.read_csv(bench / "out" / "comparison" / "metrics.csv")
    assert list(dict.fromkeys(table["label"])) == [shown, "b"]
    found = json.loads((bench / "out" / "comparison" / "metrics.json").read_text())
    assert list(found["checkpoints"]) == [shown, "b"]
    page = (bench / "out" / "comparison" / "report.html").read_text()
    assert "<script>alert" not in page
    for path in (bench / "out").rglob("*"):
        assert path.name.isprintable()
        if path.suffix in (".csv", ".json", ".md", ".tex", ".html"):
            text = path.read_text(encoding="utf-8")
            assert all(char == "\n" or not ("\x00" <= char < " " or char in "\u202e\x7f") for char in text), path
    plane = command(*landscape("--points", "3", "--formats", "svg,html", "--out", "plane"), "--label", name)
    assert (plane.code, plane.err) == (0, "")
    ET.parse(bench / "plane" / "landscape.svg")  # noqa: S314 - our own file


@pytest.mark.parametrize(
    "name", [n for n in NAMES.values() if "/" not in n and len(n) < 256 and "\udce9" not in n], ids=ascii
)
def test_names_of_files(name: str, bench: Path, command: Command) -> None:
    """Files of results have printable names, and the second command goes on from the first."""
    (bench / f"{name}.pt").write_bytes((bench / CHECKPOINT).read_bytes())
    for _ in range(2):
        outcome = command("landscape", f"./{name}.pt", *landscape(*LINE)[2:])
        assert (outcome.code, outcome.err) == (0, "")
    found = written(bench / "out")
    assert len(found) == 2
    assert all(each.isprintable() for each in found)
    assert outcome.out.replace("\n", "").isprintable()


@pytest.mark.parametrize("arguments", [(*GOOD, *LOSS), landscape(*LINE)], ids=["measure", "landscape"])
def test_a_name_of_another_encoding(arguments: tuple[str, ...], bench: Path, command: Command) -> None:
    (bench / "caf\udce9.pt").write_bytes((bench / CHECKPOINT).read_bytes())
    outcome = command(arguments[0], "caf\udce9.pt", *arguments[2:])
    assert outcome.code == 2
    assert (
        outcome.err
        == r"msam-analysis: the name caf\udce9.pt is not UTF-8, and torch cannot open it: rename the file" + "\n"
    )


def test_names_of_files_are_short_and_all_different() -> None:
    long = ["é" * 300, "é" * 301, "a/b", "a-b", "", "\x1b", r"\x1b"]
    found = file_names(long)
    assert len(set(found)) == len(long)
    assert all(len(name.encode()) < 210 and name and "/" not in name for name in found)


# --- functions of users

USERS = """
import os, sys
import torch
from workbench import data, model, x, y


class Own(BaseException):
    pass


def leaves(): sys.exit(0)
def leaves_with_words(*_): sys.exit("good bye")
def own(*_): raise Own("mine")
def gives_up(): raise GeneratorExit
def key(*_): raise KeyError("head")
def stops(): raise StopIteration
def nothing(): assert False
def deep(): return deep()
def no_memory(): raise MemoryError
def interrupts(): raise KeyboardInterrupt


def goes_away():
    os.chdir("/")
    return model()


def data_that_go_away():
    os.chdir("/")
    return data()


def prints():
    print("of mine")
    return model()


class Batches:
    def __init__(self, act): self.act = act
    def __iter__(self):
        yield from data()
        self.act()


def batches_leave(): return Batches(leaves)
def batches_fail(): return Batches(key)
def batches_own(): return Batches(own)
def batches_go_away(): return Batches(lambda: os.chdir("/"))
"""

# Which of the user's functions, what it is for, and words of the one sentence, which ends with its file and line.
FAULTS = {
    "leaves": ("model", r"a function of yours ended the program (exit code 0)"),
    "leaves_with_words": ("model", r"a function of yours ended the program (exit code good bye)"),
    "own": ("model", "Own: mine"),
    "gives_up": ("model", "GeneratorExit"),
    "key": ("model", "KeyError: 'head'"),
    "stops": ("model", "StopIteration"),
    "nothing": ("model", "AssertionError"),
    "deep": ("model", "maximum recursion depth"),
    "no_memory": ("model", "MemoryError"),
    "batches_leave": ("data", "ended the program"),
    "batches_fail": ("data", "KeyError: 'head'"),
    "batches_own": ("data", "Own: mine"),
}


@pytest.fixture
def users(bench: Path) -> Path:
    (bench / "users.py").write_text(USERS)
    return bench


@pytest.fixture(autouse=True)
def _forgotten() -> object:
    """Modules of the bench are those of one test."""
    home = Path.cwd()
    yield
    os.chdir(home)
    for name in ("users", MODULE):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("what", ["measure", "landscape"])
@pytest.mark.parametrize("name", FAULTS)
def test_functions_of_users_that_fail(what: str, name: str, users: Path, command: Command) -> None:
    """One sentence with the user's own line, a code that is not 0, nothing half-written."""
    role, says = FAULTS[name]
    options = {"model": f"{MODULE}:model", "data": f"{MODULE}:data", role: f"users:{name}"}
    parts = ("--model", options["model"], "--data", options["data"], "--out", "out")
    outcome = command(what, CHECKPOINT, *parts, *(LOSS if what == "measure" else LINE))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert says in outcome.err
    assert f"{users / 'users.py'}, line " in outcome.err
    assert not (users / "out").exists()


def test_the_key_to_interrupt_in_a_function(users: Path, command: Command) -> None:
    outcome = command("measure", CHECKPOINT, "--model", "users:interrupts", "--data", f"{MODULE}:data", "--out", "out")
    assert outcome.code == 130
    assert outcome.err.startswith("msam-analysis: interrupted")


@pytest.mark.parametrize("metric", ["own", "key", "leaves_with_words"])
def test_metrics_that_fail(metric: str, users: Path, command: Command) -> None:
    outcome = command(*landscape(*LINE, "--metrics", f"users:{metric}"))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "users.py, line " in outcome.err


def test_a_metric_that_is_called_as_a_picture(users: Path, command: Command) -> None:
    (users / "users.py").write_text(f"{USERS}def surface(objective, w): return float(w.norm())\n")
    outcome = command(*landscape("--points", "3", "--metrics", "users:surface"))
    assert (outcome.code, outcome.err) == (0, "")
    assert written(users / "out") >= {"landscape.png", "surface.png", "metric-surface.png"}


@pytest.mark.parametrize(
    ("role", "name"),
    [("model", "goes_away"), ("data", "data_that_go_away"), ("data", "batches_go_away"), ("model", "prints")],
)
@pytest.mark.parametrize("what", ["measure", "landscape"])
def test_paths_are_those_of_the_beginning(what: str, role: str, name: str, users: Path, command: Command) -> None:
    options = {"model": f"{MODULE}:model", "data": f"{MODULE}:data", role: f"users:{name}"}
    parts = ("--model", options["model"], "--data", options["data"], "--out", "out")
    (users / "b.pt").write_bytes((users / CHECKPOINT).read_bytes())
    outcome = command(what, CHECKPOINT, "b.pt", *parts, *(LOSS if what == "measure" else LINE))
    assert (outcome.code, outcome.err) == (0, "")
    assert " out/" in outcome.out, "as it was given"
    assert str(users) not in outcome.out
    assert len(written(users / "out")) >= 3


def test_the_next_checkpoint_goes_on_after_one_that_leaves(users: Path, command: Command) -> None:
    """A function that ends the program for one checkpoint ends this one alone."""
    text = "def once(path, seen=[]):\n    seen.append(path)\n    return leaves() if len(seen) == 1 else model()\n"
    (users / "users.py").write_text(USERS + text)
    (users / "b.pt").write_bytes((users / CHECKPOINT).read_bytes())
    parts = ("--model", "users:once", "--data", f"{MODULE}:data", "--out", "out")
    outcome = command("measure", CHECKPOINT, "b.pt", *parts, *LOSS)
    assert outcome.code == 1
    assert "FAILED run-checkpoint: SystemExit: it ended the program (" in outcome.out
    table = pd.read_csv(next((users / "out").rglob("metrics.csv")))
    assert set(table["label"]) == {"b"}


def test_a_fault_of_ours_keeps_its_traceback(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(**_: object) -> None:
        exec(compile("raise LookupError('a bug')", "<ours>", "exec"))  # noqa: S102 - a line in no user's file

    monkeypatch.setattr(cli.entry, "where", lambda _: "")
    monkeypatch.setattr(cli.entry, "app", ours)
    monkeypatch.setattr(sys, "argv", ["msam-analysis", "measure"])
    with pytest.raises(LookupError, match="a bug"):
        cli.main()


# --- options and folders, before anything is computed

BAD: dict[str, tuple[tuple[str, ...], str]] = {
    **{
        f"rho {v}": ((*GOOD, *LOSS, "--rho", v), "rho must be a positive number")
        for v in ("0", "-1", "nan", "inf", "1e300")
    },
    **{f"tolerance {v}": ((*GOOD, *LOSS, "--tolerance", v), "tolerance must be") for v in ("0", "nan", "inf")},
    **{f"budget {v}": ((*GOOD, *LOSS, "--budget", v), "budget must be") for v in ("0", "-1", "nan", "inf", "1e-300")},
    **{f"samples {v}": ((*GOOD, *LOSS, "--samples", v), "samples must be at least 1") for v in ("0", "-1")},
    "no eigenvalues": ((*GOOD, *LOSS, "--eigenvalues", "0"), "eigenvalues must be at least 1, got 0"),
    "many seeds": (("study", "--seeds", "9" * 20), "seeds must be from 1 to 10,000"),
    "many eigenvalues": (
        (*GOOD, "--metrics", "eigenvalues", "--eigenvalues", "100000"),
        "k must be between 1 and the number of parameters",
    ),
    "no products": ((*GOOD, *LOSS, "--max-hvps", "0"), "max_hvps must be at least 1, got 0"),
    "a seed that is too large": ((*GOOD, *LOSS, "--seed", "9" * 30), "seed must be from"),
    "an empty label": ((*GOOD, *LOSS, "--label", " "), "none empty"),
    "dim 0": (landscape("--dim", "0"), "--dim must be 1"),
    **{
        f"radius {v}": (landscape("--radius", v), "radius must be a positive")
        for v in ("0", "-1", "nan", "inf", "1e300")
    },
    **{
        f"points {v}": (landscape("--points", v), "points must be from 2 to 3,162")
        for v in ("0", "1", "-1", "1000000001")
    },
    "points on a line": (landscape("--dim", "1", "--points", "9" * 20), "points must be from 2 to 10,000,000"),
    "even points": (landscape("--points", "50"), "points must be odd"),
    **{f"refine {v}": (landscape("--refine", v), "refine must be a fraction") for v in ("0", "1", "nan", "-1")},
    "normalize": (landscape("--normalize", ""), "normalize must be one of"),
    "batchnorm": (landscape("--batchnorm", "none"), "batchnorm must be one of"),
    "one sample": (landscape("--samples", "1"), "samples must be at least 2"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
def test_options(arguments: tuple[str, ...], says: str, bench: Path, command: Command) -> None:
    outcome = command(*arguments)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert says in outcome.err
    assert not (bench / "out").exists()


@pytest.mark.parametrize("out", ["/dev/null", CHECKPOINT, f"{CHECKPOINT}/below", "n" * 256, "a/" + "n" * 256])
@pytest.mark.parametrize("what", ["measure", "landscape", "study"])
def test_folders_that_cannot_be(what: str, out: str, bench: Path, command: Command) -> None:
    """Before data and model are made, or a network is trained."""
    parts = ("--model", f"{MODULE}:failing_model", "--data", f"{MODULE}:failing_data", "--out", out)
    before = {path.name for path in bench.iterdir()}
    outcome = command(what, *((CHECKPOINT, *parts) if what != "study" else ("--out", out)))
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "in the way" in outcome.err or "no results can be written there" in outcome.err
    assert {path.name for path in bench.iterdir()} == before


def test_a_release_that_nobody_installed() -> None:
    assert fingerprint.release("no-such-package") == "not installed"
    assert fingerprint.release("torch")


# --- the same bytes


def test_the_same_command_gives_the_same_bytes_in_another_process(bench: Path) -> None:
    """Whatever the order of sets, the time zone and the moment."""
    found = []
    for seed, zone in (("1", "UTC"), ("2", "UTC-9")):
        options = (
            *landscape("--points", "3", "--metrics", "accuracy"),
            "--formats",
            "png,pdf,svg,npz,vtk,csv",
            "--quiet",
        )
        environment = {"PYTHONHASHSEED": seed, "TZ": zone, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, bench]))}
        program = ended([sys.executable, "-m", "msam_analysis", *options], bench, environment)
        assert program.code == 0, program.err
        found.append({path.name: path.read_bytes() for path in (bench / "out").iterdir()})
        for path in (bench / "out").iterdir():
            path.unlink()
    assert len(found[0]) == 13
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


# --- what is ours, and what is not


def test_what_the_user_put_there_stays(bench: Path, command: Command) -> None:
    command(*GOOD, *LOSS)
    home = next((bench / "out").rglob("metrics.csv")).parent
    (home / "thesis.tex").write_text("mine")
    (home / ".notes").write_text("mine")
    (bench / "elsewhere.csv").write_text("old")
    (home / "metrics.csv").unlink()
    (home / "metrics.csv").symlink_to(bench / "elsewhere.csv")
    debris = f"{files.PARTIAL}{files._machine()}-4194305-1.csv"
    (home / debris).write_text("half")
    (bench / "out" / debris).write_text("half")
    assert command(*GOOD, *LOSS).code == 0
    assert (home / "thesis.tex").read_text() == (home / ".notes").read_text() == "mine"
    assert (home / "metrics.csv").is_symlink()
    assert (bench / "elsewhere.csv").read_text().startswith("label,")
    assert debris not in written(bench / "out")


def test_a_file_that_is_read_only_is_named(bench: Path, command: Command) -> None:
    command(*landscape(*LINE))
    (bench / "out" / "landscape.png").chmod(0o444)
    before = (bench / "out" / "landscape.png").read_bytes()
    outcome = command(*landscape(*LINE, "--label", "other", "--formats", "png,svg"))
    assert outcome.code == 1
    assert "landscape.png is read-only and stays as it is" in outcome.err
    assert (bench / "out" / "landscape.png").read_bytes() == before


def test_killed_in_its_first_write_a_landscape_goes_on(bench: Path, command: Command) -> None:
    (bench / "out").mkdir()
    debris = f"{files.PARTIAL}{files._machine()}-4194305-1.safetensors"
    (bench / "out" / debris).write_text("half")
    assert command(*landscape(*LINE)).code == 0
    assert debris not in written(bench / "out")


@pytest.mark.parametrize("name", ["report.md", "tables", "figures"])
def test_a_folder_of_somebody_else_gets_no_study(name: str, bench: Path, command: Command) -> None:
    (bench / "out").mkdir()
    (bench / "out" / name).mkdir() if "." not in name else (bench / "out" / name).write_text("mine")
    outcome = command("study", "--out", "out")
    assert outcome.code == 2
    assert f"out holds {name}, and no study wrote it: choose another output folder" in outcome.err
    assert {path.name for path in (bench / "out").iterdir()} == {name}
