"""What processes do, for test_sharded: objectives of sharded models beside those of the same models whole."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard, distribute_tensor

import msam_analysis as ma
from msam_analysis.landscape.metrics import OutputMetric

from .cases import CASES, Case
from .sharded_models import (
    FOLDER,
    Found,
    Penalty,
    Sine,
    batches,
    compare,
    encoding,
    far,
    in_bfloat16,
    kept_without_scale,
    net,
    pair,
    root,
    shard,
    squares,
    whole,
    without_scale,
)

# ------------------------------------------------------------------------------------------------ cases of other tables


def of_table(case: Case, divide: Callable[[Any], Any], dtype: torch.dtype, **more: Any) -> Found:
    sharded, alone, _ = pair(lambda: case.model(dtype), divide, case.loss_fn, case.data(dtype), **more)
    return compare(sharded, alone)


def of_net(
    divide: Callable[[Any], Any] = without_scale, loss: Any = squares, data: Any = None, **options: bool
) -> Found:
    return compare(*pair(lambda: net(**options), divide, loss, data or batches())[:2])


def reached() -> Found:
    """The loss knows the original."""
    alone, sharded = net(), net()
    without_scale(sharded)
    data = [{"x": x, "y": y} for x, y in batches()]
    data = [dataset_pair(batch) for batch in data]
    return compare(ma.Objective(sharded, Penalty(sharded), data, ranks=True), ma.Objective(alone, Penalty(alone), data))


def dataset_pair(batch: dict[str, Tensor]) -> Any:
    """A batch that is no pair, so that the loss gets the model."""
    return batch["x"], batch["y"], torch.zeros(len(batch["x"]))


def methods() -> Found:
    """A method that gathers weights, as forward does."""

    def divide(model: Any) -> Any:
        without_scale(model)
        register_fsdp_forward_method(model, "encode")
        return model

    return of_net(divide, encoding, [{"x": x} for x, _ in batches()])


def selected() -> Found:
    """Some parameters, frozen ones among them."""
    sharded, alone, model = pair(net, without_scale, squares, batches())
    for each in (alone.model, model):
        each.last.weight.requires_grad_(False)
    found = compare(sharded.with_parameters(["first.*", "scale"]), alone.with_parameters(["first.*", "scale"]))
    frozen = compare(sharded.with_parameters("last.*"), alone.with_parameters("last.*"))
    rest = compare(ma.Objective(model, squares, batches(), ranks=True), ma.Objective(alone.model, squares, batches()))
    return (
        found | {f"frozen: {key}": value for key, value in frozen.items()} | {f"rest: {k}": v for k, v in rest.items()}
    )


def differences() -> Found:
    """Products by differences, with the step of the whole model: they differ by less than their error."""

    def model() -> Any:
        built: Any = net()
        built.block = Sine()
        return built

    sharded, alone, _ = pair(model, without_scale, squares, batches(), second_derivatives="central")
    found = compare(sharded, alone)
    stated = [o.settings["error of differences"] for o in (sharded, alone)]
    rough = ("hvp", "together", "again", "rebuilt")
    found |= {"kept": 0.0} | {key: float(found[key] > max(1e-9, *stated)) for key in rough}  # no graphs are kept
    return found | {"stated": float(not 0.1 < stated[0] / stated[1] < 10)}


def vectors() -> Found:
    """Flat vectors of tensors of any kind, by parameter or by name."""
    sharded, alone, model = pair(net, without_scale, squares, batches())
    part = sharded.space.part
    for each in (model, alone.model):
        squares(each(batches()[0][0]), batches()[0][1]).backward()
    of = {p: p.grad for p in model.parameters()}
    expected = alone.vector({p: p.grad for p in alone.model.parameters()})
    named = {name: p.grad for name, p in alone.model.named_parameters()}
    return {
        "by parameter": far(sharded.vector(of), part(expected)),
        "whole, by name": far(sharded.vector(named), part(expected)),
        "some": far(sharded.vector({"scale": torch.tensor(2.0)}), part(alone.vector({"scale": torch.tensor(2.0)}))),
    }


def split() -> Found:
    """Each process has other data, the second one none at all, or a batch that weighs nothing."""
    found: Found = {}
    for name, mine in {"two and one": [slice(0, 2), slice(2, 3)], "all and none": [slice(0, 3), slice(3, 3)]}.items():
        data = batches()[mine[dist.get_rank()]]
        sharded = ma.Objective(without_scale(net()), squares, data, ranks="split")
        alone = ma.Objective(net(), squares, batches())
        again = compare(sharded, alone) | {"kept": float(sharded.batches.samples != 21)}
        found |= {f"{name} {key}": value for key, value in again.items()}
    return found


def weightless() -> Found:
    """The labels of a batch are all to be ignored: it has no mean, and does not count."""
    data = [(x, y.argmax(1)) for x, y in batches()]
    data[1][1].fill_(-100)
    sharded, alone, _ = pair(net, without_scale, nn.CrossEntropyLoss(), data)
    return compare(sharded, alone) | {"kept": 0.0}


def samples() -> Found:
    """A bootstrap sample of the data."""
    sharded, alone, _ = pair(net, without_scale, squares, batches())
    chosen = torch.arange(0, 21, 2)
    return compare(sharded.with_samples(chosen), alone.with_samples(chosen))


def directions() -> Found:
    """Directions of all kinds and normalisations: parts of those of the whole model."""
    sharded, alone, model = pair(net, without_scale, squares, batches())
    part, d = sharded.space.part, ma.directions
    found: Found = {}
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, alone.model)]
    for objective, optimizer in zip((sharded, alone), optimizers, strict=True):
        trained(objective.model, optimizer)

    def near(name: str, one: Any, other: Any) -> None:
        found[name] = max(far(one.vector, part(other.vector)), abs(one.norm / other.norm - 1), one.name != other.name)

    for how in ("filter", "layer", "weight", "l2", "none"):
        for one_d in (False, True):
            near(f"{how} {one_d}", *(d.random(o, 5, how, one_d=one_d) for o in (sharded, alone)))
    near("gradient", *(d.gradient(o, "l2") for o in (sharded, alone)))
    near("momentum", *(d.momentum(opt, o) for opt, o in zip(optimizers, (sharded, alone), strict=True)))
    near("eigenvector", *(d.eigenvector(o) for o in (sharded, alone)))
    planes = [d.plane_through(o, *(o.point() + d.random(o, seed).vector for seed in (1, 2))) for o in (sharded, alone)]
    found["plane"] = far(planes[0].points, planes[1].points)
    for one, other in zip(planes[0].directions, planes[1].directions, strict=True):
        near(one.name, one, other)
    last = [o.with_parameters("last.*") for o in (sharded, alone)]
    parts = [d.restricted(d.random(o, 3), o, p) for o, p in zip((sharded, alone), last, strict=True)]
    found["restricted"] = far(parts[0].vector, last[0].space.part(parts[1].vector))
    found["bare"] = abs(ma.directions.as_direction(sharded.point(), sharded).norm / float(alone.point().norm()) - 1)
    return found


def spectra() -> Found:
    """Eigenvalues, traces and densities are those of the whole model."""
    sharded, alone, _ = pair(net, without_scale, squares, batches())
    part, found = sharded.space.part, {}
    pairs = [ma.top_eigenvalues(o, 3) for o in (sharded, alone)]
    found["eigenvalues"] = far(pairs[0].values, pairs[1].values)
    signs = torch.stack(
        [sharded.space.dot(*both) for both in zip(pairs[0].vectors.T, part(pairs[1].vectors).T, strict=True)]
    )
    found["eigenvectors"] = float((signs.abs() - 1).abs().max())
    for how in ("hutchinson", "hutch++"):
        found[how] = far(*(torch.tensor(ma.trace(o, method=how, draws=12).value) for o in (sharded, alone)))
    densities = [ma.spectral_density(o, probes=2, steps=6, extremes=1) for o in (sharded, alone)]
    found["density"] = far(densities[0].density, densities[1].density)
    gauss_newton = [ma.top_eigenvalues(o.gauss_newton(), 1).values for o in (sharded, alone)]
    return found | {"Gauss-Newton": far(*gauss_newton)}


def fisher() -> Found:
    """Fisher matrices, also where a process repeats a batch that does not count."""
    found: Found = {}
    classes = [(x, y.argmax(1)) for x, y in batches()]
    for name, loss, data in (
        ("means", nn.CrossEntropyLoss(), classes),
        ("sums", nn.CrossEntropyLoss(reduction="sum"), classes),
        ("values", nn.MSELoss(), batches()),
    ):
        sharded, alone, _ = pair(net, without_scale, loss, data)
        part, v = sharded.space.part, alone.space.gaussian(5, seed=0, like=alone.point())
        ways: dict[str, Any] = {"empirical": {}, "sampled": {"kind": "sampled", "draws": 2}}
        for kind, options in ways.items():
            one, other = (o.fisher(**options) for o in (sharded, alone))
            found[f"{name} {kind}"] = far(one @ part(v), part(other @ v))
            found[f"{name} {kind} again"] = far(one @ part(v[:, 0]), part(other @ v[:, 0]))
            found[f"{name} {kind} trace"] = far(*(torch.tensor(ma.trace(f, draws=6).value) for f in (one, other)))
        found[f"{name} eigenvalue"] = far(*(ma.top_eigenvalues(f, 1).values for f in (one, other)))
    return found


def measures() -> Found:
    """Balls, averages and curvatures along a line are those of the whole model."""
    both = pair(net, without_scale, squares, batches())[:2]

    def near(ask: Callable[[ma.Objective], float]) -> float:
        one, other = (ask(o) for o in both)
        return abs(one - other) / abs(other)

    return {
        "ball": near(lambda o: ma.ball_sharpness(o, 0.1).sharpness),
        "average": near(lambda o: ma.average_sharpness(o, 0.05, draws=3).value),
        "along": near(lambda o: ma.curvature_along(o, ma.directions.random(o)).value),
        "critical": near(lambda o: ma.critical_sharpness(o).value),
        "critical along": near(lambda o: ma.critical_sharpness(o, ma.directions.gradient(o, "l2")).value),
        "adaptive": near(lambda o: ma.ball_sharpness(o, 0.1, adaptive=True).sharpness),
        "table": near(lambda o: float(ma.measure(o, metrics=("loss",)).table["value"].abs().sum())),
    }


def flatness() -> Found:
    objective = pair(net, without_scale, squares, batches())[0]
    return {"value": ma.relative_flatness(objective, "last.weight").value}


def slices(folder: str = "") -> Found:
    """Slices, with metrics of both kinds, with errors, under a policy that reads the data at each point; in files."""
    found: Found = {}
    options: dict[str, Any] = {"points": 3, "progress": False}
    metrics: dict[str, Any] = {"norm": gradient_norm, "sizes": OutputMetric(lambda output, target: output.norm(dim=1))}
    sharded, alone, _ = pair(net, without_scale, squares, batches())
    both = sharded, alone
    lines = [ma.slice_1d(o, ma.directions.random(o, 1), metrics=metrics, **options) for o in both]
    found["line"] = far(lines[0].loss, lines[1].loss)
    found |= {f"metric {key}": far(lines[0].metrics[key], lines[1].metrics[key]) for key in metrics}
    drawn = [ma.slice_1d(o, ma.directions.random(o, 1), samples=12, **options) for o in both]
    found["drawn"] = far(drawn[0].loss, drawn[1].loss) + far(drawn[0].standard_error, drawn[1].standard_error)
    planes = [ma.slice_2d(o, (ma.directions.random(o, 1), ma.directions.random(o, 2)), **options) for o in both]
    found["plane"] = far(planes[0].loss, planes[1].loss)
    found["cosine"] = abs(planes[0].cosine - planes[1].cosine)
    convnet = next(case for case in CASES if "batch" in case.policies)
    kept = shared_folder() / "line"  # of all processes, in one of which it is written
    again = [ma.slice_1d(sharded, ma.directions.random(sharded, 1), path=kept, **options) for _ in range(2)]
    found["file"] = far(again[0].loss, lines[1].loss) + far(again[1].loss, lines[1].loss)
    pairs = pair(convnet.model, shard, convnet.loss_fn, convnet.data(), batchnorm="recalibrate")[:2]
    again = [ma.slice_1d(o, ma.directions.gradient(o), **options) for o in pairs]
    return found | {"recalibrate": far(again[0].loss, again[1].loss)}


def shared_folder() -> Path:
    """A new folder that all processes know."""
    names = [tempfile.mkdtemp(dir=FOLDER[0])]
    dist.broadcast_object_list(names)
    return Path(names[0])


def gradient_norm(objective: ma.Objective, w: Tensor) -> float:
    return float(objective.space.norm(objective.gradient(w)))


def chunks() -> Found:
    objective = pair(net, without_scale, squares, batches())[0]
    return {"loss": ma.slice_1d(objective, ma.directions.random(objective), chunk=2, points=3, progress=False).loss}


# -------------------------------------------------------------------------------------------------the model is its own


def state(model: nn.Module) -> list[Any]:
    """What a measurement must leave: types and identities, values of shards and of whole weights, gradients, modes."""
    kept: list[Any] = []
    for name, p in model.named_parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        gradient = None if p.grad is None else getattr(p.grad, "to_local", lambda p=p: p.grad)().clone()
        kept.append((name, id(p), hasattr(p, "to_local"), local.detach().clone(), gradient, p.requires_grad))
    modes = [(module.training, sorted(vars(module)), len(module._forward_hooks)) for module in model.modules()]
    return [kept, modes, [b.clone() for b in model.buffers()], torch.random.get_rng_state(), random.getstate()[1][:5]]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def measured(model: Any, before: Callable[[Any], None]) -> dict[str, float]:
    """Measure a model in some state; what was measured, and whether the model is as it was."""
    before(model)
    alone = net()
    with torch.no_grad():
        for name, p in alone.named_parameters():
            p.copy_(weights_of(model)[name])
    before_it = state(model)
    sharded = ma.Objective(model, squares, batches(), ranks=True)
    found = compare(sharded, ma.Objective(alone, squares, batches()))
    sharded.with_parameters("last.*").gradient()
    found["another state"] = float(not same(before_it, state(model)))
    return found


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights of a model, by a twin of its state, which is not touched."""
    return {name: whole(p) for name, p in model.named_parameters()}


