"""What of a step lies in the memory of the machine, and the bytes that it moves, from shapes."""

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax

from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.optimizers import make_optimizer, micro_batches_at_rank
from examples.flax_llama.step import initial_params


class OfLayers(NamedTuple):
    """Bytes of the layers, or of those of them that lie in the memory of the machine."""

    weights: int = 0
    projectors: int = 0
    moments: int = 0

    @property
    def state(self) -> int:
        return self.projectors + self.moments


def as_held(config: Config) -> Config:
    """The same without what parameters and state do not depend on, since a search changes it.

    But for whether GaLore averages micro-batches: its accumulator stays between updates.
    """
    several = micro_batches_at_rank(config) > 1
    return dataclasses.replace(
        config,
        **{"dtype": "float32", "attention": "xla", "remat": False, "clip_by": "global"},
        **{"batch": 1 + several, "accumulate": 1 + several, "layerwise": several},
        **{"inputs_dtype": None, "inputs_every": 1, "inputs_memory": "device", "offload": ()},
    )


@functools.cache
def of_layers(config: Config, vocab_size: int) -> OfLayers:
    """Bytes of the layers' weights and of their state, but for single figures of each layer."""
    shape = config.shape(vocab_size)
    params = jax.eval_shape(lambda: initial_params(config, shape))
    state = jax.eval_shape(make_optimizer(config).init, params)
    sizes = {"weights": nbytes(params["blocks"]), "projectors": 0, "moments": 0}
    for path, leaf in jax.tree.leaves_with_path(state):
        names = {getattr(key, "name", getattr(key, "key", None)) for key in path}
        if "blocks" in names and len(leaf.shape) > 1:
            sizes["projectors" if names & {"left", "right"} else "moments"] += nbytes(leaf)
    return OfLayers(**sizes)


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def offloaded(config: Config, vocab_size: int) -> OfLayers:
    """Bytes of the layers that lie in the memory of the machine.

    Raises:
      UsageError: the moments are to lie there, and there are none.
    """
    if not config.offload:
        return OfLayers()
    weights, projectors, moments = of_layers(as_held(config), vocab_size)
    weights *= "weights" in config.offload
    if "moments" not in config.offload:
        return OfLayers(weights)
    if not projectors + moments:
        raise UsageError(
            f"offload has moments, and optimizer={config.optimizer!r} keeps none of the layers "
            "here: leave it out."
        )
    return OfLayers(weights, projectors, moments)


def moved(config: Config, vocab_size: int, inputs: int) -> int:
    """Bytes that an update copies between the memories, both ways together.

    The state of each layer is read and written once. Weights are read by each micro-batch's forward
    pass and by the backward pass, and are written; to clip the global norm there is another one
    before. Of a group of layers of which one input is kept, all but the last are read once more.
    Each pass fetches one layer more than there are, ahead of the last one.

    Args:
      config: the resolved configuration.
      vocab_size: of the tokenizer.
      inputs: bytes of the layers' inputs in the memory of the machine, written and read once.
    """
    own = offloaded(config, vocab_size)
    backward = 2 if config.clip and config.clip_by == "global" else 1
    layers, every = config.layers, config.inputs_every
    fetched = (config.accumulate + backward) * (layers + 1)
    fetched += backward * (layers // every) * (every - 1)
    return 2 * own.state + own.weights * (fetched + layers) // layers + (1 + backward) * inputs


def machine_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
