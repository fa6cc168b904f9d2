"""How much of the largest loss rise in a ball is found, and for how many gradients; see docs/sharpness.md.

Networks trained on digits by the study's own code, all balls that are in use, radii from small to large. What a long
search finds is the reference: 5 starts (gradient, ± top eigenvector, two random draws that nobody else uses) with 100
steps each of two methods. Beside the library at its defaults: the single step of SAM, 20 steps of projected gradient
ascent, and Auto-PGD written from its paper, with 40 gradients and with as many as the library's call costs in all.

The floor is one gradient for every point that is looked at. Hessian-vector products are counted beside the gradients,
and the cost of the whole call is given as CPU time over that of one gradient, measured in the same run.

``python benchmarks/sharpness.py`` takes an hour on one core, for the reference; ``--minutes 8`` stops after so many and
the same command goes on from there: networks and finished cells are kept in ``--cache``. ``--parts`` measures the two
searches of the library alone, with parts of the data and without, and writes ``sharpness_parts_cpu.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, save
from optimizers import Block
from torch import Tensor, nn

import msam_analysis as ma
import msam_analysis.measures as balls
from msam_analysis.measures.geometry import Ball, Norm
from msam_analysis.objective.operators import ScaledOperator, SymmetricOperator
from msam_analysis.studies.training import train
from msam_analysis.studies.workloads import DIGITS

RESULTS = Path(__file__).parent / "results" / "sharpness_cpu.json"
PARTS = RESULTS.with_name("sharpness_parts_cpu.json")
RADII = {
    ("l2", False): (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 3.0),
    ("l2", True): (0.05, 0.2, 1.0, 3.0),
    ("linf", False): (0.0005, 0.002, 0.01),
    ("linf", True): (0.003, 0.02, 0.1),
}
BALLS = {
    ("l2", False): "‖e‖₂",
    ("l2", True): "‖e/|w|‖₂",
    ("linf", False): "‖e‖∞",
    ("linf", True): "‖e/|w|‖∞",
}
TARGET = 0.98
SAMPLES = 500  # of the 1,000 training samples: to measure on


# ---------------------------------------------------------------- networks


def mlp() -> nn.Module:
    """A ReLU perceptron: 6,570 parameters, no normalisation."""
    return nn.Sequential(*(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))


def wrn() -> nn.Module:
    """A wide residual network (WRN-10-1 of half the width), for 8 × 8 images: 19,714 parameters."""
    blocks = [Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2)]
    head = [nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), *blocks, *head)


class Transformer(nn.Module):
    """Two pre-norm blocks on the 8 rows of an image: 18,026 parameters."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, width)
        self.positions = nn.Parameter(0.02 * torch.randn(8, width))
        shared: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 2 * width, **shared) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.inputs(images[:, 0]) + self.positions
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x).mean(1))
        return result


@dataclasses.dataclass(frozen=True)
class Network:
    """What is trained, with which of the study's optimizers."""

    build: Callable[[], nn.Module]
    optimizer: str


NETWORKS = {
    "CNN, SGD": Network(DIGITS.network, "SGD"),
    "CNN, MSAM": Network(DIGITS.network, "MSAM"),
    "MLP, SGD": Network(mlp, "SGD"),
    "WRN, SGD": Network(wrn, "SGD"),
    "transformer, SGD": Network(Transformer, "SGD"),
}


def objective_of(name: str, cache: Path) -> ma.Objective:
    """Train the network, or read it from the cache."""
    network = NETWORKS[name]
    workload = dataclasses.replace(DIGITS, network=network.build)
    path = cache / f"{name.replace(', ', '-')}.pt"
    if path.exists():
        model = network.build()
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        model = train(workload, network.optimizer, 0, every=None).model
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    objective = ma.Objective(model.eval(), nn.CrossEntropyLoss(), workload.train())
    return objective.with_samples(torch.arange(SAMPLES))


# ---------------------------------------------------------------- what is compared


