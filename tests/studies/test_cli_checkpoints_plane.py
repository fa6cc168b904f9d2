"""``msam-analysis landscape --directions pca`` on the checkpoints of a training themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import msam_analysis as ma
from msam_analysis import results

from .bench import CHECKPOINT, MODULE, Command, contents, objective

FACTORIES = ("--model", f"{MODULE}:model", "--data", f"{MODULE}:data", "--quiet", "--out", "out")


@pytest.fixture
def training(bench: Path) -> Path:
    """Checkpoints of steps 2, 4, ..., 10, whose names order wrongly as text."""
    model = objective().model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    (bench / "steps").mkdir()
    for step in range(1, 11):
        for x, y in objective().batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if step % 2 == 0:
            torch.save({"model": model.state_dict(), "step": step}, bench / "steps" / f"step={step}.pt")
    return bench


def points() -> torch.Tensor:
    """The weights of the checkpoints, in the order of their steps."""
    states = [torch.load(f"steps/step={step}.pt", weights_only=True)["model"] for step in (2, 4, 6, 8, 10)]
    names = [name for name, _ in objective().model.named_parameters()]
    return torch.stack([torch.cat([state[name].flatten() for name in names]) for state in states])


@pytest.mark.parametrize("given", ["steps", "steps/*.pt"])
def test_the_plane_of_checkpoints(given: str, training: Path, command: Command) -> None:
    """Through the last, spanned by the singular vectors of the differences; all lie on the picture."""
    outcome = command("landscape", given, *FACTORIES, "--directions", "pca", "--points", 5, "--formats", "png,csv")
    assert outcome.code == 0, outcome.err
    names = {path.name for path in Path("out").iterdir()}
    assert names == {"pca.safetensors", "pca.csv", "landscape.png", "surface.png", "trajectory-checkpoints.csv"}
    way = np.genfromtxt("out/trajectory-checkpoints.csv", delimiter=",", names=True)
    assert way["step"].tolist() == [2, 4, 6, 8, 10]
    differences = (points() - points()[-1]).double()
    _, singular, right = torch.linalg.svd(differences, full_matrices=False)
    expected = (differences @ right[:2].T).abs()
    np.testing.assert_allclose(np.abs(np.stack([way["x"], way["y"]], 1)), expected, atol=1e-4)
    plane = results.load("out/pca.safetensors")
    assert isinstance(plane, results.Slice2D)
    share = 100 * float(singular[0] ** 2 / singular.square().sum())
    assert plane.directions[0] == f"PCA 1 ({share:.1f} %)"
    last = ma.Objective(objective().model, nn.CrossEntropyLoss(), objective().batches, batchnorm="recalibrate")
    assert plane.center_loss == pytest.approx(float(last.loss(points()[-1])), rel=1e-5)
    assert float(plane.x[0]) <= way["x"].min() <= way["x"].max() <= float(plane.x[-1])


def test_steps_that_are_not_known_are_counted(training: Path, command: Command) -> None:
    for number, step in enumerate((2, 6, 10)):
        state = torch.load(f"steps/step={step}.pt", weights_only=True)["model"]
        torch.save(state, f"{'abc'[number]}.pt")
    outcome = command(
        "landscape", "a.pt", "b.pt", "c.pt", *FACTORIES, "--directions", "pca", "--points", 3, "--formats", "csv"
    )
    assert outcome.code == 0, outcome.err
    way = np.genfromtxt("out/trajectory-checkpoints.csv", delimiter=",", names=True)
    assert way["step"].tolist() == [0, 1, 2]


def test_what_a_killed_command_left_is_no_other_folder(bench: Path, command: Command) -> None:
    (bench / "out").mkdir()
    (bench / "out" / ".checkpoint.dt_vzn41.safetensors").write_text("half")
    assert command("landscape", CHECKPOINT, *FACTORIES, "--points", 3).code == 0
    assert "run-checkpoint.safetensors" in contents(bench / "out")


def test_labels_are_shown_as_they_are(bench: Path, command: Command) -> None:
    outcome = command("landscape", CHECKPOINT, *FACTORIES, "--points", 3, "--label", "a[/b]c")
    assert outcome.code == 0, outcome.err
    assert "a[/b]c" in outcome.out
