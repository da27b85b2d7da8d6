"""ReLoRA: what LoRA has trained is added to the kernels from time to time, and LoRA begins again.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates" (arXiv:2307.05695), algorithm
1: sums of products of rank r have a higher rank. Each time, most of what the optimizer remembers of
the matrices is forgotten, and the learning rate rises again (schedules.py).
"""

from typing import Any

import jax
import jax.numpy as jnp

import galore_optax
from examples.flax_llama.adapters import Adapter, Params, with_parts
from examples.flax_llama.config import Config
from examples.flax_llama.optimizer_state import schedule_count

# Of the entries of a layer's moment, all but the largest ones, this part of them, become zero.
REMEMBERED = 0.01
# The bits of infinity in float32. As integers, the bits of larger numbers are larger.
INFINITY = 0x7F800000


def begin_again(
    config: Config, params: Params, old: Any, new: Any, key: jax.Array
) -> tuple[Params, Any]:
    """Parameters and the optimizer's state after an update, which begin again if it is time.

    It is after every `config.merge_every` updates, but for the last one of all.

    Args:
      config: resolved.
      params: after the update.
      old: the optimizer's state before the update, which may have been skipped.
      new: the same after it.
      key: of this update, for what is drawn and what is rounded at random.
    """
    done = schedule_count(new)
    due = (done % config.merge_every == 0) & (done != schedule_count(old)) & (done < config.steps)
    adapter = config.adapter
    assert adapter is not None

    def again(params: Params, state: Any) -> tuple[Params, Any]:
        return merged_and_redrawn(params, adapter, key, config.stochastic_rounding), forgotten(
            state
        )

    return jax.lax.cond(due, again, lambda *same: same, params, new)


def merged_and_redrawn(
    params: Params, adapter: Adapter, key: jax.Array, round_bfloat16: bool = False
) -> Params:
    """The same model, whose kernels have what was beside them; A is drawn anew, and B is zero.

    Kernels in codes are rounded at random, as by every update; those in bfloat16 if asked for.
    """

    def merge(layer: tuple[Any, jax.Array, jax.Array, jax.Array]) -> Any:
        kernel, a, b, key = layer
        return galore_optax.apply_updates(
            kernel, adapter.factor * (a @ b), key, round_bfloat16=round_bfloat16
        )

    def one(linear: Params, key: jax.Array) -> Params:
        a, b = linear["lora"]["lora_a"], linear["lora"]["lora_b"]
        keys = jax.random.split(key, (2, len(a)))
        # A layer after the other, so that there is one product at a time.
        kernel = jax.lax.map(merge, (linear["kernel"], a, b, keys[0]))
        bound = a.shape[1] ** -0.5
        drawn = jax.random.uniform(keys[1, 0], a.shape, a.dtype, -bound, bound)
        return {"kernel": kernel, "lora": {"lora_a": drawn, "lora_b": jnp.zeros_like(b)}}

    return with_parts(params, of_linear_layers(params, one, key))


def of_linear_layers(params: Params, function: Any, key: jax.Array) -> Params:
    """What a function makes of each linear layer that LoRA is beside, with a key of its own."""
    found = {}
    for i, (name, value) in enumerate(sorted(params.items())):
        if not isinstance(value, dict):
            continue
        own = jax.random.fold_in(key, i)
        if "lora" in value:
            found[name] = function(value, own)
        elif below := of_linear_layers(value, function, own):
            found[name] = below
    return found


def forgotten(state: Any) -> Any:
    """An optimizer's state that has of each layer's moments of LoRA the largest hundredth alone."""

    def forget(path: tuple[Any, ...], x: Any) -> Any:
        if not any(getattr(key, "key", None) == "lora" for key in path):
            return x
        size = jnp.abs(x.astype(jnp.float32))
        least = least_of_the_largest(size, max(1, round(REMEMBERED * x[0].size)))
        return jnp.where(size >= least, x, jnp.zeros_like(x))

    return jax.tree.map_with_path(forget, state)


def least_of_the_largest(size: jax.Array, count: int) -> jax.Array:
    """The least of the `count` largest of each matrix of a stack, none negative: (L, 1, 1).

    By bisection of its bits, since to sort as much takes XLA minutes to compile.
    """
    bits = jax.lax.bitcast_convert_type(size, jnp.int32)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # at least `count` are at least `low`, and fewer at least `high`
        middle = low + (high - low) // 2
        enough = (bits >= middle).sum((1, 2), keepdims=True) >= count
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((len(bits), 1, 1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, INFINITY + 1)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