class Search:
    """The loss over a ball in coordinates in which it is plain; every gradient is counted."""

    def __init__(self, objective: ma.Objective, rho: float, norm: Norm, adaptive: bool) -> None:
        self.objective, self.center = objective, objective.point()
        self.ball = Ball.around(objective, rho, norm, adaptive)
        loss, slope = objective.loss_and_gradient(self.center)
        self.base, self.slope = float(loss), self.ball.displacement(slope)
        self.gradients = 1

    def at(self, z: Tensor) -> tuple[float, Tensor]:
        """Rise and slope."""
        self.gradients += 1
        loss, slope = self.objective.loss_and_gradient(self.center + self.ball.displacement(z))
        return float(loss) - self.base, self.ball.displacement(slope)

    def unit(self, slope: Tensor) -> Tensor:
        """Steepest direction of unit length in the ball's norm."""
        return slope.sign() if self.ball.norm == "linf" else slope / slope.norm().clamp_min(1e-30)


Start = tuple[Tensor, float, Tensor]  # where, rise, slope


def fixed_point(search: Search, start: Start, steps: int) -> float:
    """``z ← argmax ⟨slope, z⟩``, without any safeguard; the best point counts."""
    _, best, slope = start
    for _ in range(steps):
        rise, slope = search.at(search.ball.radius * search.unit(slope))
        best = max(best, rise)
    return best


def projected_ascent(search: Search, start: Start, steps: int) -> float:
    """Normalised gradient steps of 2.5 ρ / steps, projected (Madry et al. 2018); the best point counts."""
    z, best, slope = start
    for _ in range(steps):
        z = search.ball.project(z + 2.5 * search.ball.radius / steps * search.unit(slope))
        rise, slope = search.at(z)
        best = max(best, rise)
    return best


def auto_pgd(search: Search, start: Start, steps: int) -> float:
    """Auto-PGD, algorithm 1 of Croce & Hein (2020): momentum 0.75, step 2ρ, halved at checkpoints without progress."""
    marks = [0.0, 0.22]
    while marks[-1] < 1:
        marks.append(marks[-1] + max(marks[-1] - marks[-2] - 0.03, 0.06))
    checkpoints = {math.ceil(mark * steps) for mark in marks[1:]}
    before, now, step, progress, last = start, start, 2 * search.ball.radius, 0, 0
    best = start
    kept = (step, best[1])
    for k in range(1, steps + 1):
        z = search.ball.project(now[0] + step * search.unit(now[2]))
        if k > 1:
            z = search.ball.project(now[0] + 0.75 * (z - now[0]) + 0.25 * (now[0] - before[0]))
        before, now = now, (z, *search.at(z))
        progress += now[1] > before[1]
        best = max(best, now, key=lambda point: point[1])
        if k in checkpoints:
            stalled = kept == (step, best[1])
            kept = (step, best[1])
            if progress < 0.75 * (k - last) or stalled:
                step /= 2
                before = now = best
            progress, last = 0, k
    return best[1]


METHODS = (fixed_point, auto_pgd)


def reference(objective: ma.Objective, rho: float, norm: Norm, adaptive: bool, steps: int = 100) -> dict[str, Any]:
    """The best of five starts and two methods."""
    search = Search(objective, rho, norm, adaptive)
    hessian: SymmetricOperator = search.objective.hessian(search.center)
    if search.ball.scale is not None:
        hessian = ScaledOperator(hessian, search.ball.scale)
    top = ma.top_eigenvalues(hessian, 1, tolerance=1e-2).vectors[:, 0].to(search.center)
    generator = torch.Generator().manual_seed(20_000)
    draws = [torch.randn(len(top), generator=generator).to(top) for _ in range(2)]
    points = [search.ball.stretch(direction) for direction in (search.slope, top, -top, *draws)]
    starts = [(z, *search.at(z)) for z in points]
    rise = max(method(search, start, steps) for method in METHODS for start in starts)
    return {"rise": rise, "gradients": search.gradients}


