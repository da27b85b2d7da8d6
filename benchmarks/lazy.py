"""How similar successive subspaces of real gradients are, and what the threshold of lazy does.

    python -m benchmarks.lazy --out benchmarks/results/lazy.json

Trains the demo's LLaMA. With refreshes every T updates, for several T, it notes the similarity of
the new and the old subspace at each of them, as `galore_optax.Lazy` measures it, by kind of matrix
and by layer. At the weights that it ends with it notes the similarity of the subspaces of different
batches, of one and of many times their size: of nothing but their noise. Then it trains with lazy
refreshes at several thresholds, and compares the number of refreshes and the validation loss with
those of refreshes every T updates, at the same tokens.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import galore_optax
from benchmarks.gradients import short_side_first
from benchmarks.machine import machine
from examples.flax_llama.config import Config
from examples.flax_llama.demo import GALORE
from examples.flax_llama.evaluate import make_evaluate
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.sharding import make_mesh, replicated
from examples.flax_llama.step import (
    State,
    initial_params,
    make_gradients,
    make_update,
    put_batch,
)
from examples.flax_llama.train import open_dataset

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclasses.dataclass
class Run:
    """What a training came to.

    Attributes:
      valid_loss: after the last update.
      refreshes: of all matrices and updates together.
      similarities: one (layers,) for each update with a refresh but the first, by kind of matrix;
        NaN for the layers that were not refreshed.
      of_noise: by number of batches, the median similarity of the subspaces of two gradients that
        are means over so many different ones, at the last weights.
    """

    valid_loss: float
    refreshes: int
    similarities: dict[str, list[np.ndarray]]
    of_noise: dict[int, float]


def train(config: Config, refresh: str | galore_optax.Lazy, means: Sequence[int] = ()) -> Run:
    """Trains as `examples.flax_llama.train` does, and looks at the subspaces after every update."""
    config = dataclasses.replace(config.resolve(), refresh=refresh)
    dataset, mesh = open_dataset(config), make_mesh()
    shape = config.shape(dataset.tokenizer.vocab_size)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    optimizer = make_optimizer(config)
    params = initial_params(config, shape)
    # Placed as updates leave it, so that the first one is not compiled apart.
    state = jax.device_put(State(params, jax.jit(optimizer.init)(params)), replicated(mesh))
    update = make_update(config, graphdef, optimizer, mesh)
    found: dict[str, list[np.ndarray]] = {}
    counts: dict[str, np.ndarray] = {}
    for _ in range(config.steps):
        state, _ = update(state, put_batch(next(dataset.train), config.accumulate, mesh))
        for kind, similar, refreshes in subspaces(state, config.rank):
            new = (refreshes > counts.get(kind, refreshes)) & (refreshes > 1)
            if np.any(new):
                found.setdefault(kind, []).append(np.where(new, similar, np.nan))
            counts[kind] = refreshes
    evaluate = make_evaluate(graphdef, mesh)
    loss = evaluate(state.params, *dataset.valid.batches(config.batch)).loss
    gradients = jax.jit(make_gradients(graphdef, mesh))

    def mean_gradient(batches: int) -> Any:
        found = [next(dataset.train) for _ in range(batches)]
        together = jax.tree.map(lambda *x: np.concatenate(x), *found)
        return gradients(state.params, put_batch(together, batches, mesh))[1]["blocks"]

    of_noise = {n: between(mean_gradient(n), mean_gradient(n), config.rank) for n in means}
    dataset.train.close()
    return Run(loss, int(sum(x.sum() for x in counts.values())), found, of_noise)


def between(one: Any, other: Any, rank: int) -> float:
    """The median similarity of the subspaces of the stacked matrices of two trees."""
    found = []
    for pair in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if pair[0].ndim == 3:
            matrices = [short_side_first(np.asarray(x)) for x in pair]
            a, b = (np.linalg.svd(x)[0][..., :rank] for x in matrices)
            found.append(similarity(np.sum((a.mT @ b) ** 2, (-2, -1)) / rank, rank, a.shape[-2]))
    return round(float(np.median(found)), 3)


def similarity(overlap: np.ndarray, rank: int, size: int) -> np.ndarray:
    """An overlap corrected for chance, as `galore_optax.Lazy` has it."""
    return (overlap - rank / size) / (1 - rank / size)


def subspaces(state: State, rank: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Of each stack its kind, and by layer the last similarity and the number of refreshes."""

    def is_galore(x: Any) -> bool:
        return isinstance(x, galore_optax.GaloreState)

    nodes = jax.tree.leaves(state.optimizer, is_leaf=is_galore)
    (subspace,) = [node.subspace for node in nodes if is_galore(node)]
    leaves = jax.tree.leaves_with_path(subspace.overlap)
    counts = jax.tree.leaves(subspace.refreshes)
    size = min(state.params["blocks"]["mlp"]["up"]["kernel"].shape[1:])  # of all short sides
    return [
        (path[-2].key, similarity(np.asarray(overlap), rank, size), np.asarray(count))
        for (path, overlap), count in zip(leaves, counts, strict=True)
    ]


