"""chain() is optax.chain, where what follows galore() runs in its subspace, or with its steps."""

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import optax

from galore_optax._galore import BareGalore
from galore_optax._jaxpr import dependence
from galore_optax._sharding import zeros_like
from galore_optax._state import accumulates, is_at_a_step
from galore_optax._types import Params, State, Updates
from galore_optax._update import Accumulating


def chain(*transformations: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies transformations one after the other, those after ``galore(...)`` in its subspace.

    ``chain(before, galore(rank=128), optax.adamw(3e-4))`` is
    ``optax.chain(before, galore(optax.adamw(3e-4), rank=128))``, and everything else is
    ``optax.chain``, which cannot do this itself: it gives each member the full parameters, so
    that moments after ``galore`` would be full size. What stands before ``galore`` sees the full
    gradient. A nested ``optax.chain`` is one opaque transformation.

    Where a ``galore(inner, ...)`` or a preset has ``accumulation_steps``, what follows it runs once
    for each of its steps, not for each of their gradients: schedules count steps, and moments
    average updates. In ``optax.chain`` a schedule behind it would run k times too fast. What stands
    before it sees, and counts, each gradient.

    Args:
      *transformations: the Optax transformations, at most one of them a ``galore(...)`` without an
        inner transformation.

    Raises:
      ValueError: more than one bare ``galore(...)``; or, at ``init``, a galore with
        ``accumulation_steps`` in a wrapper such as ``optax.masked``, and something after it that
        has a state or uses the parameters, as weight decay does: the wrapper hides when a step is
        complete.

    Examples:
      >>> import galore_optax, optax
      >>> tx = galore_optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     galore_optax.galore(rank=128),
      ...     optax.adamw(3e-4, weight_decay=0.1),
      ... )
    """
    bare = [(i, t) for i, t in enumerate(transformations) if isinstance(t, BareGalore)]
    if len(bare) > 1:
        raise ValueError(
            f"chain takes one galore(...) without an inner transformation; got {len(bare)}, as "
            f"arguments {', '.join(str(i) for i, _ in bare)}. For different ranks pass a callable "
            "rank, or use optax.partition."
        )
    members = list(transformations)
    if bare and bare[0][0] < len(members) - 1:
        [(position, galore)] = bare
        after = members[position + 1 :]
        inner = after[0] if len(after) == 1 else optax.chain(*after)
        members[position:] = [galore.with_inner(inner)]
    made = optax.chain(*members)

    def init(params: Params) -> State:
        state = cast(tuple[State, ...], made.init(params))
        _check_visible(members, state, params)
        return state

    in_steps = any(isinstance(member, Accumulating) for member in members)
    kind = Accumulating if in_steps else optax.GradientTransformationExtraArgs
    return kind(init, _by_steps(members))


def _by_steps(members: Sequence[optax.GradientTransformation]) -> optax.TransformUpdateExtraArgsFn:
    """Returns the update of a chain, whose members after one that accumulates go by its steps."""
    place = next((i for i, tx in enumerate(members) if isinstance(tx, Accumulating)), None)
    if place is None or place == len(members) - 1:
        return optax.with_extra_args_support(optax.chain(*members)).update
    head = optax.with_extra_args_support(optax.chain(*members[: place + 1])).update
    tail = _by_steps(members[place + 1 :])

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, State]:
        updates, new = head(updates, state[: place + 1], params, **extra_args)
        of_head, of_tail = cast(tuple[State, ...], new), state[place + 1 :]

        def step() -> tuple[Updates, State]:
            return tail(updates, of_tail, params, **extra_args)

        def wait() -> tuple[Updates, State]:
            new, _ = jax.eval_shape(step)
            return jax.tree.map(zeros_like, new), of_tail

        new, of_tail = jax.lax.cond(is_at_a_step(of_head[place]), step, wait)
        return new, (*of_head, *of_tail)

    return update


def _check_visible(
    members: Sequence[optax.GradientTransformation], state: Sequence[State], params: Params
) -> None:
    """Raises an error where a wrapper hides the steps of a galore from what follows.

    Args:
      members: the members of a chain.
      state: their states.
      params: the parameters.
    """
    for i, (tx, own) in enumerate(zip(members, state, strict=True)):
        if isinstance(tx, Accumulating) or not accumulates(own):
            continue
        if jax.tree.leaves(state[i + 1 :]) or _uses_params(members[i + 1 :], params):
            raise ValueError(
                f"argument {i} of chain has a galore with accumulation_steps in a wrapper, and "
                "what follows would count gradients for steps. Put what follows into the wrapper, "
                "as in optax.masked(galore_optax.chain(galore(...), ...), mask), or leave out "
                "accumulation_steps and put optax.MultiSteps around all of it."
            )


def _uses_params(members: Sequence[optax.GradientTransformation], params: Params) -> bool:
    """Returns whether the updates of a chain without a state depend on the parameters."""
    tail = optax.with_extra_args_support(optax.chain(*members))

    def updates_of(params: Params) -> Updates:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return tail.update(zeros, tail.init(params), params)[0]

    return any(jax.tree.leaves(dependence(updates_of, params), is_leaf=_is_inputs))


def _is_inputs(x: object) -> bool:
    return isinstance(x, frozenset)
