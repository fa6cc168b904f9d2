"""Messages of torch where a sentence of ours belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import msam
import msam_analysis as ma

from .cases import Answer, Ask, ShortError, case, mlp, points, seeded

ma_any: Any = ma  # wrong arguments on purpose


def objective(**options: Any) -> Any:
    net, (x, y) = mlp(), points()
    return ma_any.Objective(net, F.cross_entropy, (x, y), **options)


def refused(ask: Ask, question: Callable[[], Any]) -> Answer:
    """Ask something that has no answer."""
    raise ShortError(f"there is an answer: {str(ask(question))[:100]}")


@case("messages", "refused")
def dictionaries_with_a_criterion(ask: Ask) -> Answer:
    """Batches of dictionaries with a criterion of two arguments."""
    net, (x, y) = mlp(), points()
    return refused(ask, lambda: ma.Objective(net, nn.CrossEntropyLoss(), [{"x": x, "y": y}]).loss())


class TwoOutputs(nn.Module):
    """Returns logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Any:
        return self.net(x), x


@case("messages", "refused")
def two_outputs_with_a_criterion(ask: Ask) -> Answer:
    """A network with two outputs and a criterion for one."""
    net, (x, y) = TwoOutputs(), points()
    return refused(ask, lambda: ma.Objective(net, nn.CrossEntropyLoss(), (x, y)).loss())


@case("messages", "refused")
def arguments_swapped(ask: Ask) -> Answer:
    """Objective(loss_fn, model, data)."""
    net, (x, y) = mlp(), points()
    return refused(ask, lambda: ma_any.Objective(F.cross_entropy, net, (x, y)).loss())


@case("messages", "refused")
def criterion_and_model_swapped(ask: Ask) -> Answer:
    """Objective(criterion, model, data) with a criterion that is a module."""
    net, (x, y) = mlp(), points()
    return refused(ask, lambda: ma.Objective(nn.CrossEntropyLoss(), net, (x, y)).loss())


@case("messages", "refused")
def data_and_loss_swapped(ask: Ask) -> Answer:
    """Objective(model, data, loss_fn)."""
    net, (x, y) = mlp(), points()
    return refused(ask, lambda: ma_any.Objective(net, [(x, y)], F.cross_entropy).loss())


@case("messages", "refused")
def target_and_output_swapped(ask: Ask) -> Answer:
    """Batches (label, input)."""
    net, (x, y) = mlp(), points()
    return refused(ask, lambda: ma.Objective(net, F.cross_entropy, [(y, x)]).loss())


@case("messages", "refused")
def batch_of_one_in_batch_mode(ask: Ask) -> Answer:
    """A last batch of one sample under BatchNorm's batch mode."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    loader = DataLoader(TensorDataset(*points(9)), batch_size=4)
    return refused(ask, lambda: ma.Objective(net, F.cross_entropy, loader, batchnorm="batch").loss())


@case("messages", "refused")
def class_of_the_model(ask: Ask) -> Answer:
    """The class of a network instead of an instance."""
    data = points()
    return refused(ask, lambda: ma_any.Objective(TwoOutputs, F.cross_entropy, data).loss())


@case("messages", "refused")
def class_of_the_criterion(ask: Ask) -> Answer:
    """nn.CrossEntropyLoss instead of nn.CrossEntropyLoss()."""
    net, data = mlp(), points()
    return refused(ask, lambda: ma_any.Objective(net, nn.CrossEntropyLoss, data).loss())


@case("messages", "refused")
def data_set_instead_of_a_loader(ask: Ask) -> Answer:
    """A data set, whose items are samples, instead of a loader."""
    net, data = mlp(), TensorDataset(*points())
    return refused(ask, lambda: ma.Objective(net, F.cross_entropy, data).loss())


@case("messages", "refused")
def arrays_instead_of_tensors(ask: Ask) -> Answer:
    """Batches of numpy arrays."""
    net, (x, y) = mlp(), points()
    return refused(ask, lambda: ma.Objective(net, F.cross_entropy, [(x.numpy(), y.numpy())]).loss())


@case("messages", "refused")
def generator_as_data(ask: Ask) -> Answer:
    """A generator, which can be read once."""
    net, (x, y) = mlp(), points()
    return refused(ask, lambda: ma.Objective(net, F.cross_entropy, (batch for batch in [(x, y)])).loss())


@case("messages", "refused")
def loss_as_a_number(ask: Ask) -> Answer:
    """A loss_fn that returns loss.item()."""
    net, (x, y) = mlp(), points()
    f: Any = lambda o, t: F.cross_entropy(o, t).item()  # noqa: E731 -- as users write it
    return refused(ask, lambda: ma.Objective(net, f, (x, y)).gradient().norm())


@case("messages", "refused")
def loss_that_returns_nothing(ask: Ask) -> Answer:
    """A loss_fn that forgot its return."""
    net, (x, y) = mlp(), points()
    f: Any = lambda o, t: None  # noqa: E731 -- as users write it
    return refused(ask, lambda: ma.Objective(net, f, (x, y)).loss())


@case("messages", "refused")
def label_out_of_range(ask: Ask) -> Answer:
    """A label that the network has no output for."""
    net, (x, y) = mlp(), points()
    y[4] = 7
    return refused(ask, lambda: ma.Objective(net, F.cross_entropy, (x, y)).loss())


@case("messages", "refused")
def labels_as_floats(ask: Ask) -> Answer:
    """Class labels as floating-point numbers."""
    net, (x, y) = mlp(), points()
    return refused(ask, lambda: ma.Objective(net, F.cross_entropy, (x, y.double())).loss())


@case("messages", "refused")
def inputs_of_another_width(ask: Ask) -> Answer:
    """Inputs of another width than the network's."""
    net, (x, y) = mlp(inputs=5), points()
    return refused(ask, lambda: ma.Objective(net, F.cross_entropy, (x, y)).loss())


