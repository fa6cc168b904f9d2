"""Ball maxima by way of parts of the data: where they help, where nothing changes, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msam_analysis as ma
from msam_analysis.results import BallSharpness

from . import cases
from .cases import Quadratic, mean_output, normal
from .oracles import symmetric, trust_region_maximum

pytestmark = pytest.mark.filterwarnings("ignore::msam_analysis.results.ConvergenceWarning")

WITHOUT: Any = ("gradient",)
WITH: Any = ("gradient", "parts")
LARGE = 4.0


def network(*, normalised: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        hidden = [nn.BatchNorm1d(12)] if normalised else []
        layers = [nn.Linear(8, 12), *hidden, nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)]
        return nn.Sequential(*layers).double()


def data(samples: int = 160) -> list[tuple[Tensor, ...]]:
    inputs, targets = normal(samples, 8, seed=90), cases.labels(samples, classes=4, seed=91)
    pairs: list[Any] = cases.split([100, samples - 100], inputs, targets)
    return pairs


def objective(**options: Any) -> ma.Objective:
    return ma.Objective(network(), nn.CrossEntropyLoss(), data(), **options)


def climbed(result: BallSharpness) -> list[str]:
    return [name for name in result.starts if name.startswith("part ")]


def check_same(one: BallSharpness, two: BallSharpness) -> None:
    """Every number is the same, bit for bit."""
    assert torch.equal(one.displacement, two.displacement)
    for name in ("sharpness", "stationarity", "gradients", "hvps", "starts", "spread", "converged"):
        assert getattr(one, name) == getattr(two, name), name


def test_parts_find_a_higher_maximum() -> None:
    whole = objective()
    without, found = (ma.ball_sharpness(whole, LARGE, starts=starts) for starts in (WITHOUT, WITH))
    assert found.sharpness > 1.05 * without.sharpness
    assert climbed(found)
    assert found.gradients <= 40
    point = whole.point()
    rise = float(whole.loss(point + found.displacement)) - float(whole.loss(point))
    assert found.sharpness == pytest.approx(rise, rel=1e-12)
    assert float(found.displacement.norm()) <= LARGE * (1 + 1e-12)
    assert found.sharpness >= max(found.starts.values())


def test_a_seed_gives_the_same_search() -> None:
    check_same(ma.ball_sharpness(objective(), LARGE), ma.ball_sharpness(objective(), LARGE))
    first, second = (ma.ball_sharpness(objective(), LARGE, starts=WITH, seed=seed) for seed in (0, 1))
    assert first.starts["part 2, random"] != second.starts["part 2, random"]


def test_a_quadratic_stays_as_it_was() -> None:
    H, g = symmetric([5.0, 3.0, 0.0, -1.0, -8.0], seed=5), normal(5, seed=74)
    scale = torch.linspace(0.5, 1.5, 200).double()
    whole = ma.Objective(Quadratic(H, g), mean_output, cases.split([150, 50], scale, torch.zeros(200)))
    found = ma.ball_sharpness(whole, 2.0)
    assert found.sharpness == pytest.approx(trust_region_maximum(H, g, 2.0), rel=1e-6)
    check_same(found, ma.ball_sharpness(whole, 2.0, starts=("gradient", "krylov", "eigenvector")))


@pytest.mark.parametrize("rho", [1e-3, 1e-2])
def test_a_small_ball_stays_as_it_was(rho: float) -> None:
    whole = objective()
    check_same(ma.ball_sharpness(whole, rho, starts=WITH), ma.ball_sharpness(whole, rho, starts=WITHOUT))


class Tabled(nn.Module):
    """A network whose batches come with a table that is no data of single samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.inner(inputs)
        return found


def tabled_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["inputs"]) * batch["table"].mean(), batch["targets"])


def tabled() -> ma.Objective:
    table = torch.ones(3).double()
    batches = [{"inputs": inputs, "targets": targets, "table": table} for inputs, targets in data()]
    return ma.Objective(Tabled(), tabled_loss, batches)


NO_PARTS = {
    "too few samples": lambda: ma.Objective(network(), nn.CrossEntropyLoss(), data(127)),
    "statistics of batches": lambda: ma.Objective(
        network(normalised=True), nn.CrossEntropyLoss(), data(), batchnorm="batch"
    ),
    "no cache": lambda: objective(cache_bytes=0),
    "no samples apart": tabled,
}


@pytest.mark.parametrize("kind", NO_PARTS)
def test_where_no_part_can_be_taken(kind: str) -> None:
    whole = NO_PARTS[kind]()
    check_same(ma.ball_sharpness(whole, LARGE, starts=WITH), ma.ball_sharpness(whole, LARGE, starts=WITHOUT))


def test_a_small_budget_is_for_all_data() -> None:
    short = [ma.ball_sharpness(objective(), LARGE, starts=starts, iterations=16) for starts in (WITH, WITHOUT)]
    check_same(*short)


def test_a_large_budget_is_for_both() -> None:
    """With room for it every start gets its first steps, and no part is climbed twice."""
    found = ma.ball_sharpness(objective(), LARGE, starts=WITH, iterations=200)
    assert len(climbed(found)) == 16
    assert found.starts["gradient"] > found.one_step
    assert found.sharpness >= ma.ball_sharpness(objective(), LARGE, starts=WITHOUT, iterations=200).sharpness


def test_parts_alone_begin_at_the_gradient() -> None:
    whole = objective()
    check_same(ma.ball_sharpness(whole, LARGE, starts=("parts",)), ma.ball_sharpness(whole, LARGE, starts=WITH))


def test_gradients_count_samples() -> None:
    seen = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal seen
        seen += len(target)
        return nn.functional.cross_entropy(output, target)

    whole = ma.Objective(network(), loss, data())
    whole.loss()
    seen = 0
    found = ma.ball_sharpness(whole, LARGE, starts=WITH)
    assert climbed(found)
    assert seen % whole.samples, "parts were looked at"
    assert found.gradients == -(-seen // whole.samples) <= 40
