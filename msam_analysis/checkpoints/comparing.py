"""The metrics of many checkpoints in one table; each metric is kept when it is done."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from msam_analysis.checkpoints.loading import Loaded, load
from msam_analysis.checkpoints.naming import distinct_names, expand, numbered
from msam_analysis.landscape.identity import identity
from msam_analysis.measures.summary import DEFAULT_METRICS, RADII, SIGMA, TOLERANCE, measure
from msam_analysis.objective.batches import Batches
from msam_analysis.objective.explaining import told
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.progress import LINE, Bar
from msam_analysis.objective.randomness import drawn_indices
from msam_analysis.objective.ranks import Ranks
from msam_analysis.results import BallSharpness, Comparison, Eigenpairs, Measurement, Result
from msam_analysis.results import load as load_result
from msam_analysis.results.checking import check
from msam_analysis.results.files import sweep, write_json
from msam_analysis.results.fingerprint import fingerprint, of_tensors

VERSION = 1
"""Raised by hand when the numbers of a metric change: what was kept before is measured again."""

_RECORD = "record.json"
_OTHERS = 70  # characters on the line of progress that are no label's
_LONGEST = 100  # characters of a folder's name


def compare(
    checkpoints: Mapping[str, str | os.PathLike[str] | nn.Module] | Sequence[str | os.PathLike[str]],
    factory: Callable[..., nn.Module] | None,
    loss_fn: Callable[..., Any],
    data: Any,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    radii: Sequence[float] = RADII,
    sigma: float = SIGMA,
    eigenvalues: int = 5,
    tolerance: float = TOLERANCE,
    max_hvps: int | None = None,
    seed: int = 0,
    samples: int | None = None,
    budget: float | None = None,
    prefix: str = "",
    ignore: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    vectors: bool = False,
    tick: Callable[[str, str], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> Comparison:
    """Measure many checkpoints on the same data with the same draws, one after the other.

    The data are held once and one model at a time, so that memory does not grow with the number of checkpoints. A
    checkpoint that fails is named in ``failures``, and the others are measured.

    Parameters
    ----------
    checkpoints
        Label to file, folder or module; or files, folders and patterns, whose labels are their names and whose order is
        that of their steps or epochs where a folder or pattern stands for several.
    factory
        Builds the model, see :func:`load`; None where all are modules.
    loss_fn, data
        As for :class:`~msam_analysis.Objective`.
    metrics, radii, sigma, eigenvalues, tolerance, max_hvps, seed
        As for :func:`~msam_analysis.measure`; the draws are the same for all.
    samples
        Number of samples, drawn at random with ``seed``, the same for all; default all.
    budget
        Seconds for all checkpoints together, see :func:`~msam_analysis.measure`; default unlimited.
    prefix, ignore
        As for :func:`load`.
    out
        Folder in which each metric is kept as soon as it is measured. The same call goes on from there; what is kept of
        other weights, data or settings is never touched. Default: nothing is written.
    vectors
        Keep eigenvectors and the displacements of balls, in the files of ``out``, or in memory if there is none: with
        the default metrics 9 times the weights of each checkpoint. Default: left out, the tensors are empty.
    tick
        Called with label and metric before each is measured.
    progress
        Show on one line the checkpoint, the metric, how far its solver is, the residual or standard error so far, and
        the time left.
    **options
        Further arguments of :class:`~msam_analysis.Objective`: ``batchnorm``, ``parameters``, ``device``, ``dtype``,
        ``examine``, ``ranks``, ...; with ``ranks`` the first process alone writes to ``out``.

    Returns
    -------
    Comparison
        Label to measurement, with paired differences from the first.

    Raises
    ------
    FileNotFoundError
        A file is missing, or a folder or pattern holds no checkpoint.
    NotADirectoryError
        ``out`` is a file.
    TypeError
        There is no factory for a file.
    ValueError
        There is no checkpoint, a metric or an option is out of range, or every checkpoint failed.

    Warns
    -----
    UserWarning
        A checkpoint failed and is left out.
    """
    named = _named(checkpoints)
    asked: dict[str, Any] = {"radii": radii, "sigma": sigma, "eigenvalues": eigenvalues, "tolerance": tolerance}
    asked |= {"max_hvps": max_hvps, "seed": seed}
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ValueError(f"samples must be a positive integer, or None for all; got {samples!r}")
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be a number of seconds above 0, or None; got {budget!r}")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise NotADirectoryError(f"out must be a folder for results, and {out} is a file: choose another")
    one_by_one = _Measuring(factory, loss_fn, data, options, samples, asked, (prefix, ignore), out, vectors)
    end = None if budget is None else time.perf_counter() + budget
    measurements: dict[str, Measurement] = {}
    sources: dict[str, Mapping[str, Any]] = {}
    failures: dict[str, str] = {}
    with Bar(len(named), "measuring", shown=progress, form=LINE, leave=False) as bar:
        line = _Line(list(named), bar, tick)
        for number, (label, one) in enumerate(named.items()):
            more: dict[str, Any] = {"metrics": metrics, "tick": partial(line.tick, label)}
            if end is not None:  # in equal parts; what one leaves goes to the others
                more["budget"] = max((end - time.perf_counter()) / (len(named) - number), 1e-3)
            try:
                measurements[label], sources[label] = one_by_one.measure(label, one, more)
            except (Exception, SystemExit) as error:  # what a user's model, loss or file does concerns this one alone
                if len(named) == 1:
                    raise
                failures[label] = told(error)
                warnings.warn(f"compare: {label} failed and is left out: {failures[label]}", UserWarning, stacklevel=2)
            bar.advance()
    if not measurements:
        first, reason = next(iter(failures.items()))
        raise ValueError(f"all {len(named)} checkpoints failed; {first}: {reason}")
    baseline = next(iter(measurements))
    return Comparison(
        measurements=measurements,
        sources=sources,
        baseline=baseline,
        failures=failures,
        settings={**measurements[baseline].settings, **_budgeted(list(measurements.values()))},
    )


@dataclass
class _Measuring:
    """What all checkpoints have in common."""

    factory: Callable[..., nn.Module] | None
    loss_fn: Callable[..., Any]
    data: Any
    options: Mapping[str, Any]
    samples: int | None
    asked: Mapping[str, Any]
    names: tuple[str, Sequence[str]]
    out: str | os.PathLike[str] | None
    vectors: bool

    def measure(self, label: str, one: Any, more: Mapping[str, Any]) -> tuple[Measurement, Mapping[str, Any]]:
        """Load and measure one checkpoint; what is kept of it is taken. What one process raises is raised by all."""
        ranks = Ranks(together=bool(self.options.get("ranks", False)))
        with ranks.apart(f"measuring {label}"):
            return self._measured(label, one, more, ranks)

    def _measured(
        self, label: str, one: Any, more: Mapping[str, Any], ranks: Ranks
    ) -> tuple[Measurement, Mapping[str, Any]]:
        loaded = self._loaded(one)
        objective = self._objective(loaded.model)
        source: dict[str, Any] = {"path": str(loaded.path), "taken": loaded.taken}
        source |= {"step": loaded.step, "epoch": loaded.epoch}
        if self.out is None:
            source["weights"] = of_tensors([objective.point()])
            measured = measure(objective, **self.asked, **more)
            return measured if self.vectors else _slim(measured), source
        decides = identity(objective, [], {}, {**self.asked, "vectors": self.vectors, "version": VERSION})
        source["weights"] = decides["weights"]
        # Of several processes the first alone reads and writes.
        kept = Kept(Path(self.out), label, source, decides) if ranks.rank == 0 else None
        known, folder = ranks.from_first((kept.known(), kept.folder.name) if kept is not None else ({}, ""))

        def keep(name: str, part: Measurement) -> None:
            if kept is not None:
                kept.keep(name, part if self.vectors else _slim(part))

        measured = measure(objective, **self.asked, **more, known=known, keep=keep)
        return _slim(measured), {**source, "folder": folder}

    def _objective(self, model: nn.Module) -> Objective:
        """Return the loss of a model; all share the data of the first, as they were read and chosen for it."""
        objective = Objective(model, self.loss_fn, self.data, **self.options)
        if isinstance(self.data, Batches):
            return objective
        if self.samples is not None and self.samples < objective.samples:
            objective = objective.with_samples(drawn_indices(objective.samples, self.samples, self.asked["seed"]))
        self.data = objective.batches
        return objective

    def _loaded(self, one: Any) -> Loaded:
        if isinstance(one, nn.Module):
            return Loaded(Path(), one, f"a {type(one).__name__} in memory")
        if self.factory is None:
            raise TypeError(f"expected a factory for the checkpoint {one}, got None: pass what builds its model")
        prefix, ignore = self.names
        return load(one, self.factory, prefix=prefix, ignore=ignore)


class _Line:
    """What the line of progress says: which checkpoint, which metric, and how much time is left."""

    def __init__(self, labels: Sequence[str], bar: Bar, tick: Callable[[str, str], None] | None) -> None:
        self._labels, self._bar, self._tell = list(labels), bar, tick
        self._first: tuple[int, float] | None = None  # the first checkpoint that is measured now, and when it began

    def tick(self, label: str, metric: str) -> None:
        """Say which metric of which checkpoint is begun."""
        number, count, now = self._labels.index(label), len(self._labels), time.monotonic()
        first, begun = self._first = self._first or (number, now)
        left = f"{(now - begun) / (number - first) * (count - number):.0f} s left" if number > first else ""
        room = max(self._bar.width - _OTHERS, 10)
        short = label if len(label) <= room else f"…{label[1 - room :]}"
        self._bar.say(f"{short} {number + 1}/{count}: {metric}", left)
        if self._tell is not None:
            self._tell(label, metric)


class Kept:
    """The folder of one checkpoint: a file per result, and a record of what was measured on what.

    ``root``: Folder of all. ``label``: Wanted name of the folder in it; a number is added where that is taken by other
    weights, data or settings. ``source``: What is known of the checkpoint. ``identity``: What decides the numbers.
    """

    def __init__(self, root: Path, label: str, source: Mapping[str, Any], identity: Mapping[str, str]) -> None:
        self._key = fingerprint(dict(identity))
        name = "".join(char if char.isalnum() or char in "-_.=+ " else "-" for char in label)[:_LONGEST].strip(". ")
        self.folder = next(folder for folder in numbered(root / (name or "checkpoint")) if self._free(folder))
        new = {"key": self._key, **source, "identity": dict(identity), "metrics": {}}
        self._record: dict[str, Any] = self._read(self.folder) or new
        sweep(self.folder)

    def known(self) -> dict[str, Measurement]:
        """Return the metrics that are there whole."""
        found: dict[str, Measurement] = {}
        for name, part in self._record["metrics"].items():
            # what is damaged is measured again
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                results = {result: load_result(self.folder / f"{result}.safetensors") for result in part["results"]}
                whole = Measurement(rows=tuple(part["rows"]), results=results, settings=part["settings"])
                check(whole)
                found[name] = whole
        return found

    def keep(self, name: str, part: Measurement) -> None:
        """Write the results of a metric, and then its rows: what is in the record is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for result, one in part.results.items():
            one.save(self.folder / f"{result}.safetensors")
        self._record["metrics"][name] = {
            "rows": [dict(row) for row in part.rows],
            "results": list(part.results),
            "settings": dict(part.settings),
        }
        write_json(self.folder / _RECORD, self._record)

    def _free(self, folder: Path) -> bool:
        record = self._read(folder)
        return record["key"] == self._key if record is not None else not folder.exists() or not any(folder.iterdir())

    @staticmethod
    def _read(folder: Path) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        whole = isinstance(record, dict) and {"key", "metrics"} <= record.keys() and isinstance(record["metrics"], dict)
        return record if whole else None


