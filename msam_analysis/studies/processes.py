"""The jobs of a study, made in processes: worker processes of this machine, or of a Dask cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import joblib
import torch
from joblib.externals.loky import get_reusable_executor
from tqdm.auto import tqdm

from msam_analysis.studies.jobs import Job
from msam_analysis.studies.training import Tick

if TYPE_CHECKING:
    from typing_extensions import Never

# A run draws from torch's global generator: of the threads of a Dask worker, one makes runs at a time.
_one_at_a_time = threading.Lock()
# Where a worker process reports to, set once when it starts.
_ticks: list[Connection] = []


def make(jobs: Sequence[Job], processes: int, *, cluster: str | None = None, done: int = 0, bar: bool = True) -> None:
    """Make jobs, the dearest first, so that no processor idles at the end; show how far they are.

    ``jobs``: What is to be made.
    ``processes``: Worker processes; with one, the jobs are made in this process.
    ``cluster``: Address of a Dask scheduler, whose workers make the jobs instead; they must see the same folder.
    ``done``: How many other jobs of the study are finished, for the progress bar.
    ``bar``: Whether to show it.
    Raises ChildProcessError: A worker process was killed.
    Raises FileNotFoundError: The workers of the cluster write to another disk.
    Raises ModuleNotFoundError: Dask is not installed.
    """
    if not jobs:
        return
    jobs = sorted(jobs, key=lambda job: -job.cost)
    with _progress(jobs, done, bar) as shown:

        def tick(amount: float) -> None:
            shown.update(amount)

        if cluster is not None:
            ended = _on_cluster(jobs, cluster, tick)
        elif min(processes, len(jobs)) == 1:
            ended = (execute(job, tick) for job in jobs)
        else:
            ended = _in_workers(jobs, min(processes, len(jobs)), tick)
        for number, _ in enumerate(ended, done + 1):
            # The bar says when it is time to draw it.
            shown.set_description_str(f"{number}/{done + len(jobs)} runs", refresh=False)
    for job in jobs if cluster is not None else ():
        if not job.finished:
            raise FileNotFoundError(
                f"the cluster's workers made {job.directory.name}, which is not in {job.directory.parent} here: "
                "expected an output folder that this process and all workers see under the same path"
            )


def _progress(jobs: Sequence[Job], done: int, shown: bool) -> tqdm[Never]:
    return tqdm(
        total=sum(job.cost for job in jobs),
        desc=f"{done}/{done + len(jobs)} runs",
        disable=not shown,
        bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed} passed, {remaining} left",
        # Into a log, every redraw is a line.
        mininterval=0.2 if sys.stderr.isatty() else 20,
        # The mean rate over the whole study: a recent rate would jump between cheap and dear phases.
        smoothing=0,
    )


def execute(job: Job, tick: Tick | None = None) -> float:
    """Make a job with one thread, so that the number of processes does not change a bit; return its cost."""
    with _one_at_a_time:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            job.make(tick or _report)
        finally:
            torch.set_num_threads(threads)
    return job.cost


def _report(amount: float) -> None:
    for ticks in _ticks:
        ticks.send(amount)


def _in_workers(jobs: Sequence[Job], processes: int, tick: Tick) -> Iterator[Any]:
    """Yield for every job that is made in a worker process of this machine."""
    # No locks: so short a message is written at once or not at all, and a worker that is killed would keep its lock.
    told, ticks = multiprocessing.Pipe(duplex=False)
    alive, ours = multiprocessing.Pipe(duplex=False)
    listener = threading.Thread(target=_listen, args=(told, tick), daemon=True)
    listener.start()
    try:
        with joblib.parallel_config("loky", inner_max_num_threads=1, initializer=_prepare, initargs=(ticks, alive)):
            yield from _parallel(jobs, processes)
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process was killed (out of memory?): finished runs are kept, and the same command goes on from "
            "them; fewer processes (--jobs 1) need less memory"
        ) from None
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)
        ticks.close()
        listener.join()
        for end in (told, alive, ours):
            end.close()


def _listen(told: Connection, tick: Tick) -> None:
    """Pass on what the workers tell, until the last of them is gone."""
    with suppress(EOFError):
        while True:
            tick(told.recv())


def _parallel(jobs: Sequence[Job], processes: int) -> Iterator[Any]:
    # Two jobs a process are handed out ahead (the default): loky's own thread dies at an interrupt that finds more.
    parallel = joblib.Parallel(processes, batch_size=1, return_as="generator_unordered")
    made: Iterator[Any] = parallel(joblib.delayed(execute)(job) for job in jobs)
    return made


def _prepare(ticks: Connection, alive: Connection) -> None:
    """Prepare a worker process: the interrupt key is left to the main process, and there is no life without that."""
    _ticks.append(ticks)
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_parent(alive: Connection) -> None:
    # The other end is the main process's alone: nothing ever comes, and it closes when that process ends.
    alive.poll(None)
    os._exit(1)


def _on_cluster(jobs: Sequence[Job], address: str, tick: Tick) -> Iterator[Any]:
    """Yield for every job that is made on a Dask cluster."""
    try:
        from dask.distributed import Client
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a cluster needs Dask: install it with pip install 'msam-analysis[cluster]', or leave --cluster out"
        ) from None
    connect: Any = Client
    with connect(address) as client, joblib.parallel_config("dask", client=client):
        for cost in _parallel(jobs, -1):
            tick(cost)
            yield cost


@contextmanager
def terminable() -> Iterator[None]:
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


def processors() -> int:
    """Return how many processors this process may use: a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
