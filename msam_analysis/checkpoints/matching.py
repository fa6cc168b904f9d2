"""Whether a checkpoint determines every tensor of a model: names are matched by a rule, and nothing is guessed."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from msam_analysis.checkpoints.reading import Content, Entry
from msam_analysis.results.text import printable

_FEW = 4  # so many prefixes are tried: those that most names of the model have


@dataclass(frozen=True)
class Fit:
    """One way to read a model's tensors from a checkpoint, and what speaks against it.

    ``names``: The checkpoint's name of each tensor of the model.
    ``prefix``: What the checkpoint's names have before the model's; ``added``: what the model's have before those.
    ``dropped``: Parts of names that only one side has.
    ``unused``: Names of the same mapping, behind the same prefix, that the model does not know.
    ``renamed``: Those of them that the model's own hooks rename.
    ``own``: Tensors that the model's constructor determines; ``tied``: those that a twin determines.
    ``problems``: What contradicts, in words.
    """

    names: Mapping[str, str]
    prefix: str
    added: str
    dropped: tuple[str, ...]
    unused: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class Model:
    """A model's tensors by name, which of them are one, and which its constructor determines."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state: dict[str, Tensor] = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
        parameters = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        self.frozen = {name for name, one in parameters.items() if not one.requires_grad}
        self.buffers = buffers
        everything: dict[str, Tensor] = {**parameters, **buffers}
        self.identity = {name: id(everything[name]) for name in self.state if name in everything}
        self.twins: dict[int, list[str]] = {}
        for name, number in self.identity.items():
            self.twins.setdefault(number, []).append(name)
        # an index, a mask or a counter; a buffer of floating point may be a statistic, which no constructor knows
        self.constants = {name for name, one in buffers.items() if not one.is_floating_point() and not one.is_complex()}

    def twin(self, name: str, known: Mapping[str, str]) -> str | None:
        """Return a name in ``known`` of the same tensor as ``name``."""
        return next((other for other in self.twins.get(self.identity.get(name, -1), ()) if other in known), None)

    def loads(self, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Return what torch finds missing and unexpected once the model's own hooks have renamed what is old.

        Asked of a copy without memory. Raises RuntimeError: Shapes differ.
        """
        everything = [*self.module.parameters(), *self.module.buffers()]
        memo: dict[int, Any] = {}
        for one in everything:
            empty = torch.empty_like(one, device="meta")
            memo[id(one)] = nn.Parameter(empty, one.requires_grad) if isinstance(one, nn.Parameter) else empty
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copies into the empty model do nothing, as is meant
            twin = copy.deepcopy(self.module, memo)
            found = twin.load_state_dict({name: one.to("meta") for name, one in tensors.items()}, strict=False)
        return list(found.missing_keys), list(found.unexpected_keys)


def fits(content: Content, model: Model, *, prefix: str = "", ignore: Sequence[str] = ()) -> list[Fit]:
    """Return the ways to read the model's tensors from ``content``: all that fit, else the one with fewest problems.

    ``prefix``: What all names must begin with.
    ``ignore``: Patterns of names of the checkpoint or the model that need not fit.
    """
    tensors = {name: entry for name, entry in content.tensors.items() if name.startswith(prefix)}
    tried: dict[tuple[tuple[str, str], ...], Fit] = {}
    for raw in (True, False):  # first the names as they are, then without what only one side has
        for fit in _candidates(tensors, model, content.partial, raw):
            judged = _judged(fit, tensors, model, content.partial, ignore)
            tried.setdefault(tuple(sorted(judged.names.items())), judged)
        good = [fit for fit in tried.values() if not fit.problems]
        if good:
            return good
    return sorted(tried.values(), key=lambda fit: -len(fit.names))[:1]


def _candidates(tensors: Mapping[str, Entry], model: Model, partial: bool, raw: bool) -> Iterator[Fit]:
    """Yield renamings: prefixes of the checkpoint, prefixes of the model, and parts that only one side has."""
    theirs = {name: name for name in tensors}
    wanted = [name for name in model.state if not (partial and name in model.frozen)]
    ours = {name: name for name in wanted}
    dropped: tuple[str, ...] = ()
    if not raw:
        parts, others = (_parts(names) for names in (tensors, wanted))
        theirs, ours = _without(tensors, parts - others), _without(wanted, others - parts)
        gone = ((parts - others, theirs), (others - parts, ours))
        dropped = tuple(sorted(set[str]().union(*(_lost(side, names) for side, names in gone))))
        if not dropped:
            return
    common = _common(list(ours))
    for added in ["".join(f"{part}." for part in common[:n]) for n in range(len(common) + 1)]:
        short = {name.removeprefix(added): name for name in ours}
        counts: Counter[str] = Counter()
        for name in theirs:
            parts_of = name.split(".")
            for n in range(len(parts_of)):
                if ".".join(parts_of[n:]) in short:
                    counts["".join(f"{part}." for part in parts_of[:n])] += 1
        for found, count in counts.most_common(_FEW):
            if count * 2 >= counts.most_common(1)[0][1]:
                names = {ours[full]: theirs[found + key] for key, full in short.items() if found + key in theirs}
                yield Fit(names, found, added, dropped)


def _judged(fit: Fit, tensors: Mapping[str, Entry], model: Model, partial: bool, ignore: Sequence[str]) -> Fit:
    """Say what a renaming leaves open and what contradicts it."""
    names, taken = dict(fit.names), set(fit.names.values())
    missing, own, tied = [], [], []
    for name in model.state:
        if name in names:
            continue
        if model.twin(name, names) is not None:
            tied.append(name)
        elif name in model.constants or _any(name, ignore) or (partial and name in model.frozen):
            own.append(name)
        else:
            missing.append(name)
    holders = {tensors[name].holder for name in taken}
    unused = [n for n in tensors if n not in taken and n.startswith(fit.prefix) and tensors[n].holder in holders]
    unknown = [n for n in unused if not _known(n, fit, tensors, model, ignore)]
    strange = unknown
    if (missing or unknown) and not fit.dropped and not fit.added:
        missing, unknown = _renamed(fit, tensors, model, missing, unknown, unused)
    renamed = tuple(name for name in strange if name not in unknown)
    compared = {name: other for name, other in names.items() if not _any(name, ignore)}
    pairs = {name: (model.state[name], tensors[other].tensor) for name, other in compared.items()}
    reshaped = [name for name, (ours, theirs) in pairs.items() if not is_lazy(ours) and ours.shape != theirs.shape]
    kinds = [name for name, (ours, theirs) in pairs.items() if not _castable(theirs, ours)]
    split = [
        name
        for name in names
        if (twin := model.twin(name, names)) not in (None, name)
        and not torch.equal(tensors[names[name]].tensor, tensors[names[str(twin)]].tensor)
    ]
    problems = _problems(missing, unknown, reshaped, kinds, split, pairs)
    return Fit(names, fit.prefix, fit.added, fit.dropped, tuple(unused), renamed, tuple(own), tuple(tied), problems)


def _problems(
    missing: list[str],
    unknown: list[str],
    reshaped: list[str],
    kinds: list[str],
    split: list[str],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[str, ...]:
    """Say how many names each contradiction has, with the first."""
    said = []
    for names, what in (
        (missing, "missing from the checkpoint"),
        (unknown, "unknown to the model"),
        (reshaped, "of another shape"),
        (kinds, "of another kind of number"),
        (split, "different where the model has one tensor"),
    ):
        if names:
            ours, theirs = pairs.get(names[0], (None, None))
            found = ""
            if names is reshaped and ours is not None and theirs is not None:
                found = f", {list(theirs.shape)} in place of {list(ours.shape)}"
            if names is kinds and ours is not None and theirs is not None:
                found = f", {_dtype(theirs)} in place of {_dtype(ours)}"
            said.append(f"{len(names)} {what} (first: {printable(names[0])!r}{found})")
    return tuple(said)


def _renamed(
    fit: Fit, tensors: Mapping[str, Entry], model: Model, missing: list[str], unknown: list[str], unused: list[str]
) -> tuple[list[str], list[str]]:
    """Let the model's own hooks rename what was saved by an older version."""
    given = {n.removeprefix(fit.prefix): tensors[n].tensor for n in [*fit.names.values(), *unused]}
    try:
        lacking, strange = model.loads(given)
    except Exception:  # noqa: BLE001 -- a model that cannot be copied, or shapes that differ: said by what calls this
        return missing, unknown
    return [n for n in missing if n in lacking], [n for n in unknown if n.removeprefix(fit.prefix) in strange]


def _known(name: str, fit: Fit, tensors: Mapping[str, Entry], model: Model, ignore: Sequence[str]) -> bool:
    """Tell whether a name that is not used agrees with the model: a constant that is no longer saved, or ignored."""
    inner = fit.added + name.removeprefix(fit.prefix)
    if _any(name, ignore) or _any(inner, ignore):
        return True
    constant = model.buffers.get(inner)
    tensor = tensors[name].tensor
    return constant is not None and constant.shape == tensor.shape and bool((constant.cpu() == tensor).all())


def _castable(theirs: Tensor, ours: Tensor) -> bool:
    """Tell whether the numbers can be those of the weights: small integers and 8-bit floats need a scale."""
    if ours.is_floating_point():
        return theirs.is_floating_point() and (theirs.element_size() > 1 or theirs.dtype == ours.dtype)
    if ours.is_complex():
        return theirs.is_complex()
    return not theirs.is_floating_point() and not theirs.is_complex()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _parts(names: Iterable[str]) -> set[str]:
    """Return the parts of dotted names that are words."""
    return {part for name in names for part in name.split(".") if not part.isdigit()}


def _without(names: Iterable[str], parts: set[str]) -> dict[str, str]:
    """Return the names without ``parts``, but for those at their beginning, to the names as they are."""
    short: dict[str, str] = {}
    for name in names:
        split = name.split(".")
        first = next((n for n, part in enumerate(split) if part not in parts), len(split))
        kept = [part for n, part in enumerate(split) if n < first or part not in parts]
        short.setdefault(".".join(kept), name)
    return short


def _lost(parts: set[str], names: Mapping[str, str]) -> set[str]:
    """Return those of ``parts`` that a name has, and its short form has not."""
    found = (parts.intersection(name.split(".")).difference(short.split(".")) for short, name in names.items())
    return set[str]().union(*found)


def _common(names: Sequence[str]) -> list[str]:
    """Return the parts with which all names begin."""
    split = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common
