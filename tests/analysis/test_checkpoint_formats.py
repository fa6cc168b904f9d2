"""Checkpoints as libraries write them: the weights are those that were saved, and what was taken is said."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import re
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import msam_analysis as ma
from msam_analysis.checkpoints import folders
from msam_analysis.checkpoints.naming import expand

State = dict[str, Tensor]


class Net(nn.Sequential):
    """A small network with BatchNorm; weights differ by seed."""

    def __init__(self, seed: int = 9) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self(torch.randn(7, 3))  # statistics of its own


class Tied(nn.Module):
    """An embedding whose weight the head shares."""

    def __init__(self, seed: int = 9) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight


@pytest.fixture
def net() -> Net:
    return Net(1)


def check(model: nn.Module, expected: nn.Module) -> None:
    """Every tensor of the state dict is equal, to the bit."""
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(state[name].to(value.dtype), value), name


def compiled(net: nn.Module) -> nn.Module:
    made: Any = torch.compile(net, backend="eager")
    return cast(nn.Module, made)


def renamed(state: State, rename: Callable[[str], str], **more: Any) -> dict[str, Any]:
    return {**{rename(name): value for name, value in state.items()}, **more}


# --- names and nesting: what a wrapper or a trainer adds


FORMS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "distributed": (lambda net: renamed(net.state_dict(), lambda n: f"module.{n}"), "prefix 'module.'"),
    "compiled": (lambda net: compiled(net).state_dict(), "prefix '_orig_mod.'"),
    "sharded, compiled, checkpointed": (
        lambda net: renamed(
            net.state_dict(),
            lambda n: "_fsdp_wrapped_module._orig_mod." + n.replace(".", "._checkpoint_wrapped_module.", 1),
        ),
        "'_checkpoint_wrapped_module' in names",
    ),
    "averaged": (lambda net: AveragedModel(net).state_dict(), "prefix 'module.'"),
    "averaged and distributed": (
        lambda net: AveragedModel(nn.DataParallel(net)).state_dict(),
        "prefix 'module.module.'",
    ),
    "deeply nested": (lambda net: {"a": {"b": {"c": net.state_dict()}}, "lr": 0.1}, "prefix 'a.b.c.'"),
    "backbone of a Lightning module": (
        lambda net: {
            "state_dict": renamed(net.state_dict(), lambda n: f"model.{n}", **{"criterion.weight": torch.ones(2)}),
            "hyper_parameters": {"args": argparse.Namespace(lr=0.1)},
            "global_step": 3000,
        },
        r"step 3000.*prefix 'state_dict\.model\.'.*not read: argparse\.Namespace at \['hyper_parameters'\]\['args'\]",
    ),
    "DeepSpeed": (
        lambda net: {"module": net.state_dict(), "ds_config": {"stage": 1}, "global_steps": 2},
        "prefix 'module.'",
    ),
    "beside optimizer states": (
        lambda net: {"model": net.state_dict(), "optimizer": {"state": {0: {"exp_avg": torch.ones(4, 3)}}}},
        "prefix 'model.'",
    ),
    "whole": (lambda net: net, r"not read: .*Net at the whole"),
    "whole, in a dictionary": (lambda net: {"net": net, "epoch": 5}, r"epoch 5.*prefix 'net\.'"),
    "two equal sets": (lambda net: {"model": net.state_dict(), "ema": net.state_dict()}, "prefix 'model.'"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, legacy: bool, net: Net, tmp_path: Path) -> None:
    make, said = FORMS[form]
    torch.save(make(net), tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    if legacy and form.startswith("whole"):  # torch's safe reader takes no modules of the old format
        with pytest.raises(ValueError, match=r"holds more than tensors.*save its state_dict; nothing in it was run"):
            ma.checkpoints.load(tmp_path / "weights.pt", Net)
        return
    loaded = ma.checkpoints.load(tmp_path / "weights.pt", Net)
    check(loaded.model, net)
    assert re.search(said, loaded.taken), loaded.taken
    assert loaded.path == tmp_path / "weights.pt"


def test_objects_of_other_classes_are_passed_over(net: Net, tmp_path: Path) -> None:
    class Settings(dict[str, int]):
        pass

    class Names(list[str]):
        pass

    class Slots:
        __slots__ = ("a",)

    for one in (Settings, Names, Slots):
        one.__qualname__ = one.__name__
        globals()[one.__name__] = one
    slots = Slots()
    slots.a = 1  # type: ignore[attr-defined]
    others = {
        "dictionary": Settings(a=1),
        "list": Names(["a"]),
        "slots": slots,
        "number": np.float64(3.0),
        "array": np.ones(3),
        "path": Path("x"),
        "time": dt.datetime(2026, 1, 1),  # noqa: DTZ001 -- stored and not used
        "class": torch.optim.SGD,
        "set": {1},
        "ordered": OrderedDict(a=1),
    }
    torch.save({"state_dict": net.state_dict(), **others}, tmp_path / "weights.pt")
    loaded = ma.checkpoints.load(tmp_path / "weights.pt", Net)
    check(loaded.model, net)
    assert "pathlib" in loaded.taken
    assert ma.checkpoints.load_weights(tmp_path / "weights.pt").keys() == net.state_dict().keys()


@pytest.mark.parametrize("trace", [False, True])
def test_torchscript(trace: bool, net: Net, tmp_path: Path) -> None:
    if trace:
        with pytest.warns(DeprecationWarning, match="trace"):
            torch.jit.trace(net.eval(), torch.ones(2, 3)).save(tmp_path / "script.pt")
    else:
        torch.jit.script(net).save(tmp_path / "script.pt")
    loaded = ma.checkpoints.load(tmp_path / "script.pt", Net)
    check(loaded.model, net)
    assert "TorchScript" in loaded.taken


def distributed(state: dict[str, Any], folder: Path) -> None:
    """Save by torch.distributed.checkpoint, in one process."""
    from torch.distributed.checkpoint.state_dict_saver import save

    with pytest.warns(UserWarning, match="single process"):
        save(state, checkpoint_id=folder)


def test_distributed_checkpoint(net: Net, tmp_path: Path) -> None:
    distributed({"model": net.state_dict(), "lr": 0.1}, tmp_path / "step-12")
    loaded = ma.checkpoints.load(tmp_path / "step-12", Net)
    check(loaded.model, net)
    assert loaded.step == 12


def test_a_distributed_checkpoint_runs_nothing(net: Net, tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"folder cannot be read.*posix\.mkdir.*expected \.metadata"):
        ma.checkpoints.load(tmp_path / "folder", Net)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("more", "step", "epoch"),
    [
        ({"step": 70, "epoch": 3}, 70, 3),
        ({"train_state": {"step": torch.tensor(71), "words": "some"}}, 71, None),
        ({"optimizer": {"state": {"step": torch.tensor(5)}}, "trainer": {"loop": {"global_step": 72}}}, 72, None),
        ({"trainer": {"epoch": 8}, "epoch": 9.0}, None, 9),
        ({"optimizer": {"step": 5}}, None, None),
        ({"step": argparse.Namespace(count=1), "epoch": "x" * 2**17}, None, None),
        ({"step": torch.arange(3)}, None, None),
    ],
)
def test_counters_of_distributed_checkpoints(
    more: dict[str, Any], step: int | None, epoch: int | None, net: Net, tmp_path: Path
) -> None:
    """A number or a tensor with one; not the optimizer's, and nothing that only running it could restore."""
    distributed({"model": net.state_dict(), **more}, tmp_path / "saved")
    loaded = ma.checkpoints.load(tmp_path / "saved", Net)
    assert (loaded.step, loaded.epoch) == (step, epoch)
    assert folders.counters(tmp_path / "saved") == {"step": step, "epoch": epoch}


