"""Runs by value: what two exhibits need is trained once."""

from __future__ import annotations

import dataclasses
import pickle
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msam import Perturbation, normalization_layers
from msam_analysis.studies import measuring, store
from msam_analysis.studies.exhibits import EXHIBITS
from msam_analysis.studies.jobs import Job, job
from msam_analysis.studies.measuring import MEASURES, Protocol, Subject
from msam_analysis.studies.runs import Run, gather, variant
from msam_analysis.studies.training import train
from msam_analysis.studies.watching import WATCHES

from .toy import COARSE, STEPS, TOY

MSAM = TOY.perturbations["MSAM"]


def test_a_variant_without_a_change_is_the_same_network() -> None:
    assert Run(variant(TOY, "MSAM", MSAM), "MSAM", 0).identity == Run(TOY, "MSAM", 0).identity


@pytest.mark.parametrize(
    "other",
    [
        Run(TOY, "MSAM", 1),
        Run(TOY, "SAM", 0),
        Run(TOY, "MSAM", 0, replacement=True),
        Run(variant(TOY, "MSAM", MSAM, lr=0.05), "MSAM", 0),
        Run(variant(TOY, "MSAM", Perturbation(direction="momentum", rho=0.4)), "MSAM", 0),
        Run(variant(TOY, "MSAM", Perturbation(direction="momentum", rho=0.3, sign=-1)), "MSAM", 0),
    ],
)
def test_another_setting_is_another_network(other: Run) -> None:
    assert other.identity != Run(TOY, "MSAM", 0).identity


def test_what_is_wanted_of_one_network_adds_up() -> None:
    one = Run(TOY, "MSAM", 0, watched=frozenset({"rise"}))
    two = Run(variant(TOY, "MSAM", MSAM), "MSAM", 0, watched=frozenset({"curvature"}), measured=frozenset({"balls"}))
    (run,) = gather([one, two]).values()
    assert (set(run.watched), set(run.measured)) == ({"rise", "curvature"}, {"balls"})
    assert list(gather([two, Run(TOY, "SGD", 0), one])) == [one.identity, Run(TOY, "SGD", 0).identity]


def test_what_decides_a_network_a_record_and_a_measure(tmp_path: Path) -> None:
    """A network is one, whatever is wanted of it; records and measures have names of their own inside."""
    wanted = Run(TOY, "MSAM", 0, watched=frozenset({"rise", "curvature"}), measured=frozenset({"balls", "slices"}))
    one = job(wanted, tmp_path, COARSE, 4)
    assert one.directory == job(Run(TOY, "MSAM", 0), tmp_path, COARSE, 3).directory
    finer, fewer = dataclasses.replace(COARSE, line_points=7), dataclasses.replace(COARSE, samples=7)

    def changed(other: Job) -> set[str]:
        assert other.directory == one.directory
        mine, its = {**one.watched, **one.measured}, {**other.watched, **other.measured}
        return {name for name in mine if mine[name] != its[name]}

    assert changed(job(wanted, tmp_path, COARSE, 3)) == {"rise", "curvature"}
    assert changed(job(wanted, tmp_path, finer, 4)) == {"slices"}
    assert changed(job(wanted, tmp_path, fewer, 4)) == {"curvature", "balls", "slices"}


def test_a_raised_version_is_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Run(TOY, "MSAM", 0, watched=frozenset({"rise"}), measured=frozenset({"balls"}))
    before = job(wanted, tmp_path, COARSE, 4)
    with monkeypatch.context() as patch:
        patch.setitem(WATCHES, "rise", WATCHES["rise"]._replace(version=99))
        patch.setitem(MEASURES, "balls", MEASURES["balls"]._replace(version=99))
        inside = job(wanted, tmp_path, COARSE, 4)
    assert inside.directory == before.directory
    assert inside.watched["rise"] != before.watched["rise"]
    assert inside.measured["balls"] != before.measured["balls"]
    monkeypatch.setattr("msam_analysis.studies.training.VERSION", 99)
    assert job(wanted, tmp_path, COARSE, 4).directory != before.directory


def test_a_probe_of_another_perturbation_is_named_after_it(tmp_path: Path) -> None:
    other = dataclasses.replace(
        TOY, perturbations={**TOY.perturbations, "SAM": Perturbation(direction="gradient", rho=0.2)}
    )
    jobs = [
        job(Run(one, "MSAM", 0, watched=frozenset({"rise", "sam_angle"})), tmp_path, COARSE, 4) for one in (TOY, other)
    ]
    assert jobs[0].directory == jobs[1].directory
    assert jobs[0].watched["rise"] == jobs[1].watched["rise"]
    assert jobs[0].watched["sam_angle"] != jobs[1].watched["sam_angle"]


