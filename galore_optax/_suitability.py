"""Finds out what an inner transformation does, and whether transport and residual can go with it.

The inner transformation is opaque, so that it is tried: on gradients of ones, twos and zeros of a
few elements each. A name such as ``nu`` in its state does not say enough: AMSGrad, AdaMax, Yogi,
RAdam and AdaBelief have the field too, and mean something else by it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from galore_optax._adam import Betas, Findings, Trial, check_scales_only
from galore_optax._core import Method
from galore_optax._errors import CombinationError
from galore_optax._limiter import LimitNormGrowthState
from galore_optax._ownership import Owned, Role, moments_of, ownership
from galore_optax._quantized import is_quantized
from galore_optax._types import State

_ZEROS, _ONES, _TWOS = 0.0, 1.0, 2.0


class Outcome(NamedTuple):
    """What was found out about an inner transformation that goes with transport and residual."""

    betas: Betas | None  # the decay rates that the residual wants, if they could be found.
    tried: bool  # whether it was tried.


def check(
    inner: optax.GradientTransformationExtraArgs,
    method: Method,
    low_rank: PyTree,
    projected: list[bool],
    tries: bool,
    final: bool,
) -> Outcome:
    """Raises an error where an inner transformation cannot go with one of the answers.

    Args:
      inner: the inner transformation.
      method: the answers to the five questions.
      low_rank: arrays, or their shapes, like the gradients that it gets.
      projected: for each leaf whether it is projected.
      tries: whether to try it, where its state alone does not say enough.
      final: whether it is an error if it cannot be tried.

    Returns:
      What else was found out.

    Raises:
      CombinationError: it cannot go with one of them.
    """
    projector, transport, residual = method.projector, method.transport, method.residual

    @functools.cache
    def trials() -> _Trials | None:
        try:
            return _Trials.of(inner, low_rank) if tries else None
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
            return None  # under inject_hyperparams its numbers are traced
        except Exception as error:
            if not final:
                return None  # it may want another tree, which init has
            raise CombinationError(
                "whether the inner transformation can go with the transport and the residual is "
                f"found out by trying it, and that failed: {error}",
                "It must take gradients, state and parameters alone.",
            ) from error

    state = jax.eval_shape(inner.init, low_rank)
    owned, leaves = ownership(state, low_rank), jax.tree.leaves(state, is_leaf=is_quantized)
    limits, waits = has(LimitNormGrowthState, state), has(optax.ApplyIfFiniteState, state)
    betas = None
    for i, own in enumerate(projected):
        if not own:
            continue

        def trial(i: int = i) -> Trial | None:
            steps = trials()
            return None if steps is None else steps.of_leaf(i)

        found = _findings(owned, leaves, i, low_rank, trial)
        if waits and transport.moves:
            raise CombinationError(
                "moments that are moved may not be those of steps that were skipped",
                "Put optax.apply_if_finite around galore, not inside.",
            )
        if limits:
            check_scales_only("limit_norm_growth", trial())
        if missing := [role for role in projector.reads if role not in found.roles]:
            raise CombinationError(
                f"the projector {projector.name} needs the inner transformation to have a "
                f"{missing[0]} moment, and it has none that is known",
                "Use another projector, such as power_iteration.",
            )
        residual.check(found)
        transport.check(found)
        if residual.wants_betas and betas is None:
            done = trial()
            betas = None if done is None else done.betas
    return Outcome(betas, trials() is not None if trials.cache_info().currsize else False)


class _Step(NamedTuple):
    """What the inner transformation made of some gradients."""

    updates: list[np.ndarray]
    state: State


@dataclasses.dataclass(frozen=True)
class _Trials:
    """A few steps that the inner transformation took, on some elements of each leaf.

    Attributes:
      params: the zeros that it took for parameters.
      initial: its first state.
      one: its first step with gradients of ones.
      then_none: the step with zeros after that.
      two: its first step with gradients of twos.
      weighted: its first step with gradients of ones, and parameters of ones.
      afresh: the second step with ones, where the moments were made zero after the first. Its
        learning rate is the first one's.
      forgot: the step with zeros after the first, where the first moments were made zero.
    """

    params: PyTree
    initial: State
    one: _Step
    then_none: _Step
    two: _Step
    weighted: _Step
    afresh: _Step
    forgot: _Step

    @classmethod
    def of(cls, inner: optax.GradientTransformationExtraArgs, low_rank: PyTree) -> "_Trials":
        """Takes the steps."""

        def full(value: float) -> PyTree:
            return jax.tree.map(
                lambda x: jnp.full([min(size, 2) for size in x.shape], value, x.dtype), low_rank
            )

        def step(value: float, state: State, params: PyTree) -> _Step:
            updates, state = inner.update(full(value), state, params)
            return _Step([np.asarray(x, np.float64) for x in jax.tree.leaves(updates)], state)

        with jax.ensure_compile_time_eval(), jax.disable_jit():
            params = full(_ZEROS)
            initial = inner.init(params)
            one = step(_ONES, initial, params)
            return cls(
                params,
                initial,
                one,
                then_none=step(_ZEROS, one.state, params),
                two=step(_TWOS, initial, params),
                weighted=step(_ONES, initial, full(_ONES)),
                afresh=step(_ONES, _without(None, _at_start(one.state, initial), params), params),
                forgot=step(_ZEROS, _without("first", one.state, params), params),
            )

    def of_leaf(self, i: int) -> Trial:
        """Returns what the steps say of the leaf at position i."""
        of_one, weighted, afresh = (
            float(step.updates[i].ravel()[0]) for step in (self.one, self.weighted, self.afresh)
        )
        return Trial(
            of_one=of_one,
            uses_params=of_one != weighted,
            betas=self._betas(i),
            afresh=afresh / of_one if of_one else math.nan,
        )

    def _betas(self, i: int) -> Betas | None:
        """Returns the decay rates of Adam's moments, or None where they are not Adam's.

        These are: averages of gradients and of their squares, with constant weights, that make
        steps whose size does not depend on that of the gradients.
        """
        counts = _counts(ownership(self.initial, self.params), i)
        if counts.get("first") != 1 or counts.get("second") != 1:
            return None
        (m1, v1), (m2, v2), (m_two, v_two), (_, forgot) = (
            self._moments(step.state, i)
            for step in (self.one, self.then_none, self.two, self.forgot)
        )
        if not (m1 > 0 and v1 > 0):
            return None
        # Six digits are what float32 can tell.
        b1, b2 = round(m2 / m1, 6), round(v2 / v1, 6)
        if not (0 <= b1 < 1 and 0 <= b2 < 1):
            return None
        gradient = m1 / (1 - b1)  # less than one where it was clipped before
        of_one, of_two = (step.updates[i].ravel()[0] for step in (self.one, self.two))
        alike = (
            forgot == v2  # it does not depend on the first moment
            and _close(v1, (1 - b2) * gradient**2)
            and _close(v_two / v1, (m_two / m1) ** 2)
            and _close(of_one, of_two)
        )
        return Betas(b1, b2) if alike else None

    def _moments(self, state: State, i: int) -> tuple[float, float]:
        """Returns an entry of the first and of the second moment of a leaf."""
        positions = moments_of(ownership(state, self.params), i)
        leaves = jax.tree.leaves(state, is_leaf=is_quantized)

        def entry(role: Role) -> float:
            moment = leaves[positions[role][0]]
            array = moment.dequantize() if is_quantized(moment) else moment
            return float(np.asarray(array, np.float64).ravel()[0])

        return entry("first"), entry("second")


def has(kind: type, state: State) -> bool:
    """Whether a state of that type is anywhere in a state."""

    def is_of_kind(x: object) -> bool:
        return isinstance(x, kind)

    return any(map(is_of_kind, jax.tree.leaves(state, is_leaf=is_of_kind)))


def _at_start(state: State, initial: State) -> State:
    """Returns a state whose schedules, of learning rates, are where they were at first."""

    def is_schedule(x: object) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda now, first: first if is_schedule(now) else now, state, initial, is_leaf=is_schedule
    )


def _findings(
    owned: list[Owned],
    state: list[PyTree],
    i: int,
    low_rank: PyTree,
    trial: Callable[[], Trial | None],
) -> Findings:
    """Returns what is found out about the leaf at position i."""
    shape = np.shape(jax.tree.leaves(low_rank)[i])
    unknown, others = [], []
    for own, array in zip(owned, state, strict=True):
        if own.owner == i and own.role is None and math.prod(np.shape(array)) > 1:
            (unknown if np.shape(array) == shape else others).append(own.path)
    return Findings(_counts(owned, i), tuple(unknown), tuple(others), trial)


def _counts(owned: list[Owned], i: int) -> dict[Role, int]:
    """Returns how many moments of each role a leaf has."""
    return {role: len(found) for role, found in moments_of(owned, i).items()}


def _without(role: Role | None, state: State, params: PyTree) -> State:
    """Returns a state with moments of zero, those of a role or all."""
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_quantized)
    for i, own in enumerate(ownership(state, params)):
        if own.role is not None and role in (None, own.role):
            leaves[i] = jax.tree.map(jnp.zeros_like, leaves[i])
    return treedef.unflatten(leaves)


def _close(a: float, b: float) -> bool:
    """Whether two numbers are equal but for what moments in bfloat16 are rounded by."""
    return math.isclose(a, b, rel_tol=0.1)
