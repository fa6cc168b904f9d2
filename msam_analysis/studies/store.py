"""Finished runs on disk: what is there is whole, and named after what decides it.

A folder for every network: ``checkpoint.pt``, ``scores.json`` and ``steps.csv`` together, then a table for every slower
probe and a folder of results for every measure.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import torch

from msam_analysis import results
from msam_analysis.results import Result, atomic_folder, atomic_path
from msam_analysis.results.checking import is_number
from msam_analysis.results.files import PARTIAL
from msam_analysis.results.fingerprint import of_tensors
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, as_table, write_table
from msam_analysis.studies.training import Trained, joined, write_state

_CHECKPOINT, _SCORES, _STEPS = _NETWORK = ("checkpoint.pt", "scores.json", "steps.csv")
_CONTENTS = "contents.json"
_RECORDED = re.compile(r".+-[0-9a-f]{16}\.csv")  # a probe's file, see :class:`.Job`
UNFINISHED = ".unfinished"
LOCK = ".lock"


class DivergedError(Exception):
    """A result is asked for of a network that has none, as its loss is not finite."""


class _NoResults(dict[str, Result]):
    """The results of a diverged network."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.network = network

    def __missing__(self, name: str) -> Result:
        raise DivergedError(f"{self.network} diverged: its loss is not finite, and {name} is not measured")


def alone(root: Path) -> AbstractContextManager[object]:
    """Hold a folder of runs for this process alone; however the process ends, its hold ends with it."""
    try:
        return filelock.FileLock(root / LOCK).acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(
            f"another study is running in {root.parent}: wait for its end, or choose another output folder"
        ) from None


def is_trained(directory: Path) -> bool:
    """Tell whether a network is there, with its scores and steps."""
    return all((directory / name).is_file() for name in _NETWORK)


def write_trained(
    directory: Path, trained: Trained, scores: Mapping[str, float], watched: Mapping[str, pd.DataFrame]
) -> None:
    """Write a trained network in one step, and the records of its slower probes by the names of their files.

    The same network may be there already, trained without these probes: then their records are put beside it. What is
    not whole, or another network, as another machine may have trained, goes with all that was known of it; files that
    somebody else put there stay.
    """
    weights = trained.model.state_dict()
    same = of_tensors(weights.values())
    if is_trained(directory) and of_tensors(read_checkpoint(directory)["model"].values()) == same:
        for name, recorded in watched.items():
            write_table(recorded, directory / name)
        return
    with atomic_folder(directory, _CHECKPOINT) as partial:
        write_state({"model": weights, "optimizer": trained.optimizer.state_dict()}, partial / _CHECKPOINT)
        (partial / _SCORES).write_text(json.dumps(dict(scores), indent=1) + "\n")
        for name, recorded in {_STEPS: trained.base, **watched}.items():
            recorded.to_csv(partial / name, index=False, lineterminator="\n")
        _forget(directory)


