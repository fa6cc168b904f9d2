"""What a slice costs: a point over its forward pass, a point beside other tools, a surface from few points.

``python benchmarks/landscape.py`` takes about ten minutes on one core. ``--gpu`` measures points per second there, with
points batched together as the slice chooses; no figures of it are kept here yet. ``loss-landscapes`` is compared with
if it is installed. The other loop computes every point as a new state dict and loads it, which is how
tomgoldstein/loss-landscape (no package) moves a network.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Action, interleaved, machine, ratio, save
from optimizers import wrn
from torch import Tensor, nn

import msam_analysis as ma
from msam_analysis.studies import digits
from msam_analysis.studies.training import train
from msam_analysis.studies.workloads import DIGITS

RESULTS = Path(__file__).parent / "results"
CRITERION = nn.CrossEntropyLoss()
Data = tuple[Tensor, Tensor]


# ---------------------------------------------------------------- networks and planes


def perceptron() -> nn.Module:
    """64-32-10 on the pixels of the digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits_batch(samples: int, device: str) -> Data:
    """The first training samples as one batch."""
    inputs, labels, _, _ = digits.load()
    return inputs[:samples].to(device), labels[:samples].to(device)


def seeded(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """A network in evaluation mode, always with the same weights."""
    torch.manual_seed(0)
    return make().eval().to(device)


def random_plane(objective: ma.Objective) -> tuple[ma.Direction, ma.Direction]:
    """Two random directions."""
    return ma.directions.random(objective, 0), ma.directions.random(objective, 1)


# ---------------------------------------------------------------- a point


def ours(model: nn.Module, data: Data, side: int, **options: Any) -> Action:
    """A whole slice, its preparation included."""
    objective = ma.Objective(model, CRITERION, data)
    plane = random_plane(objective)
    return lambda: ma.slice_2d(objective, plane, 1.0, side, **options)


def bare(model: nn.Module, data: Data, side: int) -> Action:
    """As many forward passes and losses."""

    @torch.no_grad()
    def act() -> None:
        for _ in range(side * side):
            CRITERION(model(data[0]), data[1]).item()

    return act


def reloading(model: nn.Module, data: Data, side: int) -> Action:
    """A state dict computed and loaded for every point."""
    objective = ma.Objective(model, CRITERION, data)
    d1, d2 = (objective.layout.views(direction.vector) for direction in random_plane(objective))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    steps = torch.linspace(-1, 1, side).tolist()

    @torch.no_grad()
    def act() -> None:
        for x in steps:
            for y in steps:
                moved = {name: w + x * d1[name] + y * d2[name] if name in d1 else w for name, w in state.items()}
                model.load_state_dict(moved)
                CRITERION(model(data[0]), data[1]).item()
        model.load_state_dict(state)

    return act


def loss_landscapes(model: nn.Module, data: Data, side: int) -> Action | None:
    """The package of that name, if it is installed."""
    if importlib.util.find_spec("loss_landscapes") is None:
        return None
    package = importlib.import_module("loss_landscapes")
    metric = importlib.import_module("loss_landscapes.metrics").Loss(CRITERION, *data)
    # Its filter normalisation divides by zero where biases are zero; what a point costs is the same.
    return lambda: package.random_plane(model, metric, 1.0, side, normalization="layer", deepcopy_model=True)


def time_points(make: Callable[[], nn.Module], data: Data, side: int, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a point, and ratios to the bare forward passes and to the faster of the others."""
    device = "cuda" if options.gpu else "cpu"
    actions: dict[str, Action] = {
        "bare forward passes": bare(seeded(make, device), data, side),
        "slice_2d": ours(seeded(make, device), data, side),
        "state dicts reloaded": reloading(seeded(make, device), data, side),
    }
    peer = loss_landscapes(seeded(make, device), data, side)
    if peer is not None:
        actions["loss-landscapes"] = peer
    if options.gpu:
        actions["slice_2d, one point at a time"] = ours(seeded(make, device), data, side, chunk=1)
    times = interleaved(actions, options.repetitions, "wall" if options.gpu else options.clock, device, warmup=1)
    table: dict[str, Any] = {}
    for name, values in times.items():
        micros = 1e6 * statistics.median(values) / side**2
        table[name] = {
            "us_per_point": micros,
            "points_per_second": 1e6 / micros,
            "over_bare": ratio(values, times["bare forward passes"]),
            "of_slice_2d": ratio(values, times["slice_2d"]),
        }
        over, of = table[name]["over_bare"]["ratio"], table[name]["of_slice_2d"]["ratio"]
        print(f"    {name:32s} {micros:10.1f} µs a point   {over:6.3f} of bare   {of:6.3f} of slice_2d")
    return table


# ---------------------------------------------------------------- a surface


def planes(objective: ma.Objective, optimizer: torch.optim.Optimizer) -> dict[str, tuple[Any, float]]:
    """Three planes with their radii: random, momentum and gradient, the two sharpest eigenvectors."""
    directions = ma.directions
    return {
        "random": (random_plane(objective), 1.0),
        "momentum and gradient": (
            (directions.momentum(optimizer, objective, "l2"), directions.gradient(objective, "l2")),
            5.0,
        ),
        "eigenvectors": ((directions.eigenvector(objective, 0), directions.eigenvector(objective, 1)), 3.0),
    }


def refine_surfaces(optimizers: list[str], points: int, tolerance: float) -> list[dict[str, Any]]:
    """Evaluations, estimated and true error of refined surfaces, against the dense ones."""
    table = []
    for name in optimizers:
        trained = train(DIGITS, name, 0, every=None)
        objective = ma.Objective(trained.model, CRITERION, DIGITS.train())
        for label, (plane, radius) in planes(objective, trained.optimizer).items():
            start = time.process_time()
            dense = ma.slice_2d(objective, plane, radius, points)
            between = time.process_time()
            few = ma.slice_2d(objective, plane, radius, points, refine=tolerance)
            end = time.process_time()
            low, high = float(dense.loss.min()), float(dense.loss.max())
            row = {
                "optimizer": name,
                "plane": label,
                "lowest": low,
                "highest": high,
                "evaluations": few.evaluations,
                "of": dense.evaluations,
                "fraction": few.evaluations / dense.evaluations,
                "largest_error_of_range": float((few.loss - dense.loss).abs().max()) / (high - low),
                "estimated_error_of_range": few.error / (high - low),
                "largest_error_of_logarithmic_range": float((few.loss / dense.loss).log().abs().max())
                / math.log(high / low),
                "seconds_dense": between - start,
                "seconds_refined": end - between,
            }
            table.append(row)
            print(
                f"    {name:5s} {label:22s} loss {low:.3g} to {high:.4g}: {row['evaluations']} of {row['of']} points "
                f"({row['fraction']:.1%}), largest error {row['largest_error_of_range']:.2%} of the range, estimated "
                f"{row['estimated_error_of_range']:.2%}, of the logarithm "
                f"{row['largest_error_of_logarithmic_range']:.2%} of its range; {row['seconds_refined']:.1f} s, "
                f"every point {row['seconds_dense']:.1f} s"
            )
    return table


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="points per second on a CUDA device")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="cpu", help="cpu: the process's own time, for busy machines"
    )
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--only", choices=["points", "surfaces"], help="default: both")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/landscape_<device>.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if options.gpu else "cpu"
    images = torch.randn(256 if options.gpu else 32, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    classes = torch.randint(100, (len(images),), generator=torch.Generator().manual_seed(1)).to(device)
    cases: dict[str, tuple[Callable[[], nn.Module], Data, int]] = {
        "perceptron, 100 samples": (perceptron, digits_batch(100, device), 51),
        "perceptron, 1,000 samples": (perceptron, digits_batch(1000, device), 51),
        "digits network, 1,000 samples": (digits.network, digits_batch(1000, device), 11),
        f"WRN-16-4, {len(images)} images": (wrn, (images, classes), 3),
    }
    results: dict[str, Any] = {"machine": machine(device), "clock": options.clock, "points": {}}
    print(results["machine"])
    for name, (make, data, side) in cases.items() if options.only != "surfaces" else ():
        print(f"  {name}: {side} x {side} points")
        results["points"][name] = {"side": side, "table": time_points(make, data, side, options)}
    if not options.gpu and options.only != "points":
        print("  surfaces of 51 x 51 points, refine=0.01")
        results["surfaces"] = {"tolerance": 0.01, "table": refine_surfaces(["SGD", "MSAM"], 51, 0.01)}
    save(results, options.out or RESULTS / f"landscape_{device}.json")


if __name__ == "__main__":
    main()
