"""Hugging Face Trainer and accelerate themselves: what is reported, saved, loaded, repeated and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import msam
from msam.integrations import save_true_weights, unwrapped
from msam.integrations.transformers import PerturbationCallback, PerturbedTrainer

from .toy import OPTIMIZERS, by_hand, network, now, samples, true_ones, validation_loss, windows


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class Look(TrainerCallback):
    """Notes the true weights after every step; the reference of what is saved."""

    def __init__(self) -> None:
        self.true: list[list[Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.true.append(true_ones(kwargs["model"], unwrapped(kwargs["optimizer"])))


def examples(seed: int) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in zip(*samples(seed=seed), strict=True)]


def trainer_of(
    name: str,
    folder: Path,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = PerturbedTrainer,
    size: int = 16,
    **options: Any,
) -> Trainer:
    model = Classifier()
    optimizer = OPTIMIZERS[name](model.parameters())
    chosen: dict[str, Any] = {
        "num_train_epochs": 3,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
    } | options
    trainer = kind(
        model,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=size,
            per_device_eval_batch_size=96,
            train_sampling_strategy="sequential",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **chosen,
        ),
        train_dataset=examples(0),
        eval_dataset=examples(1),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def loaded(folder: str | Path) -> Classifier:
    model = Classifier()
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return model


def same(these: Any, those: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


# ---------------------------------------------------------------- what is saved is what was reported

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"max_grad_norm": 0.05},
    "mixed precision": {"bf16": True},
}
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "best",
    "metric_for_best_model": "loss",
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["MSAM", "SAM", "SGD"])
def test_the_best_checkpoint_and_the_final_model_have_the_loss_that_was_reported(
    name: str, setting: str, tmp_path: Path
) -> None:
    trainer = trainer_of(name, tmp_path, load_best_model_at_end=True, **BEST, **SETTINGS[setting])
    trainer.train()
    assert trainer.state.best_metric is not None
    assert trainer.state.best_model_checkpoint is not None
    best = loaded(trainer.state.best_model_checkpoint)
    # bfloat16 autocast rounds the reported one to three digits
    tolerance = 1e-2 if setting == "mixed precision" else 1e-6
    assert validation_loss(best.network) == pytest.approx(trainer.state.best_metric, rel=tolerance)
    assert isinstance(trainer.model, Classifier)
    assert same(trainer.model.parameters(), best.parameters())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    trainer.save_model(str(tmp_path / "final"))
    assert same(loaded(tmp_path / "final").parameters(), best.parameters())


@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_a_checkpoint_between_evaluations(name: str, tmp_path: Path) -> None:
    look = Look()
    trainer = trainer_of(name, tmp_path, look, save_strategy="steps", save_steps=4)
    trainer.train()
    for step in (4, 8, 12, 16):
        assert same(loaded(tmp_path / f"checkpoint-{step}").parameters(), look.true[step - 1])
    assert same(trainer.model.parameters(), look.true[-1])  # type: ignore[union-attr]  # there is one


def test_without_the_callback_it_is_displaced(tmp_path: Path) -> None:
    look = Look()
    trainer = trainer_of("MSAM", tmp_path, look, kind=Trainer, save_strategy="steps", save_steps=4)
    trainer.train()
    assert not same(loaded(tmp_path / "checkpoint-4").parameters(), look.true[3])
    assert not same(trainer.model.parameters(), look.true[-1])  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_the_training_is_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    plain, with_it = Look(), Look()
    trainer_of(name, tmp_path, plain).train()
    trainer_of(
        name, tmp_path, with_it, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=3
    ).train()
    assert len(plain.true) == 18
    assert all(map(same, plain.true, with_it.true))


def test_the_callback_alone_is_enough_for_msam(tmp_path: Path) -> None:
    look = Look()
    trainer = trainer_of("MSAM", tmp_path, look, PerturbationCallback(), kind=Trainer, save_strategy="epoch")
    trainer.train()
    trainer.train()  # again: the hooks of before are gone
    assert same(loaded(tmp_path / "checkpoint-18").parameters(), look.true[-1])


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_going_on_is_the_same_to_the_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    whole, rest = Look(), Look()
    trainer_of(name, tmp_path, whole, **saving, **options).train()
    trainer = trainer_of(name, tmp_path, rest, **saving, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(whole.true) == len(rest.true) + 5 == 18 // options.get("gradient_accumulation_steps", 1)
    assert all(map(same, whole.true[5:], rest.true))


# ---------------------------------------------------------------- SAM's second gradient


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


@pytest.mark.parametrize(("accumulate", "edit"), [(1, None), (2, None), (3, None), (4, None), (3, clip)])
@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_parts_of_a_batch_add_up(
    name: str, accumulate: int, edit: Callable[[nn.Module], Any] | None, tmp_path: Path
) -> None:
    trainer = trainer_of(
        name, tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=0.0 if edit is None else 0.05
    )
    trainer.train()
    expected = by_hand(name, windows(accumulate), edit=edit or (lambda _: None))
    for p, e in zip(trainer.model.parameters(), expected.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(p, e, rtol=0, atol=2e-6)


# ---------------------------------------------------------------- a model of the library's own


def test_a_pretrained_model_with_tied_weights(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = msam.MSAM(model.parameters(), lr=0.1, rho=0.5)
    save_true_weights(model, optimizer)
    tokens = torch.arange(8).unsqueeze(0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert same(again.parameters(), true_ones(model, optimizer))
    assert again.lm_head.weight is again.transformer.wte.weight
    assert not same(again.parameters(), now(model))


# ---------------------------------------------------------------- accelerate


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator(cpu=True)
    yield accelerator
    accelerator.free_memory()


@pytest.mark.parametrize("name", ["MSAM", "SAM"])
def test_accelerate_saves_and_goes_on(name: str, accelerator: Accelerator, tmp_path: Path) -> None:
    x, y = samples()

    def prepared() -> tuple[Any, Any]:
        model = network()
        pair: tuple[Any, Any] = accelerator.prepare(model, OPTIMIZERS[name](model.parameters()))
        save_true_weights(*pair)
        return pair

    def train(model: Any, optimizer: Any, steps: int) -> None:
        for _ in range(steps):

            def closure() -> Tensor:
                optimizer.zero_grad()
                value = cross_entropy(model(x), y)
                accelerator.backward(value)
                return value

            optimizer.step(closure)

    model, optimizer = prepared()
    train(model, optimizer, 3)
    true = true_ones(model, unwrapped(optimizer))
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(model, str(tmp_path / "model"))
    for folder in ("state", "model"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert same([saved[key] for key, _ in model.named_parameters()], true)
    train(model, optimizer, 3)
    expected = now(model)

    accelerator.free_memory()
    model, optimizer = prepared()
    train(model, optimizer, 1)
    accelerator.load_state(str(tmp_path / "state"))
    optimizer.train()
    train(model, optimizer, 3)
    assert same(model.parameters(), expected)
