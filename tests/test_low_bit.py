"""Moments in few bits, against the reference's trajectory, full precision and exact bytes."""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from programs import programs

import galore_optax
from galore_optax import LowBitState, QuantizedArray, galore, low_bit

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "adam_8bit.npz")
SHAPES = {"w": (64, 256), "v": (3, 64, 96), "bias": (512,)}
WITH_MU = SHAPES | {"mu": (80, 64)}


def normal(seed=0, scale=1.0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: (scale * rng.standard_normal(s)).astype(np.float32) for k, s in shapes.items()}


def is_quantized(x):
    return isinstance(x, QuantizedArray)


def by_path(state):
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in found}


def run(tx, params, all_gradients):
    """Updates, parameters and states of all steps; checks that states are stable on the way."""

    @jax.jit
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return updates, optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state, history = jax.jit(tx.init)(params), []
    types = jax.tree.map(jax.typeof, state)
    for gradients in all_gradients:
        updates, params, state = step(gradients, state, params)
        assert jax.tree.map(jax.typeof, state) == types
        history.append((*jax.tree.map(np.asarray, (updates, params)), state))
    assert step._cache_size() == 1
    return history


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("min_size", [4096, 8192])
def test_trajectory_is_that_of_the_reference(min_size):
    tx = low_bit(optax.adam(1e-2, 0.9, 0.95, 1e-8), min_size=min_size)
    history = run(tx, REFERENCE["a_p0"], REFERENCE["a_G"])
    for (_, params, _), expected in zip(history, REFERENCE["a_traj"], strict=True):
        movement = rms(expected - REFERENCE["a_p0"])
        assert rms(params - expected) < 0.01 * movement  # 0.1 is asked for
    state = history[-1][2]
    for name, number in (("mu", 1), ("nu", 2)):
        moment = optax.tree.get(state, name)
        codes = np.asarray(moment.codes)
        assert np.mean(codes == REFERENCE[f"a_state{number}"].ravel()) > 0.95
        np.testing.assert_allclose(moment.scales, REFERENCE[f"a_absmax{number}"], rtol=1e-2)


def test_an_update_uses_the_moments_before_they_are_rounded():
    """The first update is that of full precision; the second one starts from rounded moments."""
    gradients = [normal(1), normal(2)]
    low, full = (run(tx, normal(), gradients) for tx in (low_bit(optax.adam(0.1)), optax.adam(0.1)))
    chex.assert_trees_all_close(low[0][0], full[0][0], rtol=1e-6)

    @jax.jit
    def update(gradients, inner):
        dequantized = jax.tree.map(
            lambda x: x.dequantize() if is_quantized(x) else x, inner, is_leaf=is_quantized
        )
        return optax.adam(0.1).update(gradients, dequantized)[0]

    expected = update(gradients[1], low[0][2].inner)
    chex.assert_trees_all_close(low[1][0], expected, rtol=1e-4, atol=1e-6)
    assert rms(low[1][0]["w"] - full[1][0]["w"]) > 1e-4


@pytest.mark.parametrize("name", ["mu", "nu"])
def test_bytes_of_a_moment(name):
    shape = jax.ShapeDtypeStruct((2048, 5461), jnp.float32)
    state = jax.eval_shape(low_bit(optax.scale_by_adam()).init, shape)
    assert optax.tree.get(state, name).nbytes / (2048 * 5461) <= 1.02


