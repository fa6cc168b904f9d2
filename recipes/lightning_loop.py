"""Lightning, automatic optimization, with ``PerturbationCallback``: what is reported is what is saved.

Validation, checkpoints and the final model are those of the true weights, and SAM's second gradient is that of all
parts which ``accumulate_grad_batches`` adds up. (This file cannot be called ``lightning.py``: it would hide the
package.) For SAM with loss scaling use manual optimization and ``recipes/amp.py``: a scaler wants the gradients before
``step``.

If the import of Lightning fails in torchvision, that was built for another torch: ``pip uninstall torchvision``.
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import lightning as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from toy import BATCH, accuracy, network, report, spirals

import msam
from msam.integrations.lightning import PerturbationCallback

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
        """Log the loss of a batch; the callback sees to the weights."""
        x, y = batch
        self.log("validation_loss", cross_entropy(self.network(x), y))

    def on_validation_end(self) -> None:
        """Keep what was reported."""
        self.losses.append(float(self.trainer.callback_metrics["validation_loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        if self.name == "MSAM":
            return msam.MSAM(self.parameters(), lr=0.05, rho=0.3, momentum=0.9, weight_decay=5e-4)
        return msam.SAM(self.parameters(), lr=0.05, rho=0.05, momentum=0.9, weight_decay=5e-4)


def train(name: str, folder: str) -> tuple[float, list[float]]:
    """Fit and return the accuracy of the best checkpoint, and the validation losses from the start on."""
    model = Classifier(name)
    fit = DataLoader(TensorDataset(*spirals()), batch_size=BATCH, shuffle=True)
    validate = DataLoader(TensorDataset(*spirals(seed=2)), batch_size=128)
    saving = ModelCheckpoint(folder, monitor="validation_loss")
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="auto",
        callbacks=[PerturbationCallback(), saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, fit, validate)
    best = Classifier(name)
    best.load_state_dict(torch.load(saving.best_model_path, weights_only=True)["state_dict"])
    best.eval()
    x, y = spirals(seed=2)
    with torch.no_grad():
        loss = float(cross_entropy(best.network(x), y))
    if abs(loss - min(model.losses)) > 1e-3 * loss:
        raise RuntimeError(f"expected {min(model.losses)}, the best loss reported, of the file, got {loss}.")
    return accuracy(best.network), model.losses


def main() -> None:
    """Train both."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    pl.seed_everything(0, verbose=False)
    for name in ("MSAM", "SAM"):
        with tempfile.TemporaryDirectory() as folder:
            report(f"{name} in Lightning", *train(name, folder))


if __name__ == "__main__":
    main()
