"""BERT and RoBERTa in Flax NNX, with a head that classifies a text or gives it a number.

The layers are stacked on a leading axis and run under `lax.scan`. Sizes in the suffixes of names:
B batch, S sequence, D hidden, F intermediate, H heads, K size of a head, L layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import galore_optax
from examples.flax_glue.shapes import LORA_TARGETS, EncoderConfig
from examples.flax_llama.adapters import LoraLinear


class Text(NamedTuple):
    """Texts of tokens, filled up behind to the same length: arrays of JAX or of NumPy."""

    tokens_BxS: Any
    # 0, or 1 in the second of two texts.
    types_BxS: Any
    # Which tokens are of the text, bool.
    mask_BxS: Any


def linear(
    config: EncoderConfig, d_in: int, d_out: int, rngs: nnx.Rngs, *, adapted: bool = False
) -> nnx.Linear:
    options = {
        "kernel_init": nnx.initializers.normal(config.init_std),
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.dtype(config.param_dtype),
        "rngs": rngs,
    }
    if adapted and config.lora_rank:
        factor = config.lora_alpha / config.lora_rank
        options["lora_param_dtype"] = options["param_dtype"]
        return LoraLinear(d_in, d_out, rank=config.lora_rank, factor=factor, **options)
    return nnx.Linear(d_in, d_out, **options)


def layer_norm(config: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over D; Flax computes it in float32 and casts the result to `config.dtype`."""
    return nnx.LayerNorm(
        config.hidden,
        epsilon=config.norm_eps,
        use_fast_variance=False,  # cancels, where the mean is large
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """With some entries zero, and the others larger for it; as it is without a key."""
    return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def split(key: jax.Array | None, number: int) -> list[jax.Array | None]:
    """Keys for several dropouts; none for each of them where there is none."""
    return [None] * number if key is None else list(jax.random.split(key, number))


class Embeddings(nnx.Module):
    """The sum of what stands for a token, its position and its type, normalized."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config

        def table(rows: int) -> nnx.Embed:
            return nnx.Embed(
                rows,
                config.hidden,
                embedding_init=nnx.initializers.normal(config.init_std),
                param_dtype=jnp.dtype(config.param_dtype),
                rngs=rngs,
            )

        self.word = table(config.vocab_size)
        self.position = table(config.positions)
        self.token_type = table(config.token_types)
        self.norm = layer_norm(config, rngs)

    def __call__(self, text: Text, key: jax.Array | None) -> jax.Array:
        positions_S = self.config.first_position + jnp.arange(text.tokens_BxS.shape[1])
        # Those of the padding are never looked at, and need not be RoBERTa's.
        x_BxSxD = self.word(text.tokens_BxS) + self.position(positions_S)
        x_BxSxD = self.norm(x_BxSxD + self.token_type(text.types_BxS))
        return dropout(x_BxSxD, self.config.hidden_dropout, key)


class Attention(nnx.Module):
    """Multi-head attention of all tokens of a text to all of them."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        D, targets = config.hidden, LORA_TARGETS[config.lora_targets]
        self.heads, self.dropout = config.heads, config.attention_dropout
        self.q = linear(config, D, D, rngs, adapted="q" in targets)
        self.k = linear(config, D, D, rngs, adapted="k" in targets)
        self.v = linear(config, D, D, rngs, adapted="v" in targets)
        self.o = linear(config, D, D, rngs, adapted="o" in targets)

    def __call__(self, x_BxSxD: jax.Array, mask_BxS: jax.Array, key: jax.Array | None) -> jax.Array:
        BxSxHxK = (*x_BxSxD.shape[:2], self.heads, -1)
        q, k, v = (part(x_BxSxD).reshape(BxSxHxK) for part in (self.q, self.k, self.v))
        logits = jnp.einsum("bshk,bthk->bhst", q, k, preferred_element_type=jnp.float32)
        logits *= q.shape[-1] ** -0.5
        # Finite, so that a text of nothing but padding has weights too.
        logits = jnp.where(mask_BxS[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
        weights_BxHxSxS = dropout(jax.nn.softmax(logits), self.dropout, key).astype(v.dtype)
        return self.o(jnp.einsum("bhst,bthk->bshk", weights_BxHxSxS, v).reshape(x_BxSxD.shape))


class Mlp(nnx.Module):
    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        D, F, targets = config.hidden, config.intermediate, LORA_TARGETS[config.lora_targets]
        self.up = linear(config, D, F, rngs, adapted="up" in targets)
        self.down = linear(config, F, D, rngs, adapted="down" in targets)

    def __call__(self, x_BxSxD: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x_BxSxD), approximate=False))


class Block(nnx.Module):
    """One post-norm transformer layer."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.dropout = config.hidden_dropout
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.mlp_norm = layer_norm(config, rngs)

    def __call__(self, x_BxSxD: jax.Array, mask_BxS: jax.Array, key: jax.Array | None) -> jax.Array:
        of_weights, of_attention, of_mlp = split(key, 3)
        attended_BxSxD = self.attention(x_BxSxD, mask_BxS, of_weights)
        x_BxSxD = self.attention_norm(x_BxSxD + dropout(attended_BxSxD, self.dropout, of_attention))
        return self.mlp_norm(x_BxSxD + dropout(self.mlp(x_BxSxD), self.dropout, of_mlp))


class Head(nnx.Module):
    """What makes of the pooled states of a text its scores.

    Of a first token, RoBERTa's head has a hidden layer of its own; BERT's pooler is before it.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.dropout = config.classifier_dropout
        has_layer = config.kind == "roberta" and config.pooling == "first"
        self.dense = linear(config, config.hidden, config.hidden, rngs) if has_layer else None
        self.out = linear(config, config.hidden, config.outputs, rngs)

    def __call__(self, x_BxD: jax.Array, key: jax.Array | None) -> jax.Array:
        before, after = split(key, 2)
        if self.dense is not None:
            x_BxD = jnp.tanh(self.dense(dropout(x_BxD, self.dropout, before)))
        return self.out(dropout(x_BxD, self.dropout, after)).astype(jnp.float32)


class Encoder(nnx.Module):
    """An encoder with a head; `blocks` is one `Block` whose parameters have a leading axis L."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        stack = nnx.vmap(lambda layer_rngs: Block(config, rngs=layer_rngs))
        self.blocks = stack(rngs.split(config.layers))
        has_pooler = config.kind == "bert" and config.pooling == "first"
        self.pooler = linear(config, config.hidden, config.hidden, rngs) if has_pooler else None
        self.head = Head(config, rngs=rngs)

    def __call__(self, text: Text, key: jax.Array | None = None) -> jax.Array:
        """Scores of the classes of each text, or its number, float32 (B, outputs).

        Args:
          text: the texts.
          key: of what is dropped, in training; without one nothing is.
        """
        of_hidden, of_head = split(key, 2)
        return self.head(self.pooled(self.hidden(text, of_hidden), text.mask_BxS), of_head)

    def hidden(self, text: Text, key: jax.Array | None = None) -> jax.Array:
        """States after the last layer, (B, S, D) in `config.dtype`."""
        of_embeddings, of_layers = split(key, 2)
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x_BxSxD: jax.Array, inputs: tuple[nnx.State, jax.Array | None]):
            params, layer_key = inputs
            params = galore_optax.dequantize_params(params)  # one layer at a time
            return nnx.merge(graphdef, params)(x_BxSxD, text.mask_BxS, layer_key), None

        # As in the LLaMA: products with kernels are kept for the backward pass, all else is
        # computed again, so that no attention weights and no dequantized kernels are kept.
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        keys = None if of_layers is None else jax.random.split(of_layers, self.config.layers)
        x_BxSxD = self.embeddings(text, of_embeddings)
        return jax.lax.scan(layer, x_BxSxD, (stacked, keys))[0]

    def pooled(self, x_BxSxD: jax.Array, mask_BxS: jax.Array) -> jax.Array:
        """What stands for each text, (B, D)."""
        if self.config.pooling == "mean":
            number_B = jnp.maximum(mask_BxS.sum(axis=1), 1)
            sums_BxD = jnp.sum(x_BxSxD, axis=1, where=mask_BxS[..., None], dtype=jnp.float32)
            return (sums_BxD / number_B[:, None]).astype(x_BxSxD.dtype)
        first_BxD = x_BxSxD[:, 0]
        return first_BxD if self.pooler is None else jnp.tanh(self.pooler(first_BxD))
