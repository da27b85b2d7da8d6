"""Lists what may happen to the gradient outside of the subspace; `RESIDUALS` names it.

In what follows R is the low-rank gradient, psi what the inner transformation makes of it, and
P R and P psi stand for these in the shape of the matrix, whichever side is projected.
"""

import dataclasses
import math
import numbers
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from galore_optax._adam import Betas, Findings, check_betas, check_decay, check_scales_only
from galore_optax._arguments import check_rate
from galore_optax._errors import CombinationError
from galore_optax._limiter import GAMMA, check_gamma, limit, safe_norm
from galore_optax._residual import Discard, Projected, Residual, Way
from galore_optax._subspace import ABSENT
from galore_optax._types import DType, Numeric
from galore_optax._view import unit_of

_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class _WithGradient(Discard):
    """What residuals share that make use of the gradient."""

    @property
    def uses_gradient(self) -> bool:
        """Says that R and G are wanted."""
        return True

    @property
    def scales_only(self) -> bool:
        """Says that psi must point where R does."""
        return True

    @property
    def sides(self) -> int:
        """How many sides of a matrix may be projected."""
        return 1

    def check(self, found: Findings) -> None:
        """Raises where the inner transformation does more than to scale; see `Discard`."""
        check_scales_only(f"residual={self!r}", found.trial())


@dataclasses.dataclass(frozen=True)
class _Limited(_WithGradient):
    """What residuals share that scale the gradient, and limit how fast that grows.

    Attributes:
      gamma: the growth of the norm per step that the limiter allows; None for no limiter.
    """

    gamma: float | None = dataclasses.field(default=GAMMA, kw_only=True)

    def initial(self, m: int, n: int, dtype: DType) -> PyTree:
        """Returns the limiter's memory, (); see `Discard`."""
        del m, n
        return ABSENT if self.gamma is None else jnp.zeros([], dtype)

    def _check_gamma(self) -> None:
        if self.gamma is not None:
            check_gamma(f"gamma of {type(self).__name__}", self.gamma)


