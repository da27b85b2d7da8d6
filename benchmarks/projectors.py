"""Time and captured energy of each projector, beside exact SVD, in one run.

    python -m benchmarks.projectors --train 9m --models 60m 130m 350m --out OUT

Real gradients are those of the demo's LLaMA after 200 updates, projected at a quarter of the short
side. For each matrix, the energy that a basis captures, |P^T G|^2, is divided by that of exact SVD.
"power_iteration" starts from a basis of the gradient of another batch at the same weights, as a
later refresh does, and "power_iteration, first" from none. Gaussian bases are not orthonormal:
their energy is that of the subspace, of its projection Q Q^T G.

Times are of synthetic matrices of the shapes of larger models, at their published ranks, with the
mean spectrum of the real gradients (stretched to the larger size) and random singular vectors.
The projectors take turns, so that a drift of the machine's speed hits all alike; speed-ups are
medians over neighbours. Exact SVD is computed in every turn until it has taken `--svd-seconds`
for that shape, and its last time counts from there on. The refresh of a whole model is the time of
one matrix of each shape times their number, as matrices are refreshed one after the other.
|P^T P - I| is the largest entry.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gradients
from benchmarks.machine import machine
from benchmarks.shapes import PROJECTORS, RANKS, matrices
from galore_optax._basis import Side
from galore_optax._numbered import Cosines, Rows
from galore_optax.projectors import resolve

WARM, COLD = "power_iteration", "power_iteration, first"
NAMES = (*PROJECTORS, COLD)
Choose = Callable[[jax.Array, jax.Array], jax.Array]


@functools.cache
def chooser(name: str, rank: int) -> Choose:
    """Compiled (matrix, old basis) -> what a projector chooses."""
    projector = resolve(name.split(",")[0], {})

    @jax.jit
    def choose(matrix, old, first):
        if projector.basis in (Rows, Cosines):
            old = jnp.arange(rank)  # of directions
        return projector(matrix, rank, key=jax.random.key(1), old=old, first=first)

    # An argument, since a constant would let the compiler leave out half of the projector.
    first = jnp.asarray(name != WARM)
    return lambda matrix, old: choose(matrix, old, first)


def basis_of(name: str, rank: int, matrix: jax.Array, old: jax.Array) -> jax.Array:
    """The (m, r) basis that a projector chooses."""
    side = Side(0, matrix.shape[0], rank, matrix.dtype)
    kind = resolve(name.split(",")[0], {}).basis
    chosen = chooser(name, rank)(matrix, old)
    basis = kind.chosen(chosen, kind.initial(side), side, jnp.asarray(True))
    return basis.up(jnp.eye(rank, dtype=matrix.dtype), side, matrix.dtype)


@jax.jit
def captured(matrix: jax.Array, basis: jax.Array) -> jax.Array:
    """Energy of the matrix in the span of a basis, which need not be orthonormal."""
    low_rank = jnp.matmul(basis.T, matrix, precision="highest")
    gram = jnp.matmul(basis.T, basis, precision="highest")
    return jnp.sum(low_rank * jnp.linalg.solve(gram, low_rank))


@jax.jit
def orthogonality_error(basis: jax.Array) -> jax.Array:
    """Largest entry of |P^T P - I|."""
    gram = jnp.matmul(basis.T, basis, precision="highest")
    return jnp.max(jnp.abs(gram - jnp.eye(basis.shape[1])))


def on_real_gradients(
    before: dict[str, np.ndarray], now: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """By projector: mean and least energy relative to SVD's over all matrices, and errors."""
    energies: dict[str, list[float]] = {name: [] for name in NAMES}
    errors: dict[str, list[float]] = {name: [] for name in NAMES}
    kept = []
    for path, stack in now.items():
        for old, new in zip(before[path], stack, strict=True):
            rank = new.shape[0] // 4
            # By the largest entry, as galore() does.
            old, new = (jnp.asarray(x / np.abs(x).max()) for x in (old, new))
            start = basis_of("svd", rank, old, jnp.eye(old.shape[0], rank))
            exact = float(captured(new, basis_of("svd", rank, new, start)))
            kept.append(exact / float(jnp.sum(new**2)))
            for name in NAMES:
                basis = basis_of(name, rank, new, start)
                energies[name].append(float(captured(new, basis)) / exact)
                errors[name].append(float(orthogonality_error(basis)))
    return {
        name: {
            "energy_mean": statistics.mean(energies[name]),
            "energy_min": min(energies[name]),
            "orthogonality_error": max(errors[name]),
        }
        for name in NAMES
    } | {"svd": {**_exact(kept), "orthogonality_error": max(errors["svd"])}}


