"""A slice on part of the data: the same part everywhere, and an interval that covers the loss on all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.landscape.sampling import standard_error

from .cases import MLP, TAGGER, labels, normal, split


class Tilted(nn.Module):
    """Scores with a bias that has a closed form's freedom: a plain linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        with torch.no_grad():
            self.linear.weight.copy_(normal(3, 4, seed=1))
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


X, Y = normal(200, 4, seed=2), labels(200, classes=3, seed=3)


def objective(loss_fn: Any = F.cross_entropy, sizes: Any = (64, 64, 64, 8)) -> ma.Objective:
    return ma.Objective(Tilted(), loss_fn, split(sizes, X, Y))


def of_batches_only(output: Tensor, target: Tensor) -> Tensor:
    """A loss that offers no reduction."""
    return F.cross_entropy(output, target)


def line(o: ma.Objective, **options: Any) -> Any:
    return ma.slice_1d(o, torch.linspace(-1, 1, o.size).double(), points=5, **options)


def by_hand(result: Any, chosen: Tensor) -> None:
    """The sampled loss and its errors, from the losses of the samples chosen, by NumPy."""
    model, d = Tilted(), torch.linspace(-1, 1, 15).double()
    center = None
    for index in (2, 0, 1, 3, 4):
        c = float(result.coordinates[index])
        weight, bias = model.linear.weight + c * d[:12].view(3, 4), model.linear.bias + c * d[12:]
        losses = F.cross_entropy(F.linear(X[chosen], weight, bias), Y[chosen], reduction="none").detach().numpy()
        center = losses if center is None else center
        rest = np.sqrt(1 - len(chosen) / 200)
        assert float(result.loss[index]) == pytest.approx(losses.mean(), rel=1e-12)
        expected = scipy.stats.sem(losses) * rest
        assert float(result.standard_error[index]) == pytest.approx(expected, rel=1e-9)
        rise = scipy.stats.sem(losses - center) * rest
        assert float(result.rise_error[index]) == pytest.approx(rise, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss()], ids=["function", "module"])
@pytest.mark.parametrize("samples", [2, 30, 200])
def test_standard_errors_by_hand(samples: int, loss_fn: Any) -> None:
    result = line(objective(loss_fn), samples=samples, seed=4)
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(4))[:samples].sort().values
    by_hand(result, chosen)
    assert result.units == samples
    assert dict(result.settings)["samples"] == samples
    assert dict(result.settings)["samples drawn from"] == 200
    assert float(result.rise_error[2]) == 0.0


def test_the_rise_is_known_better_than_the_loss() -> None:
    result = ma.slice_1d(objective(), torch.linspace(-1, 1, 15).double(), radius=0.1, points=5, samples=30)
    assert result.standard_error is not None
    assert result.rise_error is not None
    assert (result.rise_error < 0.3 * result.standard_error).all()


def test_all_samples_leave_no_error() -> None:
    whole, all_drawn = line(objective()), line(objective(), samples=200)
    np.testing.assert_allclose(all_drawn.loss, whole.loss, rtol=1e-13)
    assert not all_drawn.standard_error.any()
    assert whole.standard_error is None
    assert whole.interval() == (whole.loss, whole.loss)


