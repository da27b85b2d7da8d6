"""Libraries that leave it to the user where state lies: Equinox, Haiku, numpyro; and brax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

import galore_optax
from tests.trainer_models import (
    LAST,
    OUTPUT_FIRST,
    RANK,
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
    unstacked,
    weights,
)
from tests.trainer_ruled import flax_leaves, flax_loss

NAMES = ("query", "key", "value")

# Equinox: modules that are trees, (output, input), with None where there is no parameter.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    weight: jax.Array
    bias: jax.Array | None
    features: int = dataclasses.field(metadata={"static": True}, default=0)

    def __call__(self, x):
        return self.weight @ x + self.bias


def equinox():
    mesh = auto_mesh((8,), ("fsdp",))
    of_layers = {
        **{k: Linear((L, N * H, D), (L, N * H)) for k in ("query", "key", "value")},
        "output": Linear((L, D, N * H), None),
        **{k: Linear((L, F, D), None) for k in ("gate", "up")},
        "down": Linear((L, D, F), None),
        **{k: {"weight": (L, D)} for k in ("norm1", "norm2")},
    }
    values = weights(
        {
            "embedding": {"weight": (V, D)},
            "blocks": of_layers,
            "norm": {"weight": (D,)},
            "lm_head": Linear((V, D), None),
        }
    )

    def loss(model):
        def of_layer(b):
            heads = lambda k: b[k].weight.T.reshape(D, N, H)  # noqa: E731
            return {
                **{k: heads(name) for k, name in zip("qkv", NAMES, strict=True)},
                "o": b["output"].weight.T.reshape(N, H, D),
                **{k: b[k].weight.T for k in ("gate", "up", "down")},
                "norms": (b["norm1"]["weight"], b["norm2"]["weight"]),
            }

        layers = [of_layer(layer) for layer in unstacked(model["blocks"])]
        biases = jnp.mean(model["blocks"]["query"].bias ** 2)
        return biases + loss_of(
            {
                "embed": model["embedding"]["weight"],
                "layers": layers,
                "norm": model["norm"]["weight"],
                "head": model["lm_head"].weight.T,
            }
        )

    specs = spec_tree(values, lambda path, shape: P(*[None] * (len(shape) - 1), "fsdp"))
    model = jax.device_put(values, named(specs, mesh))  # eqx.filter_shard
    tx = optimizer(OUTPUT_FIRST)
    state = tx.init(model)
    lie = jax.tree.map(lambda x: x.sharding, (model, state))
    model, state, losses = plain_steps(tx, loss, model, state, (*lie, None))
    return seen(tx, model, specs, mesh, state, losses)


# Haiku: two levels of dicts, modules and their parameters; layer_stack has layers in front.


def haiku():
    mesh = auto_mesh((4, 2), ("fsdp", "tp"))
    block = "lm/~/layer_stack/block"
    linear = lambda m, n: {"w": (L, m, n), "b": (L, n)}  # noqa: E731
    values = weights(
        {
            "lm/~/embed": {"embeddings": (V, D)},
            **{f"{block}/{k}": linear(D, N * H) for k in ("query", "key", "value")},
            f"{block}/linear": linear(N * H, D),
            f"{block}/linear_1": linear(D, F),
            f"{block}/linear_2": linear(F, D),
            **{f"{block}/rms_norm{k}": {"scale": (L, D)} for k in ("", "_1")},
            "lm/~/rms_norm": {"scale": (D,)},
            "lm/~/logits": {"w": (D, V)},
        }
    )

    def loss(params):
        def of_layer(i):
            w = lambda name: params[f"{block}/{name}"]["w"][i]  # noqa: E731
            heads = [w(name).reshape(D, N, H) for name in ("query", "key", "value")]
            return {
                **dict(zip("qkv", heads, strict=True)),
                "o": w("linear").reshape(N, H, D),
                **{"gate": w("linear_1"), "up": w("linear_1"), "down": w("linear_2")},
                "norms": [params[f"{block}/rms_norm{k}"]["scale"][i] for k in ("", "_1")],
            }

        biases = sum(jnp.mean(x["b"] ** 2) for x in params.values() if "b" in x)
        return biases + loss_of(
            {
                "embed": params["lm/~/embed"]["embeddings"],
                "layers": [of_layer(i) for i in range(L)],
                "norm": params["lm/~/rms_norm"]["scale"],
                "head": params["lm/~/logits"]["w"],
            }
        )

    spec_of = lambda path, shape: P(None, "fsdp", "tp") if len(shape) == 3 else P()  # noqa: E731
    specs = spec_tree(values, spec_of)
    tx = optimizer(LAST)
    params = jax.device_put(values, named(specs, mesh))
    of_state = galore_optax.state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=of_state)(params)
    lie = (named(specs, mesh), of_state, None)
    params, state, losses = plain_steps(tx, loss, params, state, lie)
    return seen(tx, params, specs, mesh, state, losses)


# numpyro: SVI, whose optimizer is (count, (parameters, state)) and gets the value of the loss. All
# of it, and a key, are made on one device.


def numpyro():
    mesh = auto_mesh((8,), ("fsdp",))
    values = {"decoder$params": flax_leaves(), "z_loc": np.zeros(D, np.float32)}

    def elbo(params):
        kl = jnp.mean((params["z_loc"] - 1.0) ** 2)
        return flax_loss(params["decoder$params"]) + kl

    tx = optax.with_extra_args_support(optimizer())

    def lies(path, shape):
        return P("fsdp") if len(shape) == 2 else P()

    specs = spec_tree(values, lies)
    initial = (jnp.zeros([], jnp.int32), values), jax.random.key(0)
    (count, params), key = jax.device_put(initial, NamedSharding(mesh, P()))
    params = jax.device_put(params, named(specs, mesh))
    of_state = galore_optax.state_shardings(tx, params)
    state = ((count, (params, jax.jit(tx.init, out_shardings=of_state)(params))), key)
    lie = jax.tree.map(lambda x: x.sharding, state)

    @functools.partial(jax.jit, out_shardings=(lie, None))
    def update(state):
        (count, (params, of_optax)), key = state
        value, grads = jax.value_and_grad(elbo)(params)
        updates, of_optax = tx.update(grads, of_optax, params, value=value)
        params = optax.apply_updates(params, updates)
        return ((count + 1, (params, of_optax)), jax.random.split(key)[0]), value

    losses = []
    for _ in range(STEPS):
        state, value = update(state)
        losses.append(value)
    _, (params, of_optax) = state[0]
    return seen(tx, params, specs, mesh, of_optax, losses)


# brax: the same on every device, by pmap, and update without parameters.


def brax():
    mesh = auto_mesh((8,), ("i",))
    count = len(jax.devices())
    sizes = [(16, 32), (32, 32), (32, 8)]
    layers = {f"hidden_{i}": {"kernel": n, "bias": n[1:]} for i, n in enumerate(sizes)}
    params = weights({"policy": {"params": layers}})
    rng = np.random.default_rng(1)
    observations = rng.normal(size=(count, 16, 16)).astype(np.float32)
    actions = np.tanh(observations @ rng.normal(size=(16, 8)).astype(np.float32))

    def loss(params, x, y):
        for i, layer in enumerate(params["policy"]["params"].values()):
            x = x @ layer["kernel"] + layer["bias"]
            x = jax.nn.swish(x) if i < 2 else x
        return jnp.mean((x - y) ** 2)

    exclude = rf"{galore_optax.DEFAULT_EXCLUDE}|hidden_2/"
    inner = optax.adam(1e-2)
    tx = galore_optax.galore(inner, rank=RANK, update_proj_gap=10, scale=1.0, exclude=exclude)

    @functools.partial(jax.pmap, axis_name="i")
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss)(params, x, y)
        grads = jax.lax.pmean(grads, "i")
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(value, "i")

    replicate = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))  # noqa: E731
    of_device, state = jax.tree.map(replicate, (params, tx.init(params)))
    losses = []
    for _ in range(STEPS):
        of_device, state, value = step(of_device, state, observations, actions)
        losses.append(value[0])
    for x in jax.tree.leaves(state):
        assert (np.asarray(x) == np.asarray(x)[:1]).all()  # the same everywhere
    specs = jax.tree.map(lambda x: P(), params)
    found = seen(tx, params, specs, mesh, state, losses)
    return {**found, "moments": {k: shape[1:] for k, shape in found["moments"].items()}}
