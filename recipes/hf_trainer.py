"""Hugging Face Trainer: ``PerturbedTrainer`` takes MSAM and SAM, evaluates and saves at the true weights, and resumes.

Trainer itself calls ``optimizer.eval()`` before an evaluation; what it saves between evaluations, and the model that it
leaves, are the true weights with ``PerturbedTrainer`` or, in any other Trainer, with ``PerturbationCallback``.

If the import of ``Trainer`` fails, there may be a torchvision built for another torch: ``pip uninstall torchvision``.
"""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import BATCH, accuracy, network, report, spirals
from transformers import PrinterCallback, TrainingArguments

import msam
from msam.integrations.transformers import PerturbedTrainer

EPOCHS = 15


class Classifier(nn.Module):
    """A network that returns its loss, as Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits of a batch."""
        logits = self.network(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def examples(seed: int) -> list[dict[str, Tensor]]:
    """The data as a list of dicts."""
    return [{"x": x, "labels": y} for x, y in zip(*spirals(seed=seed), strict=True)]


def train(name: str, folder: str) -> tuple[float, list[float]]:
    """Fit and return the accuracy at the true weights, and the validation losses from the start on."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer: msam.MSAM | msam.SAM
    if name == "MSAM":
        optimizer = msam.MSAM(model.parameters(), lr=0.05, rho=0.3, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = msam.SAM(model.parameters(), lr=0.05, rho=0.05, momentum=0.9, weight_decay=5e-4)
    trainer = PerturbedTrainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            eval_strategy="epoch",
            eval_on_start=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=examples(0),
        eval_dataset=examples(2),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return accuracy(model.network), losses


def main() -> None:
    """Train both."""
    for name in ("MSAM", "SAM"):
        with tempfile.TemporaryDirectory() as folder:
            report(f"{name} in Trainer", *train(name, folder))


if __name__ == "__main__":
    main()
