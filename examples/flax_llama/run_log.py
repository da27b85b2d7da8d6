"""What a training run reports: records kept, written to a file, shown on a progress bar."""

import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.flax_llama.config import UsageError

Record = dict[str, float]
# Takes a record to a service that draws it.
Sink = Callable[[Record], None]

METRICS = "metrics.jsonl"
# Updates in a row that are left out before a run that skips them is stopped.
MOST_SKIPPED = 10

# Dense bfloat16 operations per second with float32 sums, by the start of the device's name. From
# NVIDIA's data sheets (without sparsity), for GeForce its architecture white papers; Google's
# documentation of Cloud TPU. The first match counts.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Operations per second that a device could do at most, None where that is not known."""
    # A name stands for all that begin with its words: "NVIDIA L4" not for "NVIDIA L40".
    known = (peak for name, peak in PEAK_FLOPS.items() if re.match(rf"{name}\b", device_kind))
    return next(known, None)


class RunLog:
    """Context manager that owns the records of one run, its metrics file and its progress bar.

    Args:
      out: the run's directory, or None to write nothing.
      start: number of updates done already; the records of later ones are dropped, since they
        will be made again.
      steps: number of updates in the end.
      flops_per_token: of the model.
      sinks: take each record too.
      quiet: show no progress bar.
    """

    def __init__(
        self,
        out: Path | None,
        *,
        start: int,
        steps: int,
        flops_per_token: int,
        sinks: Sequence[Sink],
        quiet: bool,
    ):
        self.train: list[Record] = []
        self.valid: list[Record] = []
        self._sinks, self._flops_per_token = sinks, flops_per_token
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        if out is None:
            self._file = None
        else:
            for record in restart(out / METRICS, start):
                (self.valid if "valid_loss" in record else self.train).append(record)
            # Line by line, so that the file can be followed and survives a crash.
            self._file = open(out / METRICS, "a", buffering=1)  # noqa: SIM115
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]}"),
            TimeRemainingColumn(),
            disable=quiet,
        )
        self._task = self._bar.add_task(
            "", total=steps, completed=start, loss=math.nan, speed="compiling"
        )

    def __enter__(self) -> "RunLog":
        self._bar.start()
        self.start_clock()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._file is not None:
            self._file.close()

    def update(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of an update that may still be running, and fetches the one before.

        Fetching one update late keeps the device busy: the next one is already queued.
        """
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the last update and records it.

        Raises:
          FloatingPointError: something in it is not finite, or ten in a row were skipped for that.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        record = {"step": step} | {k: v.item() for k, v in jax.device_get(metrics).items()}
        now = time.perf_counter()
        record["tokens_per_second"] = record["tokens"] / (now - self._clock)
        flops = record["tokens_per_second"] * self._flops_per_token
        record |= {"mfu": flops / self._peak} if self._peak else {"flops_per_second": flops}
        self._clock = now
        self.train.append(record)
        self._write(record)
        speed = f"{flops / self._peak:.0%} MFU" if self._peak else f"{flops / 1e12:.2g} TFLOP/s"
        self._bar.update(
            self._task,
            completed=step,
            loss=record["loss"],
            speed=f"{record['tokens_per_second']:,.0f} tokens/s  {speed}",
        )
        self._check_finite(record)

    def evaluation(self, record: Record) -> None:
        """Records an evaluation."""
        self.valid.append(record)
        self._write(record)

    def start_clock(self) -> None:
        """Counts the time of the next update from here, after something that was no training."""
        self._clock = time.perf_counter()

    def _check_finite(self, record: Record) -> None:
        in_a_row = record.get("skipped_in_a_row", 0)
        checked = ("loss", "grad_norm", "update_norm")
        bad = [name for name in checked if not math.isfinite(record[name])]
        if bad and (in_a_row == 0 or in_a_row >= MOST_SKIPPED):
            again = f", the {in_a_row}th in a row" if in_a_row else ""
            raise FloatingPointError(
                f"{bad[0]} is {record[bad[0]]} at update {record['step']}{again}, where lr is "
                f"{record['lr']:.2g}: try a smaller lr or a longer warmup."
            )

    def _write(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(dump(record) + "\n")
        for sink in self._sinks:
            sink(record)


def dump(record: Record) -> str:
    """One line of JSON, which has null in place of numbers that are not finite."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()})


def read_records(path: Path) -> list[Record]:
    """The records of a metrics file, which may be of a run that goes on or that was killed.

    Raises:
      UsageError: a line is not a record.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):  # being written, or never to be
            break
        try:
            record = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            record["step"] = int(record["step"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UsageError(f"{path}:{number} is not a record of a run: {line[:60]!r}") from error
        records.append(record)
    return records


def restart(path: Path, start: int) -> list[Record]:
    """Drops from a metrics file what is beyond `start` updates, and returns what is left."""
    if not path.exists():
        return []
    records = [record for record in read_records(path) if record["step"] <= start]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(dump(record) + "\n" for record in records))
    partial.replace(path)
    return records


@contextlib.contextmanager
def tensorboard(out: Path, start: int) -> Iterator[Sink]:
    """Writes TensorBoard's event files to `out`; what an earlier process wrote ends at `start`."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(out / "tensorboard"), purge_step=start + 1) as writer:

        def write(record: Record) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, int(record["step"]))

        yield write


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
        yield lambda record: run.log(record, step=int(record["step"]))
