"""Several points at once, and several processes: the same numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.landscape import metrics
from msam_analysis.landscape.evaluator import Evaluator
from msam_analysis.landscape.together import Together, fastest
from msam_analysis.objective.ranks import Ranks
from msam_analysis.results import Slice2D, load
from tests.programs import together

from .cases import CASES, CONVNET, MLP, Case


def plane(o: ma.Objective) -> Any:
    return tuple(ma.directions.random(o, seed, one_d=True) for seed in (1, 2))


# --- in one batch


@pytest.mark.parametrize("policy", ["eval", "batch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_points_in_one_batch(case: Case, policy: Any) -> None:
    o = ma.Objective(case.model(), case.loss_fn, case.data(), batchnorm=policy)
    single = ma.slice_2d(o, plane(o), points=(3, 5))
    for chunk in (2, 7, 15, 64):
        batched = ma.slice_2d(o, plane(o), points=(3, 5), chunk=chunk)
        np.testing.assert_allclose(batched.loss, single.loss, rtol=1e-10)
        assert batched.center_loss == single.center_loss == float(batched.loss[1, 2])
        assert dict(batched.settings)["points at once"] == chunk


def test_a_point_has_the_same_bits_in_any_company() -> None:
    o = ma.Objective(MLP.model(torch.float32), MLP.loss_fn, MLP.data(torch.float32))
    together = Together(Evaluator(o, [direction.vector for direction in plane(o)]), 8)
    points = [[0.1 * i, -0.07 * i] for i in range(19)]
    rows = together.rows(points)
    for shift in (1, 5):
        assert torch.equal(together.rows(points[shift:]), rows[shift:])
    assert torch.equal(together.rows(points[3:4]), rows[3:4])


def test_a_batched_slice_is_continued_as_it_was(tmp_path: Path) -> None:
    o = ma.Objective(MLP.model(torch.float32), MLP.loss_fn, MLP.data(torch.float32))
    whole = ma.slice_2d(o, plane(o), points=5, chunk=4, path=tmp_path / "a")
    found = load(tmp_path / "a")
    assert isinstance(found, Slice2D)
    assert torch.equal(found.loss, whole.loss)


def test_one_at_a_time_is_the_choice_on_a_cpu() -> None:
    o = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    assert fastest(Evaluator(o, [ma.directions.random(o).vector]), 1000) == 1


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + torch.randn(len(x), 3)
        return out


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out if out.sum() > 0 else -out


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "recalibrate": (
        lambda: ma.Objective(CONVNET.model(), CONVNET.loss_fn, CONVNET.data(), batchnorm="recalibrate"),
        {},
        r"chunk=4 cannot serve batchnorm='recalibrate'",
    ),
    "metrics": (
        lambda: ma.Objective(MLP.model(), MLP.loss_fn, MLP.data()),
        {"metrics": {"a": metrics.accuracy}},
        r"chunk=4 measures the loss alone, and not a:",
    ),
    "draws": (lambda: ma.Objective(Drawing(), F.cross_entropy, MLP.data()), {}, r"chunk=4 cannot batch"),
    "branches": (lambda: ma.Objective(Branching(), F.cross_entropy, MLP.data()[:1]), {}, r"chunk=4 cannot batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_batched(name: str) -> None:
    make, options, message = BAD[name]
    o = make()
    with pytest.raises(ValueError, match=message):
        ma.slice_1d(o, torch.ones(o.size).double(), points=5, chunk=4, **options)


class Twofaced(nn.Module):
    """Computes something else when it is batched."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return 2 * out if torch._C._functorch.is_batchedtensor(out) else out


def test_a_batch_that_gives_another_loss_is_refused() -> None:
    o = ma.Objective(Twofaced(), F.cross_entropy, MLP.data())
    with pytest.raises(ValueError, match=r"chunk=4 gives [\d.]+ at the centre where one point alone gives [\d.]+"):
        ma.slice_1d(o, torch.ones(o.size).double(), points=5, chunk=4)


@pytest.mark.parametrize("chunk", [0, -1, True])
def test_bad_chunks(chunk: Any) -> None:
    o = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    with pytest.raises(ValueError, match=r"chunk must be a positive number of points, got"):
        ma.slice_1d(o, ma.directions.random(o), chunk=chunk)


# --- in several processes


def slices(folder: Path, label: str) -> None:
    """Everything that processes share, each into a file."""
    o = ma.Objective(MLP.model(torch.float32), nn.CrossEntropyLoss(), MLP.data(torch.float32))
    ways: dict[str, dict[str, Any]] = {
        "plain": {"points": (3, 5)},
        "metrics": {"points": (3, 3), "metrics": {"a": metrics.accuracy, "e": metrics.sample_losses}},
        "refined": {"points": 15, "radius": 2.0, "refine": 0.05, "metrics": {"a": metrics.accuracy}},
        "batched": {"points": (3, 5), "chunk": 4},
        "samples": {"points": (3, 3), "samples": 9},
    }
    for name, options in ways.items():
        result = ma.slice_2d(o, plane(o), **options, path=folder / f"{name}-written.{label}")
        result.save(folder / f"{name}.{label}")


def refusals() -> list[str]:
    """Sentences that every process gets when they do not measure the same."""
    told = []
    o = ma.Objective(MLP.model(seed=dist.get_rank()), MLP.loss_fn, MLP.data())
    try:
        ma.slice_1d(o, torch.ones(o.size).double(), points=3)
    except ValueError as error:
        told.append(str(error))
    alone = ma.slice_1d(o, torch.ones(o.size).double(), points=3, distributed=False)
    told.append(f"{float(alone.loss[0]):.6f}")
    return told


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=2)
    slices(Path(folder), f"rank{rank}")
    same = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    written = Path(folder) / "other"
    ma.slice_1d(same, torch.ones(same.size).double(), points=3, path=written)
    try:
        ma.slice_1d(same, torch.ones(same.size).double(), points=5, path=written)
    except ValueError as error:
        told = [*refusals(), str(error)]
    (Path(folder) / f"told{rank}").write_text("\n".join(told))
    dist.destroy_process_group()


def test_two_processes_give_what_one_does() -> None:
    """Bit for bit, on both; with one file, written by the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        together(work, name)
        slices(folder, "alone")
        for way in ("plain", "metrics", "refined", "batched", "samples"):
            alone, first, second, written = (
                load(folder / f"{way}{suffix}") for suffix in (".alone", ".rank0", ".rank1", "-written.rank0")
            )
            assert isinstance(alone, Slice2D)
            for other in (first, second, written):
                assert isinstance(other, Slice2D)
                for field in ("loss", "evaluated", "standard_error", "rise_error"):
                    a, b = getattr(alone, field), getattr(other, field)
                    assert (a is None and b is None) or torch.equal(a, b), (way, field)
                assert all(torch.equal(alone.metrics[key], other.metrics[key]) for key in alone.metrics)
                assert (alone.error, alone.center_loss) == (other.error, other.center_loss)
            assert not (folder / f"{way}-written.rank1").exists()
        told = [(folder / f"told{rank}").read_text().splitlines() for rank in (0, 1)]
        for sentences in told:
            assert sentences[0].startswith("process 1 measures something else than process 0: they differ in weights")
            assert "belongs to another measurement" in sentences[2]
        assert told[0][1] != told[1][1], "each its own network, with distributed=False"


def test_one_process_is_a_group_of_its_own() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.count) == (0, 1)
    assert list(ranks.share([1, 2, 3])) == [1, 2, 3]
    assert ranks.from_first("x") == "x"
    assert ranks.slowest(1.5) == 1.5
