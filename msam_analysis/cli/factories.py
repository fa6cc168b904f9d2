"""Models, data and losses from the user's own functions, which the command line names."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msam_analysis.checkpoints.loading import load_model
from msam_analysis.objective.objective import Objective


def load_objectives(
    checkpoints: Sequence[Path],
    model: str,
    data: str,
    loss: str | None,
    *,
    batchnorm: str,
    device: str | None,
    parameters: Sequence[str] | None = None,
) -> list[Objective]:
    """Return an objective for every checkpoint on the same data; evaluate each once to see that all fit together.

    ``model``, ``data``, ``loss``: References to factories: of the module; of batches, or ``(batches, loss_fn)``; and of
        ``loss_fn``.
    """
    factory, batches, loss_fn = parts(model, data, loss, device)
    chosen: dict[str, Any] = {"batchnorm": batchnorm, "device": device, "parameters": parameters}
    with returning():
        objectives = [Objective(load_model(path, factory), loss_fn, batches, **chosen) for path in checkpoints]
    try:
        with returning():
            for objective in objectives:
                objective.loss()
    except Exception as error:
        raise ValueError(f"model, data and loss do not work together: {brief(error)}") from error
    return objectives


def parts(model: str, data: str, loss: str | None, device: str | None) -> tuple[Callable[..., Any], Any, Any]:
    """Return the model's factory, the batches and the loss that references name.

    Raises TypeError, ValueError: A factory is missing or fails, or this machine does not have the device.
    """
    batches = make(data)
    loss_fn: Any = nn.CrossEntropyLoss()
    if isinstance(batches, tuple) and len(batches) == 2 and callable(batches[1]):
        batches, loss_fn = batches
    if loss is not None:
        loss_fn = own_loss if loss == "transformers" else make(loss)
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {brief(error)}") from error
    return load_object(model), batches, loss_fn


@contextlib.contextmanager
def returning() -> Iterator[None]:
    """Raise ``ValueError`` where a user's function ends the program in place of returning."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(
            f"a function of yours ended the program (exit code {error.code}): expected it to return"
        ) from error


def own_loss(model: nn.Module, batch: Any) -> Any:
    """Return the output of a model of transformers, which holds its loss: it is weighted by the labels that count."""
    return model(**batch)


def load_object(reference: str) -> Callable[[], Any]:
    """Import ``package.module:name``, also from the working directory, and return the object."""
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"expected package.module:factory, got {reference!r}: for example mypackage.models:resnet")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with returning():
            found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name!r} ({brief(error)}): check the name, the folder you are in and the module"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name!r} has no {attribute!r}: check the name after the colon")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{reference!r} is a {type(found).__name__}: expected a function without arguments")
    return found  # type: ignore[no-any-return]  # it is callable


def make(reference: str) -> Any:
    """Call the factory of a reference."""
    factory = load_object(reference)
    try:
        with returning():
            return factory()
    except Exception as error:
        raise ValueError(f"{reference} failed with {brief(error)}") from error


def brief(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:500].removesuffix(": ")
