"""Data as a fixed sequence of batches: the same samples, in the same order, at every evaluation.

A loss over data that shuffles or augments is another function at every pass, and no measurement of it means anything.
Such data is refused here, with what to do. Reading never touches the caller's random state.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from msam_analysis.objective.nested import Batch, count_samples, fields_of, is_record, map_tensors, tensors_of
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.objective.ranks import Ranks
from msam_analysis.results import ApproximationWarning
from msam_analysis.results.fingerprint import fingerprint, of_tensors

CACHE_BYTES = 2**30
_END = object()
_ENDLESS = 2**20  # batches after which data without a length are taken to be endless


class Batches:
    """Batches on a device, checked to be the same at every pass.

    Copies of the batches are kept on the device up to ``cache_bytes`` in all. Beyond it, and where something wrote to
    them, they are read again at every pass. ``dtype`` is that of floating-point tensors; ``None`` leaves them.

    Several ``ranks`` share the batches: each keeps its own alone. All of them have the same ``data``, of which they
    take batches in turn, or (``split``) each has other data, which come one after the other.

    Attributes
    ----------
    ranks
        The processes that share the batches.
    sizes
        Samples in every batch, those of other processes included.
    own
        Numbers of the batches that this process reads, among those of all.
    """

    def __init__(
        self,
        data: object,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        cache_bytes: int = CACHE_BYTES,
        ranks: Ranks | None = None,
        split: bool = False,
    ) -> None:
        self.ranks, self.split = ranks or Ranks(together=False), split
        self._device, self._dtype = device, dtype
        self._cached: list[Batch] | None = []
        self._alike = False
        self._fit = True  # whether the batches of every process fit its cache
        self.cache_bytes = cache_bytes
        with self.ranks.apart("reading the data"):
            if isinstance(data, Batches):
                _check_sharing(data, self.ranks, split=split)
            self._source = _as_source(data)
            if split:
                _warn_of_repeats(data)
            sums = self._first_pass()
            if not isinstance(self._source, list | _Samples):
                self._check_repeats(sums)
        if self.ranks.count > 1:
            self._share(sums)
        if not self.sizes or sum(self.sizes) == 0:
            raise ValueError("the data is empty: expected at least one batch with at least one sample")

    def _first_pass(self) -> list[str]:
        """Read everything once: keep what is this process's own, as far as there is room; return hashes."""
        self.nbytes, self.sizes, sums, kept = 0, list[int](), list[str](), list[Batch]()
        source, count = self._source, self.ranks.count
        given = isinstance(source, _Samples)
        # Of other batches, and of data that are divided, each process has its own part alone.
        whole = count > 1 and (given or not (self.split or isinstance(source, Batches)))
        for number, raw in enumerate(_read(source)):
            self.sizes.append(count_samples(raw))
            if not isinstance(source, list | _Samples) or (whole and not given):
                sums.append(of_tensors(tensors_of(raw)))
            if whole and number % count != self.ranks.rank:
                continue
            if whole and given:  # they cannot be read again by one process alone
                kept.append(raw)
            batch = self._move(raw)
            self.nbytes += sum(tensor.nbytes for tensor in tensors_of(batch))
            if self._cached is not None:
                self._cached.append(batch)
                if self.nbytes > self.cache_bytes:
                    self._cached = None
        self.own = self._places = range(self.ranks.rank if whole else 0, len(self.sizes), count if whole else 1)
        if whole and given:
            self._source, self._places = _Given(kept), range(len(kept))
        self._versions = self._written()
        return sums

    def _share(self, sums: list[str]) -> None:
        """Find out about the batches of the other processes."""
        found = self.ranks.everyone((self.sizes, self._cached is not None))
        self._fit = all(fits for _, fits in found)
        if isinstance(self._source, Batches):
            self.own, self.sizes = self._source.own, self._source.sizes
        elif self.split and not isinstance(self._source, _Given):
            start = sum(len(sizes) for sizes, _ in found[: self.ranks.rank])
            self.own = range(start, start + len(self.sizes))
            self.sizes = [size for sizes, _ in found for size in sizes]
        elif not self.split:
            advice = "; say ranks='split' for data that are divided among the processes already"
            self.ranks.check_alike({"data": fingerprint(sums, self.sizes)}, advice)

    @classmethod
    def shared(
        cls,
        data: object,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        cache_bytes: int,
        ranks: Ranks,
        split: bool,
    ) -> Batches:
        """Return ``data`` itself where it is batches on this device in this data type, else batches made of it."""
        if isinstance(data, Batches) and (data._device, data._dtype) == (device, dtype):
            _check_sharing(data, ranks, split=split)
            return data
        return cls(data, device=device, dtype=dtype, cache_bytes=cache_bytes, ranks=ranks, split=split)

    @classmethod
    def of(cls, batches: Sequence[Batch], *, device: torch.device, dtype: torch.dtype | None) -> Batches:
        """Return these batches as they are, whatever they hold."""
        return cls(_Given(batches), device=device, dtype=dtype)

    @property
    def fits(self) -> bool:
        """Whether copies of all batches are kept on the devices."""
        return self._fit if self.ranks.count > 1 else self._cached is not None

    @property
    def own_sizes(self) -> list[int]:
        """Samples in every batch that this process reads."""
        return [self.sizes[number] for number in self.own]

    @property
    def samples(self) -> int:
        """Samples in all batches together."""
        return sum(self.sizes)

    def __len__(self) -> int:
        """Return the number of batches, those of other processes included."""
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over this process's batches on the device; whoever gets them may write to them."""
        return self.read(self.own)

    def read(self, wanted: Sequence[int]) -> Iterator[Batch]:
        """Iterate over some of this process's batches only, given by increasing numbers."""
        if self._written() != self._versions:
            self._cached = None  # a model worked in place on them
        if self._cached is not None:
            for number in wanted:
                # Containers are new at every pass: some loss functions pop their labels.
                yield map_tensors(self._cached[self.own.index(number)], lambda tensor: tensor)
        else:
            chosen = {self._places[self.own.index(number)] for number in wanted}
            for index, raw in enumerate(_read(self._source)):
                if index in chosen:
                    yield self._move(raw)

    def take(self, indices: Tensor, batch_size: int | None = None) -> Batches:
        """Return batches of chosen samples, in this order; see :meth:`msam_analysis.Objective.with_samples`."""
        with self.ranks.apart("choosing samples") as alike:
            _check_indices(indices, self.samples)
            size = max(self.sizes) if batch_size is None else batch_size
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"batch_size must be a positive integer, got {size!r}")
            if not self._alike:
                _check_alike(self)
                self._alike = True
            alike.append(indices.double())
        source = _Samples(self, indices.detach().cpu().long(), size)
        how: dict[str, Any] = {"ranks": self.ranks, "split": self.split}
        return Batches(source, device=self._device, dtype=self._dtype, cache_bytes=self.cache_bytes, **how)

    def first(self) -> Batch:
        """Return the first batch, in every process."""
        return next(iter(self)) if self.ranks.count == 1 else self.gathered([0])[0]

    def gathered(self, wanted: Sequence[int], choose: Callable[[int, Batch], Batch] | None = None) -> list[Batch]:
        """Return some batches, given by increasing numbers, or what is chosen of them, in every process."""
        mine = [number for number in wanted if number in self.own]
        with self.ranks.apart("handing batches on"):
            read = zip(mine, self.read(mine), strict=True)
            found = {number: choose(number, batch) if choose else batch for number, batch in read}
        if self.ranks.count > 1:
            sent = {number: map_tensors(batch, Tensor.cpu) for number, batch in found.items()}
            theirs = {number: batch for each in self.ranks.everyone(sent) for number, batch in each.items()}
            found = {number: map_tensors(theirs[number], lambda tensor: tensor.to(self._device)) for number in wanted}
        return list(found.values())

    def fingerprint(self) -> str:
        """Return a hash of what all batches hold."""
        if self.ranks.count == 1:
            return of_tensors(tensor for batch in self for tensor in tensors_of(batch))
        with self.ranks.apart("reading the data"):
            mine = [(number, of_tensors(tensors_of(batch))) for number, batch in zip(self.own, self, strict=True)]
        return fingerprint(sorted(one for each in self.ranks.everyone(mine) for one in each))

    def _written(self) -> list[int]:
        """Return how often every cached tensor has been written to."""
        return [tensor._version for batch in self._cached or () for tensor in tensors_of(batch)]

    def _move(self, batch: Batch) -> Batch:
        """Return a copy on the device, so that a model that writes to its input does not write to the caller's."""

        def convert(tensor: Tensor) -> Tensor:
            if tensor.layout != torch.strided:
                raise ValueError(
                    f"a batch holds a tensor of layout {tensor.layout}: expected dense ones; pass tensor.to_dense(), "
                    "or indices and values, and make it sparse in forward"
                )
            dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(device=self._device, dtype=dtype, copy=True)

        with torch.inference_mode(mode=False):  # tensors that are made inside of it cannot be used outside
            return map_tensors(batch, convert)

    def _check_repeats(self, sums: list[str]) -> None:
        # The seed is another one, which shows what depends on the random state.
        again = [of_tensors(tensors_of(raw)) for raw in _read(self._source, seed=1)]
        if again != sums:
            raise ValueError(
                "the data differs between two passes (it shuffles, or augments at random): expected the same batches; "
                "use DataLoader(..., shuffle=False) without random augmentation, or list(loader) to freeze one pass"
            )


