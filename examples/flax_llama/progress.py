"""What one sees of a run while it goes on: lines, and in a terminal a bar beneath them."""

import contextlib
import dataclasses
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
from examples.flax_llama.paths import expand
from examples.flax_llama.records import Record
from examples.flax_llama.units import size

# From one line to the next where there is no bar; also what the speed is averaged over.
SECONDS = 10.0
# Of updates, before which nothing is said of how long all of them will take.
ENOUGH = 2.0
# In characters: no bar is drawn where there is less room left.
SHORTEST_BAR = 10


@dataclasses.dataclass(eq=False)
class Part:
    """Something to say of a run."""

    # The larger, the sooner it is left out where there is no room.
    rank: int
    # Characters that are kept for it, so that what is beside it stays where it is.
    width: int
    text: str = ""
    # What is said while that is not known, in a bar that leaves room for it.
    unknown: str = ""

    def say(self, text: str) -> None:
        self.text, self.width = text, max(self.width, len(text))


class Speed:
    """Tokens per second of the last updates, as many as take so many seconds.

    The first, which takes longer than the others, is left out as soon as there is another.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._begun = False
        self._recent: deque[tuple[float, float]] = deque()
        # Of all of these together.
        self._sums = 0.0, 0.0

    def add(self, tokens: float, seconds: float) -> float:
        """Adds an update, lets go of those too long ago, and returns what it is now."""
        if not self._begun:
            self._begun = True
            return tokens / seconds
        self._recent.append((tokens, seconds))
        self._sums = self._sums[0] + tokens, self._sums[1] + seconds
        while self._sums[1] - self._recent[0][1] >= self._seconds:
            tokens, seconds = self._recent.popleft()
            self._sums = self._sums[0] - tokens, self._sums[1] - seconds
        return self._sums[0] / self._sums[1]


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
        self._steps, self._quiet = steps, quiet
        self._best = best
        self._console = console or get_console()
        self._has_bar = self._console.is_terminal and not self._console.is_dumb_terminal
        self._step = start
        self._record: Record = {}
        self._speed = Speed(SECONDS)
        # What is done other than updates, and since when.
        self._doing: str | None = None
        self._since = time.monotonic()
        # When the first update was done, and which that was.
        self._first: tuple[float, int] | None = None
        self._last_line = -math.inf
        # In the order in which they are shown.
        self._parts = {
            "update": Part(0, len(f"update {steps:,}/{steps:,}")),
            "loss": Part(1, len("loss 9.999")),
            "validation": Part(4, len("validation 9.999"), unknown="validation -"),
            "lr": Part(5, len("lr 0.00099")),
            "speed": Part(3, len("99,999 tokens/s")),
            # Where it is known.
            "mfu": Part(7, 0),
            "left": Part(2, len("0:59:59 left")),
            "memory": Part(6, len("999.9 MiB used")),
        }
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

    def update(self, record: Record) -> None:
        """Takes the record of an update."""
        now = time.monotonic()
        self._step, self._record = int(record["step"]), record
        self._first = self._first or (now, self._step)
        speed = self._speed.add(record["tokens"], record["seconds"])
        say = {name: part.say for name, part in self._parts.items()}
        say["loss"](f"loss {record['loss']:.3f}")
        say["lr"](f"lr {record['lr']:.2g}")
        # From the end of the first update, which takes longer than the others.
        seconds, updates = now - self._first[0], self._step - self._first[1]
        if updates and seconds >= ENOUGH:
            say["speed"](f"{speed:,.0f} tokens/s")
            if "mfu" in record:
                say["mfu"](f"{record['mfu'] * speed / record['tokens_per_second']:>3.0%} MFU")
            left = (self._steps - self._step) * seconds / updates
            say["left"](f"{duration(left)} left")
        if not self._has_bar and now - self._last_line >= SECONDS:
            self.say("  ".join(part.text for part in self.parts() if part.text))
            self._last_line = now

    def evaluation(self, record: Record) -> None:
        """Takes the record of an evaluation."""
        loss = record["valid_loss"]
        self._parts["validation"].say(f"validation {loss:.3f}")
        best = ", the best so far" if loss < self._best < math.inf else ""
        self._best = min(self._best, loss)
        self.say(f"update {int(record['step']):,}: {scores(record)}{best}")

    def parts(self) -> list[Part]:
        """All that there is to say now, or will be."""
        parts = self._parts
        parts["update"].say(f"update {self._step:,}/{self._steps:,}")
        parts["memory"].say(f"{size(memory_used())} used")
        if self._doing is not None:
            # In place of the time left, where there is one.
            since = "" if self._record else f" {duration(time.monotonic() - self._since)}"
            text = f"{self._doing}{since}"
            parts = parts | {"left": dataclasses.replace(parts["left"], text=text)}
        return [part for part in parts.values() if part.width]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts, width = self.parts(), options.max_width
        bar = width - width_of(fitting(parts, width)) - 1
        if bar >= SHORTEST_BAR:
            width -= bar + 1
        if not self._record:
            # Nothing is in its place yet.
            parts = [dataclasses.replace(x, width=len(x.text)) for x in parts if x.text]
        shown = fitting(parts, width)
        text = "  ".join((part.text or part.unknown).ljust(part.width) for part in shown)
        row = Table.grid(padding=(0, 1))
        if bar < SHORTEST_BAR:
            row.add_row(text)
        else:
            row.add_row(ProgressBar(self._steps, self._step, width=min(bar, 40)), text)
        yield row


def print_text(text: str, console: Console | None = None) -> None:
    """Prints a text; in a terminal its lines are broken between words."""
    console = console or get_console()
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def width_of(parts: Sequence[Part]) -> int:
    """The room that parts take on a line, two spaces between them."""
    return sum(part.width + 2 for part in parts) - 2


def fitting(parts: Sequence[Part], width: int) -> list[Part]:
    """Those parts for which there is room on a line, in their order; what matters most goes first.

    That is decided by the room that each takes at most: what is shown stays the same.
    """
    kept: list[Part] = []
    for part in sorted(parts, key=lambda part: part.rank):
        if not kept or width_of([*kept, part]) <= width:
            kept.append(part)
    return [part for part in parts if part in kept]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))


def significant(value: float) -> str:
    """A number above zero with the first two of its digits that count, and none left out before."""
    return f"{value:,.{max(0, 1 - math.floor(math.log10(value)))}f}"


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
    has_rank = config.optimizer in IN_GALORE or config.adapter is not None
    rank = f", rank {config.rank}" if has_rank else ""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    flops = significant(shape.flops_per_token / 1e6)
    tokens = config.steps * config.batch * config.seq
    shared = f" over {shape.kv_heads}" if shape.kv_heads < shape.heads else ""
    heads = f"{shape.heads}{shared}"
    lines = [
        f"{shape.architecture.title} of {shape.num_params:,} parameters: hidden "
        f"{shape.hidden:,}, {shape.layers} layers, {heads} heads, vocabulary "
        f"{shape.vocab_size:,}; {flops} MFLOP per token",
        f"{config.optimizer}{rank}, peak learning rate {config.lr:g}; {config.steps:,} updates of "
        f"{config.batch} x {config.seq} tokens, {tokens:,} in all, on {device}",
        f"{config.data}: {extent(config, data)}, and {data.valid.num_tokens:,} to validate on",
    ]
    if config.resume:
        what = "Already finished" if start >= config.steps else "Resuming"
        lines.append(f"{what} after update {start:,}" if start else "No checkpoint yet: from 0")
    return "\n".join(lines)


def extent(config: Config, data: Data) -> str:
    """How much there is to train on, and how often the run goes through it, if that is known."""
    if data.train_tokens is None or data.documents is None or data.rows is None:
        return f"{streamed(config.data)}, whose tokens are not counted"
    what = "documents" if config.data_format == "text" else "conversations"
    return (
        f"{data.documents:,} {what}, {len(data.train_tokens):,} tokens to train on "
        f"({significant(config.steps * config.batch / data.rows)} epochs)"
    )


def streamed(data: str) -> str:
    """What is known of data before it is read."""
    if data.startswith("hf:"):
        return "read from the hub"
    files = expand(data)
    total = size(sum(file.stat().st_size for file in files))
    return f"{len(files):,} {'file' if len(files) == 1 else 'files'} of {total}"