def test_costs_add_up(tmp_path: Path) -> None:
    plain = Run(TOY, "MSAM", 0)
    assert job(plain, tmp_path, COARSE, 4).cost == STEPS
    watched = dataclasses.replace(plain, watched=frozenset({"rise"}))
    assert job(watched, tmp_path, COARSE, 4).cost > STEPS
    measured = dataclasses.replace(plain, measured=frozenset({"balls"}))
    assert job(measured, tmp_path, COARSE, 4).cost > STEPS


def test_settings_are_columns() -> None:
    settings = Run(
        variant(TOY, "MSAM", Perturbation(direction="momentum", rho=0.3, sign=-1), lr=0.2), "MSAM", 0
    ).settings
    assert settings.items() >= {"workload": "toy", "lr": 0.2, "rho": 0.3, "sign": -1, "direction": "momentum"}.items()
    assert Run(TOY, "SGD", 0).settings.items() >= {"rho": 0.0, "direction": "none"}.items()


def test_unknown_probes_and_measures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown probe 'colour': expected some of .*'curvature'"):
        train(TOY, "SGD", 0, watched=["colour"])
    colour = frozenset({"colour"})
    for run in (Run(TOY, "SGD", 0, watched=colour), Run(TOY, "SGD", 0, measured=colour)):
        with pytest.raises(ValueError, match=r"unknown probe or measure 'colour': expected some of .*'curvature'"):
            job(run, tmp_path, COARSE, 4)


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_runs_of_every_exhibit(exhibit: object) -> None:
    """They can be sent to a worker process, ask for probes that there are, and are told apart by their settings."""
    runs = next(e for e in EXHIBITS if e is exhibit).runs(TOY, 2)
    assert all(run.watched <= WATCHES.keys() for run in runs)
    identities = [run.identity for run in runs]
    assert len(set(identities)) == len(identities), "no network is asked for twice by one exhibit"
    assert [run.identity for run in pickle.loads(pickle.dumps(runs))] == identities  # noqa: S301 - our own bytes


def test_filters_travel() -> None:
    """A subset of the parameters is known by names, in this process and in a worker."""
    subset = normalization_layers(TOY.network())
    run = Run(variant(TOY, "MSAM", Perturbation(direction="momentum", rho=0.3, subset=subset)), "MSAM", 0)
    assert pickle.loads(pickle.dumps(run)).identity == run.identity  # noqa: S301 - our own bytes
    assert run.settings["subset"] == "some"


def test_another_release_of_the_attack_is_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked = Run(TOY, "MSAM", 0, measured=frozenset({"balls", "robustness"}))
    found = [job(attacked, tmp_path, COARSE, 4)]
    monkeypatch.setattr(measuring, "version", lambda _: "0.0")
    found.append(job(attacked, tmp_path, COARSE, 4))

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(measuring, "version", missing)
    found.append(job(attacked, tmp_path, COARSE, 4))
    assert len({one.measured["robustness"] for one in found}) == 3
    assert len({(one.directory, one.measured["balls"]) for one in found}) == 1


def test_another_torch_makes_no_run_of_this_one(tmp_path: Path) -> None:
    other = dataclasses.replace(job(Run(TOY, "SGD", 0), tmp_path, COARSE, 4), torch="0.0")
    with pytest.raises(RuntimeError, match=r"expected torch 0\.0 in every process, got .* here: install the same"):
        other.make(lambda _: None)


class OneChannel(nn.Module):
    """Class 1 where the mean of one channel is above a border."""

    def __init__(self, channel: int, border: float) -> None:
        super().__init__()
        self.channel, self.border = channel, nn.Parameter(torch.tensor(border))

    def forward(self, x: Tensor) -> Tensor:
        margin = x[:, self.channel].mean(dim=(1, 2)) - self.border
        return torch.stack([-margin, margin], dim=1)


