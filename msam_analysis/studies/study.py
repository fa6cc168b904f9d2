"""Train, measure, draw, judge: the main job."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import platform
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from msam_analysis import plots, report
from msam_analysis.studies import store
from msam_analysis.studies.exhibits import EXHIBITS, Evidence, Exhibit, Finding, choose
from msam_analysis.studies.measuring import Protocol, measure, scores
from msam_analysis.studies.runs import Run, Task, gather, place
from msam_analysis.studies.tables import FinishedRun, Tables, write_table
from msam_analysis.studies.training import Tick, train
from msam_analysis.studies.workloads import Recipe, Workload, formula, workload

if TYPE_CHECKING:
    from typing_extensions import Never

_SUMMARY = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "lambda_1", "gradients_per_step")


class StoppedError(Exception):
    """The study was interrupted; this run is abandoned."""


def run_study(
    name: str = "digits",
    *,
    seeds: int = 3,
    out: Path | str | None = None,
    figures: Path | str | None = None,
    exhibits: Sequence[str] | None = None,
    jobs: int | None = None,
    protocol: Protocol | None = None,
    every: int = 32,
    progress: bool = True,
) -> Path:
    """Train every optimizer of a workload with several seeds, measure every network, and write tables and a report.

    Runs are made in separate processes with one thread each, so that their number does not change a bit of the result.
    A finished run is never made again: an interrupted study, called again, goes on from the runs it has.

    Parameters
    ----------
    name
        A workload's name.
    seeds
        Seeds 0, 1, ..., ``seeds − 1`` for every optimizer. Default 3; one seed gives no interval and so no verdict.
    out
        Output folder, default ``results/<name>``: ``tables/*.csv``, ``figures/*.png``, ``runs/*/checkpoint.pt``,
        ``report.md``, ``report.html``.
    figures
        A second folder for the pictures.
    exhibits
        Ids of the exhibits to make, draw and judge; ``["all"]`` for all of them. Default the main ones, which share one
        set of networks.
    jobs
        Processes, default the number of processors.
    protocol
        What is measured, and how finely.
    every
        Steps between records of the slower probes.
    progress
        Show a progress bar with the time left.

    Returns
    -------
    pathlib.Path
        ``report.html``.

    Raises
    ------
    ValueError
        An unknown workload or exhibit, or fewer than one seed or process.
    BlockingIOError
        Another study is running in the output folder.
    ChildProcessError
        A process was killed; finished runs stay.
    KeyboardInterrupt
        Passed on, also for a request to terminate, after the processes have stopped; finished runs stay.
    """
    problem = workload(name)
    chosen = choose(exhibits)
    jobs = jobs if jobs is not None else _processors()
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds and jobs must be at least 1, got seeds={seeds} and jobs={jobs}")
    if every < 1:
        raise ValueError(f"every must be a positive integer, got {every}")
    protocol = protocol or Protocol()
    root = Path(out) if out is not None else Path("results") / name
    plan = _plan(chosen, problem, seeds)
    tasks = {identity: place(run, root / "runs", protocol, every) for identity, run in plan.items()}
    (root / "runs").mkdir(parents=True, exist_ok=True)
    with store.alone(root / "runs"), _terminable():
        store.sweep(root / "runs")
        missing = [task for task in tasks.values() if not store.is_finished(task.directory)]
        _make(missing, jobs, progress, len(tasks))
        evidence = Evidence(problem, seeds, {identity: _read(task) for identity, task in tasks.items()})
        findings = {exhibit: exhibit.study(evidence) for exhibit in chosen}
        tables = evidence.tables if any(exhibit.main for exhibit in chosen) else None
        _write_tables(findings, tables, root / "tables")
        pictures = _draw(findings, root / "figures")
        if figures is not None:
            Path(figures).mkdir(parents=True, exist_ok=True)
            for picture in pictures.values():
                shutil.copyfile(picture, Path(figures) / picture.name)
        page = _compose(problem, protocol, seeds, findings, tables, pictures)
        return report.write(page, root)[0]


@contextmanager
def _terminable() -> Iterator[None]:
    """Let a request to terminate, or a terminal that is closed, do what the interrupt key does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    here = threading.current_thread() is threading.main_thread()
    # What somebody else handles or ignores (nohup) stays so.
    ours = [number for number in signals if here and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _processors() -> int:
    # What this process may use, where the system tells; a container often has fewer than the machine.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plan(chosen: Sequence[Exhibit], problem: Workload, seeds: int) -> dict[str, Run]:
    """Return the runs that the chosen exhibits need, each with all that any exhibit wants of it.

    So a network is the same file whichever exhibits are chosen, and is never trained again for another one.
    """
    everything = gather(run for exhibit in EXHIBITS for run in exhibit.runs(problem, seeds))
    needed = gather(run for exhibit in chosen for run in exhibit.runs(problem, seeds))
    return {identity: everything[identity] for identity in needed}


def _read(task: Task) -> FinishedRun:
    return store.read_run(task.directory, task.run.optimizer, task.run.seed, task.run.settings)


def _make(tasks: Sequence[Task], jobs: int, progress: bool, total: int) -> None:
    """Make runs in processes, showing how far they are."""
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    ticks: Queue[float] = context.Queue()
    stop = context.Event()
    others = set(multiprocessing.active_children())
    bar: tqdm[Never] = tqdm(
        total=sum(task.cost for task in tasks),
        desc=f"{total - len(tasks)}/{total} runs",
        disable=not progress,
        bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed} passed, {remaining} left",
        # Into a log, every redraw is a line.
        mininterval=0.2 if sys.stderr.isatty() else 20,
        # The mean rate over the whole study: a recent rate would jump between cheap and dear phases.
        smoothing=0,
    )
    with bar, ProcessPoolExecutor(min(jobs, len(tasks)), context, _prepare, (ticks, stop)) as pool:
        # The dearest runs first, so that no processor idles at the end.
        futures = [pool.submit(execute, task) for task in sorted(tasks, key=lambda task: -task.cost)]
        try:
            _follow(futures, ticks, bar, total)
        except BaseException as error:
            stop.set()
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            # The pool's own thread waits for its processes; two waiting for one would each miss that it ended.
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a process was killed (out of memory?): finished runs are kept, and the same command goes on from "
                    "them; fewer processes (--jobs 1) need less memory"
                ) from None
            raise