def _named(checkpoints: Any) -> dict[str, Any]:
    if isinstance(checkpoints, Mapping):
        found = {str(label): one for label, one in checkpoints.items()}
    else:
        paths = expand([checkpoints] if isinstance(checkpoints, (str, os.PathLike)) else list(checkpoints))
        found = dict(zip(distinct_names(paths), paths, strict=True))
    if not found:
        raise ValueError("there is no checkpoint to measure: expected a file, a folder or a module for each label")
    return found


def _budgeted(measured: Sequence[Measurement]) -> dict[str, str]:
    """Return which metrics a budget cut or left out, with the number of checkpoints where it is not all of them."""
    said: dict[str, str] = {}
    for what in ("cut", "not measured"):
        counts = Counter(name for one in measured for name in str(one.settings.get(what) or "").split(", ") if name)
        if counts:
            parts = (name if n == len(measured) else f"{name} ({n} of {len(measured)})" for name, n in counts.items())
            said[what] = ", ".join(parts)
    return said


def _slim(measured: Measurement) -> Measurement:
    """Return a measurement without the vectors of the size of the weights."""
    results = {name: _without_vectors(result) for name, result in measured.results.items()}
    return replace(measured, results=results)


def _without_vectors(result: Result) -> Result:
    if isinstance(result, Eigenpairs):
        return replace(result, vectors=result.vectors[:0].clone())
    if isinstance(result, BallSharpness):
        return replace(result, displacement=result.displacement[:0].clone())
    return result
