"""Folders that hold a checkpoint: save_pretrained, shards, adapters, sentence-transformers, torch.distributed."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import math
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from msam_analysis.checkpoints import files
from msam_analysis.checkpoints.reading import (
    COUNTERS,
    Content,
    Entry,
    counted,
    counters_of_file,
    existing,
    number_in,
    read_file,
)
from msam_analysis.checkpoints.scanning import MOST_OBJECTS, CostlyError, scan

_INDICES = ("*.safetensors.index.json", "*.bin.index.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
_ENDINGS = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth")
_LONGEST_NAME = 255
_DESCRIPTIONS = ("torch", "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_SMALL = 2**16  # bytes of a stored number
_LAYOUTS = {str(layout): layout for layout in (torch.strided, torch.sparse_coo, torch.sparse_csr)}


def read(path: Path) -> Content:
    """Read a file or a folder.

    Raises FileNotFoundError, ValueError: Nothing is there, or what is there cannot be read as weights.
    """
    path = existing(path)
    if not path.is_dir():
        return read_file(path)
    if (path / ".metadata").is_file():
        return counted(*_distributed(path))
    if (path / "modules.json").is_file():
        content = _sentence(path)
    elif (newest := _newest(path)) is not None:  # a folder of DeepSpeed, which names its newest one
        if _newest(newest) is not None:
            raise ValueError(f"{path} names a folder that names another: expected one with weights; pass the one meant")
        return read(newest)
    else:
        content = _one(path)
    return counted(content, files.json_of(path / "trainer_state.json"))


def _newest(path: Path) -> Path | None:
    """Return the folder that a file called latest names, straight in a folder."""
    file = path / "latest"
    if not file.is_file() or file.stat().st_size > _LONGEST_NAME:
        return None
    name = file.read_bytes().decode(errors="replace").strip()
    return path / name if name.isprintable() and _straight(name) and (path / name).is_dir() else None


def _straight(name: object) -> bool:
    """Tell whether a name is that of something straight in a folder, and not of a place elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def counters(path: Path) -> dict[str, int | None]:
    """Return step and epoch as a checkpoint says them, else its name; None for what neither says."""
    if not path.is_dir():
        return counters_of_file(path)
    found = files.json_of(path / "trainer_state.json")
    if (path / ".metadata").is_file():
        with contextlib.suppress(Exception):  # damaged: said when it is loaded
            found = _numbers(path, _description(path))
    said = counted(Content(path, "", {}), found)
    return {"step": said.step, "epoch": said.epoch}


def is_checkpoint(path: Path) -> bool:
    """Tell whether a folder is one checkpoint, and not a place with several."""
    marks = (".metadata", "modules.json", "adapter_config.json", "latest", *_WEIGHTS)
    return any((path / mark).is_file() for mark in marks) or any(next(path.glob(it), None) for it in _INDICES)


def within(path: Path) -> list[Path]:
    """Return the files of weights and the folders that are checkpoints, straight in a folder."""
    found = {file for pattern in _ENDINGS for file in path.glob(pattern) if file.is_file()}
    return sorted(found | {one for one in path.iterdir() if one.is_dir() and is_checkpoint(one)})


def _one(path: Path) -> Content:
    """Read the weights that lie straight in a folder: shards behind an index, or one file."""
    for pattern in _INDICES:
        for index in sorted(path.glob(pattern)):
            return _shards(path, index)
    adapter = (path / "adapter_config.json").is_file()
    for name in _WEIGHTS:
        if (path / name).is_file() and name.startswith("adapter") == adapter:
            content = read_file(path / name)
            return dataclasses.replace(content, path=path, kind=f"folder with {name}", partial=adapter)
    for pattern in _ENDINGS:
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return dataclasses.replace(read_file(found[0]), path=path, kind=f"folder with {found[0].name}")
        if found:
            names = ", ".join(file.name for file in found[:6])
            raise ValueError(f"{path} holds {len(found)} files of weights ({names}): expected one; pass the file meant")
    raise FileNotFoundError(
        f"no checkpoint at {path}: {files.EXPECTED}, or a folder of save_pretrained; this folder holds no weights"
    )


