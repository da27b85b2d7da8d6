"""Evaluates a drawn configuration, and judges the error that refuses it."""

import contextlib
import dataclasses
import functools
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import optax

import galore_optax
from benchmarks import fuzz_names
from benchmarks.fuzz_search import Wrong

OURS = str(Path(galore_optax.__file__).parent)
# What Python says itself of a call, and Optax of one without parameters, is clear.
OF_A_CALL = re.compile(
    r"(unexpected keyword|missing .*|multiple values for) argument|too many positional"
    r"|you are not passing `params`"
)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A tree of parameters and a transformation, as code.

    Attributes:
      params: the code of the parameters.
      tx: the code of the transformation, which may use `params`.
      around: the code of what is around the transformation, which TX stands for.
      plain: the code of a transformation of Optax that does without galore, if there is one.
      wrong: the argument that has a wrong value, if one has.
    """

    params: str
    tx: str
    around: str = "TX"
    plain: str | None = None
    wrong: str | None = None

    def __str__(self) -> str:
        about = "" if self.wrong is None else f"  # {self.wrong} is wrong"
        return (
            f"from benchmarks.fuzz_names import *\nparams = {self.params}\ntx = {self.code}{about}"
        )

    @property
    def code(self) -> str:
        """The code of the transformation and of what is around it."""
        return self.around.replace("TX", self.tx)

    @property
    def without_galore(self) -> Self | None:
        """The same with a transformation of Optax, if there is one."""
        if self.plain is None:
            return None
        return dataclasses.replace(self, tx=self.plain, plain=None)

    @contextlib.contextmanager
    def in_its_dtypes(self) -> Iterator[None]:
        """Has float64 where the parameters have it."""
        with jax.enable_x64("float64" in self.params):
            yield

    def make_params(self) -> Any:
        return eval(self.params, vars(fuzz_names))

    def make_tx(self, params: Any) -> optax.GradientTransformation:
        return eval(self.code, vars(fuzz_names) | {"params": params})


def check_clear(error: Exception, wrong: str | None = None) -> None:
    """Raises `Wrong` unless an error says in its own words what is not right.

    Args:
      error: the error.
      wrong: the argument that has a wrong value, where one has.
    """
    said = str(error)
    if not isinstance(error, ValueError | TypeError):
        raise Wrong(f"a bare {type(error).__name__}: {_short(error)}") from error
    if OF_A_CALL.search(said):
        return
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not last.filename.startswith(OURS) or not (last.line or "").startswith("raise "):
        raise Wrong(f"not in words of this library: {_short(error)}") from error
    if wrong is not None and not re.search(rf"\b({wrong})\b", said):
        raise Wrong(f"an error without {wrong!r}: {_short(error)}") from error


Drawn = TypeVar("Drawn", bound=Configuration)


def as_in_optax(check: Callable[[Drawn], str]) -> Callable[[Drawn], str]:
    """Decorates a check, which then passes what goes wrong without galore in the same way."""

    @functools.wraps(check)
    def checked(configuration: Drawn) -> str:
        try:
            return check(configuration)
        except Exception as error:
            plain = configuration.without_galore
            if plain is None:
                raise
            try:
                check(plain)
            except Exception as without:
                if _what(error) == _what(without):
                    return "as in Optax"
            raise

    return checked


def _what(error: Exception) -> str:
    """Returns what is wrong, without where."""
    return re.split(r"[.:\[]", f"{type(error).__name__}, {error}")[0]


def _short(error: Exception) -> str:
    """Returns what an error says, and through which of our lines it came."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(OURS)][-2:]
    last = frames[-1:] if frames[-1] not in own else []
    places = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*own, *last])
    return f"{type(error).__name__}: {str(error)[:400]} [{places}]"
