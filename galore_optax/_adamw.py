"""Makes presets of AdamW: each is galore with some of its arguments, and AdamW inside."""

import dataclasses
import inspect
import numbers
import re
from collections.abc import Callable
from typing import Protocol, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from galore_optax import projectors
from galore_optax._adam import Betas
from galore_optax._arguments import mask_of
from galore_optax._decoded import decoded, rounded_once, sees_dtypes
from galore_optax._errors import CombinationError
from galore_optax._factored import scale_by_factored_adam
from galore_optax._galore import galore
from galore_optax._low_bit import low_bit
from galore_optax._names import is_table
from galore_optax._options import (
    GaloreOptions,
    selection_of,
    shows_galore_options,
    warn_of_calls,
)
from galore_optax._ownership import Stacked
from galore_optax._residual import Residual
from galore_optax._residuals import RESIDUALS
from galore_optax._tables import resolve
from galore_optax._transport import Transport
from galore_optax._transports import TRANSPORTS, Reset
from galore_optax._trees import bare, leaves_with_paths, logical
from galore_optax._types import DType, Mask, Numeric, Params, State
from galore_optax._view import MatrixView


class Preset(Protocol):
    """The signature of presets; each has defaults of its own for the options of galore."""

    def __call__(
        self,
        learning_rate: optax.ScalarOrSchedule,
        b1: Numeric = 0.9,
        b2: Numeric = 0.999,
        eps: Numeric = 1e-8,
        eps_root: Numeric = 0.0,
        mu_dtype: DType | None = None,
        weight_decay: optax.ScalarOrSchedule = 1e-4,
        mask: Mask | None = None,
        *,
        nesterov: bool = False,
        inject_learning_rate: bool = False,
        tables: str = "adam",
        moment_dtype: DType | None = None,
        **options: Unpack[GaloreOptions],
    ) -> optax.GradientTransformationExtraArgs: ...


class Preset8Bit(Protocol):
    """The signature of presets whose moments are in 8 bits."""

    def __call__(
        self,
        learning_rate: optax.ScalarOrSchedule,
        b1: Numeric = 0.9,
        b2: Numeric = 0.999,
        eps: Numeric = 1e-8,
        eps_root: Numeric = 0.0,
        mu_dtype: DType | None = None,
        weight_decay: optax.ScalarOrSchedule = 1e-4,
        mask: Mask | None = None,
        *,
        nesterov: bool = False,
        inject_learning_rate: bool = False,
        tables: str = "adam",
        block_size: int = 256,
        min_size: int = 4096,
        stacked: Stacked | None = None,
        **options: Unpack[GaloreOptions],
    ) -> optax.GradientTransformationExtraArgs: ...