@dataclasses.dataclass(frozen=True)
class NormScaled(_Limited):
    r"""Adds what lies outside, each column scaled as the inner transformation scales it: Fira.

    .. math::
      U = \alpha\,(P\psi + \beta\, L(s \circ (G - P R))), \qquad
      s_j = \frac{|\psi_{:j}|}{|R_{:j}| + 10^{-8}}

    Here L is the limiter of `galore_optax.limit_norm_growth`. With the rows' side projected, j runs
    over columns; with the columns' side projected, over rows.

    The paper's code differs from its text: alpha stands before P psi only, which is a beta of
    1 / alpha here; the limiter sees updates before the bias of Adam's moments is corrected; and it
    subtracts alpha P R from G instead of P R. ``NormScaled(beta=1 / alpha, subtract="scaled")`` is
    that code.

    Attributes:
      beta: the factor of what lies outside.
      gamma: the growth of the norm per step that the limiter allows; None for no limiter. It keeps
        one number per matrix.
      subtract: ``"whole"`` for G - P R, or ``"scaled"`` for the code's G - alpha P R, and its
        limiter.
      betas: the decay rates of Adam's moments, for ``subtract="scaled"``; by default those of the
        preset, or those found by trying the inner transformation, to six digits.

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, equations (5) to (8)
    """

    beta: float = 1.0
    subtract: Literal["whole", "scaled"] = "whole"
    betas: tuple[Numeric, Numeric] | None = None

    def __post_init__(self):
        _check_factor("beta of NormScaled", self.beta)
        self._check_gamma()
        if self.subtract not in ("whole", "scaled"):
            raise ValueError(
                f'subtract of NormScaled must be "whole" or "scaled"; got {self.subtract!r}'
            )
        if self.betas is not None:
            if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
                raise TypeError(
                    f"betas of NormScaled must be a pair of numbers (b1, b2); got {self.betas!r}"
                )
            for argument, value in zip(("b1", "b2"), self.betas, strict=True):
                check_rate(f"{argument} of NormScaled's betas", value)

    @property
    def wants_betas(self) -> bool:
        """Whether the limiter would want to know the decay rates of Adam's moments."""
        return self.subtract == "scaled" and self.gamma is not None and self.betas is None

    def with_betas(self, betas: Betas) -> "NormScaled":
        """Returns the residual for an inner transformation with these decay rates of moments."""
        return dataclasses.replace(self, betas=tuple(betas)) if self.wants_betas else self

    def update(
        self, projected: Projected, way: Way, state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """Returns the update of a matrix, and the next state; see `Discard`."""
        psi, low_rank, gradient = _wide(projected)
        scales = jnp.expand_dims(_scales(psi, low_rank, way.axis), way.axis or 0)
        inside = (way.scale if self.subtract == "scaled" else 1) * low_rank
        factor = self.beta
        if self.gamma is not None:
            norm = self._norm_outside(gradient, low_rank, inside, scales, way)
            bias = jnp.ones([], psi.dtype)
            if self.subtract == "scaled" and self.betas is not None:
                betas = Betas(*(jnp.asarray(b, psi.dtype) for b in self.betas))
                bias = betas.bias(way.count.astype(psi.dtype))
            allowed, state = limit(norm * bias, state, self.gamma)
            factor *= allowed
        # This is alpha (P psi + beta s (G - P R)) with one product, so that no more arrays of the
        # size of the matrix are there at a time than without a residual.
        update = way.up(way.scale * (psi - factor * scales * inside))
        return update + (way.scale * factor) * (scales * gradient), state

    def _norm_outside(
        self,
        gradient: Float[Array, "m n"],
        low_rank: Float[Array, "a b"],
        inside: Float[Array, "a b"],
        scales: Float[Array, "..."],
        way: Way,
    ) -> Float[Array, ""]:
        """Returns |s (G - P X)|, X being R or alpha R, without an array of the size of G.

        Args:
          gradient: G.
          low_rank: R = P^T G, which is what makes <G, P X> = <R, X>.
          inside: X.
          scales: s, with an axis of size 1 along the side that is projected.
          way: see `Discard`.
        """
        unit, of_gradient = _squares(gradient, way.axis)
        low_rank, inside = low_rank / unit, inside / unit
        weights = (unit * jnp.squeeze(scales, way.axis)) ** 2
        outside = of_gradient - 2 * jnp.sum(low_rank * inside, way.axis) + way.squares(inside)
        whole, squared = (jnp.sum(weights * x) for x in (of_gradient, outside))
        # A limiter that remembered but rounding errors would hold back for a thousand steps what
        # comes after them.
        return jnp.where(squared > _noise(low_rank) * whole, jnp.sqrt(squared), 0 * squared)


@dataclasses.dataclass(frozen=True)
class ScaleGradient(_Limited):
    r"""Scales the gradient itself as the inner transformation scales its sketch: APOLLO.

    .. math::
      U = \alpha\, L(s \circ G), \qquad s_j = \frac{|\psi_{:j}|}{|R_{:j}| + 10^{-8}}

    Here L is the limiter of `galore_optax.limit_norm_growth`. The subspace only serves to estimate
    norms, so that random ones will do, and rank 1 where there is one s for the whole matrix.

    Attributes:
      per: ``"channel"`` for one s for each column, or row where the columns are projected; or
        ``"tensor"`` for one s of the whole matrix.
      gamma: the growth of the norm per step that the limiter allows; None for no limiter. It keeps
        one number per matrix.

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, algorithm 1
    """

    per: Literal["channel", "tensor"] = "channel"

    def __post_init__(self):
        if self.per not in ("channel", "tensor"):
            raise ValueError(
                f'per of ScaleGradient must be "channel" or "tensor"; got {self.per!r}'
            )
        self._check_gamma()

    @property
    def sides(self) -> int:
        """How many sides of a matrix may be projected: where there are no channels, both."""
        return 1 if self.per == "channel" else 2

    def update(
        self, projected: Projected, way: Way, state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """Returns the update of a matrix, and the next state; see `Discard`."""
        psi, low_rank, gradient = _wide(projected)
        axis = way.axis if self.per == "channel" else None
        scales = _scales(psi, low_rank, axis)
        factor = jnp.ones([], psi.dtype)
        if self.gamma is not None:
            unit, squares = _squares(gradient, axis)
            norm = jnp.sqrt(jnp.sum((unit * scales) ** 2 * squares))
            factor, state = limit(norm, state, self.gamma)
        factors = (way.scale * factor) * scales
        return (factors if axis is None else jnp.expand_dims(factors, axis)) * gradient, state


@dataclasses.dataclass(frozen=True)
class Sign(_WithGradient):
    r"""Adds the signs of what lies outside: FRUGAL.

    .. math::
      U = \alpha\,(P\psi + \beta\, \mathrm{sign}(G - P R))

    It keeps no state. What is outside but for rounding errors has no sign. With a basis that is
    multiplied with, the product P R takes an array of the size of the matrix while the update is
    made; rows, FRUGAL's own, are only picked.

    Attributes:
      beta: the ratio of the learning rate outside of the subspace to that inside.

    References:
      Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024, algorithm 1
    """

    beta: float = 1.0

    def __post_init__(self):
        _check_factor("beta of Sign", self.beta)

    @property
    def sides(self) -> int:
        """How many sides of a matrix may be projected."""
        return 2

    def update(
        self, projected: Projected, way: Way, state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """Returns the update of a matrix, and the next state; see `Discard`."""
        psi, low_rank, gradient = _wide(projected)
        outside = gradient - way.up(low_rank)
        # A column of G that lies inside has signs of rounding errors only.
        noise = _noise(psi) * jnp.max(jnp.abs(gradient), way.axis, keepdims=True)
        signs = jnp.where(jnp.abs(outside) > noise, jnp.sign(outside), 0 * outside)
        return way.up(way.scale * psi) + (way.scale * self.beta) * signs, state


@dataclasses.dataclass(frozen=True)
class ErrorFeedback(Discard):
    r"""Adds what was left out to the next gradient: LDAdam.

    .. math::
      A = G + e, \qquad R = P^\top A, \qquad
      e \gets A - P R + \frac{\beta_1}{1 - \beta_1} (P_{old} m_{old} - P m)

    The last term is what the first moment lost in a refresh, and there is none on other steps.
    It costs m n elements of state for each matrix, as much as a moment at full size, and arrays of
    that size while a step is taken.

    Attributes:
      b1: the decay rate of the inner transformation's first moment; presets give it.

    References:
      Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024, algorithm 1
    """

    b1: Numeric | None = None

    def __post_init__(self):
        check_betas("ErrorFeedback", self.b1, None)

    @property
    def asks(self) -> str | None:
        """What to give, where the decay rate is not known."""
        return "galore_optax.ErrorFeedback(b1=0.9)" if self.b1 is None else None

    def with_betas(self, betas: Betas) -> "ErrorFeedback":
        """Returns the residual with a decay rate; see `Discard`."""
        return ErrorFeedback(betas.b1) if self.b1 is None else self

    @property
    def absorbs(self) -> bool:
        """Says that the state is added to the gradient."""
        return True

    @property
    def uses_gradient(self) -> bool:
        """Says that R is wanted; G is not used."""
        return True

    def check(self, found: Findings) -> None:
        """Raises where there is no one first moment, or one of another decay; see `Discard`."""
        if found.roles.get("first") != 1:
            raise CombinationError(
                f"residual={self!r} needs one first moment, such as Adam's, and the inner "
                f"transformation has {found.roles.get('first', 0)} that are known",
                'Use residual="discard", or optax.scale_by_adam.',
            )
        trial = found.trial()
        if trial is not None and trial.betas is not None:
            own = trial.betas.b1
            check_decay("ErrorFeedback", "b1", self.b1, own, f"ErrorFeedback(b1={own})")

    def initial(self, m: int, n: int, dtype: DType) -> PyTree:
        """Returns e, (m, n); see `Discard`."""
        return jnp.zeros((m, n), dtype)

    def absorb(
        self, gradient: Float[Array, "m n"], state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """Returns A, and A; see `Discard`. On the way up P R is taken from the latter."""
        both = gradient.astype(state.dtype) + state
        # What is not finite goes down, for all to see, but is not remembered. It is not cast to the
        # gradient's dtype, for whose range float16 what was left out may be too large.
        return both, jnp.where(jnp.all(jnp.isfinite(both)), both, state)

    def turned(self, state: PyTree, lost: Float[Array, "m n"]) -> PyTree:
        """Returns the state with what the first moment lost; see `Discard`."""
        if self.b1 is None:
            raise ValueError(f"ErrorFeedback needs b1: give {self.asks}")
        return state + (self.b1 / (1 - self.b1)) * lost

    def update(
        self, projected: Projected, way: Way, state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """Returns the update of a matrix, and the next state; see `Discard`."""
        psi, low_rank, _ = _wide(projected)
        sound = jnp.all(jnp.isfinite(low_rank))
        left_out = state - way.up(jnp.where(sound, low_rank, 0))
        return way.up(way.scale * psi), left_out.astype(state.dtype)


def _wide(
    projected: Projected,
) -> tuple[Float[Array, "a b"], Float[Array, "a b"], Float[Array, "m n"]]:
    """Returns psi, R and G in the dtype of psi, which is that of the moments."""
    psi, low_rank, gradient = projected
    if low_rank is None or gradient is None:
        raise ValueError("a residual that uses the gradient must say so in uses_gradient")
    return psi, low_rank.astype(psi.dtype), gradient.astype(psi.dtype)


def _scales(
    psi: Float[Array, "a b"], low_rank: Float[Array, "a b"], axis: int | None
) -> Float[Array, "..."]:
    """Returns s, by what the inner transformation scaled R: along an axis, or as a whole."""
    return safe_norm(psi, axis) / (safe_norm(low_rank, axis) + _EPSILON)


def _squares(
    gradient: Float[Array, "m n"], axis: int | None
) -> tuple[Float[Array, ""], Float[Array, "..."]]:
    """Returns a unit, and the squared norms of a gradient along an axis, or of all of it, in it.

    The unit is about as large as the largest entry, so that squares do not overflow.
    """
    unit = unit_of(gradient)
    return unit, jnp.sum((gradient / unit) ** 2, axis)


def _noise(array: Float[Array, "a b"]) -> float:
    """Returns how large the rounding errors of sums in the dtype of an array are, relatively."""
    return 16 * float(jnp.finfo(array.dtype).eps)


def _check_factor(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not (math.isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0; got {value!r}")


RESIDUALS: dict[str, Residual] = {
    "discard": Discard(),
    "norm_scaled": NormScaled(),
    "scale_gradient": ScaleGradient(),
    "sign": Sign(),
    "error_feedback": ErrorFeedback(),
}
