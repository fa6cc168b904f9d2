"""Errors that somebody's code raised, or torch on somebody's batch, in one sentence of ours."""

from __future__ import annotations

import os
import sysconfig
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msam_analysis.objective.examination import ExaminationError
from msam_analysis.objective.nested import Batch, tensors_of
from msam_analysis.objective.private import is_pair
from msam_analysis.results.text import printable

_LONGEST = 500  # characters of a message
_HOUSE = Path(__file__).resolve().parents[1]
_NOT_THEIRS = tuple(f"{place}{os.sep}" for place in (_HOUSE, _HOUSE.with_name("msam"), sysconfig.get_path("stdlib")))


@contextmanager
def explained(batch: Batch) -> Iterator[None]:
    """Say in a sentence what went wrong inside of torch when a model met somebody's batch."""
    try:
        yield
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        if _raised_on_purpose(error):
            raise
        kind = "(input, target)" if is_pair(batch) else _structure(batch)
        call = "loss_fn(model(input), target)" if is_pair(batch) else "loss_fn(model, batch)"
        raise ExaminationError(
            f"the loss cannot be evaluated: {call} on a batch of the kind {kind} raised {type(error).__name__} "
            f"({str(error).splitlines()[0] if str(error) else 'without a message'}): expected a model and a loss_fn "
            "that fit the batches; a criterion(output, target) takes batches (input, target), any other batch goes as "
            "a whole to loss_fn(model, batch)"
        ) from error


def _raised_on_purpose(error: BaseException) -> bool:
    """Whether an error comes from a ``raise`` of the user's or of ours, and not from inside of torch."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (last.line or "").startswith("raise") and f"{os.sep}torch{os.sep}" not in last.filename


def _structure(batch: Batch) -> str:
    inside = ", ".join(map(str, batch)) if isinstance(batch, dict) else f"{len(list(tensors_of(batch)))} tensors"
    return f"{type(batch).__name__} ({inside})"


@contextmanager
def decorated(what: str, failed: list[str]) -> Iterator[None]:
    """Go on where a picture or a page cannot be made, and note it: the numbers are in their files already."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box stands for the character
            warnings.filterwarnings("ignore", message="Data has no positive values")
            yield
    except Exception as error:  # noqa: BLE001 - whatever a library for pictures raises
        failed.append(f"{what} could not be made, all else is there: {told(error)}")


def told(error: BaseException) -> str:
    """Return an error of somebody's code in one sentence: its kind, its message, and the line of that code."""
    what = "it ended the program" if isinstance(error, SystemExit) else " ".join(str(error).split())
    text = printable(f"{type(error).__name__}: {what}".removesuffix(": "), _LONGEST)
    line = where(error)
    return f"{text} ({line})" if line else text


def where(error: BaseException) -> str:
    """Return file and line of the code that an error comes from, if it is neither ours nor of a library; else ""."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        for frame in reversed(traceback.extract_tb(one.__traceback__)):
            if not frame.filename.startswith((*_NOT_THEIRS, "<")) and "-packages" + os.sep not in frame.filename:
                return printable(f"{frame.filename}, line {frame.lineno}", None)
        one = one.__cause__ or one.__context__
    return ""
