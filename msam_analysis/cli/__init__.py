"""The command ``msam-analysis``: run a study, measure checkpoints, look at the loss around them."""

from msam_analysis.cli.entry import app, main

__all__ = ["app", "main"]
