"""The optimizers inside other people's training loops; a framework is imported by its own module only.

``save_true_weights`` needs torch alone. ``msam.integrations.lightning`` and ``msam.integrations.transformers`` import
the framework of their name (extras ``lightning`` and ``transformers``).
"""

from .saving import TrueState, save_true_weights, unwrapped, warn_if_displacing

__all__ = ["TrueState", "save_true_weights", "unwrapped", "warn_if_displacing"]