class _Given(list[Batch]):
    """Batches that are given as they are: this list is not one batch."""


class _Samples:
    """Chosen samples as batches; one pass over the original serves as many of them as its cache may hold."""

    def __init__(self, batches: Batches, indices: Tensor, size: int) -> None:
        self._batches = batches
        self._chunks = indices.split(size)
        self._starts = torch.tensor([0, *itertools.accumulate(batches.sizes)])
        self._at_once = max(1, batches.cache_bytes * batches.samples // max(1, batches.nbytes * size))

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self._chunks), self._at_once):
            yield from self._gather(self._chunks[first : first + self._at_once])

    def _gather(self, chunks: tuple[Tensor, ...]) -> Iterator[Batch]:
        indices = torch.cat(chunks)
        owners = torch.searchsorted(self._starts, indices, right=True) - 1
        order = owners.argsort(stable=True)
        counts = owners.bincount(minlength=len(self._batches))
        rows = (indices - self._starts[owners])[order].split(counts.tolist())
        wanted = counts.nonzero()[:, 0].tolist()
        pieces = self._batches.gathered(
            wanted, lambda number, batch: map_tensors(batch, partial(_rows, rows=rows[number]))
        )
        if self._batches.ranks.count > 1:  # each has looked at its own batches alone
            _check_constants(_constants(piece) for piece in pieces)
        columns = list(zip(*(tensors_of(piece) for piece in pieces), strict=True))
        if all(_alike(column) for column in columns):
            joined = [torch.cat(column) if column[0].ndim else column[0] for column in columns]
            for places in order.argsort().split([len(chunk) for chunk in chunks]):
                yield _filled(pieces[0], [_rows(tensor, places) for tensor in joined])
        elif len(chunks) > 1:
            for chunk in chunks:  # every batch may be padded to its own length; the samples of each are alike
                yield from self._gather((chunk,))
        else:
            shapes = sorted({tuple(part.shape[1:]) for column in columns if not _alike(column) for part in column})
            raise ValueError(
                f"samples of different shapes cannot be one batch (got {shapes}): expected tensors alike in all "
                "batches; pad them to one length, or use batch_size=1"
            )


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)] if tensor.ndim else tensor


