"""Results about the error that a metric has because its data are a finite sample."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pandas as pd
from torch import Tensor

from msam_analysis.results.base import Reading, Result, numbered, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataInterval(Result):
    """A metric on a sample of data, with the interval that its value on all data of that kind lies in.

    The interval is ``value − bias ± t · standard_error`` with Student's t of ``replicates − 1`` degrees of freedom.

    Attributes
    ----------
    value
        The metric on the samples used, in its own unit: shape ``()`` for a number, else the metric's own shape.
        Tensors here are float64, on the CPU.
    bias
        By how much ``value`` is expected to exceed the metric on unlimited data, same shape. It shrinks as
        ``1 / samples``. A maximum, such as an eigenvalue or a ball sharpness, is too high on a small sample.
    standard_error
        Of ``value`` over samples of this size, same shape.
    low, high
        Ends of the interval, same shape. Around ``corrected``, not around ``value``.
    replicates
        Shape ``(replicates, ...)``: the metric on every resample, in the order they were drawn.
    samples
        How many samples ``value`` was measured on.
    method
        ``"jackknife"``, ``"bootstrap"`` or ``"batch_means"``.
    level
        Confidence of the interval.
    failed
        Replicates on which the metric was NaN or infinite. None is dropped: the interval is then NaN.
    converged
        The metric converged on every replicate, none failed, and the bias is at most two standard errors, so that its
        estimate to first order in ``1 / samples`` can be believed.
    """

    value: Tensor
    bias: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor
    replicates: Tensor
    samples: int
    method: str
    level: float
    failed: int
    converged: bool

    _asked: ClassVar = ("method", "level", "samples", "failed")
    _shapes: ClassVar = {
        **dict.fromkeys(("value", "bias", "standard_error", "low", "high"), "..."),
        "replicates": "drawn ...",
    }
    _ranges: ClassVar = {"standard_error": "nonnegative", "level": "share"}

    @property
    def corrected(self) -> Tensor:
        """``value − bias``, the middle of the interval."""
        return self.value - self.bias

    def readings(self) -> list[Reading]:
        """Return the numbers of the metric, their bias taken off, with their standard errors."""
        values, errors = self.corrected.reshape(-1), self.standard_error.reshape(-1)
        return numbered("value less bias", values, errors, converged=self.converged)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per number of the metric: ``index`` (from 1), its value, interval, and how it was made."""
        numbers = ("value", "low", "high", "bias", "standard_error")
        columns: dict[str, object] = {"index": range(1, self.value.numel() + 1)}
        columns |= {name: getattr(self, name).reshape(-1) for name in numbers}
        columns |= {"level": self.level, "samples": self.samples, "method": self.method}
        columns |= {"replicates": len(self.replicates), "failed": self.failed, "converged": self.converged}
        return table(columns)
