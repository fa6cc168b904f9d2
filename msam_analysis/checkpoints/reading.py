"""Every tensor of a file or folder by its dotted path, with what else is known of the checkpoint."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from msam_analysis.checkpoints import files, stand_ins
from msam_analysis.checkpoints.scanning import MOST_OBJECTS, CostlyError, scan

_COUNTERS = {"step": ("global_step", "step", "steps", "iteration", "iter", "num_updates"), "epoch": ("epoch",)}
COUNTERS = {name for names in _COUNTERS.values() for name in names}
"""What a number is called that says how far the training was."""
_IN_NAMES = {
    "step": r"(?:global_?step|checkpoint|step|iter(?:ation)?)[=_-]?(\d+)",
    "epoch": r"(?:epoch|ep)[=_-]?(\d+)",
}
_DEPTH = 3
_APART = ("optim", "sched", "scaler", "ema", "model", "net", "state_dict", "callbacks")
_CLAIM = 2**26  # bytes that a tensor may have beyond those of its storage, as one that is expanded has
_DEEPEST = 100  # nested mappings


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
        found = _safetensors(path) if kind == files.SAFETENSORS else _saved(path, kind)
        tensors = {".".join(parts): entry for parts, entry in _entries(found)}
        content = Content(path, f"{kind} file", tensors, unread=tuple(stand_ins.stand_ins(found)))
        return counted(content, found)
    except CostlyError as error:
        raise files.refusal(path, f"is no checkpoint: {error}", "check where it comes from") from None
    except pickle.UnpicklingError as error:
        raise _unsafe(path, kind, str(error)) from None
    except Exception as error:  # noqa: BLE001 -- whatever a parser raises on what is damaged
        what = f"cannot be read as weights ({files.reason_of(error)})"
        raise files.refusal(path, what, "it is damaged: fetch it again") from None


def counted(content: Content, found: Any = None) -> Content:
    """Return ``content`` with step and epoch, from the numbers in ``found``, else from the names of file and folder."""
    known = {counter: _counter(counter, content.path, found) for counter in _COUNTERS}
    return replace(content, step=known["step"], epoch=known["epoch"])


def counters_of_file(path: Path) -> dict[str, int | None]:
    """Return step and epoch as the file says them, else its name; None for what neither says."""
    try:
        found = _saved(path, files.ARCHIVE) if path.is_file() and files.kind_of(path) == files.ARCHIVE else None
    except Exception:  # noqa: BLE001 -- whatever it is, it is said when the file is loaded
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
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and not value.is_meta:
        value = value.item()
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    return int(value) if whole else None


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as archive:
        names = list(archive.keys())
        if len(names) > MOST_OBJECTS:
            raise CostlyError(f"it holds {len(names)} tensors, more than {MOST_OBJECTS}")
        return {name: archive.get_tensor(name) for name in names}


def _saved(path: Path, kind: str) -> Any:
    """Read what torch wrote; its pickle is looked through beforehand."""
    size = path.stat().st_size
    if kind == files.LEGACY:  # its five pickles: three of the format, the object, and the names of storages
        with path.open("rb") as stream:
            return stand_ins.load(path, scan(stream, size, pickles=5))
    with zipfile.ZipFile(path) as archive:
        described = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
        names = scan(io.BytesIO(_record(archive, described)), size, records=_sizes(archive))
        if kind == files.TORCHSCRIPT:
            return stand_ins.load(_without_code(archive), names)
    return stand_ins.load(path, names, mmap=True)  # what nobody asks for (the optimizer's state) costs no memory


def number_in(data: bytes) -> Any:
    """Return the small object that torch saved as an archive in these bytes; None where it is no number."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            described = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            scan(io.BytesIO(_record(archive, described)), len(data), records=_sizes(archive))
        return torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # noqa: BLE001 -- a class of somebody's, or packed in a way of their own
        return None


def _sizes(archive: zipfile.ZipFile) -> dict[str, int]:
    """Return how many bytes the archive has for every storage, by its key."""
    return {info.filename.partition("/data/")[2]: info.file_size for info in archive.infolist()}


