"""Whether somebody else has written to a tensor: its version counter and its place in memory tell."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from .shards import WHOLE, here

__all__ = ["Watch"]

_VERSION = attrgetter("_version")


class Watch:
    """Remembers how tensors were left, and tells which of them were written since.

    Two integers of each tensor are compared: the counter that torch raises with every write in place, and the address.
    No value is read as long as they are the same. A tensor at a new address (``p.data = ...``, ``model.to(...)``) is
    compared with what lies at the old one: equal values were moved, and are no write. Until then the old values stay
    in memory.

    torch does not raise the counter for writes through ``p.data`` or NumPy, by collectives of ``torch.distributed`` on
    the tensor itself, by the fused optimizers and by replayed CUDA graphs: nobody can see those.
    """

    def __init__(self) -> None:
        self.versions: list[int] = []  # empty while nothing is remembered
        self._places: list[int] = []
        self._held: list[Tensor] = []  # the same memory under another name

    def look(self, tensors: list[Tensor]) -> None:
        """Remember the tensors as they are now. A step that is compiled remembers nothing."""
        if torch.compiler.is_compiling():
            self.forget()
            return
        self.versions, places = _marks(tensors)
        if places != self._places:
            self._places, self._held = places, [t.data for t in here(tensors)]

    def forget(self) -> None:
        """Remember nothing, so that nothing counts as written."""
        self.versions = []

    def written(self, tensors: list[Tensor]) -> list[bool]:
        """Return for each tensor whether it was written; empty if none was. Tensors added since were not."""
        if torch.compiler.is_compiling() or not self.versions:
            return []
        known = tensors[: len(self.versions)]
        versions, places = _marks(known)
        if versions == self.versions and places == self._places:
            return []
        now, before = zip(versions, places, strict=True), zip(self.versions, self._places, self._held, strict=True)
        return [
            version != old_version or (place != old_place and not _holds(held, t))
            for t, (version, place), (old_version, old_place, held) in zip(here(known), now, before, strict=True)
        ]


def _marks(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    """Return the counters of writes, and the addresses."""
    versions = list(map(_VERSION, tensors))
    if not WHOLE.issuperset(map(type, tensors)):  # a DTensor and its part are written one without the other
        tensors = here(tensors)
        versions = list(map(sum, zip(versions, map(_VERSION, tensors), strict=True)))
    return versions, list(map(Tensor.data_ptr, tensors))


def _holds(held: Tensor, tensor: Tensor) -> bool:
    """Whether the memory at the old address still has the values that the tensor has now."""
    if held.shape != tensor.shape or (held.numel() and not held.untyped_storage().nbytes()):
        return False
    return torch.equal(held.to(tensor.device, tensor.dtype), tensor)
