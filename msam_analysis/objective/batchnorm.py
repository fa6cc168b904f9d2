"""What BatchNorm does while a model is measured: a choice that is stated, never implied.

========================  =========================================================================================
policy                    normalisation at the point ``w + e``
========================  =========================================================================================
``"eval"``                the running statistics that the model holds: the function that is deployed
``"batch"``               each batch's own statistics, running ones untouched: the function that is trained
``"recalibrate"``         statistics re-estimated on all batches at every point, then held constant for derivatives:
                          the function that would be deployed after moving to that point; means over batches that
                          weigh what they hold, as by :func:`msam.update_batchnorm_statistics`
========================  =========================================================================================
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msam_analysis.objective.ranks import Ranks
from msam_analysis.objective.vectors import widest

Policy = Literal["eval", "batch", "recalibrate"]


def check_policy(policy: str) -> None:
    """Raise ``ValueError`` unless ``policy`` is one of the three."""
    if policy not in get_args(Policy):
        raise ValueError(f"batchnorm must be one of {get_args(Policy)}, got {policy!r}")


def batchnorm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return every BatchNorm layer by name, SyncBatchNorm included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def describe_policy(model: nn.Module, policy: Policy) -> str:
    """Return the policy in words that hold for this model, which may have no BatchNorm or none with statistics."""
    layers = batchnorm_layers(model).values()
    without = sum(layer.running_mean is None for layer in layers)
    if not layers:
        return "no BatchNorm"
    if policy == "batch" or not without:
        return policy
    if without == len(layers):
        return "batch (no running statistics)"
    return f"{policy} ({without} of {len(layers)} layers: batch, no running statistics)"


def use_batch_statistics(model: nn.Module) -> None:
    """Make every BatchNorm layer of a private copy normalise by the batch and write nothing."""
    for layer in batchnorm_layers(model).values():
        layer.train()
        layer.track_running_stats = False


def collect_statistics(model: nn.Module, share: float | None) -> None:
    """Let a private copy collect statistics, the next batch making up ``share`` of all so far; ``None``: use them."""
    for layer in batchnorm_layers(model).values():
        layer.train(share is not None)
        layer.momentum = share


def blank_statistics(model: nn.Module, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the buffers with every BatchNorm layer's running statistics reset, as new tensors."""
    fresh = dict(buffers)
    for prefix in _with_statistics(model):
        for key, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            fresh[prefix + key] = torch.full_like(buffers[prefix + key], value)
    return fresh


def averaged_statistics(model: nn.Module, buffers: dict[str, Tensor], weight: float, ranks: Ranks) -> dict[str, Tensor]:
    """Return the buffers with running statistics of all processes, from those of batches that weigh ``weight`` here."""
    names = [prefix + key for prefix in _with_statistics(model) for key in ("running_mean", "running_var")]
    if ranks.count == 1 or not names:
        return buffers
    own = torch.cat([buffers[name].flatten().to(widest(buffers[name].device)) for name in names])
    (mean,) = ranks.mean(weight, own * weight)
    parts = mean.split([buffers[name].numel() for name in names])
    return buffers | {
        name: part.view_as(buffers[name]).to(buffers[name]) for name, part in zip(names, parts, strict=True)
    }


def _with_statistics(model: nn.Module) -> list[str]:
    """Return what the names of running statistics begin with, one for each BatchNorm layer that has some."""
    layers = batchnorm_layers(model).items()
    return [f"{name}." if name else "" for name, layer in layers if layer.running_mean is not None]
