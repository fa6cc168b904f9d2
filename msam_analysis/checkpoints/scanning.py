"""A pickle is looked through before it is read: what it names, and whether it would cost more than it is worth.

Nothing is built. What instructions do to the stack is followed as far as it matters: numbers, names and tuples. A few
bytes of a pickle can ask for gigabytes (a long ``bytearray``, a place far out in the memo), for a depth that ends the
process (tuples are hashed recursively) or for a storage that the file cannot hold.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

MOST_BYTES = 2**26
"""Length of a pickle, in bytes, from which on it is none of weights."""
MOST_OBJECTS = 2**18
"""So many tensors, files in an archive, or objects in containers are more than a checkpoint has."""

_MOST_INSTRUCTIONS = 3_000_000
_MOST_FILLED = 2**20  # bytes that one instruction may fill
_DEEPEST = 100  # nested tuples
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_NUMBERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT", "PUT"}, {"BINGET", "LONG_BINGET", "GET"}
_BYTES = {"ComplexDouble": 16, "ComplexFloat": 8, "Double": 8, "Long": 8, "Float": 4, "Int": 4, "QInt32": 4}
_BYTES |= {"Half": 2, "BFloat16": 2, "Short": 2}  # of a number in torch's storages; those of all others have one
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class CostlyError(ValueError):
    """A pickle asks for more than what it could honestly hold."""


class _Name(str):
    """A class or function that a pickle names."""

    __slots__ = ()


class _Tuple(list[Any]):
    """A tuple of numbers, names, texts, tuples, and None for all else; ``depth``: how far tuples are nested in it."""

    depth = 0


_MARK = object()


def scan(
    stream: BinaryIO, size: int, pickles: int = 1, *, plain: bool = False, records: Mapping[str, int] | None = None
) -> list[str]:
    """Return the classes and functions that the next pickles of a stream name, as ``module.name``.

    ``size``: Bytes that the whole file has: no storage can be larger. ``plain``: Objects may not set what their class
    holds outside of their dictionary. ``records``: Bytes of every storage, by its key: torch would read on behind the
    end of one that is too short. Raises CostlyError; ValueError and whatever :mod:`pickletools` raises on damage.
    """
    names: dict[str, None] = {}
    for _ in range(pickles):
        _Follower(names, size, plain=plain, records=records).follow(_Bounded(stream))
    return list(names)


class _Bounded:
    """A stream that gives no more at once than a pickle may hold."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, MOST_BYTES

    def read(self, count: int) -> bytes:
        return self._took(self._stream.read(min(count, self._left + 1)))

    def readline(self) -> bytes:
        return self._took(self._stream.readline(self._left + 1))

    def tell(self) -> int:
        return self._stream.tell()

    def _took(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise CostlyError(f"its pickle has more than {MOST_BYTES // 2**20} MiB")
        return data


class _Follower:
    """What the instructions of one pickle do to stack and memo."""

    def __init__(self, names: dict[str, None], size: int, *, plain: bool, records: Mapping[str, int] | None) -> None:
        self._names, self._size, self._plain, self._records = names, size, plain, records
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def follow(self, stream: Any) -> None:
        stack, memo = self._stack, self._memo
        for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if number > _MOST_INSTRUCTIONS:
                raise CostlyError(f"its pickle has more than {_MOST_INSTRUCTIONS} instructions")
            name = code.name
            if name in _PUTS or name == "MEMOIZE":
                place = len(memo) if name == "MEMOIZE" else int(str(argument))
                if place > number + 1000:
                    raise CostlyError(f"its pickle numbers an object {place}, which is more than it has")
                memo[place] = stack[-1]
            elif name in _GETS:
                stack.append(memo[int(str(argument))])
            elif name in _NUMBERS or name in _STRINGS:
                stack.append(argument)
            elif name == "MARK":
                stack.append(_MARK)
            elif name in _TUPLES:
                count = _TUPLES[name]
                items = [stack.pop() for _ in range(count)][::-1]
                stack.append(_tuple(items))
            elif name == "TUPLE":
                stack.append(_tuple(self._to_mark()))
            elif name in _SPECIAL:
                _SPECIAL[name](self, argument)
            else:
                self._plainly(code)

    def _to_mark(self) -> list[Any]:
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _plainly(self, code: Any) -> None:
        """Do what every instruction says of itself: so many objects go, so many come."""
        before = [one.name for one in code.stack_before]
        if "mark" in before:
            self._to_mark()
            before = before[: before.index("mark")]
        for _ in before:
            self._stack.pop()
        self._stack += [None] * len(code.stack_after)

    def _named(self, argument: Any) -> None:
        found = str(argument).replace(" ", ".", 1).replace("__builtin__.", "builtins.", 1)
        self._names[found] = None
        self._stack.append(_Name(found))

    def _named_by_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._named(f"{module} {name}")

    def _copied(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _called(self, _: Any) -> None:
        """Follow a call: a number may be a length that is filled."""
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(None)
        if not isinstance(function, _Name) or not isinstance(arguments, _Tuple):
            return
        if function == "torch.Size" and len(arguments) == 1:  # the tuple that it is made of
            self._stack[-1] = arguments[0]
        filled = 1
        for item in arguments:
            for length in item if isinstance(item, _Tuple) else (item,):
                filled *= max(length, 1) if isinstance(length, int) else 1
        if function == "builtins.bytearray" and filled > _MOST_FILLED:
            raise CostlyError(f"its pickle fills {filled} bytes that are not in it")
        if function.startswith("torch.") and function.endswith("Tensor") and filled > max(self._size, _MOST_FILLED):
            raise CostlyError(f"its pickle makes a tensor of {filled} numbers, where the file has {self._size} bytes")

    def _stored(self, _: Any) -> None:
        """Follow a storage: its number of elements stands in its name."""
        found = self._stack.pop()
        self._stack.append(None)
        count = found[4] if isinstance(found, _Tuple) and len(found) > 4 else 0
        if isinstance(count, int) and not 0 <= count <= self._size:
            raise CostlyError(f"it claims a storage of {count} numbers, where the file has {self._size} bytes")
        if self._records is not None:
            self._check_record(found, count)

    def _check_record(self, found: Any, count: Any) -> None:
        """Refuse a storage that is longer than its record."""
        if not isinstance(found, _Tuple) or len(found) < 5 or not isinstance(count, int):
            raise CostlyError("it claims a storage without its length")
        claimed = count * _BYTES.get(str(found[1]).removeprefix("torch.").removesuffix("Storage"), 1)
        there = (self._records or {}).get(str(found[2]))
        if there is not None and there < claimed:
            raise CostlyError(f"it claims a storage of {claimed} bytes, where {there} are there")

    def _set(self, _: Any) -> None:
        state = self._stack.pop()
        if self._plain and isinstance(state, _Tuple) and len(state) == 2:
            raise CostlyError("its pickle sets what it has no business to set")


_SPECIAL: dict[str, Callable[[_Follower, Any], None]] = {
    "GLOBAL": _Follower._named,
    "STACK_GLOBAL": _Follower._named_by_stack,
    "DUP": _Follower._copied,
    "REDUCE": _Follower._called,
    "NEWOBJ": _Follower._called,
    "BINPERSID": _Follower._stored,
    "BUILD": _Follower._set,
}


def _tuple(items: list[Any]) -> _Tuple:
    made = _Tuple(items)
    made.depth = 1 + max((item.depth for item in items if isinstance(item, _Tuple)), default=0)
    if made.depth > _DEEPEST:
        raise CostlyError(f"its pickle nests more than {_DEEPEST} tuples")
    return made
