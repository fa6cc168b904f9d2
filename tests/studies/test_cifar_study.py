"""CIFAR-100 as a workload, from generated files and with a tiny network: what is trained on, measured and reported."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import typer
from torch import Tensor, nn

from msam_analysis.cli.entry import app
from msam_analysis.results import load
from msam_analysis.studies import cifar, cifar100, jobs
from msam_analysis.studies.augmentation import Augmentation, stream
from msam_analysis.studies.cifar import Checksum
from msam_analysis.studies.computing import Computing
from msam_analysis.studies.measuring import LINES
from msam_analysis.studies.networks import resnet50, wide_resnet
from msam_analysis.studies.store import LOCK
from msam_analysis.studies.study import Study, run_study
from msam_analysis.studies.training import Trained, train
from msam_analysis.studies.workloads import CIFAR100, Workload, workload

from .toy import COARSE

TRAIN, TEST = 60, 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with generated files."""
    folder = tmp_path_factory.mktemp("cifar")
    cifar.generate(folder, train=TRAIN, test=TEST)
    return folder


def network() -> nn.Module:
    """Return a network that sees little of an image."""
    convolution = nn.Conv2d(3, 6, 5, stride=4)
    return nn.Sequential(
        convolution, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 100)
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something smaller in place of WRN-16-4."""
    monkeypatch.setitem(cifar100.NETWORKS, "WRN-16-4", network)


def smaller(files: Path, **options: Any) -> Workload:
    settings: dict[str, Any] = {"data": files, "checksum": "any", "epochs": 2}
    found = workload("cifar100", **settings | options)
    return dataclasses.replace(found, recipe=dataclasses.replace(found.recipe, batch_size=25))


# --- the paper's set-up


@pytest.mark.parametrize(
    ("name", "network", "lr", "decay"),
    [
        ("cifar100", "WRN-16-4", 0.5, 5e-4),
        ("cifar100-wrn28-10", "WRN-28-10", 0.5, 5e-4),
        ("cifar100-resnet50", "ResNet-50", 0.1, 1e-3),
    ],
)
def test_the_papers_set_up(name: str, network: str, lr: float, decay: float, files: Path) -> None:
    found = workload(name, data=files, checksum="any")
    recipe = found.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay) == (200, 256, lr, decay)
    assert (recipe.schedule, recipe.label_smoothing, recipe.base) == ("cosine", 0.1, "sgd")
    assert found.network is cifar100.NETWORKS[network]
    assert network in found.description
    sam, msam = (found.perturbations[each] for each in ("SAM", "MSAM"))
    assert sam is not None
    assert msam is not None
    assert 0.2 <= float(sam.rho) <= 0.3  # type: ignore[arg-type]
    assert 2 <= float(msam.rho) <= 3  # type: ignore[arg-type]


def test_networks_have_a_hundred_classes() -> None:
    """WRN-16-4's parameters; the weights of the others would take seconds to draw."""
    assert sum(p.numel() for p in cifar100.NETWORKS["WRN-16-4"]().parameters()) == 2_772_020
    made = {name: (make.func, make.args) for name, make in cifar100.NETWORKS.items() if isinstance(make, partial)}
    assert made == {
        "WRN-16-4": (wide_resnet, (16, 4, 100)),
        "WRN-28-10": (wide_resnet, (28, 10, 100)),
        "ResNet-50": (resnet50, (100,)),
    }


# --- the data


