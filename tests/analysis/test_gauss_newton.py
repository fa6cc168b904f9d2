"""The Gauss-Newton matrix against dense Jacobians and loss Hessians, and against curvlinops."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import msam_analysis as ma
from msam_analysis.objective.gauss_newton import GaussNewtonOperator

from . import cases
from .cases import CONVNET, MLP, PARTIAL, TAGGER, WITH_POLICY, Case, concatenate, normal
from .oracles import dense_gauss_newton, dense_hessian, flatten, reference_loss, trainable

policies = pytest.mark.parametrize(("case", "policy"), WITH_POLICY, ids=lambda value: getattr(value, "name", value))
eye = torch.eye


def cross_entropy(output: Tensor, batch: Any) -> tuple[Tensor, int]:
    return F.cross_entropy(output, batch[1], reduction="sum"), len(batch[1])


def squared_error(output: Tensor, batch: Any) -> tuple[Tensor, int]:
    return (output - batch[1]).square().mean(1).sum(), len(batch[1])


def tokens(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(output.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["mask"].flatten()).sum(), batch["mask"].sum()


SUMS = {PARTIAL.name: squared_error, TAGGER.name: tokens}


def oracle(case: Case, model: nn.Module, policy: str = "eval") -> Tensor:
    """The matrix from the model's own forward pass, differentiated by torch.func."""
    twin = case.model().eval()
    twin.load_state_dict(model.state_dict())
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d) and policy == "batch":
            module.train().track_running_stats = False
    named = trainable(twin)
    sizes = [parameter.numel() for parameter in named.values()]

    def forward(w: Tensor, batch: Any) -> Tensor:
        pieces = zip(named.items(), w.split(sizes), strict=True)
        point = {name: piece.view_as(parameter) for (name, parameter), piece in pieces}
        inputs = (batch["ids"],) if isinstance(batch, dict) else (batch[0],)
        out: Tensor = functional_call(twin, point, inputs)
        return out

    with sdpa_kernel(SDPBackend.MATH):
        return dense_gauss_newton(forward, SUMS.get(case.name, cross_entropy), flatten(model), case.data())


def dense(operator: GaussNewtonOperator) -> Tensor:
    return operator @ eye(operator.size, dtype=operator.dtype)


@policies
def test_it_is_the_dense_matrix(case: Case, policy: Any) -> None:
    """Dict batches, (sum, count) losses, tied, frozen and unused parameters, attention and BatchNorm among them."""
    model = case.model()
    operator = ma.Objective(model, case.loss_fn, case.data(), batchnorm=policy).gauss_newton()
    expected = oracle(case, model, policy)
    got = dense(operator)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    v = normal(operator.size, seed=80)
    torch.testing.assert_close(operator @ v, expected @ v, rtol=1e-9, atol=1e-10)
    assert float(torch.linalg.eigvalsh((got + got.T) / 2)[0]) > -1e-12, "convex losses, no negative curvature"
    assert (got - dense_hessian(reference_loss(case, model, case.data(), policy), flatten(model))).norm() > 1e-3


def test_it_is_taken_where_it_is_asked_for() -> None:
    model = MLP.model()
    objective = ma.Objective(model, MLP.loss_fn, MLP.data())
    w = objective.point() + 0.3 * normal(objective.size, seed=81)
    moved = MLP.model()
    nn.utils.vector_to_parameters(w, moved.parameters())
    torch.testing.assert_close(dense(objective.gauss_newton(w)), oracle(MLP, moved), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, F.mse_loss])
