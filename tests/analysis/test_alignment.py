"""The angle of MSAM's gradient to SAM's, against plane geometry by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import msam_analysis as ma
from msam_analysis.measures import alignment
from msam_analysis.measures.alignment import cosine, inner_products, sam_msam_angle, total_products
from msam_analysis.results import SamMsamAngle, load

from .cases import CONVNET, MLP, Quadratic, normal
from .oracles import flatten, reference_loss, symmetric


def mean_output(output: Tensor, target: Tensor) -> Tensor:
    return output.mean()


def quadratic(H: Tensor, g: Tensor) -> ma.Objective:
    return ma.Objective(Quadratic(H, g), mean_output, [(torch.ones(1).double(), torch.ones(1).double())])


def in_the_plane(H: Any, g: Any, v: Any, rho: float, rho_sam: float) -> tuple[float, float]:
    """Angle and share by least squares and the arc cosine, with the sign from the other side of the plane."""
    sam, msam = g + H @ (rho_sam * g / np.linalg.norm(g)), g - H @ (rho * v / np.linalg.norm(v))
    basis = np.stack([sam, g], axis=1)
    projected = basis @ np.linalg.lstsq(basis, msam, rcond=None)[0]
    angle = math.degrees(math.acos(np.clip(projected @ sam / np.linalg.norm(projected) / np.linalg.norm(sam), -1, 1)))
    # The side of the plain gradient is the one where the coefficient of g in (g_SAM, g) is positive.
    side = np.linalg.lstsq(basis, projected, rcond=None)[0][1]
    return math.copysign(angle, side), float(np.linalg.norm(projected) / np.linalg.norm(msam))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    rho_sam=st.floats(0.05, 2.0),
    rhos=st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=4),
)
def test_angles_on_a_parabola_are_those_by_hand(seed: int, rho_sam: float, rhos: list[float]) -> None:
    H, g, v = symmetric([3.0, 1.0, 0.5, -0.2], seed), normal(4, seed=seed), normal(4, seed=seed + 1)
    found = sam_msam_angle(quadratic(H, g), v, rhos, rho_sam=rho_sam)
    assert found.rhos.tolist() == sorted({0.0, *rhos})
    for rho, angle, share in zip(found.rhos.tolist(), found.angles.tolist(), found.shares.tolist(), strict=True):
        expected, length = in_the_plane(H.numpy(), g.numpy(), v.numpy(), rho, rho_sam)
        if share > 1e-3:  # of a projection to nothing there is no angle
            turn = (angle - expected + 180) % 360 - 180
            assert turn == pytest.approx(0, abs=1e-4)
        assert share == pytest.approx(length, abs=1e-9)


def test_the_plain_gradient_is_on_the_positive_side() -> None:
    """At ρ = 0 the angle is that between SAM's gradient and the plain one, and all of the gradient is in the plane."""
    H, g = symmetric([3.0, 1.0, 0.5], 1), normal(3, seed=2)
    found = sam_msam_angle(quadratic(H, g), normal(3, seed=3), [1.0], rho_sam=0.5)
    sam = g + H @ (0.5 * g / g.norm())
    assert float(found.angles[0]) == pytest.approx(math.degrees(math.acos(float(g @ sam / g.norm() / sam.norm()))))
    assert float(found.angles[0]) > 0
    assert float(found.shares[0]) == pytest.approx(1.0, abs=1e-12)


def test_where_momentum_opposes_the_gradient_the_root_is_sams_radius() -> None:
    """Then −v is along g: MSAM with SAM's radius is SAM, and the angle is 0 there and nowhere else."""
    H, g = symmetric([3.0, 1.0, 0.5], 4), normal(3, seed=5)
    objective = quadratic(H, g)
    found = sam_msam_angle(objective, -2.5 * g, [0.25, 0.5, 1.0], rho_sam=0.5)
    assert found.angles[2] == pytest.approx(0, abs=1e-9)
    assert found.rho_0 == pytest.approx(0.5, abs=1e-9)
    between = sam_msam_angle(objective, -2.5 * g, [0.3, 0.7], rho_sam=0.5)
    assert between.bracket == (0.3, 0.7)
    assert between.rho_0 == pytest.approx(0.5, abs=0.05)  # the curve is bent over that length
    fine = sam_msam_angle(objective, -2.5 * g, [0.49, 0.51], rho_sam=0.5)
    assert fine.rho_0 == pytest.approx(0.5, abs=1e-4)
    low, high = float(between.angles[1]), float(between.angles[2])
    assert between.rho_0 == pytest.approx(0.3 + 0.4 * low / (low - high), rel=1e-12)


