"""The command ``msam-analysis landscape``."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from msam_analysis import landscape
from msam_analysis.checkpoints.naming import distinct_names, expand
from msam_analysis.cli.factories import load_object, load_objectives
from msam_analysis.cli.names import check_own
from msam_analysis.cli.pictures import FORMATS, check_formats, write_all
from msam_analysis.cli.processes import group, own_device, rank
from msam_analysis.cli.views import AROUND, THROUGH, Course, View, open_trajectories, passed, views
from msam_analysis.landscape import trajectory
from msam_analysis.objective.ranks import Ranks

METRICS: dict[str, Any] = {
    "accuracy": landscape.metrics.accuracy,
    "sample_losses": landscape.metrics.sample_losses,
    "top_eigenvalue": landscape.metrics.top_eigenvalue,
    "gradient_norm": landscape.metrics.gradient_norm,
}


def landscape_command(
    checkpoints: Annotated[list[str], typer.Argument(help="Files, folders or patterns of saved weights.")],
    model: Annotated[str, typer.Option(help="package.module:factory, called without arguments; returns the module.")],
    data: Annotated[str, typer.Option(help="package.module:factory; returns batches, or (batches, loss_fn).")],
    loss: Annotated[str | None, typer.Option(help="package.module:factory of loss_fn; default cross-entropy.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for slices and pictures; default results/landscape.")] = None,
    directions: Annotated[str, typer.Option(help=f"One of {', '.join((*AROUND, *THROUGH))}.")] = "random",
    dim: Annotated[int | None, typer.Option(help="1: a line; 2: a plane. Default 2, for an interpolation 1.")] = None,
    radius: Annotated[
        float | None, typer.Option(help="Reach on either side, in multiples of the directions; default 1.")
    ] = None,
    points: Annotated[int, typer.Option(help="Points along each axis; an odd number around a checkpoint.")] = 51,
    normalize: Annotated[
        str | None, typer.Option(help="filter, layer, weight, l2 or none; default filter, for eigenvectors none.")
    ] = None,
    one_d: Annotated[bool, typer.Option("--one-d", help="Move biases and norms too when normalising.")] = False,
    metrics: Annotated[
        str, typer.Option(help=f"Also {', '.join(METRICS)}, or package.module:function of (objective, w).")
    ] = "",
    refine: Annotated[
        float | None, typer.Option(help="Interpolate with this error, as a fraction of the range: 0.01 saves most.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of samples, drawn at random; default all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random directions (x: seed, y: seed + 1) and of --samples.")] = 0,
    batchnorm: Annotated[
        str | None, typer.Option(help="eval, batch or recalibrate; default eval around checkpoints, else recalibrate.")
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Option(help="Pattern of the parameters to move, such as 'layer4.*'; may be repeated.")
    ] = None,
    trajectories: Annotated[
        list[Path] | None, typer.Option("--trajectory", help="Folder of a TrajectoryRecorder; may be repeated.")
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", help="Name of a checkpoint in pictures; one for each.")
    ] = None,
    formats: Annotated[str, typer.Option(help=f"File formats, some of {', '.join(FORMATS)}.")] = "png",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: where the model is.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure and draw the loss on lines and planes around checkpoints, or through them.

    Every checkpoint gets a slice along its own directions (--directions random, gradient or eigenvectors; the second
    axis of gradient is random), all in one picture on one scale. Or there is one slice: through two checkpoints
    (interpolation), through three (plane), or in the plane of a training (pca): of three or more of its checkpoints,
    through the last of them, or of a recorded trajectory, through one.

    Slices are written to .safetensors files while they grow: the same command goes on where it was stopped.

    Several processes or GPUs: torchrun --nproc-per-node 2 -m msam_analysis landscape ...
    """
    course = Course(directions, dim, radius, points, normalize, one_d, seed, tuple(trajectories or ()))
    paths = [path for one in checkpoints for path in expand([one])]
    course.check(len(paths))
    wanted = list(dict.fromkeys(_split(formats)))
    check_formats(wanted, course.axes, len(course.trajectories))
    measures = _metrics(metrics)
    names = distinct_names(paths)
    titles = _titles(labels, names)
    folder = out if out is not None else Path("results") / "landscape"
    stems = names if course.kind in AROUND or (course.kind == "pca" and len(names) == 1) else [course.kind]
    check_own(folder, [f"{stem}.safetensors" for stem in stems], "an earlier landscape of these checkpoints")
    along = open_trajectories(course.trajectories)
    policy = batchnorm or ("eval" if course.kind in AROUND and not along else "recalibrate")
    device = own_device(device)
    options: dict[str, Any] = {"metrics": measures, "refine": refine, "samples": samples, "seed": seed}
    options["progress"] = not quiet and rank() == 0 and sys.stderr.isatty()
    with group():
        objectives = load_objectives(paths, model, data, loss, batchnorm=policy, device=device, parameters=parameters)
        if course.kind == "pca" and not along:
            along = {"checkpoints": passed(objectives, paths)}
        looked = views(course, objectives, names, titles, along)
        measured = [(view, _measure(view, folder, options)) for view in looked]
    if rank() == 0:
        view = looked[0]
        shown = {name: trajectory.project(item, view.lines, objective=view.objective) for name, item in along.items()}
        written = write_all(measured, shown, wanted, folder)
        _print(measured, [*(folder / f"{view.name}.safetensors" for view in looked), *written])


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _metrics(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _split(text):
        if name == "loss":  # always measured
            continue
        if name not in METRICS and ":" not in name:
            raise ValueError(
                f"unknown metric {name!r}: expected some of {', '.join(METRICS)}, or package.module:function"
            )
        found[name.rpartition(":")[2]] = METRICS[name] if name in METRICS else load_object(name)
    return found


def _titles(labels: Sequence[str] | None, names: Sequence[str]) -> Sequence[str]:
    if not labels:
        return names
    if len(labels) != len(names) or len(set(labels)) != len(names):
        raise ValueError(f"expected a --label for each of the {len(names)} checkpoint(s), all different, got {labels}")
    return labels


def _measure(view: View, folder: Path, options: Mapping[str, Any]) -> Any:
    # Rounding in another process must not lead to other directions.
    lines = Ranks().from_first(view.lines)
    if options["progress"]:
        typer.echo(view.title or view.name, err=True)
    path = folder / f"{view.name}.safetensors"
    if len(lines) == 1:
        return landscape.slice_1d(view.objective, lines[0], path=path, **view.grid, **options)
    x, y = lines
    return landscape.slice_2d(view.objective, (x, y), path=path, **view.grid, **options)


def _print(measured: Sequence[tuple[View, Any]], written: Sequence[Path]) -> None:
    console = Console()
    settings = ", ".join(f"{key} {value}" for key, value in measured[0][1].settings.items())
    table = Table(title="loss", caption=settings, title_justify="left", caption_justify="left")
    for name in ("checkpoint", "centre", "min", "max", "evaluated", "error"):
        table.add_column(name, justify="left" if name == "checkpoint" else "right", overflow="fold")
    for view, result in measured:
        known = result.loss[result.loss.isfinite()].double()
        ends = (float(known.min()), float(known.max())) if known.numel() else (math.nan, math.nan)
        numbers = [f"{number:.5g}" for number in (result.center_loss, *ends)]
        evaluated = f"{result.evaluations} of {result.loss.numel()}"
        table.add_row(Text(view.title or view.name), *numbers, evaluated, f"{result.error:.2g}")
    console.print(table)
    for path in written:
        console.print(Text(f"written: {path}"), soft_wrap=True)
