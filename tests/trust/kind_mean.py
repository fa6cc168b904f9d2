"""Not a mean over samples: weights, ignored labels, sums, tuples, tokens."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam_analysis as ma

from .cases import Answer, Ask, NotTried, Truth, case, labels, mlp, need, normal, points, seeded


def cut(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut a batch, a tuple or a dictionary, along the first dimension."""
    if isinstance(batch, dict):
        rows = zip(*(value.split(list(sizes)) for value in batch.values()), strict=True)
        return [dict(zip(batch, row, strict=True)) for row in rows]
    return list(zip(*(part.split(list(sizes)) for part in batch), strict=True))


def whole_and_parts(ask: Ask, net: nn.Module, f: Any, batch: Any, sizes: Sequence[int]) -> Answer:
    """Ask for loss and gradient of one batch and of its parts: both are those of the user's function on the whole."""
    truth = Truth(lambda: f(net(batch[0]), batch[1]) if isinstance(batch, tuple) else f(net, batch), net.parameters())
    want = torch.cat([truth.loss.reshape(1), truth.gradient])
    parts = cut(batch, sizes)

    def question() -> Tensor:
        found = []
        for data in (parts, batch):
            objective = ma.Objective(net, f, data)
            found += [objective.loss().reshape(1).double(), objective.gradient().double()]
        return torch.cat(found)

    return ask(question), torch.cat([want, want]), 1e-6


UNEVEN = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
X = normal(12, 3)


def some(ignored: int, value: int = -100) -> Tensor:
    """Return labels of which the first few are not to count."""
    target = labels(12)
    target[:ignored] = value
    return target


@case("mean", "right", "refused")
def class_weights(ask: Ask) -> Answer:
    """CrossEntropyLoss(weight=...), in one batch and in two."""
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0]).double())
    return whole_and_parts(ask, mlp(), criterion, (X, UNEVEN), [5, 7])


@case("mean", "right", "refused")
def class_weights_and_smoothing(ask: Ask) -> Answer:
    """CrossEntropyLoss(weight=..., label_smoothing=0.1)."""
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0]).double(), label_smoothing=0.1)
    return whole_and_parts(ask, mlp(), criterion, (X, UNEVEN), [5, 7])


@case("mean", "right", "refused")
def class_weights_and_probabilities(ask: Ask) -> Answer:
    """CrossEntropyLoss(weight=...) of class probabilities, which torch divides by the batch and not by the weights."""
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0]).double())
    return whole_and_parts(ask, mlp(), criterion, (X, normal(12, 2, seed=4).softmax(1)), [5, 7])


@case("mean", "right", "refused")
def class_weights_by_partial(ask: Ask) -> Answer:
    """functools.partial(F.cross_entropy, weight=...)."""
    criterion = functools.partial(F.cross_entropy, weight=torch.tensor([1.0, 10.0]).double())
    return whole_and_parts(ask, mlp(), criterion, (X, UNEVEN), [5, 7])


@case("mean", "right", "refused")
def class_weights_in_a_lambda(ask: Ask) -> Answer:
    """A lambda around F.cross_entropy(..., weight=...)."""
    weight = torch.tensor([1.0, 10.0]).double()
    return whole_and_parts(ask, mlp(), lambda o, t: F.cross_entropy(o, t, weight=weight), (X, UNEVEN), [5, 7])


@case("mean", "right", "refused")
def weighted_likelihood(ask: Ask) -> Answer:
    """NLLLoss(weight=...) of log probabilities."""
    net = nn.Sequential(*mlp(), nn.LogSoftmax(1))
    return whole_and_parts(ask, net, nn.NLLLoss(weight=torch.tensor([1.0, 5.0]).double()), (X, UNEVEN), [4, 8])


@case("mean", "right", "refused")
def ignored_labels(ask: Ask) -> Answer:
    """CrossEntropyLoss with labels -100, unevenly spread."""
    return whole_and_parts(ask, mlp(), nn.CrossEntropyLoss(), (X, some(5)), [8, 4])


