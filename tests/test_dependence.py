"""What an output depends on, by tracing, against what changes it when it is run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax._jaxpr import dependence


def branch(x, y, z):
    return jax.lax.cond(x[0] > 0, lambda y, z: (y, z), lambda y, z: (-y, y), y, z)


def switch(x, y, z):
    index = jnp.int32(jnp.abs(x[0])) % 3
    return jax.lax.switch(index, [lambda y: y, lambda y: 2 * y, lambda y: -y], y), z


def loop(x, y, z):
    return jax.lax.fori_loop(0, 2, lambda _, carry: (carry[0] + 1, carry[1] * 2), (x, y)), z


def scan(x, y, z):
    # The second result is the one before it: all that it depends on shows in a later turn only.
    return jax.lax.scan(lambda carry, _: ((z, carry[0]), None), (x, y), length=3)[0]


def while_loop(x, y, z):
    return jax.lax.while_loop(lambda c: c[0][0] < 0, lambda c: (c[0] + 9, c[1] + 1), (x, y)), z


@jax.custom_jvp
def custom_jvp(x, y):
    return x * 2, y


custom_jvp.defjvp(lambda primals, tangents: (custom_jvp(*primals), custom_jvp(*tangents)))


@jax.custom_vjp
def custom_vjp(x, y):
    return x * 2, y


custom_vjp.defvjp(lambda x, y: (custom_vjp(x, y), None), lambda _, g: g)


def last(x, y):
    # Applied to the entries of x one after the other: that it takes either is no call.
    return jax.lax.reduce(x, y[0], lambda a, b: b, (0,)), jax.lax.reduce(
        x, y[0], lambda a, b: a, (0,)
    )


X, Y, Z = range(3)
CASES = {
    "argument": (lambda x, y, z: (x, z), ({X}, {Z})),
    "constant": (lambda x, y, z: (jnp.ones(2), 3.0), (set(), set())),
    "literal": (lambda x, y, z: (2.0 * x, jnp.float32(1) + 0 * z), ({X}, {Z})),
    "sum": (lambda x, y, z: x + y.sum(), {X, Y}),
    "not used": (lambda x, y, z: (x + y, jnp.shape(z)[0] * y), ({X, Y}, {Y})),
    "shape only": (lambda x, y, z: jnp.zeros_like(x) + y, {Y}),
    "jit": (jax.jit(lambda x, y, z: (x, y * z, 1.0)), ({X}, {Y, Z}, set())),
    "nested jit": (
        jax.jit(lambda x, y, z: (jax.jit(jnp.add)(x, y), jax.jit(jnp.sin)(z))),
        ({X, Y}, {Z}),
    ),
    "checkpoint": (jax.checkpoint(lambda x, y, z: (x * y, z)), ({X, Y}, {Z})),
    "custom_jvp": (lambda x, y, z: (*custom_jvp(x, y), z), ({X}, {Y}, {Z})),
    "custom_vjp": (lambda x, y, z: (*custom_vjp(x, y), z), ({X}, {Y}, {Z})),
    "vmap": (lambda x, y, z: jax.vmap(lambda a, b: (a * 2, b))(x, z), ({X}, {Z})),
    "gradient": (lambda x, y, z: jax.grad(lambda a: jnp.sum(a * y + z))(x), {Y}),
    "cond": (branch, ({X, Y}, {X, Y, Z})),
    "switch": (switch, ({X, Y}, {Z})),
    "jit in cond": (lambda x, y, z: jax.jit(branch)(x, y, z), ({X, Y}, {X, Y, Z})),
    "where": (lambda x, y, z: jnp.where(x > 0, y, z), {X, Y, Z}),
    "loop": (loop, (({X, Y}, {X, Y}), {Z})),
    "scan": (scan, ({X, Y, Z}, {X, Y, Z})),
    "while": (while_loop, (({X, Y}, {X, Y}), {Z})),
    "reduce": (lambda x, y, z: (last(x, y), z), (({X, Y}, {X, Y}), {Z})),
    "product": (lambda x, y, z: (jnp.outer(x, y), z), ({X, Y}, {Z})),
}


def arguments():
    return [jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(3, 2))]


@pytest.mark.parametrize("name", CASES)
def test_dependence_is_what_is_written(name):
    function, expected = CASES[name]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments())
    assert dependence(function, *shapes) == expected


@pytest.mark.parametrize("name", CASES)
def test_nothing_else_changes_an_output(name):
    function, _ = CASES[name]
    args, rng = arguments(), np.random.default_rng(1)
    found = jax.tree.leaves(dependence(function, *args), is_leaf=lambda x: isinstance(x, frozenset))
    run = jax.jit(function)
    outputs = jax.tree.leaves(run(*args))
    for _ in range(20):
        for i in range(3):
            other = list(args)
            other[i] = jnp.asarray(rng.normal(size=2))
            for a, b, depends in zip(outputs, jax.tree.leaves(run(*other)), found, strict=True):
                assert i in depends or np.array_equal(a, b)


def test_leaves_of_trees_are_numbered_in_their_order():
    args = {"b": jnp.ones(2), "a": (jnp.ones(3), jnp.ones(4))}, [jnp.ones(5)]
    found = dependence(lambda p, q: {"sum": p["b"].sum() + q[0], "pair": p["a"]}, *args)
    assert found == {"sum": {2, 3}, "pair": ({0}, {1})}


def test_each_update_of_adam_depends_on_its_gradient_and_a_clipped_one_on_all():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    clipped = optax.clip_by_global_norm(1.0)
    for tx, expected in ((optax.adam(0.1), [{0}, {1}]), (clipped, [{0, 1}, {0, 1}])):
        updates, _ = dependence(tx.update, params, tx.init(params))
        # Beside the gradients, 0 and 1, there are the leaves of the state.
        assert [updates[name] & {0, 1} for name in ("a", "b")] == expected
