"""The tests' own programs: exit codes, what they write, and that what they start ends with them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.programs import ended


def test_a_program_says_how_it_ended(tmp_path: Path) -> None:
    source = "import os, sys; print(os.getcwd(), os.environ['MARK']); print('no', file=sys.stderr); sys.exit(3)"
    program = ended([sys.executable, "-c", source], tmp_path, {"MARK": "x"})
    assert (program.code, program.out, program.err) == (3, f"{tmp_path.resolve()} x\n", "no\n")
    killed = ended([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    assert killed.code == -signal.SIGKILL


FORGETFUL = """
import os
release, told = (os.open(name, os.O_RDWR) for name in ("release", "told"))
if os.fork() == 0:
    os.read(release, 1)
    os.write(told, b"alive")
"""


def test_what_a_program_has_started_ends_with_it(tmp_path: Path) -> None:
    """A child that its parent has left, and that would say so: it never gets to it."""
    for name in ("release", "told"):
        os.mkfifo(tmp_path / name)
    release, told = os.open(tmp_path / "release", os.O_RDWR), os.open(tmp_path / "told", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert ended([sys.executable, "-c", FORGETFUL], tmp_path).code == 0
        os.write(release, b"x")
        os.set_blocking(told, True)
        assert os.read(told, 5) == b""
    finally:
        os.close(release)
        os.close(told)
