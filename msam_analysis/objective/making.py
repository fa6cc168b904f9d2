"""An evaluation, made from what a user gives: everything is checked, in all processes that share the batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from msam_analysis.objective.arguments import check_autocast, device_of
from msam_analysis.objective.batches import Batches
from msam_analysis.objective.batchnorm import check_policy
from msam_analysis.objective.evaluation import Evaluation
from msam_analysis.objective.private import LossFunction, LossModule, unwrap
from msam_analysis.objective.ranks import Ranks, Sharing
from msam_analysis.objective.second_derivatives import SecondDerivatives, Wish
from msam_analysis.objective.vectors import Selection, select
from msam_analysis.results.fingerprint import fingerprint


def evaluation_of(
    model: nn.Module,
    loss_fn: LossFunction,
    data: object,
    *,
    parameters: Selection,
    device: torch.device | str | None,
    cast: torch.dtype | None,
    cache_bytes: int,
    examine: bool,
    ranks: Sharing,
    second_derivatives: Wish,
    options: Mapping[str, Any],
) -> Evaluation:
    """Return how a loss is evaluated; the arguments are those of :class:`~msam_analysis.Objective`."""
    if not (isinstance(ranks, bool) or ranks == "split"):
        raise ValueError(f"ranks must be False, True or 'split', got {ranks!r}")
    processes = Ranks(together=bool(ranks))
    with processes.apart("making an objective") as alike:
        _check(model, loss_fn, cast)
        check_policy(options["batchnorm"])
        original = LossModule(unwrap(model), unwrap(loss_fn))
        named = select(original.model, parameters)
        placed = device_of(device, next(iter(named.values())).device)
        tensors = dict(original.named_parameters()) | dict(original.named_buffers())
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        chosen = [cast, examine, ranks, placed.type, second_derivatives, *options.values()]
        arguments = fingerprint(*map(str, chosen), list(named))
        processes.check_alike({"the network": fingerprint(shapes), "arguments": arguments})
        evaluation = Evaluation(
            original,
            Batches.shared(
                data, device=placed, dtype=cast, cache_bytes=cache_bytes, ranks=processes, split=ranks == "split"
            ),
            device=placed,
            cast=cast,
            second_derivatives=SecondDerivatives(second_derivatives),
            **options,
        )
        evaluation.choose(parameters)
        check_autocast(evaluation.autocast, evaluation.dtype)
        if evaluation.shards is None:
            alike.extend(original.parameters())
        else:
            evaluation.shards.check(processes.count)
    return evaluation


def _check(model: object, loss_fn: object, dtype: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}: pass the network itself")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}: pass e.g. nn.CrossEntropyLoss()")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}: pass e.g. torch.float64")
