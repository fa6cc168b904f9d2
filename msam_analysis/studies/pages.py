"""The report of a study, put together from what its exhibits found."""

from __future__ import annotations

import platform
from collections import Counter
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
from msam_analysis.studies.tables import FinishedRun, Tables
from msam_analysis.studies.workloads import Recipe, Workload, formula

_SUMMARY = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "lambda_1", "gradients_per_step")


@dataclass(frozen=True)
class Setting:
    """What a study was asked for, for its report.

    ``workload``, ``protocol``, ``computing``, ``seeds``: As the study was given them.
    ``networks``: Number of networks that were trained.
    ``diverged``: The networks that diverged, in words; empty where there are none.
    ``examined``: What the examinations of the networks' losses found, see :func:`examined`.
    """

    workload: Workload
    protocol: Protocol
    computing: Computing
    seeds: int
    networks: int
    diverged: str
    examined: str


def examined(runs: Iterable[FinishedRun]) -> str:
    """Say in a sentence what the examinations of the networks' losses found, from the settings of their results."""
    found: Counter[str] = Counter()
    for run in runs:
        settings = [result.settings for result in run.results.values() if "batches" in result.settings]
        found.update({str(each.get("examination", "not recorded")) for each in settings})
    counts = ", ".join(f"{verdict} on {count} network{'s' * (count != 1)}" for verdict, count in found.items())
    return f"Examined before measuring: value, copy, mean, gradient, Hessian, no writes; {counts}." if found else ""


def compose(
    setting: Setting, findings: Mapping[Exhibit, Finding], tables: Tables | None, pictures: Mapping[Exhibit, Path]
) -> report.Report:
    """Return the report of a study.

    ``setting``: What the study was asked for.
    ``findings``: What every exhibit found, in the report's order.
    ``tables``: The main tables; None where they were not asked for, or a network diverged.
    ``pictures``: Files of the pictures; an exhibit without one has nothing to show.
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
    facts = {
        "setting": setting,
        "measured": 0 if tables is None else len(tables.runs),
        "verdicts": report.counted(claims),
        "solved": [] if tables is None else tables.solvers.to_list(),
    }
    return prose.render("summary.md.j2", facts)


def _setup(setting: Setting) -> str:
    workload = setting.workload
    unusual = [change for change in _changes(setting.protocol) if change[0] != "samples"]
    facts = {
        "setting": setting,
        "workload": workload,
        "recipe": ", ".join(f"{name} {value}" for name, value, _ in _changes(workload.recipe)),
        "perturbations": "; ".join(
            f"{name}: {'none' if value is None else formula(value)}" for name, value in workload.perturbations.items()
        ),
        "unusual": "; ".join(f"{name} {value} instead of {usual}" for name, value, usual in unusual),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": version("msam-analysis"),
    }
    return prose.render("setup.md.j2", facts)


def _changes(values: Recipe | Protocol) -> list[tuple[str, object, object]]:
    """Return the fields that are not at their defaults: name in words, value, default."""
    given = [(field.name.replace("_", " "), getattr(values, field.name), field.default) for field in fields(values)]
    return [change for change in given if change[1] != change[2]]


def _summary_tables(setting: Setting, tables: Tables | None, caption: str) -> list[report.Table]:
    if tables is None:
        return []
    quantities = [*_SUMMARY, *(f"sharpness_{radius:g}" for radius in setting.protocol.radii)]
    shown = tables.optimizers[["optimizer", *(c for q in quantities for c in (q, f"{q}_half_width"))]]
    return [report.Table(shown, caption)]


def _listed(names: Iterable[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last
