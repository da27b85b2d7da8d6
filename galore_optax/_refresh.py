"""Says when a subspace is chosen again.

A rule is a small frozen object like `Periodic`. It sees the counters of one matrix, and says after
a refresh when the next one is due. The table `REFRESHES` names the rules.
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from galore_optax._arguments import is_number, known
from galore_optax._callables import takes
from galore_optax._state import is_galore_state
from galore_optax._subspace import Subspace
from galore_optax._types import State, Step

_NEVER = 2**31 - 1  # the last step that an int32 can count

ONLY: Final = "only"
"""What `refresh` gives ``update`` for its argument of the same name: no step follows."""

Gap: TypeAlias = int | Array | Callable[[Step], PyTree]


class Clock(NamedTuple):
    """The time as one matrix sees it."""

    step: Step  # the number of updates done.
    gap: Int[Array, ""]  # T in steps, at least 1.
    phase: Int[Array, ""]  # by how many steps, fewer than T, staggering delays the matrix.


@runtime_checkable
class Refresh(Protocol):
    """What every rule of refresh can do; `Periodic` says what each member means."""

    @property
    def watches(self) -> bool: ...
    def initial(self) -> Subspace: ...
    def next(self, subspace: Subspace, clock: Clock, similarity: Float[Array, ""]) -> Subspace: ...


@dataclasses.dataclass(frozen=True)
class Periodic:
    """Refreshes a matrix every T steps."""

    @property
    def watches(self) -> bool:
        """Whether the rule goes by how subspaces turn, which must be able to stand still then."""
        return False

    def initial(self) -> Subspace:
        """Returns the counters of a matrix that is due at step 0; all else in it is absent."""
        # One array must not serve twice: a state is donated, and no buffer can be given away twice.
        return Subspace(refreshes=jnp.zeros([], jnp.int32), due=jnp.zeros([], jnp.int32))

    def next(self, subspace: Subspace, clock: Clock, similarity: Float[Array, ""]) -> Subspace:
        """Returns the counters of a matrix after a refresh, with the next one due.

        Args:
          subspace: the counters of the matrix, with this refresh counted.
          clock: the time of this refresh.
          similarity: how similar the new and the old subspace are: 1 where it stood still, 0 on
            average for two random ones.
        """
        del similarity
        anchor = jnp.where(subspace.refreshes == 1, clock.phase, subspace.due)
        return subspace._replace(due=_next_on_grid(anchor, clock.gap, clock.step))


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Refreshes a matrix half as often whenever its subspace has stood still: Q-GaLore.

    After each refresh but the first the similarity of the new and the old subspace goes on a queue.
    Once that is full, and whenever its mean reaches the threshold, the matrix' own gap doubles.
    The similarity is (|P_new^T P_old|_F^2 / r - r / m) / (1 - r / m), of an orthonormal basis
    (m, r): 1 for the same subspace, 0 on average for two random ones, whatever their basis.
    Random projectors cannot be combined with it: their subspaces never stand still.

    Attributes:
      threshold: the mean similarity from which on the gap doubles. The paper's 0.4 is a threshold
        of the cosine of one singular vector, which is another measure. Of this one, the demo's
        LLaMA has medians of 0.38 at T = 10, 0.32 at T = 50 and 0.18 at T = 100; noise alone leaves
        0.43 between two batches of 1,024 tokens at the same weights, 0.53 of 65,536. At T = 10 a
        threshold of 0.6 saves no refresh, 0.4 a third, 0.3 58 % and 0.2 70 %, none at a loss higher
        than without (benchmarks/lazy.py).
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

    @property
    def watches(self) -> bool:
        """Whether the rule goes by how subspaces turn."""
        return True

    def initial(self) -> Subspace:
        """Returns the counters of a matrix that is due at step 0; see `Periodic`."""
        counters = Periodic().initial()
        similarities = jnp.full(self.queue, -jnp.inf, jnp.float32)
        return counters._replace(gaps=jnp.ones([], jnp.int32), similarities=similarities)

    def next(self, subspace: Subspace, clock: Clock, similarity: Float[Array, ""]) -> Subspace:
        """Returns the counters of a matrix after a refresh; see `Periodic`."""
        shifted = jnp.append(subspace.similarities[1:], similarity)
        first = subspace.refreshes == 1
        similarities = jnp.where(first, subspace.similarities, shifted)
        grows = jnp.mean(similarities) >= self.threshold
        grows &= subspace.gaps <= (_NEVER // 2) // clock.gap
        gaps = jnp.where(grows, 2, 1) * subspace.gaps
        due = _next_on_grid(clock.phase, clock.gap * gaps, clock.step)
        return subspace._replace(similarities=similarities, gaps=gaps, due=due)


REFRESHES: dict[str, Refresh] = {"periodic": Periodic(), "lazy": Lazy()}


def resolve(refresh: str | Refresh) -> Refresh:
    """Returns the rule of that name, or the one that is given.

    Raises:
      ValueError: there is no rule of that name, or it is none.
    """
    if isinstance(refresh, str) and refresh in REFRESHES:
        return REFRESHES[refresh]
    if isinstance(refresh, type) or not isinstance(refresh, Refresh):
        names = ", ".join(f'"{name}"' for name in REFRESHES)
        raise ValueError(f"refresh must be {names} or a galore_optax.Lazy; got {refresh!r}")
    return refresh


def phase(order: Int[Array, "*batch"], total: int, gap: Int[Array, ""]) -> Int[Array, "*batch"]:
    """Returns by how many steps staggering delays the refreshes of each matrix.

    Args:
      order: the numbers of the matrices among all matrices.
      total: how many matrices there are.
      gap: the gap T, in steps.

    Returns:
      floor(T order / total), computed without overflow.
    """
    return (gap // total) * order + ((gap % total) * order) // total


def check_gap(gap: object) -> None:
    """Raises an error where ``update_proj_gap`` cannot be right.

    Raises:
      TypeError: it is neither a number, nor a schedule, nor an array.
      ValueError: it is below 1.
    """
    if callable(gap):
        if not takes(gap, 1):
            raise TypeError(f"update_proj_gap must be a schedule of the step; got {gap!r}")
        return
    is_array = isinstance(gap, jax.Array | np.ndarray)
    if not is_number(gap) or not (is_array or isinstance(gap, numbers.Integral)):
        raise TypeError(
            f"update_proj_gap must be a positive int, a schedule or an array; got {gap!r}"
        )
    # One that is traced counts as at least 1 at run time.
    value = known(gap, at_runtime=1.0) if is_array else int(gap)
    if not value >= 1:
        raise ValueError(f"update_proj_gap must be at least 1 step; got {value}")


def gap_at(gap: Gap, step: Step) -> Int[Array, ""]:
    """Returns the gap T at a step, at least 1.

    Raises:
      TypeError: a schedule returns no number.
    """
    value = gap(step) if callable(gap) else gap
    if not is_number(value):
        raise TypeError(f"update_proj_gap must be a schedule that returns a number; got {value!r}")
    value = min(value, _NEVER) if isinstance(value, numbers.Integral) else value
    return jnp.maximum(jnp.asarray(value).astype(jnp.int32), 1)


def refresh(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: State,
    params: optax.Params | None = None,
) -> State:
    """Chooses the subspaces of all matrices anew, and does nothing else.

    It is for users who decide themselves when to refresh, such as under a ``jax.vmap`` over seeds,
    where ``lax.cond`` runs both of its branches. Ordinary steps are then
    ``tx.update(grads, state, params, refresh=False)``, whose program has no factorization.

    In the middle of a step of several gradients (``accumulation_steps``) it does nothing, since
    those that are there already belong to the old subspaces.

    Args:
      tx: a galore, in any wrappers that pass on extra arguments, such as ``optax.chain``.
      grads: the gradients that choose the subspaces.
      state: the state of ``tx``.
      params: the parameters, where ``tx`` needs them.

    Returns:
      The state with new subspaces, and moments as the transport leaves them; all else in it is as
      it was.

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adamw(1e-3, rank=2)
      >>> params = {"kernel": jnp.eye(4, 8)}
      >>> state = tx.init(params)
      >>> state = galore_optax.refresh(tx, params, state, params)
      >>> updates, state = tx.update(params, state, params, refresh=False)
    """
    _, updated = optax.with_extra_args_support(tx).update(grads, state, params, refresh=ONLY)

    def take(old: State, new: State) -> State:
        return new if is_galore_state(old) else old

    return jax.tree.map(take, state, updated, is_leaf=is_galore_state)


def _next_on_grid(anchor: Int[Array, ""], gap: Int[Array, ""], step: Step) -> Int[Array, ""]:
    """Returns the first step after this one that is a whole number of gaps away from the anchor."""
    due = anchor + gap * (jnp.floor_divide(step - anchor, gap) + 1)
    return jnp.where(gap > _NEVER - step, _NEVER, due)  # instead of an overflow
