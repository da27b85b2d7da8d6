"""A small decoder in the layouts of trainers, and what is to be seen of training it.

The replays of trainers, in tests/trainer_named.py and others, are written from the conventions of
each, as docs/trainers.md describes them, for eight devices.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import galore_optax
from galore_optax import DimensionNumbers
from galore_optax._trees import bare, leaves_with_paths

P = PartitionSpec
V, D, N, H, F, L = 64, 32, 4, 8, 64, 2  # vocabulary, width, heads, width of a head and of an MLP
RANK, STEPS = 6, 30  # The rank divides neither by 4 nor by 8 devices.
LAST = DimensionNumbers(-2, -1)
OUTPUT_FIRST = DimensionNumbers(-1, -2)


def optimizer(numbers=None, make=galore_optax.galore_adamw, **options):
    options = {"rank": RANK, "update_proj_gap": 10, "scale": 1.0, **options}
    return make(1e-2, weight_dimension_numbers=numbers, projector="power_iteration", **options)


# The decoder, for weights as Flax has them; every trainer's are brought into this form.


def decoder(w, tokens):
    """Returns logits; `w["layers"]` are q, k, v (D, N, H), o (N, H, D), gate, up, down, norms."""
    x = w["embed"][tokens]
    for layer in w["layers"]:
        y = rms_norm(x, layer["norms"][0])
        q, k, v = (jnp.einsum("btd,dnh->btnh", y, layer[name]) for name in "qkv")
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        x = x + jnp.einsum("bnts,bsnh,nhd->btd", weights, v, layer["o"])
        y = rms_norm(x, layer["norms"][1])
        x = x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]
    return rms_norm(x, w["norm"]) @ w["head"]


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(V, size=(8, 9))


def loss_of(w):
    logits = decoder(w, tokens()[:, :-1])
    labels = tokens()[:, 1:]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def weights(shapes, seed=0):
    """A tree of small weights; those of norms are ones."""
    rng = np.random.default_rng(seed)

    def of_shape(path, shape):
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" in names:
            return np.ones(shape, np.float32)
        return (0.1 * rng.normal(size=shape)).astype(np.float32)

    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)  # noqa: E731
    return jax.tree_util.tree_map_with_path(of_shape, shapes, is_leaf=is_shape)


def unstacked(tree):
    """The layers of a tree of stacked weights."""
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(L)]


# What is seen of a run.


def bytes_of_device(tree):
    """The most bytes that a device has of a tree of arrays."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for x in jax.tree.leaves(tree):
        for shard in x.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return max(sizes.values())


def seen(tx, params, specs, mesh, state, losses, **others):
    report = galore_optax.memory_report(tx, bare(params), specs, mesh=mesh)
    adamw = galore_optax.memory_report(optax.adamw(1e-3), bare(params), specs, mesh=mesh)
    return {
        "losses": [float(x) for x in losses],
        "found": bytes_of_device(state),
        "planned": report.of_device.state,
        "adamw": adamw.of_device.state,
        "moments": {
            path: x.shape for path, x in leaves_with_paths(bare(optax.tree.get(bare(state), "mu")))
        },
        "shapes": {path: jnp.shape(x) for path, x in leaves_with_paths(bare(params))},
        **others,
    }


def spec_tree(params, spec_of):
    """The spec of each leaf of a tree without boxes, from its path and shape."""
    leaves = leaves_with_paths(params)
    return jax.tree.structure(params).unflatten([spec_of(path, x.shape) for path, x in leaves])


def named(specs, mesh):
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def auto_mesh(sizes, names):
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def plain_steps(tx, loss, params, state, shardings=None):
    """Trains as loops do that hand `update` to `jit`; returns parameters, state and losses."""

    @functools.partial(jax.jit, out_shardings=shardings)
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(STEPS):
        params, state, value = step(params, state)
        losses.append(value)
    return params, state, losses
