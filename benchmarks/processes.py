"""Loss, gradient and Hessian product with their batches in two processes, against one process that has them all.

``python benchmarks/processes.py`` takes a few minutes on two cores. Both processes of gloo have one thread and the same
network and data. In every repetition the first measures alone while the other waits, and then both measure together, so
that all share the machine's moods. A time together is that of the slower process. Elapsed time shows what a user gets
where two cores are free; a process's own time does not count what it waits, for the other one or for a busy machine.

The floor: half of the time alone, and what the processes exchange. Before every sum they tell one another that all is
well, which is one number more to exchange; the table has the price of both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import machine, quartiles, ratio, save
from optimizers import wrn
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import msam_analysis as ma
from msam_analysis.objective.ranks import Ranks

RESULTS = Path(__file__).parent / "results"
PROCESSES, BATCHES, TARGET = 2, 16, 0.6
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def images(size: int) -> list[tuple[Tensor, Tensor]]:
    """Random images of the size of CIFAR's, with random labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES * size, 3, 32, 32, generator=generator)
    return list(zip(x.split(size), torch.randint(10, (len(x),), generator=generator).split(size), strict=True))


def actions(ranks: bool, size: int) -> dict[str, Callable[[], object]]:
    """What is timed, of WRN-10-2."""
    torch.manual_seed(0)
    objective = ma.Objective(wrn(10, 2, classes=10), nn.CrossEntropyLoss(), images(size), ranks=ranks)
    hessian, vector = objective.hessian(), torch.ones(objective.size)
    return {
        "loss": objective.loss,
        "gradient": objective.gradient,
        "Hessian product, graph kept": lambda: hessian @ vector,
        "Hessian product, rebuilt": lambda: objective.hvp(vector),
    }


def seconds(action: Callable[[], object]) -> dict[str, float]:
    """Return how long an action takes, by both clocks."""
    before = {name: clock() for name, clock in CLOCKS.items()}
    action()
    return {name: clock() - before[name] for name, clock in CLOCKS.items()}


def exchange(repetitions: int, numbers: int) -> dict[str, dict[str, float]]:
    """Return what it takes to say that all is well, and to sum a vector."""
    ranks, total = Ranks(), torch.zeros(numbers)

    def well() -> None:
        with ranks.apart("nothing"):
            pass

    found = {}
    for name, action in {"all is well": well, "sum of a gradient": lambda: ranks.sum(total)}.items():
        times = []
        for _ in range(20 * repetitions):
            dist.barrier()
            times.append(seconds(action)["wall"])
        found[name] = quartiles(times)
    return found


def work(rank: int, folder: str, repetitions: int, size: int) -> None:
    """One of the processes; the first one writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=PROCESSES)
    together, alone = actions(True, size), actions(False, size) if rank == 0 else {}
    times: dict[str, dict[str, list[dict[str, float]]]] = {name: {"alone": [], "together": []} for name in together}
    for repetition in range(repetitions + 1):  # the first one warms up
        for name, action in together.items():
            one = seconds(alone[name]) if rank == 0 else {}
            dist.barrier()
            every: list[Any] = [None] * PROCESSES
            dist.all_gather_object(every, seconds(action))
            if repetition and rank == 0:
                times[name]["alone"].append(one)
                times[name]["together"].append({clock: max(each[clock] for each in every) for clock in CLOCKS})
    numbers = sum(parameter.numel() for parameter in wrn(10, 2, classes=10).parameters())
    told = exchange(repetitions, numbers)
    if rank == 0:
        text = json.dumps({"times": times, "exchange": told, "parameters": numbers})
        (Path(folder) / "found.json").write_text(text, encoding="utf-8")
    dist.destroy_process_group()


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--size", type=int, default=16, help="images in a batch")
    parser.add_argument("--tiny", action="store_true", help="try every line in seconds; figures mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "processes_cpu.json")
    options = parser.parse_args()
    repetitions, size = (2, 1) if options.tiny else (options.repetitions, options.size)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(folder, repetitions, size), nprocs=PROCESSES)
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    rows: dict[str, Any] = {}
    for name, both in found["times"].items():
        rows[name] = {}
        for clock in CLOCKS:
            one, two = ([each[clock] for each in both[how]] for how in ("alone", "together"))
            row: dict[str, Any] = {"alone": quartiles(one), "together": quartiles(two), **ratio(two, one)}
            rows[name][clock] = row
            print(
                f"{name:28} {clock:4} alone {row['alone']['median_ms']:8.1f} ms, together × {row['ratio']:.3f} "
                f"({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f}), floor {1 / PROCESSES}, target {TARGET}",
                flush=True,
            )
    for name, row in found["exchange"].items():
        print(f"{name:28} {row['median_ms']:.3f} ms ({row['q1_ms']:.3f} to {row['q3_ms']:.3f})")
    setup = {"processes": PROCESSES, "batches": BATCHES, "images in a batch": size, "parameters": found["parameters"]}
    save(
        {
            "machine": machine("cpu"),
            "programs at work before": load,
            **setup,
            "rows": rows,
            "exchange": found["exchange"],
        },
        options.out,
    )


if __name__ == "__main__":
    main()