@dataclasses.dataclass(frozen=True)
class LowBit:
    """The arguments of `galore_optax.low_bit`."""

    block_size: int = 256
    min_size: int = 4096
    stacked: Stacked | None = None
    bits: int = 8

    @classmethod
    def in_dtype(cls, dtype: DType | None) -> "LowBit | None":
        """Returns how moments are held in a dtype; None where they are held as they are.

        Raises:
          ValueError: moments cannot be held in it.
        """
        if dtype is None:
            return None
        try:
            is_known = jnp.dtype(dtype) == jnp.bfloat16
        except TypeError:
            is_known = False
        if not is_known:
            raise ValueError(
                f"moment_dtype must be 'bfloat16', which is rounded at random, or None for "
                f"float32; got {dtype!r}. For 8 bits, take the preset whose name ends in _8bit."
            )
        return cls(min_size=0, bits=16)


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The arguments of ``optax.adamw``, and the bits of its moments.

    Attributes:
      low_bit: how moments are held in few bits; None for moments that are held as they are.
      inject_learning_rate: whether the state holds the learning rate.
      tables: ``"factored"`` for embeddings and heads whose second moment is factored, and that have
        no first one.
    """

    learning_rate: optax.ScalarOrSchedule
    b1: Numeric
    b2: Numeric
    eps: Numeric
    eps_root: Numeric
    mu_dtype: DType | None
    weight_decay: optax.ScalarOrSchedule
    mask: Mask | None
    nesterov: bool
    low_bit: LowBit | None = None
    inject_learning_rate: bool = False
    tables: str = "adam"

    def whole(self) -> optax.GradientTransformationExtraArgs:
        """Returns AdamW."""

        def adamw(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
            return optax.chain(
                self._scaling(), self._decay(), optax.scale_by_learning_rate(learning_rate)
            )

        return self._held(self._at_the_rate(adamw))

    def in_galore(self, options: GaloreOptions) -> optax.GradientTransformationExtraArgs:
        """Returns AdamW in the gradient's subspace.

        The transport and the residual are told the decay rates of the moments. Where the residual
        wants an inner transformation that only scales, decay and learning rate come after galore.
        """
        betas = Betas(self.b1, self.b2)
        transport = resolve(
            "transport", options.get("transport", "keep"), TRANSPORTS, Transport
        ).with_betas(betas)
        residual = resolve(
            "residual", options.get("residual", "discard"), RESIDUALS, Residual
        ).with_betas(betas)
        given = options.get("projector_options")
        projector = projectors.resolve(
            options.get("projector", "svd"), {} if given is None else given
        ).with_betas(betas)
        options = options | {
            "transport": transport,
            "residual": residual,
            "projector": projector,
            "projector_options": None,
        }
        if self.nesterov and isinstance(transport, Reset):
            raise CombinationError(
                "nesterov must be False with moments that are reset: its two bias corrections "
                "cannot be made up for by one factor",
                "Use nesterov=False, or another transport.",
            )
        if not residual.scales_only:
            return self._checked(galore(self.whole(), **options), options)
        line = rounded_once(
            optax.chain(
                galore(self._held(self._scaling()), **options),
                decoded(self._decay()),
                sees_dtypes(
                    self._at_the_rate(
                        lambda learning_rate: optax.scale_by_learning_rate(learning_rate)
                    )
                ),
            )
        )
        return self._checked(line, options)

    def _decay(self) -> optax.GradientTransformation:
        """Returns weight decay before the learning rate; where there is none, with its state."""
        rate = self.weight_decay
        if self.mask is None and isinstance(rate, numbers.Real) and rate == 0:
            # A decay of zero would be a product of it with the weights.
            return optax.identity()
        return optax.add_decayed_weights(self.weight_decay, mask_of("mask", self.mask))

    def _scaling(self) -> optax.GradientTransformation:
        """Returns Adam without a learning rate; of tables, with what they have in its place."""
        adam = optax.scale_by_adam(
            self.b1, self.b2, self.eps, self.eps_root, self.mu_dtype, nesterov=self.nesterov
        )
        if self.tables == "adam":
            return adam
        factored = scale_by_factored_adam(self.b2, self.eps, self.eps_root)
        return optax.partition({"matrices": adam, "tables": factored}, _kinds)

    def _checked(
        self, tx: optax.GradientTransformationExtraArgs, options: GaloreOptions
    ) -> optax.GradientTransformationExtraArgs:
        """Returns a preset that refuses tables that are both factored and projected."""
        if self.tables == "adam":
            return tx
        selection = selection_of(options)

        def init(params: Params) -> State:
            for view in selection.views(params):
                if isinstance(view, MatrixView) and is_table(view.path):
                    raise CombinationError(
                        "tables='factored' is for embeddings and heads at full size, and "
                        f"{view.path} is projected",
                        "Name it in exclude, whose default does, or use tables='adam'.",
                    )
            return tx.init(params)

        return optax.GradientTransformationExtraArgs(init, tx.update)

    def _at_the_rate(
        self, make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
    ) -> optax.GradientTransformation:
        """Returns what is made of the learning rate, with it in the state where that is wanted."""
        rate = self.learning_rate
        if not self.inject_learning_rate:
            return make(rate)
        # An int would be one in the state, of a weak type that a step need not keep.
        rate = float(rate) if isinstance(rate, numbers.Integral) else rate
        return optax.inject_hyperparams(make)(learning_rate=rate)

    def _held(
        self, transformation: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        if self.low_bit is None:
            return optax.with_extra_args_support(transformation)
        return low_bit(transformation, **vars(self.low_bit))


def _kinds(params: Params) -> PyTree:
    """Returns for each leaf whether it is a table, an embedding or a head, or another matrix."""
    params = logical(bare(params))
    names = [
        "tables" if np.ndim(leaf) > 1 and is_table(path) else "matrices"
        for path, leaf in leaves_with_paths(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), names)


def adamw_preset(
    name: str, doc: str, defaults: GaloreOptions | None = None
) -> tuple[Preset, Preset8Bit]:
    """Makes two presets of AdamW in galore, one of them with 8-bit moments.

    Args:
      name: the name of the first one; the other one's ends in ``_8bit``.
      doc: the docstring, in which "[arguments]" stands for the description of all arguments.
      defaults: the defaults of galore's arguments that differ from galore's own.
    """
    plain = _preset(Preset, name, doc.replace("[arguments]", _ARGUMENTS), defaults)
    of_8bit = doc.replace(f".{name}(", f".{name}_8bit(").replace("[arguments]", _IN_8_BITS)
    return cast(Preset, plain), adamw_8bit_preset(f"{name}_8bit", of_8bit, defaults)


def adamw_8bit_preset(name: str, doc: str, defaults: GaloreOptions | None = None) -> Preset8Bit:
    """Makes a preset of AdamW with 8-bit moments in galore; see :func:`adamw_preset`."""
    doc = doc.replace("[arguments]", _ARGUMENTS_8BIT)
    return cast(Preset8Bit, _preset(Preset8Bit, name, doc, defaults))


def _preset(
    protocol: type, name: str, doc: str, defaults: GaloreOptions | None
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Makes a preset with the signature of a protocol, and defaults of its own for options."""
    of_method = inspect.signature(protocol.__call__)
    _, *parameters = of_method.parameters.values()
    signature = of_method.replace(parameters=parameters)
    names = {field.name for field in dataclasses.fields(LowBit)} & signature.parameters.keys()

    def preset(*args: object, **kwargs: object) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        options = (defaults or {}) | given.pop("options")
        low_bit = (
            LowBit(**{name: given.pop(name) for name in names})
            if names
            else LowBit.in_dtype(given.pop("moment_dtype"))
        )
        warn_of_calls(name, given["learning_rate"], options)
        return AdamW(**given, low_bit=low_bit).in_galore(options)

    preset.__name__ = preset.__qualname__ = name
    preset.__module__ = "galore_optax"
    preset.__doc__ = doc
    vars(preset)["__signature__"] = signature
    return shows_galore_options(defaults)(preset)


