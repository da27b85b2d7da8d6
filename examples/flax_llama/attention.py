"""Causal attention: what computes it, in which parts, and what each token attends to.

Sizes in the suffixes of names: B batch, S sequence, C context (the length of a cache), H heads of
queries, G heads of keys and values, K size of a head, L layers.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from examples.flax_llama.config import LlamaConfig, UsageError

Implementation = Literal["xla", "cudnn"]
# Of a layer: how many tokens a token attends to, itself included, known when it is compiled or not
# before it runs; None for all before it.
Window = int | jax.Array | None


def capability_here() -> float | None:
    """The compute capability of the GPU that JAX computes on, None where that is not NVIDIA's."""
    device = jax.devices()[0]
    is_nvidia = device.device_kind.startswith("NVIDIA")
    return float(device.compute_capability) if is_nvidia else None


def cudnn_lacks(config: LlamaConfig, capability: float | None) -> list[str]:
    """What the fused kernel of cuDNN would need for a model, and has not on such a device."""
    head = config.head_size
    needs = {
        "an NVIDIA GPU of compute capability 8.0 or more": (capability or 0) >= 8,
        "dtype=bfloat16": config.dtype == "bfloat16",
        "heads whose size is a multiple of 8, at most 128": head % 8 == 0 and head <= 128,
    }
    return [need for need, fulfilled in needs.items() if not fulfilled]


def attention_implementation(
    config: LlamaConfig, capability: float | None, name: str
) -> Implementation:
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
        head = config.head_size
        raise UsageError(
            f"attention='cudnn' needs {' and '.join(missing)}; here are {name}, "
            f"dtype={config.dtype} and heads of size {head}. attention='xla' runs everywhere."
        )
    return "xla" if config.attention == "xla" or missing else "cudnn"


# Attention weights that exist at a time where no fused kernel avoids them: 32 MiB in float32.
MAX_WEIGHTS = 2**23


class Parts(NamedTuple):
    """In how many parts, one after the other, attention is computed.

    Attributes:
      sequences: the parts that the sequences of a batch are in.
      heads: the parts that the heads of keys are in, each with all queries that attend to them.
    """

    sequences: int
    heads: int


