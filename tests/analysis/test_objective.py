"""Loss, gradient and Hessian-vector product against autograd on the concatenated data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import msam
import msam_analysis as ma

from . import cases
from .cases import CASES, CONVNET, MLP, PARTIAL, TAGGER, TIED, WITH_POLICY, Case, concatenate, normal
from .oracles import dense_hessian, derivatives, flatten, reference_loss, trainable

DTYPES = [torch.float32, torch.float64]
policies = pytest.mark.parametrize(("case", "policy"), WITH_POLICY, ids=lambda value: getattr(value, "name", value))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

# Relative tolerances of what float32 and float64 arithmetic can give.
LOOSE = {torch.float32: 2e-5, torch.float64: 1e-11}


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def setting(case: Case, policy: Any, dtype: torch.dtype) -> tuple[Any, Callable[[Tensor], Tensor], Tensor]:
    model, data = case.model(dtype), case.data(dtype)
    objective = ma.Objective(model, case.loss_fn, data, batchnorm=policy)
    return objective, reference_loss(case, model, data, policy), flatten(model)


def offset(point: Tensor, seed: int = 20) -> Tensor:
    return point + 0.2 * normal(len(point), seed=seed)


@dtypes
@policies
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_loss_gradient_hvp(case: Case, policy: Any, dtype: torch.dtype, elsewhere: bool) -> None:
    objective, reference, point = setting(case, policy, dtype)
    w = None
    if elsewhere:
        w = offset(point).to(dtype)
        point = w.double()
    v = normal(len(point), seed=21).to(dtype)
    expected_gradient, hvp = derivatives(reference, point, v.double())
    tolerance = LOOSE[dtype]

    assert float(objective.loss(w)) == pytest.approx(float(reference(point)), rel=tolerance)
    assert relative(objective.gradient(w), expected_gradient) < tolerance
    assert relative(objective.hvp(v, w), hvp) < 5 * tolerance
    both = objective.loss_and_gradient(w)
    assert float(both[0]) == pytest.approx(float(reference(point)), rel=tolerance)
    assert relative(both[1], expected_gradient) < tolerance


@policies
def test_hessian_operator_is_the_dense_hessian(case: Case, policy: Any) -> None:
    objective, reference, point = setting(case, policy, torch.float64)
    expected = dense_hessian(reference, point)
    operator = objective.hessian()
    assert operator.size == len(point)
    got = operator.matmat(torch.eye(len(point), dtype=torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    v = normal(len(point), seed=22)
    torch.testing.assert_close(operator @ v, expected @ v, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(operator.matvec(v), expected @ v, rtol=1e-9, atol=1e-10)
    block = normal(len(point), 3, seed=23)
    torch.testing.assert_close(operator @ block, expected @ block, rtol=1e-9, atol=1e-10)
    linear = operator.to_scipy()
    assert linear.shape == expected.shape
    torch.testing.assert_close(torch.from_numpy(linear @ v.numpy()), expected @ v, rtol=1e-9, atol=1e-10)


@policies
def test_hessian_operator_elsewhere(case: Case, policy: Any) -> None:
    objective, reference, point = setting(case, policy, torch.float64)
    w = offset(point)
    v = normal(len(point), seed=24)
    expected = dense_hessian(reference, w) @ v
    torch.testing.assert_close(objective.hessian(w) @ v, expected, rtol=1e-9, atol=1e-10)


@policies
def test_finite_differences_of_the_loss_itself(case: Case, policy: Any) -> None:
    objective, _, point = setting(case, policy, torch.float64)
    d = normal(len(point), seed=25)
    d /= d.norm()
    h = 1e-5
    slope = float(objective.loss(point + h * d) - objective.loss(point - h * d)) / (2 * h)
    assert float(objective.gradient() @ d) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    bend = (objective.gradient(point + h * d) - objective.gradient(point - h * d)) / (2 * h)
    torch.testing.assert_close(objective.hvp(d), bend, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_hvp_is_linear_in_the_vector(length: float) -> None:
    objective, _, point = setting(cases.TRANSFORMER, "eval", torch.float32)
    v = normal(len(point), seed=26).float()
    assert relative(objective.hvp(length * v) / length, objective.hvp(v)) < 1e-5


@each_case
def test_size_layout_point(case: Case) -> None:
    model = case.model(torch.float32)
    objective = ma.Objective(model, case.loss_fn, case.data(torch.float32))
    expected = trainable(model)
    assert objective.size == sum(parameter.numel() for parameter in expected.values())
    assert list(objective.layout.names) == list(expected)
    assert [tuple(shape) for shape in objective.layout.shapes] == [tuple(p.shape) for p in expected.values()]
    point = objective.point()
    assert point.dtype == torch.float32
    assert not point.requires_grad
    assert torch.equal(point.double(), flatten(model))
    views = objective.layout.views(point)
    assert list(views) == list(expected)
    for name, parameter in expected.items():
        assert torch.equal(views[name], parameter)
        assert views[name].data_ptr() != parameter.data_ptr()


def test_point_is_a_copy() -> None:
    model = MLP.model()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    before = flatten(model)
    objective.point().add_(1)
    assert torch.equal(flatten(model), before)
    assert torch.equal(objective.point(), before)


def test_views_share_memory_with_the_vector() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    flat = torch.zeros(objective.size, dtype=torch.float64)
    objective.layout.views(flat)["0.bias"].fill_(2.0)
    assert int((flat == 2).sum()) == 7


def test_loss_is_a_float64_scalar() -> None:
    objective = ma.Objective(MLP.model(torch.float32), MLP.loss_fn, MLP.data(torch.float32))
    loss = objective.loss()
    assert loss.dtype == torch.float64
    assert loss.shape == ()
    assert not loss.requires_grad
    assert objective.gradient().dtype == torch.float32
    assert not objective.gradient().requires_grad


def test_samples() -> None:
    assert ma.Objective(MLP.model(), MLP.loss_fn, MLP.data()).samples == 19


def test_loss_follows_the_model() -> None:
    """The default point is the current one, not the one at construction."""
    model = MLP.model()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    objective.loss()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    expected = reference_loss(MLP, model, MLP.data())(flatten(model))
    assert float(objective.loss()) == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(objective.point(), flatten(model))


def test_loss_follows_buffers_and_frozen_parameters() -> None:
    """Training goes on after the objective was made: running statistics and what is not selected move, too."""
    model, data = CONVNET.model(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data, parameters="8.*")
    first = objective.loss()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not name.startswith("8.") and tensor.is_floating_point():
                tensor.mul_(1.25)
    point = torch.cat([model[8].weight.detach().flatten(), model[8].bias.detach()])
    expected = reference_loss(CONVNET, model, data, "eval", ["8.weight", "8.bias"])(point)
    assert float(objective.loss()) == pytest.approx(float(expected), rel=1e-12)
    assert not torch.equal(objective.loss(), first)


# --- weights of batches


def loader(data: list[Any], batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*concatenate(data)), batch_size=batch_size, shuffle=False)


@pytest.mark.parametrize(
    "form",
    [
        lambda data: data,
        loader,
        lambda data: loader(data, 7),
        concatenate,
        lambda data: list(concatenate(data)),
        lambda data: next(iter(loader(data, 19))),
        lambda data: [concatenate(data)],
    ],
    ids=["list", "loader", "other batch size", "one batch", "one batch as a list", "from a loader", "list of one"],
)
def test_the_form_of_the_data_does_not_matter(form: Callable[[list[Any]], Any]) -> None:
    model, data = MLP.model(), MLP.data()
    objective = ma.Objective(model, MLP.loss_fn, form(data))
    reference, point = reference_loss(MLP, model, data), flatten(model)
    assert float(objective.loss()) == pytest.approx(float(reference(point)), rel=1e-12)
    torch.testing.assert_close(objective.gradient(), torch.func.grad(reference)(point), rtol=1e-10, atol=1e-12)
    assert objective.samples == 19


def test_one_dict_batch() -> None:
    model, data = TAGGER.model(), TAGGER.data()
    objective = ma.Objective(model, TAGGER.loss_fn, concatenate(data))
    expected = reference_loss(TAGGER, model, data)(flatten(model))
    assert float(objective.loss()) == pytest.approx(float(expected), rel=1e-12)


def test_a_batch_of_one_weighs_one_nineteenth() -> None:
    """A closed form: each sample is worth its coefficient, whatever batch it came in."""
    coefficients = torch.arange(1.0, 20.0, dtype=torch.float64) ** 2
    model = cases.Quadratic(2 * torch.eye(1, dtype=torch.float64), torch.ones(1).double(), 1.0, torch.ones(1).double())
    data = cases.split([8, 8, 2, 1], coefficients, torch.zeros(19))
    objective = ma.Objective(model, cases.mean_output, data)
    mean = float(coefficients.mean())
    assert float(objective.loss()) == pytest.approx(3 * mean, rel=1e-14)
    assert float(objective.gradient()[0]) == pytest.approx(3 * mean, rel=1e-14)
    assert float(objective.hvp(torch.ones(1).double())[0]) == pytest.approx(2 * mean, rel=1e-14)


def test_tokens_weigh_alike() -> None:
    """A mean over tokens differs from the mean over samples and from the mean over batches."""
    model, data = TAGGER.model(), TAGGER.data()
    got = float(ma.Objective(model, TAGGER.loss_fn, data).loss())
    point = flatten(model)
    by_batch = torch.stack([reference_loss(TAGGER, model, [batch])(point) for batch in data])
    samples = torch.tensor([4.0, 4.0, 1.0]).double()
    assert got == pytest.approx(float(reference_loss(TAGGER, model, data)(point)), rel=1e-12)
    assert got != pytest.approx(float(by_batch.mean()), rel=1e-4)
    assert got != pytest.approx(float((by_batch * samples).sum() / 9), rel=1e-4)


def test_float32_losses_are_added_in_more_than_float32() -> None:
    """Three thousand samples of loss 0.1: a float32 running sum would be off by 1e-5."""
    model = cases.Quadratic(torch.eye(1), torch.zeros(1), 0.1)
    data = cases.split([1] * 3000, torch.ones(3000), torch.zeros(3000))
    loss = float(ma.Objective(model, cases.mean_output, data).loss())
    assert loss == pytest.approx(float(torch.tensor(0.1)), rel=1e-7)


def test_loss_fn_on_model_and_batch() -> None:
    """The general form of a loss gives the same numbers as a criterion."""
    model, data = MLP.model(), MLP.data()
    dicts = [{"x": x, "y": y} for x, y in data]
    objective = ma.Objective(model, lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]), dicts)
    expected = reference_loss(MLP, model, data)(flatten(model))
    assert float(objective.loss()) == pytest.approx(float(expected), rel=1e-12)


def mlp_logits(model: Any, x: Tensor) -> Tensor:
    return model[3](torch.tanh(model[0](x)))  # type: ignore[no-any-return]


REACHING: dict[str, Callable[[Any, Any], Tensor]] = {
    "called": lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]),
    "called by keyword": lambda model, batch: F.cross_entropy(model(input=batch["x"]), batch["y"]),
    "by its layers": lambda model, batch: F.cross_entropy(mlp_logits(model, batch["x"]), batch["y"]),
    "by a method": lambda model, batch: F.cross_entropy(model.forward(batch["x"]), batch["y"]),
    "put in eval mode": lambda model, batch: F.cross_entropy(model.eval()(batch["x"]), batch["y"]),
    "checked": lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]) * isinstance(model, nn.Module),
}


@pytest.mark.parametrize("name", REACHING)
def test_a_general_loss_may_use_the_model_as_it_likes(name: str) -> None:
    """However the loss reaches the weights, it reaches those of the point asked for."""
    model, data = MLP.model().eval(), MLP.data()
    objective = ma.Objective(model, REACHING[name], [{"x": x, "y": y} for x, y in data])
    reference, point = reference_loss(MLP, model, data), flatten(model)
    w = offset(point)
    gradient, hvp = derivatives(reference, w, point)
    assert float(objective.loss()) == pytest.approx(float(reference(point)), rel=1e-12)
    assert float(objective.loss(w)) == pytest.approx(float(reference(w)), rel=1e-12)
    torch.testing.assert_close(objective.gradient(w), gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(objective.hvp(point, w), hvp, rtol=1e-9, atol=1e-11)


def test_a_general_loss_may_penalise_the_weights() -> None:
    """Weight decay inside the loss is part of the function that is differentiated."""
    model, data = MLP.model(), MLP.data()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        penalty = torch.stack([parameter.square().sum() for parameter in model.parameters()]).sum()
        return F.cross_entropy(model(batch["x"]), batch["y"]) + 0.5 * penalty

    objective = ma.Objective(model, loss_fn, [{"x": x, "y": y} for x, y in data])
    reference = reference_loss(MLP, model, data)
    w = offset(flatten(model))
    assert float(objective.loss(w)) == pytest.approx(float(reference(w) + 0.5 * w @ w), rel=1e-12)
    torch.testing.assert_close(objective.gradient(w), torch.func.grad(reference)(w) + w, rtol=1e-10, atol=1e-12)


# --- wrappers, hooks and what else surrounds a model


def test_nested_wrappers_are_looked_through() -> None:
    model = MLP.model()
    compiled: Any = torch.compile
    for wrapped in (
        compiled(nn.DataParallel(model)),
        nn.DataParallel(compiled(model)),
        compiled(nn.DataParallel(compiled(model))),
    ):
        assert ma.Objective(wrapped, MLP.loss_fn, MLP.data()).model is model


@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight", "spectral"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_hooks_that_compute_weights_run(normalise: Callable[[nn.Module], nn.Module]) -> None:
    """The loss follows the parameters behind a normalised weight, not the weight that was last computed from them."""
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(normalise(nn.Linear(4, 3).double())).eval()
    x, y = concatenate(MLP.data())
    for _ in range(2):
        expected = F.cross_entropy(model(x), y)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
        objective = ma.Objective(model, F.cross_entropy, (x, y))
        assert objective.layout.names == names
        assert float(objective.loss()) == pytest.approx(float(expected.detach()), rel=1e-12)
        torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.add_(normal(*parameter.shape, seed=60 + index), alpha=0.1)


def test_autocast_of_the_caller_has_no_effect() -> None:
    objective = ma.Objective(MLP.model(torch.float32), MLP.loss_fn, MLP.data(torch.float32))
    v = normal(objective.size, seed=62).float()

    def measured() -> tuple[Tensor, Tensor, Tensor, float, float]:
        curvature, trace = ma.curvature_along(objective, v), ma.trace(objective, draws=2).value
        return objective.loss(), objective.gradient(), objective.hvp(v), curvature, trace

    plain = measured()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measured()
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], inside[:3], strict=True))
    assert plain[3:] == inside[3:]


def test_an_objective_made_in_inference_mode_has_gradients_outside() -> None:
    model = MLP.model()
    with torch.inference_mode():
        objective = ma.Objective(model, MLP.loss_fn, cases.split([8, 8, 3], *concatenate(MLP.data())))
    assert torch.equal(objective.gradient(), ma.Objective(model, MLP.loss_fn, MLP.data()).gradient())


class Noise(nn.Module):
    """Multiplies by noise, in whatever mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * torch.randn(x.shape, dtype=x.dtype))


