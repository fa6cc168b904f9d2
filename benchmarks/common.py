"""What the benchmarks share: interleaved repetitions, medians with quartiles, and the machine they ran on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Action = Callable[[], object]


def machine(device: str) -> dict[str, Any]:
    """Name what the figures depend on."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if (info.exists())
        else []
    )
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def interleaved(
    actions: Mapping[str, Action], repetitions: int | Mapping[str, int], clock: str, device: str, *, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each action, one after the other in every repetition, so that all share the machine's moods.

    Parameters
    ----------
    actions : mapping
        What to time.
    repetitions : int or mapping
        How often; or how often each of them.
    clock : {"wall", "cpu"}
        Elapsed time, or the process's own time over all its threads: the latter does not count waiting for other
        processes on a busy machine.
    device : str
        A CUDA device is synchronised before the clock is read.
    warmup : int
        How often each runs beforehand, untimed.
    """
    read = time.perf_counter if clock == "wall" else time.process_time
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        for _ in range(warmup):
            action()
    counts = repetitions if isinstance(repetitions, Mapping) else dict.fromkeys(actions, repetitions)
    for round_ in range(max(counts.values(), default=0)):
        for name, action in actions.items():
            if round_ >= counts[name]:
                continue
            wait()
            start = read()
            action()
            wait()
            times[name].append(read() - start)
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median_ms": 1e3 * middle, "q1_ms": 1e3 * low, "q3_ms": 1e3 * high}


def ratio(values: list[float], base: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratio to ``base``, repetition by repetition."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(values, base, strict=True)], n=4)
    return {"ratio": middle, "ratio_q1": low, "ratio_q3": high}


def save(results: dict[str, Any], path: Path, *, quiet: bool = False) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not quiet:
        print(f"written: {path}")