FLAT = {"0/mu": "signed", "0/nu": "unsigned"}
EXPECTED = {
    "adam": (optax.adam(0.1), FLAT),
    "adamw": (optax.adamw(0.1), FLAT),
    "lion": (optax.lion(0.1), {"0/mu": "signed"}),
    "momentum": (optax.sgd(0.1, 0.9), {"0/trace": "signed"}),
    "amsgrad": (optax.amsgrad(0.1), FLAT),
    "adan": (optax.adan(0.1), {"0/m": "signed", "0/v": "signed"}),
    "sm3": (optax.sm3(0.1), {"0/nu": "signed"}),
    "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=16), {}),
    "schedule_free": (
        optax.contrib.schedule_free_adamw(0.1),
        {"base_optimizer_state/0/nu": "unsigned"},
    ),
    "ademamix": (optax.contrib.ademamix(0.1), {"0/nu": "unsigned"}),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(0.1),
        {"inner_state/0/mu": "signed", "inner_state/0/nu": "unsigned"},
    ),
    "multi_steps": (
        optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        {"inner_opt_state/0/mu": "signed", "inner_opt_state/0/nu": "unsigned"},
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_moments_are_in_codes_and_nothing_else(name):
    """Parameters called v and mu are not taken for moments; small ones stay as they are."""
    inner, fields = EXPECTED[name]
    state = jax.eval_shape(low_bit(inner).init, normal(shapes=WITH_MU))
    found = by_path(state.inner)
    coded = {path: leaf.scheme for path, leaf in found.items() if is_quantized(leaf)}
    large = [k for k, shape in WITH_MU.items() if k != "bias"]
    assert coded == {f"{field}/{k}": kind for field, kind in fields.items() for k in large}
    plain = by_path(jax.eval_shape(inner.init, normal(shapes=WITH_MU)))
    for path, leaf in found.items():
        if not is_quantized(leaf):
            chex.assert_trees_all_equal_shapes_and_dtypes(leaf, plain[path])


def test_named_fields_are_in_codes_too_and_others_left_out():
    names = {"z": "signed", "nu": None, "v_row": "unsigned"}
    tx = low_bit(optax.contrib.schedule_free_adamw(0.1), names=names)
    state = jax.eval_shape(tx.init, normal())
    coded = {path for path, leaf in by_path(state.inner).items() if is_quantized(leaf)}
    assert coded == {"z/w", "z/v"}
    adan = jax.eval_shape(low_bit(optax.adan(0.1), names={"v": "unsigned"}).init, normal())
    assert by_path(adan.inner)["0/v/w"].scheme == "unsigned"


def test_blocks_do_not_straddle_layers():
    """A layer comes out the same whatever its neighbours are, and can be sliced from the state."""
    layers = np.stack([10.0**i * normal()["w"][:, :96] for i in range(3)])
    tx = low_bit(optax.trace(0.9))
    first = jax.jit(lambda x: tx.update(x, tx.init(x))[1].inner.trace)
    sliced = jax.tree.map(lambda x: x[1], first(layers))
    chex.assert_trees_all_equal(sliced, first(layers[1]))


KERNELS = {"heads": (64, 8, 16), "taps": (1024, 3, 5), "norms": (8, 600), "many": (3, 5000)}


@pytest.mark.parametrize(
    ("stacked", "items"),
    [
        # All of a leaf counts. What is behind its leading axes is an item, if it is not tiny.
        (
            None,
            {"heads": (8, 16), "taps": (1024, 3, 5), "norms": (8, 600), "many": (3, 5000)},
        ),
        # One layer counts, and is an item.
        (lambda path, shape: 1, {"many": (5000,)}),
        (lambda path, shape: int(path == "norms"), KERNELS | {"norms": None}),
    ],
    ids=["presumed", "all stacked", "norms stacked"],
)
def test_min_size_is_of_the_whole_leaf_or_of_a_layer_of_what_is_said_to_be_stacked(stacked, items):
    params = normal(shapes=KERNELS)
    tx = low_bit(optax.trace(0.9), stacked=stacked)
    state = jax.eval_shape(tx.init, params)
    found = by_path(state.inner.trace)
    coded = {path: leaf.item_shape for path, leaf in found.items() if is_quantized(leaf)}
    assert coded == {path: item for path, item in items.items() if item is not None}
    assert {path: leaf.shape for path, leaf in found.items()} == KERNELS
    _, after = jax.eval_shape(tx.update, params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("name", ["w", "v"])
def test_layers_that_are_said_to_be_stacked_are_as_layers_by_themselves(name):
    layers = np.stack([10.0**i * normal()[name] for i in range(2)])
    tx = low_bit(optax.trace(0.9), stacked=lambda path, shape: 1)
    alone = low_bit(optax.trace(0.9), stacked=lambda path, shape: 0)
    moment = jax.jit(lambda x: tx.update(x, tx.init(x))[1].inner.trace)(layers)
    for i, layer in enumerate(layers):
        one = jax.jit(lambda x: alone.update(x, alone.init(x))[1].inner.trace)(layer)
        chex.assert_trees_all_equal(jax.tree.map(lambda x, i=i: x[i], moment), one)


def test_a_second_moment_that_is_small_in_its_block_does_not_explode():
    """A row of an embedding whose token is seen once, beside frequent ones."""
    tx = low_bit(optax.scale_by_adam())
    rare = np.ones(4096, np.float32)
    rare[7] = 1e-5
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    for gradient_after in (0.0, 1e-6):  # gone, small
        state, gradient = init(rare), rare.copy()
        for step in range(5):
            updates, state = update(gradient, state)
            updates, gradient[7] = np.asarray(updates), gradient_after
            assert abs(updates[7]) <= 1.1, (gradient_after, step)
            np.testing.assert_allclose(updates[0], 1, rtol=0.02)


def test_sixteen_bits_are_bfloat16_rounded_at_random():
    """A moment of 1 that decays by 2^-12 a step: nearest rounding would keep it for ever."""
    shape, steps = (4096,), 400
    tx = low_bit(optax.trace(1 - 2**-12), bits=16)

    def step(state, _):
        return tx.update(jnp.zeros(shape), state)[1], None

    @jax.jit
    def run(one):
        _, state = tx.update(one, tx.init(one))
        return jax.lax.scan(step, state, length=steps)[0]

    end = run(np.ones(shape, np.float32))
    assert end.inner.trace.dtype == jnp.bfloat16
    mean = np.asarray(end.inner.trace, np.float32).mean()
    np.testing.assert_allclose(mean, (1 - 2**-12) ** steps, atol=4 * 0.02 / np.sqrt(4096))
    assert int(end.rounds) == steps + 1


def test_the_seed_and_the_leaf_decide_what_is_drawn():
    params = {"a": np.zeros(4096, np.float32), "b": np.zeros(4096, np.float32)}
    gradients = {name: np.full(4096, 1.001, np.float32) for name in params}

    @functools.partial(jax.jit, static_argnums=0)
    def moments(seed):
        tx = low_bit(optax.trace(0.9), bits=16, seed=seed)
        return tx.update(gradients, tx.init(params))[1].inner.trace

    zero, one = moments(0), moments(1)
    moments.clear_cache()
    chex.assert_trees_all_equal(moments(0), zero)
    assert not np.array_equal(zero["a"], zero["b"])
    assert not np.array_equal(zero["a"], one["a"])


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [
        ("adamw", jnp.float32, 8),
        ("adamw", jnp.bfloat16, 16),
        ("adan", jnp.bfloat16, 8),
        ("schedule_free", jnp.bfloat16, 8),
        ("multi_steps", jnp.bfloat16, 8),
    ],
)
def test_states_are_stable_and_updates_those_of_full_precision(name, dtype, bits):
    inner = EXPECTED[name][0]
    params, gradients = normal(0, 0.1), [normal(3 + i) for i in range(3)]
    full = run(inner, params, gradients)
    params, gradients = jax.tree.map(lambda x: x.astype(dtype), (params, gradients))
    low = run(low_bit(inner, bits), params, gradients)
    for (updates, *_), (expected, *_) in zip(low, full, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        for update, wanted in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
            assert rms(update - wanted) <= 0.15 * rms(wanted)


def test_moments_that_the_optimizer_itself_rounds_are_stable():
    tx = galore_optax.adamw_8bit(1e-3, mu_dtype=jnp.bfloat16)
    *_, (_, _, state) = run(tx, normal(1), [normal(2), normal(3)])
    assert optax.tree.get(state, "mu")["w"].dtype == jnp.float32


def test_second_moments_of_bfloat16_parameters_move():
    tx = low_bit(optax.scale_by_adam())
    ones = np.ones(4096, jnp.bfloat16)

    @jax.jit
    def run(ones):
        def step(state, _):
            return tx.update(ones, state)[1], None

        return jax.lax.scan(step, tx.init(ones), length=50)[0]

    state = run(ones)
    np.testing.assert_allclose(state.inner.nu.dequantize(), 1 - 0.999**50, rtol=0.05)


ARGUMENTS = {
    "rank": 16,
    "update_proj_gap": 3,
    "weight_dimension_numbers": galore_optax.DimensionNumbers(-2, -1),
}


def test_eight_bit_galore_is_galore_with_rounded_moments():
    params, gradients = normal(0, 0.1), [normal(7)] * 4
    eight = run(galore(low_bit(optax.scale_by_adam(), min_size=1), **ARGUMENTS), params, gradients)
    full = run(galore(optax.scale_by_adam(), **ARGUMENTS), params, gradients)
    moment = eight[-1][2].inner.inner.mu["w"]
    assert is_quantized(moment)
    assert moment.shape == (16, 256)
    for (updates, *_), (expected, *_) in zip(eight, full, strict=True):
        assert rms(updates["w"] - expected["w"]) < 0.1 * rms(expected["w"])


def test_weight_decay_is_found_through_low_bit():
    """Decay of the whole matrix, and as the update of zero gradients nothing else."""
    params = normal(0, 0.1)
    tx = galore(low_bit(optax.adamw(0.1, weight_decay=0.5)), **ARGUMENTS)
    ((updates, *_),) = run(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda w: -0.05 * w, params), rtol=1e-5, atol=1e-9
    )


def test_presets_are_what_they_stand_for():
    adamw = optax.adamw(0.1, weight_decay=0.2)
    pairs = [
        (galore_optax.adamw_8bit(0.1, weight_decay=0.2), low_bit(adamw)),
        (
            galore_optax.galore_adamw_8bit(0.1, weight_decay=0.2, block_size=64, **ARGUMENTS),
            galore(low_bit(adamw, block_size=64), **ARGUMENTS),
        ),
    ]
    for preset, long in pairs:
        assert programs(preset, normal()) == programs(long, normal())


WRAPPERS = {
    "guarded_chain_of_masked": lambda tx: optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.masked(tx, lambda p: {k: k != "v" for k in p})
        ),
        3,
    ),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "partition": lambda tx: optax.partition(
        {"low": tx, "sgd": optax.sgd(0.1)}, {k: "sgd" if k == "v" else "low" for k in SHAPES}
    ),
    "galore": lambda tx: galore(tx, **ARGUMENTS),
}


