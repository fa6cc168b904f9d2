"""Probes of running training, and the monitor that asks them step by step and keeps their numbers.

This room may import everything that measures: ``landscape``, ``measures``, ``spectra``, ``objective``, ``results``.
"""

from msam_analysis.monitor import loggers, probes
from msam_analysis.monitor.monitor import Monitor

__all__ = ["Monitor", "loggers", "probes"]
