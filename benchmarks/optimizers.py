"""What a step of the optimizers costs, in time, traffic and memory; docs/optimizers.md says how to read it.

``python benchmarks/optimizers.py`` takes under four minutes on one core; two processes take part where it is FSDP2.
``--device cuda`` times the same table on a GPU, eager and replayed from a captured graph, and checks that no step waits
for the device; no figures of it are kept here yet. ``pytorch_optimizer`` is compared with if it is installed;
davda54/sam is not on PyPI.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import Action, interleaved, machine, quartiles, ratio, save
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy, relu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import msam

Shapes = list[tuple[int, ...]]
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
RESULTS = Path(__file__).parent / "results"


# ---------------------------------------------------------------- what is trained


class Block(nn.Module):
    """A pre-activation block of a wide residual network (Zagoruyko & Komodakis, arXiv 1605.07146)."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inward)
        self.conv1 = nn.Conv2d(inward, outward, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outward)
        self.conv2 = nn.Conv2d(outward, outward, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inward, outward, 1, stride, bias=False) if inward != outward else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = relu(self.norm1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        result: Tensor = kept + self.conv2(relu(self.norm2(self.conv1(y))))
        return result


def wrn(depth: int = 16, width: int = 4, classes: int = 100) -> nn.Sequential:
    """A wide residual network for images of 32 × 32."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
    channels = 16
    for stage, stride in enumerate((1, 2, 2)):
        for block in range((depth - 4) // 6):
            outward = 16 * width * 2**stage
            layers.append(Block(channels, outward, stride if block == 0 else 1))
            channels = outward
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)


def wrn_shapes() -> Shapes:
    """WRN-16-4: 2.8 M parameters in 44 tensors."""
    return [tuple(p.shape) for p in wrn().parameters()]


def vit_shapes() -> Shapes:
    """ViT-B/16 (Dosovitskiy et al., arXiv 2010.11929): 87 M parameters in 152 tensors."""
    d, tokens = 768, 197
    block: Shapes = [
        *((d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)),  # norm, attention
        *((d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)),  # norm, perceptron
    ]
    return [(1, 1, d), (1, tokens, d), (d, 3, 16, 16), (d,), *block * 12, (d,), (d,), (1000, d), (1000,)]


def parameters(shapes: Shapes, device: str) -> list[nn.Parameter]:
    """Parameters of these shapes, gradients in place."""
    generator = torch.Generator(device).manual_seed(0)
    made = [nn.Parameter(0.05 * torch.randn(shape, generator=generator, device=device)) for shape in shapes]
    for p in made:
        p.grad = 0.01 * torch.randn(p.shape, generator=generator, device=device)
    return made


# ---------------------------------------------------------------- what is compared


class TensorByTensor:
    """MSAM as the paper's Algorithm 1 reads, one tensor after the other: how a plain implementation does it."""

    def __init__(self, weights: list[nn.Parameter], rho: float, lr: float, momentum: float, weight_decay: float):
        self.weights, self.rho, self.lr, self.momentum, self.decay = weights, rho, lr, momentum, weight_decay
        self.velocities = [torch.zeros_like(w) for w in weights]
        self.scale = torch.zeros((), device=weights[0].device)

    @torch.no_grad()
    def step(self) -> None:
        """Remove the perturbation, update the momentum, step, perturb along the new momentum."""
        for w, v in zip(self.weights, self.velocities, strict=True):
            w.add_(v * self.scale)
            v.mul_(self.momentum).add_(w.grad + self.decay * w if w.grad is not None else self.decay * w)
            w.sub_(self.lr * v)
        norm = torch.stack([v.norm() for v in self.velocities]).norm()
        self.scale = self.rho / (norm + 1e-12)
        for w, v in zip(self.weights, self.velocities, strict=True):
            w.sub_(v * self.scale)


def both(optimizer: Any) -> Action:
    """SAM's own work: displace, come back and step, with gradients already there."""

    def act() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return act


Maker = Callable[[list[nn.Parameter]], Action]

# bytes that must move for each float32 parameter: every tensor read or written once in each pass that cannot be merged
TWO_PASSES = "a norm over all must be known before the weights can be displaced: read w, v, write w"
STEPS: dict[str, tuple[Maker, str, int, str]] = {  # name: how it is made, what it is compared with, bytes, which ones
    "SGD": (lambda p: torch.optim.SGD(p, **SGD, fused=True).step, "SGD", 20, "read w, g, v, write w, v"),
    "MSAM": (lambda p: msam.MSAM(p, rho=3.0, **SGD, fused=True).step, "SGD", 32, f"SGD's 20; {TWO_PASSES}"),
    "MSAM, lr → 0": (
        lambda p: msam.MSAM(p, rho=3.0, **{**SGD, "lr": 1e-9}, fused=True).step,
        "SGD",
        32,
        "the same; taken from the true weights, for the digits",
    ),
    "NAG": (lambda p: msam.NAG(p, **SGD, fused=True).step, "SGD", 20, "no norm: as SGD"),
    "MSAM, tensor by tensor": (
        lambda p: TensorByTensor(p, rho=3.0, **SGD).step,
        "SGD",
        32,
        "Algorithm 1 as a plain loop",
    ),
    "MSAM, not fused": (lambda p: msam.MSAM(p, rho=3.0, **SGD).step, "SGD", 32, "torch's default kernels"),
    "SAM, both steps": (
        lambda p: both(msam.SAM(p, **SGD, fused=True)),
        "SGD",
        40,
        "read g; read w, g, write w, copy; read copy, g, v, write w, v",
    ),
    "AdamW": (lambda p: torch.optim.AdamW(p, fused=True).step, "AdamW", 28, "read w, g, m, u, write w, m, u"),
    "AdamWMSAM": (lambda p: msam.AdamWMSAM(p, fused=True).step, "AdamW", 40, f"AdamW's 28; {TWO_PASSES}"),
}


def peer_sam() -> Maker | None:
    """pytorch_optimizer's SAM around the same fused SGD, if it is installed."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return None
    peer = importlib.import_module("pytorch_optimizer")
    return lambda p: both(peer.SAM(p, torch.optim.SGD, rho=0.05, **SGD, fused=True))


# ---------------------------------------------------------------- tables


def captured(action: Action) -> Action:
    """The action as a CUDA graph's replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def on_gpu(makers: dict[str, Maker], shapes: Shapes) -> dict[str, Action]:
    """Eager and captured actions; an eager step that waits for the device is an error."""
    actions: dict[str, Action] = {}
    for name, make in makers.items():
        eager = actions[name] = make(parameters(shapes, "cuda"))
        eager()
        torch.cuda.set_sync_debug_mode("error")
        eager()
        torch.cuda.set_sync_debug_mode("default")
        if not name.startswith("AdamW"):  # torch counts AdamW's steps on the host unless told otherwise
            actions[f"{name}, graph"] = captured(make(parameters(shapes, "cuda")))
    return actions


def time_steps(shapes: Shapes, options: argparse.Namespace, repetitions: int) -> list[dict[str, Any]]:
    """One row for each optimizer: time, ratio to its base, floor."""
    rows = dict(STEPS)
    peer = peer_sam()
    if peer is not None:
        rows["SAM, both steps, pytorch_optimizer"] = (peer, "SGD", 40, "as SAM")
    makers = {name: row[0] for name, row in rows.items()}
    if options.device == "cuda":
        actions = on_gpu(makers, shapes)
    else:
        actions = {name: make(parameters(shapes, "cpu")) for name, make in makers.items()}
    times = interleaved(actions, repetitions, options.clock, options.device)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    table = []
    for name, values in times.items():
        _, base, size, why = rows[name.removesuffix(", graph")]
        table.append(
            {
                "optimizer": name,
                **quartiles(values),
                "base": base,
                **ratio(values, times[base]),
                "floor_bytes": size * count,
                "floor_ratio": size / rows[base][2],
                "floor_is": why,
            }
        )
        print(row_of(table[-1]))
    return table


def row_of(row: dict[str, Any]) -> str:
    """A line of the table."""
    floor = f"  floor {row['floor_ratio']:.2f}" if "floor_ratio" in row else ""
    spread = f"{row['median_ms']:9.2f} ms ({row['q1_ms']:.2f} to {row['q3_ms']:.2f})"
    quotient = f"{row['ratio']:.3f} of {row['base']} ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})"
    return f"  {row['optimizer']:36s} {spread:34s} {quotient:36s}{floor}"


def time_training(options: argparse.Namespace, repetitions: int) -> list[dict[str, Any]]:
    """Whole training steps of WRN-16-4: forward, backward and step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32, generator=generator).to(options.device)
    y = torch.randint(100, (options.batch,), generator=generator).to(options.device)

    def trained(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Action:
        model = wrn().to(options.device)
        optimizer = make(model)

        def closure() -> Any:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        return lambda: optimizer.step(closure)

    times = interleaved(
        {
            "SGD": trained(lambda m: torch.optim.SGD(m.parameters(), **SGD, fused=True)),
            "MSAM": trained(lambda m: msam.MSAM(m.parameters(), rho=3.0, **SGD, fused=True)),
            "SAM": trained(lambda m: msam.SAM(m.parameters(), rho=0.2, **SGD, fused=True)),
        },
        repetitions,
        options.clock,
        options.device,
    )
    table = []
    for name, values in times.items():
        table.append({"optimizer": name, **quartiles(values), "base": "SGD", **ratio(values, times["SGD"])})
        print(row_of(table[-1]))
    return table


# ---------------------------------------------------------------- divided parameters

SHARDED: dict[str, tuple[Maker, str]] = {  # torch's fused SGD refuses parameters that are divided
    "SGD, not fused": (lambda p: torch.optim.SGD(p, **SGD).step, "SGD, not fused"),
    "MSAM, not fused": (STEPS["MSAM, not fused"][0], "SGD, not fused"),
    "MSAM": (STEPS["MSAM"][0], "SGD, not fused"),
    "SAM, both steps": (STEPS["SAM, both steps"][0], "SGD, not fused"),
    "AdamW": (STEPS["AdamW"][0], "AdamW"),
    "AdamWMSAM": (STEPS["AdamWMSAM"][0], "AdamW"),
}


def sharded(rank: int, folder: str, repetitions: int) -> None:
    """One of the processes that hold WRN-16-4 together; the first one writes its times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    actions: dict[str, Action] = {}
    for name, (make, _) in SHARDED.items():
        model = wrn()
        fully_shard(model, mesh=mesh)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        actions[name] = make(list(model.parameters()))
    times = interleaved(actions, repetitions, "cpu", "cpu")
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps(times), encoding="utf-8")
    dist.destroy_process_group()


