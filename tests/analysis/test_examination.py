"""What an examination says, what it costs, and when it is handed on."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import msam
import msam_analysis as ma
from msam_analysis import probes
from msam_analysis.objective.examine import examine
from msam_analysis.objective.randomness import ALONE

HELD = "examined: value, copy, mean, gradient, Hessian, no writes"


def network(seed: int = 0) -> nn.Sequential:
    """Return a small network, drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def points(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def applied(function: Any, x: Tensor) -> Any:
    """Apply a function with a derivative of its own."""
    return function.apply(x)


class Doubled(torch.autograd.Function):
    """The identity with twice its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


# --- what it says


def test_a_line_says_what_holds() -> None:
    found = ma.Objective(network(), nn.CrossEntropyLoss(), [points()]).examine()
    assert isinstance(found, ma.Examination)
    assert 0 <= found.largest < 1e-6
    assert found.largest == max(c.apart for c in found.checks if not math.isnan(c.apart))
    for apart, words in ((0.0, "no difference beyond rounding"), (3e-9, "largest difference 3e-09")):
        checks = tuple(dataclasses.replace(check, apart=apart) for check in found.checks)
        assert dataclasses.replace(found, checks=checks).line == f"{HELD} ({words})"


@pytest.mark.parametrize(
    ("loss_fn", "says"),
    [
        (lambda o, y: F.cross_entropy(applied(Doubled, o), y), "gradient refused: the gradient differs"),
        (
            nn.CrossEntropyLoss(reduction="sum"),
            "mean adapted: sums of the criterion are divided by the number of samples",
        ),
        (
            lambda o, y: F.cross_entropy(o, y) * (1 if torch.is_grad_enabled() else 2),
            "value adapted: values are computed",
        ),
    ],
)
def test_a_line_says_what_follows(loss_fn: Any, says: str) -> None:
    line = ma.Objective(network(), loss_fn, [points()]).examine().line
    held, *others = line.split("; ", 1)
    assert others[0].startswith(says)
    assert says.partition(" ")[0] not in held


def test_differences_by_wish_are_not_checked_products() -> None:
    found = ma.Objective(network(), nn.CrossEntropyLoss(), [points()], second_derivatives="central").examine()
    assert found.line.endswith("; Hessian not checked")


def test_a_measurement_shows_it() -> None:
    """The table, the settings and what a file keeps have the same line."""
    objective = ma.Objective(network(), nn.CrossEntropyLoss(), [points()])
    table = ma.measure(objective, metrics=["loss"])
    row = table.to_frame().iloc[0]
    assert (row["metric"], row["meaning"]) == ("examination", objective.examine().line)
    assert row["value"] == objective.examine().largest
    assert table.settings["examination"] == row["meaning"]
    assert objective.settings["examination"] == "passed"


def test_a_measurement_says_that_nothing_was_examined() -> None:
    objective = ma.Objective(network(), nn.CrossEntropyLoss(), [points()], examine=False)
    row = ma.measure(objective, metrics=["loss"]).to_frame().iloc[0]
    assert (row["metric"], row["meaning"]) == ("examination", "not examined")
    assert math.isnan(row["value"])
    assert objective.settings["examination"] == "not examined"
    assert objective.examine().verdict == objective.settings["examination"] == "passed"


# --- what it costs


def convolutions() -> nn.Sequential:
    """Return a network whose work is convolutions and products."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(288, 10),
    )