def test_folders_of_distributed_checkpoints_are_in_order(net: Net, tmp_path: Path) -> None:
    """Their names say nothing; a damaged one is named when it is loaded."""
    for name, step in (("a", 300), ("b", 20), ("c", 100)):
        distributed({"model": net.state_dict(), "step": step}, tmp_path / name)
    assert [path.name for path in expand([tmp_path])] == ["b", "c", "a"]
    (tmp_path / "c" / ".metadata").write_bytes(b"damaged")
    assert [path.name for path in expand([tmp_path])] == ["a", "b", "c"]


def test_a_distributed_checkpoint_reads_its_own_files_only(net: Net, tmp_path: Path) -> None:
    distributed({"model": net.state_dict(), "step": 7}, tmp_path / "inside")
    described = folders._description(tmp_path / "inside")
    (place,) = (one for index, one in described.storage_data.items() if index.fqn == "step")
    (tmp_path / place.relative_path).write_bytes((tmp_path / "inside" / place.relative_path).read_bytes())
    assert folders._stored(tmp_path / "inside", described, "step") == 7
    place.relative_path = f"../{place.relative_path}"
    assert folders._stored(tmp_path / "inside", described, "step") is None


# --- what others write around a state dict


AROUND: dict[str, tuple[Callable[[State], Any], str]] = {
    "mmengine": (
        lambda state: {"meta": {"epoch": 3, "iter": 120, "cfg": "a = 1"}, "state_dict": state, "message_hub": {}},
        "step 120, epoch 3, without the prefix 'state_dict.'",
    ),
    "ignite": (lambda state: {"model": state, "trainer": {"iteration": 30}}, "step 30, without the prefix 'model.'"),
    "fairseq": (
        lambda state: {
            "cfg": argparse.Namespace(arch="x"),
            "model": state,
            "extra_state": {"train_iterator": {"epoch": 4}},
            "last_optimizer_state": {"state": {0: {"step": 5}}},
        },
        "epoch 4, without the prefix 'model.'",
    ),
    "Megatron": (
        lambda state: {"iteration": 500, "model": {"language_model": {"encoder": state}}, "rng_state": [{"a": (1,)}]},
        "step 500, without the prefix 'model.language_model.encoder.'",
    ),
    "a list": (lambda state: [state, {"state": {}, "param_groups": []}, 7], "without the prefix '0.'"),
    "a pair": (lambda state: ({"epoch": 3}, {"net": state}), "without the prefix '1.net.'"),
    "a generator": (lambda state: {"generator": state, "discriminator": {"0.weight": torch.ones(1)}}, "'generator.'"),
    "a list of averages": (
        lambda state: {"state_dict": state, "callbacks": {"EMA": {"step": 1, "weights": list(state.values())}}},
        "without the prefix 'state_dict.'",
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_stands_around_a_state_dict(name: str, net: Net, tmp_path: Path) -> None:
    wrap, says = AROUND[name]
    torch.save(wrap(net.state_dict()), tmp_path / "saved.pt")
    loaded = ma.checkpoints.load(tmp_path / "saved.pt", Net)
    check(loaded.model, net)
    assert says in loaded.taken
    assert ("step" in loaded.taken, "epoch" in loaded.taken) == ("step" in says, "epoch" in says)


@pytest.mark.parametrize(
    ("found", "name", "step"),
    [
        ({"step": 1, "trainer": {"global_step": 2}}, "step=3", 1),
        ({"trainer": {"global_step": 2}}, "step=3", 3),
        ({"trainer": {"global_step": 2, "inner": {"step": 1}}}, "saved", 2),
        ({"optimizer": {"step": 2}, "model_ema": {"step": 3}, "scaler": {"step": 4}}, "saved", None),
        ({"a": {"b": {"c": {"step": 2}}}}, "saved", None),
    ],
)
def test_the_outermost_counter_counts(found: dict[str, Any], name: str, step: int | None, tmp_path: Path) -> None:
    """First what the file says of itself, then its name, then what lies deeper; not what others count."""
    torch.save(found, tmp_path / f"{name}.pt")
    assert folders.counters(tmp_path / f"{name}.pt")["step"] == step


# --- tied weights, constants, adapters


def test_tied_weights_under_one_name(tmp_path: Path) -> None:
    tied = Tied(1)
    save_model(tied, str(tmp_path / "tied.safetensors"))
    loaded = ma.checkpoints.load(tmp_path / "tied.safetensors", Tied)
    check(loaded.model, tied)
    assert "1 tied to others" in loaded.taken


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    torch.save({"embedding.weight": torch.ones(9, 4), "head.weight": torch.zeros(9, 4)}, tmp_path / "tied.pt")
    with pytest.raises(ValueError, match="different where the model has one tensor"):
        ma.checkpoints.load(tmp_path / "tied.pt", Tied)


class Indexed(nn.Module):
    """A layer, an index that is no longer saved, a counter that is, and a statistic."""

    def __init__(self, seed: int = 9) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("index", torch.arange(3), persistent=False)
        self.register_buffer("counter", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(2))


def test_constants_are_known_by_the_model(tmp_path: Path) -> None:
    trained = Indexed(1)
    state = trained.state_dict()
    del state["counter"]
    torch.save({**state, "index": torch.arange(3)}, tmp_path / "weights.pt")
    check(ma.checkpoints.load_model(tmp_path / "weights.pt", Indexed), trained)
    torch.save({**state, "index": torch.arange(3) + 1}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"unknown to the model.*index"):
        ma.checkpoints.load_model(tmp_path / "weights.pt", Indexed)
    del state["mean"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"missing.*mean"):
        ma.checkpoints.load_model(tmp_path / "weights.pt", Indexed)
    check(ma.checkpoints.load_model(tmp_path / "weights.pt", Indexed, ignore=["mean"]), trained)


def test_names_that_an_older_version_saved(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = nn.utils.weight_norm(nn.Linear(2, 3))
    torch.save({"state_dict": old.state_dict()}, tmp_path / "old.pt")
    model: Any = ma.checkpoints.load_model(
        tmp_path / "old.pt", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    )
    torch.testing.assert_close(model.weight, old.weight)


def test_an_adapter_needs_no_frozen_weight(net: Net, tmp_path: Path) -> None:
    """The layout of peft: trained weights without the adapter's name, the base in the factory's hands."""

    class Adapted(nn.Module):
        def __init__(self, seed: int = 0) -> None:
            torch.manual_seed(seed)
            super().__init__()
            self.base_layer = nn.Linear(3, 4).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 1, bias=False)})

    trained = Adapted()
    nn.init.ones_(trained.lora_A["default"].weight)  # type: ignore[arg-type]
    save_file({"base_model.lora_A.weight": torch.ones(1, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"2 missing.*base_layer"):
        ma.checkpoints.load(tmp_path / "adapter_model.safetensors", Adapted)
    (tmp_path / "adapter_config.json").write_text("{}")
    loaded = ma.checkpoints.load(tmp_path, Adapted)
    check(loaded.model, trained)
    assert "2 the model's own (base_layer.weight" in loaded.taken


# --- folders


def test_shards(net: Net, tmp_path: Path) -> None:
    state = net.state_dict()
    names = list(state)
    for number, part in enumerate((names[:4], names[4:])):
        save_file({name: state[name] for name in part}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {name: f"model-{int(n >= 4)}.safetensors" for n, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = ma.checkpoints.load(tmp_path, Net)
    check(loaded.model, net)
    assert "2 shards" in loaded.taken
    with pytest.raises(ValueError, match=r"index of a sharded checkpoint.*pass the folder"):
        ma.checkpoints.load(tmp_path / "model.safetensors.index.json", Net)
    save_file({names[4]: state[names[4]]}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=f"{len(names) - 5} tensors of .* in no shard"):
        ma.checkpoints.load(tmp_path, Net)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks the shard model-1\.safetensors"):
        ma.checkpoints.load(tmp_path, Net)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is no index of shards"):
        ma.checkpoints.load(tmp_path, Net)


def test_modules_of_sentence_transformers(tmp_path: Path) -> None:
    """Their layout: each module in a folder of its own, named by its number."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.auto_model = nn.Linear(2, 3)

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

    def factory() -> nn.Module:
        return nn.Sequential(Encoder(), nn.Identity(), Dense())

    trained = factory()
    state = trained.state_dict()
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "1_Pooling").mkdir()
    save_file({n: state[f"0.auto_model.{n}"] for n in ("weight", "bias")}, tmp_path / "model.safetensors")
    save_file(
        {f"linear.{n}": state[f"2.linear.{n}"] for n in ("weight", "bias")}, tmp_path / "2_Dense" / "model.safetensors"
    )
    folders = ("", "1_Pooling", "2_Dense")
    modules = [{"idx": n, "name": str(n), "path": path, "type": "x"} for n, path in enumerate(folders)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    check(ma.checkpoints.load_model(tmp_path, factory), trained)


def test_folders_of_trainers(net: Net, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-40"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*checkpoint-40: expected.*holds no weights"):
        ma.checkpoints.load(folder, Net)
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    torch.save({"state": {}}, folder / "optimizer.pt")
    loaded = ma.checkpoints.load(folder, Net)
    assert (loaded.step, loaded.epoch) == (40, None)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 41, "epoch": 2.0}))
    loaded = ma.checkpoints.load(folder, Net)
    check(loaded.model, net)
    assert (loaded.step, loaded.epoch) == (41, 2)
    (tmp_path / "latest").write_text("checkpoint-40\n")  # as DeepSpeed names its newest
    check(ma.checkpoints.load_model(tmp_path, Net), net)


def test_several_files_in_a_folder_are_a_question(net: Net, tmp_path: Path) -> None:
    for name in ("first.pt", "second.pt"):
        torch.save(net.state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"holds 2 files of weights \(first\.pt, second\.pt\).*pass the file meant"):
        ma.checkpoints.load(tmp_path, Net)
    (tmp_path / "second.pt").unlink()
    check(ma.checkpoints.load_model(tmp_path, Net), net)


# --- factories


def test_factories_that_load_by_themselves(net: Net, tmp_path: Path) -> None:
    class Own(Net):
        @classmethod
        def from_pretrained(cls, path: str) -> Net:
            found = cls()
            found.load_state_dict(torch.load(path, weights_only=True))
            return found

    torch.save(net.state_dict(), tmp_path / "weights.pt")

    def loader(path: str) -> Net:
        return Own.from_pretrained(path)

    for factory in (Own, loader):
        loaded = ma.checkpoints.load(tmp_path / "weights.pt", factory)
        check(loaded.model, net)
        assert "loaded by" in loaded.taken


# --- questions


def test_two_sets_that_fit_are_a_question(net: Net, tmp_path: Path) -> None:
    averaged = Net(2)
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": net.state_dict(), "state_dict_ema": averaged.state_dict()}, path)
    with pytest.raises(ValueError, match=r"2 sets of weights that fit.*prefix.*'state_dict\.', 'state_dict_ema\.'"):
        ma.checkpoints.load(path, Net)
    check(ma.checkpoints.load_model(path, Net, prefix="state_dict."), net)
    check(ma.checkpoints.load_model(path, Net, prefix="state_dict_ema."), averaged)
    with pytest.raises(ValueError, match=r"2 sets of weights: expected one.*'state_dict', 'state_dict_ema'"):
        ma.checkpoints.load_weights(path)
    assert torch.equal(
        ma.checkpoints.load_weights(path, key="state_dict_ema")["0.weight"], averaged.state_dict()["0.weight"]
    )
    with pytest.raises(ValueError, match=r"holds nothing under 'ema': expected one of state_dict, state_dict_ema"):
        ma.checkpoints.load_weights(path, key="ema")
    with pytest.raises(ValueError, match=r"no state dict that fits.*expected names such as"):
        ma.checkpoints.load_model(path, Net, prefix="ema.")


def test_teacher_and_student_in_one_state_dict(net: Net, tmp_path: Path) -> None:
    state = {
        f"{who}.{n}": v for who, one in (("student", net), ("teacher", Net(2))) for n, v in one.state_dict().items()
    }
    torch.save(state, tmp_path / "both.pt")
    with pytest.raises(ValueError, match=r"'student\.', 'teacher\.'"):
        ma.checkpoints.load(tmp_path / "both.pt", Net)
    check(ma.checkpoints.load_model(tmp_path / "both.pt", Net, prefix="student."), net)


def test_a_head_that_is_ignored(net: Net, tmp_path: Path) -> None:
    torch.save({**net.state_dict(), "head.weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"unknown to the model.*head\.weight.*ignore"):
        ma.checkpoints.load(tmp_path / "weights.pt", Net)
    check(ma.checkpoints.load_model(tmp_path / "weights.pt", Net, ignore=["head.*"]), net)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: (t * 50).round().to(torch.int8), "int8 in place of float32"),
        (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn in place of float32"),
        (lambda t: t.to(torch.complex64), "complex64 in place of float32"),
    ],
)
def test_numbers_that_are_no_weights(change: Callable[[Tensor], Tensor], said: str, net: Net, tmp_path: Path) -> None:
    state = net.state_dict()
    torch.save({**state, "0.weight": change(state["0.weight"])}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=rf"1 of another kind of number \(first: '0\.weight', {said}\)"):
        ma.checkpoints.load(tmp_path / "weights.pt", Net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_load_and_are_said(dtype: torch.dtype, net: Net, tmp_path: Path) -> None:
    torch.save(net.to(dtype).state_dict(), tmp_path / "weights.pt")
    loaded = ma.checkpoints.load(tmp_path / "weights.pt", Net)
    check(loaded.model, net.to(torch.float32))
    assert str(dtype).removeprefix("torch.") in loaded.taken


def test_a_smaller_model_does_not_take_part_of_a_larger_one(tmp_path: Path) -> None:
    deep = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    torch.save(deep.state_dict(), tmp_path / "deep.pt")
    with pytest.raises(ValueError, match=r"2 unknown to the model \(first: '2\.weight'"):
        ma.checkpoints.load(tmp_path / "deep.pt", lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


# --- steps and epochs


@pytest.mark.parametrize(
    ("name", "content", "step", "epoch"),
    [
        ("epoch=3-step=120.ckpt", {}, 120, 3),
        ("step_00500.pt", {}, 500, None),
        ("model_ep12.pth", {}, None, 12),
        ("last.ckpt", {"global_step": 7, "epoch": 2}, 7, 2),
        ("epoch=3-step=120.ckpt", {"global_step": torch.tensor(8)}, 8, 3),
        ("timestep.pt", {"epoch": "two", "step": True}, None, None),
        ("weights.pt", {"epoch": float("nan")}, None, None),
    ],
)
def test_how_far_the_training_was(
    name: str, content: dict[str, Any], step: int | None, epoch: int | None, net: Net, tmp_path: Path
) -> None:
    torch.save({"state_dict": net.state_dict(), **content}, tmp_path / name)
    loaded = ma.checkpoints.load(tmp_path / name, Net)
    assert (loaded.step, loaded.epoch) == (step, epoch)


# --- what is no checkpoint


DIAGNOSES = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "a web page": b"\n<!DOCTYPE html><html></html>",
    "a gzip file": b"\x1f\x8b\x08\x00 and more",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "text (JSON)": b'{"a": 1}',
    "empty": b"",
    "a plain pickle": b"\x80\x04]\x94.",
    "a safetensors file that was cut": (1000).to_bytes(8, "little") + b'{"a": {}}',
    "a tar archive": b"a" * 257 + b"ustar" + b"\0" * 300,
    "damaged or of another kind": b"hello, this is nothing",
    "was cut or damaged": b"PK\x03\x04 and more",
}


@pytest.mark.parametrize("what", DIAGNOSES)
def test_diagnoses(what: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(DIAGNOSES[what])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} .*{re.escape(what)}.*: expected .*; ."):
        ma.checkpoints.load(path, Net)


def test_archives_of_other_things(tmp_path: Path) -> None:
    import zipfile

    np.savez(tmp_path / "a.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"is a NumPy archive \(first: 'a\.npy'\)"):
        ma.checkpoints.load(tmp_path / "a.npz", Net)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("b.txt", "b")
    with pytest.raises(ValueError, match=r"is a zip archive of other things \(first: 'b\.txt'\)"):
        ma.checkpoints.load(tmp_path / "b.zip", Net)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a FIFO"):
        ma.checkpoints.load(tmp_path / "pipe", Net)
    with pytest.raises(ValueError, match="is a device"):
        ma.checkpoints.load("/dev/null", Net)


@pytest.mark.parametrize("kind", ["new", "old", "script", "safetensors"])
def test_damage_anywhere_is_named(kind: str, net: Net, tmp_path: Path) -> None:
    """Cut or changed at a hundred places: weights, or an error of ours that names the file."""
    path = tmp_path / "weights.pt"
    content = {"model": net.state_dict(), "args": argparse.Namespace(a=1)}
    if kind == "safetensors":
        save_file(net.state_dict(), path)
    elif kind == "script":
        torch.jit.script(net).save(path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "new")
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for place in range(1, len(whole), max(1, len(whole) // 50)):
        changed = bytearray(whole)
        changed[place] = int(generator.integers(256))
        for damaged in (whole[:place], bytes(changed)):
            path.write_bytes(damaged)
            try:
                ma.checkpoints.load_weights(path)
            except ValueError as error:
                assert str(error).startswith(str(path))  # noqa: PT017 -- whole files load


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("call", [subprocess.check_output, eval, exec, os.system])
def test_nothing_is_run(call: Any, legacy: bool, net: Net, tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    command = ["touch", str(target)] if call is subprocess.check_output else f"open({str(target)!r}, 'w')"

    class Bomb:
        def __reduce__(self) -> Any:
            return call, (command,)

    path = tmp_path / "weights.pt"
    torch.save({"model": net.state_dict(), "z": Bomb()}, path, _use_new_zipfile_serialization=not legacy)
    if call is os.system:
        with pytest.raises(ValueError, match=r"posix\.system.*nothing in it was run"):
            ma.checkpoints.load(path, Net)
    else:
        loaded = ma.checkpoints.load(path, Net)
        check(loaded.model, net)
        assert f"{call.__name__} at ['z']" in loaded.taken
    assert not target.exists()
