"""A program: train in two processes with a framework, for ``torchrun --nproc-per-node 2 parallel.py FRAMEWORK FOLDER``.

Each process writes the weights that it ends with, and the first one what was reported of the best checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.integrations.toy import now, samples, validation_loss

HIDDEN = "torchvision"
_from_name = importlib.metadata.Distribution.from_name


def _visible(name: str) -> importlib.metadata.Distribution:
    if name == HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return _from_name(name)


def in_lightning(name: str, folder: Path) -> tuple[list[Tensor], float, float]:
    """Two parts of 8 samples in each process; the weights, the best loss reported, and that of its file."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from msam.integrations.lightning import PerturbationCallback
    from tests.integrations.test_lightning import Classifier

    class Parallel(Classifier):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            value = torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.log("validation_loss", value, sync_dist=True)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    saving = ModelCheckpoint(folder, monitor="validation_loss")
    model, rank = Parallel(name), int(os.environ["RANK"])
    pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        use_distributed_sampler=False,  # which shuffles
        accumulate_grad_batches=2,
        callbacks=[saving, PerturbationCallback()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(
        model,
        DataLoader(TensorDataset(*(each[rank::2] for each in samples())), batch_size=8),
        DataLoader(TensorDataset(*(each[rank::2] for each in samples(seed=1))), batch_size=48),
    )
    best = Classifier(name)
    best.load_state_dict(torch.load(saving.best_model_path, weights_only=True)["state_dict"])
    return now(model), float(saving.best_model_score or 0.0), validation_loss(best.network)


def in_trainer(name: str, folder: Path) -> tuple[list[Tensor], float, float]:
    """Train in the same way."""
    from tests.integrations.test_transformers import BEST, loaded, trainer_of

    trainer = trainer_of(
        name,
        folder,
        max_grad_norm=0.0,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        size=8,
        **BEST,
    )
    trainer.train()
    assert trainer.model is not None
    assert trainer.state.best_metric is not None
    found = validation_loss(loaded(str(trainer.state.best_model_checkpoint)).network)
    return now(trainer.model), trainer.state.best_metric, found


FRAMEWORKS = {"lightning": in_lightning, "transformers": in_trainer}


def main(framework: str, folder: str) -> None:
    """Train with both optimizers, and write."""
    sys.modules[HIDDEN] = None  # type: ignore[assignment]
    importlib.metadata.Distribution.from_name = _visible  # type: ignore[method-assign]
    warnings.simplefilter("ignore")  # they are judged in one process
    rank = int(os.environ["RANK"])
    told: dict[str, Any] = {}
    for name in ("MSAM", "SAM"):
        weights, reported, found = FRAMEWORKS[framework](name, Path(folder) / name)
        torch.save(weights, Path(folder) / f"{name}-{rank}.pt")
        told[name] = {"reported": reported, "found": found}
    if rank == 0:
        (Path(folder) / "told.json").write_text(json.dumps(told), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