def test_a_stochastic_forward_draws_the_same_however_many_graphs_are_kept() -> None:
    """Every batch has noise of its own, the same in the loss, the gradient and every product."""
    model = nn.Sequential(MLP.model(), Noise())
    x, y = (part[:8] for part in concatenate(MLP.data()))
    v = normal(59, seed=61)
    products, kept = [], []
    for graph_bytes in (0, 6000, 2**30):
        objective = ma.Objective(model, F.cross_entropy, [(x, y)] * 3, graph_bytes=graph_bytes)
        operator = objective.hessian()
        products += [operator @ v, operator @ v]
        kept.append(operator.kept)
    assert kept[0] == 0 < kept[1] < kept[2] == 3
    assert all(torch.equal(product, products[0]) for product in products)
    step = 1e-5 * v
    bend = (objective.gradient(objective.point() + step) - objective.gradient(objective.point() - step)) / 2e-5
    torch.testing.assert_close(products[0], bend, rtol=1e-5, atol=1e-7)
    first = ma.Objective(model, F.cross_entropy, (x, y))
    assert not torch.equal(first.loss(), objective.loss()), "another batch, other noise"


# --- BatchNorm


def test_batch_policy_differs_from_eval_and_knows_its_batches() -> None:
    model, data = CONVNET.model(), CONVNET.data()
    losses = {
        policy: float(ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy).loss())
        for policy in ("eval", "batch", "recalibrate")
    }
    whole = float(ma.Objective(model, CONVNET.loss_fn, concatenate(data), batchnorm="batch").loss())
    assert len({round(loss, 6) for loss in [*losses.values(), whole]}) == 4


