"""Defines the state of galore(), checks whether one fits, and reads from it what users ask for."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, PyTreeDef

from galore_optax._excerpt import Ranks
from galore_optax._quantized import is_quantized
from galore_optax._subspace import ABSENT, Subspace, is_absent
from galore_optax._trees import path_name
from galore_optax._types import State
from galore_optax._view import LeafView

VERSION = 2
"""The version of the layout of `GaloreState`; see `galore_optax.migrate`."""


class GaloreState(NamedTuple):
    """State of :func:`galore_optax.galore`.

    Attributes:
      step: the number of updates done, (), int32.
      subspace: the subspaces, trees with the structure of the parameters.
      inner: the inner state; the moments of projected leaves have the shape of R.
      accumulator: an Accumulator where several gradients make a step.
      version: the layout's version, (), int32, so that checkpoints say what it is.
      made_with: a dict whose keys say what the arrays alone do not; it has no arrays.
    """

    step: PyTree
    subspace: Subspace
    inner: PyTree
    accumulator: PyTree = ABSENT
    version: PyTree = ABSENT
    made_with: PyTree = ABSENT


def metrics(state: State) -> dict[str, Array]:
    """Returns what a training log wants to know of the subspaces, as scalars.

    Args:
      state: any optimizer state, with galore anywhere in it.

    Returns:
      A dict with ``"refreshes"``: how often a matrix was refreshed, all matrices and steps counted.
      With ``galore(..., diagnostics=True)`` it also has ``"captured_energy"`` and
      ``"captured_energy_min"``, the mean and the least over matrices of |P^T G|^2 / |G|^2 at the
      last step; and ``"overlap"``, the mean over matrices of |P_new^T P_old|^2 / r at their last
      refresh, 0 before the second: 1 where the subspace stood still, r / m on average where it was
      replaced by a random one. The figures of each matrix are in ``state.subspace``. The dict is
      empty without galore.
    """
    subspaces = [node.subspace for node in _galore_states(state)]

    def gather(field: str) -> Array | None:
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


def accumulates(state: State) -> bool:
    """Whether a galore anywhere in a state averages gradients at rank r."""
    return any(not is_absent(node.accumulator) for node in _galore_states(state))


def is_at_a_step(state: State) -> Bool[Array, ""]:
    """Whether no galore in a state has micro-batches of a step that is not complete."""
    counts = [
        node.accumulator.count for node in _galore_states(state) if not is_absent(node.accumulator)
    ]
    return jnp.all(jnp.array([jnp.asarray(count) for count in counts], jnp.int32) == 0)


def at_a_step(state: State) -> State:
    """Returns the state without the micro-batches of a step that was begun and not finished."""

    def empty(node: PyTree) -> PyTree:
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


def is_due(state: State) -> Bool[Array, ""]:
    """Whether any matrix is to be refreshed on the next step."""
    due = [
        jnp.any(node.step >= x)
        for node in _galore_states(state)
        for x in jax.tree.leaves(node.subspace.due)
    ]
    return jnp.any(jnp.array(due, bool))


def tree_of_subspaces(treedef: PyTreeDef, subspaces: Sequence[Subspace]) -> Subspace:
    """Returns one `Subspace` of trees, made of the subspaces of all leaves, one each."""
    return Subspace(
        *(treedef.unflatten([s[k] for s in subspaces]) for k in range(len(Subspace._fields)))
    )


def subspaces_of_tree(
    treedef: PyTreeDef,
    views: Sequence[LeafView],
    state: State,
    expected: Callable[[LeafView], Subspace],
    made_with: PyTree,
) -> list[Subspace]:
    """Returns the subspace of each leaf, after a check that the leaf can use it.

    Args:
      treedef: the structure of the parameters, out of Flax's boxes.
      views: how each leaf is seen.
      state: what ``update`` was given for a state.
      expected: returns the shapes of the subspace that a view needs.
      made_with: what `GaloreState.made_with` should be.

    Raises:
      TypeError: the state is not one of galore.
      ValueError: it is one of another configuration, or of another version.
    """
    if not isinstance(state, GaloreState):
        raise TypeError(
            f"galore's update needs the GaloreState that its init made; got a "
            f"{type(state).__name__}. Was it made by another transformation, or by another chain?"
        )
    _check_version(state.version)
    fields = [leaves_like(treedef, tree, "the state's parameters") for tree in state.subspace]
    subspaces = [Subspace(*leaf) for leaf in zip(*fields, strict=True)]
    for view, subspace in zip(views, subspaces, strict=True):
        needed = expected(view)
        if not _alike(subspace, needed):
            raise ValueError(
                f"the state belongs to another configuration: the subspace of {view.path!r}, of "
                f"shape {view.shape}, needs {_described(needed)}, the state has "
                f"{_described(subspace)}. Use the rank, projector, projector_dtype, side, exclude, "
                "numbers of axes, refresh, residual and diagnostics that it was made with, or make "
                "a new state with init."
            )
    if not _same_meaning(state.made_with, made_with):
        was, now = (", ".join(sorted(x)) for x in (state.made_with, made_with))
        raise ValueError(
            f"the state belongs to another configuration: it was made with {was}, and this galore "
            f"has {now}, by which its arrays would mean something else. Use the projector, the "
            "seed and the residual that it was made with, or make a new state with init."
        )
    return subspaces


def _same_meaning(was: PyTree, now: PyTree) -> bool:
    """Returns whether two values of `GaloreState.made_with` say nothing that differs.

    A state of the first release says nothing at all, and a seed that is traced is not known, in
    the state or here.
    """
    if is_absent(was) or is_absent(now):
        return True
    was, now = (dict(key.split("=", 1) for key in said) for said in (was, now))
    if not ("seed" in was and "seed" in now):
        was.pop("seed", None)
        now.pop("seed", None)
    return was == now


def _check_version(version: PyTree) -> None:
    """Raises an error for a state of another version's layout, as far as that can be known."""
    try:
        found = 1 if is_absent(version) else int(version)
    except jax.errors.ConcretizationTypeError:  # traced, so that only its presence is known
        return
    if found != VERSION:
        raise ValueError(
            f"the state has version {found}, and this galore_optax needs version {VERSION}: "
            + (
                "galore_optax.migrate(state) makes it one of that"
                if found < VERSION
                else "install the galore_optax that made it, or a later one"
            )
        )


