"""What belongs to layers lies in the memory of the machine, and no number is another one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax._layerwise.offload import check_memories
from tests import layerwise_model as model
from tests.devices import on_devices

pytestmark = pytest.mark.since(jax="0.8")

GALORE = {"rank": 4, "update_proj_gap": 2, "weight_dimension_numbers": model.numbers}
BOTH = ("moments", "weights")


def rows(**arguments):
    return galore_optax.galore_adamw(0.01, projector="rows", **GALORE | arguments)


def put(tx, params, offload):
    return jax.device_put(params, galore_optax.layerwise_shardings(tx, params, offload=offload)[0])


def kinds(tree):
    """The memory of each array, by its path."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x.sharding.memory_kind for path, x in leaves}


def check_kinds(offload, params, state):
    """Whether that lies in the machine's memory, and nothing else, that offload names."""
    of_params, of_state = (jax.tree.leaves_with_path(x) for x in (params, state))
    for path, x in of_params:
        host = "weights" in offload and "blocks" in jax.tree_util.keystr(path)
        assert (x.sharding.memory_kind == "pinned_host") == host, path
    for path, x in of_state:
        of_layers = "'blocks'" in jax.tree_util.keystr(path) and x.ndim > 1
        host = "moments" in offload and of_layers
        assert (x.sharding.memory_kind == "pinned_host") == host, path


# Of each: the transformation, what makes its parameters, and how it is trained.
CASES = {
    "rows": (rows, lambda params: params, {}),
    "8 bits": (
        functools.partial(galore_optax.galore_adamw_8bit, 0.01, **GALORE, block_size=8, min_size=8),
        lambda params: params,
        {"micro_batches": 2, "clip_norm": 0.5, "clip_by": "layer"},
    ),
    "int8 weights": (
        functools.partial(galore_optax.q_galore_adamw, 0.01, **GALORE),
        lambda params: galore_optax.quantize_params(
            params, rank=4, weight_dimension_numbers=model.numbers
        ),
        {"inputs_every": 3},
    ),
    "APOLLO-Mini": (
        functools.partial(
            galore_optax.apollo_mini_adamw, 0.01, weight_dimension_numbers=model.numbers
        ),
        lambda params: params,
        {"clip_norm": 0.5},
    ),
}


@pytest.mark.optimized
@pytest.mark.long("two whole programs each, compiled as for users")
@pytest.mark.parametrize(
    ("case", "offload"),
    [
        ("rows", ("moments",)),
        ("rows", ("weights",)),
        pytest.param("rows", BOTH, marks=pytest.mark.ci),
        ("8 bits", BOTH),
        ("int8 weights", BOTH),
        pytest.param("int8 weights", ("moments",), marks=pytest.mark.ci),
        ("APOLLO-Mini", BOTH),
    ],
)
def test_an_offloaded_run_is_bit_for_bit_the_resident_one(case, offload):
    make, form, arguments = CASES[case]
    tx, params = make(), form(model.init(jnp.float32))
    tokens = model.batches(2, arguments.get("micro_batches", 1))
    resident = model.layerwise(tx, **arguments)
    expected = model.train(resident.step, params, resident.init(params), tokens)

    training = model.layerwise(tx, offload=offload, **arguments)
    own = put(tx, params, offload)
    state = training.init(own)
    check_kinds(offload, own, state)
    found = model.train(training.step, own, state, tokens)
    check_kinds(offload, *found[:2])
    assert found[2] == expected[2]
    jax.tree.map(np.testing.assert_array_equal, found[:2], expected[:2])


def test_the_state_that_init_makes_lies_where_the_shardings_say():
    tx, params = rows(), model.init(jnp.float32)
    of_params, of_state = galore_optax.layerwise_shardings(tx, params, offload=BOTH)
    own = jax.device_put(params, of_params)
    training = model.layerwise(tx, offload=BOTH)
    state = training.init(own)
    assert kinds(state) == {
        jax.tree_util.keystr(path): sharding.memory_kind
        for path, sharding in jax.tree.leaves_with_path(of_state)
    }
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))
    compiled = jax.jit(training.init, in_shardings=(of_params,), out_shardings=of_state)
    assert kinds(compiled(own)) == kinds(state)


def test_donated_arrays_in_the_memory_of_the_machine_are_written_in_place():
    tx, params = rows(), model.init(jnp.float32)
    training, own = model.layerwise(tx, offload=BOTH), put(tx, params, BOTH)
    step = jax.jit(training.step, donate_argnums=(0, 1))
    (tokens,), state = model.batches(1), training.init(own)
    nbytes = sum(x.nbytes for x in jax.tree.leaves((own, state)))
    plan = step.lower(own, state, tokens, None).compile().memory_analysis()
    assert plan.alias_size_in_bytes + plan.host_alias_size_in_bytes == nbytes
    new, *_ = step(own, state, tokens, None)
    assert all(x.is_deleted() for x in jax.tree.leaves((own, state)))
    assert kinds(new) == kinds(own)


