"""What one sees of a run while it goes on: lines, and in a terminal a bar beneath them."""

import contextlib
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta

import jax
from rich import get_console
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from examples.flax_llama.config import Config, LlamaConfig
from examples.flax_llama.data import Data
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.records import Record
from examples.flax_llama.units import size

# From one line to the next where there is no bar; also what the speed is averaged over.
SECONDS = 10.0
# In characters: no bar is drawn where there is less room left.
SHORTEST_BAR = 10
# Of a text, and how much it matters: the larger, the sooner it is left out.
Part = tuple[str, int]


class Progress:
    """Context manager that shows how far a run is.

    In a terminal it keeps a bar up to date, with as much beside it as there is room for. Without
    one it prints a line every ten seconds. Evaluations have a line of their own in either case.

    Args:
      start: number of updates done already.
      steps: number of updates in the end.
      best: the lowest validation loss so far.
      quiet: show nothing.
      console: where to; that of the program by default.
    """

    def __init__(
        self,
        *,
        start: int,
        steps: int,
        best: float = math.inf,
        quiet: bool = False,
        console: Console | None = None,
    ):
        self._start, self._steps, self._quiet = start, steps, quiet
        self._best = best
        self._console = console or get_console()
        self._has_bar = self._console.is_terminal and not self._console.is_dumb_terminal
        self._step = start
        self._record: Record = {}
        self._valid_loss: float | None = None
        # Tokens and seconds of the last updates, and of all of these together.
        self._recent: deque[tuple[float, float]] = deque()
        self._tokens = self._seconds = 0.0
        # What is done other than updates, and since when.
        self._doing: str | None = None
        self._since = self._began = time.monotonic()
        self._last_line = -math.inf
        self._live = Live(get_renderable=lambda: self, console=self._console)

    def __enter__(self) -> "Progress":
        if self._has_bar and not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Prints a text; in a terminal above the bar, and broken between words."""
        if not self._quiet:
            print_text(text, self._console)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows what is done that is no update."""
        self._doing, self._since = what, time.monotonic()
        try:
            yield
        finally:
            self._doing = None

    def begin(self) -> None:
        """Updates begin now, from which the time left is estimated."""
        self._began = time.monotonic()

    def update(self, record: Record) -> None:
        """Takes the record of an update."""
        self._step, self._record = int(record["step"]), record
        self._count(record["tokens"], record["tokens"] / record["tokens_per_second"])
        now = time.monotonic()
        if not self._has_bar and (now - self._last_line >= SECONDS or self._step == self._steps):
            self.say("  ".join(text for text, _ in self.parts()))
            self._last_line = now

    def _count(self, tokens: float, seconds: float) -> None:
        """Adds an update to those that the speed is of, and lets go of those too long ago."""
        self._recent.append((tokens, seconds))
        self._tokens += tokens
        self._seconds += seconds
        while self._seconds > SECONDS and len(self._recent) > 1:
            tokens, seconds = self._recent.popleft()
            self._tokens -= tokens
            self._seconds -= seconds

    def evaluation(self, record: Record) -> None:
        """Takes the record of an evaluation."""
        self._valid_loss = record["valid_loss"]
        best = ", the best so far" if self._valid_loss < self._best < math.inf else ""
        self._best = min(self._best, self._valid_loss)
        self.say(f"update {int(record['step']):,}: {scores(record)}{best}")

    def parts(self) -> list[Part]:
        """All that there is to say now."""
        record, now = self._record, time.monotonic()
        parts = [(f"update {self._step:,}/{self._steps:,}", 0)]
        if self._doing is not None:
            parts.append((f"{self._doing} {duration(now - self._since)}", 1))
        if record:
            speed = self._tokens / self._seconds
            parts.append((f"loss {record['loss']:.3f}", 1))
            if self._valid_loss is not None:
                parts.append((f"validation {self._valid_loss:.3f}", 4))
            parts += [(f"lr {record['lr']:.2g}", 5), (f"{speed:,.0f} tokens/s", 3)]
            if "mfu" in record:
                parts.append((f"{record['mfu'] * speed / record['tokens_per_second']:.0%} MFU", 7))
            each = (now - self._began) / (self._step - self._start)
            parts.append((f"{duration(each * (self._steps - self._step))} left", 2))
        parts.append((f"{size(memory_used())} used", 6))
        return parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = fitting(self.parts(), options.max_width)
        row = Table.grid(padding=(0, 1))
        room = options.max_width - len(text) - 1
        if room < SHORTEST_BAR:
            row.add_row(text)
        else:
            row.add_row(ProgressBar(self._steps, self._step, width=min(room, 40)), text)
        yield row


def print_text(text: str, console: Console | None = None) -> None:
    """Prints a text; in a terminal its lines are broken between words."""
    console = console or get_console()
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def fitting(parts: Sequence[Part], width: int) -> str:
    """Those parts that matter most, in their order, on a line of so many characters."""
    kept = sorted(range(len(parts)), key=lambda i: parts[i][1])
    while len(text := "  ".join(parts[i][0] for i in sorted(kept))) > width and len(kept) > 1:
        kept.pop()
    return text


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def memory_used() -> int:
    """The most bytes that a device has had in use; of the process where the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    # In kilobytes, but on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def scores(record: Record) -> str:
    """An evaluation in words."""
    # Of a single row there is none.
    known = math.isfinite(record["standard_error"])
    error = f" ± {record['standard_error']:.4f}" if known else ""
    return (
        f"validation loss {record['valid_loss']:.4f}{error}, perplexity "
        f"{record['perplexity']:.2f}, {record['bits_per_byte']:.4f} bits per byte"
    )


def header(config: Config, shape: LlamaConfig, data: Data, start: int) -> str:
    """What is about to be trained, and on what, in a few lines."""
    rank = f", rank {config.rank}" if config.optimizer in IN_GALORE else ""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    lines = [
        f"LLaMA of {shape.num_params:,} parameters: hidden {shape.hidden:,}, {shape.layers} "
        f"layers, {shape.heads} heads, vocabulary {shape.vocab_size:,}; "
        f"{shape.flops_per_token / 1e6:,.1f} MFLOP per token",
        f"{config.optimizer}{rank}, peak learning rate {config.lr:g}; {config.steps:,} updates of "
        f"{config.batch} x {config.seq} tokens, on {device}",
        f"{config.data}: {extent(config, data)}, and {data.valid.num_tokens:,} to validate on",
    ]
    if config.resume:
        what = "Already finished" if start >= config.steps else "Resuming"
        lines.append(f"{what} after update {start:,}" if start else "No checkpoint yet: from 0")
    return "\n".join(lines)


def extent(config: Config, data: Data) -> str:
    """How much there is to train on, and how often the run goes through it."""
    if data.train_tokens is None or data.documents is None:
        return "tokens to train on are read as training goes on"
    rows = len(data.train_tokens) // config.seq if config.packing else data.documents
    return (
        f"{data.documents:,} documents, {len(data.train_tokens):,} tokens to train on "
        f"({config.steps * config.batch / rows:,.2f} epochs)"
    )
