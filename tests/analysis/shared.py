"""What two processes do, for test_ranks: each question of a table is asked of objectives that share their batches."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import msam_analysis as ma
from msam_analysis.landscape import metrics
from msam_analysis.objective.ranks import Ranks
from msam_analysis.results import Result
from tests.builders import MEASURES, objective

from .cases import CASES, CONVNET, MLP, TAGGER, Case, token_loss

Ask = Callable[[Any], Any]
"""A question: of ``False`` one process alone knows the answer, of ``True`` and ``"split"`` two together."""


def part(batches: list[Any], ranks: Any, at: int = 2) -> list[Any]:
    """What this process is given: all of the batches, or those before or after one of them."""
    if ranks != "split":
        return batches
    return batches[:at] if dist.get_rank() == 0 else batches[at:]


def vector(o: ma.Objective, seed: int = 0) -> Tensor:
    return torch.randn(o.size, generator=torch.Generator().manual_seed(seed), dtype=o.dtype)


# --- values and derivatives


def derivatives(o: ma.Objective, *, exact: bool = True) -> dict[str, Tensor]:
    """All that an objective is asked for, at its weights and beside them."""
    w, v = o.point(), vector(o)
    loss, gradient = o.loss_and_gradient(w + 0.1 * v)
    found = {"loss": o.loss(), "loss beside": loss, "gradient": gradient}
    operator = o.hessian(w)
    vectors = torch.stack([v, v.square(), v + 1, v - 1, v * 2], dim=1)
    found |= {"products": operator @ vectors, "product": operator @ v, "rebuilt": o.hvp(v, w)}
    if exact:
        found["Gauss-Newton"] = o.gauss_newton(w) @ v
        found["Fisher"] = o.fisher(w) @ v
        if o.loss_fn is F.cross_entropy:
            found["sampled Fisher"] = o.fisher(w, kind="sampled", draws=2) @ v
    return found


def of_case(case: Case, ranks: Any, at: int = 2, batches: slice = slice(None), **options: Any) -> dict[str, Tensor]:
    data = part(case.data()[batches], ranks, at)
    return derivatives(ma.Objective(case.model(), case.loss_fn, data, ranks=ranks, **options))


ASKED: dict[str, tuple[Ask, float]] = {
    **{
        f"{case.name} {policy} {kind}": (partial(of_case, case, batchnorm=policy, dropout=dropout), 1e-12)
        for case in CASES
        for policy in (*case.policies, *(("recalibrate",) if case is CONVNET else ()))
        for kind, dropout in (("plain", False), ("dropout", True))
    },
    "no batch for one": (partial(of_case, MLP, at=1, batches=slice(1)), 1e-12),
    "all batches in the second": (partial(of_case, CONVNET, at=0, batchnorm="recalibrate"), 1e-12),
    "no graph kept": (partial(of_case, MLP, graph_bytes=0), 1e-12),
    "no batch kept": (partial(of_case, MLP, cache_bytes=0), 1e-12),
    "half of the parameters": (partial(of_case, CONVNET, parameters=["0.*", "8.*"]), 1e-12),
    # Differences enlarge rounding by the inverse of their step.
    "central": (partial(of_case, TAGGER, second_derivatives="central"), 1e-8),
}
"""Questions about a case, and how far answers may be off by rounding, relatively."""


# --- data and models in other forms


def ignoring(ranks: Any) -> dict[str, Tensor]:
    """Labels that do not count are in the last batch alone: what batches weigh is no matter of the first."""
    batches = [(x, y.clone()) for x, y in MLP.data()]
    batches[-1][1][:2] = -100
    o = ma.Objective(MLP.model(), nn.CrossEntropyLoss(), part(batches, ranks), ranks=ranks)
    return {"loss": o.loss(), "gradient": o.gradient(), "weighed": torch.tensor("weighed by" in o.settings)}


def sums(ranks: Any) -> dict[str, Tensor]:
    o = ma.Objective(MLP.model(), nn.CrossEntropyLoss(reduction="sum"), part(MLP.data(), ranks), ranks=ranks)
    return {"loss": o.loss(), "gradient": o.gradient()}


def loaded(ranks: Any) -> dict[str, Tensor]:
    """Batches of a loader, with a sampler that deals samples out if there are two processes."""
    x, y = (torch.cat(tensors)[:18] for tensors in zip(*MLP.data(), strict=True))
    whole = TensorDataset(x, y)
    sampler: Any = DistributedSampler(whole, shuffle=False) if ranks == "split" else None
    o = ma.Objective(MLP.model(), MLP.loss_fn, DataLoader(whole, batch_size=4, sampler=sampler), ranks=ranks)
    return {"loss": o.loss(), "gradient": o.gradient()}


def wrapped(ranks: Any) -> dict[str, Tensor]:
    """A DistributedDataParallel model, whose buffers differ between processes: those of the first count."""
    model = CONVNET.model()
    if ranks:
        model = nn.parallel.DistributedDataParallel(model)
        if dist.get_rank():
            model.module[1].running_mean.add_(1.0)
    return derivatives(ma.Objective(model, CONVNET.loss_fn, part(CONVNET.data(), ranks), ranks=ranks))


def sampled(ranks: Any) -> dict[str, Tensor]:
    """Samples of all batches, in any order and repeated; of other samples; on batches of another objective."""
    o = ma.Objective(MLP.model(), MLP.loss_fn, part(MLP.data(), ranks), ranks=ranks, dropout=True)
    chosen = torch.tensor([18, 0, 7, 7, 9, 3, 16, 11, 12])
    few = o.with_samples(chosen, batch_size=2)
    fewer = few.with_samples(torch.arange(7), batch_size=3)
    again = ma.Objective(MLP.model(), MLP.loss_fn, few.batches, ranks=ranks)
    wider = ma.Objective(MLP.model().double(), MLP.loss_fn, few.batches, ranks=ranks, dtype=torch.float64, dropout=True)
    moved = o.with_weights(o.point() + 0.1)
    found = {str(index): one.loss() for index, one in enumerate((few, fewer, again, wider, moved))}
    return found | {"gradient": few.gradient(), "sizes": torch.tensor(fewer.batches.sizes)}


FORMS: dict[str, Ask] = {"ignoring": ignoring, "sums": sums, "loaded": loaded, "wrapped": wrapped, "sampled": sampled}


# --- measures


def split_data(o: ma.Objective) -> list[Any]:
    """The samples of the tiny objective in three batches."""
    ((x, y),) = list(o.batches)
    return [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]


def measured(name: str, ranks: Any) -> Result:
    """A public measure of the tiny objective with three batches."""
    tiny = objective()
    o = ma.Objective(tiny.model, tiny.loss_fn, part(split_data(tiny), ranks), ranks=ranks)
    if name == "compare":
        models = {"a": o.model, "b": nn.Sequential(*o.model.children())}
        return ma.compare(models, None, o.loss_fn, o.batches, metrics=("loss", "trace"), ranks=ranks)
    if name == "spectral_density":  # rounding may lead to one point more, or to a step less than there are parameters
        return ma.spectral_density(o, steps=8, points=100)
    return MEASURES[name](o)


def everything(ranks: Any) -> Result:
    """All metrics, within a budget that is never reached: the clock of the first process is asked at every step."""
    tiny = objective()
    o = ma.Objective(tiny.model, tiny.loss_fn, part(split_data(tiny), ranks), ranks=ranks)
    return ma.measure(o, metrics=ma.measures.summary.METRICS, radii=(0.1,), eigenvalues=2, budget=1e6)


def landscapes(ranks: Any) -> dict[str, Result]:
    """Slices with everything that is read off single batches."""
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "metrics": ({}, {"metrics": {"a": metrics.accuracy, "e": metrics.sample_losses, "own": norm}}),
        "samples": ({}, {"samples": 9}),
        "refined": ({}, {"refine": 0.05, "points": 15}),
        "chunk": ({}, {"chunk": 4}),
        "alone": ({}, {"distributed": False}),
        "recalibrated": ({"batchnorm": "recalibrate"}, {}),
    }
    found: dict[str, Result] = {}
    for name, (options, asked) in ways.items():
        case = CONVNET if options else MLP
        o = ma.Objective(case.model(), nn.CrossEntropyLoss(), part(case.data(), ranks), ranks=ranks, **options)
        lines = ma.directions.random(o, 1, one_d=True), ma.directions.random(o, 2, one_d=True)
        found[name] = ma.slice_2d(o, lines, **{"points": 5, **asked})
    return found


def norm(o: ma.Objective, w: Tensor) -> Tensor:
    length: Tensor = o.gradient(w).norm()
    return length


# --- refusals


def said(ask: Callable[[], Any]) -> str:
    """What is raised, in words."""
    try:
        ask()
    except BaseException as error:  # noqa: BLE001 - also an interrupt
        return f"{type(error).__name__}: {error}"
    return "nothing"


class PeculiarError(Exception):
    """An error that is made from two things."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


