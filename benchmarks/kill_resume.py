"""Training runs that are killed a hundred times at random moments, beside runs that are left alone.

    python -m benchmarks.kill_resume --out benchmarks/results/kill_resume.json

Kills (SIGKILL) fall while Python starts and text is tokenized, while the step is compiled, between
two updates, while a checkpoint is written, and during an evaluation. Each time the run goes on with
nothing but `--out` and `--resume`. Reported are the updates that had to be made again, at most, and
whether metrics and parameters are in the end, bit for bit, those of the run that was left alone.
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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.machine import machine
from examples.flax_llama.loading import load_run
from examples.flax_llama.records import GROUPS, METRICS
from examples.flax_llama.run_directory import SETTINGS

COMMAND = [sys.executable, "-m", "examples.flax_llama.train"]
STEPS, KILLS, SAVE_EVERY, EVAL_EVERY = 1000, 100, 10, 50
RUN = shlex.split(
    "--hidden 32 --intermediate 88 --layers 2 --heads 2 --rank 8 --batch 8 --seq 32 "
    f"--update-proj-gap 25 --save-every {SAVE_EVERY} --eval-every {EVAL_EVERY} --eval-tokens 2000 "
    "--quiet --no-tensorboard"
)
# Words that the runs have beside these.
VARIANTS = {
    "ordinary": "--tokenizer bpe:500",
    "layer-wise": "--tokenizer bytes --layerwise",
    "8-bit": "--tokenizer bytes --optimizer galore_adamw_8bit",
    "Q-GaLore": "--tokenizer bytes --optimizer q_galore_adamw --layerwise",
    "staggered": "--tokenizer bytes --stagger",
    "lazy": "--tokenizer bytes --refresh lazy --projector-dtype int4",
}
# What a run does when it is killed, each in turn.
MOMENTS = ("update", "start", "save", "compile", "evaluation")
# Seconds at most that it takes to start, and to compile what no cache has.
STARTS, COMPILES = 4, 10


def start(
    out: pathlib.Path, cache: pathlib.Path, steps: int, words: Sequence[str]
) -> subprocess.Popen:
    """Starts the run, or goes on with it if it got to write its settings."""
    settings = ["--resume"] if (out / SETTINGS).exists() else [*RUN, *words, "--steps", str(steps)]
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


def is_saving(out: pathlib.Path) -> bool:
    """Whether a checkpoint is being written, whose directory gets its name in the end."""
    directory = out / "checkpoints"
    return directory.exists() and not all(x.name.isdecimal() for x in directory.iterdir())


def wait_for(
    moment: str, rng: random.Random, out: pathlib.Path, most: int, running: Callable[[], bool]
) -> None:
    """Waits until a run is to be killed.

    Args:
      moment: what it does then, of `MOMENTS`.
      rng: of the rest.
      out: its directory.
      most: how many updates it may make until then, but for those to the next evaluation.
      running: whether it has not ended.
    """
    before = last_update(out)
    target = before + rng.randrange(most)
    if moment in ("start", "compile"):
        end = time.monotonic() + rng.uniform(0, STARTS if moment == "start" else COMPILES)
        while time.monotonic() < end and last_update(out) <= before + most:
            time.sleep(0.02)
        return
    if moment == "evaluation":
        target += EVAL_EVERY - target % EVAL_EVERY - 1
    while last_update(out) <= target and running():
        time.sleep(rng.uniform(0, 0.05))
    while moment == "save" and not is_saving(out) and running():
        pass


def measure(
    seed: int,
    directory: pathlib.Path,
    kills: int = KILLS // len(VARIANTS),
    steps: int = STEPS,
    variant: str = "layer-wise",
) -> dict[str, Any]:
    """Makes both runs, of so many updates, in a directory, and kills one of them so often."""
    cache, alone, killed = (directory / name for name in ("cache", "alone", "killed"))
    words = VARIANTS[variant].split()
    finish(start(alone, cache, steps, words))
    rng = random.Random(f"{seed} {variant}")
    log = []
    for kill in range(kills):
        moment = MOMENTS[kill % len(MOMENTS)]
        with tempfile.TemporaryDirectory() as empty:
            of_compiled = pathlib.Path(empty) if moment == "compile" else cache
            process = start(killed, of_compiled, steps, words)
            # So many that the run has not ended by the last kill.
            most = steps // (kills + 1)
            wait_for(moment, rng, killed, most, lambda p=process: p.poll() is None)
            if process.poll() is not None:
                raise RuntimeError(f"It ended before it was killed: {process.communicate()[0]}")
            saving = is_saving(killed)
            process.kill()
            process.communicate()
        done, saved = last_update(killed), last_checkpoint(killed)
        log.append(
            {"moment": moment, "saving": saving, "updates": done, "lost": max(0, done - saved)}
        )
        print(variant, log[-1], flush=True)
    finish(start(killed, cache, steps, words))
    return {
        "kills": log,
        "most_lost": max(kill["lost"] for kill in log),
        "same_metrics": records(alone) == records(killed),
        "same_parameters": same_parameters(alone, killed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=KILLS, help="of all runs together")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    each = -(-args.kills // len(VARIANTS))
    record: dict[str, Any] = {"benchmark": "kill_resume", "machine": machine()}
    record |= {"run": shlex.join(RUN), "steps": STEPS, "save_every": SAVE_EVERY, "variants": {}}
    for variant, words in VARIANTS.items():
        with tempfile.TemporaryDirectory() as directory:
            result = measure(args.seed, pathlib.Path(directory), each, variant=variant)
        print(variant, json.dumps({k: v for k, v in result.items() if k != "kills"}), flush=True)
        record["variants"][variant] = {"words": words} | result
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
