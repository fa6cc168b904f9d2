"""The file of a slice while it is measured: complete at every moment, and at most a second or a point behind."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from msam_analysis.results import Slice1D, Slice2D, load

Slice = TypeVar("Slice", Slice1D, Slice2D)

INTERVAL = 1.0
"""Seconds between two writings, if points come faster."""

_SHARE = 20  # writing takes at most this part of the time: one twentieth
_HASH = re.compile(r"[0-9a-f]{16}")
_SHOWN = 40  # characters of a value that an error shows


class Journal:
    """Writes a partial result whenever a writing is due.

    Parameters
    ----------
    path
        A ``.safetensors`` file, or ``None`` for no file at all.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._last = -float("inf")
        self._duration = 0.0

    def resumed(self, kind: type[Slice], identity: Mapping[str, str]) -> Slice | None:
        """Return the slice in the file; ``None`` if there is no file.

        Raises
        ------
        ValueError
            The file belongs to another measurement.
        """
        if self.path is None or not self.path.exists():
            return None
        loaded: Any = load(self.path)
        if not isinstance(loaded, kind) or not loaded.identity:
            raise ValueError(
                f"{self.path} holds a {type(loaded).__name__} that cannot be continued: expected a {kind.__name__} "
                "measured with path=...; give another path, or move the file away"
            )
        found: Slice = loaded
        names = dict.fromkeys([*identity, *found.identity])
        told = [text for name in names if (text := _difference(name, found.identity.get(name), identity.get(name)))]
        if told:
            raise ValueError(
                f"{self.path} belongs to another measurement, which differs in its {', its '.join(told)}: expected the "
                "file of the same one; give another path, or move the file away"
            )
        return found

    def write(self, snapshot: Callable[[], Slice1D | Slice2D], *, now: bool = False) -> None:
        """Write a snapshot if a writing is due, or ``now``."""
        if self.path is None or not (now or time.monotonic() - self._last >= max(INTERVAL, _SHARE * self._duration)):
            return
        start = time.monotonic()
        snapshot().save(self.path)
        self._last = time.monotonic()
        self._duration = self._last - start


def _difference(name: str, then: str | None, now: str | None) -> str:
    """Return in words how a file differs in one setting, or an empty text."""
    if then == now:
        return ""
    shown = [value for value in (then, now) if value is not None]
    if all(_HASH.fullmatch(value) for value in shown):
        return name
    there, here = ((value or "none")[:_SHOWN] for value in (then, now))
    return f"{name} ({there} there, {here} here)"
