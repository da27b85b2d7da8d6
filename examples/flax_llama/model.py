"""A LLaMA in Flax NNX whose layers are stacked on a leading axis and run under `lax.scan`.

Sizes in the suffixes of names: B batch, S sequence, C context (the length of a cache), D hidden,
F intermediate, H heads, K size of a head, V vocabulary, L layers.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import galore_optax
from examples.flax_llama.config import LlamaConfig, UsageError

Params = dict[str, Any]


def capability_here() -> float | None:
    """The compute capability of the GPU that JAX computes on, None where that is not NVIDIA's."""
    device = jax.devices()[0]
    is_nvidia = device.device_kind.startswith("NVIDIA")
    return float(device.compute_capability) if is_nvidia else None


def cudnn_lacks(config: LlamaConfig, capability: float | None) -> list[str]:
    """What the fused kernel of cuDNN would need for a model, and has not on such a device."""
    head = config.hidden // config.heads
    needs = {
        "an NVIDIA GPU of compute capability 8.0 or more": (capability or 0) >= 8,
        "dtype=bfloat16": config.dtype == "bfloat16",
        "heads whose size is a multiple of 8, at most 128": head % 8 == 0 and head <= 128,
    }
    return [need for need, fulfilled in needs.items() if not fulfilled]


def attention_implementation(
    config: LlamaConfig, capability: float | None, name: str
) -> Literal["xla", "cudnn"]:
    """What computes attention on a device: "xla", or the fused kernel of "cudnn".

    Args:
      config: of the model.
      capability: NVIDIA's compute capability of the device, None of what is no such GPU.
      name: of the device, for errors.

    Raises:
      UsageError: `config.attention` is "cudnn", which cannot compute this model there.
    """
    missing = cudnn_lacks(config, capability)
    if config.attention == "cudnn" and missing:
        head = config.hidden // config.heads
        raise UsageError(
            f"attention='cudnn' needs {' and '.join(missing)}; here are {name}, "
            f"dtype={config.dtype} and heads of size {head}. attention='xla' runs everywhere."
        )
    return "xla" if config.attention == "xla" or missing else "cudnn"


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


class Rotation(NamedTuple):
    """Rotary position embedding of S positions, float32."""

    cos_Sx1xK2: jax.Array
    sin_Sx1xK2: jax.Array


def rotation(position_S: jax.Array, head_size: int, theta: float) -> Rotation:
    """Angles of the positions, computed once for the queries and keys of all layers."""
    frequency = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angle_Sx1xK2 = position_S.astype(jnp.float32)[:, None, None] * frequency
    return Rotation(jnp.cos(angle_Sx1xK2), jnp.sin(angle_Sx1xK2))


def rope(x_BxSxHxK: jax.Array, angles: Rotation) -> jax.Array:
    """Rotates the pairs of entry i of a head and entry i + K/2, as in Hugging Face's LLaMA."""
    cos, sin = angles
    a, b = jnp.split(x_BxSxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BxSxHxK.dtype)


# Attention weights that exist at a time where no fused kernel avoids them: 32 MiB in float32.
MAX_WEIGHTS = 2**23


def attention_groups(B: int, S: int, H: int, implementation: str) -> int:
    """In how many groups, one after the other, the attention of B sequences is computed."""
    least = math.ceil(B * H * S * S / MAX_WEIGHTS) if implementation == "xla" else 1
    return next(n for n in range(min(least, B), B + 1) if B % n == 0)


