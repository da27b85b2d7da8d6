"""That states of other versions are refused with the remedy, and migrated by it."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax._state import VERSION

PARAMS = {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)}


@pytest.fixture(scope="module")
def run():
    """A transformation with galore inside a chain, and its state after two steps."""
    tx = optax.chain(optax.clip(1.0), galore_optax.galore_adamw(0.1, rank=2, update_proj_gap=3))
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(PARAMS, state, PARAMS)
    return tx, state


def test_the_state_says_its_version(run):
    _, state = run
    assert int(optax.tree.get(state, "version")) == VERSION == 2


def test_a_state_of_version_1_is_refused_and_goes_on_once_it_is_migrated(run):
    tx, state = run
    old = galore_optax.as_version(state, 1)
    expected = tx.update(PARAMS, state, PARAMS)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(TypeError, match="needs the GaloreState"):
            update(PARAMS, old, PARAMS)
        found = update(PARAMS, galore_optax.migrate(old), PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_without_a_version_is_refused_in_one_line(run, compiled):
    """What a NamedTuple that an earlier version pickled comes back as."""
    tx, state = run
    inner = galore_optax.GaloreState(*state[1][:4])
    update = jax.jit(tx.update) if compiled else tx.update
    with pytest.raises(ValueError, match=r"has version 1.* needs version 2: galore_optax.migrate"):
        update(PARAMS, (state[0], inner), PARAMS)
    found = update(PARAMS, galore_optax.migrate((state[0], inner)), PARAMS)
    expected = update(PARAMS, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_state_of_a_later_version_is_refused(run):
    tx, state = run
    later = (state[0], state[1]._replace(version=jnp.asarray(VERSION + 1, jnp.int32)))
    with pytest.raises(ValueError, match=r"version 3.* install the galore_optax that made it"):
        tx.update(PARAMS, later, PARAMS)
    with pytest.raises(ValueError, match=r"version 3.* install the galore_optax that made it"):
        galore_optax.migrate(later)


def test_migrating_what_needs_it_not_changes_nothing(run):
    _, state = run
    for tree in (state, optax.adam(0.1).init(PARAMS)):
        migrated = galore_optax.migrate(tree)
        assert jax.tree.structure(migrated) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, migrated, tree)
    assert jax.tree.structure(galore_optax.as_version(state, VERSION)) == jax.tree.structure(state)
    pickled = pickle.loads(pickle.dumps(state))
    assert jax.tree.structure(galore_optax.migrate(pickled)) == jax.tree.structure(state)


@pytest.mark.parametrize("version", [0, VERSION + 1, True])
def test_versions_that_do_not_exist(run, version):
    with pytest.raises(ValueError, match=f"version must be from 1 to 2; got {version!r}"):
        galore_optax.as_version(run[1], version)