def _exact(kept: list[float]) -> dict[str, float]:
    """Of exact SVD, whose energy relative to itself is one; `kept` is relative to the gradient."""
    return {"energy_mean": 1.0, "energy_min": 1.0, "of_gradient": statistics.mean(kept)}


def on_shape(
    m: int, n: int, rank: int, spectrum: np.ndarray, repeats: int, svd_seconds: float
) -> dict[str, dict[str, float]]:
    """By projector: milliseconds of a basis, speed-up, energy relative to the optimum, error."""
    matrix, values = gradients.synthetic(m, n, spectrum)
    matrix = jnp.asarray(matrix / np.abs(matrix).max())
    # Scaled like the matrix; an (m, r) basis captures at most the leading r squares.
    optimum = np.sum(values[:rank] ** 2) / np.sum(values**2) * float(jnp.sum(matrix**2))
    # The basis of another batch: near the leading vectors, and no closer than real ones are.
    noise = jnp.std(matrix) * jax.random.normal(jax.random.key(2), matrix.shape)
    old = basis_of("randomized_svd", rank, matrix + noise, jnp.eye(m, rank))
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    bases = {
        name: basis_of(name, rank, matrix, old) for name in NAMES if name != "svd"
    }  # Compiled now.
    for _ in range(repeats):
        if sum(times["svd"]) < 1e3 * svd_seconds:
            elapsed = _milliseconds(chooser("svd", rank), matrix, old)
        else:
            elapsed = times["svd"][-1]
        times["svd"].append(elapsed)
        for name in bases:
            times[name].append(_milliseconds(chooser(name, rank), matrix, old))
    bases["svd"] = basis_of("svd", rank, matrix, old)
    return {
        name: {
            "ms": statistics.median(times[name]),
            "speedup": statistics.median(
                a / b for a, b in zip(times["svd"], times[name], strict=True)
            ),
            "energy": float(captured(matrix, bases[name])) / optimum,
            "orthogonality_error": float(orthogonality_error(bases[name])),
        }
        for name in NAMES
    }


def _milliseconds(function: Choose, matrix: jax.Array, old: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(matrix, old))
    return 1e3 * (time.perf_counter() - start)


def whole_model(model: str, shapes: dict[tuple[int, int], dict[str, Any]]) -> dict[str, Any]:
    """By projector: seconds of the refresh of all matrices of a model, and the speed-up."""
    seconds = {
        name: sum(
            count * shapes[shape][name]["ms"] / 1e3 for shape, count in matrices(model).items()
        )
        for name in NAMES
    }
    # From the paired speed-ups, each weighted by the time that its shape takes.
    speedup = {
        name: seconds["svd"]
        / sum(
            count * shapes[shape]["svd"]["ms"] / 1e3 / shapes[shape][name]["speedup"]
            for shape, count in matrices(model).items()
        )
        for name in NAMES
    }
    return {name: {"seconds": seconds[name], "speedup": speedup[name]} for name in NAMES}


