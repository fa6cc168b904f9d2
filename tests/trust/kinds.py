"""Importing this fills the list of cases: one file for each kind or two."""

from importlib import import_module
from pathlib import Path

from .cases import CASES

__all__ = ["CASES"]

for path in sorted(Path(__file__).parent.glob("kind_*.py")):
    import_module(f"{__package__}.{path.stem}")