def bytes_of(tree, memory, part=1):
    """The bytes of a tree's arrays in a memory, and of each one's part of a device."""
    return sum(x.nbytes // part for x in jax.tree.leaves(tree) if x.sharding.memory_kind == memory)


@pytest.mark.parametrize("offload", [("moments",), ("weights",), BOTH])
@pytest.mark.parametrize("case", CASES)
def test_the_report_tells_what_lies_in_the_memory_of_the_machine(offload, case):
    make, prepare, _ = CASES[case]
    tx, params = make(), prepare(model.init(jnp.float32))
    report = galore_optax.memory_report(tx, params, offload=offload)
    own = put(tx, params, offload)
    found = (own, model.layerwise(tx, offload=offload).init(own))
    assert report.on_host == galore_optax.HostBytes(*(bytes_of(x, "pinned_host") for x in found))
    assert report.total == sum(bytes_of(found, kind) for kind in ("pinned_host", "device"))
    # None of its shapes is divided by the mesh.
    mesh, whole = jax.sharding.AbstractMesh((2,), ("data",)), jax.sharding.PartitionSpec()
    one = galore_optax.memory_report(tx, params, whole, mesh=mesh, offload=offload).of_device
    assert one.on_host == report.on_host
    assert (one.parameters, one.state) == tuple(bytes_of(x, "device") for x in found)
    for line in ("of it in the machine's memory  optimizer state", "kB, with the parameters"):
        assert line in str(report)
    assert galore_optax.memory_report(tx, params).on_host is None


def test_the_report_refuses_what_layerwise_refuses():
    params = model.init(jnp.float32)
    with pytest.raises(ValueError, match="the transformation keeps no state of the layers"):
        galore_optax.memory_report(optax.sgd(0.1), params, offload=("moments",))
    with pytest.raises(TypeError, match="under 'layers'"):
        galore_optax.memory_report(rows(), params, offload=("weights",), blocks="layers")


def test_without_offload_the_shardings_are_those_of_the_state():
    tx, params = rows(), jax.eval_shape(lambda: model.init(jnp.float32))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, found = galore_optax.layerwise_shardings(tx, params, whole)
    assert found == galore_optax.state_shardings(tx, params, whole)


MESH = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import galore_optax
from tests import layerwise_model as model
from tests.test_layerwise_offload import BOTH, check_kinds, rows

for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        tx, params = rows(), model.init(jnp.float32)
        tokens = jax.device_put(model.batches(1, shape=(4, 5)), NamedSharding(mesh, P()))
        whole = NamedSharding(mesh, P())
        found = []
        for offload in ((), BOTH):
            places = galore_optax.layerwise_shardings(tx, params, whole, offload=offload)
            training = model.layerwise(tx, offload=offload, slice_size=None)
            own = jax.device_put(params, places[0])
            state = training.init(own)
            check_kinds(offload, own, state)
            own, state, _ = jax.jit(training.step)(own, state, tokens[0], None)
            check_kinds(offload, own, state)
            found.append(jax.device_get((own, state)))
        # To the last bit but one: fusions may round otherwise.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *found)
"""


@pytest.mark.ci
def test_a_mesh_of_either_kind_of_axes_can():
    on_devices(2, "-c", MESH)


def test_a_device_without_that_memory_is_refused():
    message = "needs the memory 'pinned_host', which Toaster does not have; it has 'device', 'hbm'"
    with pytest.raises(ValueError, match=message):
        check_memories("Toaster", ["device", "hbm"])
    check_memories("Toaster", ["device", "pinned_host"])
    check_memories("Toaster", [])  # only compiled for, so that nothing is known of it


@pytest.mark.parametrize(
    ("offload", "error", "message"),
    [
        (("moment",), ValueError, "offload must be a tuple of .*; got 'moment' in it"),
        (
            "weights",
            TypeError,
            "offload must be a tuple of 'moments' and 'weights', or .*'weights'",
        ),
    ],
)
def test_other_words_are_refused(offload, error, message):
    with pytest.raises(error, match=message):
        model.layerwise(optax.sgd(0.1), offload=offload)
    with pytest.raises(error, match=message):
        galore_optax.layerwise_shardings(optax.sgd(0.1), model.init(jnp.float32), offload=offload)


def test_moments_that_there_are_not_are_refused():
    message = "offload has 'moments', and the transformation keeps no state of the layers"
    with pytest.raises(ValueError, match=message):
        model.layerwise(optax.sgd(0.1), offload=("moments",)).init(model.init(jnp.float32))
    with pytest.raises(ValueError, match=message):
        galore_optax.layerwise_shardings(optax.sgd(0.1), model.init(jnp.float32), offload=BOTH)
    training = model.layerwise(optax.sgd(0.1), offload=("weights",))
    training.init(model.init(jnp.float32))


@pytest.mark.parametrize(
    ("params_in", "state_in", "offload", "message"),
    [
        ((), (), ("weights",), "parameters' blocks/down/kernel lies in the memory 'device', and "),
        (("weights",), ("moments",), ("weights",), "state's .* lies in the memory 'pinned_host'"),
        ((), ("moments",), (), r"with offload=\(\) it has to lie in 'device'"),
    ],
)
def test_what_lies_in_another_memory_is_refused(params_in, state_in, offload, message):
    tx, params = optax.adam(0.1), model.init(jnp.float32)
    state = jax.device_put(
        tx.init(params), galore_optax.layerwise_shardings(tx, params, offload=state_in)[1]
    )
    step = model.layerwise(tx, offload=offload).step
    with pytest.raises(ValueError, match=f"{message}(.|\\n)*layerwise_shardings"):
        jax.eval_shape(step, put(tx, params, params_in), state, model.batches(1)[0], None)


def test_micro_batches_at_rank_r_are_refused():
    tx, params = rows(accumulation_steps=2), model.init(jnp.float32)
    training = model.layerwise(tx, offload=BOTH, micro_batches=2)
    with pytest.raises(ValueError, match="leave out galore's accumulation_steps"):
        jax.eval_shape(training.step, params, tx.init(params), model.batches(1, 2)[0], None)