def attention_parts(B: int, S: int, H: int, G: int, implementation: str, devices: int = 1) -> Parts:
    """The fewest parts with at most `MAX_WEIGHTS` weights each, or as many as there can be.

    Args:
      B: the number of sequences.
      S: the tokens of each.
      H: the heads of queries.
      G: the heads of keys.
      implementation: what computes them.
      devices: how many the heads are divided over; each has some of every part.
    """
    if implementation != "xla":
        return Parts(1, 1)
    least = math.ceil(B * H * S * S / MAX_WEIGHTS)
    sequences = next(n for n in range(min(least, B), B + 1) if B % n == 0)
    own = max(1, G // devices)
    least = min(math.ceil(B // sequences * H * S * S / MAX_WEIGHTS), own)
    return Parts(sequences, next(n for n in range(least, own + 1) if own % n == 0))


def attend(
    q_BxSxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    implementation: Implementation,
    *,
    scale: float | None = None,
    window: Window = None,
    segments_BxS: jax.Array | None = None,
) -> jax.Array:
    """Causal attention, (B, S, H, K), some sequences and heads after the others if they are many.

    Args:
      q_BxSxHxK: queries.
      k_BxSxGxK: keys.
      v_BxSxGxK: values.
      implementation: what computes it.
      scale: of the scores; by default one over the root of K.
      window: how many tokens a token attends to, itself included; by default all before it.
      segments_BxS: numbers of the texts in a sequence, each of which attends to itself alone.
    """
    B, S, H, K = q_BxSxHxK.shape
    G = k_BxSxGxK.shape[2]
    masked = segments_BxS is not None or isinstance(window, jax.Array)
    span = None if masked or window is None else (window - 1, 0)

    def some(inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q, k, v, segments = inputs
        mask = visible(jnp.arange(S), jnp.arange(S), window, segments) if masked else None
        return jax.nn.dot_product_attention(
            *(q, k, v),
            mask=mask,
            scale=scale,
            is_causal=not masked,
            local_window_size=span,
            implementation=implementation,
        )

    devices = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    parts = attention_parts(B, S, H, G, implementation, devices)
    if parts == (1, 1):
        return some((q_BxSxHxK, k_BxSxGxK, v_BxSxGxK, segments_BxS))

    # Each part has some sequences and heads of every device that these are divided over.
    def by_sequences(x_BxSx: jax.Array) -> jax.Array:
        n = parts.sequences
        return jnp.moveaxis(x_BxSx.reshape(B // n, n, *x_BxSx.shape[1:]), 1, 0)

    def by_heads(x_BxSxHxK: jax.Array) -> jax.Array:
        n = parts.heads
        x = by_sequences(x_BxSxHxK.reshape(B, S, G // n, n, -1, K))
        return jnp.moveaxis(x, 4, 1).reshape(parts.sequences * n, B // parts.sequences, S, -1, K)

    segments = (
        None if segments_BxS is None else jnp.repeat(by_sequences(segments_BxS), parts.heads, 0)
    )
    inputs = *map(by_heads, (q_BxSxHxK, k_BxSxGxK, v_BxSxGxK)), segments
    out = jax.lax.map(jax.checkpoint(some), inputs)
    n, own = parts.heads, B // parts.sequences
    out = out.reshape(parts.sequences, n, own, S, G // n, H // G, K)
    return jnp.transpose(out, (2, 0, 3, 4, 1, 5, 6)).reshape(q_BxSxHxK.shape)


def visible(
    query_S: jax.Array, key_C: jax.Array, window: Window, segments_BxS: jax.Array | None = None
) -> jax.Array:
    """Which keys each query attends to by their positions, bool (B or 1, 1, S, C)."""
    distance_SxC = query_S[:, None] - key_C
    seen = (distance_SxC >= 0)[None, None]
    if window is not None:
        seen &= distance_SxC < window
    if segments_BxS is not None:
        seen = seen & (segments_BxS[:, None, :, None] == segments_BxS[:, None, None, :])
    return seen


class Cache(NamedTuple):
    """Keys, rotated, and values of the tokens so far.

    That of a layer; the model's has a leading axis L on all three, so that `lax.scan` hands each
    layer its own.
    """

    k_BxCxGxK: jax.Array
    v_BxCxGxK: jax.Array
    # Number of tokens so far, int32 scalar; what stands behind them is overwritten.
    length: jax.Array

    def append(self, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array) -> "Cache":
        def write(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.length, axis=1)

        k, v = write(self.k_BxCxGxK, k_BxSxGxK), write(self.v_BxCxGxK, v_BxSxGxK)
        return Cache(k, v, self.length + k_BxSxGxK.shape[1])

    def attend(self, q_BxSxHxK: jax.Array, scale: float | None, window: Window) -> jax.Array:
        """Attention of the last S tokens, of which the cache has keys and values already."""
        S, C = q_BxSxHxK.shape[1], self.k_BxCxGxK.shape[1]
        mask = visible(self.length - S + jnp.arange(S), jnp.arange(C), window)
        return jax.nn.dot_product_attention(
            *(q_BxSxHxK, self.k_BxCxGxK, self.v_BxCxGxK),
            mask=mask,
            scale=scale,
            implementation="xla",
        )


def empty_cache(config: LlamaConfig, batch: int) -> Cache:
    """The cache of a model that has seen nothing yet; it holds `config.max_seq` tokens."""
    L, C, G, K = config.layers, config.max_seq, config.kv_heads, config.head_size
    zeros = jnp.zeros((L, batch, C, G, K), config.dtype)
    return Cache(zeros, jnp.zeros_like(zeros), jnp.zeros(L, jnp.int32))
