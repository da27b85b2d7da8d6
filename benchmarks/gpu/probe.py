"""Prints, as JSON, what device JAX computes on: in a process of its own, which lets go of it.

python -m benchmarks.gpu.probe
"""

import json
import os
import subprocess
from typing import Any

import jax

from benchmarks.machine import machine

# What JAX's allocator takes of a GPU's memory unless told otherwise.
FRACTION = 0.75


def driver() -> dict[str, Any]:
    """The first GPU's driver and compute capability, as `nvidia-smi` says; empty without it."""
    query = ["nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    version, capability = found.stdout.splitlines()[0].split(", ")
    return {"driver": version, "compute_capability": capability}


def main() -> None:
    found: dict[str, Any] = machine()
    if found["platform"] == "gpu":
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", FRACTION))
        found |= {"memory": int(limit / fraction)} | driver()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
