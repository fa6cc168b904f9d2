"""Many checkpoints beside one another: the numbers of each alone, differences, and nothing that is lost."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import msam_analysis as ma
from msam_analysis import results
from msam_analysis.checkpoints.comparing import Kept
from tests.analysis.cases import MLP
from tests.analysis.test_results import check_same

CHEAP = ("loss", "average", "trace")
X = torch.randn(24, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = (X[:, 0] * X[:, 1] > 0).long()


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(X[:16], Y[:16]), (X[16:], Y[16:])]


def alone(seed: int, **options: Any) -> results.Measurement:
    return ma.measure(ma.Objective(network(seed), F.cross_entropy, batches()), **{"metrics": CHEAP, **options})


def compared(checkpoints: Any, **options: Any) -> results.Comparison:
    chosen: dict[str, Any] = {"metrics": CHEAP, **options}
    return ma.compare(checkpoints, network, F.cross_entropy, chosen.pop("data", batches()), **chosen)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 10 and 9, in a folder beside a text."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (2, 10, 9):
        torch.save({"model": network(step).state_dict(), "step": step}, folder / f"net-{step}.pt")
    (folder / "notes.txt").write_text("mine")
    return folder


def draws_of(measured: results.Measurement, name: str) -> Tensor:
    found = measured.results[name]
    assert isinstance(found, results.Estimate)
    assert found.values is not None
    return found.values


def values(result: results.Comparison, label: str) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in result[label].rows}


# --- which checkpoints


def test_a_mapping_of_paths_and_modules(run: Path) -> None:
    result = compared({"file": str(run / "net-2.pt"), "path": run / "net-9.pt", "module": network(3)})
    assert list(result) == ["file", "path", "module"]
    for label, seed in (("file", 2), ("path", 9), ("module", 3)):
        check_rows(result[label].rows, alone(seed).rows)
    assert result.baseline == "file"
    assert (result.sources["file"]["step"], result.sources["module"]["step"]) == (2, None)
    assert result.sources["module"]["taken"] == "a Sequential in memory"


def check_rows(rows: Any, expected: Any) -> None:
    pd.testing.assert_frame_equal(pd.DataFrame(list(rows)), pd.DataFrame(list(expected)), check_exact=True)


def test_a_folder_and_a_pattern_are_ordered_by_step(run: Path) -> None:
    for given in ([run], run, [f"{run}/net-*.pt"], str(run)):
        result = compared(given, metrics=("loss",))
        assert list(result) == ["run-net-2", "run-net-9", "run-net-10"]
        assert result.steps == [2.0, 9.0, 10.0]
        assert values(result, "run-net-10")["loss"] == alone(10).rows[1]["value"]


def test_files_keep_their_order(run: Path) -> None:
    assert list(compared([run / "net-9.pt", run / "net-2.pt"], metrics=("loss",))) == ["run-net-9", "run-net-2"]


def test_modules_need_no_factory() -> None:
    result = ma.compare({"a": network(1)}, None, F.cross_entropy, batches(), metrics=("loss",))
    assert values(result, "a")["loss"] == alone(1).rows[1]["value"]


def test_epochs_and_no_counter(tmp_path: Path) -> None:
    for name in ("epoch=3.pt", "epoch=1.pt", "x.pt"):
        torch.save({"net": network(0).state_dict()}, tmp_path / name)
    result = compared([f"{tmp_path}/epoch=*.pt"], metrics=("loss",))
    assert result.steps == [1.0, 3.0]
    assert all(math.isnan(step) for step in compared([tmp_path], metrics=("loss",)).steps)


@pytest.mark.parametrize(
    ("checkpoints", "error", "message"),
    [
        ({}, ValueError, r"there is no checkpoint to measure"),
        ([], ValueError, r"there is no checkpoint to measure"),
        (["gone.pt"], FileNotFoundError, r"no checkpoint at gone\.pt"),
        (["gone*.pt"], FileNotFoundError, r"the pattern gone\*\.pt holds no checkpoint"),
    ],
)
def test_no_checkpoints(checkpoints: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compared(checkpoints)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, ValueError, r"samples must be a positive integer, or None for all; got 0"),
        ({"samples": True}, ValueError, r"got True"),
        ({"budget": 0.0}, ValueError, r"budget must be a number of seconds above 0, or None; got 0\.0"),
        ({"metrics": ("sharp",)}, ValueError, r"metrics must be of .*'sharp'"),
        ({"radii": (-1.0,), "metrics": ("ball",)}, ValueError, r"rho must be a number >= 0"),
        ({"temperature": 1}, TypeError, r"temperature"),
        ({"data": DataLoader(TensorDataset(X, Y), shuffle=True)}, ValueError, r"the loader shuffles"),
        ({"data": iter(batches())}, TypeError, r"iterator, which can be read only once"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        compared({"a": network(1)}, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"out must be a folder for results, and .*out is a file"):
        compared({"a": network(1)}, out=tmp_path / "out")


def test_a_file_needs_a_factory(run: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a factory for the checkpoint .*net-2\.pt, got None"):
        ma.compare([run / "net-2.pt"], None, F.cross_entropy, batches())


# --- the same data and draws


def test_samples_are_the_same_for_all() -> None:
    result = compared({"a": network(1), "b": network(2)}, samples=7, seed=3, metrics=("loss",))
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(3))[:7]
    for label, seed in (("a", 1), ("b", 2)):
        expected = F.cross_entropy(network(seed)(X[chosen]), Y[chosen])
        assert values(result, label)["loss"] == pytest.approx(expected.item(), rel=1e-12)
    assert result.settings["samples"] == 7
    assert values(compared({"a": network(1)}, samples=99, metrics=("loss",)), "a")["loss"] == alone(1).rows[1]["value"]


def test_options_of_the_objective() -> None:
    result = compared({"a": network(1)}, parameters="0.*", dtype=torch.float32, metrics=("loss", "eigenvalues"))
    assert (result.settings["parameters"], result.settings["dtype"]) == (16, "float32")


def test_differences_by_hand() -> None:
    """Of the mean over the same draws; of eigenvalues; and none for what is exact or a lower bound."""
    result = compared({"a": network(1), "b": network(2)}, metrics=("loss", "average", "trace", "ball", "eigenvalues"))
    frame = result.to_frame().set_index(["label", "metric"])
    for metric, name in (("trace", "trace"), ("average_sharpness@0.01", "average")):
        first, second = (draws_of(result[label], name) for label in ("a", "b"))
        draws = [float(y - x) for x, y in zip(first, second, strict=True)]
        mean = sum(draws) / len(draws)
        error = math.sqrt(sum((draw - mean) ** 2 for draw in draws) / (len(draws) - 1) / len(draws))
        assert frame.loc[("b", metric), "difference"] == pytest.approx(mean, rel=1e-9)
        assert frame.loc[("b", metric), "difference_uncertainty"] == pytest.approx(error, rel=1e-9)
    for index in range(1, 6):
        both = [frame.loc[(label, f"lambda_{index}")] for label in ("a", "b")]
        assert both[1]["difference"] == both[1]["value"] - both[0]["value"]
        assert both[1]["difference_uncertainty"] == both[1]["uncertainty"] + both[0]["uncertainty"]
    for metric in ("loss", "ball_sharpness@0.05"):
        assert math.isnan(frame.loc[("b", metric), "difference_uncertainty"])
    assert set(frame.loc["a", "difference"]) == {0.0}


@pytest.mark.parametrize("metric", ["trace", "average"])
def test_intervals_of_differences_cover(metric: str) -> None:
    """Of 40 seeds, the share whose interval of ± 2 standard errors holds the true difference; far narrower than apart.

    The truth: the traces of the dense Hessians, or the mean over 1000 draws.
    """
    near = network(1)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1.02)
    models = {"a": network(1), "b": near}
    name = {"trace": "trace", "average": "average_sharpness@0.01"}[metric]
    if metric == "trace":
        objectives = [ma.Objective(model, F.cross_entropy, batches()) for model in models.values()]
        exact = [float(sum(o.hvp(e) @ e for e in torch.eye(o.size, dtype=torch.float64))) for o in objectives]
        truth = exact[1] - exact[0]
    else:
        objectives = [ma.Objective(model, F.cross_entropy, batches()) for model in models.values()]
        many = [ma.average_sharpness(o, 0.01, adaptive=True, draws=1000, seed=10**6).value for o in objectives]
        truth = many[1] - many[0]
    covered, paired, apart = 0, 0.0, 0.0
    for seed in range(40):
        frame = compared(models, metrics=(metric,), seed=seed, examine=False).to_frame().set_index(["label", "metric"])
        row = frame.loc[("b", name)]
        covered += abs(row["difference"] - truth) <= 2 * row["difference_uncertainty"]
        paired += row["difference_uncertainty"]
        apart += math.hypot(row["uncertainty"], frame.loc[("a", name), "uncertainty"])
    assert covered >= 33, "2 standard errors hold it in 95 % of cases: fewer than 33 of 40 by chance once in 1000"
    assert paired < apart / 5, "the same draws"


def test_brackets_of_a_difference_are_added() -> None:
    """The critical sharpness has no draws: its error is the bracket's farther end."""
    networks = {"a": MLP.model(), "b": MLP.model(seed=1)}
    found = ma.compare(networks, None, MLP.loss_fn, MLP.data(), metrics=("critical_sharpness",))
    frame = found.to_frame()
    rows = frame[frame["metric"] == "critical_sharpness"].set_index("label")
    assert rows.loc["b", "difference"] == rows.loc["b", "value"] - rows.loc["a", "value"]
    assert rows.loc["b", "difference_uncertainty"] == rows["uncertainty"].sum() > 0


