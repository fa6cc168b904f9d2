"""The command ``msam-analysis measure``."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import typer
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from msam_analysis import plots, report
from msam_analysis.checkpoints.comparing import compare
from msam_analysis.checkpoints.naming import distinct_names, expand, numbered
from msam_analysis.cli import checks
from msam_analysis.cli.factories import brief, parts, returning
from msam_analysis.cli.names import listed
from msam_analysis.cli.processes import group, own_device, rank
from msam_analysis.cli.saying import console_of, say
from msam_analysis.measures.summary import DEFAULT_METRICS, MAX_HVPS, METRICS, RADII, TOLERANCE
from msam_analysis.objective.explaining import decorated
from msam_analysis.objective.ranks import Ranks
from msam_analysis.report.page import markdown
from msam_analysis.results import Comparison
from msam_analysis.results.files import sweep, write_json, write_text
from msam_analysis.results.fingerprint import release
from msam_analysis.results.text import printable

_PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_FAILED = 1
_FEW = 3  # checkpoints of which is said what was taken; the JSON has all
_TABLE = "metrics"
_SHOWN = ["label", "step", "epoch", "metric", "value", "uncertainty", "converged", "meaning"]
_DIFFERENCES = ["label", "metric", "difference", "difference_uncertainty"]


def measure_command(
    checkpoints: Annotated[list[str], typer.Argument(help="Files, folders or patterns of saved weights.")],
    model: Annotated[str, typer.Option(help="package.module:factory, called without arguments or with the path.")],
    data: Annotated[str, typer.Option(help="package.module:factory; returns batches, or (batches, loss_fn).")],
    loss: Annotated[str | None, typer.Option(help="package.module:factory of loss_fn, or transformers.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of tables, pictures and full results.")] = Path("results/measure"),
    metrics: Annotated[str, typer.Option(help=f"Some of {', '.join(METRICS)}; or all.")] = ",".join(DEFAULT_METRICS),
    rho: Annotated[list[float] | None, typer.Option(help="Radius of the balls; may be given several times.")] = None,
    eigenvalues: Annotated[int, typer.Option(help="Number of largest eigenvalues of the Hessian.")] = 5,
    tolerance: Annotated[float, typer.Option(help="Relative residual of the eigenvalues.")] = TOLERANCE,
    max_hvps: Annotated[
        int | None,
        typer.Option(help=f"Most products for the eigenvalues; default {MAX_HVPS}, for large networks fewer."),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Minutes for all; what they end has its error.")] = None,
    samples: Annotated[int | None, typer.Option(help="Number of samples, drawn at random; default all.")] = None,
    labels: Annotated[list[str] | None, typer.Option("--label", help="Name of a checkpoint; one for each.")] = None,
    prefix: Annotated[str, typer.Option(help="With what names begin in the file: 'state_dict.'.")] = "",
    key: Annotated[str, typer.Option(help="Where in the file the weights lie: 'state_dict'.")] = "",
    ignore: Annotated[list[str] | None, typer.Option(help="Pattern of names that need not fit.")] = None,
    parameters: Annotated[list[str] | None, typer.Option(help="Pattern of parameters to measure.")] = None,
    batchnorm: Annotated[str, typer.Option(help="eval, batch or recalibrate.")] = "eval",
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(_PRECISIONS)}; default the model's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: where the model is.")] = None,
    memory: Annotated[float | None, typer.Option(help="GiB for data, graphs and vectors; default 7.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random draws; the same draws for all checkpoints.")] = 0,
    vectors: Annotated[bool, typer.Option("--vectors", help="Save eigenvectors and displacements, too.")] = False,
    examine: Annotated[bool, typer.Option(help="Examine model, loss and data before they are measured.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Print, draw and save sharpness metrics of checkpoints, side by side on the same data with the same draws.

    Each metric is kept when it is done: the same command goes on where it was stopped. Results of other weights, data
    or settings are never touched.

    Several processes or GPUs: torchrun --nproc-per-node 2 -m msam_analysis measure ...
    """
    chosen = list(METRICS) if metrics == "all" else listed(metrics)
    _check(chosen, rho, eigenvalues, tolerance, max_hvps, budget, samples, seed, batchnorm, dtype)
    checks.within("memory", memory, 0, 2**20)
    paths = expand(checkpoints)
    checks.readable(paths)
    names = checks.labelled(labels, distinct_names(paths))
    home, asked = checks.place(out), _asked(model, data, loss)
    sweep(home)
    places = {name: path.absolute() for name, path in zip(names, paths, strict=True)}
    device = own_device(device)
    options: dict[str, Any] = dict(
        metrics=chosen,
        radii=tuple(rho) if rho else RADII,
        eigenvalues=eigenvalues,
        tolerance=tolerance,
        max_hvps=max_hvps,
        seed=seed,
        samples=samples,
        budget=None if budget is None else 60 * budget,
        prefix=f"{key}." if key else prefix,
        ignore=ignore or (),
        out=home,
        vectors=vectors,
        batchnorm=batchnorm,
        parameters=parameters,
        dtype=None if dtype is None else _PRECISIONS[dtype],
        device=device,
        memory_bytes=None if memory is None else int(memory * 2**30),
        examine=examine,
    )
    with group() as several:
        options |= {"ranks": several, "progress": not quiet and rank() == 0}
        with Ranks().apart("calling the functions of model, data and loss"):
            factory, batches, loss_fn = parts(model, data, loss, device)
        result = _compared(places, factory, loss_fn, batches, options)
    if rank() == 0:
        result = _as_given(result, places, dict(zip(names, paths, strict=True)))
        folder, undrawn = write(result, home, asked)
        show(result, out / folder.relative_to(home))
        for what in undrawn:
            say(f"msam-analysis: {what}", err=True)
        # The others end well: at the first process that does not, torchrun ends all, and this one draws and writes.
        if result.failures or undrawn:
            raise typer.Exit(_FAILED)


