"""A decoder in Flax NNX whose layers are stacked on a leading axis and run under `lax.scan`.

It is a LLaMA, or what `Architecture` makes of it. Sizes in the suffixes of names: B batch,
S sequence, D hidden, F intermediate, H heads of queries, G heads of keys and values, K size of a
head, V vocabulary, L layers, N kinds of layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import galore_optax
from examples.flax_llama.adapters import LOW_RANK, LoraLinear, LowRankLinear
from examples.flax_llama.attention import (
    Cache,
    Window,
    attend,
    attention_implementation,
    capability_here,
)
from examples.flax_llama.config import LlamaConfig
from examples.flax_llama.rotary import Rotation, rope, rotations
from examples.flax_llama.sharding import is_quantized, laid
from examples.flax_llama.spaces import to_device

Params = dict[str, Any]


def linear(config: LlamaConfig, name: str, bias: bool, rngs: nnx.Rngs) -> Any:
    """The linear layer of that name in a block, or the head."""
    sizes = config.kernels.get(name, (config.hidden, config.vocab_size))
    options: dict[str, Any] = {
        "use_bias": bias,
        "kernel_init": nnx.initializers.normal(0.02),
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.dtype(config.param_dtype),
        "rngs": rngs,
    }
    adapter = config.adapter
    if adapter is None or name not in config.kernels:
        return nnx.Linear(*sizes, **options)
    if adapter.kind == LOW_RANK:
        return LowRankLinear(*sizes, rank=adapter.rank, **options)
    if adapter.adds_to(name):
        return LoraLinear(*sizes, rank=adapter.rank, factor=adapter.factor, **options)
    return nnx.Linear(*sizes, **options)


class OffsetRMSNorm(nnx.RMSNorm):
    """RMSNorm that multiplies by 1 + scale."""

    def __call__(self, x: jax.Array, **_: Any) -> jax.Array:
        assert self.scale is not None
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon)
        return (x * (1 + self.scale[...].astype(jnp.float32))).astype(self.dtype)


def rms_norm(config: LlamaConfig, size: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over the last axis, computed in float32 and cast to `config.dtype`."""
    offset = config.architecture.norm_offset
    return (OffsetRMSNorm if offset else nnx.RMSNorm)(
        size,
        epsilon=config.architecture.norm_eps,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        scale_init=nnx.initializers.zeros if offset else nnx.initializers.ones,
        rngs=rngs,
    )


class Activations(NamedTuple):
    """What one layer hands to the next."""

    x_BxSxD: jax.Array
    # The number of the next layer, int32 scalar; None where all are of one kind.
    layer: jax.Array | None
    # The texts of a sequence, int32, each of which attends to itself alone; None where it is one.
    segments_BxS: jax.Array | None


class Layout(NamedTuple):
    """What the layers know of positions, by their kinds."""

    angles_NxSx1xK2: Rotation
    # For each kind, or None where no layer has a window that is shorter than the sequence.
    windows: tuple[int, ...] | None

    @classmethod
    def of(cls, config: LlamaConfig, position_S: jax.Array, longest: int) -> "Layout":
        """That of tokens at some positions, in a sequence of `longest` tokens at most."""
        kinds = config.architecture.kinds
        windows = tuple(kind.window or longest for kind in kinds)
        angles = rotations(position_S, config.head_size, kinds)
        return cls(angles, windows if min(windows) < longest else None)

    def of_layer(self, config: LlamaConfig, layer: jax.Array | None) -> tuple[Rotation, Window]:
        """The angles and the window of a layer, by its number; of any, where all are alike."""
        pattern = config.pattern
        kind = pattern[0] if layer is None else jnp.asarray(pattern, jnp.int32)[layer]
        angles = jax.tree.map(lambda x: x[kind], self.angles_NxSx1xK2)
        if self.windows is None:
            return angles, None
        if layer is None:
            return angles, self.windows[pattern[0]]
        return angles, jnp.asarray(self.windows, jnp.int32)[kind]


