"""scale_by_factored_adam() scales gradients as Adam does, by moments of rows and of columns."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from galore_optax._arguments import checks_arguments, known
from galore_optax._boxes import boxed_like, boxed_state
from galore_optax._decoded import decoded, rounded_once
from galore_optax._placement import padded
from galore_optax._sharding import shaped, under_auto, zeros_like
from galore_optax._specs import placed_state
from galore_optax._trees import bare, beside
from galore_optax._types import Numeric, Params, State, Updates
from galore_optax._view import moment_dtype


class FactoredAdamState(NamedTuple):
    """State of :func:`scale_by_factored_adam`, trees like the parameters."""

    count: Int[Array, ""]  # the number of steps.
    v_row: PyTree  # (*batch, m): the mean square of each row; MaskedNode() for vectors.
    v_col: PyTree  # (*batch, n): the mean square of each column; MaskedNode() for vectors.
    v: PyTree  # the square of each entry of vectors; MaskedNode() for matrices.


@checks_arguments
def scale_by_factored_adam(
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    clipping_threshold: Numeric | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales gradients as Adam without a first moment, its second one factored.

    Of a matrix of m rows and n columns the state has m + n numbers, where Adam's has 2 m n. It is
    meant for the tables of a model, its embeddings and its head, which take most of what state is
    left when all other matrices are in a subspace. The second moment v of an entry is estimated
    from exponential means of the squared gradients of its row and of its column:

        v_row <- b2 v_row + (1 - b2) mean_j g_ij^2,   v_col <- b2 v_col + (1 - b2) mean_i g_ij^2,
        v_ij = v_row_i v_col_j / mean(v_row) / (1 - b2^t),

    which is exact where it is of rank 1. ``b2``, ``eps`` and ``eps_root`` mean what they do in
    ``optax.scale_by_adam(b1=0)``. Leaves of one axis keep a second moment of their size.

    Args:
      b2: the decay rate of the means.
      eps: what is added to the denominator, after bias correction.
      eps_root: what is added under the root of the denominator.
      clipping_threshold: the most that the root mean square of a matrix' update may be; None for
        no clipping.

    Returns:
      A transformation whose state is a `FactoredAdamState` in float32, or wider where gradients
      are. A leaf's last two axes are those of its matrix; all others are batch axes, over which
      matrices are stacked.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: an argument is out of range.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(
      ...     galore_optax.scale_by_factored_adam(), optax.scale_by_learning_rate(1e-3)
      ... )
      >>> state = tx.init({"embedding": jnp.ones((32000, 64))})
      >>> sum(leaf.size for leaf in jax.tree.leaves(state))
      32065

    References:
      Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018, algorithm 2
    """
    scaling = rounded_once(decoded(under_auto(_on_arrays(b2, eps, eps_root, clipping_threshold))))

    def init(params: Params) -> FactoredAdamState:
        inside = bare(params)
        state = placed_state(scaling.init(inside), inside, [])
        return boxed_state(state, params, [])

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, FactoredAdamState]:
        if not isinstance(state, FactoredAdamState):
            raise TypeError(
                "scale_by_factored_adam's update needs the FactoredAdamState that its init made; "
                f"got a {type(state).__name__}. Was it made by another transformation?"
            )
        given = bare(updates)
        new = scaling.update(given, bare(state), beside(given, bare(params)), **extra_args)
        return boxed_like(new[0], updates), boxed_like(new[1], state)

    return optax.GradientTransformationExtraArgs(init, update)


