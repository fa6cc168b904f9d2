"""torch.save files that hold objects of other classes: the tensors are read, and nothing of those classes is run."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from msam_analysis.objective.randomness import Alone


class StandIn:
    """An object in place of one whose class is not run: it keeps the state that the file has for it."""

    name = ""
    state: Any = None

    def __new__(cls, *_arguments: Any, **_named: Any) -> Any:
        """Take any arguments, as the class that it stands for did."""
        return object.__new__(cls)

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        """Do nothing with them."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


_ALONE = Alone()  # torch's list of what is safe is one for all threads
_LOOKED_INTO = (StandIn, dict, list, tuple)


def load(source: Any, names: Sequence[str], **options: Any) -> Any:
    """Return ``torch.load(source, weights_only=True)`` with stand-ins for the classes and functions ``names``.

    torch's own list of what is safe comes first. Threads pass one by one.

    Raises pickle.UnpicklingError and whatever torch.load raises.
    """
    with _ALONE:
        return _loaded(source, names, options)


def _loaded(source: Any, names: Sequence[str], options: dict[str, Any]) -> Any:
    user = torch.serialization.get_safe_globals()
    allowed = {one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}" for one in user}
    made: dict[str, Callable[..., Any]] = {name: _stand_in(name) for name in names if name not in allowed}
    checked = torch.sparse.check_sparse_tensor_invariants(True)  # else indices may lie outside of a tensor
    while True:
        with torch.serialization.safe_globals([(one, name) for name, one in made.items()]), _quiet(), checked:
            if hasattr(source, "seek"):
                source.seek(0)
            try:
                return torch.load(source, map_location="cpu", weights_only=True, **options)
            except pickle.UnpicklingError as error:
                # torch fills only true dicts and lists: a stand-in that the file fills becomes one
                found = re.search(r"Can only (\w+).* got <class '(?:[\w.]+\.)?StandIn of ([^']+)'>", str(error))
                if found is None or not found.group(1).upper().startswith(("SETITEM", "APPEND", "EXTEND")):
                    raise
                made[found.group(2)] = _filled(OrderedDict if found.group(1).upper().startswith("SETITEM") else list)


def stand_ins(content: Any) -> Iterator[tuple[str, str]]:
    """Yield class and place of every stand-in within what :func:`load` returned; each container is looked into once."""
    seen: set[int] = set()
    left: list[tuple[Any, tuple[str, ...]]] = [(content, ())]
    while left:
        found, path = left.pop()
        if isinstance(found, StandIn):
            yield found.name, "".join(f"[{part!r}]" for part in path) or "the whole"
        elif isinstance(found, (dict, list, tuple)) and id(found) not in seen:
            seen.add(id(found))
            items = found.items() if isinstance(found, dict) else enumerate(found)
            # the last first: the next one is taken from the end
            left += [(value, (*path, str(key))) for key, value in items if isinstance(value, _LOOKED_INTO)][::-1]


def _stand_in(name: str) -> type[StandIn]:
    return type(f"StandIn of {name}", (StandIn,), {"name": name})


def _filled(kind: type) -> Callable[..., Any]:
    class Filled:
        def __new__(cls, *_arguments: Any) -> Any:
            return kind()

    return Filled


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of storages and formats that are old: nothing a reader could act on
        yield