def attend(
    q_BxSxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    v_BxSxHxK: jax.Array,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    """Causal attention, (B, S, H, K), some sequences after the others if they are many."""

    def some(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return jax.nn.dot_product_attention(*qkv, is_causal=True, implementation=implementation)

    B, S, H, _ = q_BxSxHxK.shape
    groups = attention_groups(B, S, H, implementation)
    qkv = q_BxSxHxK, k_BxSxHxK, v_BxSxHxK
    if groups == 1:
        return some(qkv)

    def split(x_BxSxHxK: jax.Array) -> jax.Array:
        # Each group has sequences of every device that the batch is sharded over.
        return jnp.moveaxis(x_BxSxHxK.reshape(B // groups, groups, *x_BxSxHxK.shape[1:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(some), tuple(map(split, qkv)))
    return jnp.moveaxis(out, 0, 1).reshape(q_BxSxHxK.shape)


class Cache(NamedTuple):
    """Keys, rotated, and values of the tokens so far.

    That of a layer; the model's has a leading axis L on all three, so that `lax.scan` hands each
    layer its own.
    """

    k_BxCxHxK: jax.Array
    v_BxCxHxK: jax.Array
    # Number of tokens so far, int32 scalar; what stands behind them is overwritten.
    length: jax.Array

    def append(self, k_BxSxHxK: jax.Array, v_BxSxHxK: jax.Array) -> "Cache":
        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.length, axis=1)

        k, v = write(self.k_BxCxHxK, k_BxSxHxK), write(self.v_BxCxHxK, v_BxSxHxK)
        return Cache(k, v, self.length + k_BxSxHxK.shape[1])

    def causal_mask(self, queries: int) -> jax.Array:
        """Which entries the last `queries` tokens attend to, bool (1, 1, queries, C)."""
        position = self.length - queries + jnp.arange(queries)
        return (jnp.arange(self.k_BxCxHxK.shape[1]) <= position[:, None])[None, None]


def empty_cache(config: LlamaConfig, batch: int) -> Cache:
    """The cache of a model that has seen nothing yet; it holds `config.max_seq` tokens."""
    L, H = config.layers, config.heads
    shape = (L, batch, config.max_seq, H, config.hidden // H)
    zeros = jnp.zeros(shape, config.dtype)
    return Cache(zeros, jnp.zeros_like(zeros), jnp.zeros(L, jnp.int32))


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        D = config.hidden
        self.heads = config.heads
        device = jax.devices()[0].device_kind
        self.implementation = attention_implementation(config, capability_here(), device)
        self.q = linear(config, D, D, rngs)
        self.k = linear(config, D, D, rngs)
        self.v = linear(config, D, D, rngs)
        self.o = linear(config, D, D, rngs)

    def __call__(
        self, x_BxSxD: jax.Array, angles: Rotation, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        BxSxHxK = (*x_BxSxD.shape[:2], self.heads, -1)
        q_BxSxHxK = rope(self.q(x_BxSxD).reshape(BxSxHxK), angles)
        k_BxSxHxK = rope(self.k(x_BxSxD).reshape(BxSxHxK), angles)
        v_BxSxHxK = self.v(x_BxSxD).reshape(BxSxHxK)
        if cache is None:
            out_BxSxHxK = attend(q_BxSxHxK, k_BxSxHxK, v_BxSxHxK, self.implementation)
        else:
            cache = cache.append(k_BxSxHxK, v_BxSxHxK)
            mask = cache.causal_mask(queries=x_BxSxD.shape[1])
            out_BxSxHxK = jax.nn.dot_product_attention(
                q_BxSxHxK, cache.k_BxCxHxK, cache.v_BxCxHxK, mask=mask, implementation="xla"
            )
        return self.o(out_BxSxHxK.reshape(x_BxSxD.shape)), cache


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

    def __call__(
        self, x_BxSxD: jax.Array, angles: Rotation, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        attended_BxSxD, cache = self.attention(self.attention_norm(x_BxSxD), angles, cache)
        x_BxSxD = x_BxSxD + attended_BxSxD
        return x_BxSxD + self.mlp(self.mlp_norm(x_BxSxD)), cache


class Llama(nnx.Module):
    """Decoder-only transformer; `blocks` is one `Block` whose parameters have a leading axis L.

    Raises:
      UsageError: `config.attention` cannot compute it on this machine.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden,
            embedding_init=nnx.initializers.normal(0.02),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        stack = nnx.vmap(lambda layer_rngs: Block(config, rngs=layer_rngs))
        self.blocks = stack(rngs.split(config.layers))
        self.norm = rms_norm(config, rngs)
        self.head = linear(config, config.hidden, config.vocab_size, rngs)

    def __call__(self, tokens_BxS: jax.Array) -> jax.Array:
        """Logits (B, S, V) of the token after each of `tokens_BxS`."""
        return self.head(self.hidden(tokens_BxS))

    def hidden(self, tokens_BxS: jax.Array) -> jax.Array:
        """What the head makes logits of, (B, S, D) in `config.dtype`."""
        return self._layers(tokens_BxS, None)[0]

    def extend(self, tokens_BxS: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`hidden` of tokens that follow those in the cache, and the cache with them appended.

        They must fit: what is beyond `config.max_seq` would overwrite the last entries.
        """
        return self._layers(tokens_BxS, cache)

    def _layers(self, tokens_BxS: jax.Array, cache: Cache | None) -> tuple[jax.Array, Any]:
        config, (graphdef, stacked) = self.config, nnx.split(self.blocks)
        start = 0 if cache is None else cache.length[0]
        angles = rotation(
            start + jnp.arange(tokens_BxS.shape[1]),
            config.hidden // config.heads,
            config.rope_theta,
        )

        def layer(x_BxSxD: jax.Array, inputs: tuple[nnx.State, Cache | None]):
            params, layer_cache = inputs
            params = galore_optax.dequantize_params(params)  # one layer at a time
            return nnx.merge(graphdef, params)(x_BxSxD, angles, layer_cache)

        # Products with kernels are kept for the backward pass, or with `remat` nothing is; all else
        # (attention weights, activations, norms) takes longer to store than to compute again. The
        # scan already keeps the compiler from merging the two computations.
        policies = jax.checkpoint_policies
        keep = (
            policies.nothing_saveable if config.remat else policies.dots_with_no_batch_dims_saveable
        )
        layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
        # Cast after the look-up, so that the gradients of a token's rows add up in param_dtype.
        x_BxSxD = self.embed(tokens_BxS).astype(config.dtype)
        x_BxSxD, cache = jax.lax.scan(layer, x_BxSxD, (stacked, cache))
        return self.norm(x_BxSxD), cache


def draw_layers(config: LlamaConfig, rngs: nnx.Rngs, finish: Callable[[Params], Params]) -> Params:
    """What `finish` makes of the initial parameters of each layer, stacked; one after the other.

    The numbers are those of a `Llama` from the same `rngs`.
    """
    rngs.params()  # what the embedding is drawn from
    graphdef, keys = nnx.split(rngs.split(config.layers))

    def layer(key: Any) -> Params:
        block = Block(config, rngs=nnx.merge(graphdef, key))
        return finish(nnx.to_pure_dict(nnx.state(block, nnx.Param)))

    return jax.lax.map(layer, keys)


def is_quantized(x: Any) -> bool:
    return isinstance(x, galore_optax.QuantizedArray)


def stacked_matrices(params: Params) -> Params:
    """Tree of bool: which leaves are the layers' linear kernels, (L, in, out), quantized or not."""

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        return path[0].key == "blocks" and path[-1].key == "kernel"

    return jax.tree.map_with_path(is_matrix, params, is_leaf=is_quantized)


def dimension_numbers(params: Params) -> Params:
    """`weight_dimension_numbers` of `galore_optax.galore`; None leaves a parameter at full rank."""
    stacked_kernel = galore_optax.DimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda m: stacked_kernel if m else None, stacked_matrices(params))
