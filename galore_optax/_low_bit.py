"""low_bit(): any transformation, its moments in 8-bit codes or bfloat16 between steps."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import _codes
from galore_optax._matrix import ranging_dtype, structure
from galore_optax._part import current_part
from galore_optax._quantized import (
    check_block_size,
    fitting_block_size,
    is_quantized,
    quantize,
    static_hint,
)
from galore_optax._quantized_params import check_gradients, dequantize_params

MOMENTS = {"mu": "signed", "trace": "signed", "m": "signed", "nu": "unsigned", "v": "unsigned"}
"""The fields of states that are moments, and whether they have a sign."""

# Fields with such a name that have a sign nevertheless: the average of gradient differences,
# a momentum, and an estimate of the Hessian's diagonal.
_SIGNED = {
    optax.ScaleByAdanState: "v",
    optax.ScaleBySM3State: "nu",
    optax.contrib.SophiaState: "nu",
}

_FEWEST = 16  # elements of an item: with fewer, the scales take much of what the codes save


class LowBitState(NamedTuple):
    """State of :func:`low_bit`."""

    inner: Any  # the inner state; its moments are QuantizedArray, or bfloat16.
    rounds: Any  # (), int32: how often moments were rounded at random; MaskedNode() with 8 bits.


def low_bit(
    inner: optax.GradientTransformation,
    bits: int = 8,
    block_size: int = 256,
    *,
    min_size: int = 4096,
    names: Mapping[str, str | None] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of a transformation in 8 bits, or 16, between its steps.

    The inner transformation sees its moments in float32; what it makes of them is rounded after
    its update, which uses the moments before they are. ``galore(low_bit(optax.scale_by_adam()),
    rank=128)`` is 8-bit GaLore, ``low_bit(optax.adamw(1e-3))`` is 8-bit AdamW.

    Moments are found by the names of their fields in the inner state: ``mu``, ``trace`` and ``m``
    with a sign, ``nu`` and ``v`` without. All else, such as an average of weights, factored
    statistics or accumulators, stays as it is unless it is named.

    Args:
      inner: any Optax transformation.
      bits: 8 for dynamic codes, block by block, rounded to the nearest; 16 for bfloat16 with
        stochastic rounding.
      block_size: elements that share a scale; even.
      min_size: moments of fewer elements stay as they are; those of one layer of a stack count.
      names: names of more fields, with ``"signed"`` or ``"unsigned"`` for each, or None to leave
        a field as it is. Of a field called unsigned, negative numbers become 0.
      seed: of the stochastic rounding with 16 bits.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a `LowBitState`. The leading
      axes of moments with more than two are taken for layers and the like: no block straddles
      them. Of an element 8 bits take 1 + 4 / 256 bytes. Updates have the dtype of the gradients.
      Parameters may be `QuantizedArray`.

    Raises:
      TypeError: ``inner`` is not an Optax transformation.
      ValueError: another argument is out of range, or a state was made with others.

    Notes:
      A positive second moment never becomes 0, but the smallest value of its block: divided by
      epsilon alone, an update would be as good as infinite. Blocks that are not finite come back
      as NaN.

      ``optax.tree.map_params`` and the like see the arrays inside a `QuantizedArray`; with
      ``is_leaf=lambda x: isinstance(x, QuantizedArray)`` they see the whole.

    Examples:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((64, 256))}
      >>> tx = galore_optax.low_bit(optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> optax.tree.get(state, "mu")["kernel"].nbytes / params["kernel"].size
      1.015625

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2021.
    """
    if not callable(getattr(inner, "init", None)) or not callable(getattr(inner, "update", None)):
        raise TypeError(
            "inner must be an Optax transformation such as optax.scale_by_adam(); got "
            f"{inner!r}. To give the bits, write low_bit(inner, bits=8)."
        )
    inner = optax.with_extra_args_support(inner)
    _check_seed(seed)
    rules = _Rules(bits, block_size, min_size, MOMENTS | dict(names or {}), set(names or {}))

    def init_fn(params: optax.Params) -> LowBitState:
        params = _unboxed(dequantize_params(params), min_size)
        state = inner.init(params)
        leaves, treedef = jax.tree.flatten(state)
        stored = [
            leaf if kind is None else rules.store(_wide(leaf), kind)
            for leaf, kind in zip(leaves, rules.kinds(state, params), strict=True)
        ]
        rounds = jnp.zeros([], jnp.int32) if bits == 16 else optax.MaskedNode()
        return LowBitState(treedef.unflatten(stored), rounds)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, LowBitState]:
        if not isinstance(state, LowBitState):
            raise TypeError(
                f"low_bit's update needs the LowBitState that its init made; got a "
                f"{type(state).__name__}. Was it made by another transformation?"
            )
        check_gradients(updates)
        gradients = _unboxed(updates, min_size)
        gradients = jax.tree.map(lambda g: jnp.astype(g, ranging_dtype(g.dtype)), gradients)
        kinds = rules.kinds(state.inner, gradients)
        leaves, treedef = jax.tree.flatten(state.inner, is_leaf=is_quantized)
        rules.check(state.inner, kinds)
        restored = [
            leaf if kind is None else rules.restore(leaf)
            for leaf, kind in zip(leaves, kinds, strict=True)
        ]
        if params is not None:
            params = _unboxed(dequantize_params(params), min_size)
        new_updates, new_inner = inner.update(
            gradients, treedef.unflatten(restored), params, **extra_args
        )

        step_key = None
        if bits == 16:
            step_key = jax.random.fold_in(jax.random.key(seed), state.rounds)
            if (part := current_part()) is not None:
                step_key = jax.random.fold_in(step_key, part.turn)
        stored = []
        new_leaves = treedef.flatten_up_to(new_inner)
        for i, (kind, old, new) in enumerate(zip(kinds, leaves, new_leaves, strict=True)):
            if kind is None:
                # Wider moments must not widen what is kept beside them from step to step.
                stored.append(_like(new, old))
            else:
                leaf_key = None if step_key is None else jax.random.fold_in(step_key, i)
                stored.append(rules.store(new, kind, leaf_key))
        like = _unboxed(updates, min_size) if params is None else params
        new_updates = jax.tree.leaves(jax.tree.map(_like, new_updates, like))
        new_updates = jax.tree.structure(updates).unflatten(new_updates)
        rounds = state.rounds
        if bits == 16:
            rounds = optax.safe_increment(rounds)
        return new_updates, LowBitState(treedef.unflatten(stored), rounds)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Which leaves of a state are kept in few bits, and how."""

    bits: int
    block_size: int
    min_size: int
    names: Mapping[str, str | None]
    given: set[str]  # the names that the user gave

    def __post_init__(self):
        if self.bits not in (8, 16):
            raise ValueError(
                f"bits must be 8 or 16 for moments; got {self.bits!r}. Fewer are for weights and "
                "projectors."
            )
        check_block_size(self.block_size)
        if not isinstance(self.min_size, numbers.Integral) or self.min_size < 0:
            raise ValueError(
                f"min_size must be an int of at least 0; got {self.min_size!r}"
                + static_hint(self.min_size)
            )
        for name, kind in self.names.items():
            if kind not in ("signed", "unsigned", None):
                raise ValueError(
                    f"names[{name!r}] must be 'signed', 'unsigned' or None; got {kind!r}"
                )

    def kinds(self, state: Any, params: Any) -> list[str | None]:
        """For each leaf of a state ``"signed"``, ``"unsigned"``, or None to leave it as it is.

        Args:
          state: of the inner transformation, its moments in codes or not.
          params: the parameters, or gradients.
        """
        signed = _signed_fields(state)
        found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
        paths = [_components(path) for path, _ in found]
        param_paths = {_components(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
        kinds = []
        for (_, leaf), field in zip(found, _fields(paths, param_paths), strict=True):
            name = field[-1] if field else ""
            kind = self.names.get(name)
            if kind is not None and field in signed and name not in self.given:
                kind = "signed"
            kinds.append(kind if self._is_large(leaf) else None)
        return kinds

    def _is_large(self, leaf: Any) -> bool:
        shape = jnp.shape(leaf)
        dtype = leaf.dtype if is_quantized(leaf) else jnp.result_type(leaf)
        size = _item_size(shape)
        return jnp.issubdtype(dtype, jnp.floating) and size >= max(self.min_size, _FEWEST)

    def store(self, array: jax.Array, kind: str, key: jax.Array | None = None) -> Any:
        """A moment as it is kept between steps."""
        if self.bits == 16:
            return (
                array.astype(jnp.bfloat16) if key is None else _codes.round_to_bfloat16(array, key)
            )
        return quantize(
            array,
            kind,
            self.block_size,
            batch_axes=_batch_axes(array.shape),
            keep_positive=kind == "unsigned",
        )

    def restore(self, stored: Any) -> jax.Array:
        """A moment as the inner transformation sees it."""
        return _wide(stored) if self.bits == 16 else stored.dequantize()

    def check(self, state: Any, kinds: Iterable[str | None]) -> None:
        """Raises for a leaf that is not kept as it would be by these rules."""
        found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
        for (path, leaf), kind in zip(found, kinds, strict=True):
            if is_quantized(leaf):
                is_kept = f"{leaf.scheme} 8-bit codes in blocks of {leaf.block_size}"
            else:
                is_kept = str(jnp.result_type(leaf))
            if kind is None:
                should_be = None if is_quantized(leaf) else is_kept
            elif self.bits == 16:
                should_be = "bfloat16"
            else:
                shape = jnp.shape(leaf)
                block_size = fitting_block_size(shape[_batch_axes(shape) :], self.block_size)
                should_be = f"{kind} 8-bit codes in blocks of {block_size}"
            if is_kept != should_be:
                raise ValueError(
                    "the state belongs to another configuration of low_bit: "
                    f"{'/'.join(_components(path))} is {is_kept}, and should "
                    f"{f'be {should_be}' if should_be else 'not be in codes'}. Use the bits, "
                    "block_size, min_size and names it was made with, or make a new state with "
                    "init."
                )


def _fields(
    paths: list[tuple[str, ...]], param_paths: set[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """For each leaf of a state the path of the field it belongs to.

    A field is the outermost part of the state whose leaves have the paths of parameters, so that
    a parameter called "v" is not taken for a moment. Elsewhere it is the leaf itself.
    """
    mirrors: dict[tuple[str, ...], bool] = {}
    for path in paths:
        for end in range(len(path) + 1):
            prefix = path[:end]
            mirrors[prefix] = mirrors.get(prefix, True) and path[end:] in param_paths
    return [
        next((path[:end] for end in range(len(path)) if mirrors[path[:end]]), path)
        for path in paths
    ]


def _signed_fields(state: Any) -> set[tuple[str, ...]]:
    """Paths of the fields that have a sign though their names do not say so."""
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: type(x) in _SIGNED)
    return {
        (*_components(path), _SIGNED[type(node)]) for path, node in nodes if type(node) in _SIGNED
    }


def _components(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _unboxed(tree: Any, min_size: int) -> Any:
    """A tree with its large leaves out of Flax's boxes, which take a moment in codes for a tree."""
    leaves = jax.tree.leaves(tree)
    large = [_item_size(jnp.shape(leaf)) >= min_size for leaf in leaves]
    return structure(tree, large).unflatten(leaves)


def _batch_axes(shape: tuple[int, ...]) -> int:
    return max(0, len(shape) - 2)


def _item_size(shape: tuple[int, ...]) -> int:
    """The elements of what stands behind the batch axes: of one layer of a stack."""
    return math.prod(shape[_batch_axes(shape) :])


def _wide(array: jax.Array) -> jax.Array:
    """A moment in at least float32, in which alone a slow average of it moves."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _like(new: Any, old: Any) -> Any:
    return new if jnp.result_type(new) == jnp.result_type(old) else new.astype(jnp.result_type(old))


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an int; got {seed!r}")