def compare(objective: ma.Objective, rho: float, norm: Norm, adaptive: bool) -> dict[str, Any]:
    """Every method in one ball."""
    gradient = clocked(objective.gradient, 5)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ma.ConvergenceWarning)
        ours = ma.ball_sharpness(objective, rho, norm=norm, adaptive=adaptive)
    cost = (time.process_time() - started) / gradient
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ma.ConvergenceWarning)
        alone = ma.ball_sharpness(objective, rho, norm=norm, adaptive=adaptive, starts=("gradient",))
        certificate = ma.certify(ours, objective)
    found = {
        "ball_sharpness": (ours.sharpness, ours.gradients, ours.hvps),
        "ball_sharpness, gradient start only": (alone.sharpness, alone.gradients, alone.hvps),
        "one step (SAM)": (ours.one_step, 2, 0),
    }
    for name, method, steps in (
        ("projected ascent, 20 steps", projected_ascent, 20),
        ("Auto-PGD, 40 gradients", auto_pgd, 39),
        ("Auto-PGD, at our cost", auto_pgd, max(39, math.ceil(cost) - 1)),
    ):
        search = Search(objective, rho, norm, adaptive)
        rise = method(search, (torch.zeros_like(search.center), 0.0, search.slope), steps)
        found[name] = (rise, search.gradients, 0)
    return {
        "converged": ours.converged,
        "cost": cost,
        "verdict": certificate.verdict,
        "relative_residual": certificate.relative_residual,
        "gain": certificate.gain / ours.sharpness,
        "certificate_hvps": certificate.hvps,
        "found": {name: {"rise": f[0], "gradients": f[1], "hvps": f[2]} for name, f in found.items()},
    }


def two_searches(objective: ma.Objective, rho: float, norm: Norm, adaptive: bool) -> dict[str, Any]:
    """The library's search, with parts of the data and without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ma.ConvergenceWarning)
        found = ma.ball_sharpness(objective, rho, norm=norm, adaptive=adaptive)
        without = ma.ball_sharpness(
            objective, rho, norm=norm, adaptive=adaptive, starts=("gradient", "krylov", "eigenvector")
        )
    return {
        "rise": found.sharpness,
        "gradients": found.gradients,
        "rise_without_parts": without.sharpness,
        "gradients_without_parts": without.gradients,
        "parts": sum(name.startswith("part ") for name in found.starts),
    }


def clocked(action: Callable[[], object], repetitions: int) -> float:
    """CPU seconds of an action, the median of some repetitions."""
    action()
    times = []
    for _ in range(repetitions):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return statistics.median(times)


# ---------------------------------------------------------------- tables


def cells() -> Iterator[tuple[str, Norm, bool, float]]:
    """Every network with every ball."""
    norms: tuple[Norm, Norm] = ("l2", "linf")
    for norm in norms:
        for adaptive in (False, True):
            for name in NETWORKS:
                for rho in RADII[norm, adaptive]:
                    yield name, norm, adaptive, rho


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One method over some cells."""
    fractions = sorted(row["fraction"] for row in rows)
    return {
        "cells": len(rows),
        "least": fractions[0],
        "median": statistics.median(fractions),
        "reached": sum(fraction >= TARGET for fraction in fractions),
        "gradients": statistics.mean(row["gradients"] for row in rows),
        "most_gradients": max(row["gradients"] for row in rows),
        "hvps": statistics.mean(row["hvps"] for row in rows),
    }


