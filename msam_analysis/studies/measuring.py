"""What is measured on a trained network, by name."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from msam import PerturbedOptimizer
from msam_analysis.landscape import directions, slice_1d, slice_2d
from msam_analysis.measures.ball import ball_sharpness
from msam_analysis.measures.features import feature_rank
from msam_analysis.measures.robustness import Attack, robust_accuracy
from msam_analysis.objective.objective import Objective
from msam_analysis.results import Result
from msam_analysis.results.fingerprint import fingerprint
from msam_analysis.spectra.top import top_eigenvalues
from msam_analysis.studies.training import some
from msam_analysis.studies.workloads import Workload


@dataclass(frozen=True)
class Protocol:
    """What is measured after training, and how finely.

    Attributes
    ----------
    eigenvalues
        Number from the top (TA1: five).
    power_tolerance
        Relative residual of power iteration, whose last digits are dear; Lanczos uses its default.
    radii
        Ball radii, increasing; each ascent also starts from the answer for the radius before.
    ball_iterations
        Gradients of the final ascent in each ball.
    unit_radius, filter_radius, line_points
        1-D slices: along the unit-length gradient and momentum, and along filter-normalised random directions.
    plane_radius, plane_points, plane_refine
        2-D slices in filter-normalised random directions; of the points only those that are needed for this error, as a
        fraction of the loss's range, are computed (``None``: all).
    random_seed
        Of the random directions; the same for all networks, each normalised by its own filters.
    samples
        Training samples whose mean loss is measured, and watched: a fixed random part, the same for all networks, see
        :func:`~msam_analysis.studies.training.some`. ``None`` (default) for all, in a study for the workload's number.
    """

    eigenvalues: int = 5
    power_tolerance: float = 1e-3
    radii: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0, 2.0)
    ball_iterations: int = 60
    unit_radius: float = 3.0
    filter_radius: float = 1.0
    line_points: int = 41
    plane_radius: float = 1.0
    plane_points: int = 51
    plane_refine: float | None = 0.01
    random_seed: int = 0
    samples: int | None = None


COARSE = Protocol(
    eigenvalues=2,
    power_tolerance=0.1,
    radii=(0.05, 0.5),
    ball_iterations=5,
    line_points=5,
    plane_points=3,
    plane_refine=None,
)
"""A first look, which shows that everything works and not what it comes to."""

LINES = ("gradient", "momentum", "random")


def error_rate(output: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of wrong predictions, ``mean(argmax(output) != target)``."""
    return (output.argmax(dim=1) != target).double().mean()


def scores(workload: Workload, model: nn.Module) -> dict[str, float]:
    """Return train and test loss (nats) and accuracy (fraction) of a network; training labels as trained on."""
    criterion = workload.criterion()
    measured: dict[str, float] = {}
    for name, batches in (("train", workload.train()), ("test", workload.test())):
        measured[f"{name}_loss"] = float(Objective(model, criterion, batches).loss())
        measured[f"{name}_accuracy"] = 1.0 - float(Objective(model, error_rate, batches).loss())
    return measured


@dataclass(frozen=True)
class Subject:
    """A trained network with its data and the optimizer that trained it, in eval mode; ``samples`` as in a protocol."""

    workload: Workload
    model: nn.Module
    optimizer: PerturbedOptimizer
    samples: int | None = None

    @functools.cached_property
    def objective(self) -> Objective:
        """The training loss at the true weights, with the running BatchNorm statistics and without augmentation."""
        return Objective(self.model, self.workload.criterion(), some(self.workload.train(), self.samples))


def _eigenvalues(subject: Subject, protocol: Protocol) -> dict[str, Result]:
    k, tolerance = protocol.eigenvalues, protocol.power_tolerance
    return {
        "lanczos": top_eigenvalues(subject.objective, k),
        "power": top_eigenvalues(subject.objective, k, method="power", tolerance=tolerance),
    }


def _balls(subject: Subject, protocol: Protocol) -> dict[str, Result]:
    results: dict[str, Result] = {}
    starts: tuple[Any, ...] = ("gradient", "eigenvector")
    iterations = protocol.ball_iterations
    for radius in protocol.radii:
        ball = ball_sharpness(subject.objective, radius, starts=starts, iterations=iterations, tolerance=1e-4)
        results[f"ball-{radius:g}"] = ball
        starts = ("gradient", "eigenvector", ball.displacement)
    return results


def _slices(subject: Subject, protocol: Protocol) -> dict[str, Result]:
    objective = subject.objective
    lines = {
        "gradient": directions.gradient(objective, normalize="l2"),
        "momentum": directions.momentum(subject.optimizer, objective, normalize="l2"),
        "random": directions.random(objective, protocol.random_seed),
    }
    results: dict[str, Result] = {}
    # The members of a process group share runs, and not the points of one.
    for name in LINES:
        radius = protocol.filter_radius if name == "random" else protocol.unit_radius
        results[f"line-{name}"] = slice_1d(objective, lines[name], radius, protocol.line_points, distributed=False)
    plane = (lines["random"], directions.random(objective, protocol.random_seed + 1))
    results["plane"] = slice_2d(
        objective, plane, protocol.plane_radius, protocol.plane_points, refine=protocol.plane_refine, distributed=False
    )
    return results


def _features(subject: Subject, protocol: Protocol) -> dict[str, Result]:
    model, data = subject.model, some(subject.workload.train(), protocol.samples)
    return {"features": feature_rank(model, data, layer=last_block(model))}


