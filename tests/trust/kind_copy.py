"""Not through the private copy: wrappers, closures over the outer model, attributes changed later."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import msam_analysis as ma

from .cases import Answer, Ask, Truth, case, compiled, mlp, need, normal, numbers, points, right_numbers, seeded


def same(
    ask: Ask, net: nn.Module, f: Any, true: Callable[[], Tensor], *, data: Any = None, outer: nn.Module | None = None
) -> Answer:
    """Ask for loss, gradient and product; the right ones are of ``true()``, a function of the same network."""
    want = right_numbers(Truth(true, (outer or net).parameters()))
    batch = points() if data is None else data
    return ask(lambda: numbers(ma.Objective(net, f, batch))), want, 1e-5


def squares(parameters: Any) -> Any:
    return sum(parameter.pow(2).sum() for parameter in parameters)


# forward belongs to an instance


@case("copy", "right", "refused")
def forward_of_an_instance(ask: Ask) -> Answer:
    """A layer's forward was replaced by a function that calls the old one (accelerate)."""
    net, (x, y) = mlp(), points()
    old = net[0].forward
    net[0].forward = lambda z: old(z) + 0
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(net(x), y))


@case("copy", "right", "refused")
def forward_by_partial(ask: Ask) -> Answer:
    """A layer's forward is functools.partial of its own bound method."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Any:
            return scale * super().forward(x)

    net = seeded(lambda: nn.Sequential(Scaled(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = points()
    net[0].forward = functools.partial(net[0].forward, scale=2.0)
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(net(x), y))


@case("copy", "right", "refused")
def forward_by_method_type(ask: Ask) -> Answer:
    """A layer's forward was replaced by types.MethodType (monkey patches)."""
    net, (x, y) = mlp(), points()

    def forward(self: Any, z: Tensor) -> Tensor:
        return F.linear(z, self.weight, self.bias).relu()

    net[0].forward = types.MethodType(forward, net[0])
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(net(x), y))


class Borrowing(nn.Module):
    """Holds a function that closes over one of its own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.head: Any = lambda z: 2 * self.b(z)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.a(x)))


@case("copy", "right", "refused")
def attribute_closes_over_a_layer(ask: Ask) -> Answer:
    """An attribute of the module is a lambda that closes over its own layer."""
    net, (x, y) = seeded(Borrowing), points()
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(net(x), y))


@case("copy", "right", "refused")
def compiled_submodule(ask: Ask) -> Answer:
    """One block was compiled by torch.compile (backend eager)."""
    net, (x, y) = mlp(), points()
    plain = copy.deepcopy(net)
    net[2] = compiled(net[2], "eager")
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(plain(x), y), outer=plain)


@case("copy", "right", "refused")
def compiled_in_place(ask: Ask) -> Answer:
    """The network was compiled in place, by model.compile()."""
    net, (x, y) = mlp(), points()
    plain = copy.deepcopy(net)
    compile_it: Any = net.compile
    torch.compiler.reset()
    compile_it(backend="eager")
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(plain(x), y), outer=plain)


@case("copy", "right", "refused")
def averaged_model(ask: Ask) -> Answer:
    """The AveragedModel of torch, for stochastic weight averaging."""
    net, (x, y) = AveragedModel(mlp()), points()
    net.update_parameters(mlp(1))
    net.update_parameters(mlp(2))
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(net(x), y))


@case("copy", "right", "refused")
def data_parallel(ask: Ask) -> Answer:
    """nn.DataParallel around the network."""
    inner, (x, y) = mlp(), points()
    net = nn.DataParallel(inner)
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(inner(x), y))


# losses that close over the outer network


@case("copy", "right", "refused")
def penalty_of_parameters(ask: Ask) -> Answer:
    """The criterion adds a penalty of model.parameters() of the network that it closes over."""
    net, (x, y) = mlp(), points()

    def f(output: Tensor, target: Tensor) -> Any:
        return F.cross_entropy(output, target) + 0.5 * squares(net.parameters())

    return same(ask, net, f, lambda: f(net(x), y))


@case("copy", "right", "refused")
def penalty_of_a_list(ask: Ask) -> Answer:
    """The criterion adds a penalty of a list of parameters taken beforehand."""
    net, (x, y) = mlp(), points()
    taken = [parameter for name, parameter in net.named_parameters() if "bias" not in name]

    def f(output: Tensor, target: Tensor) -> Any:
        return F.cross_entropy(output, target) + 0.1 * sum(parameter.abs().sum() for parameter in taken)

    return same(ask, net, f, lambda: f(net(x), y))


@case("copy", "right", "refused")
def elastic_weights(ask: Ask) -> Answer:
    """Elastic weight consolidation: Fisher weights and frozen copies, over named_parameters of the outer network."""
    net, (x, y) = mlp(), points()
    old = {name: parameter.detach().clone() for name, parameter in mlp(5).named_parameters()}
    fisher = {name: value.abs() for name, value in old.items()}

    def f(model: Any, batch: Any) -> Any:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        for name, parameter in net.named_parameters():
            loss = loss + (fisher[name] * (parameter - old[name]).pow(2)).sum()
        return loss

    return same(ask, net, lambda o, t: f(lambda _: o, (x, t)), lambda: f(net, (x, y)))


class Federated:
    """A client of FedProx: its loss is a bound method."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.server = [parameter.detach() + 0.1 for parameter in model.parameters()]

    def loss(self, output: Tensor, target: Tensor) -> Any:
        pairs = zip(self.model.parameters(), self.server, strict=True)
        return F.cross_entropy(output, target) + 0.3 * sum((a - b).pow(2).sum() for a, b in pairs)


