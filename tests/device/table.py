"""Every public name, and what is done with it on a device: a function of a bench, or why nothing is to be done."""

from __future__ import annotations

import functools
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import msam
import msam_analysis as ma
from msam_analysis import checkpoints, directions, plots, probes, results, trajectory
from tests.builders import MEASURES

MODULES = {
    "msam": msam,
    "ma": ma,
    **{name: getattr(ma, name) for name in ma.__all__ if isinstance(getattr(ma, name), types.ModuleType)},
}


def public_names() -> Iterator[str]:
    """Yield every public name that is no module, with its module before it."""
    for prefix, module in MODULES.items():
        for name in module.__all__:
            if not isinstance(getattr(module, name), types.ModuleType):
                yield f"{prefix}.{name}"


# ------------------------------------------------------------------------------------------------------------ the bench


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Bench:
    """A small convolutional network with BatchNorm and its data, on a device; a folder to write to."""

    device: str
    folder: Path

    def model(self, seed: int = 0) -> nn.Sequential:
        """A new network, in evaluation mode."""
        layers = (nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
        model = nn.Sequential(*layers).double().eval()
        with torch.no_grad():
            for index, tensor in enumerate((*model.parameters(), *model.buffers())):
                if tensor.is_floating_point():
                    tensor.copy_(0.5 * normal(*tensor.shape, seed=100 * seed + index))
            getattr(model, "1").running_var.abs_().add_(0.5)
        return model.to(self.device)

    @functools.cached_property
    def data(self) -> list[tuple[Tensor, Tensor]]:
        """Two ragged batches."""
        x, y = normal(13, 1, 4, 4, seed=7), torch.arange(13) % 3
        return [(x[:8].to(self.device), y[:8].to(self.device)), (x[8:].to(self.device), y[8:].to(self.device))]

    @functools.cached_property
    def objective(self) -> ma.Objective:
        """The loss, examined already."""
        objective = ma.Objective(self.model(), nn.CrossEntropyLoss(), self.data)
        objective.examine()
        return objective

    @functools.cached_property
    def moving(self) -> ma.Objective:
        """The loss with the statistics of its batches, which fit any weights."""
        return ma.Objective(self.model(), nn.CrossEntropyLoss(), self.data, batchnorm="batch")

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """One that has taken a step on the objective's parameters, with a new gradient; the weights are as before."""
        parameters = list(self.objective.parameters.values())
        optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
        for scale in (1.0, -0.5):
            gradient = self.objective.layout.views(scale * self.objective.gradient() + 0.01)
            for name, parameter in self.objective.parameters.items():
                parameter.grad = gradient[name].clone()
            if scale > 0:
                optimizer.step()
        return optimizer

    @functools.cached_property
    def trajectory(self) -> results.Trajectory:
        """Five points around the weights."""
        noise = 0.1 * normal(5, self.objective.size, seed=3).to(self.device)
        return trajectory.from_weights(self.objective, list(self.objective.point() + noise), label="SGD")

    @functools.cache  # noqa: B019 - a bench lives as long as its process
    def measured(self, name: str) -> Any:
        """What a public measure returns, measured once."""
        return (MEASURES | OWN)[name](self.objective)

    def file(self, name: str) -> Path:
        """A path for a file; what was there is gone."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / name
        path.unlink(missing_ok=True)
        return path


BENCHES: dict[str, Bench] = {}
"""The bench of every device that was asked for."""


def bench_of(objective: ma.Objective) -> Bench:
    return BENCHES[objective.device.type]


OWN: dict[str, Callable[[ma.Objective], Any]] = {
    "compare": lambda o: ma.compare(
        {"a": bench_of(o).model(1), "b": bench_of(o).model(2)}, None, o.loss_fn, bench_of(o).data, metrics=("loss",)
    ),
    "directional_sharpness": lambda o: ma.directional_sharpness(o, directions.gradient(o), 0.5, points=5),
    "feature_rank": lambda o: ma.feature_rank(o.model, bench_of(o).data, layer="3"),
    "momentum_gradient_cosine": lambda o: ma.momentum_gradient_cosine(bench_of(o).optimizer),
    "pca_plane": lambda o: ma.pca_plane(bench_of(o).trajectory),
    "project": lambda o: ma.project(
        bench_of(o).trajectory,
        ma.pca_plane(bench_of(o).trajectory),
        objective=bench_of(o).moving,
    ),
    "relative_flatness": lambda o: ma.relative_flatness(o, "4.weight", draws=4),
    "robust_accuracy": lambda o: ma.robust_accuracy(o.model, bench_of(o).data, "pgd", [0.1, 0.5], steps=3),
    "spectral_density": lambda o: ma.spectral_density(o, probes=2, steps=10, extremes=2, tolerance=1e-6),
}
"""Measures that need more than an objective."""


# ----------------------------------------------------------------------------------------------------------- optimizers


def trained(bench: Bench, make: Callable[..., Any], steps: int = 3, watch: Callable[..., Any] | None = None) -> Any:
    """Return weights, state and displacement after some steps, and what a monitor saw (``watch``: its probes)."""
    model = bench.model().train()
    optimizer = make(model)
    objective = ma.Objective(model, F.cross_entropy, bench.data, examine=False)
    monitor = ma.Monitor(optimizer, watch(objective), every=1) if watch else None
    for step in range(steps):
        x, y = bench.data[step % 2]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    if monitor is not None:
        return monitor.rows
    epsilon = [piece for _, piece in optimizer.displacement().items()] if optimizer.perturbed else []
    optimizer.eval()
    return {"state": optimizer.state_dict()["state"], "epsilon": epsilon, "weights": list(model.state_dict().values())}


def optimizer(cls: str, **options: Any) -> Callable[[Bench], Any]:
    """Three steps of an optimizer, with and without kernels for many tensors at once."""
    options.setdefault("lr", 0.05)

    def run(bench: Bench) -> Any:
        return [
            trained(bench, lambda model, how=how: getattr(msam, cls)(model.parameters(), **options, **how))
            for how in ({}, {"foreach": False})
        ]

    return run


def make_preset(name: str) -> Callable[[nn.Module], Any]:
    """Return the optimizer of a preset as a function of the model."""

    def make(model: nn.Module) -> Any:
        rule = msam.PRESETS[name]
        subset = msam.normalization_layers(model) if rule.normalization_only else None
        if rule.optimizer == "adamw":
            return msam.PerturbedAdamW(model.named_parameters(), lr=0.01, perturbation=rule(rho=0.3, subset=subset))
        perturbation = rule(rho=0.3, subset=subset)
        return msam.PerturbedSGD(model.named_parameters(), lr=0.05, momentum=0.9, perturbation=perturbation)

    return make


def preset(name: str) -> Callable[[Bench], Any]:
    return lambda bench: trained(bench, make_preset(name))


def schedule(rho: msam.Schedule) -> Callable[[Bench], Any]:
    return optimizer("MSAM", rho=rho)


def without_statistics(bench: Bench) -> Any:
    model = bench.model().train()
    with msam.frozen_batchnorm_statistics(model):
        model(bench.data[0][0])
    return list(model.state_dict().values())


def new_statistics(bench: Bench) -> Any:
    model = bench.model()
    msam.update_batchnorm_statistics(model, bench.data)
    return list(model.state_dict().values())


OPTIMIZERS: dict[str, Callable[[Bench], Any] | str] = {
    "msam.MSAM": optimizer("MSAM", rho=0.3, weight_decay=5e-3),
    "msam.SAM": optimizer("SAM", rho=0.3, adaptive=True),
    "msam.NAG": optimizer("NAG", weight_decay=5e-3),
    "msam.AdamWMSAM": optimizer("AdamWMSAM", lr=0.01, rho=0.3),
    "msam.AdamWSAM": optimizer("AdamWSAM", lr=0.01, rho=0.3),
    "msam.PerturbedSGD": optimizer("PerturbedSGD", momentum=0.9),
    "msam.PerturbedAdamW": optimizer("PerturbedAdamW", lr=0.01, amsgrad=True),
    "msam.PRESETS": "its rows are below, one by one",
    **{f"msam.PRESETS/{name}": preset(name) for name in msam.PRESETS},
    "msam.Constant": schedule(msam.Constant(0.3)),
    "msam.Cosine": schedule(msam.Cosine(0.3, 4)),
    "msam.FollowLR": schedule(msam.FollowLR(0.3)),
    "msam.Jump": schedule(msam.Jump(0.3, 1)),
    "msam.Ramp": schedule(msam.Ramp(0.3, 4)),
    "msam.Product": schedule(msam.Product((msam.Ramp(0.3, 4), msam.FollowLR(2.0)))),
    "msam.normalization_layers": preset("bn_only_msam"),
    "msam.frozen_batchnorm_statistics": without_statistics,
    "msam.update_batchnorm_statistics": new_statistics,
    "msam.NamedSubset": "what normalization_layers returns",
    "msam.Perturbation": "what every preset is",
    "msam.PerturbedOptimizer": "what all optimizers are",
    **dict.fromkeys(("msam.ParameterFilter", "msam.Preset", "msam.Schedule"), "a type without tensors"),
}


def probed(make: Callable[[ma.Objective], Any]) -> Callable[[Bench], Any]:
    """What a probe records at three steps of MSAM."""
    return lambda bench: trained(
        bench, lambda model: msam.MSAM(model.parameters(), lr=0.05, rho=0.3), watch=lambda o: [make(o)]
    )


PROBES: dict[str, Callable[[Bench], Any] | str] = {
    "probes.Curvature": probed(probes.Curvature),
    "probes.Every": probed(lambda o: probes.Every(probes.HeldOutCosine(o), 2)),
    "probes.HeldOutCosine": probed(lambda o: probes.HeldOutCosine(o, in_turn=True)),
    "probes.LossAlongMomentum": probed(lambda o: probes.LossAlongMomentum(o, [0.5, -0.25])),
    "probes.MomentumGradientCosine": probed(
        lambda o: probes.MomentumGradientCosine(after=True, model=o.model, by="module")
    ),
    "probes.Norms": probed(lambda o: probes.Norms(model=o.model)),
    "probes.PerturbationRise": probed(probes.PerturbationRise),
    "probes.SamAngle": probed(lambda o: probes.SamAngle(o, [0.5, 1.0], 0.1)),
    "probes.TopEigenvalues": probed(lambda o: probes.TopEigenvalues(o, k=2, tolerance=1e-6)),
    **dict.fromkeys(("probes.By", "probes.Finish", "probes.Probe", "probes.StepProbe"), "a type of functions"),
}


# ------------------------------------------------------------------------------------------------------- other measures


def measure(name: str) -> Callable[[Bench], Any]:
    return lambda bench: bench.measured(name)


def derivatives(bench: Bench) -> Any:
    o = bench.objective
    w, v = o.point() + 0.1, o.gradient()
    part = bench.moving.with_weights(w).with_parameters("4.*").with_samples(torch.tensor([1, 5, 12]))
    anew = ma.Objective(o.model, o.loss_fn, bench.data, batchnorm="recalibrate")
    central = ma.Objective(o.model, o.loss_fn, bench.data, second_derivatives="central")
    values = [one.loss(w) for one in (o, bench.moving, anew)]
    return values, part.gradient(), o.hvp(v), central.hvp(v), o.hessian(w) @ v, o.gauss_newton() @ v


def matrix(bench: Bench) -> Any:
    square = normal(6, 6, seed=1)
    operator = ma.MatrixOperator((square + square.T).to(bench.device))
    pairs = [ma.top_eigenvalues(operator, 2, method=method) for method in ("lanczos", "power")]
    return [pairs[0].values, pairs[1].values], ma.trace(operator, method="hutch++", draws=6)


def monitored(bench: Bench) -> Any:
    """The rows of a monitor that also writes them to a file."""
    path = bench.file("rows.csv")
    optimizer = msam.MSAM(bench.model().parameters(), lr=0.05, rho=0.3)
    monitor = ma.Monitor(optimizer, [probes.Norms()], every=1, to=[ma.loggers.CSV(path)])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    monitor.close()
    return monitor.rows, path.read_text(encoding="utf-8")


def recorded(bench: Bench) -> Any:
    model = bench.model()
    bench.folder.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    optimizer = msam.MSAM(model.parameters(), lr=0.05, rho=0.3)
    with ma.TrajectoryRecorder(folder, model, optimizer).attach():
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    read = trajectory.load(folder)
    return read.steps, torch.stack([read.points[index] for index in range(len(read.steps))]), read.buffers


def direction(make: Callable[[ma.Objective, Bench], Any]) -> Callable[[Bench], Any]:
    return lambda bench: make(bench.objective, bench)


DIRECTIONS: dict[str, Callable[[Bench], Any] | str] = {
    "directions.as_direction": direction(lambda o, b: directions.as_direction(o.gradient(), o)),
    "directions.eigenvector": direction(lambda o, b: directions.eigenvector(o).vector.abs()),
    "directions.gradient": direction(lambda o, b: directions.gradient(o, "filter")),
    "directions.interpolation": direction(lambda o, b: directions.interpolation(b.moving, 2 * o.point())),
    "directions.last_update": direction(lambda o, b: directions.last_update(o, 0.5 * o.point(), "layer")),
    "directions.momentum": direction(lambda o, b: directions.momentum(b.optimizer, o, "l2")),
    "directions.normalized": direction(lambda o, b: directions.normalized(o.gradient(), o.layout, o.point(), "filter")),
    "directions.orthogonalized": direction(
        lambda o, b: directions.orthogonalized(directions.gradient(o), directions.random(o))
    ),
    "directions.plane_through": direction(
        lambda o, b: directions.plane_through(b.moving, o.point() + 1, 2 * o.point())
    ),
    "directions.random": direction(lambda o, b: directions.random(o, 3)),
    "directions.restricted": direction(
        lambda o, b: directions.restricted(directions.gradient(o), o, o.with_parameters("4.*"))
    ),
    "directions.Direction": "what the other functions return",
    "directions.Plane": "what plane_through returns",
    "directions.Normalization": "a type of words",
}


def written(write: Callable[[Any, Path], Any], name: str, ending: str) -> Callable[[Bench], Any]:
    """Write a result to a file."""
    return lambda bench: write(bench.measured(name), bench.file(f"{name}.{ending}")) and None


def loaded(load: Callable[[Path, Bench], Any]) -> Callable[[Bench], Any]:
    """Load a checkpoint that was saved on the device."""

    def run(bench: Bench) -> Any:
        path = bench.file("weights.pt")
        torch.save(bench.model(2).state_dict(), path)
        found = load(path, bench)
        return dict(found.state_dict() if isinstance(found, nn.Module) else found)

    return run


def drawn(draw: Callable[[Bench], object]) -> Callable[[Bench], Any]:
    """Draw a result of the device; the picture is thrown away."""

    def run(bench: Bench) -> None:
        import matplotlib.pyplot as plt

        draw(bench)
        plt.close("all")

    return run


def picture(name: str) -> Callable[[Bench], Any]:
    """Draw what a measure returns."""
    return drawn(lambda bench: getattr(plots, name)(bench.measured(name)))


def plane(bench: Bench) -> results.Slice2D:
    """The slice through the plane of the trajectory."""
    return ma.slice_2d(bench.moving, ma.pca_plane(bench.trajectory).directions, points=3)


def kept(bench: Bench) -> Any:
    """A result, written to a file and read again."""
    found = bench.measured("ball_sharpness")
    return results.load(found.save(bench.file("ball.npz")))


FILES: dict[str, Callable[[Bench], Any] | str] = {
    "export.to_hdf5": written(ma.export.to_hdf5, "slice_2d", "h5"),
    "export.to_netcdf": written(ma.export.to_netcdf, "ball_sharpness", "nc"),
    "export.to_npz": written(ma.export.to_npz, "top_eigenvalues", "npz"),
    "export.to_vtk": written(ma.export.to_vtk, "slice_2d", "vtk"),
    "export.to_xarray": lambda bench: ma.export.to_xarray(bench.measured("slice_1d")) and None,
    "checkpoints.load": loaded(lambda path, bench: checkpoints.load(path, bench.model).model),
    "checkpoints.load_model": loaded(lambda path, bench: checkpoints.load_model(path, bench.model)),
    "checkpoints.load_weights": loaded(lambda path, bench: checkpoints.load_weights(path)),
    "checkpoints.compare": measure("compare"),
    "checkpoints.Loaded": "what load returns",
    "loggers.CSV": monitored,
    "loggers.Logger": "a type of functions",
    **dict.fromkeys(
        ("loggers.MLflow", "loggers.TensorBoard", "loggers.WandB"), "gets the monitor's rows, which are numbers"
    ),
    "results.load": kept,
    "results.load_trajectory": recorded,
    "results.layer_frame": lambda bench: ma.layer_frame(bench.measured("by_layer")).to_csv(),
    **{
        f"results.{name}": "what a measure returns, or a type, or a tool for files"
        for name in results.__all__
        if not name.startswith(("load", "layer"))
    },
}

NO_PICTURES = ("COLUMN_WIDTH", "PAGE_WIDTH", "Look", "look", "panels", "save", "style")
OTHER_PICTURES = ("LivePlot", "animate_trajectory", "interactive_surface", "live", "recorded")
PICTURES: dict[str, Callable[[Bench], Any] | str] = {
    **{f"plots.{name}": picture(name) for name in MEASURES},
    "plots.eigenvalues": drawn(lambda b: plots.eigenvalues(b.measured("top_eigenvalues"))),
    "plots.slice_1d_panels": drawn(lambda b: plots.slice_1d_panels({"a": {"SGD": b.measured("slice_1d")}})),
    "plots.surface_3d": drawn(lambda b: plots.surface_3d(b.measured("slice_2d"))),
    "plots.trajectory": drawn(lambda b: plots.trajectory(b.measured("project"))),
    "plots.trajectory_losses": drawn(lambda b: plots.trajectory_losses(b.measured("project"))),
    "plots.trajectory_panels": drawn(lambda b: plots.trajectory_panels(plane(b), b.measured("project"))),
    **{f"plots.{name}": "a size, a style or a frame of pictures" for name in NO_PICTURES},
    **{f"plots.{name}": "draws rows, or results that are drawn above" for name in OTHER_PICTURES},
}

TABLE: dict[str, Callable[[Bench], Any] | str] = {
    **{f"ma.{name}": measure(name) for name in MEASURES},
    "ma.Objective": derivatives,
    "ma.MatrixOperator": matrix,
    "ma.Monitor": monitored,
    "ma.TrajectoryRecorder": recorded,
    "ma.layer_frame": lambda bench: ma.layer_frame(bench.measured("by_layer")).to_csv(),
    "ma.normalization_layers": preset("bn_only_sam"),
    "ma.Direction": direction(lambda o, b: directions.gradient(o).normalized(o, "l2")),
    "ma.Examination": lambda bench: bench.objective.examine(),
    "ma.SymmetricOperator": "what Objective.hessian returns",
    **{
        f"ma.{name}": "an error or a warning"
        for name in ("ApproximationWarning", "ConvergenceWarning", "ExaminationError")
    },
    "trajectory.PrincipalPlane": "what pca_plane returns",
    "trajectory.TrajectoryRecorder": recorded,
    "trajectory.from_weights": lambda bench: bench.trajectory,
    "trajectory.grid": lambda bench: trajectory.grid(bench.measured("project"), 3),
    "trajectory.load": recorded,
    "trajectory.pca_plane": measure("pca_plane"),
    "trajectory.project": measure("project"),
    **OPTIMIZERS,
    **PROBES,
    **DIRECTIONS,
    **FILES,
    **PICTURES,
}
"""By public name, with its module before it; the presets by their own names behind that."""
