"""galore on a mesh of Explicit axes: the numbers of one device, and state sharded as parameters."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax

LEAVES = {
    "rows": ((32, 48), P("x", None)),
    "both": ((48, 32), P("x", "y")),
    "bias": ((32,), P("y")),
    "stack": ((2, 24, 32), P("y", None, "x")),
    "heads": ((32, 4, 12), P(None, "x", None)),
}
NUMBERS = {
    "rows": galore_optax.DimensionNumbers(0, 1),
    "both": galore_optax.DimensionNumbers(0, 1),
    "bias": None,
    "stack": galore_optax.DimensionNumbers(1, 2),
    "heads": galore_optax.DimensionNumbers(0, (1, 2)),
}
ADAMW = optax.adamw(1e-2, weight_decay=0.1)
LOW_BIT = galore_optax.low_bit(optax.scale_by_adam(), min_size=64, block_size=16)


def galore(inner, **options):
    return lambda **shared: galore_optax.galore(inner, **{**shared, **options})


def injected(**shared):
    make = optax.inject_hyperparams(galore_optax.galore_adamw, static_args=("rank",))
    return make(1e-2, weight_decay=0.1, projector="eigh", **shared)


VARIANTS = {
    "svd": galore(ADAMW),
    "both sides": galore(ADAMW, side="both", projector="power_iteration", stagger=True),
    "few bits": galore(LOW_BIT, projector_dtype="int4", projector="eigh", refresh="lazy"),
    "micro-batches": galore(ADAMW, projector="rows", accumulation_steps=3, diagnostics=True),
    "injected": injected,
    "Fira": lambda **shared: galore_optax.fira_adamw(1e-2, transport="rotate", **shared),
    "LDAdam": lambda **shared: galore_optax.ldadamw(
        1e-2, residual="error_feedback", **{**shared, "update_proj_gap": 1}
    ),
    "Grass": lambda **shared: galore_optax.grass_adamw(1e-2, projector="sampled_rows", **shared),
    "APOLLO-Mini": lambda **shared: galore_optax.apollo_mini_adamw(1e-2, **{**shared, "rank": 1}),
    "FRUGAL": lambda **shared: galore_optax.frugal_adamw(1e-2, **shared),
}


def optimizer(name, leaves):
    """To be made under the mesh, so that arrays that it makes are on it."""
    given = {k: NUMBERS[k] for k in leaves}
    return VARIANTS[name](rank=8, update_proj_gap=2, weight_dimension_numbers=given)


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("x", "y"), (AxisType.Explicit,) * 2)


def tree(leaves, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=LEAVES[k][0]).astype(jnp.float_) for k in leaves}


def put(values, mesh):
    return {k: jax.device_put(x, NamedSharding(mesh, LEAVES[k][1])) for k, x in values.items()}


def spec(x):
    return tuple(jax.typeof(x).sharding.spec)


def loss(params, target):
    return sum(jnp.sum((params[k] - target[k]) ** 2) for k in params)


def train(tx, params, targets):
    def step(carry, target):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, target), state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *targets)
    return jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs)[0])(
        (params, tx.init(params)), stacked
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_types_say_that_updates_lie_as_parameters_and_state_stays_where_it_is(name):
    """One device is enough for types, which name the axes of a mesh of any size."""
    mesh = mesh_of(1, 1)
    with jax.set_mesh(mesh):
        params, tx = put(tree(LEAVES), mesh), optimizer(name, LEAVES)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
    for before, now in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert (before.shape, before.dtype, spec(before)) == (now.shape, now.dtype, spec(now))
    for k, (_, expected) in LEAVES.items():
        assert spec(updates[k]) == tuple(expected)
    if name == "svd":
        mu = optax.tree.get(state, "mu")
        assert spec(state.subspace.left["rows"]) == ("x", None)
        assert spec(mu["rows"]) == (None, "x")
        assert spec(state.subspace.right["both"]) == (("y", "x"), None)
        assert spec(mu["both"]) == (("x", "y"), None)
        assert spec(mu["bias"]) == ("y",)
        assert spec(state.subspace.left["stack"]) == ("y", "x", None)
        assert spec(state.subspace.due["stack"]) == ("y",)
        assert spec(mu["stack"]) == ("y", None, "x")
        assert spec(mu["heads"]) == (None, "x")


def test_a_mesh_of_one_device_changes_no_number():
    mesh, leaves = mesh_of(1, 1), ("bias", "heads")
    params, gradients = tree(leaves), tree(leaves, seed=1)

    def first(params, gradients):
        tx = optimizer("svd", leaves)
        return tx.update(gradients, tx.init(params), params)[0]

    expected = jax.jit(first)(params, gradients)
    with jax.set_mesh(mesh):
        found = jax.jit(first)(put(params, mesh), put(gradients, mesh))
    for k in leaves:
        np.testing.assert_allclose(found[k], expected[k], rtol=1e-4, atol=1e-6)


def test_micro_batches_outside_of_jit_have_updates_that_lie_as_parameters():
    mesh = mesh_of(1, 1)
    with jax.set_mesh(mesh):
        params = put(tree(["rows", "both"]), mesh)
        tx = galore_optax.galore_adamw(1e-2, rank=8, accumulation_steps=2)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
            assert jax.tree.map(spec, updates) == jax.tree.map(spec, params)


def test_outside_of_the_mesh_an_error_says_what_to_do():
    mesh = mesh_of(1, 1)
    tx, matrix = galore_optax.galore(ADAMW, rank=8), put(tree(["rows"]), mesh)
    explicit = r"Explicit axes, {'x': 1, 'y': 1}, outside .* jax.set_mesh"
    with pytest.raises(ValueError, match=explicit):
        tx.init(matrix)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(matrix)
    with pytest.raises(ValueError, match="outside of that mesh"):
        jax.jit(tx.update)(matrix, state, matrix)


BLOCKS = {
    "scale": ((3, 24), P()),
    "up": ((3, 24, 32), P(None, None, "y")),
    "down": ((3, 32, 24), P(None, "y", None)),
}
MODEL = {
    "embed": lambda params, batch: batch * params["gain"],
    "head_loss": lambda params, x, batch: jnp.mean((x * params["gain"] - batch) ** 2),
}
OF_LAYERS = {"micro_batches": 2, "clip_norm": 0.1}


def block(layer, x):
    layer = galore_optax.dequantize_params(layer)
    hidden = jnp.tanh((x * layer["scale"]) @ layer["up"])
    return x + jnp.einsum("bf,fd->bd", hidden, layer["down"], out_sharding=P("x", None))


def model_on(mesh):
    """Parameters on a mesh, two batches of micro-batches, and the numbers for galore."""
    rng = np.random.default_rng(0)
    blocks = {
        k: jax.device_put(0.3 * rng.normal(size=shape), NamedSharding(mesh, where))
        for k, (shape, where) in BLOCKS.items()
    }
    gain = jax.device_put(np.ones(()), NamedSharding(mesh, P()))
    batches = jax.device_put(
        rng.normal(size=(2, 2, 8, 24)), NamedSharding(mesh, P(None, None, "x"))
    )
    return {"blocks": blocks, "gain": gain}, batches


def numbers_of_model(params):
    def of(path, _):
        is_matrix = path[-1].key in ("up", "down")
        return galore_optax.DimensionNumbers(1, 2) if is_matrix else None

    is_leaf = {"is_leaf": lambda x: isinstance(x, galore_optax.QuantizedArray)}
    return jax.tree.map_with_path(of, params, **is_leaf)


def ordinary(tx):
    """The ordinary step of the same model, which clips by the norm of the whole gradient."""

    def loss(params, batch):
        layer = jax.checkpoint(lambda x, p: (block(p, x), None))
        x, _ = jax.lax.scan(layer, MODEL["embed"](params, batch), params["blocks"])
        return MODEL["head_loss"](params, x, batch)

    def step(params, state, batch):
        both = [galore_optax.value_and_grad(loss)(params, batch[i])[1] for i in (0, 1)]
        gradient = jax.tree.map(lambda a, b: (a + b) / 2, *both)
        clip = optax.clip_by_global_norm(OF_LAYERS["clip_norm"])
        gradient, _ = clip.update(gradient, clip.init(gradient))
        updates, state = tx.update(gradient, state, params)
        return galore_optax.apply_updates(params, updates, None), state

    return step


def layerwise_variants():
    shared = {"rank": 8, "update_proj_gap": 2, "weight_dimension_numbers": numbers_of_model}
    shared |= {"projector": "power_iteration"}  # svd would gather gradients
    coded = {"min_size": 128, "block_size": 16}
    return {
        "Fira": galore_optax.fira_adamw(1e-2, transport="rotate", **shared),
        "codes": galore_optax.q_galore_adamw(1e-2, **coded, **shared),
    }


def in_codes(params):
    return galore_optax.quantize_params(
        params, rank=8, block_size=16, weight_dimension_numbers=numbers_of_model
    )


@pytest.mark.parametrize("name", layerwise_variants())
def test_types_say_that_the_layer_wise_step_leaves_all_where_it_is(name):
    mesh = mesh_of(1, 1)
    with jax.set_mesh(mesh):
        (params, batches), tx = model_on(mesh), layerwise_variants()[name]
        params = in_codes(params) if name == "codes" else params
        training = galore_optax.layerwise(tx, block=block, **MODEL, **OF_LAYERS)
        before = params, jax.eval_shape(training.init, params)
        after = jax.eval_shape(training.step, *before, batches[0], None)[:2]
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert (old.shape, old.dtype, spec(old)) == (new.shape, new.dtype, spec(new))


def moves_x(layer, x):
    return jax.sharding.reshard(block(layer, x), P())


@pytest.mark.parametrize(
    ("function", "where", "message"),
    [
        (moves_x, BLOCKS["up"][1], r"in P.*\('x', None\); got .* in P.*\(None, None\)"),
        (block, P("y"), "layers of blocks/up is divided over the mesh axis 'y'"),
    ],
)
def test_error_of_what_the_layer_wise_step_cannot_divide(function, where, message):
    mesh = mesh_of(1, 1)
    with jax.set_mesh(mesh):
        params, batches = model_on(mesh)
        params["blocks"]["up"] = jax.sharding.reshard(params["blocks"]["up"], where)
        training = galore_optax.layerwise(optax.adam(1e-2), **MODEL, block=function)
        with pytest.raises(ValueError, match=message):
            training.step(params, training.init(params), batches[0, 0], None)


def compare_layerwise_on_four_devices(mesh):
    for name, tx in layerwise_variants().items():
        params, batches = model_on(mesh)
        params = in_codes(params) if name == "codes" else params
        training = galore_optax.layerwise(tx, block=block, **MODEL, **OF_LAYERS)
        expected = found = params, tx.init(params)
        step = jax.jit(training.step).lower(*found, batches[0], None).compile()
        gathered = re.findall(r"= \w+\[([0-9,]*)\]\S* all-gather", step.as_text())
        assert not {"24,32", "32,24", "1,24,32", "1,32,24"} & {*gathered}, gathered
        whole = jax.jit(ordinary(tx))
        for i in range(len(batches)):
            expected = whole(*expected, batches[i])
            *found, metrics = step(*found, batches[i], None)
        assert metrics["grad_norm"] > OF_LAYERS["clip_norm"]
        pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
        for one, other in pairs:
            assert spec(one) == spec(other), name
            if one.dtype == jnp.uint8:  # a sum in another order may round to the next code
                assert np.mean(np.asarray(one) != other) < 0.01
                continue
            # What is in codes is reckoned with in float32.
            rtol, atol = (1e-5, 1e-7) if name == "codes" else (1e-9, 1e-12)
            np.testing.assert_allclose(one, other, rtol, atol, err_msg=name)


def compare_on_four_devices():
    jax.config.update("jax_enable_x64", True)  # Adam amplifies round-off
    mesh = mesh_of(2, 2)
    for name in VARIANTS:
        leaves = {"svd": ("rows", "bias", "stack", "heads"), "injected": ("both",)}
        leaves = leaves.get(name, ("both", "stack"))
        params, data = tree(leaves), [tree(leaves, seed) for seed in (1, 1, 2)]
        expected, _ = train(optimizer(name, leaves), params, data)
        with jax.set_mesh(mesh):
            tx = optimizer(name, leaves)
            found, state = train(tx, put(params, mesh), [put(x, mesh) for x in data])
            if name == "svd":
                again = galore_optax.refresh(tx, put(data[0], mesh), state, found)
                assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, state)
        for k, x in found.items():
            assert spec(x) == tuple(LEAVES[k][1]), (name, k)
            np.testing.assert_allclose(x, expected[k], rtol=1e-6, atol=1e-7, err_msg=name + k)
            assert np.abs(x - params[k]).max() > 1e-3
    with jax.set_mesh(mesh):
        compare_layerwise_on_four_devices(mesh)


@pytest.mark.ci
@pytest.mark.long("its other devices are of a process of its own, which compiles fourteen programs")
def test_four_devices_change_no_number():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-c"),
            "from tests import test_sharding; test_sharding.compare_on_four_devices()",
        ],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
