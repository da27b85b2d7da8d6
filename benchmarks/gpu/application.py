"""The application's model and update, ready to be compiled and run on this machine's device."""

from typing import NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from examples.flax_llama.config import Config, LlamaConfig
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.sharding import make_mesh, replicated
from examples.flax_llama.step import State, initial_params, make_update


class Application(NamedTuple):
    """A run before its first update."""

    shape: LlamaConfig
    mesh: Mesh
    # Function of a state, whose memory it takes, and a batch.
    update: jax.stages.Wrapped
    state: State


def begin(config: Config, vocab_size: int) -> Application:
    """Makes what a resolved configuration trains, for a tokenizer with so many tokens."""
    shape, optimizer, mesh = config.shape(vocab_size), make_optimizer(config), make_mesh()
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))

    def initial_state() -> State:
        params = initial_params(config, shape)
        return State(params, optimizer.init(params))

    state = jax.jit(initial_state, out_shardings=replicated(mesh))()
    update = make_update(config, graphdef, optimizer, mesh)
    return Application(shape, mesh, update, jax.block_until_ready(state))
