"""What the examination of an objective costs: operations, passes and time; docs/trust.md says how to read it.

``python benchmarks/examination.py`` takes some minutes on one core. The unit is one gradient of the loss on 32
samples, as many as are looked at. Operations are those of products and convolutions, which torch counts: forward,
backward and second backward passes alike. Passes are samples that go through the network, over 32. Time is that of the
process on one thread, medians with quartiles; a ratio is one of two calls that follow each other in one run. Beside it
stands the share of a default measurement, for the networks that are measured in seconds.

The floor is what the questions take where nothing is asked twice: 4 forward passes (with gradients, without, in
float64, of halves); and on half of the samples one gradient with its graph, one product along it, and a gradient on
either side.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import interleaved, machine, quartiles, ratio, save
from networks import SPECS, batches, criterion, trained
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import msam_analysis as ma
from msam_analysis.studies.workloads import DIGITS, RELATIVES

RESULTS = Path(__file__).parent / "results"
PART = 32
Data = Iterable[tuple[Tensor, Tensor]]
QUICK = ("study: digits", "study: perceptron", "study: table", "MLP, trained, ragged", "small CNN, trained, ragged")
PASSES = {"forward": 0, "backward": 0}


class Counted(nn.Module):
    """A network that counts the samples which go through it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output."""
        output: Tensor = self.network(x)
        PASSES["forward"] += len(x)
        if output.requires_grad:
            output.register_hook(_count)
        return output


def _count(gradient: Tensor) -> None:
    PASSES["backward"] += len(gradient)


def cases() -> dict[str, tuple[nn.Module, nn.Module, Data]]:
    """Return the networks of the studies of digits, and trained ones of the benchmark of curvature."""
    found: dict[str, tuple[nn.Module, nn.Module, Data]] = {}
    for name, workload in {"digits": DIGITS, **RELATIVES}.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found[f"study: {name}"] = workload.network(), workload.criterion(), workload.train()
    for name, spec in SPECS.items():
        if spec.epochs:
            found[name] = trained(spec, spec.epochs), criterion(spec), batches(spec, spec.samples)
    return found


def operations(action: Callable[[], object]) -> int:
    """Return the floating-point operations of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        action()
    return int(counter.get_total_flops())


def cost_of(model: nn.Module, loss_fn: nn.Module, data: Data, repetitions: int, measurements: int) -> dict[str, Any]:
    """Return what an examination costs in operations, in passes, in time, and beside a default measurement."""
    x, y = (torch.cat(column) for column in zip(*data, strict=True))
    part = ma.Objective(model, loss_fn, (x[:PART], y[:PART]), examine=False)
    product = part.hessian()
    start, one, direction = part.point(), operations(part.gradient), torch.ones(part.size)
    product.matvec(direction)  # keeps the graph
    forward, along = operations(part.loss) / one, operations(lambda: product.matvec(direction)) / one

    def examine() -> object:
        return ma.Objective(model, loss_fn, data).examine()

    def measure() -> object:
        return ma.measure(ma.Objective(model, loss_fn, data))

    asked = operations(examine) / one
    PASSES.update(forward=0, backward=0)
    ma.Objective(Counted(copy.deepcopy(model)), loss_fn, data).examine()
    passes = {name: samples / PART for name, samples in PASSES.items()}
    times = interleaved({"examination": examine, "gradient": lambda: part.gradient(start)}, repetitions, "cpu", "cpu")
    row: dict[str, Any] = {
        "parameters": part.size,
        "operations": {"examination": asked, "floor": 4 * forward + (1 + along + 2) / 2, "product": along},
        "passes": passes,
        "examination": quartiles(times["examination"]),
        "gradient": quartiles(times["gradient"]),
        "in gradients": ratio(times["examination"], times["gradient"]),
    }
    if measurements:
        beside = interleaved({"examination": examine, "measure": measure}, measurements, "cpu", "cpu", warmup=1)
        row |= {"measure": quartiles(beside["measure"]), "of measure": ratio(*beside.values())}
    return row


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=25, help="examinations of each network")
    parser.add_argument("--measurements", type=int, default=5, help="default measurements of each network")
    parser.add_argument("--out", type=Path, default=RESULTS / "examination_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"machine": machine("cpu"), "clock": "cpu", "part": PART}
    rows: dict[str, Any] = {}
    for name, case in cases().items():
        row = rows[name] = cost_of(*case, options.repetitions, options.measurements if name in QUICK else 0)
        asked, passes, gradients = row["operations"], row["passes"], row["in gradients"]
        beside = row.get("of measure")
        print(
            f"{name:30} {asked['examination']:5.2f} gradients (floor {asked['floor']:.2f}), "
            f"{passes['forward']:.1f} forward and {passes['backward']:.1f} backward passes, "
            f"{row['examination']['median_ms']:6.1f} ms = {gradients['ratio']:.1f} gradients "
            f"({gradients['ratio_q1']:.1f} to {gradients['ratio_q3']:.1f})"
            + (
                f", {beside['ratio']:.2%} of measure ({beside['ratio_q1']:.2%} to {beside['ratio_q3']:.2%})"
                if beside
                else ""
            ),
            flush=True,
        )
    found["networks"] = rows
    save(found, options.out)


if __name__ == "__main__":
    main()
