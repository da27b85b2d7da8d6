"""What a training run reports: records kept, appended to a file, shown on a progress bar."""

import json
import math
import os
import time
from pathlib import Path

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Record = dict[str, float]


class RunLog:
    """Context manager that owns the records of one run, its metrics file and its progress bar."""

    def __init__(self, path: Path | None, *, steps: int, tokens_per_step: int, quiet: bool):
        self.train: list[Record] = []
        self.valid: list[Record] = []
        self._tokens_per_step = tokens_per_step
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        # Line by line, so that the file can be followed and survives a crash.
        self._file = open(path or os.devnull, "w", buffering=1)  # noqa: SIM115
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            disable=quiet,
        )
        self._task = self._bar.add_task("", total=steps, loss=math.nan, speed=0)

    def __enter__(self) -> "RunLog":
        self._bar.start()
        self._clock = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
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
          FloatingPointError: its loss is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        record = {"step": step} | {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        record["tokens_per_second"] = self._tokens_per_step / (now - self._clock)
        self._clock = now
        self.train.append(record)
        self._write(record)
        self._bar.update(
            self._task, completed=step, loss=record["loss"], speed=record["tokens_per_second"]
        )
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"The loss is {record['loss']} at update {step}, where lr is {record['lr']:.2g}: "
                "try a smaller lr or a longer warm-up."
            )

    def evaluation(self, record: Record) -> None:
        """Records an evaluation, whose time does not count as training time."""
        self.valid.append(record)
        self._write(record)
        self._clock = time.perf_counter()

    def _write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
