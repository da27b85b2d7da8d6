"""Time and operations of a layer-wise step beside those of an ordinary one, in one run.

    python -m benchmarks.layerwise_step --preset 9m --steps 20

Both keep nothing of a layer but its input, and compute the rest again in the backward pass
(`remat` in the ordinary step): the layer-wise one differs in where it updates the weights. The two
take turns on the same batches, so that a drift of the machine's speed hits both alike, and their
ratio is the median over neighbours. Steps on which GaLore chooses its subspaces again are left out.

Operations are counted twice: from the shapes of the products; and by XLA, which counts the body of
a loop once, on a model of one layer, where that is all but most chunks of the head.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
from typing import Any

import jax
from flax import nnx

from benchmarks.machine import machine
from benchmarks.train_step import timed
from examples.flax_llama.config import Config, LlamaConfig
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.sharding import make_mesh
from examples.flax_llama.step import State, initial_params, make_update, put_batch
from examples.flax_llama.train import any_batch, open_dataset

WAYS: dict[str, dict[str, Any]] = {"ordinary": {"remat": True}, "layer-wise": {"layerwise": True}}


@dataclasses.dataclass(frozen=True)
class Update:
    """A compiled update and the state that it starts from."""

    compiled: jax.stages.Compiled
    state: State

    @property
    def flops(self) -> float:
        cost = self.compiled.cost_analysis()
        assert cost is not None
        return cost["flops"]


def compile_update(config: Config, vocab_size: int) -> Update:
    shape, optimizer, mesh = config.shape(vocab_size), make_optimizer(config), make_mesh()
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    params = initial_params(config, shape)
    state = State(params, jax.jit(optimizer.init)(params))
    example = put_batch(any_batch(config), config.accumulate, mesh)
    update = make_update(config, graphdef, optimizer, mesh)
    return Update(update.lower(state, example).compile(), state)


def operations(shape: LlamaConfig) -> dict[str, int]:
    """Of the products for one token, forward and backward, a layer's forward pass twice."""
    kernels = 4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
    attention = 4 * shape.max_seq * shape.hidden
    layer, head = 2 * kernels + attention, 2 * shape.hidden * shape.vocab_size
    ordinary = shape.layers * 4 * layer + 3 * head
    # Of its products, the layer-wise step's backward pass keeps those with kernels only, and it
    # computes the logits twice.
    return {"ordinary": ordinary, "layer-wise": ordinary + shape.layers * attention + head}


def measure(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Times in milliseconds, and ratios of layer-wise to ordinary, of one optimizer."""
    settings = {**settings, "clip": 0.0, "update_proj_gap": steps + 1}
    configs = {way: Config(**settings, **own).resolve() for way, own in WAYS.items()}
    config = configs["ordinary"]
    dataset, mesh = open_dataset(config), make_mesh()
    vocab_size = config.vocab_size or dataset.tokenizer.vocab_size
    updates = {way: compile_update(own, vocab_size) for way, own in configs.items()}
    states = {way: update.state for way, update in updates.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(steps + 1):
        batch = put_batch(next(dataset.train), config.accumulate, mesh)
        # The one that goes first changes, for what it may leave in the caches.
        for way in list(WAYS)[:: -1 if step % 2 else 1]:
            (states[way], _), ms = timed(updates[way].compiled, states[way], batch)
            if step:  # the first one chooses subspaces.
                times[way].append(ms)
    one_layer = {
        way: compile_update(dataclasses.replace(own, layers=1), vocab_size).flops
        for way, own in configs.items()
    }
    counted = operations(config.shape(vocab_size))
    pairs = zip(times["layer-wise"], times["ordinary"], strict=True)
    return {
        "ms": {way: statistics.median(own) for way, own in times.items()},
        "ratio": statistics.median(a / b for a, b in pairs),
        "operations_per_token": counted,
        "operations_ratio": counted["layer-wise"] / counted["ordinary"],
        "xla_flops_of_one_layer": one_layer,
        "xla_flops_ratio": one_layer["layer-wise"] / one_layer["ordinary"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="9m")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of the model")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--seq", type=int, default=256, help="tokens of each")
    parser.add_argument(
        "--optimizers", nargs="+", default=["adamw", "galore_adamw", "q_galore_adamw"]
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    common = {name: getattr(args, name) for name in ("preset", "vocab_size", "batch", "seq")}
    results = {}
    print(f"{'':16}{'ordinary ms':>12}{'layer-wise':>12}{'ratio':>8}{'operations':>12}{'XLA':>8}")
    for name in args.optimizers:
        row = results[name] = measure(common | {"optimizer": name}, args.steps)
        print(
            f"{name:16}{row['ms']['ordinary']:12.1f}{row['ms']['layer-wise']:12.1f}"
            f"{row['ratio']:8.3f}{row['operations_ratio']:12.3f}{row['xla_flops_ratio']:8.3f}",
            flush=True,
        )
    if args.out:
        record = {"benchmark": "layerwise_step", "machine": machine(), **common}
        record |= {"steps": args.steps, "optimizers": results}
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
