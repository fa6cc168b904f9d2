"""CIFAR-100 as a workload: from files that the user has, kept as bytes, augmented batch by batch.

What is measured is the loss on the training images as they are, standardised; what is trained on is those images
cropped, mirrored and with a square cut out, drawn anew for every batch by seed, epoch and number of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor, nn

from msam_analysis.studies import cifar
from msam_analysis.studies.augmentation import Augmentation, channel_statistics
from msam_analysis.studies.cifar import Checksum
from msam_analysis.studies.networks import resnet50, wide_resnet

CLASSES = 100
_BATCH = 250  # about that of training, whose BatchNorm statistics the probes see

NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "WRN-16-4": partial(wide_resnet, 16, 4, CLASSES),
    "WRN-28-10": partial(wide_resnet, 28, 10, CLASSES),
    "ResNet-50": partial(resnet50, CLASSES),
}
"""The paper's networks for CIFAR-100, by its names."""


@dataclass(frozen=True)
class Source:
    """Which images: see :func:`msam_analysis.studies.cifar.load`; of training and test the first ``limit`` ones."""

    path: Path
    checksum: Checksum = "published"
    limit: int | None = None


@dataclass(frozen=True, eq=False)
class Augmented:
    """What an epoch of training draws from: images ``(N, 3, 32, 32)``, uint8, and labels; how a batch is augmented."""

    images: Tensor
    labels: Tensor
    augmentation: Augmentation


@lru_cache(maxsize=1)
def load(source: Source) -> tuple[Augmented, Tensor, Tensor]:
    """Return what is trained on, and the test images (uint8) and labels as they are in the file; read once."""
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"expected a positive limit of images, got {source.limit}: leave it out for all of them")
    data = cifar.load(source.path, "cifar100", checksum=source.checksum)
    images, labels = data.train.images[: source.limit].contiguous(), data.train.labels[: source.limit]
    mean, std = channel_statistics(images)
    train = Augmented(images, labels, Augmentation(mean, std))
    return train, data.test.images[: source.limit], data.test.labels[: source.limit]


def augmented(source: Source) -> Augmented:
    """Return what is trained on."""
    return load(source)[0]


@lru_cache(maxsize=1)
def train_data(source: Source) -> list[tuple[Tensor, Tensor]]:
    """Return the training images as they are, standardised, in batches of 250: what is measured."""
    train = augmented(source)
    return _batches(train.images, train.labels, train.augmentation)


@lru_cache(maxsize=1)
def test_data(source: Source) -> list[tuple[Tensor, Tensor]]:
    """Return the test images, standardised as the training images are, in batches of 250."""
    train, images, labels = load(source)
    return _batches(images, labels, train.augmentation)


def _batches(images: Tensor, labels: Tensor, augmentation: Augmentation) -> list[tuple[Tensor, Tensor]]:
    parts = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    return [(augmentation.standardise(part), answers) for part, answers in parts]
