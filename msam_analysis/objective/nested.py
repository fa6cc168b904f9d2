"""Batches and outputs of any structure: tensors in mappings, tuples, lists and data classes, however nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Batch = Any


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """Iterate over the tensors in any nesting of mappings, tuples, lists and data classes, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping) or is_record(batch):
        for value in (batch if isinstance(batch, Mapping) else fields_of(batch)).values():
            yield from tensors_of(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors_of(value)


def map_tensors(batch: Batch, convert: Callable[[Tensor], Tensor]) -> Batch:
    """Return the same nesting with every tensor converted; containers are new, other items are kept."""
    if isinstance(batch, Tensor):
        return convert(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(value, convert) for key, value in batch.items()}
        # Hugging Face's BatchEncoding is a mapping whose attributes are its keys: keep its kind where that is possible.
        return items if type(batch) is dict else _rebuild(batch, items)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, convert) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, convert) for value in batch)
    if is_record(batch):
        return dataclasses.replace(batch, **map_tensors(fields_of(batch), convert))
    return batch


def is_record(batch: object) -> bool:
    """Whether a batch is an instance of a data class."""
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def fields_of(record: Any) -> dict[str, Any]:
    """Return what a data class is made from, by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.init}


def _rebuild(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    try:
        return type(batch)(items)  # type: ignore[call-arg]  # most mappings take one; those that do not become a dict
    except TypeError:
        return items


def count_samples(batch: Batch) -> int:
    """Return the leading dimension of the first tensor in a batch; ``TypeError`` if there is none."""
    for tensor in tensors_of(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise TypeError(
        f"a batch holds no tensor with a sample dimension (got {type(batch).__name__}): expected (inputs, "
        "targets), or a mapping of tensors whose first dimension counts samples"
    )
