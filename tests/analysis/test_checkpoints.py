"""Weights from files: the common formats, nothing that runs code, errors that name the file and the key."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import msam_analysis as ma

from .cases import CONVNET, TIED

State = dict[str, Tensor]


def factory() -> nn.Module:
    model: nn.Module = CONVNET.model(seed=9)
    return model


@pytest.fixture
def trained() -> Any:
    return CONVNET.model(seed=1)


def check_equal(model: nn.Module, expected: nn.Module) -> None:
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name


FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "under model": lambda state: {"model": state, "epoch": 3, "lr": 0.1},
    "under state_dict": lambda state: {"state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "of DistributedDataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "of torch.compile": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "nested and prefixed": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(FORMS[form](trained.state_dict()), path)
    for given in (path, str(path)):
        weights = ma.checkpoints.load_weights(given)
        for (name, value), (expected_name, expected) in zip(weights.items(), trained.state_dict().items(), strict=True):
            assert name.endswith(expected_name)
            assert torch.equal(value, expected)
        check_equal(ma.checkpoints.load_model(given, factory), trained)


def test_safetensors(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    check_equal(ma.checkpoints.load_model(path, factory), trained)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    trained = TIED.model(seed=1)
    path = tmp_path / "weights.pt"
    torch.save(trained.state_dict(), path)
    model: Any = ma.checkpoints.load_model(path, TIED.model)
    check_equal(model, trained)
    assert model.decoder.weight is model.embedding.weight


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.module.", "module._orig_mod.", "module.module.", "_orig_mod.module._orig_mod."]
)
def test_nested_wrappers(prefix: str, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({prefix + name: tensor for name, tensor in trained.state_dict().items()}, path)
    check_equal(ma.checkpoints.load_model(path, factory), trained)


def test_a_layer_that_is_called_module(tmp_path: Path) -> None:
    """The prefix of DistributedDataParallel can be a name of one's own."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    trained, path = Own(), tmp_path / "weights.pt"
    torch.save(trained.state_dict(), path)
    check_equal(ma.checkpoints.load_model(path, Own), trained)


def test_the_loss_of_a_loaded_model_is_the_loss_of_the_model(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(trained.state_dict(), path)
    losses = [
        ma.Objective(model, CONVNET.loss_fn, CONVNET.data()).loss()
        for model in (trained, ma.checkpoints.load_model(path, factory))
    ]
    assert torch.equal(*losses)


# --- what cannot be loaded


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.pt", tmp_path):
        for load in (ma.checkpoints.load_weights, lambda path: ma.checkpoints.load_model(path, factory)):
            with pytest.raises(FileNotFoundError, match=rf"no checkpoint at {path}.*expected"):
                load(path)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_that_would_run_code(inside: bool, trained: nn.Module, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    path = tmp_path / "weights.pt"
    torch.save({"model": trained.state_dict(), "extra": bomb} if inside else bomb, path)
    with pytest.raises(ValueError, match=r"weights\.pt.*expected.*safetensors.*state_dict") as caught:
        ma.checkpoints.load_model(path, factory)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pt"]
    message = str(caught.value)
    assert "Re-running" not in message, "torch's advice to switch the safety off is not passed on"
    assert "\x1b" not in message
    torch.load(path, weights_only=False)
    assert (tmp_path / "exploded").is_dir(), "the bomb is one"


def test_a_whole_model_gives_its_weights(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(trained, path)
    assert ma.checkpoints.load_weights(path).keys() == trained.state_dict().keys()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_rubbish(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights\{suffix}.*expected"):
        ma.checkpoints.load_weights(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated(suffix: str, part: float, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(trained.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=rf"weights\{suffix}.*expected"):
        ma.checkpoints.load_weights(path)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {}, {"epoch": 3}, {"model": {"epoch": 3}}])
def test_no_state_dict(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pt holds no state dict.*expected names to tensors"):
        ma.checkpoints.load_weights(path)


def drop(state: State) -> State:
    return {name: value for name, value in state.items() if name != "4.bias"}


def drop_buffer(state: State) -> State:
    return {name: value for name, value in state.items() if name != "4.running_mean"}


def add(state: State) -> State:
    return state | {"9.weight": torch.ones(2)}


def reshape(state: State) -> State:
    return state | {"8.weight": torch.ones(3, 5)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"missing.*4\.bias"),
        (drop_buffer, r"missing.*4\.running_mean"),
        (add, r"unknown to the model.*9\.weight"),
        (reshape, r"shape.*8\.weight"),
    ],
)
def test_keys_that_do_not_fit(
    change: Callable[[State], State], message: str, trained: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pt"
    torch.save(change(trained.state_dict()), path)
    with pytest.raises(ValueError, match=rf"(?s)weights\.pt does not fit.*{message}.*pass"):
        ma.checkpoints.load_model(path, factory)


def test_a_misfit_does_not_load_half(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(drop(trained.state_dict()), path)
    model = factory()
    with pytest.raises(ValueError, match="does not fit"):
        ma.checkpoints.load_model(path, lambda: model)
    check_equal(model, factory())


def test_factories(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(trained.state_dict(), path)
    nothing: Any = lambda: None  # noqa: E731
    with pytest.raises(TypeError, match=r"factory must return a torch\.nn\.Module, got NoneType"):
        ma.checkpoints.load_model(path, nothing)
