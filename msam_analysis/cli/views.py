"""The lines and planes of the landscape command: through which weights, in which directions, how far."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from msam_analysis.checkpoints.naming import distinct_names
from msam_analysis.checkpoints.reading import counters
from msam_analysis.landscape import between, directions, trajectory
from msam_analysis.objective.direction import Direction
from msam_analysis.objective.objective import Objective
from msam_analysis.results import Trajectory, load_trajectory

AROUND = ("random", "gradient", "eigenvectors")
"""Kinds of directions that every checkpoint has for itself."""
THROUGH = {"interpolation": 2, "plane": 3, "pca": 1}
"""Kinds of lines and planes through several checkpoints, with their number; of pca: with a recorded trajectory."""
FEWEST = 3
"""Checkpoints that stand for a trajectory in pca, at least."""


@dataclass(frozen=True)
class Course:
    """The options that decide the lines and planes.

    ``kind``: One of :data:`AROUND` or :data:`THROUGH`.
    ``dimensions``: Number of axes, 1 or 2; ``None``: 1 for an interpolation, otherwise 2.
    ``radius``, ``normalize``, ``one_d``: Length and normalisation of :data:`AROUND`; ``None`` and ``False``: the
        default.
    ``points``: Number of points along each axis.
    ``seed``: Seed of random directions, the same for every checkpoint.
    ``trajectories``: Folders of recorded trajectories to draw.
    """

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
        return self.dimensions or (1 if self.kind == "interpolation" else 2)

    def check(self, checkpoints: int) -> None:
        """Refuse options that do not go together.

        Raises ValueError: Some options do not go together.
        """
        if self.kind not in (*AROUND, *THROUGH):
            raise ValueError(f"--directions must be one of {', '.join((*AROUND, *THROUGH))}, got {self.kind!r}")
        if self.axes not in (1, 2):
            raise ValueError(f"--dim must be 1 (a line) or 2 (a plane), got {self.axes}")
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
    """A line or plane to measure.

    ``name``: Name of its file.
    ``title``: Name in pictures.
    ``objective``: The loss at its centre.
    ``lines``: One or two directions.
    ``grid``: Arguments of a slice for the points.
    ``marks``: Coordinates of points to mark on a plane, by title.
    """

    name: str
    title: str
    objective: Objective
    lines: tuple[Direction, ...]
    grid: Mapping[str, Any]
    marks: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def views(
    course: Course,
    objectives: Sequence[Objective],
    names: Sequence[str],
    titles: Sequence[str],
    trajectories: Mapping[str, Trajectory],
) -> list[View]:
    """Return the views to measure: one for each checkpoint, or one through all."""
    first = objectives[0]
    others = [objective.point() for objective in objectives[1:]]
    if course.kind == "interpolation":
        line = replace(
            directions.interpolation(first, others[0]), name=f"the line from {titles[0]} (0) to {titles[1]} (1)"
        )
        return [View("interpolation", "", first, (line,), {"coordinates": between(course.points)})]
    if course.kind == "plane":
        plane = directions.plane_through(first, others[0], others[1])
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
            line = directions.random(objective, course.seed + axis, normalize, one_d=course.one_d)
        else:
            own = course.kind == "gradient"
            line = directions.gradient(objective) if own else directions.eigenvector(objective, axis, seed=course.seed)
            if normalize != "none":
                line = line.normalized(objective, normalize, one_d=course.one_d)
        found.append(line)
    return tuple(found)


def passed(objectives: Sequence[Objective], paths: Sequence[Path]) -> Trajectory:
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


def open_trajectories(folders: Sequence[Path]) -> dict[str, Trajectory]:
    """Return recorded trajectories by their labels, or by their folders if labels are the same."""
    found = [load_trajectory(folder) for folder in folders]
    labels = [item.label for item in found]
    names = labels if len(set(labels)) == len(labels) else distinct_names(folders)
    return {name: replace(item, label=name) for name, item in zip(names, found, strict=True)}
