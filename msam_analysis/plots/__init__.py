"""Results and tidy tables drawn with matplotlib, pages to turn and films; nothing is measured here.

One file for each kind of picture, the look that all share, and the scales. This room may import ``results``.

What a measure returns is drawn by the function of the same name, alone or by name beside others:

>>> plots.top_eigenvalues(ma.top_eigenvalues(objective))  # doctest: +SKIP
>>> plots.trace({"SGD": one, "MSAM": other})  # doctest: +SKIP

Every function takes what it draws and, optionally, the axes to draw on, and returns the axes, so that a caller can go
on from there. Figures made here follow the package's style file, 3.3 in wide for one panel and 6.8 in for several;
neither the user's ``rcParams`` nor the user's axes are restyled, and nothing is shown or written until asked:

>>> axes = plots.slice_2d({"SGD": sgd, "MSAM": msam})  # doctest: +SKIP
>>> plots.save(axes, "figures/surface")  # doctest: +SKIP
>>> plots.interactive_surface(msam, "figures/surface.html")  # doctest: +SKIP

What the functions share:

``result``, ``results``, ``projections``
    What a measure returned, or one for each name, such as an optimizer's or a panel's title.
``ax``, ``axes``
    Axes to draw on, one for each panel; by default a new figure.
``legend``
    Whether curves and markers are named. Default: they are.

They return the axes, those of several panels as an array of shape ``(panels,)``. They raise ``ValueError`` where there
is nothing to draw or there are fewer axes than panels, and ``TypeError`` for what is not a result of the measure.

An optimizer has one colour, line style and marker in every picture (:func:`look`). Bands and bars over seeds are 68 %
Student-t intervals of the mean, as in the paper; those of a single result are its own error. An open marker did not
converge. NaN and infinity are drawn as holes.
"""

from msam_analysis.plots.animation import animate_trajectory
from msam_analysis.plots.comparison import compare
from msam_analysis.plots.curves import (
    directional_sharpness,
    feature_rank,
    pca_plane,
    robust_accuracy,
    sam_msam_angle,
    spectral_density,
)
from msam_analysis.plots.drawing import panels
from msam_analysis.plots.interactive import interactive_surface
from msam_analysis.plots.lines import slice_1d, slice_1d_panels
from msam_analysis.plots.live import LivePlot, live, recorded
from msam_analysis.plots.look import COLUMN_WIDTH, PAGE_WIDTH, Look, look, save, style
from msam_analysis.plots.planes import slice_2d, surface_3d
from msam_analysis.plots.points import (
    average_sharpness,
    ball_sharpness,
    by_layer,
    certify,
    critical_sharpness,
    curvature_along,
    data_interval,
    fisher_rao_norm,
    m_sharpness,
    measure,
    momentum_gradient_cosine,
    one_step_sharpness,
    relative_flatness,
    top_eigenvalues,
    trace,
)
from msam_analysis.plots.trajectories import project, trajectory, trajectory_losses, trajectory_panels

eigenvalues = top_eigenvalues

__all__ = [
    "COLUMN_WIDTH", "PAGE_WIDTH", "LivePlot", "Look", "animate_trajectory", "average_sharpness", "ball_sharpness",
    "by_layer", "certify", "compare", "critical_sharpness", "curvature_along", "data_interval", "directional_sharpness",
    "eigenvalues", "feature_rank", "fisher_rao_norm", "interactive_surface", "live", "look", "m_sharpness", "measure",
    "momentum_gradient_cosine", "one_step_sharpness", "panels", "pca_plane", "project", "recorded", "relative_flatness",
    "robust_accuracy", "sam_msam_angle", "save", "slice_1d", "slice_1d_panels", "slice_2d", "spectral_density", "style",
    "surface_3d", "top_eigenvalues", "trace", "trajectory", "trajectory_losses", "trajectory_panels",
]  # fmt: skip


def __dir__() -> list[str]:
    return list(__all__)
