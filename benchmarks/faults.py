"""What faults do: kills, hostile files, wrong commands, threads, closed pipes, full disks, names; see docs/trust.md.

``python benchmarks/faults.py`` (or ``make faults``) takes about ten minutes on two cores; ``--only kills`` runs those
parts whose name contains the word. A part counts what it tried and what held: the results are those of an undisturbed
run, byte for byte, or one sentence of ours says what is wrong. What did not hold is named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases of the tests are tried here in full

from common import machine, save

import msam_analysis as ma
from msam_analysis import cli
from tests.analysis import (
    damaged,
    hostile,
    test_hostile_checkpoints,
    test_hostile_results,
    test_log_faults,
    test_threads,
)
from tests.builders import KINDS
from tests.programs import SERVER, run, variables
from tests.studies import bench
from tests.studies.test_cli import MISTAKES
from tests.trust.cases import is_sentence

RESULTS = Path(__file__).parent / "results" / "faults_cpu.json"


class Part:
    """How often something was tried, and where it did not hold."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what
        self.tried = 0
        self.failed: list[str] = []
        self.more: dict[str, Any] = {}

    def count(self, holds: bool, what: str) -> None:  # noqa: D102
        self.tried += 1
        if not holds:
            self.failed.append(what)

    @contextlib.contextmanager
    def case(self, what: str) -> Iterator[None]:
        """Count a case that holds unless it raises."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is counted
            self.count(False, f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            self.count(True, what)


# ------------------------------------------------------------------------------------------------------------- programs

PROJECT = """
import torch
from torch import nn
def network(): return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(600, 4, generator=generator), torch.randint(0, 3, (600,), generator=generator)
    return list(zip(x.split(100), y.split(100)))
"""
COMMAND = """
import sys
from msam_analysis import cli
sys.argv = ["msam-analysis", *{arguments!r}]
cli.main()
"""
TRAINING = """
from pathlib import Path
import torch
from torch import nn
import msam
import msam_analysis as ma
from msam_analysis.results import atomic_path

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
optimizer = msam.MSAM(model.parameters(), lr=0.1, rho=0.3, momentum=0.9)
x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
state, out = Path("state.pt"), Path("out")
out.mkdir(exist_ok=True)
saved = torch.load(state, weights_only=True) if state.exists() else None
start = 0
{watch}
if saved is not None:
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    start = saved["step"]
    {back}
