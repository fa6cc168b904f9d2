"""Augmented batches: image by image, in frequencies, and the same however a batch is shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msam_analysis.studies.augmentation import Augmentation, Draw, channel_statistics, stream

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
# Frequencies over so many draws; a chi-square statistic of k degrees of freedom has mean k and variance 2k.
MANY = 200_000


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def one_by_one(images: Tensor, draw: Draw, augmentation: Augmentation) -> Tensor:
    """The definition, one image after another, in NumPy and float64."""
    results = []
    for image, (top, left), mirrored, (y, x) in zip(
        images.numpy(), draw.corners.tolist(), draw.mirrored.tolist(), draw.centres.tolist(), strict=True
    ):
        _, height, width = image.shape
        p, side = augmentation.padding, augmentation.cutout
        padded = np.pad(image, ((0, 0), (p, p), (p, p)))
        result = padded[:, top : top + height, left : left + width]
        if mirrored:
            result = np.flip(result, axis=2)
        mean, std = (np.array(numbers)[:, None, None] for numbers in (augmentation.mean, augmentation.std))
        result = (result / 255 - mean) / std
        first_row, first_column = y - side // 2, x - side // 2
        result[:, max(0, first_row) : max(0, first_row + side), max(0, first_column) : max(0, first_column + side)] = 0
        results.append(result)
    return torch.from_numpy(np.stack(results))


@settings(max_examples=60)
@given(
    count=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 5),
    cutout=st.integers(0, 12),
    mirror=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**63),
)
def test_a_batch_is_augmented_as_one_image_after_another(
    count: int, height: int, width: int, padding: int, cutout: int, mirror: float, seed: int
) -> None:
    """To the rounding of float32; pixels are at most 4 deviations from the mean."""
    augmentation = Augmentation(MEAN, STD, padding=padding, mirror=mirror, cutout=cutout)
    images = random_images(count, 3, height, width, seed=seed % 1000)
    before = images.clone()
    draw = augmentation.draw(images.shape, stream(seed, 1, 2))
    result = augmentation.apply(images, draw)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), one_by_one(images, draw, augmentation), rtol=0, atol=1e-6)
    assert torch.equal(images, before)


def test_the_corners_of_a_crop() -> None:
    """Corner (0, 0) of padding 2 shifts an image down and right by 2, corner (4, 4) up and left; (2, 2) keeps it."""
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 1, 4, 4).expand(3, -1, -1, -1)
    augmentation = Augmentation(mean=(0.0,), std=(1 / 255,), padding=2, cutout=0)
    corners = torch.tensor([[0, 0], [2, 2], [4, 4]])
    draw = Draw(corners, torch.zeros(3, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.int64))
    shifted = augmentation.apply(images, draw).round().int()[:, 0].tolist()
    assert shifted[0] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 5, 6]]
    assert shifted[1] == images[0, 0].tolist()
    assert shifted[2] == [[11, 12, 0, 0], [15, 16, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_what_is_cut_out_is_the_mean_colour() -> None:
    """0 after standardising, over the whole square; what the crop brings in is black."""
    augmentation = Augmentation(MEAN, STD, cutout=2, mirror=0.0)
    images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    draw = Draw(torch.tensor([[3, 4]]), torch.tensor([False]), torch.tensor([[3, 2]]))
    result = augmentation.apply(images, draw)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        white, black = (1 - mean) / std, -mean / std
        expected = [[black] * 4, [white] * 4, [white, 0, 0, white], [white, 0, 0, white]]
        torch.testing.assert_close(result[0, channel], torch.tensor(expected))


# --- distributions


def chi_square(counts: np.ndarray[Any, Any]) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.fixture(scope="module")
def draw() -> Draw:
    """Draws of the paper's kind: 32×32 pixels, padding 4, mirrored or not, cutout 16."""
    return Augmentation(MEAN, STD).draw((MANY, 3, 32, 32), stream(0, 0, 0))


