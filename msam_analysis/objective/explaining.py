"""Errors of torch that a model met on somebody's batch, in one sentence of ours."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from msam_analysis.objective.examination import ExaminationError
from msam_analysis.objective.nested import Batch, tensors_of
from msam_analysis.objective.private import is_pair


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