def measure(
    trained: list[str],
    models: list[str],
    train_steps: int = 200,
    repeats: int = 5,
    svd_seconds: float = 10.0,
) -> dict[str, Any]:
    """Runs everything, prints it as it comes, and returns what is written as JSON."""
    real, spectrum = {}, np.ones(2)
    for preset in trained:
        before, now = gradients.of_trained_model(preset, train_steps, batches=2)
        spectrum = gradients.mean_spectrum(now)
        real[preset] = {
            "projectors": on_real_gradients(before, now),
            "spectrum": spectrum.tolist(),
        }
        print(f"\n{real_table(preset, real[preset]['projectors'], train_steps)}", flush=True)
    synthetic = {}
    for model in models:
        shapes = {
            shape: on_shape(*shape, RANKS[model], spectrum, repeats, svd_seconds)
            for shape in matrices(model)
        }
        synthetic[model] = {
            "rank": RANKS[model],
            "shapes": {f"{m}x{n}": rows for (m, n), rows in shapes.items()},
            "refresh": whole_model(model, shapes),
        }
        print(f"\n{synthetic_table(model, synthetic[model])}", flush=True)
    return {
        "benchmark": "projectors",
        "machine": machine(),
        "train_steps": train_steps,
        "real": real,
        "synthetic": synthetic,
    }


def real_table(preset: str, rows: dict[str, Any], steps: int) -> str:
    lines = [
        f"Real gradients of LLaMA-{preset} after {steps} updates, rank a quarter; exact SVD "
        f"captures {rows['svd']['of_gradient']:.3f} of them",
        f"{'':24}{'energy / svd':>13}{'least':>8}{'|PtP - I|':>11}",
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:24}{row['energy_mean']:13.4f}{row['energy_min']:8.4f}"
            f"{row['orthogonality_error']:11.1e}"
        )
    return "\n".join(lines)


def synthetic_table(model: str, result: dict[str, Any]) -> str:
    lines = [
        f"LLaMA-{model}, rank {result['rank']}: synthetic matrices with that spectrum",
        f"{'':24}"
        + "".join(f"{shape + ', ms':>16}{'energy':>8}" for shape in result["shapes"])
        + f"{'all matrices, s':>17}{'x faster':>10}{'|PtP - I|':>11}",
    ]
    for name in NAMES:
        shapes = [rows[name] for rows in result["shapes"].values()]
        lines.append(
            f"{name:24}"
            + "".join(f"{row['ms']:16.1f}{row['energy']:8.4f}" for row in shapes)
            + f"{result['refresh'][name]['seconds']:17.2f}"
            + f"{result['refresh'][name]['speedup']:10.1f}"
            + f"{max(row['orthogonality_error'] for row in shapes):11.1e}"
        )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: pathlib.Path) -> None:
    """Captured energy of real gradients over the time of a refresh of a whole model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, synthetic = list(result["synthetic"].items())[-1]
    figure, axes = plt.subplots(figsize=(8.5, 4.5), layout="constrained")
    for i, name in enumerate(NAMES):
        axes.plot([], [], "s", color=f"C{i}", label=name)
    for marker, (preset, real) in zip("ov^D", result["real"].items(), strict=False):
        axes.plot([], [], marker, color="gray", label=f"gradients of {preset}")
        for i, name in enumerate(NAMES):
            x = synthetic["refresh"][name]["seconds"]
            y = 100 * real["projectors"][name]["energy_mean"]
            axes.plot(x, y, marker, color=f"C{i}", markersize=8)
    axes.axhline(95, color="gray", linewidth=0.8, linestyle="--")
    axes.axvline(synthetic["refresh"]["svd"]["seconds"] / 20, color="gray", linewidth=0.8, ls="--")
    device = result["machine"]["device"]
    axes.set(
        xscale="log",
        xlabel=f"refresh of all matrices of LLaMA-{model}, seconds on {device}",
        ylabel="captured energy, % of exact SVD's",
        title="Dashed: 95 % of the energy, a twentieth of the time",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="+", default=["9m"], help="models for real gradients")
    parser.add_argument("--train-steps", type=int, default=200)
    parser.add_argument("--models", nargs="+", choices=RANKS, default=["60m", "130m", "350m"])
    parser.add_argument("--repeats", type=int, default=5, help="of each projector and shape")
    parser.add_argument("--svd-seconds", type=float, default=10.0, help="for SVDs of a shape")
    parser.add_argument("--out", type=pathlib.Path, help="path without suffix, of JSON and picture")
    args = parser.parse_args()
    result = measure(args.train, args.models, args.train_steps, args.repeats, args.svd_seconds)
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        plot(result, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
