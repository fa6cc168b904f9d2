"""A log is not the training: whatever happens to a monitor's files, the weights are those of an undisturbed run.

Rows go on, or one warning says why they do not; nothing is raised once the weights have moved, and no file has NULs.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import msam
import msam_analysis as ma
from msam_analysis.monitor.growing import ForeignFileError, GrowingFile
from msam_analysis.monitor.records import RecordFile
from tests.programs import script_ended

STEPS, FAULT = 8, 4


def trained(
    path: Path | None, kind: str, fault: Callable[[Path], object] = lambda path: None
) -> tuple[Tensor, list[str], Any]:
    """Train with a monitor whose file meets a fault half way: the weights, the warnings, the monitor."""
    weight = nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = msam.MSAM([weight], lr=0.1, rho=0.3, momentum=0.9)
    out: dict[str, Any] = {}
    if path is not None:
        out = {"path": path} if kind == "jsonl" else {"to": [ma.loggers.CSV(path)]}
    monitor = ma.Monitor(optimizer, [ma.probes.Norms(), ma.probes.Every(later, 3)], every=1, **out)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(STEPS):
            if step == FAULT and path is not None:
                fault(path)
            weight.grad = weight.detach().cos() + step
            optimizer.step()
        monitor.close()
    with optimizer.unperturbed():
        return weight.detach().clone(), [str(one.message) for one in said], monitor


def later(optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
    """A column that comes and goes; in a table, one that comes late makes it be written anew."""
    return {"late": float(step)} if step else {}


def cut(keep: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * keep))


def replaced(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"somebody's own notes\n" * 200)


def overwritten(path: Path) -> None:
    path.write_bytes(b"somebody's own notes\n")


def another_writes(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"99,1,2\n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_full_disk(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/full")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_becomes_a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


def new_and_empty(path: Path) -> None:
    path.unlink()
    path.touch()


def copied_back(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


# what happens, the steps that the file then has, and the warning
WHOLE, NEW = list(range(STEPS)), list(range(FAULT, STEPS))
FAULTS: dict[str, tuple[Callable[[Path], object], list[int] | None, str]] = {
    "nothing": (lambda path: None, WHOLE, ""),
    "emptied": (lambda path: os.truncate(path, 0), NEW, ""),
    "deleted": (lambda path: path.unlink(), NEW, ""),
    "renamed": (lambda path: path.rename(path.with_name("old")), NEW, ""),
    "replaced by an empty file": (new_and_empty, NEW, ""),
    "its folder deleted": (lambda path: shutil.rmtree(path.parent), NEW, ""),
    "its folder renamed": (lambda path: path.parent.rename(path.parent.with_name("old")), NEW, ""),
    "cut in a row": (cut(0.7), WHOLE, ""),
    "cut in its first line": (cut(0.02), WHOLE, ""),
    "copied and put back": (copied_back, WHOLE, ""),
    "replaced by another": (replaced, None, "holds what this monitor did not write"),
    "overwritten": (overwritten, None, "holds what this monitor did not write"),
    "written to by another": (another_writes, None, "holds what this monitor did not write"),
    "made longer": (lambda path: os.truncate(path, 10_000), None, "holds what this monitor did not write"),
    "replaced by a folder": (a_folder, None, "is a folder: expected a file"),
    "replaced by a full disk": (a_full_disk, None, "is a device"),
    "replaced by a pipe": (a_pipe, None, "is a device, a pipe or a socket"),
    "its folder becomes a file": (folder_becomes_a_file, None, "Error"),
}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("what", FAULTS)
def test_the_training_goes_on(what: str, kind: str, tmp_path: Path) -> None:
    fault, steps, message = FAULTS[what]
    path = tmp_path / "folder" / f"run.{kind}"
    left: dict[str, bytes] = {}

    def strike(path: Path) -> None:
        fault(path)
        left.update({path.name: path.read_bytes()} if path.is_file() else {})

    weights, said, monitor = trained(path, kind, strike)
    assert torch.equal(weights, trained(None, kind)[0])
    assert [row["step"] for row in monitor.rows] == WHOLE
    assert len(said) == bool(message), said
    assert all(message in one for one in said)
    if steps is not None:
        read = ma.Monitor.read(path) if kind == "jsonl" else pd.read_csv(path)
        assert read["step"].tolist() == steps
        assert b"\0" not in path.read_bytes()
    elif left:
        assert path.read_bytes() == left[path.name], "what is somebody's own stays"


def test_rows_that_could_not_be_written_come_with_the_next(tmp_path: Path) -> None:
    """The disk is full for two rows, then there is room again."""
    for kind in ("jsonl", "csv"):
        path = tmp_path / f"run.{kind}"
        file: Any = RecordFile(path, {"probes": ["a"]}) if kind == "jsonl" else ma.loggers.CSV(path)
        add = file.append if kind == "jsonl" else file
        add({"step": 0, "a": 1.0})
        kept = path.rename(tmp_path / "kept")
        path.symlink_to("/dev/full")
        for step in (1, 2):
            with pytest.raises(ForeignFileError, match="is a device"):
                add({"step": step, "a": 1.0})
        path.unlink()
        kept.rename(path)
        add({"step": 3, "a": 1.0})
        read = ma.Monitor.read(path) if kind == "jsonl" else pd.read_csv(path)
        assert read["step"].tolist() == [0, 1, 2, 3]


FULL = """
import resource, sys, warnings
import torch
from torch import nn
import msam_analysis as ma

