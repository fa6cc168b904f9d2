"""The command ``msam-analysis study``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, cast

import typer

from msam_analysis.cli import checks
from msam_analysis.cli.names import listed
from msam_analysis.cli.processes import group, rank
from msam_analysis.cli.saying import say
from msam_analysis.studies.cifar import Checksum
from msam_analysis.studies.computing import computing
from msam_analysis.studies.measuring import COARSE, Protocol
from msam_analysis.studies.study import run_study

MOST_SEEDS = 10_000


def study_command(
    workload: Annotated[
        str, typer.Option(help="What to train: digits, cifar100, cifar100-wrn28-10, cifar100-resnet50.")
    ] = "digits",
    seeds: Annotated[int, typer.Option(help="Seeds per optimizer; intervals need at least 2.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Output folder; default results/WORKLOAD.")] = None,
    figures: Annotated[Path | None, typer.Option(help="A second folder for the pictures.")] = None,
    exhibits: Annotated[str | None, typer.Option(help="Some, e.g. F2C,TA1, or all; default the main ones.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes; default one per processor, on a GPU one.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler whose workers make the runs, e.g. tcp://host:8786.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="CIFAR-100's binary archive, or the folder with it.")] = None,
    checksum: Annotated[str, typer.Option(help="published, or any for other files of CIFAR-100's format.")] = (
        "published"
    ),
    limit: Annotated[int | None, typer.Option(help="Only the first images, so many for training and test.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of the workload's own number.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Training samples to measure on; default 10,000 of CIFAR-100, else all.")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Steps between slow records; default a 20th of a run.")] = None,
    coarse: Annotated[bool, typer.Option("--coarse", help="Measure as little as shows that it works.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    amp: Annotated[str, typer.Option(help="Mixed precision of training steps: none, bfloat16, float16.")] = "none",
    save_every: Annotated[
        int | None, typer.Option(help="Epochs between saved states of a run; default 10 for CIFAR-100, else none.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train SGD, NAG, SAM and MSAM, measure them, and write tables, figures and a report. Resumes where it stopped.

    With torchrun, several processes, each with a GPU of its own if there are any, share the runs.
    """
    checks.within("seeds", seeds, 1, MOST_SEEDS)
    protocol = dataclasses.replace(COARSE if coarse else Protocol(), samples=samples)
    with group():
        page = run_study(
            workload,
            seeds=seeds,
            out=out,
            figures=figures,
            exhibits=None if exhibits is None else listed(exhibits),
            jobs=jobs,
            cluster=cluster,
            protocol=protocol,
            every=every,
            computing=computing(device, amp, save_every),
            data=data,
            checksum=cast(Checksum, checksum),
            limit=limit,
            epochs=epochs,
            progress=not quiet,
        )
    if rank() == 0:
        say(f"report: {page}", f"report: {page.with_suffix('.md')}", f"tables: {page.parent / 'tables'}")
