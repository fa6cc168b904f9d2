"""Files of weights in every format, and what a disk, a network or a hostile person makes of them."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

State = dict[str, torch.Tensor]


def state() -> State:
    return {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2), "1.count": torch.tensor(3)}


def new(path: Path) -> None:
    torch.save({"model": state(), "args": argparse.Namespace(a=1), "step": 7}, path)


def old(path: Path) -> None:
    torch.save({"model": state(), "args": argparse.Namespace(a=1)}, path, _use_new_zipfile_serialization=False)


def script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        torch.jit.script(nn.Linear(3, 2)).save(path)


def safetensors(path: Path) -> None:
    save_file(state(), path)


def distributed(path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        save({"model": state()}, checkpoint_id=path)


def shards(path: Path) -> None:
    path.mkdir()
    save_file({"0.weight": torch.ones(2)}, path / "model-0.safetensors")
    index = {"metadata": {"total_size": 8}, "weight_map": {"0.weight": "model-0.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def sentence(path: Path) -> None:
    path.mkdir()
    save_file({"w": torch.ones(2)}, path / "model.safetensors")
    (path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "x"}]))


FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "new": (new, ""),
    "old": (old, ""),
    "script": (script, ""),
    "safetensors": (safetensors, ""),
    "distributed": (distributed, ".metadata"),
    "distributed data": (distributed, "__0_0.distcp"),
    "shards": (shards, "model.safetensors.index.json"),
    "sentence": (sentence, "modules.json"),
}
"""How a checkpoint is written, and which file of a folder is damaged."""

WORDS = [b"\0" * 8, b"\xff" * 8, b"\x7f" + b"\xff" * 7, struct.pack("<Q", 2**40), struct.pack("<I", 2**31)]
WORDS += [b"PK\x03\x04", b"PK\x01\x02", b"(" * 20, b"\x85" * 40, b"r\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 7, b"[" * 50]
WORDS += [b'"shape":[-1]', b"NaN", b"1e400", b"{}", b".", b"R", b"Q", b"c__builtin__\nbytearray\n", b"}", b"99999999"]

Change = tuple[str, float, float, bytes]
CHANGES: st.SearchStrategy[list[Change]] = st.lists(
    st.tuples(
        st.sampled_from(["cut", "put", "insert", "drop", "repeat"]),
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from(WORDS) | st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)
"""What is done to the bytes of a file, one after the other, at places given as parts of its length."""


def changed(content: bytes, changes: list[Change]) -> bytes:
    for what, where, other, word in changes:
        start, stop = sorted((int(where * len(content)), int(other * len(content))))
        if what == "cut":
            content = content[: max(start, stop)]
        elif what == "put":
            content = content[:start] + word + content[start + len(word) :]
        elif what == "insert":
            content = content[:start] + word + content[start:]
        elif what == "drop":
            content = content[:start] + content[min(stop, start + 64) :]
        else:
            content = content[:stop] + content[start:]
    return content


# --- made by hand: a few bytes that ask for much


def archive(
    path: Path, pickled: bytes, *, stored: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None
) -> None:
    """Write a torch.save file with this description."""
    with zipfile.ZipFile(path, "w", stored) as file:
        content = {"a/data.pkl": pickled, "a/version": b"3\n", "a/byteorder": b"little", **(more or {})}
        for name, data in content.items():
            file.writestr(name, data)


def legacy(path: Path, pickled: bytes) -> None:
    """Write a torch.save file of before version 1.6 with this object."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    content = b"".join(pickle.dumps(one, protocol=2) for one in head)
    path.write_bytes(content + pickled + pickle.dumps([], protocol=2))


def storage(count: int, *, size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85") -> bytes:
    """A pickle of one tensor with a storage of so many numbers."""
    number = b"\x8a\x09" + count.to_bytes(9, "little", signed=True)
    key = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number + b"tQ"
    return (
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
        + key
        + b"K\0"
        + size
        + stride
        + (b"\x89ccollections\nOrderedDict\n)RtRs.")
    )


def _long(number: int) -> bytes:
    return b"\x8a\x09" + number.to_bytes(9, "little", signed=True)


PICKLES: dict[str, tuple[bytes, str]] = {
    "a long bytearray": (
        b"\x80\x02c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R.",
        "fills 2130706432 bytes that are not in it",
    ),
    "a place far out in the memo": (b"\x80\x02]r\xff\xff\xff\x0f.", "numbers an object 268435455"),
    "tuples in tuples": (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", "nests more than 100 tuples"),
    "a long tensor": (
        b"\x80\x02ctorch\nFloatTensor\n" + _long(10**12) + b"\x85R.",
        "makes a tensor of 1000000000000 numbers",
    ),
    "a huge storage": (storage(10**12), "claims a storage of 1000000000000 numbers"),
    "a storage below 0": (storage(-4), "claims a storage of -4 numbers"),
    "a dictionary in itself": (b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "its containers hold themselves"),
    "dictionaries in dictionaries": (
        b"\x80\x02" + b"}X\x01\0\0\0a" * 5000 + b"}" + b"s" * 5000 + b".",
        "its containers hold themselves, or more",
    ),
    "a doubling of dictionaries": (
        b"\x80\x02}q\0" + b"".join(b"}q%c(X\x01\0\0\0ah%cX\x01\0\0\0bh%cu" % (n + 1, n, n) for n in range(60)) + b".",
        "its containers hold themselves, or more",
    ),
    "instructions without end": (b"\x80\x02" + b"N0" * 1_600_000 + b"N.", r"has more than \d+ instructions"),
}
"""Pickles that cost much, and what is said of them."""
