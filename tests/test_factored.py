"""Second moments of rows and columns: against NumPy, in the presets, on meshes, in boxes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax

B2, EPS, ROOT = 0.9, 1e-3, 1e-4
SHAPES = {
    "embedding": (20, 6),
    "head": {"kernel": (6, 20), "bias": (20,)},
    "layers": {"kernel": (6, 12), "scale": (6,)},
}


def tree(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=is_shape)


def by_hand(gradients, threshold=None):
    """The updates of one array, in float64, a step and an item of a stack after the other."""
    gradients = [np.asarray(g, np.float64) for g in gradients]
    if gradients[0].ndim > 2:
        items = zip(*gradients, strict=True)
        return [
            np.stack(step) for step in zip(*(by_hand(x, threshold) for x in items), strict=True)
        ]
    rows = columns = entries = 0.0
    updates = []
    for t, g in enumerate(gradients, 1):
        if g.ndim == 2:
            rows = B2 * rows + (1 - B2) * (g**2).mean(1)
            columns = B2 * columns + (1 - B2) * (g**2).mean(0)
            v = np.outer(rows, columns) / rows.mean()
        else:
            v = entries = B2 * entries + (1 - B2) * g**2
        update = g / (np.sqrt(v / (1 - B2**t) + ROOT) + EPS)
        if threshold is not None:
            update /= max(1, np.sqrt((update**2).mean()) / threshold)
        updates.append(update)
    return updates


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_updates_are_those_computed_by_hand(threshold):
    shapes = {"matrix": (5, 7), "stack": (2, 3, 4), "vector": (6,)}
    steps = [tree(shapes, seed) for seed in range(3)]
    tx = galore_optax.scale_by_factored_adam(B2, EPS, ROOT, threshold)
    state, found = tx.init(steps[0]), []
    for gradients in steps:
        updates, state = jax.jit(tx.update)(gradients, state)
        found.append(updates)
    for name in shapes:
        expected = by_hand([step[name] for step in steps], threshold)
        np.testing.assert_allclose([step[name] for step in found], expected, rtol=2e-5)


def test_a_second_moment_of_rank_one_is_that_of_adam():
    rng = np.random.default_rng(0)
    sizes = np.outer(rng.uniform(1, 5, 8), rng.uniform(1, 5, 6)).astype(np.float32)
    ours, adam = galore_optax.scale_by_factored_adam(0.9), optax.scale_by_adam(0.0, 0.9)
    of_ours, of_adam = ours.init(sizes), adam.init(sizes)
    for scale in (1.0, -3.0, 0.5):
        found, of_ours = ours.update(scale * sizes, of_ours)
        expected, of_adam = adam.update(scale * sizes, of_adam)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_what_is_narrow_is_averaged_in_float32(dtype):
    gradients = jax.tree.map(lambda x: (1e-4 * x).astype(dtype), tree())
    tx = galore_optax.scale_by_factored_adam()
    state = tx.init(gradients)
    chex.assert_trees_all_equal_dtypes(state.v_row, jax.tree.map(np.float32, state.v_row))
    found, _ = tx.update(gradients, state)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
    expected, _ = tx.update(wide, state)
    chex.assert_trees_all_equal(found, jax.tree.map(lambda x: x.astype(dtype), expected))


@pytest.mark.parametrize(
    ("size", "eps", "expected"), [(0.0, 1e-8, 0.0), (1e-25, 0.0, 1.0), (1e30, 1e-8, 0.0)]
)
def test_very_small_and_very_large_gradients_give_finite_updates(size, eps, expected):
    """As in Adam, where squares overflow, nothing moves; roots are multiplied, not squares."""
    tx = galore_optax.scale_by_factored_adam(0.5, eps)
    gradient = jnp.full((4, 6), size)
    if size == 1e-25:  # whose square float32 cannot hold, but a mean over a few of 1e-15 it can.
        gradient = jnp.full((4, 6), 1e-15)
    update, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(update, np.full((4, 6), expected), rtol=1e-5)


PRESETS = {
    "galore_adamw": {},
    "galore_adamw_8bit": {"min_size": 16, "block_size": 16},
    "tracked_adamw": {},
    "apollo_adamw": {"nesterov": True},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_tables_of_their_own_and_change_nothing_else(name):
    params = tree()
    make = functools.partial(
        getattr(galore_optax, name), 1e-2, rank=2, weight_decay=0.1, **PRESETS[name]
    )
    alone = optax.chain(
        galore_optax.scale_by_factored_adam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(1e-2),
    )
    optimizers = [make(tables="factored"), make(), alone]
    states = [tx.init(params) for tx in optimizers]

    @jax.jit
    def step(gradients, states):
        pairs = zip(optimizers, states, strict=True)
        return [tx.update(gradients, state, params) for tx, state in pairs]

    for seed in (1, 2):
        (found, plain, of_tables), states = zip(*step(tree(seed=seed), states), strict=True)
    tables = {"embedding", "kernel"}
    for keys, update in jax.tree_util.tree_leaves_with_path(found):
        is_table = keys[0].key in ("embedding", "head") and keys[-1].key in tables
        expected, other = (of_tables, plain) if is_table else (plain, of_tables)
        of_leaf = dict(jax.tree_util.tree_leaves_with_path(expected))[keys]
        np.testing.assert_allclose(update, of_leaf, rtol=1e-6)
        assert not np.allclose(update, dict(jax.tree_util.tree_leaves_with_path(other))[keys])
    report = galore_optax.memory_report(optimizers[0], params)
    moments = {group.path: group.moments for group in report.groups}
    assert moments["embedding"] == moments["head/kernel"] == 4 * (20 + 6)


def test_eight_bit_adamw_has_them_too():
    few = {"min_size": 16, "block_size": 16}
    txs = (galore_optax.adamw_8bit(1e-2, tables=tables, **few) for tables in ("factored", "adam"))
    reports = (galore_optax.memory_report(tx, tree()) for tx in txs)
    found, plain = ({group.path: group.moments for group in r.groups} for r in reports)
    assert found["embedding"] == found["head/kernel"] == 4 * (20 + 6)
    assert plain["embedding"] > 2 * 20 * 6
    for path in ("head/bias", "layers/kernel", "layers/scale"):
        assert found[path] == plain[path]


def test_micro_batches_at_rank_r_are_averaged_for_tables_too():
    params, one, other = tree(), tree(seed=1), tree(seed=2)
    make = functools.partial(galore_optax.galore_adamw, 1e-2, rank=2, tables="factored")
    several, whole = make(accumulation_steps=2), make()
    state = several.init(params)
    for gradients in (one, other):
        found, state = several.update(gradients, state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    # The subspace of the first step is chosen of the first micro-batch.
    expected, _ = whole.update(mean, whole.init(params), params)
    for name in ("embedding", "head"):
        chex.assert_trees_all_close(found[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"exclude": None}, galore_optax.CombinationError, "embedding is projected. Name it in ex"),
        ({"tables": "rows"}, ValueError, "tables must be one of 'adam', 'factored'; got 'rows'"),
    ],
)
def test_what_cannot_be_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        galore_optax.galore_adamw(1e-2, rank=2, **{"tables": "factored", **arguments}).init(tree())


def test_a_state_of_another_transformation_is_refused():
    tx = galore_optax.scale_by_factored_adam()
    with pytest.raises(TypeError, match=r"needs the FactoredAdamState .* got a ScaleByAdamState"):
        tx.update(tree(), optax.scale_by_adam().init(tree()))


@pytest.mark.since(jax="0.7")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_it_lies_as_its_table_does(kind):
    mesh = jax.make_mesh((1, 1), ("x", "y"), (kind, kind))
    place = NamedSharding(mesh, P("x", "y"))
    params = {"embedding": jax.device_put(jnp.ones((8, 6)), place)}
    tx = galore_optax.scale_by_factored_adam()
    with jax.set_mesh(mesh):
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state)
        specs = galore_optax.state_partition_specs(tx, params, {"embedding": P("x", "y")})
    assert specs.v_row["embedding"] == P("x")
    assert specs.v_col["embedding"] == P("y")
    if kind is AxisType.Explicit:
        for of_state in (state, after):
            assert jax.typeof(of_state.v_row["embedding"]).sharding.spec == P("x")
            assert jax.typeof(of_state.v_col["embedding"]).sharding.spec == P("y")
        assert jax.typeof(updates["embedding"]).sharding.spec == P("x", "y")


@pytest.mark.since(jax="0.7")
def test_it_takes_the_names_of_axes_along_in_boxes():
    names = ("vocab", "embed")
    init = nnx.with_partitioning(nnx.initializers.ones, names)
    tx = galore_optax.scale_by_factored_adam()
    with jax.set_mesh(jax.make_mesh((1, 1), names, (AxisType.Auto, AxisType.Auto))):
        params = nnx.state(nnx.Embed(8, 6, embedding_init=init, rngs=nnx.Rngs(0)), nnx.Param)
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
    for of_state in (state, after):
        rows, columns = of_state.v_row["embedding"], of_state.v_col["embedding"]
        assert (rows.get_metadata("out_sharding"), columns.get_metadata("out_sharding")) == (
            ("vocab",),
            ("embed",),
        )
        chex.assert_shape((rows[...], columns[...]), [(8,), (6,)])
    chex.assert_trees_all_equal_structs(updates, params)
    chex.assert_trees_all_equal_structs(after, state)
