"""Five Hessian eigenvalues: how right the tools are, how long they take, and what a product costs.

``python benchmarks/curvature.py`` takes some fifteen minutes on one core, and three more the first time, when it trains
the networks of ``networks.py`` and computes the references. ``--networks`` and ``--tools`` choose, ``--resume`` goes on
from the networks that the results file has. PyHessian, curvlinops and hessian-eigenthings are compared with as far as
they are installed, each asked what it answers: PyHessian, and hessian-eigenthings at its defaults, look for the
eigenvalues that are largest in magnitude, the others for the largest. PyHessian stops when a value pauses, which is
often far from where it ends; so it is timed twice, at its defaults, and with the first of some smaller tolerances that
brings every value within 1e-3 or all of its iterations, of which it makes 100 a value. ``--gpu`` times large networks
on a GPU instead; no figures of it are kept here yet. ``--tiny`` tries every line of it in seconds; its figures mean
nothing.

What a product must cost. A linear layer takes one matrix product forward and two backward: one for the weights, one for
its input. The derivative of these three along a direction takes six, as each has two factors. So a Hessian-vector
product costs at least 2 gradients when the gradient's graph is there, and 3 when it is built anew. What is elementwise,
as activations and normalisation are, costs more of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import importlib.util
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Action, interleaved, machine, quartiles, ratio, save
from networks import SPECS, VALUES, Batch, Case, LanguageModel, VisionTransformer, case
from optimizers import wrn
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import msam_analysis as ma

RESULTS = Path(__file__).parent / "results"
RIGHT, CLOSE = 1e-4, 1e-3
Times = dict[str, list[float]]
KEPT_FLOOR, REBUILT_FLOOR = 2.0, 3.0
KEPT_TARGET, REBUILT_TARGET = 2.5, 4.2


# ---------------------------------------------------------------- tools


@dataclass(frozen=True)
class Answer:
    """What a tool said, and how many Hessian-vector products it took."""

    values: Tensor
    products: int
    at_its_end: bool = False  # whether it made all the iterations that it ever makes


@dataclass(frozen=True)
class Tool:
    """A tool with its settings."""

    package: str
    asks: str  # "largest" or "magnitude": which reference it is compared with
    run: Callable[[Case], Answer]
    finer: tuple[Callable[[Case], Answer], ...] = ()  # tried in turn, where values are not close

    @property
    def installed(self) -> bool:
        """Whether it can be run here."""
        return importlib.util.find_spec(self.package) is not None


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        self.calls += 1
        return self.function(*args, **kwargs)


def ours(method: Any = "lanczos") -> Callable[[Case], Answer]:
    """msam_analysis at its defaults; its tolerance is 1e-4 anyway."""

    def run(of: Case) -> Answer:
        objective = ma.Objective(of.model, of.criterion, of.batches)
        pairs = ma.top_eigenvalues(objective, VALUES, method=method)
        return Answer(pairs.values, pairs.hvps)

    return run


def pyhessian(tolerance: float = 1e-3, iterations: int = 100, values: int = VALUES) -> Callable[[Case], Answer]:
    """PyHessian: power iteration with deflation. It draws from the global generator and fills the gradients."""

    def run(of: Case) -> Answer:
        package = importlib.import_module("pyhessian")
        single = len(of.batches) == 1
        data: dict[str, Any] = {"data": of.batches[0]} if single else {"dataloader": of.batches}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            computed = package.hessian(of.model, of.criterion, cuda=False, **data)
            owner = sys.modules["pyhessian.hessian"] if single else computed
            name = "hessian_vector_product" if single else "dataloader_hv_product"
            original = getattr(owner, name)
            counted = Counted(original)
            setattr(owner, name, counted)
            try:
                found, _ = computed.eigenvalues(top_n=values, tol=tolerance, maxIter=iterations)
            finally:
                setattr(owner, name, original)
                of.model.zero_grad(set_to_none=True)
        every = counted.calls == iterations * values
        return Answer(torch.tensor(found, dtype=torch.float64), counted.calls, at_its_end=every)

    return run


def curvlinops(
    check_deterministic: bool = True, tolerance: float = 0.0, values: int = VALUES
) -> Callable[[Case], Answer]:
    """The Hessian of curvlinops as a SciPy operator, for ARPACK."""

    def run(of: Case) -> Answer:
        package = importlib.import_module("curvlinops")
        parameters = [p for p in of.model.parameters() if p.requires_grad]
        hessian = package.HessianLinearOperator(
            of.model, of.criterion, parameters, of.batches, check_deterministic=check_deterministic
        ).to_scipy()
        counted = Counted(hessian.matvec)
        operator = LinearOperator(hessian.shape, matvec=counted, dtype=hessian.dtype)
        found = eigsh(operator, values, which="LA", tol=tolerance, return_eigenvectors=False)
        return Answer(torch.from_numpy(np.sort(found)[::-1].copy()), counted.calls)

    return run


def eigenthings(tolerance: float | None = None, values: int = VALUES) -> Callable[[Case], Answer]:
    """hessian-eigenthings' Lanczos; its steps are a fixed number, doubled here until it says that it has converged."""

    def run(of: Case) -> Answer:
        package = importlib.import_module("hessian_eigenthings")
        operator = package.HessianOperator(of.model, of.batches, package.supervised_loss(of.criterion))
        if tolerance is None:
            found = package.lanczos(operator, k=values, seed=0)
            return Answer(found.eigenvalues, found.iterations)
        steps = products = 2 * values
        while True:
            found = package.lanczos(operator, k=values, max_iter=steps, tol=tolerance, which="LA", seed=0)
            if bool(found.converged.all()) or 2 * steps > operator.size:
                return Answer(found.eigenvalues, products)
            steps *= 2
            products += steps

    return run