def _filled(batch: Batch, tensors: list[Tensor]) -> Batch:
    """Return a batch of the same structure with other tensors."""
    rest = iter(tensors)
    return map_tensors(batch, lambda _: next(rest))


def _alike(column: tuple[Tensor, ...]) -> bool:
    return len({part.shape[1:] for part in column}) == 1


def _check_indices(indices: Tensor, samples: int) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor of integers, got {type(indices).__name__}: pass torch.tensor(...)")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(
            f"indices must be integers, got {indices.dtype}: they count samples; for a mask use mask.nonzero()[:, 0]"
        )
    if indices.ndim != 1 or not len(indices):
        raise ValueError(f"indices must be flat and name at least one sample, got shape {tuple(indices.shape)}")
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= samples:
        raise IndexError(f"no sample {low if low < 0 else high}: expected indices from 0 to {samples - 1}")


def _check_alike(batches: Batches) -> None:
    """Raise ``ValueError`` unless every batch is rows of the same tensors, and all else is equal in all batches."""
    _check_constants(_rows_apart(batch, size) for batch, size in zip(batches, batches.own_sizes, strict=True))


def _rows_apart(batch: Batch, size: int) -> Any:
    """Return what of a batch is not rows of a tensor; ``ValueError`` where rows of a tensor are no samples."""
    for tensor in tensors_of(batch):
        if tensor.ndim and len(tensor) != size:
            raise ValueError(
                f"a batch of {size} samples holds a tensor of shape {tuple(tensor.shape)}: expected tensors whose "
                "first dimension counts samples; leave out what is not data of one sample, or make it 0-dimensional"
            )
    return _constants(batch)


