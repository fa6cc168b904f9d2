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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from msam_analysis import plots, report
from msam_analysis.studies import store
from msam_analysis.studies.exhibits import EXHIBITS, Exhibit, choose
from msam_analysis.studies.measuring import Protocol, cost, measure, scores
from msam_analysis.studies.tables import FinishedRun, Tables, tabulate
from msam_analysis.studies.training import Tick, train
from msam_analysis.studies.workloads import Workload, formula, workload

if TYPE_CHECKING:
    from typing_extensions import Never

_SUMMARY = ("train_accuracy", "test_accuracy", "train_loss", "test_loss", "lambda_1", "gradients_per_step")


@dataclass(frozen=True)
class Task:
    """One run to be made: a network that is trained and measured, or a control that is trained alone."""

    workload: Workload
    optimizer: str
    seed: int
    directory: Path
    protocol: Protocol
    every: int
    control: bool = False

    @property
    def cost(self) -> float:
        """Rough cost in training steps, for the progress bar alone."""
        steps = float(self.workload.recipe.steps(sum(len(labels) for _, labels in self.workload.train())))
        return steps if self.control else steps + cost(self.protocol)


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
        Ids of the exhibits to draw and judge; default all.
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
    tasks = _plan(problem, seeds, root / "runs", protocol, every)
    (root / "runs").mkdir(parents=True, exist_ok=True)
    with store.alone(root / "runs"), _terminable():
        store.sweep(root / "runs")
        _make([task for task in tasks if not store.is_finished(task.directory)], jobs, progress, len(tasks))
        runs, controls = (
            [store.read_run(t.directory, t.optimizer, t.seed) for t in tasks if t.control is control]
            for control in (False, True)
        )
        tables = tabulate(runs, controls)
        tables.write(root / "tables")
        pictures = _draw(chosen, tables, runs, root / "figures")
        if figures is not None:
            Path(figures).mkdir(parents=True, exist_ok=True)
            for picture in pictures.values():
                shutil.copyfile(picture, Path(figures) / picture.name)
        page = _compose(problem, protocol, seeds, chosen, tables, pictures)
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


def _plan(problem: Workload, seeds: int, folder: Path, protocol: Protocol, every: int) -> list[Task]:
    def task(optimizer: str, seed: int, control: bool) -> Task:
        fingerprint = problem.fingerprint(optimizer, protocol, every, control, torch.__version__)
        name = f"control-{optimizer}" if control else optimizer
        directory = store.run_directory(folder, name, seed, fingerprint)
        return Task(problem, optimizer, seed, directory, protocol, every, control)

    measured = [task(optimizer, seed, False) for optimizer in problem.perturbations for seed in range(seeds)]
    return measured + [task(optimizer, seed, True) for optimizer in problem.controls for seed in range(seeds)]


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
    """Train one network, measure it unless it is a control, and write the run."""
    problem = task.workload
    every = None if task.control else task.every
    trained = train(problem, task.optimizer, task.seed, every=every, replacement=task.control, tick=tick)
    measured = {} if task.control else measure(problem, trained, task.protocol, tick)
    reached = scores(problem, trained.model) | {"gradients_per_step": trained.gradients_per_step}
    store.write_run(task.directory, trained, reached, measured)


def _draw(chosen: Sequence[Exhibit], tables: Tables, runs: Sequence[FinishedRun], folder: Path) -> dict[str, Path]:
    return {
        exhibit.name: plots.save(exhibit.draw(tables, runs), folder / exhibit.name, close=True)[0] for exhibit in chosen
    }


def _compose(
    problem: Workload,
    protocol: Protocol,
    seeds: int,
    chosen: Sequence[Exhibit],
    tables: Tables,
    pictures: dict[str, Path],
) -> report.Report:
    recipe = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in asdict(problem.recipe).items())
    perturbations = "; ".join(
        f"{name}: {'none' if value is None else formula(value)}" for name, value in problem.perturbations.items()
    )
    setup = (
        f"{problem.description[0].upper()}{problem.description[1:]}.\n\n"
        f"Every optimizer is SGD with momentum ({recipe}, cosine decay to 0) and differs from the others only in the "
        f"perturbation ε at which the gradient is taken: {perturbations}. The seed sets the initial weights and the "
        "order of the batches, and is shared by all optimizers.\n\n"
        "After training, BatchNorm statistics are re-estimated on the training set at the true weights; losses, slices "
        "and Hessians are of the training set (wrong labels included) with these running statistics. While training, "
        "curvatures and perturbation rises use each batch's own statistics, as the training step does. Control runs "
        "draw every sample of a batch independently.\n\n"
        f"Intervals are 68 % Student-t intervals over {seeds} seeds. Made with torch {torch.__version__}, Python "
        f"{platform.python_version()}, msam-analysis {version('msam-analysis')}."
    )
    quantities = [*_SUMMARY, *(f"sharpness_{radius:g}" for radius in protocol.radii)]
    shown = tables.optimizers[["optimizer", *(c for q in quantities for c in (q, f"{q}_half_width"))]]
    sections = [report.Section("What was run", setup, [report.Table(shown, f"Mean over {seeds} seeds ± half width")])]
    for exhibit in chosen:
        label = f"{', '.join(exhibit.ids)}: " if exhibit.ids else ""
        picture = report.Figure(pictures[exhibit.name], exhibit.caption, exhibit.title)
        sections.append(report.Section(f"{label}{exhibit.title}", "", [picture]))
    claims = [claim.judge(tables) for exhibit in chosen for claim in exhibit.claims]
    verdicts = f" {report.counted(claims)}." if claims else ""
    solvers = tables.solvers
    return report.Report(
        title=f"SGD, NAG, SAM and MSAM on {problem.name}",
        summary=(
            f"{len(tables.runs)} networks were trained and measured.{verdicts}\n\n"
            "Verdicts are computed from the tables: a claim holds where the 68 % interval over seeds of every quantity "
            "compared lies on the claim's side of its bound; it does not hold where some interval lies on the other "
            "side even at the level 1 − 0.32/m for m comparisons (Bonferroni), as of many quantities one is easily "
            "there by chance; otherwise it cannot be told. Differences and ratios are paired by seed; the intervals of "
            "ratios are in brackets.\n\n"
            f"Of {len(solvers)} runs of an iterative solver (eigenvalues, largest rise in a ball), "
            f"{int((~solvers).sum()) or 'none'} ended at the budget before it converged; the tables mark them."
        ),
        sections=sections,
        claims=claims,
    )


__all__ = ["EXHIBITS", "Protocol", "execute", "run_study"]