def _follow(futures: Sequence[Future[None]], ticks: Queue[float], bar: tqdm[Never], total: int) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.2)
        for future in done:
            future.result()
        try:
            while True:
                bar.update(ticks.get_nowait())
        except queue.Empty:
            pass
        bar.set_description_str(f"{total - len(pending)}/{total} runs")


# What a worker process reports to, set once when it starts; empty in the main process.
_worker: list[tuple[Queue[float], Event]] = []


def _prepare(ticks: Queue[float], stop: Event) -> None:
    """Prepare a worker process: one thread, the interrupt key left to the main process, and no life without that."""
    _worker.append((ticks, stop))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def execute(task: Task) -> None:
    """Train and measure one network and write the run; called in a worker process, or directly."""

    def tick(amount: float) -> None:
        for ticks, stop in _worker:
            if stop.is_set():
                raise StoppedError
            ticks.put(amount)

    make_run(task, tick)


def make_run(task: Task, tick: Tick) -> None:
    """Train one network, measure what is wanted of it, and write the run."""
    run = task.run
    trained = train(
        run.workload,
        run.optimizer,
        run.seed,
        every=task.every,
        watched=sorted(run.watched),
        replacement=run.replacement,
        tick=tick,
    )
    measured = measure(run.workload, trained, run.measured, task.protocol, tick)
    reached = scores(run.workload, trained.model) | {"gradients_per_step": trained.gradients_per_step}
    store.write_run(task.directory, trained, reached, measured)


def _write_tables(findings: Mapping[Exhibit, Finding], tables: Tables | None, folder: Path) -> None:
    if tables is not None:
        tables.write(folder)
    for exhibit, finding in findings.items():
        if finding.table is not None:
            write_table(finding.table, folder / f"{exhibit.name}.csv")


def _draw(findings: Mapping[Exhibit, Finding], folder: Path) -> dict[Exhibit, Path]:
    return {
        exhibit: plots.save(finding.draw(), folder / exhibit.name, close=True)[0]
        for exhibit, finding in findings.items()
    }