for step in range(start, 240):
    {before}
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    if step % 7 == 6:
        parts = {{"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, {kept}}}
        with atomic_path(state) as partial:
            torch.save(parts, partial)
{end}
torch.save([p.detach() for p in model.parameters()], out / "weights.pt")
"""
STUDY = """
from msam_analysis.studies.study import run_study
from tests.studies.toy import COARSE, TOY
if __name__ == "__main__":
    run_study(TOY, seeds=2, out="out", exhibits=["A3"], jobs=1, protocol=COARSE, progress=False)
"""
MODEL = ("--model", "proj:network", "--data", "proj:data")
MEASURE = ("measure", "ck.pt", *MODEL, "--metrics", "loss,average,ball,eigenvalues,trace", "--out", "out")
LANDSCAPE = ("landscape", "ck.pt", *MODEL, "--points", "15", "--out", "out", "--quiet")
MONITOR = TRAINING.format(
    watch="""monitor = ma.Monitor(optimizer, [ma.probes.Norms(), ma.probes.MomentumGradientCosine(after=True)], every=2,
    path=out / "run.jsonl", to=[ma.loggers.CSV(out / "run.csv")])
if saved is None: monitor.load_state_dict({**monitor.state_dict(), "step": 0})""",
    back='monitor.load_state_dict(saved["monitor"])',
    before="pass",
    kept='"monitor": monitor.state_dict()',
    end="monitor.close()",
)
RECORDER = TRAINING.format(
    watch='recorder = ma.TrajectoryRecorder(out / "path", model, optimizer, every=3, dtype=torch.float16)\n'
    "if saved is None: recorder.rewind(-1)",
    back="recorder.rewind(start - 1)",
    before="recorder.record(step)",
    kept="",
    end="",
)
PROGRAMS = {
    "measure": COMMAND.format(arguments=list(MEASURE)),
    "landscape": COMMAND.format(arguments=list(LANDSCAPE)),
    "study": STUDY,
    "monitor": MONITOR,
    "recorder": RECORDER,
}


def project(folder: Path) -> None:
    """Make the folder of somebody who has a network and a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "proj.py").write_text(PROJECT)
    namespace: dict[str, Any] = {}
    exec(PROJECT, namespace)  # noqa: S102 -- the text above
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(namespace["network"]().state_dict(), folder / "ck.pt")


def started(script: Path, folder: Path, log: Path) -> Any:
    """Start a script in a process of its own, with the library imported."""
    environment = variables({"PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), str(folder)))})
    process = SERVER.Process(target=run, args=(script, (), folder, environment, False, log, log))
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """The results in a folder, by name; hidden files are none."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def kills(folder: Path, draw: random.Random, rounds: int) -> Part:
    """Kill programs at random moments, and run the same command again until it ends."""
    part = Part("kills", "SIGKILL at a random moment, then the same command again: the results are equal, to the byte")
    part.more["kills"] = {}
    project(folder / "work")
    # the first start of all takes longest, and would mislead
    started(Path(__file__).parent / "common.py", folder / "work", folder / "log").join()
    for name, text in PROGRAMS.items():
        here, script, log = folder / "work", folder / f"{name}.py", folder / "log"
        script.write_text(text)
        project(here)
        begun = time.monotonic()
        process = started(script, here, log)
        process.join()
        seconds, whole = time.monotonic() - begun, contents(here / "out")
        if process.exitcode or not whole:
            part.count(False, f"{name}: undisturbed, it ended with {process.exitcode}: {log.read_text()[-200:]}")
            continue
        for _ in range(rounds if name != "study" else max(1, rounds // 4)):
            project(here)
            killed = 0
            while True:
                process = started(script, here, log)
                process.join(draw.uniform(0.05, 1.0) * seconds if killed < 3 else None)
                if process.exitcode is not None:
                    break
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
                killed += 1
            part.more["kills"][name] = part.more["kills"].get(name, 0) + killed
            found = contents(here / "out")
            hidden = [path for path in (here / "out").rglob(".*") if path.is_file() and path.name != ".lock"]
            part.more["hidden files left"] = part.more.get("hidden files left", 0) + len(hidden)
            unlike = sorted(key for key in found.keys() | whole.keys() if found.get(key) != whole.get(key))
            ended = "" if process.exitcode == 0 else f", it ended with {process.exitcode}: {log.read_text()[-200:]}"
            part.count(not unlike and not ended, f"{name}, killed {killed} times: differs in {unlike[:4]}{ended}")
    return part


# ---------------------------------------------------------------------------------------------------------------- files


def hostile_results(folder: Path, share: int) -> Part:
    """Every field and tensor of every kind of result, in every wrong way; or one file in so many of these."""
    part = Part(
        "hostile results", "files of our own results with one thing changed: one sentence, or a result that works"
    )
    path = folder / "result.safetensors"
    for kind in (*KINDS, "pca_plane", "slice_2d"):
        test_hostile_results.whole(kind).save(path)
        for what, write in list(hostile.files(path))[::share]:
            write()
            with part.case(f"{kind}: {what}"):
                end = test_hostile_results.fate(lambda: ma.results.load(path), path)
                part.more[end] = part.more.get(end, 0) + 1
    return part


def hostile_checkpoints(folder: Path, draw: random.Random, number: int) -> Part:
    """Random damage to files of every format, and a few bytes that ask for gigabytes."""
    part = Part("hostile checkpoints", "checkpoints of eight formats, damaged at random, and made to cost much")
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    names = sorted(damaged.FORMATS)
    for count in range(number):
        name = names[count % len(names)]
        kinds, many = ["cut", "put", "insert", "drop", "repeat"], draw.randint(1, 4)
        changes = [(draw.choice(kinds), draw.random(), draw.random(), draw.choice(damaged.WORDS)) for _ in range(many)]
        files, inner = test_hostile_checkpoints.whole(name), damaged.FORMATS[name][1]
        hurt = f"weights/{inner}" if inner else "weights"
        shutil.rmtree(folder / "it", ignore_errors=True)
        (folder / "it").mkdir()
        content = damaged.changed(files[hurt], changes)
        test_hostile_checkpoints.put(folder / "it", {**files, hurt: content})
        begun = time.monotonic()
        with part.case(f"{name}: {changes}"):
            end = test_hostile_checkpoints.fate(folder / "it" / "weights")
            part.more[end] = part.more.get(end, 0) + 1
        slowest = max(slowest, time.monotonic() - begun)
    for what, (pickled, message) in damaged.PICKLES.items():
        for write in (damaged.archive, damaged.legacy):
            write(folder / "weights.pt", pickled)
            begun = time.monotonic()
            with part.case(what):
                refused(lambda: ma.checkpoints.load_weights(folder / "weights.pt"), message)
            slowest = max(slowest, time.monotonic() - begun)
    part.more["slowest, s"] = round(slowest, 1)
    part.more["peak memory more than before, MiB"] = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    ) // 1024
    return part


def refused(call: Callable[[], object], message: str) -> None:
    """Require one sentence of ours."""
    try:
        call()
    except ValueError as error:
        assert re.search(message, str(error)), error  # noqa: PT017 -- no test
        assert is_sentence(str(error)), error  # noqa: PT017
        return
    raise AssertionError("it was not refused")


def logs(folder: Path) -> Part:
    """What happens to a monitor's files while it records."""
    part = Part("logs", "a monitor's file emptied, moved, cut, replaced, full: rows go on or one warning, same weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("jsonl", "csv"):
            for what in test_log_faults.FAULTS:
                shutil.rmtree(folder / "log", ignore_errors=True)
                (folder / "log").mkdir()
                with part.case(f"{kind}: {what}"):
                    test_log_faults.test_the_training_goes_on(what, kind, folder / "log")
    return part


# ---------------------------------------------------------------------------------------------------- command, threads


def called(arguments: Sequence[str]) -> tuple[int, str]:
    """Call the command in this process: its status, and what it wrote to standard error."""
    said = io.StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["msam-analysis", *map(str, arguments)]),
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.modules.pop(bench.MODULE, None)
    return code if isinstance(code, int) else 0 if code is None else 1, said.getvalue()


def commands(folder: Path) -> Part:
    """A table of wrong commands."""
    part = Part("wrong commands", "one line, a status that is not 0, and no file that was not there before")
    with warnings.catch_warnings(), inside(bench_in(folder)), mock.patch.dict(os.environ, COLUMNS="200"):
        warnings.simplefilter("ignore")
        for what, (arguments, words) in MISTAKES.items():
            before = bench.contents(Path())
            code, said = called(arguments)
            holds = code not in (0, None) and len(said.splitlines()) == 1 and re.search(words, said) is not None
            part.count(holds and bench.contents(Path()) == before, f"{what}: status {code}, {said[:150]!r}")
    return part


def names(folder: Path) -> Part:
    """Names of folders and labels that look like markup, options, or patterns."""
    part = Part("names", "folders and labels with brackets, quotes, percent signs and the like: shown as they are")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("a[/b]c", "[red]", "[link=x]", "%s {} $x", "quote'\"", "<b>&amp;</b>", "ü–漢", "a b"):
            project(folder / "named")
            with inside(folder / "named"):
                shutil.copy("ck.pt", f"{name.replace('/', '')}.pt")
                for arguments in (
                    (
                        "measure",
                        f"{name.replace('/', '')}.pt",
                        *MODEL,
                        "--metrics",
                        "loss",
                        "--out",
                        "m",
                        "--label",
                        name,
                    ),
                    ("landscape", "ck.pt", *MODEL, "--points", "3", "--quiet", "--out", "l", "--label", name),
                ):
                    code, said = called(arguments)
                    sys.modules.pop("proj", None)
                    kept = bool(contents(Path(arguments[arguments.index("--out") + 1])))
                    part.count(
                        code == 0 and kept and "Traceback" not in said, f"{arguments[0]} {name!r}: {said[-150:]!r}"
                    )
    return part


def pipes(folder: Path) -> Part:
    """A reader that is gone, a full disk behind standard output, a terminal of ASCII."""
    part = Part(
        "pipes", "standard output closed, full or of ASCII: the results are saved, to the byte, without a traceback"
    )
    lines = {
        "closed": "{} | true",
        "full": "{} > /dev/full",
        "ascii": "LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii {}",
    }
    quick = (*MEASURE[: MEASURE.index("--metrics")], "--metrics", "loss", "--out", "out")
    for arguments in (quick, ("landscape", "ck.pt", *MODEL, "--points", "3", "--out", "out")):
        line = " ".join((sys.executable, "-m", "msam_analysis", *arguments))
        for how, wrapped in lines.items():
            project(folder / "piped")
            environment = variables({"PYTHONPATH": os.pathsep.join((str(Path(__file__).parents[1]), "."))})
            done = subprocess.run(
                ["bash", "-c", wrapped.format(line)],  # noqa: S607
                cwd=folder / "piped",
                env=environment,
                capture_output=True,
                check=False,
            )
            said = done.stderr.decode(errors="replace")
            kept = bool(contents(folder / "piped" / "out"))
            part.count(kept and "Traceback" not in said, f"{arguments[0]}, {how}: {said[-200:]!r}")
    return part


def threads(rounds: int) -> Part:
    """Four threads that ask one objective at different points."""
    part = Part("threads", "four threads on one objective: the numbers of one thread, and nothing of torch's changed")
    for kind in ("plain", "dropout", "statistics", "checkpointed", "attention"):
        for number in range(rounds):
            with part.case(f"{kind}, round {number}"):
                test_threads.test_threads_get_the_numbers_of_one(kind, bool(number % 2))
    return part


def bench_in(folder: Path) -> Path:
    """Make the folder of a user of the command line, as the tests have it."""
    shutil.rmtree(folder / "bench", ignore_errors=True)
    (folder / "bench").mkdir()
    bench.furnish(folder / "bench")
    return folder / "bench"


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, from which modules can be imported."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            yield
    finally:
        os.chdir(before)


def markdown(results: dict[str, Any]) -> str:
    """The counts as the table in ``docs/trust.md``."""
    lines = ["| fault | tried | held | what holds |", "| --- | ---: | ---: | --- |"]
    for one in results["parts"]:
        more = "; ".join(f"{key} {value}" for key, value in flat(one["more"]))
        lines.append(
            f"| {one['name']} | {one['tried']} | {one['held']} | {one['what']}{f' ({more})' if more else ''} |"
        )
    return "\n".join(lines)


def flat(more: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give what else was counted, inner counts as well."""
    for key, value in more.items():
        yield key, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value


def main() -> None:
    """Try, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="runs of each program that are killed")
    parser.add_argument("--share", type=int, default=1, help="try one in so many of the hostile results")
    parser.add_argument("--files", type=int, default=6_000, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="parts whose name contains this word; others stay as they are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    parts: dict[str, Callable[[Path], Part]] = {
        "kills": lambda folder: kills(folder, draw, options.rounds),
        "hostile results": lambda folder: hostile_results(folder, options.share),
        "hostile checkpoints": lambda folder: hostile_checkpoints(folder, draw, options.files),
        "logs": logs,
        "wrong commands": commands,
        "names": names,
        "pipes": pipes,
        "threads": lambda _: threads(options.rounds),
    }
    found: dict[str, dict[str, Any]] = {}
    if options.only and options.out.exists():
        found = {one["name"]: one for one in json.loads(options.out.read_text(encoding="utf-8"))["parts"]}
    failed = False
    for word, part in parts.items():
        if options.only not in word:
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            done = part(Path(name))
        held = done.tried - len(done.failed)
        print(f"{done.name}: {held} of {done.tried}, {time.monotonic() - begun:.0f} s")
        print("".join(f"  does not hold: {one}\n" for one in done.failed[:20]), end="", flush=True)
        found[done.name] = {"name": done.name, "what": done.what, "tried": done.tried, "held": held}
        found[done.name] |= {"more": done.more, "failed": done.failed}
        failed = failed or bool(done.failed)
        ordered = [found[name] for name in parts if name in found]
        save({"machine": machine("cpu"), "seed": options.seed, "parts": ordered}, options.out)  # kept part by part
    print(markdown({"parts": list(found.values())}))
    sys.exit(failed)


if __name__ == "__main__":
    main()