@pytest.mark.parametrize("policy", ["batch", "recalibrate"])
def test_running_statistics_do_not_matter(policy: Any) -> None:
    model, data = CONVNET.model(), CONVNET.data()
    before = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy).loss()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.mul_(3.0).add_(1.0)
    after = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy).loss()
    assert torch.equal(before, after)


def test_recalibrated_statistics_are_those_of_the_data_at_the_point() -> None:
    """On one layer and equal batches: mean over batches of their means and of their unbiased variances, or of all."""
    torch_model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    for index, parameter in enumerate(torch_model.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=30 + index))
    x, y = normal(600, 3, seed=40), normal(600, 2, seed=41)
    data = cases.split([200, 200, 200], x, y)
    objective = ma.Objective(torch_model, F.mse_loss, data, batchnorm="recalibrate")
    for w in (objective.point(), offset(objective.point())):
        p = {name: view.double() for name, view in objective.layout.views(w).items()}
        hidden = x @ p["0.weight"].T + p["0.bias"]
        # Biased or unbiased, pooled or averaged over batches: with 200 samples a batch they agree to about a percent.
        scaled = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0) + 1e-5) * p["1.weight"] + p["1.bias"]
        expected = ((scaled @ p["2.weight"].T + p["2.bias"] - y) ** 2).mean()
        assert float(objective.loss(w)) == pytest.approx(float(expected), rel=0.02)


