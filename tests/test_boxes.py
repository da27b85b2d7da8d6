"""State in the boxes of Flax: their names are those of the axes that the state has."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import galore_optax

P = PartitionSpec
KEY = jax.random.key(0)  # made outside of meshes of no devices.
SHAPE = (64, 512)  # rows are projected: R is (16, 512), P is (64, 16).


def of_linen(names):
    init = nn.with_logical_partitioning(nn.initializers.ones, names)
    model, x = nn.Dense(SHAPE[1], kernel_init=init), jax.ShapeDtypeStruct(SHAPE[:1], jnp.float32)
    return jax.eval_shape(model.init, KEY, x)["params"]


def of_nnx(names):
    init = nnx.with_partitioning(nnx.initializers.ones, names)
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: nnx.Linear(*SHAPE, kernel_init=init, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


CONTAINERS = {"linen": (of_linen, nn.get_partition_spec), "nnx": (of_nnx, nnx.get_partition_spec)}
containers = pytest.mark.parametrize("container", CONTAINERS)


def named(container, names, tx):
    """The state of a kernel and a bias, with the names that Flax finds in it."""
    params, read = CONTAINERS[container]
    with nnx.use_eager_sharding(False):
        state = read(jax.eval_shape(tx.init, params(names)))
    # An nnx.Variable has its names inside.
    return nnx.as_pure(state)


def of_kernel(state):
    return [entry["kernel"] for entry in (state.subspace.left, *state.inner[0][1:])]


@containers
def test_the_names_are_those_of_the_axes_that_are_left(container):
    tx = galore_optax.galore_adamw(1e-3, rank=16)
    state = named(container, ("embed", "mlp"), tx)
    assert of_kernel(state) == [P("embed", None), P(None, "mlp"), P(None, "mlp")]
    assert state.step == state.subspace.due["kernel"] == state.inner[0].mu["bias"] == P()


@containers
def test_names_of_an_array_in_codes_are_those_of_its_codes(container):
    tx = galore_optax.galore_adamw_8bit(1e-3, rank=16, projector_dtype="int8")
    state = named(container, ("embed", "mlp"), tx)
    moment = state.inner.inner[0].mu["kernel"]
    assert moment.codes == moment.scales == P(None, "mlp")
    # Blocks of 256 straddle the rows of (64, 16), whose codes have one axis therefore.
    assert state.subspace.left["kernel"].codes == P("embed")


@containers
@pytest.mark.filterwarnings("ignore:galore projects nothing:UserWarning")
def test_what_has_the_shape_of_its_parameter_has_its_names(container):
    state = named(container, ("embed", "mlp"), galore_optax.galore_adamw(1e-3, 4, exclude="kernel"))
    assert state.inner[0].mu["kernel"] == state.inner[0].nu["kernel"] == P("embed", "mlp")


@containers
@pytest.mark.parametrize("size", [4, 3], ids=["divides", "does_not"])
def test_the_other_sides_name_is_taken_where_rules_say_that_its_mesh_axis_divides(container, size):
    """Else the moments of a matrix that is divided along its rows were on every device."""
    tx = galore_optax.galore_adamw(1e-3, rank=16)
    assert of_kernel(named(container, ("embed", None), tx))[1:] == [P(None, None)] * 2
    mesh = AbstractMesh((size,), ("fsdp",), (AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules((("embed", "fsdp"),)):
        found = of_kernel(named(container, ("embed", None), tx))
    name = "fsdp" if container == "nnx" else "embed"  # NNX reads names by the rules.
    assert found == [P(name, None), *[P(None, name if size == 4 else None)] * 2]


@containers
def test_boxes_without_names_change_nothing(container):
    tx = galore_optax.galore_adamw(1e-3, rank=16)
    assert all(not any(spec) for spec in of_kernel(named(container, (None, None), tx)))


def test_boxes_around_the_codes_of_a_parameter_are_seen_through():
    params = {"kernel": jnp.ones((8, 512))}
    boxed = jax.tree.map(nnx.Param, galore_optax.quantize_params(params, rank=4))
    tx = galore_optax.galore_adamw(1e-3, rank=4)
    chex.assert_trees_all_equal_shapes(tx.init(boxed), tx.init(params))


@pytest.mark.parametrize("boxed", ["gradients", "state", "params"])
def test_refresh_of_parameters_in_boxes(boxed):
    """Which of the three are in boxes makes no difference."""
    rng = np.random.default_rng(0)
    tx = galore_optax.galore_adamw(1e-2, rank=4)
    plain = {"kernel": rng.normal(size=(8, 16)), "bias": rng.normal(size=16)}
    plain = nnx.State(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), plain))
    state = tx.init(plain)
    expected = galore_optax.refresh(tx, plain, state, plain)
    assert not np.allclose(expected.subspace.left["kernel"], state.subspace.left["kernel"])

    gradients, params = plain, plain
    if boxed == "gradients":
        gradients = jax.tree.map(nnx.Param, plain)
    elif boxed == "state":
        state = tx.init(jax.tree.map(nnx.Param, plain))
    else:
        params = jax.tree.map(nnx.Param, plain)
    found = galore_optax.refresh(tx, gradients, state, params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    chex.assert_trees_all_equal(*map(jax.tree.leaves, (nnx.as_pure(found), expected)))
