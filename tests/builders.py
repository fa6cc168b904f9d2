"""Results with known contents, awkward numbers among them: the one place where tests make results by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

import msam_analysis as ma
from msam_analysis import results

Kind = TypeVar("Kind", bound=results.Result)

SETTINGS: results.Settings = {"batchnorm": "eval", "samples": 19, "fraction": 0.1 + 0.2, "cached": True, "subset": None}

FIELDS: dict[str, dict[str, Any]] = {
    "Eigenpairs": {
        "values": torch.tensor([3.0, -1.0]).double(),
        "vectors": torch.eye(5, 2).double(),
        "residuals": torch.tensor([1e-7, math.nan], dtype=torch.float64),
        "converged": False,
        "hvps": 17,
        "method": "lanczos",
        "which": "largest",
        "tolerance": 1e-4,
    },
    "BallSharpness": {
        "sharpness": 0.1 + 0.2,
        "one_step": 0.1,
        "loss": math.inf,
        "displacement": torch.linspace(0, 1, 5),
        "rho": 0.05,
        "norm": "l2",
        "adaptive": True,
        "starts": {"gradient": 0.3, "random": 0.2},
        "spread": 1 / 3,
        "stationarity": math.nan,
        "converged": True,
        "gradients": 40,
        "hvps": 0,
    },
    "Slice1D": {
        "coordinates": torch.linspace(-1, 1, 3).double(),
        "loss": torch.tensor([math.nan, 1 / 3, -math.inf], dtype=torch.float64),
        "center_loss": 1 / 3,
        "direction": "random (filter)",
        "direction_norm": 2.0,
    },
    "Slice2D": {
        "x": torch.tensor([-1.0, 0.0, 1.0]).double(),
        "y": torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).double(),
        "loss": torch.arange(15.0).reshape(3, 5).double(),
        "center_loss": 7.0,
        "directions": ("first", "second"),
        "direction_norms": (1.0, 0.1 + 0.2),
        "cosine": 1e-17,
    },
    "Estimate": {
        "quantity": "trace",
        "value": 0.1 + 0.2,
        "standard_error": math.nan,
        "draws": 3,
        "evaluations": 3,
    },
    "DataInterval": {
        **{
            name: torch.tensor([0.1 + 0.2, math.nan], dtype=torch.float64)
            for name in ("value", "bias", "standard_error", "low", "high")
        },
        "replicates": torch.eye(3, 2).double(),
        "samples": 19,
        "method": "jackknife",
        "level": 0.68,
        "failed": 1,
        "converged": False,
    },
    "BatchSharpness": {
        "value": 0.1 + 0.2,
        "standard_error": math.nan,
        "rises": torch.tensor([0.1, math.inf, 1 / 3], dtype=torch.float64),
        "one_steps": torch.tensor([0.05, math.nan, -0.1], dtype=torch.float64),
        "sizes": torch.tensor([8, 8, 3]),
        "m": 8,
        "rho": 0.05,
        "norm": "linf",
        "adaptive": "filter",
        "batches": 5,
        "converged": False,
        "gradients": 90,
        "hvps": 36,
    },
    "Certificate": {
        "verdict": "local maximum",
        "multiplier": 1 / 3,
        "residual": 1e-17,
        "relative_residual": math.nan,
        "curvature": -math.inf,
        "curvature_residual": 0.0,
        "gain": 0.1 + 0.2,
        "on_surface": True,
        "dimensions": 0,
        "converged": True,
        "tolerance": 1e-2,
        "hvps": 0,
    },
    "CriticalSharpness": {
        "value": 0.1 + 0.2,
        "bracket": (0.0, math.inf),
        "status": "several crossings",
        "crossings": 2,
        "converged": False,
        "steps": torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
        "rises": torch.tensor([-1 / 3, math.nan, math.inf], dtype=torch.float64),
        "resolution": 1e-17,
        "loss": 0.1,
        "direction": "gradient of <another>",
        "direction_norm": 1 / 3,
        "width": 1 / 16,
        "evaluations": 4,
        "gradients": 1,
    },
    "DirectionalSharpness": {
        "sharpness": 1 / 3,
        "largest": math.inf,
        "at": -0.5,
        "coordinates": torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64),
        "rises": torch.tensor([math.inf, 0.0, 1 / 3], dtype=torch.float64),
        "resolution": 1e-17,
        "loss": 0.1,
        "displacement": torch.linspace(0, 1, 5),
        "direction": "random (filter)",
        "rho": 0.5,
        "evaluations": 3,
    },
    "Projection": {
        "label": "MSAM",
        "steps": torch.tensor([0, 10]),
        "coordinates": torch.tensor([[0.1 + 0.2, math.nan], [1.0, -0.0]]).double(),
        "distance": torch.tensor([1.0, math.inf]).double(),
        "off_plane": torch.tensor([0.5, math.nan]).double(),
        "rounding": torch.zeros(2).double(),
        "directions": ("PCA 1 (90.0 %)", "PCA 2 (9.0 %)"),
        "direction_norms": (1.0, 0.1 + 0.2),
        "loss": torch.tensor([1 / 3, math.inf]).double(),
        "projected_loss": None,
        "center_loss": 1e-17,
    },
    "Trajectory": {
        "label": "SGD",
        "steps": torch.tensor([0, 5]),
        "points": torch.tensor([[1.0, 2.0, 3.0], [math.nan, 0.5, -math.inf]]),
        "rounding": torch.tensor([0.0, math.nan]).double(),
        "names": ("a", "b"),
        "shapes": ((2, 1), (1,)),
        "metrics": {"loss": torch.tensor([1 / 3, math.nan]).double()},
        "buffers": {"bn.mean": torch.arange(4.0).reshape(2, 2), "bn.count": torch.tensor([3, 4])},
    },
    "SamMsamAngle": {
        "rhos": torch.tensor([0.0, 0.1 + 0.2, 1.0]).double(),
        "angles": torch.tensor([20.0, 1 / 3, math.nan]).double(),
        "shares": torch.tensor([1.0, 0.9, 0.0]).double(),
        "rho_0": math.nan,
        "bracket": (0.1 + 0.2, 1.0),
        "rho_sam": 0.05,
    },
    "Scalar": {"quantity": "curvature along <gradient>", "value": 0.1 + 0.2},
    "Curvatures": {
        "values": torch.tensor([0.1 + 0.2, math.nan], dtype=torch.float64),
        "directions": ("gradient", "random (filter)"),
    },
    "FeatureRank": {
        "rank": 2,
        "threshold": 0.99,
        "effective_rank": 0.1 + 0.2,
        "stable_rank": 1 / 3,
        "numerical_rank": 3,
        "resolution": 1e-17,
        "singular_values": torch.tensor([2.0, 1.0, 1e-3], dtype=torch.float64),
        "samples": 19,
        "dimension": 3,
    },
    "RobustAccuracy": {
        "attack": "pgd",
        "sizes": torch.tensor([0.1, 0.2], dtype=torch.float64),
        "accuracies": torch.tensor([0.1 + 0.2, 0.0], dtype=torch.float64),
        "clean": 0.9,
        "errors": torch.tensor([0.1, 0.0], dtype=torch.float64),
        "samples": 19,
        "steps": 10,
    },
}
"""What a result of every kind holds, but for the settings."""


def built(kind: type[Kind], **changes: Any) -> Kind:
    """Return a result of a kind, with some of its fields changed."""
    return kind(**{"settings": SETTINGS, **FIELDS[kind.__name__], **changes})


SIGMA = 0.05


def density(shift: float = 0.0, *, ends: bool = True, converged: bool = True) -> results.SpectralDensity:
    """Ten eigenvalues, two known and eight seen by three probes as two nodes each."""
    known = torch.tensor([-0.5, 4.0]) if ends else torch.zeros(0)
    share = (10 - len(known)) / 10
    nodes = torch.cat([known, torch.tensor([0.0, 1.0, 0.1, 1.1, -0.1, 0.9])]).double() + shift
    part = torch.tensor([0.8, 0.2, 0.7, 0.3, 0.75, 0.25]).double() * share
    none = torch.zeros(0).double()
    return results.SpectralDensity.smoothed(
        sigma=SIGMA,
        points=None,
        nodes=nodes,
        weights=torch.cat([torch.full((len(known),), 0.1).double(), part]),
        probe=torch.tensor([-1] * len(known) + [0, 0, 1, 1, 2, 2]),
        exhausted=torch.ones(3, dtype=torch.bool),  # two nodes are all that a probe sees
        top=nodes[1:2] if ends else none,
        top_residuals=torch.full((int(ends),), 1e-6).double(),
        bottom=nodes[:1] if ends else none,
        bottom_residuals=torch.full((int(ends),), 1e-6).double(),
        converged=converged,
        margin=0.0,
        size=10,
        steps=2,
        hvps=30,
        settings=SETTINGS,
    )


def by_layer() -> results.ByLayer[results.Eigenpairs]:
    """The eigenvalues of two layers, one of them with a name that a file or a page must escape."""
    pairs = {"0/<a>": built(results.Eigenpairs), "head": built(results.Eigenpairs, converged=True)}
    return results.ByLayer(results=pairs, settings=SETTINGS)


def measurement() -> results.Measurement:
    row = {"value": 0.1 + 0.2, "uncertainty": math.nan, "converged": None, "meaning": "mean over the samples"}
    ball = {"metric": "ball_sharpness@0.05", "value": 0.5, "converged": False, "meaning": "largest rise"}
    return results.Measurement(
        rows=(
            {"metric": "loss", **row},
            row | ball,
            {"metric": "lambda_1", **row, "uncertainty": 1e-17, "converged": True},
        ),
        results={"ball": built(results.BallSharpness), "layers": by_layer()},
        settings=SETTINGS,
    )


def comparison(count: int = 2) -> results.Comparison:
    """Checkpoints with metrics of every kind, one of them with a name that a page must escape; one failed."""
    labels = ["<a> [b]", *(f"net-{step}" for step in range(1, count))]
    base = measurement()
    measurements = {}
    for index, label in enumerate(labels):
        draws = torch.linspace(0.0, 1.0, 5, dtype=torch.float64) * (1 + index)
        mean = {"value": float(draws.mean()), "uncertainty": 0.1, "converged": None, "meaning": "trace"}
        measurements[label] = results.Measurement(
            rows=(*base.rows, {"metric": "trace", **mean}),
            results={"trace": built(results.Estimate, values=draws, draws=len(draws)), **base.results},
            settings=SETTINGS,
        )
    sources = {label: {"path": "a/b.pt", "step": 10 * n, "epoch": None} for n, label in enumerate(labels)}
    return results.Comparison(
        measurements=measurements,
        sources=sources,
        baseline=labels[0],
        failures={"net-x": "ValueError: <x> is empty"},
        settings=SETTINGS,
    )


KINDS: dict[str, Callable[[], results.Result]] = {
    **{name: functools.partial(built, getattr(results, name)) for name in FIELDS},
    "SpectralDensity": density,
    "ByLayer": by_layer,
    "Measurement": measurement,
    "Comparison": comparison,
}
"""A result of every kind."""


# ---------------------------------------------------------------------------------------------- what measures return

Measure = Callable[[ma.Objective], results.Result]


def objective() -> ma.Objective:
    """A tiny classifier, at weights where it has learned nothing."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return ma.Objective(model, torch.nn.functional.cross_entropy, (x, (x[:, 0] > 0).long()))