def test_it_is_the_hessian_of_a_linear_model(loss_fn: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(4, 3).double()
    data = MLP.data() if loss_fn is F.cross_entropy else [(x, normal(len(x), 3, seed=82)) for x, _ in MLP.data()]
    objective = ma.Objective(model, loss_fn, data)
    identity = eye(objective.size, dtype=torch.float64)
    torch.testing.assert_close(objective.gauss_newton() @ identity, objective.hessian() @ identity)


@pytest.mark.parametrize("case", [MLP, CONVNET], ids=lambda case: case.name)
def test_curvlinops_agrees(case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvlinops = pytest.importorskip("curvlinops")
        model, data = case.model().eval(), case.data()
        peer: Any = curvlinops.GGNLinearOperator(
            model, nn.CrossEntropyLoss(), list(model.parameters()), data, check_deterministic=False
        )
        expected = peer @ eye(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    got = dense(ma.Objective(model, F.cross_entropy, data).gauss_newton())
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_precision(dtype: torch.dtype) -> None:
    model = CONVNET.model(dtype)
    operator = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(dtype)).gauss_newton()
    exact = ma.Objective(model, CONVNET.loss_fn, CONVNET.data(dtype), dtype=torch.float64).gauss_newton()
    v = normal(operator.size, seed=83)
    product = operator @ v.to(dtype)
    assert product.dtype == dtype
    assert float((product - exact @ v).norm() / (exact @ v).norm()) < {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]


def test_subset_of_the_parameters_is_a_block() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    part = objective.with_parameters("3.*")
    torch.testing.assert_close(dense(part.gauss_newton()), dense(objective.gauss_newton())[-24:, -24:])


def test_settings_tell_it_from_the_hessian() -> None:
    objective = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    pairs = ma.top_eigenvalues(objective.gauss_newton(), k=2)
    assert pairs.settings == {**objective.settings, "matrix": "Gauss-Newton"}
    exact = torch.linalg.eigvalsh(oracle(MLP, MLP.model())).flip(0)[:2]
    torch.testing.assert_close(pairs.values.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("graph_bytes", [0, 120_000, 2**30])
def test_the_budget_of_kept_graphs_changes_nothing_but_the_time(graph_bytes: int) -> None:
    model, data = CONVNET.model(), CONVNET.data()
    objective = ma.Objective(model, CONVNET.loss_fn, data, graph_bytes=graph_bytes)
    operator, v = objective.gauss_newton(), normal(objective.size, seed=84)
    assert operator.kept == 0
    first, again = operator @ v, operator @ v
    assert operator.kept == {0: 0, 120_000: 1, 2**30: 3}[graph_bytes]
    expected = oracle(CONVNET, model) @ v
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-10)


# --- what a model may put out


class Answer(OrderedDict[str, Tensor]):
    """As the outputs of Hugging Face's models: a mapping whose keys are attributes, too."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


@dataclasses.dataclass
class Record:
    logits: Tensor
    hidden: Tensor


class Shaped(nn.Module):
    """A network whose answer comes in one of several wrappings, together with what no loss uses."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.wrap = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), wrap
        for index, parameter in enumerate(self.parameters()):
            parameter.data.copy_(normal(*parameter.shape, seed=90 + index))

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x))
        return self.wrap(self.second(hidden), hidden)


WRAPPINGS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda logits, hidden: logits, lambda out: out),
    "tuple": (lambda logits, hidden: (logits, hidden), lambda out: out[0]),
    "dict": (lambda logits, hidden: {"hidden": hidden, "logits": logits}, lambda out: out["logits"]),
    "mapping with attributes": (lambda logits, hidden: Answer(logits=logits, hidden=hidden), lambda out: out.logits),
    "data class": (Record, lambda out: out.logits),
    "nested": (lambda logits, hidden: {"a": [logits, (hidden, "text", None, 3)]}, lambda out: out["a"][0]),
    "with constants": (lambda logits, hidden: (logits, hidden.detach(), hidden.argmax(1)), lambda out: out[0]),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_output_of_any_structure(name: str) -> None:
    wrap, unwrap = WRAPPINGS[name]
    plain = dense(ma.Objective(Shaped(WRAPPINGS["tensor"][0]), F.cross_entropy, MLP.data()).gauss_newton())
    as_criterion = ma.Objective(Shaped(wrap), lambda out, y: F.cross_entropy(unwrap(out), y), MLP.data())
    torch.testing.assert_close(dense(as_criterion.gauss_newton()), plain)
    batches = [{"x": x, "y": y} for x, y in MLP.data()]
    as_loss = ma.Objective(
        Shaped(wrap), lambda model, batch: F.cross_entropy(unwrap(model(batch["x"])), batch["y"]), batches
    )
    torch.testing.assert_close(dense(as_loss.gauss_newton()), plain)


