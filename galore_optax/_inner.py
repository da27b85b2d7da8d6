"""Runs the inner transformation in the subspace, and takes the weight decay out of it.

The inner transformation is opaque. It sees the low-rank gradient where a leaf is projected, so
its moments have rank r, but weight decay belongs to the whole matrix. Whatever multiple of the
parameters the inner update contains is therefore found by differentiation: with low-rank
parameters p = 0 and tangents 1, one entry of the tangent of the update is the coefficient c in
u(p) = u(0) + c p, and the caller adds c W to the update of the whole matrix.
"""

import enum
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree, PyTreeDef

from galore_optax._core import Method
from galore_optax._errors import check_transformation
from galore_optax._jaxpr import dependence
from galore_optax._limiter import LimitNormGrowthState
from galore_optax._promotion import standard_promotion
from galore_optax._suitability import Outcome, check, has
from galore_optax._trees import logical, path_name
from galore_optax._types import DType, Params, Shape, State
from galore_optax._view import LeafView, MatrixView

_Shapes: TypeAlias = tuple[PyTreeDef, tuple[tuple[Shape, DType], ...]]

# A function of the parameters of the projected leaves. It returns the updates of these leaves; and
# beside them the updates of all leaves, and the next state.
_Run: TypeAlias = Callable[[list[Array]], tuple[list[Array], tuple[list[Array], State]]]


class ParamsUse(enum.Enum):
    """How the update of the projected leaves depends on their parameters."""

    NONE = enum.auto()  # it does not depend on them at all.
    AFFINE = enum.auto()  # u(p) = u(0) + c p, which is weight decay.
    OTHER = enum.auto()  # it depends on them in another way: trust ratios, parameter scales.


class Call(NamedTuple):
    """What the inner transformation is called with, by leaf of the parameters."""

    low_rank: Sequence[Array]  # R for projected leaves, the gradient for others.
    state: State  # the inner state.
    params: Sequence[PyTree] | None  # the parameters at full size, or None where there are none.
    structure: PyTreeDef  # the structure of the trees that the inner transformation sees.
    views: Sequence[LeafView]  # how each leaf is seen.
    extra_args: Mapping[str, PyTree]  # the keyword arguments of the inner transformation.

    @property
    def projected(self) -> dict[int, MatrixView]:
        """The views of the leaves that are projected, by their positions."""
        return {i: view for i, view in enumerate(self.views) if isinstance(view, MatrixView)}

    @property
    def shapes(self) -> _Shapes:
        """What is the same for all calls that are traced alike."""
        return self.structure, tuple((x.shape, x.dtype) for x in self.low_rank)


class LowRankUpdate(NamedTuple):
    """What the inner transformation makes of the gradients, by leaf."""

    updates: list[Array]  # (*batch, r or m, r or n) where projected, else the leaf's shape.
    decay: list[Array | None]  # c, the same in all entries of R, or None without decay.
    state: State  # the next inner state.


