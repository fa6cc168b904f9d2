"""Rows read back from the files of the trackers themselves."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import msam_analysis as ma

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what they import, of what they import
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
]


def recorded(logger: Any, steps: range = range(6), resume: dict[str, Any] | None = None) -> ma.Monitor:
    """A run of which every second step is recorded; its first row has no cosine yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    asked: list[Any] = [ma.probes.MomentumGradientCosine(model=model), ma.probes.Norms()]
    monitor = ma.Monitor(optimizer, asked, every=2, to=[logger])
    if resume is not None:
        monitor.load_state_dict(resume)
    x = torch.randn(20, 4, 3, generator=torch.Generator().manual_seed(1))
    for step in steps:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[step]), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    monitor.close()
    return monitor


def expected(monitor: ma.Monitor) -> dict[str, list[tuple[int, float]]]:
    """Every number with its step, by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in monitor.rows:
        for name, value in row.items():
            if name != "step":
                found.setdefault(f"monitor/{name}", []).append((int(row["step"]), float(value)))
    assert len(found) == 7  # cosines of two tensors among them
    return found


def check(read: dict[str, list[tuple[int, float]]], monitor: ma.Monitor, rel: float) -> None:
    wanted = expected(monitor)
    assert read.keys() == wanted.keys()
    for name, series in wanted.items():
        assert [step for step, _ in read[name]] == [step for step, _ in series]
        assert [value for _, value in read[name]] == pytest.approx([value for _, value in series], rel=rel, nan_ok=True)
    assert math.isnan(wanted["monitor/cosine"][0][1])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


def test_tensorboard(tmp_path: Path) -> None:
    monitor = recorded(ma.loggers.TensorBoard(tmp_path))
    check(scalars(tmp_path), monitor, rel=1e-6)  # it keeps single precision


def test_tensorboard_goes_back(tmp_path: Path) -> None:
    first = recorded(ma.loggers.TensorBoard(tmp_path))
    again = recorded(ma.loggers.TensorBoard(tmp_path), range(4, 8), resume=first.state_dict() | {"step": 4})
    steps = [step for step, _ in scalars(tmp_path)["monitor/step_norm"]]
    assert [row["step"] for row in again.rows] == [4, 6]
    assert steps == [0, 2, 4, 6]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its default, a database, wants more packages
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    yield mlflow
    mlflow.set_tracking_uri(before)


def metrics(mlflow: Any, run: str) -> dict[str, list[tuple[int, float]]]:
    client = mlflow.MlflowClient()
    names = client.get_run(run).data.metrics
    return {name: [(e.step, e.value) for e in client.get_metric_history(run, name)] for name in names}


def test_mlflow(mlflow: Any) -> None:
    logger = ma.loggers.MLflow(experiment="ours")
    monitor = recorded(logger)
    found = {"monitor/" + name[8:].replace(".", "/", 1): series for name, series in metrics(mlflow, logger.run).items()}
    check(found, monitor, rel=0)
    client = mlflow.MlflowClient()
    run = client.get_run(logger.run)
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "ours"
    assert ma.loggers.MLflow(experiment="ours").run != logger.run


def test_mlflow_in_a_run_of_ones_own_that_goes_back(mlflow: Any) -> None:
    with mlflow.start_run() as active:
        mlflow.log_metric("loss", 1.0, step=100)
        logger = ma.loggers.MLflow()
        assert logger.run == active.info.run_id
        monitor = recorded(logger)
        assert mlflow.MlflowClient().get_run(logger.run).info.status == "RUNNING"
    again = ma.loggers.MLflow(run=logger.run)
    recorded(again, range(4, 8), resume=monitor.state_dict() | {"step": 4})
    found = metrics(mlflow, logger.run)
    assert found.pop("loss") == [(100, 1.0)]
    assert [step for step, _ in found["monitor/step_norm"]] == [0, 2, 4, 6]


def test_mlflow_and_names_that_it_does_not_know(mlflow: Any) -> None:
    logger = ma.loggers.MLflow()
    logger({"step": 0, "loss_along/-0.5": 1.0, "λ₁ (max)": 2.0})
    assert metrics(mlflow, logger.run) == {"monitor/loss_along.-0.5": [(0, 1.0)], "monitor/λ₁ _max_": [(0, 2.0)]}


def records(content: bytes) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format after a header of seven bytes."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the rest of a block that has no room for a record's head
            position += 32768 - position % 32768
            continue
        size, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """What an offline run of W&B keeps."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            rows.append({e.key or "/".join(e.nested_key): json.loads(e.value_json) for e in record.history.item})
    return rows


def test_wandb(tmp_path: Path) -> None:
    import wandb

    with wandb.init(mode="offline", dir=tmp_path, project="test", settings=wandb.Settings(silent=True)) as run:
        logger = ma.loggers.WandB()
        assert logger.run is run
        monitor = recorded(logger)
        run.log({"loss": 1.0})
        recorded(ma.loggers.WandB(run), range(4, 8), resume=monitor.state_dict() | {"step": 4})  # goes back
        run.log({"loss": 2.0})
    wandb.teardown()  # its files are whole when its process has ended
    rows = history(tmp_path)
    assert [row["loss"] for row in rows if "loss" in row] == [1.0, 2.0]
    ours = [row for row in rows if "monitor/step" in row]
    assert [row["monitor/step"] for row in ours] == [0, 2, 4, 6]
    read = {
        name: [(int(row["monitor/step"]), float(row[name])) for row in ours[:3]]
        for name in ours[0]
        if name.startswith("monitor/") and name != "monitor/step"
    }
    check(read, monitor, rel=0)


def test_wandb_in_a_run_that_is_made_and_ended(tmp_path: Path) -> None:
    import wandb

    settings = wandb.Settings(silent=True)
    logger = ma.loggers.WandB(mode="offline", dir=tmp_path, project="test", settings=settings, prefix="")
    assert wandb.run is logger.run
    monitor = recorded(logger)
    assert wandb.run is None
    wandb.teardown()
    assert [row["step_norm"] for row in history(tmp_path)] == [row["step_norm"] for row in monitor.rows]
