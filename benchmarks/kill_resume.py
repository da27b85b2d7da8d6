"""A training run that is killed ten times at random moments, beside one that is left alone.

    python -m benchmarks.kill_resume

Kills (SIGKILL) fall anywhere: while Python starts, while the step is compiled, while training, and,
since there is a checkpoint every few updates, while one is written. Each time the run goes on with
nothing but `--out` and `--resume`. Reported are the updates that had to be made again, and whether
metrics and parameters are in the end, bit for bit, those of the run that was left alone.
"""

import argparse
import json
import os
import pathlib
import random
import shlex
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.machine import machine
from examples.flax_llama.checkpoint import load_run
from examples.flax_llama.records import GROUPS, METRICS
from examples.flax_llama.run_directory import SETTINGS

COMMAND = [sys.executable, "-m", "examples.flax_llama.train"]
STEPS, KILLS = 2000, 10
RUN = shlex.split(
    "--hidden 32 --intermediate 88 --layers 2 --heads 2 --rank 8 --tokenizer bytes --batch 8 "
    "--seq 32 --update-proj-gap 25 --save-every 10 --eval-every 500 --eval-tokens 2000 --quiet "
    "--no-tensorboard"
)


def start(out: pathlib.Path, cache: pathlib.Path, steps: int) -> subprocess.Popen:
    """Starts the run, or goes on with it if it got to write its settings."""
    settings = ["--resume"] if (out / SETTINGS).exists() else [*RUN, "--steps", str(steps)]
    compilation = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [*COMMAND, *settings, "--out", str(out)],
        env=os.environ | compilation,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"The run failed: {output}")


def records(out: pathlib.Path) -> list[dict[str, Any]]:
    """Whole records of the metrics file, without what depends on the machine's speed."""
    path = out / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [{k: v for k, v in r.items() if k not in GROUPS["speed"]} for r in whole]


def last_update(out: pathlib.Path) -> int:
    return max((record["step"] for record in records(out)), default=0)


def last_checkpoint(out: pathlib.Path) -> int:
    directory = out / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def same_parameters(one: pathlib.Path, other: pathlib.Path) -> bool:
    trees = [nnx.to_pure_dict(nnx.state(load_run(out)[0])) for out in (one, other)]
    return all(map(np.array_equal, *map(jax.tree.leaves, trees)))


def measure(
    seed: int, directory: pathlib.Path, kills: int = KILLS, steps: int = STEPS
) -> dict[str, Any]:
    """Makes both runs, of so many updates, in a directory, and kills one of them so often."""
    cache, alone, killed = (directory / name for name in ("cache", "alone", "killed"))
    finish(start(alone, cache, steps))
    rng = random.Random(seed)
    log = []
    for kill in range(kills):
        process = start(killed, cache, steps)
        if kill % 4 == 3:
            # Somewhere in the seconds that it takes to start.
            time.sleep(rng.uniform(0, 3))
        else:
            target = last_update(killed) + rng.randrange(steps // kills)
            while last_update(killed) <= target and process.poll() is None:
                time.sleep(rng.uniform(0, 0.05))
        if process.poll() is not None:
            raise RuntimeError(f"The run ended before it was killed: {process.communicate()[0]}")
        process.kill()
        process.communicate()
        done, saved = last_update(killed), last_checkpoint(killed)
        log.append({"updates": done, "saved": saved, "lost": done - saved})
        print(log[-1], flush=True)
    finish(start(killed, cache, steps))
    return {
        "kills": log,
        "most_lost": max(kill["lost"] for kill in log),
        "same_metrics": records(alone) == records(killed),
        "same_parameters": same_parameters(alone, killed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(args.seed, pathlib.Path(directory))
    record = {
        "benchmark": "kill_resume",
        "machine": machine(),
        "run": shlex.join(RUN),
        "steps": STEPS,
    } | result
    print(json.dumps({k: v for k, v in result.items() if k != "kills"}))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
