"""That states and parameters in codes survive the ways in which people save them."""

import dataclasses
import functools
import importlib
import pickle
import subprocess
import sys

import cloudpickle
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization, traverse_util

import galore_optax

PARAMS = {
    "kernel": np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32),
    "stack": np.random.default_rng(1).normal(size=(2, 24, 16)).astype(np.float32),
    "bias": np.zeros(24, np.float32),
}
NUMBERS = {
    "kernel": galore_optax.DimensionNumbers(0, 1),
    "stack": galore_optax.DimensionNumbers(1, 2),
    "bias": None,
}
OPTIONS = {"rank": 4, "update_proj_gap": 4, "weight_dimension_numbers": NUMBERS}
CODES = {"min_size": 0, "block_size": 16}
MAKE = {
    "8 bits": functools.partial(galore_optax.galore_adamw_8bit, **CODES),
    "Q-GaLore": functools.partial(galore_optax.q_galore_adamw, **CODES),
    "bfloat16": functools.partial(galore_optax.galore_adamw, moment_dtype="bfloat16"),
    "float8": functools.partial(galore_optax.galore_adamw, projector_dtype="float8_e4m3"),
    "sampled rows": functools.partial(
        galore_optax.galore_adamw, projector="sampled_rows", accumulation_steps=2
    ),
    "limiter": functools.partial(galore_optax.apollo_adamw),
}


@functools.cache
def saved(name):
    """A state in the middle of a gap, and one of the same kind to restore to; or parameters."""
    if name == "parameters":
        quantize = functools.partial(
            galore_optax.quantize_params, rank=4, weight_dimension_numbers=NUMBERS, block_size=8
        )
        return quantize(PARAMS), quantize(jax.tree.map(np.zeros_like, PARAMS))
    tx = MAKE[name](0.1, **OPTIONS)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    return state, tx.init(PARAMS)


def by_standard_checkpointer(state, like, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", jax.eval_shape(lambda: like))


def by_orbax_v1(state, like, path):
    v1 = getattr(ocp, "v1", None)
    if v1 is None:
        pytest.skip("this Orbax has no v1")
    v1.save(path / "state", state)
    return v1.load(path / "state", like)


def by_npz(state, like, path):
    """The arrays of a flattened state dict, as many trainers save them."""
    flat = traverse_util.flatten_dict(serialization.to_state_dict(state), sep="/")
    arrays = {name: np.asarray(x) for name, x in flat.items()}
    # NumPy's files do not know bfloat16.
    views = {n: x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for n, x in arrays.items()}
    np.savez(path / "state.npz", **views)
    loaded = {n: x.view(arrays[n].dtype) for n, x in np.load(path / "state.npz").items()}
    empty = {
        name: x
        for name, x in traverse_util.flatten_dict(
            serialization.to_state_dict(like), keep_empty_nodes=True, sep="/"
        ).items()
        if x is traverse_util.empty_node
    }
    return serialization.from_state_dict(
        like, traverse_util.unflatten_dict(loaded | empty, sep="/")
    )


WAYS = {
    "pickle": lambda state, like, path: pickle.loads(pickle.dumps(state)),
    "cloudpickle": lambda state, like, path: cloudpickle.loads(cloudpickle.dumps(state)),
    "numpy": lambda state, like, path: jax.tree.map(np.asarray, state),
    "msgpack": lambda state, like, path: serialization.from_bytes(
        like, serialization.to_bytes(state)
    ),
    "state dict": lambda state, like, path: serialization.from_state_dict(
        like, serialization.to_state_dict(state)
    ),
    "npz": by_npz,
    "Orbax": by_standard_checkpointer,
    "Orbax v1": by_orbax_v1,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*MAKE, "parameters"])
def test_what_is_saved_comes_back_bit_for_bit(name, way, tmp_path):
    state, like = saved(name)
    restored = WAYS[way](state, like, tmp_path)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_a_run_goes_on_from_what_flax_restored():
    tx = MAKE["Q-GaLore"](0.1, **OPTIONS)
    state, like = saved("Q-GaLore")
    restored = serialization.from_bytes(like, serialization.to_bytes(state))
    found, expected = (jax.jit(tx.update)(PARAMS, s, PARAMS) for s in (restored, state))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"scheme": "int4"}, "int4"),
        ({"block_size": 8}, "8]"),
        ({"dtype": jnp.dtype(jnp.bfloat16)}, "bfloat16"),
        ({"item_shape": (8, 48)}, "[8, 48]"),
    ],
    ids=["scheme", "block_size", "dtype", "item_shape"],
)
def test_codes_of_another_kind_are_not_restored(other, says):
    array = galore_optax.quantize(jnp.ones((16, 24)), block_size=12)
    data = serialization.to_bytes({"a": array})
    with pytest.raises(ValueError, match=r"holds a QuantizedArray of .* at ./a") as caught:
        serialization.from_bytes({"a": dataclasses.replace(array, **other)}, data)
    assert says in str(caught.value)


def exported():
    """An update of parameters and moments in codes, its arguments, and what it returns."""
    tx = MAKE["8 bits"](0.1, **OPTIONS)
    state, _ = saved("8 bits")
    params = galore_optax.quantize_params(PARAMS, rank=4, weight_dimension_numbers=NUMBERS)
    update, arguments = jax.jit(tx.update), (PARAMS, state, params)
    return jax.export.export(update)(*arguments), arguments, update(*arguments)


@pytest.mark.since(jax="0.7")  # which exports a factorization.
def test_an_exported_update_takes_and_returns_codes():
    update, arguments, expected = exported()
    jax.tree.map(np.testing.assert_array_equal, update.call(*arguments), expected)


def test_an_exported_update_can_be_saved():
    """Types of Optax are for its users to register, as for any of its optimizers."""
    pytest.importorskip("flatbuffers")
    for named in (optax.MaskedNode, optax.EmptyState, optax.ScaleByAdamState):
        jax.export.register_namedtuple_serialization(
            named, serialized_name=f"optax.{named.__name__}"
        )
    update, arguments, expected = exported()
    restored = jax.export.deserialize(bytearray(update.serialize()))
    jax.tree.map(np.testing.assert_array_equal, restored.call(*arguments), expected)


# The tests' own checks of types cannot be sent, so that this is a process without them.
SENT = """
import cloudpickle, jax.numpy as jnp, optax, galore_optax
params = {"kernel": jnp.eye(8, 12)}
for tx in (
    galore_optax.q_galore_adamw(0.1, rank=2),
    galore_optax.galore_muon(0.1, rank=2, accumulation_steps=None),
    galore_optax.chain(
        galore_optax.galore(optax.sgd(0.1), rank=galore_optax.RankByRole(2), accumulation_steps=2),
        optax.trace(0.9),
    ),
):
    updates, state = tx.update(params, tx.init(params), params)
    sent = cloudpickle.loads(cloudpickle.dumps(tx))
    assert jnp.array_equal(sent.update(params, sent.init(params), params)[0]["kernel"],
                           updates["kernel"])
"""


@pytest.mark.ci
def test_a_transformation_can_be_sent_to_another_process():
    """Also when it was used already, and remembers what it traced."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", SENT], check=True)


def test_the_library_may_be_imported_again():
    importlib.reload(galore_optax)