def test_no_root_where_the_sign_does_not_change() -> None:
    H, g = symmetric([3.0, 1.0, 0.5], 4), normal(3, seed=5)
    found = sam_msam_angle(quadratic(H, g), g, [0.1, 0.2], rho_sam=0.5)  # along +g: away from SAM
    assert (found.angles > 0).all()
    assert math.isnan(found.rho_0)
    assert all(math.isnan(end) for end in found.bracket)


def test_turning_round_is_no_root() -> None:
    """A gradient that passes through its opposite changes the sign of its angle as well, at 180 degrees."""
    H, g = torch.diag(torch.tensor([1.0, 2.0]).double()), torch.tensor([1.0, 1.0]).double()
    found = sam_msam_angle(quadratic(H, g), torch.tensor([0.656, 0.3775]).double(), [1.2, 8.0, 9.0], rho_sam=0.5)
    assert (found.angles > 0).tolist() == [True, True, False, False]
    assert (found.angles[1:].abs() > 150).all()
    assert math.isnan(found.rho_0)


@pytest.mark.parametrize("policy", ["eval", "batch"])
def test_on_a_network_against_the_reference_loss(policy: Any) -> None:
    """Gradients by torch.func of a forward pass written from the formulas."""
    model, data = CONVNET.model().eval(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy)
    gradient = torch.func.grad(reference_loss(CONVNET, model, data, policy))
    w, v = flatten(model), normal(objective.size, seed=6)
    plain = gradient(w)
    sam = gradient(w + 0.2 * plain / plain.norm())
    basis = torch.linalg.qr(torch.stack([sam, plain], dim=1)).Q
    basis = basis * torch.sign(basis.T @ torch.stack([sam, plain], dim=1)).diagonal()
    found = sam_msam_angle(objective, v, [0.4, 1.5], rho_sam=0.2)
    for rho, angle, share in zip(found.rhos, found.angles, found.shares, strict=True):
        there = gradient(w - rho * v / v.norm())
        x, y = (basis.T @ there).tolist()
        assert float(angle) == pytest.approx(math.degrees(math.atan2(y, x)), abs=1e-6)
        assert float(share) == pytest.approx(math.hypot(x, y) / float(there.norm()), rel=1e-8)


def test_another_point() -> None:
    model, data = MLP.model().eval(), MLP.data()
    objective = ma.Objective(model, MLP.loss_fn, data)
    w, v = objective.point() + 0.1, normal(objective.size, seed=7)
    there = sam_msam_angle(objective, v, [1.0], rho_sam=0.2, w=w)
    nn.utils.vector_to_parameters(w, model.parameters())
    here = sam_msam_angle(objective, v, [1.0], rho_sam=0.2)
    torch.testing.assert_close(there.angles, here.angles, rtol=1e-10, atol=1e-10)


def test_unknown_planes_and_directions_are_nan() -> None:
    """A gradient that SAM does not turn spans no plane; no momentum has no direction, and no gradient no anything."""
    H, g, v = torch.eye(3).double(), normal(3, seed=8), normal(3, seed=9)
    parallel = sam_msam_angle(quadratic(H, g), v, [1.0], rho_sam=0.5)
    assert parallel.angles.isnan().all()
    assert parallel.shares.isnan().all()
    turned = quadratic(symmetric([3.0, 1.0, 0.5], 4), g)
    without = sam_msam_angle(turned, 0 * v, [1.0], rho_sam=0.5)
    assert without.angles.isnan().tolist() == [False, True]
    nothing = sam_msam_angle(quadratic(H, 0 * g), v, [1.0], rho_sam=0.5)
    assert nothing.angles.isnan().all()
    assert all(math.isnan(found.rho_0) for found in (parallel, without, nothing))