ONE_ERROR = ArithmeticError("this again")


def failing(make: Callable[[], BaseException] | None, at: str) -> str:
    """One process has the batch that fails; both must hear of it, and both can go on."""
    ill = [False]

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        if ill[0] and make is not None and bool((target == 1).any()):
            raise make()
        return F.cross_entropy(output, target)

    batches = [(x, torch.full_like(y, number)) for number, (x, y) in enumerate(MLP.data()[:2])]
    o = ma.Objective(MLP.model(), criterion, batches, ranks=True)
    before, v = float(o.loss()), vector(o)
    ill[0] = True
    sentence = said(lambda: o.hvp(v) if at == "hvp" else getattr(o, at)())
    ill[0] = False
    return sentence + (" after which it goes on" if float(o.loss()) == before else "")


class Once(torch.autograd.Function):
    """A square that has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        slope: Tensor = 2 * ctx.saved_tensors[0] * grad[0]
        return slope


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Once.apply(self.linear(x))  # type: ignore[no-untyped-call]
        return found


def missing(ranks: Any) -> dict[str, Tensor]:
    """A layer without a second derivative, of which only one process has a batch, and no examination."""
    torch.manual_seed(0)
    data = part(MLP.data(), ranks, at=0)
    o = ma.Objective(Square(), F.cross_entropy, data, ranks=ranks, examine=False)
    return {"product": o.hvp(vector(o)), "central": torch.tensor("second derivatives" in o.settings)}


def not_finite() -> str:
    """One batch makes the loss NaN: the Hessian is refused in both processes."""
    batches = [(x, y) for x, y in MLP.data()]
    batches[1] = (batches[1][0] * float("nan"), batches[1][1])
    o = ma.Objective(MLP.model(), MLP.loss_fn, batches, ranks=True)
    return said(lambda: o.hvp(vector(o))) + f", loss {float(o.loss())}"


def refusals(rank: int) -> dict[str, str]:
    """Sentences that every process gets."""

    def made(*, model: int = 0, first: int = 0, ranks: Any = True, **options: Any) -> ma.Objective:
        return ma.Objective(MLP.model(seed=model), MLP.loss_fn, MLP.data()[first:], ranks=ranks, **options)

    same = made()
    return {
        "model": said(lambda: made(model=rank)),
        "layers": said(lambda: ma.Objective(nn.Linear(4, 3 + rank), F.cross_entropy, MLP.data(), ranks=True)),
        "data": said(lambda: made(first=rank)),
        "arguments": said(lambda: made(seed=rank)),
        "bad argument": said(lambda: made(batchnorm=("eval", "none")[rank])),
        "empty": said(lambda: ma.Objective(MLP.model(), MLP.loss_fn, [], ranks="split")),
        "point": said(lambda: same.loss(same.point() + rank)),
        "length": said(lambda: same.gradient(same.point()[rank:])),
        "vector": said(lambda: same.hvp(vector(same, rank))),
        "samples": said(lambda: same.with_samples(torch.tensor([0, rank]))),
        "no sample": said(lambda: same.with_samples(torch.tensor([0, 18 + rank]))),
        "calls": said(lambda: same.gradient() if rank else same.loss()),
        "trace": said(lambda: ma.trace(same, draws=3, seed=rank)),
        "unlike samples": said(lambda: numbered(rank).with_samples(torch.tensor([0, 3]))),
        "batches": said(lambda: ma.Objective(MLP.model(), MLP.loss_fn, same.batches)),
        "shared batches": said(lambda: ma.robust_accuracy(same.model, same.batches, "fgsm", [0.1])),
        "PyHessian": said(lambda: ma.trace(same, draws=3, backend="pyhessian")),
        "gradient": failing(lambda: ValueError("class 1 is unwell"), "gradient"),
        "loss": failing(lambda: PeculiarError("this", "that"), "loss"),
        "product": failing(lambda: torch.OutOfMemoryError("no room"), "hvp"),
        "one error": failing(lambda: ONE_ERROR, "loss"),
        "the same again": failing(lambda: ONE_ERROR, "gradient"),
        "interrupt": failing(KeyboardInterrupt, "loss"),
        "nobody fails": failing(None, "loss"),
        "not finite": not_finite(),
        "metric": said(lambda: ma.slice_1d(same, ma.directions.random(same), points=3, metrics={"m": ill_in_one})),
        "shared points": said(shared_points),
        "pickle": said(lambda: Ranks().everyone((lambda: 0) if rank else 0)),
        "checkpoint": compared(rank),
        "goes on": f"{float(same.loss()):.12g}",
    }


def numbered(rank: int) -> ma.Objective:
    """Batches with a number beside their samples, which is not the same in both processes."""
    return ma.Objective(MLP.model(), token_loss, [{"ids": torch.zeros(2, 4), "number": rank}], ranks="split")


def ill_in_one(*_: Any) -> float:
    if dist.get_rank():
        raise OSError("the disk of this process is full")
    return 0.0


def shared_points() -> None:
    """Processes that share points, not batches, hear of an error as well."""
    o = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())
    ma.slice_1d(o, ma.directions.random(o), points=9, metrics={"m": ill_in_one})


def compared(rank: int) -> str:
    """A checkpoint that one process cannot load is left out by both."""
    checkpoints = {"good": MLP.model(), "lost": Lost(rank)}
    found = ma.compare(checkpoints, None, MLP.loss_fn, MLP.data(), metrics=["loss"], ranks=True)
    return f"{list(found)} {dict(found.failures)}"


class Lost(nn.Module):
    """A network that only the first process can run."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.linear = rank, nn.Linear(4, 3).double()
        with torch.no_grad():
            for p in self.linear.parameters():
                p.fill_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.rank:
            raise OSError("this machine is unwell")
        out: Tensor = self.linear(x)
        return out


# --- the processes


def answers(folder: Path, label: str, ways: tuple[Any, ...]) -> None:
    """Ask everything and save it."""
    found: dict[str, Any] = {}
    for ranks in ways:
        for name, (ask, _) in ASKED.items():
            found[f"{name} {ranks}"] = ask(ranks)
        for name, form in FORMS.items():
            found[f"{name} {ranks}"] = form(ranks)
        found[f"missing {ranks}"] = missing(ranks)
        results = {name: measured(name, ranks) for name in MEASURES} | landscapes(ranks)
        for name, result in {**results, "everything": everything(ranks)}.items():
            result.save(folder / f"{name} {ranks}.{label}")
    torch.save(found, folder / f"{label}.pt")


def work(rank: int, folder: str) -> None:
    """All questions in one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-point", rank=rank, world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers(Path(folder), f"rank{rank}", (True, "split"))
        told = refusals(rank)
        last = ma.Objective(MLP.model(), MLP.loss_fn, MLP.data(), ranks=True)
        if rank == 0:
            told["left alone"] = said(last.loss)
        torch.save(told, Path(folder) / f"told{rank}.pt")
    gc.collect()  # gloo's threads have to end before the process does
    dist.destroy_process_group()