@pytest.mark.parametrize(
    ("name", "bits"), [*((name, 8) for name in WRAPPERS if name != "galore"), ("galore", 16)]
)
def test_wrappers_around_are_stable_and_count_their_bytes(name, bits):
    tx = WRAPPERS[name](low_bit(optax.adamw(0.1), bits))
    history = run(tx, normal(0, 0.1), [normal(5), normal(6)])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(history[-1][1]))
    state = history[-1][2]
    report = galore_optax.memory_report(tx, normal())
    assert report.state == sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize("bits", [8, 16])
def test_inject_hyperparams_and_map_params_work_around(bits):
    tx = optax.inject_hyperparams(low_bit, static_args=("bits", "block_size", "min_size", "seed"))
    tx = tx(optax.scale_by_adam(), bits=bits)
    jax.eval_shape(lambda x: tx.update(x, tx.init(normal())), normal(1))
    tx = low_bit(optax.adamw(0.1), bits)
    state = tx.init(normal())
    specs = {name: name.upper() for name in SHAPES}
    mapped = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        state,
        specs,
        is_leaf=is_quantized,
        transform_non_params=lambda _: 0,
    )
    assert mapped.inner[0].mu == mapped.inner[0].nu == specs
    assert mapped.inner[0].count == 0


@pytest.mark.parametrize("inside", ["alone", "in_galore"])
def test_a_compiled_init_does_not_compute_codes_of_constants_while_it_compiles(inside):
    """XLA folds what it can, for minutes on a GPU where moments are large stacks of zeros.

    So nothing but an optimization barrier may see the zeros; behind it they are no constants.
    """
    tx = low_bit(optax.scale_by_adam())
    if inside == "in_galore":
        tx = galore(tx, rank=128, weight_dimension_numbers=galore_optax.DimensionNumbers(1, 2))
    params = {"kernel": jax.ShapeDtypeStruct((24, 512, 1376), jnp.bfloat16)}
    text = jax.jit(tx.init).lower(params).as_text().split("func.func private")[0]
    rows = 512 if inside == "alone" else 128
    moment = rf"tensor<24x{rows}x1376x(?:f32|bf16)>"
    zeros = re.findall(rf"(%\w+) = stablehlo.broadcast_in_dim .*-> {moment}", text)
    uses = [
        re.search(r"= (\S+)", line)[1]
        for line in text.splitlines()
        if any(re.search(rf"= .*{zero}\b", line) for zero in zeros)
    ]
    assert uses == ["stablehlo.optimization_barrier"] * 2


