"""Trajectories of optimizers: recorded while they train, and shown on a plane with the distance from that plane.

>>> recorder = ma.TrajectoryRecorder("runs/MSAM", model, optimizer, every=10)  # doctest: +SKIP
>>> for step, batch in enumerate(loader):
...     recorder.record(step, loss=train(batch))  # doctest: +SKIP

Several optimizers on one plane, its surface, and the distance of each from the plane:

>>> runs = {name: ma.trajectory.load(f"runs/{name}") for name in ("SGD", "MSAM")}  # doctest: +SKIP
>>> plane = ma.pca_plane(runs)  # doctest: +SKIP
>>> centred = objective.with_weights(plane.center)  # doctest: +SKIP
>>> seen = {name: ma.project(run, plane, objective=centred) for name, run in runs.items()}  # doctest: +SKIP
>>> surface = ma.slice_2d(centred, plane.directions, coordinates=ma.trajectory.grid(seen))  # doctest: +SKIP
>>> ma.plots.trajectory_panels(surface, seen)  # doctest: +SKIP
"""

from msam_analysis.landscape.trajectory.planes import PrincipalPlane, grid, pca_plane, project
from msam_analysis.landscape.trajectory.recorder import TrajectoryRecorder, from_weights
from msam_analysis.results import load_trajectory as load

__all__ = ["PrincipalPlane", "TrajectoryRecorder", "from_weights", "grid", "load", "pca_plane", "project"]


def __dir__() -> list[str]:
    return list(__all__)
