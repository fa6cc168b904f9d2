"""Lightning itself, with ``PerturbationCallback``: what is reported, saved, averaged, repeated and gone on with."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import msam
from msam.integrations.lightning import PerturbationCallback

from .toy import OPTIMIZERS, by_hand, network, now, samples, true_ones, validation_loss, windows

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Classifier(pl.LightningModule):
    def __init__(self, name: str, norm: bool = False) -> None:
        super().__init__()
        self.name, self.network = name, network(norm)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        value = cross_entropy(self.network(batch[0]), batch[1])
        self.log("training_loss", value)
        return value

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("validation_loss", cross_entropy(self.network(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.name](self.parameters())


class Look(pl.Callback):
    """Notes the true weights after every batch, and what was logged; the reference of what is saved."""

    def __init__(self) -> None:
        self.true: list[list[Tensor]] = []
        self.logged: list[float] = []
        self.at_epochs: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.true.append(true_ones(pl_module, trainer.optimizers[0]))
        self.logged.append(float(trainer.callback_metrics["training_loss"]))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at_epochs.append(true_ones(pl_module, trainer.optimizers[0]))


def loaders(size: int = 16) -> tuple[DataLoader[Any], DataLoader[Any]]:
    return (
        DataLoader(TensorDataset(*samples()), batch_size=size),
        DataLoader(TensorDataset(*samples(seed=1)), batch_size=96),
    )


def trainer_of(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    chosen: dict[str, Any] = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False} | options
    return pl.Trainer(
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        default_root_dir=folder,
        **chosen,
    )


def fitted(
    name: str, folder: Path, *callbacks: pl.Callback, norm: bool = False, ckpt_path: Any = None, **options: Any
) -> tuple[Classifier, pl.Trainer]:
    model = Classifier(name, norm)
    trainer = trainer_of(folder, *callbacks, **options)
    trainer.fit(model, *loaders(), ckpt_path=ckpt_path)
    return model, trainer


def loaded(path: Any, name: str = "MSAM", norm: bool = False) -> Classifier:
    content = torch.load(path, weights_only=True)
    model = Classifier(name, norm)
    model.load_state_dict(content["state_dict"])
    return model


def same(these: Any, those: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


# ---------------------------------------------------------------- what is saved is what was reported

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.05},
    "mixed precision": {"precision": "bf16-mixed"},
    "in the middle of epochs": {"val_check_interval": 2},
    "between batches too": {"every_batch": True},
}


def best(
    name: str, folder: Path, *callbacks: pl.Callback, weights_only: bool = False, **options: Any
) -> tuple[Any, Any]:
    """The best validation loss that was reported, and the loss of the file that is named after it."""
    saving = ModelCheckpoint(folder, "{validation_loss:.4f}", monitor="validation_loss", save_weights_only=weights_only)
    fitted(name, folder, saving, *callbacks, **options)
    assert saving.best_model_score is not None
    reported = float(saving.best_model_score)
    assert f"{reported:.4f}" in saving.best_model_path
    return reported, validation_loss(loaded(saving.best_model_path, name).network)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["MSAM", "SAM", "SGD"])
def test_the_best_checkpoint_has_the_loss_that_it_is_named_after(
    name: str, setting: str, weights_only: bool, tmp_path: Path
) -> None:
    options = dict(SETTINGS[setting])
    callback = PerturbationCallback(options.pop("every_batch", None))
    reported, found = best(name, tmp_path, callback, weights_only=weights_only, **options)
    # bfloat16 autocast rounds the reported one to three digits
    assert found == pytest.approx(reported, rel=1e-2 if setting == "mixed precision" else 1e-6)


def test_without_the_callback_it_has_not(tmp_path: Path) -> None:
    """The fault that the callback is for: the validation is that of the recipe, at the true weights."""

    class Evaluating(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].eval()  # type: ignore[attr-defined]  # MSAM

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].train()  # type: ignore[attr-defined]

    reported, found = best("MSAM", tmp_path, Evaluating())
    assert abs(found - reported) > 0.01


@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_a_checkpoint_in_the_middle_of_an_epoch(name: str, tmp_path: Path) -> None:
    look = Look()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    model, _ = fitted(name, tmp_path, look, saving, PerturbationCallback(), max_epochs=2)
    for step in (4, 8, 12):
        assert same(loaded(tmp_path / f"step={step}.ckpt").parameters(), look.true[step - 1])
    assert same(model.parameters(), look.true[-1])


def test_the_model_is_left_at_the_true_weights(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
            if trainer.global_step == 4:
                raise RuntimeError("enough")

    look = Look()
    model, _ = fitted("MSAM", tmp_path, PerturbationCallback(), look, max_steps=4, max_epochs=-1)
    assert same(model.parameters(), look.true[-1])

    model, look = Classifier("MSAM"), Look()
    with pytest.raises(RuntimeError, match="enough"):
        trainer_of(tmp_path, PerturbationCallback(), look, Stop()).fit(model, *loaders())
    assert same(model.parameters(), look.true[-1])


@pytest.mark.parametrize("every_batch", [False, True])
@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_the_training_is_the_same_to_the_bit(name: str, every_batch: bool, tmp_path: Path) -> None:
    """Whatever validates and saves in between, and whether there is a callback."""
    plain, with_it = Look(), Look()
    fitted(name, tmp_path, plain)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fitted(name, tmp_path, with_it, saving, PerturbationCallback(every_batch), val_check_interval=2)
    assert len(plain.true) == 18
    assert all(map(same, plain.true, with_it.true))


def test_weights_in_bfloat16_validate_and_go_on(tmp_path: Path) -> None:
    """Their way back is a copy, which made in Lightning's inference mode could not be written to in training."""
    model, _ = fitted("MSAM", tmp_path, PerturbationCallback(), precision="bf16-true")
    assert validation_loss(model.network) < 0.9 < math.log(3)


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-true"}])
@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_going_on_is_the_same_to_the_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    def ends() -> list[Any]:
        return [PerturbationCallback(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), Look()]

    whole = ends()
    fitted(name, tmp_path, *whole, max_epochs=4, **options)
    rest = ends()
    model, trainer = fitted(name, tmp_path, *rest, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt", **options)
    assert len(rest[2].true) == 12
    assert all(map(same, whole[2].true[12:], rest[2].true))
    assert same(model.parameters(), whole[2].true[-1])
    trainer.optimizers[0].train()  # type: ignore[attr-defined]
    assert same(now(model), whole[2].true[-1]) == (name == "SAM")


def test_going_on_with_a_checkpoint_of_before_and_without_the_callback(tmp_path: Path) -> None:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    fitted("MSAM", tmp_path, saving(), max_epochs=2)  # its weights are displaced, and its optimizer knows
    whole, rest = Look(), Look()
    fitted("MSAM", tmp_path, whole, max_epochs=3)
    ours = [PerturbationCallback(), rest, saving()]
    fitted("MSAM", tmp_path, *ours, max_epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(map(same, whole.true[12:], rest.true))
    with pytest.raises(RuntimeError, match="expected train mode, got eval mode"):
        fitted("MSAM", tmp_path, saving(), max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt")


# ---------------------------------------------------------------- averages


@pytest.mark.parametrize("first", [True, False])
def test_a_moving_average_is_that_of_the_true_weights(first: bool, tmp_path: Path) -> None:
    look, saving = Look(), ModelCheckpoint(tmp_path, monitor="validation_loss")
    averaging, ours = EMAWeightAveraging(decay=0.8), PerturbationCallback()
    order: list[pl.Callback] = [ours, averaging] if first else [averaging, ours]
    model, _ = fitted("MSAM", tmp_path, *order, look, saving)
    expected = [w.double() for w in look.true[0]]
    for weights in look.true[1:]:
        expected = [0.8 * e + 0.2 * w.double() for e, w in zip(expected, weights, strict=True)]
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=0, atol=1e-6)
    # the file and the metric are those of the average
    assert saving.best_model_score is not None
    found = validation_loss(loaded(saving.best_model_path).network)
    assert found == pytest.approx(float(saving.best_model_score), rel=1e-6)


def test_a_moving_average_goes_on_to_the_bit(tmp_path: Path) -> None:
    def ends() -> list[Any]:
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        return [PerturbationCallback(), EMAWeightAveraging(decay=0.8), saving]

    whole, _ = fitted("MSAM", tmp_path, *ends(), max_epochs=4)
    rest, _ = fitted("MSAM", tmp_path, *ends(), max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(whole.parameters(), rest.parameters())


@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_stochastic_weight_averaging_and_its_batchnorm(name: str, tmp_path: Path) -> None:
    """The mean of the true weights at the epochs' ends, and the statistics that the training data have there."""
    look = Look()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    model, _ = fitted(name, tmp_path, PerturbationCallback(), averaging, look, norm=True, max_epochs=5)
    noted = look.at_epochs[1:5]  # its epochs count from 1; the last one is that of the statistics
    assert len(look.at_epochs) == 6
    for i, p in enumerate(model.parameters()):
        torch.testing.assert_close(p, torch.stack([weights[i] for weights in noted]).mean(0), rtol=1e-5, atol=1e-6)
    twin = Classifier(name, norm=True)
    twin.load_state_dict(model.state_dict())
    torch.optim.swa_utils.update_bn(((x,) for x, _ in loaders()[0]), twin.network)
    for key, buffer in twin.named_buffers():
        if "running" in key:
            torch.testing.assert_close(dict(model.named_buffers())[key], buffer, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- SAM's second gradient


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


@pytest.mark.parametrize(
    ("accumulate", "options", "edit"),
    [(1, {}, None), (2, {}, None), (3, {}, None), (4, {}, None), (3, {"gradient_clip_val": 0.05}, clip)],
)
@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_parts_of_a_batch_add_up(
    name: str, accumulate: int, options: dict[str, Any], edit: Callable[[nn.Module], Any] | None, tmp_path: Path
) -> None:
    """Against a plain loop; without the callback SAM's second gradient has the first one in it."""
    model, _ = fitted(name, tmp_path, PerturbationCallback(), accumulate_grad_batches=accumulate, **options)
    # Lightning divides by ``accumulate_grad_batches``, also where an epoch ends with fewer parts
    expected = by_hand(name, windows(accumulate), accumulate, edit or (lambda _: None))
    for p, e in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=0, atol=2e-6)


def test_without_the_callback_they_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected a closure that clears the gradients"):
        fitted("SAM", tmp_path, accumulate_grad_batches=3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_sam_logs_is_its_value_at_the_true_weights(accumulate: int, tmp_path: Path) -> None:
    look = Look()
    fitted("SAM", tmp_path, PerturbationCallback(), look, accumulate_grad_batches=accumulate)
    model = Classifier("SAM")
    weights = [now(model), *look.true]
    x, y = samples()
    for batch, logged in enumerate(look.logged):
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights[batch], strict=True):
                p.copy_(w)
            rows = slice(16 * (batch % 6), 16 * (batch % 6) + 16)
            assert logged == pytest.approx(float(cross_entropy(model.network(x[rows]), y[rows])), rel=1e-5)


def test_a_training_step_may_return_a_dict_take_no_index_skip_a_part_and_have_its_own_log(tmp_path: Path) -> None:
    class Other(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
            x, y = batch
            if torch.equal(x, samples()[0][16:32]):
                return None
            self.log("training_loss", 0.0)
            return {"loss": cross_entropy(self.network(x), y)}

    model = Other("SAM")
    kept: list[str] = []
    model.log = lambda name, *_, **__: kept.append(name)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        trainer_of(tmp_path, PerturbationCallback(), accumulate_grad_batches=3, max_epochs=1).fit(model, loaders()[0])
    assert len(kept) == 5  # of six batches, one was left out
    expected = network()
    x, y = samples()
    optimizer = msam.SAM(expected.parameters(), lr=0.1, rho=0.2, momentum=0.9, weight_decay=1e-3)
    for parts in ((0, 32), (48, 64, 80)):

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = sum((cross_entropy(expected(x[s : s + 16]), y[s : s + 16]) for s in parts), torch.zeros(())) / 3  # noqa: B023
            torch.autograd.backward(value)
            return value

        optimizer.step(closure)
    for p, e in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=0, atol=2e-6)


def test_manual_optimization_is_left_as_it_is(tmp_path: Path) -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__("SAM")
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                value = cross_entropy(self.network(batch[0]), batch[1])
                self.manual_backward(value)
                return value

            optimizer.step(closure)

    model = Manual()
    trainer_of(tmp_path, PerturbationCallback(), max_epochs=1).fit(model, loaders()[0])
    expected = by_hand("SAM", windows(1, epochs=1))
    for p, e in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, e, rtol=0, atol=2e-6)
