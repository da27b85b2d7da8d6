"""The inner transformation, run in the subspace, and the weight decay taken out of it.

The inner transformation is opaque. It sees the low-rank gradient where a leaf is projected, so
its moments have rank r, but weight decay belongs to the whole matrix. Whatever multiple of the
parameters the inner update contains is therefore found by differentiation: with low-rank
parameters p = 0 and tangents 1, one entry of the tangent of the update is the coefficient c in
u(p) = u(0) + c p, and the caller adds c W to the update of the whole matrix.
"""

import enum
import warnings
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._dependence import dependence
from galore_optax._matrix import LeafView, MatrixView
from galore_optax._quantized import is_quantized


class ParamsUse(enum.Enum):
    """How the update of the projected leaves depends on their parameters."""

    NONE = enum.auto()  # not at all
    AFFINE = enum.auto()  # u(p) = u(0) + c p: weight decay
    OTHER = enum.auto()  # anything else: trust ratios, parameter scales


class LowRankUpdate(NamedTuple):
    """What the inner transformation makes of the gradients, by leaf."""

    updates: list[jax.Array]  # (*batch, r or m, r or n) where projected, else the leaf's shape
    decay: list[jax.Array | None]  # c, the same in all entries of R, or None without decay
    state: Any  # the inner state


class Inner:
    """Runs an inner transformation on low-rank gradients.

    Args:
      transformation: any Optax transformation.

    Raises:
      TypeError: it is not an Optax transformation.
    """

    def __init__(self, transformation: optax.GradientTransformation):
        if not callable(getattr(transformation, "init", None)) or not callable(
            getattr(transformation, "update", None)
        ):
            raise TypeError(
                "inner must be an Optax transformation such as optax.scale_by_adam(); got "
                f"{transformation!r}. To give the rank, write galore(rank=128)."
            )
        if isinstance(transformation, optax.MultiSteps):
            raise ValueError(_MULTI_STEPS)
        self._transformation = optax.with_extra_args_support(transformation)
        self._uses: dict[Any, ParamsUse] = {}
        self._checked: set[Any] = set()

    def init(self, low_rank_params: Any, projected: Sequence[bool] = ()) -> Any:
        """The inner state for parameters whose projected leaves have the shape of R.

        Args:
          low_rank_params: the parameters, zeros for projected leaves.
          projected: for each leaf whether it is projected.

        Raises:
          ValueError: the transformation keeps something made from the parameters in its state
            (`KeepsParametersError`), or contains ``optax.MultiSteps``.
        """
        state = self._transformation.init(low_rank_params)
        if any(projected):
            kept = dependence(self._transformation.init, low_rank_params)
            _check_keeps_none(kept, {i for i, own in enumerate(projected) if own})
        nodes = jax.tree.leaves(state, is_leaf=_is_multi_steps_state)
        if any(map(_is_multi_steps_state, nodes)):
            raise ValueError(_MULTI_STEPS)
        return state

    def warn(
        self, low_rank_params: Any, state: Any, views: Sequence[LeafView], stacklevel: int
    ) -> None:
        """Warns where weight decay cannot be taken out of the inner transformation.

        Args:
          low_rank_params: as for :meth:`init`.
          state: the inner state.
          views: how each leaf is seen.
          stacklevel: of the caller.

        Raises:
          KeepsParametersError: an update would keep something made from the parameters.
        """
        treedef = jax.tree.structure(low_rank_params)

        def classify(leaves, state):
            run = self._runner(leaves, state, leaves, treedef, views, {})
            self._use(run, leaves, treedef, views)

        try:
            jax.eval_shape(classify, jax.tree.leaves(low_rank_params), state)
        except KeepsParametersError:
            raise
        except Exception:  # such as for want of extra arguments; update says what is wrong
            return
        if ParamsUse.OTHER in self._uses.values():
            warnings.warn(_NOT_AFFINE, UserWarning, stacklevel + 1)

    def update(
        self,
        low_rank: Sequence[jax.Array],
        state: Any,
        params: Sequence[jax.Array] | None,
        treedef: Any,
        views: Sequence[LeafView],
        project: Callable[[int, MatrixView], jax.Array],
        extra_args: dict[str, Any],
    ) -> LowRankUpdate:
        """One step of the inner transformation.

        Args:
          low_rank: the low-rank gradient R of projected leaves, the gradient of others.
          state: the inner state.
          params: the parameters, or None where the caller got none.
          treedef: the structure of what the inner transformation sees.
          views: how each leaf is seen.
          project: of a projected leaf its parameters, projected like its gradient.
          extra_args: keyword arguments for the inner transformation.

        Returns:
          The updates of all leaves, and the decay that the caller has to add.

        Raises:
          ValueError: the state is not one of this transformation for these leaves, or the
            transformation needs the parameters and there are none.
        """
        self._check_state(low_rank, state, treedef)
        decay: list[jax.Array | None] = [None] * len(views)
        if params is None:
            gradients = treedef.unflatten(low_rank)
            try:
                updates, state = self._transformation.update(gradients, state, None, **extra_args)
            except Exception as error:
                raise ValueError(
                    "the inner transformation of galore failed without params, which it may need: "
                    f"call update(updates, state, params). It said: {error}"
                ) from error
            return LowRankUpdate(treedef.flatten_up_to(updates), decay, state)

        projected = {i: view for i, view in enumerate(views) if isinstance(view, MatrixView)}
        run = self._runner(low_rank, state, params, treedef, views, extra_args)
        zeros = [jnp.zeros_like(low_rank[i]) for i in projected]
        use = self._use(run, low_rank, treedef, views)
        if use is not ParamsUse.AFFINE:
            other = use is ParamsUse.OTHER
            values = [project(i, view) for i, view in projected.items()] if other else zeros
            _, (updates, new_state) = run(values)
            return LowRankUpdate(updates, decay, new_state)

        ones = [jnp.ones_like(x) for x in zeros]
        _, tangents, (updates, new_state) = jax.jvp(run, (zeros,), (ones,), has_aux=True)
        for i, tangent in zip(projected, tangents, strict=True):
            decay[i] = tangent
        return LowRankUpdate(updates, decay, new_state)

    def _runner(self, low_rank, state, params, treedef, views, extra_args) -> Any:
        """The inner update as a function of the parameters of the projected leaves."""
        projected = [i for i, view in enumerate(views) if isinstance(view, MatrixView)]
        full_size = [x.astype(g.dtype) for x, g in zip(params, low_rank, strict=True)]

        def run(projected_params):
            leaves = list(full_size)
            for i, leaf in zip(projected, projected_params, strict=True):
                leaves[i] = leaf
            updates, new_state = self._transformation.update(
                treedef.unflatten(low_rank), state, treedef.unflatten(leaves), **extra_args
            )
            updates = treedef.flatten_up_to(updates)
            return [updates[i] for i in projected], (updates, new_state)

        return run

    def _use(self, run, low_rank, treedef, views) -> ParamsUse:
        key = _shapes(low_rank, treedef)
        if key not in self._uses:
            pairs = zip(low_rank, views, strict=True)
            zeros = [jnp.zeros_like(g) for g, view in pairs if isinstance(view, MatrixView)]
            self._uses[key] = _params_use(run, zeros)
        return self._uses[key]

    def _check_state(self, low_rank: Sequence[jax.Array], state: Any, treedef: Any) -> None:
        key = _shapes(low_rank, treedef)
        if key in self._checked:
            return
        expected = jax.eval_shape(self._transformation.init, treedef.unflatten(low_rank))
        found, wanted = _described(state), _described(expected)
        different = [path for path in wanted | found if found.get(path) != wanted.get(path)]
        if different or jax.tree.structure(state) != jax.tree.structure(expected):
            where = ""
            if different:
                path = different[0]
                where = (
                    f" {path} is {found.get(path, 'missing')}, and should be "
                    f"{wanted.get(path, 'missing')}."
                )
            raise ValueError(
                "the state belongs to another configuration: its inner state is not what the inner "
                f"transformation of galore makes for these leaves.{where} Use the transformation "
                "the state was made with, or make a new state with init. It has "
                f"{jax.tree.map(jnp.shape, state)}, and should have "
                f"{jax.tree.map(jnp.shape, expected)}"
            )
        self._checked.add(key)


