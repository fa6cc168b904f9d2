"""What is measured on a trained network, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msam_analysis.landscape import directions, slice_1d, slice_2d
from msam_analysis.measures.ball import ball_sharpness
from msam_analysis.measures.features import feature_rank
from msam_analysis.measures.robustness import Attack, robust_accuracy
from msam_analysis.objective.objective import Objective
from msam_analysis.results import ConvergenceWarning, Result
from msam_analysis.spectra.top import top_eigenvalues
from msam_analysis.studies.training import Tick, Trained, some
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


def cost(measured: Iterable[str], protocol: Protocol) -> float:
    """Return the rough cost of :func:`measure` in training steps, for the progress bar alone."""
    balls = len(protocol.radii) - 1
    return sum(MEASURES[name].cost * (1 + balls * (name == "balls")) for name in measured)


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


def measure(
    workload: Workload, trained: Trained, measured: Iterable[str], protocol: Protocol, tick: Tick
) -> dict[str, Result]:
    """Return results on the training set's loss at the true weights, by name; of an augmented one, without that.

    Parameters
    ----------
    workload, trained
        The network and its data.
    measured
        What to measure: keys of :data:`MEASURES`.
    protocol
        How finely.
    tick
        Called with the cost of every part that is done.

    Raises
    ------
    ValueError
        A name is unknown.

    Notes
    -----
    Names: ``lanczos``, ``power``, ``ball-<radius>``, ``line-<direction>``, ``plane``; ``features``,
    ``robustness-<attack>``, ``lambda1`` where an exhibit asks. Where a solver's budget ended
    first its result says so in ``converged``; that is recorded in the tables, not printed.
    """
    objective = Objective(trained.model, workload.criterion(), some(workload.train(), protocol.samples))
    results: dict[str, Result] = {}
    wanted = set(measured)
    if not wanted <= MEASURES.keys():
        raise ValueError(f"unknown measure {min(wanted - MEASURES.keys())!r}: expected some of {sorted(MEASURES)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name in (name for name in MEASURES if name in wanted):
            results |= MEASURES[name].of(Trainee(workload, trained, objective), protocol)
            tick(cost([name], protocol))
    return results


def _eigenvalues(trainee: Trainee, protocol: Protocol) -> dict[str, Result]:
    k, tolerance = protocol.eigenvalues, protocol.power_tolerance
    return {
        "lanczos": top_eigenvalues(trainee.objective, k),
        "power": top_eigenvalues(trainee.objective, k, method="power", tolerance=tolerance),
    }


def _balls(trainee: Trainee, protocol: Protocol) -> dict[str, Result]:
    results: dict[str, Result] = {}
    previous: list[Tensor] = []
    for radius in protocol.radii:
        ball = ball_sharpness(
            trainee.objective,
            radius,
            starts=("gradient", "eigenvector", *previous),
            iterations=protocol.ball_iterations,
            tolerance=1e-4,
        )
        results[f"ball-{radius:g}"] = ball
        previous = [ball.displacement]
    return results


def _slices(trainee: Trainee, protocol: Protocol) -> dict[str, Result]:
    objective = trainee.objective
    lines = {
        "gradient": directions.gradient(objective, normalize="l2"),
        "momentum": directions.momentum(trainee.trained.optimizer, objective, normalize="l2"),
        "random": directions.random(objective, protocol.random_seed),
    }
    results: dict[str, Result] = {}
    for name in LINES:
        radius = protocol.filter_radius if name == "random" else protocol.unit_radius
        results[f"line-{name}"] = slice_1d(objective, lines[name], radius, protocol.line_points)
    plane = (lines["random"], directions.random(objective, protocol.random_seed + 1))
    results["plane"] = slice_2d(
        objective, plane, protocol.plane_radius, protocol.plane_points, refine=protocol.plane_refine
    )
    return results


def _features(trainee: Trainee, protocol: Protocol) -> dict[str, Result]:
    model, data = trainee.trained.model, some(trainee.workload.train(), protocol.samples)
    return {"features": feature_rank(model, data, layer=last_block(model))}


def last_block(model: nn.Module) -> str:
    """Return the name of the layer whose outputs are the features before pooling.

    That is ``features`` of the networks of :mod:`~msam_analysis.studies.networks`; in a sequence, what comes before
    the first pooling or flattening, or else before the last layer.
    """
    if "features" in dict(model.named_children()):
        return "features"
    names = list(dict(model.named_children()))
    ends = [name for name, layer in model.named_children() if isinstance(layer, nn.AdaptiveAvgPool2d | nn.Flatten)]
    return names[names.index(ends[0] if ends else names[-1]) - 1]


class _FromShares(nn.Module):
    """A network for inputs as shares of the range that the training inputs have, channel by channel."""

    low: Tensor
    span: Tensor

    def __init__(self, network: nn.Module, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("low", low)
        self.register_buffer("span", high - low)

    def forward(self, shares: Tensor) -> Tensor:
        outputs: Tensor = self.network(self.low + shares * self.span)
        return outputs


def _robustness(trainee: Trainee, _: Protocol) -> dict[str, Result]:
    # Pixels of 0 to 1 again, whatever standardised them: a share is the same change of any channel.
    inputs = torch.cat([batch for batch, _ in trainee.workload.train()])
    dims = [dim for dim in range(inputs.ndim) if inputs.ndim < 3 or dim != 1]
    low, high = inputs.amin(dims, keepdim=True)[0], inputs.amax(dims, keepdim=True)[0]
    device = next(trainee.trained.model.parameters()).device
    model = _FromShares(trainee.trained.model, low, high).to(device)
    test = [((batch - low) / (high - low), labels) for batch, labels in trainee.workload.test()]
    return {
        f"robustness-{attack}": robust_accuracy(
            model, test, attack, shares, bounds=None if attack == "noise" else (0.0, 1.0)
        )
        for attack, shares in DISTURBANCES.items()
    }


def _top_of_some(trainee: Trainee, _: Protocol) -> dict[str, Result]:
    first = torch.arange(min(SOME, trainee.objective.samples))
    return {"lambda1": top_eigenvalues(trainee.objective.with_samples(first), 1, tolerance=1e-2)}


DISTURBANCES: Mapping[Attack, tuple[float, ...]] = {
    "noise": (0.1, 0.2, 0.4),
    "fgsm": (1 / 255, 8 / 255, 32 / 255),
    "pgd": (1 / 255, 8 / 255, 32 / 255),
    "apgd": (1 / 255, 8 / 255, 32 / 255),
}
"""Sizes of disturbances of the test inputs, as shares of the range of the training inputs' values."""

SOME = 256
"""Training samples, the first ones, whose loss the cheap largest eigenvalue is of."""


@dataclass(frozen=True)
class Trainee:
    """What is measured: a trained network, and its training loss with the running BatchNorm statistics."""

    workload: Workload
    trained: Trained
    objective: Objective


class Measure(NamedTuple):
    """A part of the measurements, and its rough cost in training steps."""

    of: Callable[[Trainee, Protocol], dict[str, Result]]
    cost: float


MEASURES: Mapping[str, Measure] = {
    "eigenvalues": Measure(_eigenvalues, 380.0),
    "balls": Measure(_balls, 115.0),
    "slices": Measure(_slices, 190.0),
    "features": Measure(_features, 10.0),
    "robustness": Measure(_robustness, 130.0),
    "lambda1": Measure(_top_of_some, 200.0),
}
"""What can be measured after training, by name."""

SHARPNESS = frozenset({"eigenvalues", "balls", "slices"})
"""What the study measures on every network of its main table."""
