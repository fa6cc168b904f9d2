"""Sharpness that does not change when weights are rescaled without effect on the function.

A ReLU layer can be multiplied by ``a > 0`` and the next one divided by ``a``: the network computes the same function,
but every plain sharpness can be made as large as one likes (Dinh et al. 2017). The measures in this file do not change,
and neither do the adaptive ball and average-case sharpness.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from msam_analysis.objective.arguments import numbers
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.progress import told
from msam_analysis.objective.randomness import drawn_indices
from msam_analysis.objective.vectors import read, widest
from msam_analysis.results import Estimate

_NO_NORMALIZATION = "no BatchNorm"


@numbers
def relative_flatness(objective: Objective, layer: str, *, draws: int = 30, seed: int = 0) -> Estimate:
    r"""Return the relative flatness of one layer, ``κ = Σ_{s,s'} ⟨w_s, w_s'⟩ tr(H_{s,s'})``.

    ``w_s`` are the rows of the layer's weight matrix (neurons, or flattened filters) and ``H_{s,s'}`` is the block of
    second derivatives with respect to ``w_s`` and ``w_s'``. With a factor ``F Fᵀ = W Wᵀ`` and a matrix ``Ξ`` of random
    signs, ``κ = E⟨F Ξ, H (F Ξ)⟩``, which costs one Hessian-vector product of this layer for each draw. A larger value
    means sharper. It does not change when the layer is multiplied by a factor and another one divided by it. Source:
    Petzka, Kamp, Adilova, Sminchisescu and Boley, *Relative Flatness and Generalization* (NeurIPS 2021, arXiv
    2001.00939), the trace variant; the theory is about the layer that acts on the features, such as the last weight
    matrix.

    Memory: as a Hessian with the entries of this layer alone, and ``F``, which is as large as the layer.

    Parameters
    ----------
    objective
        The loss.
    layer
        Name of a parameter with at least two dimensions, such as ``"fc.weight"``; the first dimension counts neurons.
        It need not belong to the objective's selection.
    draws
        Number of Hessian-vector products. Default 30.
    seed
        Seed of the random signs.

    Returns
    -------
    Estimate
        The relative flatness, with its standard error over the draws.

    Raises
    ------
    ValueError
        There are fewer than 2 draws, or the name fits no parameter, several parameters, or a vector;
        the weights are sharded.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, so that an error can be given; got {draws}")
    alone = objective.with_parameters(layer)
    if len(alone.layout.names) != 1 or len(alone.layout.shapes[0]) < 2:
        found = ", ".join(f"{n!r} {tuple(s)}" for n, s in zip(alone.layout.names, alone.layout.shapes, strict=True))
        raise ValueError(f"layer must name one weight with at least two dimensions, {layer!r} is {found[:200]}")
    if alone.evaluation.shards is not None:
        raise ValueError(
            f"relative flatness needs the singular values of {layer!r}, whose rows lie in several processes: expected "
            "a whole model; measure it in one process"
        )
    weight = alone.point().reshape(alone.layout.shapes[0][0], -1)
    left, singular, _ = torch.linalg.svd(
        weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
    )
    factor = left * singular
    hessian = alone.hessian()
    generator = torch.Generator().manual_seed(seed)
    products = []
    for draw in range(draws):
        signs = 2 * torch.randint(2, (factor.shape[1], weight.shape[1]), generator=generator) - 1
        mixed = (factor @ signs.to(factor)).reshape(-1)
        products.append(mixed.dot(hessian.matvec(mixed).to(mixed)))
        if told("products", draw + 1, draws) and draw > 0:
            break
    sample = torch.tensor(read(*products), dtype=torch.float64)
    return _estimate("relative flatness", sample, objective, layer=layer)


@numbers
def fisher_rao_norm(objective: Objective, *, samples: int | None = None, seed: int = 0) -> Estimate:
    r"""Return the squared Fisher–Rao norm, ``‖w‖²_fr = wᵀ F w = E_i ⟨w, ∇ℓ_i(w)⟩²``.

    ``F = E_i ∇ℓ_i ∇ℓ_iᵀ`` over the samples of the data, with their labels; ``⟨w, ∇ℓ_i⟩`` is the derivative of a
    sample's loss when all weights are scaled together. It measures capacity rather than sharpness: it does not change
    when layers are rescaled, and it is small where the weights or the gradients of single samples are small. Source:
    Liang, Poggio, Rakhlin and Stokes, *Fisher-Rao Metric, Geometry, and Complexity of Neural Networks* (AISTATS 2019,
    arXiv 1711.01530).

    Memory: four vectors, and the graph of one sample.

    Parameters
    ----------
    objective
        The loss; one sample is one row of its batches. Its BatchNorm policy must be ``"eval"``, so that a sample does
        not depend on the others in its batch.
    samples
        Number of samples, drawn at random without replacement; default: all. Each costs the gradient of one sample.
    seed
        Seed of the choice of samples.

    Returns
    -------
    Estimate
        Mean and standard error over the samples.

    Raises
    ------
    ValueError
        ``samples`` is out of range, or the BatchNorm policy is not ``"eval"``.
    """
    if objective.batchnorm != "eval" and objective.settings["batchnorm"] != _NO_NORMALIZATION:
        raise ValueError(
            f"the Fisher-Rao norm is a mean over single samples, which batchnorm={objective.batchnorm!r} makes "
            "depend on one another: use batchnorm='eval'"
        )
    if samples is not None and not 2 <= samples <= objective.samples:
        raise ValueError(f"samples must be between 2 and {objective.samples}, got {samples}")
    count = objective.samples if samples is None else samples
    chosen = drawn_indices(objective.samples, count, seed)
    point = objective.point()
    wide, numbers = widest(objective.device), []
    for number, index in enumerate(chosen):
        loss, gradient = objective.with_samples(index[None], batch_size=1).loss_and_gradient(point)
        numbers += [loss, objective.space.dot(point.to(wide), gradient.to(wide))]
        if told("samples", number + 1, count) and number > 0:
            break
    found = read(*numbers)
    pairs = zip(found[::2], found[1::2], strict=True)
    squares = torch.tensor(
        [slope**2 if math.isfinite(loss) else math.nan for loss, slope in pairs], dtype=torch.float64
    )
    return _estimate("squared Fisher-Rao norm", squares, objective)


def _estimate(quantity: str, sample: Tensor, objective: Objective, **labels: str) -> Estimate:
    return Estimate(
        quantity=quantity,
        value=float(sample.mean()),
        standard_error=float(sample.std() / math.sqrt(len(sample))) if len(sample) > 1 else math.nan,
        draws=len(sample),
        evaluations=len(sample),
        settings={**objective.settings, **labels},
    )