class Attention(nnx.Module):
    """Causal self-attention, of which several heads may share their keys and values."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        kind = config.architecture
        self.config = config
        device = jax.devices()[0].device_kind
        self.implementation = attention_implementation(config, capability_here(), device)
        self.q = linear(config, "q", kind.attention_bias, rngs)
        self.k = linear(config, "k", kind.attention_bias, rngs)
        self.v = linear(config, "v", kind.attention_bias, rngs)
        self.o = linear(config, "o", kind.output_bias, rngs)
        if kind.qk_norm:
            self.q_norm = rms_norm(config, config.head_size, rngs)
            self.k_norm = rms_norm(config, config.head_size, rngs)

    def __call__(
        self, inputs: Activations, layout: Layout, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        x_BxSxD, config = inputs.x_BxSxD, self.config
        scale = config.architecture.attention_scale
        angles, window = layout.of_layer(config, inputs.layer)
        BxSxHxK = (*x_BxSxD.shape[:2], -1, config.head_size)
        q_BxSxHxK, k_BxSxGxK = (p(x_BxSxD).reshape(BxSxHxK) for p in (self.q, self.k))
        v_BxSxGxK = self.v(x_BxSxD).reshape(BxSxHxK)
        if config.architecture.qk_norm:
            q_BxSxHxK, k_BxSxGxK = self.q_norm(q_BxSxHxK), self.k_norm(k_BxSxGxK)
        q_BxSxHxK, k_BxSxGxK, v_BxSxGxK = (
            laid(x, "heads") for x in (rope(q_BxSxHxK, angles), rope(k_BxSxGxK, angles), v_BxSxGxK)
        )
        if cache is None:
            out_BxSxHxK = attend(
                *(q_BxSxHxK, k_BxSxGxK, v_BxSxGxK, self.implementation),
                scale=scale,
                window=window,
                segments_BxS=inputs.segments_BxS,
            )
        else:
            cache = cache.append(k_BxSxGxK, v_BxSxGxK)
            out_BxSxHxK = cache.attend(q_BxSxHxK, scale, window)
        return self.o(out_BxSxHxK.reshape(*x_BxSxD.shape[:2], config.q_width)), cache


class Mlp(nnx.Module):
    """SwiGLU, or GeGLU."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        bias = config.architecture.mlp_bias
        self.activation = config.architecture.activation
        self.gate = linear(config, "gate", bias, rngs)
        self.up = linear(config, "up", bias, rngs)
        self.down = linear(config, "down", bias, rngs)

    def __call__(self, x_BxSxD: jax.Array) -> jax.Array:
        activate = jax.nn.silu if self.activation == "silu" else jax.nn.gelu
        return self.down(laid(activate(self.gate(x_BxSxD)) * self.up(x_BxSxD), "mlp"))


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.norm_after = config.architecture.norm_after
        self.attention_norm = rms_norm(config, config.hidden, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = rms_norm(config, config.hidden, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        if self.norm_after:
            self.attention_norm_after = rms_norm(config, config.hidden, rngs)
            self.mlp_norm_after = rms_norm(config, config.hidden, rngs)

    def __call__(
        self, inputs: Activations, layout: Layout, cache: Cache | None = None
    ) -> tuple[Activations, Cache | None]:
        x_BxSxD, layer, _ = inputs
        normed = inputs._replace(x_BxSxD=self.attention_norm(x_BxSxD))
        new_BxSxD, cache = self.attention(normed, layout, cache)
        x_BxSxD = x_BxSxD + (self.attention_norm_after(new_BxSxD) if self.norm_after else new_BxSxD)
        new_BxSxD = self.mlp(self.mlp_norm(x_BxSxD))
        x_BxSxD = x_BxSxD + (self.mlp_norm_after(new_BxSxD) if self.norm_after else new_BxSxD)
        x_BxSxD = laid(x_BxSxD, "layers")
        return inputs._replace(x_BxSxD=x_BxSxD, layer=None if layer is None else layer + 1), cache


def first_activations(
    config: LlamaConfig, x_BxSxD: jax.Array, segments_BxS: jax.Array | None = None
) -> Activations:
    """What the first layer gets, of the embeddings of tokens."""
    # Cast after the look-up, so that the gradients of a token's rows add up in param_dtype.
    x_BxSxD = x_BxSxD.astype(config.dtype)
    if config.architecture.embed_scaled:
        x_BxSxD *= jnp.asarray(config.hidden**0.5, x_BxSxD.dtype)
    layer = jnp.zeros((), jnp.int32) if config.alternates else None
    return Activations(laid(x_BxSxD, "layers"), layer, segments_BxS)


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
        self.norm = rms_norm(config, config.hidden, rngs)
        if not config.architecture.tied:
            self.head = linear(config, "head", False, rngs)

    def __call__(self, tokens_BxS: jax.Array, segments_BxS: jax.Array | None = None) -> jax.Array:
        """Logits (B, S, V) of the token after each of `tokens_BxS`."""
        return self.logits(self.hidden(tokens_BxS, segments_BxS))

    def logits(self, x_BxSxD: jax.Array) -> jax.Array:
        """What the head makes of `hidden`, in `config.dtype`."""
        return x_BxSxD @ self.head_DxV.astype(x_BxSxD.dtype)

    @property
    def head_DxV(self) -> jax.Array:
        """The kernel of the head, which may be the embedding."""
        if self.config.architecture.tied:
            return self.embed.embedding[...].T
        return self.head.kernel[...]

    def hidden(self, tokens_BxS: jax.Array, segments_BxS: jax.Array | None = None) -> jax.Array:
        """What the head makes logits of, (B, S, D) in `config.dtype`.

        Args:
          tokens_BxS: int32.
          segments_BxS: numbers of the texts in a sequence, each of which attends to itself alone;
            by default a sequence is one text.
        """
        return self._layers(tokens_BxS, segments_BxS, None)[0]

    def extend(self, tokens_BxS: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`hidden` of tokens that follow those in the cache, and the cache with them appended.

        They must fit: what is beyond `config.max_seq` would overwrite the last entries.
        """
        return self._layers(tokens_BxS, None, cache)

    def _layers(
        self, tokens_BxS: jax.Array, segments_BxS: jax.Array | None, cache: Cache | None
    ) -> tuple[jax.Array, Any]:
        config, (graphdef, stacked) = self.config, nnx.split(self.blocks)
        start, S = 0 if cache is None else cache.length[0], tokens_BxS.shape[1]
        longest = S if cache is None else cache.k_BxCxGxK.shape[2]
        layout = Layout.of(config, start + jnp.arange(S), longest)

        def layer(inputs: Activations, own: tuple[nnx.State, Cache | None]):
            params, layer_cache = own
            params = galore_optax.dequantize_params(to_device(params))  # one layer at a time
            return nnx.merge(graphdef, params)(inputs, layout, layer_cache)

        # Products with kernels are kept for the backward pass, or with `remat` nothing is; all else
        # (attention weights, activations, norms) takes longer to store than to compute again. The
        # scan already keeps the compiler from merging the two computations.
        policies = jax.checkpoint_policies
        keep = (
            policies.nothing_saveable if config.remat else policies.dots_with_no_batch_dims_saveable
        )
        layer = jax.checkpoint(layer, policy=keep, prevent_cse=False)
        table_VxD = laid(self.embed.embedding[...], "table")
        x_BxSxD = jnp.take(table_VxD, tokens_BxS, axis=0)
        first = first_activations(config, x_BxSxD, segments_BxS)
        last, cache = jax.lax.scan(layer, first, (stacked, cache))
        return self.norm(last.x_BxSxD), cache


def head_of(params: Params) -> jax.Array:
    """The kernel of the head, (D, V), which is the embedding where there is none."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T


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


def stacked_matrices(params: Params) -> Params:
    """Tree of bool: which leaves are the layers' linear kernels, (L, in, out), quantized or not."""

    def is_matrix(path: tuple[Any, ...], _: Any) -> bool:
        return path[0].key == "blocks" and path[-1].key == "kernel"

    return jax.tree.map_with_path(is_matrix, params, is_leaf=is_quantized)


def dimension_numbers(params: Params) -> Params:
    """`weight_dimension_numbers` of `galore_optax.galore`; None leaves a parameter at full rank."""
    stacked_kernel = galore_optax.DimensionNumbers(reduction_axis=1, output_axis=2)
    return jax.tree.map(lambda m: stacked_kernel if m else None, stacked_matrices(params))
