"""What a batch weighs in the mean over all samples, and how that is found out for other people's losses.

A loss over batches is a mean over samples only if every batch counts for what it holds. Which things a criterion counts
(samples, labels that are not ignored, class weights, tokens of a mask) is found by trying: the value of a batch must be
the weighted mean of the values of its two halves.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from msam_analysis.objective.nested import Batch, count_samples, map_tensors, tensors_of

IGNORED = -100
"""The label that torch's criteria and Hugging Face's models leave out by default."""

Count = Callable[[Batch], float]


@dataclass(frozen=True)
class Weighing:
    """How batches are weighed."""

    counts: str  # what is counted, in words
    count: Count | None  # a batch to its weight; None: the criterion itself has to be asked
    sums: bool = False  # whether the loss is a sum over what is counted, and not its mean


def _samples(batch: Batch) -> float:
    return float(count_samples(batch))


SAMPLES = Weighing("samples", _samples)


def mean_and_weight(returned: object, weight: float, *, sums: bool = False) -> tuple[Tensor, float]:
    """Return the mean loss of a batch and its weight, from what its ``loss_fn`` returned; ``sums``: a sum."""
    if not isinstance(returned, Tensor):
        loss = _own_loss(returned)
        if loss is not None:
            returned = loss
        elif isinstance(returned, tuple):
            total, count = _sum_and_count(returned)
            return total / count, count
    value = _scalar(returned, "a mean loss")
    return (value / weight if sums else value), weight


def _own_loss(returned: object) -> Tensor | None:
    """Return the loss inside an output of a model (Hugging Face's), if there is one."""
    loss = returned.get("loss") if isinstance(returned, Mapping) else getattr(returned, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def _sum_and_count(returned: tuple[Any, ...]) -> tuple[Tensor, float]:
    count = returned[1] if len(returned) == 2 else None
    if not (isinstance(count, int | float) or (isinstance(count, Tensor) and count.numel() == 1)):
        second = f" with {_what(count)} as its second item" if len(returned) == 2 else ""
        raise ValueError(
            f"loss_fn returned a tuple of {len(returned)}{second}: expected a mean loss alone, or (sum, count) "
            "with a number; drop what else it returns, e.g. the logits"
        )
    weight = float(count)
    if not weight > 0:
        raise ValueError(f"loss_fn returned (sum, count) with count {weight:g}: expected a positive count")
    return _scalar(returned[0], "a sum"), weight


def _what(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _scalar(value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            f"loss_fn must return {what} as one number, got {_what(value)}: use reduction='mean', or "
            "return (sum, count)"
        )
    return value.reshape(())


# ------------------------------------------------------------------------------------------- criteria with a reduction


def with_reduction(loss_fn: Any, reduction: str) -> Callable[..., Any] | None:
    """Return a criterion with another ``reduction``, or ``None`` if it offers no choice of one."""
    if not isinstance(_option(loss_fn, "reduction"), str):
        return None
    if not isinstance(loss_fn, nn.Module):
        return functools.partial(loss_fn, reduction=reduction)
    changed: Any = copy.copy(loss_fn)
    changed.reduction = reduction
    return changed  # type: ignore[no-any-return]


def reduction_of(loss_fn: Any) -> str | None:
    """Return the ``reduction`` of a criterion; ``None`` if it has none."""
    found = _option(loss_fn, "reduction")
    return found if isinstance(found, str) else None


def _option(loss_fn: Any, name: str) -> Any:
    """Return an option of a criterion: an attribute of a module, or a keyword of a function and its default."""
    if isinstance(loss_fn, nn.Module):
        return getattr(loss_fn, name, None)
    try:
        default = inspect.signature(loss_fn).parameters[name].default
    except (TypeError, ValueError, KeyError):  # a builtin, or no such option
        return None
    return None if default is inspect.Parameter.empty else default


def needs_counting(loss_fn: Any, batches: Sequence[Batch]) -> bool:
    """Whether a criterion may count something else than samples: weights, ignored labels, elements that vary."""
    own = (*loss_fn.parameters(), *loss_fn.buffers()) if isinstance(loss_fn, nn.Module) else ()
    named = () if isinstance(loss_fn, nn.Module) else getattr(loss_fn, "keywords", {}).values()
    if own or any(isinstance(value, Tensor) for value in named):
        return True
    ignored = _option(loss_fn, "ignore_index")
    rates = set()
    for batch in batches:
        for target in tensors_of(batch[1]):
            if ignored is not None and not target.is_floating_point() and bool((target == ignored).any()):
                return True
            rates.add(target.numel() / max(count_samples(batch), 1))
    return len(rates) > 1


def counted(mean: float, total: float) -> float:
    """Return what a criterion counted on a batch: the sum over the mean; 0 where there is nothing to count."""
    if math.isnan(mean) and total == 0.0:
        return 0.0
    if mean == 0.0 or not math.isfinite(total / mean):
        return math.nan
    count = total / mean
    return float(round(count)) if abs(count - round(count)) <= 1e-4 * count and round(count) > 0 else count


# -------------------------------------------------------------------------------------- what a batch says by its shapes


def candidates(batch: Batch) -> Iterator[tuple[str, Count]]:
    """Yield what may be counted in such batches, the likeliest first, as words and a function."""
    yield "samples", _samples
    for index, tensor in enumerate(tensors_of(batch)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.ndim == 0:
            continue
        if bool((tensor == IGNORED).any()):
            words, left_out = "labels that count", IGNORED
        elif tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all()):
            words, left_out = "ones of a mask", 0
        else:
            continue
        # All of them, or all but the first of every sequence: causal language models predict the next token.
        for shift in range(min(tensor.ndim, 2)):
            yield words + " after the first" * shift, functools.partial(_unlike, index, shift, left_out)


def _unlike(index: int, shift: int, value: int, batch: Batch) -> float:
    """Count the entries of a tensor, behind the first ``shift`` columns, that are not a value."""
    tensor = list(tensors_of(batch))[index]
    return float(((tensor[:, shift:] if shift else tensor) != value).sum())


def leading_sizes(batch: Batch) -> tuple[int, ...]:
    """Return the first dimension of every tensor in a batch that has one."""
    return tuple(tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim)


def contradict(sizes: Sequence[tuple[int, ...]]) -> bool:
    """Whether tensors disagree, from batch to batch, about how many samples a batch holds; a row of sizes for each."""
    if len(sizes) < 2:
        return False
    if len({len(row) for row in sizes}) > 1:
        return any(len(set(row)) > 1 for row in sizes)
    columns = list(zip(*sizes, strict=True))
    first, rest = columns[0], [column for column in columns[1:] if len(set(column)) > 1]
    return any(column[0] * mine != first[0] * own for column in rest for mine, own in zip(first, column, strict=True))


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """Return a batch as two, cut by the first dimension of its tensors; ``None`` where that is not what they share."""
    sizes = set(leading_sizes(batch))
    if len(sizes) != 1 or (size := sizes.pop()) < 2:
        return None
    cut = size // 2
    return rows(batch, slice(0, cut)), rows(batch, slice(cut, size))


def rows(batch: Batch, chosen: slice | Tensor) -> Batch:
    """Return the chosen rows of every tensor of a batch that has rows."""
    return map_tensors(batch, lambda tensor: tensor[chosen] if tensor.ndim else tensor)