def table(found: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Ball, then method, then what it found."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in found:
        ball = grouped.setdefault(BALLS[cell["norm"], cell["adaptive"]], {})
        for method, row in cell["found"].items():
            ball.setdefault(method, []).append(row)
    return {ball: {method: summary(rows) for method, rows in methods.items()} for ball, methods in grouped.items()}


def markdown(results: dict[str, Any]) -> str:
    """The figures as the table in ``docs/sharpness.md``."""
    lines = [
        "| ball | method | found of the reference: least, median | at least 98 % | gradients: mean, most | HVPs |",
        "|---|---|---|---|---|---|",
    ]
    for ball, methods in results["table"].items():
        for method, row in methods.items():
            name = ball.replace("|", "\\|")
            shares = f"{row['least']:.2f}, {row['median']:.3f}"
            counts = f"{row['gradients']:.0f}, {row['most_gradients']}"
            lines.append(
                f"| {name} | {method} | {shares} | {row['reached']} of {row['cells']} | {counts} | {row['hvps']:.0f} |"
            )
    return "\n".join(lines)


def parts_table(rows: list[dict[str, Any]]) -> str:
    """The balls where one of the two searches misses the target, as the table in ``docs/sharpness.md``."""
    lines = ["| network | ball | without parts | with parts | gradients |", "|---|---|---:|---:|---:|"]
    for row in rows:
        shares = [row[name] / row["reference"] for name in ("rise_without_parts", "rise")]
        if min(shares) < TARGET:
            ball = BALLS[row["norm"], row["adaptive"]].replace("|", "\\|")
            counts = f"{row['gradients_without_parts']}, {row['gradients']}"
            found = f"{shares[0]:.3f} | {shares[1]:.3f}"
            lines.append(f"| {row['network']} | {ball} ≤ {row['rho']:g} | {found} | {counts} |")
    return "\n".join(lines)


def measure_parts(cache: Cache, folder: Path) -> None:
    """Both searches of the library in every ball, against the reference."""
    objectives = {name: objective_of(name, folder) for name in NETWORKS}
    rows = []
    for name, norm, adaptive, rho in cells():
        objective = objectives[name]
        longest = kept(
            cache.path("reference", objective, name, norm, adaptive, rho),
            partial(reference, objective, rho, norm, adaptive),
        )
        row = {"network": name, "norm": norm, "adaptive": adaptive, "rho": rho, "reference": longest["rise"]}
        rows.append({**row, "reference_from": "this network", **two_searches(objective, rho, norm, adaptive)})
    print(parts_table(rows))
    save({"machine": machine("cpu"), "cells": rows}, PARTS)


class Cache:
    """A folder of what was measured, under names that change with the weights and with the code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mine = [inspect.getsource(part) for part in (Search, *METHODS, reference)]
        library = [path.read_text(encoding="utf-8") for path in sorted(Path(balls.__file__).parent.glob("*.py"))]
        ours = [inspect.getsource(part) for part in (compare, projected_ascent)]
        self.code = {"reference": "".join(mine), "compare": "".join([*mine, *ours, *library])}

    def path(self, part: str, objective: ma.Objective, *settings: object) -> Path:
        """Where a result of this part is or will be."""
        content = objective.point().numpy().tobytes() + f"{objective.samples} {self.code[part]}".encode()
        name = "-".join(str(setting) for setting in settings)
        return self.folder / f"{part}-{name}-{hashlib.sha256(content).hexdigest()[:10]}.json"


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read a result, or measure and keep it."""
    if not path.exists():
        path.write_text(json.dumps(measure()), encoding="utf-8")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many; the same command goes on")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "msam-sharpness")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the table of such a file, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--parts", action="store_true", help="the two searches of the library alone")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    started, found = time.monotonic(), []
    cache = Cache(options.cache)
    if options.parts:
        measure_parts(cache, options.cache)
        return
    objectives: dict[str, ma.Objective] = {}
    for name, norm, adaptive, rho in cells():
        if name not in objectives:
            objectives[name] = objective_of(name, options.cache)
        objective = objectives[name]
        places = {part: cache.path(part, objective, name, norm, adaptive, rho) for part in cache.code}
        if not all(path.exists() for path in places.values()) and time.monotonic() - started > 60 * options.minutes:
            print("time is up: the same command goes on from here")
            return
        longest = kept(places["reference"], partial(reference, objective, rho, norm, adaptive))
        cell = kept(places["compare"], partial(compare, objective, rho, norm, adaptive))
        for row in cell["found"].values():
            row["fraction"] = row["rise"] / longest["rise"]
        ball = {"network": name, "norm": norm, "adaptive": adaptive, "rho": rho}
        found.append({**ball, "reference": longest["rise"], "reference_gradients": longest["gradients"], **cell})
        ours = cell["found"]["ball_sharpness"]
        print(
            f"{name:17s} {BALLS[norm, adaptive]:9s} ρ = {rho:<6g} found {ours['fraction']:.3f}, {ours['gradients']} "
            f"gradients + {ours['hvps']} HVPs (cost {cell['cost']:.0f})  "
            + "  ".join(f"{row['fraction']:.3f}" for row in list(cell["found"].values())[1:])
            + f"  {cell['verdict']}, gain {cell['gain']:.1e}",
            flush=True,
        )
    results = {
        "machine": machine("cpu"),
        "floor": "one gradient for every point that is looked at",
        "reference": "5 starts × 100 steps × (fixed point, Auto-PGD)",
        "networks": {name: {"parameters": o.size, "samples": o.samples} for name, o in objectives.items()},
        "cost": {
            "median": statistics.median(cell["cost"] for cell in found),
            "reference_gradients": statistics.median(cell["reference_gradients"] for cell in found),
        },
        "table": table(found),
        "cells": found,
    }
    print(markdown(results))
    save(results, options.out)


if __name__ == "__main__":
    main()
