"""A small model of stacked blocks, in the three functions that layerwise takes and as one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax

LAYERS, D, F, V = 3, 16, 24, 20


def init(dtype=jnp.float64, tied=False, layers=LAYERS, d=D, f=F, v=V):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape), dtype)

    params = {
        "embed": {"embedding": normal(v, d)},
        "blocks": {
            "norm": {"scale": jnp.ones((layers, d), dtype)},
            "mix": {"kernel": normal(layers, d, d)},
            "up": {"kernel": normal(layers, d, f)},
            "down": {"kernel": normal(layers, f, d)},
        },
        "norm": {"scale": jnp.ones(d, dtype)},
    }
    return params if tied else params | {"head": {"kernel": normal(d, v)}}


def embed(params, tokens):
    return params["embed"]["embedding"][tokens]


def block(layer, x):
    layer = galore_optax.dequantize_params(layer)
    h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    h = (h * layer["norm"]["scale"][None, None]) @ layer["mix"]["kernel"]
    return x + jnp.tanh(h @ layer["up"]["kernel"]) @ layer["down"]["kernel"]


def head_loss(params, x, tokens):
    kernel = params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T
    logits = jax.nn.log_softmax((x * params["norm"]["scale"][None, None]) @ kernel)
    # Smoothed, so that there is a least loss that training tends to.
    right = jnp.take_along_axis(logits, (3 * tokens[..., None] + 1) % V, axis=-1)
    return -0.5 * jnp.mean(right) - 0.5 * jnp.mean(logits)


def loss(params, tokens):
    """The model as one function, its layers recomputed in the backward pass."""
    rest = {name: x for name, x in params.items() if name != "blocks"}
    layer = jax.checkpoint(lambda x, p: (block(p, x), None), prevent_cse=False)
    x, _ = jax.lax.scan(layer, embed(rest, tokens), params["blocks"])
    return head_loss(rest, x, tokens)


def is_quantized(x):
    return isinstance(x, galore_optax.QuantizedArray)


def numbers(params):
    def of(path, _):
        is_matrix = path[0].key == "blocks" and path[-1].key == "kernel"
        return galore_optax.DimensionNumbers(1, 2) if is_matrix else None

    return jax.tree.map_with_path(of, params, is_leaf=is_quantized)


def partition(**transformations):
    """Each for the leaves with its name in their path, and "rest" for those with none."""

    def label(path, _):
        keys = jax.tree_util.keystr(path)
        return next((name for name in transformations if f"'{name}'" in keys), "rest")

    return optax.partition(
        transformations, lambda params: jax.tree.map_with_path(label, params, is_leaf=is_quantized)
    )


def layerwise(tx, **arguments):
    return galore_optax.layerwise(tx, embed=embed, block=block, head_loss=head_loss, **arguments)


def ordinary(tx, micro_batches=1):
    """The ordinary step: the gradient of all, then the update."""

    def mean(params, tokens):
        if micro_batches == 1:
            return loss(params, tokens)
        return sum(loss(params, tokens[k]) for k in range(micro_batches)) / micro_batches

    def step(params, state, tokens, key):
        value, gradient = galore_optax.value_and_grad(mean)(params, tokens)
        updates, state = tx.update(gradient, state, params)
        params = galore_optax.apply_updates(params, updates, key)
        norms = {"grad_norm": norm(gradient), "update_norm": norm(updates)}
        return params, state, {"loss": value} | norms

    return step


def norm(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def batches(steps, micro_batches=1, shape=(3, 5)):
    rng = np.random.default_rng(1)
    count = () if micro_batches == 1 else (micro_batches,)
    return jnp.asarray(rng.integers(0, V, (steps, *count, *shape)))


def train(step, params, state, tokens):
    step = jax.jit(step)
    metrics = []
    for i, batch in enumerate(tokens):
        params, state, new = step(params, state, batch, jax.random.key(i))
        metrics.append({name: float(x) for name, x in new.items()})
    return params, state, metrics