def _optimizer(o: ma.Objective) -> torch.optim.Optimizer:
    """An optimizer that has taken one step, with a new gradient."""
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1, momentum=0.9)
    for number in (1.0, -0.5):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, number)
        if number > 0:
            optimizer.step()
    return optimizer


def _trajectory(o: ma.Objective) -> results.Trajectory:
    steps = torch.arange(5)
    noise = torch.randn(5, o.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shapes = tuple(tuple(parameter.shape) for parameter in o.model.parameters())
    names = tuple(name for name, _ in o.model.named_parameters())
    return results.Trajectory(
        label="SGD", steps=steps, points=o.point() + 0.1 * noise, rounding=torch.zeros(5), names=names, shapes=shapes
    )


def _data(o: ma.Objective) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    return [(x, (x[:, 0] > 0).long())]


MEASURES: dict[str, Measure] = {
    "average_sharpness": lambda o: ma.average_sharpness(o, 0.1, draws=4),
    "ball_sharpness": lambda o: ma.ball_sharpness(o, 0.1),
    "by_layer": lambda o: ma.by_layer(o, lambda part: ma.top_eigenvalues(part, 2)),
    "certify": lambda o: ma.certify(ma.ball_sharpness(o, 0.1), o),
    "compare": lambda o: ma.compare(
        {"a": o.model, "b": torch.nn.Sequential(*o.model.children())},
        None,
        o.loss_fn,
        o.batches,
        metrics=("loss", "trace"),
    ),
    "critical_sharpness": ma.critical_sharpness,
    "curvature_along": lambda o: ma.curvature_along(o, ma.directions.gradient(o)),
    "data_interval": lambda o: ma.data_interval(o, lambda part: float(part.loss()), replicates=3),
    "directional_sharpness": lambda o: ma.directional_sharpness(o, ma.directions.random(o), 0.5, points=5),
    "feature_rank": lambda o: ma.feature_rank(o.model, _data(o), layer="0"),
    "fisher_rao_norm": ma.fisher_rao_norm,
    "m_sharpness": lambda o: ma.m_sharpness(o, 0.1, 6),
    "measure": lambda o: ma.measure(o, metrics=("loss", "eigenvalues", "trace", "average")),
    "momentum_gradient_cosine": lambda o: ma.momentum_gradient_cosine(_optimizer(o)),
    "one_step_sharpness": lambda o: ma.one_step_sharpness(o, 0.1),
    "pca_plane": lambda o: ma.pca_plane(_trajectory(o)),
    "project": lambda o: ma.project(_trajectory(o), ma.pca_plane(_trajectory(o))),
    "relative_flatness": lambda o: ma.relative_flatness(o, "2.weight"),
    "robust_accuracy": lambda o: ma.robust_accuracy(o.model, _data(o), "fgsm", [0.1, 0.5]),
    "sam_msam_angle": lambda o: ma.sam_msam_angle(o, o.gradient().flip(0), [0.5, 2.0], rho_sam=0.1),
    "slice_1d": lambda o: ma.slice_1d(o, ma.directions.random(o), points=5),
    "slice_2d": lambda o: ma.slice_2d(o, (ma.directions.random(o), ma.directions.gradient(o)), points=5),
    "spectral_density": ma.spectral_density,
    "top_eigenvalues": lambda o: ma.top_eigenvalues(o, 3),
    "trace": lambda o: ma.trace(o, draws=4),
}
"""Every public measure, called on a tiny objective."""
