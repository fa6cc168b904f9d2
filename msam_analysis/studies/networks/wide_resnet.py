"""Wide residual networks."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from msam_analysis.studies.networks.network import GlobalAverage, Network, convolution


def wide_resnet(depth: int, width: int, classes: int = 100, *, in_channels: int = 3, dropout: float = 0.0) -> Network:
    r"""Return a wide residual network with pre-activation, WRN-``depth``-``width``.

    A 3×3 convolution to 16 channels; three groups of :math:`n = (\text{depth} - 4) / 6` blocks with
    :math:`16k, 32k, 64k` channels for width :math:`k`, the second and third of which begin with stride 2; BatchNorm and
    ReLU; global average; a linear layer. A block is BatchNorm, ReLU, 3×3 convolution, twice, and adds its input. Where
    the number of channels changes, a 1×1 convolution of the first activation takes the input's place.

    Parameters
    ----------
    depth
        6n + 4: 10, 16, 22, 28, 40.
    width
        Factor k on the channels.
    classes
        Default 100, CIFAR-100.
    in_channels
        Default 3; 1 for grey images such as the digits, for which ``wide_resnet(10, 1, 10, in_channels=1)`` has
        77,562 parameters.
    dropout
        Probability to drop, between the convolutions of a block. Default 0, as in the paper's CIFAR runs.

    Returns
    -------
    Network
        Input ``(N, in_channels, H, W)``; features, after the last ReLU, ``(N, 64 k, ⌈H/4⌉, ⌈W/4⌉)``; output
        ``(N, classes)``. With 100 classes and 3 channels WRN-16-4 has 2,772,020 parameters, WRN-28-10 36,536,884.

    Raises
    ------
    ValueError
        The depth is not 6n + 4 with n ≥ 1, or the width is not positive.

    Notes
    -----
    Zagoruyko and Komodakis 2016 (arXiv 1605.07146), table 1; figure 1 (d) with dropout. Initial weights as in their
    published code: convolutions of He et al.'s normal distribution by fan-out, BatchNorm 1 and 0, the linear layer's
    weights uniform within :math:`\pm 1 / \sqrt{64 k}` and its bias zero. No weight of a block is zero.
    """
    if depth < 10 or (depth - 4) % 6 != 0 or width < 1:
        raise ValueError(
            f"expected a depth of 6n + 4 (10, 16, 22, 28, 40, ...) and a positive width, got {depth} and {width}"
        )
    blocks = (depth - 4) // 6
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=convolution(in_channels, 16, 3))
    channels = 16
    for number, (outputs, stride) in enumerate(((16 * width, 1), (32 * width, 2), (64 * width, 2)), start=1):
        first = _Block(channels, outputs, stride, dropout)
        stages[f"group{number}"] = nn.Sequential(
            first, *(_Block(outputs, outputs, 1, dropout) for _ in range(1, blocks))
        )
        channels = outputs
    stages["norm"] = nn.BatchNorm2d(channels)
    stages["activation"] = nn.ReLU()
    linear = nn.Linear(channels, classes)
    nn.init.zeros_(linear.bias)
    return Network(nn.Sequential(stages), nn.Sequential(GlobalAverage(), linear))


class _Block(nn.Module):
    """BatchNorm, ReLU, convolution, twice, plus the input."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.shortcut = None if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.norm1(x))
        branch = self.dropout(self.activation(self.norm2(self.conv1(activated))))
        kept: Tensor = x if self.shortcut is None else self.shortcut(activated)
        total: Tensor = kept + self.conv2(branch)
        return total
