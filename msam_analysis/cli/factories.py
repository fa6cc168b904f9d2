"""What a user names on the command line: models, data and losses made by functions of their own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msam_analysis.checkpoints.loading import load_model
from msam_analysis.objective.batchnorm import Policy
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
    """Return the loss of every checkpoint on the same data, evaluated once to see that all fit together.

    Parameters
    ----------
    checkpoints
        Files of weights.
    model, data, loss
        References to factories: of the module; of batches, or ``(batches, loss_fn)``; of ``loss_fn``.
    batchnorm, device, parameters
        As for :class:`~msam_analysis.Objective`.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        A file, a factory or what it returned is not what it should be.
    """
    factory, batches = partial(make, model), make(data)
    loss_fn: Any = nn.CrossEntropyLoss()
    if isinstance(batches, tuple) and len(batches) == 2 and callable(batches[1]):
        batches, loss_fn = batches
    if loss is not None:
        loss_fn = make(loss)
    check_device(device)
    chosen: dict[str, Any] = {"batchnorm": as_policy(batchnorm), "device": device, "parameters": parameters}
    objectives = [Objective(load_model(path, factory), loss_fn, batches, **chosen) for path in checkpoints]
    for objective in objectives:
        check_fit(objective)
    return objectives


def as_policy(name: str) -> Policy:
    """Return a BatchNorm policy; the objective refuses names that are none."""
    return name  # type: ignore[return-value]  # checked, with a sentence, where it is used


def load_object(reference: str) -> Callable[[], Any]:
    """Import ``package.module:name`` (the working directory included) and return what is there.

    Raises
    ------
    ValueError
        The reference is not of that form, or names nothing.
    TypeError
        What it names cannot be called.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"expected package.module:factory, got {reference!r}: for example mypackage.models:resnet")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
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
    return found  # type: ignore[no-any-return]  # callable, as just checked


def make(reference: str) -> Any:
    """Call the factory that a reference names.

    Raises
    ------
    ValueError
        The factory raised something.
    """
    factory = load_object(reference)
    try:
        return factory()
    except Exception as error:
        raise ValueError(f"{reference} failed with {brief(error)}") from error


def check_device(device: str | None) -> None:
    """Refuse a device that this machine, or this build of torch, does not have.

    Raises
    ------
    ValueError
        A tensor cannot be made there.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {brief(error)}") from error


def check_fit(objective: Objective) -> None:
    """Refuse data that the model or the loss cannot take.

    Raises
    ------
    ValueError
        The loss could not be evaluated.
    """
    try:
        objective.loss()
    except Exception as error:
        raise ValueError(f"model, data and loss do not work together: {brief(error)}") from error


def brief(error: Exception) -> str:
    """Return the kind and the first line of what somebody else's code raised."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:500].removesuffix(": ")
