"""Lifts the core from one matrix to a leaf: to a stack of matrices, wherever on a mesh they lie.

Leaves that are seen alike share one traced and compiled function, to which everything that tells
them apart is an argument: their gradients and subspaces, the keys of their random numbers, and
their place in the order of all matrices.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from galore_optax import _core as core
from galore_optax._choose import refresh as refresh_one
from galore_optax._core import Bases, Method, matrix_of
from galore_optax._excerpt import Excerpt, Ordinal
from galore_optax._placement import Placement
from galore_optax._random import key_of
from galore_optax._refresh import Clock, phase
from galore_optax._residual import Projected
from galore_optax._sharding import each_its_own, in_auto
from galore_optax._subspace import Subspace
from galore_optax._transport import Held
from galore_optax._types import DType, MeshAxes, Scalar, Shape, Step
from galore_optax._view import MatrixView, wide


class Identity(NamedTuple):
    """What tells the matrices of a leaf apart from those of others that are seen alike."""

    # A key for each side of each matrix; None where the projector draws no random numbers.
    keys: Key[Array, "*batch 2"] | None
    order: Int[Array, "*batch"] | None  # the numbers of the matrices; None if not staggered.


class Down(NamedTuple):
    """What the way down makes of the gradient, the subspaces and the moments of a leaf."""

    subspace: Subspace  # the subspaces, refreshed where they were due.
    moments: Held  # the moments that were given, now in these subspaces.
    step: Step  # the step that was given, which depends on the refresh of the leaf.
    bases: Bases  # the bases, ready for products, with batch axes.
    low_rank: Float[Array, "*batch a b"]  # the low-rank gradients R.


class Lift:
    """Applies the core to leaves.

    Args:
      method: the answers to the five questions.
      stagger: whether refreshes are spread over the gap.
    """

    def __init__(self, method: Method, stagger: bool):
        self.method, self.stagger = method, stagger
        static = ("view", "placement", "total", "refresh", "only")
        self._down = jax.jit(self._down_traced, static_argnames=static)
        self._up = jax.jit(self._up_traced, static_argnames=("view", "placement", "dtypes"))
        self._project = jax.jit(self._project_traced, static_argnames=("view", "placement"))

    def initial(self, view: MatrixView) -> Subspace:
        """Returns a leaf's first subspaces, which no gradient chose and which are due at step 0."""
        of_one = core.initial(matrix_of(view), self.method)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*view.batch, *x.shape)), of_one)

    def identity(
        self,
        view: MatrixView,
        ordinal: Ordinal,
        seed: int | Int[Array, ""],
        excerpt: Excerpt | None,
    ) -> Identity:
        """Returns what tells the matrices of a leaf apart from others.

        Args:
          view: the view of the leaf.
          ordinal: where the leaf's matrices stand among all matrices.
          seed: the seed of the random numbers, which also depend on the leaf's path and on the
            matrix' place in it.
          excerpt: which layer of the leaf is here, or None where all of it is.
        """
        count, keys, order = view.count, None, None
        if "key" in self.method.projector.needs:
            if excerpt is None or excerpt.layer is None:
                keys = _keys(seed, view.path, count)
            else:
                keys = _keys(seed, view.path, excerpt.layers * count)
                keys = jax.lax.dynamic_slice_in_dim(keys, excerpt.layer * count, count)
            keys = keys.reshape(*view.batch, 2)
        if self.stagger:
            numbers = np.arange(count, dtype=np.int32).reshape(view.batch)
            order = jnp.asarray(ordinal.first + numbers)
        return Identity(keys, order)

    def down(
        self,
        view: MatrixView,
        placement: Placement | None,
        gradient: Float[Array, "..."],
        subspace: Subspace,
        moments: Held,
        clock: tuple[Step, Int[Array, ""]],
        identity: Identity,
        *,
        total: int,
        refresh: bool | None,
        only: bool,
        allowed: Bool[Array, ""] | bool,
    ) -> Down:
        """Projects the gradient of a leaf on its subspaces, which are refreshed first where due.

        Args:
          view: the view of the leaf.
          placement: where the leaf lies on a mesh with Explicit axes, or None without one.
          gradient: the gradient of the leaf, in the shape of the leaf.
          subspace: the subspaces as the state holds them.
          moments: the moments that the method wants to see, by role, as the state holds them.
          clock: the step, and the gap T.
          identity: what tells the leaf apart from others.
          total: how many matrices there are in all leaves.
          refresh: where to refresh: None (where due), True (everywhere) or False (nowhere).
          only: whether no step follows, so that the gradient is not used up.
          allowed: whether a refresh may happen now.

        Raises:
          ValueError: the projector returns bases of another shape than (m, r).
        """
        return self._down(
            gradient,
            subspace,
            moments,
            clock,
            identity,
            allowed,
            view=view,
            placement=placement,
            total=total,
            refresh=refresh,
            only=only,
        )

    def up(
        self,
        view: MatrixView,
        placement: Placement | None,
        projected: Projected,
        bases: Bases,
        kept: Subspace,
        scale: Scalar,
        step: Step,
        decay: tuple[Float[Array, "*batch a b"], PyTree] | None,
        *,
        dtypes: tuple[DType, DType],
    ) -> tuple[Float[Array, "..."], PyTree]:
        """Makes the update of a leaf from that of its low-rank gradient.

        Args:
          view: the view of the leaf.
          placement: where the leaf lies, as for :meth:`down`.
          projected: psi, and where the residual uses them also R and the gradient, which has the
            shape of the leaf.
          bases: the bases that :meth:`down` returned.
          kept: what the residual and the transport keep of the leaf, all else being absent.
          scale: alpha, the factor of the whole update.
          step: the number of updates done before this one.
          decay: the coefficient c, in all entries of an array of the shape of R, and the leaf of
            the parameters; None without weight decay.
          dtypes: the dtype of the operands of products, and the dtype of the result.

        Returns:
          The update of the leaf, and the next state of the residual.
        """
        return self._up(
            projected,
            bases,
            kept,
            scale,
            step,
            decay,
            view=view,
            placement=placement,
            dtypes=dtypes,
        )

    def project(
        self, view: MatrixView, placement: Placement | None, weights: PyTree, bases: Bases
    ) -> Float[Array, "*batch a b"]:
        """Projects the parameters of a leaf as if they were its gradient, in the moments' dtype."""
        return self._project(weights, bases, view=view, placement=placement)

    def _down_traced(
        self,
        gradient: Float[Array, "..."],
        subspace: Subspace,
        moments: Held,
        clock: tuple[Step, Int[Array, ""]],
        identity: Identity,
        allowed: Bool[Array, ""] | bool,
        *,
        view: MatrixView,
        placement: Placement | None,
        total: int,
        refresh: bool | None,
        only: bool,
    ) -> Down:
        matrix, method = matrix_of(view), self.method

        def body(
            gradient: Array,
            subspace: Subspace,
            moments: Held,
            clock: tuple[Array, Array],
            identity: Identity,
            allowed: Array,
        ) -> Down:
            matrices, step = view.to_matrices(gradient), clock[0]
            absorbed = subspace.residual
            if method.residual.absorbs:
                matrices, both = _over(view.batch, method.residual.absorb)(matrices, absorbed)
                absorbed = absorbed if only else both
                # In its place stands what the first moment loses, until the refreshes are done.
                subspace = subspace._replace(residual=jnp.zeros_like(absorbed))
            if refresh is not False:
                one = functools.partial(
                    refresh_one, matrix=matrix, method=method, force=refresh is True
                )
                due = allowed if refresh else jnp.any(step >= subspace.due) & allowed
                subspace, moments, step = _refreshed(
                    one, due, matrices, subspace, moments, clock, identity, total, divided
                )
            over = functools.partial(_over, view.batch)
            if method.residual.absorbs:
                kept = over(method.residual.turned)(absorbed, subspace.residual)
                subspace = subspace._replace(residual=kept)
            load = functools.partial(core.load, matrix=matrix, method=method)
            bases = over(load)(subspace, identity.keys)
            if places is not None:  # They are gathered once, for all products of this step.
                bases = jax.lax.with_sharding_constraint(bases, places.bases)
            low_rank = over(functools.partial(core.down, matrix=matrix))(matrices, bases)
            if method.diagnostics:
                energy = over(core.captured_energy)(matrices, low_rank)
                subspace = subspace._replace(energy=energy)
            return Down(subspace, moments, step, bases, low_rank)

        places, divided = None, ()
        if placement is not None:
            divided = placement.batch
            places = placement.of_down(subspace, moments, method.projector.basis)
            places = Down(*places)._replace(bases=Bases(*places[3]))
        return in_auto(body, places, gradient, subspace, moments, clock, identity, allowed)

    def _up_traced(
        self,
        projected: Projected,
        bases: Bases,
        kept: Subspace,
        scale: Scalar,
        step: Step,
        decay: tuple[Array, PyTree] | None,
        *,
        view: MatrixView,
        placement: Placement | None,
        dtypes: tuple[DType, DType],
    ) -> tuple[Float[Array, "..."], PyTree]:
        operands, result = dtypes
        up = functools.partial(core.up, matrix=matrix_of(view), method=self.method, dtype=operands)

        def body(
            projected: Projected,
            bases: Bases,
            kept: Subspace,
            scale: Array,
            step: Array,
            decay: tuple[Array, PyTree] | None,
        ) -> tuple[Array, PyTree]:
            if projected.gradient is not None:
                projected = projected._replace(gradient=view.to_matrices(projected.gradient))

            rounded = result if decay is None else None

            def of_one(projected: Projected, bases: Bases, kept: Subspace) -> tuple[Array, PyTree]:
                return up(projected, bases, kept, scale, step, rounded=rounded)

            update, state = _over(view.batch, of_one)(projected, bases, kept)
            if decay is not None:
                weights = view.to_matrices(wide(jnp.asarray(decay[1])))
                coefficient = decay[0][..., :1, :1].astype(weights.dtype)
                update = update.astype(weights.dtype) + coefficient * weights
            return view.from_matrices(update).astype(result), state

        places = placement and placement.of_up(kept.residual)
        return in_auto(body, places, projected, bases, kept, scale, step, decay)

    def _project_traced(
        self,
        weights: PyTree,
        bases: Bases,
        *,
        view: MatrixView,
        placement: Placement | None,
    ) -> Float[Array, "*batch a b"]:
        matrix = matrix_of(view)

        def body(weights: PyTree, bases: Bases) -> Array:
            matrices = view.to_matrices(jnp.asarray(weights)).astype(matrix.dtype)
            return _over(view.batch, functools.partial(core.down, matrix=matrix))(matrices, bases)

        return in_auto(body, placement and placement.low_rank, weights, bases)


