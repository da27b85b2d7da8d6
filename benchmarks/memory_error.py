"""How far the planner's estimate is off, of steps of many kinds: beside XLA's plan of the same.

    python -m benchmarks.memory_error --out benchmarks/results/memory_error.json

Every row compiles the application's real update of a small model, for the CPU or for a GPU that
need not be here (`pip install 'jax[cuda13]'`). Rows that the file has already are kept. Steps
of 7B and 13B are in benchmarks/results/memory_7b.json, and peaks that a device counted are in
benchmarks/results/gpu: by all of these the planner knows what it can be sure of.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.memory_7b import ROOT, VOCAB_SIZE, is_of
from examples.flax_llama.compile_step import compile_step
from examples.flax_llama.config import Config
from examples.flax_llama.devices import DEVICES, device_here, device_named
from examples.flax_llama.memory import estimate
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.topology import check_needs_driver

DEVICE = "h100_80gb"
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = RESULTS / "memory_error.json"
HALF = {"dtype": "bfloat16"}
ALL_HALF = HALF | {"param_dtype": "bfloat16"}
MANY = {"batch": 64}
LONG = HALF | {"batch": 64, "seq": 1024}


def table() -> dict[str, dict[str, Any]]:
    """The rows by name: a vocabulary and the settings of a run, XLA's attention unless they say."""
    rows: dict[str, tuple[int, dict[str, Any]]] = {
        "9m": (2048, {}),
        "9m layer-wise": (VOCAB_SIZE, {"optimizer": "adamw", "layerwise": True}),
        "20m remat": (2048, MANY | {"remat": True}),
        "35m remat": (2048, MANY | HALF | {"remat": True}),
        "35m Q-GaLore": (2048, MANY | ALL_HALF | {"optimizer": "q_galore_adamw"}),
        "35m Q-GaLore layer-wise": (
            2048,
            MANY | ALL_HALF | {"optimizer": "q_galore_adamw", "layerwise": True},
        ),
        "60m micro-batches": (VOCAB_SIZE, MANY | {"accumulate": 8}),
        "60m long": (VOCAB_SIZE, LONG),
        "60m long layer-wise": (VOCAB_SIZE, LONG | {"layerwise": True}),
        "60m recipe": (VOCAB_SIZE, HALF | {"remat": True}),
        "60m ReLoRA": (VOCAB_SIZE, {"batch": 8, "optimizer": "relora"}),
        "60m ReLoRA in bfloat16": (VOCAB_SIZE, ALL_HALF | {"batch": 8, "optimizer": "relora"}),
        "60m lion": (VOCAB_SIZE, {"batch": 8, "remat": True, "optimizer": "galore_lion"}),
        **{
            f"60m {name}": (VOCAB_SIZE, {"batch": 8, "optimizer": name})
            for name in ("adamw_8bit", "galore_adamw_8bit", "fira_adamw", "apollo_adamw")
        },
        "130m layer-wise": (
            VOCAB_SIZE,
            MANY | HALF | {"optimizer": "galore_adamw_8bit", "layerwise": True},
        ),
        "130m micro-batches layer-wise": (
            VOCAB_SIZE,
            MANY | HALF | {"accumulate": 4, "layerwise": True},
        ),
        "35m micro-batches layer-wise": (
            2048,
            HALF | {"batch": 8, "accumulate": 2, "layerwise": True, "clip": 0.0},
        ),
        "35m micro-batches layer-wise, clipped": (
            2048,
            HALF | {"batch": 8, "accumulate": 2, "layerwise": True},
        ),
        "350m SGD": (VOCAB_SIZE, ALL_HALF | {"batch": 32, "remat": True, "optimizer": "sgd"}),
    }
    on_cpu = {
        "9m, CPU": (2048, {}),
        "9m layer-wise, CPU": (2048, {"optimizer": "adamw", "layerwise": True}),
        "9m in bfloat16, CPU": (2048, ALL_HALF),
        "20m remat, CPU": (2048, {"remat": True}),
    }
    return {
        name: {"device": device, "vocab_size": size, "settings": row_settings(name, settings)}
        for device, kind in ((DEVICE, rows), ("cpu", on_cpu))
        for name, (size, settings) in kind.items()
    }


def row_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a row, with a refresh that has no workspace of cuSOLVER's."""
    found: dict[str, Any] = {
        "preset": name.replace(",", "").split()[0],
        "attention": "xla",
    } | settings
    resolved = Config(**found).resolve()
    exact = resolved.optimizer in IN_GALORE and resolved.projector == "svd"
    return found | ({"projector": "power_iteration"} if exact else {})


def analyse(row: dict[str, Any]) -> dict[str, Any]:
    """XLA's figures of a row, in bytes."""
    device = device_here() if row["device"] == "cpu" else device_named(row["device"])
    config = Config(**row["settings"]).resolve()
    with check_needs_driver():
        compiled = compile_step(config, row["vocab_size"], device)
    return {"jax": jax.__version__, "xla": dataclasses.asdict(compiled)}


def ratios() -> Iterator[tuple[str, str, float]]:
    """Of each figure that is committed: what it is of, the kind of device, and its ratio.

    It is that of the bytes that a step needs beyond what stays, to those of the estimate.
    """

    def ratio(settings: dict[str, Any], vocab_size: int, peak: int) -> float:
        estimated = estimate(Config(**settings).resolve(), vocab_size)
        return (peak - estimated.arguments) / estimated.temporaries

    large = json.loads((RESULTS / "memory_7b.json").read_text())["rows"]
    small = json.loads(FIGURES.read_text())["rows"]
    for name, row in (large | small).items():
        size = row.get("vocab_size", VOCAB_SIZE)
        found = ratio(row["settings"], size, row["xla"]["peak"])
        kind = "cpu" if row["device"] == "cpu" else DEVICES[row["device"]].platform
        yield f"XLA's plan of {name}", kind, found
    for name, item in json.loads((RESULTS / "gpu" / "memory.json").read_text())["items"].items():
        peak = item["result"]["peak_bytes"]
        yield f"measured {name}", "cuda", ratio(large[name]["settings"], VOCAB_SIZE, peak)
    for name, item in json.loads((RESULTS / "gpu" / "train.json").read_text())["items"].items():
        if "result" in item:
            settings = measured_settings(name, item["result"]["batch"])
            peak = item["result"]["peak_bytes"]
            yield f"measured {name}", "cuda", ratio(settings, VOCAB_SIZE, peak)


def measured_settings(name: str, batch: int) -> dict[str, Any]:
    """The settings of a run of benchmarks/gpu/train.py, whose attention was cuDNN's."""
    preset, optimizer, *layerwise = name.replace(",", "").split()
    return {
        "preset": preset,
        "optimizer": optimizer,
        "layerwise": bool(layerwise),
        "projector": "power_iteration",
        "batch": batch,
        "dtype": "bfloat16",
        "clip": 0.0,
        "attention": "cudnn",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=FIGURES, help="JSON file to write")
    args = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "memory_error", "rows": {}}
    if args.out.exists():
        record = json.loads(args.out.read_text())
    rows = table()
    record["rows"] = {k: row for k, row in record["rows"].items() if is_of(rows.get(k), row)}
    for name, row in rows.items():
        if name not in record["rows"]:
            found = analyse(row)
            done = record["rows"] | {name: row | found}
            record["rows"] = {key: done[key] for key in rows if key in done}
            args.out.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{name}: compiled in {found['xla']['seconds']:.0f} s", flush=True)
    for name, _, ratio in sorted(ratios(), key=lambda found: found[-1]):
        print(f"{ratio:6.3f}  {name}")


if __name__ == "__main__":
    main()
