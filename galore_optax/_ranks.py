"""Says to which rank each matrix is projected: all to the same, or each to that of its role."""

import bisect
import dataclasses
import functools
import math
import numbers
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np

from galore_optax._callables import is_pattern, takes
from galore_optax._types import Shape
from galore_optax._view import LeafView, MatrixView

MOARA: Mapping[str, float] = types.MappingProxyType(
    {
        r"(?i)(^|/)(w?[qk]|[qk]_(proj|einsum)|query|key)(/|$)": 0.5,
        r"(?i)(^|/)(down(_proj)?|w2)(/|$)"
        r"|(^|/)(mlp|ffn|feed_forward|[^/]*moe[^/]*)(/.+)?/(c_proj|linear|wo)(/|$)": 2.0,
    }
)
"""The relative ranks of MoARa (2026), by regular expressions on the path of a leaf.

Attention's q and k kernels have half the rank of others, and the down projection of the MLP has
twice the others'. The names are those of LLaMA (``q_proj``, ``wk``, ``down_proj``,
``feed_forward/w2``), Gemma (``attn/q_einsum``, ``mlp/linear``), GPT-2 (``mlp/c_proj``), MaxText
(``self_attention/query``, ``mlp/wo``) and of models named like these. A fused kernel that holds v
as well, such as ``c_attn`` or ``kv_einsum``, counts as any other: its factor is 1.
"""

Factors: TypeAlias = Mapping[str, float] | Mapping[str | re.Pattern[str], float]
"""Relative ranks by regular expressions."""

UniformRank: TypeAlias = int | float | Callable[[str, Shape], int | float]


@dataclasses.dataclass(frozen=True)
class RankByRole:
    r"""The ranks of matrices by their role, in a state of as many bytes as with a uniform rank.

    Given as ``rank`` of :func:`galore_optax.galore`. It projects the leaves that the uniform rank
    r projects, each to the rank

    .. math::
      r_i = \min(\max(\mathrm{round}(f\, c_i\, r), 1), s_i - 1)

    where c_i is the factor of the leaf's role, and s_i its short side, at which it would not be
    projected any more. The one number f is as large as it can be: bases, moments and all else in
    the state together take at most the bytes that they take with r for all. With `MOARA`, SVD and
    Adam it is 0.90 for LLaMA-7B. What rounding leaves of these bytes goes to those roles where one
    rank more fits. The rest is less than 1 % for the published LLaMAs, and more where ranks are so
    few that one of them is more, or where moments of fewer ranks have more bytes, as those that
    ``optax.adafactor`` does not factor.

    All layers of a stack have the same rank, and so have leaves of the same role and shape.

    Attributes:
      rank: the uniform rank r: an int, a fraction of the short side in (0, 1), or a callable of
        path and shape that returns either.
      factors: the factor of each role, larger than 0, by a regular expression that is searched in
        the path (``"/"`` between components). The first that matches counts; leaves that none
        matches have 1.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: a rank or factor out of range, or an invalid regular expression.

    Notes:
      The bytes are found by an abstract ``init`` of the inner transformation on each leaf alone.
      Where that fails, as with masks of the structure of all parameters, they are taken to be those
      of two float32 arrays of the shape of R. Where no byte depends on the rank, f is 1.

      The ranks depend on what is around a leaf, and on the inner transformation: give the same to
      go on with a saved state.

    Examples:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> shapes = {"q": (64, 64), "v": (64, 64), "down": (192, 64)}
      >>> params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
      >>> tx = galore_optax.galore_adamw(1e-3, rank=galore_optax.RankByRole(16))
      >>> {name: mu.shape for name, mu in optax.tree.get(tx.init(params), "mu").items()}
      {'down': (192, 22), 'q': (6, 64), 'v': (12, 64)}

    References:
      The relative ranks of `MOARA` are those of MoARa, 2026.
    """

    rank: UniformRank
    factors: Factors = dataclasses.field(default_factory=lambda: MOARA, hash=False)

    def __post_init__(self):
        _check_uniform(self.rank, "rank of RankByRole")
        if not isinstance(self.factors, Mapping):
            raise TypeError(
                "factors of RankByRole must be a mapping from regular expressions to numbers, such "
                f'as {{"[qk]_proj": 0.5}}; got {self.factors!r}'
            )
        for pattern, factor in self.factors.items():
            _check_factor(pattern, factor)
        object.__setattr__(self, "factors", dict(self.factors))  # the caller's own may change.

    def factor(self, path: str) -> float:
        """Returns the factor of a leaf's role, by its path."""
        found = (c for pattern, c in self.factors.items() if re.search(pattern, path))
        return float(next(found, 1.0))

    def unmatched(self, paths: Sequence[str]) -> list[str | re.Pattern[str]]:
        """Returns the regular expressions that match none of some paths.

        Not all models have all roles of `MOARA`: of these it returns none if any matches.
        """
        none = [p for p in self.factors if not any(re.search(p, path) for path in paths)]
        return [] if self.factors == MOARA and len(none) < len(MOARA) else none

    def share(
        self, views: Sequence[LeafView], nbytes: Callable[[MatrixView], int]
    ) -> dict[str, int]:
        """Returns the ranks of the projected leaves, by path.

        Args:
          views: how each leaf is seen with the uniform rank.
          nbytes: returns the bytes of the state of one leaf, by itself; its view has one of the
            paths of ``views``, and any rank.
        """
        alike: dict[tuple[MatrixView, float, int], list[MatrixView]] = {}
        for view in views:
            if isinstance(view, MatrixView):
                # Inner transformations may treat leaves of one shape differently.
                alike.setdefault((view, self.factor(view.path), nbytes(view)), []).append(view)
        roles = [_Role(found, factor, nbytes) for (_, factor, _), found in alike.items()]
        ranks = _shared(roles)
        return {v.path: rank for role, rank in zip(roles, ranks, strict=True) for v in role.views}


