"""Load saved weights into models, without ever running code from the file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msam_analysis.checkpoints import folders
from msam_analysis.checkpoints.files import reason_of
from msam_analysis.checkpoints.matching import Fit, Model, fits
from msam_analysis.checkpoints.reading import Content, existing
from msam_analysis.results.text import printable

_SHOWN = 6  # so many names stand in a message


@dataclass(frozen=True)
class Loaded:
    """A model with the weights of a checkpoint, and what was taken from it.

    Attributes
    ----------
    path
        The file or folder.
    model
        The module with these weights.
    taken
        What was taken, in a line: ``"last.ckpt (torch.save file), step 3000, without the prefix 'state_dict.model.', 62
        tensors of float32"``.
    step, epoch
        How far the training was, from the checkpoint or its name; None where neither says so.
    """

    path: Path
    model: nn.Module
    taken: str
    step: int | None = None
    epoch: int | None = None


def load_weights(path: str | os.PathLike[str], *, key: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a file or a folder.

    Read are ``.safetensors`` and ``torch.save`` files of any age, TorchScript archives (their weights), modules that
    were saved whole, folders of ``save_pretrained`` (also in shards), adapters of peft, folders of
    sentence-transformers and of ``torch.distributed.checkpoint``. torch reads with ``weights_only=True``; objects of
    other classes are passed over, and no code of theirs is run.

    Parameters
    ----------
    path
        The file or the folder.
    key
        Where in the file the state dict lies, as keys joined by dots (``"state_dict"``, ``"ema.shadow"``). Default: the
        only state dict, or the uppermost.

    Returns
    -------
    dict
        Tensors on the CPU, by the names of parameters and buffers.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder, or the folder holds no weights.
    ValueError
        It is no checkpoint (a git-lfs pointer, a web page, an index, ...) or damaged; it cannot be read safely; it
        holds no state dict, or several between which only ``key`` can choose.
    """
    content = folders.read(Path(path))
    sets: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for name, (tensor, holder) in content.tensors.items():
        sets.setdefault(holder, {})[name[len(".".join(holder)) + bool(holder) :]] = tensor
    if key is not None:
        start = f"{key}."
        wanted = {name.removeprefix(start): one for name, one in content.tensors.items() if name.startswith(start)}
        if not wanted:
            raise ValueError(f"{path} holds nothing under {key!r}: expected one of {_keys(content)}; choose another")
        return {name: _copied(path, name, entry.tensor) for name, entry in wanted.items()}
    upper = min((len(holder) for holder in sets), default=0)
    top = {holder: one for holder, one in sets.items() if len(holder) == upper and holder + tuple(one) != ("tensor",)}
    largest = max(top.values(), key=len, default=None)
    if largest is None:
        raise ValueError(
            f"{path} holds no state dict: expected names to tensors, alone or under a key"
            f"{_unread(content)}; save model.state_dict()"
        )
    same = [".".join(holder) for holder, one in top.items() if one.keys() == largest.keys()]
    if len(same) > 1:
        raise ValueError(f"{path} holds {len(same)} sets of weights: expected one; choose one by key, of {same}")
    return {name: _copied(path, name, tensor) for name, tensor in largest.items()}


def load_model(
    path: str | os.PathLike[str],
    factory: Callable[..., nn.Module],
    *,
    prefix: str = "",
    ignore: Sequence[str] = (),
) -> nn.Module:
    """Build a model and load a checkpoint into it: every tensor of the model must be determined, with nothing left.

    The same as ``load(...).model``; see :func:`load`.

    Parameters
    ----------
    path, factory, prefix, ignore
        As for :func:`load`.

    Returns
    -------
    torch.nn.Module
        The loaded model.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        As for :func:`load`.
    """
    return load(path, factory, prefix=prefix, ignore=ignore).model


