"""Services that draw what a run reports: TensorBoard and Weights & Biases."""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
from tensorboardX.record_writer import RecordWriter

from examples.flax_llama.config import UsageError
from examples.flax_llama.records import Record, tagged
from examples.flax_llama.writing import naming

# Takes a record.
Sink = Callable[[Record], None]

# From one time that TensorBoard's file is brought up to date to the next.
FLUSH_SECONDS = 30


@contextlib.contextmanager
def tensorboard(out: Path, start: int) -> Iterator[Sink]:
    """Writes TensorBoard's event files to `out`; what an earlier process wrote ends at `start`.

    It writes in the thread of the run, whose error a full disk then is; tensorboardX's own writer
    has threads that print theirs.
    """
    directory = out / "tensorboard"
    directory.mkdir(exist_ok=True)
    # Read in the order of their names.
    name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    path = directory / name
    with naming(path):
        records = RecordWriter(str(path))
    flushed = time.monotonic()

    def append(**event: Any) -> None:
        with naming(path):
            records.write(Event(wall_time=time.time(), **event).SerializeToString())

    def write(record: Record) -> None:
        nonlocal flushed
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in tagged(record).items()]
        append(step=int(record["step"]), summary=Summary(value=values))
        if time.monotonic() - flushed > FLUSH_SECONDS:
            with naming(path):
                records.flush()
            flushed = time.monotonic()

    try:
        append(file_version="brain.Event:2")
        append(step=start + 1, session_log=SessionLog(status=SessionLog.START))
        yield write
    except BaseException:
        with contextlib.suppress(OSError):
            records.close()
        raise
    with naming(path):
        records.close()


@contextlib.contextmanager
def wandb(project: str, out: Path, settings: dict[str, Any]) -> Iterator[Sink]:
    """Sends records to Weights & Biases, to the same run when resumed.

    Raises:
      UsageError: wandb is not installed.
    """
    try:
        import wandb as service  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UsageError(
            f"wandb={project!r} needs a package that is not installed: pip install "
            "'galore-optax[wandb]'."
        ) from error
    with service.init(
        project=project,
        name=out.name,
        dir=out,
        config=settings,
        id=uuid.uuid5(uuid.NAMESPACE_URL, out.absolute().as_uri()).hex,
        resume="allow",
    ) as run:
        yield lambda record: run.log(tagged(record), step=int(record["step"]))