@case("mean", "right", "refused")
def ignored_labels_functional(ask: Ask) -> Answer:
    """F.cross_entropy with labels -100, unevenly spread."""
    return whole_and_parts(ask, mlp(), F.cross_entropy, (X, some(5)), [8, 4])


@case("mean", "right", "refused")
def ignored_batch(ask: Ask) -> Answer:
    """A whole batch without labels, whose mean is NaN."""
    return whole_and_parts(ask, mlp(), nn.CrossEntropyLoss(), (X, some(6)), [6, 6])


@case("mean", "right", "refused")
def ignored_class_of_images(ask: Ask) -> Answer:
    """Segmentation (N, C, H, W) with ignore_index=255."""
    net = seeded(lambda: nn.Conv2d(2, 3, 1))
    target = labels(4 * 9, 3).view(4, 3, 3)
    target[0] = 255
    target[1, 0] = 255
    return whole_and_parts(ask, net, nn.CrossEntropyLoss(ignore_index=255), (normal(4, 2, 3, 3), target), [1, 3])


@case("mean", "right", "refused")
def padding_index(ask: Ask) -> Answer:
    """Sequences (N, C, T) padded with class 0, ignore_index=0."""
    net = seeded(lambda: nn.Conv1d(3, 4, 1))
    lengths = torch.tensor([6, 1, 1, 2, 5])
    target = torch.where(torch.arange(6)[None] < lengths[:, None], 1 + labels(30, 3).view(5, 6), 0)
    return whole_and_parts(ask, net, nn.CrossEntropyLoss(ignore_index=0), (normal(5, 3, 6), target), [2, 3])


def _sum_or_mean(ask: Ask, criterion: Any, target: Tensor) -> Answer:
    net = mlp()
    total = float(Truth(lambda: criterion(net(X), target), net.parameters()).loss)

    def question() -> list[float]:
        return [float(ma.Objective(net, criterion, data).loss()) for data in ((X, target), cut((X, target), [5, 7]))]

    one, two = ask(question)
    need(abs(one - two) <= 1e-9 * abs(total), f"one batch {one}, two {two}")
    near = [abs(one - value) <= 1e-9 * abs(value) for value in (total, total / 12)]
    need(any(near), f"{one} is neither the sum {total} nor the mean {total / 12}")
    return None


@case("mean", "right", "refused")
def sum_of_cross_entropy(ask: Ask) -> Answer:
    """CrossEntropyLoss(reduction="sum"): one number whatever the batches."""
    return _sum_or_mean(ask, nn.CrossEntropyLoss(reduction="sum"), UNEVEN)


@case("mean", "right", "refused")
def sum_of_squares(ask: Ask) -> Answer:
    """A lambda around F.mse_loss(..., reduction="sum")."""
    return _sum_or_mean(ask, lambda o, t: F.mse_loss(o, t, reduction="sum"), normal(12, 2, seed=6))


@case("mean", "right", "refused")
def sum_of_likelihoods(ask: Ask) -> Answer:
    """PoissonNLLLoss(reduction="sum")."""
    return _sum_or_mean(ask, nn.PoissonNLLLoss(reduction="sum"), normal(12, 2, seed=6).abs().round())


@case("mean", "refused")
def no_reduction(ask: Ask) -> Answer:
    """CrossEntropyLoss(reduction="none"): no scalar."""
    net = mlp()
    return ask(lambda: ma.Objective(net, nn.CrossEntropyLoss(reduction="none"), (X, UNEVEN)).loss()), 0.0, 0.0


# means over samples, which must not be refused


@case("mean", "right")
def positive_weight(ask: Ask) -> Answer:
    """BCEWithLogitsLoss(pos_weight=...), a mean over samples and labels."""
    target = labels(24).view(12, 2).double()
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 7.0]).double())
    return whole_and_parts(ask, mlp(), criterion, (X, target), [5, 7])