def test_a_disturbance_is_a_share_of_the_range_of_its_own_channel() -> None:
    """Two channels hold the same picture, one of them stretched and moved: both networks are disturbed alike."""
    shares = torch.rand(400, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    shares[0], shares[1] = 0.0, 1.0
    inputs = torch.cat([shares, 50.0 * shares - 7.0], dim=1)
    labels = (shares.mean(dim=(1, 2, 3)) > 0.5).long()
    workload = dataclasses.replace(TOY, train=lambda: [(inputs, labels)], test=lambda: [(inputs, labels)])
    found = []
    for channel, border in ((0, 0.5), (1, 18.0)):
        optimizer: Any = None
        subject = Subject(workload, OneChannel(channel, border), optimizer)
        measured: Any = MEASURES["robustness"].of(subject, COARSE)
        found.append({name: result.accuracies.tolist() for name, result in measured.items()})
    for attack in ("fgsm", "pgd"):
        ours = found[0][f"robustness-{attack}"]
        assert ours == pytest.approx(found[1][f"robustness-{attack}"], abs=0.011)
        assert ours[0] > 0.9 > ours[-1] + 0.2


@pytest.mark.parametrize("measured", [(), ("eigenvalues", "features")])
def test_a_progress_bar_ends_at_its_end(measured: tuple[str, ...], tmp_path: Path) -> None:
    """Also where a part is there already."""
    run = Run(TOY, "SAM", 0, watched=frozenset({"rise", "held_out"}), measured=frozenset(measured))
    for one in (job(run, tmp_path, COARSE, 4), job(run, tmp_path, COARSE, 4)):
        ticks: list[float] = []
        one.make(ticks.append)
        assert sum(ticks) == pytest.approx(one.cost)


# --- what is there counts


def made(run: Run, folder: Path, protocol: Protocol = COARSE) -> Job:
    one = job(run, folder, protocol, 4)
    one.make(lambda _: None)
    assert one.finished
    return one


def test_what_is_missing_is_added_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measure is added without training, a record with it, and both stay; less than what is there is there."""
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))

    def trained() -> int:
        return len(log.read_text().splitlines())

    plain = Run(TOY, "MSAM", 0, watched=frozenset({"rise"}), measured=frozenset({"features"}))
    first = made(plain, tmp_path / "runs")
    before = {path.name: path.stat().st_mtime_ns for path in first.directory.rglob("*")}
    second = made(dataclasses.replace(plain, measured=frozenset({"eigenvalues"})), tmp_path / "runs")
    assert trained() == 1
    third = made(dataclasses.replace(plain, watched=frozenset({"rise", "along_momentum"})), tmp_path / "runs")
    assert trained() == 2
    assert {path.name: path.stat().st_mtime_ns for path in first.directory.rglob("*")}.items() >= {
        name: stamp for name, stamp in before.items() if not name.startswith("rise")
    }.items(), "the same network: it stays"
    assert all(one.finished for one in (first, second, third))
    assert list(first.read().results) == ["features"]
    assert list(second.read().results) == ["lanczos", "power"]
    assert "loss_along/1" not in first.read().steps
    assert "loss_along/1" in third.read().steps
    whole = train(TOY, "MSAM", 0, every=4, watched=["along_momentum", "rise"]).steps
    assert third.read().steps.equals(whole), "as if it had been wanted at once"


def test_another_machine_s_network_is_replaced_with_all_that_is_known_of_it(tmp_path: Path) -> None:
    plain = Run(TOY, "MSAM", 0, measured=frozenset({"features"}))
    first = made(plain, tmp_path)
    saved = torch.load(first.directory / "checkpoint.pt", weights_only=True)
    saved["model"]["1.weight"][0, 0] += 1e-6
    torch.save(saved, first.directory / "checkpoint.pt")
    again = job(dataclasses.replace(plain, watched=frozenset({"rise"})), tmp_path, COARSE, 4)
    assert not again.trained
    again.make(lambda _: None)
    assert again.finished
    assert {path.name for path in again.directory.iterdir()} == {
        *("checkpoint.pt", "scores.json", "steps.csv"),
        *again.watched.values(),
        *again.measured.values(),
    }


def test_measured_from_the_file_is_measured(tmp_path: Path) -> None:
    """Weights, statistics and momentum come back to the bit: the numbers are those of the network just trained."""
    one = made(Run(TOY, "MSAM", 0, measured=frozenset({"slices"})), tmp_path)
    trained = train(TOY, "MSAM", 0, every=None)
    expected = MEASURES["slices"].of(Subject(TOY, trained.model, trained.optimizer), COARSE)
    for name, result in one.read().results.items():
        assert result.to_frame().equals(expected[name].to_frame()), name


@pytest.mark.filterwarnings("ignore::msam_analysis.results.ConvergenceWarning")
@pytest.mark.parametrize("name", [name for name in MEASURES if name != "robustness"])
def test_a_measure_reads_the_settings_that_name_it(name: str) -> None:
    """What it reads of the protocol, and no other, is part of its identity."""
    read: set[str] = set()

    class Spy:
        def __getattr__(self, field: str) -> object:
            read.add(field)
            return getattr(COARSE, field)

    trained, spy = train(TOY, "MSAM", 0, every=None), Spy()
    MEASURES[name].of(Subject(TOY, trained.model, trained.optimizer), spy)  # type: ignore[arg-type]
    assert read | {"samples"} == set(MEASURES[name].settings)


def test_a_name_is_that_of_the_content(tmp_path: Path) -> None:
    folder = tmp_path / "balls-0"
    assert not store.is_measured(folder)
    store.write_measured(folder, made(Run(TOY, "SGD", 0, measured=frozenset({"features"})), tmp_path).read().results)
    assert store.is_measured(folder)
    (folder / "features.safetensors").unlink()
    assert not store.is_measured(folder)
