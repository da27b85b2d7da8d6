"""When the subspace is chosen again, and that nothing else is paid for on other steps."""

import dataclasses
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax._matrix import moment_dtype
from galore_optax._part import Turn
from galore_optax._state import GaloreState
from galore_optax._subspace import ABSENT, Sides, Subspace, is_absent
from galore_optax.projectors import Projector

_NEVER = 2**31 - 1  # the last step that an int32 can count


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Refreshes a matrix half as often whenever its subspace has stood still: Q-GaLore.

    After each refresh but the first the similarity of the new and the old subspace goes on a queue.
    Once that is full, and whenever its mean reaches the threshold, the matrix' own gap doubles.
    The similarity is (|P_new^T P_old|_F^2 / r - r / m) / (1 - r / m), of an orthonormal basis
    (m, r): 1 for the same subspace, 0 on average for two random ones, whatever their basis.
    Random projectors cannot be combined with it: their subspaces never stand still.

    Attributes:
      threshold: of the mean similarity. The paper's 0.4 is of the cosine of one singular vector,
        which is another measure. Of this one, the demo's LLaMA has medians of 0.38 at T = 10, 0.32
        at T = 50 and 0.18 at T = 100; noise alone leaves 0.43 between two batches of 1,024 tokens
        at the same weights, 0.53 of 65,536. At T = 10 a threshold of 0.6 saves no refresh, 0.4 a
        third, 0.3 58 % and 0.2 70 %, none at a loss higher than without (benchmarks/lazy.py).
      queue: how many similarities are averaged.

    References:
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.2.
    """

    threshold: float = 0.4
    queue: int = 5

    def __post_init__(self):
        real = isinstance(self.threshold, numbers.Real) and not isinstance(self.threshold, bool)
        if not real or not 0 < float(self.threshold) <= 1:
            raise ValueError(f"threshold must be a number in (0, 1]; got {self.threshold!r}")
        whole = isinstance(self.queue, numbers.Integral) and not isinstance(self.queue, bool)
        if not whole or self.queue < 1:
            raise ValueError(f"queue must be a positive int; got {self.queue!r}")


@dataclasses.dataclass(frozen=True)
class Timing:
    """When matrices fall due. Attributes are the arguments of `galore_optax.galore`."""

    update_proj_gap: int | jax.Array | optax.Schedule
    refresh: str | Lazy
    stagger: bool

    def __post_init__(self):
        _check_gap(self.update_proj_gap)
        if self.refresh not in ("periodic", "lazy") and not isinstance(self.refresh, Lazy):
            raise ValueError(
                f'refresh must be "periodic", "lazy" or a galore_optax.Lazy; got {self.refresh!r}'
            )
        if not isinstance(self.stagger, bool | np.bool):
            raise TypeError(f"stagger must be a bool; got {self.stagger!r}")

    def check(self, projector: Projector) -> None:
        """Raises for a projector that cannot be combined with this."""
        if self.lazy is not None and not projector.stored:
            raise ValueError(
                'refresh="lazy" is for subspaces that can stand still; those of the projectors '
                'gaussian and orthonormal are random ones. Use refresh="periodic" with these.'
            )

    @property
    def lazy(self) -> Lazy | None:
        """The rule by which gaps grow, or None where they do not."""
        if isinstance(self.refresh, Lazy):
            return self.refresh
        return Lazy() if self.refresh == "lazy" else None

    def gap(self, step: jax.Array) -> jax.Array:
        """T at a step, (), int32, at least 1."""
        gap = self.update_proj_gap
        gap = gap(step) if callable(gap) else gap
        gap = min(gap, _NEVER) if isinstance(gap, numbers.Integral) else gap
        return jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)


def refresh_leaf(
    matrices: jax.Array,
    subspace: Subspace,
    *,
    sides: Sides,
    turn: Turn,
    step: jax.Array,
    gap: jax.Array,
    timing: Timing,
    force: bool,
    allowed: jax.Array | bool,
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
      subspace: of the leaf.
      sides: of the leaf: how bases are chosen, stored and loaded.
      turn: of the leaf.
      step: (), int32, the number of updates before this one; what the leaf before returned.
      gap: (), int32, positive: steps from one refresh to the next. What is late does not shift
        the later ones: with a constant gap T they are due at multiples of T, or, staggered, at a
        step of each matrix' own and every T steps from there.
      timing: whether matrices are staggered, and whether their gaps grow.
      force: whether to take all matrices as due.
      allowed: whether matrices may be refreshed now.

    Returns:
      The subspace to use from this step on, and the step for the leaf that comes next.

    Raises:
      ValueError: the projector returns bases of another shape than (m, r).
    """
    view, batch = sides.view, sides.view.batch

    def one(matrix: jax.Array, old: Subspace, key: jax.Array, place: jax.Array) -> Subspace:
        # In one pass over the matrix; jnp.max alone loses a nan on the CPU.
        peak = jnp.max(jnp.where(jnp.isnan(matrix), jnp.inf, jnp.abs(matrix)))
        usable = (peak > 0) & (peak < jnp.inf)
        due = usable if force else usable & (step >= old.due)
        choose_again = functools.partial(choose, matrix, peak, old, key, place)
        return jax.lax.cond(due, choose_again, lambda: old)

    def choose(
        matrix: jax.Array, peak: jax.Array, old: Subspace, key: jax.Array, place: jax.Array
    ) -> Subspace:
        dtype = moment_dtype(matrix.dtype)
        # Products of entries could over- or underflow. To divide by a power of two is exact.
        limits = jnp.finfo(dtype)
        power = jax.lax.reduce_precision(peak.astype(dtype) / 2, limits.nexp, 0)
        matrix = matrix.astype(dtype) / jnp.maximum(power, limits.tiny)
        first = old.refreshes == 0
        stored, overlaps, chances = [], [], []
        for side, was, g in zip(
            sides.of_matrix(key), (old.left, old.right), (matrix, matrix.T), strict=True
        ):
            if side is None:
                stored.append(ABSENT)
                continue
            now, overlap = side.choose(g, was, old.refreshes)
            stored.append(now)
            overlaps.append(overlap)
            chances.append(side.rank / side.size)
        overlap = jnp.where(first, 0.0, sum(overlaps) / len(overlaps)).astype(jnp.float32)
        chance = sum(chances) / len(chances)
        new = old._replace(left=stored[0], right=stored[1], refreshes=old.refreshes + 1)
        new = next_due(new, (overlap - chance) / (1 - chance), place)
        if not is_absent(old.overlap):
            new = new._replace(overlap=overlap)
        return _if_sound(new, old)

    def next_due(subspace: Subspace, similarity: jax.Array, place: jax.Array) -> Subspace:
        first = subspace.refreshes == 1
        # floor(gap * place / total), without the overflow.
        phase = (gap // turn.total) * place + ((gap % turn.total) * place) // turn.total
        phase = phase if timing.stagger else jnp.zeros_like(place)
        anchor = jnp.where(first, phase, subspace.due)
        own_gap = gap
        if timing.lazy is not None:
            shifted = jnp.append(subspace.similarities[1:], similarity)
            similarities = jnp.where(first, subspace.similarities, shifted)
            grows = jnp.mean(similarities) >= timing.lazy.threshold
            grows &= subspace.gaps <= (_NEVER // 2) // gap
            gaps = jnp.where(grows, 2, 1) * subspace.gaps
            subspace = subspace._replace(similarities=similarities, gaps=gaps)
            own_gap, anchor = gap * gaps, phase
        due = anchor + own_gap * (jnp.floor_divide(step - anchor, own_gap) + 1)
        due = jnp.where(own_gap > _NEVER - step, _NEVER, due)  # instead of an overflow
        return subspace._replace(due=due)

    def all_of_leaf(matrices: jax.Array, old: Subspace) -> Subspace:
        keys = sides.keys
        if not batch:
            return one(matrices, old, keys[0], jnp.asarray(turn.first, jnp.int32))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), (matrices, old))
        places = turn.first + jnp.arange(view.count, dtype=jnp.int32)
        new = jax.lax.map(lambda arguments: one(*arguments), (*flat, keys, places))
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), new)

    due = allowed if force else jnp.any(step >= subspace.due) & allowed
    # JAX would take what both branches pass through out of the conditional, hence the addition.
    return jax.lax.cond(
        due, lambda: (all_of_leaf(matrices, subspace), step + 0), lambda: (subspace, step)
    )