def _as_given(result: Comparison, places: Mapping[str, Path], given: Mapping[str, Path]) -> Comparison:
    """Return a comparison that calls files as the user did."""

    def told(label: str, text: object) -> str:
        return str(text).replace(str(places[label]), str(given[label]))

    sources = {
        label: {**source, "path": str(given[label]), "taken": told(label, source["taken"])}
        for label, source in result.sources.items()
    }
    failures = {label: told(label, why) for label, why in result.failures.items()}
    return replace(result, sources=sources, failures=failures)


def _check(
    metrics: Sequence[str],
    rho: Sequence[float] | None,
    eigenvalues: int,
    tolerance: float,
    max_hvps: int | None,
    budget: float | None,
    samples: int | None,
    seed: int,
    batchnorm: str,
    dtype: str | None,
) -> None:
    """Refuse what is out of range, whether or not the metrics that are asked for use it."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics must be of {', '.join(METRICS)}; got {(unknown or ['none'])[0]!r}")
    for radius in rho or ():
        checks.positive("rho", radius)
    checks.at_least("eigenvalues", eigenvalues, 1)
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance}: {TOLERANCE:g} is the default")
    if "eigenvalues" not in metrics:  # else the search itself says how many it needs
        checks.at_least("max_hvps", max_hvps, 1)
    checks.positive("budget", budget)
    checks.at_least("samples", samples, 1)
    checks.within("seed", seed, *checks.SEEDS)
    checks.one_of("batchnorm", batchnorm, ("eval", "batch", "recalibrate"))
    checks.one_of("dtype", dtype, list(_PRECISIONS))


def _compared(
    checkpoints: Mapping[str, Path],
    factory: Any,
    loss_fn: Any,
    batches: Any,
    options: Mapping[str, Any],
) -> Comparison:
    """Measure; what a user's own functions raise becomes a sentence."""
    try:
        with returning(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="compare: ")  # the failures are told at the end
            if rank():
                warnings.simplefilter("ignore")  # the first process says them
            warnings.showwarning = _warn
            return compare(checkpoints, factory, loss_fn, batches, **options)
    except (ValueError, TypeError, RuntimeError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"model, data and loss do not work together: {brief(error)}") from error


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Say a warning in one line, beside the line of progress; where it comes from in the sources helps no user."""
    tqdm.write(f"msam-analysis: {' '.join(printable(str(message), None).split())}", file=sys.stderr)


def write(result: Comparison, out: Path, asked: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """Write the table in four formats, a picture per metric and one page; return their folder, and what failed.

    One checkpoint's go to its results, those of several to a folder of their own for each set of checkpoints.
    """
    frame, table = result.to_frame(), result.to_table()
    folders = [str(source["folder"]) for source in result.sources.values()]
    sweep(out)
    home = (
        out / folders[0] if len(folders) == 1 else next(it for it in numbered(out / "comparison") if _of(it, folders))
    )
    described = {
        **asked,
        "settings": dict(result.settings),
        "folders": folders,
        "checkpoints": {label: dict(source) for label, source in result.sources.items()},
        "failures": dict(result.failures),
        "rows": [{name: _plain(value) for name, value in row.items()} for row in frame.to_dict("records")],
    }
    texts = {
        "csv": frame.to_csv(index=False, lineterminator="\n"),
        "md": _markdown(table),
        "tex": _latex(table),
    }
    for ending, text in texts.items():
        write_text(home / f"{_TABLE}.{ending}", text)
    write_json(home / f"{_TABLE}.json", described)
    undrawn: list[str] = []
    items: list[report.Figure | report.Table] = []
    every = report.Table(frame[_SHOWN], "Every number with its uncertainty.")
    if len(result) > 1:  # pictures first: the tables are long
        for metric in table.columns:
            with decorated(f"the picture of {metric}", undrawn):
                path = plots.save(plots.compare(result, metrics=[metric]), home / metric, close=True)[0]
                items.append(report.Figure(path, f"{metric.replace('_', ' ')} of every checkpoint."))
        others = frame[frame["label"] != result.baseline]
        items.append(
            report.Table(others[_DIFFERENCES], f"Differences from {result.baseline}: the same data and draws.")
        )
        items.append(every)
    else:
        items.append(every)
        if result.metrics:
            with decorated("the picture of the metrics", undrawn):
                path = plots.save(plots.measure(next(iter(result.values()))), home / _TABLE, close=True)[0]
                items.append(report.Figure(path, "The metrics; bars are residuals, brackets or standard errors."))
    summary = f"{len(result)} checkpoint(s). {_settings(result)}."
    page = report.Report(f"Sharpness of {home.name}", summary, [report.Section("Metrics", "", items)])
    with decorated("the report", undrawn):
        report.write(page, home)
    return home, undrawn


def show(result: Comparison, home: Path) -> None:
    """Print the table: one checkpoint's with what each number is, several with metrics across."""
    frame = result.to_frame()
    if len(result) == 1:
        table = Table(title=Text(next(iter(result))), title_justify="left")
        for name in ("metric", "value", "±", "what it is"):
            justify: Literal["left", "right"] = "right" if name in ("value", "±") else "left"
            table.add_column(name, justify=justify, no_wrap=name != "what it is")
        for row in frame[frame["metric"].isin(result.metrics)].to_dict("records"):
            note = "; NOT converged" if row["converged"] is False else ""
            texts = (row["metric"], f"{row['value']:.5g}", _error(row), f"{row['meaning']}{note}")
            table.add_row(*(Text(str(text)) for text in texts))
        say(table)
    else:
        width = console_of().width
        rows = {(row["label"], row["metric"]): row for row in frame.to_dict("records")}
        columns = {
            metric: [_heading(metric), *(_cell(rows.get((label, metric))) for label in result)]
            for metric in result.metrics
        }
        for part in _fitting(columns, list(result), width):
            table = Table()
            table.add_column("checkpoint", overflow="fold", no_wrap=max(map(len, result)) <= width // 2)
            for metric in part:
                table.add_column(Text(columns[metric][0]), justify="right", overflow="fold")
            for label, *found in zip(result, *(columns[metric][1:] for metric in part), strict=True):
                table.add_row(Text(label), *map(Text, found))
            say(table)
        say("± residual, bracket or standard error; * not converged; † ended by the budget")
    say(_settings(result))
    for label, source in list(result.sources.items())[:_FEW]:
        say(source["taken"] if len(result) == 1 else f"{label}: {source['taken']}")
    for label, reason in result.failures.items():
        say(f"FAILED {label}: {reason}")
    say(f"saved in {home}: {_TABLE}.csv, .json, .md, .tex, report.html, pictures")


def _plain(value: Any) -> Any:
    """Return a number of a table as JSON has it: null for what is missing or NaN, words for infinity."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def _asked(model: str, data: str, loss: str | None) -> dict[str, Any]:
    """Return what is needed to run the command again."""
    command = shlex.join(["msam-analysis", *sys.argv[1:]])
    versions = {name: release(name) for name in ("msam-analysis", "torch")}
    return {
        "command": command,
        "folder": os.fspath(Path.cwd()),
        "versions": versions,
        "model": model,
        "data": data,
        "loss": loss,
    }


def _latex(table: pd.DataFrame) -> str:
    r"""Return a table for LaTeX, where ``[`` or ``*`` first in a row would belong to the ``\\`` before it."""
    text = table.to_latex(float_format="%.5g", escape=True)
    return "".join(f"{{}}{line}" if line.startswith(("[", "*")) else line for line in text.splitlines(keepends=True))


def _markdown(table: pd.DataFrame) -> str:
    rows = [["checkpoint", *table.columns], ["---"] + ["---:"] * len(table.columns)]
    rows += [[str(label), *(f"{value:.5g}" for value in values)] for label, *values in table.itertuples()]
    rows[2:] = [[markdown(cell) for cell in row] for row in rows[2:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _of(folder: Path, folders: Sequence[str]) -> bool:
    """Tell whether a folder is free, or holds the table of the same checkpoints."""
    if not folder.exists():
        return True
    try:
        found = json.loads((folder / f"{_TABLE}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(folder.iterdir())
    return isinstance(found, dict) and found.get("folders") == list(folders)


def _settings(result: Comparison) -> str:
    settings = dict(result.settings)
    examined = settings.pop("examination", "")
    return "; ".join(filter(None, [", ".join(f"{key} {value}" for key, value in settings.items()), str(examined)]))


def _error(row: Any) -> str:
    error = float(row["uncertainty"])
    return "" if math.isnan(error) else f"{error:.2g}"


def _cell(row: Any) -> str:
    if row is None:
        return "–"
    error = _error(row)
    marks = "*" * (row["converged"] is False) + "†" * ("the budget ended it" in row["meaning"])
    return f"{row['value']:.4g}" + (f" ±{error}" if error else "") + marks


def _heading(metric: str) -> str:
    return metric.replace("_", " ").replace("@", " @")


def _fitting(columns: Mapping[str, Sequence[str]], labels: Sequence[str], width: int) -> list[list[str]]:
    """Return the metrics in groups that fit beside one another and the labels: as wide as their cells and words."""
    first = room = width - min(max(map(len, labels)), width // 2) - 4
    groups: list[list[str]] = [[]]
    for metric, (heading, *cells) in columns.items():
        needed = max(map(len, [*heading.split(" "), *cells])) + 3
        if groups[-1] and needed > room:
            groups.append([])
            room = first
        groups[-1].append(metric)
        room -= needed
    return groups
