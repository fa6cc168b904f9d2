"""Programs that a test starts: they take the time that they take, and leave no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code, as :mod:`subprocess` gives it, and what it wrote."""

    code: int
    out: str
    err: str


def ended(command: list[str], folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a program in a folder to its end, with one thread and some more variables.

    It has a process group of its own, which is killed once the program is over or the test is interrupted: what the
    program has started ends with it. It writes to files: a process that outlives it holds no pipe open.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        program = subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=err, start_new_session=True)
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
