"""Every transport and residual, step for step, against an implementation in NumPy of its own."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_family as reference
from family_runs import galore, run
from reference_family import Rule

STEPS, GAP, RANK = 50, 20, 3
SHAPES = {"tall": (11, 7), "wide": (7, 11), "square": (8, 8), "stack": (2, 7, 10)}
DEEPER = {"deep": (2, 2, 9, 6)}


@functools.cache
def gradients_of(shapes):
    """Gradients (STEPS, ...) that turn slowly, in noise, and whose norms come and go."""
    rng = np.random.default_rng(0)
    found = {}
    for name, shape in shapes:
        here, there, noise = (rng.normal(size=(n, *shape)) for n in (1, 1, STEPS))
        angle = np.linspace(0, np.pi / 2, STEPS).reshape(-1, *[1] * len(shape))
        size = np.exp(rng.normal(size=(STEPS, *shape[:-2], *[1] * len(shape[-2:]))))
        found[name] = size * (np.cos(angle) * here + np.sin(angle) * there + 0.5 * noise)
    return found


@functools.cache
def given_bases(size, orthonormal):
    """A basis for each refresh, of which nothing is known but that it was given."""
    bases = np.random.default_rng(size).normal(size=(math.ceil(STEPS / GAP), size, RANK))
    return np.linalg.qr(bases)[0] if orthonormal else bases / RANK**0.5


def given(orthonormal):
    """A projector that returns given bases: for the library, and for the reference."""

    def projector(matrix, rank, *, step):
        bases = jnp.asarray(given_bases(matrix.shape[0], orthonormal), matrix.dtype)
        return bases[step // GAP][:, :rank]

    def basis(choice):
        bases = given_bases(len(choice.matrix), orthonormal)
        return reference.with_signs(bases[choice.number][:, : choice.rank], choice.old)

    return projector, basis


RULES = {
    "keep": Rule(),
    "project": Rule("project"),
    "rotate": Rule("rotate"),
    "rotate with betas far apart": Rule("rotate", b1=0.5, b2=0.999),
    "reset": Rule("reset"),
    "reset with betas far apart": Rule("reset", b1=0.5, b2=0.999),
    "fira": Rule(residual="norm_scaled"),
    "fira with beta, unlimited": Rule(residual="norm_scaled", beta=0.3, gamma=None),
    "fira with rotate": Rule("rotate", "norm_scaled"),
    "fira with reset": Rule("reset", "norm_scaled", gamma=1.2),
    "fira as published": Rule(residual="norm_scaled", beta=4.0, subtract="scaled"),
    "apollo": Rule(residual="scale_gradient", scale=1.0),
    "apollo with project": Rule("project", "scale_gradient", gamma=1.2),
    "apollo, unlimited": Rule(residual="scale_gradient", gamma=None),
    "apollo mini": Rule(residual="scale_gradient", per="tensor", rank=1, scale=128**0.5),
    "frugal": Rule(residual="sign"),
    "frugal with reset": Rule("reset", "sign", beta=0.5),
    "error feedback": Rule(residual="error_feedback"),
    "error feedback with project": Rule("project", "error_feedback"),
    "error feedback with reset": Rule("reset", "error_feedback", b1=0.8),
    "ldadam": Rule("rotate", "error_feedback", scale=1.0, gap=1),
    "ldadam, seldom": Rule("rotate", "error_feedback", scale=1.0),
}
# These are tested as users call them, in test_family_presets.
AS_PRESETS = ("keep", "fira", "apollo", "apollo mini")
GIVEN = {
    "project": (Rule("project"), True),
    "rotate": (Rule("rotate"), True),
    "reset": (Rule("reset"), True),
    "fira with rotate": (Rule("rotate", "norm_scaled"), True),
    "apollo": (Rule(residual="scale_gradient"), False),
    "apollo with project": (Rule("project", "scale_gradient", per="tensor"), True),
    "frugal with project": (Rule("project", "sign"), True),
    "ldadam": (Rule("rotate", "error_feedback"), True),
}


def assert_same(found, expected, tolerance=1e-9):
    """Agreement to nine digits of the largest entry of every step's update, or to fewer."""
    assert found.shape == expected.shape
    assert found.dtype == np.float64
    axes = tuple(range(1, found.ndim))
    error, size = (np.abs(x).max(axes) for x in (found - expected, expected))
    assert np.all(error <= tolerance * size), error / size


def assert_as_in_numpy(rule, shapes=SHAPES, projector="svd"):
    gradients = gradients_of(tuple(shapes.items()))
    with jax.enable_x64(True):
        updates, _ = run(galore(rule, projector), gradients)
    for name, gradient in gradients.items():
        assert_same(updates[name], reference.of_matrices(rule, gradient))


@pytest.mark.parametrize("name", [name for name in RULES if name not in AS_PRESETS])
def test_every_step_is_that_of_numpy(name):
    assert_as_in_numpy(RULES[name])


@pytest.mark.parametrize("name", GIVEN)
def test_every_step_is_that_of_numpy_in_subspaces_that_are_given(name):
    rule, orthonormal = GIVEN[name]
    projector, basis = given(orthonormal)
    rule = reference.dataclasses.replace(rule, basis=basis)
    assert_as_in_numpy(rule, projector=projector)


@pytest.mark.parametrize("name", ["fira with rotate", "ldadam, seldom", "apollo mini"])
def test_matrices_of_a_stack_of_two_axes_are_on_their_own(name):
    assert_as_in_numpy(RULES[name], DEEPER)


@pytest.mark.parametrize("name", ["project", "rotate", "reset", "fira", "apollo", "ldadam"])
def test_gradients_of_zeros_choose_nothing_until_there_are_others(name):
    """At the beginning, and at the second refresh: both come later, and the third in time."""
    silent = np.ones(STEPS)
    silent[[0, 1, 2, GAP, GAP + 1]] = 0
    rule = reference.dataclasses.replace(RULES[name], gap=GAP)
    shapes = {"tall": SHAPES["tall"], "square": SHAPES["square"]}
    gradients = {
        k: silent[:, None, None] * g for k, g in gradients_of(tuple(shapes.items())).items()
    }
    with jax.enable_x64(True):
        updates, state = run(galore(rule), gradients)
    for name, gradient in gradients.items():
        assert_same(updates[name][3:], reference.of_matrices(rule, gradient)[3:])
        assert not updates[name][:3].any()
        assert state.subspace.refreshes[name] == 3


NEARLY = {
    "keep": ("project", {}),
    "project": ("rotate", {}),
    "reset": ("keep", {}),
    "fira": ("fira with beta, unlimited", {"beta": 1.0}),
    "fira as published": ("fira", {"beta": 4.0}),
    "apollo": ("apollo, unlimited", {"scale": 1.0}),
    "ldadam, seldom": ("error feedback", {"scale": 1.0}),
    "error feedback with project": ("error feedback", {}),
}


@pytest.mark.plain
@pytest.mark.parametrize("name", NEARLY)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_tell_rules_apart(name, shape):
    """Which would agree on gradients of a fixed subspace, say, or on ones that no limiter holds."""
    other, changes = NEARLY[name]
    gradients = gradients_of(tuple(SHAPES.items()))[shape]
    rules = RULES[name], reference.dataclasses.replace(RULES[other], **changes)
    found, unlike = (reference.of_matrices(rule, gradients) for rule in rules)
    assert np.abs(found - unlike).max() > 1e-2 * np.abs(found).max()
