"""Time of choosing the bases of LLaMA-7B, projector by projector, and what they capture.

One matrix of each shape is refreshed, as `galore_optax.refresh` does, three times beside the first;
times their number that makes a refresh of the model, since matrices are refreshed one after the
other. What a basis captures of a gradient is measured on matrices with the spectrum of real
gradients, and on the gradients of a model that the application has trained here.

JAX' algorithms for the SVD are called by themselves, too. `gesvd` is what `svd` calls. The polar
decomposition, by which it was, is not called by any projector: it stays here as the evidence
against it, and to show when a version of cuSOLVER has it right, since it is much faster.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from benchmarks import gradients
from benchmarks.gpu.stage import Item, Size, Unavailable
from benchmarks.gpu.timing import one_by_one
from benchmarks.shapes import RANKS, matrices

# The random ones, of which the gaussian is not orthonormal, have no energy to speak of.
PROJECTORS = ("power_iteration", "svd", "randomized_svd", "eigh", "rows", "dct", "orthonormal")
ALGORITHMS = {"polar": "POLAR", "gesvd": "QR"}
REPEATS = 3
# For a trained model and its gradients: the most, which a call of nine minutes has room for; and
# what has to be left for it to begin, since nothing is kept of it if it is cut off.
MOST_SECONDS, LEAST_SECONDS = 300, 150


@dataclasses.dataclass(frozen=True)
class Model:
    """The matrices of a model: how many there are of each shape, and the rank."""

    name: str
    rank: int
    counts: dict[tuple[int, int], int]


TINY = Model("7b", 8, {(32, 32): 4, (32, 88): 3})


def items(size: Size) -> list[Item]:
    """Of the trained model first, then projectors at the shapes of 7B, JAX' algorithms last."""
    model = size.of(Model("7b", RANKS["7b"], matrices("7b")), TINY)
    gradients_of = functools.partial(trained, size)
    found = [Item("gradients of a trained model", gradients_of, MOST_SECONDS)]
    for name in PROJECTORS:
        measure = functools.partial(refresh_of, model, name)
        found.append(Item(f"{model.name} {name}", lambda _, measure=measure: measure(), 180))
    for name in ALGORITHMS:
        measure = functools.partial(factorize, model, name)
        found.append(
            Item(f"{model.name} {name} by itself", lambda _, measure=measure: measure(), 240)
        )
    return found


def describe(name: str, result: dict[str, Any]) -> str:
    if "projectors" in result:
        energies = (f"{n} {row['mean']:.4f}" for n, row in result["projectors"].items())
        return "of the energy that svd captures: " + ", ".join(energies)
    if "model_s" not in result:
        return "not to be had here: " + result["unavailable"]
    energies = (f"{row['captured']:.4f}" for row in result["shapes"].values())
    return f"all matrices in {result['model_s']:.2f} s; captured {', '.join(energies)}"


