"""Every tensor of a file or folder by its dotted path, with what else is known of the checkpoint."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from msam_analysis.checkpoints import files, stand_ins

_COUNTERS = {"step": ("global_step", "step", "steps", "iteration", "iter", "num_updates"), "epoch": ("epoch",)}
COUNTERS = {name for names in _COUNTERS.values() for name in names}
"""What a number is called that says how far the training was."""
_IN_NAMES = {
    "step": r"(?:global_?step|checkpoint|step|iter(?:ation)?)[=_-]?(\d+)",
    "epoch": r"(?:epoch|ep)[=_-]?(\d+)",
}
_DEPTH = 3
_APART = ("optim", "sched", "scaler", "ema", "model", "net", "state_dict", "callbacks")
_DAMAGED = (SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, IndexError)
_BROKEN = (ArithmeticError, AttributeError, AssertionError, UnicodeError, MemoryError, struct.error, zipfile.BadZipFile)


class Entry(NamedTuple):
    """One tensor and the mapping of the file in which it stands."""

    tensor: Tensor
    holder: tuple[str, ...]


Place = tuple[tuple[str, ...], Entry]


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds.

    ``tensors``: Every tensor, by the path of keys that leads to it, joined by dots.
    ``kind``: What it is, for a reader.
    ``step``, ``epoch``: How far the training was, as the content or the name says; None if neither does.
    ``unread``: Class and place of every object that was not read, since only running its class could restore it.
    ``partial``: It holds some of the model's weights on purpose (an adapter).
    """

    path: Path
    kind: str
    tensors: Mapping[str, Entry]
    step: int | None = None
    epoch: int | None = None
    unread: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    partial: bool = False


def read_file(path: Path) -> Content:
    """Read one file.

    Raises ValueError: As :func:`files.kind_of`; the file is damaged or cannot be read safely.
    """
    kind = files.kind_of(path)
    try:
        if kind == files.SAFETENSORS:
            with safe_open(path, framework="pt") as archive:
                found: Any = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118 -- no mapping
        elif kind == files.TORCHSCRIPT:
            found = _script(path)
        else:
            found = _saved(path, kind)
    except pickle.UnpicklingError as error:
        raise _unsafe(path, kind, str(error)) from None
    except (*_DAMAGED, *_BROKEN) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise files.refusal(path, f"cannot be read as weights ({reason})", "it is damaged: fetch it again") from None
    tensors = {".".join(parts): entry for parts, entry in _entries(found)}
    content = Content(path, f"{kind} file", tensors, unread=tuple(stand_ins.stand_ins(found)))
    return counted(content, found)


def counted(content: Content, found: Any = None) -> Content:
    """Return ``content`` with step and epoch, from the numbers in ``found``, else from the names of file and folder."""
    known = {counter: _counter(counter, content.path, found) for counter in _COUNTERS}
    return replace(content, step=known["step"], epoch=known["epoch"])


def counters_of_file(path: Path) -> dict[str, int | None]:
    """Return step and epoch as the file says them, else its name; None for what neither says."""
    try:
        found = _saved(path, files.ARCHIVE) if path.is_file() and files.kind_of(path) == files.ARCHIVE else None
    except (ValueError, pickle.UnpicklingError, *_DAMAGED, *_BROKEN):  # said when it is loaded
        found = None
    return {counter: _counter(counter, path, found) for counter in _COUNTERS}


def _counter(counter: str, path: Path, found: Any) -> int | None:
    outer, *inner = ([_number(one.get(key)) for one in level for key in _COUNTERS[counter]] for level in _levels(found))
    values = list(outer)
    for name in (path.name, path.parent.name):
        match = re.search(rf"(?<![a-z]){_IN_NAMES[counter]}", name.lower())
        values.append(int(match.group(1)) if match else None)
    values += itertools.chain.from_iterable(inner)
    return next((value for value in values if value is not None), None)


def _levels(found: Any) -> Iterator[list[Mapping[Any, Any]]]:
    """Yield the mappings of the outermost three levels, but for those of weights and of what counts for itself."""
    level = [found] if isinstance(found, Mapping) else []
    for _ in range(_DEPTH):
        yield level
        inner = ((str(key).lower(), value) for one in level for key, value in one.items())
        level = [v for key, v in inner if isinstance(v, Mapping) and not any(it in key for it in _APART)]


def _number(value: Any) -> int | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    return int(value) if whole else None


def _saved(path: Path, kind: str) -> Any:
    if kind == files.ARCHIVE:  # mapped and not read: what nobody asks for (the optimizer's state) costs no memory
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        return stand_ins.load(path, unsafe, mmap=True)
    with path.open("rb") as stream:
        names = stand_ins.names_in(stream, pickles=4)
    return stand_ins.load(path, names)


def _script(path: Path) -> Any:
    """Read the attributes of a TorchScript archive; its code is left out before torch sees it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            root, _, inner = info.filename.partition("/")
            inner = inner.removeprefix(".data/") if inner == ".data/version" else inner
            if inner in ("data.pkl", "version", "byteorder") or inner.startswith("data/"):
                new.writestr(f"{root}/{inner}", old.read(info))
        pickled = next(old.read(info) for info in old.infolist() if info.filename.endswith("/data.pkl"))
    return stand_ins.load(packed, stand_ins.names_in(io.BytesIO(pickled)))


def _unsafe(path: Path, kind: str, message: str) -> ValueError:
    """Name the class that stops the reading, and where it stands."""
    named = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"StandIn of ([\w.]+)", message)
    what = f" ({named.group(1)} in {'data.pkl' if kind != files.LEGACY else 'the pickle'})" if named else ""
    return files.refusal(
        path,
        f"holds more than tensors and plain containers{what}, which only running it could restore",
        "load it where it was made and save its state_dict; nothing in it was run",
    )


def _entries(found: Any, path: tuple[str, ...] = (), holder: tuple[str, ...] | None = None) -> Iterator[Place]:
    """Yield every tensor in mappings and in modules that were saved whole: its path, itself, what holds it.

    All tensors of such a module lie in one: as in a state dict, its own names have dots. Lists may hold mappings; a
    tensor straight in a list has no name.
    """
    if isinstance(found, Tensor):
        yield path or ("tensor",), Entry(found, path[:-1] if holder is None else holder)
    elif isinstance(found, stand_ins.StandIn) and isinstance(found.state, dict):
        state = found.state
        if "_modules" in state and "_parameters" in state:  # of torch.nn
            passing = set(state.get("_non_persistent_buffers_set") or ())
            buffers = {name: one for name, one in state["_buffers"].items() if name not in passing}
            state = {**state["_parameters"], **buffers, **state["_modules"]}
        for name, value in state.items():
            yield from _entries(value, (*path, str(name)), path if holder is None else holder)
    elif isinstance(found, Mapping):
        for key, value in found.items():
            if isinstance(key, (str, int)):
                yield from _entries(value, (*path, str(key)), holder)
    elif isinstance(found, (list, tuple)):
        for number, value in enumerate(found):
            if not isinstance(value, Tensor):  # which has no name
                yield from _entries(value, (*path, str(number)), holder)


def existing(path: str | os.PathLike[str]) -> Path:
    """Return the path.

    Raises FileNotFoundError: Nothing lies there.
    """
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(
            f"no checkpoint at {found}: {files.EXPECTED}, or a folder of save_pretrained; check the path"
        )
    return found
