"""Projectors in few bits, quantized parameters, and all of it together: Q-GaLore."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from programs import programs

import galore_optax

NUMBERS = {"stack": galore_optax.DimensionNumbers(1, 2), "w": galore_optax.DimensionNumbers(0, 1)}
NUMBERS |= {"embed": None, "scale": None}
RANK = 16


def tree(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"stack": (3, 64, 96), "w": (128, 64), "embed": (32, 64), "scale": (64,)}
    return {name: (0.1 * rng.normal(size=s)).astype(np.float32) for name, s in shapes.items()}


def make(inner=None, **arguments):
    inner = inner or optax.adamw(1e-2, weight_decay=0.1)
    return galore_optax.galore(
        inner, **{"rank": RANK, "weight_dimension_numbers": NUMBERS, **arguments}
    )


@pytest.mark.parametrize(
    ("dtype", "most"),
    [("float32", 4.0), ("bfloat16", 2.0), ("int8", 1.04), ("int4", 0.54), ("float8_e4m3", 1.02)],
)
def test_bytes_of_a_projector(dtype, most):
    params = tree()
    state = jax.jit(make(projector_dtype=dtype).init)(params)
    for basis in (state.subspace.left["stack"], state.subspace.right["w"]):
        assert basis.nbytes / basis.size <= most
    report = galore_optax.memory_report(make(projector_dtype=dtype), params)
    assert report.projectors == sum(
        x.nbytes for x in jax.tree.leaves((state.subspace.left, state.subspace.right))
    )


@functools.cache
def state_in_float32():
    """After an update with the gradients of tree(1)."""
    tx = make(optax.identity())
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[1])(
        tree(1), tree(0)
    )


@pytest.mark.parametrize(
    ("dtype", "off"),
    [
        ("bfloat16", 2**-8),
        ("int8", 1 / 254),
        ("int4", 1 / 14),
        ("float8_e4m3", 1 / 16),
        ("float8_e5m2", 1 / 8),
    ],
)
def test_update_goes_through_the_basis_as_it_is_kept(dtype, off):
    params, grads = tree(0), tree(1)
    tx = make(optax.identity(), scale=1.0, projector_dtype=dtype)
    first = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params))
    updates, state = first(grads, params)
    kept = state.subspace.right["w"]
    ideal = np.asarray(state_in_float32().subspace.right["w"])
    p = np.asarray(kept if dtype == "bfloat16" else kept.dequantize(), np.float64)
    assert 0 < np.abs(p - ideal).max() <= off * (ideal.max() - ideal.min())
    expected = np.asarray(grads["w"], np.float64) @ p @ p.T
    np.testing.assert_allclose(updates["w"], expected, atol=1e-5)


@pytest.mark.parametrize("projector", ["svd", "power_iteration"])
def test_int4_projectors_are_refreshed_by_layer_and_stable(projector):
    tx = make(optax.scale_by_adam(), projector_dtype="int4", update_proj_gap=2, projector=projector)
    params = tree()
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    types = jax.tree.map(jax.typeof, state)
    for i in range(4):
        before = state
        _, state = update(tree(i), state, params)
        assert jax.tree.map(jax.typeof, state) == types
        same = jax.tree.map(
            lambda a, b: bool(np.all(np.asarray(a == b))), before.subspace.left, state.subspace.left
        )
        assert same["stack"].codes == (i % 2 == 1)
    assert update._cache_size() == 1
    np.testing.assert_array_equal(state.subspace.refreshes["stack"], [2, 2, 2])


@pytest.mark.parametrize(
    "make_inner",
    [
        lambda: optax.adamw(1e-2, weight_decay=0.1),
        lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    ],
    ids=["adamw", "adafactor"],
)
@pytest.mark.filterwarnings("ignore:the inner transformation of galore uses the parameters")
def test_quantized_parameters_are_updated_as_what_they_stand_for(make_inner):
    tx = make(make_inner())
    quantized = galore_optax.quantize_params(tree(), rank=RANK, weight_dimension_numbers=NUMBERS)
    assert isinstance(quantized["stack"], galore_optax.QuantizedArray)
    assert isinstance(quantized["w"], galore_optax.QuantizedArray)
    dense = galore_optax.dequantize_params(quantized)
    state, dense_state = jax.jit(lambda a, b: (tx.init(a), tx.init(b)))(quantized, dense)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, dense_state)
    update = jax.jit(tx.update)
    for i in range(3):
        grads = tree(i + 1)
        updates, state = update(grads, state, quantized)
        expected, dense_state = update(grads, dense_state, dense)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(state, dense_state, rtol=1e-4, atol=1e-6)


def test_init_and_report_take_shapes_of_quantized_parameters():
    tx = galore_optax.q_galore_adamw(1e-3, rank=RANK, weight_dimension_numbers=NUMBERS)

    def quantize(params):
        return galore_optax.quantize_params(params, rank=RANK, weight_dimension_numbers=NUMBERS)

    abstract = jax.eval_shape(quantize, tree())
    quantized = jax.jit(quantize)(tree())
    state = jax.jit(tx.init)(quantized)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, abstract), state)
    report = galore_optax.memory_report(tx, abstract)
    assert report.parameters == sum(x.nbytes for x in jax.tree.leaves(quantized))
    assert report.state == sum(x.nbytes for x in jax.tree.leaves(state))
    assert {group.path for group in report.groups} == {"stack", "w", "embed", "scale"}


def test_preset_is_what_it_stands_for():
    options = {"rank": RANK, "weight_dimension_numbers": NUMBERS}
    preset = galore_optax.q_galore_adamw(1e-2, weight_decay=0.1, min_size=64, **options)
    spelled = galore_optax.galore(
        galore_optax.low_bit(optax.adamw(1e-2, weight_decay=0.1), min_size=64),
        projector_dtype="int4",
        refresh="lazy",
        **options,
    )
    assert programs(preset, tree()) == programs(spelled, tree())
    state = jax.eval_shape(preset.init, tree())
    assert state.subspace.left["stack"].scheme == "int4"
    assert optax.tree.get(state, "mu")["w"].scheme == "signed"
    assert state.subspace.similarities["w"].shape == (5,)


def regression():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(256, 64)), jnp.float32)
    target = jnp.tanh(x @ jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.float32))
    params = {
        "hidden": jnp.asarray(rng.normal(size=(64, 128)) / 8, jnp.float32),
        "out": jnp.asarray(rng.normal(size=(128, 64)) / 12, jnp.float32),
    }

    def loss(params):
        weights = galore_optax.dequantize_params(params)
        return jnp.mean((jnp.tanh(x @ weights["hidden"]) @ weights["out"] - target) ** 2)

    return params, loss


def trainer(tx, loss):
    """A function that trains for some steps, with one compiled program of a step."""

    @jax.jit
    def step(params, state, number):
        value, grads = galore_optax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        key = jax.random.fold_in(jax.random.key(0), number)
        return galore_optax.apply_updates(params, updates, key), state, value

    def train(params, state, numbers):
        for number in numbers:
            params, state, value = step(params, state, number)
        return params, state, value

    return train


@pytest.fixture(scope="module")
def q_galore():
    """Its parameters, their state, the loss of an update, and the trainer."""
    params, loss = regression()
    tx = galore_optax.q_galore_adamw(1e-2, min_size=64, rank=32, update_proj_gap=20)
    params = galore_optax.quantize_params(params, rank=32)
    return params, jax.jit(tx.init)(params), trainer(tx, loss)


def test_q_galore_with_int8_weights_trains_as_well_as_galore(q_galore):
    params, loss = regression()
    tx = galore_optax.galore_adamw(1e-2, rank=32, update_proj_gap=20)
    plain = trainer(tx, loss)
    quantized, quantized_state, train = q_galore
    start = plain(params, jax.jit(tx.init)(params), range(1))[2]
    *_, of_plain = plain(params, jax.jit(tx.init)(params), range(100))
    *_, of_quantized = train(quantized, quantized_state, range(100))
    assert of_plain < 0.3 * start
    assert of_quantized < 1.1 * of_plain


def test_restored_q_galore_run_goes_on_as_if_uninterrupted(q_galore, tmp_path):
    params, state, train = q_galore
    *middle, _ = train(params, state, range(18))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", jax.eval_shape(lambda: middle))
    chex.assert_trees_all_equal(train(*restored, range(18, 22)), train(*middle, range(18, 22)))


GIB = 2**30


def llama_7b():
    d, f, layers, vocab = 4096, 11008, 32, 32000
    like = jax.ShapeDtypeStruct
    shapes = {name: (layers, d, d) for name in ("q", "k", "v", "o")}
    shapes |= {"gate": (layers, d, f), "up": (layers, d, f), "down": (layers, f, d)}
    shapes |= {"embed": (vocab, d), "head": (d, vocab), "scale": (layers, 2, d), "norm": (d,)}
    return {name: like(shape, jnp.bfloat16) for name, shape in shapes.items()}


def numbers_7b(params):
    projected = galore_optax.DimensionNumbers(1, 2)
    return {
        name: projected if len(x.shape) == 3 and name != "scale" else None
        for name, x in params.items()
    }


def reports_7b():
    params = llama_7b()
    options = {"rank": 1024, "weight_dimension_numbers": numbers_7b}
    int8 = jax.eval_shape(lambda p: galore_optax.quantize_params(p, **options), params)
    eight_bit = galore_optax.galore_adamw_8bit(1e-3, projector_dtype="bfloat16", **options)
    rows = {
        "AdamW": (optax.adamw(1e-3), params),
        "8-bit AdamW": (galore_optax.adamw_8bit(1e-3), params),
        "GaLore": (galore_optax.galore_adamw(1e-3, **options), params),
        "8-bit GaLore": (eight_bit, params),
        "Q-GaLore": (galore_optax.q_galore_adamw(1e-3, **options), int8),
    }
    return {name: galore_optax.memory_report(*row) for name, row in rows.items()}


def test_llama_7b_in_gib():
    reports = reports_7b()
    total = {name: report.total / GIB for name, report in reports.items()}
    assert total["Q-GaLore"] <= 10.8
    assert total["8-bit GaLore"] <= 17.9
    assert total["8-bit GaLore"] < total["8-bit AdamW"] < total["GaLore"] < total["AdamW"]
    # 6.74e9 parameters and two moments of each, all in bfloat16.
    np.testing.assert_allclose(total["AdamW"], 6.738e9 * 6 / GIB, rtol=1e-3)
    # Moments of embedding and head, which are not projected, in 8 bits.
    groups = {group.path: group for group in reports["Q-GaLore"].groups}
    assert groups["embed"].moments + groups["head"].moments <= 2 * 2 * 32000 * 4096 * 1.02
