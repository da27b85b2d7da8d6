"""The bytes that one step of an optimizer reads and writes on a GPU, counted without the GPU.

    python -m benchmarks.bytes --out benchmarks/results/bytes.json

What is compiled is an update and `optax.apply_updates`, with parameters and state donated, of the
matrices of LLaMA-1B's blocks in bfloat16, of which two stand for all. `kernels.py` says what counts
as read and written. Figures are per parameter. To compile for a GPU takes
`pip install 'jax[cuda13]'` and no GPU; without a GPU XLA does not try which kernels are fastest.

"Least" is what must be moved: parameters and moments read and written once, gradients, or of them
the rows that are selected, and bases read once; with products, also the low-rank gradient and what
becomes of it, each written and read once in bfloat16.
"""

import argparse
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

import galore_optax
from benchmarks.gpu.record import write
from benchmarks.kernels import Kernel, kernels
from benchmarks.memory_7b import versions
from benchmarks.shapes import RANKS, unstacked_llama
from examples.flax_llama.config import UsageError
from examples.flax_llama.devices import device_named
from examples.flax_llama.topology import check_needs_driver

MODEL, BLOCKS, DEVICE, DECAY = "1b", 2, "h100_80gb", 0.1
RANK = RANKS[MODEL]
RATE = 1e-3


def optax_adamw(mu: Any, nu: Any) -> optax.GradientTransformation:
    """Optax's AdamW whose moments have these dtypes."""
    inner = optax.adamw(RATE, weight_decay=DECAY, mu_dtype=mu)

    def init(params: Any) -> Any:
        return inner.init(jax.tree.map(lambda p: p.astype(nu), params))

    return optax.GradientTransformation(init, inner.update)


def in_galore(
    name: str, projector: str, decay: float = DECAY
) -> Callable[[], optax.GradientTransformation]:
    preset = getattr(galore_optax, name)
    return functools.partial(preset, RATE, rank=RANK, projector=projector, weight_decay=decay)


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "optax.adamw, float32": lambda: optax_adamw(jnp.float32, jnp.float32),
    "optax.adamw, mu float32, nu bfloat16": lambda: optax_adamw(jnp.float32, jnp.bfloat16),
    "optax.adamw, bfloat16": lambda: optax_adamw(jnp.bfloat16, jnp.bfloat16),
    "adamw_8bit": lambda: galore_optax.adamw_8bit(RATE, weight_decay=DECAY),
    "galore_adamw, rows": in_galore("galore_adamw", "rows"),
    "galore_adamw_8bit, rows": in_galore("galore_adamw_8bit", "rows"),
    "galore_adamw, power_iteration": in_galore("galore_adamw", "power_iteration"),
    "galore_adamw_8bit, power_iteration": in_galore("galore_adamw_8bit", "power_iteration"),
} | {
    f"{name}, {projector}, without decay": in_galore(name, projector, decay=0.0)
    for projector in ("rows", "power_iteration")
    for name in ("galore_adamw", "galore_adamw_8bit")
}


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One update and its application, and the shapes of what it takes."""

    tx: optax.GradientTransformation
    params: Any
    state: Any

    @classmethod
    def of(cls, make: Callable[[], optax.GradientTransformation], params: Any) -> "Step":
        tx = make()
        return cls(tx, params, jax.eval_shape(tx.init, params))

    def __call__(self, params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = self.tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def text(self, device: jax.Device) -> str:
        """The program that is compiled for a device."""
        place = SingleDeviceSharding(device)

        def put(tree: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
            )

        shapes = map(put, (self.params, self.state, self.params))
        return jax.jit(self, donate_argnums=(0, 1)).lower(*shapes).compile().as_text() or ""

    @property
    def least(self) -> int:
        """Bytes that must be moved; see above."""
        weights = gradients = nbytes(self.params)
        moments = [optax.tree.get(self.state, name) for name in ("mu", "nu")]
        total = 2 * weights + 2 * nbytes(moments)
        if not isinstance(self.state, galore_optax.GaloreState):
            return total + gradients
        subspace = self.state.subspace
        bases = [subspace.left, subspace.right]
        # A moment has the shape of the low-rank gradient.
        low_rank = sum(2 * x.size for x in jax.tree.leaves(moments[0], is_leaf=is_moment))
        if all(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(bases)):
            return total + nbytes(bases) + low_rank
        return total + nbytes(bases) + gradients + 4 * low_rank


def is_moment(x: Any) -> bool:
    return isinstance(x, galore_optax.QuantizedArray)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def blocks(count: int = BLOCKS) -> Any:
    """The shapes of so many blocks, in bfloat16."""
    layers = unstacked_llama(MODEL)["layers"][:count]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), layers)


def figures(step: Step, device: jax.Device) -> dict[str, Any]:
    """What is committed of one optimizer."""
    found = kernels(step.text(device))
    count = sum(x.size for x in jax.tree.leaves(step.params))

    def per_parameter(size: float) -> float:
        return round(size / count, 3)

    return {
        "bytes_per_parameter": per_parameter(sum(kernel.bytes for kernel in found)),
        "read": per_parameter(sum(kernel.read * kernel.times for kernel in found)),
        "written": per_parameter(sum(kernel.written * kernel.times for kernel in found)),
        "least": per_parameter(step.least),
        "kernels": sum(kernel.times for kernel in found),
        "copies": sum(k.times for k in found if k.operation == "copy"),
        "largest": {
            name: per_parameter(size) for name, size in by_kind(found) if size >= 0.01 * count
        },
    }


def by_kind(found: list[Kernel]) -> list[tuple[str, float]]:
    """The bytes of kernels whose names differ by a number only, the most first."""
    total: dict[str, float] = {}
    for kernel in found:
        name = re.sub(r"(\.\d+)+$", "", kernel.name)
        total[name] = total.get(name, 0) + kernel.bytes
    return sorted(total.items(), key=lambda item: -item[1])


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """The figures, for people."""
    found = Table(title=f"Bytes per parameter and step: LLaMA-{MODEL}, rank {RANK}, {DEVICE}")
    found.add_column("optimizer")
    for heading in ("moved", "read", "written", "least", "kernels", "copies"):
        found.add_column(heading, justify="right")
    for name, row in rows.items():
        sizes = (row[key] for key in ("bytes_per_parameter", "read", "written", "least"))
        counts = (row[key] for key in ("kernels", "copies"))
        found.add_row(name, *(f"{size:.2f}" for size in sizes), *map(str, counts))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=pathlib.Path, help="the JSON file")
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with check_needs_driver():
        try:
            device = device_named(DEVICE).mesh().devices.flat[0]
        except UsageError as error:
            parser.error(str(error))
        for name in args.optimizers:
            rows[name] = figures(Step.of(OPTIMIZERS[name], blocks()), device)
            print(f"{name}: {rows[name]['bytes_per_parameter']:.2f}", flush=True)
    Console().print(table(rows))
    if args.out:
        setting = {"model": MODEL, "blocks": BLOCKS, "rank": RANK, "device": DEVICE}
        setting |= {"weight_decay": DECAY, "dtype": "bfloat16"}
        compiler = versions(False) | {"jax": jax.__version__, "optax": optax.__version__}
        write({"benchmark": "bytes", **setting, "compiler": compiler, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