@pytest.mark.parametrize("classes", [2, 10])
def test_it_costs_at_most_six_gradients_of_the_part(classes: int) -> None:
    """Floating-point operations over those of one gradient on 32 samples; labels of two classes may be a mask."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 64, generator=generator), torch.randint(classes, (400,), generator=generator)
    model = convolutions()

    def operations(action: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            action()
        return int(counter.get_total_flops())

    part = ma.Objective(model, nn.CrossEntropyLoss(), (x[:32], y[:32]), examine=False)
    whole = ma.Objective(model, nn.CrossEntropyLoss(), list(zip(x.split(150), y.split(150), strict=True)))
    price = operations(whole.examine) / operations(part.gradient)
    assert 3 < price <= 6


class Whole(nn.Module):
    """A criterion of a whole batch."""

    def __init__(self, refuse: Callable[[int], Tensor | None]) -> None:
        super().__init__()
        self.refuse = refuse

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        other = self.refuse(len(output))
        return F.cross_entropy(output, target) if other is None else other


def complain(count: int) -> None:
    """Raise an error of the user's where a batch is not whole."""
    if count != 20:
        raise IndexError("twenty, please")


@pytest.mark.parametrize("refuse", [complain, lambda count: None if count == 20 else torch.tensor(math.nan)])
def test_derivatives_are_compared_on_all_where_half_does_not_do(refuse: Any) -> None:
    found = ma.Objective(network(), Whole(refuse), points(20)).examine()
    assert [check.verdict for check in found.checks if check.topic in ("gradient", "Hessian")] == ["holds"] * 3


def test_an_error_of_the_users_in_the_second_pass_of_a_derivative_is_theirs() -> None:
    """Half of the samples fail as all of them do."""
    passes = iter(range(100))

    class Tired(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            if next(passes) >= 0:
                raise IndexError("no gradient today")
            return gradients[0]

    with pytest.raises(IndexError, match="no gradient today"):
        ma.Objective(network(), lambda o, y: F.cross_entropy(applied(Tired, o), y), points(20)).gradient()


# --- threads


def test_no_other_thread_passes_while_a_loss_is_evaluated() -> None:
    """It would put another point in place of this one's."""
    free: list[bool] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: free.append(ALONE.acquire(blocking=False)))
        other.start()
        other.join()
        return F.cross_entropy(output, target)

    objective = ma.Objective(network(), loss_fn, [points()], examine=False)
    objective.loss_and_gradient()
    objective.loss()
    assert free == [False, False]
    assert ALONE.acquire(blocking=False), "it is given back"
    ALONE.release()


