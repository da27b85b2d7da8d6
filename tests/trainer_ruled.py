"""Trainers that shard state by rules, on its paths or its shapes: EasyDeL, openpi, Kauldron."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

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
    bytes_of_device,
    loss_of,
    optimizer,
    plain_steps,
    seen,
    unstacked,
    weights,
)

# EasyDeL: NNX variables without names, and regular expressions on the paths of all state.

EASYDEL_RULES = (
    (r"^(?:.*/)?model/embed_tokens/embedding(?:/.*)?$", P("tp", "fsdp")),
    (r"^(?:.*/)?model/layers/\d+/self_attn/[qkv]_proj/kernel(?:/.*)?$", P("fsdp", "tp")),
    (r"^(?:.*/)?model/layers/\d+/self_attn/o_proj/kernel(?:/.*)?$", P("tp", "fsdp")),
    (r"^(?:.*/)?model/layers/\d+/mlp/(gate|up)_proj/kernel(?:/.*)?$", P("fsdp", "tp")),
    (r"^(?:.*/)?model/layers/\d+/mlp/down_proj/kernel(?:/.*)?$", P("tp", "fsdp")),
    (r"^(?:.*/)?lm_head/kernel(?:/.*)?$", P("fsdp", "tp")),
    (r".*", P()),
)


def flax_leaves():
    """The LLaMA of Flax: EasyDeL's names, which are those of Hugging Face."""
    attn = {f"{k}_proj": {"kernel": (D, N * H)} for k in "qkv"}
    layer = {
        "self_attn": {**attn, "o_proj": {"kernel": (N * H, D)}},
        "mlp": {
            **{k: {"kernel": (D, F)} for k in ("gate_proj", "up_proj")},
            "down_proj": {"kernel": (F, D)},
        },
        "input_layernorm": {"kernel": (D,)},
        "post_attention_layernorm": {"kernel": (D,)},
    }
    model = {
        "embed_tokens": {"embedding": (V, D)},
        "layers": {0: layer},
        "norm": {"kernel": (D,)},
    }
    return weights({"model": model, "lm_head": {"kernel": (D, V)}})


def flax_loss(params):
    model = params["model"]

    def of_layer(layer):
        attn, mlp = layer["self_attn"], layer["mlp"]
        return {
            **{k: attn[f"{k}_proj"]["kernel"].reshape(D, N, H) for k in "qkv"},
            "o": attn["o_proj"]["kernel"].reshape(N, H, D),
            **{k: mlp[f"{k}_proj"]["kernel"] for k in ("gate", "up", "down")},
            "norms": [layer[f"{k}_layernorm"]["kernel"] for k in ("input", "post_attention")],
        }

    return loss_of(
        {
            "embed": model["embed_tokens"]["embedding"],
            "layers": [of_layer(layer) for layer in model["layers"].values()],
            "norm": model["norm"]["kernel"],
            "head": params["lm_head"]["kernel"],
        }
    )


def variable(x):
    """A variable of NNX as it is in a state."""
    found = nnx.Param(jnp.asarray(x))
    return found.to_state() if hasattr(found, "to_state") else found


def easydel():
    mesh = auto_mesh((4, 2), ("fsdp", "tp"))
    params = nnx.State(jax.tree.map(variable, flax_leaves()))

    def shardings(rules, tree):
        def of_leaf(keys, x):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            spec = next(spec for rule, spec in rules if re.search(rule, path)) if x.shape else P()
            parts = zip(x.shape, spec, strict=False)
            axes = [a if n % math.prod(sizes(a)) == 0 else None for n, a in parts]
            return NamedSharding(mesh, P(*axes))

        def sizes(axes):
            return [mesh.shape[str(a)] for a in np.atleast_1d(axes if axes is not None else ())]

        return jax.tree_util.tree_map_with_path(of_leaf, tree)

    tx = optimizer(trainers.EASYDEL)
    params = jax.device_put(params, shardings(EASYDEL_RULES, params))
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    of_state = galore_optax.state_partition_specs(tx, params, specs, mesh=mesh)
    rules = (*trainers.partition_rules(of_state), *EASYDEL_RULES)
    shapes = jax.eval_shape(tx.init, params)
    state = jax.jit(tx.init, out_shardings=shardings(rules, shapes))(params)
    state = jax.device_put(state, shardings(rules, state))
    lie = (jax.tree.map(lambda x: x.sharding, (params, state)), None)

    @functools.partial(jax.jit, out_shardings=lie)
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: flax_loss(nnx.to_pure_dict(p)))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    losses = []
    for _ in range(STEPS):
        (params, state), value = step(params, state)
        losses.append(value)
    plain = jax.device_put(state, shardings(EASYDEL_RULES, state))
    without = bytes_of_device(plain)
    return seen(tx, params, specs, mesh, state, losses, without=without)


