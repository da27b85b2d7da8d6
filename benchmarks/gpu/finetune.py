"""Fine-tuning of models that people have: SmolLM2-135M on sums, MiniLM-L6 on SST-2.

They are `python -m benchmarks.finetune_smollm2` and `python -m examples.flax_glue.compare`, a
method at a time: three learning rates with one seed, and two more seeds at the best. The models
and SST-2 must be there: `--smollm2`, `--minilm` and `--sst2` name their directories.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.finetune_smollm2 import METHODS, Bench, about, planned, row_of, write_data
from benchmarks.gpu.stage import Item, Size, Unavailable
from benchmarks.quality.statistics import estimate
from examples.flax_glue.compare import compare
from examples.flax_glue.config import Config

SECONDS = 600.0
# What is compared on SST-2, and its learning rates.
SST2: dict[str, str] = {
    "adamw": "5e-5,1e-4,2e-4",
    "galore_adamw:4": "2e-4,4e-4,8e-4",
    "galore_adamw:8": "2e-4,4e-4,8e-4",
    "lora:4": "2e-3,4e-3,8e-3",
    "lora:8": "2e-3,4e-3,8e-3",
    "tracked_adamw:8": "1e-4,2e-4,4e-4",
    "q_galore_adamw:8": "2e-4,4e-4,8e-4",
}


def items(size: Size) -> list[Item]:
    """A method on each of the two tasks."""
    of_smollm2 = [
        Item(f"SmolLM2 {name}", functools.partial(measure_smollm2, size, name), SECONDS)
        for name in METHODS
    ]
    of_minilm = [
        Item(f"MiniLM {name}", functools.partial(measure_minilm, size, name), SECONDS)
        for name in SST2
    ]
    return of_smollm2 + of_minilm


def measure_smollm2(size: Size, method: str, deadline: float) -> dict[str, Any]:
    """The runs of a method for which there is time, and what comes of them."""
    model = directory_of(size, "smollm2")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise Unavailable("needs the package reasoning-gym")
    same = json.dumps(about(model), sort_keys=True).encode()
    bench = Bench(cache() / f"smollm2-{hashlib.sha256(same).hexdigest()[:12]}.json", model)
    with tempfile.TemporaryDirectory() as directory:
        data = write_data(Path(directory))
        longest, complete = 0.0, True
        for run in planned(bench, [method]):
            began = time.time()
            # A run that has begun must end before the item is stopped.
            if began + 1.5 * longest > deadline:
                complete = False
                break
            bench.do(run, data)
            longest = max(longest, time.time() - began)
    return {"complete": complete, **row_of(bench, method)}


def measure_minilm(size: Size, method: str, deadline: float) -> dict[str, Any]:
    """A method on SST-2; where it is stopped, another try goes on where it was."""
    del deadline
    model, data = directory_of(size, "minilm"), directory_of(size, "sst2")
    longest, limit = size.of((64, None), (16, 64))
    shared = Config(model=model, data=data, epochs=1, max_length=longest, limit=limit)
    out = cache() / method.replace(":", "-")
    rates = f"{method}={SST2[method]}"
    found = compare(dataclasses.replace(shared, out=out), (method,), (rates,), seeds=3)
    [runs] = found.best.values()
    scores = {"dev": [run.dev for run in runs], "test": [run.test or math.nan for run in runs]}
    return {
        "lr": runs[0].lr,
        **{name: estimate(of_runs) for name, of_runs in scores.items()},
        "seconds_of_a_run": estimate([run.seconds for run in runs]),
        "memory": dict(runs[0].memory),
        "runs": [dataclasses.asdict(run) for run in found.runs],
    }


def directory_of(size: Size, name: str) -> Path:
    if name not in size.pretrained:
        raise Unavailable(f"needs --{name} DIR")
    return Path(size.pretrained[name])


def cache() -> Path:
    """Where runs that have ended are kept, so that another try does not make them again."""
    directory = Path(tempfile.gettempdir()) / "finetune-cache"
    directory.mkdir(exist_ok=True)
    return directory


def describe(name: str, result: dict[str, Any]) -> str:
    if name.startswith("MiniLM"):
        test, seconds = result["test"], result["seconds_of_a_run"]["mean"]
        of_test = f"{100 * test['mean']:.2f} +- {100 * test['error']:.2f} % of the test"
        return f"{of_test} at lr {result['lr']:g}, {seconds:.0f} s a run"
    if "lr" not in result:
        return "no time for a run"
    share = result["accuracy"]
    text = f"{100 * share['mean']:.1f} % right of {share['n']} seeds at lr {result['lr']:g}"
    text += f", {result['seconds_of_an_update']:.2f} s an update"
    return text if result["complete"] else f"{text}; not complete"
