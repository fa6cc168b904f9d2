"""Tables of finished runs, and runs on disk: the same numbers, whole or not there at all."""

from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from msam_analysis.results import BallSharpness, Eigenpairs, Result, Slice1D, Slice2D
from msam_analysis.studies import store
from msam_analysis.studies.exhibits import EXHIBITS, choose
from msam_analysis.studies.measuring import LINES
from msam_analysis.studies.runs import Run
from msam_analysis.studies.tables import FinishedRun, Tables, rows, tabulate
from msam_analysis.studies.training import Trained, train

from .toy import TOY

AWKWARD = 0.1 + 0.2  # 0.30000000000000004: needs all of its 17 digits
RADII = (0.05, 0.5, 10.0)


def pairs(values: list[float], method: str) -> Eigenpairs:
    k = len(values)
    return Eigenpairs(
        values=torch.tensor(values, dtype=torch.float64),
        vectors=torch.eye(4, k, dtype=torch.float64),
        residuals=torch.full((k,), 1e-5, dtype=torch.float64),
        converged=True,
        hvps=9,
        method=method,
        which="largest",
        tolerance=1e-4,
    )


def ball(rho: float, sharpness: float) -> BallSharpness:
    return BallSharpness(
        sharpness=sharpness,
        one_step=sharpness / 2,
        loss=1.0,
        displacement=torch.zeros(4),
        rho=rho,
        norm="l2",
        adaptive=False,
        starts={"gradient": sharpness},
        spread=0.0,
        stationarity=0.0,
        converged=True,
        gradients=3,
        hvps=0,
    )


def line(name: str, losses: list[float], center: float) -> Slice1D:
    return Slice1D(
        coordinates=torch.linspace(-1, 1, len(losses), dtype=torch.float64),
        loss=torch.tensor(losses, dtype=torch.float64),
        center_loss=center,
        direction=name,
        direction_norm=2.0,
    )


def plane(losses: list[list[float]], center: float) -> Slice2D:
    grid = torch.linspace(-1, 1, 3, dtype=torch.float64)
    return Slice2D(
        x=grid,
        y=grid,
        loss=torch.tensor(losses, dtype=torch.float64),
        center_loss=center,
        directions=("a", "b"),
        direction_norms=(1.0, 1.0),
        cosine=0.0,
    )


def results(offset: float) -> dict[str, Result]:
    """Return results whose summaries are known: λ = 3, 2 + offset; rises of 1, 2, 3 along lines, 4 on the plane."""
    measured: dict[str, Result] = {
        "lanczos": pairs([3.0 + offset, 2.0 + offset], "lanczos"),
        "power": pairs([3.01 + offset, 2.01 + offset], "power"),
    }
    measured |= {f"ball-{radius:g}": ball(radius, radius + offset) for radius in RADII}
    center = 0.5 + offset
    for height, name in enumerate(LINES, start=1):
        # Five losses whose mean is `height` above the centre.
        measured[f"line-{name}"] = line(name, [center + height * f for f in (2.0, 0.5, 0.0, 0.5, 2.0)], center)
    measured["plane"] = plane([[center + 4.5] * 3, [center + 4.5, center, center + 4.5], [center + 4.5] * 3], center)
    return measured


def steps(offset: float) -> pd.DataFrame:
    columns = {
        "step": [0, 1, 2],
        "epoch": [0, 0, 1],
        "cosine": [math.nan, -0.3 - offset, AWKWARD],
        "lr": [0.1, 0.05, 0.0],
    }
    frame: pd.DataFrame = pd.DataFrame(columns)
    return frame


def run(optimizer: str, seed: int) -> FinishedRun:
    offset = seed / 8 + len(optimizer) / 64
    return FinishedRun(
        optimizer, seed, {"test_accuracy": 0.5 + offset, "train_loss": AWKWARD}, steps(offset), results(offset)
    )


@pytest.fixture
def tables() -> Tables:
    runs = [run(name, seed) for name in ("SGD", "MSAM") for seed in (0, 1, 2)]
    return tabulate(runs, [run("SGD", seed) for seed in (0, 1, 2)])


# --- what the tables say