@case("copy", "right", "refused")
def proximal_term(ask: Ask) -> Answer:
    """A proximal term (FedProx) in a bound method of the trainer."""
    net, (x, y) = mlp(), points()
    client = Federated(net)
    return same(ask, net, client.loss, lambda: client.loss(net(x), y))


class Penalised(nn.Module):
    """A criterion that is a module and holds the network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, output: Tensor, target: Tensor) -> Any:
        return F.cross_entropy(output, target) + 0.5 * squares(self.model.parameters())


@case("copy", "right", "refused")
def criterion_holds_the_network(ask: Ask) -> Answer:
    """A criterion module that registers the network as its submodule."""
    net, (x, y) = mlp(), points()
    criterion = Penalised(net)
    return same(ask, net, criterion, lambda: criterion(net(x), y))


@case("copy", "right", "refused")
def loss_ignores_the_model_it_is_given(ask: Ask) -> Answer:
    """loss_fn(model, batch) uses the outer network and not the one it is given."""
    net, (x, y) = mlp(), points()
    batch = {"x": x, "y": y}
    return same(
        ask, net, lambda _, b: F.cross_entropy(net(b["x"]), b["y"]), lambda: F.cross_entropy(net(x), y), data=batch
    )


SHELF: dict[str, nn.Module] = {}


def _with_global_penalty(output: Tensor, target: Tensor) -> Any:
    return F.cross_entropy(output, target) + 0.5 * squares(SHELF["net"].parameters())


@case("copy", "right", "refused")
def penalty_of_a_global(ask: Ask) -> Answer:
    """The penalty is of a network that is a global variable."""
    net, (x, y) = mlp(), points()
    SHELF["net"] = net
    return same(ask, net, _with_global_penalty, lambda: _with_global_penalty(net(x), y))


@case("copy", "right", "refused")
def penalty_by_partial(ask: Ask) -> Answer:
    """The criterion is functools.partial with the last layer as keyword argument."""
    net, (x, y) = mlp(), points()

    def f(output: Tensor, target: Tensor, *, layer: nn.Linear) -> Any:
        return F.cross_entropy(output, target) + torch.linalg.matrix_norm(layer.weight).pow(2)

    bound = functools.partial(f, layer=net[2])
    return same(ask, net, bound, lambda: bound(net(x), y))


@case("copy", "right")
def penalty_of_the_given_model(ask: Ask) -> Answer:
    """loss_fn(model, batch) adds a penalty of the model that it is given."""
    net, (x, y) = mlp(), points()

    def f(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1]) + 0.5 * squares(model.parameters())

    batch = {0: x, 1: y}
    return same(ask, net, f, lambda: f(net, (x, y)), data=batch)


@case("copy", "right")
def distillation(ask: Ask) -> Answer:
    """The criterion closes over a frozen teacher, which is not the network."""
    net, (x, y) = mlp(), points()
    teacher = mlp(4).requires_grad_(False)
    batch = {"x": x, "y": y}

    def f(model: Any, b: Any) -> Any:
        target = teacher(b["x"]).softmax(1)
        return F.kl_div(model(b["x"]).log_softmax(1), target, reduction="batchmean")

    return same(ask, net, f, lambda: f(net, batch), data=batch)


class Watched(nn.Module):
    """Keeps its hidden units where a criterion finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.hidden: Any = None

    def forward(self, x: Tensor) -> Any:
        self.hidden = torch.tanh(self.a(x))
        return self.b(self.hidden)


@case("copy", "right", "refused")
def activations_read_from_the_outer_network(ask: Ask) -> Answer:
    """The criterion penalises hidden units that forward left on the outer network."""
    net, (x, y) = seeded(Watched), points()

    def f(output: Tensor, target: Tensor) -> Any:
        return F.cross_entropy(output, target) + net.hidden.abs().mean()

    want = right_numbers(Truth(lambda: f(net(x), y), net.parameters()))
    net(x)
    return ask(lambda: numbers(ma.Objective(net, f, (x, y)))), want, 1e-5