# Gemma's names: stacked over layers in openpi, one by one in Kauldron; both shard by shape.


def by_shape(tree, mesh, axis, least, fewest_axes):
    """Divides the largest axis that can be, of arrays of so many bytes and axes at least."""

    def of_leaf(x):
        spec = [None] * len(x.shape)
        if len(x.shape) >= fewest_axes and math.prod(x.shape) * x.dtype.itemsize >= least:
            sizes = sorted(range(len(x.shape)), key=lambda i: -x.shape[i])
            fitting = next((i for i in sizes if x.shape[i] % mesh.shape[axis] == 0), None)
            if fitting is not None:
                spec[fitting] = axis
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(of_leaf, tree)


def gemma_leaves(*stack):
    layer = {
        "attn": {
            "q_einsum": {"w": (*stack, N, D, H)},
            "kv_einsum": {"w": (*stack, 2, N, D, H)},
            "attn_vec_einsum": {"w": (*stack, N, H, D)},
        },
        "mlp": {"gating_einsum": (*stack, 2, D, F), "linear": (*stack, F, D)},
        "pre_attention_norm": {"scale": (*stack, D)},
        "pre_ffw_norm": {"scale": (*stack, D)},
    }
    layers = {"layers": layer} if stack else {"layer_0": layer}
    embedder = {"input_embedding": (V, D)}
    return weights({"embedder": embedder, **layers, "final_norm": {"scale": (D,)}})


def gemma_loss(params):
    def of_layer(layer):
        attn, mlp = layer["attn"], layer["mlp"]
        k, v = attn["kv_einsum"]["w"]
        heads_last = functools.partial(jnp.einsum, "ndh->dnh")
        return {
            **{"q": heads_last(attn["q_einsum"]["w"]), "k": heads_last(k), "v": heads_last(v)},
            "o": attn["attn_vec_einsum"]["w"],
            **{"gate": mlp["gating_einsum"][0], "up": mlp["gating_einsum"][1]},
            "down": mlp["linear"],
            "norms": [layer[f"pre_{k}_norm"]["scale"] for k in ("attention", "ffw")],
        }

    stack = params.get("layers")
    layers = unstacked(stack) if stack else None
    return loss_of(
        {
            "embed": params["embedder"]["input_embedding"],
            "layers": [of_layer(layer) for layer in layers or [params["layer_0"]]],
            "norm": params["final_norm"]["scale"],
            "head": params["embedder"]["input_embedding"].T,
        }
    )


def openpi():
    mesh = auto_mesh((2, 4), ("batch", "fsdp"))
    # Matrices have more bytes than this, and what has their rank has less.
    sharded = functools.partial(by_shape, mesh=mesh, axis="fsdp", least=6000, fewest_axes=2)
    tx = optimizer(trainers.GEMMA)

    def initial():
        values = {"PaliGemma": {"llm": gemma_leaves(L)}}
        params = nnx.State(jax.tree.map(variable, values))
        return params, tx.init(params)

    shapes = jax.eval_shape(initial)
    of_params, of_state = sharded(shapes)
    without = sum(
        math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
        for x, s in zip(jax.tree.leaves(shapes[1]), jax.tree.leaves(of_state), strict=True)
    )
    of_state = galore_optax.state_shardings(tx, shapes[0], of_params)
    params, state = jax.jit(initial, out_shardings=(of_params, of_state))()

    def loss(params):
        return gemma_loss(nnx.to_pure_dict(params)["PaliGemma"]["llm"])

    lie = (of_params, of_state, None)
    params, state, losses = plain_steps(tx, loss, params, state, lie)
    specs = jax.tree.map(lambda x: x.spec, bare(of_params))
    return seen(tx, params, specs, mesh, state, losses, without=without)


def kauldron():
    mesh = Mesh(np.asarray(jax.devices()), ("devices",))
    fsdp = functools.partial(by_shape, mesh=mesh, axis="devices", least=1, fewest_axes=1)
    tx = optimizer(trainers.GEMMA)

    def constrained(x, shardings):
        """Shardings may be callables of what they are for."""

        def merge(sharding, part):
            if callable(sharding):
                return constrained(part, sharding(part))
            return jax.lax.with_sharding_constraint(part, sharding)

        return jax.tree.map(merge, shardings, x)

    strategy = {"params": fsdp, "opt_state": fsdp}

    @jax.jit
    def initial():
        params = jax.tree.map(jnp.asarray, gemma_leaves())
        return constrained({"params": params, "opt_state": tx.init(params)}, strategy)

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(gemma_loss)(state["params"])
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return constrained({"params": params, "opt_state": opt_state}, strategy), value

    state, losses = initial(), []
    for _ in range(STEPS):
        state, value = step(state)
        losses.append(value)
    specs = jax.tree.map(lambda x: x.spec, fsdp(state["params"]))
    return seen(tx, state["params"], specs, mesh, state["opt_state"], losses)
