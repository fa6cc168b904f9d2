"""The command ``msam-analysis``: run a study, measure checkpoints."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.status import Status
from rich.table import Table
from torch import nn

from msam_analysis.batchnorm import Policy
from msam_analysis.checkpoints import load_model
from msam_analysis.measure import RADII, Metrics, measure
from msam_analysis.objective import Objective
from msam_analysis.results import atomic_folder
from msam_analysis.studies.study import run_study

if TYPE_CHECKING:
    from typing_extensions import Never

_METRICS = "metrics.csv"
_INTERRUPTED = 130
# click's, or that of the copy of click in newer typer, which has no name of its own.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="How flat is this minimum, and why did the optimizer go there?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command("study")
def study_command(
    workload: Annotated[str, typer.Option(help="What to train: digits.")] = "digits",
    seeds: Annotated[int, typer.Option(help="Seeds per optimizer; intervals need at least 2.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Output folder; default results/WORKLOAD.")] = None,
    figures: Annotated[Path | None, typer.Option(help="A second folder for the pictures.")] = None,
    exhibits: Annotated[str | None, typer.Option(help="Only these, e.g. F2C,TA1; default all.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; default one per processor.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train SGD, NAG, SAM and MSAM, measure them, and write tables, figures and a report. Resumes where it stopped."""
    names = [name.strip() for name in (exhibits or "").split(",") if name.strip()]
    chosen = None if exhibits is None or names == ["all"] else names
    page = run_study(workload, seeds=seeds, out=out, figures=figures, exhibits=chosen, jobs=jobs, progress=not quiet)
    typer.echo(f"report: {page}\nreport: {page.with_suffix('.md')}\ntables: {page.parent / 'tables'}")


@app.command("measure")
def measure_command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Saved weights: .safetensors or torch.save files.")],
    model: Annotated[str, typer.Option(help="package.module:factory, called without arguments; returns the module.")],
    data: Annotated[str, typer.Option(help="package.module:factory; returns batches, or (batches, loss_fn).")],
    loss: Annotated[str | None, typer.Option(help="package.module:factory of loss_fn; default cross-entropy.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.csv and the full results.")] = None,
    rho: Annotated[list[float] | None, typer.Option(help="Radius of an L2 ball; may be given several times.")] = None,
    eigenvalues: Annotated[int, typer.Option(help="How many of the Hessian's largest eigenvalues.")] = 5,
    batchnorm: Annotated[str, typer.Option(help="eval, batch or recalibrate.")] = "eval",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: where the model is.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random starts.")] = 0,
) -> None:
    """Print and save sharpness metrics of checkpoints: loss, λ1..λ5, trace, largest rise in a ball, average rise."""
    factory, batches = partial(make, model), make(data)
    loss_fn: Any = nn.CrossEntropyLoss()
    if isinstance(batches, tuple) and len(batches) == 2 and callable(batches[1]):
        batches, loss_fn = batches
    if loss is not None:
        loss_fn = make(loss)
    check_device(device)
    root = out if out is not None else Path("results") / "measure"
    folders = [root / name for name in distinct_names(checkpoints)]
    check_replaceable(folders)
    objectives = [
        Objective(load_model(path, factory), loss_fn, batches, batchnorm=as_policy(batchnorm), device=device)
        for path in checkpoints
    ]
    for objective in objectives:
        check_fit(objective)
    console, progress = Console(), Console(stderr=True)
    for path, folder, objective in zip(checkpoints, folders, objectives, strict=True):
        name = folder.name
        with progress.status(f"{name} ...") as status:
            metrics = measure(
                objective,
                radii=tuple(rho) if rho else RADII,
                eigenvalues=eigenvalues,
                seed=seed,
                tick=partial(_show, status, name),
            )
        _print(console, str(path), objective, metrics)
        save(metrics, folder)
        console.print(f"saved in {folder}", highlight=False, soft_wrap=True)


def _show(status: Status, name: str, what: str) -> None:
    status.update(f"{name}: {what} ...")


def as_policy(name: str) -> Policy:
    """Return a BatchNorm policy; the objective refuses names that are none."""
    return name  # type: ignore[return-value]  # checked, with a sentence, where it is used