def test_crops_are_uniform_over_81(draw: Draw) -> None:
    """All 9×9 of them, within 6 deviations of what chi-square has."""
    assert (int(draw.corners.min()), int(draw.corners.max())) == (0, 8)
    counts = np.bincount((draw.corners[:, 0] * 9 + draw.corners[:, 1]).numpy(), minlength=81)
    assert abs(chi_square(counts) - 80) < 6 * np.sqrt(2 * 80)


def test_half_of_the_images_are_mirrored(draw: Draw) -> None:
    assert abs(float(draw.mirrored.double().mean()) - 0.5) < 6 * 0.5 / np.sqrt(MANY)
    rare = Augmentation(MEAN, STD, mirror=0.1).draw((MANY, 3, 4, 4), stream(0, 0, 0))
    assert abs(float(rare.mirrored.double().mean()) - 0.1) < 6 * 0.3 / np.sqrt(MANY)


def test_cutouts_are_centred_anywhere(draw: Draw) -> None:
    assert (int(draw.centres.min()), int(draw.centres.max())) == (0, 31)
    counts = np.bincount((draw.centres[:, 0] * 32 + draw.centres[:, 1]).numpy(), minlength=1024)
    assert abs(chi_square(counts) - 1023) < 6 * np.sqrt(2 * 1023)


def test_draws_are_independent(draw: Draw) -> None:
    """No two of the five numbers of an image are correlated: |r| < 6/√N."""
    columns = [*draw.corners.T, draw.mirrored, *draw.centres.T]
    correlation = np.corrcoef(np.stack([column.numpy().astype(float) for column in columns]))
    assert np.abs(correlation - np.eye(5)).max() < 6 / np.sqrt(MANY)


def test_the_area_of_a_cutout() -> None:
    """Over all centres: 8 to 16 pixels a side and 14 on average, so 64 to 256, and 196 on average."""
    augmentation = Augmentation(mean=(0.5,), std=(0.25,))
    centres = torch.cartesian_prod(torch.arange(32), torch.arange(32))
    nothing = Draw(torch.full((1024, 2), 4), torch.zeros(1024, dtype=torch.bool), centres)
    areas = (augmentation.apply(torch.full((1024, 1, 32, 32), 255, dtype=torch.uint8), nothing) == 0).sum((1, 2, 3))
    assert (int(areas.min()), int(areas.max()), float(areas.double().mean())) == (64, 256, 196)
    assert int(areas[16 * 32 + 16]) == 256


# --- streams


def drawn(seed: int, epoch: int, batch: int) -> tuple[bytes, ...]:
    draw = Augmentation(MEAN, STD).draw((8, 3, 32, 32), stream(seed, epoch, batch))
    return draw.corners.numpy().tobytes(), draw.mirrored.numpy().tobytes(), draw.centres.numpy().tobytes()


