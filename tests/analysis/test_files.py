"""The one writer: a file is whole or not there, what is not ours stays, and what a killed process left is known."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from msam_analysis.results import atomic_folder, atomic_path, files
from msam_analysis.results.text import LONGEST, printable

GONE = 4194305  # one more than the largest number of a process


def left(process: int = GONE, suffix: str = ".csv") -> str:
    """The name of what a process of this machine is writing."""
    return f"{files.PARTIAL}{files._machine()}-{process}-17{suffix}"


def write(path: Path, text: str = "new") -> None:
    with atomic_path(path) as partial:
        partial.write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what goes wrong

FULL = OSError(errno.ENOSPC, "No space left on device")


def no_space(*_: object, **__: object) -> None:
    raise FULL


@pytest.mark.parametrize("last", ["replace", "chmod", "write_text"])
def test_the_last_step_fails(last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old file stays, nothing is left beside it, and the error names the file and not the temporary one."""
    path = tmp_path / "table.csv"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, last, no_space)
        with pytest.raises(OSError, match="cannot be written: there is no space left") as raised:
            write(path)
    assert raised.value.filename == str(path)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert names(tmp_path) == {"table.csv"}


def read_only(folder: Path) -> Path:
    path = folder / "table.csv"
    path.write_text("old")
    path.chmod(0o444)
    return path


def a_folder(folder: Path) -> Path:
    path = folder / "table.csv"
    path.mkdir()
    return path


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("old")
    return folder / "file" / "table.csv"


def too_long(folder: Path) -> Path:
    return folder / ("n" * 256)


def around_itself(folder: Path) -> Path:
    path = folder / "table.csv"
    path.symlink_to(path)
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "read-only": (read_only, PermissionError, "is read-only and stays as it is: make it writable"),
    "a folder": (a_folder, IsADirectoryError, "is a folder, expected a file or nothing"),
    "below a file": (below_a_file, NotADirectoryError, "Not a directory"),
    "too long a name": (too_long, OSError, "too long"),
    "a link to itself": (around_itself, OSError, "Too many levels"),
}


@pytest.mark.parametrize(("make", "kind", "says"), REFUSED.values(), ids=REFUSED)
def test_what_must_not_be_replaced(
    make: Callable[[Path], Path], kind: type[Exception], says: str, tmp_path: Path
) -> None:
    path = make(tmp_path)
    before = names(tmp_path)
    with pytest.raises(kind, match=says) as raised:
        write(path)
    assert path.name in str(raised.value)
    assert files.PARTIAL not in str(raised.value)
    assert names(tmp_path) == before


def test_tensors_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be written .*No space left.*: is there space on the disk"):
        files.write_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", "header", "{}")
    assert not names(tmp_path)


# --- what stays


