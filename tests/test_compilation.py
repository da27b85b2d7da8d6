"""The program of an update does not grow with the layers that are stacked."""

import functools

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
    sizes = [len(program(layers, projector, stagger)) for layers in (4, 64)]
    assert sizes[1] < 1.1 * sizes[0]


@functools.cache
def of_a_leaf(projector):
    """Instructions that a second leaf adds to the compiled program of an update."""

    def instructions(leaves):
        params = {str(i): jax.ShapeDtypeStruct((24, 32), jnp.float32) for i in range(leaves)}
        tx = galore_optax.galore(optax.adamw(1e-3), rank=4, projector=projector)
        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(tx.update).lower(params, state, params).compile()
        return compiled.as_text().count(" = ")

    return instructions(2) - instructions(1)


@pytest.mark.parametrize(
    ("projector", "least", "most"),
    [("power_iteration", 1.2, 2.2), ("randomized_svd", 1.2, 3.5), ("orthonormal", 0.5, 1.7)],
)
def test_part_of_the_program_that_a_leaf_adds_is_short(projector, least, most):
    assert least < of_a_leaf(projector) / of_a_leaf("svd") < most
