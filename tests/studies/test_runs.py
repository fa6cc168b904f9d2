"""Runs by value: what two exhibits need is trained once."""

from __future__ import annotations

import dataclasses
import pickle
import types
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msam import Perturbation, normalization_layers
from msam_analysis.studies import measuring, runs
from msam_analysis.studies.exhibits import EXHIBITS
from msam_analysis.studies.runs import Run, gather, place, variant
from msam_analysis.studies.study import make_run
from msam_analysis.studies.watching import WATCHES, Scene, watch

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


def test_a_place_tells_probes_and_protocols_apart(tmp_path: Path) -> None:
    plain = Run(TOY, "MSAM", 0)
    watched = dataclasses.replace(plain, watched=frozenset({"rise"}))
    measured = dataclasses.replace(plain, measured=frozenset({"balls"}))
    finer = dataclasses.replace(COARSE, line_points=7)
    places = [
        place(run, tmp_path, protocol, every).directory
        for run, protocol, every in [
            (plain, COARSE, 4),
            (watched, COARSE, 4),
            (watched, COARSE, 3),
            (measured, COARSE, 4),
            (measured, finer, 4),
        ]
    ]
    assert len(set(places)) == len(places)
    assert place(plain, tmp_path, finer, 4).directory == places[0], "a protocol counts where something is measured"


def test_costs_add_up(tmp_path: Path) -> None:
    plain = Run(TOY, "MSAM", 0)
    assert place(plain, tmp_path, COARSE, 4).cost == STEPS
    watched = dataclasses.replace(plain, watched=frozenset({"rise"}))
    assert place(watched, tmp_path, COARSE, 4).cost > STEPS
    measured = dataclasses.replace(plain, measured=frozenset({"balls"}))
    assert place(measured, tmp_path, COARSE, 4).cost > STEPS


def test_settings_are_columns() -> None:
    settings = Run(
        variant(TOY, "MSAM", Perturbation(direction="momentum", rho=0.3, sign=-1), lr=0.2), "MSAM", 0
    ).settings
    assert settings.items() >= {"workload": "toy", "lr": 0.2, "rho": 0.3, "sign": -1, "direction": "momentum"}.items()
    assert Run(TOY, "SGD", 0).settings.items() >= {"rho": 0.0, "direction": "none"}.items()


def test_unknown_probes() -> None:
    optimizer = TOY.optimizer("SGD", TOY.network())
    scene: Scene = None  # type: ignore[assignment]  # refused before it is looked at
    with pytest.raises(ValueError, match=r"unknown probe 'colour': expected some of .*'curvature'"):
        watch(optimizer, scene, ["colour"], 4)


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


def test_another_release_of_the_attack_is_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, attacked = (
        Run(TOY, "MSAM", 0, measured=frozenset(measured)) for measured in (["balls"], ["balls", "robustness"])
    )
    before = [place(run, tmp_path, COARSE, 4).directory for run in (plain, attacked)]
    monkeypatch.setattr(runs, "version", lambda _: "0.0")
    after = [place(run, tmp_path, COARSE, 4).directory for run in (plain, attacked)]
    assert before[0] == after[0]
    assert before[1] != after[1]

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(runs, "version", missing)
    assert place(attacked, tmp_path, COARSE, 4).directory not in (before[1], after[1])


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
    problem = dataclasses.replace(TOY, train=lambda: [(inputs, labels)], test=lambda: [(inputs, labels)])
    found = []
    for channel, border in ((0, 0.5), (1, 18.0)):
        trained: Any = types.SimpleNamespace(model=OneChannel(channel, border))
        objective: Any = None
        measured: Any = measuring.MEASURES["robustness"].of(measuring.Trainee(problem, trained, objective), COARSE)
        found.append({name: result.accuracies.tolist() for name, result in measured.items()})
    for attack in ("fgsm", "pgd"):
        ours = found[0][f"robustness-{attack}"]
        assert ours == pytest.approx(found[1][f"robustness-{attack}"], abs=0.011)
        assert ours[0] > 0.9 > ours[-1] + 0.2


@pytest.mark.parametrize("measured", [(), ("eigenvalues", "features")])
def test_a_progress_bar_ends_at_its_end(measured: tuple[str, ...], tmp_path: Path) -> None:
    run = Run(TOY, "SAM", 0, watched=frozenset({"rise", "held_out"}), measured=frozenset(measured))
    task = place(run, tmp_path, COARSE, 4)
    ticks: list[float] = []
    make_run(task, ticks.append)
    assert sum(ticks) == pytest.approx(task.cost)
