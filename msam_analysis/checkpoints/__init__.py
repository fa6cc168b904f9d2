"""Checkpoints: weights in files, read without ever running code from the file.

This room knows torch and formats of files. It may import ``results``.
"""

from msam_analysis.checkpoints.loading import Loaded, load, load_model, load_weights

__all__ = ["Loaded", "load", "load_model", "load_weights"]


def __dir__() -> list[str]:
    return list(__all__)