def _forget(directory: Path) -> None:
    """Remove what was known of a network that is about to be replaced: the weights first, then records and measures."""
    (directory / _CHECKPOINT).unlink(missing_ok=True)
    for path in list(directory.glob("*")):
        if path.is_file() and _RECORDED.fullmatch(path.name):
            path.unlink()
        elif (path / _CONTENTS).is_file():
            names = _listed(path) or []
            for name in (_CONTENTS, *names):
                (path / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody put a file there
                path.rmdir()


def read_checkpoint(directory: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the weights and the state of the optimizer of a trained network.

    Raises ValueError: The file is damaged.
    """
    path = directory / _CHECKPOINT
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # noqa: BLE001 -- whatever torch says of what is damaged, with advice that runs it
        raise _damaged(path, f"torch cannot read it: {type(error).__name__}") from None
    weights, state = (saved.get("model"), saved.get("optimizer")) if isinstance(saved, dict) else (None, None)
    if not isinstance(weights, dict) or not isinstance(state, dict) or not all(map(torch.is_tensor, weights.values())):
        raise _damaged(path, "it holds no weights with a state of the optimizer")
    return dict(saved)


def read_scores(directory: Path) -> dict[str, float]:
    """Return what a trained network reached; ValueError: the file is damaged."""
    path = directory / _SCORES
    try:
        reached = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(reached, dict) or "train_loss" not in reached or not all(map(is_number, reached.values())):
        raise _damaged(path, "it holds no scores, which are names with numbers, among them train_loss")
    return reached


def is_measured(folder: Path) -> bool:
    """Tell whether every result of a measure is there."""
    names = _listed(folder)
    return names is not None and all((folder / name).is_file() for name in names)


def _listed(folder: Path) -> list[str] | None:
    """Return the names of the results in a folder of a measure; ``None`` where no list can be read."""
    try:
        return _contents(folder)
    except (OSError, ValueError):
        return None


def write_measured(folder: Path, measured: Mapping[str, Result]) -> None:
    """Write the results of a measure in one step."""
    with atomic_folder(folder, _CONTENTS) as partial:
        names = [f"{name}.safetensors" for name in measured]
        for name, result in zip(names, measured.values(), strict=True):
            result.save(partial / name)
        (partial / _CONTENTS).write_text(json.dumps(names) + "\n")


def read_run(directory: Path, run: Run, watched: Sequence[str] = (), measured: Sequence[str] = ()) -> FinishedRun:
    """Read a finished run, to the bit, with these files of probes and folders of measures, in this order."""
    reached = read_scores(directory)
    found: dict[str, Result] = {}
    if math.isfinite(reached["train_loss"]):
        for folder in measured:
            for name in _contents(directory / folder):
                found[name.removesuffix(".safetensors")] = results.load(directory / folder / name)
    else:
        found = _NoResults(f"{run.optimizer}, seed {run.seed},")
    steps, *records = (_read_numbers(directory / name) for name in (_STEPS, *watched))
    return FinishedRun(run.optimizer, run.seed, reached, joined(steps, records), found, run.settings)


def name_network(directory: Path, target: Path) -> None:
    """Put the checkpoint of a run where its name does not change with what decides the run, in place of another."""
    if target.exists() and target.samefile(directory / _CHECKPOINT):
        return
    with atomic_path(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(directory / _CHECKPOINT, partial)
        except OSError:  # a file system without links
            shutil.copyfile(directory / _CHECKPOINT, partial)


def forget_state(file: Path) -> None:
    """Remove the state of a training, and the folder of states if it was the last one."""
    file.unlink(missing_ok=True)
    with suppress(OSError):
        file.parent.rmdir()


def sweep(root: Path) -> None:
    """Remove what interrupted runs left, but for their states, in a folder that this process holds alone."""
    for leftover in [*root.glob(f"{PARTIAL}*"), *root.glob(f"*/{PARTIAL}*"), *root.glob(f"*/*/{PARTIAL}*")]:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _contents(folder: Path) -> list[str]:
    """Return the names of the files of a measure; ValueError: the list of them is damaged."""
    path = folder / _CONTENTS
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(names, list) or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise _damaged(path, "it holds no list of names of files")
    return names


def _read_numbers(path: Path) -> pd.DataFrame:
    """Read a table of numbers to the bit, which pandas of itself does in some of its versions only."""
    try:
        texts = pd.read_csv(path, dtype=str, na_filter=False)
        columns = {name: [int(t) if t.isdecimal() else float(t or "nan") for t in texts[name]] for name in texts}
    except (ValueError, TypeError, AttributeError, csv.Error) as error:  # pandas' own are of the first kind
        raise _damaged(path, error) from None
    return as_table(columns)


def _damaged(path: Path, why: object) -> ValueError:
    reason = " ".join(str(why).split())[:200]
    return ValueError(
        f"{path} is damaged ({reason}): expected what a study wrote; delete the folder that it is in, and the same "
        "command makes it again"
    )
