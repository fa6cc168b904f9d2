"""Ranks of features: against matrices of known rank, numpy's SVD and PCA by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from msam_analysis.measures.features import feature_rank
from msam_analysis.results import FeatureRank, load
from msam_analysis.studies.networks import mlp


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank: int, samples: int, dimension: int, seed: int = 0) -> Tensor:
    return normal(samples, rank, seed=seed) @ normal(rank, dimension, seed=seed + 1)


@given(st.integers(1, 6), st.integers(8, 20), st.integers(8, 20), st.integers(0, 9))
def test_rank_of_a_product(rank: int, samples: int, dimension: int, seed: int) -> None:
    found = feature_rank(None, of_rank(rank, samples, dimension, seed), threshold=1 - 1e-9)
    assert found.rank == found.numerical_rank == rank
    assert 1 <= found.stable_rank <= found.effective_rank + 1e-9 <= rank + 2e-9
    assert (found.samples, found.dimension) == (samples, dimension)


@pytest.mark.parametrize(("samples", "dimension"), [(30, 7), (7, 30)])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_against_numpy(samples: int, dimension: int, threshold: float) -> None:
    features = normal(samples, dimension) * torch.linspace(0.1, 3.0, dimension) + 5.0
    found = feature_rank(None, features, threshold=threshold)
    matrix = features.numpy()
    values = np.linalg.svd(matrix - matrix.mean(axis=0), compute_uv=False)
    explained = np.cumsum(values**2) / np.sum(values**2)
    assert found.rank == int(np.argmax(explained >= threshold)) + 1
    assert np.allclose(found.singular_values.numpy(), values, atol=1e-6 * values[0])
    shares = values[values > 1e-6] / values.sum()
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert found.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2)


def test_known_shares() -> None:
    """Four directions with 50, 30, 15 and 5 % of the variance."""
    basis = torch.linalg.qr(normal(40, 4) - normal(40, 4).mean(dim=0))[0]
    basis = torch.linalg.qr(basis - basis.mean(dim=0))[0]
    features = basis * torch.tensor([50.0, 30.0, 15.0, 5.0], dtype=torch.float64).sqrt()
    ranks = {share: feature_rank(None, features, threshold=share).rank for share in (0.49, 0.51, 0.81, 0.96)}
    assert ranks == {0.49: 1, 0.51: 2, 0.81: 3, 0.96: 4}


@given(st.floats(-50, 50), st.floats(0.01, 100))
def test_shift_and_scale_change_nothing(shift: float, scale: float) -> None:
    features = of_rank(3, 20, 8)
    one, other = feature_rank(None, features), feature_rank(None, scale * features + shift)
    assert one.rank == other.rank
    assert one.stable_rank == pytest.approx(other.stable_rank, rel=1e-6)


def test_features_that_do_not_vary() -> None:
    found = feature_rank(None, torch.full((9, 4), 1 / 3))
    assert (found.rank, found.numerical_rank, found.effective_rank, found.stable_rank) == (0, 0, 0.0, 0.0)


def test_a_threshold_of_one_needs_every_component() -> None:
    assert feature_rank(None, normal(30, 5), threshold=1).rank == 5


def test_layer_of_a_network() -> None:
    network = mlp([6, 9, 3])
    network.train()
    before = copy.deepcopy(network.state_dict())
    x = normal(20, 6).float()
    batches = [(x[:12], None), (x[12:], None)]
    direct = feature_rank(None, network.features(x))
    found = feature_rank(network, batches)
    assert torch.allclose(found.singular_values, direct.singular_values, rtol=1e-4, atol=1e-5)
    assert found.settings["layer"] == "features"
    assert feature_rank(network, batches, layer="head").dimension == 3
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_images_are_flattened_and_batchnorm_is_evaluated() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    x = normal(10, 1, 4, 4).float()
    found = feature_rank(network, [(x[:4],), (x[4:],)], layer="1")
    assert found.dimension == 8
    with torch.no_grad():
        outputs = network.eval()[:2](x).flatten(1)
    assert torch.allclose(found.singular_values, feature_rank(None, outputs).singular_values, atol=1e-5)


def test_table_and_file(tmp_path: Path) -> None:
    found = feature_rank(None, of_rank(3, 12, 5))
    frame = found.to_frame()
    assert list(frame.columns) == ["component", "singular_value", "explained"]
    assert frame["explained"].iloc[-1] == pytest.approx(1.0)
    read = load(found.save(tmp_path / "rank.safetensors"))
    assert isinstance(read, FeatureRank)
    assert (read.rank, read.effective_rank) == (found.rank, found.effective_rank)
    assert torch.equal(read.singular_values, found.singular_values)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.unused = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("third", "the model has no layer 'third': expected the name of a submodule"),
        ("pair", "expected layer 'pair' to return a tensor with one entry for each sample, got tuple"),
        ("unused", "expected layer 'unused' to return a tensor with one entry for each sample, got NoneType"),
    ],
)
def test_layers_that_give_no_features(layer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_rank(Last(), [(normal(5, 3),)], layer=layer)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="threshold must be a share"):
        feature_rank(None, normal(5, 3), threshold=1.5)
    with pytest.raises(TypeError, match="expected features as a tensor, got list"):
        feature_rank(None, [normal(5, 3)])
    for features in (normal(1, 3), normal(4, 3) * torch.nan):
        with pytest.raises(ValueError, match="expected finite features of at least two samples"):
            feature_rank(None, features)


def test_given_features_stay_as_they_are() -> None:
    features = normal(20, 5, seed=3).double()
    before = features.clone()
    feature_rank(None, features)
    assert torch.equal(features, before)
