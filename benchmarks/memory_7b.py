"""Peak memory of training steps of 7B, 13B and real models on GPUs and TPUs, by XLA's analysis.

    python -m benchmarks.memory_7b --out benchmarks/results/memory_7b.json

Every row compiles the application's real update, refreshes of the projectors included, for a device
that need not be here (`pip install 'jax[cuda13]' libtpu`), in a process of its own. Rows that the
file has already, of the same settings, are kept: the same command goes on where it was interrupted.

What steps of some of these rows really take, on a larger card under the memory of the smaller one,
is measured by `python -m benchmarks.gpu`.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax

from examples.flax_llama.compile_step import TooLarge, compile_step
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import device_named
from examples.flax_llama.memory import estimate
from examples.flax_llama.topology import check_needs_driver

ROOT = pathlib.Path(__file__).parents[1]
VOCAB_SIZE = 32_000
SHARED: dict[str, Any] = {"batch": 16, "seq": 256, "dtype": "bfloat16", "param_dtype": "bfloat16"}
# The layer-wise update of the papers does not clip; a row shows what clipping as published takes.
SHARED |= {"update_proj_gap": 500, "attention": "xla", "clip": 0.0}
GALORE = {"optimizer": "galore_adamw_8bit", "projector_dtype": "bfloat16", "layerwise": True}
Q_GALORE = {"optimizer": "q_galore_adamw", "layerwise": True}
APOLLO = {"optimizer": "apollo_adamw_8bit", "layerwise": True}
APOLLO_MINI = {"optimizer": "apollo_mini_adamw_8bit", "layerwise": True}
# Weights and layers' inputs in 8 bits, and no moments of the size of the embedding or the head.
FEWEST = {"int8_weights": True, "tables": "factored", "inputs_dtype": "int8"}
ADAMW = {"optimizer": "adamw", "remat": True}
PROJECTORS = ("power_iteration", "svd")


def table() -> dict[str, dict[str, Any]]:
    """The rows by name: a device, and the settings of a run."""
    rows: dict[str, dict[str, Any]] = {}
    published = (
        ("7b", "8-bit GaLore", GALORE, "rtx4090_24gb"),
        ("7b", "Q-GaLore", Q_GALORE, "rtx4060ti_16gb"),
        ("7b", "Q-GaLore", Q_GALORE, "tpu_v5e"),
        ("13b", "Q-GaLore", Q_GALORE, "rtx4090_24gb"),
    )
    for preset, method, settings, device in published:
        for projector in PROJECTORS:
            rows[f"{preset} {method} {projector} {device}"] = {
                "device": device,
                "method": method,
                "settings": SHARED | settings | {"preset": preset, "projector": projector},
            }
    for preset, method, settings, device in published:
        rows[f"{preset} {method} rows {device}"] = {
            "device": device,
            "method": f"{method}, projector `rows`",
            "settings": SHARED | settings | {"preset": preset, "projector": "rows"},
        }
    rows["7b Q-GaLore clipped rtx4060ti_16gb"] = {
        "device": "rtx4060ti_16gb",
        "method": "Q-GaLore, clipped by the global norm",
        "settings": SHARED
        | Q_GALORE
        | {"preset": "7b", "projector": "power_iteration", "clip": 1.0},
    }
    rows["7b AdamW h100_80gb"] = {
        "device": "h100_80gb",
        "method": "AdamW, ordinary step",
        "settings": SHARED | ADAMW | {"preset": "7b"},
    }
    # As they are fine-tuned; their vocabularies are as large as a good part of all layers.
    for preset, method, settings, device in (
        ("gemma-3-1b", "8-bit GaLore", GALORE, "rtx4060_8gb"),
        ("llama-3.1-8b", "Q-GaLore", Q_GALORE, "rtx4080_16gb"),
    ):
        long = {"batch": 1, "seq": 2048, "rank": 256, "projector": "rows"}
        rows[f"{preset} {method} rows {device}"] = {
            "device": device,
            "method": f"{method}, projector `rows`, rank 256, 1 x 2,048 tokens",
            "settings": SHARED | settings | long | {"preset": preset},
        }
    return rows | fewest()


def fewest() -> dict[str, dict[str, Any]]:
    """The rows with the fewest bytes: see `FEWEST`."""
    short, long = {"batch": 1, "seq": 256}, {"batch": 1, "seq": 2048}
    rows = {}
    for preset, method, settings, of_batch, device in (
        ("7b", "GaLore rank 1024", GALORE, {}, "rtx4060ti_16gb"),
        ("7b", "APOLLO rank 256", APOLLO | {"rank": 256}, {}, "rtx4060ti_16gb"),
        ("7b", "GaLore rank 256", GALORE | {"rank": 256}, short, "rtx4070_12gb"),
        ("llama-3.1-8b", "GaLore rank 256", GALORE | {"rank": 256}, long, "rtx4070_12gb"),
        ("llama-3.1-8b", "GaLore rank 256", GALORE | {"rank": 256}, {}, "rtx4080_16gb"),
        ("13b", "APOLLO-Mini", APOLLO_MINI, {}, "rtx4060ti_16gb"),
    ):
        projector = {} if "APOLLO" in method else {"projector": "rows"}
        of_row = SHARED | settings | FEWEST | projector | of_batch | {"preset": preset}
        named = method.replace(" rank", " `rows` rank") if projector else method
        tokens = f"{of_row['batch']} x {of_row['seq']:,}"
        rows[f"{preset} fewest {method} {of_row['batch']}x{of_row['seq']} {device}"] = {
            "device": device,
            "method": f"8-bit {named}, weights and inputs int8, tables factored, {tokens}",
            "settings": of_row,
        }
    return rows


def analyse(device: str, settings: dict[str, Any], vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """The estimate and XLA's figures of one row, in bytes; `error` where the compiler refused."""
    config, target = Config(**settings).resolve(), device_named(device)
    with check_needs_driver():
        estimated = estimate(config, vocab_size)
    row: dict[str, Any] = {
        "parameters": config.shape(vocab_size).num_params,
        "usable": target.usable,
        "estimate": estimated.parts | {"total": estimated.total, "moment": estimated.moment},
        "jax": jax.__version__,
        "compiler": versions(target.platform == "tpu"),
    }
    try:
        return row | {"xla": dataclasses.asdict(compile_step(config, vocab_size, target))}
    except TooLarge as error:
        return row | {"error": str(error)}