def test_shapes_are_enough_for_init():
    shapes = jax.eval_shape(normal)
    tx = low_bit(optax.adamw(0.1))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        tx.init(shapes), jax.eval_shape(tx.init, shapes), tx.init(normal())
    )


def test_reported_bytes_are_those_of_the_codes():
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    tx = galore_optax.galore_adamw_8bit(0.1, rank=128)
    (group,) = galore_optax.memory_report(tx, params).groups
    assert group.moments == 2 * 128 * 1024 * (1 + 4 / 256)
    assert group.moments_without_galore == 2 * 512 * 1024 * (1 + 4 / 256)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_restored_run_goes_on_as_if_uninterrupted(bits, tmp_path):
    tx = low_bit(optax.adamw(0.1), bits)
    step = jax.jit(tx.update)
    _, state = step(normal(1), jax.jit(tx.init)(normal()), normal())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(tx.init, normal()))
        other = jax.eval_shape(low_bit(optax.adamw(0.1), 24 - bits).init, normal())
        with pytest.raises(ValueError, match="'mu'"):
            checkpointer.restore(tmp_path / "checkpoint", other)
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal(restored, state)
    found, expected = (
        step(normal(2), jax.tree.map(np.asarray, s), normal()) for s in (restored, state)
    )
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.since(flax="0.11")
def test_flax_optimizer_trains_with_it():
    model = nnx.Linear(64, 256, rngs=nnx.Rngs(0))
    tx = galore_optax.galore_adamw_8bit(0.01, rank=16, scale=1.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(jnp.ones((4, 64))) - 1) ** 2)

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]