# --- when it is handed on


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that grows by one with every examination."""
    made: list[object] = []

    def counted(evaluation: Any) -> Any:
        made.append(None)
        return examine(evaluation)

    monkeypatch.setattr("msam_analysis.objective.handing_on.examine", counted)
    return made


def train(model: nn.Module, asked: list[Any], steps: int = 4) -> ma.Monitor:
    """Train on one batch with a monitor that records every step."""
    x, y = points()
    optimizer = msam.MSAM(model.parameters(), lr=0.05, rho=0.3, momentum=0.9)
    with ma.Monitor(optimizer, asked, every=1) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return monitor


def rise(model: nn.Module, make: Callable[[], Any], data: Callable[[], Any], **options: Any) -> Any:
    """Return a probe whose source makes another objective at every record."""
    return probes.PerturbationRise(lambda: ma.Objective(model, make(), data(), **options))


def test_a_source_is_examined_once(count: list[object]) -> None:
    """Also by several probes, and where the criterion is a new one every time; the numbers are the same."""
    model, batches = network(), iter(range(100))
    asked = [
        rise(model, nn.CrossEntropyLoss, lambda: [points(40 - next(batches), seed=1)]),
        probes.HeldOutCosine(lambda: ma.Objective(model, nn.CrossEntropyLoss(), [points(seed=2)])),
    ]
    monitor = train(model, asked)
    assert len(monitor.rows) == 4
    assert len(count) == 1
    again = network()
    batches = iter(range(100))
    plain = train(
        again, [rise(again, nn.CrossEntropyLoss, lambda: [points(40 - next(batches), seed=1)], examine=False)]
    )
    assert [row["loss_after"] for row in monitor.rows] == [row["loss_after"] for row in plain.rows]


def test_outside_of_a_monitor_every_objective_is_examined(count: list[object]) -> None:
    model = network()
    for _ in range(3):
        ma.Objective(model, nn.CrossEntropyLoss(), [points()]).loss()
    assert len(count) == 3


@pytest.mark.parametrize(
    ("change", "examined"),
    [
        (lambda n: {"make": lambda: nn.CrossEntropyLoss(label_smoothing=0.1 * n)}, 4),
        (lambda n: {"make": lambda: nn.CrossEntropyLoss(weight=torch.ones(3))}, 4),
        (lambda n: {"make": lambda: lambda o, y: F.cross_entropy(2 * o, y)}, 1),
        (lambda n: {"make": lambda: lambda o, y: F.cross_entropy(o, y) * (n + 1)}, 4),
        (lambda n: {"make": lambda: nn.CrossEntropyLoss().forward}, 1),
        (lambda n: {"parameters": "0.*" if n % 2 else "2.*"}, 2),
        (lambda n: {"seed": n}, 4),
        (lambda n: {"data": {"x": points()[0], "y": points()[1], "number": n}, "make": lambda: by_keys}, 1),
        (lambda n: {"data": [*points(), torch.ones(40)][: 2 + n % 2], "make": lambda: by_place}, 2),
    ],
)
def test_another_kind_is_examined_by_itself(
    change: Callable[[int], dict[str, Any]], examined: int, count: list[object]
) -> None:
    model, numbers = network(), iter(range(100))

    def source() -> ma.Objective:
        options: dict[str, Any] = {"make": nn.CrossEntropyLoss, "data": [points()]} | change(next(numbers))
        return ma.Objective(model, options.pop("make")(), options.pop("data"), **options)

    train(model, [probes.PerturbationRise(source)])
    assert len(count) == examined


def by_keys(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch with names."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def by_place(*given: Any) -> Tensor:
    """Return the loss of a batch of two tensors or three."""
    first, batch = given
    return F.cross_entropy(first, batch) if isinstance(first, Tensor) else F.cross_entropy(first(batch[0]), batch[1])


def test_another_model_is_examined_by_itself_and_forgotten(count: list[object]) -> None:
    """A monitor keeps no model alive that its source has given up."""
    seen: list[weakref.ref[nn.Module]] = []

    def source() -> ma.Objective:
        other = network()
        other.load_state_dict(model.state_dict())
        seen.append(weakref.ref(other))
        return ma.Objective(other, nn.CrossEntropyLoss(), [points()])

    class Loss:
        def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
            return {"loss": float(source().loss())}

    model = network()
    monitor = train(model, [Loss()])
    gc.collect()
    assert len(count) == len(monitor.rows) == 4
    assert [reference() for reference in seen] == [None] * 4


def test_what_batches_weigh_is_found_anew(count: list[object]) -> None:
    """The first data has no label that is left out, the second has: its batches weigh labels."""
    model, (x, y) = network(), points()
    ignored = y.clone()
    ignored[:15] = -100
    found: list[ma.Objective] = []

    def source() -> ma.Objective:
        labels = ignored if found else y
        found.append(ma.Objective(model, nn.CrossEntropyLoss(), list(zip(x.split(20), labels.split(20), strict=True))))
        return found[-1]

    train(model, [probes.PerturbationRise(source)], steps=2)
    assert len(count) == 1
    assert [objective.examine().verdict for objective in found] == ["passed", "a mean over samples: adapted"]
    expected = F.cross_entropy(model(x), ignored)
    torch.testing.assert_close(found[1].loss(), expected.detach().double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_loss_in_float32_is_compared_at_long_steps(seed: int, right: bool) -> None:
    """Also where the model is in float64, as language models do it: rounding is no fault, and a wrong gradient is."""
    torch.manual_seed(seed)

    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(output, y).float() + 30.0
        return loss if right else cast(Tensor, applied(Doubled, loss))

    checks = ma.Objective(network(), loss_fn, [points()]).examine().checks
    (gradient,) = [check for check in checks if check.topic == "gradient"]
    assert gradient.verdict == ("holds" if right else "refused")
    assert math.isfinite(gradient.apart)
