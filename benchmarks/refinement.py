"""How few points a refined surface takes, and whether its error holds; see docs/landscapes.md.

Five networks are trained on digits to a small loss, where the logarithm of the loss counts and, with ReLU, every sample
adds kinks. On six planes of each every point is computed once; the surface is then refined from these values, so that a
refinement costs no pass. Nothing was tuned on the deep perceptron and the mixer.

``python benchmarks/refinement.py`` takes about four minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import machine, save
from sharpness import Transformer, mlp
from torch import Tensor, nn

import msam_analysis as ma
from msam_analysis.landscape.refine import Surface, refine_grid

RESULTS = Path(__file__).parent / "results" / "refinement_cpu.json"
POINTS = 51
Array = npt.NDArray[np.float64]


def deep() -> nn.Module:
    """Five narrow ReLU layers without normalisation: 4,210 parameters."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (64, 24, 24, 24, 24):
        layers += [nn.Linear(width, 24), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(24, 10))


def smooth() -> nn.Module:
    """A GELU perceptron: no kinks."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10))


class Mixer(nn.Module):
    """One block of two perceptrons, over the rows of an image and over the channels, with ReLU and LayerNorm."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.inputs, self.rows = nn.Linear(8, width), nn.Linear(8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        x = self.inputs(images[:, 0])
        x = x + torch.relu(self.rows(self.norms[0](x).transpose(1, 2))).transpose(1, 2)
        result: Tensor = self.head((x + self.channels(self.norms[1](x))).mean(1))
        return result


NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether constants were chosen on planes of it
    "perceptron, ReLU": (mlp, True),
    "transformer": (Transformer, True),
    "deep perceptron, ReLU": (deep, False),
    "mixer, ReLU": (Mixer, False),
    "perceptron, GELU": (smooth, True),
}


def trained(build: Callable[[], nn.Module]) -> tuple[ma.Objective, Tensor]:
    """The loss on 80 of the samples that the network was trained on, and the weights of every epoch."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    images, labels = (images - images.mean()) / images.std(), torch.tensor(bunch.target)
    torch.manual_seed(2)
    model = build()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    weights = []
    for _ in range(40):
        for chosen in torch.randperm(500).split(50):
            optimizer.zero_grad()
            criterion(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    return ma.Objective(model.eval(), criterion, (images[:80], labels[:80])), torch.stack(weights)


def planes(objective: ma.Objective, weights: Tensor) -> Iterator[tuple[str, tuple[Any, Any], float]]:
    """Six planes: random ones of three radii, the gradient with an eigenvector, and the training's two main axes."""
    draw = ma.directions.random
    for number, radius in enumerate((0.3, 1.0, 1.0, 2.5)):
        pair = draw(objective, 50 + 2 * number), draw(objective, 51 + 2 * number)
        yield f"random {number}, radius {radius:g}", pair, radius
    steep = ma.top_eigenvalues(objective, 1, tolerance=0.05, confirm=False).vectors[:, 0].float()
    yield "gradient, eigenvector", (ma.directions.gradient(objective, "l2"), ma.Direction(steep, "eigenvector")), 0.5
    moves = weights - objective.point()
    axes = torch.linalg.svd(moves, full_matrices=False)[2][:2]
    extent = 1.1 * float((moves @ axes.T).abs().max())
    yield "trajectory", (ma.Direction(axes[0], "first axis"), ma.Direction(axes[1], "second axis")), extent


def refined(dense: Array, tolerance: float) -> tuple[int, Surface]:
    """Refine a surface whose values are known: number of points, and what came of them."""
    asked, last = np.zeros(dense.size, dtype=bool), list[Surface]()

    def measure(points: Sequence[int]) -> Mapping[str, Array]:
        asked[list(points)] = True
        return {"loss": np.where(asked, dense.ravel(), np.nan)}

    refine_grid(measure, dense.shape, tolerance, lambda surfaces: last.append(surfaces["loss"]))
    return int(asked.sum()), last[-1]


def judged(dense: Array, tolerance: float) -> dict[str, Any]:
    """Points, estimated and true errors, as fractions of the ranges."""
    started = time.process_time()
    count, surface = refined(dense, tolerance)
    flat, low, high = dense.ravel(), float(dense.min()), float(dense.max())
    counts = high >= 10 * low
    logarithm = float(np.abs(np.log(surface.values / flat)).max()) / math.log(high / low) if counts else 0.0
    linear = float(np.abs(surface.values - flat).max()) / (high - low)
    return {
        "fraction": count / dense.size,
        "estimated": surface.relative,
        "linear": linear,
        "logarithm": logarithm,
        "true": max(linear, logarithm),
        "lowest": low,
        "highest": high,
        "seconds": time.process_time() - started,
    }


def summary(rows: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """What some surfaces have in common."""
    fractions, errors = [row["fraction"] for row in rows], [row["true"] for row in rows]
    return {
        "surfaces": len(rows),
        "median_fraction": statistics.median(fractions),
        "largest_fraction": max(fractions),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "beyond_tolerance": sum(error > tolerance for error in errors),
        "beyond_estimate": sum(row["true"] > row["estimated"] for row in rows),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    surfaces: list[tuple[str, bool, str, Array]] = []
    for network, (build, seen) in NETWORKS.items():
        objective, weights = trained(build)
        for plane, pair, radius in planes(objective, weights):
            dense = ma.slice_2d(objective, pair, radius, POINTS).loss.double().numpy()
            surfaces.append((network, seen, plane, dense))
    results: dict[str, Any] = {"machine": machine("cpu"), "points": POINTS**2, "tolerances": {}}
    for tolerance in (0.05, 0.01):
        rows = [
            {"network": network, "chosen_on": seen, "plane": plane, **judged(dense, tolerance)}
            for network, seen, plane, dense in surfaces
        ]
        print(f"refine={tolerance:g}")
        for row in rows:
            print(
                f"  {row['network']:22s} {row['plane']:24s} {row['fraction']:6.1%} of the points, estimated "
                f"{row['estimated']:.2%}, true {row['linear']:.2%} and {row['logarithm']:.2%} of the logarithm"
            )
        unseen = [row for row in rows if not row["chosen_on"]]
        found = {"all": summary(rows, tolerance), "networks that nothing was chosen on": summary(unseen, tolerance)}
        for name, total in found.items():
            print(f"  {name}: {total}")
        results["tolerances"][f"{tolerance:g}"] = {"summary": found, "table": rows}
    save(results, options.out)


if __name__ == "__main__":
    main()
