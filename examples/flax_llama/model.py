"""A LLaMA in Flax NNX whose layers are stacked on a leading axis and run under `lax.scan`.

Sizes in the suffixes of names: B batch, S sequence, D hidden, F intermediate, H heads, K size of a
head, V vocabulary, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from examples.flax_llama.config import LlamaConfig

Params = dict[str, Any]


def linear(config: LlamaConfig, d_in: int, d_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=False,
        kernel_init=nnx.initializers.normal(0.02),
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def rms_norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over D; Flax computes it in float32 and casts the result to `config.dtype`."""
    return nnx.RMSNorm(
        config.hidden,
        epsilon=config.rms_norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def rope(x_BxSxHxK: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding that pairs entry i of a head with entry i + K/2, as in HF LLaMA."""
    S, K = x_BxSxHxK.shape[1], x_BxSxHxK.shape[3]
    frequency = theta ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
    angle = jnp.arange(S, dtype=jnp.float32)[:, None, None] * frequency  # (S, 1, K/2)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BxSxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BxSxHxK.dtype)


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D = config.hidden
        self.config = config
        self.q = linear(config, D, D, rngs)
        self.k = linear(config, D, D, rngs)
        self.v = linear(config, D, D, rngs)
        self.o = linear(config, D, D, rngs)

    def __call__(self, x_BxSxD: jax.Array) -> jax.Array:
        BxSxD, theta = x_BxSxD.shape, self.config.rope_theta
        BxSxHxK = (*BxSxD[:2], self.config.heads, -1)
        q_BxSxHxK = rope(self.q(x_BxSxD).reshape(BxSxHxK), theta)
        k_BxSxHxK = rope(self.k(x_BxSxD).reshape(BxSxHxK), theta)
        v_BxSxHxK = self.v(x_BxSxD).reshape(BxSxHxK)
        out_BxSxHxK = jax.nn.dot_product_attention(q_BxSxHxK, k_BxSxHxK, v_BxSxHxK, is_causal=True)
        return self.o(out_BxSxHxK.reshape(BxSxD))


class Mlp(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden, config.intermediate
        self.gate = linear(config, D, F, rngs)
        self.up = linear(config, D, F, rngs)
        self.down = linear(config, F, D, rngs)

    def __call__(self, x_BxSxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x_BxSxD)) * self.up(x_BxSxD))


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(self, x_BxSxD: jax.Array) -> jax.Array:
        x_BxSxD = x_BxSxD + self.attention(self.attention_norm(x_BxSxD))
        return x_BxSxD + self.mlp(self.mlp_norm(x_BxSxD))


class Llama(nnx.Module):
    """Decoder-only transformer; `blocks` is one `Block` whose parameters have a leading axis L."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        stack = nnx.vmap(lambda layer_rngs: Block(config, rngs=layer_rngs))
        self.blocks = stack(rngs.split(config.layers))
        self.norm = rms_norm(config, rngs)
        self.head = linear(config, config.hidden, config.vocab_size, rngs)

    def __call__(self, tokens_BxS: jax.Array) -> jax.Array:
        """Logits (B, S, V) of the token after each of `tokens_BxS`."""
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x_BxSxD: jax.Array, params: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graphdef, params)(x_BxSxD), None

        x_BxSxD, _ = jax.lax.scan(layer, self.embed(tokens_BxS), stacked)
        return self.head(self.norm(x_BxSxD))


def next_token_losses(model: Llama, tokens_BxS1: jax.Array) -> jax.Array:
    """Cross entropy in nats, float32 (B, S), of tokens 1..S of each row given those before."""
    logits_BxSxV = model(tokens_BxS1[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxSxV, tokens_BxS1[:, 1:])


def stacked_matrices(params: Params) -> Params:
    """Tree of bool: which leaves are the layers' linear kernels, (L, in, out)."""

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        return path[0].key == "blocks" and path[-1].key == "kernel"

    return jax.tree.map_with_path(is_matrix, params)


def dimension_numbers(params: Params) -> Params:
    """`weight_dimension_numbers` of `galore_optax.galore`; None leaves a parameter at full rank."""
    stacked_kernel = galore_optax.DimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda m: stacked_kernel if m else None, stacked_matrices(params))
