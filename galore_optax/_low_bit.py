"""low_bit() keeps the moments of any transformation in 8-bit codes or bfloat16 between steps."""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, PyTreeDef

from galore_optax._arguments import static_hint
from galore_optax._blocks import lying_as
from galore_optax._boxes import boxed_like, boxed_state
from galore_optax._errors import check_transformation
from galore_optax._excerpt import Excerpt
from galore_optax._ownership import FEWEST, Owned, Role, Stacked, check_stacked, ownership
from galore_optax._promotion import standard_promotion
from galore_optax._quantized import (
    QuantizedArray,
    check_block_size,
    fitting_block_size,
    is_quantized,
)
from galore_optax._quantized_params import check_gradients, dequantize_params
from galore_optax._specs import decoded_specs, placed_state
from galore_optax._storage import Storage, Stored
from galore_optax._trees import bare, beside
from galore_optax._twice import twice
from galore_optax._types import Params, Shape, State, Updates
from galore_optax._view import moment_dtype, wide

SCHEMES: Mapping[Role, str] = {"first": "signed", "second": "unsigned", "curvature": "signed"}
"""The codec of the moments of each role, which says whether they have a sign."""


class LowBitState(NamedTuple):
    """State of :func:`low_bit`."""

    inner: PyTree  # the inner state; its moments are QuantizedArray, or bfloat16.
    rounds: PyTree  # (), int32: how often moments were rounded at random; MaskedNode() with 8 bits.