@case("mean", "right")
def divergence_batchmean(ask: Ask) -> Answer:
    """KLDivLoss(reduction="batchmean")."""
    net = nn.Sequential(*mlp(), nn.LogSoftmax(1))
    target = normal(12, 2, seed=4).softmax(1)
    return whole_and_parts(ask, net, nn.KLDivLoss(reduction="batchmean"), (X, target), [5, 7])


@case("mean", "right")
def divergence_mean(ask: Ask) -> Answer:
    """KLDivLoss(reduction="mean", log_target=True), a mean over entries."""
    net = nn.Sequential(*mlp(), nn.LogSoftmax(1))
    target = normal(12, 2, seed=4).log_softmax(1)
    return whole_and_parts(ask, net, nn.KLDivLoss(reduction="mean", log_target=True), (X, target), [5, 7])


@case("mean", "right")
def gaussian_likelihood(ask: Ask) -> Answer:
    """GaussianNLLLoss of a mean and a variance."""
    criterion = nn.GaussianNLLLoss()

    def f(output: Tensor, target: Tensor) -> Any:
        return criterion(output[:, :1], target, F.softplus(output[:, 1:]))

    return whole_and_parts(ask, mlp(), f, (X, normal(12, 1, seed=4)), [5, 7])


@case("mean", "right")
def triplets(ask: Ask) -> Answer:
    """TripletMarginLoss over dictionaries of anchors, positives and negatives."""
    batch = {name: normal(12, 3, seed=seed) for seed, name in enumerate(("anchor", "positive", "negative"))}
    criterion = nn.TripletMarginLoss(margin=3.0)

    def f(model: Any, b: Any) -> Any:
        return criterion(model(b["anchor"]), model(b["positive"]), model(b["negative"]))

    return whole_and_parts(ask, mlp(), f, batch, [5, 7])


@case("mean", "right")
def connectionist_temporal(ask: Ask) -> Answer:
    """CTCLoss, which divides every sample by its own length."""
    net = seeded(lambda: nn.Linear(3, 4))
    lengths = torch.tensor([3, 1, 2, 2, 1, 3])
    batch = {"x": normal(6, 7, 3), "y": 1 + labels(18, 3).view(6, 3), "lengths": lengths}

    def f(model: Any, b: Any) -> Any:
        scores = model(b["x"]).log_softmax(2).transpose(0, 1)
        return F.ctc_loss(scores, b["y"], torch.full((len(b["x"]),), 7), b["lengths"])

    return whole_and_parts(ask, net, f, batch, [4, 2])


