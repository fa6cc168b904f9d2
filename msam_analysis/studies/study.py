"""A study as a value: train, measure, draw, judge."""

from __future__ import annotations

import math
import platform
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import joblib
import torch

from msam_analysis import plots, report
from msam_analysis.objective.explaining import decorated
from msam_analysis.results import atomic_path
from msam_analysis.results.files import check_writable, sweep
from msam_analysis.results.fingerprint import release
from msam_analysis.studies import prose, store
from msam_analysis.studies.computing import PLAIN, Computing
from msam_analysis.studies.exhibits import Exhibit, Finding, choose, find, main_tables, networks
from msam_analysis.studies.jobs import Job, job
from msam_analysis.studies.measuring import MEASURES, Protocol
from msam_analysis.studies.processes import Members, make, terminable
from msam_analysis.studies.runs import gather
from msam_analysis.studies.tables import FinishedRun, Tables, write_table
from msam_analysis.studies.workloads import Workload, formula, workload

_RECORDS = 20
_SUMMARY = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "lambda_1", "gradients_per_step")


@dataclass(frozen=True)
class Study:
    """What is trained, measured and shown, and how.

    A finished run is never made again: an interrupted study, run again, goes on from what is there, and from the states
    of unfinished trainings that ``computing`` lets it keep. Other settings have other runs, which lie beside these.

    Attributes
    ----------
    workload
        What is trained: one of ours, see :func:`~msam_analysis.studies.workloads.workload`, or your own.
    exhibits
        What is made, drawn and judged, see :func:`~msam_analysis.studies.exhibits.choose`. Networks are recorded and
        measured as these need it, and no more.
    seeds
        Seeds 0, 1, ..., ``seeds − 1`` for every optimizer. Default 3; one seed gives no interval and so no verdict.
    protocol
        What is measured, and how finely; ``samples`` defaults to the workload's number.
    computing
        Device, precision, and how often the state of a training is saved; default the CPU, float32 and the workload's
        number.
    every
        Steps between records of the slower probes; default a twentieth of a run, two epochs of the digits.

    Raises
    ------
    ValueError
        Fewer than one seed, sample, or step between records.
    """

    workload: Workload
    exhibits: tuple[Exhibit, ...]
    seeds: int = 3
    protocol: Protocol = field(default_factory=Protocol)
    computing: Computing = PLAIN
    every: int | None = None

    def __post_init__(self) -> None:
        """Take from the workload what is not said."""
        samples = self.workload.samples if self.protocol.samples is None else self.protocol.samples
        save_every = self.computing.save_every or self.workload.save_every
        steps = self.workload.recipe.steps(self.workload.training_samples)
        every = max(1, steps // _RECORDS) if self.every is None else self.every
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        if every < 1:
            raise ValueError(f"every must be a positive integer, got {every}")
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be a positive number to measure on, got {samples}: leave it out")
        object.__setattr__(self, "protocol", replace(self.protocol, samples=samples))
        object.__setattr__(self, "computing", replace(self.computing, save_every=save_every))
        object.__setattr__(self, "every", every)

    def jobs(self, folder: Path) -> dict[str, Job]:
        """Return the jobs of all networks that the exhibits need, in a folder of runs, by :attr:`.Run.identity`."""
        needed = gather(run for exhibit in self.exhibits for run in exhibit.runs(self.workload, self.seeds))
        for name in {name for run in needed.values() for name in run.measured & MEASURES.keys()}:
            MEASURES[name].check()
        every = self.every or 1
        return {identity: job(run, folder, self.protocol, every, self.computing) for identity, run in needed.items()}

    def run(
        self,
        out: Path | str | None = None,
        *,
        figures: Path | str | None = None,
        jobs: int | None = None,
        cluster: str | None = None,
        progress: bool = True,
    ) -> Path:
        """Train and measure every network, and write tables and a report.

        Runs are made with one thread each, so that the number of processes does not change a bit of the result. In a
        process group of :mod:`torch.distributed` each process makes its share of the runs; the first one also reads
        them and writes everything else.

        Parameters
        ----------
        out
            Output folder, default ``results/<name of the workload>``: ``tables/*.csv``, ``figures/*.png``,
            ``networks/*.pt``, ``runs``, ``report.md``, ``report.html``.
        figures
            A second folder for the pictures, each with its table beside it, and for ``report.md``.
        jobs
            Worker processes, default the number of processors; on a GPU one. In a process group, of each member,
            default one. A single one is this process.
        cluster
            Address of a Dask scheduler whose workers make the runs, for example ``"tcp://10.0.0.1:8786"``. They must
            see the output folder under the same path. Default: none.
        progress
            Show a progress bar with the time left.

        Returns
        -------
        pathlib.Path
            ``report.html``.

        Raises
        ------
        ValueError
            Fewer than one process; both ``jobs`` and ``cluster``; in a process group, members that plan different runs.
        ModuleNotFoundError
            A package that the workload, a measure or a cluster needs is not installed.
        BlockingIOError
            Another study is running in the output folder.
        ChildProcessError
            A process was killed; finished runs stay.
        FileNotFoundError
            The workers of the cluster do not see the output folder.
        RuntimeError
            In a process group: a run failed here, or another member has ended; finished runs stay.
        KeyboardInterrupt
            Passed on, also for a request to terminate, after the processes have stopped; finished runs stay.
        """
        if jobs is not None and cluster is not None:
            raise ValueError("jobs are processes of this machine, and a cluster has its own: choose one of the two")
        members = Members()
        if jobs is None:
            jobs = 1 if self.computing.device != "cpu" or members.count > 1 else joblib.cpu_count()
        if jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {jobs}")
        root = (Path(out) if out is not None else Path("results") / self.workload.name).absolute()
        second = None if figures is None else Path(figures).absolute()
        for folder in (root, second) if members.rank == 0 else ():
            if folder is not None:
                check_writable(folder)
        _check_own(root)
        plan = self.jobs(root / "runs")
        members.check_alike([(one.directory.name, one.watched, one.measured) for one in plan.values()])
        if members.rank > 0:
            with terminable():
                make(plan.values(), jobs, members, cluster=cluster, bar=False)
            members.exchange("the end")
            return root / "report.html"
        (root / "runs").mkdir(parents=True, exist_ok=True)
        with store.alone(root / "runs"), terminable():
            store.sweep(root / "runs")
            for folder in (root, root / "tables", root / "figures", root / "networks"):
                sweep(folder)
            for one in plan.values():
                if one.trained:
                    store.forget_state(one.state)
            make(plan.values(), jobs, members, cluster=cluster, bar=progress)
            for run in networks(self.workload, self.seeds) if any(exhibit.main for exhibit in self.exhibits) else ():
                store.name_network(
                    plan[run.identity].directory, root / "networks" / f"{run.optimizer}-seed{run.seed}.pt"
                )
            page = _write(self, {identity: one.read() for identity, one in plan.items()}, root, second)
        members.exchange("the end")
        return page


def run_study(
    name: str | Workload = "digits",
    *,
    seeds: int = 3,
    out: Path | str | None = None,
    figures: Path | str | None = None,
    exhibits: Sequence[str] | None = None,
    jobs: int | None = None,
    cluster: str | None = None,
    protocol: Protocol | None = None,
    every: int | None = None,
    computing: Computing | None = None,
    progress: bool = True,
    **source: Any,
) -> Path:
    """Make a :class:`Study` of a workload by its name, or of your own, and :meth:`run <Study.run>` it.

    Parameters
    ----------
    name
        A workload or its name.
    exhibits
        Ids of the exhibits to make; ``["all"]`` for all of them. Default the main ones, which share one set of
        networks.
    seeds, protocol, every, computing
        See :class:`Study`.
    out, figures, jobs, cluster, progress
        See :meth:`Study.run`.
    **source
        For a name: ``data``, ``checksum``, ``limit``, ``epochs`` of :func:`~msam_analysis.studies.workloads.workload`.

    Returns
    -------
    pathlib.Path
        ``report.html``.

    Raises
    ------
    ValueError
        An unknown workload or exhibit; what the workload finds wrong with its data; and as :class:`Study`.
    """
    chosen = workload(name, **source) if isinstance(name, str) else name
    study = Study(chosen, choose(exhibits), seeds, protocol or Protocol(), computing or PLAIN, every)
    return study.run(out, figures=figures, jobs=jobs, cluster=cluster, progress=progress)


def _write(study: Study, finished: Mapping[str, FinishedRun], root: Path, figures: Path | str | None) -> Path:
    """Let the exhibits find what they find in finished runs, write all of it, and return ``report.html``."""
    findings = {exhibit: find(exhibit, study.workload, study.seeds, finished) for exhibit in study.exhibits}
    main = any(exhibit.main for exhibit in study.exhibits)
    tables = main_tables(study.workload, study.seeds, finished) if main else None
    if tables is not None:
        tables.write(root / "tables")
    for exhibit, finding in findings.items():
        if finding.table is not None:
            write_table(finding.table, root / "tables" / f"{exhibit.name}.csv")
    pictures: dict[Exhibit, Path] = {}
    failed: list[str] = []
    for exhibit, finding in findings.items():
        if finding.draw is not None:
            with decorated(f"the picture of {exhibit.name}", failed):
                pictures[exhibit] = plots.save(finding.draw(), root / "figures" / exhibit.name, close=True)[0]
    for what in failed:
        warnings.warn(f"study: {what}", UserWarning, stacklevel=3)
    page = report.write(_compose(study, finished, findings, tables, pictures), root)[0]
    if figures is not None:
        folder = Path(figures)
        copies = {exhibit: folder / picture.name for exhibit, picture in pictures.items()}
        for exhibit, copy in copies.items():
            _copy(pictures[exhibit], copy)
            _copy(root / "tables" / f"{exhibit.name}.csv", copy.with_suffix(".csv"))
        report.write_markdown(_compose(study, finished, findings, tables, copies), folder)
    return page


def _copy(file: Path, target: Path) -> None:
    with atomic_path(target) as partial:
        shutil.copyfile(file, partial)


def _check_own(root: Path) -> None:
    """Raise ``FileExistsError`` if a folder without a study has a file of a name that a study writes."""
    if (root / "runs").is_dir():
        return
    for name in ("report.html", "report.md", "tables", "figures", "networks"):
        if (root / name).exists():
            raise FileExistsError(f"{root} holds {name}, and no study wrote it: choose another output folder")


def _compose(
    study: Study,
    finished: Mapping[str, FinishedRun],
    findings: Mapping[Exhibit, Finding],
    tables: Tables | None,
    pictures: Mapping[Exhibit, Path],
) -> report.Report:
    spread = f"Mean over {study.seeds} seeds ± half width"
    claims = [claim for finding in findings.values() for claim in finding.claims]
    summary = {
        "setting": {**vars(study), "networks": len(finished), "diverged": _diverged(finished.values())},
        "measured": 0 if tables is None else len(tables.runs),
        "verdicts": report.counted(claims),
        "solved": [] if tables is None else tables.solvers.to_list(),
    }
    summaries: list[report.Figure | report.Table] = []
    if tables is not None:
        quantities = [*_SUMMARY, *(f"sharpness_{radius:g}" for radius in study.protocol.radii)]
        columns = ["optimizer", *(column for q in quantities for column in (q, f"{q}_half_width"))]
        summaries = [report.Table(tables.optimizers[columns], spread)]
    sections = [report.Section("What was run", _setup(study, _examined(finished.values())), summaries)]
    for exhibit, finding in findings.items():
        words, ids = exhibit.prose, ", ".join(exhibit.ids)
        items: list[report.Figure | report.Table] = []
        if exhibit in pictures:
            items.append(report.Figure(pictures[exhibit], words.caption, words.title))
        if finding.shown is not None:
            items.append(report.Table(finding.shown, f"{spread} of the 68 % interval"))
        sections.append(report.Section(f"{ids}: {words.title}" if ids else words.title, finding.note, items))
    *head, last = study.workload.perturbations
    title = f"{', '.join(head)} and {last} on {study.workload.name}" if head else f"{last} on {study.workload.name}"
    return report.Report(title, prose.render("summary.md.j2", summary), sections, claims)


def _setup(study: Study, examined: str) -> str:
    unusual = [change for change in _changes(study.protocol) if change[0] != "samples"]
    perturbations = study.workload.perturbations.items()
    facts = {
        "setting": study,
        "examined": examined,
        "workload": study.workload,
        "recipe": ", ".join(f"{name} {value}" for name, value, _ in _changes(study.workload.recipe)),
        "perturbations": "; ".join(f"{name}: {'none' if one is None else formula(one)}" for name, one in perturbations),
        "unusual": "; ".join(f"{name} {value} instead of {usual}" for name, value, usual in unusual),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "version": release("msam-analysis"),
    }
    return prose.render("setup.md.j2", facts)


def _changes(values: Any) -> list[tuple[str, object, object]]:
    """Return the fields of a data class that are not at their defaults: name in words, value, default."""
    given = [(field.name.replace("_", " "), getattr(values, field.name), field.default) for field in fields(values)]
    return [change for change in given if change[1] != change[2]]


def _examined(finished: Iterable[FinishedRun]) -> str:
    """Say in a sentence what the examinations of the networks' losses found, from the settings of their results."""
    found: Counter[str] = Counter()
    for run in finished:
        settings = [result.settings for result in run.results.values() if "batches" in result.settings]
        found.update({str(each.get("examination", "not recorded")) for each in settings})
    counts = ", ".join(f"{verdict} on {count} network{'s' * (count != 1)}" for verdict, count in found.items())
    return f"Examined before measuring: value, copy, mean, gradient, Hessian, no writes; {counts}." if found else ""


def _diverged(finished: Iterable[FinishedRun]) -> str:
    """Name the networks whose loss is not finite; empty where there are none."""
    kinds: dict[str, list[int]] = {}
    for run in finished:
        if not math.isfinite(run.scores["train_loss"]):
            strength = f"{'−' * (run.settings['sign'] < 0)}{run.settings['rho']}"
            kinds.setdefault(f"{run.settings['workload']} {run.optimizer} at ρ = {strength}", []).append(run.seed)
    return "; ".join(f"{kind}, seed {', '.join(map(str, sorted(kinds[kind])))}" for kind in sorted(kinds))