def test_one_row_per_run(tables: Tables) -> None:
    frame = tables.runs
    assert list(frame["optimizer"]) == ["SGD"] * 3 + ["MSAM"] * 3
    assert list(frame["seed"]) == [0, 1, 2] * 2
    for row in frame.to_dict("records"):
        offset = row["seed"] / 8 + len(row["optimizer"]) / 64
        assert row["test_accuracy"] == 0.5 + offset
        assert (row["lambda_1"], row["lambda_2"]) == (3.0 + offset, 2.0 + offset), "Lanczos, not the power iteration"
        assert [row[f"sharpness_{radius:g}"] for radius in RADII] == [radius + offset for radius in RADII]
        for height, name in enumerate(LINES, start=1):
            assert row[f"rise_along_{name}"] == pytest.approx(height, rel=1e-12)
        assert row["rise_on_plane"] == pytest.approx(4.0, rel=1e-12)


def test_what_did_not_converge_is_in_the_tables() -> None:
    measured = results(0.0)
    for name in ("power", "ball-0.5"):
        measured[name] = dataclasses.replace(measured[name], converged=False)  # type: ignore[call-arg]
    tables = tabulate([FinishedRun("SGD", 0, {}, steps(0.0), measured), run("SGD", 1)])
    assert (len(tables.solvers), int((~tables.solvers).sum())) == (2 * (2 + len(RADII)), 2)
    bad = tables.eigenvalues[~tables.eigenvalues["converged"]]
    assert list(zip(bad["seed"], bad["method"], strict=True)) == [(0, "power")] * 2
    assert tables.balls.loc[~tables.balls["converged"], ["seed", "rho"]].to_numpy().tolist() == [[0, 0.5]]
    runs = tables.runs
    assert list(runs["lambda_converged"]) == [True, True], "Lanczos, whose values these are"
    assert list(runs["lambda_2_residual"]) == [1e-5, 1e-5]
    assert list(runs["sharpness_0.5_converged"]) == [False, True]
    assert list(runs["sharpness_0.5_stationarity"]) == [0.0, 0.0]


