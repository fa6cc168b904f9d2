"""Record probes while a training loop runs."""

from msam_analysis.monitor.monitor import Monitor

__all__ = ["Monitor"]