def load(
    path: str | os.PathLike[str],
    factory: Callable[..., nn.Module],
    *,
    prefix: str = "",
    ignore: Sequence[str] = (),
) -> Loaded:
    """Build a model, load a checkpoint into it, and say what was taken.

    A checkpoint fits when every tensor of the model is determined by it and nothing contradicts. The second name of a
    tied tensor is determined by its twin, an index or counter by the model itself, a frozen weight beside an adapter by
    the factory. Prefixes, nesting and the names that wrappers add (of DistributedDataParallel, FSDP, ``torch.compile``,
    averaged models, Lightning modules, peft) are found by comparing names with the model's; what the model's own hooks
    rename on loading is renamed.

    Parameters
    ----------
    path
        The file or the folder, as for :func:`load_weights`.
    factory
        A function without arguments that returns the module; or a function of the path, or a class with
        ``from_pretrained``, that returns the module with its weights.
    prefix
        With what the names of the weights begin in the checkpoint, nesting included (``"state_dict_ema."``), where it
        holds more than one set that fits. Default: found.
    ignore
        Patterns (``"head.*"``) of names that need not fit: those of the checkpoint are not used, and where it lacks
        those of the model, the factory's values stay.

    Returns
    -------
    Loaded
        The model, with what was taken.

    Raises
    ------
    FileNotFoundError, ValueError
        As for :func:`load_weights`; also ``ValueError`` if names, shapes or kinds of numbers differ, with the first
        that do, or if more than one set of weights fits.
    TypeError
        The factory is a module, or does not return one.
    """
    found = existing(path)
    if whole := _loader(factory):
        model = _module(whole(str(found)))
        return Loaded(found, model, f"{found}, loaded by {getattr(factory, '__name__', factory)}")
    content = folders.read(found)
    model = _module(factory())
    known = Model(model)
    ways = fits(content, known, prefix=prefix, ignore=ignore)
    if not ways:
        raise ValueError(
            f"{path} holds no state dict that fits the model {type(model).__name__}: expected names such as "
            f"{_first(list(known.state))}, found {_first(list(content.tensors)) or 'none'}{_unread(content)}; pass the "
            "factory of the model that was saved"
        )
    best = ways[0]
    if best.problems:
        raise ValueError(
            f"{path} does not fit the model {type(model).__name__}: {'; '.join(best.problems)}{_unread(content)}; "
            "pass the factory of the model that was saved, or ignore names that need not fit"
        )
    different = [way for way in ways[1:] if not _same(way, best, content)]
    if different:
        choices = [repr(way.prefix) for way in (best, *different)]
        raise ValueError(
            f"{path} holds {len(choices)} sets of weights that fit: expected one; choose by the prefix of names, of "
            f"{', '.join(choices)}"
        )
    _fill(model, known, best, content)
    return Loaded(found, model, _taken(found, content, best), content.step, content.epoch)


def _loader(factory: Callable[..., Any]) -> Callable[[str], Any] | None:
    """Return what loads a path by itself: ``from_pretrained`` of a class, or a function with one argument to fill."""
    own: Callable[[str], Any] | None = getattr(factory, "from_pretrained", None)
    if callable(own):
        return own
    if isinstance(factory, nn.Module):  # its own forward would be called with the path
        raise TypeError(
            f"expected a function that returns the model, got a {type(factory).__name__} itself: pass its class, or a "
            "lambda that returns it"
        )
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return factory if [p.default for p in parameters if p.kind in kinds].count(inspect.Parameter.empty) == 1 else None


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model factory must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _fill(model: nn.Module, known: Model, fit: Fit, content: Content) -> None:
    """Load by torch's own function, whose hooks rename what is old."""
    state: dict[str, Any] = {
        fit.added + name.removeprefix(fit.prefix): content.tensors[name].tensor
        for name in fit.unused
        if fit.added + name.removeprefix(fit.prefix) not in known.buffers
    }
    state |= {name: content.tensors[other].tensor for name, other in fit.names.items()}
    for name in fit.tied:
        state[name] = state[str(known.twin(name, fit.names))]
    state |= {name: known.state[name] for name in fit.own}
    with torch.no_grad():
        model.load_state_dict(state, strict=False)


def _same(one: Fit, other: Fit, content: Content) -> bool:
    """Tell whether two ways give every tensor the same values."""
    pairs = ((one.names.get(name), other.names.get(name)) for name in {*one.names, *other.names})
    return all(
        a == b
        or (a is not None and b is not None and torch.equal(content.tensors[a].tensor, content.tensors[b].tensor))
        for a, b in pairs
    )


def _taken(path: Path, content: Content, fit: Fit) -> str:
    said = [f"{path} ({content.kind})"]
    said += [f"{counter} {n}" for counter, n in (("step", content.step), ("epoch", content.epoch)) if n is not None]
    if fit.prefix:
        said.append(f"without the prefix {fit.prefix!r}")
    if fit.added:
        said.append(f"behind the prefix {fit.added!r} of the model")
    if fit.dropped:
        said.append(f"without {', '.join(map(repr, fit.dropped))} in names")
    dtypes = sorted({str(content.tensors[name].tensor.dtype).removeprefix("torch.") for name in fit.names.values()})
    said.append(f"{len(fit.names)} tensor{'s' * (len(fit.names) != 1)} of {' and '.join(dtypes)}")
    unused = tuple(name for name in fit.unused if name not in fit.renamed)
    kinds = ((fit.renamed, "renamed by the model"), (fit.tied, "tied to others"), (fit.own, "the model's own"))
    for names, what in (*kinds, (unused, "not used")):
        if names:
            said.append(f"{len(names)} {what} ({_first(names)})")
    if content.unread:
        said.append(f"not read: {_first([f'{name} at {place}' for name, place in content.unread])}")
    return ", ".join(said)


def _unread(content: Content) -> str:
    if not content.unread:
        return ""
    return f" (not read, since only running them could restore them: {_first([n for n, _ in content.unread])})"


def _copied(path: str | os.PathLike[str], name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of its own; torch cannot copy some of those that are quantised."""
    try:
        return tensor.clone()
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds the tensor {printable(name)!r}, which cannot be copied ({reason_of(error)}): expected plain "
            "tensors; save it as one"
        ) from error


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:_SHOWN])) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )


def _keys(content: Content) -> str:
    return _first(sorted({".".join(entry.holder) for entry in content.tensors.values() if entry.holder}))
