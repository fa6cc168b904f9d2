"""The report of a study, put together from what its exhibits found."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch

from msam_analysis import report
from msam_analysis.studies import prose
from msam_analysis.studies.computing import Computing
from msam_analysis.studies.exhibits import Exhibit, Finding
from msam_analysis.studies.measuring import Protocol
from msam_analysis.studies.tables import Tables
from msam_analysis.studies.workloads import Recipe, Workload, formula

_SUMMARY = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "lambda_1", "gradients_per_step")


@dataclass(frozen=True)
class Setting:
    """What a study was asked for, for its report.

    Attributes
    ----------
    workload, protocol, computing, seeds
        As the study was given them.
    networks
        Number of networks that were trained.
    diverged
        The networks that diverged, in words; empty where there are none.
    """

    workload: Workload
    protocol: Protocol
    computing: Computing
    seeds: int
    networks: int
    diverged: str


def compose(
    setting: Setting, findings: Mapping[Exhibit, Finding], tables: Tables | None, pictures: Mapping[Exhibit, Path]
) -> report.Report:
    """Return the report of a study.

    Parameters
    ----------
    setting
        What the study was asked for.
    findings
        What every exhibit found, in the report's order.
    tables
        The main tables; None where they were not asked for, or a network diverged.
    pictures
        Files of the pictures; an exhibit without one has nothing to show.
    """
    spread = f"Mean over {setting.seeds} seeds ± half width"
    sections = [report.Section("What was run", _setup(setting), _summary_tables(setting, tables, spread))]
    for exhibit, finding in findings.items():
        words, ids = exhibit.prose, ", ".join(exhibit.ids)
        items: list[report.Figure | report.Table] = []
        if exhibit in pictures:
            items.append(report.Figure(pictures[exhibit], words.caption, words.title))
        if finding.shown is not None:
            items.append(report.Table(finding.shown, f"{spread} of the 68 % interval"))
        sections.append(report.Section(f"{ids}: {words.title}" if ids else words.title, finding.note, items))
    claims = [claim for finding in findings.values() for claim in finding.claims]
    return report.Report(
        title=f"{_listed(setting.workload.perturbations)} on {setting.workload.name}",
        summary=_summary(setting, claims, tables),
        sections=sections,
        claims=claims,
    )


def _summary(setting: Setting, claims: list[report.Claim], tables: Tables | None) -> str:
    solvers = None if tables is None else tables.solvers
    measured = 0 if tables is None else len(tables.runs)
    return prose.render(
        "summary.md.j2",
        {
            "measured": measured,
            "others": f"{setting.networks - measured:,}",
            "verdicts": report.counted(claims),
            "departures": "; ".join(setting.workload.departures),
            "diverged": setting.diverged,
            "solved": 0 if solvers is None else len(solvers),
            "unsolved": "none" if solvers is None or solvers.all() else int((~solvers).sum()),
        },
    )


def _setup(setting: Setting) -> str:
    workload, samples, recipe = setting.workload, setting.protocol.samples, setting.workload.recipe
    whole = samples is None or samples >= workload.training_samples
    usual = Protocol(samples=samples)
    return prose.render(
        "setup.md.j2",
        {
            "description": f"{workload.description[0].upper()}{workload.description[1:]}",
            "base": "SGD with momentum" if recipe.base == "sgd" else "AdamW",
            "recipe": ", ".join(
                f"{field.name.replace('_', ' ')} {getattr(recipe, field.name)}"
                for field in fields(Recipe)
                if getattr(recipe, field.name) != field.default
            ),
            "schedule": "cosine decay to 0" if recipe.schedule == "cosine" else "constant learning rate",
            "perturbations": "; ".join(
                f"{name}: {'none' if value is None else formula(value)}"
                for name, value in workload.perturbations.items()
            ),
            "part": "the training set" if whole else f"{samples:,} of the training samples",
            "labels": "labels as trained on" if workload.augmented is None else "without augmentation",
            "controls": workload.controls,
            "computing": setting.computing,
            "departures": "; ".join(workload.departures),
            "coarser": "; ".join(
                f"{field.name.replace('_', ' ')} {getattr(setting.protocol, field.name)} instead of "
                f"{getattr(usual, field.name)}"
                for field in fields(Protocol)
                if getattr(setting.protocol, field.name) != getattr(usual, field.name)
            ),
            "seeds": setting.seeds,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "version": version("msam-analysis"),
        },
    )


def _summary_tables(setting: Setting, tables: Tables | None, caption: str) -> list[report.Table]:
    if tables is None:
        return []
    quantities = [*_SUMMARY, *(f"sharpness_{radius:g}" for radius in setting.protocol.radii)]
    shown = tables.optimizers[["optimizer", *(c for q in quantities for c in (q, f"{q}_half_width"))]]
    return [report.Table(shown, caption)]


def _listed(names: Iterable[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


__all__ = ["Setting", "compose"]
