"""Residual networks with bottlenecks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from msam_analysis.studies.networks.network import GlobalAverage, Network, convolution

_EXPANSION = 4
# Blocks and inner channels of the four groups: He et al. 2016, table 1.
_GROUPS = ((3, 64), (4, 128), (6, 256), (3, 512))


def resnet50(classes: int = 100, stem: Literal["cifar", "imagenet"] = "cifar", *, in_channels: int = 3) -> Network:
    r"""Return a residual network of 50 layers.

    A stem; four groups of 3, 4, 6 and 3 bottleneck blocks with 256, 512, 1024 and 2048 channels, the later three of
    which begin with stride 2; global average; a linear layer. A block is a 1×1, a 3×3 and a 1×1 convolution, each
    followed by BatchNorm, with ReLU between them and after the sum with its input; the first block of a group passes
    that through a 1×1 convolution and BatchNorm. The stride is that of the 3×3 convolution, as in today's
    implementations, not of the first 1×1.

    Parameters
    ----------
    classes
        Default 100, CIFAR-100.
    stem
        ``"cifar"`` (default): a 3×3 convolution of stride 1. ``"imagenet"``: 7×7 of stride 2, then 3×3 max-pooling of
        stride 2. Either is followed by BatchNorm and ReLU and has 64 channels.
    in_channels
        Default 3.

    Returns
    -------
    Network
        Input ``(N, in_channels, H, W)``; features, after the last block's ReLU, ``(N, 2048, ⌈H/8⌉, ⌈W/8⌉)``, with the
        ImageNet stem ``(N, 2048, ⌈H/32⌉, ⌈W/32⌉)``; output ``(N, classes)``. 23,705,252 parameters with the CIFAR
        stem and 100 classes; 25,557,032 with the ImageNet stem and 1,000.

    Raises
    ------
    ValueError
        There is no such stem.

    Notes
    -----
    He et al. 2016 (arXiv 1512.03385), table 1 and figure 5. Initial weights: convolutions of He et al.'s normal
    distribution by fan-out, BatchNorm 1 and 0 (also the last one of a block, which some later recipes begin with at
    0), the linear layer's weights and biases uniform within :math:`\pm 1 / \sqrt{2048}`.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=_stem(stem, in_channels))
    channels = 64
    for number, (blocks, inner) in enumerate(_GROUPS, start=1):
        first = _Bottleneck(channels, inner, stride=1 if number == 1 else 2)
        channels = _EXPANSION * inner
        stages[f"group{number}"] = nn.Sequential(first, *(_Bottleneck(channels, inner, 1) for _ in range(1, blocks)))
    return Network(nn.Sequential(stages), nn.Sequential(GlobalAverage(), nn.Linear(channels, classes)))


def _stem(kind: str, inputs: int) -> nn.Module:
    if kind == "cifar":
        return nn.Sequential(convolution(inputs, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
    if kind == "imagenet":
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        return nn.Sequential(convolution(inputs, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), pool)
    raise ValueError(f"expected the stem 'cifar' or 'imagenet', got {kind!r}")


class _Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions with BatchNorm, plus the input, and ReLU of the sum."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * inner
        self.branch = nn.Sequential(
            convolution(inputs, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            convolution(inner, inner, 3, stride),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            convolution(inner, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.activation(self.shortcut(x) + self.branch(x))
        return total
