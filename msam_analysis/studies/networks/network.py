"""A network in two halves: what it sees, and what it says about it."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """``head(features(x))``: the features of the last block before pooling, and what makes logits of them.

    The paper measures the feature rank on ``network.features(x)``; as a submodule, ``"features"`` can also be hooked.

    >>> import torch
    >>> from msam_analysis.studies.networks import mlp
    >>> network, x = mlp([4, 8, 3]), torch.ones(2, 4)
    >>> network.features(x).shape, torch.equal(network(x), network.head(network.features(x)))
    (torch.Size([2, 8]), True)
    """

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.head(self.features(x))
        return logits


class GlobalAverage(nn.Module):
    """Mean over all positions of an image: ``(N, C, H, W)`` to ``(N, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the means."""
        return x.mean(dim=(2, 3))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size at stride 1; He et al. 2015, equation 14 ("fan-out")."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
