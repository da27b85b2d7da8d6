"""What the compiled layer-wise step takes: no second copy of anything, one more forward pass."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from tests import layerwise_model as model

# Bytes and operations are decided before what this leaves out, which is of the machine code.


def compiled(layers, tx, int8_weights=False, **arguments):
    params = model.init(jnp.float32, layers=layers, d=64, f=96)
    if int8_weights:
        params = galore_optax.quantize_params(
            params, rank=32, weight_dimension_numbers=model.numbers
        )
    training = model.layerwise(tx, **arguments)
    state = training.init(params)
    tokens = jnp.zeros((4, 16), jnp.int32)
    step = jax.jit(training.step, donate_argnums=(0, 1))
    return step.lower(params, state, tokens, None).compile(), (params, state), tokens


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("low_bit", [False, True])
def test_weights_and_state_are_updated_in_place(low_bit):
    inner = galore_optax.adamw_8bit(0.01, min_size=64 * 32 + 1) if low_bit else optax.adamw(0.01)
    tx = galore_optax.galore(
        inner, rank=32, projector="power_iteration", weight_dimension_numbers=model.numbers
    )
    temporaries = {}
    for layers in (8, 32):
        step, donated, tokens = compiled(layers, tx, int8_weights=low_bit)
        memory = step.memory_analysis()
        assert memory.alias_size_in_bytes == nbytes(donated)
        temporaries[layers] = memory.temp_size_in_bytes
    block_input = tokens.size * 64 * 4
    # Of each further layer nothing is kept but its input.
    slope = (temporaries[32] - temporaries[8]) / 24
    assert slope <= 1.05 * block_input, (temporaries, block_input)


def test_it_costs_one_more_forward_pass_of_the_blocks_and_no_more():
    """With one layer, since XLA counts the body of a loop once."""
    params = model.init(jnp.float32, layers=1, d=64, f=256)
    tx, tokens = optax.sgd(0.1), jnp.zeros((8, 32), jnp.int32)
    counts = []
    for step in (model.layerwise(tx).step, model.ordinary(tx)):
        lowered = jax.jit(step).lower(params, tx.init(params), tokens, None)
        counts.append(lowered.compile().cost_analysis()["flops"])
    assert counts[0] <= 1.02 * counts[1]