def versions(is_tpu: bool) -> dict[str, str]:
    """Of the packages that XLA's compiler for a kind of device is in."""
    names = ("libtpu",) if is_tpu else ("jax-cuda13-pjrt", "jax-cuda12-pjrt")
    found = {"jaxlib": importlib.metadata.version("jaxlib")}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def apart(device: str, settings: dict[str, Any], limit: float) -> dict[str, Any]:
    """What `analyse` returns, called in a process of its own; `error` where it failed.

    Args:
      device: of the row.
      settings: of the row.
      limit: seconds after which it is stopped.
    """
    command = [sys.executable, "-m", "benchmarks.memory_7b"]
    command += ["--one", json.dumps({"device": device, "settings": settings})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} seconds"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def is_of(row: dict[str, Any] | None, done: dict[str, Any]) -> bool:
    """Whether figures are those of a row of the table as it is now."""
    return row is not None and all(done[key] == value for key, value in row.items())


def described(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:44} {row['error']}"
    sizes = row["estimate"]["total"], row["xla"]["peak"], row["usable"]
    figures = "".join(f"{size / 2**30:10.2f}" for size in sizes)
    return f"{name:44}{figures}{'  rematerializes' * bool(row['xla']['rematerializes'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", help="to do, again if they are done; else all missing")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a row")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write, and to go on with")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(analyse(**json.loads(args.one))))
        return
    rows = table()
    unknown = set(args.rows or ()) - rows.keys()
    if unknown:
        parser.error(f"--rows: {', '.join(sorted(unknown))}: expected some of {', '.join(rows)}")
    record: dict[str, Any] = {"benchmark": "memory_7b", "rows": {}}
    if args.out and args.out.exists():
        record = json.loads(args.out.read_text())
        record["rows"] = {k: row for k, row in record["rows"].items() if is_of(rows.get(k), row)}
    wanted = args.rows or [name for name in rows if name not in record["rows"]]
    try:
        for name in wanted:
            device_named(rows[name]["device"]).mesh()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{'GiB':44}{'estimate':>10}{'XLA peak':>10}{'usable':>10}")
    for name in wanted:
        row = rows[name]
        result = apart(row["device"], row["settings"], args.limit)
        done = record["rows"] | {name: row | result}
        record["rows"] = {name: done[name] for name in rows if name in done}
        print(described(name, done[name]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    if any("error" in record["rows"][name] for name in wanted):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