def load_object(reference: str) -> Callable[[], Any]:
    """Import ``package.module:name`` (the working directory included) and return what is there.

    Raises
    ------
    ValueError
        The reference is not of that form, or names nothing.
    TypeError
        What it names cannot be called.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"expected package.module:factory, got {reference!r}: for example mypackage.models:resnet")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name!r} ({_brief(error)}): check the name, the folder you are in and the module"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module_name!r} has no {attribute!r}: check the name after the colon")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{reference!r} is a {type(found).__name__}: expected a function without arguments")
    return found  # type: ignore[no-any-return]  # callable, as just checked


def make(reference: str) -> Any:
    """Call the factory that a reference names.

    Raises
    ------
    ValueError
        The factory raised something.
    """
    factory = load_object(reference)
    try:
        return factory()
    except Exception as error:
        raise ValueError(f"{reference} failed with {_brief(error)}") from error


def check_device(device: str | None) -> None:
    """Refuse a device that this machine, or this build of torch, does not have.

    Raises
    ------
    ValueError
        A tensor cannot be made there.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {_brief(error)}") from error


def check_fit(objective: Objective) -> None:
    """Refuse data that the model or the loss cannot take.

    Raises
    ------
    ValueError
        The loss could not be evaluated.
    """
    try:
        objective.loss()
    except Exception as error:
        raise ValueError(f"model, data and loss do not work together: {_brief(error)}") from error


def distinct_names(checkpoints: Sequence[Path]) -> list[str]:
    """Return a name per checkpoint: folder and file, with more folders or a number where two would be the same."""
    parts = [[part for part in (*path.parts[:-1], path.stem) if part.strip("./\\")] for path in checkpoints]
    names: list[str] = []
    for own in parts:
        depths = (depth for depth in range(2, len(own)) if [p[-depth:] for p in parts].count(own[-depth:]) == 1)
        name = "-".join(own[-next(depths, len(own)) :])
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(free for free in itertools.chain([name], numbered) if free not in names))
    return names


def check_replaceable(folders: Sequence[Path]) -> None:
    """Refuse to replace a folder that :func:`save` did not write.

    Raises
    ------
    FileExistsError
        A folder has files, but no ``metrics.csv``.
    """
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / _METRICS).is_file():
            raise FileExistsError(f"{folder} holds something else than an earlier measurement: choose another --out")


def save(metrics: Metrics, folder: Path) -> None:
    """Write ``metrics.csv`` and one ``.safetensors`` file per result, in place of all that an earlier call wrote."""
    with atomic_folder(folder) as partial:
        for name, result in metrics.results.items():
            result.save(partial / f"{name}.safetensors")
        metrics.table.to_csv(partial / _METRICS, index=False, lineterminator="\n")


def _print(console: Console, title: str, objective: Objective, metrics: Metrics) -> None:
    settings = ", ".join(f"{key} {value}" for key, value in objective.settings.items())
    table = Table(title=title, caption=settings, title_justify="left", caption_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("±", justify="right")
    table.add_column("what it is")
    for row in metrics.table.to_dict("records"):
        uncertainty = float(row["uncertainty"])
        shown = "" if math.isnan(uncertainty) else f"{uncertainty:.2g}"
        meaning = f"{row['meaning']}{'; NOT converged' if row['converged'] is False else ''}"
        table.add_row(str(row["metric"]), f"{row['value']:.5g}", shown, meaning)
    console.print(table)


def main() -> None:
    """Run the command; a user's mistake becomes one sentence and exit code 2, an interrupt exit code 130."""
    if len(sys.argv) < 2:
        sys.argv.append("--help")
    interrupted = False
    try:
        # typer turns the interrupt key into this code, or into Abort.
        interrupted = app(standalone_mode=False) == _INTERRUPTED
    except _UsageError as error:
        _refuse(error.format_message())
    except (ValueError, TypeError, ModuleNotFoundError, OSError, RuntimeError) as error:
        _refuse(str(error) or _brief(error))
    except (KeyboardInterrupt, typer.Abort):
        interrupted = True
    if interrupted:
        typer.echo(
            "msam-analysis: interrupted; finished runs are kept, and the same command goes on from them", err=True
        )
        raise SystemExit(_INTERRUPTED)


def _brief(error: Exception) -> str:
    """Return the kind and the first line of what somebody else's code raised."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:500].removesuffix(": ")


def _refuse(sentence: str) -> Never:
    line = " ".join(sentence.split())
    typer.echo(f"msam-analysis: {line[:900]}{' ...' if len(line) > 900 else ''}", err=True)
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
