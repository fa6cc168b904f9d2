"""One flat vector and the tensors it stands for.

Every point, gradient and direction in this package is a flat 1-D tensor. A :class:`Layout` says which slice of it
belongs to which parameter and gives views, never copies.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from msam.perturbation import has_float64

_DRAWN = 2**20  # random numbers that are drawn at a time
ParameterFilter = Callable[[str, nn.Parameter], bool]
Selection = str | Iterable[str] | ParameterFilter | None


@dataclass(frozen=True)
class Layout:
    """Names (as in ``model.named_parameters()``) and shapes of the tensors that a flat vector is made of, in order."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Split a vector of shape ``(size,)`` into views by name, of the parameters' shapes, that share its memory."""
        self.check(vector)
        pieces = torch.split(vector, list(self.sizes))
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """Concatenate tensors, given in the layout's order, to a new flat vector of shape ``(size,)``."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def check(self, vector: Tensor, what: str = "vector") -> None:
        """Raise ``ValueError`` unless ``vector`` is flat and of the right length."""
        if not isinstance(vector, Tensor) or vector.shape != (self.size,):
            came = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(
                f"expected a flat {what} of shape ({self.size},), one entry per selected parameter element; "
                f"got {came}: build it with objective.vector(...) or a function of msam_analysis.landscape.directions"
            )


def flat_of(
    layout: Layout, tensors: Mapping[Any, Tensor], parameters: Mapping[str, nn.Parameter], part: Callable[..., Tensor]
) -> Tensor:
    """Return the flat vector of tensors by parameter or name; ``part(name, tensor)`` is what this process has of one.

    Raises ValueError: A shape is not its parameter's, or no key belongs to a parameter.
    """
    pieces, found = [], 0
    for name, parameter in parameters.items():
        tensor = next((tensors[key] for key in (parameter, name) if key in tensors), None)
        if tensor is None:
            tensor = torch.zeros_like(parameter)
        elif tensor.shape != parameter.shape:
            raise ValueError(f"expected shape {tuple(parameter.shape)} for {name!r}, got {tuple(tensor.shape)}")
        else:
            found += 1
        pieces.append(part(name, tensor.detach()))
    if tensors and not found:
        raise ValueError(
            "none of the tensors belongs to a parameter of this objective: expected the same model's parameters; "
            "build the objective and the optimizer from one model"
        )
    return layout.flatten(pieces)


def select(model: nn.Module, parameters: Selection) -> dict[str, nn.Parameter]:
    """Return the parameters that a selection names, in the model's order, tied ones once."""
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if isinstance(parameter, UninitializedParameter):
            raise TypeError(
                f"the parameter {name!r} has no shape yet (a lazy layer): expected a model that has seen a batch; run "
                "model(inputs) once"
            )
        if parameter.is_complex():
            raise TypeError(
                f"the parameter {name!r} is complex: expected real parameters; keep torch.view_as_real(weight) as the "
                "parameter and make it complex in forward"
            )
    if parameters is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        if not chosen:
            raise ValueError(
                f"the model has no parameter with requires_grad=True among its {len(named)}: "
                "unfreeze some, or select frozen ones by name with parameters=..."
            )
        return chosen
    wanted = parameters if callable(parameters) else _matcher(named, parameters)
    chosen = {name: parameter for name, parameter in named.items() if wanted(name, parameter)}
    if not chosen:
        raise ValueError(f"parameters selects nothing: expected at least one of {_some(named)}")
    return chosen


def _matcher(named: Mapping[str, object], parameters: str | Iterable[str]) -> ParameterFilter:
    """Return a predicate of name patterns, each of which must name a parameter."""
    patterns = [parameters] if isinstance(parameters, str) else list(parameters)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            "parameters must be None, name patterns such as 'layer1.*', or a predicate f(name, parameter); "
            f"got {[type(pattern).__name__ for pattern in patterns]}: pass names, not tensors"
        )
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(
                f"no parameter is named {pattern!r}: expected a pattern that matches one of {_some(named)}"
            )
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has none."""
    return torch.float64 if has_float64(device.type) else torch.float32


def read(*numbers: Tensor) -> list[float]:
    """Return 0-dimensional tensors of one device as numbers; the host waits for the device once, for all of them."""
    found: list[float] = torch.stack([number.to(widest(number.device)) for number in numbers]).tolist()
    return found


def no_autocast(device: torch.device) -> torch.autocast:
    """Return a context that switches a caller's autocast off."""
    return torch.autocast(device.type, enabled=False)


def gaussian(size: int, columns: int, *, seed: int, like: Tensor, use: str = "") -> Tensor:
    """Draw a ``(size, columns)`` standard Gaussian matrix from a private generator seeded with ``seed`` and ``use``.

    The draw is in float64 on the CPU, so that every device and data type sees the same numbers. Draws for different
    uses are independent, also from the same seed.
    """
    draw = torch.randn(size, columns, generator=_generator(seed, use), dtype=torch.float64)
    return draw.to(device=like.device, dtype=like.dtype)


def gaussian_rows(size: int, columns: int, *, seed: int, use: str = "") -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of :func:`gaussian` in float64, in parts that need little memory, each with its first index."""
    generator = _generator(seed, use)
    # torch draws in blocks of 16 numbers, and the last 16 anew where a block is left open: a part ends where one does,
    # and the last part has 16 numbers at least.
    step = 16 * max(_DRAWN // (16 * columns), 1)
    start = 0
    while start < size:
        stop = size if size - start < step + 16 else start + step
        yield start, torch.randn(stop - start, columns, generator=generator, dtype=torch.float64)
        start = stop


def _generator(seed: int, use: str) -> torch.Generator:
    # The generator reads only 32 bits of its seed, so that all of it is hashed into these.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {use}".encode()) if use else seed)


def _some(names: Mapping[str, object] | Sequence[str], limit: int = 6) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
