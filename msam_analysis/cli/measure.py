"""The command ``msam-analysis measure``."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table

from msam_analysis.cli.factories import load_objectives
from msam_analysis.cli.names import check_own, distinct_names, listed
from msam_analysis.measures.summary import DEFAULT_METRICS, METRICS, RADII, measure
from msam_analysis.objective.objective import Objective
from msam_analysis.results import Measurement, atomic_folder

_METRICS = "metrics.csv"


def measure_command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Saved weights: .safetensors or torch.save files.")],
    model: Annotated[str, typer.Option(help="package.module:factory, called without arguments; returns the module.")],
    data: Annotated[str, typer.Option(help="package.module:factory; returns batches, or (batches, loss_fn).")],
    loss: Annotated[str | None, typer.Option(help="package.module:factory of loss_fn; default cross-entropy.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.csv and the full results.")] = None,
    metrics: Annotated[str, typer.Option(help=f"Some of {', '.join(METRICS)}; or all.")] = ",".join(DEFAULT_METRICS),
    rho: Annotated[list[float] | None, typer.Option(help="Radius of an L2 ball; may be given several times.")] = None,
    eigenvalues: Annotated[int, typer.Option(help="Number of largest eigenvalues of the Hessian.")] = 5,
    batchnorm: Annotated[str, typer.Option(help="eval, batch or recalibrate.")] = "eval",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: where the model is.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random starts.")] = 0,
) -> None:
    """Print and save sharpness metrics of checkpoints: loss, λ1..λ5, trace, largest rise in a ball, average rise."""
    chosen = METRICS if metrics == "all" else listed(metrics)
    root = out if out is not None else Path("results") / "measure"
    folders = [root / name for name in distinct_names(checkpoints)]
    for folder in folders:
        check_own(folder, [_METRICS], "an earlier measurement")
    objectives = load_objectives(checkpoints, model, data, loss, batchnorm=batchnorm, device=device)
    console, progress = Console(), Console(stderr=True)
    options: dict[str, Any] = {"radii": tuple(rho) if rho else RADII, "eigenvalues": eigenvalues, "seed": seed}
    for path, folder, objective in zip(checkpoints, folders, objectives, strict=True):
        with progress.status(f"{folder.name} ...") as status:
            measured = measure(objective, metrics=chosen, tick=functools.partial(_show, status, folder.name), **options)
        _print(console, str(path), objective, measured)
        # In place of all that an earlier call wrote.
        with atomic_folder(folder) as partial:
            for name, result in measured.results.items():
                result.save(partial / f"{name}.safetensors")
            measured.to_frame().to_csv(partial / _METRICS, index=False, lineterminator="\n")
        console.print(f"saved in {folder}", highlight=False, soft_wrap=True)


def _show(status: Status, name: str, what: str) -> None:
    status.update(f"{name}: {what} ...")


def _print(console: Console, title: str, objective: Objective, metrics: Measurement) -> None:
    settings = ", ".join(f"{key} {value}" for key, value in objective.settings.items() if key != "examination")
    settings = f"{metrics.settings['examination']}\n{settings}"
    table = Table(title=title, caption=settings, title_justify="left", caption_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("±", justify="right")
    table.add_column("what it is")
    for row in metrics.to_frame().to_dict("records"):
        uncertainty = float(row["uncertainty"])
        shown = "" if math.isnan(uncertainty) else f"{uncertainty:.2g}"
        meaning = f"{row['meaning']}{'; NOT converged' if row['converged'] is False else ''}"
        table.add_row(str(row["metric"]), f"{row['value']:.5g}", shown, meaning)
    console.print(table)
