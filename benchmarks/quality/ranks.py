"""Rules that give matrices ranks by their role, in a state of as many bytes as with one rank."""

import random
from collections.abc import Mapping

import galore_optax

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
# The relative ranks of MoARa; other roles have 1.
MOARA = {"q": 0.5, "k": 0.5, "down": 2.0}
UNIFORM, BY_ROLE = "uniform", "by role"
RANDOM_RULES = 5


def rules() -> dict[str, dict[str, float]]:
    """The relative ranks by role of MoARa, and of rules that give the same ones to random roles."""
    moara = {role: MOARA.get(role, 1.0) for role in ROLES}
    found = {BY_ROLE: moara}
    draw = random.Random(0)
    while len(found) < 1 + RANDOM_RULES:
        factors = dict(zip(ROLES, draw.sample([*moara.values()], len(ROLES)), strict=True))
        if factors not in found.values():
            found[f"random {len(found)}"] = factors
    return found


def by_role(rank: int, factors: Mapping[str, float]) -> galore_optax.RankByRole:
    """`rank` of `galore_optax.galore`, for ranks in the ratios of the factors."""
    # The path of a kernel is blocks/attention/q/kernel.
    return galore_optax.RankByRole(rank, {f"/{role}/": factor for role, factor in factors.items()})
