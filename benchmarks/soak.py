"""A long run with everything on, watched from outside: nothing grows but its log, nothing slows.

    python -m benchmarks.soak --out benchmarks/results/soak.json --updates 20000

The train command makes so many updates of a tiny model: 8-bit moments, layer by layer, refreshes
when they are due, micro-batches, checkpoints of which old ones go, evaluations, and TensorBoard.
Its memory is read while it goes on, and the time of updates from its log. Written are the figures,
whether they are within the bounds, and a picture beside them. The same command starts it again.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine
from examples.flax_llama.records import METRICS, read_records

EVERY = 50
RUN = shlex.split(
    "--hidden 32 --intermediate 88 --layers 2 --heads 2 --rank 8 --tokenizer bytes --batch 8 "
    "--seq 32 --vocab-size 512 --optimizer galore_adamw_8bit --refresh lazy --layerwise "
    f"--accumulate 2 --update-proj-gap 25 --save-every {EVERY} --eval-every {2 * EVERY} "
    "--eval-tokens 2000 --keep 3 --quiet --tensorboard"
)
# The first part of the updates, in which caches fill.
WARM_UP = 0.25
WINDOWS = 20
# The log of updates is kept in memory, for what `train` returns: so many bytes of each update,
# and once as many megabytes for what allocators keep.
BOUNDS = {
    "bytes_per_update": 2048.0,
    "megabytes_beside": 32.0,
    "slowdown": 1.25,
    "checkpoints": 5,
    "log_bytes_per_update": 1024.0,
}


def resident(pid: int) -> int:
    """Bytes of a process in memory, of Linux; 0 where it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * 4096


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory, which come and go."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def look(pid: int, out: Path) -> dict[str, int]:
    """What there is to see of a run from outside."""
    log, checkpoints = out / METRICS, out / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return {
        "memory": resident(pid),
        "checkpoints": sum(name.isdecimal() for name in names),
        "log": log.stat().st_size if log.is_file() else 0,
        "directory": size_of(out),
    }


def watch(out: Path, updates: int, seconds: float) -> list[dict[str, Any]]:
    """Makes the run, and looks at it every so many seconds."""
    words = [*RUN, "--steps", str(updates), "--out", str(out)]
    command = [sys.executable, "-m", "examples.flax_llama.train", *words]
    seen = []
    with open(out.with_suffix(".txt"), "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(seconds)
                found = look(process.pid, out)
                if found["log"] and found["memory"]:
                    seen.append({"clock": time.time()} | found)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"The run failed: {out.with_suffix('.txt').read_text()}")
    return seen


def by_update(seen: list[dict[str, Any]], updates: int) -> list[dict[str, Any]]:
    """The same with the number of updates that were done, by the size of the log."""
    whole = seen[-1]["log"]
    return [each | {"update": round(updates * each["log"] / whole)} for each in seen]


def figures(
    seen: list[dict[str, Any]], records: list[dict[str, float]], updates: int
) -> dict[str, Any]:
    """What came of a run, to be compared with `BOUNDS`."""
    warm = [each for each in seen if each["update"] > WARM_UP * updates]
    done, memory = (np.array([each[name] for each in warm], float) for name in ("update", "memory"))
    seconds = [record["seconds"] for record in records if "loss" in record]
    windows = [float(statistics.median(part)) for part in np.array_split(seconds, WINDOWS)]
    late = windows[round(WARM_UP * WINDOWS) :]
    grown = float(
        np.median(memory[-len(memory) // 4 :]) - np.median(memory[: -(-len(memory) // 4)])
    )
    slope = float(np.polyfit(done, memory, 1)[0])
    allowed = BOUNDS["bytes_per_update"] * float(done[-1] - done[0])
    half = len(late) // 2
    found = {
        "updates": len(seconds),
        "memory_slope_bytes_per_update": round(slope, 1),
        "memory_grown_mb": round(grown / 1e6, 2),
        "window_seconds": [float(f"{window:.4g}") for window in windows],
        "slowdown": round(statistics.median(late[half:]) / statistics.median(late[:half]), 3),
        "most_checkpoints": max(each["checkpoints"] for each in seen),
        "log_bytes_per_update": round(seen[-1]["log"] / updates, 1),
        "directory_mb": round(seen[-1]["directory"] / 1e6, 2),
    }
    found["within"] = {
        "updates": len(seconds) == updates,
        "memory": grown <= allowed + 1e6 * BOUNDS["megabytes_beside"],
        "slowdown": found["slowdown"] <= BOUNDS["slowdown"],
        "checkpoints": found["most_checkpoints"] <= BOUNDS["checkpoints"],
        "log": found["log_bytes_per_update"] <= BOUNDS["log_bytes_per_update"],
    }
    return found


def draw(seen: list[dict[str, Any]], found: dict[str, Any], path: Path) -> None:
    """Memory, time of updates, checkpoints and sizes, over updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    done = [each["update"] for each in seen]
    middle = (np.arange(WINDOWS) + 0.5) * found["updates"] / WINDOWS
    lines = {
        "memory of the process, MB": (done, [each["memory"] / 1e6 for each in seen]),
        "milliseconds of an update": (middle, [1e3 * x for x in found["window_seconds"]]),
        "checkpoints": (done, [each["checkpoints"] for each in seen]),
        "size of the directory, MB": (done, [each["directory"] / 1e6 for each in seen]),
    }
    for axis, (title, (x, y)) in zip(axes.flat, lines.items(), strict=True):
        axis.plot(x, y)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(bottom=0)
    axes[1][1].plot(done, [each["log"] / 1e6 for each in seen], label="of which the log")
    axes[1][1].legend()
    for axis in axes[1]:
        axis.set_xlabel("updates")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=2.0, help="between two looks")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        out, began = Path(directory, "run"), time.monotonic()
        seen = by_update(watch(out, args.updates, args.seconds), args.updates)
        found = figures(seen, read_records(out / METRICS), args.updates)
    record = {"benchmark": "soak", "machine": machine(), "run": shlex.join(RUN), "bounds": BOUNDS}
    record |= {"seconds": round(time.monotonic() - began), **found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    draw(seen, found, args.out.with_suffix(".png"))
    print(json.dumps({name: value for name, value in found.items() if name != "window_seconds"}))
    beyond = [name for name, is_within in found["within"].items() if not is_within]
    print(f"fail: {', '.join(beyond)}" if beyond else "pass")
    raise SystemExit(bool(beyond))


if __name__ == "__main__":
    main()
