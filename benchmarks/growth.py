"""How cost and memory grow with parameters, samples, eigenvalues; with the tools of others beside ours.

``python benchmarks/growth.py`` takes some forty minutes on one core, ``--all`` two hours. Each figure is made in a
process of its own, so that its peak of memory is its own: the highest resident size during the measure, less that
before it, when the network, its data and one gradient are in memory. ``--networks`` chooses, ``--tiny`` tries every
line in a minute; its figures mean nothing.

Floors. A gradient holds one vector, a Hessian-vector product three (its argument, its sum over batches, what comes from
one batch) beside the graph of one batch. Lanczos on c columns holds 2 c vectors. Time is counted in gradients on all
data: a product costs at least 2, k eigenvalues at least k products, a loss about 1/3.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, save
from curvature import RESULTS, curvlinops, eigenthings, pyhessian, sentences
from networks import Case, LanguageModel, Reference
from torch import nn

import msam_analysis as ma

# vocabulary, tokens, width, depth, heads
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "0.1 M": (256, 16, 64, 2, 2),
    "1 M": (1000, 16, 128, 4, 4),
    "10 M": (4000, 16, 320, 6, 5),
    "44 M": (8000, 16, 576, 9, 9),
    "124 M": (16000, 16, 768, 14, 12),
}
SEQUENCES, AT_ONCE = 4, 2
GROWING: dict[str, dict[str, float]] = {
    "samples": {str(count): count for count in (8, 32, 128, 512)},
    "eigenvalues": {str(k): k for k in (1, 2, 4, 8, 16)},
}


def case(name: str, sequences: int) -> Case:
    """A language model with random weights, and random sentences."""
    vocabulary, tokens, width, depth, heads = SHAPES[name]
    torch.manual_seed(0)
    model = LanguageModel(vocabulary, tokens, width, depth, heads).eval()
    inputs, target = sentences(vocabulary, tokens)(sequences, torch.Generator().manual_seed(0))
    batches = list(zip(inputs.split(AT_ONCE), target.split(AT_ONCE), strict=True))
    nothing = torch.zeros(0)
    return Case(name, model, nn.CrossEntropyLoss(), batches, Reference(nothing, nothing, "none"))


def peer(tool: Callable[[Case], Any], of: Case) -> dict[str, Any]:
    """What somebody else's tool says."""
    answer = tool(of)
    return {"values": answer.values.tolist(), "products": answer.products}


MEASURES: dict[str, Callable[[ma.Objective], Any]] = {
    "gradient": lambda o: o.gradient(),
    "loss": lambda o: o.loss(),
    "product": lambda o: o.hvp(torch.ones(o.size)),
    "1 eigenvalue": lambda o: ma.top_eigenvalues(o, 1),
    "1 eigenvalue, basis in float16": lambda o: ma.top_eigenvalues(o, 1, tolerance=1e-3, basis_dtype=torch.float16),
    "5 eigenvalues": lambda o: ma.top_eigenvalues(o, 5),
    "trace, 10 draws": lambda o: ma.trace(o, draws=10),
    "density, 2 probes of 10": lambda o: ma.spectral_density(o, probes=2, steps=10, extremes=1),
    "ball": lambda o: ma.ball_sharpness(o, 0.05),
    "average, 4 draws": lambda o: ma.average_sharpness(o, 0.01, draws=4),
    "line, 5 points": lambda o: ma.slice_1d(o, ma.directions.random(o), points=5),
}
CHEAP = ("gradient", "loss", "product")
LARGE = {
    "44 M": (
        *CHEAP,
        "1 eigenvalue",
        "1 eigenvalue, basis in float16",
        "trace, 10 draws",
        "curvlinops + eigsh, 1 eigenvalue",
    ),
    "124 M": (*CHEAP, "1 eigenvalue"),
}
"""What is asked of the large networks, unless ``--all`` asks everything."""
PEERS: dict[str, Callable[[Case], Any]] = {
    "PyHessian, 1 eigenvalue": partial(peer, pyhessian(1e-4, values=1)),
    "curvlinops + eigsh, 1 eigenvalue": partial(peer, curvlinops(False, 1e-4, values=1)),
    "hessian-eigenthings, 1 eigenvalue": partial(peer, eigenthings(1e-4, values=1)),
}


def seconds_of(action: Callable[[], Any]) -> float:
    """The process's own time for an action."""
    start = time.process_time()
    action()
    return time.process_time() - start