def time_sharded(repetitions: int) -> list[dict[str, Any]]:
    """One step of WRN-16-4 under FSDP2 in two processes: each one's own time, without what it waits for the other."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(sharded, args=(folder, repetitions), nprocs=2)
        times = json.loads(Path(folder, "times.json").read_text(encoding="utf-8"))
    table = []
    for name, values in times.items():
        base = SHARDED[name][1]
        table.append({"optimizer": name, **quartiles(values), "base": base, **ratio(values, times[base])})
        print(row_of(table[-1]))
    return table


# ---------------------------------------------------------------- memory


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors made inside it: how many were alive at once."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = set(known)
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
                self.seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor, self.gone, key, size)
        return result

    def gone(self, key: int, size: int) -> None:
        """Forget a tensor that is no more."""
        self.seen.discard(key)
        self.live -= size


MEMORY: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, **SGD, fused=True),
    "MSAM": lambda p: msam.MSAM(p, rho=3.0, **SGD, fused=True),
    "MSAM, not fused": lambda p: msam.MSAM(p, rho=3.0, **SGD),
    "NAG": lambda p: msam.NAG(p, **SGD, fused=True),
    "SAM": lambda p: msam.SAM(p, rho=0.2, **SGD, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamWMSAM": lambda p: msam.AdamWMSAM(p, fused=True),
}


def storages() -> dict[int, int]:
    """Bytes of every tensor that is alive, by storage."""
    alive = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive}


def memory_of(name: str, make: Callable[[list[nn.Parameter]], Any], shapes: Shapes, device: str) -> dict[str, Any]:
    """Bytes of all that lives on between steps, and of temporary tensors at most, as multiples of the parameters'."""
    ps = parameters(shapes, device)
    size, before = sum(p.numel() * p.element_size() for p in ps), storages()
    optimizer = make(ps)
    act = both(optimizer) if name == "SAM" else optimizer.step
    act()
    act()
    after = storages()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        act()
        peak = torch.cuda.max_memory_allocated() - allocated
    else:
        with Allocations(set(after)) as allocations:
            act()
        peak = allocations.peak
    lasting = sum(after[key] for key in after.keys() - before.keys())
    kept, most = round(lasting / size, 4), round(peak / size, 4)
    return {"optimizer": name, "lasting_per_parameter": kept, "temporary_per_parameter": most}


