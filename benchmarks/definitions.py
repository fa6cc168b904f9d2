"""Every definition of sharpness on the same networks: where they agree and where not; see docs/sharpness.md.

The networks of the study (digits, 40 % of the training labels wrong) that SGD, SAM and MSAM found from the same seeds,
and SGD's once more with one layer four times as large and the next a quarter: the same function of its inputs.

``python benchmarks/definitions.py`` takes some minutes on one core; ``--minutes 8`` stops after so many and the same
command goes on from there: what is measured on a network is kept in ``--cache``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import machine, save
from sharpness import kept
from torch import nn

import msam_analysis as ma
from msam_analysis.results.statistics import mean_interval, paired_interval
from msam_analysis.studies.measuring import scores
from msam_analysis.studies.training import train
from msam_analysis.studies.workloads import DIGITS

RESULTS = Path(__file__).parent / "results" / "definitions_cpu.json"
OPTIMIZERS = ("SGD", "SAM", "MSAM")
RESCALED = "SGD, rescaled"
FACTOR = 4.0
LAYER = "11.weight"

Number = Callable[[ma.Objective], float]


def along_random(objective: ma.Objective) -> float:
    """Mean rise at the end of five filter-normalised random directions, each of its own length."""
    directions = [ma.directions.random(objective, seed) for seed in range(5)]
    rises = [ma.directional_sharpness(objective, d, d.norm, points=3).sharpness for d in directions]
    return sum(rises) / len(rises)


DEFINITIONS: dict[str, Number] = {
    "largest rise, ‖e‖₂ ≤ 0.05": lambda o: ma.ball_sharpness(o, 0.05).sharpness,
    "largest rise, ‖e‖₂ ≤ 0.5": lambda o: ma.ball_sharpness(o, 0.5).sharpness,
    "largest rise, ‖e‖∞ ≤ 0.005": lambda o: ma.ball_sharpness(o, 0.005, norm="linf").sharpness,
    "one step of SAM, ρ = 0.05": lambda o: ma.one_step_sharpness(o, 0.05).sharpness,
    "one step of SAM, ρ = 0.5": lambda o: ma.one_step_sharpness(o, 0.5).sharpness,
    "m-sharpness, m = 100, ρ = 0.05": lambda o: ma.m_sharpness(o, 0.05, 100).value,
    "average, σ = 0.02": lambda o: ma.average_sharpness(o, 0.02).value,
    "λ₁": lambda o: float(ma.top_eigenvalues(o, 1).values[0]),
    "trace": lambda o: ma.trace(o).value,
    "adaptive, ‖e/|w|‖₂ ≤ 0.5": lambda o: ma.ball_sharpness(o, 0.5, adaptive=True).sharpness,
    "adaptive, ‖e/|w|‖∞ ≤ 0.02": lambda o: ma.ball_sharpness(o, 0.02, norm="linf", adaptive=True).sharpness,
    "adaptive by filters, ρ = 0.1": lambda o: ma.ball_sharpness(o, 0.1, adaptive="filter").sharpness,
    "one step of ASAM, ρ = 0.5": lambda o: ma.one_step_sharpness(o, 0.5, adaptive=True).sharpness,
    "adaptive average, σ = 0.1": lambda o: ma.average_sharpness(o, 0.1, adaptive=True).value,
    "random directions, filter-normalised": along_random,
    "relative flatness, last layer": lambda o: ma.relative_flatness(o, LAYER, draws=100).value,
    "squared Fisher-Rao norm": lambda o: ma.fisher_rao_norm(o, samples=300).value,
}


def rescaled(model: nn.Module) -> nn.Module:
    """The same function: the first normalisation layer's output four times as large, the next convolution a quarter."""
    copied = copy.deepcopy(model)
    parameters = dict(copied.named_parameters())
    with torch.no_grad():
        for name, factor in (("1.weight", FACTOR), ("1.bias", FACTOR), ("3.weight", 1 / FACTOR)):
            parameters[name].mul_(factor)
    return copied


def measured(name: str, seed: int) -> dict[str, Any]:
    """Every number of a network, which is trained first."""
    model = train(DIGITS, "SGD" if name == RESCALED else name, seed, every=None).model
    model = rescaled(model) if name == RESCALED else model
    objective = ma.Objective(model, nn.CrossEntropyLoss(), DIGITS.train())
    numbers = {name: number(objective) for name, number in DEFINITIONS.items()}
    context = scores(DIGITS, model)
    return {"test accuracy": 100 * context["test_accuracy"], "train loss": context["train_loss"], **numbers}


def order(values: dict[str, list[float]]) -> str:
    """The optimizers from sharp to flat; ≈ where the 68 % interval of the difference over seeds holds 0."""
    ranked = sorted(OPTIMIZERS, key=lambda name: -sum(values[name]))
    text = ranked[0]
    for first, second in pairwise(ranked):
        difference = paired_interval(values[first], values[second])
        text += f" {'>' if difference.low > 0 else '≈'} {second}"
    return text


def shown(values: list[float]) -> str:
    """Mean and 68 % half width, with the digits that the half width leaves."""
    interval = mean_interval(values)
    digits = 2 - math.ceil(math.log10(interval.half_width)) if interval.half_width > 0 else 3
    return f"{interval.mean:.{max(0, min(digits, 6))}f} ± {interval.half_width:.{max(0, min(digits, 6))}f}"


def markdown(results: dict[str, Any]) -> str:
    """The figures as the table in ``docs/sharpness.md``."""
    networks = (*OPTIMIZERS, RESCALED)
    lines = [f"| definition | {' | '.join(networks)} | from sharp to flat |", "|---|---:|---:|---:|---:|---|"]
    for row in results["table"]:
        cells = " | ".join(shown(row["values"][name]) for name in networks)
        definition = row["definition"].replace("|", "\\|")
        lines.append(f"| {definition} | {cells} | {row['order']} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "msam-definitions")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the table of such a file, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    options.cache.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OPTIMIZERS, RESCALED)}
    state = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]
    for seed in range(options.seeds):
        for name, rows in found.items():
            path = options.cache / f"{name.replace(', ', '-')}-{seed}-{state}.json"
            if not path.exists() and time.monotonic() - started > 60 * options.minutes:
                print("time is up: the same command goes on from here")
                return
            rows.append(kept(path, partial(measured, name, seed)))
        print(f"seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
    table = []
    for definition in found["SGD"][0]:
        values = {name: [row[definition] for row in rows] for name, rows in found.items()}
        table.append({"definition": definition, "values": values, "order": order(values)})
    results = {"machine": machine("cpu"), "seeds": options.seeds, "factor": FACTOR, "table": table}
    print(markdown(results))
    save(results, options.out)


if __name__ == "__main__":
    main()
