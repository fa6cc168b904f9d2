"""The critical sharpness along the directions of a running training, and updates that optimizers are about to take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import msam
import msam_analysis as ma
from msam_analysis import probes
from msam_analysis.measures.momentum import true_weights

from .cases import MLP
from .oracles import flatten, reference_loss
from .test_untouched import untouched

LR = 0.1
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=0.01),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=LR),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=LR / 10),
    "Adam": lambda p: torch.optim.Adam(p, lr=LR / 10, amsgrad=True, maximize=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=LR / 10),
    "NAG": lambda p: msam.NAG(p, lr=LR),
    "MSAM": lambda p: msam.MSAM(p, lr=LR, rho=0.3, weight_decay=0.01),
    "AdamWMSAM": lambda p: msam.AdamWMSAM(p, lr=LR / 10),
    "two rates": lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "lr": 3 * LR}], lr=LR),
}


def start(name: str) -> tuple[Any, torch.optim.Optimizer, list[Any]]:
    model, data = MLP.model().eval(), MLP.data()
    return model, OPTIMIZERS[name](list(model.parameters())), data


def backward(model: Any, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()


def weights(optimizer: torch.optim.Optimizer) -> Tensor:
    return torch.cat([w.flatten().clone() for w in true_weights(optimizer).values()])


# --- the update that comes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_coming_update_is_the_step_that_comes(name: str) -> None:
    """And nothing of the model or the optimizer moves, not even where it keeps ``w + ε``."""
    model, optimizer, data = start(name)
    objective = ma.Objective(model, MLP.loss_fn, data)
    for batch in (*data, data[0]):
        backward(model, optimizer, batch)
        before = weights(optimizer)
        state = {key: repr(entry) for key, entry in optimizer.state.items()}
        with untouched(model):
            coming = ma.directions.update(optimizer, objective)
        assert {key: repr(entry) for key, entry in optimizer.state.items()} == state
        optimizer.step()
        taken = (before - weights(optimizer)) / optimizer.param_groups[0]["lr"]
        torch.testing.assert_close(coming.vector, taken, rtol=1e-9, atol=1e-11)
    assert coming.name == "update"
    assert ma.directions.update(optimizer, objective, "l2").norm == pytest.approx(1.0)


def test_the_update_of_adamw_is_preconditioned() -> None:
    """``m̂ / (√v̂ + ε) + λ w``, from the formula."""
    model, optimizer, data = start("AdamW")
    objective = ma.Objective(model, MLP.loss_fn, data)
    m = v = torch.zeros(objective.size, dtype=torch.float64)
    for step, batch in enumerate(data, 1):
        backward(model, optimizer, batch)
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8) + 0.01 * flatten(model)
        torch.testing.assert_close(ma.directions.update(optimizer, objective).vector, expected, rtol=1e-8, atol=1e-11)
        optimizer.step()


def test_a_parameter_without_a_gradient_does_not_move() -> None:
    model, optimizer, data = start("SGD without momentum")
    objective = ma.Objective(model, MLP.loss_fn, data)
    backward(model, optimizer, data[0])
    first = next(model.parameters())
    first.grad = None
    found = objective.layout.views(ma.directions.update(optimizer, objective).vector)
    assert [bool(view.any()) for view in found.values()] == [p is not first for p in model.parameters()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.0), r"the learning rate is 0: expected a positive one"),
        (lambda p: msam.SAM(p, lr=LR), r"a copy of SAM cannot step .*use directions.last_update after the step"),
        (torch.optim.LBFGS, r"a copy of LBFGS cannot step .*closure"),
    ],
)
def test_steps_that_cannot_be_foreseen(make: Any, message: str) -> None:
    model, data = MLP.model().eval(), MLP.data()
    optimizer = make(list(model.parameters()))
    objective = ma.Objective(model, MLP.loss_fn, data)
    with pytest.raises(RuntimeError, match=r"no parameter of the optimizer has a gradient"):
        ma.directions.update(optimizer, objective)
    backward(model, optimizer, data[0])
    with pytest.raises(RuntimeError, match=message):
        ma.directions.update(optimizer, objective)


# --- the probe


def watched(
    name: str, steps: int = 6, **options: Any
) -> tuple[list[dict[str, float]], list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Train with the probe in every direction; return its rows, and w, g, v and the step over lr by hand."""
    model, optimizer, data = start(name)
    parameters = list(model.parameters())
    objective = ma.Objective(model, MLP.loss_fn, data)
    kinds = options.get("kinds", ("gradient", "momentum", "update"))
    monitor = ma.Monitor(optimizer, [probes.CriticalSharpness(objective, kind) for kind in kinds], every=1)
    seen = []
    for step in range(steps):
        backward(model, optimizer, data[step % 3])
        w, g = weights(optimizer), torch.cat([p.grad.flatten() for p in parameters])
        key = "exp_avg" if "Adam" in name else "momentum_buffer"
        v = torch.cat([optimizer.state.get(p, {}).get(key, torch.zeros_like(p)).flatten().clone() for p in parameters])
        optimizer.step()
        seen.append((w, g, v, (w - weights(optimizer)) / optimizer.param_groups[0]["lr"]))
    return monitor.rows, seen


