"""Lightning, automatic optimization: it hands ``step`` a closure, which is all that SAM needs.

Validation runs at the true weights. (This file cannot be called ``lightning.py``: it would hide the package.) For SAM
with loss scaling use manual optimization and ``recipes/amp.py``: a scaler wants the gradients before ``step``.

If the import of Lightning fails in torchvision, that was built for another torch: ``pip uninstall torchvision``.
"""

from __future__ import annotations

import logging
import warnings

import lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from toy import BATCH, accuracy, network, report, spirals

import msam

EPOCHS = 15


class Classifier(pl.LightningModule):
    """A network and the optimizer it is trained with."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.network = network()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of a batch; SAM asks twice."""
        x, y = batch
        return cross_entropy(self.network(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Log the loss of a batch, at the true weights."""
        x, y = batch
        self.log("validation_loss", cross_entropy(self.network(x), y))

    def perturbed_optimizer(self) -> msam.PerturbedOptimizer:
        """Return the optimizer itself, without Lightning's wrapper."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, msam.PerturbedOptimizer):
            raise TypeError(f"expected one optimizer of msam, got {type(optimizer).__name__}.")
        return optimizer

    def on_validation_start(self) -> None:
        """Put the true weights in place."""
        self.perturbed_optimizer().eval()

    def on_validation_end(self) -> None:
        """Go back to the perturbed ones."""
        self.perturbed_optimizer().train()
        self.losses.append(float(self.trainer.callback_metrics["validation_loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        if self.name == "MSAM":
            return msam.MSAM(self.parameters(), lr=0.05, rho=0.3, momentum=0.9, weight_decay=5e-4)
        return msam.SAM(self.parameters(), lr=0.05, rho=0.05, momentum=0.9, weight_decay=5e-4)


def train(name: str) -> tuple[float, list[float]]:
    """Fit and return the accuracy at the true weights, and the validation losses from the start on."""
    model = Classifier(name)
    fit = DataLoader(TensorDataset(*spirals()), batch_size=BATCH, shuffle=True)
    validate = DataLoader(TensorDataset(*spirals(seed=2)), batch_size=128)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, fit, validate)
    with model.perturbed_optimizer().unperturbed():
        return accuracy(model.network), model.losses


def main() -> None:
    """Train both."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    pl.seed_everything(0, verbose=False)
    for name in ("MSAM", "SAM"):
        report(f"{name} in Lightning", *train(name))


if __name__ == "__main__":
    main()
