"""The command ``msam-analysis study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msam_analysis.studies.study import run_study


def study_command(
    workload: Annotated[str, typer.Option(help="What to train: digits.")] = "digits",
    seeds: Annotated[int, typer.Option(help="Seeds per optimizer; intervals need at least 2.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Output folder; default results/WORKLOAD.")] = None,
    figures: Annotated[Path | None, typer.Option(help="A second folder for the pictures.")] = None,
    exhibits: Annotated[str | None, typer.Option(help="Some, e.g. F2C,TA1, or all; default the main ones.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; default one per processor.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train SGD, NAG, SAM and MSAM, measure them, and write tables, figures and a report. Resumes where it stopped."""
    names = [name.strip() for name in (exhibits or "").split(",") if name.strip()]
    chosen = None if exhibits is None or names == ["all"] else names
    page = run_study(workload, seeds=seeds, out=out, figures=figures, exhibits=chosen, jobs=jobs, progress=not quiet)
    typer.echo(f"report: {page}\nreport: {page.with_suffix('.md')}\ntables: {page.parent / 'tables'}")
