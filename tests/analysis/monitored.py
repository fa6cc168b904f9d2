"""A script: train in frameworks with a monitor, and write what it recorded beside what was seen from the framework.

``python monitored.py FILE FRAMEWORK ...``. The file holds for each framework and optimizer the rows of the monitor, and
the cosines computed by hand at the framework's own callback for the moment before the step.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import msam
import msam_analysis as ma
from msam_analysis import probes

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "MSAM": lambda p: msam.MSAM(p, lr=0.05, rho=0.3, momentum=0.9),
}


def samples(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points on a plane, and which of three sectors each is in."""
    x = torch.randn(96, 2, generator=torch.Generator().manual_seed(seed))
    return x, ((torch.atan2(x[:, 1], x[:, 0]) + math.pi) / (2 * math.pi) * 3).long().clamp(0, 2)


def network() -> nn.Sequential:
    """Drawn from the global generator, which the caller has seeded."""
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))


def by_hand(optimizer: torch.optim.Optimizer) -> float:
    """The cosine from the optimizer's state and the gradients of now."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in parameters]
    buffers = [state.get("momentum_buffer", state.get("exp_avg")) for state in states]
    if any(buffer is None for buffer in buffers):
        return math.nan
    v = torch.cat([buffer.double().flatten() for buffer in buffers])
    g = torch.cat([p.grad.double().flatten() for p in parameters])
    return float(v @ g / v.norm() / g.norm())


def watch(optimizer: torch.optim.Optimizer, model: nn.Module) -> ma.Monitor:
    """One monitor with cheap probes and one that evaluates."""
    objective = ma.Objective(model, nn.CrossEntropyLoss(), [samples(1)])
    asked: list[Any] = [
        probes.MomentumGradientCosine(after=True, model=model, by="module"),
        probes.Norms(),
        probes.Every(probes.HeldOutCosine(objective), 3),
    ]
    return ma.Monitor(optimizer, asked, every=1)


def in_lightning(name: str) -> tuple[ma.Monitor, list[float]]:
    """Automatic optimization with accumulation and clipping."""
    import lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    seen: list[float] = []

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return OPTIMIZERS[name](self.parameters())

        def on_fit_start(self) -> None:
            self.monitor = watch(self.optimizers(), self.network)  # type: ignore[arg-type]  # Lightning's wrapper

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            seen.append(by_hand(optimizer))

    pl.seed_everything(0, verbose=False)
    model = Classifier()
    pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, DataLoader(TensorDataset(*samples()), batch_size=16))
    return model.monitor, seen


def in_trainer(name: str) -> tuple[ma.Monitor, list[float]]:
    """Hugging Face Trainer with accumulation; it clips by default."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.network(x)
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    seen: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
            seen.append(by_hand(optimizer))

    torch.manual_seed(0)
    model = Classifier()
    optimizer = OPTIMIZERS[name](model.parameters())
    monitor = watch(optimizer, model.network)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                num_train_epochs=2,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=[{"x": x, "labels": y} for x, y in zip(*samples(), strict=True)],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[Look()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return monitor, seen


def in_parallel(name: str) -> tuple[ma.Monitor, list[float]]:
    """DistributedDataParallel over gloo, one process."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        torch.manual_seed(0)
        model = DistributedDataParallel(network())
        optimizer = OPTIMIZERS[name](model.parameters())
        monitor = watch(optimizer, model)
        x, y = samples()
        for step in range(6):
            optimizer.zero_grad()
            cross_entropy(model(x[step::6]), y[step::6]).backward()
            seen.append(by_hand(optimizer))
            optimizer.step()
        dist.destroy_process_group()
    return monitor, seen


FRAMEWORKS = {"lightning": in_lightning, "transformers": in_trainer, "parallel": in_parallel}


def train(framework: str) -> dict[str, Any]:
    """Train with every optimizer."""
    runs = {name: FRAMEWORKS[framework](name) for name in OPTIMIZERS}
    return {name: {"rows": monitor.rows, "seen": seen} for name, (monitor, seen) in runs.items()}


def main(file: str, *frameworks: str) -> None:
    """Write what every framework and optimizer shows."""
    Path(file).write_text(json.dumps({name: train(name) for name in frameworks}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
