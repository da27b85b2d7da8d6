"""What the compiled layer-wise step takes: no second copy of anything, one more forward pass."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from tests import layerwise_model as model

# Bytes and operations are decided before what this leaves out, which is of the machine code.


def compiled(layers, tx):
    def start():
        params = model.init(jnp.float32, layers=layers, d=64, f=96)
        up = {"up": params["blocks"]["up"]}
        params["blocks"] |= galore_optax.quantize_params(
            up, rank=32, weight_dimension_numbers={"up": {"kernel": STACKED}}
        )
        return params, tx.init(params)

    donated, tokens = jax.eval_shape(start), jax.ShapeDtypeStruct((4, 16), jnp.int32)
    step = jax.jit(model.layerwise(tx).step, donate_argnums=(0, 1))
    return step.lower(*donated, tokens, None).compile(), donated, tokens


STACKED = galore_optax.DimensionNumbers(1, 2)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.since(jax="0.7")  # whose compiler of CPUs copies less.
@pytest.mark.ci
@pytest.mark.both
def test_weights_and_state_are_updated_in_place():
    """Where both are in 8 bits, where the state is, where neither, and where there is no galore."""

    def galore(inner):
        numbers = {"weight_dimension_numbers": model.numbers}
        return galore_optax.galore(inner, rank=32, projector="power_iteration", **numbers)

    in_8_bit = galore(galore_optax.adamw_8bit(0.01, min_size=64 * 32 + 1))
    adamw = optax.adamw(0.01)
    tx = model.partition(up=in_8_bit, down=in_8_bit, mix=galore(adamw), rest=adamw)
    temporaries = {}
    for layers in (8, 32):
        step, donated, tokens = compiled(layers, tx)
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