@pytest.mark.parametrize("name", ["SGD", "NAG", "MSAM", "AdamW"])
def test_the_bracket_holds_the_step_at_which_the_loss_rises(name: str) -> None:
    """By a forward pass from the formulas: at one end it is above the loss of the true weights, at the other below."""
    loss = reference_loss(MLP, MLP.model(), MLP.data())
    rows, seen = watched(name)
    found = 0
    for step, (row, (w, g, v, moved)) in enumerate(zip(rows, seen, strict=True)):
        for kind, d in (("gradient", g), ("momentum", v), ("update", moved)):
            value, low, high, crossings = (
                row[f"critical_sharpness_{kind}{end}"] for end in ("", "_low", "_high", "_crossings")
            )
            if kind == "momentum" and step == 0:
                assert math.isnan(value)
                assert crossings == 0
                continue
            assert float(loss(w - 2 / low * d)) > float(loss(w))
            if math.isinf(value):
                assert float(d @ torch.func.grad(loss)(w)) < 0
                assert crossings == 0
                continue
            found += 1
            assert crossings >= 1
            assert low <= value <= high <= low / (1 - 1 / 16) * (1 + 1e-12)
            assert float(loss(w - 2 / high * d)) < float(loss(w))
    assert found >= 12


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_search_begins_where_the_last_one_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float | None] = []
    module: Any = probes.losses
    original = module.critical_sharpness

    def told(*arguments: Any, start: float | None, **options: Any) -> Any:
        starts.append(start)
        return original(*arguments, start=start, **options)

    monkeypatch.setattr(module, "critical_sharpness", told)
    rows, _ = watched(name, kinds=("update",))
    steps = [2 / row["critical_sharpness_update"] for row in rows]
    assert starts[0] is None
    assert starts[1:] == [pytest.approx(step) for step in steps[:-1]]


def test_a_resumed_run_goes_on_there() -> None:
    first, second = (probes.CriticalSharpness(lambda: pytest.fail("not asked")) for _ in range(2))
    first.load_state_dict({"start": 0.25})
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"start": 0.25}


def test_the_update_of_sam_and_a_learning_rate_of_zero() -> None:
    """SAM's step is known when it is taken; one of learning rate 0 has no direction."""
    model, data = MLP.model().eval(), MLP.data()
    optimizer = msam.SAM(model.parameters(), lr=LR)
    monitor = ma.Monitor(optimizer, [probes.CriticalSharpness(ma.Objective(model, MLP.loss_fn, data))], every=1)
    for rate in (LR, 0.0):
        optimizer.param_groups[0]["lr"] = rate

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data[0][0]), data[0][1])
            loss.backward()
            return loss

        optimizer.step(closure)
    first, second = (row["critical_sharpness_update"] for row in monitor.rows)
    assert 0 < first < math.inf
    assert math.isnan(second)


def test_without_momentum_there_is_no_such_direction() -> None:
    with pytest.raises(RuntimeError, match="keeps no momentum buffer"):
        watched("SGD without momentum", kinds=("momentum",))