def test_the_result_in_a_file_and_as_a_table(tmp_path: Path) -> None:
    found = sam_msam_angle(
        quadratic(symmetric([3.0, 1.0], 1), normal(2, seed=1)), normal(2, seed=2), [0.5, 1], rho_sam=0.5
    )
    again = load(found.save(tmp_path / "angle.safetensors"))
    assert isinstance(again, SamMsamAngle)
    assert again.to_frame().equals(found.to_frame())
    assert found.to_frame()["rho"].tolist() == [0.0, 0.5, 1.0]
    assert np.array_equal(again.bracket, found.bracket, equal_nan=True)
    assert isinstance(again.bracket, tuple)


BAD: dict[str, tuple[Callable[[ma.Objective], Any], str]] = {
    "no radius": (lambda o: sam_msam_angle(o, o.point(), [1.0], rho_sam=0.0), r"rho_sam must be a positive.*got 0\.0"),
    "NaN": (lambda o: sam_msam_angle(o, o.point(), [math.nan], rho_sam=1.0), r"rhos must be finite.*got \[nan\]"),
    "none": (
        lambda o: sam_msam_angle(o, o.point(), [], rho_sam=1.0),
        r"rhos must be finite and at least one, got \[\]",
    ),
    "another shape": (lambda o: sam_msam_angle(o, torch.ones(2), [1.0], rho_sam=1.0), r"expected a flat momentum of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(quadratic(torch.eye(3).double(), torch.ones(3).double()))


# --- inner products


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3), st.booleans(), st.booleans()), max_size=5),
    block=st.sampled_from([1, 5, alignment._BLOCK]),
)
def test_inner_products_are_those_of_numpy(seed: int, shapes: list[tuple[int, int, bool, bool]], block: int) -> None:
    first: dict[Tensor, Tensor] = {}
    second: dict[Tensor, Tensor] = {}
    for number, (rows, columns, in_first, in_second) in enumerate(shapes):
        parameter = torch.zeros(rows, columns)
        for vectors, there, add in ((first, in_first, 0), (second, in_second, 1)):
            if there:
                vectors[parameter] = normal(rows, columns, seed=seed + 2 * number + add).float()
    # Whether tensors are taken together, each by itself, or in pieces.
    with mock.patch.object(alignment, "_BLOCK", block):
        found, whole = inner_products(first, second), total_products(first, second)
    np.testing.assert_allclose(whole, [sum(row[place] for row in found.values()) for place in range(3)], rtol=1e-12)
    assert found.keys() == first.keys() | second.keys()
    for parameter, (ab, aa, bb) in found.items():
        zero = torch.zeros_like(parameter)
        a, b = (vectors.get(parameter, zero).double().numpy().ravel() for vectors in (first, second))
        np.testing.assert_allclose([ab, aa, bb], [a @ b, a @ a, b @ b], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1.0, 1.0, 1.0)], 1.0),
        ([(-0.5, 1.0, 0.25), (0.0, 0.0, 0.75)], -0.5),
        ([(1.0 + 1e-15, 1.0, 1.0)], 1.0),
        ([(0.0, 0.0, 1.0)], math.nan),
        ([(math.nan, math.nan, 1.0)], math.nan),
        ([(math.inf, 1.0, math.inf)], math.nan),
        ([], math.nan),
    ],
)
def test_cosine_of_inner_products(rows: list[tuple[float, float, float]], expected: float) -> None:
    assert cosine(rows) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_has_no_angle(value: float) -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    w.grad = torch.ones(2)
    optimizer.step()
    w.grad = torch.tensor([value, 1.0])
    assert math.isnan(ma.momentum_gradient_cosine(optimizer))


def test_sparse_gradients_count_as_dense_ones() -> None:
    embedding = nn.Embedding(4, 2, sparse=True).double()
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1, momentum=0.9)
    embedding.weight.grad = normal(4, 2, seed=1)
    optimizer.step()
    dense = normal(4, 2, seed=2)
    embedding.weight.grad = dense
    expected = ma.momentum_gradient_cosine(optimizer)
    embedding.weight.grad = dense.to_sparse()
    assert ma.momentum_gradient_cosine(optimizer) == expected