class Spy(nn.Module):
    """A linear network that takes down what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 100)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen.append(x)
        out: Tensor = self.linear(x.flatten(1))
        return out


def test_training_sees_images_augmented_by_seed_epoch_and_batch(files: Path) -> None:
    """By hand, from the images that were read: the order is that of a generator with the seed."""
    spied = dataclasses.replace(smaller(files), network=Spy)
    model = train(spied, "SGD", 3, every=None).model
    assert isinstance(model, Spy)
    data = cifar.load(files, checksum="any").train
    pixels = data.images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    augment = Augmentation(tuple(mean.tolist()), tuple(std.tolist()))
    generator, seen = torch.Generator().manual_seed(3), iter(model.seen)
    for epoch in range(2):
        for batch, index in enumerate(torch.randperm(TRAIN, generator=generator).split(25)):
            expected = augment(data.images[index], stream(3, epoch, batch))
            torch.testing.assert_close(next(seen), expected, rtol=1e-5, atol=1e-5)
    assert next(seen, None) is None
    assert {len(batch) for batch in model.seen} == {25, 10}


def test_all_optimizers_see_the_same_images(files: Path) -> None:
    spied = dataclasses.replace(smaller(files), network=Spy)
    sgd, sam = (train(spied, name, 1, every=None).model for name in ("SGD", "SAM"))
    assert isinstance(sgd, Spy)
    assert isinstance(sam, Spy)
    assert all(torch.equal(a, b) for a, b in zip(sgd.seen, sam.seen[::2], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sam.seen[::2], sam.seen[1::2], strict=True)), "both passes"


def test_what_is_measured_is_standardised_and_not_augmented(files: Path) -> None:
    found = smaller(files)
    images = torch.cat([x for x, _ in found.train()]).double()
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    data = cifar.load(files, checksum="any")
    pixels = data.train.images.double() / 255
    shape, axes = (3, 1, 1), (0, 2, 3)
    mean, std = pixels.mean(axes).view(shape), pixels.std(axes, correction=0).view(shape)
    torch.testing.assert_close(images, (pixels - mean) / std, rtol=1e-5, atol=1e-5)
    tested = torch.cat([x for x, _ in found.test()]).double()
    torch.testing.assert_close(tested, (data.test.images.double() / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat([y for _, y in found.train()]), data.train.labels)
    assert torch.equal(torch.cat([y for _, y in found.test()]), data.test.labels)


def test_a_limit_takes_the_first_images(files: Path) -> None:
    found, data = smaller(files, limit=15), cifar.load(files, checksum="any")
    assert found.augmented is not None
    assert torch.equal(found.augmented().images, data.train.images[:15])
    assert [len(y) for _, y in found.train()] == [len(y) for _, y in found.test()] == [15]
    assert torch.equal(found.test()[0][1], data.test.labels[:15])


def test_departures_are_told(files: Path) -> None:
    unchecked = "files that were not checked to be the published CIFAR-100"
    assert workload("cifar100", data=files, checksum="any").departures == (unchecked,)
    few = "the first 30 training and 20 test images only"
    assert smaller(files, limit=30).departures == (unchecked, few, "2 epochs instead of 200")
    short = workload("digits", epochs=8)
    assert short.departures == ("8 epochs instead of 40, other problems in proportion",)
    recipes = {name: (one.recipe.epochs, one.recipe.warmup) for name, one in short.relatives.items()}
    assert recipes == {"perceptron": (8, 0), "transformer": (8, 1), "text": (3, 0), "table": (8, 0)}
    assert workload("digits", epochs=40).departures == workload("digits").departures == ()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no data": ({"data": None}, ValueError, r"the workload 'cifar100' needs its images: pass .* with --data"),
    "data gone": ({"data": Path("gone")}, FileNotFoundError, r"at gone, which does not exist"),
    "not the published": ({"checksum": "published"}, ValueError, r"expected 153,700,000 of the 50,000 published"),
    "unknown checksum": ({"checksum": "none"}, ValueError, r"expected checksum 'published' or 'any', got 'none'"),
    "no images": ({"limit": 0}, ValueError, r"expected a positive limit of images, got 0"),
    "no epochs": ({"epochs": 0}, ValueError, r"expected 1 or more epochs, got 0"),
    "unknown": ({"name": "imagenet"}, ValueError, r"expected one of \['digits', .*'cifar100', 'cifar100-wrn28-10'"),
    "digits with data": ({"name": "digits", "checksum": "published"}, ValueError, r"'digits' comes with its data"),
    "digits with a limit": ({"name": "digits", "data": None, "limit": 5}, ValueError, r"leave --data, --checksum and"),
    "digits unchecked": ({"name": "digits", "data": None}, ValueError, r"'digits' comes with its data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_workloads(case: str, files: Path) -> None:
    options, kind, message = BAD[case]
    settings: dict[str, Any] = {"name": "cifar100", "data": files, "checksum": "any"}
    if case == "digits with a limit":
        settings["checksum"] = "published"
    with pytest.raises(kind, match=message):
        workload(**settings | options)


# --- what decides a run


def augmented_otherwise(found: Workload) -> Workload:
    def other() -> cifar100.Augmented:
        assert found.augmented is not None
        data = found.augmented()
        return dataclasses.replace(data, augmentation=dataclasses.replace(data.augmentation, cutout=8))

    return dataclasses.replace(found, augmented=other)


def test_data_and_augmentation_decide_a_run_and_the_folder_does_not(files: Path, tmp_path: Path, tiny: None) -> None:
    original = smaller(files).fingerprint("SGD")
    shutil.copytree(files, tmp_path / "moved")
    assert smaller(tmp_path / "moved").fingerprint("SGD") == original
    others = [
        augmented_otherwise(smaller(files)),
        smaller(files, limit=50),
        dataclasses.replace(smaller(files), augmented=None),
    ]
    changed = next((tmp_path / "moved").rglob("train.bin"))
    content = bytearray(changed.read_bytes())
    content[100] ^= 1
    changed.write_bytes(content)
    cifar100.load.cache_clear()
    cifar100.train_data.cache_clear()
    others.append(smaller(tmp_path / "moved"))
    assert len({other.fingerprint("SGD") for other in others} | {original}) == len(others) + 1


# --- the whole study


def test_the_study_end_to_end(files: Path, tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, from the files to the report, which says how this is not the paper's."""
    small = dataclasses.replace(CIFAR100["cifar100"][1], batch_size=30)
    monkeypatch.setitem(CIFAR100, "cifar100", ("WRN-16-4", small))
    out = tmp_path / "out"
    asked: list[int | None] = []

    def spy(*arguments: Any, **options: Any) -> Trained:
        asked.append(options["computing"].save_every)
        return train(*arguments, **options)

    monkeypatch.setattr(jobs, "train", spy)
    page = study(files, out)
    assert asked == [10] * 4
    runs = pd.read_csv(out / "tables" / "runs.csv")
    assert list(runs["optimizer"]) == ["SGD", "NAG", "SAM", "MSAM"]
    assert list(runs["gradients_per_step"]) == [1, 1, 2, 1]
    assert runs.notna().all(axis=None)
    steps = pd.read_csv(out / "tables" / "steps.csv")
    assert len(steps) == 4 * 2
    assert set(steps.loc[steps["rise"].notna(), "step"]) == {0, 1}, "a run of less than 20 steps is recorded at each"
    names = set()
    for result in (out / "runs").glob("*/*/*.safetensors"):
        names.add(result.stem)
        assert dict(load(result).settings)["samples"] == 10
    lines = {f"line-{direction}" for direction in LINES}
    assert names == {"lanczos", "power", "ball-0.05", "ball-0.5", "plane", *lines}, "what T1 needs and no more"
    text = page.with_suffix(".md").read_text()
    assert "Not the paper's set-up: files that were not checked to be the published CIFAR-100; 1 epoch instead" in text
    assert text.count("Not the paper's set-up") == 2, "in the summary and where the set-up is told"
    for words in ("10 of the training samples", "in bfloat16", "without augmentation", "line points 5 instead of 41"):
        assert words in text
    assert "wrong labels" not in text.split("What was run")[1].split("##")[0]
    assert [path.name for path in out.rglob(".*")] == [LOCK], "no state is left of a finished run"


