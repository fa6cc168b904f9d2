"""The command ``msam-analysis landscape``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from msam_analysis import landscape
from msam_analysis.checkpoints.folders import counters
from msam_analysis.checkpoints.naming import distinct_names, expand
from msam_analysis.cli import checks
from msam_analysis.cli.factories import load_object, load_objectives
from msam_analysis.cli.names import check_own, file_names, listed
from msam_analysis.cli.pictures import FORMATS, check_formats, write_all
from msam_analysis.cli.processes import group, own_device, rank
from msam_analysis.cli.saying import say, watched
from msam_analysis.landscape import between, trajectory
from msam_analysis.landscape import directions as lines_of
from msam_analysis.objective.direction import Direction
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.ranks import Ranks
from msam_analysis.results import Trajectory, load_trajectory
from msam_analysis.results.files import sweep

AROUND = ("random", "gradient", "eigenvectors")
# Through several checkpoints, so many; pca: with a recorded trajectory.
THROUGH = {"interpolation": 2, "plane": 3, "pca": 1}
FEWEST = 3  # checkpoints that stand for a trajectory in pca
MOST_POINTS = 10**7  # of a grid: more could not be kept in a file, nor be drawn
NORMALIZE = ("filter", "layer", "weight", "l2", "none")
_UNDRAWN = 1

METRICS: dict[str, Any] = {
    "accuracy": landscape.metrics.accuracy,
    "sample_losses": landscape.metrics.sample_losses,
    "top_eigenvalue": landscape.metrics.top_eigenvalue,
    "gradient_norm": landscape.metrics.gradient_norm,
}


@dataclass(frozen=True)
class Course:
    """The options that decide the lines and planes; ``None`` stands for the default of the kind."""

    kind: str
    dimensions: int | None
    radius: float | None
    points: int
    normalize: str | None
    one_d: bool
    seed: int
    trajectories: Sequence[Path] = ()

    @property
    def axes(self) -> int:
        """Number of axes, 1 or 2."""
        return (1 if self.kind == "interpolation" else 2) if self.dimensions is None else self.dimensions

    def check(self, checkpoints: int) -> None:
        """Refuse options that do not go together."""
        if self.kind not in (*AROUND, *THROUGH):
            raise ValueError(f"--directions must be one of {', '.join((*AROUND, *THROUGH))}, got {self.kind!r}")
        if self.axes not in (1, 2):
            raise ValueError(f"--dim must be 1 (a line) or 2 (a plane), got {self.axes}")
        checks.positive("radius", self.radius)
        checks.one_of("normalize", self.normalize, NORMALIZE)
        checks.within("seed", self.seed, *checks.SEEDS)
        if not 2 <= self.points <= MOST_POINTS ** (1 / self.axes):
            most = math.floor(MOST_POINTS ** (1 / self.axes))
            raise ValueError(f"points must be from 2 to {most:,} along each of {self.axes} axes, got {self.points}")
        if self.kind in AROUND and self.points % 2 == 0:
            raise ValueError(f"points must be odd, so that the centre is a grid point; got {self.points}: use 51")
        if self.kind in THROUGH:
            self._check_through(checkpoints)
        if self.trajectories and (self.axes == 1 or (self.kind in AROUND and checkpoints > 1)):
            raise ValueError(
                "--trajectory is drawn on a plane through one checkpoint: expected --dim 2 and one of them"
            )

    def _check_through(self, checkpoints: int) -> None:
        if self.kind == "pca" and not self.trajectories:
            if checkpoints < FEWEST:
                raise ValueError(
                    f"--directions pca is the plane of a training: expected at least {FEWEST} checkpoints of it, "
                    f"or one (the centre) with --trajectory FOLDER; got {checkpoints}"
                )
        elif checkpoints != THROUGH[self.kind]:
            raise ValueError(
                f"--directions {self.kind} takes {THROUGH[self.kind]} checkpoint(s), got {checkpoints}: "
                "2 for interpolation, 3 for plane, 1 (the centre) for pca with --trajectory"
            )
        if (self.axes == 1) != (self.kind == "interpolation"):
            raise ValueError(f"--directions {self.kind} has no --dim {self.axes}: leave --dim out")
        if self.radius is not None or self.normalize is not None or self.one_d:
            raise ValueError(
                f"--directions {self.kind} reaches as far as what it shows: leave out --radius, --normalize and --one-d"
            )


@dataclass(frozen=True)
class View:
    """A line or plane to measure: the names of its file and in pictures, what a slice takes, and points to mark."""

    name: str
    title: str
    objective: Objective
    lines: tuple[Direction, ...]
    grid: Mapping[str, Any]
    marks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


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
    checks.readable(paths)
    if refine is not None and not 0 < refine < 1:
        raise ValueError(f"refine must be a fraction of the range between 0 and 1, got {refine}: 0.01 is one per cent")
    checks.at_least("samples", samples, 2)
    checks.one_of("batchnorm", batchnorm, ("eval", "batch", "recalibrate"))
    wanted = list(dict.fromkeys(listed(formats)))
    check_formats(wanted, course.axes, len(course.trajectories))
    measures = _metrics(metrics)
    given = distinct_names(paths)
    names, titles = file_names(given), checks.labelled(labels, given)
    shown_folder = out if out is not None else Path("results") / "landscape"
    folder = checks.place(shown_folder)
    paths = [path.absolute() for path in paths]
    stems = names if course.kind in AROUND or (course.kind == "pca" and len(names) == 1) else [course.kind]
    check_own(shown_folder, [f"{stem}.safetensors" for stem in stems], "an earlier landscape of these checkpoints")
    if rank() == 0:
        sweep(folder)
    along = _open_trajectories(course.trajectories)
    policy = batchnorm or ("eval" if course.kind in AROUND and not along else "recalibrate")
    device = own_device(device)
    options: dict[str, Any] = {"metrics": measures, "refine": refine, "samples": samples, "seed": seed}
    options["progress"] = not quiet and rank() == 0 and watched()
    with group():
        objectives = load_objectives(paths, model, data, loss, batchnorm=policy, device=device, parameters=parameters)
        if course.kind == "pca" and not along:
            along = {"checkpoints": _passed(objectives, paths)}
        looked = _views(course, objectives, names, titles, along)
        measured = [(view, _measure(view, folder, options)) for view in looked]
    if rank() == 0:
        view = looked[0]
        shown = {name: trajectory.project(item, view.lines, objective=view.objective) for name, item in along.items()}
        results = {view.name: result for view, result in measured}
        results |= {f"trajectory-{name}": item for name, item in shown.items()}
        slices = {view.title: result for view, result in measured}
        written, undrawn = write_all(results, slices, shown, view.marks, wanted, folder)
        written = [*(folder / f"{view.name}.safetensors" for view in looked), *written]
        _print(measured, [shown_folder / path.relative_to(folder) for path in written])
        for what in undrawn:
            say(f"msam-analysis: {what}", err=True)
        if undrawn:
            raise typer.Exit(_UNDRAWN)


def _metrics(text: str) -> dict[str, Any]:
    names = [name for name in listed(text) if name != "loss"]  # which is always measured
    for name in names:
        if name not in METRICS and ":" not in name:
            raise ValueError(
                f"unknown metric {name!r}: expected some of {', '.join(METRICS)}, or package.module:function"
            )
    return {name.rpartition(":")[2]: METRICS[name] if name in METRICS else load_object(name) for name in names}


def _measure(view: View, folder: Path, options: Mapping[str, Any]) -> Any:
    # Rounding in another process must not lead to other directions.
    lines = Ranks().from_first(view.lines)
    if options["progress"]:
        say(view.title or view.name, err=True)
    path = folder / f"{view.name}.safetensors"
    if len(lines) == 1:
        return landscape.slice_1d(view.objective, lines[0], path=path, **view.grid, **options)
    return landscape.slice_2d(view.objective, (lines[0], lines[1]), path=path, **view.grid, **options)


def _print(measured: Sequence[tuple[View, Any]], written: Sequence[Path]) -> None:
    settings = ", ".join(f"{key} {value}" for key, value in measured[0][1].settings.items())
    table = Table(title="loss", caption=Text(settings), title_justify="left", caption_justify="left")
    for name in ("checkpoint", "centre", "min", "max", "evaluated", "error"):
        table.add_column(name, justify="left" if name == "checkpoint" else "right", overflow="fold")
    for view, result in measured:
        known = result.loss[result.loss.isfinite()].double()
        ends = (float(known.min()), float(known.max())) if known.numel() else (math.nan, math.nan)
        numbers = [f"{number:.5g}" for number in (result.center_loss, *ends)]
        evaluated = f"{result.evaluations} of {result.loss.numel()}"
        table.add_row(Text(view.title or view.name), *numbers, evaluated, f"{result.error:.2g}")
    say(table, *(f"written: {path}" for path in written))


def _views(
    course: Course,
    objectives: Sequence[Objective],
    names: Sequence[str],
    titles: Sequence[str],
    trajectories: Mapping[str, Trajectory],
) -> list[View]:
    """Return what is to be measured: one view for each checkpoint, or one through all."""
    first = objectives[0]
    others = [objective.point() for objective in objectives[1:]]
    if course.kind == "interpolation":
        named = f"the line from {titles[0]} (0) to {titles[1]} (1)"
        line = replace(lines_of.interpolation(first, others[0]), name=named)
        return [View("interpolation", "", first, (line,), {"coordinates": between(course.points)})]
    if course.kind == "plane":
        plane = lines_of.plane_through(first, others[0], others[1])
        x, y = plane.directions
        lines = (replace(x, name=f"to {titles[1]}"), replace(y, name=f"to {titles[2]}, orthogonal to x"))
        marks = {title: tuple(point) for title, point in zip(titles, plane.points.tolist(), strict=True)}
        return [View("plane", "", first, lines, {"coordinates": plane.coordinates(course.points)}, marks)]
    if course.kind == "pca":
        first = objectives[-1]  # the end of a training, or the only one
        found = trajectory.pca_plane(trajectories, center=first.point())
        projections = [trajectory.project(item, found) for item in trajectories.values()]
        grid = {"coordinates": trajectory.grid(projections, course.points)}
        return [View(names[0] if len(names) == 1 else "pca", titles[-1], first, found.directions, grid)]
    around: dict[str, Any] = {"radius": 1.0 if course.radius is None else course.radius, "points": course.points}
    return [
        View(name, title, objective, _around(course, objective), around)
        for name, title, objective in zip(names, titles, objectives, strict=True)
    ]


def _around(course: Course, objective: Objective) -> tuple[Direction, ...]:
    # Eigenvectors have length 1 already.
    normalize: Any = course.normalize or ("none" if course.kind == "eigenvectors" else "filter")
    found = []
    for axis in range(course.axes):
        if course.kind == "random" or (course.kind == "gradient" and axis == 1):
            line = lines_of.random(objective, course.seed + axis, normalize, one_d=course.one_d)
        else:
            own = course.kind == "gradient"
            line = lines_of.gradient(objective) if own else lines_of.eigenvector(objective, axis, seed=course.seed)
            if normalize != "none":
                line = line.normalized(objective, normalize, one_d=course.one_d)
        found.append(line)
    return tuple(found)


def _passed(objectives: Sequence[Objective], paths: Sequence[Path]) -> Trajectory:
    """Return checkpoints of one training as the trajectory that they are points of, in their order.

    Steps are those that files or names say, if they increase; else they are counted from 0.

    Raises ValueError: Parameters differ between them.
    """
    layouts = {(item.layout.names, tuple(map(tuple, item.layout.shapes))) for item in objectives}
    if len(layouts) > 1:
        raise ValueError("the checkpoints are of different parameters: expected those of one training")
    known = [counters(path) for path in paths]
    steps = next((found for name in known[0] if _increase(found := [one[name] for one in known])), range(len(paths)))
    (names, shapes) = layouts.pop()
    return Trajectory(
        label="checkpoints",
        steps=torch.tensor(steps),
        points=torch.stack([item.point().cpu() for item in objectives]),
        rounding=torch.zeros(len(paths), dtype=torch.float64),
        names=tuple(names),
        shapes=shapes,
        settings=objectives[-1].settings,
    )


def _increase(numbers: Sequence[int | None]) -> bool:
    return None not in numbers and all(a < b for a, b in itertools.pairwise(numbers))  # type: ignore[operator]


def _open_trajectories(folders: Sequence[Path]) -> dict[str, Trajectory]:
    """Return recorded trajectories by their labels, or by their folders if labels are the same."""
    found = [load_trajectory(folder) for folder in folders]
    labels = [item.label for item in found]
    names = labels if len(set(labels)) == len(labels) else distinct_names(folders)
    return {name: replace(item, label=name) for name, item in zip(file_names(names), found, strict=True)}
