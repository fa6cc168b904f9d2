"""The metrics of several checkpoints, side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from msam_analysis.results.base import Reading, Result
from msam_analysis.results.together import Measurement

_PAIRED = {"average_sharpness": "average", "trace": "trace"}  # metrics whose draws are the same for all checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Result, Mapping[str, Measurement]):
    """The metrics of several checkpoints on the same data with the same draws: a mapping from label to measurement.

    Attributes
    ----------
    measurements
        Label to measurement, in the order of the checkpoints.
    sources
        Label to what is known of the checkpoint: ``path``, ``taken`` (what was read from it), ``weights`` (their
        fingerprint), ``step``, ``epoch`` (None where neither file nor name says so).
    baseline
        The label from which differences are taken: the first.
    failures
        Label to the reason, for each checkpoint that could not be measured.
    """

    measurements: Mapping[str, Measurement]
    sources: Mapping[str, Mapping[str, Any]]
    baseline: str
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def _disagreement(self) -> str:
        if not self.measurements:
            return "it has no measurements, expected one or more"
        if self.baseline not in {*self.measurements, *self.failures}:
            return f"its baseline {self.baseline[:60]!a} is none of its labels"
        for label, source in self.sources.items():
            counts = [source.get(counter) for counter in ("step", "epoch")]
            if not all(count is None or (type(count) is int and 0 <= count < 2**63) for count in counts):
                return f"the step or epoch of {label[:60]!a} is no whole number of 0 or more"
        return ""

    def __getitem__(self, label: str) -> Measurement:
        """Return the measurement of one checkpoint."""
        return self.measurements[label]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the labels."""
        return iter(self.measurements)

    def __len__(self) -> int:
        """Return the number of checkpoints measured."""
        return len(self.measurements)

    @property
    def converged(self) -> bool:
        """Whether every iterative solver did, for every checkpoint."""
        return all(measured.converged for measured in self.measurements.values())

    @property
    def steps(self) -> list[float]:
        """The step of every checkpoint, else its epoch, else NaN."""
        known = [self.sources.get(label, {}) for label in self]
        for counter in ("step", "epoch"):
            if known and all(source.get(counter) is not None for source in known):
                return [float(source[counter]) for source in known]
        return [math.nan] * len(known)

    @property
    def metrics(self) -> list[str]:
        """Names of the numbers that were measured, in the order of the table."""
        return list(dict.fromkeys(reading.name for measured in self.values() for reading in measured.readings()))

    def readings(self) -> list[Reading]:
        """Return the readings of all checkpoints, each with its label."""
        return [
            reading._replace(name=f"{label}: {reading.name}")
            for label, measured in self.items()
            for reading in measured.readings()
        ]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per checkpoint and number.

        Columns: ``label``, ``step``, ``epoch``, ``metric``, ``value``, ``uncertainty``, ``converged``, ``meaning`` (see
        :meth:`Measurement.to_frame`), ``difference`` (from the baseline) and ``difference_uncertainty``: a standard
        error over paired draws for the average and the trace, the sum of both residuals for an eigenvalue, or of both
        brackets for the critical sharpness; NaN for values that are exact or lower bounds.
        """
        frames = []
        for label, measured in self.items():
            frame = measured.to_frame()
            source = self.sources.get(label, {})
            for place, counter in enumerate(("label", "step", "epoch")):
                frame.insert(place, counter, label if counter == "label" else source.get(counter))
            differences = [self._difference(label, row) for row in measured.rows]
            frame["difference"] = [difference for difference, _ in differences]
            frame["difference_uncertainty"] = [error for _, error in differences]
            frames.append(frame.astype({"step": "Int64", "epoch": "Int64"}))
        together: pd.DataFrame = pd.concat(frames, ignore_index=True)
        return together

    def to_table(self) -> pd.DataFrame:
        """Return the values with checkpoints down and metrics across."""
        frame = self.to_frame()
        table = frame.pivot(index="label", columns="metric", values="value")
        ordered: pd.DataFrame = table.reindex(index=list(self), columns=self.metrics)
        return ordered

    def _difference(self, label: str, row: Mapping[str, Any]) -> tuple[float, float]:
        """Return what a number has over the baseline's, and the error of that."""
        metric, base = str(row["metric"]), self.measurements.get(self.baseline)
        other = next((it for it in base.rows if it["metric"] == metric), None) if base is not None else None
        if other is None:
            return math.nan, math.nan
        difference = float(row["value"]) - float(other["value"])
        if label == self.baseline:
            return 0.0, 0.0
        if metric.startswith("lambda_") or metric == "critical_sharpness":
            return difference, float(row["uncertainty"]) + float(other["uncertainty"])
        name = _PAIRED.get(metric.partition("@")[0], "")
        draws = [getattr(self.measurements[one].results.get(name), "values", None) for one in (label, self.baseline)]
        return difference, _paired(*draws)


def _paired(values: Tensor | None, others: Tensor | None) -> float:
    """Return the standard error of the mean difference of the draws that both have."""
    if values is None or others is None:
        return math.nan
    number = min(len(values), len(others))
    if number < 2:
        return math.nan
    return float((values[:number] - others[:number]).to(torch.float64).std() / math.sqrt(number))
