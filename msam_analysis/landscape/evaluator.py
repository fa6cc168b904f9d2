"""Rows of numbers at the points of a line or a plane: the loss first, then its errors and the metrics.

A point is computed in one flat buffer, and the parameters of a private copy of the network are views of it: nothing is
allocated, copied or looked up between two forward passes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from msam_analysis.landscape.metrics import Metric, OutputMetric
from msam_analysis.landscape.output_reader import OutputReader
from msam_analysis.landscape.sampling import standard_error
from msam_analysis.objective.batchnorm import averaged_statistics, batchnorm_layers, collect_statistics
from msam_analysis.objective.nested import Batch
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.passes import Pass, repeats
from msam_analysis.objective.private import is_pair
from msam_analysis.objective.randomness import RandomStream, same_state
from msam_analysis.objective.vectors import widest
from msam_analysis.objective.weighing import mean_and_weight

ERRORS = ("standard_error", "rise_error")


class Evaluator:
    """The loss and metrics of an objective at ``w + Σ c_k d_k``, with the same bits as :meth:`Objective.loss`.

    Parameters
    ----------
    objective
        The loss.
    directions
        ``d_k``, each of shape ``(size,)``, with the objective's device and data type.
    metrics
        Metrics to measure beside the loss, by name.
    fraction
        Part of the data from which the objective's samples were drawn, in (0, 1]; ``None``: all data, without standard
        errors.

    Attributes
    ----------
    widths
        Length of each quantity in a row, by name and in order; 0 for a single number.
    center
        The row at the centre.
    seconds
        Duration of the row at the centre.
    units
        Number of samples or batches behind the standard errors.
    """

    def __init__(
        self,
        objective: Objective,
        directions: Sequence[Tensor],
        metrics: Mapping[str, Metric] | None = None,
        fraction: float | None = None,
    ) -> None:
        self.objective = objective
        self.directions = directions
        self.metrics = dict(metrics or {})
        self.fraction = fraction
        self.weights = objective.point()
        self.at = self.weights.clone()
        self._row, self._head = self.weights, [0.0] * (len(directions) - 1)
        self.evaluation = objective.evaluation
        self.ranks = self.evaluation.ranks  # that share the batches: they evaluate a point together
        self.module = self.evaluation.private_copy(own=True)
        buffers = dict(self.module.named_buffers())
        for name, tensor in self.ranks.tensors_of_first(buffers).items():
            buffers[name].copy_(tensor)
        self._sums = self.evaluation.findings.weighing.sums
        self._copies = self._bind()
        self._buffers = _Buffers(self.module)
        self._reader = OutputReader(self.module, self.metrics, losses=fraction is not None)
        self._held = self._hold()
        self._tensors = [tensor for batch, _ in self._held or () for tensor in batch]
        self._versions = [tensor._version for tensor in self._tensors]
        on_cpu = objective.device.type == "cpu"
        self._number = float if on_cpu else partial(torch.Tensor.to, dtype=widest(objective.device))
        self._reference: Tensor | None = None  # losses of the samples or batches at the centre
        self.widths: dict[str, int] = {}
        self.center = self._first()

    @property
    def units(self) -> int:
        """Number of samples or batches behind the standard errors; 0 without them."""
        return 0 if self._reference is None else len(self._reference)

    def rows(self, coordinates: Sequence[Sequence[float]]) -> Tensor:
        """Return one row for each point, shape ``(points, width)``, float64 on the CPU.

        Parameters
        ----------
        coordinates
            The ``c_k`` of every point.
        """
        with self.evaluation.evaluating() as stream:
            quick = self._quickly(coordinates, stream)
            if quick is not None:
                return quick
            rows = [self._forward(point, stream) for point in coordinates]
        return self._stacked(rows, coordinates)

    def move(self, point: Sequence[float]) -> Tensor:
        """Move the private copy to a point, and return the buffer that holds the point."""
        *head, last = point
        if head != self._head:
            # Neighbouring points share all but their last step.
            start = self.weights
            for coordinate, direction in zip(head, self.directions[:-1], strict=True):
                start = torch.add(start, direction, alpha=coordinate) if coordinate else start
            self._row, self._head = start, head
        if last:
            torch.add(self._row, self.directions[-1], alpha=last, out=self.at)
        else:
            self.at.copy_(self._row)
        for parameter, view in self._copies:
            parameter.copy_(view)
        return self.at

    def warn_of_rounding(self, point: Sequence[float]) -> None:
        """Let the objective warn if weights in half precision are too coarse for a point."""
        if self._copies:
            self.evaluation.leaves(self.move(point))

    def batches(self) -> Iterable[tuple[Batch, float]]:
        """Iterate over this process's batches and their weights."""
        if self._unread():
            return self._held or []
        self._held = None  # a forward pass wrote to them: read the data again
        return zip(self.objective.batches, self.evaluation.weights, strict=True)

    # ----------------------------------------------------------------------------------------------------------- inside

    def _bind(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Make parameters views of the point; return those of another precision, which need copies."""
        copies = []
        parameters = dict(self.module.named_parameters())
        for name, view in self.objective.layout.views(self.at).items():
            parameter = parameters[f"model.{name}"]
            if parameter.dtype == view.dtype:
                parameter.data = view
            else:
                copies.append((parameter, view))
        return copies

    def _hold(self) -> list[tuple[tuple[Tensor, Tensor], float]] | None:
        """Return the batches where they fit the cache and are pairs of tensors, which a loss cannot change."""
        batches = self.objective.batches
        if batches.nbytes > batches.cache_bytes:
            return None
        weighed = zip(batches, self.evaluation.weights, strict=True)
        pairs = [
            (batch, weight)
            for batch, weight in weighed
            if is_pair(batch) and all(isinstance(item, Tensor) for item in batch)
        ]
        return pairs if len(pairs) == len(batches) else None

    def _first(self) -> Tensor:
        origin = [0.0] * len(self.directions)
        start = time.monotonic()
        with self.evaluation.evaluating() as stream:
            row = self._forward(origin, stream)
        self.seconds = time.monotonic() - start
        # The quick way: only the loss is wanted, as one number from a pair of tensors, without anything else to do.
        alone = not self.metrics and self.fraction is None and self.ranks.count == 1
        alone = alone and not self._sums and self.module.redirect is None and self.module.fresh is None
        alone = alone and not self.evaluation.findings.with_gradients
        self._quick = alone and self._unread() and self._direct and self.objective.batchnorm != "recalibrate"
        return self._stacked([row], [origin])[0]

    def _unread(self) -> bool:
        """Return whether the held batches are as they were read."""
        return self._held is not None and [tensor._version for tensor in self._tensors] == self._versions

    def _quickly(self, coordinates: Sequence[Sequence[float]], stream: RandomStream) -> Tensor | None:
        """Return the rows if no forward pass draws or writes anything; ``None`` if one did.

        For a small network the checks of :meth:`_forward` for every batch take as long as the network.
        """
        if not self._quick:
            return None
        model, number, held = self.module.model, self._number, self._held or []
        loss_fn: Any = self.module.loss_fn
        weight_sum = sum(weight for _, weight in held)
        losses: list[Any] = []
        before = stream.state
        for point in coordinates:
            self.move(point)
            total: Any = 0.0
            for (inputs, targets), weight in held:
                if weight:
                    total = total + number(loss_fn(model(inputs), targets)) * weight
            losses.append(total / weight_sum)
        self._quick = self._unread() and not self._buffers.written and same_state(before, stream.state)
        if not self._quick:
            return None
        return _row(losses)[:, None]

    def _forward(self, point: Sequence[float], stream: RandomStream) -> list[Any]:
        """Return the loss, its errors and the output metrics at a point."""
        total: Any = 0.0
        weight_sum = 0.0
        numbers, values, weights = [], [], []
        with self.evaluation.apart("a point of a slice") as alike:
            alike.append(self.move(point))
            if self.objective.batchnorm == "recalibrate":
                self._recalibrate(stream)
            more = repeats(self.evaluation, self.evaluation.weights)
            for index, (batch, held) in zip(self.objective.batches.own, self.batches(), strict=True):
                if not held:
                    continue
                # Every batch has its own seed and fresh buffers: no batch depends on another.
                stream.restart(self.objective.seed + index)
                self._buffers.restore()
                returned = self.module(batch)
                self._direct = isinstance(returned, Tensor) and returned.ndim == 0
                mean, weight = mean_and_weight(returned, held, sums=self._sums)
                value = self._number(mean.detach())
                total = total + value * weight
                weight_sum += weight
                numbers.append(index)
                values.append(value)
                weights.append(weight)
            self._repeat(more, stream)
        row = [self._mean(total, weight_sum)]
        if self.fraction is not None:
            row += self._errors(values, weights)
        return row + self._reader.collect(numbers, self.ranks) if self._reader.names else row

    def _repeat(self, more: Iterable[Pass], stream: RandomStream) -> None:
        """Make the passes that do not count; see :func:`.passes.repeats`."""
        self._reader.listens = False
        for one in more:
            stream.restart(self.objective.seed + one.number)
            self.module(one.batch)
        self._reader.listens = True

    def _mean(self, total: Any, weight_sum: float) -> Any:
        """Return the loss at a point, from a sum over this process's batches and their weight."""
        if self.ranks.count == 1:
            return total / weight_sum
        device = self.objective.device
        (mean,) = self.ranks.mean(weight_sum, torch.as_tensor(total, dtype=widest(device), device=device).clone())
        return float(mean) if device.type == "cpu" else mean

    def _errors(self, values: list[Any], weights: list[float]) -> list[float]:
        losses = self._reader.losses(values)
        if self.ranks.anywhere(losses is None):
            losses = None
        units = _row(values) if losses is None else losses
        weighing = torch.ones_like(units) if losses is not None else torch.tensor(weights, dtype=torch.float64)
        if self.ranks.count > 1:
            units, weighing = (torch.cat(parts) for parts in zip(*self.ranks.everyone((units, weighing)), strict=True))
        if self._reference is None:
            self._reference = units
        fraction = self.fraction or 0.0
        return [standard_error(x, weighing, fraction) for x in (units, units - self._reference)]

    def _recalibrate(self, stream: RandomStream) -> None:
        """Re-estimate the statistics of BatchNorm at this point, as :class:`Objective` does."""
        for layer in batchnorm_layers(self.module).values():
            layer.reset_running_stats()
        batches, seen = self.objective.batches, 0
        more = repeats(self.evaluation, [float(size) for size in batches.own_sizes])
        try:
            for index, batch, size in zip(batches.own, batches, batches.own_sizes, strict=True):
                stream.restart(self.objective.seed + index)
                seen += size
                collect_statistics(self.module, share=size / seen if seen else 0.0)
                self.module(batch)
            collect_statistics(self.module, share=0.0)
            self._repeat(more, stream)
        finally:
            collect_statistics(self.module, share=None)
        buffers = dict(self.module.named_buffers())
        for name, mean in averaged_statistics(self.module, buffers, seen, self.ranks).items():
            buffers[name].copy_(mean)
        self._reader.forget()
        self._buffers.keep()

    def _stacked(self, rows: list[list[Any]], coordinates: Sequence[Sequence[float]]) -> Tensor:
        if self.objective.device.type != "cpu":
            for row, loss in zip(rows, torch.stack([row[0] for row in rows]).tolist(), strict=True):  # one transfer
                row[0] = loss
        if not self.metrics and self.fraction is None:
            self.widths["loss"] = 0
            return torch.tensor(rows, dtype=torch.float64)
        others = {name: metric for name, metric in self.metrics.items() if not isinstance(metric, OutputMetric)}
        for row, point in zip(rows, coordinates, strict=True):
            for name, metric in others.items():
                # A copy: a metric may keep it, and the next point changes the buffer.
                with self.ranks.apart(f"the metric {name!r}"):
                    row.append(_plain(name, metric(self.objective, self.move(point).clone())))
        names = ["loss", *(ERRORS if self.fraction is not None else ()), *self._reader.names, *others]
        for row in rows:
            for name, value in zip(names, row, strict=True):
                width = len(value) if isinstance(value, Tensor) else 0
                if self.widths.setdefault(name, width) != width:
                    raise ValueError(
                        f"the metric {name!r} returned {width or 1} numbers where there were {self.widths[name] or 1} "
                        "before: expected a tensor that is as long at every point"
                    )
        if not any(self.widths.values()):
            return torch.tensor(rows, dtype=torch.float64)
        return torch.stack(
            [torch.cat([torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in row]) for row in rows]
        )


def _row(values: Sequence[Any]) -> Tensor:
    """Return numbers as a float64 tensor on the CPU; those of a device come together."""
    if values and isinstance(values[0], Tensor):
        return torch.stack(list(values)).cpu().double()
    return torch.tensor(values, dtype=torch.float64)


def _plain(name: str, value: object) -> float | Tensor:
    """Return the value of a metric as a float, or as a flat float64 tensor on the CPU."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Tensor) or value.ndim > 1:
        came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"the metric {name!r} returned {came}: expected a number or a flat tensor")
    return value.detach().cpu().double() if value.ndim else float(value)


class _Buffers:
    """The buffers of a private copy, restored after a forward pass wrote to them."""

    def __init__(self, module: nn.Module) -> None:
        self._found = [
            (owner._buffers, name, tensor)
            for owner in module.modules()
            for name, tensor in owner._buffers.items()
            if tensor is not None
        ]
        self.keep()

    def keep(self) -> None:
        """Keep the present values as those to restore."""
        self._kept = [(*buffer, buffer[2].clone()) for buffer in self._found]
        self._versions = [tensor._version for _, _, tensor in self._found]

    @property
    def written(self) -> bool:
        """Whether a buffer was written to since :meth:`keep`."""
        return any(
            owner.get(name) is not tensor or tensor._version != version
            for (owner, name, tensor, _), version in zip(self._kept, self._versions, strict=True)
        )

    def restore(self) -> None:
        """Restore the buffers that were written to."""
        for number, (owner, name, tensor, kept) in enumerate(self._kept):
            if owner.get(name) is not tensor or tensor._version != self._versions[number]:
                owner[name] = tensor.copy_(kept)
                self._versions[number] = tensor._version
