"""The state of galore(): what it holds, whether it fits, and what can be read from it."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax._matrix import LeafView
from galore_optax._quantized import is_quantized
from galore_optax._subspace import ABSENT, Subspace, is_absent


class GaloreState(NamedTuple):
    """State of :func:`galore_optax.galore`."""

    step: Any  # (), int32: the number of updates done.
    subspace: Subspace  # of trees with the structure of the parameters.
    inner: Any  # the inner state; the moments of projected leaves have the shape of R.
    accumulator: Any = ABSENT  # an Accumulator where several gradients make a step.


def metrics(state: Any) -> dict[str, jax.Array]:
    """What a training log wants to know of the subspaces, as scalars.

    Args:
      state: any optimizer state, with galore anywhere in it.

    Returns:
      ``"refreshes"``: how often a matrix was refreshed, all matrices and steps counted. With
      ``galore(..., diagnostics=True)`` also ``"captured_energy"`` and ``"captured_energy_min"``,
      the mean and the least over matrices of |P^T G|^2 / |G|^2 at the last step; and
      ``"overlap"``, the mean over matrices of |P_new^T P_old|^2 / r at their last refresh, 0
      before the second: 1 where the subspace stood still, r / m on average where it was replaced
      by a random one. The figures of each matrix are in ``state.subspace``. Empty without galore.
    """
    subspaces = [node.subspace for node in _galore_states(state)]

    def gather(field: str) -> jax.Array | None:
        found = [x.ravel() for s in subspaces for x in jax.tree.leaves(getattr(s, field))]
        return jnp.concatenate(found) if found else None

    result = {}
    if (refreshes := gather("refreshes")) is not None:
        result["refreshes"] = jnp.sum(refreshes)
    if (energy := gather("energy")) is not None:
        result["captured_energy"] = jnp.mean(energy)
        result["captured_energy_min"] = jnp.min(energy)
    if (overlap := gather("overlap")) is not None:
        result["overlap"] = jnp.mean(overlap)
    return result


def accumulates(state: Any) -> bool:
    """Whether a galore anywhere in a state averages gradients at rank r."""
    return any(not is_absent(node.accumulator) for node in _galore_states(state))


def at_a_step(state: Any) -> Any:
    """The state without the micro-batches of a step that was begun and not finished."""

    def empty(node: Any) -> Any:
        if not is_galore_state(node) or is_absent(node.accumulator):
            return node
        kept = jax.lax.cond(
            node.accumulator.count == 0,
            lambda accumulator: accumulator,
            lambda accumulator: jax.tree.map(jnp.zeros_like, accumulator),
            node.accumulator,
        )
        return node._replace(accumulator=kept)

    return jax.tree.map(empty, state, is_leaf=is_galore_state)


def is_due(state: Any) -> jax.Array:
    """Whether any matrix is to be refreshed on the next step, (), bool."""
    due = [
        jnp.any(node.step >= x)
        for node in _galore_states(state)
        for x in jax.tree.leaves(node.subspace.due)
    ]
    return jnp.any(jnp.array(due, bool))


def tree_of_subspaces(treedef: Any, subspaces: Sequence[Subspace]) -> Subspace:
    """One Subspace of trees, from one for each leaf."""
    return Subspace(
        *(treedef.unflatten([s[k] for s in subspaces]) for k in range(len(Subspace._fields)))
    )


def subspaces_of_tree(
    treedef: Any,
    views: Sequence[LeafView],
    state: GaloreState,
    init_subspace: Callable[[LeafView], Subspace],
) -> list[Subspace]:
    """The subspace of each leaf, checked against what the leaf needs."""
    if not isinstance(state, GaloreState):
        raise TypeError(
            f"galore's update needs the GaloreState that its init made; got a "
            f"{type(state).__name__}. Was it made by another transformation, or by another chain?"
        )
    fields = [leaves_like(treedef, tree, "the state's parameters") for tree in state.subspace]
    subspaces = [Subspace(*leaf) for leaf in zip(*fields, strict=True)]
    for view, subspace in zip(views, subspaces, strict=True):
        expected = _described(jax.eval_shape(lambda v=view: init_subspace(v)))
        found = _described(subspace)
        if found != expected:
            raise ValueError(
                f"the state belongs to another configuration: the subspace of {view.path!r}, of "
                f"shape {view.shape}, needs {expected}, the state has {found}. "
                "Use the rank, projector, projector_dtype, side, exclude, numbers of axes, refresh "
                "and diagnostics that the state was made with, or make a new state with init."
            )
    return subspaces


def leaves_like(treedef: Any, tree: Any, name: str) -> list[Any]:
    """The leaves of a tree that must have the structure of the gradients."""
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"the gradients have another structure than {name}: {error}. Pass gradients of the "
            "parameters that the state was made for; optax.masked leaves out some of them."
        ) from error


@dataclasses.dataclass
class Inspection:
    """A look into every galore ``init`` that runs under :func:`inspecting`.

    Attributes:
      trees: how the leaves were seen, by each galore; filled by ``init``.
      without_galore: set to make the inner state as if there were no galore around it.
    """

    trees: list[Sequence[LeafView]] = dataclasses.field(default_factory=list)
    without_galore: bool = False


_INSPECTION: contextvars.ContextVar[Inspection | None]
_INSPECTION = contextvars.ContextVar("galore_inspection", default=None)


@contextlib.contextmanager
def inspecting(inspection: Inspection) -> Iterator[None]:
    """Lets a report look into a galore that any number of wrappers hide; silences warnings."""
    token = _INSPECTION.set(inspection)
    try:
        yield
    finally:
        _INSPECTION.reset(token)


def inspection_in_progress() -> Inspection | None:
    """What :func:`inspecting` was given, where it is running."""
    return _INSPECTION.get()


def _galore_states(state: Any) -> list[GaloreState]:
    nodes = jax.tree.leaves(state, is_leaf=is_galore_state)
    return [node for node in nodes if is_galore_state(node)]


def is_galore_state(x: Any) -> bool:
    """Whether this is a state of galore; a predicate for ``is_leaf``."""
    return isinstance(x, GaloreState)


def _described(subspace: Subspace) -> dict[str, str]:
    return {name: _array(x) for name, x in subspace._asdict().items() if not is_absent(x)}


def _array(x: Any) -> str:
    if is_quantized(x):
        return f"{x.scheme}{list(x.shape)} in blocks of {x.block_size}"
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"
