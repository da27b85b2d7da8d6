"""Validation losses of optimizers in a subspace at 60m, each at the best of its learning rates.

It is `python -m benchmarks.quality --model 60m` at one rank, a contender at a time.
"""

import dataclasses
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.stage import Item, Size
from benchmarks.quality.contenders import ADAMW, GALORE
from benchmarks.quality.record import Record
from benchmarks.quality.sizes import SIZES, STEPS, base_of
from benchmarks.quality.stages import Bench
from benchmarks.quality.statistics import contenders
from benchmarks.quality.workers import Work, executors
from examples.flax_llama.documents import BUILT_IN

MODEL = "60m"
# In order of value; the others are for whoever has more time, by the command itself.
NAMES = (ADAMW, GALORE, "tracked", "fira", "apollo", "apollo-mini")
FRACTION = 4
TINY: dict[str, Any] = {"hidden": 32, "intermediate": 88, "layers": 1, "heads": 2, "batch": 2}
TINY |= {"seq": 32, "tokenizer": "bytes", "eval_tokens": 500}


def items(size: Size) -> list[Item]:
    """A sweep for each contender, and two more seeds at the best."""
    return [
        Item(f"{MODEL} {name}", functools.partial(measure, size, name), size.of(1500, 120))
        for name in size.of(NAMES, NAMES[:3])
    ]


def measure(size: Size, name: str, deadline: float) -> dict[str, Any]:
    """The runs of a contender for which there is time, and what comes of them."""
    cache = Path(tempfile.gettempdir()) / "quality-cache"
    directory = None if size.data == BUILT_IN else Path(size.data)
    model, steps = size.of((MODEL, STEPS), ("9m", 2))
    base, about = base_of(model, steps, directory, cache)
    base = dataclasses.replace(base, **size.of({}, TINY))
    bench = Bench(base, (name,), (FRACTION,), rate=SIZES[MODEL].rate)
    record, seconds = Record(None, about, {}), SIZES[MODEL].seconds
    # A run that has begun must end before the item is stopped.
    left = deadline - time.time() - size.of(2 * seconds, 10)
    work = Work(bench, record, ["seeds"], seconds, minutes=max(left, 0) / 60)
    with executors(base, 1, cache / "programs") as execute:
        complete = work.do(execute)
    rows = contenders(record.results, [name], base.hidden, base.hidden // FRACTION)
    runs = [
        {"run": dataclasses.asdict(run), "result": result} for run, result in record.results.items()
    ]
    return {"complete": complete, "about": about, "rows": rows, "runs": runs}


def describe(name: str, result: dict[str, Any]) -> str:
    if not result["rows"]:
        return "no time for a run"
    row = result["rows"][0]
    loss, seeds = row["loss"]["mean"], row["loss"]["n"]
    text = f"loss {loss:.4f} of {seeds} seeds at lr {row['lr']:g} x {row['ratio']:g}"
    text += f", {len(result['runs'])} runs, {row['state_bytes'] / 1e6:.1f} MB of state"
    if row["tokens_per_second"]:
        text += f", {row['tokens_per_second']:,.0f} tokens/s"
    return text if result["complete"] else f"{text}; not complete"
