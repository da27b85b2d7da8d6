"""What a rehearsal on the CPU cannot show, compiled for an H100 that need not be here.

    python -m benchmarks.gpu.compiled --out benchmarks/results/gpu/compiled.json

Needs `jax[cuda13]` (or cuda12), but no GPU and no driver; without it the command says that it is
skipped. It compiles the refresh of one matrix of LLaMA-7B by each projector that factorizes, and
the application's real update, ordinary and layer-wise, for one GPU with attention of XLA and of
cuDNN, and for several GPUs that share the batch. Figures are XLA's, of one device: bytes, the
collectives of a step, and the functions of libraries that stand in the program. Not in them is the
workspace that cuSOLVER and cuDNN ask for when they run.

Each row is made in a process of its own and written at once. Rows that the file has already, of the
same settings, are kept: the same command goes on where it was interrupted.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import galore_optax
from benchmarks import hlo
from benchmarks.gpu.record import commit, write
from examples.flax_llama.compile_step import lower
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import device_named
from examples.flax_llama.sharding import on, replicated
from examples.flax_llama.topology import check_needs_driver, cuda_extra, cuda_packages

DEVICE = "h100_80gb"
VOCAB_SIZE = 32_000
RANK, MATRICES = 1024, ((4096, 4096), (4096, 11008))
SHARED: dict[str, Any] = {
    **{"optimizer": "galore_adamw", "projector": "svd", "batch": 16, "seq": 256, "clip": 0.0},
    **{"dtype": "bfloat16", "param_dtype": "bfloat16"},
}
WAYS: dict[str, dict[str, Any]] = {"ordinary": {"remat": True}, "layer-wise": {"layerwise": True}}


PROJECTORS = ("svd", "eigh", "randomized_svd", "power_iteration")


def table() -> dict[str, dict[str, Any]]:
    """The rows by name: what is compiled, and with what arguments."""
    rows: dict[str, dict[str, Any]] = {}
    for projector in PROJECTORS:
        for m, n in MATRICES:
            given = {"projector": projector, "shape": [m, n], "rank": RANK}
            rows[f"refresh {m}x{n} {projector}"] = {"task": "refresh", "given": given}
    for devices, attentions in ((1, ("xla", "cudnn")), (2, ("cudnn",)), (4, ("cudnn",))):
        for preset in ("60m", "1b"):
            for way, how in WAYS.items():
                for attention in attentions:
                    settings = SHARED | how | {"preset": preset, "attention": attention}
                    given = {"settings": settings, "devices": devices}
                    name = f"step {preset} {way} {attention} {devices} GPU"
                    rows[name] = {"task": "step", "given": given}
    return rows


def refresh(projector: str, shape: list[int], rank: int) -> dict[str, Any]:
    """Figures of `galore_optax.refresh` of one bfloat16 gradient on one device."""
    tx = galore_optax.galore(optax.scale_by_adam(), rank=rank, projector=projector)
    grads = {"kernel": jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16)}
    state = jax.eval_shape(tx.init, grads)
    everywhere = replicated(mesh_of(1))
    again = jax.jit(
        lambda grads, state: galore_optax.refresh(tx, grads, state, grads), donate_argnums=1
    )
    return figures(lambda: again.lower(on(everywhere, grads), on(everywhere, state)))


def step(settings: dict[str, Any], devices: int, vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """Figures of the application's update, the batch divided among so many devices."""
    config = Config(**settings).resolve()
    mesh = mesh_of(devices)
    found = figures(lambda: lower(config, vocab_size, mesh))
    return {"parameters": config.shape(vocab_size).num_params, **found}


def mesh_of(devices: int) -> Mesh:
    return device_named(DEVICE).mesh(devices)


def figures(lowered: Callable[[], jax.stages.Lowered]) -> dict[str, Any]:
    """XLA's figures of one device, bytes, of a program that is lowered and compiled here."""
    start = time.perf_counter()
    compiled = lowered().compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    names = {"argument_size": "arguments", "temp_size": "temporaries", "peak_memory": "peak"}
    sizes = {name: getattr(memory, f"{field}_in_bytes") for field, name in names.items()}
    moved = {kind: dataclasses.asdict(found) for kind, found in hlo.collectives(text).items()}
    return {**sizes, "collectives": moved, "calls": hlo.custom_calls(text), "seconds": seconds}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {"refresh": refresh, "step": step}


def one(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row; `error` and its traceback where there are none."""
    try:
        with check_needs_driver():
            return TASKS[row["task"]](**row["given"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return {"error": reason.splitlines()[0], "traceback": traceback.format_exc()}


def apart(row: dict[str, Any], limit: float) -> dict[str, Any]:
    """What `one` returns in a process of its own, which a fault of the compiler may end.

    Args:
      row: of the table.
      limit: seconds after which it is stopped.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.compiled", "--one", json.dumps(row)]
    # The devices of this machine are of no use to it, and it takes no memory of theirs.
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} seconds"}
    if done.returncode:
        log = done.stderr.strip().splitlines()[-20:]
        return {"error": f"exit status {done.returncode}", "log": log}
    return json.loads(done.stdout.splitlines()[-1])


def origin() -> dict[str, Any]:
    """What a row is made with: the commit, Python, and the packages of JAX and CUDA."""
    names = sorted({found.metadata["Name"].lower() for found in importlib.metadata.distributions()})
    relevant = [name for name in names if name.startswith(("jax", "nvidia-"))]
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in relevant},
    }


def described(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:36} {row['error']}"
    sizes = "".join(f"{row[key] / 2**30:8.2f}" for key in ("arguments", "temporaries", "peak"))
    notes = [
        f"{moved['count']} {kind}, {moved['bytes'] / 2**20:.1f} MiB"
        for kind, moved in row["collectives"].items()
    ]
    notes += [f"{count} {target}" for target, count in row["calls"].items()]
    return f"{name:36}{sizes}  {'; '.join(notes)}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", help="to do, again if they are done; else all missing")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a row")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write, and to go on with")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return
    rows = table()
    unknown = set(args.rows or ()) - rows.keys()
    if unknown:
        parser.error(f"--rows: {', '.join(sorted(unknown))}: expected some of {', '.join(rows)}")
    if cuda_extra() is None:
        print(f"skipped: to compile for a GPU needs pip install {cuda_packages()}")
        return
    try:
        with check_needs_driver():
            mesh_of(1)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    done: dict[str, Any] = {}
    if args.out and args.out.exists():
        written = json.loads(args.out.read_text())["rows"]
        done = {
            k: row for k, row in written.items() if k in rows and rows[k].items() <= row.items()
        }
    wanted = args.rows or [name for name in rows if name not in done]
    print(f"{'GiB of one device':36}{'stays':>8}{'temp.':>8}{'peak':>8}")
    for name in wanted:
        done[name] = rows[name] | apart(rows[name], args.limit) | origin()
        print(described(name, done[name]), flush=True)
        if args.out:
            ordered = {name: done[name] for name in rows if name in done}
            write({"benchmark": "gpu/compiled", "device": DEVICE, "rows": ordered}, args.out)
    if any("error" in done[name] for name in wanted):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
