"""Parameters in two processes, by FSDP2 and by ZeroRedundancyOptimizer: what one process does, or a refusal.

The norm is over all parameters, wherever they lie. Shards are uneven, and some are empty. One pair of processes makes
all cases, each in a process group of its own: a rank that fails leaves it, and the other does not wait.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

import msam

from .workloads import backward, furthest

pytestmark = pytest.mark.filterwarnings("ignore:expected writes to weights in eval")  # a case has them

STEPS = 4
SGD: dict[str, Any] = dict(lr=0.1, momentum=0.9, weight_decay=1e-2)
ADAMW: dict[str, Any] = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)


def along(**switches: Any) -> dict[str, Any]:
    """Options of the general optimizer for a perturbation."""
    return dict(SGD, perturbation=msam.Perturbation(**{"rho": 0.3, **switches}))


OPTIMIZERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, SGD),
    "MSAM": (msam.MSAM, dict(SGD, rho=0.3)),
    "MSAM, copies": (msam.MSAM, dict(SGD, rho=0.3, restore="copy")),
    "MSAM, fused": (msam.MSAM, dict(SGD, rho=0.3, fused=True)),
    "MSAM, foreach": (msam.MSAM, dict(SGD, rho=0.3, foreach=True)),
    "MSAM, written": (msam.MSAM, dict(SGD, rho=0.3)),
    "NAG": (msam.NAG, SGD),
    "SAM": (msam.SAM, dict(SGD, rho=0.3)),
    "SAM, two calls": (msam.SAM, dict(SGD, rho=0.3)),
    "ASAM": (msam.SAM, dict(SGD, rho=0.3, adaptive=True)),
    "AdamWMSAM": (msam.AdamWMSAM, dict(ADAMW, rho=0.3)),
    "AdamWSAM": (msam.AdamWSAM, dict(ADAMW, rho=0.3)),
    "adaptive": (msam.PerturbedSGD, along(direction="momentum", scale="adaptive")),
    "relative": (msam.PerturbedSGD, along(direction="momentum", scale="relative")),
    "random": (msam.PerturbedSGD, along(direction="random", seed=3)),
    "last gradient": (msam.PerturbedSGD, along(direction="last_gradient")),
}
BY_FSDP = [name for name in OPTIMIZERS if name != "MSAM, fused"]  # torch's fused kernels know no shards
# a step() and nothing else; random noise is drawn for the share that a process has
BY_ZERO = [name for name in OPTIMIZERS if name not in ("SAM, two calls", "MSAM, written", "random")]


def network() -> nn.Sequential:
    """Layers whose first dimensions two processes share unevenly; the last one's is 1, so that one has nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def loss(model: nn.Module, step: int, rank: int | None = None) -> Tensor:
    """Mean over a batch, or over one half of it."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    x = x if rank is None else x[4 * rank : 4 * rank + 4]
    value: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return value


def closure_of(model: nn.Module, opt: Any, step: int, rank: int | None) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        return backward(loss(model, step, rank))

    return closure


def whole(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters, gathered from their shards."""
    return [getattr(p.detach(), "full_tensor", p.detach)().clone() for p in model.parameters()]


def steps(model: nn.Module, opt: Any, name: str, rank: int | None = None) -> dict[str, list[Tensor]]:
    """What a training loop leaves: the weights as they stand after every step, and the true ones at the end."""
    found = {}
    for step in range(STEPS):
        closure = closure_of(model, opt, step, rank)
        if name == "SAM, two calls":
            closure()
            opt.first_step()
            closure()
            opt.second_step()
        else:
            opt.step(closure)
        if name == "MSAM, written" and step == 1:  # by somebody else, while they stand displaced
            with torch.no_grad():
                next(model.parameters()).mul_(0.5)
        found[f"after step {step}"] = whole(model)
    if hasattr(opt, "unperturbed"):
        with opt.unperturbed():
            found["true"] = whole(model)
        opt.eval()
        found["eval"] = whole(model)
    return found