def test_recalibration_weighs_batches_by_what_they_hold() -> None:
    """The statistics are those of msam.update_batchnorm_statistics, ragged batches included."""
    model, data = CONVNET.model(), CONVNET.data()
    by_hand = CONVNET.model()
    msam.update_batchnorm_statistics(by_hand, data)
    expected = ma.Objective(by_hand, CONVNET.loss_fn, data).loss()
    got = ma.Objective(model, CONVNET.loss_fn, data, batchnorm="recalibrate").loss()
    assert float(got) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("policy", ["eval", "batch", "recalibrate"])
def test_layers_without_running_statistics_are_not_labelled_with_them(policy: Any) -> None:
    without = nn.BatchNorm1d(4, track_running_stats=False)
    for layers, label in (
        ([nn.BatchNorm1d(4)], policy),
        ([without], "batch" if policy == "batch" else "batch (no running statistics)"),
        (
            [nn.BatchNorm1d(4), without],
            "batch" if policy == "batch" else f"{policy} (1 of 2 layers: batch, no running statistics)",
        ),
        ([], "no BatchNorm"),
    ):
        model = nn.Sequential(nn.Linear(4, 4), *layers).double()
        objective = ma.Objective(model, F.cross_entropy, MLP.data(), batchnorm=policy)
        assert objective.settings["batchnorm"] == label


