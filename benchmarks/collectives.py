"""What devices send each other for one refresh and for one ordinary step, read from programs.

    python -m benchmarks.collectives --out benchmarks/results/collectives.json

Matrices of LLaMA-7B, rank 1024, float32, on eight devices, which are those of a host: nothing is
run, so that a laptop does. Bytes are those of a device's operands of all-reduce, all-gather and
the like. They are divided by the bytes of one projector, m r 4, or of one low-rank gradient,
r n 4. Optax's AdamW on matrices that lie so sends nothing.

A power iteration is one product with G G^T and as many passes of Cholesky-QR as `PASSES`, which is
one more than most need.
"""

import argparse
import dataclasses
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import galore_optax
from benchmarks import hlo
from benchmarks.gpu.record import write
from benchmarks.machine import machine
from benchmarks.shapes import PROJECTORS

RANK, PASSES = 1024, 3
WIDTH, HIDDEN = 4096, 11008
P = PartitionSpec
# The sizes of the mesh axes "x" and "y", the shape, and where it lies.
LAYOUTS: dict[str, tuple[tuple[int, int], tuple[int, ...], PartitionSpec]] = {
    "long axis": ((8, 1), (WIDTH, HIDDEN), P(None, "x")),
    "short axis": ((8, 1), (WIDTH, HIDDEN), P("x", None)),
    "both axes": ((2, 4), (WIDTH, HIDDEN), P("x", "y")),
    "square, both axes": ((2, 4), (WIDTH, WIDTH), P("x", "y")),
    "8 layers, divided": ((8, 1), (8, WIDTH, HIDDEN), P("x", None, None)),
    "2 layers, long axis": ((8, 1), (2, WIDTH, HIDDEN), P(None, None, "x")),
}
AXES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}


@dataclasses.dataclass(frozen=True)
class Row:
    """What is compiled.

    Attributes:
      projector: the projector.
      layout: a name in `LAYOUTS`.
      axes: "Auto" or "Explicit".
    """

    projector: str
    layout: str
    axes: str


def figures(row: Row, scale: int = 1) -> dict[str, Any]:
    """What devices send for a refresh of one leaf, and for an ordinary step of it.

    Args:
      row: what is compiled.
      scale: by how much sizes and rank are divided, for tests.

    Returns:
      What is moved, by kind of collective, and the bytes of operands over those of the leaf's
      projectors and of its low-rank gradients.
    """
    sizes, shape, spec = LAYOUTS[row.layout]
    *batch, m, n = shape
    m, n, rank = m // scale, n // scale, RANK // scale
    mesh = jax.make_mesh(sizes, ("x", "y"), axis_types=(AXES[row.axes],) * 2)
    lies = NamedSharding(mesh, spec)
    params = {"kernel": jax.ShapeDtypeStruct((*batch, m, n), jnp.float32, sharding=lies)}
    numbers = galore_optax.DimensionNumbers(-2, -1)
    tx = galore_optax.galore(
        optax.scale_by_adam(),
        rank=rank,
        projector=row.projector,
        weight_dimension_numbers=numbers,
    )
    places = galore_optax.state_shardings(tx, params)
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(tx.init, {"kernel": jax.ShapeDtypeStruct((*batch, m, n), jnp.float32)}),
            places,
        )

        def compiled(function: Any, out: Any) -> hlo.Traffic:
            out = out if row.axes == "Auto" else None
            lowered = jax.jit(function, out_shardings=out).lower(params, state)
            return hlo.collectives(lowered.compile().as_text() or "", [1, PASSES])

        found = {
            "refresh": compiled(lambda g, s: galore_optax.refresh(tx, g, s), places),
            "step": compiled(
                lambda g, s: tx.update(g, s, refresh=False), ({"kernel": lies}, places)
            ),
        }
    count = math.prod(batch)
    units = {"projector": 4 * count * m * rank, "low_rank": 4 * count * rank * n}
    result: dict[str, Any] = {}
    for name, traffic in found.items():
        total = sum(moved.operands for moved in traffic.values())
        result[name] = {
            "collectives": {kind: dataclasses.asdict(moved) for kind, moved in traffic.items()},
            **{f"per_{unit}": round(total / size, 4) for unit, size in units.items()},
        }
    return result


def rows() -> list[Row]:
    return [
        Row(projector, layout, axes)
        for axes in AXES
        for layout in LAYOUTS
        for projector in PROJECTORS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file")
    out = parser.parse_args().out
    if jax.device_count() < 8:
        raise SystemExit(
            "Eight devices are needed: set XLA_FLAGS=--xla_force_host_platform_device_count=8, "
            f"before Python starts; there are {jax.device_count()}."
        )
    found = []
    for row in rows():
        of_row = figures(row)
        refresh, step = of_row["refresh"], of_row["step"]
        found.append(dataclasses.asdict(row) | of_row)
        print(
            f"{row.axes:9}{row.layout:22}{row.projector:17}"
            f"refresh {refresh['per_projector']:7.2f} projectors, "
            f"step {step['per_low_rank']:6.2f} low-rank gradients",
            flush=True,
        )
        write({"rank": RANK, "passes": PASSES, "machine": machine(), "rows": found}, out)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
