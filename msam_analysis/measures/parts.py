"""Ascents on parts of the data, for balls where the loss is far from quadratic."""

from __future__ import annotations

import torch

from msam_analysis.measures.ascent import Ascent
from msam_analysis.measures.ball_loss import BallLoss
from msam_analysis.objective.vectors import read

# Chosen by benchmarks/sharpness.py.
_PARTS = 16  # the data is cut into as many
_STEPS = 20  # evaluations on a part
_KEPT = 10  # gradients on all data that are left for the end of the search
_FEWEST = 8  # samples in a part
_QUADRATIC = 0.08  # of the highest rise: as much may a quadratic model miss


def from_parts(ball_loss: BallLoss, ascents: list[Ascent], tolerance: float, seed: int) -> list[Ascent]:
    """Return ascents on all data that begin where ascents on parts of the data ended.

    Every part is climbed once, from one of the starts (the highest first) and from a random point in turn. There are
    none where the loss is nearly quadratic, where parts cannot be taken, or where the budget does not allow for two.
    """
    count = min(_PARTS, int((ball_loss.left - _KEPT) / (1 + _STEPS / _PARTS)))
    if count < 2 or not ascents or not _far_from_quadratic(ball_loss, ascents):
        return []
    parts = _parts(ball_loss, seed)
    highest_first = sorted(ascents, key=lambda ascent: ascent.at.rise, reverse=True)
    found = []
    for number, part in enumerate(parts[:count]):
        if not ball_loss.left:
            break
        if number % 2:
            space = ball_loss.ball.space
            draw = space.gaussian(1, seed=seed, like=ball_loss.center, use=f"ball part {number}")[:, 0]
            name, z = "random", ball_loss.ball.stretch(draw)
        else:
            start = highest_first[number // 2 % len(ascents)]
            name, z = start.name, start.at.z
        climb = Ascent(part, name, part.evaluate(z))
        climb.run(_STEPS - 1, tolerance)
        if ball_loss.left:
            found.append(Ascent(ball_loss, f"part {number + 1}, {name}", ball_loss.evaluate(climb.at.z)))
    return found


def _far_from_quadratic(ball_loss: BallLoss, ascents: list[Ascent]) -> bool:
    """Say whether the rise at a start is not the mean slope on the way to it, as it is for a quadratic loss."""
    space = ball_loss.ball.space
    points = [ascent.at for ascent in ascents]
    means = read(*(space.dot(ball_loss.slope + point.slope, point.z) / 2 for point in points))
    highest = max(point.rise for point in points)
    missed = max(abs(point.rise - mean) for point, mean in zip(points, means, strict=True))
    return highest > 0 and missed > _QUADRATIC * highest


def _parts(ball_loss: BallLoss, seed: int) -> list[BallLoss]:
    """Return the loss on disjoint parts, drawn at random; none where a part is no smaller problem of the same kind."""
    objective = ball_loss.objective
    size = objective.samples // _PARTS
    # With statistics of batches a part is another function; data that no cache holds would be read for every part.
    if size < _FEWEST or objective.batchnorm != "eval" or not objective.batches.fits:
        return []
    order = torch.randperm(objective.samples, generator=torch.Generator().manual_seed(seed))
    each = -(-size // objective.batches.ranks.count)
    batch_size = min(each, max(objective.batches.sizes))
    try:
        return [
            ball_loss.on(objective.with_samples(order[first : first + size], batch_size=batch_size))
            for first in range(0, _PARTS * size, size)
        ]
    except ValueError:
        return []  # samples that cannot be taken apart
