"""The small workload on which the paper's claims already show: real 8x8 digits, 40 % of the training labels wrong.

scikit-learn's bundled digits (UCI "Optical Recognition of Handwritten Digits"): 1,797 images, 1,000 to train on and 797
to test on. Of the 1,000 training labels, 400 are replaced by another class at random, so that fitting the training set
and generalising part ways: a network that reaches zero training loss has memorised the wrong labels.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor, nn

TRAIN_SAMPLES = 1000
WRONG_LABELS = 0.4


def network() -> nn.Module:
    """Return the untrained network: three 3x3 convolutions (16, 32, 32 channels; stride 1, 2, 2), BatchNorm, ReLU.

    14,458 parameters; input ``(N, 1, 8, 8)``, output ``(N, 10)`` logits.
    """

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*block(1, 16, 1), *block(16, 32, 2), *block(32, 32, 2), *head)


@lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train inputs, train labels (40 % wrong), test inputs, test labels; always the same.

    ``(1000, 1, 8, 8)`` and ``(797, 1, 8, 8)`` float32, standardised by the training pixels; int64 labels.
    """
    bunch = datasets("digits").load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32)[:, None], torch.tensor(bunch.target)
    return divided(images, labels, TRAIN_SAMPLES, WRONG_LABELS)


def train_data() -> list[tuple[Tensor, Tensor]]:
    """Return the training set, wrong labels included, as two batches of 500."""
    inputs, labels, _, _ = load()
    return list(zip(inputs.split(500), labels.split(500), strict=True))


def test_data() -> list[tuple[Tensor, Tensor]]:
    """Return the test set as batches of at most 500."""
    _, _, inputs, labels = load()
    return list(zip(inputs.split(500), labels.split(500), strict=True))


def divided(
    inputs: Tensor, labels: Tensor, count: int, wrong: float, dim: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``count`` inputs and labels to train on, a share of these wrong, and the rest to test on; always the same.

    Inputs are standardised by those trained on: by one mean and deviation, or by those along ``dim``.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[:count], order[count:]
    inputs = (inputs - inputs[train].mean(dim=dim)) / inputs[train].std(dim=dim)
    noisy, classes = labels[train].clone(), int(labels.max()) + 1
    chosen = torch.randperm(count, generator=generator)[: round(wrong * count)]
    noisy[chosen] = (noisy[chosen] + torch.randint(1, classes, (len(chosen),), generator=generator)) % classes
    return inputs[train], noisy, inputs[test], labels[test]


def datasets(workload: str) -> ModuleType:
    """Return ``sklearn.datasets``; the error where it is not installed names the workload."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"the {workload} workload needs scikit-learn: install it with pip install 'msam-analysis[study]'"
        ) from None
    module: ModuleType = datasets
    return module
