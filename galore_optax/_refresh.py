"""When the subspace is chosen again, and that nothing else is paid for on other steps."""

import jax
import jax.numpy as jnp

from galore_optax._matrix import moment_dtype
from galore_optax._projectors import Projector, orient
from galore_optax._subspace import Subspace, is_absent

_NEVER = 2**31 - 1  # the last step that an int32 can count


def refresh(
    matrices: jax.Array,
    subspace: Subspace,
    *,
    step: jax.Array,
    gap: jax.Array,
    projector: Projector,
    rank: int,
) -> tuple[Subspace, jax.Array]:
    """Chooses again the subspaces that are due, and returns the others as they are.

    All work is inside ``lax.cond`` with a scalar predicate. Matrices of a stack are done one
    after the other, so that the workspace is that of one. A gradient that is zero or not finite
    cannot choose a subspace: the old one stays, and stays due until a later gradient can.

    The step is handed from leaf to leaf, which puts the leaves in a row: XLA works through them one
    after the other, with the temporaries of a few, where it would otherwise do each operation for
    all leaves before the next one, through memory instead of caches.

    Args:
      matrices: (*batch, m, n), the gradient.
      subspace: of one leaf.
      step: (), int32, the number of updates before this one; what the leaf before returned.
      gap: (), int32, positive: steps from one refresh to the next. What is late does not shift
        the later ones: with a constant gap T they are due at multiples of T.
      projector: chooses the directions.
      rank: r.

    Returns:
      The subspace to use from this step on, and the step for the leaf that comes next.

    Raises:
      ValueError: the projector returns bases of other shapes than (m, r) and (n, r).
    """
    batch = subspace.due.shape

    def one(matrix: jax.Array, old: Subspace) -> Subspace:
        peak = jnp.max(jnp.abs(matrix))  # nan where the matrix has one
        usable = (peak > 0) & (peak < jnp.inf)
        return jax.lax.cond((step >= old.due) & usable, choose, lambda _, old: old, matrix, old)

    def choose(matrix: jax.Array, old: Subspace) -> Subspace:
        bases = projector(matrix.astype(moment_dtype(matrix.dtype)), rank)
        expected = tuple((rows, rank) for rows in matrix.shape)
        if tuple(map(jnp.shape, bases)) != expected:
            raise ValueError(
                f"projector must return bases of shapes {expected} for a matrix of shape "
                f"{matrix.shape} and rank {rank}; got {tuple(map(jnp.shape, bases))}"
            )
        left, right = (
            was if is_absent(was) else orient(new, was, old.refreshes == 0).astype(was.dtype)
            for new, was in zip(bases, (old.left, old.right), strict=True)
        )
        due = old.due + gap * (jax.lax.div(step - old.due, gap) + 1)
        due = jnp.where(gap > _NEVER - step, _NEVER, due)  # instead of an overflow
        new = Subspace(left, right, old.refreshes + 1, due)
        sound = jnp.isfinite(sum(jnp.sum(basis) for basis in jax.tree.leaves((left, right))))
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)

    def all_of_leaf(matrices: jax.Array, old: Subspace) -> Subspace:
        if not batch:
            return one(matrices, old)
        axes = len(batch)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), (matrices, old))
        new = jax.lax.map(lambda arguments: one(*arguments), flat)
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), new)

    due = jnp.any(step >= subspace.due)
    # JAX would take what both branches pass through out of the conditional, hence the addition.
    return jax.lax.cond(
        due, lambda: (all_of_leaf(matrices, subspace), step + 0), lambda: (subspace, step)
    )