def updated(tx, state):
    jax.eval_shape(tx.update, normal(1), state, normal())


STATES = {
    "block_size": (low_bit(optax.adamw(0.1), block_size=128), "0/mu/v is signed 8-bit codes in"),
    "bits": (low_bit(optax.adamw(0.1), 16), "0/mu/v is bfloat16, and should be signed 8-bit"),
    "names": (low_bit(optax.adamw(0.1), names={"nu": "signed"}), "0/nu/v is signed 8-bit"),
    "min_size": (
        low_bit(optax.adamw(0.1), min_size=2**15),
        "0/mu/v is float32, and should be signed 8-bit",
    ),
    "stacked": (
        low_bit(optax.adamw(0.1), stacked=lambda path, shape: 0),
        r"0/mu/v is .* items \(3, 64, 96\), and should .* items \(64, 96\)",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_configuration_names_the_leaf(name):
    other, message = STATES[name]
    with pytest.raises(ValueError, match=f"another configuration of low_bit: {message}"):
        updated(low_bit(optax.adamw(0.1)), jax.eval_shape(other.init, normal()))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_moment_in_few_bits_stays_there_however_small_it_is(bits):
    """As in an update of one layer of a stack, of which the whole was large."""
    params, gradients = normal(), normal(1)
    before = low_bit(optax.adamw(0.1), bits, min_size=256)
    state = jax.jit(before.init)(params)
    found, expected = (
        jax.jit(tx.update)(gradients, state, params)
        for tx in (low_bit(optax.adamw(0.1), bits, min_size=2**20), before)
    )
    chex.assert_trees_all_equal(found, expected)


def test_a_state_of_another_configuration_inside_galore_names_the_leaf():
    other = low_bit(optax.adamw(0.1), block_size=128)
    with pytest.raises(ValueError, match=r"another configuration.*0/mu/v is signed .* 128"):
        updated(
            galore(low_bit(optax.adamw(0.1)), **ARGUMENTS),
            jax.eval_shape(galore(other, **ARGUMENTS).init, normal()),
        )


def test_a_state_of_another_transformation_is_an_error():
    with pytest.raises(TypeError, match="needs the LowBitState that its init made; got a tuple"):
        updated(low_bit(optax.adamw(0.1)), optax.adamw(0.1).init(normal()))
    assert isinstance(low_bit(optax.adamw(0.1)).init(normal()), LowBitState)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inner": 8}, TypeError, "inner must be an Optax transformation.*got 8"),
        ({"bits": 4}, ValueError, "bits must be 8 or 16 for moments; got 4"),
        ({"block_size": 0}, ValueError, "block_size must be a positive multiple of 2; got 0"),
        ({"block_size": 3}, ValueError, "block_size must be a positive multiple of 2; got 3"),
        ({"min_size": -1}, ValueError, "min_size must be an int of at least 0; got -1"),
        ({"names": {"z": 8}}, ValueError, r"names\['z'\] must be 'signed', .*got 8"),
        ({"seed": 0.5}, TypeError, r"seed must be an int; got 0\.5"),
        ({"stacked": 1}, TypeError, "stacked must be a function of a path and a shape.*got 1"),
    ],
)
def test_arguments_that_cannot_be_right(arguments, error, message):
    with pytest.raises(error, match=message):
        low_bit(**{"inner": optax.adam(0.1), **arguments})
