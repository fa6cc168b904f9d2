"""What a process does that has the device: run the table on the CPU and there, and save the numbers of both."""

from __future__ import annotations

import dataclasses
import os
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .counts import COUNTS, Count
from .second import NAME, register
from .table import BENCHES, TABLE, Bench

Numbers = dict[str, Tensor | str]


def numbers(value: Any, name: str = "") -> Numbers:
    """Return all that a value holds, by the way to it: tensors on the CPU, and the rest in words."""
    if isinstance(value, Tensor):
        return {name: value.detach().cpu()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {name: torch.tensor(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        value.pop("settings", None)
        value.pop("sources", None)
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {name: str(value)}
    found: Numbers = {}
    for key, item in items:
        found |= numbers(item, f"{name}/{key}")
    return found


def saved(run: Callable[[Bench], Any], bench: Bench) -> Numbers:
    """Return what a row of the table gives; where it raises, how."""
    try:
        return numbers(run(bench))
    except Exception:  # noqa: BLE001 - the test that asks for this row shows it
        return {"raised": traceback.format_exc()}


def begun(library: Path, *, doubles: bool = True) -> Callable[[], int]:
    """Make this process one that measures, and return what counts the reads of the device."""
    os.environ["MPLBACKEND"] = "Agg"
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    return register(library, doubles=doubles)


def measure(_: int, library: Path, folder: Path) -> None:
    """Save the numbers on both devices under ``folder``, and how often the host has read."""
    reads = begun(library)
    found: dict[str, dict[str, Numbers]] = {}
    for device in ("cpu", NAME):
        BENCHES[device] = Bench(device, folder / device)
        found[device] = {name: saved(run, BENCHES[device]) for name, run in TABLE.items() if callable(run)}
    counted = {name: count_of(count, BENCHES[NAME], reads) for name, count in COUNTS.items()}
    torch.save({"found": found, "counted": counted, "device": of_the_device(reads)}, folder / "measured.pt")


def count_of(count: Count, bench: Bench, reads: Callable[[], int]) -> dict[str, int | str]:
    """Return how often the host has read, and how often it may; where something raises, how."""
    try:
        asked = count.prepare(bench)
        before = reads()
        outcome = asked()
        return {"reads": reads() - before, "allowed": count.allowed(outcome)}
    except Exception:  # noqa: BLE001 - the test that asks for this row shows it
        return {"raised": traceback.format_exc()}


def measure_in_single(_: int, library: Path, folder: Path) -> None:
    """Save the numbers in float32, on the CPU and on a device that has nothing wider."""
    begun(library, doubles=False)
    found: dict[str, dict[str, Numbers]] = {}
    for device in ("cpu", NAME):
        BENCHES[device] = Bench(device, folder / f"{device}-single", torch.float32)
        rows = {name: run for name, run in TABLE.items() if callable(run) and not name.startswith("plots.")}
        found[device] = {name: saved(run, BENCHES[device]) for name, run in rows.items()}
    torch.save(found, folder / "single.pt")


def of_the_device(reads: Callable[[], int]) -> dict[str, int | str]:
    """What shows that the device refuses and counts: the reads of some operations, and an error."""
    x = torch.arange(6.0).reshape(2, 3).to(NAME)
    mask = x > 2
    operations: dict[str, Callable[[], object]] = {
        "x + x": lambda: x + x,
        "x @ x.T": lambda: x @ x.T,
        "x.sum()": x.sum,
        "x[[0]]": lambda: x[torch.tensor([0], device=NAME)],
        "x.cpu()": x.cpu,
        "float(x.sum())": lambda: float(x.sum()),
        "x.tolist()": x.tolist,
        "bool(mask.any())": lambda: bool(mask.any()),
        "torch.equal(x, x)": lambda: torch.equal(x, x),
        "x[mask]": lambda: x[mask],
        "mask.nonzero()": mask.nonzero,
    }
    found: dict[str, int | str] = {}
    for name, operation in operations.items():
        before = reads()
        operation()
        found[name] = reads() - before
    try:
        nn.Linear(3, 2).to(NAME)(torch.ones(2, 3))
    except RuntimeError as error:
        found["refused"] = str(error)
    return found