weight = nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
monitor = ma.Monitor(optimizer, [ma.probes.Norms()], every=1, path="run.jsonl", to=[ma.loggers.CSV("run.csv")])
resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for step in range(12):
        weight.grad = torch.ones(3)
        optimizer.step()
    monitor.close()
print(len(said), len(monitor.rows), sorted({"File too large" in str(one.message) for one in said}))
"""


def test_a_limit_in_the_middle_of_a_row(tmp_path: Path) -> None:
    """The system refuses to let the files grow: half a row is taken back, and one warning for each file says so."""
    script = tmp_path / "full.py"
    script.write_text(FULL)
    done = script_ended(script, folder=tmp_path)
    assert done.out.split() == ["2", "12", "[True]"], done
    steps = ma.Monitor.read(tmp_path / "run.jsonl")["step"].tolist()
    assert 0 < len(steps) < 12
    for name in ("run.jsonl", "run.csv"):
        content = (tmp_path / name).read_bytes()
        assert len(content) <= 700
        assert content.endswith(b"\n")


def test_two_monitors_of_one_file_do_not_go_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    monitors = [ma.Monitor(optimizer, [ma.probes.Norms(["weights"])], every=1, path=path) for optimizer in optimizers]

    def train() -> None:
        for _ in range(3):
            for optimizer, weight in zip(optimizers, weights, strict=True):
                weight.grad = torch.ones(2)
                optimizer.step()

    with pytest.warns(UserWarning, match="two write to one file") as said:
        train()
    assert len(said) == 1
    assert ma.Monitor.read(path)["step"].tolist() == [0, 1, 2], "those of one of them"
    assert all(monitor.step == 3 for monitor in monitors)


def test_a_writer_between_look_and_writing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    file = RecordFile(path, {"probes": ["a"]})
    real = os.ftruncate

    def late(descriptor: int, size: int) -> None:
        real(descriptor, size)
        another_writes(path)

    monkeypatch.setattr(os, "ftruncate", late)
    with pytest.raises(ForeignFileError, match="two write to one file"):
        file.append({"step": 0, "a": 1.0})
    monkeypatch.undo()
    with pytest.raises(ForeignFileError, match="two write to one file"):
        file.append({"step": 1, "a": 1.0})


def test_a_monitor_with_a_file_lives_as_long_as_the_optimizer(tmp_path: Path) -> None:
    """Nobody needs to hold it; another one for the same file takes its place."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(2)
    for _ in range(2):
        ma.Monitor(optimizer, [ma.probes.Norms()], every=1, path=tmp_path / "run.jsonl")
        for _ in range(3):
            optimizer.step()
    assert ma.Monitor.read(tmp_path / "run.jsonl")["step"].tolist() == list(range(6))


@pytest.mark.parametrize("make", [lambda path: RecordFile(path, {"a": 1}), ma.loggers.CSV], ids=["jsonl", "csv"])
@pytest.mark.parametrize("place", ["/dev/full", "/dev/zero", "a pipe", "a folder"])
def test_what_is_no_file_is_refused_before_the_training(make: Callable[[Any], Any], place: str, tmp_path: Path) -> None:
    path = Path(place)
    if place == "a pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    elif place == "a folder":
        path = tmp_path
    with pytest.raises(ForeignFileError, match=r"is a .*: expected a file to add rows to; give another path"):
        make(path)


def test_going_back_leaves_what_is_somebodys_own(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "run.jsonl", {"probes": ["a"]})
    file.append({"step": 0, "a": 1.0})
    (tmp_path / "run.jsonl").write_bytes(b"somebody's own notes\n" * 9)
    with pytest.raises(ForeignFileError, match="did not write"):
        file.rewind(0)
    assert (tmp_path / "run.jsonl").read_bytes().startswith(b"somebody")
    assert len(file.rows) == 1


def test_going_back_after_the_file_was_emptied(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "run.jsonl", {"probes": ["a"]})
    for step in range(3):
        file.append({"step": step, "a": 1.0})
    (tmp_path / "run.jsonl").write_bytes(b"")
    for step in range(3, 6):
        file.append({"step": step, "a": 1.0})
    file.rewind(5)
    assert ma.Monitor.read(tmp_path / "run.jsonl")["step"].tolist() == [3, 4]
    assert [row["step"] for row in file.rows] == [0, 1, 2, 3, 4]


