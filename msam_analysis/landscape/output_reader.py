"""Metrics and losses of single samples, read off the forward passes of the loss at no further cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msam_analysis.landscape.metrics import Metric, OutputMetric
from msam_analysis.landscape.sampling import per_sample
from msam_analysis.objective.nested import count_samples
from msam_analysis.objective.ranks import Ranks


class OutputReader:
    """Reads metrics, and the losses of single samples, between a network and its criterion.

    Parameters
    ----------
    module
        A private copy of network and criterion; its criterion is replaced by one that shows its arguments.
    metrics
        Metrics by name; only those that are an :class:`OutputMetric` are read here.
    losses
        Whether the losses of single samples are wanted.

    Attributes
    ----------
    names
        Names of the metrics that are read here.
    listens
        Whether passes count.
    """

    def __init__(self, module: Any, metrics: Mapping[str, Metric], *, losses: bool) -> None:
        self._metrics = {name: metric for name, metric in metrics.items() if isinstance(metric, OutputMetric)}
        self.names = tuple(self._metrics)
        self.listens = True
        self._criterion = per_sample(module.loss_fn)
        self._seen: dict[str, list[Tensor]] = {name: [] for name in self._metrics}
        self._losses: list[Tensor | None] = []
        self._wanted = losses and self._criterion is not None
        self._checked = False
        if self._metrics or self._wanted:
            criterion = module.loss_fn
            del module.loss_fn
            module.loss_fn = _ReadCriterion(criterion, self)

    def __call__(self, output: Any, target: Any) -> None:
        """Note the metrics and the losses of one batch."""
        if not self.listens:
            return
        if isinstance(output, nn.Module):
            self._wanted = False
            if self._metrics:
                raise ValueError(
                    f"the metric {self.names[0]!r} is read off the output for (input, target) batches, and the data "
                    "has batches of another kind: write a metric f(objective, w) for them"
                )
            return
        samples = count_samples((target, output))
        if self._wanted:
            self._losses.append(self._own_losses(output, target, samples))
        for name, metric in self._metrics.items():
            own = metric.per_sample
            measured = self._own_losses(output, target, samples) if own is None else own(output, target)
            if not isinstance(measured, Tensor) or measured.shape != (samples,):
                came = f"shape {tuple(measured.shape)}" if isinstance(measured, Tensor) else type(measured).__name__
                raise ValueError(
                    f"the metric {name!r} returned {came} for a batch of {samples} samples: expected one number each; "
                    "a loss without an argument 'reduction' has none: write an OutputMetric with a function"
                )
            self._seen[name].append(measured)

    def _own_losses(self, output: Any, target: Any, samples: int) -> Tensor | None:
        losses = self._criterion(output, target) if self._criterion is not None else None
        if not isinstance(losses, Tensor) or losses.ndim == 0 or len(losses) != samples:
            return None
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def losses(self, means: list[Any]) -> Tensor | None:
        """Return the loss of every sample since the last call; ``None`` if the loss of a batch is not their mean."""
        seen = [losses for losses in self._losses if losses is not None]
        self._losses = []
        if self._wanted and not self._checked:
            self._checked = True
            own = torch.tensor([float(losses.mean()) for losses in seen], dtype=torch.float64)
            told = torch.tensor([float(mean) for mean in means], dtype=torch.float64)
            # They differ for class weights and for targets that are ignored.
            self._wanted = len(own) == len(told) and torch.allclose(own, told, rtol=1e-4, equal_nan=True)
        if not self._wanted:
            return None
        return torch.cat(seen).cpu().double() if seen else torch.zeros(0, dtype=torch.float64)

    def collect(self, numbers: Sequence[int], ranks: Ranks) -> list[float | Tensor]:
        """Return the metrics over the batches of all processes since the last call; this one's have these numbers."""
        seen = self._seen
        self.forget()
        if ranks.count > 1:
            mine = {name: [one.cpu() for one in own] for name, own in seen.items()}
            found = ranks.everyone((list(numbers), mine))
            places = sorted((n, rank, i) for rank, (own, _) in enumerate(found) for i, n in enumerate(own))
            seen = {name: [found[rank][1][name][i] for _, rank, i in places] for name in seen}
        values = {name: torch.cat(parts).cpu().double() for name, parts in seen.items()}
        return [values[name] if metric.each else float(values[name].mean()) for name, metric in self._metrics.items()]

    def forget(self) -> None:
        """Drop the notes of a pass that does not count."""
        self._seen = {name: [] for name in self._metrics}
        self._losses = []


class _ReadCriterion(nn.Module):
    """A criterion that shows its arguments to a reader."""

    def __init__(self, loss_fn: Any, reader: OutputReader) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self._reader = reader

    def forward(self, *arguments: Any) -> Any:
        """Return the criterion's loss."""
        self._reader(*arguments)
        return self.loss_fn(*arguments)
