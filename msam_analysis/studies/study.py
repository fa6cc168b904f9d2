"""Train, measure, draw, judge: the main job."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from msam_analysis import plots, report
from msam_analysis.studies import store
from msam_analysis.studies.cifar import Checksum
from msam_analysis.studies.computing import PLAIN, Computing, repeatable
from msam_analysis.studies.exhibits import EXHIBITS, Exhibit, Finding, choose, find, main_tables, networks
from msam_analysis.studies.measuring import Protocol, measure, scores
from msam_analysis.studies.pages import Setting, compose
from msam_analysis.studies.ranks import Ranks
from msam_analysis.studies.runs import Run, Task, gather, place
from msam_analysis.studies.tables import FinishedRun, Tables, write_table
from msam_analysis.studies.training import Tick, train
from msam_analysis.studies.workloads import Workload, workload

if TYPE_CHECKING:
    from typing_extensions import Never

_RECORDS = 20


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
    every: int | None = None,
    computing: Computing | None = None,
    data: Path | str | None = None,
    checksum: Checksum = "published",
    limit: int | None = None,
    epochs: int | None = None,
    progress: bool = True,
) -> Path:
    """Train every optimizer of a workload with several seeds, measure every network, and write tables and a report.

    Runs are made in separate processes with one thread each, so that their number does not change a bit of the result.
    A finished run is never made again: an interrupted study, called again, goes on from the runs it has, and from the
    states of others that ``computing`` lets it keep.

    In a process group of :mod:`torch.distributed` each process makes its share of the runs; the first one also reads
    them and writes everything else.

    Parameters
    ----------
    name
        A workload's name.
    seeds
        Seeds 0, 1, ..., ``seeds − 1`` for every optimizer. Default 3; one seed gives no interval and so no verdict.
    out
        Output folder, default ``results/<name>``: ``tables/*.csv``, ``figures/*.png``, ``networks/*.pt``, ``runs``,
        ``report.md``, ``report.html``.
    figures
        A second folder for the pictures, each with its table beside it, and for ``report.md``.
    exhibits
        Ids of the exhibits to make, draw and judge; ``["all"]`` for all of them. Default the main ones, which share one
        set of networks.
    jobs
        Processes, default the number of processors; on a GPU one. In a process group, of each member, default one.
    protocol
        What is measured, and how finely.
    every
        Steps between records of the slower probes; default a twentieth of a run, two epochs of the digits.
    computing
        Device, precision, and how often the state of a run is saved; default the CPU and float32.
    data, checksum, limit, epochs
        Of the workload: see :func:`~msam_analysis.studies.workloads.workload`.
    progress
        Show a progress bar with the time left.

    Returns
    -------
    pathlib.Path
        ``report.html``.

    Raises
    ------
    ValueError
        An unknown workload or exhibit, or fewer than one seed or process; what the workload finds wrong with its data;
        in a process group, members that plan different runs.
    BlockingIOError
        Another study is running in the output folder.
    ChildProcessError
        A process was killed; finished runs stay.
    RuntimeError
        In a process group: a run failed here, or another member has ended; finished runs stay.
    KeyboardInterrupt
        Passed on, also for a request to terminate, after the processes have stopped; finished runs stay.
    """
    problem = workload(name, data=data, checksum=checksum, limit=limit, epochs=epochs)
    chosen = choose(exhibits)
    computing = computing or PLAIN
    if computing.save_every is None:
        computing = replace(computing, save_every=problem.save_every)
    ranks = Ranks()
    jobs = jobs if jobs is not None else 1 if computing.device != "cpu" or ranks.count > 1 else _processors()
    if seeds < 1 or jobs < 1:
        raise ValueError(f"seeds and jobs must be at least 1, got seeds={seeds} and jobs={jobs}")
    every = every if every is not None else max(1, problem.recipe.steps(problem.training_samples) // _RECORDS)
    if every < 1:
        raise ValueError(f"every must be a positive integer, got {every}")
    protocol = protocol or Protocol()
    if protocol.samples is None:
        protocol = replace(protocol, samples=problem.samples)
    if protocol.samples is not None and protocol.samples < 1:
        raise ValueError(f"samples must be a positive number to measure on, got {protocol.samples}: leave it out")
    root = Path(out) if out is not None else Path("results") / name
    plan = _plan(chosen, problem, seeds)
    tasks = {identity: place(run, root / "runs", protocol, every, computing) for identity, run in plan.items()}
    ranks.check_alike([task.directory.name for task in tasks.values()])
    if ranks.rank > 0:
        with _terminable():
            _make_share(list(tasks.values()), ranks, jobs, progress=False)
        ranks.meet()
        return root / "report.html"
    (root / "runs").mkdir(parents=True, exist_ok=True)
    with store.alone(root / "runs"), _terminable():
        store.sweep(root / "runs")
        _make_share(list(tasks.values()), ranks, jobs, progress)
        finished = {identity: _read(task) for identity, task in tasks.items()}
        findings = {exhibit: find(exhibit, problem, seeds, finished) for exhibit in chosen}
        tables = main_tables(problem, seeds, finished) if any(exhibit.main for exhibit in chosen) else None
        _write_tables(findings, tables, root / "tables")
        if tables is not None:
            main = networks(problem, seeds)
            named = {f"{run.optimizer}-seed{run.seed}": tasks[run.identity].directory for run in main}
            store.name_networks(named, root / "networks")
        pictures = _draw(findings, root / "figures")
        setting = Setting(problem, protocol, computing, seeds, len(finished), _diverged(finished.values()))
        page = report.write(compose(setting, findings, tables, pictures), root)[0]
        if figures is not None:
            copies = _copy(findings, pictures, Path(figures))
            report.write_markdown(compose(setting, findings, tables, copies), figures)
    ranks.meet()
    return page


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

    So a network is the same file whichever exhibits are chosen, and is never trained again for another one. Where a
    workload is frugal, each has what the chosen exhibits want of it.
    """
    needed = gather(run for exhibit in chosen for run in exhibit.runs(problem, seeds))
    if problem.frugal:
        return needed
    everything = gather(run for exhibit in EXHIBITS for run in exhibit.runs(problem, seeds))
    return {identity: everything[identity] for identity in needed}


def _read(task: Task) -> FinishedRun:
    return store.read_run(task.directory, task.run.optimizer, task.run.seed, task.run.settings)


def _make_share(tasks: Sequence[Task], ranks: Ranks, jobs: int, progress: bool) -> None:
    """Make this process's share of what is missing, and wait for the others' shares."""
    # The first one's view: others may see half of what it has just cleared away.
    missing = set(ranks.from_first([task.directory.name for task in tasks if not store.is_finished(task.directory)]))
    share = ranks.share([task for task in tasks if task.directory.name in missing])
    try:
        _make(share, jobs, progress, len(tasks) if ranks.count == 1 else len(share))
    except Exception as error:
        if ranks.count == 1:
            raise
        raise RuntimeError(
            f"a run failed ({type(error).__name__}: {error}): finished runs are kept, and the same command goes on "
            "from them"
        ) from error
    ranks.meet()


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
        # The bar says when it is time to draw it.
        bar.set_description_str(f"{total - len(pending)}/{total} runs", refresh=False)


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
    with repeatable():
        trained = train(
            run.workload,
            run.optimizer,
            run.seed,
            every=task.every,
            watched=sorted(run.watched),
            replacement=run.replacement,
            tick=lambda steps: tick(steps * task.cost_of_a_step),
            samples=task.protocol.samples,
            computing=task.computing,
            state=None if task.computing.save_every is None else store.state_file(task.directory),
        )
        reached = scores(run.workload, trained.model) | {"gradients_per_step": trained.gradients_per_step}
        # There is nothing to measure of a network whose loss is not finite.
        wanted = run.measured if math.isfinite(reached["train_loss"]) else ()
        measured = measure(run.workload, trained, wanted, task.protocol, tick)
    if task.computing.amp == "float16":
        reached["skipped_steps"] = trained.skipped
    store.write_run(task.directory, trained, reached, measured)
    store.forget_state(task.directory)


def _diverged(finished: Iterable[FinishedRun]) -> str:
    """Name the networks whose loss is not finite; empty where there are none."""
    found = [run for run in finished if not math.isfinite(run.scores["train_loss"])]
    kinds: dict[str, list[int]] = {}
    for run in found:
        strength = f"{'−' * (run.settings['sign'] < 0)}{run.settings['rho']}"
        kinds.setdefault(f"{run.settings['workload']} {run.optimizer} at ρ = {strength}", []).append(run.seed)
    return "; ".join(f"{kind}, seed {', '.join(map(str, sorted(kinds[kind])))}" for kind in sorted(kinds))


def _write_tables(findings: Mapping[Exhibit, Finding], tables: Tables | None, folder: Path) -> None:
    if tables is not None:
        tables.write(folder)
    for exhibit, finding in findings.items():
        if finding.table is not None:
            write_table(finding.table, folder / f"{exhibit.name}.csv")


def _copy(findings: Mapping[Exhibit, Finding], pictures: Mapping[Exhibit, Path], folder: Path) -> dict[Exhibit, Path]:
    """Copy every picture to a folder, with its table beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {exhibit: folder / picture.name for exhibit, picture in pictures.items()}
    for exhibit, copy in copies.items():
        shutil.copyfile(pictures[exhibit], copy)
        table = findings[exhibit].table
        if table is not None:
            write_table(table, copy.with_suffix(".csv"))
    return copies


def _draw(findings: Mapping[Exhibit, Finding], folder: Path) -> dict[Exhibit, Path]:
    return {
        exhibit: plots.save(finding.draw(), folder / exhibit.name, close=True)[0]
        for exhibit, finding in findings.items()
        if finding.draw is not None
    }


__all__ = ["EXHIBITS", "Protocol", "execute", "run_study"]
