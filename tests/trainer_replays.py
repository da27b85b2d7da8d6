"""Small models with the names and axes of trainers, and what these do with optimizer state.

Each replay is written from the conventions of its trainer, as docs/trainers.md describes them, for
eight devices, and trains in the way that this page gives. What it returns is compared in
tests/test_trainers.py, to which it comes as JSON from a process of its own.
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
import sys
import types
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import galore_optax
from galore_optax import DimensionNumbers, trainers
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


# Tunix: NNX modules, whose parameters name axes of the mesh.


def tunix():
    mesh = auto_mesh((4, 2), ("fsdp", "tp"))
    into_heads, into, out = P("fsdp", "tp", None), P("fsdp", "tp"), P("tp", "fsdp")
    shapes = {
        "attn": {
            **{f"{k}_proj": {"w": ((D, N, H), into_heads)} for k in "qkv"},
            "o_proj": {"w": ((N, H, D), P("tp", None, "fsdp"))},
        },
        "mlp": {
            **{k: {"kernel": ((D, F), into)} for k in ("gate_proj", "up_proj")},
            "down_proj": {"kernel": ((F, D), out)},
        },
        "input_layernorm": {"w": ((D,), P("fsdp"))},
        "post_attention_layernorm": {"w": ((D,), P("fsdp"))},
    }
    whole = {
        "embedder": {"input_embedding": ((V, D), P("tp", "fsdp"))},
        "layers": [shapes],
        "final_norm": {"w": ((D,), P("fsdp"))},
        "lm_head": {"w": ((D, V), P("fsdp", "tp"))},
    }
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    values = weights(jax.tree.map(lambda x: x[0], whole, is_leaf=is_pair))
    specs = jax.tree.map(lambda x: x[1], whole, is_leaf=is_pair)

    class Module(nnx.Module):
        """A part of the model, with its parameters or modules as attributes."""

        def __init__(self, values, specs):
            for name, value in values.items():
                of_name = specs[name]
                if isinstance(value, dict):
                    module = Module(value, of_name)
                elif isinstance(value, list):
                    module = nnx.List([Module(*x) for x in zip(value, of_name, strict=True)])
                else:
                    module = nnx.Param(jnp.asarray(value), out_sharding=of_name)
                setattr(self, name, module)

    def forward(model):
        def of_layer(layer):
            attn, mlp = layer.attn, layer.mlp
            return {
                **{k: getattr(attn, f"{k}_proj").w[...] for k in "qkvo"},
                **{k: getattr(mlp, f"{k}_proj").kernel[...] for k in ("gate", "up", "down")},
                "norms": (layer.input_layernorm.w[...], layer.post_attention_layernorm.w[...]),
            }

        return loss_of(
            {
                "embed": model.embedder.input_embedding[...],
                "layers": [of_layer(layer) for layer in model.layers],
                "norm": model.final_norm.w[...],
                "head": model.lm_head.w[...],
            }
        )

    def shard(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec or P()))

    def step(model, optimizer):
        value, grads = nnx.value_and_grad(forward)(model)
        before = jax.tree.map(lambda x: x.dtype, nnx.state(optimizer, nnx.OptState))
        optimizer.update(model, grads)
        after = jax.tree.map(lambda x: x.dtype, nnx.state(optimizer, nnx.OptState))
        assert before == after
        return value

    with jax.set_mesh(mesh):
        model = Module(values, specs)
        tx = optimizer(trainers.TUNIX)
        optimizer_ = nnx.Optimizer(model, tx, wrt=nnx.Param)
        state = nnx.state(optimizer_, nnx.OptState)
        by_names = nnx.get_partition_spec(state)
        nnx.update(optimizer_, jax.tree.map(shard, state, by_names))
        jitted = nnx.jit(step)
        losses = [jitted(model, optimizer_) for _ in range(STEPS)]
    params = nnx.state(model, nnx.Param)
    specs = bare(nnx.get_partition_spec(params))
    return seen(tx, params, specs, mesh, optimizer_.opt_state, losses)


# MaxText: logical names of axes, and rules that say what they stand for on a mesh that has all of
# its axes; layers are stacked along the second axis.

MAXTEXT_MESH = {"data": 1, "stage": 1, "fsdp": 4, "fsdp_transpose": 1, "tensor": 2, "expert": 1}
MAXTEXT_RULES = (
    ("vocab", ("tensor",)),
    ("embed_vocab", ("fsdp", "fsdp_transpose", "expert")),
    ("heads", ("tensor",)),
    ("q_heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("kv", ()),
    ("kv_head_dim", ()),
    ("mlp", ("fsdp_transpose", "tensor")),
    ("embed", ("fsdp", "fsdp_transpose", "expert")),
    ("embed", ("fsdp", "expert")),
    ("norm", ("tensor",)),
    ("layers", "stage"),
)


def maxtext_leaves():
    """Values and names of all parameters."""
    of_keys = ((D, L, N, H), ("embed", "layers", "kv_heads", "kv_head_dim"))
    into = {"kernel": ((D, L, F), ("embed", "layers", "mlp"))}
    norm = {"scale": ((D, L), ("norm", "layers"))}
    layers = {
        "self_attention": {
            "query": {"kernel": ((D, L, N, H), ("embed", "layers", "q_heads", "kv"))},
            "key": {"kernel": of_keys},
            "value": {"kernel": of_keys},
            "out": {"kernel": ((N, L, H, D), ("heads", "layers", "kv", "embed"))},
        },
        "mlp": {
            "wi_0": into,
            "wi_1": into,
            "wo": {"kernel": ((F, L, D), ("mlp", "layers", "embed"))},
        },
        "pre_self_attention_layer_norm": norm,
        "post_self_attention_layer_norm": norm,
    }
    whole = {
        "token_embedder": {"embedding": ((V, D), ("vocab", "embed_vocab"))},
        "decoder": {
            "layers": layers,
            "decoder_norm": {"scale": ((D,), ("norm",))},
            "logits_dense": {"kernel": ((D, V), ("embed_vocab", "vocab"))},
        },
    }
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    values = weights(jax.tree.map(lambda x: x[0], whole, is_leaf=is_pair))
    return values, jax.tree.map(lambda x: x[1], whole, is_leaf=is_pair)


def maxtext_loss(params):
    stacked = params["decoder"]["layers"]
    attention, mlp = stacked["self_attention"], stacked["mlp"]
    names = {"q": "query", "k": "key", "v": "value", "o": "out"}

    def of_layer(i):
        of_mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
        norms = ("pre_self_attention_layer_norm", "post_self_attention_layer_norm")
        return {
            **{k: attention[name]["kernel"][:, i] for k, name in names.items()},
            **{k: mlp[name]["kernel"][:, i] for k, name in of_mlp.items()},
            "norms": [stacked[name]["scale"][:, i] for name in norms],
        }

    return loss_of(
        {
            "embed": params["token_embedder"]["embedding"],
            "layers": [of_layer(i) for i in range(L)],
            "norm": params["decoder"]["decoder_norm"]["scale"],
            "head": params["decoder"]["logits_dense"]["kernel"],
        }
    )


def maxtext_sharding(names, mesh):
    spec = nn.logical_to_mesh_axes(names, MAXTEXT_RULES)

    def of_axis(axes):
        left = [a for a in np.atleast_1d(axes if axes is not None else ()) if mesh.shape[a] > 1]
        return tuple(map(str, left))

    return NamedSharding(mesh, P(*map(of_axis, spec)))


def maxtext_linen():
    mesh = auto_mesh(tuple(MAXTEXT_MESH.values()), tuple(MAXTEXT_MESH))
    values, names = maxtext_leaves()
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    is_spec = lambda x: isinstance(x, P)  # noqa: E731

    def initial(tx):
        boxed = jax.tree.map(
            lambda x, n: nn.LogicallyPartitioned(jnp.asarray(x), n), values, names
        )
        return boxed, tx.init(boxed)

    def shardings(tx):
        with nn.logical_axis_rules(MAXTEXT_RULES):
            annotations = nn.get_partition_spec(jax.eval_shape(functools.partial(initial, tx)))
        return jax.tree.map(lambda x: maxtext_sharding(x, mesh), annotations, is_leaf=is_spec)

    told = optimizer(trainers.MAXTEXT)
    tx = trainers.on_mesh(told, mesh)
    of_state = shardings(tx)
    with nn.logical_axis_rules(MAXTEXT_RULES):
        start = jax.jit(functools.partial(initial, tx), out_shardings=of_state)()
    params, state = jax.tree.map(lambda x: x.unbox() if is_box(x) else x, start, is_leaf=is_box)
    _, state, losses = plain_steps(tx, maxtext_loss, params, state, (*of_state, None))
    specs = jax.tree.map(lambda x: x.spec, of_state[0])
    # Without on_mesh each side of a matrix has its own names only.
    shapes = jax.eval_shape(lambda: told.init(values))
    not_told = jax.tree.leaves(shardings(told)[1])
    sizes = zip(jax.tree.leaves(shapes), not_told, strict=True)
    without = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in sizes)
    return seen(tx, params, specs, mesh, state, losses, without=without)


def maxtext_nnx():
    mesh = auto_mesh(tuple(MAXTEXT_MESH.values()), tuple(MAXTEXT_MESH))
    values, names = maxtext_leaves()
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    tx = trainers.on_mesh(optimizer(trainers.MAXTEXT), mesh)

    class Part(nnx.Module):
        def __init__(self, values, names):
            for key, value in values.items():
                of_key = names[key]
                is_scanned = "layers" in of_key and not isinstance(value, dict)
                scan = {nnx.PARTITION_NAME: "layers", "param_scan_axis": 1} if is_scanned else {}
                setattr(
                    self,
                    key,
                    Part(value, of_key)
                    if isinstance(value, dict)
                    else nnx.Param(jnp.asarray(value), out_sharding=of_key, **scan),
                )

    class TrainState(nnx.Module):
        def __init__(self):
            self.model = Part(values, names)
            self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)

    def sharding(variable):
        of_axes = variable.get_metadata().get("out_sharding")
        of_axes = list(of_axes) if of_axes else []
        scanned = variable.get_metadata().get(nnx.PARTITION_NAME)
        if of_axes and scanned and scanned not in of_axes:
            of_axes.insert(variable.get_metadata()["param_scan_axis"], scanned)
        return variable.replace(maxtext_sharding(tuple(of_axes), mesh))

    with nnx.use_eager_sharding(False), nn.logical_axis_rules(MAXTEXT_RULES):
        graphdef, abstract = nnx.split(nnx.eval_shape(TrainState))
        of_state = jax.tree.map(sharding, abstract, is_leaf=is_variable)
        of_state = jax.tree.map(lambda x: x, of_state)

        @functools.partial(jax.jit, out_shardings=of_state)
        def create():
            return nnx.state(TrainState())

        @functools.partial(jax.jit, out_shardings=(of_state, None))
        def step(state):
            merged = nnx.merge(graphdef, state)

            def loss(model):
                return maxtext_loss(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

            value, grads = nnx.value_and_grad(loss)(merged.model)
            merged.optimizer.update(merged.model, grads)
            return nnx.state(merged), value

        state, losses = create(), []
        for _ in range(STEPS):
            state, value = step(state)
            losses.append(value)
        merged = nnx.merge(graphdef, state)
    params = nnx.to_pure_dict(nnx.state(merged.model, nnx.Param))
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    return seen(tx, params, specs, mesh, merged.optimizer.opt_state, losses)


if __name__ == "__main__":
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))
