"""Configurations that are compiled: ten steps of each, and what they come to saved and restored."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from hypothesis import strategies as st

from benchmarks import fuzz_transformations, fuzz_trees
from benchmarks.fuzz_clear import Configuration, as_in_optax, check_clear
from benchmarks.fuzz_search import Wrong

STEPS = 10
# By how much an update may differ, relative to its norm, where it is not compiled as a whole: Adam
# divides what is nearly zero by what is nearly zero, so that rounding errors are seen.
TOLERANCE = {"float64": 1e-6, "float32": 2e-2, "bfloat16": 5e-2, "float16": 5e-2}


@st.composite
def cases(draw: st.DrawFn) -> Configuration:
    """Draws any tree and any transformation."""
    drawn = draw(fuzz_transformations.transformations())
    return Configuration(draw(fuzz_trees.trees()), **drawn)


@as_in_optax
def check(configuration: Configuration) -> str:
    """Raises `Wrong` unless a configuration is refused in one clear error, or trains."""
    with configuration.in_its_dtypes():
        params = configuration.make_params()
        try:
            tx = configuration.make_tx(params)
            state = tx.init(params)
            jax.eval_shape(tx.update, _gradients(params, 0), state, params)
        except Exception as error:
            check_clear(error)
            return "refused"
        check_types("a state of shapes alone", jax.eval_shape(tx.init, params), state)
        state = _ten_steps(tx, params, state)
        _check_saved(state, lambda: tx.init(params), params)
    return "trained"


def _gradients(params: Any, step: int) -> Any:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), params)


def check_types(name: str, one: Any, other: Any) -> None:
    """Raises `Wrong` unless two trees have the same structure, shapes and dtypes."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        raise Wrong(
            f"another type: {name} have the structure {jax.tree.structure(one)}, where "
            f"{jax.tree.structure(other)} is right"
        )
    for (path, x), y in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        if np.shape(x) != np.shape(y) or x.dtype != y.dtype:
            place = jax.tree_util.keystr(path)
            raise Wrong(
                f"another type: {name}{place} is {x.dtype}{x.shape}, where {y.dtype}{y.shape} is "
                "right"
            )


def check_finite(name: str, tree: Any) -> None:
    """Raises `Wrong` unless all numbers of a tree are finite."""
    for path, x in jax.tree.leaves_with_path(tree):
        if not np.all(np.isfinite(np.asarray(x, np.float64))):
            raise Wrong(f"{name}{jax.tree_util.keystr(path)} are not finite: {x}")


def _numbers(x: jax.Array) -> np.ndarray:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def _ten_steps(tx: optax.GradientTransformation, params: Any, state: Any) -> Any:
    """Raises `Wrong` unless ten steps are as they should be; returns the last state."""
    traced = 0

    # Donated, as in training: no array may stand in a state twice.
    @functools.partial(jax.jit, donate_argnums=1)
    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        nonlocal traced
        traced += 1
        return tx.update(gradients, state, params)

    for step in range(STEPS):
        gradients = _gradients(params, step)
        alone = tx.update(gradients, state, params)[0] if step in (0, 3) else None
        updates, new = update(gradients, state, params)
        check_types(f"updates of step {step}", updates, params)
        check_types(f"the state of step {step}", new, state)
        check_finite(f"updates of step {step}", updates)
        if alone is not None:
            _check_close(updates, alone, params, step)
        state, params = new, optax.apply_updates(params, updates)
    if traced > 1:
        raise Wrong(f"compiled {traced} times")
    return state


def _check_close(compiled: Any, alone: Any, params: Any, step: int) -> None:
    trees = (jax.tree.leaves(tree) for tree in (alone, params))
    for (path, one), other, weights in zip(
        jax.tree.leaves_with_path(compiled), *trees, strict=True
    ):
        tolerance, eps = TOLERANCE[one.dtype.name], float(jnp.finfo(one.dtype).eps)
        one, other, weights = (np.asarray(x, float) for x in (one, other, weights))
        # What the weights are too large to feel is no difference.
        allowed = tolerance * np.linalg.norm(other) + eps * np.linalg.norm(weights)
        if not np.linalg.norm(one - other) <= allowed:
            raise Wrong(
                f"{jax.tree_util.keystr(path)} of step {step} is {one} compiled, and {other} alone"
            )


def _check_saved(state: Any, fresh: Callable[[], Any], params: Any) -> None:
    """Raises `Wrong` unless a state comes back from files as it was.

    Not where that of ``optax.adam`` does not either, as of arrays without elements in Orbax.
    """
    for way in (_through_msgpack, _through_orbax):
        try:
            back = way(state, fresh())
        except Exception as error:
            if _adam_comes_back(way, params):
                said = f"{type(error).__name__}: {str(error)[:500]}"
                raise Wrong(f"not saved {way.__name__}: {said}") from error
            continue
        check_types(f"a state {way.__name__}", back, state)
        for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
            if not np.array_equal(_numbers(one), _numbers(other)):
                raise Wrong(f"other numbers {way.__name__}: {one}, were {other}")


def _adam_comes_back(way: Callable[[Any, Any], Any], params: Any) -> bool:
    state = optax.adam(1e-3).init(params)
    try:
        way(state, state)
    except Exception:
        return False
    return True


def _through_msgpack(state: Any, fresh: Any) -> Any:
    return flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))


def _through_orbax(state: Any, fresh: Any) -> Any:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
    with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory) / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(Path(directory) / "checkpoint", abstract)