def test_a_loss_of_two_outputs() -> None:
    """Jacobian and loss Hessian of both, with what mixes them."""

    def loss_fn(out: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(out[0] * out[1].sum(1, keepdim=True), target)

    model, data = Shaped(lambda logits, hidden: (logits, hidden)), concatenate(MLP.data())

    def forward(w: Tensor, batch: Any) -> Tensor:
        shapes = dict(model.named_parameters())
        pieces = w.split([parameter.numel() for parameter in shapes.values()])
        point = {name: piece.view_as(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
        return torch.cat(functional_call(model, point, (batch[0],)), dim=1)

    def loss_sum(output: Tensor, batch: Any) -> tuple[Tensor, int]:
        return len(batch[1]) * loss_fn((output[:, :3], output[:, 3:]), batch[1]), len(batch[1])

    expected = dense_gauss_newton(forward, loss_sum, flatten(model), [data])
    got = dense(ma.Objective(model, loss_fn, data).gauss_newton())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_loss_of_two_calls() -> None:
    """Each call has its Jacobian: for independent halves of a batch, the matrix is the mean of theirs."""
    x, y = (part[:18] for part in concatenate(MLP.data()))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        halves = [F.cross_entropy(model(batch["x"][part]), batch["y"][part]) for part in (slice(9), slice(9, 18))]
        return torch.stack(halves).mean()

    got = ma.Objective(MLP.model(), loss_fn, {"x": x, "y": y}).gauss_newton()
    torch.testing.assert_close(dense(got), dense(ma.Objective(MLP.model(), F.cross_entropy, (x, y)).gauss_newton()))


def test_a_loss_may_work_in_place() -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.mul_(0.5), target)

    got = ma.Objective(MLP.model(), loss_fn, MLP.data()).gauss_newton()
    expected = ma.Objective(MLP.model(), lambda o, y: F.cross_entropy(0.5 * o, y), MLP.data()).gauss_newton()
    torch.testing.assert_close(dense(got), dense(expected))


def test_the_loss_is_whole_again_after_a_failure() -> None:
    """What cuts it off from the parameters goes, whatever is raised."""
    failing: list[bool] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if failing:
            raise RuntimeError("interrupted")
        return F.cross_entropy(output, target)

    objective = ma.Objective(MLP.model(), loss_fn, MLP.data())
    expected, operator = objective.gradient(), objective.gauss_newton()
    failing.append(True)
    with pytest.raises(RuntimeError, match="interrupted"):
        operator @ expected
    failing.clear()
    assert torch.equal(objective.gradient(), expected)
    torch.testing.assert_close(operator @ expected, oracle(MLP, MLP.model()) @ expected)


# --- what it refuses


def product(loss_fn: Any, data: Any, model: nn.Module | None = None, **options: Any) -> Tensor:
    objective = ma.Objective(MLP.model() if model is None else model, loss_fn, data, **options)
    return objective.gauss_newton() @ torch.ones(objective.size, dtype=torch.float64)


DICTS = [{"x": x, "y": y} for x, y in MLP.data()]


class OwnLoss(nn.Module):
    """A model that computes its loss, as those of Hugging Face do when they get labels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP.model()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


OWN: dict[str, Callable[[Any, Any], Tensor]] = {
    "alone": lambda model, batch: model(batch["x"], batch["y"])["loss"],
    "beside another term": lambda model, batch: (
        (out := model(batch["x"], batch["y"]))["loss"] + out["logits"].square().mean()
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_models_that_compute_the_loss_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"linear in what the model puts out.*compute it in loss_fn from its logits"):
        product(OWN[name], DICTS, OwnLoss())


def test_outputs_that_are_losses_are_refused() -> None:
    model = cases.Quadratic(eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="linear in what the model puts out"):
        product(cases.mean_output, cases.ONE_SAMPLE, model)


BESIDE: dict[str, Callable[[Any, Any], Tensor]] = {
    "penalty": lambda model, batch: (
        F.cross_entropy(model(batch["x"]), batch["y"]) + sum(p.square().sum() for p in model.parameters())
    ),
    "by its layers": lambda model, batch: F.cross_entropy(model[3](model[0](batch["x"])), batch["y"]),
    "by a method": lambda model, batch: F.cross_entropy(model.forward(batch["x"]), batch["y"]),
}


@pytest.mark.parametrize("name", BESIDE)
def test_losses_of_more_than_the_output_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"uses the parameters beside the model's output: expected loss_fn to call"):
        product(BESIDE[name], DICTS)


def test_a_model_called_on_its_own_output_is_refused() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(4, 4).double()
    with pytest.raises(ValueError, match=r"called on its own output.*into the model's forward"):
        product(lambda model, batch: F.cross_entropy(model(model(batch["x"])), batch["y"]), DICTS, model)


def test_a_loss_without_the_selected_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="depends on none of the 2 selected parameters"):
        product(F.mse_loss, PARTIAL.data(), PARTIAL.model(), parameters="unused.*")
