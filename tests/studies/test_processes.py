"""A study's processes when somebody ends one of them, or starts a second study in the same folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from msam_analysis.studies import store
from msam_analysis.studies.study import run_study
from msam_analysis.studies.workloads import Workload

from .toy import COARSE

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")

ROOT = Path(__file__).parents[2]
# Runs far too long to end by itself, in two worker processes, and tells what stopped it.
SCRIPT = """
import dataclasses, sys
from msam_analysis.studies import study
from msam_analysis.studies.workloads import WORKLOADS
from tests.studies.toy import COARSE, TOY

if __name__ == "__main__":
    recipe = dataclasses.replace(TOY.recipe, epochs=10**6)
    WORKLOADS["toy"] = dataclasses.replace(TOY, recipe=recipe)
    try:
        study.run_study("toy", out=sys.argv[1], jobs=2, protocol=COARSE, every=10**6, progress=False)
    except BaseException as error:
        print(type(error).__name__, error)
"""


def wait_for(condition: object, seconds: float = 60.0) -> bool:
    """Ask until the answer is yes or the time is up."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A process that has ended, but that nobody has asked about, is a zombie.
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


class Running:
    """A study in a process of its own, whose two worker processes are at work."""

    def __init__(self, folder: Path) -> None:
        script, self.out, log = folder / "script.py", folder / "out", folder / "begun.log"
        script.write_text(SCRIPT)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOY_LOG": str(log), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(self.out)]
        self.main = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        self.workers: set[int] = set()

        def begun() -> bool:
            self.workers = {int(line) for line in log.read_text().split()} if log.exists() else set()
            return len(self.workers) == 2

        assert wait_for(begun), "the workers did not begin"

    def said(self) -> str:
        return self.main.communicate(timeout=60)[0]

    def end(self) -> None:
        for process in (self.main.pid, *self.workers):
            if alive(process):
                os.kill(process, signal.SIGKILL)
        self.main.communicate()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    study = Running(tmp_path)
    yield study
    study.end()


def ended(workers: set[int]) -> bool:
    return wait_for(lambda: not any(map(alive, workers)), 20.0)


def test_a_request_to_terminate_is_an_interrupt(running: Running) -> None:
    running.main.terminate()
    assert running.said().startswith("KeyboardInterrupt")
    assert ended(running.workers)


def test_a_killed_worker_is_reported(running: Running) -> None:
    os.kill(min(running.workers), signal.SIGKILL)
    assert running.said().startswith("ChildProcessError a process was killed (out of memory?)")
    assert ended(running.workers)


def test_one_study_at_a_time(running: Running, toy: Workload) -> None:
    """A second one in the same folder is refused, and takes nothing from the first; that one killed, none is left."""
    partial = running.out / "runs" / ".partial-of-the-first"
    partial.mkdir()
    with pytest.raises(BlockingIOError, match=r"another study is running in .*out: wait for its end, or choose"):
        run_study("toy", out=running.out, seeds=1, protocol=COARSE, progress=False)
    assert partial.is_dir()
    assert running.main.poll() is None
    running.main.kill()
    running.said()
    assert ended(running.workers), "nobody asked them to"
    with store.alone(running.out / "runs"):
        store.sweep(running.out / "runs")
    assert not partial.exists(), "of a study that is dead"


def test_a_second_hold_is_refused(tmp_path: Path) -> None:
    with (
        store.alone(tmp_path),
        pytest.raises(BlockingIOError, match="another study is running"),
        store.alone(tmp_path),
    ):
        pass
    with store.alone(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