def last_block(model: nn.Module) -> str:
    """Return the layer before pooling: ``features``, or what comes before pooling, flattening, or the last layer."""
    names = [name for name, _ in model.named_children()]
    if "features" in names:
        return "features"
    ends = [name for name, layer in model.named_children() if isinstance(layer, nn.AdaptiveAvgPool2d | nn.Flatten)]
    return names[names.index(ends[0] if ends else names[-1]) - 1]


class _FromShares(nn.Module):
    """A network for inputs as shares of the range that the training inputs have, channel by channel."""

    def __init__(self, network: nn.Module, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.network = network
        self.low, self.span = nn.Buffer(low), nn.Buffer(high - low)

    def forward(self, shares: Tensor) -> Tensor:
        outputs: Tensor = self.network(self.low + shares * self.span)
        return outputs


def _robustness(subject: Subject, _: Protocol) -> dict[str, Result]:
    # Pixels of 0 to 1 again, whatever standardised them: a share is the same change of any channel.
    inputs = torch.cat([batch for batch, _ in subject.workload.train()])
    dims = [dim for dim in range(inputs.ndim) if inputs.ndim < 3 or dim != 1]
    low, high = inputs.amin(dims, keepdim=True)[0], inputs.amax(dims, keepdim=True)[0]
    device = next(subject.model.parameters()).device
    model = _FromShares(subject.model, low, high).to(device)
    test = [((batch - low) / (high - low), labels) for batch, labels in subject.workload.test()]
    results: dict[str, Result] = {}
    for attack, shares in DISTURBANCES.items():
        bounds = None if attack == "noise" else (0.0, 1.0)
        results[f"robustness-{attack}"] = robust_accuracy(model, test, attack, shares, bounds=bounds)
    return results


def _top_of_some(subject: Subject, _: Protocol) -> dict[str, Result]:
    first = torch.arange(min(SOME, subject.objective.samples))
    return {"lambda1": top_eigenvalues(subject.objective.with_samples(first), 1, tolerance=1e-2)}


DISTURBANCES: Mapping[Attack, tuple[float, ...]] = {
    "noise": (0.1, 0.2, 0.4),
    "fgsm": (1 / 255, 8 / 255, 32 / 255),
    "pgd": (1 / 255, 8 / 255, 32 / 255),
    "apgd": (1 / 255, 8 / 255, 32 / 255),
}
"""Sizes of disturbances of the test inputs, as shares of the range of the training inputs' values."""

SOME = 256
"""Training samples, the first ones, whose loss the cheap largest eigenvalue is of."""


class Measure(NamedTuple):
    """A part of the measurements.

    ``of``: Measures a network, as finely as the protocol says: results by name.
    ``settings``: The fields of the protocol that it reads.
    ``version``: Raised by hand when the numbers of the measure change: it is then measured anew on every network.
    ``cost``: Rough cost in training steps, of every radius if it reads them, for the progress bar alone.
    ``needs``: An optional package: the name to import and the name of the release.
    """

    of: Callable[[Subject, Protocol], dict[str, Result]]
    settings: tuple[str, ...]
    version: int = 1
    cost: float = 0.0
    needs: tuple[str, str] | None = None

    def price(self, protocol: Protocol) -> float:
        """Return the rough cost in training steps."""
        return self.cost * (len(protocol.radii) if "radii" in self.settings else 1)

    def identity(self, protocol: Protocol) -> str:
        """Return a hash of what decides the numbers, beside the network."""
        settings = {name: getattr(protocol, name) for name in self.settings}
        release = None
        if self.needs is not None:
            with suppress(PackageNotFoundError):
                release = version(self.needs[1])
        return fingerprint(self.version, settings, torch.__version__, release)

    def check(self) -> None:
        """Raise ``ModuleNotFoundError`` where the package that it needs is not installed."""
        if self.needs is not None and importlib.util.find_spec(self.needs[0]) is None:
            raise ModuleNotFoundError(
                f"a chosen exhibit needs {self.needs[1]}: install it with pip install 'msam-analysis[study]', or "
                "choose other exhibits"
            )


_SLICES = ("random_seed", "filter_radius", "unit_radius", "line_points", "plane_radius", "plane_points", "plane_refine")

MEASURES: Mapping[str, Measure] = {
    "eigenvalues": Measure(_eigenvalues, ("eigenvalues", "power_tolerance", "samples"), cost=380.0),
    "balls": Measure(_balls, ("radii", "ball_iterations", "samples"), cost=115.0),
    "slices": Measure(_slices, (*_SLICES, "samples"), version=2, cost=190.0),
    "features": Measure(_features, ("samples",), cost=10.0),
    "robustness": Measure(_robustness, (), cost=130.0, needs=("art", "adversarial-robustness-toolbox")),
    "lambda1": Measure(_top_of_some, ("samples",), cost=200.0),
}
"""What can be measured after training, by name; ``needs`` of ``robustness`` is for its strongest attack.

Results: ``lanczos``, ``power``, ``ball-<radius>``, ``line-<direction>``, ``plane``, ``features``,
``robustness-<attack>``, ``lambda1``. Where a solver's budget ended first, its result says so in ``converged``.
"""

SHARPNESS = frozenset({"eigenvalues", "balls", "slices"})
"""What the study measures on every network of its main table."""