@case("messages", "refused", "right")
def inputs_of_another_precision(ask: Ask) -> Answer:
    """Inputs in float32 for a network in float64."""
    net, (x, y) = mlp(), points()
    want = F.cross_entropy(net(x.float().double()), y)
    return ask(lambda: ma.Objective(net, F.cross_entropy, (x.float(), y)).loss()), want, 1e-9


@case("messages", "refused", "warned")
def squares_that_broadcast(ask: Ask) -> Answer:
    """MSELoss of outputs (N, 1) and targets (N,), which broadcast to (N, N): two batches are not their mean."""
    net, (x, y) = mlp(classes=1), points()
    batches = [(x[:4], y[:4].double()), (x[4:], y[4:].double())]
    want = F.mse_loss(net(x)[:, 0], y.double())
    return ask(lambda: ma.Objective(net, nn.MSELoss(), batches).loss()), want, 1e-9


WRONG: dict[str, tuple[str, Callable[[], Any]]] = {
    "k_as_text": ("k='5'", lambda: ma_any.top_eigenvalues(objective(), k="5")),
    "k_as_a_float": ("k=2.5", lambda: ma_any.top_eigenvalues(objective(), k=2.5)),
    "k_too_large": ("k larger than the number of parameters", lambda: ma.top_eigenvalues(objective(), k=1000)),
    "radius_as_text": ("rho='0.05'", lambda: ma_any.ball_sharpness(objective(), rho="0.05")),
    "radius_as_none": ("rho=None", lambda: ma_any.one_step_sharpness(objective(), rho=None)),
    "noise_as_text": ("sigma='0.01'", lambda: ma_any.average_sharpness(objective(), sigma="0.01")),
    "draws_as_text": ("draws='30'", lambda: ma_any.trace(objective(), draws="30")),
    "seed_as_text": ("seed='0'", lambda: ma_any.trace(objective(), draws=3, seed="0")),
    "points_as_text": ("points='11'", lambda: ma_any.slice_1d(objective(), torch.ones(26).double(), points="11")),
    "direction_too_short": ("a direction of another length", lambda: ma.slice_1d(objective(), torch.ones(5))),
    "direction_as_array": ("a numpy array as a direction", lambda: ma_any.slice_1d(objective(), np.ones(26))),
    "directions_in_a_list": (
        "one direction where there are two",
        lambda: ma_any.slice_2d(objective(), torch.ones(26).double(), points=3),
    ),
    "model_as_objective": ("a network where an objective belongs", lambda: ma_any.top_eigenvalues(mlp(), k=1)),
    "metrics_as_text": ("metrics='loss' and not a list", lambda: ma_any.measure(objective(), metrics="loss")),
    "metric_unknown": ("metrics=['accuracy']", lambda: ma.measure(objective(), metrics=["accuracy"])),
    "dtype_as_text": ("dtype='float64'", lambda: objective(dtype="float64").loss()),
    "device_unknown": ("device='gpu'", lambda: objective(device="gpu").loss()),
    "policy_unknown": ("batchnorm='train'", lambda: objective(batchnorm="train").loss()),
    "parameters_unknown": ("parameters=['conv.*'] of a perceptron", lambda: objective(parameters=["conv.*"])),
    "parameters_as_tensors": ("parameters=model.parameters()", lambda: objective(parameters=mlp().parameters()).size),
    "vector_too_short": ("a vector of another length", lambda: ma.Objective.loss(objective(), torch.ones(3))),
    "vector_as_list": ("a list as a vector", lambda: objective().hvp([1.0] * 26)),
    "probe_as_class": (
        "a probe's class instead of an instance",
        lambda: ma_any.Monitor(torch.optim.SGD(mlp().parameters(), lr=0.1), [ma.probes.Norms]),
    ),
    "probe_alone": (
        "a probe without a list around it",
        lambda: ma_any.Monitor(torch.optim.SGD(mlp().parameters(), lr=0.1), ma.probes.Norms()),
    ),
    "monitor_of_a_model": ("Monitor(model, probes)", lambda: ma_any.Monitor(mlp(), [ma.probes.Norms()])),
    "every_as_text": (
        "every='50'",
        lambda: ma_any.Monitor(msam.MSAM(mlp().parameters()), [ma.probes.Norms()], every="50"),
    ),
}


def _add(name: str, situation: str, question: Callable[[], Any]) -> None:
    def build(ask: Ask) -> Answer:
        return refused(ask, question)

    build.__name__, build.__doc__ = name, f"Wrong argument: {situation}."
    case("messages", "refused")(build)


for _name, (_situation, _question) in WRONG.items():
    _add(_name, _situation, _question)
