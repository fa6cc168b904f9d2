"""Random crop, mirror image and cutout of a batch of images at once, where the images are.

What is drawn for a batch depends on seed, epoch and the batch's number alone, and is drawn on the CPU: devices agree,
and processes that share a batch draw for all of it and apply their part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, epoch: int, batch: int) -> np.random.Generator:
    """Return the generator of one batch, independent of all others': Philox, seeded by a hash of the three numbers.

    ``seed``, ``epoch``, ``batch``: Not negative; the seed below 2^128, the others below 2^32.
    """
    # Not the list [seed, epoch, batch]: a seed of more than 32 bits would there be mistaken for two numbers.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch, batch))))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    r"""Return the mean and standard deviation of every channel, over all pixels of all images.

    From the histogram of the 256 values, in exact integers until the last division and root. For CIFAR-100's training
    images means of 0.5071, 0.4865, 0.4409 and deviations of 0.2673, 0.2564, 0.2762 are widely reported.

    ``images``: Shape ``(N, C, H, W)``, uint8; otherwise TypeError or ValueError.
    Returns: C numbers each, of pixels scaled to [0, 1]; the variance is :math:`\overline{x^2} - \bar{x}^2`.
    """
    _check(images)
    means, deviations, values = [], [], torch.arange(256)
    for channel in images.unbind(dim=1):
        counts = torch.bincount(channel.reshape(-1), minlength=256).cpu()
        total, first, second = (int((counts * values**power).sum()) for power in range(3))
        means.append(first / total / 255)
        deviations.append(((total * second - first**2) / total**2) ** 0.5 / 255)
    return tuple(means), tuple(deviations)


@dataclass(frozen=True, eq=False)
class Draw:
    """What was drawn for a batch.

    ``corners``: Shape ``(N, 2)``, int64: top and left of the crop in the padded image, from 0 to twice the padding.
    ``mirrored``: Shape ``(N,)``, bool: whether left and right change places.
    ``centres``: Shape ``(N, 2)``, int64: row and column of the cutout's centre in the result.
    """

    corners: Tensor
    mirrored: Tensor
    centres: Tensor

    def __getitem__(self, part: slice | Tensor) -> Draw:
        """Return what was drawn for some of the batch's images, for a process that has only these."""
        return Draw(self.corners[part], self.mirrored[part], self.centres[part])


@dataclass(frozen=True)
class Augmentation:
    r"""Standardised images, cropped at random, mirrored at random, and with a square cut out.

    An image is padded with black on all sides, and of that a random window of its own size is taken, each with the same
    probability; it is mirrored left to right with a probability; scaled to [0, 1] and standardised by channel,
    :math:`(x - \mu) / \sigma`; and a square around a random pixel is set to 0, which is then the mean colour. The
    square may reach over the edge: of 16×16 on 32×32 pixels, 196 are cut out on average.

    Parameters
    ----------
    mean, std
        By channel, of pixels scaled to [0, 1]: :func:`channel_statistics` of the training images.
    padding
        In pixels; 0 takes the whole image. Default 4, He et al. 2016 (arXiv 1512.03385), section 4.2.
    mirror
        Probability to mirror. Default 0.5, as there.
    cutout
        Side of the square in pixels; 0 for none. Default 16, DeVries and Taylor 2017 (arXiv 1708.04552), section 4.2,
        for CIFAR-10; they prefer 8 for CIFAR-100.

    Raises
    ------
    ValueError
        A number is outside its range, or means and deviations differ in number.

    Examples
    --------
    >>> images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    >>> augment = Augmentation(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    >>> batch = augment(images, stream(seed=0, epoch=3, batch=7))
    >>> batch.shape, batch.unique().tolist()
    (torch.Size([2, 3, 32, 32]), [-2.0, 0.0])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 4
    mirror: float = 0.5
    cutout: int = 16

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(deviation > 0 for deviation in self.std):
            raise ValueError(
                f"expected a mean and a positive deviation for every channel, got {self.mean} and {self.std}: take "
                "those of channel_statistics(images)"
            )
        if self.padding < 0 or self.cutout < 0 or not 0 <= self.mirror <= 1:
            raise ValueError(
                "expected a padding and a cutout of 0 or more pixels and a probability to mirror, got "
                f"{self.padding}, {self.cutout} and {self.mirror}"
            )

    def __call__(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        """Draw for a batch, and apply; see :meth:`apply`."""
        return self.apply(images, self.draw(images.shape, generator))

    def draw(self, shape: torch.Size | tuple[int, ...], generator: np.random.Generator) -> Draw:
        """Draw for all of a batch ``(N, C, H, W)``, also where only a part of it will be augmented; on the CPU."""
        count, _, *size = shape
        corners = generator.integers(0, 2 * self.padding + 1, (count, 2))
        mirrored = generator.random(count) < self.mirror
        centres = generator.integers(0, size, (count, 2))
        return Draw(torch.from_numpy(corners), torch.from_numpy(mirrored), torch.from_numpy(centres))

    def apply(self, images: Tensor, draw: Draw) -> Tensor:
        """Return images ``(N, C, H, W)``, uint8, on any device, augmented as drawn: of the same shape, float32."""
        self._check(images)
        if len(draw.mirrored) != len(images):
            raise ValueError(
                f"expected a draw for {len(images)} images, got one for {len(draw.mirrored)}: draw for the whole batch "
                "and take the part of these images, draw[part]"
            )
        device, (height, width) = images.device, images.shape[2:]
        corners, centres = draw.corners.to(device), draw.centres.to(device)
        row, column = torch.arange(height, device=device), torch.arange(width, device=device)
        # Where each row (N, H) and column (N, W) of the result comes from.
        rows = row + corners[:, :1] - self.padding
        columns = torch.where(draw.mirrored.to(device)[:, None], width - 1 - column, column)
        columns = columns + corners[:, 1:] - self.padding
        inside = _cross((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        index = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
        cropped = images.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, images.shape[1], -1))
        standardised = self.standardise(cropped.view_as(images) * inside)
        cut = _cross(self._within(row, centres[:, :1]), self._within(column, centres[:, 1:]))
        return standardised.masked_fill(cut, 0.0)

    def _within(self, positions: Tensor, centre: Tensor) -> Tensor:
        """Tell which positions the cutout covers: ``cutout`` of them, from ``cutout // 2`` before the centre."""
        offset = positions - centre + self.cutout // 2
        return (offset >= 0) & (offset < self.cutout)

    def standardise(self, images: Tensor) -> Tensor:
        """Return images ``(N, C, H, W)``, uint8, on any device, standardised and otherwise as they are; float32."""
        self._check(images)
        numbers = torch.tensor([self.mean, self.std], dtype=torch.float32, device=images.device)
        mean, std = numbers[:, :, None, None].unbind()
        return (images.float() / 255 - mean) / std

    def _check(self, images: Tensor) -> None:
        _check(images)
        if images.shape[1] != len(self.mean):
            raise ValueError(f"expected images of {len(self.mean)} channels, as many as means, got {images.shape[1]}")


def _cross(rows: Tensor, columns: Tensor) -> Tensor:
    """Return where both hold, ``(N, 1, H, W)`` of ``(N, H)`` and ``(N, W)``."""
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _check(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"expected images of uint8, 0 to 255, got {images.dtype}: pass them as they were read")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"expected a batch of images, (N, C, H, W) with N of 1 or more, got {tuple(images.shape)}")
