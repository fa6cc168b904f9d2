"""Options, checked before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from msam_analysis.cli.processes import rank
from msam_analysis.results.files import check_writable
from msam_analysis.results.text import printable

SEEDS = (-(2**63), 2**63 - 2)  # what torch's generators take; a second direction has the next one
_TINY, _HUGE = 1e-12, 1e15  # squares of what is beyond leave the range of float32, or drown in rounding


def within(option: str, value: float | None, least: float, most: float) -> None:
    """Raise ``ValueError`` unless an option is a number in a range; ``None``: it was not given."""
    if value is not None and not least <= value <= most:
        raise ValueError(f"{option} must be from {_shown(least)} to {_shown(most)}, got {value}")


def positive(option: str, value: float | None) -> None:
    """Raise ``ValueError`` unless an option is a number above 0 that float32 can square."""
    if value is not None and not _TINY <= value <= _HUGE:
        raise ValueError(f"{option} must be a positive number, {_TINY:g} to {_HUGE:g}, got {value}")


def at_least(option: str, value: float | None, least: float) -> None:
    """Raise ``ValueError`` unless an option is a finite number of this size."""
    if value is not None and not (least <= value and math.isfinite(value)):
        raise ValueError(f"{option} must be at least {_shown(least)}, got {value}")


def one_of(option: str, value: str | None, known: Sequence[str]) -> None:
    """Raise ``ValueError`` unless an option is one of these words."""
    if value is not None and value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")


def labelled(labels: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """Return what checkpoints are called: their labels, or their names, on one line each and all different.

    Raises ValueError: There are not as many labels as checkpoints, or two are the same, or one is empty.
    """
    called = [printable(name) for name in labels or names]
    if labels and (len(labels) != len(names) or len(set(called)) != len(names) or not all(map(str.strip, called))):
        raise ValueError(
            f"expected a --label for each of the {len(names)} checkpoint(s), all different and none empty, got {labels}"
        )
    return distinct(called)


def readable(paths: Sequence[Path]) -> None:
    """Raise ``ValueError`` for a name that is not UTF-8: neither torch nor safetensors opens such a file."""
    for path in paths:
        if printable(str(path), None) != str(path) and any("\ud800" <= char <= "\udfff" for char in str(path)):
            raise ValueError(f"the name {printable(str(path))} is not UTF-8, and torch cannot open it: rename the file")


def distinct(names: Sequence[str]) -> list[str]:
    """Return names with a number behind those that are there already."""
    found: list[str] = []
    for name in names:
        number, free = 2, name
        while free in found:
            number, free = number + 1, f"{name}-{number}"
        found.append(free)
    return found


def place(out: Path) -> Path:
    """Return the folder for results, which stays the same wherever a user's function goes; it can be written to.

    Raises OSError: It cannot, as the first of several processes finds, which writes there.
    """
    if rank() == 0:
        check_writable(out)
    return Path.cwd() / out


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"
