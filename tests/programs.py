"""Programs that a test starts: they take the time that they take, and leave no process behind.

A Python that imports torch and the library is at work for seconds before its first line. :func:`ended` starts one, for
tests of what such a start does. Scripts that only need a process of their own get it from :func:`script_ended`, and
ranks from :func:`together`: these processes are copies of one that has imported the library, and nothing else, once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from torch.multiprocessing.spawn import start_processes

SERVER = multiprocessing.get_context("forkserver")
"""Where such processes come from; it starts with the first of them, and ends with the tests."""
# The second is what torch imports when the first optimizer is made.
SERVER.set_forkserver_preload(["msam_analysis.studies.study", "torch._dynamo"])


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code, as :mod:`subprocess` gives it, and what it wrote."""

    code: int
    out: str
    err: str


def variables(more: Mapping[str, str] | None) -> dict[str, str]:
    """The environment of a program: ours, one thread, and some more."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}


def ended(command: list[str], folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a program in a folder to its end, with one thread and some more variables.

    It has a process group of its own, which is killed once the program is over or the test is interrupted: what the
    program has started ends with it. It writes to files: a process that outlives it holds no pipe open.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        program = subprocess.Popen(
            command, cwd=folder, env=variables(environment), stdout=out, stderr=err, start_new_session=True
        )
        try:
            code = program.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return Ended(code, *texts)


def script_ended(
    script: Path, *arguments: str, folder: Path, environment: Mapping[str, str] | None = None, strict: bool = False
) -> Ended:
    """Run a script as :func:`ended` would, where the library is imported already; strict: its warnings are errors."""
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        command = (script.resolve(), arguments, folder, variables(environment), strict, out, err)
        program = SERVER.Process(target=run, args=command)
        program.start()
        try:
            program.join()
        finally:
            assert program.pid is not None
            program.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.join()
        assert program.exitcode is not None
        return Ended(program.exitcode, *(file.read_text(encoding="utf-8") for file in (out, err)))


def run(
    script: Path,
    arguments: tuple[str, ...],
    folder: Path,
    environment: Mapping[str, str],
    strict: bool,
    out: Path | Connection,
    err: Path | None,
) -> None:
    """Become a script, in a process group of its own: what the process does that was copied."""
    os.setsid()
    for number, target in ((1, out), (2, err)):
        if isinstance(target, Connection):
            os.dup2(target.fileno(), number)
            target.close()
        elif target is not None:
            with target.open("wb") as file:
                os.dup2(file.fileno(), number)
    become(environment)
    os.chdir(folder)
    if strict:
        warnings.simplefilter("error")
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


def become(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one process in at a time; the others wait."""
    import fcntl  # of Linux and macOS

    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def together(work: Callable[..., None], *arguments: object, count: int = 2) -> None:
    """Run a function in some processes, with the rank before the arguments; raise if one of them raises."""
    start_processes(
        ranked, (work, variables(None), *arguments), nprocs=count, daemon=True, start_method=SERVER.get_start_method()
    )


def ranked(rank: int, work: Callable[..., None], environment: Mapping[str, str], *arguments: object) -> None:
    become(environment)
    work(rank, *arguments)