class Inner:
    """Runs an inner transformation on low-rank gradients.

    Args:
      transformation: any Optax transformation.

    Raises:
      TypeError: it is not an Optax transformation.
    """

    def __init__(self, transformation: optax.GradientTransformation):
        check_transformation("inner", transformation, "To give the rank, write galore(rank=128).")
        if isinstance(transformation, optax.MultiSteps):
            raise ValueError(_MULTI_STEPS)
        self._transformation = standard_promotion(transformation)
        self._uses: dict[_Shapes, ParamsUse] = {}
        self._expected: dict[_Shapes, State] = {}

    def init(self, low_rank_params: Params, projected: Sequence[bool] = ()) -> State:
        """Returns the inner state for parameters whose projected leaves have the shape of R.

        Args:
          low_rank_params: the parameters, with zeros of the shape of R for projected leaves.
          projected: for each leaf, whether it is projected.

        Raises:
          ValueError: the transformation keeps something made from the parameters in its state
            (`KeepsParametersError`), or contains ``optax.MultiSteps``.
        """
        state = self._transformation.init(low_rank_params)
        if any(projected):
            kept = dependence(self._transformation.init, low_rank_params)
            _check_keeps_none(kept, {i for i, own in enumerate(projected) if own})
            # It begins with zeros, and its line search wants arguments by which an update could be
            # traced only later.
            if has(optax.ScaleByLBFGSState, state):
                raise KeepsParametersError(_KEEPS_PARAMETERS.format(name="of optax.lbfgs"))
        nodes = jax.tree.leaves(state, is_leaf=_is_multi_steps_state)
        if any(map(_is_multi_steps_state, nodes)):
            raise ValueError(_MULTI_STEPS)
        return state

    def check(
        self,
        method: Method,
        low_rank: Params,
        projected: list[bool],
        tries: bool,
        final: bool,
    ) -> Outcome:
        """Raises where the transformation cannot go with one of the answers; see `check`."""
        return check(self._transformation, method, low_rank, projected, tries, final)

    def limits(self, low_rank: Params) -> bool:
        """Whether a limiter of the growth of norms is in the transformation."""
        return has(LimitNormGrowthState, jax.eval_shape(self._transformation.init, low_rank))

    def must_wait_for_init(self, low_rank: Params) -> bool:
        """Whether nothing can be known of the transformation before it sees the parameters.

        It may tell leaves apart by their names, or its ``init`` may not take another tree.
        """
        try:
            state = jax.eval_shape(self._transformation.init, low_rank)
        except Exception:  # whatever it wants of a tree
            return True
        return has(optax.MaskedState, state) or has(optax.PartitionState, state)

    def warn(
        self, low_rank_params: Params, state: State, views: Sequence[LeafView], stacklevel: int
    ) -> None:
        """Warns where weight decay cannot be taken out of the inner transformation.

        Args:
          low_rank_params: the parameters as for :meth:`init`.
          state: the inner state.
          views: how each leaf is seen.
          stacklevel: the stack level of the warning, as seen from the caller.

        Raises:
          KeepsParametersError: an update would keep something made from the parameters.
        """
        leaves, treedef = jax.tree.flatten(low_rank_params)

        def classify(leaves: list[Array], state: State) -> None:
            self._use(Call(leaves, state, leaves, treedef, views, {}))

        try:
            jax.eval_shape(classify, leaves, state)
        except KeepsParametersError:
            raise
        except Exception:  # such as for want of extra arguments; update says what is wrong
            return
        if ParamsUse.OTHER in self._uses.values():
            warnings.warn(_NOT_AFFINE, UserWarning, stacklevel + 1)

    def update(self, call: Call, project: Callable[[int, MatrixView], Array]) -> LowRankUpdate:
        """Takes one step of the inner transformation.

        Args:
          call: what the inner transformation is called with.
          project: returns the parameters of a projected leaf, given its position and view,
            projected like its gradient.

        Returns:
          The updates of all leaves, and the decay that the caller has to add.

        Raises:
          ValueError: the state is not one of this transformation for these leaves, or the
            transformation needs the parameters and there are none.
        """
        self._check_state(call)
        decay: list[Array | None] = [None] * len(call.views)
        if call.params is None:
            try:
                updates, state = self._run(call, None)
            except Exception as error:
                raise ValueError(
                    "the inner transformation of galore failed without params, which it may need: "
                    f"call update(updates, state, params). It said: {error}"
                ) from error
            return LowRankUpdate(updates, decay, state)

        projected, run = call.projected, self._of_projected(call)
        zeros = [jnp.zeros_like(call.low_rank[i]) for i in projected]
        use = self._use(call)
        if use is not ParamsUse.AFFINE:
            other = use is ParamsUse.OTHER
            values = [project(i, view) for i, view in projected.items()] if other else zeros
            _, (updates, state) = run(values)
            return LowRankUpdate(updates, decay, state)

        ones = [jnp.ones_like(x) for x in zeros]
        _, tangents, (updates, state) = jax.jvp(run, (zeros,), (ones,), has_aux=True)
        for i, tangent in zip(projected, tangents, strict=True):
            decay[i] = tangent
        return LowRankUpdate(updates, decay, state)

    def _run(self, call: Call, params: Params | None) -> tuple[list[Array], State]:
        """Returns the updates of all leaves, and the next state."""
        gradients = call.structure.unflatten(call.low_rank)
        updates, state = self._transformation.update(
            gradients, call.state, params, **call.extra_args
        )
        return call.structure.flatten_up_to(updates), state

    def _of_projected(self, call: Call) -> _Run:
        """Returns the inner update as a function of the parameters of the projected leaves."""
        projected = call.projected
        full_size = [
            None if i in projected else jnp.asarray(x).astype(g.dtype)
            for i, (x, g) in enumerate(zip(call.params or (), call.low_rank, strict=True))
        ]

        def run(params: list[Array]) -> tuple[list[Array], tuple[list[Array], State]]:
            leaves = list(full_size)
            for i, leaf in zip(projected, params, strict=True):
                leaves[i] = leaf
            updates, state = self._run(call, call.structure.unflatten(leaves))
            return [updates[i] for i in projected], (updates, state)

        return run

    def _use(self, call: Call) -> ParamsUse:
        """Returns how the updates of projected leaves depend on their parameters."""
        if call.shapes not in self._uses:
            zeros = [jnp.zeros_like(call.low_rank[i]) for i in call.projected]
            self._uses[call.shapes] = _params_use(self._of_projected(call), zeros)
        return self._uses[call.shapes]

    def _check_state(self, call: Call) -> None:
        """Raises an error for a state that is not one of the transformation for these leaves.

        What is in codes is left for low_bit to check: it depends on the size of the whole stack,
        of which this may be one layer.
        """
        if call.shapes not in self._expected:
            low_rank = call.structure.unflatten(call.low_rank)
            self._expected[call.shapes] = jax.eval_shape(self._transformation.init, low_rank)
        state, expected = logical(call.state), logical(self._expected[call.shapes])
        found, wanted = _shapes_by_path(state), _shapes_by_path(expected)
        if found == wanted and jax.tree.structure(state) == jax.tree.structure(expected):
            return
        different = [path for path in wanted | found if found.get(path) != wanted.get(path)]
        where = ""
        if different:
            name = path_name(different[0])
            is_there, should_be = (
                f"an array of shape {shapes[different[0]]}" if different[0] in shapes else "missing"
                for shapes in (found, wanted)
            )
            where = f" {name} is {is_there}, and should be {should_be}."
        raise ValueError(
            "the state belongs to another configuration: its inner state is not what the inner "
            f"transformation of galore makes for these leaves.{where} Use the transformation "
            "the state was made with, or make a new state with init. It has "
            f"{jax.tree.map(np.shape, state)}, and should have "
            f"{jax.tree.map(np.shape, expected)}"
        )


