"""These tests are for ``make integrations`` (``-m integrations``): elsewhere their files are not even imported.

torchvision, which the frameworks import if it is there, may be built for another torch: it is hidden from them.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

HIDDEN = "torchvision"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Look into this folder only if the marker is chosen."""
    return None if config.option.markexpr == "integrations" else True


def pytest_configure(config: pytest.Config) -> None:
    """Hide torchvision, and let the libraries warn of themselves."""
    if config.option.markexpr == "integrations":
        sys.modules[HIDDEN] = None  # type: ignore[assignment]  # this is how Python is told that there is none
        importlib.metadata.Distribution.from_name = classmethod(_visible)  # type: ignore[method-assign, assignment]


_from_name = importlib.metadata.Distribution.from_name.__func__  # type: ignore[attr-defined]


def _visible(cls: type, name: str) -> importlib.metadata.Distribution:
    if name == HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    found: importlib.metadata.Distribution = _from_name(cls, name)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("integrations")