PENDING: list[Tensor] = []


def never_run(model: Any) -> None:
    pass


def just_run(model: Any) -> None:
    """The root, at least, holds whole weights afterwards."""
    with torch.no_grad():
        model(batches()[0][0])
    assert not all(hasattr(p, "to_local") for p in model.parameters())


def trained(model: Any, optimizer: Any = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    squares(model(batches()[0][0]), batches()[0][1]).backward()
    optimizer.step()


def in_the_middle(model: Any) -> None:
    """Between a forward and a backward pass, with gradients of an earlier one."""
    trained(model)
    PENDING.append(squares(model(batches()[1][0]), batches()[1][1]))


def goes_on() -> Found:
    """An objective is measured while its model trains; then the backward pass that was under way is right."""
    PENDING.clear()
    model, twin = without_scale(net()), net()
    found = measured(model, in_the_middle)
    in_the_middle(twin)
    for each, value in zip((model, twin), PENDING, strict=True):
        each.zero_grad()
        value.backward()
    gradients = zip(model.parameters(), twin.parameters(), strict=True)
    found["pending"] = max(far(whole(one.grad), other.grad) for one, other in gradients)
    return found


def followed() -> Found:
    """An objective sees the weights that the model has now, whole or sharded, and changes of attributes."""
    sharded, alone, model = pair(net, kept_without_scale, squares, batches())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, alone.model)]
    found: Found = {}
    for step, change in enumerate((never_run, just_run, trained, just_run)):
        if change is trained:
            for each, optimizer in zip((model, alone.model), optimizers, strict=True):
                trained(each, optimizer)
        else:
            change(model)
        found |= {f"{step} {key}": value for key, value in compare(sharded, alone).items()}
    for each in (model, alone.model):
        each.reach = True
    return found | {f"changed: {key}": value for key, value in compare(sharded, alone).items()}


