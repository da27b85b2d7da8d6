"""Training that is interrupted and restored goes on as if it had not been."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import galore_optax

GAP, SAVED_AT, STEPS = 4, 6, 11  # refreshes at 0, 4 and, after the interruption, 8

SHAPES = {"embed": (20, 6), "kernel": (8, 12), "stacked": (2, 12, 8), "bias": (12,)}


def galore_adamw():
    return galore_optax.galore_adamw(
        0.01,
        rank=3,
        update_proj_gap=GAP,
        weight_decay=0.1,
        weight_dimension_numbers=galore_optax.DimensionNumbers(-2, -1),
    )


def gradient_at(step):
    rng = np.random.default_rng(step)
    return {name: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for name, s in SHAPES.items()}


def fresh(tx):
    rng = np.random.default_rng(100)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for name, s in SHAPES.items()}
    return {"params": params, "state": tx.init(params)}


def save_and_restore(directory, saved, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "checkpoint", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "checkpoint", target)


def test_restored_run_is_bit_identical_to_the_uninterrupted_one(tmp_path):
    tx = galore_adamw()

    @jax.jit
    def train_step(run, gradient):
        updates, state = tx.update(gradient, run["state"], run["params"])
        return {"params": optax.apply_updates(run["params"], updates), "state": state}

    uninterrupted = fresh(tx)
    for step in range(SAVED_AT):
        uninterrupted = train_step(uninterrupted, gradient_at(step))

    target = jax.eval_shape(lambda: fresh(tx))
    restored = save_and_restore(tmp_path, uninterrupted, target)
    chex.assert_trees_all_equal_structs(restored, uninterrupted)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, target)
    chex.assert_trees_all_equal(restored, uninterrupted)

    for step in range(SAVED_AT, STEPS):
        uninterrupted = train_step(uninterrupted, gradient_at(step))
        restored = train_step(restored, gradient_at(step))
        chex.assert_trees_all_equal(restored, uninterrupted)
    assert restored["state"].subspace.refreshes["kernel"] == 3
