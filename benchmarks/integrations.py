"""What the callbacks for frameworks cost; docs/integrations.md says how to read it.

``python benchmarks/integrations.py`` takes two minutes on one core. The part inside Lightning is left out where it is
not installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Action, interleaved, machine, quartiles, ratio, save
from optimizers import wrn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import msam
from msam.integrations import save_true_weights

RESULTS = Path(__file__).parent / "results"
STEP = "a step of MSAM"
OPTIONS: dict[str, Any] = {"lr": 0.1, "rho": 3.0, "momentum": 0.9, "weight_decay": 5e-4, "fused": True}


def made(*, watched: bool = True) -> tuple[nn.Sequential, msam.MSAM]:
    """A WRN-16-4 with gradients, displaced by a first step."""
    torch.manual_seed(0)
    model = wrn()
    optimizer = msam.MSAM(model.parameters(), **OPTIONS)
    if watched:
        save_true_weights(model, optimizer)
    for p in model.parameters():
        p.grad = 0.01 * torch.randn_like(p)
    optimizer.step()
    return model, optimizer


def switched() -> Action:
    """To the true weights and back, as between two batches."""
    _, optimizer = made()

    def act() -> None:
        optimizer.eval()
        optimizer.train()

    return act


def averaged(*, true: bool) -> Action:
    """One update of a moving average, of the true weights or of those that are there."""
    model, optimizer = made()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))

    def act() -> None:
        if true:
            with optimizer.unperturbed():
                average.update_parameters(model)
        else:
            average.update_parameters(model)

    return act


def copies_of(state: dict[str, Any]) -> list[Tensor]:
    """What a checkpoint would write."""
    return [value.clone() for value in state.values() if isinstance(value, Tensor)]


def operations() -> dict[str, Action]:
    """What is timed, by name."""
    plain, watched = made(watched=False), made()
    return {
        STEP: made()[1].step,
        "eval() and train(), as between two batches": switched(),
        "model.state_dict(), copied": lambda: copies_of(plain[0].state_dict()),
        "model.state_dict() with save_true_weights, which copies": watched[0].state_dict,
        "optimizer.state_dict() with save_true_weights": watched[1].state_dict,
        "an update of a moving average": averaged(true=False),
        "an update of a moving average inside unperturbed()": averaged(true=True),
    }


# ---------------------------------------------------------------- inside Lightning


def in_lightning(repetitions: int, clock: str) -> list[dict[str, Any]]:
    """Batches of a small network in Lightning: the callback's own work, where there is little else."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # it may be built for another torch
    found = importlib.metadata.Distribution.from_name

    def visible(name: str) -> importlib.metadata.Distribution:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    importlib.metadata.Distribution.from_name = visible  # type: ignore[method-assign]
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from msam.integrations.lightning import PerturbationCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    x = torch.randn(6400, 20, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=64)

    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 2))

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return msam.MSAM(self.parameters(), **OPTIONS)

    def fit(*callbacks: pl.Callback) -> None:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), loader)

    base = "fit of 100 batches"
    actions: dict[str, Callable[[], None]] = {
        base: fit,
        f"{base}, PerturbationCallback()": lambda: fit(PerturbationCallback()),
        f"{base}, PerturbationCallback(every_batch=True)": lambda: fit(PerturbationCallback(every_batch=True)),
    }
    return rows_of(interleaved(actions, repetitions, clock, "cpu", warmup=1), base)


def rows_of(times: dict[str, list[float]], base: str) -> list[dict[str, Any]]:
    """A row for each action."""
    rows = [{"what": name, **quartiles(values), **ratio(values, times[base])} for name, values in times.items()]
    for row in rows:
        print(f"  {row['what']:60s} {row['median_ms']:9.2f} ms   {row['ratio']:.2f} of {base}")
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The figures as the Markdown table in ``docs/integrations.md``."""
    lines = ["| what | median, ms (quartiles) | of the first line (quartiles) |", "|---|---|---|"]
    for table in (results["operations"], results["lightning"]):
        for row in table:
            spread = f"{row['median_ms']:.4g} ({row['q1_ms']:.4g}–{row['q3_ms']:.4g})"
            lines.append(
                f"| {row['what']} | {spread} | {row['ratio']:.2f} ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f}) |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=101)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "integrations_cpu.json")
    parser.add_argument("--markdown", type=Path, help="print the table of an earlier run's JSON, and measure nothing")
    options = parser.parse_args()
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": machine("cpu")}
    print("WRN-16-4")
    results["operations"] = rows_of(interleaved(operations(), options.repetitions, options.clock, "cpu"), STEP)
    results["lightning"] = []
    if importlib.util.find_spec("lightning") is not None:
        results["lightning"] = in_lightning(max(options.repetitions // 10, 3), options.clock)
    save(results, options.out)


if __name__ == "__main__":
    main()