RankSpec: TypeAlias = UniformRank | RankByRole


def uniform(rank: RankSpec) -> UniformRank:
    """Returns the uniform rank, which decides what is projected."""
    return rank.rank if isinstance(rank, RankByRole) else rank


def rank_of(rank: RankSpec, path: str, shape: Shape, short: int) -> int:
    """Returns the rank of a leaf, with the uniform rank where ranks go by role.

    Args:
      rank: the rank as the user gave it.
      path: the path of the leaf.
      shape: the shape of the leaf.
      short: the short side of its matrices.

    Raises:
      TypeError: a callable returns something of a wrong type.
      ValueError: a callable returns something out of range.
    """
    rank = uniform(rank)
    if callable(rank):
        rank = rank(path, shape)
        _check_number(rank, f"rank({path!r}, {shape})")
    return int(rank) if isinstance(rank, numbers.Integral) else max(1, round(rank * short))


def check_rank(rank: RankSpec) -> None:
    """Raises an error where galore's argument ``rank`` cannot be right."""
    if not isinstance(rank, RankByRole):
        _check_uniform(rank, "rank")


def _check_uniform(rank: object, name: str) -> None:
    """Raises an error where a number, or a callable of path and shape, cannot be right."""
    if not callable(rank) or not takes(rank, 2):
        _check_number(rank, name)


def _check_number(rank: object, name: str) -> None:
    if isinstance(rank, jax.Array):
        raise TypeError(
            f"{name} must be a Python number, since it sets shapes; got the array {rank}. Under "
            'optax.inject_hyperparams, pass static_args=("rank",).'
        )
    if isinstance(rank, bool | np.bool) or not isinstance(rank, numbers.Real):
        raise TypeError(
            f"{name} must be a positive int, a fraction of the short side in (0, 1), or a callable "
            f"of path and shape; got {rank!r}"
        )
    if isinstance(rank, numbers.Integral):
        if rank < 1:
            raise ValueError(f"{name} must be positive; got {rank}")
    elif not 0 < float(rank) < 1:
        raise ValueError(
            f"{name} must be an int, or a fraction of the short side in (0, 1); got {rank!r}"
        )