TOOLS: dict[str, Tool] = {
    "msam_analysis": Tool("msam_analysis", "largest", ours()),
    "msam_analysis, power": Tool("msam_analysis", "largest", ours("power")),
    "PyHessian": Tool("pyhessian", "magnitude", pyhessian()),
    "PyHessian, to 1e-3": Tool(
        "pyhessian", "magnitude", pyhessian(), tuple(pyhessian(tolerance) for tolerance in (1e-4, 1e-5, 1e-6, 0.0))
    ),
    "curvlinops + eigsh": Tool("curvlinops", "largest", curvlinops()),
    "curvlinops + eigsh, 1e-4": Tool("curvlinops", "largest", curvlinops(False, 1e-4)),
    "hessian-eigenthings": Tool("hessian_eigenthings", "magnitude", eigenthings()),
    "hessian-eigenthings, 1e-4": Tool("hessian_eigenthings", "largest", eigenthings(1e-4)),
}
OURS = "msam_analysis"
USUAL = [name for name in TOOLS if name != "msam_analysis, power"]


# ---------------------------------------------------------------- figures of one network


def errors(values: Tensor, reference: Tensor) -> list[float]:
    """Relative error of every value against the one in its place; of all of them, if too few came."""
    found = values.detach().cpu().double()
    if found.shape != reference.shape:
        return [math.inf] * len(reference)
    return ((found - reference).abs() / reference.abs()).nan_to_num(nan=math.inf).tolist()


def times_of(actions: Mapping[str, Action], first: Mapping[str, float], options: argparse.Namespace) -> Times:
    """Repeat every action, those that take long fewer times; where two runs are too long, the first is one of them."""
    counts = {
        name: min(
            options.repetitions, max(1 + (seconds < 2 * options.seconds), int(options.seconds / max(seconds, 1e-9)))
        )
        for name, seconds in first.items()
    }
    counts |= {OURS: options.repetitions} if OURS in counts else {}  # the base of every ratio
    times = interleaved(actions, counts, options.clock, "cpu", warmup=0)
    return {name: [*values, first[name]] if len(values) == 1 else values for name, values in times.items()}


def answer_of(tool: Tool, of: Case) -> tuple[Answer, list[float], Action, float]:
    """A tool's answer, with its errors, what gave it, and how long that took."""
    for run in (tool.run, *tool.finer):
        start = time.process_time()
        answer = run(of)
        seconds = time.process_time() - start
        wrong = errors(answer.values, getattr(of.reference, tool.asks))
        if max(wrong) <= CLOSE or answer.at_its_end:
            break
    return answer, wrong, partial(run, of), seconds


