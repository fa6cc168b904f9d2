"""The numbers of training, probes and measures on the toy, stored with the versions that they belong to.

``python -m tests.studies.versions`` stores them again, after a version was raised.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from msam import update_batchnorm_statistics
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.results import ConvergenceWarning
from msam_analysis.studies import training
from msam_analysis.studies.measuring import MEASURES, Subject, scores
from msam_analysis.studies.training import train
from msam_analysis.studies.watching import WATCHES

from .toy import COARSE, TOY

FILE = Path(__file__).with_name("versions.json")
COMMAND = "python -m tests.studies.versions"

# How much work a solver took, and how near it came, is not what is measured, and may differ between machines.
_EFFORT = ("gradients", "hvps", "residual", "iterations", "stationarity", "spread", "converged", "budget", "seconds")

Numbers = dict[str, float | None]


def _means(frame: pd.DataFrame, name: str = "") -> Numbers:
    numbers = frame.select_dtypes("number").drop(columns=["step", *_EFFORT], errors="ignore")
    return {f"{name}{column}": None if pd.isna(mean) else float(mean) for column, mean in numbers.mean().items()}


def of_training() -> Numbers:
    """Scores, gradients and norm of the weights of every optimizer."""
    found: Numbers = {}
    for name in TOY.perturbations:
        trained = train(TOY, name, 0, every=None)
        norm = float(torch.cat([p.detach().flatten() for p in trained.model.parameters()]).norm())
        reached = scores(TOY, trained.model) | {"norm": norm, "gradients": trained.gradients_per_step}
        found |= {f"{name} {key}": value for key, value in reached.items()} | _means(trained.base, f"{name} ")
    return found


def of_watch(name: str) -> Numbers:
    """Means over what a probe recorded on the way of MSAM, in 24 steps: every probe records three times or more."""
    longer = dataclasses.replace(TOY, recipe=dataclasses.replace(TOY.recipe, epochs=6))
    return _means(train(longer, "MSAM", 0, every=6, watched=[name]).watched[name])


def of_measure(name: str) -> Numbers:
    """Means over the results of a measure on a network that was trained without the study."""
    with RandomStream(0):
        model = TOY.network()
    optimizer, criterion = TOY.optimizer("MSAM", model), TOY.criterion()
    for inputs, labels in TOY.train() * 3:

        def closure(x: torch.Tensor = inputs, y: torch.Tensor = labels) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    optimizer.eval()
    update_batchnorm_statistics(model, TOY.train(), optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the toy's protocol is coarse
        results = MEASURES[name].of(Subject(TOY, model.eval(), optimizer), COARSE)
    return {key: value for of, one in results.items() for key, value in _means(one.to_frame(), f"{of} ").items()}


PARTS: Mapping[str, tuple[int, Callable[[], Numbers]]] = {
    "training": (training.VERSION, of_training),
    **{f"WATCHES['{name}']": (row.version, partial(of_watch, name)) for name, row in WATCHES.items()},
    **{f"MEASURES['{name}']": (row.version, partial(of_measure, name)) for name, row in MEASURES.items()},
}
"""What has a version, with it and with what gives its numbers."""


def stored() -> dict[str, Any]:
    """Return what was stored: part to ``{"version": ..., "numbers": ...}``."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def store() -> None:
    """Store the numbers of every part whose version is not the stored one."""
    before = stored() if FILE.exists() else {}
    parts = {
        part: before[part]
        if before.get(part, {}).get("version") == version
        else {"version": version, "numbers": numbers()}
        for part, (version, numbers) in PARTS.items()
    }
    FILE.write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    store()