def _shapes(leaves: Sequence[jax.Array], treedef: Any) -> Any:
    return treedef, tuple((x.shape, x.dtype) for x in leaves)


def _described(state: Any) -> dict[str, str]:
    """What each leaf of a state is, by path, as far as it may not change."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.scheme} codes of shape {leaf.shape} in blocks of {leaf.block_size}"
            if is_quantized(leaf)
            else f"an array of shape {jnp.shape(leaf)}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
    }


def _params_use(run: Callable[[list[jax.Array]], Any], params: list[jax.Array]) -> ParamsUse:
    """How the updates that `_runner` makes depend on the parameters.

    Raises:
      KeepsParametersError: the next state depends on them.
    """
    updates, (_, state) = dependence(run, params)
    _check_keeps_none(state, set(range(len(params))))
    if not any(updates):
        return ParamsUse.NONE

    def function(params: list[jax.Array]) -> list[jax.Array]:
        return run(params)[0]

    try:
        # Transposition, which nothing but linear use of the parameters survives; traced only.
        jax.eval_shape(lambda: jax.linear_transpose(function, params)(function(params)))
    except Exception:  # JAX raises various types for what it cannot transpose
        return ParamsUse.OTHER
    return ParamsUse.AFFINE


class KeepsParametersError(ValueError):
    """An inner transformation keeps in its state what it makes from the parameters."""


def _check_keeps_none(state: Any, projected: Set[int]) -> None:
    """Raises where a state holds something that was made from projected parameters.

    Args:
      state: for each leaf the set of parameters that it depends on.
      projected: those that the inner transformation sees as zeros.
    """
    is_set = {"is_leaf": lambda x: isinstance(x, frozenset)}
    for path, depends in jax.tree_util.tree_leaves_with_path(state, **is_set):
        if depends & projected:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise KeepsParametersError(_KEEPS_PARAMETERS.format(name=name))


def _is_multi_steps_state(x: Any) -> bool:
    return isinstance(x, optax.MultiStepsState)


_MULTI_STEPS = (
    "inner must not contain optax.MultiSteps: its accumulator would add up gradients projected by "
    "different subspaces. Put it outside: optax.MultiSteps(galore(...), every_k_schedule=...)."
)

_KEEPS_PARAMETERS = (
    "the inner transformation of galore keeps parameters, or something made from them, in its "
    "state ({name}), where it would see projected ones: it would train other weights than yours. "
    "Put what keeps them around galore, as optax.contrib.schedule_free(galore(...), ...); put "
    "weight decay behind what averages, as optax.adamw does, or after galore. "
    "optax.add_decayed_weights ahead of a momentum, optax.novograd, optax.lars and "
    "optax.apply_every have it in an average."
)

_NOT_AFFINE = (
    "the inner transformation of galore uses the parameters in another way than weight decay "
    "(optax.lamb and the parameter scale of optax.adafactor do), so it sees projected "
    "parameters, and any weight decay in it acts in the subspace only. To decay whole matrices, "
    "put optax.add_decayed_weights after galore."
)
