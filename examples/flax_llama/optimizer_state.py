"""What is read out of an optimizer's state, and how one goes on with other settings."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from examples.flax_llama.config import Config
from examples.flax_llama.optimizers import galore_arguments

# The count that the learning rate is computed from.
SCHEDULE = ("ScaleByScheduleState", "count")


def field_of(state_type: str, field: str) -> Callable[[Any, Any], bool]:
    """Filter of `optax.tree` functions: that field of the state of that name."""
    key = optax.tree_utils.NamedTupleKey(state_type, field)
    return lambda path, _: bool(path) and path[-1] == key


def schedule_count(opt_state: Any) -> jax.Array:
    """The count that the learning rate of the next update is computed from, int32 scalar."""
    return optax.tree.get(opt_state, "count", filtering=field_of(*SCHEDULE))


def skipped_updates(opt_state: Any) -> dict[str, jax.Array]:
    """How many updates `on_nan="skip"` left out, and how many of them the last ones in a row."""
    return {
        "skipped": optax.tree.get(opt_state, "total_notfinite"),
        "skipped_in_a_row": optax.tree.get(opt_state, "notfinite_count"),
    }


def arrays(tree: Any) -> dict[str, str]:
    """The dtype and shape of each array of a tree, by path."""
    return {
        jax.tree_util.keystr(key, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}"
        for key, x in jax.tree.leaves_with_path(tree)
    }


def carry_over(new_state: Any, old_state: Any) -> Any | None:
    """An old state in the layout of a new optimizer's, which may skip updates that the old did not.

    Between updates a GaLore that averages micro-batches has none, so that these are the new one's.

    Returns:
      The state, or None where the two have other arrays beside that.
    """

    def bare(state: Any) -> Any:
        return state.inner_state if isinstance(state, optax.ApplyIfFiniteState) else state

    def take_accumulators(new: Any, old: Any) -> Any:
        return old._replace(accumulator=new.accumulator) if is_galore(old) else old

    new, old = bare(new_state), bare(old_state)
    if arrays(without_accumulators(new)) != arrays(without_accumulators(old)):
        return None
    if made_with(new) != made_with(old):
        return None
    kept = jax.tree.map(take_accumulators, new, old, is_leaf=is_galore)
    return kept if new is new_state else new_state._replace(inner_state=kept)


def is_galore(state: Any) -> bool:
    return isinstance(state, galore_optax.GaloreState)


def made_with(state: Any) -> list[Any]:
    """What each GaLore of a state says of it that its arrays do not show."""
    nodes = jax.tree.leaves(state, is_leaf=is_galore)
    return [node.made_with for node in nodes if is_galore(node)]


def without_accumulators(state: Any) -> Any:
    """The same without what GaLore averages micro-batches in."""
    none = optax.MaskedNode()
    return jax.tree.map(
        lambda x: x._replace(accumulator=none) if is_galore(x) else x, state, is_leaf=is_galore
    )


def from_the_start(state: Any) -> Any:
    """A state whose learning rate is that of the first update; all else is as it was."""
    return optax.tree.set(state, field_of(*SCHEDULE), count=jnp.zeros([], jnp.int32))


def start_anew(new_state: Any, old_state: Any, config: Config) -> Any:
    """A new optimizer's state at the positions that an old one had got to.

    The schedule goes on and GaLore counts on, which is to say that later refreshes fall on the
    same updates as before; moments and subspaces are those of `new_state`. Only where the moments
    are reset or rotated at a refresh, GaLore counts from 0: that takes its count for the number of
    updates that the moments are averages of.
    """
    count = schedule_count(old_state)
    positions = [SCHEDULE]
    if galore_arguments(config).get("transport") not in ("reset", "rotate"):
        positions.append(("GaloreState", "step"))
    for state_type, field in positions:
        filtering = field_of(state_type, field)
        if optax.tree.get(new_state, field, filtering=filtering) is not None:
            new_state = optax.tree.set(new_state, filtering, **{field: jnp.copy(count)})
    return new_state
