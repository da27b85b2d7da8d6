"""State in the boxes of Flax: their names are those of the axes that the state has."""

import contextlib
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import galore_optax
from galore_optax._axis_names import naming

P = PartitionSpec
KEY = jax.random.key(0)  # made outside of meshes of no devices.
SHAPE = (64, 512)  # rows are projected: R is (16, 512), P is (64, 16).


# Flax puts arrays where their names say while it makes them, today unless it is told not to.
lazily = getattr(nnx, "use_eager_sharding", lambda _: contextlib.nullcontext())


def of_linen(names, shape):
    init = nn.with_logical_partitioning(nn.initializers.ones, names)
    model, x = nn.Dense(shape[1], kernel_init=init), jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    return jax.eval_shape(model.init, KEY, x)["params"]


def of_nnx(names, shape):
    init = nnx.with_partitioning(nnx.initializers.ones, names)
    with lazily(False):
        model = nnx.eval_shape(lambda: nnx.Linear(*shape, kernel_init=init, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


CONTAINERS = {"linen": (of_linen, nn.get_partition_spec), "nnx": (of_nnx, nnx.get_partition_spec)}
of_nnx_alone = pytest.mark.since(flax="0.12.8")  # where an nnx.Variable is a pytree.
containers = pytest.mark.parametrize(
    "container", ["linen", pytest.param("nnx", marks=of_nnx_alone)]
)


def named(container, names, tx, shape=SHAPE):
    """The state of a kernel and a bias, with the names that Flax finds in it."""
    params, read = CONTAINERS[container]
    with lazily(False):
        state = read(jax.eval_shape(tx.init, params(names, shape)))
    # An nnx.Variable has its names inside.
    return nnx.as_pure(state) if container == "nnx" else state


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
    state = named(
        container, ("embed", "mlp"), galore_optax.galore_adamw(1e-3, rank=4, exclude="kernel")
    )
    assert state.inner[0].mu["kernel"] == state.inner[0].nu["kernel"] == P("embed", "mlp")


RULES = (("embed", ("fsdp", "expert")), ("mlp", "tensor"), ("heads", ()), ("embed", "fsdp"))


def on(container, names, sizes, shape=SHAPE):
    """Where the kernel's state lies by its names on a mesh, as Flax reads them."""
    mesh = AbstractMesh(sizes, ("fsdp", "tensor", "expert"), axis_types=(AxisType.Auto,) * 3)
    tx = galore_optax.galore_adamw(1e-3, rank=16)
    with jax.sharding.use_abstract_mesh(mesh), nn.logical_axis_rules(RULES):
        found = of_kernel(named(container, names, tx, shape))
        if container == "linen":  # NNX has read the rules already.
            found = [nn.logical_to_mesh_axes(spec) for spec in found]
    size = mesh.shape
    return [
        [tuple(a for a in np.atleast_1d(axes or ()) if size[a] > 1) for axes in s] for s in found
    ]


@pytest.mark.since(flax="0.12.8")
@containers
def test_where_the_mesh_is_known_names_say_what_specs_say(container):
    """Else moments are on every device, of all or of one of the axes of the mesh."""
    none, both = (), ("tensor", "fsdp")
    assert on(container, ("embed", "mlp"), (4, 2, 1)) == [
        [("fsdp", "tensor"), none],
        *[[none, both]] * 2,
    ]
    # The name of the other side, where an axis has none, or one that stands for one device.
    for name, sizes in ((None, (4, 2, 1)), ("heads", (4, 2, 1)), ("mlp", (4, 1, 1))):
        expected = [[("fsdp",), none], *[[none, ("fsdp",)]] * 2]
        assert on(container, ("embed", name), sizes) == expected
    # 4 divides 64 and not 510.
    expected = [[("fsdp", "tensor"), none], *[[none, ("tensor",)]] * 2]
    assert on(container, ("embed", "mlp"), (4, 2, 1), (64, 510)) == expected


@pytest.mark.since(jax="0.7")
@pytest.mark.parametrize("source", ["on_mesh", "set_mesh", "entered", "array", "box", None])
def test_the_mesh_of_names_is_known_from_where_it_is(source):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
    box = nn.Partitioned(jnp.ones(8), ("embed",), mesh=mesh if source == "box" else None)
    array = jax.device_put(box.value, NamedSharding(mesh, P())) if source == "array" else box.value
    seen = []

    def init(params):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`with mesh:`", DeprecationWarning)
            context = {"set_mesh": lambda: jax.set_mesh(mesh), "entered": lambda: mesh}
            with context.get(source, contextlib.nullcontext)():
                seen.append(naming([box], [array]))

    tx = optax.GradientTransformation(init, optax.identity().update)
    (galore_optax.trainers.on_mesh(tx, mesh) if source == "on_mesh" else tx).init({})
    assert [known and known.mesh for known in seen] == [source and mesh.abstract_mesh]


@containers
def test_boxes_without_names_change_nothing(container):
    tx = galore_optax.galore_adamw(1e-3, rank=16)
    assert all(not any(spec) for spec in of_kernel(named(container, (None, None), tx)))


@of_nnx_alone
def test_boxes_around_the_codes_of_a_parameter_are_seen_through():
    params = {"kernel": jnp.ones((8, 512))}
    boxed = jax.tree.map(nnx.Param, galore_optax.quantize_params(params, rank=4))
    tx = galore_optax.galore_adamw(1e-3, rank=4)
    chex.assert_trees_all_equal_shapes(tx.init(boxed), tx.init(params))


@pytest.mark.parametrize("boxed", ["gradients", "state", "params"])
@of_nnx_alone
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
