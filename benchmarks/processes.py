"""A run of several processes beside that of one, restored by others, and killed at random.

    python -m benchmarks.processes --kills 50 --out benchmarks/results/processes.json

Four processes of two CPU devices each train as one process of eight does. A checkpoint of theirs is
restored by one, two and eight processes. Then a random one of the four is killed (SIGKILL) at a
random moment, as often as asked for: while they start, compile, train or save. Each time the
survivors must end with a line that names it, and all go on with nothing but `--resume`. Reported
are how long the survivors took, and whether the end is bit for bit that of the run that was left
alone; and, from a kill in the middle, how far the losses are apart ten updates after on another
mesh.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.kill_resume import last_checkpoint, last_update, records, same_parameters
from benchmarks.machine import machine
from examples.flax_llama.run_directory import SETTINGS

DEVICES, STEPS = 8, 600
MESH, OTHER = "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"
# Seconds within which the survivors of a killed process must have ended: of one that had come, and
# those that they wait for one that never comes.
LIMIT, ARRIVAL = 10, 40
RUN = shlex.split(
    "--hidden 16 --intermediate 40 --layers 2 --heads 2 --rank 4 --tokenizer bytes --batch 8 "
    "--seq 20 --update-proj-gap 25 --save-every 10 --eval-every 200 --eval-tokens 200 --quiet "
    f"--no-tensorboard --mesh {MESH} --lr 0.01"
)
# Updates after which losses on another mesh are compared.
AFTER = 10


class Group:
    """The processes of a run, which share eight devices.

    Args:
      out: the run's directory.
      cache: of compiled programs.
      count: of processes.
      words: of the command line.
    """

    def __init__(self, out: pathlib.Path, cache: pathlib.Path, count: int, *words: str):
        own = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
            # As many threads as devices wait for each other.
            "NPROC": str(4 * DEVICES // count),
        }
        command = [sys.executable, "-m", "examples.flax_llama.train", "--out", str(out), *words]
        several = ["--distributed", "--coordinator", f"localhost:{free_port()}"]
        several += ["--distributed-timeout", str(ARRIVAL), "--processes", str(count), "--process"]
        self.processes = [
            subprocess.Popen(
                [*command, *several, str(number)] if count > 1 else command,
                env=own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(count)
        ]

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def finish(self) -> None:
        outputs = [process.communicate()[0] for process in self.processes]
        if any(process.returncode for process in self.processes):
            raise RuntimeError("The run failed:\n" + "\n".join(outputs))

    def kill(self, victim: int) -> dict[str, Any]:
        """Kills one of the processes, and says what became of the others.

        One that is killed while it starts may not have come yet. Of such a one nothing is known;
        the others wait for it, and say that it has not come.
        """
        self.processes[victim].kill()
        began, seconds, told, had_come = time.monotonic(), [], [], True
        for number, process in enumerate(self.processes):
            if number == victim:
                continue
            try:
                process.wait(2 * (LIMIT + ARRIVAL))
            except subprocess.TimeoutExpired:
                process.kill()
            seconds.append(time.monotonic() - began)
        for number, process in enumerate(self.processes):
            output, _ = process.communicate()
            if number != victim:
                ended = f"error: process {victim} of {len(self.processes)} has ended" in output
                missing = f" process {victim} has not come" in output
                told.append(ended or missing)
                had_come = had_come and not missing
                if not told[-1]:
                    print(f"process {number} said:\n{output[-2000:]}", flush=True)
        return {
            "victim": victim,
            "had_come": had_come,
            "seconds": max(seconds),
            "told": all(told),
        }


def free_port() -> int:
    """A port that is free with the one before it."""
    while True:
        with socket.socket() as one, socket.socket() as before:
            one.bind(("", 0))
            port: int = one.getsockname()[1]
            with contextlib.suppress(OSError):
                before.bind(("", port - 1))
                return port


def settings(out: pathlib.Path, steps: int) -> list[str]:
    """The words that begin a run, or go on with it if it got to write its settings."""
    return ["--resume"] if (out / SETTINGS).exists() else [*RUN, "--steps", str(steps)]


def losses(out: pathlib.Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(out) if "loss" in record}


def apart(one: pathlib.Path, other: pathlib.Path, last: int | None = None) -> float:
    """The largest relative difference of the losses of two runs, up to some update."""
    first, second = losses(one), losses(other)
    steps = [step for step in first if last is None or step <= last]
    return max(abs(first[step] / second[step] - 1) for step in steps)


def up_to(source: pathlib.Path, out: pathlib.Path, step: int | None = None) -> int:
    """A copy of a run as if it had been ended after a checkpoint; returns the update of that."""
    shutil.copytree(source, out)
    for path in (out / "checkpoints").iterdir():
        if step is not None and path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)
    return last_checkpoint(out)


def restores(four: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
    """How far the losses of other numbers of processes are apart, from the same checkpoint on."""
    first = min(int(path.name) for path in (four / "checkpoints").iterdir())
    found = {}
    for count in (1, 2, 8):
        out = four.with_name(f"restored_by_{count}")
        up_to(four, out, first)
        Group(out, cache, count, "--resume").finish()
        found[str(count)] = apart(out, four)
        print(f"restored by {count}: {found[str(count)]}", flush=True)
    return found


def measure(seed: int, directory: pathlib.Path, kills: int, steps: int) -> dict[str, Any]:
    """Makes all runs in a directory."""
    cache, one, four, killed = (directory / name for name in ("cache", "one", "four", "killed"))
    Group(one, cache, 1, *settings(one, steps)).finish()
    Group(four, cache, 4, *settings(four, steps)).finish()
    result: dict[str, Any] = {"four_and_one_apart": apart(four, one)}
    print(result, flush=True)
    result["restored_apart"] = restores(four, cache)
    rng, log = random.Random(seed), []
    for kill in range(kills):
        group = Group(killed, cache, 4, *settings(killed, steps))
        if kill % 4 == 3:
            # Somewhere in the seconds that it takes to start.
            time.sleep(rng.uniform(0, 10))
        else:
            target = last_update(killed) + rng.randrange(max(1, steps // kills))
            while last_update(killed) <= target and group.running():
                time.sleep(rng.uniform(0, 0.05))
        if not group.running():
            raise RuntimeError("The run ended before it was killed.")
        found = group.kill(rng.randrange(4))
        found |= {"updates": last_update(killed), "saved": last_checkpoint(killed)}
        log.append(found)
        print(found, flush=True)
        if kill == kills // 2:
            saved = up_to(killed, elsewhere := directory / "elsewhere")
            words = ["--resume", "--mesh", OTHER, "--steps", str(steps)]
            Group(elsewhere, cache, 4, *words).finish()
            result["other_mesh_apart"] = apart(elsewhere, four, saved + AFTER)
    Group(killed, cache, 4, *settings(killed, steps)).finish()
    return result | {
        "kills": log,
        "longest_seconds": max((k["seconds"] for k in log if k["had_come"]), default=None),
        "longest_wait_for_arrival": max(
            (k["seconds"] for k in log if not k["had_come"]), default=None
        ),
        "all_told": all(kill["told"] for kill in log),
        "most_lost": max((kill["updates"] - kill["saved"] for kill in log), default=None),
        "same_metrics": records(four) == records(killed),
        "same_parameters": same_parameters(four, killed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(args.seed, pathlib.Path(directory), args.kills, args.steps)
    record = {
        "benchmark": "processes",
        "machine": machine(),
        "run": shlex.join(RUN),
        "steps": args.steps,
    } | result
    print(json.dumps({k: v for k, v in result.items() if k != "kills"}))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
