"""galore on a mesh of Explicit axes: the numbers of one device, and state sharded as parameters."""

import functools
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax
from tests.devices import on_devices

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
    "Q-GaLore": lambda **shared: galore_optax.q_galore_adamw(1e-2, block_size=16, **shared),
    "Muon": lambda **shared: galore_optax.galore_muon(1e-2, **shared),
    "FRUGAL": lambda **shared: galore_optax.frugal_adamw(1e-2, **shared),
}


def optimizer(name, leaves, rank=8, update_proj_gap=2):
    """To be made under the mesh, so that arrays that it makes are on it."""
    given = {k: NUMBERS[k] for k in leaves}
    return VARIANTS[name](
        rank=rank, update_proj_gap=update_proj_gap, weight_dimension_numbers=given
    )


pytestmark = pytest.mark.since(jax="0.7")


def mesh_of(*sizes, kind=AxisType.Explicit):
    return jax.make_mesh(sizes, ("x", "y"), (kind, kind))


def tree(leaves, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=LEAVES[k][0]).astype(jnp.float_) for k in leaves}


def put(values, mesh):
    return {k: jax.device_put(x, NamedSharding(mesh, LEAVES[k][1])) for k, x in values.items()}


def padded(where, axes):
    return (*where, *[None] * (axes - len(where)))


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


STATES = {
    "up": ((512, 2816), P("x", "y")),  # rows of 11 blocks
    "down": ((2816, 512), P("y", "x")),
    "table": ((320, 1152), P("x", "y")),  # rows of 4.5 blocks
    "stack": ((4, 64, 96), P("x", None, "y")),
    "norms": ((3, 48, 32), P(None, "x", "y")),
}
PRESETS = ("q_galore_adamw", "tracked_adamw_8bit", "flora", "galore_muon", "adamw_8bit")


def states_lie_as_their_specs_say():
    """By types alone: what init makes, and what update makes of it and of what specs describe."""
    mesh = mesh_of(4, 2)
    numbers = {"up": 0, "down": 0, "stack": 1}
    numbers = {
        k: galore_optax.DimensionNumbers(numbers[k], numbers[k] + 1) if k in numbers else None
        for k in STATES
    }
    params = {
        k: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, where))
        for k, (shape, where) in STATES.items()
    }

    def typed(tree):
        def of(x):
            where = () if x.sharding is None else x.sharding.spec
            return x.shape, x.dtype, padded(where, x.ndim)

        return list(map(of, jax.tree.leaves(tree)))

    for name in PRESETS:
        options = {} if name == "adamw_8bit" else {"rank": 24, "weight_dimension_numbers": numbers}
        tx = getattr(galore_optax, name)(1e-3, **options)
        shardings = galore_optax.state_shardings(tx, params)
        with jax.set_mesh(mesh):
            state = jax.eval_shape(tx.init, params)
            planned = jax.tree.map(
                lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                state,
                shardings,
            )
            for before in (state, planned):
                updates, after = jax.eval_shape(tx.update, params, before, params)
                assert typed(before) == typed(planned), name
                assert typed(after) == typed(planned), name
                assert typed(updates) == typed(params), name
        print(name, flush=True)
    with jax.set_mesh(mesh):
        make = {"rank": 24, "weight_dimension_numbers": numbers}
        before = jax.eval_shape(lambda p: galore_optax.quantize_params(p, **make), params)
        for key in (None, jax.random.key(0)):
            add = functools.partial(galore_optax.apply_updates, key=key)
            assert typed(jax.eval_shape(add, before, params)) == typed(before)


