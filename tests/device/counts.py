"""How often the host may read a number from the device: each time it waits until all that was asked for has run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import msam
import msam_analysis as ma
from msam_analysis import directions

from .table import PROBES, Bench, make_preset

# What a call may read beside its steps: checks of its arguments, the value at the centre, the result.
HANDFUL = 8


class Count(NamedTuple):
    """Something that is done, once it is prepared, and how many reads the outcome allows."""

    prepare: Callable[[Bench], Callable[[], Any]]
    allowed: Callable[[Any], int]


def never(_: Any) -> int:
    return 0


def at_most(reads: int) -> Callable[[Any], int]:
    return lambda _: reads


def measured(measure: Callable[[ma.Objective], Any], allowed: Callable[[Any], int]) -> Count:
    """A measure of the objective, which was examined before."""
    return Count(lambda bench: lambda: measure(bench.objective), allowed)


def ascents(found: Any) -> int:
    """Two reads an ascent step, two a step of the search for a start."""
    return int(2 * found.gradients + 2 * found.hvps + HANDFUL)


def products(found: Any) -> int:
    """Two reads a product, and a search has a beginning and an end."""
    return 2 * (int(found.hvps) + HANDFUL)


def steps_of(name: str) -> Callable[[Bench], Callable[[], Any]]:
    """Three steps of an optimizer, and the true weights between them; gradients are there already."""

    def prepare(bench: Bench) -> Callable[[], Any]:
        model = bench.model()
        optimizer = make_preset(name)(model)
        given = [torch.ones_like(parameter) for parameter in model.parameters()]

        def gradients() -> Tensor:
            for parameter, gradient in zip(model.parameters(), given, strict=True):
                parameter.grad = gradient.clone()
            return torch.zeros((), device=bench.device)

        def steps() -> None:
            for _ in range(3):
                gradients()
                optimizer.step(gradients)
                optimizer.eval()
                optimizer.train()

        return steps

    return prepare


def recorded(name: str) -> Callable[[Bench], Callable[[], Any]]:
    """A probe at three steps of MSAM."""
    row = PROBES[name]
    assert callable(row)
    return lambda bench: lambda: row(bench)


def derivative(ask: Callable[[ma.Objective, Tensor, Tensor], Any]) -> Callable[[Bench], Callable[[], Any]]:
    def prepare(bench: Bench) -> Callable[[], Any]:
        o = bench.objective
        w, v = o.point() + 0.1, o.gradient()
        return lambda: ask(o, w, v)

    return prepare


def kept_graphs(bench: Bench) -> Callable[[], Any]:
    """Products of an operator whose graphs are there."""
    operator, v = bench.objective.hessian(), bench.objective.gradient()
    operator @ v
    return lambda: [operator @ v for _ in range(5)]


def certificate(bench: Bench) -> Callable[[], Any]:
    ball = bench.measured("ball_sharpness")
    return lambda: ma.certify(ball, bench.objective)


def overshooting(bench: Bench) -> Callable[[], Any]:
    optimizer = bench.optimizer
    return lambda: ma.momentum_gradient_cosine(optimizer)


def projection(bench: Bench) -> Callable[[], Any]:
    """The losses along a trajectory of five points."""
    bench.moving.examine()
    plane = ma.pca_plane(bench.trajectory)
    return lambda: ma.project(bench.trajectory, plane, objective=bench.moving)


def examination(bench: Bench) -> Callable[[], Any]:
    objective = ma.Objective(bench.model(), torch.nn.CrossEntropyLoss(), bench.data)
    return objective.examine


# Reads a row of a probe's records.
ROWS = {
    "Curvature": HANDFUL,
    "Every": 1,
    "HeldOutCosine": 1,
    "LossAlongMomentum": 2,
    "MomentumGradientCosine": 2,
    "Norms": 4,
    "PerturbationRise": 2,
    "SamAngle": 2,
    "TopEigenvalues": 60,
}

COUNTS: dict[str, Count] = {
    **{f"steps of {name}": Count(steps_of(name), never) for name in msam.PRESETS},
    "the examination": Count(examination, at_most(64)),
    "loss": Count(derivative(lambda o, w, v: o.loss(w)), never),
    "loss and gradient": Count(derivative(lambda o, w, v: o.loss_and_gradient(w)), never),
    "products along kept graphs": Count(kept_graphs, never),
    "a new operator": Count(derivative(lambda o, w, v: o.hvp(v, w)), at_most(1)),
    "with_weights": Count(derivative(lambda o, w, v: o.with_weights(o.point())), at_most(1)),
    "average_sharpness": measured(lambda o: ma.average_sharpness(o, 0.1, draws=20), at_most(HANDFUL)),
    "ball_sharpness": measured(lambda o: ma.ball_sharpness(o, 0.1), ascents),
    "ball_sharpness, linf": measured(lambda o: ma.ball_sharpness(o, 0.02, norm="linf"), ascents),
    "ball_sharpness, adaptive": measured(lambda o: ma.ball_sharpness(o, 0.3, adaptive="filter"), ascents),
    "m_sharpness": measured(
        lambda o: ma.m_sharpness(o, 0.1, 5), lambda found: ascents(found) + HANDFUL * len(found.rises)
    ),
    "one_step_sharpness": measured(lambda o: ma.one_step_sharpness(o, 0.1), at_most(4)),
    "directional_sharpness": measured(
        lambda o: ma.directional_sharpness(o, directions.gradient(o), 0.1, points=11), at_most(4)
    ),
    "certify": Count(certificate, products),
    "curvature_along": measured(
        lambda o: ma.curvature_along(o, [directions.gradient(o), directions.random(o)]), at_most(4)
    ),
    "sam_msam_angle": measured(
        lambda o: ma.sam_msam_angle(o, o.gradient().flip(0), [0.5, 1.0, 2.0, 4.0], rho_sam=0.1), at_most(4)
    ),
    "momentum_gradient_cosine": Count(overshooting, at_most(1)),
    "fisher_rao_norm": measured(ma.fisher_rao_norm, at_most(HANDFUL)),
    "relative_flatness": measured(lambda o: ma.relative_flatness(o, "4.weight", draws=10), at_most(HANDFUL)),
    "robust_accuracy": Count(
        lambda bench: lambda: ma.robust_accuracy(bench.objective.model, bench.data, "pgd", [0.1], steps=5),
        at_most(HANDFUL),
    ),
    "feature_rank": Count(
        lambda bench: lambda: ma.feature_rank(bench.objective.model, bench.data, layer="3"), at_most(HANDFUL)
    ),
    "slice_1d": measured(lambda o: ma.slice_1d(o, directions.gradient(o), points=11), at_most(HANDFUL)),
    "slice_1d, refined": measured(
        lambda o: ma.slice_1d(o, directions.gradient(o), points=5, refine=0.01), at_most(HANDFUL)
    ),
    "slice_2d": measured(
        lambda o: ma.slice_2d(o, (directions.gradient(o), directions.random(o)), points=5), at_most(HANDFUL)
    ),
    "slice_1d, samples": measured(
        lambda o: ma.slice_1d(o, directions.gradient(o), points=11, samples=10), at_most(3 * 11 + HANDFUL)
    ),
    "project": Count(projection, at_most(5 + HANDFUL)),
    # The spectra.
    "top_eigenvalues": measured(lambda o: ma.top_eigenvalues(o, 2), products),
    "top_eigenvalues, power": measured(lambda o: ma.top_eigenvalues(o, 1, method="power"), products),
    "spectral_density": measured(lambda o: ma.spectral_density(o, probes=2, steps=10, extremes=2), products),
    "trace": measured(lambda o: ma.trace(o, draws=20), at_most(HANDFUL)),
    "trace, hutch++": measured(lambda o: ma.trace(o, method="hutch++", draws=21), at_most(HANDFUL)),
    **{f"probes.{name}": Count(recorded(f"probes.{name}"), at_most(3 * reads)) for name, reads in ROWS.items()},
}
"""By what is done; the objectives were examined before, but for that of the examination."""