def _without_code(archive: zipfile.ZipFile) -> io.BytesIO:
    """Return a TorchScript archive without its code, which torch does not see then."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as new:
        for info in archive.infolist():
            root, _, inner = info.filename.partition("/")
            inner = inner.removeprefix(".data/") if inner == ".data/version" else inner
            if inner in ("data.pkl", "version", "byteorder") or inner.startswith("data/"):
                new.writestr(f"{root}/{inner}", _record(archive, info))
    return packed


def _record(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read a record of an archive; torch can be told to write no checksums, and so none is asked for."""
    info.CRC = None  # type: ignore[assignment]  # zipfile's way to say that it is not known
    return archive.read(info)


def _unsafe(path: Path, kind: str, message: str) -> ValueError:
    """Name the class that stops the reading, and where it stands."""
    named = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"StandIn of ([\w.]+)", message)
    what = f" ({named.group(1)} in {'data.pkl' if kind != files.LEGACY else 'the pickle'})" if named else ""
    return files.refusal(
        path,
        f"holds more than tensors and plain containers{what}, which only running it could restore",
        "load it where it was made and save its state_dict; nothing in it was run",
    )


def _entries(found: Any) -> Iterator[Place]:
    """Yield every tensor in mappings and in modules that were saved whole: its path, itself, what holds it.

    All tensors of such a module lie in one: as in a state dict, its own names have dots. Lists may hold mappings; a
    tensor straight in a list has no name.
    """
    looked, claimed, there = 0, 0, dict[int, int]()
    left: list[tuple[Any, tuple[str, ...], tuple[str, ...] | None]] = [(found, (), None)]
    while left:
        found, path, holder = left.pop()
        looked += 1
        if looked > 4 * MOST_OBJECTS or len(path) > _DEEPEST:
            raise CostlyError("its containers hold themselves, or more than a checkpoint has")
        if isinstance(found, Tensor):
            claimed += _claim(found, path, there)
            if claimed > _CLAIM and claimed > 16 * sum(there.values()):
                raise CostlyError(f"its tensors claim {claimed} bytes, where {sum(there.values())} are there")
            yield path or ("tensor",), Entry(found, path[:-1] if holder is None else holder)
        elif isinstance(found, stand_ins.StandIn) and isinstance(found.state, dict):
            whose = path if holder is None else holder
            left += [(value, (*path, str(name)), whose) for name, value in _of_module(found.state).items()][::-1]
        elif isinstance(found, Mapping):
            named = [(key, value) for key, value in found.items() if isinstance(key, (str, int))]
            left += [(value, (*path, str(key)), holder) for key, value in named][::-1]
        elif isinstance(found, (list, tuple)):
            inner = [(str(number), value) for number, value in enumerate(found) if not isinstance(value, Tensor)]
            left += [(value, (*path, number), holder) for number, value in inner][::-1]


def _of_module(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a module that was saved whole holds by name; any other state as it is."""
    if "_modules" not in state or "_parameters" not in state:
        return state
    passing = set(state.get("_non_persistent_buffers_set") or ())
    buffers = {name: one for name, one in state["_buffers"].items() if name not in passing}
    return {**state["_parameters"], **buffers, **state["_modules"]}


def _claim(tensor: Tensor, path: tuple[str, ...], storages: dict[int, int]) -> int:
    """Return how many bytes a tensor claims, and note those of its storage; refuse one without values, or too large."""
    if sum(part.count(".") + 1 for part in path) > _DEEPEST:
        raise CostlyError(f"its tensor {'.'.join(path)[:60]!r}... lies deeper than a checkpoint goes")
    if tensor.is_meta:
        raise CostlyError(f"its tensor {'.'.join(path)!r:.60} has a shape and no values")
    if tensor.layout != torch.strided or tensor.is_quantized:
        return 0
    claimed, there = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
    storages[tensor.untyped_storage().data_ptr()] = there
    if claimed > _CLAIM and claimed > 16 * there:
        raise CostlyError(f"its tensor {'.'.join(path)!r:.60} claims {claimed} bytes, where {there} are there")
    return claimed


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