def refresh(
    tx: optax.GradientTransformation, grads: optax.Updates, state: Any, params: Any | None = None
) -> Any:
    """Chooses the subspaces of all matrices anew, and does nothing else.

    For users who decide themselves when to refresh, such as under a ``jax.vmap`` over seeds, where
    ``lax.cond`` runs both of its branches. Ordinary steps are then
    ``tx.update(grads, state, params, refresh=False)``, whose program has no factorization.

    In the middle of a step of several gradients (``accumulation_steps``) it does nothing, since
    those that are there already belong to the old subspaces.

    Args:
      tx: a galore, in any wrappers that pass on extra arguments, such as ``optax.chain``.
      grads: gradients.
      state: of ``tx``.
      params: the parameters, where ``tx`` needs them.

    Returns:
      The state with new subspaces; all else in it is as it was.

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adamw(1e-3, rank=2)
      >>> params = {"kernel": jnp.eye(4, 8)}
      >>> state = tx.init(params)
      >>> state = galore_optax.refresh(tx, params, state, params)
      >>> updates, state = tx.update(params, state, params, refresh=False)
    """
    _, updated = optax.with_extra_args_support(tx).update(grads, state, params, refresh=True)

    def take(old, new):
        return old._replace(subspace=new.subspace) if isinstance(old, GaloreState) else old

    return jax.tree.map(take, state, updated, is_leaf=lambda x: isinstance(x, GaloreState))


def _if_sound(new: Subspace, old: Subspace) -> Subspace:
    floats = [x for x in jax.tree.leaves((new.left, new.right)) if jnp.issubdtype(x, jnp.floating)]
    sound = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats], bool))
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)


def _check_gap(gap: Any) -> None:
    if callable(gap):
        return
    if isinstance(gap, jax.Array | np.ndarray):
        try:
            gap = float(gap)
        except jax.errors.ConcretizationTypeError:  # traced: counts as at least 1 at run time
            return
    elif isinstance(gap, bool) or not isinstance(gap, numbers.Integral):
        raise TypeError(
            f"update_proj_gap must be a positive int, a schedule or an array; got {gap!r}"
        )
    if gap < 1:
        raise ValueError(f"update_proj_gap must be at least 1 step; got {gap}")