@case("mean", "right")
def batch_statistics(ask: Ask) -> Answer:
    """BatchNorm in batch mode: batches and their halves differ, which is a stated choice."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    y = labels(12)
    parts = cut((X, y), [7, 5])

    def mean() -> Any:
        net.train()
        total = sum(len(b) * F.cross_entropy(net(a), b) for a, b in parts) / 12
        net.eval()
        return total

    kept = {name: value.clone() for name, value in net.named_buffers()}
    truth = Truth(mean, net.parameters())
    want = torch.cat([truth.loss.reshape(1), truth.gradient])
    net.load_state_dict(kept, strict=False)

    def question() -> Tensor:
        objective = ma.Objective(net, F.cross_entropy, parts, batchnorm="batch")
        return torch.cat([objective.loss().reshape(1), objective.gradient()])

    return ask(question), want, 1e-9


# means over something else


@case("mean", "right", "refused")
def masked_squares(ask: Ask) -> Answer:
    """A masked squared error, divided by the number of entries that are known."""
    mask = torch.arange(12) >= 5

    def f(model: Any, b: Any) -> Any:
        error = (model(b["x"]) - b["y"]).pow(2).sum(1)
        return (error * b["mask"]).sum() / b["mask"].sum()

    return whole_and_parts(ask, mlp(), f, {"x": X, "y": normal(12, 2, seed=5), "mask": mask.double()}, [6, 6])


@case("mean", "right", "refused")
def weights_of_samples(ask: Ask) -> Answer:
    """Weights of samples in the batch, divided by their sum (importance weights)."""
    weights = torch.linspace(0.1, 3.0, 12, dtype=torch.float64)

    def f(model: Any, b: Any) -> Any:
        return (F.cross_entropy(model(b["x"]), b["y"], reduction="none") * b["w"]).sum() / b["w"].sum()

    return whole_and_parts(ask, mlp(), f, {"x": X, "y": UNEVEN, "w": weights}, [6, 6])


@case("mean", "right", "refused")
def divided_by_positives(ask: Ask) -> Answer:
    """A focal loss divided by the number of positive samples."""

    def focal(output: Tensor, target: Tensor) -> Tensor:
        log_p = output.log_softmax(1).gather(1, target[:, None])[:, 0]
        return -((1 - log_p.exp()).pow(2) * log_p).sum() / target.sum().clamp(min=1)

    target = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1])
    return whole_and_parts(ask, mlp(), focal, (X, target), [6, 6])


@case("mean", "refused", "warned")
def contrastive(ask: Ask) -> Answer:
    """In-batch negatives (InfoNCE): no mean over samples, whatever the weights."""
    batch = {"a": X, "b": normal(12, 3, seed=8)}

    def f(model: Any, b: Any) -> Any:
        scores = model(b["a"]) @ model(b["b"]).T
        return F.cross_entropy(scores, torch.arange(len(scores)))

    return whole_and_parts(ask, mlp(), f, batch, [6, 6])


@case("mean", "refused", "warned")
def dice(ask: Ask) -> Answer:
    """A soft Dice loss over the batch: a ratio of sums."""

    def f(output: Tensor, target: Tensor) -> Any:
        p = output.softmax(1)[:, 1]
        return 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)

    return whole_and_parts(ask, mlp(), f, (X, UNEVEN), [5, 7])


# tuples


def _counted(ask: Ask, sizes: Sequence[int]) -> Answer:
    net, target = mlp(), some(5)
    truth = Truth(lambda: F.cross_entropy(net(X), target), net.parameters())
    want = torch.cat([truth.loss.reshape(1), truth.gradient])

    def f(output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(output, t, reduction="sum"), (t != -100).sum()

    def question() -> Tensor:
        objective = ma.Objective(net, f, cut((X, target), sizes))
        return torch.cat([objective.loss().reshape(1), objective.gradient()])

    return ask(question), want, 1e-9


@case("mean", "right")
def tokens_with_counts(ask: Ask) -> Answer:
    """A true (sum, count) over tokens that count."""
    return _counted(ask, [8, 4])


@case("mean", "right", "refused")
def batch_with_count_zero(ask: Ask) -> Answer:
    """A true (sum, count) with a batch that has nothing to count."""
    return _counted(ask, [5, 7])


def _tuple(ask: Ask, second: Any) -> Answer:
    """Ask about a loss that returns (mean, something)."""
    net = mlp()
    want = F.cross_entropy(net(X), UNEVEN).detach()

    def f(output: Tensor, target: Tensor) -> tuple[Tensor, Any]:
        return F.cross_entropy(output, target), second(output, target)

    return ask(lambda: ma.Objective(net, f, cut((X, UNEVEN), [5, 7])).loss()), want, 1e-9


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).double().mean()


@case("mean", "right", "refused")
def loss_and_accuracy(ask: Ask) -> Answer:
    """(loss, accuracy), which is no (sum, count)."""
    return _tuple(ask, accuracy)


@case("mean", "right", "refused")
def loss_and_accuracy_number(ask: Ask) -> Answer:
    """(loss, accuracy) with a Python number."""
    return _tuple(ask, lambda o, t: float(accuracy(o, t)) + 0.01)


@case("mean", "right", "refused")
def loss_and_correct(ask: Ask) -> Answer:
    """(loss, number of correct answers), which looks like a count."""
    return _tuple(ask, lambda o, t: 1 + int((o.argmax(1) == t).sum()))


@case("mean", "right", "refused")
def loss_and_outputs(ask: Ask) -> Answer:
    """(loss, logits), as many models return with labels."""
    return _tuple(ask, lambda o, t: o)


@case("mean", "right", "refused")
def loss_and_dictionary(ask: Ask) -> Answer:
    """(loss, dictionary of metrics)."""
    return _tuple(ask, lambda o, t: {"accuracy": accuracy(o, t)})


@case("mean", "right", "refused")
def loss_in_a_dictionary(ask: Ask) -> Answer:
    """A dictionary with "loss", as Lightning's training_step returns it."""
    net = mlp()
    want = F.cross_entropy(net(X), UNEVEN).detach()
    parts = cut({"x": X, "y": UNEVEN}, [5, 7])
    step: Any = lambda m, b: {"loss": F.cross_entropy(m(b["x"]), b["y"])}  # noqa: E731 -- as users write it
    return ask(lambda: ma.Objective(net, step, parts).loss()), want, 1e-9


