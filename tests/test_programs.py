"""The tests' own programs: exit codes, what they write, and that what they start ends with them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessRaisedException

from tests.programs import Ended, ended, script_ended, together

Way = Callable[[str, Path], Ended]
MARK = {"MARK": "x"}


def program(source: str, folder: Path) -> Ended:
    """A Python that starts."""
    return ended([sys.executable, "-c", source], folder, MARK)


def script(source: str, folder: Path, *, strict: bool = False) -> Ended:
    """A copy of a process that has imported the library."""
    file = folder / "script.py"
    file.write_text(source, encoding="utf-8")
    return script_ended(file, "first", "second", folder=folder, environment=MARK, strict=strict)


ways = pytest.mark.parametrize("way", [program, script])


@ways
def test_a_program_says_how_it_ended(way: Way, tmp_path: Path) -> None:
    source = "import os, sys; print(os.getcwd(), os.environ['MARK']); print('no', file=sys.stderr); sys.exit(3)"
    told = way(source, tmp_path)
    assert (told.code, told.out, told.err) == (3, f"{tmp_path.resolve()} x\n", "no\n")
    assert way("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path).code == -signal.SIGKILL
    raised = way("1 / 0", tmp_path)
    assert raised.code == 1
    assert "ZeroDivisionError" in raised.err


def test_a_script_is_the_main_module_in_an_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of now, whatever it was when the first script was run."""
    monkeypatch.setenv("NOW", "1")
    source = "import os, sys, beside; print(__name__, sys.argv[1:], os.environ.get('NOW'), 'msam' in sys.modules)"
    (tmp_path / "beside.py").touch()
    assert script(source, tmp_path).out == "__main__ ['first', 'second'] 1 True\n"
    monkeypatch.delenv("NOW")
    assert script(source, tmp_path).out == "__main__ ['first', 'second'] None True\n"


def test_warnings_are_errors_if_asked_for(tmp_path: Path) -> None:
    source = "import warnings; warnings.warn('beware')"
    assert script(source, tmp_path).code == 0
    assert "UserWarning: beware" in script(source, tmp_path, strict=True).err


def rank_of(rank: int, folder: Path) -> None:
    (folder / f"{rank}").write_text(f"{os.environ['NOW']} {'msam' in sys.modules}")


def fail(rank: int) -> None:
    if rank == 1:
        raise ValueError("trouble with the second")


def test_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOW", "1")
    together(rank_of, tmp_path, count=3)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("012", "1 True")
    with pytest.raises(ProcessRaisedException, match="trouble with the second"):
        together(fail)


FORGETFUL = """
import os
release, told = (os.open(name, os.O_RDWR) for name in ("release", "told"))
if os.fork() == 0:
    os.read(release, 1)
    os.write(told, b"alive")
"""


@ways
def test_what_a_program_has_started_ends_with_it(way: Way, tmp_path: Path) -> None:
    """A child that its parent has left, and that would say so: it never gets to it."""
    for name in ("release", "told"):
        os.mkfifo(tmp_path / name)
    release, told = os.open(tmp_path / "release", os.O_RDWR), os.open(tmp_path / "told", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert way(FORGETFUL, tmp_path).code == 0
        os.write(release, b"x")
        os.set_blocking(told, True)
        assert os.read(told, 5) == b""
    finally:
        os.close(release)
        os.close(told)
