"""Runs jobs on several processes with a core each, and knows how much there is left to do."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import queue
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from benchmarks.quality.record import Record, loss_of
from benchmarks.quality.stages import STAGES, Bench, best
from benchmarks.quality.training import Result, Run, measure
from examples.flax_llama.config import Config

Execute = Callable[[Run], Result]
# One thread in each process: models this small do not use two well.
ONE_THREAD = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OPENBLAS_NUM_THREADS": "1",
}


class TimeIsUp(Exception):
    """Raised in place of a run that would begin too late."""


@contextlib.contextmanager
def executors(config: Config, count: int, cache: Path) -> Iterator[list[Execute]]:
    """Functions that make a run, to be called by one thread each.

    With one it is this process that trains, with all its threads; else each has its own, on cores
    of its own, with one thread for what a CPU computes, or a part of the GPU's memory. What is
    compiled is kept in `cache`.
    """
    if count == 1:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        yield [functools.partial(measure, config)]
        return
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(
                    1,
                    multiprocessing.get_context("spawn"),
                    begin,
                    (cores[i::count] or cores, count, str(cache)),
                )
            )
            for i in range(count)
        ]
        yield [functools.partial(submit, pool, config) for pool in pools]


def begin(cores: Sequence[int], count: int, cache: str) -> None:
    """Begins a process: before JAX looks for processors it has these, and one thread."""
    os.environ |= ONE_THREAD
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / count:.2f}")
    if cores:
        os.sched_setaffinity(0, cores)
    jax.config.update("jax_compilation_cache_dir", cache)


def submit(pool: concurrent.futures.Executor, config: Config, run: Run) -> Result:
    return pool.submit(measure, config, run).result()


class Work:
    """Makes the runs of stages that a record has not yet.

    Args:
      bench: what is compared.
      record: takes the runs.
      stages: their names.
      seconds: that a run of the width itself takes, before any has been made.
      minutes: after which no run begins; None for no limit.
    """

    def __init__(
        self,
        bench: Bench,
        record: Record,
        stages: Sequence[str],
        seconds: float,
        minutes: float | None = None,
    ):
        self._bench, self._record, self._stages, self._seconds = bench, record, stages, seconds
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._locks: defaultdict[Run, threading.Lock] = defaultdict(threading.Lock)
        self._workers = 1

    def do(self, execute: Sequence[Execute]) -> bool:
        """Does what is left, one stage after the other; returns whether it came to an end."""
        self._workers = len(execute)
        for stage in self._stages:
            jobs: queue.SimpleQueue = queue.SimpleQueue()
            for job in STAGES[stage](self._bench, self._record.results):
                jobs.put(job)

            def work(execute: Execute, jobs: queue.SimpleQueue = jobs) -> None:
                loss = functools.partial(self._loss, execute)
                with contextlib.suppress(queue.Empty):
                    while True:
                        jobs.get_nowait()(loss)

            with concurrent.futures.ThreadPoolExecutor(len(execute)) as pool:
                try:
                    list(pool.map(work, execute))
                except TimeIsUp:
                    return False
        return True

    def _loss(self, execute: Execute, run: Run) -> float:
        # Two jobs may ask for the same run.
        with self._locks[run]:
            if run not in self._record.results:
                if self._deadline is not None and time.monotonic() > self._deadline:
                    raise TimeIsUp
                self._record.put(run, execute(run))
                result = self._record.results[run]
                print(
                    f"{loss_of(result):.4f}  {run}  ({result['seconds']:.0f} s, about "
                    f"{self.left() / 60:.0f} min left)",
                    flush=True,
                )
        return loss_of(self._record.results[run])

    def left(self) -> float:
        """Seconds that what is left will take."""
        return sum(seconds for _, seconds in self.plan().values()) / self._workers

    def plan(self) -> dict[str, tuple[int, float]]:
        """By stage, how many runs are left and how many seconds of one worker they will take.

        The jobs are gone through with losses that are made up where there are none: they are
        lowest where a sweep begins, and higher than those that were measured.
        """
        results = dict(self._record.results)
        measured = dict(results)
        found = {}
        for stage in self._stages:
            wanted: list[Run] = []

            def loss(run: Run, wanted: list[Run] = wanted) -> float:
                if run not in results:
                    known = best(measured, run.contender, self._bench.hidden, run.rank)
                    like = run.contender, self._bench.hidden, run.rank
                    centre = known or self._bench.beginning({}, *like)
                    away = abs(run.lr / centre.lr - 1) + abs(run.ratio / centre.ratio - 1)
                    results[run] = {"valid_loss": 1000 + away}
                    wanted.append(run)
                return loss_of(results[run])

            for job in STAGES[stage](self._bench, results):
                job(loss)
            found[stage] = len(wanted), sum(self._expected(measured, Counter(wanted)))
        return found

    def _expected(self, measured: dict[Run, Result], wanted: Counter[Run]) -> Iterator[float]:
        for run in wanted:
            same_width = [r for r in measured if r.hidden == run.hidden]
            alike = [r for r in same_width if r.contender == run.contender] or same_width
            if alike:
                yield statistics.mean(measured[r]["seconds"] for r in alike)
            else:
                # Products take four times as long at twice the width, and all else two.
                yield self._seconds * (run.hidden / self._bench.hidden) ** 1.5
