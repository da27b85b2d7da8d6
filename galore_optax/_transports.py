"""Lists what may happen to the moments when a subspace is chosen again; `TRANSPORTS` names it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from galore_optax._adam import Betas, Findings, check_betas, check_decay
from galore_optax._errors import CombinationError
from galore_optax._subspace import ABSENT
from galore_optax._transport import Keep, Moments, Transport, Turn
from galore_optax._types import Numeric, Step


@dataclasses.dataclass(frozen=True)
class Reset(Keep):
    """Forgets the moments: FRUGAL, Grass.

    Optax' transformations count steps for all leaves at once, so that the bias of moments that
    began anew would be corrected as if they were old. Updates are therefore multiplied by what
    that correction should have been, over what it was, and a matrix steps as a fresh Adam would,
    but for its epsilon, which that factor multiplies too. Nesterov's momentum, which has two
    corrections, is refused.

    Attributes:
      b1: the decay rate of the inner transformation's first moment, where it corrects biases;
        presets give it.
      b2: the same of its second moment.

    References:
      Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024; Muhamed et al., `Grass
      <https://arxiv.org/abs/2406.17660>`_, 2024
    """

    b1: Numeric | None = None
    b2: Numeric | None = None

    def __post_init__(self):
        _check_both("Reset", self.b1, self.b2)

    def with_betas(self, betas: Betas) -> "Reset":
        """Returns the rule with decay rates; see `Keep`."""
        return Reset(*betas) if self.b1 is None else self

    @property
    def moves(self) -> tuple[str, ...]:
        """The roles of the moments that are forgotten: all there are."""
        return ("first", "second", "curvature")

    def initial(self) -> PyTree:
        """Returns the step at which the moments began, (), int32; nothing without betas."""
        return ABSENT if self.b1 is None else jnp.zeros([], jnp.int32)

    def check(self, found: Findings) -> None:
        """Raises where moments of zero are no fresh start; see `Keep`."""
        _check_known("reset", (*found.unknown, *found.others))
        if not found.roles:
            raise _without_moments("reset")
        trial = found.trial()
        if trial is None or math.isnan(trial.afresh):
            return  # the learning rate may be zero at first, as in a warm-up
        factor = 1.0
        if self.b1 is not None and self.b2 is not None:
            try:
                b1, b2 = float(self.b1), float(self.b2)
            except jax.errors.ConcretizationTypeError:
                return
            factor = (1 - b1**2) / (1 - b1) * math.sqrt((1 - b2) / (1 - b2**2))
        if math.isclose(trial.afresh * factor, 1, rel_tol=0.02):
            return
        own = None if trial.betas == (self.b1, self.b2) else trial.betas
        remedy = (
            "It is not one of those whose bias correction is known: adam and adamw without "
            "Nesterov's momentum, and those that correct none, such as momentum."
            if own is None
            else f"Give transport=galore_optax.Reset(b1={own.b1}, b2={own.b2}), or take a preset, "
            "which does so."
        )
        raise CombinationError(
            'transport="reset" would not make the inner transformation begin anew: with moments of '
            f"zero its second step is {trial.afresh * factor:.3g} times its first",
            remedy,
        )

    def move(self, moments: Moments, state: PyTree, turn: Turn) -> tuple[Moments, PyTree]:
        """Returns moments of zero; see `Keep`."""
        # The sum makes the new state an array of its own: the step goes on as a token.
        return jax.tree.map(
            jnp.zeros_like, moments
        ), ABSENT if self.b1 is None else turn.clock.step + 0

    def count(self, state: PyTree, step: Step) -> Step:
        """Returns how many steps there were since the last refresh; see `Keep`."""
        return step + 1 if self.b1 is None else step + 1 - state

    def correct(self, psi: Float[Array, "a b"], state: PyTree, step: Step) -> Float[Array, "a b"]:
        """Returns the update of moments that began at the last refresh; see `Keep`."""
        if self.b1 is None or self.b2 is None:
            return psi
        betas = Betas(*(jnp.asarray(b, psi.dtype) for b in (self.b1, self.b2)))
        # As numbers of psi's dtype, since a power of float32 would round what float64 may need.
        was, should_be = (x.astype(psi.dtype) for x in (step + 1, self.count(state, step)))
        return psi * (betas.bias(was) / betas.bias(should_be))


@dataclasses.dataclass(frozen=True)
class Project(Keep):
    """Projects first moments on the new subspace: m <- C m.

    Second moments stay as they are. It is exact for what is linear in the gradients: momentum in a
    subspace that holds the whole gradient is momentum in full.

    References:
      Hao et al., `Flora <https://arxiv.org/abs/2402.03293>`_, 2024, algorithm 2
    """

    @property
    def moves(self) -> tuple[str, ...]:
        """The role of the moments that are projected."""
        return ("first",)

    def check(self, found: Findings) -> None:
        """Raises where there is no first moment; see `Keep`."""
        _check_known("project", found.unknown)
        if "first" not in found.roles:
            raise _without_moments("project")

    def move(self, moments: Moments, state: PyTree, turn: Turn) -> tuple[Moments, PyTree]:
        """Returns the moments in the new subspace; see `Keep`."""

        def move(moment: Float[Array, "a b"]) -> Float[Array, "a b"]:
            return jnp.where(turn.first, moment, turn.take(moment))

        return jax.tree.map(move, moments), state


@dataclasses.dataclass(frozen=True)
class Rotate(Keep):
    r"""Takes both of Adam's moments to the new subspace, as statistics of the gradient: LDAdam.

    With the bias-corrected moments :math:`\hat m`, :math:`\hat v` after t steps, and C o C the
    square of every entry of C,

    .. math::
      m \gets C m, \qquad v \gets (1 - \beta_2^t)
      \bigl(\max(0, (C \circ C)(\hat v - \hat m^2)) + (C \hat m)^2\bigr)

    that is, the variances of the old coordinates add up to those of the new ones as if they were
    independent. The paper takes the absolute value of the whole sum instead of max(0, .), so that a
    variance that is estimated to be negative is taken from the square of the mean, or counts for as
    much as a positive one; here it counts for nothing, and v is never less than that square: a
    second moment that is, grows even where the subspace stands still.

    Attributes:
      b1: the decay rate of the inner transformation's first moment; presets give it.
      b2: the same of its second moment.

    References:
      Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024, algorithm 1
    """

    b1: Numeric | None = None
    b2: Numeric | None = None

    def __post_init__(self):
        _check_both("Rotate", self.b1, self.b2)

    @property
    def asks(self) -> str | None:
        """What to give, where the decay rates are not known."""
        return "galore_optax.Rotate(b1=0.9, b2=0.999)" if self.b1 is None else None

    def with_betas(self, betas: Betas) -> "Rotate":
        """Returns the rule with decay rates; see `Keep`."""
        return Rotate(*betas) if self.b1 is None else self

    @property
    def moves(self) -> tuple[str, ...]:
        """The roles of the moments that are rotated."""
        return ("first", "second")

    @property
    def needs_orthonormal(self) -> bool:
        """Says that C must not change lengths."""
        return True

    def check(self, found: Findings) -> None:
        """Raises where the moments are not Adam's, or have other decay rates; see `Keep`."""
        _check_known("rotate", found.unknown)
        trial = found.trial()
        if trial is None and found.roles.get("first") == found.roles.get("second") == 1:
            return
        if trial is None or trial.betas is None:
            raise CombinationError(
                'transport="rotate" is for the moments of optax.adam, adamw, nadam, lamb and '
                "scale_by_adam, averages of gradients and of their squares; the inner "
                f"transformation has other ones, or none ({dict(found.roles)})",
                "Those of AdaMax, Yogi, RAdam and AdaBelief are called alike and are not "
                'supported. Use transport="project" or "keep".',
            )
        remedy = f"Rotate(b1={trial.betas.b1}, b2={trial.betas.b2})"
        check_decay("Rotate", "b1", self.b1, trial.betas.b1, remedy)
        check_decay("Rotate", "b2", self.b2, trial.betas.b2, remedy)

    def move(self, moments: Moments, state: PyTree, turn: Turn) -> tuple[Moments, PyTree]:
        """Returns the moments in the new subspace; see `Keep`."""
        [m], [v] = moments["first"], moments["second"]
        betas = Betas(*(jnp.asarray(b, m.dtype) for b in (self.b1, self.b2)))
        # At step 0 the moments are zero whatever they are divided by.
        of_first, of_second = betas.corrections(jnp.maximum(turn.clock.step, 1).astype(m.dtype))
        turned_m = turn.take(m)
        # Infinities, of one huge gradient, have no difference.
        most = float(jnp.finfo(m.dtype).max) / (2 * max(m.shape))
        v_hat, square = (jnp.minimum(x, most) for x in (v / of_second, (m / of_first) ** 2))
        variance = turn.squared().take(v_hat - square)
        turned_v = of_second * (jnp.maximum(variance, 0) + (turned_m / of_first) ** 2)
        return {
            "first": [jnp.where(turn.first, m, turned_m)],
            "second": [jnp.where(turn.first, v, turned_v)],
        }, state


def _check_both(name: str, b1: Numeric | None, b2: Numeric | None) -> None:
    """Raises an error where one decay rate is given without the other, or cannot be right."""
    if (b1 is None) != (b2 is None):
        raise ValueError(f"{name} needs both b1 and b2, or neither; got b1={b1!r}, b2={b2!r}")
    check_betas(name, b1, b2)


def _without_moments(name: str) -> CombinationError:
    return CombinationError(
        f'transport="{name}" needs moments, and the inner transformation has none that are known '
        "by the names mu, nu, m, v or trace, as optax.adam, lion, adan and momentum have",
        'Use transport="keep".',
    )


def _check_known(name: str, unknown: tuple[str, ...]) -> None:
    """Raises an error where the inner state has arrays that nobody moves."""
    if unknown:
        raise CombinationError(
            f'transport="{name}" does not know what {", ".join(unknown)} in the state of the '
            "inner transformation is, and would leave it in the old subspace",
            "It knows the moments of optax.adam, adamw, nadam, lamb, lion, sgd and rmsprop.",
        )


TRANSPORTS: dict[str, Transport] = {
    "keep": Keep(),
    "reset": Reset(),
    "project": Project(),
    "rotate": Rotate(),
}
