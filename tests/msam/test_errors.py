"""Bad input, as data: each gets one clear error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import msam

from .cases import BY_NAME, NAMED, RHO, Case, general
from .workloads import backward, closure_of, loss, network, same, snapshot, train

NAN, INF = float("nan"), float("inf")
CLASSES = ("PerturbedSGD", "PerturbedAdamW", "MSAM", "SAM", "NAG", "AdamWMSAM", "AdamWSAM")
SGD_CLASSES = ("PerturbedSGD", "MSAM", "SAM", "NAG")
ADAMW_CLASSES = ("PerturbedAdamW", "AdamWMSAM", "AdamWSAM")
RHO_CLASSES = ("MSAM", "SAM", "AdamWMSAM", "AdamWSAM")
NOT_A_STRENGTH = (-0.1, NAN, INF, -INF)

BAD_NUMBERS: list[tuple[str, str, Any]] = [
    *((cls, name, value) for cls in CLASSES for name in ("lr", "weight_decay") for value in NOT_A_STRENGTH),
    *((cls, "momentum", value) for cls in SGD_CLASSES for value in NOT_A_STRENGTH),
    *((cls, "rho", value) for cls in RHO_CLASSES for value in NOT_A_STRENGTH),
    *((cls, "eps", value) for cls in ADAMW_CLASSES for value in NOT_A_STRENGTH),
    *(
        (cls, "betas", value)
        for cls in ADAMW_CLASSES
        for value in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (NAN, 0.9), (0.9, NAN))
    ),
    *((cls, "dampening", NAN) for cls in ("PerturbedSGD", "MSAM")),
]


def construct(cls: str, **options: Any) -> Any:
    model = options.pop("params", None)
    return getattr(msam, cls)(network().parameters() if model is None else model, **options)


@pytest.mark.parametrize(("cls", "name", "value"), BAD_NUMBERS)
def test_hyper_parameters(cls: str, name: str, value: Any) -> None:
    word = name.rstrip("s") if name == "betas" else name
    with pytest.raises(ValueError, match=f"(?i){word.replace('_', '[_ ]')}|learning rate"):
        construct(cls, **{"lr": 0.1, name: value})


@pytest.mark.parametrize(("cls", "name", "value"), BAD_NUMBERS[::3])
def test_hyper_parameters_of_a_group(cls: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"(?i)[a-z]{2}"):
        construct(cls, params=[{"params": list(network().parameters()), name: value}], lr=0.1)


@pytest.mark.parametrize("value", NOT_A_STRENGTH)
def test_rho_of_a_group_added_later(value: float) -> None:
    opt = construct("MSAM", lr=0.1, rho=RHO)
    with pytest.raises(ValueError, match="rho"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": value})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("value", NOT_A_STRENGTH)
def test_rho_of_a_perturbation(value: float) -> None:
    with pytest.raises(ValueError, match="rho"):
        msam.Perturbation(direction="momentum", rho=value)


def test_negative_rho_points_at_the_sign() -> None:
    for make in (
        lambda: msam.Perturbation(direction="momentum", rho=-1.0),
        lambda: construct("MSAM", lr=0.1, rho=-1.0),
    ):
        with pytest.raises(ValueError, match="sign=-1"):
            make()


SWITCHES: list[tuple[str, Any]] = [
    ("direction", "up"),
    ("sign", 0),
    ("sign", 2),
    ("sign", 0.5),
    ("normalize", "l1"),
    ("scale", "log"),
    ("subset", "some"),
]


@pytest.mark.parametrize(("name", "value"), SWITCHES)
def test_switches_of_a_perturbation(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        msam.Perturbation(**{"direction": "momentum", "rho": RHO, name: value})


def test_perturbation_is_frozen_and_keyword_only() -> None:
    perturbation: Any = msam.Perturbation(direction="momentum", rho=RHO)
    cls: Any = msam.Perturbation
    with pytest.raises(AttributeError):
        perturbation.rho = 1.0
    with pytest.raises(TypeError):
        cls("momentum", RHO)


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_keyword(cls: str) -> None:
    with pytest.raises(TypeError, match="momentun"):
        construct(cls, lr=0.1, momentun=0.9)


@pytest.mark.parametrize("cls", CLASSES)
def test_no_parameters(cls: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        construct(cls, params=[], lr=0.1)


@pytest.mark.parametrize("cls", CLASSES)
def test_bare_tensor_as_parameters(cls: str) -> None:
    with pytest.raises(TypeError):
        construct(cls, params=torch.ones(3, requires_grad=True), lr=0.1)


@pytest.mark.parametrize("cls", CLASSES)
def test_complex_parameters(cls: str) -> None:
    with pytest.raises(TypeError, match="complex"):
        construct(cls, params=[nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1)


@pytest.mark.parametrize("cls", ["PerturbedSGD", "PerturbedAdamW", "MSAM"])
def test_foreach_and_fused_exclude_one_another(cls: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match="fused"):
        construct(cls, lr=0.1, foreach=True, fused=True)


@pytest.mark.parametrize("value", ["here", None, True])
def test_where_weight_decay_acts(value: Any) -> None:
    with pytest.raises(ValueError, match="weight_decay_at"):
        construct("PerturbedSGD", lr=0.1, weight_decay_at=value)


@pytest.mark.parametrize("value", ["later", None, True])
def test_way_back_to_the_true_weights(value: Any) -> None:
    with pytest.raises(ValueError, match="restore"):
        construct("PerturbedSGD", lr=0.1, restore=value)


@pytest.mark.parametrize(
    "switches", [dict(direction="gradient"), dict(direction="momentum", scale="adaptive")], ids=str
)
def test_subtracting_what_cannot_be_known_again(switches: dict[str, Any]) -> None:
    perturbation = msam.Perturbation(rho=RHO, **switches)
    with pytest.raises(ValueError, match="restore"):
        construct("PerturbedSGD", lr=0.1, momentum=0.9, perturbation=perturbation, restore="subtract")


@pytest.mark.parametrize("rho", ["3", None, [1.0]])
def test_rho_is_a_number_or_a_schedule(rho: Any) -> None:
    with pytest.raises(TypeError, match=r"rho|number"):
        msam.Perturbation(direction="momentum", rho=rho)


def test_model_without_normalisation_layers() -> None:
    with pytest.raises(ValueError, match="norm"):
        msam.normalization_layers(network(norm=False))


def test_statistics_of_no_batch() -> None:
    with pytest.raises(ValueError, match="batch"):
        msam.update_batchnorm_statistics(network(), [])


def test_state_of_torch_nesterov() -> None:
    """Its parameters are perturbed ones, which the state does not say how to undo."""
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    train(model, opt, range(2))
    with pytest.raises(ValueError, match=r"(?i)nesterov"):
        construct("MSAM", params=model.parameters(), lr=0.1).load_state_dict(opt.state_dict())


def test_state_displaced_along_another_direction() -> None:
    model, other = network(), network()
    opt = general("sgd", dict(direction="last_gradient", rho=RHO)).make(model.parameters())
    train(model, opt, range(2))
    with pytest.raises(ValueError, match=r"direction|last_gradient"):
        construct("MSAM", params=other.parameters(), lr=0.1).load_state_dict(opt.state_dict())


EVERY = [*NAMED, *(general("sgd", dict(direction=d, rho=RHO)) for d in ("last_gradient", "random"))]
each_case = pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)


@each_case
def test_sparse_gradients(case: Case) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    opt = case.make(embedding.parameters())
    before = snapshot(embedding.parameters())

    def closure() -> torch.Tensor:
        opt.zero_grad()
        return backward(embedding(torch.tensor([1, 2])).sum())

    with pytest.raises(RuntimeError, match="sparse"):
        opt.step(closure)
    assert same(embedding.parameters(), before)


@pytest.mark.parametrize("name", ["SAM", "AdamWSAM"])
def test_gradient_direction_needs_a_closure(name: str) -> None:
    model = network()
    opt = BY_NAME[name].make(model.parameters())
    backward(loss(model, 0))
    with pytest.raises(RuntimeError, match=r"(?s)closure.*first_step|first_step.*closure"):
        opt.step()


@each_case
def test_step_in_eval_mode(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    train(model, opt, range(3), case.closure)
    opt.eval()
    before = snapshot(model.parameters())
    with pytest.raises(RuntimeError, match="train"):
        opt.step(closure_of(model, opt, 3))
    assert same(model.parameters(), before)
    opt.train()
    train(model, opt, [3], case.closure)


@each_case
def test_step_inside_unperturbed(case: Case) -> None:
    model = network()
    opt = case.make(model.parameters())
    train(model, opt, range(3), case.closure)
    with opt.unperturbed(), pytest.raises(RuntimeError):
        opt.step(closure_of(model, opt, 3))


def test_second_step_without_first() -> None:
    model = network()
    opt = BY_NAME["SAM"].make(model.parameters())
    backward(loss(model, 0))
    with pytest.raises(RuntimeError, match="first_step"):
        opt.second_step()


@pytest.mark.parametrize("passes", [1, 2])
def test_closure_that_raises_leaves_true_weights(passes: int) -> None:
    """SAM, half way: the weights come back, and training can go on."""
    model = network()
    opt = BY_NAME["SAM"].make(model.parameters())
    train(model, opt, range(3), closure=True)
    before, calls = snapshot(model.parameters()), []

    def closure() -> torch.Tensor:
        calls.append(1)
        if len(calls) == passes:
            raise ZeroDivisionError
        return closure_of(model, opt, 3)()

    with pytest.raises(ZeroDivisionError):
        opt.step(closure)
    assert same(model.parameters(), before)
    assert not opt.perturbed
    train(model, opt, [3], closure=True)


def test_first_step_of_an_optimizer_with_one_gradient() -> None:
    model = network()
    opt = BY_NAME["MSAM"].make(model.parameters())
    backward(loss(model, 0))
    with pytest.raises((RuntimeError, AttributeError)):
        opt.first_step()


def momentum_along(**switches: Any) -> msam.Perturbation:
    return msam.Perturbation(**{"direction": "momentum", "rho": RHO, **switches})


# one row for each message that no test above asks for: what is done, the error, a word of its message
MORE: dict[str, tuple[Any, type[Exception], str]] = {
    "decay of SGD after the step": (lambda: construct("SAM", weight_decay_at="updated"), ValueError, "AdamW"),
    "perturbation": (lambda: construct("PerturbedSGD", perturbation="msam"), TypeError, "Perturbation"),
    "lr of two elements": (lambda: construct("MSAM", lr=torch.ones(2)), ValueError, "one element"),
    "negative tensor lr": (lambda: construct("MSAM", lr=torch.tensor(-1.0)), ValueError, "lr"),
    "misspelt option of a group": (
        lambda: construct("MSAM", params=[{"params": list(network().parameters()), "weigth_decay": 0.1}]),
        ValueError,
        "weight_decay",
    ),
    "foreach with a tensor lr": (
        lambda: construct("AdamWMSAM", lr=torch.tensor(0.1), foreach=True),
        ValueError,
        "capturable",
    ),
    "squared learning rate": (
        lambda: momentum_along(normalize="lr", rho=msam.FollowLR(0.1)),
        ValueError,
        "learning rate",
    ),
    "seed of nothing": (lambda: momentum_along(seed=1), ValueError, "random"),
    "seed of a wrong type": (lambda: momentum_along(direction="random", seed=1.5), TypeError, "seed"),
    "factor without norm": (lambda: momentum_along().factor(None, RHO, 0.1), ValueError, "norm"),
    "saved schedule": (lambda: msam.Schedule.from_plain({"schedule": "Cosinus", "value": 1.0}), ValueError, "Cosinus"),
    "copied filter without names": (
        lambda: construct("MSAM", subset=copy.deepcopy(msam.NamedSubset(frozenset({"0.weight"})))),
        ValueError,
        "named_parameters",
    ),
}


@pytest.mark.parametrize(("act", "error", "word"), MORE.values(), ids=MORE)
def test_message(act: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        act()


@pytest.mark.parametrize("name", ["SAM", "AdamWSAM"])
def test_closure_inside_a_gradient_scaler(name: str) -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu")
    opt = BY_NAME[name].make(model.parameters())
    backward(scaler.scale(loss(model, 0)))
    with pytest.raises(RuntimeError, match="first_step"):
        scaler.step(opt, closure_of(model, opt, 0))


def test_schedule_in_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would repeat the rho of its capture for ever."""
    model = network()
    opt = BY_NAME["MSAM"].make(model.parameters(), rho=msam.Ramp(RHO, steps=5))
    train(model, opt, [0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="tensor"):
        opt.step()