def _on_arrays(
    b2: Numeric, eps: Numeric, eps_root: Numeric, clipping_threshold: Numeric | None
) -> optax.GradientTransformation:
    """Returns the transformation of arrays in at least float32, in no boxes and on one device."""

    def init(params: Params) -> FactoredAdamState:
        leaves, treedef = jax.tree.flatten(params)
        moments = zip(*map(_no_moments, leaves), strict=True) if leaves else [()] * 3
        return FactoredAdamState(jnp.zeros([], jnp.int32), *map(treedef.unflatten, moments))

    def update(
        updates: Updates, state: State, params: Params | None = None
    ) -> tuple[Updates, FactoredAdamState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        correction = jnp.sqrt(1 - jnp.power(b2, count))
        gradients, treedef = jax.tree.flatten(updates)
        trees = [treedef.flatten_up_to(tree) for tree in state[1:]]
        scaled, moments = [], []
        for g, *old in zip(gradients, *trees, strict=True):
            new = _averaged(g, old, b2)
            root = _root(*new) / correction.astype(g.dtype)
            if known(eps_root, 1.0) != 0:
                root = jnp.sqrt(root**2 + eps_root)
            update = g / (root + eps)
            if clipping_threshold is not None:
                update = clip_rms(update, range(g.ndim - 2), clipping_threshold)
            scaled.append(update)
            moments.append(new)
        new = zip(*moments, strict=True) if moments else [()] * 3
        return treedef.unflatten(scaled), FactoredAdamState(count, *map(treedef.unflatten, new))

    return optax.GradientTransformation(init, update)


_Moments: TypeAlias = tuple[PyTree, PyTree, PyTree]  # of rows, of columns, of entries


def _no_moments(leaf: PyTree) -> _Moments:
    """Returns zeros for what a leaf has, and MaskedNode() for what it has not."""
    none = optax.MaskedNode()
    if leaf.ndim < 2:
        return none, none, zeros_like(leaf, moment_dtype(leaf.dtype))
    rows, columns = (
        zeros_like(_without(axis, leaf), moment_dtype(leaf.dtype)) for axis in (-1, -2)
    )
    return rows, columns, none


def _without(axis: int, leaf: PyTree) -> jax.ShapeDtypeStruct:
    """Returns the shape of a leaf without an axis, divided by an Explicit mesh as the leaf is."""
    like = shaped(leaf)
    kept = [i for i in range(leaf.ndim) if i != leaf.ndim + axis]
    sharding = like.sharding
    if isinstance(sharding, NamedSharding):
        spec = PartitionSpec(*(padded(sharding.spec, leaf.ndim)[i] for i in kept))
        sharding = NamedSharding(sharding.mesh, spec)
    shape = tuple(leaf.shape[i] for i in kept)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _averaged(g: Float[Array, "..."], old: Sequence[PyTree], b2: Numeric) -> _Moments:
    """Returns the exponential means after one more gradient."""
    rows, columns, entries = old
    square = g**2
    if g.ndim < 2:
        return rows, columns, b2 * entries + (1 - b2) * square
    rows = b2 * rows + (1 - b2) * jnp.mean(square, -1)
    return rows, b2 * columns + (1 - b2) * jnp.mean(square, -2), entries


def _root(rows: PyTree, columns: PyTree, entries: PyTree) -> Float[Array, "..."]:
    """Returns the root of the second moment of each entry.

    It is a product of roots, since that of two small squares would be zero.
    """
    if isinstance(rows, optax.MaskedNode):
        return jnp.sqrt(entries)
    mean = jnp.mean(rows, -1, keepdims=True)
    # Where all gradients were zero, so is each row. Where squares were too large for the dtype,
    # rows are taken for alike, and the columns say which of them were.
    overflown = jnp.isinf(mean)
    share = jnp.where(overflown, 1, rows / jnp.where((mean == 0) | overflown, 1, mean))
    return jnp.sqrt(share)[..., :, None] * jnp.sqrt(columns)[..., None, :]


def clip_rms(
    update: Float[Array, "..."], batch: Sequence[int], threshold: Numeric
) -> Float[Array, "..."]:
    """Returns the update with a root mean square of at most the threshold over all axes but some.

    Args:
      update: the update.
      batch: the axes of each of whose items the root mean square is another.
      threshold: the most that it may be.
    """
    axes = tuple(axis for axis in range(update.ndim) if axis not in batch)
    mean_square = jnp.mean(update**2, axes, keepdims=True)
    return update / jnp.maximum(1, jnp.sqrt(mean_square) / threshold)