def test_recalibrate_equals_eval_after_recalibrating_by_hand() -> None:
    """On one batch there is one answer: torch's own running statistics with momentum 1."""
    model, batch = CONVNET.model(), concatenate(CONVNET.data())
    objective = ma.Objective(model, CONVNET.loss_fn, batch, batchnorm="recalibrate")
    by_hand = CONVNET.model()
    for module in by_hand.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        by_hand.train()(batch[0])
        expected = CONVNET.loss_fn(by_hand.eval()(batch[0]), batch[1])
    assert float(objective.loss()) == pytest.approx(float(expected), rel=1e-10)


def test_the_mode_of_the_model_does_not_matter() -> None:
    """Dropout is off and BatchNorm follows the policy, in whatever mode the model comes."""
    model, data = CONVNET.model(), CONVNET.data()
    for policy in ("eval", "batch"):
        model.train()
        training = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy)
        losses = [training.loss(), training.loss()]
        model.eval()
        losses += [training.loss(), ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy).loss()]
        assert len({float(loss) for loss in losses}) == 1


# --- subsets and precision


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("0.*", ["0.weight"]),
        ("*.bias", ["1.bias", "3.bias", "4.bias", "8.bias"]),
        (["8.weight", "1.*"], ["1.weight", "1.bias", "8.weight"]),
        (lambda name, parameter: parameter.ndim == 4, ["0.weight", "3.weight"]),
    ],
    ids=["glob", "biases", "list", "predicate"],
)
@pytest.mark.parametrize("policy", CONVNET.policies)
def test_subsets(parameters: Any, names: list[str], policy: Any) -> None:
    model, data = CONVNET.model(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data, batchnorm=policy, parameters=parameters)
    assert list(objective.layout.names) == names
    reference = reference_loss(CONVNET, model, data, policy, names)
    lookup = dict(model.named_parameters())
    point = torch.cat([lookup[name].detach().flatten() for name in names])
    assert torch.equal(objective.point(), point)
    v = normal(len(point), seed=50)
    w = offset(point)
    gradient, hvp = derivatives(reference, w, v)
    assert float(objective.loss(w)) == pytest.approx(float(reference(w)), rel=1e-12)
    torch.testing.assert_close(objective.gradient(w), gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(objective.hvp(v, w), hvp, rtol=1e-9, atol=1e-11)


def test_unused_parameters_have_zero_gradient_and_zero_curvature() -> None:
    objective = ma.Objective(PARTIAL.model(), PARTIAL.loss_fn, PARTIAL.data())
    assert not any(name.startswith("frozen") for name in objective.layout.names)
    for vector in (objective.gradient(), objective.hvp(torch.ones(objective.size).double())):
        views = objective.layout.views(vector)
        assert not views["unused.weight"].any()
        assert not views["unused.bias"].any()
        assert views["head.weight"].any()


def test_tied_weights_count_once_and_move_together() -> None:
    model, data = TIED.model(), TIED.data()
    objective = ma.Objective(model, TIED.loss_fn, data)
    assert objective.size == 24 + 16 + 4
    w = offset(objective.point())
    twin = TIED.model()
    nn.utils.vector_to_parameters(w, twin.parameters())
    x, y = concatenate(data)
    assert float(objective.loss(w)) == pytest.approx(float(F.cross_entropy(twin(x), y).detach()), rel=1e-12)


def test_dtype_casts_model_and_data() -> None:
    """A float32 model measured in float64 gives the float64 numbers of the rounded weights."""
    model, data = CONVNET.model(torch.float32), CONVNET.data(torch.float32)
    objective = ma.Objective(model, CONVNET.loss_fn, data, dtype=torch.float64)
    reference, point = reference_loss(CONVNET, model, data), flatten(model)
    assert objective.point().dtype == torch.float64
    assert float(objective.loss()) == pytest.approx(float(reference(point)), rel=1e-13)
    v = normal(len(point), seed=51)
    gradient, hvp = derivatives(reference, point, v)
    torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(objective.hvp(v), hvp, rtol=1e-10, atol=1e-12)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(x.dtype == torch.float32 for x, _ in data)


def test_dtype_casts_a_criterion_with_weights() -> None:
    """Class weights are part of the loss; the criterion itself stays as it is."""
    x, y = concatenate(MLP.data(torch.float32))
    weight = torch.tensor([1.0, 2.0, 0.5])
    criterion = nn.CrossEntropyLoss(weight=weight)
    objective = ma.Objective(MLP.model(torch.float32), criterion, (x, y), dtype=torch.float64)
    expected = F.cross_entropy(MLP.model(torch.float32).double().eval()(x.double()), y, weight=weight.double())
    assert float(objective.loss()) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert objective.hvp(objective.point()).dtype == torch.float64
    assert criterion.weight is weight
    assert weight.dtype == torch.float32


class Mixed(nn.Module):
    """A body in one precision, a head in another, and the cast between them."""

    def __init__(self, body: torch.dtype, head: torch.dtype) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5).to(body), nn.Linear(5, 3).to(head)
        for index, parameter in enumerate(self.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=70 + index))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x.to(self.body.weight.dtype)))
        out: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return out