def test_another_number_of_draws_is_paired_as_far_as_it_goes() -> None:
    first = alone(1, metrics=("trace",))
    second = alone(2, metrics=("trace",))
    few = ma.trace(ma.Objective(network(2), F.cross_entropy, batches()), draws=9)
    cut = results.Measurement(rows=second.rows, results={"trace": few})
    frame = results.Comparison(measurements={"a": first, "b": cut}, sources={}, baseline="a").to_frame()
    assert few.values is not None
    draws = few.values - draws_of(first, "trace")[:9]
    assert frame[frame["metric"] == "trace"]["difference_uncertainty"].iloc[1] == pytest.approx(
        float(draws.std() / 3), rel=1e-12
    )
    alone_ = results.Comparison(measurements={"a": first, "b": cut}, sources={}, baseline="gone").to_frame()
    assert alone_["difference"].isna().all()


# --- failures


def test_one_that_fails_is_named_and_left_out(run: Path) -> None:
    (run / "net-9.pt").write_bytes(b"\x1f\x8b123")
    with pytest.warns(UserWarning, match=r"compare: run-net-9 failed and is left out: ValueError: .*is a gzip file"):
        result = compared([run], metrics=("loss",))
    assert list(result) == ["run-net-2", "run-net-10"]
    assert list(result.failures) == ["run-net-9"]
    assert result.failures["run-net-9"].startswith("ValueError: ")
    assert "\n" not in result.failures["run-net-9"]


