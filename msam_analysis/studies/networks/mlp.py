"""A multilayer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import nn

from msam_analysis.studies.networks.network import Network


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> Network:
    r"""Return a multilayer perceptron.

    Parameters
    ----------
    sizes
        Inputs, units of each hidden layer, outputs: ``[64, 32, 10]`` has one hidden layer.
    activation
        Makes the activation after every hidden layer. Default ReLU; ``torch.nn.Tanh`` gives a smooth loss.

    Returns
    -------
    Network
        Input ``(N, ...)`` of ``sizes[0]`` numbers each, flattened; features, the last hidden layer's activations,
        ``(N, sizes[-2])``; output ``(N, sizes[-1])``. It has :math:`\sum_i (s_i + 1)\, s_{i+1}` parameters.

    Raises
    ------
    ValueError
        Fewer than two sizes, or one that is not positive.

    Notes
    -----
    Initial weights: :math:`N(0, 2 / s_i)`, of He et al. 2015 (arXiv 1502.01852, equation 10); biases are zero.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(
            f"sizes must be two or more positive numbers, inputs first and outputs last, got {list(sizes)}: "
            "pass e.g. [64, 32, 10]"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers += [_linear(inputs, outputs), activation()]
    return Network(nn.Sequential(*layers), _linear(sizes[-2], sizes[-1]))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer
