"""Where optimizer state lies on a mesh: by shapes, for every optimizer and layout."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

import galore_optax
from galore_optax import DimensionNumbers, state_partition_specs

P = PartitionSpec
EIGHT = {"fsdp": (8, 1), "tensor": (1, 8), "both": (2, 4)}
OPTIMIZERS = (
    *("galore_adamw", "galore_adamw_8bit", "q_galore_adamw", "fira_adamw_8bit", "apollo_adamw"),
    *("ldadamw", "tracked_adamw_8bit", "dct_adamw", "grass_adamw", "flora", "galore_muon"),
    *("galore_adafactor", "frugal_adamw", "adamw_8bit"),
)


def is_spec(x):
    return isinstance(x, PartitionSpec)


@functools.cache
def of_7b():
    """The shapes of LLaMA-7B, its layers stacked, and where they lie."""
    layers, width, hidden, vocabulary = 32, 4096, 11008, 32000
    shapes = {
        "embed/embedding": (vocabulary, width),
        "blocks/q": (layers, width, width),
        "blocks/o": (layers, width, width),
        "blocks/up": (layers, width, hidden),
        "blocks/down": (layers, hidden, width),
        "blocks/norm/scale": (layers, width),
        "lm_head/kernel": (width, vocabulary),
    }
    params = {k: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for k, shape in shapes.items()}
    into, out = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
    specs = {"blocks/q": into, "blocks/up": into, "blocks/o": out, "blocks/down": out}
    rest = {"blocks/norm/scale": P(), "embed/embedding": P("fsdp", "tensor")}
    return params, {**specs, **rest, "lm_head/kernel": P("fsdp", "tensor")}


def nbytes(shape, dtype):
    return math.prod(shape) * jnp.dtype(dtype).itemsize


# Q-GaLore's state, of all kinds, in each layout; those of the others in one layout each, in turn.
OF_EIGHT = [("q_galore_adamw", layout) for layout in EIGHT]
OF_EIGHT += [
    (name, [*EIGHT][i % len(EIGHT)])
    for i, name in enumerate(OPTIMIZERS)
    if name != "q_galore_adamw"
]


@pytest.mark.filterwarnings("ignore:the inner transformation:UserWarning")  # of Adafactor
@pytest.mark.parametrize(("name", "layout"), OF_EIGHT)
def test_a_device_has_an_eighth_of_the_state_of_7b(name, layout):
    options = {} if name == "adamw_8bit" else {"rank": 1024}
    if options:
        options["weight_dimension_numbers"] = DimensionNumbers(-2, -1)
    tx = getattr(galore_optax, name)(1e-3, **options)
    params, specs = of_7b()
    mesh = AbstractMesh(EIGHT[layout], ("fsdp", "tensor"))
    found = state_partition_specs(tx, params, specs, mesh=mesh)
    state = jax.eval_shape(tx.init, params)
    places = jax.tree.leaves(found, is_leaf=is_spec)
    total = of_device = 0
    for x, place in zip(jax.tree.leaves(state), places, strict=True):
        parts = [math.prod(mesh.shape[a] for a in np.atleast_1d(axes or ())) for axes in place]
        assert all(size % k == 0 for size, k in zip(x.shape, parts, strict=False))
        total += nbytes(x.shape, x.dtype)
        of_device += nbytes(x.shape, x.dtype) / math.prod(parts)
    assert of_device <= 1.01 * total / 8
    if name == "q_galore_adamw":  # whose codes, scales and counters are of all kinds.
        report = galore_optax.memory_report(tx, params, specs, mesh=mesh)
        assert report.of_device.devices == 8
        assert report.of_device.state == of_device
        assert 8 * report.of_device.parameters == pytest.approx(report.parameters, rel=1e-3)
        size = of_device / 1e9
        assert f"on each of 8 devices  optimizer state {size:.3f} GB, with the" in str(report)


MATRIX = {"kernel": jax.ShapeDtypeStruct((64, 512), jnp.float32)}


def specs_of(tx, spec, params=MATRIX, **options):
    return state_partition_specs(tx, params, {"kernel": spec}, **options)


def test_each_kind_of_array_lies_by_its_rule():
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        galore_optax.fira_adamw(1e-3, rank=16, projector_dtype="int8"),
        optax.ema(0.9),
    )
    found = optax.MultiSteps(tx, 2)
    found = specs_of(found.gradient_transformation(), P("x", "y"))
    assert optax.tree.get(found, "mu")["kernel"] == P(None, ("y", "x"))
    assert found.acc_grads["kernel"] == found.inner_opt_state[2].ema["kernel"] == P("x", "y")
    galore = next(
        x
        for x in jax.tree.leaves(found, is_leaf=lambda x: hasattr(x, "subspace"))
        if hasattr(x, "subspace")
    )
    # (64, 16) in blocks of 256 straddles rows, so that there is one axis.
    assert galore.subspace.left["kernel"].codes == P(("x", "y"))
    assert galore.subspace.due["kernel"] == galore.step == found.mini_step == P()


def test_a_factored_moment_has_the_axes_that_are_left():
    tx = galore_optax.galore(optax.scale_by_factored_rms(min_dim_size_to_factor=8), rank=16)
    found = specs_of(tx, P("x", "y")).inner
    shapes = jax.eval_shape(tx.init, MATRIX).inner
    of_size = {512: P(("y", "x")), 16: P(None)}
    for name in ("v_row", "v_col"):
        shape = getattr(shapes, name)["kernel"].shape
        assert getattr(found, name)["kernel"] == of_size[shape[0]]


def test_mesh_axes_that_do_not_divide_are_left_out():
    params = {"kernel": jax.ShapeDtypeStruct((64, 510), jnp.float32)}
    mesh = AbstractMesh((4, 2), ("x", "y"))
    tx = galore_optax.galore_adamw(1e-3, rank=16)
    found = specs_of(tx, P("x", "y"), params, mesh=mesh)
    assert found.inner[0].mu["kernel"] == P(None, "y")
    assert found.subspace.left["kernel"] == P(("x", "y"), None)


def test_an_axis_that_merges_several_is_divided_as_all_of_them():
    params = {"kernel": jax.ShapeDtypeStruct((64, 8, 16), jnp.float32)}
    numbers = DimensionNumbers(0, (1, 2))
    tx = galore_optax.galore_adamw(1e-3, rank=16, weight_dimension_numbers=numbers)
    for spec, expected in ((P(None, "x", "y"), ("x", "y")), (P(None, None, "y"), "y")):
        found = specs_of(tx, spec, params)
        assert found.inner[0].mu["kernel"] == P(None, expected)
        assert found.subspace.left["kernel"] == P(expected, None)


@pytest.mark.since(jax="0.7")
def test_bytes_of_a_device_need_a_mesh():
    tx, specs = galore_optax.galore_adamw(1e-3, rank=4), {"kernel": P("x")}
    with pytest.raises(ValueError, match="needs the mesh of specs"):
        galore_optax.memory_report(tx, MATRIX, specs)
    with pytest.raises(ValueError, match="needs specs to say what a device of the mesh has"):
        galore_optax.memory_report(tx, MATRIX, mesh=AbstractMesh((4,), ("x",)))
    with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ("x",))):
        report = galore_optax.memory_report(tx, MATRIX, specs)
    assert report.of_device.parameters == 64 * 512 * 4 / 4


@pytest.mark.parametrize(
    ("specs", "error", "says"),
    [
        ({"kernel": P("z")}, ValueError, "'kernel' has the mesh axis 'z'; the mesh has 'x', 'y'"),
        ({"other": P("x")}, ValueError, "specs must have the structure of .*no parameter 'other'"),
        ({}, ValueError, "specs must have the structure .*: there is nothing for 'kernel'"),
        ({"kernel": ("x", None)}, ValueError, "'kernel' is one parameter and has several entries"),
        ({"kernel": P(), "b": P()}, ValueError, "there is no parameter 'b'"),
        ({"kernel": P("x", None, None)}, ValueError, "more axes than its shape"),
        ({"kernel": P(("x", "y"))}, ValueError, "64 of its shape .* which are 6 devices"),
        ({"kernel": P("x", "x")}, ValueError, r"P.*'kernel' has the mesh axis 'x' twice"),
        ({"kernel": P(("y", "y"))}, ValueError, r"'kernel' has the mesh axis 'y' twice"),
        ({"kernel": P(P.UNCONSTRAINED)}, ValueError, r"'kernel' leaves an axis open"),
        ({"kernel": "x"}, TypeError, "must be jax.sharding.PartitionSpec"),
        (
            {"kernel": NamedSharding(AbstractMesh((3,), ("x",)), P())},
            TypeError,
            "'kernel' has NamedSharding.*, which state_shardings takes",
        ),
    ],
    ids=str,
)
def test_specs_that_cannot_be_right(specs, error, says):
    mesh = AbstractMesh((3, 2), ("x", "y"))
    with pytest.raises(error, match=says):
        state_partition_specs(galore_optax.galore_adamw(1e-3, rank=4), MATRIX, specs, mesh=mesh)


@pytest.mark.since(jax="0.10")
def test_sums_that_are_not_added_up_have_no_place():
    with pytest.raises(ValueError, match="'kernel' is of sums that are not added up yet"):
        specs_of(galore_optax.galore_adamw(1e-3, rank=4), P("x", unreduced={"y"}))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"tx": "adamw"}, "tx must be an Optax transformation .*got 'adamw'"),
        ({"mesh": "x"}, "mesh must be a jax.sharding.Mesh or AbstractMesh, or None; got 'x'"),
        ({"mesh": {"x": 4}}, "mesh must be .*got {'x': 4}"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [state_partition_specs, galore_optax.memory_report])
def test_arguments_of_another_kind_are_refused(function, given, says):
    right = {"tx": galore_optax.galore_adamw(1e-3, rank=4), "mesh": AbstractMesh((2,), ("x",))}
    with pytest.raises(TypeError, match=says):
        function(**{**right, **given}, params=MATRIX, specs={"kernel": P("x")})


def mesh_of(*axes):
    return Mesh(np.array(jax.devices()[:1]).reshape([1] * len(axes)), axes)


def test_a_sharding_of_none_is_on_every_device():
    tx, params = galore_optax.galore_adamw(1e-3, rank=4), {**MATRIX, "bias": MATRIX["kernel"]}
    kernel = NamedSharding(mesh_of("x"), P("x"))
    found, same = (
        galore_optax.state_shardings(tx, params, {"kernel": kernel, "bias": bias})
        for bias in (None, NamedSharding(kernel.mesh, P()))
    )
    assert found == same


@pytest.mark.parametrize(
    ("shardings", "error", "says"),
    [
        (lambda: P("x"), TypeError, r"must be jax.sharding.NamedSharding; 'bias' has P"),
        (lambda: SingleDeviceSharding(jax.devices()[0]), TypeError, "'bias' has SingleDevice"),
        (
            lambda: NamedSharding(mesh_of("z"), P()),
            ValueError,
            "on one mesh; that of 'bias' is on Mesh.*'z'.*, and that of 'kernel' on Mesh.*'x'",
        ),
    ],
    ids=["spec", "one device", "another mesh"],
)
def test_shardings_that_cannot_be_right(shardings, error, says):
    tx, params = galore_optax.galore_adamw(1e-3, rank=4), {**MATRIX, "bias": MATRIX["kernel"]}
    of_kernel = NamedSharding(mesh_of("x"), P("x"))
    with pytest.raises(error, match=says):
        galore_optax.state_shardings(tx, params, {"kernel": of_kernel, "bias": shardings()})
    with pytest.raises(ValueError, match="at least one NamedSharding"):
        galore_optax.state_shardings(tx, params, {"kernel": None, "bias": None})


def test_rules_of_paths_are_of_specs():
    with pytest.raises(TypeError, match="PartitionSpec for each array; 'kernel' has ShapeDtype"):
        galore_optax.trainers.partition_rules(MATRIX)
