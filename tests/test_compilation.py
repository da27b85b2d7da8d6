"""The program of an update does not grow with the layers that are stacked."""

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax


def program(layers, projector, stagger):
    """The compiled program of an update of a stack of so many layers, as text."""
    params = {
        "stack": jax.ShapeDtypeStruct((layers, 24, 32), jnp.float32),
        "norms": jax.ShapeDtypeStruct((layers, 24), jnp.float32),
    }
    tx = galore_optax.galore(
        optax.adamw(1e-3, weight_decay=0.1),
        rank=4,
        projector=projector,
        stagger=stagger,
        weight_dimension_numbers={"stack": galore_optax.DimensionNumbers(-2, -1), "norms": None},
    )
    state = jax.eval_shape(tx.init, params)
    return jax.jit(tx.update).lower(params, state, params).compile().as_text()


@pytest.mark.parametrize(
    ("projector", "stagger"), [("svd", False), ("power_iteration", True), ("orthonormal", False)]
)
def test_program_is_as_long_for_64_stacked_layers_as_for_4(projector, stagger):
    sizes = [len(program(layers, projector, stagger)) for layers in (4, 16, 64)]
    assert max(sizes[1:]) < 1.1 * sizes[0]
