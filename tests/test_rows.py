"""Whether rows are treated by themselves, by tracing, against what happens when one changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax._jaxpr import Use, use_of_rows

SAME, ROWS, ALL = Use.SAME, Use.ROWS, Use.ALL
N, A, B = 4, 3, 6
C = np.random.default_rng(0).normal(size=(N, A, B)).astype(np.float32)

# Of x (N, A, B), whose leading axis is one of rows, and c (N, A, B), which is constant.
CASES = {
    "argument": (lambda x, c: (x, c), (ROWS, ROWS)),
    "elementwise": (lambda x, c: jnp.sqrt(jnp.abs(x) + 1) * c - 2, ROWS),
    "select": (lambda x, c: jnp.where(c > 0, x, jnp.clip(x, -1, 1)), ROWS),
    "cast": (lambda x, c: x.astype(jnp.float16), ROWS),
    "no rows": (lambda x, c: (jnp.ones(3) * 2, jnp.float32(1) + 1), (SAME, SAME)),
    "numbers of each row": (lambda x, c: x * jnp.arange(N, dtype=x.dtype)[:, None, None], ALL),
    "one number for all rows": (lambda x, c: x * jnp.full((N, 1, 1), 2.0), ROWS),
    "random numbers": (lambda x, c: x + jax.random.normal(jax.random.key(0), x.shape), ALL),
    "shape only": (lambda x, c: jnp.zeros_like(x), SAME),
    "literal": (lambda x, c: (1.0, x + 1.0), (SAME, ROWS)),
    "sum of rows": (lambda x, c: x.sum((1, 2)), ROWS),
    "one of each": (lambda x, c: (x.sum(2), x.sum(0)), (ROWS, ALL)),
    "sum of all": (lambda x, c: x.sum(), ALL),
    "sum over rows": (lambda x, c: x.max(0), ALL),
    "sum kept": (lambda x, c: x / x.sum(-1, keepdims=True), ROWS),
    "sum of all kept": (lambda x, c: x / x.sum(keepdims=True), ALL),
    "argmax": (lambda x, c: (jnp.argmax(x, 1), jnp.argmax(x, 0)), (ROWS, ALL)),
    "any": (lambda x, c: ((x > 0).any(1), (x > 0).all()), (ROWS, ALL)),
    "spread within rows": (lambda x, c: x[:, :1] * c, ROWS),
    "spread over a new axis": (lambda x, c: x.sum(2)[:, :, None] + c, ROWS),
    "spread along other rows": (lambda x, c: jnp.broadcast_to(x, (2, N, A, B)), ALL),
    "sums of rows against columns": (lambda x, c: x.sum((1, 2))[None, :] + c[:, 0, :N], ALL),
    "split a row": (lambda x, c: x.reshape(N, A, 2, 3), ROWS),
    "flatten rows": (lambda x, c: x.reshape(N, -1), ROWS),
    "flatten all": (lambda x, c: x.reshape(-1), ALL),
    "split the leading axis": (lambda x, c: x.reshape(2, 2, A, B), ALL),
    "merge the leading axis": (lambda x, c: x.reshape(N * A, B), ALL),
    "transpose rows": (lambda x, c: x.transpose(0, 2, 1), ROWS),
    "transpose": (lambda x, c: x.T, ALL),
    "move away and back": (lambda x, c: jnp.moveaxis(jnp.moveaxis(x, 0, 1), 1, 0), ALL),
    "squeeze": (lambda x, c: (x[:, :1].squeeze(1), x[:1].squeeze(0)), (ROWS, ALL)),
    "concatenate": (
        lambda x, c: (jnp.concatenate([x, c], 2), jnp.concatenate([x, c], 0)),
        (ROWS, ALL),
    ),
    "slice": (lambda x, c: (x[:, 1:, ::2], x[:2], x[::2]), (ROWS, ALL, ALL)),
    "pad": (
        lambda x, c: (jnp.pad(x, ((0, 0), (0, 0), (1, 2))), jnp.pad(x, ((0, 1), (0, 0), (0, 0)))),
        (ROWS, ALL),
    ),
    "reverse": (lambda x, c: jnp.flip(x, 0), ALL),
    "jit": (jax.jit(lambda x, c: (x * c, x.sum(0), c)), (ROWS, ALL, ROWS)),
    "custom_jvp": (lambda x, c: jax.nn.silu(x) + jax.nn.relu(x), ROWS),
    "product": (lambda x, c: x @ c[0].T, ALL),
    "loop": (lambda x, c: jax.lax.fori_loop(0, 2, lambda _, y: y + 1, x), ALL),
    "scan": (lambda x, c: jax.lax.scan(lambda _, y: (None, 2 * y), None, x)[1], ALL),
    "cumulative": (lambda x, c: jnp.cumsum(x, 0), ALL),
    "reduction of one's own": (
        lambda x, c: jax.lax.reduce(x, np.float32(1), lambda a, b: a * b + b, (1,)),
        ALL,
    ),
    "after all": (lambda x, c: (x * x.sum()).sum(1), ALL),
}


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Use))


def start():
    return np.random.default_rng(1).normal(size=(N, A, B)).astype(np.float32)


@functools.cache
def results():
    """Of all cases by one program: as it is, and with each row changed."""
    compute = jax.jit(
        lambda x, c: {name: jax.tree.leaves(f(x, c)) for name, (f, _) in CASES.items()}
    )
    changed = [start() for _ in range(N)]
    for row, x in enumerate(changed):
        x[row] = C[row] + 5
    return [jax.tree.map(np.asarray, compute(x, C)) for x in (start(), *changed)]


@pytest.mark.parametrize("name", CASES)
def test_use_is_what_is_written(name):
    function, expected = CASES[name]
    shapes = [jax.ShapeDtypeStruct((N, A, B), jnp.float32)] * 2
    assert use_of_rows(function, *shapes, rows=[True, True]) == expected


@pytest.mark.parametrize("name", CASES)
def test_a_row_changes_nothing_but_itself(name):
    function, _ = CASES[name]
    uses = leaves(use_of_rows(function, start(), C, rows=[True, True]))
    before, *changed = (result[name] for result in results())
    for row, after in enumerate(changed):
        for use, a, b in zip(uses, before, after, strict=True):
            if use is ROWS:
                a, b = np.delete(a, row, 0), np.delete(b, row, 0)
            assert use is ALL or np.array_equal(a, b)


# Of what cuts numbers otherwise: whether it is of each slice of some rows, for any of them.
TOGETHER = {
    "blocks": (
        lambda x: x / jnp.repeat(jnp.abs(x.reshape(-1, 8)).max(1), 8).reshape(x.shape),
        True,
    ),
    "blocks, spread": (
        lambda x: (x.reshape(-1, 8) / jnp.abs(x.reshape(-1, 8)).max(1)[:, None]).reshape(x.shape),
        True,
    ),
    "flat": (lambda x: x.reshape(-1) * 2, True),
    "columns for rows": (lambda x: x.reshape(x.shape[1], x.shape[0]).reshape(x.shape), False),
    "one block": (lambda x: (x.reshape(1, -1) / x.reshape(1, -1).max(1)[:, None]).ravel(), False),
    "a share": (lambda x: x / x.shape[0], False),
    "all": (lambda x: x - x.reshape(-1).max(), False),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_count_together_may_be_cut_otherwise(name):
    function, by_slices = TOGETHER[name]
    x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    some, twice = (jax.ShapeDtypeStruct((n, 12), jnp.float32) for n in (4, 8))
    found = use_of_rows(function, some, rows=[True], twice=(twice,))
    assert (found is ROWS) is by_slices
    parts = np.concatenate([function(x[:4]), function(x[4:])])
    if by_slices:
        np.testing.assert_array_equal(parts, function(x))
    # Rows alone, which no other axis may be made of.
    assert use_of_rows(function, some, rows=[True]) is ALL or name == "a share"


def test_rows_of_several_arguments_are_the_same():
    both = use_of_rows(jnp.add, jnp.ones((3, 2)), jnp.ones((3, 2)), rows=[True, True])
    outer = use_of_rows(lambda a, b: a[:, None] + b, jnp.ones(3), jnp.ones(3), rows=[True, True])
    assert (both, outer) == (ROWS, ALL)


LARGE = {"min_size": 1, "block_size": 4}
TRANSFORMATIONS = {
    "sgd": (optax.sgd(0.1, momentum=0.9), True),
    "adamw": (optax.adamw(0.1, weight_decay=0.1), True),
    "lion": (optax.lion(0.1), True),
    "low_bit": (galore_optax.low_bit(optax.adam(0.1), **LARGE), True),
    "adamw_8bit": (galore_optax.adamw_8bit(0.1, **LARGE), True),
    "galore, not projected": (galore_optax.galore_adamw(0.1, rank=2, exclude="w"), True),
    "factored_rms, not factored": (optax.scale_by_factored_rms(min_dim_size_to_factor=99), True),
    "factored_rms": (optax.scale_by_factored_rms(min_dim_size_to_factor=2), False),
    "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=2), False),
    "lamb": (optax.lamb(0.1), False),
    "clip_by_block_rms": (optax.clip_by_block_rms(0.1), False),
    "galore": (galore_optax.galore_adamw(0.1, rank=2), False),
}


@pytest.mark.filterwarnings("ignore:galore projects nothing")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_updates_by_rows_are_those_of_each_row_by_itself(name):
    tx, by_rows = TRANSFORMATIONS[name]
    rng = np.random.default_rng(0)
    params, grads, more = ({"w": rng.normal(size=(6, 8)).astype(np.float32)} for _ in range(3))

    @jax.jit
    def two_steps(grads, more, params):
        _, state = tx.update(grads, tx.init(params), params)
        return state, tx.update(more, state, params)[0]

    state, _ = jax.eval_shape(two_steps, grads, more, params)
    has_rows = [x.shape[:1] == (6,) for x in jax.tree.leaves(state)]
    uses = use_of_rows(tx.update, more, state, params, rows=[True, *has_rows, True])
    wanted = [ROWS, *(ROWS if x else SAME for x in has_rows)]
    assert (leaves(uses) == wanted) is by_rows
    if by_rows:
        state, updates = jax.tree.map(np.asarray, two_steps(grads, more, params))
        structure, update = jax.tree.structure(state), jax.jit(tx.update)
        for i in range(6):
            own = [
                x[i : i + 1] if has else x for x, has in zip(leaves(state), has_rows, strict=True)
            ]
            row = jax.tree.map(lambda x, i=i: x[i : i + 1], (more, params))
            alone, _ = update(row[0], structure.unflatten(own), row[1])
            np.testing.assert_allclose(alone["w"][0], updates["w"][i], rtol=1e-5, atol=1e-7)
