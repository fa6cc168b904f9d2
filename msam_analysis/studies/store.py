"""Finished runs on disk: whole or not there at all, and named after what decides their outcome."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from msam_analysis import results
from msam_analysis.results import Result, atomic_folder, atomic_path
from msam_analysis.results.files import PARTIAL
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import Trained

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SUMMARY = "scores.json"
_UNFINISHED = ".unfinished"


class DivergedError(Exception):
    """A result is asked for of a network that has none, as its loss is not finite."""


class _Results(dict[str, Result]):
    """Results by name; of a diverged network, none."""

    def __init__(self, found: Mapping[str, Result], network: str) -> None:
        super().__init__(found)
        self.network = network

    def __missing__(self, name: str) -> Result:
        raise DivergedError(f"{self.network} diverged: its loss is not finite, and {name} is not measured")


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold a folder of runs for this process alone; however the process ends, its hold ends with it.

    Raises
    ------
    BlockingIOError
        Another process holds it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BlockingIOError(
            f"another study is running in {root.parent}: wait for its end, or choose another output folder"
        ) from None
    finally:
        os.close(handle)


def run_directory(root: Path, optimizer: str, seed: int, fingerprint: str) -> Path:
    """Return where a run lives; another setting has another fingerprint, and so another place."""
    return root / f"{optimizer}-seed{seed}-{fingerprint}"


def is_finished(directory: Path) -> bool:
    """Tell whether a run is there with every file that was written."""
    try:
        return all((directory / name).is_file() for name in _summary(directory)["files"])
    except (OSError, ValueError, KeyError):
        return False


def write_run(directory: Path, trained: Trained, scores: Mapping[str, float], measured: Mapping[str, Result]) -> None:
    """Write a run, in one step; what is in its place is not whole, and goes."""
    with atomic_folder(directory) as partial:
        torch.save(
            {"model": trained.model.state_dict(), "optimizer": trained.optimizer.state_dict()},
            partial / "checkpoint.pt",
        )
        trained.steps.to_csv(partial / "steps.csv", index=False, lineterminator="\n")
        for name, result in measured.items():
            result.save(partial / f"{name}.safetensors")
        summary = {"scores": dict(scores), "files": sorted(path.name for path in partial.iterdir())}
        (partial / _SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


def read_run(directory: Path, optimizer: str, seed: int, settings: Mapping[str, Any] | None = None) -> FinishedRun:
    """Read a finished run; the numbers are those that were written, to the bit."""
    found = {path.stem: results.load(path) for path in sorted(directory.glob("*.safetensors"), key=_natural)}
    reached = _summary(directory)["scores"]
    measured = found if math.isfinite(reached["train_loss"]) else _Results(found, f"{optimizer}, seed {seed},")
    return FinishedRun(
        optimizer=optimizer,
        seed=seed,
        scores=reached,
        steps=_read_numbers(directory / "steps.csv"),
        results=measured,
        settings=settings or {},
    )


def name_networks(named: Mapping[str, Path], folder: Path) -> None:
    """Put the checkpoints of runs into a folder, under names that do not change with what decides a run.

    Parameters
    ----------
    named
        Name, without an ending, to the directory of a run.
    folder
        It is made; another checkpoint of that name is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, directory in named.items():
        with atomic_path(folder / f"{name}.pt") as partial:
            partial.unlink(missing_ok=True)
            try:
                os.link(directory / "checkpoint.pt", partial)
            except OSError:  # a file system without links
                shutil.copyfile(directory / "checkpoint.pt", partial)


def state_file(directory: Path) -> Path:
    """Return where the state of a run that is under way lives; it is of no use once the run is finished."""
    return directory.parent / _UNFINISHED / f"{directory.name}.pt"


def forget_state(directory: Path) -> None:
    """Remove the state of a run, and the folder of states if it was the last one."""
    file = state_file(directory)
    file.unlink(missing_ok=True)
    with suppress(OSError):
        file.parent.rmdir()


def sweep(root: Path) -> None:
    """Remove what interrupted runs left behind, but for the states that they can go on from.

    Only for who holds the folder, see :func:`alone`.
    """
    for leftover in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in (root / _UNFINISHED).glob(".*"):
        leftover.unlink(missing_ok=True)
    for state in (root / _UNFINISHED).glob("*.pt"):
        if is_finished(root / state.stem):
            forget_state(root / state.stem)


def _summary(directory: Path) -> Any:
    return json.loads((directory / _SUMMARY).read_text())


def _read_numbers(path: Path) -> pd.DataFrame:
    """Read a table of numbers exactly, which pandas of itself does in some of its versions only."""

    def number(text: str) -> float:
        return int(text) if text.isdecimal() else float(text or "nan")

    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    columns = {name: [number(row[place]) for row in rows] for place, name in enumerate(header)}
    table: pd.DataFrame = pd.DataFrame(columns)
    return table


def _natural(path: Path) -> tuple[str, float]:
    """Order ``ball-0.05`` before ``ball-1``."""
    stem, _, number = path.stem.rpartition("-")
    try:
        return stem, float(number)
    except ValueError:
        return path.stem, 0.0
