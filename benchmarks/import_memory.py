"""Peak memory of importing a model of Hugging Face of some size, out of random shards.

    python -m benchmarks.import_memory --preset 7b --int8
    python -m benchmarks.import_memory --preset llama-3.2-1b --out import_memory.json

Aim: at most 1.3 times the largest shard, and the imported model, which is on the disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.machine import machine
from examples.flax_llama.config import Config
from examples.flax_llama.export_hf import divided
from examples.flax_llama.pretrained import open_model
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.tokenizer import train_tokenizer
from examples.flax_llama.units import size
from examples.hf.configuration import CONFIG, config_of
from examples.hf.tensors import INDEX

BOUND = 1.3
# Prints the most memory that a process has had, before and after it imports.
IMPORT = """
import re, sys
from pathlib import Path
from examples.flax_llama.import_hf import import_hf
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
import_hf(Path(sys.argv[1]), Path(sys.argv[2]), int8=sys.argv[3] == "int8", quiet=True)
print(before, peak())
"""


def write_model(directory: Path, shape: LlamaConfig, most: float) -> int:
    """Writes a model of random numbers in shards of at most so many bytes, in bfloat16.

    Returns:
      The bytes of the largest shard.
    """
    rng, places, largest = np.random.default_rng(0), {}, 0
    shards = list(divided(shape, most))
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {
            entry.name: (rng.standard_normal(entry.shape, np.float32) / 50).astype(
                ml_dtypes.bfloat16
            )
            for entry in shard
        }
        save_file(arrays, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(arrays, name)
        largest = max(largest, (directory / name).stat().st_size)
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    (directory / CONFIG).write_text(json.dumps(config_of(shape)))
    train_tokenizer([], "bytes", eos=True).save(directory)
    return largest


def measured(preset: str, int8: bool, most: float, where: Path) -> dict[str, float]:
    """The bytes of the largest shard, of the model, and of the process at its peak."""
    shape = Config(preset=preset, param_dtype="bfloat16").resolve().shape(32_000)
    with tempfile.TemporaryDirectory(dir=where) as directory:
        source, out = Path(directory, "model"), Path(directory, "run")
        source.mkdir()
        shard = write_model(source, shape, most)
        like = open_model(source, int8=int8).like
        words = [str(source), str(out), "int8" if int8 else "dense"]
        done = subprocess.run(
            [sys.executable, "-c", IMPORT, *words], check=True, capture_output=True, text=True
        )
    before, peak = map(int, done.stdout.split())
    model = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    return {"shard": shard, "model": model, "before": before, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="7b")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--shard-gigabytes", type=float, default=2.0)
    parser.add_argument("--where", type=Path, help="directory with room for the model twice")
    parser.add_argument("--out", type=Path, help="JSON file, to which this is added")
    args = parser.parse_args()
    found = measured(args.preset, args.int8, args.shard_gigabytes * 1e9, args.where)
    over = (found["peak"] - found["before"]) / found["shard"]
    print(
        f"{args.preset}{' in 8 bits' * args.int8}, {size(found['model'])}: peak "
        f"{size(found['peak'])}, of which {size(found['before'])} are the process before it; the "
        f"rest is {over:.2f} of the largest shard, {size(found['shard'])} (bound {BOUND})"
    )
    if args.out:
        runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
        settings = {"preset": args.preset, "int8": args.int8}
        runs = [run for run in runs if {k: run[k] for k in settings} != settings]
        result = {"benchmark": "import_memory", "machine": machine(), "bound": BOUND}
        runs.append(settings | found | {"over_in_shards": round(over, 3)})
        args.out.write_text(json.dumps(result | {"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
