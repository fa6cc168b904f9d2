"""Files of our own results with one thing in them changed for the worse: every field of the header, every tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "3": 3,
    "1.5": 1.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "-infinity": -math.inf,
    "2^70": 2**70,
    "10^400": 10**400,
    "a text": "text",
    "no text": "",
    "half a character": "\ud800",
    "[]": [],
    "[1, 'a']": [1, "a"],
    "[[[]]]": [[[]]],
    "{}": {},
    "{'a': []}": {"a": []},
    "results": {"<results>": [["a", "Estimate", {}]]},
    "results of a wrong kind": {"<results>": [["a", "Result", {}]]},
    "results that are none": {"<results>": 3},
}
"""What stands in place of a value of the header."""

TENSORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "gone": lambda t: None,
    "empty": lambda t: t.flatten()[:0],
    "without dimensions": lambda t: t.flatten()[:1].sum(),
    "one more": lambda t: torch.cat([t, t[:1]]) if t.ndim and len(t) else t[None],
    "one dimension more": lambda t: t[None],
    "transposed": lambda t: t.T.contiguous() if t.ndim == 2 else t.flip(0) if t.ndim else t,
    "negative": lambda t: -t.double().abs() - 1,
    "NaN": lambda t: torch.full_like(t.double(), math.nan),
    "infinite": lambda t: torch.full_like(t.double(), math.inf),
    "complex": lambda t: t.to(torch.complex64),
    "true": lambda t: torch.ones_like(t, dtype=torch.bool),
    "bytes": lambda t: torch.zeros_like(t, dtype=torch.uint8),
    "large whole numbers": lambda t: torch.full_like(t, 2**62, dtype=torch.int64),
    "float8": lambda t: t.double().float().to(torch.float8_e4m3fn),
    "bfloat16": lambda t: t.to(torch.bfloat16),
}
"""What becomes of a tensor."""


def opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the header and the tensors of a file."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in names}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where every value of a header stands, outer ones first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a header with another value at a place."""
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = changed(value[path[0]], path[1:], new)
    return copied


def files(path: Path, entry: str = "result") -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what is wrong with a file, and what writes it that way; ``entry``: where its header has our JSON."""
    metadata, tensors = opened(path)
    header = json.loads(metadata[entry])

    def written(text: str, those: dict[str, Tensor]) -> Callable[[], None]:
        return lambda: save_file(those, path, metadata={**metadata, entry: text})

    def write(other: Any, those: dict[str, Tensor]) -> Callable[[], None]:
        return written(json.dumps(other), those)

    for place in places(header):
        for name, value in VALUES.items():
            yield f"{'/'.join(map(str, place)) or 'all'} is {name}", write(changed(header, place, value), tensors)
    for name, tensor in tensors.items():
        for what, change in TENSORS.items():
            other = change(tensor)
            rest = {**tensors, name: other.contiguous()} if other is not None else {}
            rest = rest or {key: value for key, value in tensors.items() if key != name}
            yield f"the tensor {name} is {what}", write(header, rest)
    for what, text in (("no JSON", "{"), ("deep", "[" * 10**5), ("a list", "[]"), ("a number", "9" * 10_000)):
        yield f"the header is {what}", written(text, tensors)
    yield "another tensor", write(header, {**tensors, "other": torch.ones(2)})
    yield "another tensor inside", write(header, {**tensors, "other/a": torch.ones(2)})


def claims(path: Path, size: int) -> None:
    """Write a safetensors file whose header claims this size."""
    head = json.dumps({"a": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