def distribution(similarities: list[np.ndarray]) -> dict[str, Any]:
    """Quantiles over refreshes and layers, and the medians of each layer."""
    stacked = np.stack(similarities)
    return {
        "quantiles": np.round(np.nanquantile(stacked, QUANTILES), 3).tolist(),
        "median_by_layer": np.round(np.nanmedian(stacked, axis=0), 3).tolist(),
        "median_of_last_quarter": round(
            float(np.nanmedian(stacked[-max(1, len(stacked) // 4) :])), 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gaps", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.6])
    parser.add_argument("--means", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--lazy-gap", type=int, default=10, help="T of the runs with thresholds")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each threshold")
    parser.add_argument("--steps", type=int, default=GALORE.steps)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    base = dataclasses.replace(GALORE, steps=args.steps, eval_every=args.steps, quiet=True)

    def run(refresh: str | galore_optax.Lazy, means: Sequence[int] = (), **changes: Any) -> Run:
        start = time.perf_counter()
        result = train(dataclasses.replace(base, **changes), refresh, means)
        what = ", ".join(f"{name} {value}" for name, value in changes.items())
        seconds = time.perf_counter() - start
        print(f"{what}, {refresh}: {result.valid_loss:.4f} ({seconds:.0f} s)", flush=True)
        return result

    similarities, of_noise = {}, {}
    for optimizer, gap in [
        *(("galore_adamw", gap) for gap in args.gaps),
        ("q_galore_adamw", args.lazy_gap),
    ]:
        means = () if of_noise else args.means
        result = run("periodic", means, optimizer=optimizer, update_proj_gap=gap)
        of_noise |= result.of_noise
        rows = {kind: distribution(values) for kind, values in result.similarities.items()}
        rows["all"] = distribution([x for xs in result.similarities.values() for x in xs])
        similarities[f"{optimizer}, T={gap}"] = rows

    thresholds = {}
    for threshold in (None, *args.thresholds):
        refresh = "periodic" if threshold is None else galore_optax.Lazy(threshold)
        of_seeds = [
            run(refresh, update_proj_gap=args.lazy_gap, seed=seed) for seed in range(args.seeds)
        ]
        thresholds["periodic" if threshold is None else f"{threshold:g}"] = {
            "refreshes": [x.refreshes for x in of_seeds],
            "valid_loss": [round(x.valid_loss, 4) for x in of_seeds],
        }

    settings = {name: getattr(base, name) for name in ("preset", "steps", "batch", "seq", "lr")}
    settings |= {"lazy_gap": args.lazy_gap, "quantiles": QUANTILES}
    result = {"benchmark": "lazy", "machine": machine(), "settings": settings}
    result |= {"similarity": similarities, "of_noise": of_noise, "thresholds": thresholds}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Both parts of the result as text."""
    quantiles = [f"{100 * q:.0f} %" for q in result["settings"]["quantiles"]]
    lines = [f"{'similarity':32}" + "".join(f"{q:>7}" for q in quantiles) + "   by layer"]
    for name, rows in result["similarity"].items():
        for kind, row in rows.items():
            values = "".join(f"{x:7.2f}" for x in row["quantiles"])
            layers = " ".join(f"{x:.2f}" for x in row["median_by_layer"])
            lines.append(f"{name + ', ' + kind:32}{values}   {layers}")
    lines += ["", "of the means of so many batches at the same weights"]
    lines += [f"{batches:>10}{value:7.2f}" for batches, value in result["of_noise"].items()]
    lines += ["", f"{'threshold':10}{'refreshes':>11}{'validation loss':>17}"]
    for name, row in result["thresholds"].items():
        refreshes, loss = (float(np.mean(row[x])) for x in ("refreshes", "valid_loss"))
        lines.append(f"{name:10}{refreshes:11.0f}{loss:17.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