def test_the_same_samples_at_every_point() -> None:
    """Losses of one draw move together; of another draw they differ."""
    o = objective()
    first, again, other = (line(o, samples=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.loss, again.loss)
    assert not torch.equal(first.loss, other.loss)
    surface = ma.slice_2d(o, (torch.linspace(-1, 1, 15).double(), torch.ones(15).double()), points=5, samples=20)
    torch.testing.assert_close(surface.loss[:, 2], first.loss, rtol=1e-13, atol=0)
    assert surface.standard_error is not None
    assert surface.standard_error.shape == (5, 5)


def test_intervals_cover_as_often_as_they_say() -> None:
    """150 draws of 25 of 200: the 90 % interval covers the loss on all data in 84 to 96 % of them."""
    o = objective()
    whole = line(o).loss
    hits = torch.zeros(5)
    for seed in range(150):
        low, high = line(o, samples=25, seed=seed).interval(0.9)
        hits += ((low <= whole) & (whole <= high)).float()
    assert ((hits / 150 > 0.84) & (hits / 150 < 0.96)).all(), hits / 150
    assert line(o, samples=25).interval(0.5)[0][0] > line(o, samples=25).interval(0.99)[0][0]


def test_batches_are_the_units_where_samples_cannot_be_told() -> None:
    """Class weights, and a loss without a reduction: the mean over a batch is no mean of the samples' losses."""
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0]).double())
    for loss_fn in (weighted, of_batches_only):
        o = objective(loss_fn, sizes=(8,) * 25)
        result = line(o, samples=100, seed=1)
        assert result.units == 13  # twelve batches of 8, one of 4
        chosen = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:100].sort().values
        parts = [loss_fn(Tilted()(X[part]), Y[part]).item() for part in chosen.split(8)]
        counted = torch.ones(3).double() if loss_fn is of_batches_only else torch.tensor([1.0, 5.0, 2.0]).double()
        sizes = np.array([float(counted[Y[part]].sum()) for part in chosen.split(8)])
        mean = np.average(parts, weights=sizes)
        expected = np.sqrt(0.5 * 13 / 12 * np.sum((sizes * (parts - mean)) ** 2)) / sizes.sum()
        assert float(result.standard_error[2]) == pytest.approx(expected, rel=1e-9)


def test_one_unit_tells_nothing_of_its_error() -> None:
    result = line(objective(of_batches_only), samples=40)
    assert result.units == 1
    assert torch.isnan(result.standard_error).all()
    assert torch.isnan(result.interval()[0]).all()


def test_losses_of_other_batches() -> None:
    """Dictionaries with a loss of their own: batches are the units."""
    o = ma.Objective(TAGGER.model(), TAGGER.loss_fn, TAGGER.data())
    result = line(o, samples=8)
    assert result.units == 2
    assert torch.isfinite(result.standard_error).all()


def test_both_economies_together() -> None:
    o = objective()
    dense = ma.slice_1d(o, torch.linspace(-1, 1, 15).double(), samples=50)
    result = ma.slice_1d(o, torch.linspace(-1, 1, 15).double(), samples=50, refine=0.01)
    assert result.evaluations < 51
    assert float((result.loss - dense.loss).abs().max()) <= result.error
    assert result.standard_error is not None
    assert dense.standard_error is not None
    torch.testing.assert_close(result.standard_error, dense.standard_error, rtol=0.05, atol=0)


def test_unreduced_losses_with_more_dimensions() -> None:
    o = ma.Objective(Tilted(), F.mse_loss, (X, normal(200, 3, seed=9)))
    result = line(o, samples=50)
    assert result.units == 50
    assert torch.isfinite(result.standard_error).all()


def test_formula() -> None:
    x, w = normal(6, seed=1), torch.ones(6).double()
    assert standard_error(x, w, 0.0) == pytest.approx(float(scipy.stats.sem(x)), rel=1e-12)
    assert standard_error(x, w, 0.75) == pytest.approx(float(scipy.stats.sem(x)) / 2, rel=1e-12)
    assert standard_error(x, 3 * w, 0.0) == pytest.approx(float(scipy.stats.sem(x)), rel=1e-12)


@pytest.mark.parametrize("samples", [0, 1, 20, -3, True, 2.5])
def test_bad_numbers_of_samples(samples: Any) -> None:
    o = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    with pytest.raises(ValueError, match=r"samples must be an integer from 2 to the 19 that there are, got"):
        ma.slice_1d(o, ma.directions.random(o), samples=samples)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_bad_levels(level: float) -> None:
    with pytest.raises(ValueError, match=r"level must lie between 0 and 1"):
        line(objective(), samples=20).interval(level)
