"""Every preset of the family as users call it, step for step, against NumPy in float64."""

import functools

import jax
import numpy as np
import optax
import pytest
import reference_family as reference
from family_runs import LAST_TWO, bases_of, run
from reference_family import Rule
from test_family import SHAPES, assert_same, gradients_of

import galore_optax

GAP, DECAY, SEED = 20, 0.1, 7
B1, B2, EPS = 0.85, 0.99, 1e-6
LEAVES = {**SHAPES, "bias": (9,)}


def learning_rate(count):
    """A schedule, of numbers and of arrays."""
    return 0.5 / (5 + count)


def decays(tree):
    return {name: name != "bias" for name in tree}


COMMON = {
    "weight_decay": DECAY,
    "mask": decays,
    "weight_dimension_numbers": LAST_TWO,
    "seed": SEED,
}


def of_paper(*answers, **numbers):
    return Rule(*answers, **{"b1": B1, "b2": B2, "eps": EPS, "gap": GAP} | numbers)


# By preset: its arguments, and what its paper says. The ranks are those of the arguments, or a
# quarter of the shorter side, which is 2 for all SHAPES.
RANK, SELDOM = {"rank": 3}, {"update_proj_gap": GAP}
PRESETS = {
    "galore_adamw": (SELDOM | RANK, of_paper()),
    "fira_adamw": (SELDOM | RANK, of_paper("keep", "norm_scaled")),
    "apollo_adamw": (SELDOM, of_paper("keep", "scale_gradient", scale=1.0, rank=2)),
    "apollo_mini_adamw": (
        SELDOM,
        of_paper("keep", "scale_gradient", scale=128**0.5, rank=1, per="tensor"),
    ),
    "ldadamw": (RANK, of_paper("rotate", scale=1.0, gap=1, basis=reference.momentum_iteration)),
    "tracked_adamw": (
        RANK,
        of_paper("rotate", "norm_scaled", beta=2.0, gap=1, basis=reference.momentum_iteration),
    ),
    "frugal_adamw": (SELDOM, of_paper("reset", "sign", scale=1.0, rank=2)),
    "grass_adamw": (SELDOM | RANK, of_paper("reset", basis=reference.largest_rows)),
    "dct_adamw": (RANK, of_paper("rotate", scale=1.0, gap=1, basis=reference.cosines)),
}
RANDOM = {
    "apollo_adamw": "gaussian",
    "apollo_mini_adamw": "gaussian",
    "frugal_adamw": "random_rows",
}
# The same with some of their answers exchanged.
OTHERWISE = {
    "apollo_adamw": {"projector": "svd"},
    "apollo_mini_adamw": {"projector": "svd"},
    "ldadamw": {"residual": "error_feedback"},
}


@functools.cache
def weights():
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape) for name, shape in LEAVES.items()}


def gradients():
    return gradients_of(tuple(LEAVES.items()))


def directions_of(rule, projector=None):
    """What NumPy makes of all gradients, before the learning rate.

    Where the projector is a random one the reference is given the bases that the library draws.
    """
    rules = dict.fromkeys(SHAPES, rule)
    if projector is not None:
        matrices = {name: gradients()[name] for name in SHAPES}
        options = {"rank": rule.rank, "update_proj_gap": GAP, "seed": SEED}
        with jax.enable_x64(True):
            drawn = bases_of(matrices, projector=projector, **options)
        rules = {k: rule.with_bases(drawn[k][:, ::GAP]) for k in SHAPES}
    found = {k: reference.of_matrices(rules[k], gradients()[k]) for k in SHAPES}
    return found | {"bias": reference.of_vector(rule, gradients()["bias"])}


def assert_as_in_numpy(tx, directions, tolerance=1e-9):
    """All steps of all leaves: whole matrices are decayed, the bias is not."""
    with jax.enable_x64(True):
        updates, _ = run(tx, gradients(), weights())
    for name, start in weights().items():
        decay = 0 if name == "bias" else DECAY
        expected = reference.steps_of(start, directions[name], learning_rate, decay)
        assert_same(updates[name], expected, tolerance)


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in PRESETS), *OTHERWISE.items()],
    ids=[*PRESETS, *(f"{name}, otherwise" for name in OTHERWISE)],
)
def test_every_step_of_adamw_is_that_of_numpy(name, changes):
    arguments, rule = PRESETS[name]
    rule = reference.dataclasses.replace(rule, residual=changes.get("residual", rule.residual))
    tx = getattr(galore_optax, name)(
        learning_rate, b1=B1, b2=B2, eps=EPS, **COMMON, **arguments, **changes
    )
    directions = directions_of(rule, None if "projector" in changes else RANDOM.get(name))
    assert_as_in_numpy(tx, directions)


def test_every_step_of_flora_is_that_of_numpy():
    """But for Adafactor's decay, which Optax computes in float32."""
    rule, threshold = of_paper("project", scale=1.0, inner=reference.Momentum), 0.9
    directions = directions_of(rule, "gaussian")
    for name, momentum in directions.items():
        factored = name != "bias"
        directions[name] = reference.adafactor(momentum, factored, threshold=threshold)
        directions[name] *= 0.5 if factored else 1
    tx = galore_optax.flora(
        learning_rate,
        b1=B1,
        min_dim_size_to_factor=4,
        clipping_threshold=threshold,
        scale=0.5,
        **COMMON,
        **SELDOM,
        **RANK,
    )
    assert_as_in_numpy(tx, directions, 1e-5)


class Muon:
    """Optax's Muon of one matrix, whose momentum the reference may move."""

    tx = optax.contrib.scale_by_muon(beta=B1, eps=EPS)
    update = staticmethod(jax.jit(tx.update))

    def __init__(self, rule, shape):
        self.state = self.tx.init(np.zeros(shape))

    @property
    def m(self):
        return np.asarray(self.state.mu)

    @m.setter
    def m(self, moment):
        self.state = self.state._replace(mu=moment)

    def __call__(self, r):
        direction, self.state = self.update(r, self.state)
        return np.asarray(direction)

    def keep(self, rounded):
        assert rounded is reference.exactly


def test_every_step_of_muon_is_that_of_optax_in_the_subspace():
    rule = of_paper("project", scale=1.0, inner=Muon)
    with jax.enable_x64(True):
        directions = {k: reference.of_matrices(rule, gradients()[k]) for k in SHAPES}
    for name, (*_, m, n) in SHAPES.items():
        directions[name] *= max(1, n / m) ** 0.5
    directions["bias"] = reference.of_vector(of_paper(), gradients()["bias"])
    tx = galore_optax.galore_muon(
        learning_rate,
        B1,
        eps=EPS,
        adam_b1=B1,
        adam_b2=B2,
        **COMMON,
        **SELDOM,
        **RANK,
    )
    assert_as_in_numpy(tx, directions)