# language models


@dataclasses.dataclass
class Output:
    """What a model returns with its labels."""

    loss: Tensor
    logits: Tensor


class Tagger(nn.Module):
    """A model with its loss inside: a mean over the labels that are not -100."""

    def __init__(self, shift: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.shift = nn.Embedding(7, 4), nn.Linear(4, 7), shift

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        logits = self.head(torch.tanh(self.embedding(input_ids)))
        scores, target = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return Output(F.cross_entropy(scores.flatten(0, 1), target.flatten()), logits)


def sentences() -> dict[str, Tensor]:
    ids = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0))
    target = ids.clone()
    target[0, 1:] = -100
    target[1, 2:] = -100
    target[4, :4] = -100
    return {"input_ids": ids, "labels": target}


@case("mean", "right", "refused")
def tokens_of_a_tagger(ask: Ask) -> Answer:
    """model(**batch).loss with labels -100: a mean over tokens."""
    net = seeded(lambda: Tagger(shift=False))
    return whole_and_parts(ask, net, lambda m, b: m(**b).loss, sentences(), [2, 4])


@case("mean", "right", "refused")
def tokens_of_a_language_model(ask: Ask) -> Answer:
    """model(**batch).loss with labels that the model shifts."""
    net = seeded(lambda: Tagger(shift=True))
    return whole_and_parts(ask, net, lambda m, b: m(**b).loss, sentences(), [2, 4])


@case("mean", "right", "refused")
def output_of_a_language_model(ask: Ask) -> Answer:
    """loss_fn returns the model's whole output, with .loss."""
    net = seeded(lambda: Tagger(shift=False))
    want = net(**sentences()).loss.detach()
    parts = cut(sentences(), [2, 4])
    return ask(lambda: ma.Objective(net, lambda m, b: m(**b), parts).loss()), want, 1e-6


@case("mean", "right", "refused")
def transformers_language_model(ask: Ask) -> Answer:
    """A causal language model of transformers, model(**batch).loss with -100."""
    hidden = sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]  # it need not import beside this torch
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise NotTried("transformers is not installed") from error
    finally:
        if hidden is None:
            del sys.modules["torchvision"]
    make: Any = GPT2Config
    config = make(
        vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=1, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    net = seeded(lambda: GPT2LMHeadModel(config))
    return whole_and_parts(ask, net, lambda m, b: m(**b).loss, sentences(), [2, 4])


@case("mean", "right")
def plain_rows(ask: Ask) -> Answer:
    """A plain mean over rows, in one batch and in two: nothing is said."""
    return whole_and_parts(ask, mlp(), F.cross_entropy, points(12), [5, 7])
