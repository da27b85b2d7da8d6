"""Defines what a projector is to the rest of the library, and finds the one that is meant."""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, PyTree

from galore_optax._adam import Betas
from galore_optax._basis import Basis, Dense
from galore_optax._callables import takes
from galore_optax._ownership import Role

_SUPPLIED = ("key", "old", "first", "moments", "step")
_LEAST = {"oversampling": 0, "power_iterations": 0, "iterations": 1}


@dataclasses.dataclass(frozen=True)
class Projector:
    """A projector: a function that chooses directions, and what a basis of them is.

    Attributes:
      function: the function that chooses; it takes a matrix, the rank, and what else it asks for by
        name.
      basis: the type of the bases that it chooses.
      orthonormal: whether the vectors of such a basis are orthonormal.
      stands_still: whether two bases are alike where gradients are; random ones never are.
      sides: how many sides of a matrix may be projected by it, at most.
      reads: the roles of the moments without which it cannot choose.
    """

    function: Callable[..., PyTree]
    basis: type[Basis] = Dense
    orthonormal: bool = True
    stands_still: bool = True
    sides: int = 2
    reads: tuple[Role, ...] = ()

    @functools.cached_property
    def needs(self) -> tuple[str, ...]:
        """The names of what the caller supplies, such as ``key``, that the function takes."""
        return tuple(name for name in _SUPPLIED if name in _taken(self.function))

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the other arguments of the function, which are the user's to give."""
        return tuple(name for name in _taken(self.function) if name not in _SUPPLIED)

    @property
    def required(self) -> tuple[str, ...]:
        """The names among these that have no default."""
        parameters = inspect.signature(self.function).parameters if self.options else {}
        return tuple(n for n in self.options if parameters[n].default is inspect.Parameter.empty)

    def with_betas(self, betas: Betas) -> "Projector":
        """Returns the projector for an inner transformation with these decay rates of moments."""
        if "b1" not in self.required:
            return self
        function = functools.partial(self.function, b1=betas.b1)
        return dataclasses.replace(self, function=function)

    @property
    def name(self) -> str:
        """The name of the function."""
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return getattr(function, "__name__", repr(function))

    def __call__(
        self, matrix: Array | jax.ShapeDtypeStruct, rank: int, **supplied: PyTree
    ) -> PyTree:
        """Returns what the function chooses; ``supplied`` is all that it may ask for."""
        return self.function(matrix, rank, **{name: supplied[name] for name in self.needs})


def resolve_projector(
    projector: str | Callable[..., Array],
    options: Mapping[str, object],
    table: Mapping[str, Projector],
) -> Projector:
    """Returns the projector of that name, or of the user's function, with options.

    Args:
      projector: the name, the function, or a row of a table.
      options: keyword arguments of the function.
      table: the projectors that have names, for which their functions stand too.

    Raises:
      ValueError: there is no projector of that name, or an option is out of range.
      TypeError: neither a name nor a function, or it does not take an option.
    """
    if isinstance(projector, str):
        if projector not in table:
            raise ValueError(f"projector must be one of {', '.join(table)}; got {projector!r}")
        found = table[projector]
    elif isinstance(projector, Projector):
        found = projector
    elif callable(projector) and takes(projector, 2, more=True):
        known = (row for row in table.values() if row.function is projector)
        found = next(known, Projector(projector))
    else:
        raise TypeError(
            f"projector must be a name ({', '.join(table)}) or a function "
            f"(matrix, rank) -> basis; got {projector!r}"
        )
    if not isinstance(options, Mapping):
        raise TypeError(
            "projector_options must be a dict of keyword arguments of the projector; got "
            f"{options!r}"
        )
    name = getattr(found.function, "__name__", repr(found.function))
    for option, value in options.items():
        if option not in found.options:
            raise TypeError(
                f"projector_options has {option!r}, which {name} does not take; it takes "
                f"{', '.join(found.options) or 'no options'}"
            )
        least = _LEAST.get(option)
        if least is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(
                f"{option} of {name} must be an int of at least {least}; got {value!r}"
            )
    return dataclasses.replace(found, function=functools.partial(found.function, **options))


def _taken(function: Callable[..., Array]) -> tuple[str, ...]:
    """Returns the names of the arguments behind the matrix and the rank."""
    try:
        return tuple(inspect.signature(function).parameters)[2:]
    except ValueError:  # some built-in functions have no signature
        return ()
