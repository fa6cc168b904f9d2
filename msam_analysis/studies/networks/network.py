"""A network in two halves: what it sees, and what it says about it."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """``head(features(x))``.

    Parameters
    ----------
    features
        Everything up to the last block, its normalisation and activation included.
    head
        Pools the features and makes logits of them.

    Attributes
    ----------
    features, head
        The halves. ``network.features(x)`` are the last block's features before pooling, on which the paper measures
        the feature rank; as a submodule, ``"features"`` can also be hooked.

    Examples
    --------
    >>> import torch
    >>> from msam_analysis.studies.networks import mlp
    >>> network = mlp([4, 8, 3])
    >>> x = torch.ones(2, 4)
    >>> network.features(x).shape
    torch.Size([2, 8])
    >>> torch.equal(network(x), network.head(network.features(x)))
    True
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
    r"""Return a convolution without bias that keeps the size at stride 1, with He et al.'s initial weights.

    They are drawn from :math:`N(0, 2 / (\text{kernel}^2 \cdot \text{outputs}))`: He et al. 2015 (arXiv 1502.01852),
    equation 14, which keeps the variance of gradients ("fan-out").
    """
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