@pytest.mark.parametrize("name", ["n" * 255, "n" * 240 + ".safetensors", "é" * 127, "." + "n" * 254, "a." + "s" * 253])
def test_names_up_to_the_limit_of_the_file_system(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert names(tmp_path) == {name}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """What it points to is replaced, where that lies; a link to nothing makes the file."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.csv").write_text("old")
    for target in ("kept.csv", "made.csv"):
        link = tmp_path / f"link-{target}"
        link.symlink_to(tmp_path / "elsewhere" / target)
        write(link)
        assert link.is_symlink()
        assert (tmp_path / "elsewhere" / target).read_text() == "new"
    assert names(tmp_path / "elsewhere") == {"kept.csv", "made.csv"}


def test_permissions(tmp_path: Path) -> None:
    """A file keeps its own; a new one has those that any program would give it."""
    write(tmp_path / "new")
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
    (tmp_path / "new").chmod(0o600)
    write(tmp_path / "new", "again")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


def test_a_folder_is_replaced_file_by_file(tmp_path: Path) -> None:
    """What somebody added stays; a link to the folder too; old files and new ones are never taken for a whole."""
    real, folder = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    folder.symlink_to(real)
    for name in ("contents.json", "a", "thesis.tex"):
        (folder / name).write_text("old")
    seen = []
    with atomic_folder(folder, "contents.json") as partial:
        for name in ("contents.json", "a"):
            (partial / name).write_text("new")
        seen.append((folder / "contents.json").read_text())
    assert seen == ["old"]
    assert folder.is_symlink()
    assert {path.name: path.read_text() for path in real.iterdir()} == {
        "contents.json": "new",
        "a": "new",
        "thesis.tex": "old",
    }
    assert names(tmp_path) == {"real", "link"}


def test_a_folder_that_is_replaced_half_way_has_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("contents.json", "a"):
        (tmp_path / "it").mkdir(exist_ok=True)
        (tmp_path / "it" / name).write_text("old")

    def replace_into() -> None:
        with atomic_folder(tmp_path / "it", "contents.json") as partial:
            for name in ("contents.json", "a"):
                (partial / name).write_text("new")
            monkeypatch.setattr(Path, "replace", no_space)

    with pytest.raises(OSError, match="no space left"):
        replace_into()
    assert names(tmp_path / "it") == {"a"}
    assert names(tmp_path) == {"it"}


# --- what a killed process left


def test_only_what_dead_processes_of_this_machine_left_is_swept(tmp_path: Path) -> None:
    debris = {left(), left(suffix=""), left(os.getpid()), left(suffix=".safetensors")}
    others = {
        left(os.getppid()),
        f"{files.PARTIAL}00000000-{GONE}-1.csv",
        ".hidden",
        ".partial-of-mine",
        "table.csv",
        "thesis.tex",
    }
    for name in (*debris, *others):
        (tmp_path / name).write_text("")
    (tmp_path / left(suffix="folder")).mkdir()
    (tmp_path / left(suffix="folder") / "a").write_text("")
    with atomic_path(tmp_path / "now.csv") as partial:
        files.sweep(tmp_path)
        assert names(tmp_path) == others | {partial.name}
        partial.write_text("")
    files.sweep(tmp_path / "nowhere")


def test_processes_that_cannot_be_asked_are_taken_for_running(monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.is_debris(left())
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        assert not files.is_debris(left())
    assert not files.is_debris(left(10**30))


# --- folders for results


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b")
    assert not names(tmp_path)
    (tmp_path / "mine").mkdir()
    files.check_writable(tmp_path / "mine")
    assert names(tmp_path) == {"mine"}


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("file", "a file is in the way"),
        ("file/a/b", "a file is in the way"),
        ("new/" + "n" * 256, "too long), choose another"),
    ],
)
def test_a_folder_that_cannot(place: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"in the way|no results can be written") as raised:
        files.check_writable(tmp_path / place)
    assert says in str(raised.value)
    assert names(tmp_path) == {"file"}


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SPACE", 2**70)
    with pytest.raises(OSError, match=r"MiB left, expected at least .*: make room, or choose another folder"):
        files.check_writable(tmp_path / "out")
    assert not names(tmp_path)


# --- text

# What a user wrote, and what is shown.
SHOWN = {
    "plain": ("a model", "a model"),
    "letters": ("模型 é ± −", "模型 é ± −"),
    "spaces that do not break": ("1\u00a0%", "1\u00a0%"),
    "markup": ("d[/b] $x$ <b> %", "d[/b] $x$ <b> %"),
    "escape": ("\x1b[31mred", r"\x1b[31mred"),
    "bell and back": ("a\x07\x08", r"a\x07\x08"),
    "lines": ("a\nb\rc\u2028d", r"a\nb\rc\u2028d"),
    "another encoding": ("caf\udce9", r"caf\udce9"),
    "direction": ("a\u202egnp.b", r"a\u202egnp.b"),
    "no width": ("a\u200bb", r"a\u200bb"),
    "nothing": ("", ""),
    "long": ("x" * 100_000, "x" * (LONGEST - 1) + "…"),
}


@pytest.mark.parametrize(("text", "shown"), SHOWN.values(), ids=SHOWN)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown
    assert printable(text, None).startswith(shown.rstrip("…"))


@pytest.mark.parametrize(("text", "_"), SHOWN.values(), ids=SHOWN)
def test_json_is_safe_to_print_and_reads_back_as_it_was(text: str, _: str, tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {text: [text]})
    raw = (tmp_path / "a.json").read_bytes()
    assert json.loads(raw) == {text: [text]}
    assert printable(raw.decode().replace("\n", ""), None) == raw.decode().replace("\n", "")


def test_text_that_utf8_does_not_have(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "caf\udce9\n")
    assert (tmp_path / "a").read_bytes() == b"caf\\udce9\n"
