"""Transports and residuals with all else that galore can do, step for step against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_family as reference
from family_runs import bases_of, galore, run
from reference_family import Lazy, Rule
from test_family import GAP, SHAPES, assert_same, given, gradients_of

import galore_optax
from galore_optax.projectors import PROJECTORS

replace = reference.dataclasses.replace
SOME = ("stack", "tall")


def gradients(names=tuple(SHAPES)):
    return {name: gradients_of(tuple(SHAPES.items()))[name] for name in names}


def assert_as_in_numpy(rule, given=None, phases=None, **options):
    given = gradients(SOME) if given is None else given
    with jax.enable_x64(True):
        updates, state = run(galore(rule, **options), given)
        for name, gradient in given.items():
            expected = reference.of_matrices(rule, gradient, phases and phases[name])
            assert_same(updates[name], expected)
    return state


# Each transport and each residual; on two sides those that are for two.
ONE_SIDE = {
    "fira with rotate": Rule("rotate", "norm_scaled"),
    "apollo with project": Rule("project", "scale_gradient"),
    "frugal": Rule("reset", "sign"),
    "ldadam": Rule("rotate", "error_feedback"),
}
TWO_SIDES = {
    "galore": Rule(),
    "apollo mini with project": Rule("project", "scale_gradient", per="tensor"),
    "frugal with rotate": Rule("rotate", "sign"),
    "error feedback with reset": Rule("reset", "error_feedback"),
}


@pytest.mark.parametrize(
    ("name", "side"), [*((name, "long") for name in ONE_SIDE), ("fira with rotate", "right")]
)
def test_sides(name, side):
    rule = replace(ONE_SIDE[name], side=side)
    assert_as_in_numpy(rule, gradients(("square", "tall", "wide")))


@pytest.mark.parametrize("name", TWO_SIDES)
def test_both_sides(name):
    """In subspaces that are given: in those of the singular vectors R would be diagonal."""
    projector, basis = given(orthonormal=True)
    rule = replace(TWO_SIDES[name], side="both", basis=basis)
    assert_as_in_numpy(rule, projector=projector)


def kept_in_8_bits(moment, kind):
    """What low_bit keeps of a moment of one matrix."""
    quantized = galore_optax.quantize(jnp.asarray(moment), kind, keep_positive=kind == "unsigned")
    return np.asarray(quantized.dequantize())


@pytest.mark.parametrize("name", ONE_SIDE)
def test_staggered_and_lazy_refreshes_of_moments_in_eight_bits(name):
    """Moments are rounded after each step, and again where a refresh moves them.

    Those of one column, or row, have no code that is small enough, but for the second ones 0.
    """
    tiny = {name: gradient.copy() for name, gradient in gradients(SOME).items()}
    tiny["stack"][..., 0] *= 1e-5
    tiny["tall"][:, 0] *= 1e-5
    rule = replace(ONE_SIDE[name], gap=5, lazy=Lazy(0.3, 2), rounded=kept_in_8_bits)
    # The refreshes of three matrices, in the order of their paths.
    phases = {"stack": [0, 5 // 3], "tall": [10 // 3]}
    adam = optax.scale_by_adam(rule.b1, rule.b2, rule.eps)
    inner = galore_optax.low_bit(adam, min_size=0, stacked=lambda _, shape: len(shape) - 2)
    state = assert_as_in_numpy(rule, tiny, phases, inner=inner, stagger=True)
    gaps = np.concatenate([x.ravel() for x in state.subspace.gaps.values()])
    # What is fed back lies outside of the old subspace, so that none stands still.
    assert (len(set(gaps)) == 1) == (rule.residual == "error_feedback")


# For each leaf what is to be done with it; the same with every projector.
OF_LEAVES = {
    "tall": Rule("project", "norm_scaled"),
    "wide": Rule("keep", "scale_gradient"),
    "stack": Rule("project", "sign"),
}
# But for those with which all others are compared, and LDAdam's, which looks at the moments.
HELD = [(name, None) for name in PROJECTORS if name not in ("svd", "eigh", "momentum_iteration")]


@pytest.mark.parametrize(("projector", "dtype"), [*HELD, ("svd", "int4")])
def test_residuals_with_every_projector(projector, dtype):
    """In the subspaces that it chooses, whichever these are, and however they are held."""
    options = {"projector": projector, "projector_dtype": dtype, "seed": 3}
    # Moments turn with a basis that was not rounded yet.
    rules = {k: replace(v, transport="keep") if dtype else v for k, v in OF_LEAVES.items()}
    tx = optax.partition(
        {name: galore(rule, **options) for name, rule in rules.items()},
        lambda params: {name: name for name in params},
    )
    with jax.enable_x64(True):
        updates, _ = run(tx, gradients(OF_LEAVES))
        bases = bases_of(gradients(OF_LEAVES), rank=3, update_proj_gap=GAP, **options)
    for name, gradient in gradients(OF_LEAVES).items():
        rule = rules[name].with_bases(bases[name][:, ::GAP])
        # Codes are read in float32, with other rounding errors in another program.
        tolerance = 1e-6 if dtype else 1e-9
        assert_same(updates[name], reference.of_matrices(rule, gradient), tolerance)


@pytest.mark.parametrize("name", ["rotate", "reset"])
def test_gradients_that_are_averaged_in_the_subspace(name):
    """The first of each step chooses the subspace, if that is due, and moments move then."""
    assert_as_in_numpy(Rule(name, gap=8, gradients_per_step=2))
