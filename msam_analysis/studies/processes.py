"""The jobs of a study, made here, in worker processes of this machine, on a Dask cluster, or shared under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import joblib
import torch
import torch.distributed as dist
from joblib.externals.loky import get_reusable_executor

from msam_analysis.objective.progress import Bar
from msam_analysis.studies.jobs import Job
from msam_analysis.studies.training import Tick

T = TypeVar("T")

# The others' runs may take days; a process that ends is noticed at once.
_PATIENCE = timedelta(days=365)
# A run draws from torch's global generator: of the threads of a Dask worker, one makes runs at a time.
_one_at_a_time = threading.Lock()
# Where a worker process reports to, set once when it starts.
_ticks: list[Connection] = []


def make(
    jobs: Collection[Job], processes: int, members: Members, *, cluster: str | None = None, bar: bool = True
) -> None:
    """Make this process's share of the jobs that are not finished, show how far it is, and wait for the others' shares.

    ``processes``: Worker processes; with one, the jobs are made in this process.
    ``cluster``: Address of a Dask scheduler, whose workers make the jobs instead; they must see the same folder.
    """
    # The first one's view: others may see half of what it has just cleared away.
    missing = set(members.exchange([job.directory.name for job in jobs if not job.finished])[0])
    share = members.share([job for job in jobs if job.directory.name in missing])
    try:
        _make_all(share, processes, cluster, len(jobs) - len(share) if members.count == 1 else 0, bar)
    except Exception as error:
        if members.count == 1:
            raise
        raise RuntimeError(
            f"a run failed ({type(error).__name__}: {error}): finished runs are kept, and the same command goes on "
            "from them"
        ) from error
    members.exchange("the end")


def _make_all(jobs: Sequence[Job], processes: int, cluster: str | None, done: int, bar: bool) -> None:
    """Make jobs in their order; the bar counts on from those that are ``done``."""
    if not jobs:
        return
    total = done + len(jobs)
    form = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed} passed, {remaining} left{postfix}"
    with Bar(sum(job.cost for job in jobs), f"{done}/{total} runs", form=form, shown=bar) as shown:
        tick = shown.advance
        if cluster is not None:
            ended = _on_cluster(jobs, cluster, tick)
        elif min(processes, len(jobs)) == 1:
            ended = (execute(job, tick) for job in jobs)
        else:
            ended = _in_workers(jobs, min(processes, len(jobs)), tick)
        for number, _ in enumerate(ended, done + 1):
            shown.say(f"{number}/{total} runs")
    for job in jobs if cluster is not None else ():
        if not job.finished:
            raise FileNotFoundError(
                f"the cluster's workers made {job.directory.name}, which is not in {job.directory.parent} here: "
                "expected an output folder that this process and all workers see under the same path"
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

    def listen() -> None:
        with suppress(EOFError):  # the last worker is gone
            while True:
                tick(told.recv())

    listener = threading.Thread(target=listen, daemon=True)
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


def _parallel(jobs: Sequence[Job], processes: int) -> Iterator[Any]:
    # Two jobs a process are handed out ahead (the default): loky's own thread dies at an interrupt that finds more.
    parallel = joblib.Parallel(processes, batch_size=1, return_as="generator_unordered")
    made: Iterator[Any] = parallel(joblib.delayed(execute)(job) for job in jobs)
    return made


def _prepare(ticks: Connection, alive: Connection) -> None:
    """Prepare a worker process: the interrupt key is left to the main process, and there is no life without that."""
    _ticks.append(ticks)

    def end_with_parent() -> None:
        # The other end is the main process's alone: nothing ever comes, and it closes when that process ends.
        alive.poll(None)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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


class Members:
    """The processes that torchrun started for a study, or this one alone: each makes its share, the first all the rest.

    ``rank``, ``count``: Which this one is, and how many there are.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.count > 1 else None

    def share(self, jobs: Sequence[Job]) -> list[Job]:
        """Return this process's jobs, the dearest first, so that no processor idles at the end.

        Each goes, the dearest first, to who has least to do.
        """
        loads = [0.0] * self.count
        mine = []
        for job in sorted(jobs, key=lambda job: (-job.cost, job.directory.name)):
            who = loads.index(min(loads))
            loads[who] += job.cost
            mine += [job] if who == self.rank else []
        return mine

    def check_alike(self, plan: object) -> None:
        """Raise ``ValueError`` where another process is about to make other runs."""
        first, *others = self.exchange(plan)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(
                    f"process {rank} plans other runs than process 0: expected the same command, data and versions in "
                    "every process"
                )

    def exchange(self, value: T) -> list[T]:
        """Wait for the others and return everyone's value; RuntimeError: one of them has ended."""
        values: list[Any] = [value] * self.count
        try:
            if self.count > 1:
                dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                "another process of this study has ended, see what it says: finished runs are kept, and the same "
                "command goes on from them"
            ) from error
        return values
