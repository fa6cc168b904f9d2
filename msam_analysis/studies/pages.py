"""What a study writes: the tables, the pictures and the report of what its exhibits found."""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msam_analysis import plots, report
from msam_analysis.studies import prose
from msam_analysis.studies.exhibits import Exhibit, Finding, find, main_tables
from msam_analysis.studies.tables import FinishedRun, Tables, write_table
from msam_analysis.studies.workloads import formula

if TYPE_CHECKING:
    from msam_analysis.studies.study import Study

_SUMMARY = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "lambda_1", "gradients_per_step")


def write(study: Study, finished: Mapping[str, FinishedRun], root: Path, figures: Path | str | None) -> Path:
    """Let the exhibits find what they find in finished runs, write all of it, and return ``report.html``."""
    findings = {exhibit: find(exhibit, study.workload, study.seeds, finished) for exhibit in study.exhibits}
    main = any(exhibit.main for exhibit in study.exhibits)
    tables = main_tables(study.workload, study.seeds, finished) if main else None
    if tables is not None:
        tables.write(root / "tables")
    pictures = {}
    for exhibit, finding in findings.items():
        if finding.table is not None:
            write_table(finding.table, root / "tables" / f"{exhibit.name}.csv")
        if finding.draw is not None:
            pictures[exhibit] = plots.save(finding.draw(), root / "figures" / exhibit.name, close=True)[0]
    setting = {**vars(study), "networks": len(finished), "diverged": _diverged(finished.values())}
    page = report.write(_compose(setting, findings, tables, pictures), root)[0]
    if figures is not None:
        folder = Path(figures)
        folder.mkdir(parents=True, exist_ok=True)
        copies = {exhibit: folder / picture.name for exhibit, picture in pictures.items()}
        for exhibit, copy in copies.items():
            shutil.copyfile(pictures[exhibit], copy)
            shutil.copyfile(root / "tables" / f"{exhibit.name}.csv", copy.with_suffix(".csv"))
        report.write_markdown(_compose(setting, findings, tables, copies), folder)
    return page


def _compose(
    setting: Mapping[str, Any],
    findings: Mapping[Exhibit, Finding],
    tables: Tables | None,
    pictures: Mapping[Exhibit, Path],
) -> report.Report:
    """Return the report: ``setting`` has the study's fields, the number of networks, and those that diverged."""
    spread = f"Mean over {setting['seeds']} seeds ± half width"
    claims = [claim for finding in findings.values() for claim in finding.claims]
    summary = {
        "setting": setting,
        "measured": 0 if tables is None else len(tables.runs),
        "verdicts": report.counted(claims),
        "solved": [] if tables is None else tables.solvers.to_list(),
    }
    summaries: list[report.Figure | report.Table] = []
    if tables is not None:
        quantities = [*_SUMMARY, *(f"sharpness_{radius:g}" for radius in setting["protocol"].radii)]
        columns = ["optimizer", *(column for q in quantities for column in (q, f"{q}_half_width"))]
        summaries = [report.Table(tables.optimizers[columns], spread)]
    sections = [report.Section("What was run", _setup(setting), summaries)]
    for exhibit, finding in findings.items():
        words, ids = exhibit.prose, ", ".join(exhibit.ids)
        items: list[report.Figure | report.Table] = []
        if exhibit in pictures:
            items.append(report.Figure(pictures[exhibit], words.caption, words.title))
        if finding.shown is not None:
            items.append(report.Table(finding.shown, f"{spread} of the 68 % interval"))
        sections.append(report.Section(f"{ids}: {words.title}" if ids else words.title, finding.note, items))
    *head, last = setting["workload"].perturbations
    title = f"{', '.join(head)} and {last}" if head else last
    return report.Report(
        f"{title} on {setting['workload'].name}", prose.render("summary.md.j2", summary), sections, claims
    )


def _setup(setting: Mapping[str, Any]) -> str:
    workload = setting["workload"]
    unusual = [change for change in _changes(setting["protocol"]) if change[0] != "samples"]
    perturbations = workload.perturbations.items()
    facts = {
        "setting": setting,
        "workload": workload,
        "recipe": ", ".join(f"{name} {value}" for name, value, _ in _changes(workload.recipe)),
        "perturbations": "; ".join(f"{name}: {'none' if one is None else formula(one)}" for name, one in perturbations),
        "unusual": "; ".join(f"{name} {value} instead of {usual}" for name, value, usual in unusual),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": version("msam-analysis"),
    }
    return prose.render("setup.md.j2", facts)


def _changes(values: Any) -> list[tuple[str, object, object]]:
    """Return the fields of a data class that are not at their defaults: name in words, value, default."""
    given = [(field.name.replace("_", " "), getattr(values, field.name), field.default) for field in fields(values)]
    return [change for change in given if change[1] != change[2]]


def _diverged(finished: Iterable[FinishedRun]) -> str:
    """Name the networks whose loss is not finite; empty where there are none."""
    kinds: dict[str, list[int]] = {}
    for run in finished:
        if not math.isfinite(run.scores["train_loss"]):
            strength = f"{'−' * (run.settings['sign'] < 0)}{run.settings['rho']}"
            kinds.setdefault(f"{run.settings['workload']} {run.optimizer} at ρ = {strength}", []).append(run.seed)
    return "; ".join(f"{kind}, seed {', '.join(map(str, sorted(kinds[kind])))}" for kind in sorted(kinds))