def _check_constants(found: Iterable[Any]) -> None:
    rest = iter(found)
    first = next(rest, None)
    if any(constant != first for constant in rest):
        raise ValueError(
            "batches differ in what is not rows of a tensor (keys, numbers, strings, 0-dimensional tensors): "
            "expected it equal in all batches; make it a tensor whose first dimension counts samples"
        )


def _constants(batch: Batch) -> Any:
    """Return what must be equal in all batches, in a form that can be compared; a tensor of rows is one mark."""
    if isinstance(batch, Tensor):
        return (batch.dtype, _END if batch.ndim else batch.item())
    if isinstance(batch, Mapping):
        return {key: _constants(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_constants(value) for value in batch]
    return _constants(fields_of(batch)) if is_record(batch) else batch


def _read(source: Iterable[Batch], seed: int = 0) -> Iterator[Batch]:
    """Read one pass from a random stream of its own; a loader's own generator is given back as it was."""
    if isinstance(source, list | _Samples):
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
        for _ in range(_most(source)):
            with stream:
                item = next(iterator, _END)
            if item is _END:
                return
            yield item
        with stream:
            if next(iterator, _END) is not _END:
                raise ValueError(
                    f"the data does not end after {_most(source)} batches, the most that it says or that is read "
                    "without a length: expected a pass that ends; give list(itertools.islice(data, n))"
                )
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _most(source: Iterable[Batch]) -> int:
    """Return the number of batches that there may be: the length of what has one."""
    try:
        return len(source)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return _ENDLESS


def _generators(source: object) -> list[torch.Generator]:
    holders = (source, getattr(source, "sampler", None), getattr(source, "batch_sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _as_source(data: object) -> Iterable[Batch]:
    if isinstance(data, _Samples | _Given):
        return data
    if isinstance(data, DataLoader):
        _refuse_shuffling(data)
        return data
    if isinstance(data, Tensor):
        raise TypeError("data is a bare tensor: expected batches; pass one batch as a tuple (inputs, targets)")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"data is a data set ({type(data).__name__}): expected batches; wrap it in DataLoader(data, batch_size=256)"
        )
    if isinstance(data, Mapping) or (is_record(data) and not isinstance(data, Iterable)):
        return [data]
    if isinstance(data, list | tuple):
        return [data] if data and all(isinstance(item, Tensor) for item in data) else list(data)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data must be batches that can be iterated, got {type(data).__name__}: pass a loader or a list"
        )
    if iter(data) is data:
        raise TypeError("data is an iterator, which can be read only once: pass list(data), or a loader")
    return data


def _check_sharing(batches: Batches, ranks: Ranks, *, split: bool) -> None:
    if batches.ranks.count != ranks.count or (ranks.count > 1 and batches.split != split):
        raise ValueError(
            "the batches of another objective are shared by processes in another way: expected the same argument ranks "
            "for both; give it, or pass the data themselves"
        )


def _warn_of_repeats(data: object) -> None:
    """Warn of samples that a sampler repeats, so that all processes have equally many."""
    sampler = getattr(data, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return
    dataset: Any = sampler.dataset
    repeated = sampler.total_size - len(dataset)
    if repeated > 0:
        warnings.warn(
            f"the DistributedSampler repeats {repeated} sample(s), so that all processes have equally many: they count "
            "twice in the loss; pass all data to every process with ranks=True, or divide them by a Subset",
            ApproximationWarning,
            stacklevel=2,
        )


def _refuse_shuffling(loader: DataLoader[Any]) -> None:
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
        at_random = isinstance(sampler, RandomSampler | WeightedRandomSampler)
        if at_random or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
            raise ValueError(
                f"the loader shuffles (its sampler is a {type(sampler).__name__}): expected the same batches at "
                "every pass; use DataLoader(..., shuffle=False)"
            )