@functools.cache
def example(m: int, n: int) -> tuple[jax.Array, jax.Array]:
    """Two noisy gradients (m, n) of one signal, whose singular values fall as those of real ones.

    They fall as 1 / i, which is near what benchmarks/results/projectors_cpu.json has of real ones.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    basis = lambda key, size: jnp.linalg.qr(jax.random.normal(key, (size, m)))[0]  # noqa: E731
    values = 1 / jnp.arange(1, m + 1)
    signal = jnp.matmul(basis(keys[0], m) * values, basis(keys[1], n).T, precision="highest")
    noise = jnp.std(signal)
    first, second = (signal + 0.5 * noise * jax.random.normal(key, (m, n)) for key in keys[2:])
    return first, second


def refresh_of(model: Model, projector: str) -> dict[str, Any]:
    """Seconds of a refresh of one matrix of each shape, and of all of the model."""
    shapes: dict[str, Any] = {}
    for (m, n), count in model.counts.items():
        before, now = example(m, n)
        tx = galore_optax.galore(
            optax.scale(1.0), rank=model.rank, projector=projector, diagnostics=True
        )
        state = tx.init(now)
        refresh = jax.jit(lambda s, g: galore_optax.refresh(tx, g, s), donate_argnums=0)  # noqa: B023
        start = time.perf_counter()
        compiled = refresh.lower(state, now).compile()
        compile_s = time.perf_counter() - start
        # From no basis; then from that of another gradient, as later refreshes do.
        state, first = one_by_one(lambda s: compiled(s, before), state, 1)  # noqa: B023
        state, later = one_by_one(lambda s: compiled(s, now), state, REPEATS)  # noqa: B023
        _, state = jax.jit(functools.partial(tx.update, refresh=False))(now, state)
        shapes[f"{m}x{n}"] = {
            "count": count,
            "compile_s": compile_s,
            "first_s": first[0],
            "seconds": later,
            "captured": float(galore_optax.metrics(state)["captured_energy"]),
        }
    return {"rank": model.rank, "shapes": shapes, "model_s": _of_model(shapes)}


def _of_model(shapes: dict[str, dict[str, Any]]) -> float:
    return sum(row["count"] * statistics.median(row["seconds"]) for row in shapes.values())


def factorize(model: Model, name: str) -> dict[str, Any]:
    """Likewise of one of JAX' algorithms for the SVD, called by itself."""
    algorithm = jax.lax.linalg.SvdAlgorithm[ALGORITHMS[name]]
    factors = jax.jit(lambda x: jax.lax.linalg.svd(x, full_matrices=False, algorithm=algorithm)[0])
    shapes: dict[str, Any] = {}
    for (m, n), count in model.counts.items():
        _, now = example(m, n)
        try:
            start = time.perf_counter()
            basis = jax.block_until_ready(factors(now))[:, : model.rank]
        except (NotImplementedError, ValueError) as error:
            return {"unavailable": str(error).splitlines()[0][:200]}
        first_s = time.perf_counter() - start
        # The first call compiled; a slow algorithm is not called more often than it has to be.
        _, seconds = one_by_one(lambda _: factors(now), None, REPEATS if first_s < 20 else 1)  # noqa: B023
        kept = jnp.matmul(basis.T, now, precision="highest")
        shapes[f"{m}x{n}"] = {
            "count": count,
            "first_s": first_s,
            "seconds": seconds,
            "captured": float(jnp.sum(kept**2) / jnp.sum(now**2)),
        }
    return {"rank": model.rank, "shapes": shapes, "model_s": _of_model(shapes)}


def trained(size: Size, deadline: float) -> dict[str, Any]:
    """Energy that each projector captures of a trained model's gradients, over that of svd.

    Bases are of the gradient of one batch, refreshed on that of another one at the same weights.

    Raises:
      Unavailable: there is too little time.
    """
    if deadline - time.time() < size.of(LEAST_SECONDS, 0):
        left = deadline - time.time()
        raise Unavailable(f"{left:.0f} seconds are too few to train and to compile")
    preset, steps = size.of("60m", "9m"), size.of(300, 2)
    tiny = {"hidden": 32, "intermediate": 88, "layers": 1, "heads": 2, "tokenizer": "bytes"}
    tiny |= {"rank": 8, "batch": 2, "eval_tokens": 100}
    # Refreshed by products alone, which take less time than the demo's SVDs.
    before, now = gradients.of_trained_model(
        preset,
        steps,
        batches=2,
        rows=size.of(16, 2),
        seq=size.of(256, 32),
        projector="power_iteration",
        **size.of({}, tiny),
    )
    rank = min(x.shape[-2] for x in now.values()) // 4
    energies: dict[str, np.ndarray] = {}
    for name in PROJECTORS:
        tx = galore_optax.galore(
            optax.scale(1.0),
            rank=rank,
            projector=name,
            exclude=None,
            diagnostics=True,
            weight_dimension_numbers=galore_optax.DimensionNumbers(1, 2),
        )

        @jax.jit
        def both(before: Any, now: Any, tx=tx) -> Any:
            state = galore_optax.refresh(tx, before, tx.init(now))
            state = galore_optax.refresh(tx, now, state)
            return galore_optax.metrics(tx.update(now, state, refresh=False)[1])

        # Under one name, so that stacks of one shape share a program.
        by_leaf = [both({"stack": before[k]}, {"stack": now[k]}) for k in now]
        energies[name] = np.array([float(found["captured_energy"]) for found in by_leaf])
    relative = {name: energy / energies["svd"] for name, energy in energies.items()}
    return {
        "preset": preset,
        "updates": steps,
        "rank": rank,
        "svd_captures": float(energies["svd"].mean()),
        # Means over the layers of each kind of matrix; mean and least of these.
        "projectors": {
            name: {"mean": float(x.mean()), "least": float(x.min())} for name, x in relative.items()
        },
    }