class _Role:
    """Leaves that are seen alike, with the same factor, and that share one rank.

    Attributes:
      views: the views of the leaves, with their uniform rank.
      share: the rank that they would have without f: their factor times their uniform rank.
      uniform: their uniform rank.
      most: the largest rank with which they are projected.
      nbytes: returns the bytes of the state of all of them, by their rank.
    """

    def __init__(
        self, views: Sequence[MatrixView], factor: float, nbytes: Callable[[MatrixView], int]
    ):
        first, *_ = self.views = views
        self.share, self.uniform, self.most = factor * first.rank, first.rank, first.short - 1

        @functools.cache
        def of_all(rank: int) -> int:
            return len(views) * nbytes(dataclasses.replace(first, rank=rank))

        self.nbytes = of_all

    @property
    def bytes_per_rank(self) -> float:
        """The bytes of one more rank, on average."""
        return (self.nbytes(self.most) - self.nbytes(1)) / max(1, self.most - 1)

    def rank(self, f: float) -> int:
        """Returns the rank for some f."""
        return min(max(math.floor(f * self.share + 0.5), 1), self.most)

    def steps(self) -> list[float]:
        """Returns where the rank goes up as f does, from 1 to the largest."""
        return [(rank + 0.5) / self.share for rank in range(1, self.most)]


def _shared(roles: Sequence[_Role]) -> list[int]:
    """Returns the rank of each role: together they have no more bytes than the uniform ranks."""
    uniform = [role.uniform for role in roles]
    budget = _total(roles, uniform)
    least = sum(role.nbytes(1) - role.bytes_per_rank for role in roles)
    slope = sum(role.bytes_per_rank * role.share for role in roles)
    if slope == 0:
        return _ranks(roles, 1.0)
    ranks = _ranks(roles, _largest(roles, budget, (budget - least) / slope))
    if _total(roles, ranks) > budget:  # such as for moments that are too small to be in few bits.
        return uniform
    fewest_first = sorted(range(len(roles)), key=lambda i: ranks[i] / roles[i].share)
    for i in fewest_first:
        more = [rank + (i == j) for j, rank in enumerate(ranks)]
        if more[i] <= roles[i].most and _total(roles, more) <= budget:
            ranks = more
    return ranks


def _largest(roles: Sequence[_Role], budget: int, guess: float) -> float:
    """Returns the largest f whose ranks have no more bytes than ``budget``, or 0 for none.

    Bytes nearly are linear in f, so that a good guess takes few of them to be counted. Where some
    go down as f goes up, this is one such f, from where on more would be too many.
    """
    steps = sorted({f for role in roles for f in role.steps()})

    def bytes_at(f: float) -> int:
        return _total(roles, _ranks(roles, f))

    low = high = bisect.bisect_right(steps, guess)
    width = 1
    while low > 0 and bytes_at(steps[low - 1]) > budget:
        low, width = max(0, low - width), 2 * width
    while high < len(steps) and bytes_at(steps[high]) <= budget:
        high, width = min(len(steps), high + width), 2 * width
    place = bisect.bisect_right(steps, budget, low, high, key=bytes_at)
    return steps[place - 1] if place else 0.0


def _ranks(roles: Sequence[_Role], f: float) -> list[int]:
    return [role.rank(f) for role in roles]


def _total(roles: Sequence[_Role], ranks: Sequence[int]) -> int:
    return sum(role.nbytes(rank) for role, rank in zip(roles, ranks, strict=True))


def _check_factor(pattern: object, factor: object) -> None:
    if not is_pattern(pattern):
        raise TypeError(
            f"factors of RankByRole must have regular expressions for keys; got {pattern!r}"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            "factors of RankByRole must have valid regular expressions for keys; got "
            f"{pattern!r}: {error}"
        ) from error
    if isinstance(factor, bool | np.bool) or not isinstance(factor, numbers.Real):
        raise TypeError(f"factors[{pattern!r}] of RankByRole must be a number; got {factor!r}")
    if not 0 < float(factor) < math.inf:
        raise ValueError(
            f"factors[{pattern!r}] of RankByRole must be finite and larger than 0; got {factor!r}"
        )
