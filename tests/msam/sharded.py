"""What two processes do, for test_shards: train with parameters that are divided among them, and save what came out."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import msam
from msam.perturbation import global_norm

STEPS = 6
HOW: dict[str, dict[str, Any]] = {"plain": {}, "fused": {"fused": True}}


def network() -> nn.Sequential:
    """Rows that two processes do not share evenly: 7, 5 and 3 of them, and one for both."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1)]
    return nn.Sequential(*layers).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, 1, generator=generator, dtype=torch.float64)


def optimizer(name: str, model: nn.Module, params: Any, **options: Any) -> Any:
    """The optimizer of a preset."""
    row = msam.PRESETS[name]
    subset = msam.normalization_layers(model) if row.normalization_only else None
    perturbation = row(min(row.rho, 0.3), subset=subset)
    if row.optimizer == "adamw":
        return msam.PerturbedAdamW(params, lr=0.01, perturbation=perturbation, **options)
    return msam.PerturbedSGD(params, 0.05, 0.9, weight_decay=5e-3, perturbation=perturbation, **options)


def whole(tensors: Any) -> list[Tensor]:
    """The tensors of all processes."""
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for t in tensors]


def trained(model: nn.Module, opt: Any, mine: slice, switch: bool = True) -> list[Tensor]:
    """Weights after some steps on a share of each batch, displaced and true, and ε."""
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            opt.zero_grad()
            x, y = batch(step)
            value: Tensor = (model(x[mine]) - y[mine]).square().mean()
            value.backward()
            return value

        if switch and opt.perturbation.direction == "gradient":
            opt.step(closure)
        else:
            closure()
            opt.step()
        if switch and step == 3:
            with opt.unperturbed():
                pass
    found = whole(model.parameters())
    if switch:
        shift = opt.displacement()
        found += whole(shift[p] for p in model.parameters() if p in shift)
        with opt.unperturbed():
            found += whole(model.parameters())
        state = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(state)
        found += whole(opt.state[p][key] for p in model.parameters() for key in sorted(opt.state[p]))
    return found


def alone(name: str, how: str) -> list[Tensor]:
    model = network()
    return trained(model, optimizer(name, model, model.parameters(), **HOW[how]), slice(None))


def under_fsdp(name: str, how: str, rank: int) -> list[Tensor]:
    model = network()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return trained(model, optimizer(name, model, model.parameters(), **HOW[how]), slice(rank, None, 2))


def zero(name: str, model: nn.Module, **options: Any) -> Any:
    """The optimizer that gives each process a share of the parameters."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit when it is imported

    make: Any = lambda params, **more: optimizer(name, model, params, **more)  # noqa: E731
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=make, **options)


def under_zero(name: str, how: str, rank: int) -> list[Tensor]:
    """The parameters of all processes are displaced alike after a step."""
    model = nn.parallel.DistributedDataParallel(network())
    return trained(model, zero(name, model, **HOW[how]), slice(rank, None, 2), switch=False)


def under_zero_with_epsilon(name: str, rank: int) -> list[Tensor]:
    """Parts of ε in this process, side by side as one vector; their squares add up to ρ² over the processes."""
    model = nn.parallel.DistributedDataParallel(network())
    opt = zero(name, model)
    trained(model, opt, slice(rank, None, 2), switch=False)
    return [torch.cat([e.flatten() for e in opt.optim.displacement().values()])]


def noticed(write: str, rank: int) -> list[Any]:
    """Warnings of writes to sharded weights, and whether what was written is what counts."""
    model = network()
    fully_shard(model)
    opt = optimizer("msam", model, model.parameters())
    trained(model, opt, slice(rank, None, 2), switch=False)
    with torch.no_grad():
        for p in model.parameters():
            part: Any = p
            (p if write == "whole" else part.to_local()).mul_(0.5)
    before = whole(model.parameters())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.eval()
    return [len(seen), all(torch.equal(a, b) for a, b in zip(before, whole(model.parameters()), strict=True))]


def partial(rank: int) -> Tensor:
    """A norm of tensors that are to be added up first."""
    mesh = init_device_mesh("cpu", (2,))
    return global_norm([DTensor.from_local(torch.ones(3), mesh, [Partial()])])


def replicated(rank: int) -> list[Tensor]:
    """A norm of a matrix that is divided in rows, a vector that all processes have, and one that is no DTensor."""
    mesh = init_device_mesh("cpu", (2,))
    rows = distribute_tensor(torch.full((3, 2), 2.0), mesh, [Shard(0)])
    copied = distribute_tensor(torch.full((4,), 3.0), mesh, [Replicate()])
    return [global_norm([rows, copied, torch.full((1,), 4.0)])]


def answer(ask: Callable[..., Any], *arguments: Any) -> Any:
    """What comes back, or the error in words."""
    try:
        return ask(*arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def work(rank: int, folder: str) -> None:
    """All ways of all presets in one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=2)
    found: dict[str, Any] = {"partial": answer(partial, rank), "replicated": answer(replicated, rank)}
    for name, how in itertools.product(msam.PRESETS, HOW):
        found[f"fsdp {name} {how}"] = answer(under_fsdp, name, how, rank)
        found[f"zero {name} {how}"] = answer(under_zero, name, how, rank)
    for name in ("msam", "random"):
        found[f"epsilon {name}"] = answer(under_zero_with_epsilon, name, rank)
    for write in ("whole", "part"):
        found[f"write {write}"] = answer(noticed, write, rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    gc.collect()  # gloo's threads have to end before the process does
    dist.destroy_process_group()