def _alike(found: Subspace, expected: Subspace) -> bool:
    leaves, treedef = jax.tree.flatten(found)
    needed, needed_treedef = jax.tree.flatten(expected)
    return treedef == needed_treedef and all(
        np.shape(a) == b.shape and jnp.result_type(a) == b.dtype
        for a, b in zip(leaves, needed, strict=True)
    )


def leaves_like(treedef: PyTreeDef, tree: PyTree, name: str) -> list[PyTree]:
    """Returns the leaves of a tree, which must have the structure of the gradients.

    Raises:
      ValueError: it has another structure.
    """
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
      trees: for each galore how its leaves were seen; ``init`` fills it.
      without_galore: whether to make the inner state as if there were no galore around it.
      ranks: the ranks of all leaves where ``init`` gets only a part of them, else None.
    """

    trees: list[Sequence[LeafView]] = dataclasses.field(default_factory=list)
    without_galore: bool = False
    ranks: Ranks | None = None


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
    """Returns what :func:`inspecting` was given while it is running, else None."""
    return _INSPECTION.get()


def _galore_states(state: State) -> list[GaloreState]:
    nodes = jax.tree.leaves(state, is_leaf=is_galore_state)
    return [node for node in nodes if is_galore_state(node)]


def is_galore_state(x: object) -> TypeGuard[GaloreState]:
    """Whether this is a state of galore; a predicate for ``is_leaf``."""
    return isinstance(x, GaloreState)


def _described(subspace: Subspace) -> dict[str, str]:
    """Returns what each array of a subspace is, by the name of its field."""
    found = jax.tree_util.tree_leaves_with_path(subspace, is_leaf=is_quantized)
    return {path_name(path): _array(x) for path, x in found}


def _array(x: PyTree) -> str:
    if is_quantized(x):
        return f"{x.scheme}{list(x.shape)} in blocks of {x.block_size}"
    return f"{jnp.result_type(x)}{list(np.shape(x))}"