def _compose(
    problem: Workload,
    protocol: Protocol,
    seeds: int,
    findings: Mapping[Exhibit, Finding],
    tables: Tables | None,
    pictures: Mapping[Exhibit, Path],
) -> report.Report:
    sections = [report.Section("What was run", _setup(problem, seeds), _summary_tables(tables, protocol, seeds))]
    for exhibit, finding in findings.items():
        label = f"{', '.join(exhibit.ids)}: " if exhibit.ids else ""
        items: list[report.Figure | report.Table] = [report.Figure(pictures[exhibit], exhibit.caption, exhibit.title)]
        if finding.shown is not None:
            items.append(report.Table(finding.shown, f"Mean over {seeds} seeds ± half width of the 68 % interval"))
        sections.append(report.Section(f"{label}{exhibit.title}", finding.note, items))
    claims = [claim for finding in findings.values() for claim in finding.claims]
    verdicts = f" {report.counted(claims)}." if claims else ""
    trained = f"{len(tables.runs)} networks were trained and measured." if tables is not None else ""
    return report.Report(
        title=f"{_listed(problem.perturbations)} on {problem.name}",
        summary=(
            f"{trained}{verdicts}\n\n"
            "Verdicts are computed from the tables: a claim holds where the 68 % interval over seeds of every quantity "
            "compared lies on the claim's side of its bound; it does not hold where some interval lies on the other "
            "side even at the level 1 − 0.32/m for m comparisons (Bonferroni), as of many quantities one is easily "
            "there by chance; otherwise it cannot be told. Differences and ratios are paired by seed; the intervals of "
            "ratios are in brackets; d is the effect size, the mean of the paired differences over their standard "
            f"deviation.\n\n{_solved(tables)}"
        ),
        sections=sections,
        claims=claims,
    )


def _setup(problem: Workload, seeds: int) -> str:
    recipe = ", ".join(
        f"{field.name.replace('_', ' ')} {getattr(problem.recipe, field.name)}"
        for field in fields(Recipe)
        if getattr(problem.recipe, field.name) != field.default
    )
    perturbations = "; ".join(
        f"{name}: {'none' if value is None else formula(value)}" for name, value in problem.perturbations.items()
    )
    return (
        f"{problem.description[0].upper()}{problem.description[1:]}.\n\n"
        f"Every optimizer is {'SGD with momentum' if problem.recipe.base == 'sgd' else 'AdamW'} ({recipe}; "
        f"{'cosine decay to 0' if problem.recipe.schedule == 'cosine' else 'constant learning rate'}) and differs from "
        f"the others only in the perturbation ε at which the gradient is taken: {perturbations}. The seed sets the "
        "initial weights and the order of the batches, and is shared by all optimizers.\n\n"
        "After training, BatchNorm statistics are re-estimated on the training set at the true weights; losses, slices "
        "and Hessians are of the training set (wrong labels included) with these running statistics. While training, "
        "curvatures and perturbation rises use each batch's own statistics, as the training step does. Control runs "
        "draw every sample of a batch independently.\n\n"
        f"Intervals are 68 % Student-t intervals over {seeds} seeds. Made with torch {torch.__version__}, Python "
        f"{platform.python_version()}, msam-analysis {version('msam-analysis')}."
    )


def _summary_tables(tables: Tables | None, protocol: Protocol, seeds: int) -> list[report.Table]:
    if tables is None:
        return []
    quantities = [*_SUMMARY, *(f"sharpness_{radius:g}" for radius in protocol.radii)]
    shown = tables.optimizers[["optimizer", *(c for q in quantities for c in (q, f"{q}_half_width"))]]
    return [report.Table(shown, f"Mean over {seeds} seeds ± half width")]


def _solved(tables: Tables | None) -> str:
    if tables is None:
        return ""
    solvers = tables.solvers
    return (
        f"Of {len(solvers)} runs of an iterative solver (eigenvalues, largest rise in a ball), "
        f"{int((~solvers).sum()) or 'none'} ended at the budget before it converged; the tables mark them."
    )


def _listed(names: Iterable[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


__all__ = ["EXHIBITS", "Protocol", "execute", "run_study"]
