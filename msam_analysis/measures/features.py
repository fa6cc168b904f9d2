"""The rank of a network's features: the number of directions in which the outputs of a layer vary over the data."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.batches import Batches
from msam_analysis.objective.private import unwrap
from msam_analysis.results import FeatureRank

_EPS = torch.finfo(torch.float64).eps


@numbers
def feature_rank(
    model: nn.Module | None, data: object, *, layer: str | None = None, threshold: float = 0.99
) -> FeatureRank:
    """Return the rank of a layer's outputs over the data, in evaluation mode (exhibit A6r).

    Parameters
    ----------
    model
        Any module; it is not modified. ``None``: ``data`` are the features, a tensor with one row for each sample.
    data
        Batches ``(input, ...)``: a loader that does not shuffle, a list, or one batch. Without a model: the features.
    layer
        Name of the submodule that returns the features, as in ``model.named_modules()``; the output of each sample is
        flattened. Default ``"features"``: in this package's networks everything up to the last block, before pooling.
        If the submodule is called more than once, its last output counts.
    threshold
        Share of the variance that the rank explains. Default 0.99, as in the source.

    Returns
    -------
    FeatureRank
        The rank, three other ranks by the same singular values, and the singular values.

    Raises
    ------
    ValueError
        ``threshold`` is not in (0, 1], the layer does not exist or was not called, its output is not a tensor with one
        entry for each sample, there are fewer than two samples, or a feature is not finite.
    TypeError
        There is no model, and ``data`` is not a tensor.

    Notes
    -----
    The definition is that of Andriushchenko et al. 2023 (arXiv 2305.16292, section 2), who count the principal
    components that explain 99 % of the variance. Other authors mean the numerical rank, or one of the smooth ranks
    reported beside it; the numerical rank is full wherever there is noise. All features are held in float64 at once,
    8 N D bytes, beside a matrix of min(N, D)² entries. Ranks grow with N up to D: compare networks on the same samples.

    Examples
    --------
    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> feature_rank(None, x @ torch.ones(3, 1) @ torch.ones(1, 8)).rank
    1
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be a share in (0, 1], got {threshold!r}: pass e.g. 0.99")
    if model is None:
        if not isinstance(data, Tensor):
            raise TypeError(f"expected features as a tensor, got {type(data).__name__}: pass the model as well")
        features = data.detach().flatten(1).cpu().to(torch.float64, copy=True)
    else:
        features = _collected(unwrap(model), data, "features" if layer is None else layer)
    if len(features) < 2 or not features.isfinite().all():
        raise ValueError(f"expected finite features of at least two samples, got shape {tuple(features.shape)}")
    return _ranks(features, threshold, {"layer": "given" if model is None else layer or "features"})


def _collected(model: nn.Module, data: object, layer: str) -> Tensor:
    """Return the layer's outputs, one row for each sample, from a private copy in evaluation mode."""
    private = copy.deepcopy(model).eval()
    modules = dict(private.named_modules())
    if layer not in modules:
        near = [name for name in modules if name and "." not in name]
        raise ValueError(f"the model has no layer {layer!r}: expected the name of a submodule, such as one of {near}")
    caught: list[object] = []
    modules[layer].register_forward_hook(lambda _, __, output: caught.append(output))
    device = next((tensor.device for tensor in private.parameters()), torch.device("cpu"))
    batches = Batches(data, device=device, dtype=None)
    features, done = torch.empty(0, 0, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches:
            inputs = batch[0] if isinstance(batch, tuple | list) else batch
            caught.clear()
            private(inputs)
            output = caught[-1] if caught else None
            if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != len(inputs):
                raise ValueError(
                    f"expected layer {layer!r} to return a tensor with one entry for each sample, got "
                    f"{tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__}: name another"
                )
            rows = output.flatten(1)
            if done == 0:
                # Not a list of parts: there may be memory for one copy only.
                features = torch.empty(sum(batches.sizes), rows.shape[1], dtype=torch.float64)
            features[done : done + len(rows)] = rows
            done += len(rows)
    return features


def _ranks(features: Tensor, threshold: float, settings: dict[str, str | int | float | bool | None]) -> FeatureRank:
    """Return the ranks of features; overwrites them."""
    samples, dimension = features.shape
    largest = max(abs(float(end)) for end in features.aminmax())
    centred = features.sub_(features.mean(dim=0))
    gram = centred @ centred.T if samples <= dimension else centred.T @ centred
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0.0)
    values, total = squares.sqrt(), float(squares.sum())
    resolution = float(values[0]) * math.sqrt(_EPS * max(samples, dimension))
    # Features that differ only by rounding do not vary.
    if total <= len(squares) * (_EPS * largest * samples) ** 2:
        values, squares, total = values * 0, squares * 0, 0.0
    known = values[values > resolution]
    shares = known / known.sum()
    explained = squares.cumsum(0)
    return FeatureRank(
        # The last sum is the total here, so that a threshold of 1 is reached in spite of rounding.
        rank=1 + int((explained < threshold * explained[-1]).sum()) if total > 0 else 0,
        threshold=float(threshold),
        effective_rank=float(torch.exp(-(shares * shares.log()).sum())) if total > 0 else 0.0,
        stable_rank=total / float(squares[0]) if total > 0 else 0.0,
        numerical_rank=int((values > resolution).sum()),
        resolution=resolution,
        singular_values=values,
        samples=samples,
        dimension=dimension,
        settings=settings,
    )
