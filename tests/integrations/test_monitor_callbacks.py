"""Monitors as callbacks: in Lightning and in Trainer they record what a monitor in a plain loop does, and go on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy
from transformers import Trainer

import msam_analysis as ma
import msam_analysis.monitor.lightning as in_lightning
import msam_analysis.monitor.transformers as in_trainer
from msam.integrations.lightning import PerturbationCallback

from . import test_lightning, test_transformers
from .toy import OPTIMIZERS, network, samples

pytestmark = test_lightning.pytestmark
QUIET = test_lightning._quiet


def by_hand(name: str, steps: int) -> list[dict[str, float]]:
    """The rows of a monitor in a plain loop."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    monitor = ma.Monitor(optimizer, asked(), every=2)
    points = itertools.cycle(list(zip(*(each.split(16) for each in samples()), strict=True)))
    part: list[Any] = []

    def closure() -> Any:
        optimizer.zero_grad()
        value = cross_entropy(model(part[0]), part[1])
        value.backward()
        return value

    for part[:] in itertools.islice(points, steps):
        optimizer.step(closure)
    return monitor.rows


def asked() -> list[Any]:
    return [ma.probes.MomentumGradientCosine(after=True), ma.probes.Norms()]


def close(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert list(row.values()) == pytest.approx(list(wanted.values()), rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", ["MSAM", "SAM", "SGD"])
def test_in_lightning(name: str, tmp_path: Path) -> None:
    rows: list[Any] = []
    monitor = in_lightning.MonitorCallback(asked(), 2, path=tmp_path / "run.jsonl", to=[rows.append])
    logger = CSVLogger(tmp_path, "logs", flush_logs_every_n_steps=1)
    test_lightning.fitted(name, tmp_path, PerturbationCallback(), monitor, logger=logger, max_epochs=2)
    assert monitor.monitor is not None
    close(monitor.monitor.rows, by_hand(name, 12))
    assert rows == monitor.monitor.rows
    assert ma.Monitor.read(tmp_path / "run.jsonl").equals(monitor.monitor.frame())
    logged = pd.read_csv(Path(logger.log_dir) / "metrics.csv").dropna(subset="monitor/step_norm")
    assert logged["monitor/step_norm"].tolist() == pytest.approx([row["step_norm"] for row in rows], rel=1e-12)
    assert logged["step"].tolist() == [0, 2, 4, 6, 8, 10]


def test_in_lightning_going_on(tmp_path: Path) -> None:
    def callbacks(file: str) -> list[Any]:
        monitor = in_lightning.MonitorCallback(asked(), 2, path=tmp_path / file, log=False)
        return [PerturbationCallback(), monitor, ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]

    test_lightning.fitted("MSAM", tmp_path, *callbacks("whole.jsonl"), max_epochs=4)
    test_lightning.fitted("MSAM", tmp_path, *callbacks("run.jsonl"), max_epochs=3)
    again = callbacks("run.jsonl")
    test_lightning.fitted("MSAM", tmp_path, *again, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert again[1].monitor.step == 24


def test_in_lightning_without_the_other_callback(tmp_path: Path) -> None:
    """It warns where checkpoints are made of displaced weights, and only there."""
    monitor = in_lightning.MonitorCallback(asked())
    with pytest.warns(UserWarning, match=r"MSAM leaves the weights displaced.*integrations\.lightning"):
        test_lightning.fitted("MSAM", tmp_path, monitor, ModelCheckpoint(tmp_path), max_epochs=1)
    test_lightning.fitted("MSAM", tmp_path, in_lightning.MonitorCallback(asked()), max_epochs=1)
    for name in ("SAM", "SGD"):
        callbacks = [in_lightning.MonitorCallback(asked()), ModelCheckpoint(tmp_path)]
        test_lightning.fitted(name, tmp_path, *callbacks, max_epochs=1)
    assert in_lightning.MonitorCallback(asked()).state_dict() == {}


@pytest.mark.parametrize("name", ["MSAM", "SAM", "SGD"])
def test_in_trainer(name: str, tmp_path: Path) -> None:
    rows: list[Any] = []
    monitor = in_trainer.MonitorCallback(asked(), 2, path=tmp_path / "run.jsonl", to=[rows.append])
    # SAM's first gradient, which is the one that is recorded, comes before Trainer's clipping
    trainer = test_transformers.trainer_of(name, tmp_path, monitor, num_train_epochs=2, max_grad_norm=0.0)
    trainer.train()
    assert monitor.monitor is not None
    close(monitor.monitor.rows, by_hand(name, 12))
    assert rows == monitor.monitor.rows
    assert ma.Monitor.read(tmp_path / "run.jsonl").equals(monitor.monitor.frame())


def test_in_trainer_going_on(tmp_path: Path) -> None:
    def train(file: str, epochs: int, folder: str, **options: Any) -> Any:
        monitor = in_trainer.MonitorCallback(asked(), 2, path=tmp_path / file)
        saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": epochs}
        test_transformers.trainer_of("MSAM", tmp_path / folder, monitor, **saving).train(**options)
        return monitor.monitor

    train("whole.jsonl", 3, "whole")
    train("run.jsonl", 2, "run")
    again = train("run.jsonl", 3, "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert (tmp_path / "run.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert again.step == 18


def test_in_trainer_without_the_other_callback(tmp_path: Path) -> None:
    def train(name: str) -> None:
        monitor = in_trainer.MonitorCallback(asked())
        test_transformers.trainer_of(name, tmp_path, monitor, kind=Trainer, save_strategy="epoch").train()

    with pytest.warns(UserWarning, match=r"MSAM leaves the weights displaced.*integrations\.transformers"):
        train("MSAM")
    train("SGD")
