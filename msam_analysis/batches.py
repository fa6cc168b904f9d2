"""Data as a fixed sequence of batches: the same samples, in the same order, at every evaluation.

A loss over data that shuffles or augments is another function at every pass, and no probe of it means anything; so such
data is refused here, with what to do. Reading never touches the caller's random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from msam_analysis.randomness import RandomStream

Batch = Any
_CACHE_BYTES = 2**30
_END = object()


class Batches:
    """Batches on a device, checked to be the same at every pass.

    Parameters
    ----------
    data
        A loader that does not shuffle, a list of batches, or a single batch: a tuple or list of tensors such as
        ``(x, y)``, or a mapping of tensors. A re-iterable of any other kind also works.
    device
        Where batches are moved.
    dtype
        Floating-point tensors are cast to it; ``None`` leaves them.
    cache_bytes
        Copies of the batches are kept on the device up to this size in all; beyond it, and if they turn out to have
        been written to, batches are read again at every pass. Default 1 GiB.

    Raises
    ------
    TypeError
        The data is not batches: a data set, an iterator that can be read once, a bare tensor.
    ValueError
        The data is empty, shuffles, or differs between two passes.
    """

    def __init__(
        self,
        data: object,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._source = _as_source(data)
        self._device = device
        self._dtype = dtype
        self._cached: list[Batch] | None = []
        kept, self.sizes, sums = 0, [], []
        for raw in _read(self._source):
            self.sizes.append(count_samples(raw))
            batch = self._move(raw)
            if not isinstance(self._source, list):
                sums.append(_fingerprint(raw))
            kept += sum(tensor.nbytes for tensor in _tensors(batch))
            if self._cached is not None:
                self._cached.append(batch)
                if kept > cache_bytes:
                    self._cached = None
        self._versions = self._written()
        if not self.sizes or sum(self.sizes) == 0:
            raise ValueError("the data is empty: expected at least one batch with at least one sample")
        if not isinstance(self._source, list):
            self._check_repeats(sums)

    @property
    def samples(self) -> int:
        """Samples in all batches together."""
        return sum(self.sizes)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over batches on the device, which whoever gets them may write to."""
        if self._written() != self._versions:
            self._cached = None  # a model that works in place
        if self._cached is not None:
            for batch in self._cached:
                yield _map(batch, lambda tensor: tensor)  # containers of its own: loss functions pop their labels
        else:
            for raw in _read(self._source):
                yield self._move(raw)

    def _written(self) -> list[int]:
        """Return how often every cached tensor has been written to."""
        return [tensor._version for batch in self._cached or () for tensor in _tensors(batch)]

    def _move(self, batch: Batch) -> Batch:
        """Return a copy on the device: what a model does to its input in place, it does not do to the caller's."""

        def convert(tensor: Tensor) -> Tensor:
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(device=self._device, dtype=dtype, copy=True)

        with torch.inference_mode(mode=False):  # tensors made inside of it could not be used outside
            return _map(batch, convert)

    def _check_repeats(self, sums: list[tuple[float, ...]]) -> None:
        # Another seed: what depends on the random state shows.
        again = [_fingerprint(raw) for raw in _read(self._source, seed=1)]
        if again != sums:
            raise ValueError(
                "the data differs between two passes (it shuffles, or augments at random): expected the same batches; "
                "use DataLoader(..., shuffle=False) without random augmentation, or list(loader) to freeze one pass"
            )


def _read(source: Iterable[Batch], seed: int = 0) -> Iterator[Batch]:
    """Read one pass from a random stream of its own; a loader's own generator is given back as it was."""
    if isinstance(source, list):
        yield from source
        return
    stream = RandomStream(seed)
    generators = _generators(source)
    states = [generator.get_state() for generator in generators]
    try:
        with stream:
            for generator in generators:
                generator.manual_seed(seed)
            iterator = iter(source)
        while True:
            with stream:
                item = next(iterator, _END)
            if item is _END:
                return
            yield item
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(source: object) -> list[torch.Generator]:
    holders = (source, getattr(source, "sampler", None), getattr(source, "batch_sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _as_source(data: object) -> Iterable[Batch]:
    if isinstance(data, DataLoader):
        _refuse_shuffling(data)
        return data
    if isinstance(data, Mapping) or (
        isinstance(data, list | tuple) and data and all(isinstance(item, Tensor) for item in data)
    ):
        return [data]
    if isinstance(data, Tensor):
        raise TypeError("data is a bare tensor: expected batches; pass one batch as a tuple (inputs, targets)")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"data is a data set ({type(data).__name__}): expected batches; wrap it in DataLoader(data, batch_size=256)"
        )
    if isinstance(data, list | tuple):
        return list(data)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data must be batches that can be iterated, got {type(data).__name__}: pass a loader or a list"
        )
    if iter(data) is data:
        raise TypeError("data is an iterator, which can be read only once: pass list(data), or a loader")
    return data


def _refuse_shuffling(loader: DataLoader[Any]) -> None:
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    for sampler in samplers:
        shuffles = isinstance(sampler, RandomSampler | WeightedRandomSampler) or (
            isinstance(sampler, DistributedSampler) and sampler.shuffle
        )
        if shuffles:
            raise ValueError(
                f"the loader shuffles (its sampler is a {type(sampler).__name__}): expected the same batches at "
                "every pass; use DataLoader(..., shuffle=False)"
            )


def _tensors(batch: Batch) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def _map(batch: Batch, convert: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, Tensor):
        return convert(batch)
    if isinstance(batch, Mapping):
        items = {key: _map(value, convert) for key, value in batch.items()}
        # Hugging Face's BatchEncoding is a mapping whose attributes are its keys: keep its kind where that is possible.
        return items if type(batch) is dict else _rebuild(batch, items)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(value, convert) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_map(value, convert) for value in batch)
    return batch


def _rebuild(batch: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    try:
        return type(batch)(items)  # type: ignore[call-arg]  # most mappings take one; those that do not become a dict
    except TypeError:
        return items


def count_samples(batch: Batch) -> int:
    """Return the leading dimension of the first tensor in a batch; ``TypeError`` if there is none."""
    for tensor in _tensors(batch):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise TypeError(
        f"a batch holds no tensor with a sample dimension (got {type(batch).__name__}): expected (inputs, "
        "targets), or a mapping of tensors whose first dimension counts samples"
    )


def _fingerprint(batch: Batch) -> tuple[float, ...]:
    """Return numbers that change when the content or the order of a batch changes."""
    marks: list[float] = []
    for tensor in _tensors(batch):
        flat = tensor.detach().reshape(-1)
        if flat.is_complex():
            flat = torch.view_as_real(flat).reshape(-1)
        flat = flat.cpu().double()
        weights = torch.arange(1, flat.numel() + 1, dtype=torch.float64).sqrt()
        marks += [float(flat.numel()), float(torch.nan_to_num(flat).dot(weights))]
    return tuple(marks)
