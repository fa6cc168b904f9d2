"""Everything that is measured on one trained network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from msam_analysis import directions
from msam_analysis.eigen import top_eigenvalues
from msam_analysis.landscape import slice_1d, slice_2d
from msam_analysis.objective import Objective
from msam_analysis.results import ConvergenceWarning, Result
from msam_analysis.sharpness import ball_sharpness
from msam_analysis.studies.training import Tick, Trained
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
    plane_radius, plane_points
        2-D slices in filter-normalised random directions.
    random_seed
        Of the random directions; the same for all networks, each normalised by its own filters.
    """

    eigenvalues: int = 5
    power_tolerance: float = 1e-3
    radii: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0, 2.0)
    ball_iterations: int = 60
    unit_radius: float = 3.0
    filter_radius: float = 1.0
    line_points: int = 41
    plane_radius: float = 1.0
    plane_points: int = 25
    random_seed: int = 0


LINES = ("gradient", "momentum", "random")

# Rough cost of each phase in training steps, for the progress bar alone.
_COST = {"lanczos": 100.0, "power": 280.0, "ball": 115.0, "lines": 50.0, "plane": 260.0}


def cost(protocol: Protocol) -> float:
    """Return the rough cost of :func:`measure` in training steps."""
    return sum(_COST.values()) + _COST["ball"] * (len(protocol.radii) - 1)


def error_rate(output: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of wrong predictions, ``mean(argmax(output) != target)``."""
    return (output.argmax(dim=1) != target).double().mean()


def scores(workload: Workload, model: nn.Module) -> dict[str, float]:
    """Return train and test loss (nats) and accuracy (fraction) of a network; training labels as trained on."""
    criterion = nn.CrossEntropyLoss()
    measured: dict[str, float] = {}
    for name, batches in (("train", workload.train()), ("test", workload.test())):
        measured[f"{name}_loss"] = float(Objective(model, criterion, batches).loss())
        measured[f"{name}_accuracy"] = 1.0 - float(Objective(model, error_rate, batches).loss())
    return measured


def measure(workload: Workload, trained: Trained, protocol: Protocol, tick: Tick) -> dict[str, Result]:
    """Return every result on the training set's loss at the true weights, by name.

    Names: ``lanczos``, ``power``, ``ball-<radius>``, ``line-<direction>``, ``plane``. Where a solver's budget ended
    first its result says so in ``converged``; that is recorded in the tables, not printed.
    """
    objective = Objective(trained.model, nn.CrossEntropyLoss(), workload.train())
    results: dict[str, Result] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        results["lanczos"] = top_eigenvalues(objective, protocol.eigenvalues)
        tick(_COST["lanczos"])
        results["power"] = top_eigenvalues(
            objective, protocol.eigenvalues, method="power", tolerance=protocol.power_tolerance
        )
        tick(_COST["power"])
        previous: list[Tensor] = []
        for radius in protocol.radii:
            ball = ball_sharpness(
                objective,
                radius,
                starts=("gradient", "eigenvector", *previous),
                iterations=protocol.ball_iterations,
                tolerance=1e-4,
            )
            results[f"ball-{radius:g}"] = ball
            previous = [ball.displacement]
            tick(_COST["ball"])
    lines = {
        "gradient": directions.gradient(objective, normalize="l2"),
        "momentum": directions.momentum(trained.optimizer, objective, normalize="l2"),
        "random": directions.random(objective, protocol.random_seed),
    }
    for name in LINES:
        radius = protocol.filter_radius if name == "random" else protocol.unit_radius
        results[f"line-{name}"] = slice_1d(objective, lines[name], radius, protocol.line_points)
    tick(_COST["lines"])
    plane = (lines["random"], directions.random(objective, protocol.random_seed + 1))
    results["plane"] = slice_2d(objective, plane, protocol.plane_radius, protocol.plane_points)
    tick(_COST["plane"])
    return results