def measure_tools(of: Case, names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One row for each tool: error, products, time and its ratio to ours."""
    rows: dict[str, dict[str, Any]] = {}
    actions: dict[str, Action] = {}
    first: dict[str, float] = {}
    for name in names:
        tool = TOOLS[name]
        if not tool.installed:
            rows[name] = {"failed": "not installed"}
            continue
        importlib.import_module(tool.package)  # which takes seconds
        try:
            answer, wrong, action, seconds = answer_of(tool, replace(of, model=copy.deepcopy(of.model)))
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its row in the table
            rows[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
            continue
        rows[name] = {"errors": wrong, "worst": max(wrong), "products": answer.products}
        actions[name], first[name] = action, seconds
    times = times_of(actions, first, options)
    for name, values in times.items():
        rows[name] |= {**quartiles(values), "repetitions": len(values)}
        if OURS in times:
            rows[name] |= ratio(values, times[OURS][: len(values)])
    return rows


def measure_products(of: Case, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A Hessian-vector product, with the gradient's graph and without, beside a gradient in plain torch."""
    parameters = list(of.model.parameters())

    def gradient() -> None:
        for inputs, target in of.batches:
            torch.autograd.grad(of.criterion(of.model(inputs), target), parameters)

    kept = ma.Objective(of.model, of.criterion, of.batches)
    rebuilt = ma.Objective(of.model, of.criterion, of.batches, graph_bytes=0)
    vector = torch.randn(kept.size, generator=torch.Generator().manual_seed(0))
    with_graph, without = kept.hessian(), rebuilt.hessian()
    actions: dict[str, Action] = {
        "gradient": gradient,
        "objective.gradient": kept.gradient,
        "product, graph kept": lambda: with_graph.matvec(vector),
        "product, graph built anew": lambda: without.matvec(vector),
    }
    times = interleaved(actions, 4 * options.repetitions, options.clock, "cpu")
    return {name: {**quartiles(values), **ratio(values, times["gradient"])} for name, values in times.items()}


# ---------------------------------------------------------------- what the figures say


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether every value is within 1e-4."""
    return bool(row.get("worst", math.inf) <= RIGHT)


def fastest_right_peer(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The peer with all five values right in the least time; ``None``: there is none."""
    right = {name: row["median_ms"] for name, row in rows.items() if not name.startswith(OURS) and is_right(row)}
    return min(right, key=lambda name: right[name]) if right else None


def misses(rows: Mapping[str, Mapping[str, Any]], products: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Every target that is missed on a network, in words."""
    found = []
    mine = rows[OURS]
    if not is_right(mine):
        found.append(f"a value is off by {mine.get('worst', math.inf):.1e} (target {RIGHT:g})")
    peer = fastest_right_peer(rows)
    limits = {
        "PyHessian": (1 / 3, "a third of"),
        "PyHessian, to 1e-3": (1 / 3, "a third of"),
        "curvlinops + eigsh": (1 / 2, "half of"),
        "curvlinops + eigsh, 1e-4": (1 / 2, "half of"),
        **({peer: (1.0, "the fastest right tool,")} if peer and not peer.startswith("curvlinops") else {}),
    }
    for name, (limit, words) in limits.items():
        if "ratio" in rows.get(name, {}) and 1 / rows[name]["ratio"] > limit:
            found.append(f"takes {1 / rows[name]['ratio']:.2f} of the time of {name} (target: {words} it)")
    for name, target in (("product, graph kept", KEPT_TARGET), ("product, graph built anew", REBUILT_TARGET)):
        if products[name]["ratio"] > target:
            found.append(f"a {name} takes {products[name]['ratio']:.2f} gradients (target {target:g})")
    return found


def summary(networks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each tool over all networks."""
    table = []
    for name in TOOLS:
        rows = [part["tools"][name] for part in networks.values() if name in part["tools"]]
        done = [row for row in rows if "errors" in row]
        if not rows:
            continue
        row: dict[str, Any] = {"tool": name, "networks": len(rows), "right": sum(map(is_right, done))}
        if done:
            every = [error for one in done for error in one["errors"]]
            ratios = [one["ratio"] for one in done if "ratio" in one]
            row |= {
                "worst_error": max(every),
                "median_error": statistics.median(every),
                "products": statistics.median(one["products"] for one in done),
                **(
                    {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
                    if ratios
                    else {}
                ),
            }
        row |= {"failed": sorted({one["failed"] for one in rows if "failed" in one})}
        table.append(row)
    return table


# ---------------------------------------------------------------- large networks on a GPU


@dataclass(frozen=True)
class Large:
    """A network of the size that people train, with random weights and data."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    samples: int
    at_once: int  # samples in a batch, so that a product's graph fits
    values: tuple[int, ...]  # how many eigenvalues are asked for, one after the other


def images(side: int, classes: int) -> Callable[[int, torch.Generator], Batch]:
    """Random images with random labels."""
    return lambda count, generator: (
        torch.randn(count, 3, side, side, generator=generator),
        torch.randint(classes, (count,), generator=generator),
    )


def sentences(vocabulary: int, tokens: int) -> Callable[[int, torch.Generator], Batch]:
    """Random tokens, each followed by a random one."""

    def draw(count: int, generator: torch.Generator) -> Batch:
        text = torch.randint(vocabulary, (count, tokens + 1), generator=generator)
        return text[:, :-1], text[:, 1:]

    return draw


LARGE: dict[str, Large] = {
    "WRN-28-10, batch 512": Large(lambda: wrn(28, 10), images(32, 100), 512, 128, (1, 5)),
    "ViT-B/16, batch 512": Large(
        lambda: VisionTransformer(3, 224, 16, 768, 12, 12, 1000), images(224, 1000), 512, 64, (1, 5)
    ),
    "transformer, 1 G parameters": Large(
        lambda: LanguageModel(32000, 512, 2048, 18, 16), sentences(32000, 512), 4, 1, (1,)
    ),
}
TINY: dict[str, Large] = {
    "WRN-10-1": Large(lambda: wrn(10, 1, 10), images(8, 10), 6, 4, (1,)),
    "ViT": Large(lambda: VisionTransformer(3, 8, 4, 8, 1, 2, 10), images(8, 10), 6, 4, (1, 5)),
    "transformer": Large(lambda: LanguageModel(20, 6, 8, 1, 2), sentences(20, 6), 3, 2, (1,)),
}


def measure_large(name: str, large: Large, device: str, repetitions: int) -> dict[str, Any]:
    """Time and memory of a gradient, a product, and eigenvalues."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = large.build().to(device).eval()
    generator = torch.Generator().manual_seed(0)
    inputs, target = (tensor.to(device) for tensor in large.batch(large.samples, generator))
    batches = list(zip(inputs.split(large.at_once), target.split(large.at_once), strict=True))
    objective = ma.Objective(model, nn.CrossEntropyLoss(), batches)
    operator = objective.hessian()
    vector = torch.randn(objective.size, generator=generator).to(device)
    actions: dict[str, Callable[[], Any]] = {
        "gradient": objective.gradient,
        "product": lambda: operator.matvec(vector),
        **{f"{k} eigenvalues": partial(ma.top_eigenvalues, objective, k) for k in large.values},
    }
    rows: dict[str, Any] = {}
    print(f"{name}: {objective.size / 1e6:.1f} M parameters, {large.samples} samples in batches of {large.at_once}")
    for what, action in actions.items():
        try:
            rows[what] = timed(action, device, repetitions if "eigenvalues" not in what else 1)
        except torch.OutOfMemoryError as error:
            rows[what] = {"failed": f"out of memory: {error}"[:200]}
        else:
            rows[what]["of_gradient"] = rows[what]["seconds"] / rows["gradient"]["seconds"]
        print(f"  {what:16s} {json.dumps(rows[what])}")
    return {"parameters": objective.size, "samples": large.samples, "at_once": large.at_once, "rows": rows}


def timed(action: Callable[[], Any], device: str, repetitions: int) -> dict[str, Any]:
    """Median seconds and peak memory; of eigenvalues also how they ended."""
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    if repetitions > 1:
        action()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, found = [], None
    for _ in range(repetitions):
        wait()
        start = time.perf_counter()
        found = action()
        wait()
        seconds.append(time.perf_counter() - start)
    row: dict[str, Any] = {"seconds": statistics.median(seconds)}
    if device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    if isinstance(found, ma.results.Eigenpairs):
        row |= {
            "values": found.values.tolist(),
            "residuals": found.residuals.tolist(),
            "converged": found.converged,
            "products": found.hvps,
        }
    return row


# ---------------------------------------------------------------- printing


def print_network(name: str, part: Mapping[str, Any]) -> None:
    """The rows of a network."""
    print(f"{name}: {part['parameters']} parameters, {part['samples']} samples in {part['batches']} batches")
    for tool, row in part["tools"].items():
        if "failed" in row:
            print(f"  {tool:26s} {row['failed']}")
            continue
        spread = f"{row['median_ms']:8.1f} ms ({row['q1_ms']:.1f} to {row['q3_ms']:.1f})"
        quotient = f"{row['ratio']:6.2f} of ours" if "ratio" in row else ""
        print(f"  {tool:26s} worst {row['worst']:.1e}  {row['products']:4d} products  {spread:34s} {quotient}")
    for what, row in part["products"].items():
        print(f"  {what:26s} {row['median_ms']:8.2f} ms  {row['ratio']:.2f} gradients")
    for miss in part["misses"]:
        print(f"  ! {miss}")


def markdown(results: Mapping[str, Any]) -> str:
    """The figures over all networks as a Markdown table."""
    head = "| tool | networks right | worst error | median error | products | time, of ours (lowest–highest) |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in summary(results["networks"]):
        start = f"| {row['tool']} | {row['right']} of {row['networks']} |"
        if "worst_error" not in row:
            lines.append(f"{start} {'; '.join(row['failed'])} | | | |")
            continue
        spread = f"{row['ratio']:.2f} ({row['lowest']:.2f}–{row['highest']:.2f})" if "ratio" in row else ""
        figures = f"{row['worst_error']:.0e} | {row['median_error']:.0e} | {row['products']:g} | {spread}"
        lines.append(f"{start} {figures} |")
    lines += ["", "| product | gradients (lowest–highest) | floor |", "|---|---|---|"]
    for what, floor in (("product, graph kept", KEPT_FLOOR), ("product, graph built anew", REBUILT_FLOOR)):
        found = [part["products"][what]["ratio"] for part in results["networks"].values()]
        lines.append(f"| {what} | {statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f}) | {floor:g} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NAME", help=f"default: all; of {', '.join(SPECS)}")
    parser.add_argument(
        "--tools",
        nargs="+",
        metavar="NAME",
        help=f"ours is always run; default: all but power iteration; of {', '.join(TOOLS)}",
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="cpu", help="cpu: the process's own time, for busy machines"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="for a tool on a network, unless two runs take longer"
    )
    parser.add_argument("--resume", action="store_true", help="keep the networks that the results file has")
    parser.add_argument("--gpu", action="store_true", help="large networks on a GPU, and nothing else")
    parser.add_argument("--tiny", action="store_true", help="few samples, few repetitions, no results file")
    parser.add_argument(
        "--markdown", type=Path, metavar="JSON", help="print the tables of such a file, measure nothing"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/curvature_<cpu or cuda>.json")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(options.threads)
    measure = measure_gpu if options.gpu else measure_cpu
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' are many; what ours would say, the rows say
        measure(options)


def measure_gpu(options: argparse.Namespace) -> None:
    """The large networks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("skipped: there is no CUDA device here")
        return
    results: dict[str, Any] = {"machine": machine(device), "networks": {}}
    for name, large in (TINY if options.tiny else LARGE).items():
        if options.networks is None or name in options.networks:
            results["networks"][name] = measure_large(name, large, device, options.repetitions)
    if options.out or not options.tiny:
        save(results, options.out or RESULTS / "curvature_cuda.json")


def measure_cpu(options: argparse.Namespace) -> None:
    """The networks with references."""
    out = options.out or RESULTS / "curvature_cpu.json"
    results: dict[str, Any] = {
        "machine": machine("cpu"),
        "versions": versions(),
        "clock": options.clock,
        "networks": {},
    }
    if options.resume and out.exists():
        results["networks"] = json.loads(out.read_text(encoding="utf-8"))["networks"]
    print(results["machine"], results["versions"], f"clock {options.clock}", sep="\n")
    tools = [OURS, *(name for name in options.tools or USUAL if name != OURS)]
    if options.tiny:
        options.repetitions = 2
    for name in options.networks or SPECS:
        if name in results["networks"]:
            continue
        of = case(name, tiny=options.tiny)
        part: dict[str, Any] = {
            "parameters": of.parameters,
            "samples": sum(len(target) for _, target in of.batches),
            "batches": len(of.batches),
            "reference": of.reference.method,
            "tools": measure_tools(of, tools, options),
            "products": measure_products(of, options),
        }
        part["misses"] = misses(part["tools"], part["products"])
        results["networks"][name] = part
        print_network(name, part)
        if options.out or not options.tiny:
            save(results, out)
    print(markdown(results))


def versions() -> dict[str, str]:
    """Of the tools that are installed."""
    distributions = ("PyHessian", "curvlinops-for-pytorch", "hessian-eigenthings", "scipy")
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    main()
