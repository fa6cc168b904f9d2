"""A study's processes when somebody ends one of them, or starts a second study in the same folder; a cluster's.

Nothing here asks twice: all processes of a study write to one pipe, which is at its end when the last of them is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest

from msam_analysis.studies import processes, store
from msam_analysis.studies.jobs import job
from msam_analysis.studies.processes import Members
from msam_analysis.studies.runs import Run
from msam_analysis.studies.study import run_study
from msam_analysis.studies.workloads import Workload
from tests.programs import SERVER, run, variables

from .test_study import hidden, study, tables
from .toy import COARSE, TOY

ROOT = Path(__file__).parents[2]
# Runs far too long to end by itself, in two worker processes, and tells what stopped it.
SCRIPT = """
import dataclasses, sys
from msam_analysis.studies.study import run_study
from tests.studies.toy import COARSE, TOY

if __name__ == "__main__":
    endless = dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, epochs=10**6))
    try:
        run_study(endless, out=sys.argv[1], jobs=2, protocol=COARSE, every=10**6, progress=False)
    except BaseException as error:
        print(type(error).__name__, error)
"""


class Running:
    """A study in a process of its own, whose two worker processes are at work."""

    def __init__(self, folder: Path) -> None:
        script, self.out = folder / "script.py", folder / "out"
        script.write_text(SCRIPT)
        environment = variables({"PYTHONPATH": str(ROOT), "TOY_LOG": "/dev/stdout"})
        ours, theirs = SERVER.Pipe(duplex=False)
        arguments = (str(self.out),)
        self.main = SERVER.Process(target=run, args=(script, arguments, folder, environment, False, theirs, None))
        self.main.start()
        theirs.close()
        self.pipe = os.fdopen(os.dup(ours.fileno()), encoding="utf-8")
        ours.close()
        self.workers: set[int] = set()
        while len(self.workers) < 2:
            line = self.pipe.readline()
            assert line.strip().isdecimal(), f"the study ended before its workers began: {line!r}"
            self.workers.add(int(line))

    def said(self) -> str:
        """Wait for the end of all processes, and return what they said until then."""
        return self.pipe.read()

    def end(self) -> None:
        self.main.kill()  # its workers end with it
        self.said()
        self.pipe.close()
        self.main.join()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    if os.name != "posix":
        pytest.skip("signals of POSIX")
    study = Running(tmp_path)
    yield study
    study.end()


def test_a_request_to_terminate_is_an_interrupt(running: Running) -> None:
    running.main.terminate()
    assert running.said().startswith("KeyboardInterrupt")


def test_a_killed_worker_is_reported(running: Running) -> None:
    os.kill(min(running.workers), signal.SIGKILL)
    assert running.said().startswith("ChildProcessError a process was killed (out of memory?)")


def test_one_study_at_a_time(running: Running) -> None:
    """A second one in the same folder is refused, and takes nothing from the first; that one killed, none is left."""
    partial = running.out / "runs" / ".partial-of-the-first"
    partial.mkdir()
    with pytest.raises(BlockingIOError, match=r"another study is running in .*out: wait for its end, or choose"):
        run_study(TOY, out=running.out, seeds=1, protocol=COARSE, progress=False)
    assert partial.is_dir()
    assert running.main.exitcode is None
    running.main.kill()
    assert running.said() == "", "its workers ended, though nobody asked them to"
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
    assert [path.name for path in tmp_path.iterdir()] == [store.LOCK]


# --- a cluster


def test_a_cluster_gives_what_this_machine_does(
    toy: Workload, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, from two workers that the test starts."""
    distributed = pytest.importorskip("dask.distributed")
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    ensure_running()  # our server, which has imported the library, before Dask would start one that has not
    dask = pytest.importorskip("dask")
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": SERVER.get_start_method()}),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=str(tmp_path),
            env=variables(None),
        ) as cluster,
    ):
        study(tmp_path / "out", seeds=1, jobs=None, cluster=cluster.scheduler_address)
    assert tables(tmp_path / "out") == tables(alone)
    assert hidden(tmp_path / "out") == []
    made_by = [int(line) for line in log.read_text().split()]
    assert len(made_by) == 6
    assert os.getpid() not in made_by


def test_what_a_cluster_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = job(Run(TOY, "SGD", 0), tmp_path, COARSE, 4)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dask.distributed", None)
        with pytest.raises(ModuleNotFoundError, match=r"a cluster needs Dask: .*msam-analysis\[cluster\]"):
            processes.make([one], 1, Members(), cluster="tcp://127.0.0.1:1", bar=False)
    monkeypatch.setattr(processes, "_on_cluster", lambda jobs, *_: iter([1.0]))
    with pytest.raises(FileNotFoundError, match=r"made SGD-seed0-.* is not in .*that this process and all workers see"):
        processes.make([one], 1, Members(), cluster="tcp://elsewhere:1", bar=False)
    with pytest.raises(ValueError, match="a cluster has its own: choose one of the two"):
        run_study(TOY, out=tmp_path / "out", jobs=2, cluster="tcp://elsewhere:1")
    assert list(tmp_path.iterdir()) == []
