"""Finished runs on disk: whole or not there at all, and named after what decides their outcome."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from msam_analysis import results
from msam_analysis.results import Result
from msam_analysis.studies.tables import FinishedRun
from msam_analysis.studies.training import Trained

_PARTIAL = ".partial-"


def run_directory(root: Path, optimizer: str, seed: int, fingerprint: str) -> Path:
    """Return where a run lives; another setting has another fingerprint, and so another place."""
    return root / f"{optimizer}-seed{seed}-{fingerprint}"


def is_finished(directory: Path) -> bool:
    """Tell whether a run is there; it appears in one piece, when everything in it is written."""
    return (directory / "scores.json").is_file()


def write_run(directory: Path, trained: Trained, scores: Mapping[str, float], measured: Mapping[str, Result]) -> None:
    """Write a run to a hidden folder beside its place, and move it there in one step."""
    partial = directory.parent / f"{_PARTIAL}{directory.name}-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    try:
        torch.save(
            {"model": trained.model.state_dict(), "optimizer": trained.optimizer.state_dict()},
            partial / "checkpoint.pt",
        )
        trained.steps.to_csv(partial / "steps.csv", index=False, lineterminator="\n")
        for name, result in measured.items():
            result.save(partial / f"{name}.safetensors")
        (partial / "scores.json").write_text(json.dumps(dict(scores), indent=1) + "\n")
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_run(directory: Path, optimizer: str, seed: int) -> FinishedRun:
    """Read a finished run; the numbers are those that were written, to the bit."""
    measured = {path.stem: results.load(path) for path in sorted(directory.glob("*.safetensors"), key=_natural)}
    return FinishedRun(
        optimizer=optimizer,
        seed=seed,
        scores=json.loads((directory / "scores.json").read_text()),
        steps=pd.read_csv(directory / "steps.csv", float_precision="round_trip"),
        results=measured,
    )


def sweep(root: Path) -> None:
    """Remove what interrupted runs left behind."""
    for leftover in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _natural(path: Path) -> tuple[str, float]:
    """Order ``ball-0.05`` before ``ball-1``."""
    stem, _, number = path.stem.rpartition("-")
    try:
        return stem, float(number)
    except ValueError:
        return path.stem, 0.0
