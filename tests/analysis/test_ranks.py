"""Processes that share the batches: what one process measures, and one sentence for all where something is wrong."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import msam_analysis as ma
from msam_analysis.results import Result, load
from tests.builders import MEASURES
from tests.programs import alone, together

from . import shared
from .cases import MLP

TOLERANCE = 1e-12
ROUNDING = 1e-14  # of numbers around 1: what a residual of nothing is
WAYS = ("True", "split")
SLICES = ("plain", "metrics", "samples", "refined", "chunk", "alone", "recalibrated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes, and one alone, have left their answers; made once for all workers of pytest."""
    root = tmp_path_factory.getbasetemp()
    shared_by_all = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "ranks"
    shared_by_all.mkdir(exist_ok=True)
    with alone(shared_by_all):
        if not (shared_by_all / "made").exists():
            together(shared.work, str(shared_by_all))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shared.answers(shared_by_all, "alone", (False,))
            (shared_by_all / "made").touch()
    return shared_by_all


@pytest.fixture(scope="module")
def found(folder: Path) -> tuple[Any, ...]:
    return tuple(torch.load(folder / f"{name}.pt", weights_only=True) for name in ("alone", "rank0", "rank1"))


def apart(one: Tensor, other: Tensor) -> float:
    """The distance of two tensors, relatively."""
    assert one.shape == other.shape
    return float((one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-300))


@pytest.mark.parametrize("ranks", WAYS)
@pytest.mark.parametrize("name", [*shared.ASKED, *shared.FORMS, "missing"])
def test_two_processes_give_what_one_does(name: str, ranks: str, found: tuple[Any, ...]) -> None:
    """And each of them the same, to the bit."""
    alone, *both = found
    tolerance = shared.ASKED[name][1] if name in shared.ASKED else 1e-8 if name == "missing" else TOLERANCE
    expected, first, second = alone[f"{name} False"], *(one[f"{name} {ranks}"] for one in both)
    for key, tensor in expected.items():
        assert torch.equal(first[key], second[key]), key
        assert apart(tensor, first[key]) <= tolerance, key
    if name == "missing":
        assert bool(first["central"]), "the batch of one process decides for both"
    if name == "ignoring":
        assert bool(first["weighed"])


def differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """How far two results are apart, field by field; settings aside, which say how many processes there were."""
    if isinstance(one, Result):
        for field in dataclasses.fields(one):
            if field.name not in ("settings", "identity", "sources"):
                yield from differences(getattr(one, field.name), getattr(other, field.name), f"{name}.{field.name}")
    elif isinstance(one, Tensor) and one.is_floating_point():
        known = one.isfinite()
        assert torch.equal(known, other.isfinite()), name
        rounding = bool(known.any()) and float((one[known] - other[known]).norm()) < ROUNDING
        yield name, 0.0 if rounding or not bool(known.any()) else apart(one[known], other[known])
    elif isinstance(one, Mapping):
        assert list(one) == list(other), name
        for key in one:
            yield from differences(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{name}.{index}")
    elif isinstance(one, float):
        yield from differences(torch.tensor([one]).double(), torch.tensor([other]).double(), name)
    else:
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name


@pytest.mark.parametrize("ranks", WAYS)
@pytest.mark.parametrize("name", [*MEASURES, *SLICES, "everything"])
def test_every_measure(name: str, ranks: str, folder: Path) -> None:
    alone, first, second = (
        load(folder / f"{name} {way}") for way in ("False.alone", f"{ranks}.rank0", f"{ranks}.rank1")
    )
    assert all(off == 0 for _, off in differences(first, second))
    for key, off in differences(alone, first):
        assert off <= 1e-9, (key, off)


TOLD = {
    "model": "ValueError: the processes differ in their weights or vectors (making an objective",
    "layers": "ValueError: process 1 measures something else than process 0: they differ in the network; expected",
    "data": "ValueError: process 1 measures something else than process 0: they differ in data; expected the same",
    "arguments": "ValueError: process 1 measures something else than process 0: they differ in arguments; expected",
    "bad argument": "batchnorm must be one of ('eval', 'batch', 'recalibrate'), got 'none'",
    "empty": "ValueError: the data is empty",
    "point": "ValueError: the processes differ in their weights or vectors (a loss",
    "length": "expected a flat point w",
    "vector": "ValueError: the processes differ in their weights or vectors (products of second",
    "samples": "ValueError: the processes differ in their weights or vectors (choosing samples",
    "no sample": "no sample 19: expected indices from 0 to 18",
    "calls": "ValueError: process 1 does something else than process 0 (a gradient, not a loss): expected the same",
    "trace": "ValueError: the processes differ in their weights or vectors (products of second",
    "unlike samples": "batches differ in what is not rows of a tensor (keys, numbers, strings, 0-dimensional tensors)",
    "batches": "ValueError: the batches of another objective are shared by processes in another way: expected",
    "shared batches": "ValueError: the batches of another objective are shared by processes in another way: expected",
    "PyHessian": "ValueError: PyHessian reads all batches in one process, and the objective has them in several",
    "gradient": "class 1 is unwell after which it goes on",
    "loss": "this and that after which it goes on",
    "product": "no room after which it goes on",
    "one error": "this again after which it goes on",
    "the same again": "this again after which it goes on",
    "interrupt": "KeyboardInterrupt",
    "nobody fails": "nothing after which it goes on",
    "not finite": "the loss is NaN or infinite at these weights: expected a finite one, which has derivatives; look",
    "metric": "the disk of this process is full",
    "shared points": "the disk of this process is full",
    "pickle": "pickle",
    "checkpoint": "['good'] {'lost': ",
}
"""Sentences that both processes get; of what only the second knows, the first says so."""
ONLY_SECOND = (
    "bad argument",
    "length",
    "no sample",
    "gradient",
    "loss",
    "product",
    "one error",
    "the same again",
    "metric",
    "shared points",
)


@pytest.mark.parametrize("name", TOLD)
def test_what_is_wrong_is_told_by_all(name: str, folder: Path) -> None:
    first, second = (torch.load(folder / f"told{rank}.pt", weights_only=True) for rank in (0, 1))
    for told in (first, second):
        assert TOLD[name] in told[name]
    if name in ONLY_SECOND:
        assert "process 1: " in first[name]
        assert "process 1: " not in second[name]
    assert float(first["goes on"]) == pytest.approx(float(second["goes on"]))


def test_a_process_that_has_ended_is_told(folder: Path) -> None:
    told = torch.load(folder / "told0.pt", weights_only=True)["left alone"]
    assert told.startswith("RuntimeError: a process has ended while this one waited for it (")


# --- one process


def test_without_a_group_there_is_one_process() -> None:
    alone = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    for ranks in (True, "split"):
        o = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), ranks=ranks)
        assert torch.equal(o.gradient(), alone.gradient())
        assert o.settings == alone.settings


@pytest.mark.parametrize("ranks", [None, "whole", 2])
def test_an_unknown_way_to_share(ranks: Any) -> None:
    with pytest.raises(ValueError, match=r"ranks must be False, True or 'split', got"):
        ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), ranks=ranks)


def test_samples_that_a_sampler_repeats_are_told() -> None:
    x, y = (torch.cat(tensors) for tensors in zip(*MLP.data(), strict=True))
    whole = TensorDataset(x, y)  # 19 samples, of which each of two processes is given 10
    loader = DataLoader(whole, batch_size=4, sampler=DistributedSampler(whole, 2, 0, shuffle=False))
    with pytest.warns(ma.results.ApproximationWarning, match=r"repeats 1 sample\(s\)"):
        ma.Objective(MLP.model(), MLP.loss_fn, loader, ranks="split")
