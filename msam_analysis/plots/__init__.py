"""Results and tidy tables drawn with matplotlib; nothing is measured here.

Every function takes what it draws and, optionally, the axes to draw on, and returns the axes, so that a caller can go
on from there. Figures made here follow the package's style file, 3.3 in wide for one panel and 6.8 in for several;
neither the user's ``rcParams`` nor the user's axes are restyled, and nothing is shown or written until asked:

>>> axes = plots.slice_2d({"SGD": sgd, "MSAM": msam})  # doctest: +SKIP
>>> plots.save(axes, "figures/surface")  # doctest: +SKIP
>>> plots.interactive_surface(msam, "figures/surface.html")  # doctest: +SKIP

An optimizer has one colour, line style and marker in every picture (:func:`look`). Bands and bars are 68 % Student-t
intervals of the mean over seeds, as in the paper. NaN and infinity are drawn as holes.
"""

from msam_analysis.plots.animation import animate_trajectory
from msam_analysis.plots.contours import slice_2d
from msam_analysis.plots.interactive import interactive_surface
from msam_analysis.plots.lines import slice_1d, slice_1d_panels
from msam_analysis.plots.live import LivePlot, live, recorded
from msam_analysis.plots.look import COLUMN_WIDTH, PAGE_WIDTH, Look, look, panels, save, style
from msam_analysis.plots.spectra import spectral_density
from msam_analysis.plots.surfaces import surface_3d
from msam_analysis.plots.trajectories import trajectory, trajectory_losses, trajectory_panels

__all__ = [
    "COLUMN_WIDTH",
    "PAGE_WIDTH",
    "LivePlot",
    "Look",
    "animate_trajectory",
    "interactive_surface",
    "live",
    "look",
    "panels",
    "recorded",
    "save",
    "slice_1d",
    "slice_1d_panels",
    "slice_2d",
    "spectral_density",
    "style",
    "surface_3d",
    "trajectory",
    "trajectory_losses",
    "trajectory_panels",
]