# --- lines that a monitor did not write

LINES: dict[str, bytes] = {
    "a step that is text": b'{"step": "1", "a": 1.0}',
    "a step below 0": b'{"step": -1, "a": 1.0}',
    "a step that is no whole number": b'{"step": 1.5, "a": 1.0}',
    "a step that is true": b'{"step": true, "a": 1.0}',
    "a step that was there": b'{"step": 0, "a": 1.0}',
    "a number that is a list": b'{"step": 1, "a": [1.0]}',
    "a number that is text": b'{"step": 1, "a": "1.0"}',
    "an end that is a list": b'{"end": [1]}',
    "an end below 0": b'{"end": -1}',
    "an end that is NaN": b'{"end": NaN}',
    "an end with more": b'{"end": 3, "a": 1}',
    "deep nesting": b'{"step": 1, "a": ' + b"[" * 100_000,
    "a whole number without end": b'{"step": ' + b"9" * 10_000 + b"}",
    "NULs": b"\0" * 50,
    "no UTF-8": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("what", LINES)
def test_damaged_lines_are_told(what: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    file = RecordFile(path, {"probes": ["a"]})
    file.append({"step": 0, "a": 1.0})
    with path.open("ab") as more:
        more.write(LINES[what] + b"\n")
    for call in (ma.Monitor.read, lambda path: RecordFile(path, {"probes": ["a"]})):
        with pytest.raises(ValueError, match=r"run\.jsonl is damaged in line 3: remove that line"):
            call(path)


TABLES: dict[str, tuple[bytes, str]] = {
    "a step that is text": (b"step,a\nx,1\n", "cannot be read as a table"),
    "a step that is none": (b"step,a\n,1\n", "is damaged: expected"),
    "steps that fall": (b"step,a\n1,1\n0,1\n", "is damaged: expected"),
    "a step twice": (b"step,a\n1,1\n1,1\n", "is damaged: expected"),
    "a short row": (b"step,a\n1\n", "is damaged: expected"),
    "a long row": (b"step,a\n1,2,3\n", "is damaged: expected"),
    "a column twice": (b"step,a,a\n1,2,3\n", "is damaged: expected"),
    "NULs": (b"step,a\n1,\0\0\n", "is damaged: expected"),
    "no UTF-8": (b"step,a\n1,\xff\n", "cannot be read as a table"),
    "a field without end": (b"step,a\n1," + b"9" * 200_000 + b"\n", "cannot be read as a table"),
    "a quote without end": (b'step,a\n1,"9\n', "cannot be read as a table"),
}


@pytest.mark.parametrize("what", TABLES)
def test_damaged_tables_are_told(what: str, tmp_path: Path) -> None:
    content, message = TABLES[what]
    path = tmp_path / "run.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        ma.loggers.CSV(path)
    assert str(told.value).startswith(str(path))
    assert path.read_bytes() == content


def test_a_table_of_an_earlier_run_is_refused_before_anything_moves(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("step,a\n0,1\n")
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    monitor = ma.Monitor(optimizer, [ma.probes.Norms(["weights"])], to=[ma.loggers.CSV(tmp_path / "run.csv")])
    weight.grad = torch.ones(3)
    with pytest.raises(ValueError, match="holds rows up to step 0, got one of step 0"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(3))
    monitor.close()


def test_a_recorder_whose_folder_fails_does_not_end_the_training(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = ma.TrajectoryRecorder(tmp_path / "path", model, optimizer).attach()
    shutil.rmtree(tmp_path / "path")
    (tmp_path / "path").write_bytes(b"")

    def train() -> None:
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    with pytest.warns(UserWarning, match="the weights of step 1 were not recorded .*the training goes on") as said:
        train()
    assert len(said) == 1
    assert recorder.step == 3
    with pytest.raises(OSError, match="path"):
        recorder.record(4)


def test_threads_share_a_table(tmp_path: Path) -> None:
    """Loggers of two monitors that step in two threads: every row is there, whole, or is refused for its step."""
    table = ma.loggers.CSV(tmp_path / "run.csv")
    barrier = threading.Barrier(4)
    refused: list[str] = []

    def write(number: int) -> None:
        barrier.wait()
        for step in range(number, 200, 4):
            try:
                table({"step": step, "a": 1.0})
            except ValueError as error:  # noqa: PERF203 -- each row is asked about
                refused.append(str(error))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = pd.read_csv(tmp_path / "run.csv")["step"].tolist()
    assert steps == sorted(set(steps))
    assert len(steps) + len(refused) == 200


def test_a_growing_file_is_begun_anew_where_it_is_gone(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "deep" / "a.txt", lambda: b"head\n", lambda: b"head\n")
    assert file.append(b"")
    assert not file.append(b"one\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"head\none\n"
