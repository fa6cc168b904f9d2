"""Models, batches and outputs of Hugging Face's transformers, tiny and untrained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import msam_analysis as ma
from msam_analysis import cli
from msam_analysis.cli.factories import own_loss as transformers_loss

from .cases import normal


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    """The library, without torchvision: an installed one need not import beside this torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision", None)
        yield pytest.importorskip("transformers")


def gpt2(library: Any, attention: str) -> Any:
    config = library.GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return randomised(library.GPT2LMHeadModel(config))


def bert(library: Any, attention: str) -> Any:
    config = library.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        num_labels=3,
        attn_implementation=attention,
    )
    return randomised(library.BertForSequenceClassification(config))


def randomised(model: Any) -> Any:
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(0.5 * normal(*parameter.shape, seed=300 + index))
    return model.double().train()


def batches(library: Any) -> list[Any]:
    """Two ragged batches, padded, of the kind that tokenizers return."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(11, (5, 6), generator=generator)
    mask = (torch.arange(6) < torch.tensor([4, 6, 3, 6, 5])[:, None]).long()
    parts = zip(ids.split(3), mask.split(3), torch.tensor([0, 1, 2, 1, 0]).split(3), strict=True)
    return [
        library.BatchEncoding({"input_ids": i, "attention_mask": m, "labels": i.masked_fill(m == 0, -100), "kind": k})
        for i, m, k in parts
    ]


def token_loss(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Attributes of the batch and of the output, as in the library's examples."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum"), (labels != -100).sum()


def class_loss(model: Any, batch: Any) -> Tensor:
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return F.cross_entropy(output["logits"], batch["kind"])


def own_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    return loss


MODELS: dict[str, tuple[Any, Any]] = {"gpt2": (gpt2, token_loss), "bert": (bert, class_loss)}


def direction(objective: ma.Objective, seed: int) -> Tensor:
    """A direction without the row of the padding token, which its embedding holds constant for derivatives."""
    v = normal(objective.size, seed=seed)
    for name, view in objective.layout.views(v).items():
        if name == "bert.embeddings.word_embeddings.weight":
            view[0] = 0
    return v


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives(library: Any, name: str, attention: str) -> None:
    build, loss_fn = MODELS[name]
    objective = ma.Objective(build(library, attention), loss_fn, batches(library), second_derivatives="exact")
    point = objective.point()
    block = torch.stack([direction(objective, seed) for seed in range(310, 314)], dim=1)
    step = 1e-5 / block[:, 0].norm()
    ahead, behind = (objective.gradient(point + sign * step * block[:, 0]) for sign in (1, -1))
    products = objective.hessian() @ block
    torch.testing.assert_close(products[:, 0], (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(objective.hvp(block[:, 3]), products[:, 3], rtol=1e-10, atol=1e-12)
    assert [type(batch).__name__ for batch in objective.batches] == ["BatchEncoding"] * 2


def test_a_model_that_computes_its_loss(library: Any) -> None:
    """As a loss of its logits, but for the float32 in which the library computes losses."""
    model = gpt2(library, "sdpa")

    def same_loss(model: Any, batch: Any) -> Tensor:
        total, count = token_loss(model, batch)
        return total / count

    itself, expected = (ma.Objective(model, loss_fn, batches(library)) for loss_fn in (own_loss, same_loss))
    v = direction(itself, 315)
    assert float(itself.loss()) == pytest.approx(float(expected.loss()), rel=1e-6)
    torch.testing.assert_close(itself.gradient(), expected.gradient(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(itself.hvp(v), expected.hvp(v), rtol=1e-4, atol=1e-4)


def test_the_padding_row_of_an_embedding_is_constant(library: Any) -> None:
    objective = ma.Objective(bert(library, "eager"), class_loss, batches(library))
    for vector in (objective.gradient(), objective.hvp(normal(objective.size, seed=316))):
        rows = objective.layout.views(vector)["bert.embeddings.word_embeddings.weight"]
        assert not rows[0].any()
        assert rows[1:].any()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_gauss_newton(library: Any, name: str) -> None:
    """``vᵀGv`` is the curvature of the loss along the straight line on which the outputs would move."""
    build, loss_fn = MODELS[name]
    model = build(library, "eager")
    objective = ma.Objective(model, loss_fn, batches(library))
    v = direction(objective, 311)
    point, total, count = objective.layout.views(objective.point()), torch.zeros(()), 0.0
    tangent = objective.layout.views(v)
    for batch in batches(library):
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

        def logits(p: Any, inputs: Any = inputs) -> Tensor:
            answer: Tensor = torch.func.functional_call(model.eval(), p, (), inputs).logits
            return answer

        jvp: Any = torch.func.jvp
        z, dz = jvp(logits, (point,), (tangent,))
        labels = batch["labels"][:, 1:].flatten() if loss_fn is token_loss else batch["kind"]
        if loss_fn is token_loss:
            z, dz = z[:, :-1].flatten(0, 1), dz[:, :-1].flatten(0, 1)
        used = labels != -100
        q, u = z[used].softmax(1), dz[used]
        total = total + ((q * u * u).sum(1) - (q * u).sum(1) ** 2).sum()
        count += float(used.sum())
    assert float(v @ (objective.gauss_newton() @ v)) == pytest.approx(float(total / count), rel=1e-9)


def test_a_model_that_computes_its_loss_has_no_gauss_newton_matrix_here(library: Any) -> None:
    objective = ma.Objective(gpt2(library, "eager"), own_loss, batches(library))
    with pytest.raises(ValueError, match="compute it in loss_fn from its logits"):
        objective.gauss_newton() @ torch.ones(objective.size)


def test_some_samples_some_parameters_and_dropout(library: Any) -> None:
    objective = ma.Objective(gpt2(library, "sdpa"), token_loss, batches(library), dropout=True)
    part = objective.with_parameters("*.attn.*").with_samples(torch.tensor([4, 0, 0]))
    assert torch.equal(part.loss(), part.loss())
    assert not torch.equal(part.loss(), ma.Objective(objective.model, token_loss, batches(library)).loss())
    v, step = normal(part.size, seed=312), 1e-6
    ahead, behind = (part.gradient(part.point() + sign * step * v) for sign in (1, -1))
    torch.testing.assert_close(part.hvp(v), (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-6)


# --- checkpoints, and the loss that a model has itself


@pytest.mark.parametrize("form", ["folder", "shards", "file", "bin", "half"])
def test_checkpoints_of_the_library(form: str, library: Any, tmp_path: Path) -> None:
    """Tied weights, under one name in the file: by a factory, by the class, and into the backbone alone."""
    model = gpt2(library, "eager").float()
    expected = model
    if form == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        expected = model.to(torch.bfloat16) if form == "half" else model
        expected.save_pretrained(tmp_path, **({"max_shard_size": "1KB"} if form == "shards" else {}))
    path = tmp_path / "model.safetensors" if form == "file" else tmp_path
    loaded = ma.checkpoints.load(path, lambda: library.GPT2LMHeadModel(model.config).float())
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name].float()), name
    assert ("tied to others (lm_head.weight)" in loaded.taken) is (form != "bin")
    backbone: Any = ma.checkpoints.load(path, lambda: library.GPT2Model(model.config).float()).model
    assert torch.equal(backbone.wte.weight, expected.transformer.wte.weight.float())


def test_the_own_loss_is_a_mean_over_label_tokens(library: Any) -> None:
    """``--loss transformers``: the same number whatever the batches, though -100 hides labels unequally."""
    model = gpt2(library, "eager")
    ids = torch.randint(11, (6, 7), generator=torch.Generator().manual_seed(5))
    shown = (torch.arange(7) < torch.tensor([7, 2, 5, 3, 7, 2])[:, None]).long()
    whole = {"input_ids": ids, "attention_mask": shown, "labels": ids.masked_fill(shown == 0, -100)}
    logits = model.eval()(input_ids=ids, attention_mask=shown).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, whole["labels"][:, 1:].flatten()).item()
    for size in (6, 4, 1):
        parts = [
            dict(zip(whole, rows, strict=True)) for rows in zip(*(x.split(size) for x in whole.values()), strict=True)
        ]
        assert float(ma.Objective(model, transformers_loss, parts).loss()) == pytest.approx(expected, rel=1e-6)


def test_the_command_knows_the_loss_of_transformers(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of save_pretrained, a class with from_pretrained, and --loss transformers: no code but the data's."""
    model = gpt2(library, "eager").float()
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("words.py").write_text(WORDS, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "words", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    options = ["--model", "transformers:GPT2LMHeadModel", "--data", "words:data", "--loss", "transformers"]
    monkeypatch.setattr(sys, "argv", ["msam-analysis", "measure", "model", *options, "--metrics", "loss"])
    cli.main()
    table = pd.read_csv(next((tmp_path / "results").rglob("metrics.csv"))).set_index("metric")
    ids = torch.arange(10).reshape(2, 5)
    logits = model.eval()(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, ids[:, 1:].flatten()).item()
    assert table.loc["loss", "value"] == pytest.approx(expected, rel=1e-5)


WORDS = """
import torch


def data():
    ids = torch.arange(10).reshape(2, 5)
    return [{"input_ids": ids[:1], "labels": ids[:1]}, {"input_ids": ids[1:], "labels": ids[1:]}]
"""
