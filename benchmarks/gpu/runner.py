"""Runs the items of a stage in processes of their own, each with its time."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from benchmarks.gpu.record import ROOT, Entry
from benchmarks.gpu.stage import Item, Size

# Less than that is not worth starting a process for.
LEAST_SECONDS = 10.0
# For a process that has begun, before its first item does: importing JAX, finding the device.
START_SECONDS = 90.0
# An item is asked to end by its deadline; it is stopped so much later.
GRACE_SECONDS = 10.0
# The last part of what a process that died had to say.
TAIL = 4000
Put = Callable[[str, Entry], None]


@dataclasses.dataclass
class Process:
    """A worker, what it tells, and what it writes to standard error."""

    process: subprocess.Popen
    events: queue.Queue[dict[str, Any] | None]
    log: IO[bytes]

    def last_words(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-TAIL:]


def run_items(stage: str, items: Sequence[Item], size: Size, deadline: float, put: Put) -> None:
    """Measures items until all are done or the time is over, and hands over every entry at once.

    An item that takes too long, or that takes its process down, has an entry that says so, and the
    next one begins in a new process.

    Args:
      stage: their stage.
      items: in order.
      size: of everything.
      deadline: by `time.time`.
      put: takes the name and the entry of an item.
    """
    left = list(items)
    while left and time.time() < deadline - LEAST_SECONDS:
        together = left[:1]
        if not left[0].alone:
            together += itertools.takewhile(functools.partial(may_join, left[0]), left[1:])
        with worker(stage, together, size, deadline) as process:
            ended = follow(process, together, deadline, put)
        left = left[ended:]


def may_join(first: Item, item: Item) -> bool:
    """Whether an item is measured by the process of another one."""
    return not item.alone and item.environment == first.environment


def follow(process: Process, items: Sequence[Item], deadline: float, put: Put) -> int:
    """Takes the entries of a worker's items until it ends or has to be stopped.

    Returns:
      How many items need not be begun again.
    """
    current: Item | None = None
    begun = time.time()
    for ended, item in enumerate(items):
        while True:
            seconds = START_SECONDS if current is None else item.seconds
            end = min(begun + seconds, deadline) + GRACE_SECONDS
            try:
                event = process.events.get(timeout=max(0.0, end - time.time()))
            except queue.Empty:
                taken = time.time() - begun
                put(item.name, {"timed_out": round(taken, 1), "log": process.last_words()})
                return ended + 1
            if event is None:
                code = process.process.wait()
                log = process.last_words() or f"The process ended with exit status {code}."
                put(item.name, {"error": log, "exit_status": code})
                return ended + 1
            if "ends" in event:
                put(item.name, event["entry"])
                begun = time.time()
                break
            current, begun = item, time.time()
            if begun > deadline - LEAST_SECONDS:
                return ended
    return len(items)


@contextlib.contextmanager
def worker(stage: str, items: Sequence[Item], size: Size, deadline: float) -> Iterator[Process]:
    """A process that measures items; it ends with the context, with all processes of its own."""
    reading, writing = os.pipe()
    request = {
        "stage": stage,
        "items": [item.name for item in items],
        "size": dataclasses.asdict(size),
        "deadline": deadline,
        "channel": writing,
    }
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(request)],
            cwd=ROOT,
            env=os.environ | items[0].environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=listen, args=(reading, events), daemon=True).start()
        try:
            yield Process(process, events, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def listen(reading: int, events: queue.Queue[dict[str, Any] | None]) -> None:
    """Passes on what a worker tells, and None when it tells no more."""
    # A process that is killed may leave half a line.
    with os.fdopen(reading) as lines, contextlib.suppress(ValueError):
        for line in lines:
            events.put(json.loads(line))
    events.put(None)
