"""The exhibits of the paper as data: the runs that each needs, its table, its figure and its claims."""

from __future__ import annotations

from collections.abc import Sequence

from msam_analysis.studies.exhibits.base import Evidence, Exhibit, Finding, find
from msam_analysis.studies.exhibits.choosing import CHOOSING
from msam_analysis.studies.exhibits.core import CORE, main_tables
from msam_analysis.studies.exhibits.mechanisms import COSINES, MECHANISMS
from msam_analysis.studies.exhibits.models import MODELS_AND_TASKS, SOLUTIONS
from msam_analysis.studies.exhibits.schematic import SCHEMATIC
from msam_analysis.studies.exhibits.stability import STABILITY
from msam_analysis.studies.exhibits.strengths import STRENGTHS, VARIANTS
from msam_analysis.studies.exhibits.wanted import controls, networks
from msam_analysis.studies.prose import of_exhibits

_PAPER = (SCHEMATIC, *CORE, *STRENGTHS, *VARIANTS, *STABILITY, *MECHANISMS, *COSINES, *MODELS_AND_TASKS, *SOLUTIONS)

EXHIBITS: tuple[Exhibit, ...] = tuple(
    sorted((*_PAPER, CHOOSING), key=lambda exhibit: [*of_exhibits()].index(exhibit.name))
)
"""In the order of their words, which is the report's: the paper's order, and then what is not in it."""


def choose(ids: Sequence[str] | None) -> tuple[Exhibit, ...]:
    """Return the exhibits with any of the given ids or names, in the report's order; the main ones for ``None``.

    ``all`` stands for every one, and the head of an id, ``F4``, for all that begin with it: ``F4A``, ``F4B``, ``F4C``.

    Raises ValueError: An id is unknown, or none is given.
    """
    if ids is None:
        return tuple(exhibit for exhibit in EXHIBITS if exhibit.main)
    if "all" in ids:
        return EXHIBITS
    if not ids:
        raise ValueError("no exhibit was chosen: name some, as in F2C,TA1, or all")
    keys = {exhibit.name: {exhibit.name, *_names(exhibit.ids)} for exhibit in EXHIBITS}
    known = set().union(*keys.values())
    unknown = [key for key in ids if key not in known]
    if unknown:
        raise ValueError(f"unknown exhibit {unknown[0]!r}: expected some of {sorted(known)}, or all")
    return tuple(exhibit for exhibit in EXHIBITS if keys[exhibit.name] & set(ids))


def _names(ids: Sequence[str]) -> set[str]:
    """Return ids, and their heads where a letter of a panel follows the number: F4 of F4A, A3 of A3."""
    return {*ids, *(key.rstrip("ABC") for key in ids if key[-1].isalpha() and key[:1] != "T")}


__all__ = ["EXHIBITS", "Evidence", "Exhibit", "Finding", "choose", "controls", "find", "main_tables", "networks"]
