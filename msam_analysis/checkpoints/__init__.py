"""Checkpoints: weights in files, read without ever running code from the file.

This room reads files of any library, fits them to models, and measures many of them beside one another. It may import
``landscape``, ``measures``, ``spectra``, ``objective`` and ``results``.
"""

from msam_analysis.checkpoints.comparing import compare
from msam_analysis.checkpoints.loading import Loaded, load, load_model, load_weights

__all__ = ["Loaded", "compare", "load", "load_model", "load_weights"]


def __dir__() -> list[str]:
    return list(__all__)