@pytest.mark.parametrize("body", [torch.float32, torch.float64])
def test_mixed_precision_is_evaluated_as_it_is(body: torch.dtype) -> None:
    """Every parameter in its own data type, the vector in the widest."""
    head = torch.float32 if body == torch.float64 else torch.float64
    model, (x, y) = Mixed(body, head), concatenate(MLP.data())
    objective = ma.Objective(model, F.cross_entropy, (x, y))
    loss = F.cross_entropy(model(x), y)
    gradient = torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert objective.dtype == torch.float64
    assert torch.equal(objective.point(), flatten(model))
    assert float(objective.loss()) == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(objective.gradient(), gradient, rtol=1e-6, atol=1e-8)
    v = normal(objective.size, seed=75)
    exact = ma.Objective(model, F.cross_entropy, (x, y), dtype=torch.float64).hvp(v)
    assert relative(objective.hvp(v), exact) < 1e-5


def test_loss_follows_weights_that_were_assigned() -> None:
    """load_state_dict(assign=True) puts other parameters in the place of those the objective was made with."""
    model = MLP.model()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data(), parameters="3.*")
    model.load_state_dict({name: 0.5 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    expected = reference_loss(MLP, model, MLP.data())(flatten(model))
    assert float(objective.loss()) == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(objective.vector({model[3].weight: model[3].weight})[:21], model[3].weight.detach().flatten())


def test_vector_from_parameters() -> None:
    model = PARTIAL.model()
    objective = ma.Objective(model, PARTIAL.loss_fn, PARTIAL.data())
    chosen = {model.head.weight: torch.full((2, 5), 3.0).double(), model.unused.bias: torch.ones(2).double()}
    vector = objective.vector(chosen)
    views = objective.layout.views(vector)
    assert vector.shape == (objective.size,)
    assert torch.equal(views["head.weight"], torch.full((2, 5), 3.0).double())
    assert torch.equal(views["unused.bias"], torch.ones(2).double())
    assert int((vector != 0).sum()) == 12


def test_works_where_the_caller_switched_gradients_off() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    gradient, hvp = objective.gradient(), objective.hvp(torch.ones(objective.size).double())
    with torch.no_grad():
        assert torch.equal(objective.gradient(), gradient)
        assert torch.equal(objective.hvp(torch.ones(objective.size).double()), hvp)
        assert torch.equal(objective.hessian() @ torch.ones(objective.size).double(), hvp)


def test_nan_and_infinity_stay() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    objective = ma.Objective(model, lambda output, target: torch.log(output).mean(), cases.ONE_SAMPLE)
    assert float(objective.loss(torch.zeros(1).double())) == -float("inf")
    assert torch.isnan(objective.loss(-torch.ones(1).double()))


def test_an_objective_shows_what_it_is() -> None:
    objective = ma.Objective(
        nn.Linear(3, 2), nn.CrossEntropyLoss(), [(torch.ones(5, 3), torch.zeros(5, dtype=torch.long))]
    )
    shown = repr(objective)
    assert shown.startswith("Objective(Linear, batchnorm='no BatchNorm', samples=5, batches=1, parameters=8, dtype=")
    assert all(f"{value!r}" in shown for value in objective.settings.values())


def test_settings_name_the_choices() -> None:
    objective = ma.Objective(CONVNET.model(), CONVNET.loss_fn, CONVNET.data(), batchnorm="batch")
    settings = dict(objective.settings)
    assert "batch" in settings.values()
    assert 19 in settings.values()
    assert objective.size in settings.values()
    assert all(isinstance(value, str | int | float | bool | None) for value in settings.values())