def _shards(path: Path, index: Path) -> Content:
    found = files.json_of(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places or not all(map(_straight, places.values())):
        raise ValueError(f"{index} is no index of shards: expected names of tensors to files beside it; fetch it again")
    tensors: dict[str, Entry] = {}
    shards = sorted(set(places.values()))
    for name in shards:
        if not (path / name).is_file():
            raise ValueError(f"{path} lacks the shard {name}, which {index.name} names: fetch it, too")
        tensors |= read_file(path / name).tensors
    lacking = [name for name in places if name not in tensors]
    if lacking:
        raise ValueError(
            f"{path}: {len(lacking)} tensors of {index.name} are in no shard (first: {lacking[0]!r}); fetch it again"
        )
    return Content(path, f"folder of {len(shards)} shards", tensors)


def _sentence(path: Path) -> Content:
    """Read the modules of a sentence-transformers folder, each under the name that the model gives it."""
    tensors: dict[str, Entry] = {}
    modules = files.json_of(path / "modules.json")
    if not isinstance(modules, list) or not all(map(_is_module, modules)):
        raise ValueError(
            f"{path / 'modules.json'} is no list of modules: expected a name and a path beside it for each; fetch it "
            "again"
        )
    for module in modules:
        folder = path / module["path"]
        if not any(next(folder.glob(pattern), None) for pattern in (*_INDICES, *_ENDINGS)):
            continue  # a pooling layer has no weights
        name = module["name"]
        tensors |= {f"{name}.{key}": Entry(entry.tensor, ()) for key, entry in _one(folder).tensors.items()}
    return Content(path, "folder of sentence-transformers", tensors)


def _is_module(module: object) -> bool:
    if not isinstance(module, dict) or not isinstance(module.get("name"), str):
        return False
    return module.get("path") == "" or _straight(module.get("path"))


def _distributed(path: Path) -> tuple[Content, dict[str, Any]]:
    """Read a folder of torch.distributed.checkpoint in one process, and its counters; nothing in it is run."""
    from torch.distributed.checkpoint.api import CheckpointException  # imports much

    try:
        metadata = _description(path)
        names = [name for name, one in metadata.state_dict_metadata.items() if hasattr(one, "properties")]
        wanted, known = _tensors(path, metadata, names), _numbers(path, metadata)
    except (Exception, CheckpointException) as error:  # noqa: BLE001 -- whatever it is; torch's own is no Exception
        reason = files.reason_of(error)
        raise ValueError(
            f"{path} cannot be read as a checkpoint of torch.distributed ({reason}): expected .metadata and the "
            "files that it names; fetch it again, or convert it by torch.distributed.checkpoint.format_utils"
        ) from None
    tensors = {name: Entry(tensor, (name.split(".", 1)[0],)) for name, tensor in wanted.items()}
    return Content(path, "folder of torch.distributed.checkpoint", tensors), known


def _description(path: Path) -> Any:
    """Read what the folder says of itself; it may claim no more than its files hold."""
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    with (path / ".metadata").open("rb") as stream:
        scan(stream, size, plain=True)
        stream.seek(0)
        metadata = _Descriptions(stream).load()
    described = [one for one in metadata.state_dict_metadata.values() if hasattr(one, "properties")]
    claimed = sum(math.prod(one.size) * one.properties.dtype.itemsize for one in described)
    below = any(length < 0 for one in described for length in one.size)
    if below or claimed > size or len(metadata.state_dict_metadata) > MOST_OBJECTS:
        raise CostlyError(f"{len(described)} tensors claim {claimed} bytes, where its files have {size}")
    return metadata


def _tensors(path: Path, metadata: Any, names: Sequence[str]) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # imports much
    from torch.distributed.checkpoint.state_dict_loader import load

    sizes = {name: metadata.state_dict_metadata[name] for name in names}
    wanted = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in sizes.items()}
    reader = FileSystemReader(path)
    reader.read_metadata = lambda *_args, **_options: metadata  # type: ignore[method-assign]  # its own runs the pickle
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is what is meant
        load(wanted, storage_reader=reader)
    return wanted


def _numbers(path: Path, metadata: Any) -> dict[str, Any]:
    """Return the counters of the training, the outermost of each name; an optimizer's own are others."""
    found: dict[str, Any] = {}
    described: Mapping[str, Any] = metadata.state_dict_metadata
    for name in sorted(described, key=lambda name: name.count(".")):
        *outer, last = name.split(".")
        if last in found or last not in COUNTERS or any("optim" in part.lower() for part in outer):
            continue
        one = described[name]
        if not hasattr(one, "properties"):
            found[last] = _stored(path, metadata, name)
        elif one.size.numel() == 1:
            found[last] = _tensors(path, metadata, [name])[name]
    return found


def _stored(path: Path, metadata: Any, name: str) -> Any:
    """Return an object that is small and safe to read, from its place in one of the folder's files."""
    place = next((one for index, one in metadata.storage_data.items() if index.fqn == name), None)
    if place is None or place.length > _SMALL or (path / place.relative_path).parent != path:
        return None
    with (path / place.relative_path).open("rb") as stream:
        stream.seek(place.offset)
        return number_in(stream.read(place.length))


class _Descriptions(pickle.Unpickler):
    """Reads the description of a distributed checkpoint: makes its dataclasses, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of torch that only describes.

        Raises pickle.UnpicklingError: It is another one.
        """
        if module == "pathlib":
            return PurePosixPath
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _LAYOUTS.get
        found = getattr(importlib.import_module(module), name, None) if module in _DESCRIPTIONS else None
        if dataclasses.is_dataclass(found) or isinstance(found, (enum.EnumMeta, torch.dtype)) or found is torch.Size:
            return found
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which only running it could restore")
