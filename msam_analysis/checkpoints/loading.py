"""Load saved weights, without ever running code from the file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_NESTED = ("model", "state_dict", "model_state_dict", "weights")
_WRAPPERS = ("module.", "_orig_mod.")


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file or a ``torch.save`` file.

    A ``torch.save`` file is read with ``weights_only=True``: a file that would run code is refused. A state dict nested
    under ``model``, ``state_dict``, ``model_state_dict`` or ``weights`` is found.

    Parameters
    ----------
    path
        The file, ``.safetensors`` or written by ``torch.save``.

    Returns
    -------
    dict
        Tensors on the CPU, by the names of parameters and buffers.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file cannot be read safely, or does not hold a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: expected a .safetensors or torch.save file; check the path")
    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors and plain containers, which only running it could restore: expected "
            "a .safetensors file or torch.save(model.state_dict(), path); nothing in it was run"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights ({reason}): the file is damaged or of another kind; expected "
            "a .safetensors file or torch.save(model.state_dict(), path)"
        ) from None
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        came = sorted(map(str, content))[:6] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} holds no state dict (found {came}): expected names to tensors, alone or under one of {_NESTED}"
        )
    return dict(content)


def load_model(path: str | os.PathLike[str], factory: Callable[[], nn.Module]) -> nn.Module:
    """Build a model and load a checkpoint into it; every name and shape must match.

    The prefixes that ``DistributedDataParallel`` and ``torch.compile`` add to names, in any nesting, are removed unless
    the model's own names have them.

    Parameters
    ----------
    path
        The file, as for :func:`load_weights`.
    factory
        A function without arguments that returns the module.

    Returns
    -------
    torch.nn.Module
        The loaded model.

    Raises
    ------
    FileNotFoundError, ValueError
        As for :func:`load_weights`; also ``ValueError`` if names or shapes differ, with the first that do.
    TypeError
        The factory does not return a module.
    """
    weights = load_weights(path)
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model factory must return a torch.nn.Module, got {type(model).__name__}")
    expected = model.state_dict()
    while prefix := next((p for p in _WRAPPERS if _all_start(weights, p) and not _all_start(expected, p)), None):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    reshaped = [n for n in expected if n in weights and expected[n].shape != weights[n].shape]
    if missing or unexpected or reshaped:
        problems = [
            f"{len(names)} {what} (first: {names[0]!r})"
            for names, what in (
                (missing, "missing from the checkpoint"),
                (unexpected, "unknown to the model"),
                (reshaped, "of another shape"),
            )
            if names
        ]
        raise ValueError(
            f"{path} does not fit the model {type(model).__name__}: {'; '.join(problems)}; "
            "pass the factory of the model that was saved"
        )
    model.load_state_dict(weights)
    return model


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)