def test_every_batch_has_a_stream_of_its_own() -> None:
    """Seeds beyond 32 bits too, and no mixing up of seed, epoch and batch."""
    keys = [(s, e, b) for s in (0, 1, 2**32, 2**32 + 1, 2**64) for e in (0, 1, 2) for b in (0, 1, 2)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(1, 2, 3) == drawn(1, 2, 3)


def test_a_stream_is_the_same_everywhere() -> None:
    """Numbers as they were when this was written: another NumPy must not change a study without a word."""
    draw = Augmentation(MEAN, STD).draw((3, 3, 32, 32), stream(1, 2, 3))
    assert draw.corners.tolist() == [[4, 1], [2, 3], [3, 0]]
    assert draw.mirrored.tolist() == [True, True, False]
    assert draw.centres.tolist() == [[19, 28], [14, 9], [7, 7]]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_processes_that_share_a_batch_see_the_same_images(processes: int) -> None:
    augmentation, images = Augmentation(MEAN, STD), random_images(7, 3, 32, 32)
    whole = augmentation(images, stream(0, 5, 9))
    parts = []
    for part in torch.arange(7).tensor_split(processes):
        draw = augmentation.draw(images.shape, stream(0, 5, 9))
        parts.append(augmentation.apply(images[part], draw[part]))
    assert torch.equal(torch.cat(parts), whole)
    draw = augmentation.draw(images.shape, stream(0, 5, 9))
    assert torch.equal(augmentation.apply(images[2:5], draw[2:5]), whole[2:5])


def test_nothing_is_drawn_from_the_global_generators(generators: Callable[[], tuple[object, ...]]) -> None:
    before = generators()
    Augmentation(MEAN, STD)(random_images(2, 3, 8, 8), stream(0, 0, 0))
    assert generators() == before


def test_images_may_be_views() -> None:
    """As they come from CIFAR's records: strided, and every image after its labels."""
    records = random_images(4, 3074)
    images = records[:, 2:].unflatten(1, (3, 32, 32))
    augmentation = Augmentation(MEAN, STD)
    assert torch.equal(augmentation(images, stream(0, 0, 0)), augmentation(images.contiguous(), stream(0, 0, 0)))


# --- standardisation


@settings(max_examples=25)
@given(count=st.integers(1, 4), channels=st.integers(1, 4), side=st.integers(1, 6), seed=st.integers(0, 1000))
def test_statistics_by_numpy(count: int, channels: int, side: int, seed: int) -> None:
    images = random_images(count, channels, side, side, seed=seed)
    mean, std = channel_statistics(images)
    scaled = images.numpy() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-14)
    assert std == pytest.approx(scaled.std((0, 2, 3)), abs=1e-8)


def test_standardised_images_have_mean_0_and_deviation_1() -> None:
    images = random_images(50, 3, 32, 32) // torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]
    mean, std = channel_statistics(images)
    result = Augmentation(mean, std).standardise(images).double()
    assert result.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-6)
    assert result.var((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-6)


def test_without_augmentation_an_image_is_standardised() -> None:
    augmentation = Augmentation(MEAN, STD, padding=0, mirror=0.0, cutout=0)
    images = random_images(4, 3, 8, 8)
    assert torch.equal(augmentation(images, stream(0, 0, 0)), augmentation.standardise(images))


# --- errors

BATCH = random_images(2, 3, 4, 4)
ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "floats": (
        lambda: Augmentation(MEAN, STD).standardise(BATCH.float()),
        TypeError,
        r"expected images of uint8, 0 to 255, got torch.float32: pass them as they were read",
    ),
    "an image": (
        lambda: channel_statistics(BATCH[0]),
        ValueError,
        r"a batch of images, \(N, C, H, W\).*got \(3, 4, 4\)",
    ),
    "no image": (lambda: channel_statistics(BATCH[:0]), ValueError, r"N of 1 or more, got \(0, 3, 4, 4\)"),
    "channels": (
        lambda: Augmentation(MEAN, STD)(BATCH[:, :1], stream(0, 0, 0)),
        ValueError,
        "expected images of 3 channels, as many as means, got 1",
    ),
    "another draw": (
        lambda: Augmentation(MEAN, STD).apply(BATCH[:1], Augmentation(MEAN, STD).draw(BATCH.shape, stream(0, 0, 0))),
        ValueError,
        r"a draw for 1 images, got one for 2: draw for the whole batch and take the part of these images, draw\[part\]",
    ),
    "fewer deviations": (
        lambda: Augmentation((0.5, 0.5), (0.5,)),
        ValueError,
        r"a mean and a positive deviation for every channel, got \(0.5, 0.5\) and \(0.5,\): take those of channel_stat",
    ),
    "no deviation": (lambda: Augmentation((0.5,), (0.0,)), ValueError, "a positive deviation for every channel"),
    "padding": (lambda: Augmentation((0.5,), (1.0,), padding=-1), ValueError, "got -1, 16 and 0.5"),
    "cutout": (lambda: Augmentation((0.5,), (1.0,), cutout=-2), ValueError, "got 4, -2 and 0.5"),
    "mirror": (lambda: Augmentation((0.5,), (1.0,), mirror=1.5), ValueError, "got 4, 16 and 1.5"),
}


@pytest.mark.parametrize(("call", "kind", "sentence"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], object], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        call()
