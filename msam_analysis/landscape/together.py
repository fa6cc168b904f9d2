"""Several points in one forward pass, for networks so small that the number of passes decides the cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from msam_analysis.landscape.evaluator import Evaluator
from msam_analysis.objective.nested import Batch
from msam_analysis.objective.weighing import mean_and_weight

_SIZES = (8, 32, 128)
# Least factor that a batch of points must gain: a smaller one may come from a busy machine.
_GAIN = 1.2


class Together:
    """Losses at ``size`` points at once, by :func:`torch.vmap`.

    They differ from those of :class:`Evaluator` by rounding, but not from one call to another: every call computes
    ``size`` points, and repeats the last one if there are fewer.

    Parameters
    ----------
    evaluator
        Evaluates the loss, without metrics.
    size
        Number of points at once.

    Raises
    ------
    ValueError
        The network, the loss or the BatchNorm policy does not allow it, or there are metrics.
    """

    def __init__(self, evaluator: Evaluator, size: int) -> None:
        self.evaluator = evaluator
        self.size = size
        objective = evaluator.objective
        if set(evaluator.widths) != {"loss"}:
            names = ", ".join(name for name in evaluator.widths if name != "loss")
            raise ValueError(f"chunk={size} measures the loss alone, and not {names}: leave chunk out")
        if objective.batchnorm == "recalibrate":
            raise ValueError(f"chunk={size} cannot serve batchnorm='recalibrate', done point by point: leave chunk out")
        try:
            found = float(self.rows([[0.0] * len(evaluator.directions)])[0, 0])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"chunk={size} cannot batch the points of this loss ({str(error).splitlines()[0]}): leave chunk out"
            ) from error
        expected = float(evaluator.center[0])
        rounding = 1e3 * torch.finfo(objective.precision).eps
        if not abs(found - expected) <= rounding * max(abs(expected), 1.0):
            raise ValueError(
                f"chunk={size} gives {found:g} at the centre where one point alone gives {expected:g}: leave chunk out"
            )

    def rows(self, coordinates: Sequence[Sequence[float]]) -> Tensor:
        """Return the losses, shape ``(points, 1)``, ``size`` points at a time."""
        groups = [coordinates[start : start + self.size] for start in range(0, len(coordinates), self.size)]
        # Fused attention has no rule for a batch of points.
        with self.evaluator.evaluation.evaluating(), sdpa_kernel(SDPBackend.MATH):
            return torch.cat([self._group(group) for group in groups])

    def _group(self, coordinates: Sequence[Sequence[float]]) -> Tensor:
        evaluator, layout = self.evaluator, self.evaluator.objective.layout
        padded = [*coordinates, *[coordinates[-1]] * (self.size - len(coordinates))]
        steps = torch.tensor(padded, dtype=torch.float64).to(evaluator.weights)
        points = evaluator.weights.repeat(self.size, 1)
        for column, direction in zip(steps.T, evaluator.directions, strict=True):
            points.addcmul_(column[:, None], direction)
        dtypes = {name: parameter.dtype for name, parameter in evaluator.module.named_parameters()}

        def loss(point: Tensor, batch: Batch, weight: float) -> tuple[Tensor, Tensor]:
            views = {f"model.{name}": view for name, view in layout.views(point).items()}
            tensors = {name: view.to(dtypes[name]) for name, view in views.items()}
            returned = functional_call(evaluator.module, tensors, (batch,))
            mean, weight = mean_and_weight(returned, weight, sums=evaluator.evaluation.findings.weighing.sums)
            return mean.detach(), torch.as_tensor(weight, dtype=torch.float64)

        total = weight_sum = torch.zeros(self.size, dtype=torch.float64)
        with evaluator.ranks.apart("points of a slice") as alike:
            alike.append(points)
            for batch, held in evaluator.batches():
                means, weights = vmap(partial(loss, batch=batch, weight=held))(points)
                total = total + means.cpu().double() * weights
                weight_sum = weight_sum + weights
        both = evaluator.ranks.sum(torch.stack([total, weight_sum]))
        return (both[0] / both[1])[: len(coordinates), None]


def fastest(evaluator: Evaluator, points: int) -> int:
    """Return the number of points at once that is fastest here, by measurement.

    On a CPU it is always 1, without measurement: there batches gained little or lost (``benchmarks/landscape.py``).

    Parameters
    ----------
    evaluator
        Evaluates the loss.
    points
        Number of points that will be needed.
    """
    if evaluator.objective.device.type == "cpu":
        return 1
    origin = [[0.0] * len(evaluator.directions)]
    best, shortest = 1, _seconds(partial(evaluator.rows, origin * 8)) / 8
    for size in _SIZES:
        if size > points:
            break
        try:
            batched = Together(evaluator, size)
            seconds = _GAIN * _seconds(partial(batched.rows, origin * size)) / size
        except (ValueError, torch.cuda.OutOfMemoryError):
            break
        if seconds >= shortest:
            break
        best, shortest = size, seconds
    return best


def _seconds(action: Callable[[], Tensor]) -> float:
    """Return the shorter of two durations; the device has finished, as the rows come back to the CPU."""
    durations = []
    for _ in range(2):
        start = time.perf_counter()
        action()
        durations.append(time.perf_counter() - start)
    return min(durations)
