"""The layer-wise step over several devices: the numbers of one, and no kernel goes around."""

import pytest

from tests.devices import on_devices

SHARDED = """
import re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import galore_optax
from tests import layerwise_model as model

mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,))
D, F = 32, 48
params = jax.device_get(model.init(jnp.float32, d=D, f=F, v=24))  # apart from what is donated
tokens = model.batches(5, shape=(8, 6))
galore = {"rank": 8, "update_proj_gap": 3, "weight_dimension_numbers": model.numbers}

def sharded(tree):
    # Kernels, and what the state has of them, on their output axis.
    def of(path, x):
        is_cut = "kernel" in jax.tree_util.keystr(path) and x.ndim == 3 and x.shape[-1] >= D
        return NamedSharding(mesh, P(None, None, "model") if is_cut else P())
    return jax.tree.map_with_path(of, tree)

def close(path, found, expected, tolerance):
    error = np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-3)
    assert error < tolerance, (jax.tree_util.keystr(path), error)

def galore_by(projector):
    return galore_optax.galore_adamw(0.01, eps=1e-4, projector=projector, **galore)

adamw = optax.adamw(0.01, eps=1e-4)
power, rows = galore_by("power_iteration"), galore_by("rows")

for up, down, mix in eval(sys.argv[1]):
    tx = model.partition(up=up, down=down, mix=mix, rest=adamw)
    training = model.layerwise(tx, clip_norm=4.0, slice_size=None)
    state = jax.device_get(training.init(params))
    expected = model.train(training.step, params, state, tokens)

    places = sharded(params), sharded(state)
    assert sum(x.spec != P() for x in jax.tree.leaves(places[1])) >= 4
    own, whole = jax.device_put((params, state), places), NamedSharding(mesh, P())
    step = jax.jit(training.step, donate_argnums=(0, 1), out_shardings=(*places, None))
    batch = [jax.device_put(x, whole) for x in tokens]
    compiled = step.lower(*own, batch[0], None).compile()
    donated = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(own))
    assert compiled.memory_analysis().alias_size_in_bytes == donated
    collectives = re.findall(r"= \\w+\\[([0-9,]*)\\]\\S* all-(?:gather|to-all)", compiled.as_text())
    assert collectives
    moved = [sorted(map(int, x.split(",")))[-2:] for x in collectives if "," in x]
    assert [D, D] not in moved and [D, F] not in moved, moved

    metrics = []
    for i, one in enumerate(batch):
        *own, new = step(*own, one, None)
        metrics.append({name: float(x) for name, x in new.items()})
    found = jax.device_get(own[0])
    jax.tree.map_with_path(lambda *x: close(*x, 1e-4), found, jax.device_get(expected[0]))
    for a, b in zip(metrics, expected[2], strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
"""


@pytest.mark.parametrize(
    "transformations",
    [
        "[(power, rows, adamw)]",
        pytest.param("[(rows, adamw, power), (adamw, power, rows)]", marks=pytest.mark.ci),
    ],
)
@pytest.mark.since(jax="0.7")
def test_sharded_kernels_are_updated_where_they_are(transformations):
    """On 4 devices, in a process of its own; all transformations of each kernel in CI."""
    on_devices(4, "-W", "error", "-c", SHARDED, transformations)