def test_whatever_a_loss_raises_concerns_one_checkpoint() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if float(next(model.parameters()).detach().flatten()[0]) == 7.0:
            raise ZeroDivisionError("seven")
        return F.cross_entropy(model(batch["x"]), batch["y"])

    bad = network(1)
    with torch.no_grad():
        next(bad.parameters()).view(-1)[0] = 7.0
    with pytest.warns(UserWarning, match=r"b failed and is left out: .*seven"):
        result = ma.compare(
            {"a": network(1), "b": bad, "c": network(2)}, None, loss, {"x": X, "y": Y}, metrics=("loss",)
        )
    assert list(result) == ["a", "c"]


def test_if_the_first_fails_the_next_is_the_baseline(run: Path) -> None:
    (run / "net-2.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"is empty"):
        result = compared([run], metrics=("trace",))
    assert result.baseline == "run-net-9"
    assert set(result.to_frame().query("label == 'run-net-9'")["difference"]) == {0.0}


def test_all_that_fail(run: Path) -> None:
    for path in run.glob("*.pt"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="failed and is left out"),
        pytest.raises(ValueError, match=r"all 3 checkpoints failed; run-net-2: ValueError: .*is empty"),
    ):
        compared([run])


def test_the_only_one_raises_what_it_raised(run: Path) -> None:
    (run / "net-2.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"net-2\.pt is empty"):
        compared([run / "net-2.pt"])


# --- what is kept


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Stop(BaseException):
    """An interrupt."""


def interrupted(after: int, patch: pytest.MonkeyPatch, out: Path, run: Path) -> None:
    """Compare, and stop before the metric of this number is kept."""
    original, calls = Kept.keep, iter(range(10**6))

    def keep(self: Kept, name: str, part: results.Measurement) -> None:
        if next(calls) == after:
            raise Stop
        original(self, name, part)

    with patch.context() as inner:
        inner.setattr(Kept, "keep", keep)
        with pytest.raises(Stop):
            compared([run], out=out)


@pytest.mark.parametrize("after", range(9))
def test_a_stop_at_any_metric_ends_with_the_same_bytes(
    after: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compared([run], out=tmp_path / "whole")
    interrupted(after, monkeypatch, tmp_path / "again", run)
    kept = files(tmp_path / "again") if after else {}
    told: list[tuple[str, str]] = []
    result = compared([run], out=tmp_path / "again", tick=lambda *one: told.append(one))
    assert len(told) == 9 - after, "what is kept is not measured again"
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    assert {name for name in kept if name.endswith("safetensors")} <= set(files(tmp_path / "again"))
    check_same(result, whole)


@pytest.mark.parametrize("harm", ["a word", "no rows", "a list", "no result"])
def test_a_kept_metric_that_is_damaged_is_measured_again(harm: str, run: Path, tmp_path: Path) -> None:
    compared([run], out=tmp_path / "whole")
    compared([run], out=tmp_path / "again")
    record = next((tmp_path / "again").rglob("record.json"))
    content = json.loads(record.read_text(encoding="utf-8"))
    part = content["metrics"]["trace"]
    if harm == "a word":
        part["rows"][0]["value"] = "high"
    elif harm == "no rows":
        part["rows"] = []
    elif harm == "a list":
        content["metrics"]["trace"] = [1]
    else:
        part["results"] = ["trace/../.."]
    record.write_text(json.dumps(content), encoding="utf-8")
    told: list[tuple[str, str]] = []
    compared([run], out=tmp_path / "again", tick=lambda *one: told.append(one))
    assert [name for _, name in told] == ["trace"]


def test_a_stop_while_a_file_is_written(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a result and its rows: the result is measured again."""
    compared([run], out=tmp_path / "whole")

    def stop(*_: Any, **__: Any) -> Iterator[Path]:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["msam_analysis.checkpoints.comparing"], "write_json", stop)
        with pytest.raises(Stop):
            compared([run], out=tmp_path / "again")
    compared([run], out=tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "gone", "record", "list", "row"])
def test_what_is_damaged_is_measured_again(damage: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compared([run / "net-2.pt"], out=out)
    before = files(out)
    file, record = out / "run-net-2" / "trace.safetensors", out / "run-net-2" / "record.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "gone":
        file.unlink()
    elif damage == "row":
        record.write_text(record.read_text().replace('"rows"', '"lines"', 1))
    else:
        record.write_text({"record": "{", "list": "[]"}[damage])
    compared([run / "net-2.pt"], out=out)
    if damage in ("record", "list"):  # nobody knows of what: it stays, beside the new
        assert {name for name in files(out) if "run-net-2-2" in name}
        assert file.read_bytes() == before["run-net-2/trace.safetensors"]
    else:
        assert files(out) == before


@pytest.mark.parametrize("what", ["weights", "data", "seed", "radii", "loss", "samples", "dtype", "sigma"])
def test_nothing_kept_is_overwritten_by_something_else(what: str, run: Path, tmp_path: Path) -> None:
    out, metrics = tmp_path / "out", ("loss", "average", "ball")
    compared([run / "net-2.pt"], out=out, metrics=metrics)
    before = files(out)
    every: dict[str, dict[str, Any]] = {
        "data": {"data": [(X[:16], Y[:16])]},
        "seed": {"seed": 1},
        "radii": {"radii": (0.3,)},
        "samples": {"samples": 5},
        "dtype": {"dtype": torch.float32},
        "sigma": {"sigma": 0.02},
    }
    options = every.get(what, {})
    if what == "weights":
        torch.save({"model": network(77).state_dict(), "step": 2}, run / "net-2.pt")
    if what == "loss":
        result = ma.compare(
            [run / "net-2.pt"], network, nn.CrossEntropyLoss(label_smoothing=0.1), batches(), metrics=metrics, out=out
        )
    else:
        result = compared([run / "net-2.pt"], out=out, metrics=metrics, **options)
    assert {name: content for name, content in files(out).items() if name in before} == before
    assert result.sources["run-net-2"]["folder"] == "run-net-2-2"
    again = compared([run / "net-2.pt"], out=out, metrics=metrics, **options) if what != "loss" else result
    assert again.sources["run-net-2"]["folder"] == "run-net-2-2", "and is found again"


def test_more_metrics_join_those_that_are_kept(run: Path, tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    compared([run / "net-2.pt"], out=tmp_path, metrics=("loss", "trace"))
    result = compared([run / "net-2.pt"], out=tmp_path, metrics=CHEAP, tick=lambda *one: told.append(one))
    assert told == [("run-net-2", "average")]
    check_rows(result["run-net-2"].rows, alone(2).rows)


def test_names_of_folders_are_safe(tmp_path: Path) -> None:
    label = "../../a/b\\c:*? \n" + "x" * 300
    result = compared({label: network(1)}, out=tmp_path / "out", metrics=("loss",))
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == result.sources[label]["folder"]
    assert len(folder.name) <= 100
    compared({"...": network(1)}, out=tmp_path / "out", metrics=("loss",))
    assert (tmp_path / "out" / "checkpoint").is_dir()


# --- memory


def test_vectors_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    metrics = ("ball", "eigenvalues")
    for out in (None, tmp_path / "a"):
        found = compared({"a": network(1)}, metrics=metrics, out=out)["a"].results
        assert found["eigenvalues"].vectors.shape == (0, 5)  # type: ignore[attr-defined]
        assert found["ball-0.5"].displacement.shape == (0,)  # type: ignore[attr-defined]
    whole = compared({"a": network(1)}, metrics=metrics, vectors=True)["a"].results
    assert whole["eigenvalues"].vectors.shape == (26, 5)  # type: ignore[attr-defined]
    memory = compared({"a": network(1)}, metrics=metrics, vectors=True, out=tmp_path / "b")["a"].results
    assert memory["eigenvalues"].vectors.shape == (0, 5)  # type: ignore[attr-defined]
    kept = results.load(tmp_path / "b" / "a" / "eigenvalues.safetensors")
    check_same(kept, whole["eigenvalues"])


def test_one_model_at_a_time_and_the_data_once(run: Path) -> None:
    """When a model is built, those before it are gone; every objective has the batches of the first."""
    alive: list[weakref.ref[nn.Module]] = []
    counts: list[int] = []

    def factory() -> nn.Module:
        gc.collect()
        counts.append(sum(one() is not None for one in alive))
        model = network(0)
        alive.append(weakref.ref(model))
        return model

    reads: list[int] = []

    class Read:
        """Batches that count how often they are read."""

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            reads.append(len(alive))
            return iter(batches())

    ma.compare([run], factory, F.cross_entropy, Read(), metrics=("loss", "eigenvalues"))
    assert counts == [0, 0, 0]
    assert set(reads) == {1}, "read for the first model, and never again"


def test_a_budget_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In equal parts of what is left."""
    given: list[float] = []
    clock = iter([0.0, 0.0, 10.0, 60.0])
    module: Any = sys.modules["msam_analysis.checkpoints.comparing"]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def measure(*_: Any, budget: float, **__: Any) -> results.Measurement:
        given.append(budget)
        return found

    found = alone(1, metrics=("loss",))
    monkeypatch.setattr(module, "measure", measure)
    compared({label: network(1) for label in "abc"}, budget=90.0)
    assert given == [30.0, 40.0, 30.0]


def test_what_a_budget_cut_is_said_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each metric with the number of checkpoints; without one where it is all of them."""
    module: Any = sys.modules["msam_analysis.checkpoints.comparing"]
    said = iter([{"cut": "trace", "not measured": "ball, eigenvalues"}, {"not measured": "ball"}, {"cut": "trace"}])

    def measure(*_: Any, **__: Any) -> results.Measurement:
        return dataclasses.replace(found, settings={**found.settings, **next(said)})

    found = alone(1, metrics=("loss",))
    monkeypatch.setattr(module, "measure", measure)
    settings = compared({label: network(1) for label in "abc"}).settings
    assert settings["cut"] == "trace (2 of 3)"
    assert settings["not measured"] == "ball (2 of 3), eigenvalues (1 of 3)"
    said = iter(2 * [{"cut": "trace"}])
    assert compared({label: network(1) for label in "ab"}).settings["cut"] == "trace"
