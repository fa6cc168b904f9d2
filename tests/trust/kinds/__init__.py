"""The cases, a file for each kind or two."""

from importlib import import_module
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("*.py")):
    if path.stem != "__init__":
        import_module(f"{__name__}.{path.stem}")