def _refreshed(
    one: Callable[..., tuple[Subspace, Held]],
    due: Bool[Array, ""],
    matrices: Float[Array, "*batch m n"],
    subspace: Subspace,
    moments: Held,
    clock: tuple[Step, Int[Array, ""]],
    identity: Identity,
    total: int,
    divided: tuple[MeshAxes, ...],
) -> tuple[Subspace, Held, Step]:
    """Chooses again the subspaces that are due, and returns the others as they are.

    All work is inside ``lax.cond`` with a scalar predicate. The matrices of a stack are worked
    through one after the other, so that the workspace is that of one.

    The step is a token too: it comes back from the conditional, and the next leaf takes it from
    there. This makes XLA work through the leaves one after the other, with the temporaries of one.

    Args:
      one: `_choose.refresh`, with what is static already given.
      due: whether any matrix of the leaf is due.
      matrices: the gradients of the matrices.
      subspace: the subspaces of the leaf.
      moments: the moments of the leaf that the method wants to see.
      clock: the step, and the gap T.
      identity: what tells the leaf apart from others.
      total: how many matrices there are in all leaves.
      divided: what each of the axes over which matrices are stacked is divided over, as far as
        this is known.
    """
    step = clock[0]

    def all_of_leaf(
        matrices: Array, subspace: Subspace, moments: Held, identity: Identity, clock: PyTree
    ) -> tuple[Subspace, Held]:
        (step, gap), batch = clock, matrices.shape[:-2]
        order = identity.order
        phases = jnp.zeros(batch, jnp.int32) if order is None else phase(order, total, gap)
        stacked = (matrices, subspace, moments, phases, identity.keys)

        def of_one(
            stacked: tuple[Array, Subspace, Held, Array, Array | None],
        ) -> tuple[Subspace, Held]:
            matrix, subspace, moments, phase, keys = stacked
            return one(matrix, subspace, moments, Clock(step, gap, phase), keys)

        if not batch:
            return of_one(stacked)
        if not math.prod(batch):
            return subspace, moments
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), stacked)

        def at(i: Int[Array, ""], held: tuple[Subspace, Held]) -> tuple[Subspace, Held]:
            # Each takes the place of what it replaces, so that there is no second stack.
            own = jax.tree.map(lambda x: x[i], (flat[0], *held, *flat[3:]))
            return jax.tree.map(lambda x, new: x.at[i].set(new), held, of_one(own))

        new = jax.lax.fori_loop(0, math.prod(batch), at, (flat[1], flat[2]))
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), new)

    def on_mesh() -> tuple[Subspace, Held]:
        run = each_its_own(all_of_leaf, divided, (True, True, True, True, False))
        return run(matrices, subspace, moments, identity, clock)

    # JAX would take what both branches pass through out of the conditional, hence the addition.
    return jax.lax.cond(due, lambda: (*on_mesh(), step + 0), lambda: (subspace, moments, step))


def _over(batch: Shape, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Returns the function that applies a function of one matrix to each matrix of a stack."""
    for _ in batch:
        function = jax.vmap(function)
    return function


def _keys(seed: int | Int[Array, ""], path: str, count: int) -> Key[Array, "count 2"]:
    """Returns a key for each side of each of the ``count`` matrices of a leaf."""
    # Where the seed is a number the keys are constants, not a part of the program for every leaf.
    with jax.ensure_compile_time_eval():
        key = jax.random.fold_in(key_of(seed), zlib.crc32(path.encode()))
        return jax.random.split(key, (count, 2))