@pytest.mark.filterwarnings("ignore:the inner transformation:UserWarning")  # of Adafactor
def test_states_lie_as_their_specs_say_also_where_blocks_do_not_divide():
    call = "from tests import test_sharding; test_sharding.states_lie_as_their_specs_say()"
    assert on_devices(8, "-c", call).split() == list(PRESETS)


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
    other = jax.make_mesh((1, 1), ("y", "x"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(other), pytest.raises(ValueError, match=r"mesh, on \{'y': 1, 'x'"):
        tx.update(matrix, state, matrix)


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


def compare_layerwise(mesh):
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


STEPS, GAP = 30, 12  # with refreshes at steps 0, 12 and 24.
# What is compared by its loss: codes that are rounded apart once stay apart.
BY_LOSS = ("few bits", "Q-GaLore")


def lies(kind, mesh, name, leaves, rank):
    """Trains on a mesh and on one device, and compares parameters, or the loss."""
    options = {"rank": rank, "update_proj_gap": GAP}
    params, [target] = tree(leaves), [tree(leaves, seed=1)]
    expected, _ = train(optimizer(name, leaves, **options), params, [target] * STEPS)
    with jax.set_mesh(mesh):
        tx, sharded = optimizer(name, leaves, **options), put(params, mesh)
        found, state = train(tx, sharded, [put(target, mesh)] * STEPS)
        if kind == AxisType.Explicit and name == "svd":
            again = galore_optax.refresh(tx, put(target, mesh), state, found)
            assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, state)
        if kind == AxisType.Auto:
            check_bytes(tx, sharded, mesh)
    assert max(np.abs(found[k] - params[k]).max() for k in found) > 0.05
    if name in BY_LOSS:
        np.testing.assert_allclose(loss(found, target), loss(expected, target), rtol=5e-3)
        return
    for k, x in found.items():
        difference = np.linalg.norm(x - expected[k]) / np.linalg.norm(expected[k])
        assert difference < 1e-9, (kind, name, rank, k, difference)


def check_bytes(tx, params, mesh):
    """Outside of jit a new state has on each device what the report says."""
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    planned = galore_optax.memory_report(tx, params, specs, mesh=mesh).of_device.state
    arrays = [x for x in jax.tree.leaves(tx.init(params)) if isinstance(x, jax.Array)]
    assert planned == sum(x.addressable_shards[0].data.nbytes for x in arrays)


def restore_on_another_mesh():
    """Both interfaces of Orbax read a state onto two of the devices that eight have written."""
    from orbax.checkpoint import v1

    leaves, kind = ("both", "stack"), AxisType.Auto
    large = mesh_of(4, 2, kind=kind)
    small = jax.make_mesh((2, 1), ("x", "y"), (kind, kind), devices=jax.devices()[:2])
    tx = optimizer("Q-GaLore", leaves)
    params = put(tree(leaves), large)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    there = put(tree(leaves), small)
    target = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(tx.init, there),
        galore_optax.state_shardings(tx, there),
    )
    with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
        path = pathlib.Path(directory)
        checkpointer.save(path / "v0", state)
        checkpointer.wait_until_finished()
        v1.save(path / "v1", state)
        for restored in (checkpointer.restore(path / "v0", target), v1.load(path / "v1", target)):
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            triples = map(jax.tree.leaves, (state, restored, target))
            for saved, found, wanted in zip(*triples, strict=True):
                assert found.sharding == wanted.sharding
                np.testing.assert_array_equal(found, saved)


def compare_on_eight_devices():
    restore_on_another_mesh()
    jax.config.update("jax_enable_x64", True)  # Adam amplifies round-off
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = mesh_of(4, 2, kind=kind)
        for name in VARIANTS if kind == AxisType.Explicit else ("svd", "Q-GaLore", "Fira"):
            leaves = {"svd": tuple(LEAVES), "injected": ("both",)}.get(name, ("both", "stack"))
            for rank in (8, 7) if name == "svd" else (8,):
                lies(kind, mesh, name, leaves, rank)
                print(kind, name, rank, flush=True)
    mesh = mesh_of(4, 2)
    with jax.set_mesh(mesh):
        compare_layerwise(mesh)


@pytest.mark.ci
@pytest.mark.long("its other devices are of a process of its own, which compiles 20 programs")
def test_eight_devices_change_no_number():
    on_devices(
        8,
        "-W",
        "error",
        "-c",
        "from tests import test_sharding; test_sharding.compare_on_eight_devices()",
        timeout=600,
    )
