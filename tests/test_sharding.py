"""galore on a mesh of Explicit axes: the numbers of one device, and state sharded as parameters."""

import os
import subprocess
import sys

EXPLICIT = """
import jax, jax.numpy as jnp, numpy as np, optax, pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import galore_optax

jax.config.update("jax_enable_x64", True)  # Adam amplifies round-off
mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit,) * 2)
shapes = {
    "rows": ((32, 48), P("x", None)),
    "both": ((48, 32), P("x", "y")),
    "bias": ((32,), P("y")),
    "stack": ((2, 24, 32), P("y", None, "x")),
    "heads": ((32, 4, 12), P(None, "x", None)),
}
numbers = {
    "rows": galore_optax.DimensionNumbers(0, 1),
    "both": galore_optax.DimensionNumbers(0, 1),
    "bias": None,
    "stack": galore_optax.DimensionNumbers(1, 2),
    "heads": galore_optax.DimensionNumbers(0, (1, 2)),
}
rng = np.random.default_rng(0)
host = {name: rng.normal(size=shape) for name, (shape, _) in shapes.items()}
targets = [{k: rng.normal(size=v.shape) for k, v in host.items()}] * 2
targets += [{k: rng.normal(size=v.shape) for k, v in host.items()}]

def put(tree):
    return {k: jax.device_put(x, NamedSharding(mesh, shapes[k][1])) for k, x in tree.items()}

def loss(params, target):
    return sum(jnp.sum((params[k] - target[k]) ** 2) for k in params)

def train(tx, params, targets):
    state = tx.init(params)

    def step(carry, target):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, target), state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *targets)
    return jax.jit(lambda carry, xs: jax.lax.scan(step, carry, xs)[0])((params, state), stacked)

adamw = optax.adamw(1e-2, weight_decay=0.1)
low_bit = galore_optax.low_bit(optax.scale_by_adam(), min_size=64, block_size=16)
def galore(inner, **options):
    return lambda **shared: galore_optax.galore(inner, **{**shared, **options})

def injected(**shared):
    make = optax.inject_hyperparams(galore_optax.galore_adamw, static_args=("rank",))
    return make(1e-2, weight_decay=0.1, projector="eigh", **shared)

both_sides = {"side": "both", "projector": "power_iteration", "stagger": True}
few_bits = {"projector_dtype": "int4", "projector": "eigh", "refresh": "lazy"}
micro_batches = {"projector": "rows", "accumulation_steps": 3, "diagnostics": True}
variants = {
    "svd": galore(adamw),
    "both sides": galore(adamw, **both_sides),
    "few bits": galore(low_bit, **few_bits),
    "micro-batches": galore(adamw, **micro_batches),
    "injected": injected,
}
for name, make in variants.items():
    keys = shapes if name == "svd" else ("both", "stack")
    params, *data = ({k: x[k] for k in keys} for x in (host, *targets))
    given = {k: numbers[k] for k in keys}
    options = {"rank": 8, "update_proj_gap": 2, "weight_dimension_numbers": given}
    expected, _ = train(make(**options), params, data)
    with jax.set_mesh(mesh):
        tx = make(**options)  # here, so that arrays that it makes are on the mesh
        found, state = train(tx, put(params), [put(x) for x in data])
    for k, x in found.items():
        assert jax.typeof(x).sharding.spec == shapes[k][1], (name, k)
        np.testing.assert_allclose(x, expected[k], rtol=1e-6, atol=1e-7, err_msg=name + k)
        assert np.abs(x - params[k]).max() > 1e-3
    if name == "svd":
        with jax.set_mesh(mesh):
            again = galore_optax.refresh(tx, put(data[0]), state, found)
        assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, state)
        spec = lambda x: tuple(jax.typeof(x).sharding.spec)
        mu = optax.tree.get(state, "mu")
        assert spec(state.subspace.left["rows"]) == ("x", None)
        assert spec(mu["rows"]) == (None, None)
        assert spec(state.subspace.right["both"]) == ("y", None)
        assert spec(mu["both"]) == ("x", None)
        assert spec(mu["bias"]) == ("y",)
        assert spec(state.subspace.left["stack"]) == ("y", None, None)
        assert spec(state.subspace.due["stack"]) == ("y",)
        assert spec(mu["stack"]) == ("y", None, "x")
        assert spec(mu["heads"]) == (None, "x")

tx = galore_optax.galore(adamw, rank=8)
matrix = {"rows": put(host)["rows"]}
with pytest.raises(ValueError, match=r"Explicit axes, {'x': 2, 'y': 2}, outside .* jax.set_mesh"):
    tx.init(matrix)
with jax.set_mesh(mesh):
    state = tx.init(matrix)
with pytest.raises(ValueError, match="outside of that mesh"):
    jax.jit(tx.update)(matrix, state, matrix)

training = galore_optax.layerwise(
    optax.adam(1e-2),
    embed=lambda params, batch: batch,
    block=lambda layer, x: x @ layer,
    head_loss=lambda params, x, batch: jnp.sum(x),
)
with jax.set_mesh(mesh), pytest.raises(ValueError, match="layerwise needs .* of Auto axes"):
    training.init({"blocks": put(host)["stack"]})
"""


def test_explicit_axes():
    """On 4 devices, in a process of its own."""
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXPLICIT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