# ------------------------------------------------------------------------------------------------------------ refusals


def tensor_parallel() -> Found:
    """Rows of a parameter are divided, but not by FSDP."""
    model, mesh = net(), init_device_mesh("cpu", (dist.get_world_size(),))
    model.first.weight = nn.Parameter(distribute_tensor(model.first.weight.detach(), mesh, [Shard(0)]))
    return {"point": ma.Objective(model, squares, batches(), ranks=True).point()}


def by_columns() -> Found:
    model: Any = fully_shard(net().first, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else Shard(0))
    return {"point": ma.Objective(model, squares, batches(), ranks=True).point()}


def two_meshes() -> Found:
    """Layers are divided among four processes, and among two of them."""
    model = net()
    fully_shard(model.first, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model.last, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return {"point": ma.Objective(model, squares, batches(), ranks=True).point()}


def alone() -> Found:
    """Processes that do not measure together."""
    return {"point": ma.Objective(without_scale(net()), squares, batches()).point()}


def replicated() -> Found:
    """Four processes, two and two: the weights are divided in each half."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return of_net(lambda model: shard(model, mesh=mesh, ignored_params={model.scale}))


HERE: dict[str, Callable[[], Found]] = {
    "net": of_net,
    "kept whole": lambda: of_net(kept_without_scale),
    "bfloat16 in training": lambda: of_net(in_bfloat16),
    "run again": lambda: of_net(blocks=True),
    "child's weight": lambda: of_net(kept_without_scale, reach=True),
    "recurrent": lambda: of_net(lstm=True),
    "reached": reached,
    "methods": methods,
    "selected": selected,
    "differences": differences,
    "vectors": vectors,
    "split": split,
    "weightless": weightless,
    "samples": samples,
    "directions": directions,
    "spectra": spectra,
    "fisher": fisher,
    "slices": slices,
    "measures": measures,
    "chunks": chunks,
    "flatness": flatness,
    "never run": lambda: measured(without_scale(net()), never_run),
    "just run": lambda: measured(without_scale(net()), just_run),
    "just run, kept whole": lambda: measured(kept_without_scale(net()), just_run),
    "trained": lambda: measured(without_scale(net()), trained),
    "goes on": goes_on,
    "followed": followed,
    "tensor parallel": tensor_parallel,
    "by columns": by_columns,
    "alone": alone,
}
REFUSED = {
    "tensor parallel": "ValueError: .*not by fully_shard: expected FSDP2; measure",
    "by columns": r"ValueError: .*is divided as \(Shard\(dim=1\),\): expected rows",
    "two meshes": "ValueError: expected weights that are all divided alike, got 'model.last.weight'",
    "chunks": "ValueError: expected points one after the other where processes share the weights, got chunk=2",
    "flatness": "ValueError: relative flatness needs the singular values of 'last.weight', whose rows",
    "alone": "ValueError: the weights are sharded over 2 processes, and 1 measure together: expected",
}


def cases(world: int) -> dict[str, Callable[[], Found]]:
    """All that some processes do, by name; four of them do less."""
    table: dict[str, Callable[[], Found]] = {}
    for case in CASES:
        for policy in (*case.policies, *(["recalibrate"] if "batch" in case.policies else [])):
            if case.name == "tied":  # units of their own would part the two
                continue
            name, more = f"{case.name} {policy}", {"batchnorm": policy}
            table[name] = partial(of_table, case, shard, torch.float64, **more)
            if world == 2 and policy == "eval":
                table[f"{name} float32"] = partial(of_table, case, shard, torch.float32, **more)
        table[f"{case.name} root"] = partial(of_table, case, root, torch.float64)
    if world == 4:
        return table | {"replicated": replicated, "two meshes": two_meshes}
    return table | HERE


def work(rank: int, folder: str, world: int) -> None:
    """One of some processes; a case that fails leaves its sentence, and its group."""
    torch.set_num_threads(1)
    FOLDER[:] = [folder]
    results: dict[str, Any] = {}
    for number, (name, make) in enumerate(cases(world).items()):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=world)
        dist.barrier()  # a process that is refused at once must not leave while the other still connects
        try:
            results[name] = make()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test looks at
            results[name] = f"{type(error).__name__}: {error}"
        dist.destroy_process_group()
    torch.save(results, Path(folder) / f"rank{rank}.pt")