def resident(field: str) -> int:
    """Bytes of a field of the process's status, ``VmRSS`` or ``VmHWM`` (the peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one(network: str, measure: str, sequences: int, k: int) -> dict[str, Any]:
    """Time one measure in this process, and see how much memory it takes."""
    of = case(network, sequences)
    objective = ma.Objective(of.model, of.criterion, of.batches)
    gradient = statistics.median(seconds_of(objective.gradient) for _ in range(5))
    own: dict[str, Callable[[ma.Objective], Any]] = {f"{k} eigenvalues": lambda o: ma.top_eigenvalues(o, k), **MEASURES}
    action = partial(PEERS[measure], of) if measure in PEERS else partial(own[measure], objective)
    if measure in CHEAP:
        action()
    clear = Path("/proc/self/clear_refs")
    before = resident("VmRSS")
    clear.write_text("5")
    start = time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = action()
    seconds = time.process_time() - start
    if measure in CHEAP:
        seconds = statistics.median(seconds_of(action) for _ in range(5))
    extra = max(resident("VmHWM") - before, 0)
    row: dict[str, Any] = {
        "parameters": objective.size,
        "seconds": seconds,
        "gradients": seconds / gradient,
        "bytes": extra,
        "vectors": extra / 4 / objective.size,
        "peak_bytes": resident("VmHWM"),
        "warnings": [
            str(warning.message)[:80] for warning in said if issubclass(warning.category, ma.ConvergenceWarning)
        ],
    }
    if isinstance(found, ma.results.Eigenpairs):
        found = {"values": found.values.tolist(), "products": found.hvps}
    return row | (found if isinstance(found, dict) else {})


def asked(network: str, measure: str, *, sequences: int = SEQUENCES, k: int = 1) -> dict[str, Any]:
    """Run :func:`one` in a process of its own."""
    command = [sys.executable, __file__, "--one", network, measure, str(sequences), str(k)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return {"failed": f"status {done.returncode}: {last}"[:200]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def slope(rows: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, float], what: str) -> float:
    """The exponent ``a`` of ``cost ~ size^a`` over the three largest sizes, by least squares on logarithms."""
    known = [(math.log(sizes[n]), math.log(max(row[what], 1e-9))) for n, row in rows.items() if what in row][-3:]
    if len(known) < 2:
        return math.nan
    x, y = np.array(known).T
    return float(np.polyfit(x, y, 1)[0])


def print_row(name: str, row: Mapping[str, Any]) -> None:
    """One line of the table."""
    if "failed" in row:
        print(f"  {name:36s} {row['failed']}")
        return
    products = f"{row['products']:5d} products" if "products" in row else ""
    print(
        f"  {name:36s} {row['seconds']:9.2f} s {row['gradients']:8.1f} gradients {row['bytes'] / 2**20:9.0f} MiB "
        f"{row['vectors']:7.1f} vectors {products}",
        flush=True,
    )


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--all", action="store_true", help="every measure of every network, also of the large ones")
    parser.add_argument("--tiny", action="store_true", help="the smallest network alone")
    parser.add_argument("--one", nargs=4, metavar=("NETWORK", "MEASURE", "SEQUENCES", "K"), help="one figure, as JSON")
    parser.add_argument("--output", type=Path, default=RESULTS / "growth_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        network, measure, sequences, k = options.one
        print(json.dumps(one(network, measure, int(sequences), int(k))))
        return
    chosen = list(SHAPES)[:1] if options.tiny else options.networks
    found: dict[str, Any] = {"machine": machine("cpu"), "growing": {}, "networks": {}, "slopes": {}}

    def keep(part: dict[str, Any], name: str, row: dict[str, Any]) -> None:
        """Take in a row, print it, and write all that there is: the largest networks take long."""
        part[name] = row
        print_row(name, row)
        found["slopes"] = slopes(found["networks"], found["growing"])
        if not options.tiny:
            save(found, options.output, quiet=True)

    for what, sizes in GROWING.items():
        print(f"0.1 M parameters, growing {what}")
        part = found["growing"].setdefault(what, {})
        for name, size in list(sizes.items())[: 2 if options.tiny else None]:
            samples = what == "samples"
            row = (
                asked("0.1 M", "1 eigenvalue", sequences=int(size))
                if samples
                else asked("0.1 M", f"{name} eigenvalues", k=int(size))
            )
            keep(part, name, row)
    for network in chosen:
        print(f"{network} parameters, {SEQUENCES} sequences in batches of {AT_ONCE}")
        part = found["networks"].setdefault(network, {})
        for measure in (*MEASURES, *PEERS) if options.all else LARGE.get(network, (*MEASURES, *PEERS)):
            keep(part, measure, asked(network, measure))
    for name, value in found["slopes"].items():
        print(f"  {name:44s} ~ size^{value:.2f}")


def slopes(networks: Mapping[str, Any], growing: Mapping[str, Any]) -> dict[str, float]:
    """How seconds and bytes grow with parameters, and seconds with samples and eigenvalues."""
    known = {name: rows for name, rows in networks.items() if "parameters" in rows.get("gradient", {})}
    sizes = {name: float(rows["gradient"]["parameters"]) for name, rows in known.items()}
    found = {
        f"{what} of {measure}": slope({n: r[measure] for n, r in known.items() if measure in r}, sizes, what)
        for measure in MEASURES
        for what in ("seconds", "bytes")
    }
    found |= {f"seconds by {what}": slope(growing[what], GROWING[what], "seconds") for what in growing}
    return {name: value for name, value in found.items() if math.isfinite(value)}


if __name__ == "__main__":
    main()