def low_bit(
    inner: optax.GradientTransformation,
    bits: int = 8,
    block_size: int = 256,
    *,
    min_size: int = 4096,
    names: Mapping[str, str | None] | None = None,
    seed: int = 0,
    stacked: Stacked | None = None,
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
      min_size: moments of fewer elements stay as they are. All elements of a leaf count, or those
        of one layer where ``stacked`` says how many axes are stacks. With 16 bits, a moment that
        the inner transformation itself keeps in bfloat16 is rounded at random whatever its size.
      names: the names of more fields, with ``"signed"`` or ``"unsigned"`` for each, or None to
        leave a field as it is. In a field called unsigned, negative numbers become 0.
      seed: the seed of the stochastic rounding with 16 bits.
      stacked: a function of a parameter's path, components joined by "/", and its shape, which
        returns how many of its leading axes are stacks of layers; for example
        ``lambda path, shape: int("blocks" in path)``. No block of codes straddles these.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a `LowBitState`. Without
      ``stacked``, all axes of a moment but the last two are presumed to be stacks, except where
      fewer than 16 elements are behind them. With 8 bits an element takes 1 + 4 / 256 bytes.
      Updates have the dtype of the gradients. Parameters may be `QuantizedArray`.

    Raises:
      TypeError: ``inner`` is not an Optax transformation, or another argument has a wrong type.
      ValueError: another argument is out of range, or a state was made with others.

    Notes:
      A positive second moment never becomes 0, but at least the smallest value of its block:
      divided by epsilon alone, an update would be as good as infinite. Blocks that are not finite
      come back as NaN.

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
    check_transformation("inner", inner, "To give the bits, write low_bit(inner, bits=8).")
    _check_seed(seed)
    check_stacked(stacked)
    rules = _Rules(bits, block_size, min_size, {} if names is None else names)
    made = _LowBit(standard_promotion(inner), rules, stacked, seed)
    return optax.GradientTransformationExtraArgs(made.init, made.update)


_Leaf: TypeAlias = jax.typing.ArrayLike | QuantizedArray | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Which leaves of a state are kept in few bits, and how."""

    bits: int
    block_size: int
    min_size: int
    names: Mapping[str, str | None]

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
        if not isinstance(self.names, Mapping):
            raise TypeError(
                "names must be a dict of names of fields and 'signed', 'unsigned' or None; got "
                f"{self.names!r}"
            )
        for name, kind in self.names.items():
            if not isinstance(name, str):
                raise TypeError(f"names must have names of fields for keys; got {name!r}")
            if kind not in ("signed", "unsigned", None):
                raise ValueError(
                    f"names[{name!r}] must be 'signed', 'unsigned' or None; got {kind!r}"
                )

    def is_large(self, owned: Owned) -> bool:
        """Whether a new moment is kept in few bits."""
        return owned.size >= max(self.min_size, FEWEST)

    def kinds(self, leaves: Sequence[_Leaf], owned: Sequence[Owned]) -> list[str | None]:
        """Returns for each leaf of a state its kind: ``"signed"``, ``"unsigned"``, or None.

        The kind is None where a leaf is no moment.
        """
        return [
            self.names.get(own.name, None if own.role is None else SCHEMES[own.role])
            if jnp.issubdtype(_dtype(leaf), jnp.floating)
            else None
            for leaf, own in zip(leaves, owned, strict=True)
        ]

    def kinds_in_state(self, leaves: Sequence[_Leaf], owned: Sequence[Owned]) -> list[str | None]:
        """Returns for each leaf of a state its kind, or None if it is not kept in few bits.

        The state itself says so: of a stack of layers `min_size` was compared with the whole,
        which an update of one layer does not see.

        Raises:
          ValueError: a leaf is not kept as it would be by these rules.
        """
        kinds = self.kinds(leaves, owned)
        result = []
        for leaf, own, kind in zip(leaves, owned, kinds, strict=True):
            self._check(leaf, own, kind)
            rounded = self.bits == 16 and _dtype(leaf) == jnp.bfloat16
            result.append(kind if is_quantized(leaf) or rounded else None)
        return result

    def _check(self, leaf: _Leaf, owned: Owned, kind: str | None) -> None:
        is_kept, should_be = str(_dtype(leaf)), "bfloat16"
        if isinstance(leaf, QuantizedArray):
            is_kept = _codes_of(leaf.scheme, leaf.block_size, leaf.item_shape)
        elif kind is None or not self.is_large(owned):
            return
        if self.bits == 8:
            item = np.shape(leaf)[owned.batch_axes :]
            should_be = _codes_of(
                kind, fitting_block_size(item, self.block_size, kind or "signed"), item
            )
        if is_kept != should_be or kind is None:
            raise ValueError(
                "the state belongs to another configuration of low_bit: "
                f"{owned.path} is {is_kept}, and should "
                f"{'not be in codes' if kind is None else f'be {should_be}'}. Use the bits, "
                "block_size, min_size, names and stacked it was made with, or make a new state "
                "with init."
            )

    def storage(self, kind: str) -> Storage:
        """Returns how a moment of this kind is held between steps."""
        return Storage("bfloat16" if self.bits == 16 else kind, self.block_size)

    def store(
        self,
        array: Float[Array, "..."],
        kind: str,
        batch_axes: int,
        key: PRNGKeyArray | None = None,
        twin: Float[Array, "..."] | None = None,
    ) -> Stored:
        """Returns a moment as it is kept between steps, to be read again in at least float32."""
        return self.storage(kind).keep(
            wide(array),
            batch_axes=batch_axes,
            key=key,
            keep_positive=kind == "unsigned",
            twin=twin,
        )

    def restore(
        self, stored: Stored, kind: str, where: PartitionSpec | None
    ) -> Float[Array, "..."]:
        """Returns a moment as the inner transformation sees it, in at least float32."""
        return wide(self.storage(kind).load(stored, where))


@dataclasses.dataclass(frozen=True)
class _LowBit:
    """The transformation that `low_bit` makes, whose arguments its attributes are."""

    inner: optax.GradientTransformationExtraArgs
    rules: _Rules
    stacked: Stacked | None
    seed: int

    def init(self, params: Params) -> LowBitState:
        """Returns the state of the inner transformation, its moments in few bits."""
        given, params = params, dequantize_params(bare(params))
        state = self.inner.init(params)
        leaves, treedef = jax.tree.flatten(state, is_leaf=is_quantized)
        owned = ownership(state, params, stacked=self.stacked)
        kinds = self.rules.kinds(leaves, owned)
        pairs = zip(kinds, owned, strict=True)
        small = [kind is not None and not self.rules.is_large(own) for kind, own in pairs]
        leaves = self._widened(leaves, treedef, small, params)
        # XLA would compute the codes of constants, zeros mostly, while it compiles: for minutes.
        hide = jax.lax.optimization_barrier
        stored = [
            self.rules.store(wide(hide(leaf)), kind, own.batch_axes)
            if kind and self.rules.is_large(own)
            else leaf
            for leaf, own, kind in zip(leaves, owned, kinds, strict=True)
        ]
        rounds = jnp.zeros([], jnp.int32) if self.rules.bits == 16 else optax.MaskedNode()
        state = LowBitState(treedef.unflatten(stored), rounds)
        return boxed_state(placed_state(state, bare(given), []), given, [])

    def update(
        self,
        updates: Updates,
        state: State,
        params: Params | None = None,
        *,
        excerpt: Excerpt | None = None,
        **extra_args: object,
    ) -> tuple[Updates, LowBitState]:
        """Returns the updates of the inner transformation, and its next state in few bits."""
        if not isinstance(state, LowBitState):
            raise TypeError(
                f"low_bit's update needs the LowBitState that its init made; got a "
                f"{type(state).__name__}. Was it made by another transformation?"
            )
        boxes = updates, state
        updates, state = bare(updates), bare(state)
        params = beside(updates, bare(params))
        check_gradients(updates)
        owned = ownership(state.inner, updates, stacked=self.stacked)
        leaves, treedef = jax.tree.flatten(state.inner, is_leaf=is_quantized)
        kinds = self.rules.kinds_in_state(leaves, owned)
        if isinstance(state.rounds, optax.MaskedNode) == (self.rules.bits == 16):
            raise ValueError(
                "the state belongs to another configuration of low_bit: it was made with bits="
                f"{24 - self.rules.bits}, and this low_bit has bits={self.rules.bits}. Use the "
                "bits it was made with, or make a new state with init."
            )
        gradients = jax.tree.map(wide, updates)
        params = dequantize_params(params)
        like = updates if params is None else params
        params = jax.tree.map(wide, params)
        places = decoded_specs(state.inner, updates)
        extra_args |= {} if excerpt is None else {"excerpt": excerpt}

        kept = {i: kind for i, kind in enumerate(kinds) if kind is not None}
        codes = {i: leaves[i] for i in kept}

        def read(codes: dict[int, Stored]) -> dict[int, Array]:
            return {i: self.rules.restore(x, kept[i], places[i]) for i, x in codes.items()}

        def step(moments: dict[int, Array]) -> tuple[tuple[Updates, list], dict[int, Array]]:
            inner = treedef.unflatten([moments.get(i, leaf) for i, leaf in enumerate(leaves)])
            new_updates, inner = self.inner.update(gradients, inner, params, **extra_args)
            new_leaves = treedef.flatten_up_to(inner)
            return (new_updates, new_leaves), {i: new_leaves[i] for i in codes}

        twins: dict[int, Array] | None = None
        if self.rules.bits == 8:
            (new_updates, new_leaves), _, twins = twice(step, read, codes)
        else:
            (new_updates, new_leaves), _ = step(read(codes))
        new_updates = jax.tree.map(_like, new_updates, like)
        key, rounds = self._next_round(state, excerpt)
        stored = []
        for i, (kind, old, new) in enumerate(zip(kinds, leaves, new_leaves, strict=True)):
            if kind is None:
                # Wider moments must not widen what is kept beside them from step to step.
                stored.append(_like(new, old))
            else:
                leaf_key = None if key is None else jax.random.fold_in(key, i)
                twin = None if twins is None else twins[i]
                new = self.rules.store(new, kind, owned[i].batch_axes, leaf_key, twin)
                stored.append(lying_as(old, new))
        new_state = LowBitState(treedef.unflatten(stored), rounds)
        return boxed_like(new_updates, boxes[0]), boxed_like(new_state, boxes[1])

    def _widened(
        self,
        leaves: list[_Leaf],
        treedef: PyTreeDef,
        small: Sequence[bool],
        params: Params,
    ) -> list[_Leaf]:
        """Returns small moments in the dtype that they have for parameters of at least float32.

        In 16 bits they would be sums that small squares leave as they are.
        """
        shapes = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(np.shape(p), moment_dtype(jnp.result_type(p))), params
        )
        if all(p.dtype == jnp.result_type(q) for p, q in _pairs(shapes, params)):
            return leaves
        wider = treedef.flatten_up_to(jax.eval_shape(self.inner.init, shapes))
        return [
            _like(jnp.asarray(leaf), like) if widens and not is_quantized(leaf) else leaf
            for leaf, widens, like in zip(leaves, small, wider, strict=True)
        ]

    def _next_round(
        self, state: LowBitState, excerpt: Excerpt | None
    ) -> tuple[PRNGKeyArray | None, PyTree]:
        """Returns the key of what is rounded at random, if anything is, and the next ``rounds``.

        Each step, and each excerpt of the parameters, gets another key.
        """
        if self.rules.bits != 16:
            return None, state.rounds
        key = jax.random.fold_in(jax.random.key(self.seed), state.rounds)
        rounds = jnp.asarray(optax.safe_increment(state.rounds))
        if excerpt is None:
            return key, rounds
        return jax.random.fold_in(key, excerpt.turn), excerpt.acknowledge(rounds)


def _pairs(one: PyTree, other: PyTree) -> list[tuple[PyTree, PyTree]]:
    return list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def _codes_of(kind: str | None, block_size: int, item_shape: Shape) -> str:
    return f"{kind} 8-bit codes in blocks of {block_size} of items {item_shape}"


def _dtype(leaf: _Leaf) -> jnp.dtype:
    return leaf.dtype if isinstance(leaf, QuantizedArray) else jnp.result_type(leaf)


def _like(new: jax.Array, old: jax.Array) -> jax.Array:
    return new if jnp.result_type(new) == jnp.result_type(old) else new.astype(jnp.result_type(old))


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an int; got {seed!r}")
