"""The critical sharpness against closed forms, the mean value theorem, and losses of one number made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis.objective.direction import Direction
from msam_analysis.results import ApproximationWarning, CriticalSharpness

from .cases import CONVNET, MLP, ONE_SAMPLE, Quadratic, mean_output, normal
from .oracles import flatten, reference_loss, symmetric
from .test_sharpness_definitions import quadratic
from .test_untouched import untouched

loose: Any = ma
examples = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Line(nn.Module):
    """A model of one weight whose output is a function of it."""

    def __init__(self, function: Callable[[Tensor], Tensor], w: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))
        self.function = function

    def forward(self, scale: Tensor) -> Tensor:
        return scale * self.function(self.w)


def line(function: Callable[[Tensor], Tensor], w: float = 0.0) -> ma.Objective:
    return ma.Objective(Line(function, w), mean_output, ONE_SAMPLE, examine=False)


AHEAD = torch.ones(1, dtype=torch.float64)


def counted(objective: ma.Objective, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count losses and gradients of an objective."""
    calls = {"loss": 0, "loss_and_gradient": 0}

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return original(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(objective, name, counting(name, getattr(objective, name)))
    return calls


def check_bracket(found: CriticalSharpness, expected: float, width: float = 1 / 16) -> None:
    low, high = found.bracket
    assert low * (1 - 1e-9) <= expected <= high * (1 + 1e-9)
    assert low <= found.value <= high
    assert 1 - low / high <= width * (1 + 1e-12)
    assert found.error == max(found.value - low, high - found.value)
    assert found.converged


# --- quadratics


INDEFINITE = symmetric([3.0, 0.5, 1e-3, -0.4], seed=3)
SLOPE = torch.tensor([1.0, -0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["gradient", "given", "a tensor"])
def test_a_quadratic_in_closed_form(kind: str, seed: int) -> None:
    """``dᵀHd / gᵀd``: for the gradient its Rayleigh quotient; the parabola is exact, whatever the bracket."""
    w = normal(4, seed=seed)
    objective = quadratic(INDEFINITE, SLOPE, w)
    if kind == "gradient":
        d, found = SLOPE, ma.critical_sharpness(objective)
        assert (found.direction, found.gradients) == ("gradient", 1)
    else:
        d = SLOPE + 0.3 * normal(4, seed=10 + seed)
        found = ma.critical_sharpness(objective, d if kind == "a tensor" else Direction(d, "mine"))
        assert (found.direction, found.gradients) == ("direction" if kind == "a tensor" else "mine", 0)
    expected = float(d @ INDEFINITE @ d / (SLOPE @ d))
    assert expected > 0
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.step == pytest.approx(2 / expected, rel=1e-9)
    assert (found.status, found.crossings) == ("one crossing", 1)
    assert found.direction_norm == pytest.approx(float(d.norm()))
    assert found.loss == pytest.approx(float(objective.loss()))
    check_bracket(found, expected)


def test_every_step_tried_is_there_with_its_rise() -> None:
    """``w − η d``, as an optimizer moves: steps and rises are those of the formula."""
    found = ma.critical_sharpness(quadratic(INDEFINITE, SLOPE))
    eta = found.steps
    rises = -eta * float(SLOPE @ SLOPE) + 0.5 * eta**2 * float(SLOPE @ INDEFINITE @ SLOPE)
    torch.testing.assert_close(found.rises, rises, rtol=1e-9, atol=1e-12)
    assert bool((eta.diff() > 0).all())
    assert found.evaluations == 1 + len(eta)
    frame = found.to_frame()
    assert frame["step"].tolist() == eta.tolist()
    assert frame["rise"].tolist() == found.rises.tolist()
    shown = found.readings()[0]
    assert (shown.value, shown.error, shown.converged) == (found.value, found.error, True)


@pytest.mark.parametrize("index", range(3))
def test_along_an_eigenvectors_part_of_the_gradient_it_is_the_eigenvalue(index: int) -> None:
    values, vectors = torch.linalg.eigh(INDEFINITE)
    u = vectors[:, -1 - index]
    found = ma.critical_sharpness(quadratic(INDEFINITE, SLOPE), (SLOPE @ u) * u)
    assert found.value == pytest.approx(float(values[-1 - index]), rel=1e-6)


@examples
@given(
    seed=st.integers(0, 10**6),
    factor=st.floats(1e-6, 1e6),
    start=st.floats(-8, 8),
    size=st.integers(2, 5),
)
def test_properties_on_quadratics(seed: int, factor: float, start: float, size: int) -> None:
    """At most ``λ₁`` along the gradient; ``c d`` has ``η_c / c``; the start of the search does not matter."""
    H = symmetric([*(0.1 + normal(size - 1, seed=seed).abs()).tolist(), 1.0], seed=seed)
    g = normal(size, seed=seed + 1)
    objective = quadratic(H, g, normal(size, seed=seed + 2))
    found = ma.critical_sharpness(objective)
    assert found.status == "one crossing"
    assert found.value <= float(torch.linalg.eigvalsh(H)[-1]) * (1 + 1e-7)
    scaled = ma.critical_sharpness(objective, factor * g)
    assert scaled.step == pytest.approx(found.step / factor, rel=1e-6)
    begun = ma.critical_sharpness(objective, start=found.step * 2**start)
    assert begun.value == pytest.approx(found.value, rel=1e-6)
    check_bracket(begun, float(g @ H @ g / (g @ g)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [0.5, 1 / 16, 1e-3])
def test_the_bracket_is_as_narrow_as_asked(width: float, dtype: torch.dtype) -> None:
    model = Quadratic(INDEFINITE, SLOPE, 0.5).to(dtype)
    data = tuple(tensor.to(dtype) for tensor in ONE_SAMPLE)
    found = ma.critical_sharpness(ma.Objective(model, mean_output, data), width=width)
    check_bracket(found, float(SLOPE @ INDEFINITE @ SLOPE / (SLOPE @ SLOPE)), width)
    assert found.width == width


@pytest.mark.parametrize("H", [-torch.eye(4).double(), torch.zeros(4, 4).double()], ids=["concave", "linear"])
def test_a_loss_that_falls_and_falls_has_no_crossing(H: Tensor) -> None:
    """And the other way it rises at once: a move with the wrong sign would exchange the two."""
    objective = quadratic(H, SLOPE)
    for found in (ma.critical_sharpness(objective), ma.critical_sharpness(objective, SLOPE)):
        assert (found.status, found.value, found.crossings, found.converged) == ("no crossing", 0.0, 0, True)
        assert found.bracket == (0.0, 2 / float(found.steps[-1]))
        assert found.step == math.inf
        assert found.error == found.bracket[1] < 1e-3
        assert bool((found.rises < 0).all())


@pytest.mark.parametrize("H", [torch.zeros(4, 4).double(), INDEFINITE], ids=["linear", "curved"])
def test_a_direction_that_leads_up_rises_at_once(H: Tensor) -> None:
    found = ma.critical_sharpness(quadratic(H, SLOPE), -SLOPE)
    assert (found.status, found.value, found.step) == ("rises at once", math.inf, 0.0)
    first = next(step for step, rise in zip(found.steps, found.rises, strict=True) if rise > found.resolution)
    assert found.bracket == (2 / float(first), math.inf)
    assert found.converged
    assert math.isnan(found.error)
    assert "inf" in repr(found)
    assert "rises at once" in repr(found)


# --- losses of one number


def test_several_crossings_are_told_and_the_first_is_given() -> None:
    """``L(−η) = −sin η`` is above 0 from π to 2π, and below at 1, 2 and 8."""
    found = ma.critical_sharpness(line(torch.sin), AHEAD, start=1.0)
    assert (found.status, found.crossings) == ("several crossings", 2)
    check_bracket(found, 2 / math.pi)


def test_a_loss_that_levels_off_has_no_crossing() -> None:
    """Each parabola comes back a little farther: they are not followed for long."""
    found = ma.critical_sharpness(line(lambda w: torch.exp(w) + 1, 1.0))
    assert (found.status, found.value) == ("no crossing", 0.0)
    assert found.evaluations <= 15


def test_what_lies_before_the_start_is_not_looked_at() -> None:
    """The search passes over the first hill of ``−sin η``, and gives a later crossing: as the docstring says."""
    check_bracket(ma.critical_sharpness(line(torch.sin), start=8.0), 2 / (3 * math.pi))


@pytest.mark.parametrize("kind", ["NaN", "infinity", "overflow"])
def test_what_is_no_number_is_above(kind: str) -> None:
    beyond: dict[str, Callable[[Tensor], Tensor]] = {
        "NaN": lambda w: torch.where(w < -1.5, torch.nan, w),
        "infinity": lambda w: torch.where(w < -1.5, torch.inf, w),
        "overflow": lambda w: torch.where(w < -1.5, torch.exp(-1e5 * w), w),
    }
    for found in (
        ma.critical_sharpness(line(beyond[kind]), start=1.0),
        ma.critical_sharpness(line(beyond[kind]), AHEAD, start=64.0),
    ):
        assert (found.status, found.crossings) == ("one crossing", 1)
        check_bracket(found, 2 / 1.5)


def test_a_step_that_is_exactly_critical() -> None:
    """``½w²`` from 1: at ``η = 2`` the loss is that at the start, to the bit."""
    for start, direction in ((1.0, None), (0.75, None), (2.0, None), (2.0, AHEAD)):
        found = ma.critical_sharpness(line(lambda w: 0.5 * w**2, 1.0), direction, start=start)
        assert found.value == pytest.approx(1.0, rel=1e-12)
        check_bracket(found, 1.0)


def test_a_narrow_fall_before_a_rise_is_looked_for() -> None:
    """Far below the start the fall is between two steps of the search, and rounding hides it at the smaller one."""
    found = ma.critical_sharpness(line(lambda w: 1 + 5e-7 * w + 0.5 * w**2), AHEAD, start=1.0)
    assert found.status == "one crossing"
    check_bracket(found, 2 / 1e-6)


def test_a_fall_below_rounding_is_told() -> None:
    objective = line(lambda w: 1e6 + 1e-6 * w + w**2)
    with pytest.warns(ApproximationWarning, match=r"changes by less than its resolution .* lies between .* and inf"):
        found = ma.critical_sharpness(objective)
    assert (found.status, found.converged, found.crossings) == ("rounding", False, 0)
    assert math.isnan(found.value)
    assert 0 < found.bracket[0] <= 2 / 1e-6 < found.bracket[1]
    given = ma.critical_sharpness(objective, AHEAD)
    assert given.status == "rises at once", "without a gradient nothing says that it leads down"


def test_a_loss_that_does_not_change_is_rounding() -> None:
    with pytest.warns(ApproximationWarning, match=r"lies between 0 and inf"):
        found = ma.critical_sharpness(line(lambda w: 1 + 0 * w), AHEAD)
    assert (found.status, found.bracket) == ("rounding", (0.0, math.inf))


def test_rounding_may_keep_the_bracket_wide() -> None:
    objective = line(lambda w: 1e4 + 1e-5 * w + 0.5 * w**2)
    with pytest.warns(ApproximationWarning, match="changes by less than its resolution"):
        found = ma.critical_sharpness(objective, width=1e-3)
    assert (found.status, found.converged) == ("one crossing", False)
    low, high = found.bracket
    assert low <= 1 <= high
    assert found.readings()[0].converged is False


def test_from_weights_and_a_loss_of_zero() -> None:
    """Nothing is rounding beside a loss of 0, and the search for a fall ends."""
    found = ma.critical_sharpness(line(torch.abs), AHEAD)
    assert (found.status, found.value) == ("rises at once", math.inf)
    assert found.evaluations < 25


@pytest.mark.parametrize("direction", [None, torch.zeros(1, dtype=torch.float64)], ids=["gradient", "given"])
def test_a_zero_direction_is_told(direction: Tensor | None) -> None:
    found = ma.critical_sharpness(line(lambda w: w**2), direction)
    assert (found.status, found.evaluations, found.converged) == ("zero direction", 1, False)
    assert math.isnan(found.value)
    assert all(map(math.isnan, found.bracket))


@pytest.mark.parametrize(
    "function", [lambda w: w / 0 * 0, lambda w: 1 / w, torch.sqrt], ids=["NaN", "infinity", "gradient of infinity"]
)
def test_a_loss_or_gradient_that_is_not_finite_is_told(function: Callable[[Tensor], Tensor]) -> None:
    found = ma.critical_sharpness(line(function))
    assert (found.status, found.evaluations) == ("undefined", 1)
    assert math.isnan(found.value)
    assert math.isnan(found.step)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_directions_of_any_length(size: float) -> None:
    """The steps are then numbers that float32 does not have."""
    model, data = Quadratic(INDEFINITE, SLOPE).float(), tuple(tensor.float() for tensor in ONE_SAMPLE)
    objective = ma.Objective(model, mean_output, data)
    expected = float(SLOPE @ INDEFINITE @ SLOPE / (SLOPE @ SLOPE)) * size
    assert ma.critical_sharpness(objective, SLOPE.float() * size).value == pytest.approx(expected, rel=1e-4)


# --- one loss along the update of another


def test_the_relative_critical_sharpness_of_two_quadratics() -> None:
    """``g₂ᵀH₁g₂ / g₁ᵀg₂``: the first loss, along the gradient of the second, at the same weights."""
    w = normal(4, seed=5)
    first, second = quadratic(INDEFINITE, SLOPE, w), quadratic(torch.eye(4).double(), SLOPE + 0.2, w)
    for one, other, H, g1, g2 in (
        (first, second, INDEFINITE, SLOPE, SLOPE + 0.2),
        (second, first, torch.eye(4).double(), SLOPE + 0.2, SLOPE),
    ):
        found = ma.critical_sharpness(one, other)
        assert found.value == pytest.approx(float(g2 @ H @ g2 / (g1 @ g2)), rel=1e-9)
        assert (found.direction, found.gradients) == ("gradient of another objective", 1)
    assert ma.critical_sharpness(first, first).value == ma.critical_sharpness(first).value
    opposed = ma.critical_sharpness(first, quadratic(INDEFINITE, -SLOPE, w))
    assert (opposed.status, opposed.value) == ("rises at once", math.inf)


def test_at_other_weights() -> None:
    """Both losses are taken at ``w``."""
    w, at = normal(4, seed=5), normal(4, seed=6)
    first, second = quadratic(INDEFINITE, SLOPE, w), quadratic(torch.eye(4).double(), SLOPE, w)
    g1, g2 = SLOPE + INDEFINITE @ (at - w), SLOPE + at - w
    assert ma.critical_sharpness(first, w=at).value == pytest.approx(float(g1 @ INDEFINITE @ g1 / (g1 @ g1)), rel=1e-8)
    if g1 @ g2 > 0:
        expected = float(g2 @ INDEFINITE @ g2 / (g1 @ g2))
        assert ma.critical_sharpness(first, second, w=at).value == pytest.approx(expected, rel=1e-8)


# --- networks


class Digits:
    """A tanh network for scikit-learn's digits, in float64, after some steps of gradient descent."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.images[:300]).flatten(1) / 16, torch.tensor(digits.target[:300])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
        self.data = [(x[:128], y[:128]), (x[128:], y[128:])]
        self.x, self.y = x, y

    def train(self, steps: int) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(self.model(self.x), self.y).backward()
            optimizer.step()

    def loss(self, flat: Tensor) -> Tensor:
        a, b, c, d = flat.split([64 * 16, 16, 16 * 10, 10])
        return F.cross_entropy(torch.tanh(self.x @ a.view(16, 64).T + b) @ c.view(10, 16).T + d, self.y)


@pytest.mark.parametrize("steps", [0, 20, 100])
def test_on_a_network_it_is_the_mean_of_the_curvature_up_to_the_crossing(steps: int, monkeypatch: Any) -> None:
    """By Taylor's formula: ``λ_c = (2/η_c²) ∫ (η_c − t) gᵀH(w − t g)g / gᵀg dt``; at most the largest ``λ₁`` met."""
    digits = Digits()
    digits.train(steps)
    objective = ma.Objective(digits.model, nn.CrossEntropyLoss(), digits.data)
    objective.examine()
    calls = counted(objective, monkeypatch)
    found = ma.critical_sharpness(objective, width=1e-4)
    assert calls == {"loss": found.evaluations - 1, "loss_and_gradient": 1}
    w = flatten(digits.model)
    g = torch.func.grad(digits.loss)(w)
    for step, above in ((2 / found.bracket[0], True), (2 / found.bracket[1], False)):
        assert (float(digits.loss(w - step * g)) > float(digits.loss(w))) is above
    at = found.step * torch.linspace(0, 1, 201, dtype=torch.float64) ** 2
    along = torch.func.grad(torch.func.grad(lambda t: digits.loss(w - t * g)))
    curvature = torch.stack([along(t) for t in at]) / (g @ g)
    mean = torch.trapezoid((found.step - at) * curvature, at) * 2 / found.step**2
    assert found.value == pytest.approx(float(mean), rel=2e-3)
    sharpest = max(float(ma.top_eigenvalues(objective.hessian(w - t * g), 1).values[0]) for t in at[::50])
    assert found.value <= sharpest
    at_once = ma.curvature_along(objective, ma.directions.gradient(objective))
    assert float(at_once) == pytest.approx(float(curvature[0]), rel=1e-9)
    default = ma.critical_sharpness(objective)
    assert default.bracket[0] <= found.value <= default.bracket[1]
    assert default.evaluations <= 13
    assert ma.critical_sharpness(objective, start=default.step).evaluations <= 11


@pytest.mark.parametrize("policy", CONVNET.policies)
def test_batchnorm_follows_the_policy(policy: Any) -> None:
    model, data = CONVNET.model().eval(), CONVNET.data()
    found = ma.critical_sharpness(ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy))
    if policy != "recalibrate":
        loss, w = reference_loss(CONVNET, model, data, policy), flatten(model)
        g = torch.func.grad(loss)(w)
        expected = torch.stack([loss(w - step * g) - loss(w) for step in found.steps])
        torch.testing.assert_close(found.rises, expected, rtol=1e-8, atol=1e-10)
    assert found.status in ("one crossing", "several crossings")


def test_nothing_is_left_behind() -> None:
    model, data = MLP.model(), MLP.data()
    with untouched(model):
        ma.critical_sharpness(ma.Objective(model, MLP.loss_fn, data))


# --- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.0}, r"width must be between 0 and 1, got 0.0"),
        ({"width": 1.0}, r"width must be between 0 and 1, got 1.0"),
        ({"start": 0.0}, r"start must be a positive number, got 0.0"),
        ({"start": math.inf}, r"start must be a positive number, got inf"),
        ({"direction": torch.ones(3)}, r"expected a flat direction of shape \(4,\)"),
        ({"direction": torch.full((4,), math.nan)}, r"holds NaN or infinity"),
        ({"w": torch.ones(3)}, r"expected a flat point w of shape \(4,\)"),
        ({"direction": line(torch.sin)}, r"the other objective has other parameters: expected the same names"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ma.critical_sharpness(quadratic(INDEFINITE, SLOPE), **options)


def test_other_types() -> None:
    with pytest.raises(TypeError, match=r"expected a Direction or a flat tensor, got str"):
        loose.critical_sharpness(quadratic(INDEFINITE, SLOPE), "momentum")
    with pytest.raises(TypeError, match=r"expected a number for 'width'"):
        loose.critical_sharpness(quadratic(INDEFINITE, SLOPE), width="thin")