def test_one_row_per_optimizer(tables: Tables) -> None:
    """Mean and 68 % Student-t half width of every number, recomputed by scipy."""
    assert list(tables.optimizers["optimizer"]) == ["SGD", "MSAM"]
    quantities = [name for name in tables.runs.columns if name not in ("optimizer", "seed")]
    for row in tables.optimizers.to_dict("records"):
        values = tables.runs[tables.runs["optimizer"] == row["optimizer"]]
        for name in quantities:
            column = values[name].to_numpy(dtype=np.float64)
            expected = stats.t.ppf(0.84, 2) * column.std(ddof=1) / math.sqrt(3)
            assert row[name] == pytest.approx(column.mean(), rel=1e-12)
            assert row[f"{name}_half_width"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_seed_has_no_interval() -> None:
    optimizers = tabulate([run("SGD", 0)], [run("SGD", 0)]).optimizers
    assert optimizers["test_accuracy"].notna().all()
    assert optimizers["test_accuracy_half_width"].isna().all()


@pytest.mark.parametrize(
    ("table", "rows"),
    [("steps", 6 * 3), ("eigenvalues", 6 * 2 * 2), ("balls", 6 * 3), ("lines", 6 * 3 * 5), ("planes", 6 * 9)],
)
def test_long_tables(table: str, rows: int, tables: Tables) -> None:
    frame = getattr(tables, table)
    assert list(frame.columns[:2]) == ["optimizer", "seed"]
    assert len(frame) == rows
    assert list(frame.index) == list(range(rows))
    assert frame.groupby(["optimizer", "seed"]).size().eq(rows // 6).all()


def test_long_tables_hold_the_results(tables: Tables) -> None:
    expected = run("MSAM", 2)

    def part(frame: pd.DataFrame) -> pd.DataFrame:
        chosen = frame[(frame["optimizer"] == "MSAM") & (frame["seed"] == 2)]
        rest: pd.DataFrame = chosen.drop(columns=["optimizer", "seed"]).reset_index(drop=True)
        return rest

    pd.testing.assert_frame_equal(part(tables.steps), expected.steps, check_exact=True)
    eigenvalues = part(tables.eigenvalues)
    assert list(eigenvalues["method"]) == ["lanczos"] * 2 + ["power"] * 2
    for name in ("lanczos", "power"):
        found = expected.results[name]
        assert isinstance(found, Eigenpairs)
        assert list(eigenvalues.loc[eigenvalues["method"] == name, "value"]) == found.values.tolist()
    assert list(part(tables.balls)["rho"]) == list(RADII)
    assert list(part(tables.lines)["direction"].unique()) == list(LINES)
    assert float(part(tables.planes)["loss"].sum()) == pytest.approx(9 * (expected_center() + 4))


def expected_center() -> float:
    return 0.5 + 2 / 8 + len("MSAM") / 64


def test_controls_are_kept_apart(tables: Tables) -> None:
    assert set(tables.controls["optimizer"]) == {"SGD"}
    assert len(tables.controls) == 3 * 3
    assert len(tables.runs) == 6


def test_no_controls() -> None:
    tables = tabulate([run("SGD", 0)])
    assert len(tables.controls) == 0
    assert {"optimizer", "seed"} <= set(tables.controls.columns)


# --- files


def test_written_numbers_are_the_numbers(tables: Tables, tmp_path: Path) -> None:
    tables.write(tmp_path / "new" / "tables")
    names = {field.name for field in dataclasses.fields(Tables)}
    assert {path.name for path in (tmp_path / "new" / "tables").iterdir()} == {f"{name}.csv" for name in names}
    for name in names:
        frame: pd.DataFrame = getattr(tables, name)
        with (tmp_path / "new" / "tables" / f"{name}.csv").open(newline="") as file:
            header, *rows = csv.reader(file)
        assert header == list(frame.columns)
        assert len(rows) == len(frame)
        for text, values in zip(rows, frame.itertuples(index=False), strict=True):
            assert all(same(a, b) for a, b in zip(text, values, strict=True)), (name, text)


def same(text: str, value: object) -> bool:
    """Tell whether a cell of a file is a value of a table, to the last bit."""
    if isinstance(value, float):
        return text == "" if math.isnan(value) else float(text) == value
    return text == str(value)


def test_equal_tables_are_equal_bytes(tables: Tables, tmp_path: Path) -> None:
    again = tabulate(
        [run(name, seed) for name in ("SGD", "MSAM") for seed in (0, 1, 2)], [run("SGD", seed) for seed in (0, 1, 2)]
    )
    tables.write(tmp_path / "a")
    again.write(tmp_path / "b")
    again.write(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        content = path.read_bytes()
        assert content == (tmp_path / "b" / path.name).read_bytes()
        assert b"\r" not in content


def test_a_table_that_cannot_be_written_leaves_the_old_one(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(frame: pd.DataFrame, path: Path, **_: object) -> None:
        Path(path).write_text("half of ")
        raise OSError("the disk is full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk is full"):
        tables.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- runs on disk


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(TOY, "MSAM", 0, every=3)


def scores() -> Mapping[str, float]:
    return {"train_loss": AWKWARD, "test_accuracy": 1 / 3, "gradients_per_step": 1.0}


RUN = Run(TOY, "MSAM", 0)


def test_a_run_is_read_as_it_was_written(trained: Trained, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert not store.is_trained(directory)
    watched = {f"{name}.csv": recorded for name, recorded in trained.watched.items()}
    store.write_trained(directory, trained, scores(), watched)
    assert store.is_trained(directory)
    assert not store.is_measured(directory / "all")
    store.write_measured(directory / "all", results(0.1))
    assert store.is_measured(directory / "all")
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]
    read = store.read_run(directory, RUN, list(watched), ["all"])
    assert (read.optimizer, read.seed) == ("MSAM", 0)
    assert dict(read.scores) == dict(scores())
    pd.testing.assert_frame_equal(read.steps, trained.steps, check_exact=True)
    given = results(0.1)
    assert list(read.results) == list(given), "in their order"
    for name, result in given.items():
        for field in dataclasses.fields(result):
            a, b = getattr(result, field.name), getattr(read.results[name], field.name)
            alike = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or repr(a) == repr(b) == "nan"
            assert alike, (name, field.name)
    bare = store.read_run(directory, RUN)
    assert list(bare.steps.columns) == list(trained.base.columns), "what is not wanted is not read"
    assert bare.results == {}


def test_the_checkpoint_of_a_run_can_be_loaded(trained: Trained, tmp_path: Path) -> None:
    """At the true weights, by the loader that runs nothing from the file."""
    from msam_analysis.checkpoints.loading import load_model

    store.write_trained(tmp_path / "run", trained, scores(), {})
    model = load_model(tmp_path / "run" / "checkpoint.pt", TOY.network)
    expected = trained.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert "optimizer" in content


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_what_cannot_be_written_is_not_there(
    error: BaseException, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_csv", fail)
        with pytest.raises(type(error)):
            store.write_trained(tmp_path / "run", trained, scores(), {})
    monkeypatch.setattr(Slice2D, "save", fail)
    with pytest.raises(type(error)):
        store.write_measured(tmp_path / "run", results(0.0))
    assert list(tmp_path.iterdir()) == []


def test_what_an_interrupted_run_left_is_swept_away(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed cleans nothing up: its folder is no result, and goes at the next start."""
    store.write_trained(tmp_path / "run", trained, scores(), {})
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Slice2D, "save", die)
        with pytest.raises(KeyboardInterrupt):
            store.write_measured(tmp_path / "run" / "all", results(0.0))
    monkeypatch.undo()
    assert len(list((tmp_path / "run").iterdir())) == 4, "the partial folder is there"
    assert not store.is_measured(tmp_path / "run" / "all")
    store.sweep(tmp_path)
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert store.is_trained(tmp_path / "run")


def test_what_is_not_whole_is_replaced(trained: Trained, tmp_path: Path) -> None:
    """File by file: what somebody else put there stays."""
    directory = tmp_path / "run"
    store.write_trained(directory, trained, scores(), {})
    store.write_measured(directory / "all", results(0.0))
    (directory / "all" / "plane.safetensors").rename(directory / "all" / "stale.safetensors")
    assert not store.is_measured(directory / "all")
    store.write_measured(directory / "all", results(0.0))
    assert store.is_measured(directory / "all")
    (directory / "all" / "thesis.txt").write_text("mine")
    (directory / "all" / "contents.json").write_text("half of")
    assert not store.is_measured(directory / "all")
    (directory / "scores.json").unlink()
    assert not store.is_trained(directory)
    store.write_trained(directory, trained, scores(), {})
    assert {path.name for path in directory.iterdir()} == {"checkpoint.pt", "scores.json", "steps.csv", "all"}
    assert not store.is_measured(directory / "all"), "of the network that is gone"
    assert (directory / "all" / "thesis.txt").read_text() == "mine"


def test_networks_have_names_that_stay(trained: Trained, tmp_path: Path) -> None:
    """Put there twice, nothing is left beside them."""
    store.write_trained(tmp_path / "run", trained, scores(), {})
    for _ in range(2):
        store.name_network(tmp_path / "run", tmp_path / "networks" / "one.pt")
    assert [path.name for path in (tmp_path / "networks").iterdir()] == ["one.pt"]


# --- exhibits


def test_no_exhibits() -> None:
    with pytest.raises(ValueError, match="no exhibit was chosen"):
        choose([])


def test_exhibits_can_be_chosen() -> None:
    assert choose(["all"]) == EXHIBITS
    assert choose(None) == tuple(exhibit for exhibit in EXHIBITS if exhibit.main)
    assert [e.name for e in choose(["TA1", "T1"])] == [e.name for e in EXHIBITS if {"TA1", "T1"} & set(e.ids)]
    for key in ("F4", "F4A", "F4B", "F4C", "slices"):
        assert [e.ids for e in choose([key])] == [("F4A", "F4B", "F4C")]
    assert choose(["ball_sharpness"])[0].claims == ()
    claims = [claim for exhibit in EXHIBITS for claim in exhibit.claims]
    assert len(claims) == len(set(claims)), "no claim is told twice"


@pytest.mark.parametrize("bad", [["F9"], ["T1", "nonsense"], ["f2c"], [""]])
def test_unknown_exhibits(bad: list[str]) -> None:
    with pytest.raises(ValueError, match=f"unknown exhibit '{bad[-1]}': expected some of"):
        choose(bad)


def test_rows_by_their_values() -> None:
    table = pd.DataFrame({"optimizer": ["SGD", "SAM", "MSAM", "SAM"], "seed": [0, 0, 1, 1], "x": [1.0, 2.0, 3.0, 4.0]})
    assert rows(table)["x"].to_list() == [1.0, 2.0, 3.0, 4.0]
    assert rows(table, optimizer="SAM")["x"].to_list() == [2.0, 4.0]
    assert rows(table, optimizer=("MSAM", "SAM"), seed=1)["x"].to_list() == [3.0, 4.0]
    assert rows(table, optimizer="NAG").empty
