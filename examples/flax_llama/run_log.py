"""What a training run reports: records kept, written to a file, shown, and sent to services."""

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from examples.flax_llama.progress import Progress, Speed
from examples.flax_llama.records import METRICS, Record, dump, restart
from examples.flax_llama.sinks import Sink
from examples.flax_llama.writing import naming

# Updates in a row that are left out before a run that skips them is stopped.
MOST_SKIPPED = 10
# Over which speeds are averaged: updates of milliseconds are fetched in fits and starts.
SECONDS = 1.0

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
    """Context manager that owns the records of one run, its metrics file and what is shown of it.

    Args:
      out: the run's directory, or None to write nothing.
      start: number of updates done already; the records of later ones are dropped, since they
        will be made again.
      steps: number of updates in the end.
      flops_per_token: of the model.
      sinks: take each record too.
      quiet: show nothing.
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
        self._speed = Speed(SECONDS)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._path = out and out / METRICS
        if self._path is None:
            self._file = None
        else:
            for record in restart(self._path, start):
                (self.valid if "valid_loss" in record else self.train).append(record)
            # Without a buffer, so that the file can be followed and survives a crash.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak and peak * jax.device_count()
        best = min((record["valid_loss"] for record in self.valid), default=math.inf)
        self.progress = Progress(start=start, steps=steps, best=best, quiet=quiet)

    def __enter__(self) -> "RunLog":
        self.progress.__enter__()
        self.start_clock()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.__exit__()
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
        record["seconds"] = now - self._clock
        record["tokens_per_second"] = self._speed.add(record["tokens"], record["seconds"])
        flops = record["tokens_per_second"] * self._flops_per_token
        record |= {"mfu": flops / self._peak} if self._peak else {"flops_per_second": flops}
        self._clock = now
        self.train.append(record)
        self._write(record)
        self.progress.update(record)
        self._check_finite(record)

    def evaluation(self, record: Record) -> None:
        """Records an evaluation."""
        self.valid.append(record)
        self._write(record)
        self.progress.evaluation(record)

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
        if self._file is not None and self._path is not None:
            with naming(self._path):
                line = memoryview(f"{dump(record)}\n".encode())
                # Where the disk is full, a part of it may be written before there is an error.
                while line:
                    line = line[self._file.write(line) :]
        for sink in self._sinks:
            sink(record)