def measure_memory(shapes: Shapes, device: str) -> list[dict[str, Any]]:
    """A row for each optimizer."""
    table = []
    for name, make in MEMORY.items():
        gc.collect()
        table.append(memory_of(name, make, shapes, device))
        lasting, peak = table[-1]["lasting_per_parameter"], table[-1]["temporary_per_parameter"]
        print(f"  {name:20s} lasting {lasting:6.3f}   temporary, at most {peak:6.3f}   of the parameters")
    return table


def markdown(results: dict[str, Any]) -> str:
    """The figures as the Markdown table in ``docs/optimizers.md``."""
    lines = ["| what | optimizer | median, ms (quartiles) | of its base (quartiles) | floor |", "|---|---|---|---|---|"]
    tables = {f"step, {name}": part["table"] for name, part in results["steps"].items()}
    tables["step, WRN-16-4, FSDP2 in two processes"] = results["sharded"]["table"]
    tables[f"training step, WRN-16-4, batch {results['options']['batch']}"] = results["training"]["table"]
    for what, table in tables.items():
        for row in table:
            spread = f"{row['median_ms']:.4g} ({row['q1_ms']:.4g}–{row['q3_ms']:.4g})"
            quotient = f"{row['ratio']:.2f} ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f}) {row['base']}"
            floor = f"{row['floor_ratio']:.2f}" if "floor_ratio" in row else ""
            lines.append(f"| {what} | {row['optimizer']} | {spread} | {quotient} | {floor} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch on the CPU")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: the process's own time, for busy machines"
    )
    parser.add_argument("--repetitions", type=int, default=40, help="of a step of WRN-16-4; a fifth of it of ViT-B")
    parser.add_argument("--training", type=int, default=6, help="repetitions of whole training steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the table of such a file, measure nothing")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/optimizers_<device>.json")
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "machine": machine(options.device),
        "clock": options.clock,
        "options": {"batch": options.batch, **SGD},
        "steps": {},
    }
    print(results["machine"], f"clock {options.clock}", sep="\n")
    for name, shapes, repetitions in (
        ("WRN-16-4", wrn_shapes(), options.repetitions),
        ("ViT-B", vit_shapes(), max(4, options.repetitions // 5)),
    ):
        count = sum(torch.Size(shape).numel() for shape in shapes)
        print(f"one step, {name}: {count / 1e6:.1f} M parameters in {len(shapes)} tensors")
        results["steps"][name] = {
            "parameters": count,
            "tensors": len(shapes),
            "repetitions": repetitions,
            "table": time_steps(shapes, options, repetitions),
        }
    print("one step, WRN-16-4, FSDP2 in two processes, each one's own time")
    results["sharded"] = {"clock": "cpu", "processes": 2, "table": time_sharded(options.repetitions)}
    print(f"one training step, WRN-16-4, batch {options.batch}")
    results["training"] = {"repetitions": options.training, "table": time_training(options, options.training)}
    print("memory of a step, WRN-16-4")
    results["memory"] = measure_memory(wrn_shapes(), options.device)
    if peer_sam() is None:
        print("pytorch_optimizer is not installed: no row for its SAM")
    save(results, options.out or RESULTS / f"optimizers_{options.device}.json")


if __name__ == "__main__":
    main()
