"""Text from a model: a prompt is read at once, then a token at a time out of a cache.

Sizes in the suffixes of names: S sequence, V vocabulary.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.flax_llama.attention import Cache, empty_cache
from examples.flax_llama.model import Llama
from examples.flax_llama.tokenizer import Tokenizer
from examples.flax_llama.usage import UsageError, at_least_one

# No vocabulary has more tokens.
ALL = 2**31 - 1
# What stands for bytes that are no character, or not yet.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def keep_top_k(logits_V: jax.Array, top_k: jax.Array | int) -> jax.Array:
    """-inf for all but the `top_k` likeliest tokens; of equal ones those with smaller numbers."""
    order_V = jnp.argsort(-logits_V)
    place_V = jnp.zeros_like(order_V).at[order_V].set(jnp.arange(len(order_V)))
    return jnp.where(place_V < top_k, logits_V, -jnp.inf)


def keep_top_p(logits_V: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf for all but the fewest, likeliest tokens whose probabilities reach `top_p` together.

    From Holtzman et al., "The curious case of neural text degeneration" (arXiv:1904.09751). Of
    tokens that are equally likely those with the smaller number come first.
    """
    order_V = jnp.argsort(-logits_V)
    p_V = jax.nn.softmax(logits_V)[order_V]
    before_V = jnp.cumsum(p_V) - p_V
    # Round-off may take the sum to 1 before its end, and 1 means all tokens.
    keep_V = (before_V < top_p) | (top_p >= 1)
    return jnp.where(jnp.zeros_like(keep_V).at[order_V].set(keep_V), logits_V, -jnp.inf)


@jax.jit
def draw(
    logits_V: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    key: jax.Array,
    top_k: jax.Array | int = ALL,
) -> jax.Array:
    """A token of softmax(logits / temperature), int32 scalar; at 0 the likeliest.

    It is one of the `top_k` likeliest; of what these have of the probability it is cut to `top_p`.
    """
    logits_V = logits_V.astype(jnp.float32)
    warm_V = keep_top_k(logits_V / jnp.maximum(temperature, 1e-6), top_k)
    sampled = jax.random.categorical(key, keep_top_p(warm_V, top_p))
    return jnp.where(temperature > 0, sampled, logits_V.argmax()).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="graphdef")
def prefill(
    graphdef: nnx.GraphDef, state: nnx.State, tokens_S: jax.Array, length: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits (V,) after the first `length` tokens, and the cache that holds these."""
    model = nnx.merge(graphdef, state)
    x_1xSxD, cache = model.extend(tokens_S[None], empty_cache(model.config, batch=1))
    # What the padding left in the cache is behind its end.
    return model.logits(x_1xSxD[0, length - 1]), cache._replace(
        length=jnp.full_like(cache.length, length)
    )


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="cache")
def decode(
    graphdef: nnx.GraphDef, state: nnx.State, token: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Logits (V,) after one more token, and the cache with it."""
    model = nnx.merge(graphdef, state)
    x_1x1xD, cache = model.extend(token.reshape(1, 1), cache)
    return model.logits(x_1x1xD[0, 0]), cache


def padded_length(length: int, longest: int) -> int:
    """The next power of two, so that prompts of all lengths need few compilations."""
    return min(longest, 2 ** math.ceil(math.log2(length)))


def generate_ids(
    model: Llama,
    prompt: np.ndarray,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    top_k: int | None = None,
) -> Iterator[int]:
    """The tokens after a prompt, without end.

    The model sees at most `config.max_seq` tokens: of a longer prompt the end, and whenever the
    context is full, its later half becomes the start of a new one.
    """
    graphdef, state = nnx.split(model)
    key, window = jax.random.key(seed), model.config.max_seq
    context, token, cache = prompt[-window:].tolist(), None, None
    for step in itertools.count():
        if cache is None:
            padded_S = np.zeros(padded_length(len(context), window), np.int32)
            padded_S[: len(context)] = context
            logits_V, cache = prefill(graphdef, state, padded_S, len(context))
        else:
            logits_V, cache = decode(graphdef, state, token, cache)
        step_key = jax.random.fold_in(key, step)
        token = draw(logits_V, temperature, top_p, step_key, ALL if top_k is None else top_k)
        context.append(int(token))
        yield context[-1]
        if len(context) > window:
            context, cache = context[-max(1, window // 2) :], None


def answer(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: np.ndarray,
    stop_ids: Collection[int],
    *,
    tokens: int,
) -> str:
    """The likeliest text after a prompt, up to a token that ends it, or by so many tokens."""
    endless = generate_ids(model, prompt, temperature=0.0, top_p=1.0, seed=0)
    ends = {*stop_ids, tokenizer.eos_id}
    made = itertools.takewhile(lambda token: token not in ends, itertools.islice(endless, tokens))
    return tokenizer.decode(list(made))


def check_sampling(
    prompt: np.ndarray, tokens: int, temperature: float, top_p: float, top_k: int | None
) -> None:
    """Raises UsageError for settings that `generate` cannot work with."""
    if tokens < 0:
        raise UsageError(f"tokens={tokens}: expected 0 or more.")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature}: expected 0 or a positive number.")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p}: expected more than 0, and 1 at most.")
    if top_k is not None:
        at_least_one("top_k", top_k)
    if not len(prompt):
        raise UsageError("prompt='' is empty: give at least one character to continue.")


def stream(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The prompt, continued up to the end of the document, or by `tokens` tokens, as it is made.

    Args:
      model: a language model.
      tokenizer: the one of its training data.
      prompt: text to continue.
      tokens: largest number of tokens to add.
      temperature: of the softmax; 0 always takes the likeliest token.
      top_p: draw from the likeliest tokens only whose probabilities reach this sum; 1 is all.
      top_k: draw from that many of the likeliest tokens only, before `top_p`; by default from all.
      seed: of the drawing.

    Returns:
      Pieces of the text, the first of which is the prompt.

    Raises:
      UsageError: a setting is out of its range, or the prompt is empty.
    """
    ids = tokenizer.encode(prompt)
    check_sampling(ids, tokens, temperature, top_p, top_k)
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    endless = generate_ids(model, ids, **settings)
    added = itertools.takewhile(
        lambda token: token != tokenizer.eos_id, itertools.islice(endless, tokens)
    )
    return pieces(tokenizer, ids.tolist(), added)


def pieces(tokenizer: Tokenizer, ids: list[int], added: Iterable[int]) -> Iterator[str]:
    """The text of some tokens, and what each one adds to it; a character is not cut in two."""
    text = tokenizer.decode(ids)
    yield text
    for token in added:
        ids.append(token)
        longer = tokenizer.decode(ids)
        if not longer.endswith(REPLACEMENT):
            yield longer[len(text) :]
            text = longer
    yield tokenizer.decode(ids)[len(text) :]


def generate(model: Llama, tokenizer: Tokenizer, prompt: str, **settings: Any) -> str:
    """The whole text of `stream`, which says what the settings are."""
    return "".join(stream(model, tokenizer, prompt, **settings))