@case("copy", "right", "refused", "warned")
def activations_by_a_hook(ask: Ask) -> Answer:
    """A forward hook fills a dictionary that the criterion penalises."""
    net, (x, y) = mlp(), points()
    seen: dict[str, Tensor] = {}
    net[1].register_forward_hook(lambda module, inputs, output: seen.update(hidden=output))

    def f(output: Tensor, target: Tensor) -> Any:
        return F.cross_entropy(output, target) + seen["hidden"].abs().mean()

    want = right_numbers(Truth(lambda: f(net(x), y), net.parameters()))
    seen["hidden"] = torch.zeros(1, dtype=torch.float64)
    return ask(lambda: numbers(ma.Objective(net, f, (x, y)))), want, 1e-5


@case("copy", "right", "refused", "warned")
def hook_that_changes_the_output(ask: Ask) -> Answer:
    """A forward hook of the user's doubles a layer's output."""
    net, (x, y) = mlp(), points()
    net[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(net(x), y))


# attributes changed after the objective was made


class Tempered(nn.Module):
    """A network with a temperature."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net, self.temperature = mlp(), 1.0
        self.options = {"scale": 1.0}
        self.register_buffer("offset", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return self.options["scale"] * self.net(x) / self.temperature + self.offset


def later(ask: Ask, net: nn.Module, criterion: Any, change: Callable[[], object]) -> Answer:
    """Ask, let the user change something, and ask again: the numbers follow."""
    x, y = points()
    objective = ask(lambda: ma.Objective(net, criterion, (x, y)))
    before = ask(lambda: numbers(objective))
    change()
    want = right_numbers(Truth(lambda: criterion(net(x), y), net.parameters()))
    after = ask(lambda: numbers(objective))
    need(before.shape != want.shape or not torch.allclose(before, want, rtol=1e-6), "the change changes nothing")
    return after, want, 1e-5


@case("copy", "right", "refused")
def temperature_changed(ask: Ask) -> Answer:
    """An attribute of the network (a temperature) changes after the objective was made."""
    net = Tempered()
    return later(ask, net, F.cross_entropy, lambda: setattr(net, "temperature", 0.2))


@case("copy", "right", "refused")
def options_changed(ask: Ask) -> Answer:
    """An entry of a dictionary on the network changes after the objective was made."""
    net = Tempered()
    return later(ask, net, F.cross_entropy, lambda: net.options.update(scale=3.0))


@case("copy", "right", "refused")
def buffer_changed(ask: Ask) -> Answer:
    """A buffer of the network changes after the objective was made."""
    net = Tempered()
    return later(ask, net, F.cross_entropy, lambda: net.offset.copy_(torch.tensor([1.0, 0.0])))


@case("copy", "right", "refused")
def smoothing_changed(ask: Ask) -> Answer:
    """label_smoothing of the criterion changes after the objective was made."""
    criterion = nn.CrossEntropyLoss()
    return later(ask, mlp(), criterion, lambda: setattr(criterion, "label_smoothing", 0.3))


@case("copy", "right", "refused")
def layer_replaced(ask: Ask) -> Answer:
    """A layer is replaced by a new one after the objective was made."""
    net = mlp()

    def change() -> None:
        net[2] = mlp(8)[2]

    return later(ask, net, F.cross_entropy, change)


@case("copy", "right", "refused")
def activation_replaced(ask: Ask) -> Answer:
    """An activation is replaced after the objective was made."""
    net = mlp()

    def change() -> None:
        net[1] = nn.Softplus()

    return later(ask, net, F.cross_entropy, change)


@case("copy", "right", "refused")
def parameter_replaced(ask: Ask) -> Answer:
    """A parameter is replaced by a new one after the objective was made."""
    net = mlp()
    return later(ask, net, F.cross_entropy, lambda: setattr(net[2], "weight", nn.Parameter(normal(2, 4))))


@case("copy", "right", "refused")
def trained_on(ask: Ask) -> Answer:
    """The user goes on training after the objective was made, with BatchNorm."""
    net, (x, y) = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))), points()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)

    def change() -> None:
        net.train()
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        net.eval()

    return later(ask, net, F.cross_entropy, change)


class Hidden(nn.Module):
    """Keeps layers in a plain list, where parameters() does not find them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.layers = [nn.Linear(3, 4).double()]

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layers[0](x).tanh())


@case("copy", "right", "refused", "warned")
def layers_in_a_plain_list(ask: Ask) -> Answer:
    """Layers in a plain list: trainable tensors that model.parameters() does not name."""
    net, (x, y) = seeded(Hidden), points()
    return same(ask, net, F.cross_entropy, lambda: F.cross_entropy(net(x), y))
