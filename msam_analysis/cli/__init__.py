"""The command ``msam-analysis``: run a study, measure checkpoints, draw the loss around them.

One file for each command, with its options and what it prints; the work is done in the rooms below. Models, data and
losses come from functions that the user names. This room may import every other one; none imports it.
"""

from msam_analysis.cli.entry import app, main

__all__ = ["app", "main"]
