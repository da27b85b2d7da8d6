"""Trainers that shard state by the names of axes: Tunix and MaxText."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

import galore_optax
from galore_optax import trainers
from galore_optax._trees import bare
from tests.trainer_models import (
    STEPS,
    D,
    F,
    H,
    L,
    N,
    P,
    V,
    auto_mesh,
    loss_of,
    named,
    optimizer,
    plain_steps,
    seen,
    spec_tree,
    weights,
)

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
        boxed = jax.tree.map(lambda x, n: nn.LogicallyPartitioned(jnp.asarray(x), n), values, names)
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


def zero_1():
    """State is divided over data too, over which parameters are not."""
    mesh = auto_mesh((4, 2), ("data", "tensor"))
    values, _ = maxtext_leaves()
    into = {"query", "key", "value", "wi_0", "wi_1"}

    def over(path, axes):
        """The tensor axis, and where it is divided, the axis of data."""
        if re.search("norm|embed|logits", path):
            return P()
        if into & set(path.split("/")):
            return P(axes, None, "tensor")
        return P("tensor", None, None, axes) if "out" in path else P("tensor", None, axes)

    params_lie = spec_tree(values, lambda path, shape: over(path, None))
    specs = spec_tree(values, lambda path, shape: over(path, "data"))
    params = jax.device_put(values, named(params_lie, mesh))
    tx = optimizer(trainers.MAXTEXT)
    of_state = galore_optax.state_shardings(tx, params, named(specs, mesh))
    state = jax.jit(tx.init, out_shardings=of_state)(params)
    lie = (named(params_lie, mesh), of_state, None)
    params, state, losses = plain_steps(tx, maxtext_loss, params, state, lie)
    down = params["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert down.sharding.shard_shape(down.shape) == (F // 2, L, D)
    return seen(tx, params, specs, mesh, state, losses)