_IN_8_BITS = """Here moments are in 8 bits, as in `galore_optax.low_bit`.

    [arguments]"""

_ARGUMENTS = """Args:
      learning_rate: the learning rate; see ``optax.adamw``, as for all arguments up to
        ``nesterov``.
      b1: the decay rate of the first moment.
      b2: the decay rate of the second moment.
      eps: what is added to the denominator, after bias correction.
      eps_root: what is added under the root of the denominator.
      mu_dtype: the dtype of the first moment.
      weight_decay: the decay of whole matrices, times the learning rate, not scaled by ``scale``.
      mask: the leaves to decay.
      nesterov: whether to use Nesterov momentum.
      inject_learning_rate: whether the state holds the learning rate, as that of
        ``optax.inject_hyperparams``, so that it can be read and set there. A schedule counts steps,
        which it does not around a preset with ``accumulation_steps``.
      tables: ``"factored"`` for embeddings and heads with a factored second moment and no first
        one, as `galore_optax.scale_by_factored_adam` has; their state is then m + n numbers instead
        of 2 m n. They are told by their names, and must be at full size.
      moment_dtype: ``"bfloat16"`` keeps both moments in it between steps, rounded at random, as
        `galore_optax.low_bit` does with 16 bits; None keeps them in float32, or wider where the
        gradients are.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`, with the defaults that the signature shows.

    Returns:
      The transformation."""

_ARGUMENTS_8BIT = re.sub(
    r"      moment_dtype.*?(?=      \*\*options)", "", _ARGUMENTS, flags=re.DOTALL
)
_ARGUMENTS_8BIT = _ARGUMENTS_8BIT.replace(
    "      **options",
    """      block_size: the number of elements of a block, which share a scale.
      min_size: the number of elements below which moments are not rounded. All elements of a leaf
        count, or those of one layer where ``stacked`` says how many axes are stacks.
      stacked: see `galore_optax.low_bit`.
      **options""",
).replace(
    "the dtype of the first moment.",
    "the dtype of the first moment before it is rounded to 8 bits.",
)