def alone(name: str) -> dict[str, list[Tensor]]:
    model = network()
    cls, options = OPTIMIZERS[name]
    return steps(model, cls(model.parameters(), **options), name)


def by_fsdp(name: str, rank: int) -> dict[str, list[Tensor]]:
    """Each process has its half of every batch; gradients are averaged."""
    model, mesh = network(), init_device_mesh("cpu", (2,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    cls, options = OPTIMIZERS[name]
    return steps(model, cls(model.parameters(), **options), name, rank)


def by_zero(name: str, rank: int) -> dict[str, list[Tensor]]:
    """Each process has every batch, steps some of the parameters, and sends them to the other."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns; here warnings are no errors

    model = network()
    cls, options = OPTIMIZERS[name]
    return steps(model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **options), name)


WAYS: list[tuple[str, Callable[[str, int], dict[str, list[Tensor]]], list[str]]] = [
    ("fsdp", by_fsdp, BY_FSDP),
    ("zero", by_zero, BY_ZERO),
]


def work(rank: int, folder: str) -> None:
    """One of the two processes; a case that fails leaves its sentence, and its group."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for way, make, names in WAYS:
        for name in names:
            meeting = f"file://{folder}/{way} {name}".replace(" ", "-").replace(",", "")
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
            dist.barrier()  # a process that is refused at once must not leave while the other still connects
            try:
                results[f"{way} {name}"] = make(name, rank)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what the test looks at
                results[f"{way} {name}"] = f"{type(error).__name__}: {error}"
            dist.destroy_process_group()
    torch.save(results, Path(folder) / f"rank{rank}.pt")


def is_a_refusal(told: list[str]) -> bool:
    """Both processes say the same in one line, and it is about what is shared."""
    return len(set(told)) == 1 and bool(re.fullmatch(r"(Runtime|Value|Type)Error: .*(shard|process|rank).*", told[0]))


def trouble(way: str, found: list[Any], expected: dict[str, list[Tensor]]) -> str | None:
    """What is wrong about a case, if anything."""
    told = [result for result in found if isinstance(result, str)]
    if told:
        return None if way == "zero" and is_a_refusal(found) else told[0].splitlines()[0]
    far = {key: max(furthest(result[key], expected[key]) for result in found) for key in found[0]}
    wrong = {key: f"{gap:.1e}" for key, gap in far.items() if gap > 1e-11}
    return f"off by {wrong}" if wrong else None


def test_two_processes_do_what_one_does() -> None:
    """FSDP2 does; what ZeroRedundancyOptimizer cannot do is refused by both processes. torch's SGD is the control."""
    expected = {name: alone(name) for name in OPTIMIZERS}
    with tempfile.TemporaryDirectory() as name:
        spawn(work, args=(name,), nprocs=2, daemon=True)
        ranks = [torch.load(Path(name) / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert len(ranks[0]) == len(BY_FSDP) + len(BY_ZERO)
    troubles = []
    for key in ranks[0]:
        way, case = key.split(" ", 1)
        if what := trouble(way, [rank[key] for rank in ranks], expected[case]):
            troubles.append(f"{key}: {what}")
    assert not troubles, "\n".join(troubles)


def test_the_cases_displace() -> None:
    """In one process the true weights are others than those that stand; else the test above could not fail."""
    for name in OPTIMIZERS:
        found = alone(name)
        between = name not in ("SGD", "SAM", "SAM, two calls", "ASAM", "AdamWSAM")
        plain = alone("SGD")
        if between:
            assert furthest(found["true"], found[f"after step {STEPS - 1}"]) > 1e-2
        if name != "SGD":
            assert furthest(found["true"], plain[f"after step {STEPS - 1}"]) > 1e-3
            assert furthest(found["true"], found["eval"]) < 1e-14