def _shapes_by_path(state: State) -> dict[jax.tree_util.KeyPath, Shape]:
    found = jax.tree_util.tree_leaves_with_path(state)
    return {path: np.shape(leaf) for path, leaf in found}


def _params_use(run: _Run, params: list[Array]) -> ParamsUse:
    """Returns how the updates of projected leaves depend on their parameters.

    Raises:
      KeepsParametersError: the next state depends on them.
    """
    updates, (_, state) = dependence(run, params)
    _check_keeps_none(state, set(range(len(params))))
    if not any(updates):
        return ParamsUse.NONE

    def function(params: list[Array]) -> list[Array]:
        return run(params)[0]

    try:
        # Only a linear use of the parameters survives transposition, which is traced, never run.
        jax.eval_shape(lambda: jax.linear_transpose(function, params)(function(params)))
    except Exception:  # JAX raises various types for what it cannot transpose
        return ParamsUse.OTHER
    return ParamsUse.AFFINE


class KeepsParametersError(ValueError):
    """An inner transformation keeps in its state what it makes from the parameters."""


def _check_keeps_none(state: PyTree, projected: Set[int]) -> None:
    """Raises an error where a state holds something that was made from projected parameters.

    Args:
      state: for each leaf of the state the set of parameters that it depends on.
      projected: the positions of the parameters that the inner transformation sees as zeros.
    """
    is_set = {"is_leaf": lambda x: isinstance(x, frozenset)}
    for path, depends in jax.tree_util.tree_leaves_with_path(state, **is_set):
        if depends & projected:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise KeepsParametersError(_KEEPS_PARAMETERS.format(name=name))


def _is_multi_steps_state(x: object) -> bool:
    return isinstance(x, optax.MultiStepsState)


_MULTI_STEPS = (
    "inner must not contain optax.MultiSteps: its accumulator would add up gradients projected by "
    "different subspaces. Put it outside: optax.MultiSteps(galore(...), every_k_schedule=...)."
)

_KEEPS_PARAMETERS = (
    "the inner transformation of galore keeps parameters, or something made from them, in its "
    "state ({name}), where it would see projected ones: it would train other weights than yours. "
    "Put what keeps them around galore, as optax.contrib.schedule_free(galore(...), ...) or "
    "optax.contrib.mechanize(galore(...)); put weight decay behind what averages, as optax.adamw "
    "does, or after galore. optax.add_decayed_weights ahead of a momentum, optax.novograd, "
    "optax.lars and optax.apply_every have it in an average. prodigy, dog, dowg, cocob and madgrad "
    "of optax.contrib remember where the weights began: optax.contrib.dadapt_adamw does not."
)

_NOT_AFFINE = (
    "the inner transformation of galore uses the parameters in another way than weight decay "
    "(optax.lamb and the parameter scale of optax.adafactor do), so it sees projected "
    "parameters, and any weight decay in it acts in the subspace only. To decay whole matrices, "
    "put optax.add_decayed_weights after galore."
)