def study(files: Path, out: Path, checksum: Checksum = "any") -> Path:
    return run_study(
        "cifar100",
        data=files,
        checksum=checksum,
        epochs=1,
        seeds=1,
        out=out,
        exhibits=["T1"],
        protocol=dataclasses.replace(COARSE, samples=10),
        computing=Computing(amp="bfloat16"),
        jobs=1,
        progress=False,
    )


def test_records_are_a_twentieth_of_a_run_apart() -> None:
    """Every 32 steps of the digits, two epochs."""
    pytest.importorskip("sklearn")
    assert [Study(workload("digits", epochs=epochs), ()).every for epochs in (None, 10)] == [32, 8]


PAGE = Path(__file__).parents[2] / "docs" / "paper_scale.md"


def test_the_page_names_options_that_there_are() -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, typer.core.TyperGroup)
    known = {option for parameter in command.commands["study"].params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE.read_text()))
    assert named - {"--nproc-per-node"} <= known
    assert {"--data", "--checksum", "--limit", "--epochs", "--samples", "--amp", "--save-every", "--coarse"} <= named


def test_nothing_is_begun_without_the_data(tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: study(tmp_path / "gone", tmp_path / "out"),
        lambda: run_study("cifar100", out=tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises((ValueError, FileNotFoundError), match=r"expected cifar-100-binary|needs its images"):
            call()
    assert list(tmp_path.iterdir()) == []
