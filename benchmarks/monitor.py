"""What a monitor costs: steps with and without each probe, in one run; docs/monitor.md says how to read it.

``python benchmarks/monitor.py`` takes a few minutes on one core. In every run each second step is recorded: the ratio
of a recorded step to the one before it, which is not, is what the probe adds, and both share the machine's moods. Where
that is lost in the noise of forward and backward passes, the optimizer's step is timed by itself as well, recorded and
not. Time is the process's own on one thread.

The wide residual network is trained on random images of the size of CIFAR's. What a cheap probe costs depends on the
number of parameters alone, and not on the batch: its share of a step falls as the batch grows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import machine, quartiles, ratio, save
from optimizers import wrn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import msam
import msam_analysis as ma
from msam_analysis import probes
from msam_analysis.studies import digits
from msam_analysis.studies.workloads import DIGITS

RESULTS = Path(__file__).parent / "results"
Batch = tuple[Tensor, Tensor]
_ALONE = 15


class Scene(NamedTuple):
    """What a probe is made of: the network that is trained, and the loss of the batch it is trained on."""

    model: nn.Module
    objective: Callable[[], ma.Objective]


Make = Callable[[Scene], Any]

CHEAP: dict[str, Make] = {
    "cosine": lambda _: probes.MomentumGradientCosine(),
    "cosine, before and after": lambda _: probes.MomentumGradientCosine(after=True),
    "cosine, before and after, by parameter": lambda scene: probes.MomentumGradientCosine(True, scene.model),
    "norms": lambda _: probes.Norms(),
    "norms, by parameter": lambda scene: probes.Norms(model=scene.model),
}
DEAR: dict[str, Make] = {
    "loss before and after": lambda scene: probes.PerturbationRise(scene.objective),
    "loss along momentum, 5 offsets": lambda scene: probes.LossAlongMomentum(scene.objective, [-1, -0.5, 0.5, 1]),
    "held-out cosine": lambda scene: probes.HeldOutCosine(scene.objective),
    "angle to SAM, 4 strengths": lambda scene: probes.SamAngle(scene.objective, [0.5, 1, 2, 4], 0.2),
    "curvature along 3 directions": lambda scene: probes.Curvature(scene.objective()),
    "λ1, confirmed": lambda scene: probes.TopEigenvalues(scene.objective),
    "λ1, tracked only": lambda scene: probes.TopEigenvalues(scene.objective, confirm=False),
}


def images(samples: int) -> Batch:
    """Random images with random labels: the time of a step does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 3, 32, 32, generator=generator), torch.randint(100, (samples,), generator=generator)


def small_images(samples: int) -> Batch:
    """The first training samples of the digits."""
    inputs, labels, _, _ = digits.load()
    return inputs[:samples], labels[:samples]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch], int]] = {
    "WRN-16-4": (wrn, images, 128),
    "digits network": (DIGITS.network, small_images, 64),
}


def steps_of(network: str, make: Make, pairs: int) -> dict[str, Any]:
    """Train, with each second step recorded, and return what that costs."""
    build, data, size = NETWORKS[network]
    torch.manual_seed(0)
    model, batch = build(), data(size)
    optimizer = msam.MSAM(model.parameters(), lr=0.01, rho=0.3, momentum=0.9)
    monitor = ma.Monitor(
        optimizer,
        [make(Scene(model, lambda: ma.Objective(model, nn.CrossEntropyLoss(), [batch], batchnorm="batch")))],
        every=2,
    )
    times = []
    for _ in range(2 * pairs + 3):
        start = time.process_time()
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        times.append(time.process_time() - start)
    without, recorded = times[3::2], times[4::2]
    optimizer.param_groups[0]["lr"] = 1e-9
    alone = []  # the optimizer's step by itself, with the gradient that is there: what the probe takes shows best
    for _ in range(2 * _ALONE + 1):
        start = time.process_time()
        optimizer.step()
        alone.append(time.process_time() - start)
    monitor.close()
    own = [with_probe - bare for with_probe, bare in zip(alone[1::2], alone[2::2], strict=True)]
    return {
        "without": quartiles(without),
        "recorded": quartiles(recorded),
        **ratio(recorded, without),
        "pairs": pairs,
        "probe": quartiles(own),
        "share": statistics.median(own) / statistics.median(without),
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=4, help="recorded steps of the wide network, for each probe")
    parser.add_argument("--out", type=Path, default=RESULTS / "monitor_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine("cpu"), "clock": "cpu"}
    for network, (build, _, size) in NETWORKS.items():
        count = sum(parameter.numel() for parameter in build().parameters())
        rows: dict[str, Any] = {}
        wide = network == "WRN-16-4"
        for name, make in (CHEAP if wide else CHEAP | DEAR).items():
            row = rows[name] = steps_of(network, make, options.pairs if wide else 40)
            print(
                f"{network:15} {name:40} step {row['without']['median_ms']:8.1f} ms, recorded × {row['ratio']:.4f} "
                f"({row['ratio_q1']:.4f} to {row['ratio_q3']:.4f}), probe {row['probe']['median_ms']:.2f} ms, "
                f"{row['share']:.2%}",
                flush=True,
            )
        found[network] = {"parameters": count, "batch": size, "probes": rows}
    save(found, options.out)


if __name__ == "__main__":
    main()
