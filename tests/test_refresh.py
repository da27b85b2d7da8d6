"""When subspaces are chosen again, what that costs, and what survives a bad gradient."""

import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax

NUMBERS = galore_optax.DimensionNumbers(-2, -1)
# Matrices of a shape of their own in each leaf, by which the factorizations are told apart.
LAYOUTS = {"matrix": (6, 9), "stacked": (3, 10, 6), "two_batch_axes": (2, 2, 7, 8)}
STEPS = 12


def gap_of_schedule(step):
    return 2 if step < 4 else 3


def due_steps(gap, steps=STEPS):
    """The steps at which a refresh is due, from the gap that is read at each refresh."""
    due, found = 0, []
    for step in range(steps):
        if step == due:
            found.append(step)
            due += gap(step)
    return found


def gradients_of(shapes, seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def counting_svd():
    """`galore_optax.projectors.svd`, and a counter of the matrix shapes it was executed on."""
    executed = collections.Counter()

    def projector(matrix, rank):
        jax.debug.callback(functools.partial(executed.update, [tuple(sorted(matrix.shape))]))
        return galore_optax.projectors.svd(matrix, rank)

    return projector, executed


def galore_with_gap(kind, projector):
    make = functools.partial(
        galore_optax.galore_sgd,
        0.1,
        rank=2,
        projector=projector,
        weight_dimension_numbers=NUMBERS,
    )
    if kind == "constant":
        return make(update_proj_gap=5)
    if kind == "array":
        return make(update_proj_gap=jnp.asarray(5))
    if kind == "schedule":
        return make(update_proj_gap=lambda step: jnp.where(step < 4, 2, 3))
    # inject_hyperparams makes the gap a traced array and would take functions for schedules.
    static = ("rank", "projector", "weight_dimension_numbers", "exclude", "side")
    injected = optax.inject_hyperparams(galore_optax.galore_sgd, static_args=static)
    return injected(**make.keywords, learning_rate=0.1, update_proj_gap=5)


def state_after(tx, gradients):
    """The state after updates with these gradients, once all callbacks have run."""
    params = jax.tree.map(np.zeros_like, gradients[0])
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for gradient in gradients:
        _, state = update(gradient, state, params)
    jax.block_until_ready(state)
    jax.effects_barrier()
    return state


@functools.cache
def counted_run(kind):
    """The final state and the factorizations executed in STEPS steps."""
    projector, executed = counting_svd()
    tx = galore_with_gap(kind, projector)
    return state_after(tx, [gradients_of(LAYOUTS, step) for step in range(STEPS)]), executed


@pytest.mark.parametrize("kind", ["constant", "array", "schedule", "injected"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_factorizations_executed_are_the_refreshes_due(layout, kind):
    *batch, m, n = LAYOUTS[layout]
    _, executed = counted_run(kind)
    gap = gap_of_schedule if kind == "schedule" else lambda step: 5
    assert executed[min(m, n), max(m, n)] == int(np.prod(batch)) * len(due_steps(gap))


@pytest.mark.parametrize("kind", ["constant", "array", "schedule", "injected"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_counts_the_refreshes(layout, kind):
    state, _ = counted_run(kind)
    (galore_state,) = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, galore_optax.GaloreState))
        if isinstance(x, galore_optax.GaloreState)
    ]
    gap = gap_of_schedule if kind == "schedule" else lambda step: 5
    due = due_steps(gap)
    expected = np.full(LAYOUTS[layout][:-2], len(due))
    np.testing.assert_array_equal(galore_state.subspace.refreshes[layout], expected)
    next_due = due[-1] + gap(due[-1])
    np.testing.assert_array_equal(
        galore_state.subspace.due[layout], np.full_like(expected, next_due)
    )


def test_injected_gap_can_be_changed_between_steps():
    params = {"kernel": jnp.zeros((6, 9))}
    tx = optax.inject_hyperparams(galore_optax.galore_sgd, static_args=("rank",))(
        learning_rate=0.1, rank=2, update_proj_gap=100
    )
    state = tx.init(params)
    state.hyperparams["update_proj_gap"] = jnp.asarray(3.0)
    update = jax.jit(tx.update)
    for step in range(7):
        _, state = update(gradients_of({"kernel": (6, 9)}, step), state, params)
    assert optax.tree.get(state, "refreshes")["kernel"] == 3  # at steps 0, 3 and 6


def test_gap_that_grows_beyond_any_step_ends_the_refreshes():
    projector, executed = counting_svd()
    tx = galore_optax.galore_sgd(
        0.1,
        rank=2,
        projector=projector,
        update_proj_gap=lambda step: jnp.where(step < 2, 2, 2**31 - 1),
    )
    state_after(tx, [gradients_of({"kernel": (6, 9)}, step) for step in range(6)])
    assert executed[6, 9] == 2  # at steps 0 and 2


FACTORIZATION = re.compile("svd|gesdd|syev|eigh|qr|potrf|cholesky|triang", re.IGNORECASE)


def hlo_computations(text):
    """Of an HLO module: {computation: (factorizations, callees, callees that are branches)}."""
    computations, entry, name = {}, None, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[2]
            computations[name] = [0, set(), set()]
            entry = name if header[1] else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            operation = re.sub(r"metadata=\{[^}]*\}", "", line)
            target = re.search(r'custom_call_target="([^"]*)"', operation)
            computations[name][0] += bool(target and FACTORIZATION.search(target[1]))
            callees = set()
            for single, several in re.findall(r"\w+=(?:%([\w.-]+)|\{(%[^}]*)\})", operation):
                callees.update([single] if single else re.findall(r"%([\w.-]+)", several))
            computations[name][2 if " conditional(" in operation else 1].update(callees)
    return computations, entry


def factorizations_of_hlo(compiled):
    """(all, unconditional) factorizations in a compiled function."""
    computations, entry = hlo_computations(compiled.as_text())
    unconditional, pending = set(), [entry]
    while pending:
        name = pending.pop()
        if name not in unconditional:
            unconditional.add(name)
            pending.extend(computations[name][1])
    return (
        sum(calls for calls, _, _ in computations.values()),
        sum(computations[name][0] for name in unconditional),
    )


def factorizations_of_stablehlo(lowered):
    """The same before XLA's optimizations, in the functions and regions of StableHLO."""
    functions = {}
    calls = {True: 0, False: 0}

    def operations(operation):
        for region in operation.regions:
            for block in region.blocks:
                for child in block.operations:
                    yield child.operation

    def walk(operation, conditional, stack):
        for child in operations(operation):
            # Of one branch is what is chosen by the platform.
            chooses = child.name in ("stablehlo.case", "stablehlo.if") and len(child.regions) > 1
            inside = conditional or chooses
            if child.name == "stablehlo.custom_call":
                target = str(child.attributes["call_target_name"])
                calls[inside] += bool(FACTORIZATION.search(target))
            elif child.name == "func.call":
                callee = str(child.attributes["callee"]).lstrip("@")
                assert callee not in stack
                walk(functions[callee], inside, (*stack, callee))
            walk(child, inside, stack)

    for function in operations(lowered.compiler_ir("stablehlo").operation):
        functions[str(function.attributes["sym_name"]).strip('"')] = function
    walk(functions["main"], False, ("main",))
    return calls[True] + calls[False], calls[False]


@functools.cache
def lowered_update(projector):
    tx = galore_optax.galore_sgd(0.1, rank=2, projector=projector, weight_dimension_numbers=NUMBERS)
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in LAYOUTS.items()}
    return jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)


def test_temporaries_of_an_update_do_not_grow_with_the_number_of_leaves():
    def temporaries(leaves):
        params = {
            f"layer_{i}": jax.ShapeDtypeStruct((256, 512), jnp.float32) for i in range(leaves)
        }
        tx = galore_optax.galore_adamw(0.1, rank=32, weight_decay=0.1)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # All back-projections at once would take a whole matrix more for each leaf more.
    assert temporaries(12) - temporaries(4) < 4 * 256 * 512


@pytest.mark.parametrize("projector", ["svd", "eigh", "randomized_svd", "power_iteration"])
def test_compiled_update_factorizes_only_in_branches_of_conditionals(projector):
    calls, unconditional = factorizations_of_hlo(lowered_update(projector).compile())
    assert calls >= len(LAYOUTS)
    assert unconditional == 0


@pytest.mark.parametrize("projector", ["svd", "eigh", "randomized_svd", "power_iteration"])
def test_lowered_update_factorizes_only_in_branches_of_conditionals(projector):
    calls, unconditional = factorizations_of_stablehlo(lowered_update(projector))
    assert calls >= len(LAYOUTS)
    assert unconditional == 0


def refresh_by_select(due, gradients, old):
    """Of one matrix: computed in any case, then selected."""
    return jnp.where(due, galore_optax.projectors.svd(gradients, 2), old)


def refresh_by_vmap(due, gradients, old):
    """Of a stack: under vmap a conditional becomes a selection."""

    def one(due, gradient, old):
        return jax.lax.cond(due, lambda: galore_optax.projectors.svd(gradient, 2), lambda: old)

    return jax.vmap(one)(due, gradients, old)


def refresh_by_loop(due, gradients, old):
    """Of a stack: one after the other, and every one of them."""
    return jax.lax.map(lambda x: refresh_by_select(*x), (due, gradients, old))


@pytest.mark.parametrize(
    ("bad", "batch"), [(refresh_by_select, ()), (refresh_by_vmap, (3,)), (refresh_by_loop, (3,))]
)
@pytest.mark.since(jax="0.7")
def test_checkers_find_a_factorization_outside_of_conditionals(bad, batch):
    lowered = jax.jit(bad).lower(
        jax.ShapeDtypeStruct(batch, jnp.bool),
        jax.ShapeDtypeStruct((*batch, 6, 9), jnp.float32),
        jax.ShapeDtypeStruct((*batch, 6, 2), jnp.float32),
    )
    assert factorizations_of_stablehlo(lowered) == (1, 1)
    assert factorizations_of_hlo(lowered.compile()) == (1, 1)


GAP, RANK = 4, 2
SHAPES = {"matrix": (6, 9), "stacked": (3, 9, 6), "vector": (5,)}
MATRICES = ["matrix", "stacked"]
TX = galore_optax.galore_adamw(
    0.01, rank=RANK, update_proj_gap=GAP, weight_dimension_numbers=NUMBERS
)
B1 = 0.9


@functools.cache
def jitted_update():
    return jax.jit(TX.update)


@functools.cache
def first_state():
    return jax.jit(TX.init)(gradients_of(SHAPES, 0))


def run(gradients):
    """The states before, between and after updates with these gradients."""
    params = jax.tree.map(np.ones_like, gradients[0])
    states = [first_state()]
    for gradient in gradients:
        states.append(jitted_update()(gradient, states[-1], params)[1])
    return states


def good(count, first_seed=0):
    return [gradients_of(SHAPES, seed) for seed in range(first_seed, first_seed + count)]


def basis(state, name):
    """(basis,) of the one side of each matrix that is projected."""
    (found,) = jax.tree.leaves((state.subspace.left[name], state.subspace.right[name]))
    return np.asarray(found)


def assert_orthonormal(p):
    gram = np.swapaxes(p, -1, -2) @ p
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(RANK), gram.shape), atol=1e-5)


@pytest.mark.parametrize("name", MATRICES)
def test_basis_is_orthonormal_before_the_first_refresh(name):
    assert_orthonormal(basis(run(good(1))[0], name))


@pytest.mark.parametrize("name", MATRICES)
def test_ordinary_steps_leave_the_basis_bit_identical(name):
    bases = [basis(state, name) for state in run(good(2 * GAP))[1:]]
    for step in range(1, 2 * GAP):
        if step == GAP:
            assert not np.any(np.all(bases[step] == bases[step - 1], axis=(-2, -1)))
        else:
            np.testing.assert_array_equal(bases[step], bases[step - 1])


@pytest.mark.parametrize("name", MATRICES)
def test_basis_of_a_refresh_comes_from_the_gradient_of_that_step(name):
    gradients = good(GAP + 1)
    found = basis(run(gradients)[-1], name).reshape(-1, 6, RANK)  # 6: the short side
    matrices = np.asarray(gradients[GAP][name], np.float64).reshape(-1, *SHAPES[name][-2:])
    for p, g in zip(found, matrices, strict=True):
        u, _, vt = np.linalg.svd(g, full_matrices=False)
        leading = u[:, :RANK] if name == "matrix" else vt[:RANK].T
        np.testing.assert_allclose(p @ p.T, leading @ leading.T, atol=1e-4)


def test_moments_are_kept_across_a_refresh():
    gradients = good(GAP + 1)
    *_, before, after = run(gradients)
    p = basis(after, "matrix")
    assert np.abs(p - basis(before, "matrix")).max() > 1e-3
    old, new = (optax.tree.get(state, "mu")["matrix"] for state in (before, after))
    expected = B1 * np.asarray(old) + (1 - B1) * p.T @ np.asarray(gradients[GAP]["matrix"])
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)


def with_bad_value(gradients, name, value, index=...):
    bad = np.array(gradients[name])
    bad[index] = value
    return {**gradients, name: bad}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("zeros", [1, 2, 5])
def test_refresh_that_met_zeros_is_due_until_it_succeeds_and_keeps_the_grid(zeros, name):
    steps = 3 * GAP
    gradients = good(steps)
    for step in range(zeros):
        gradients[step] = with_bad_value(gradients[step], name, 0.0)
    states = run(gradients)
    refreshed = [
        step
        for step in range(steps)
        if np.all(states[step + 1].subspace.refreshes[name] > states[step].subspace.refreshes[name])
    ]
    assert refreshed == [zeros, *(step for step in (GAP, 2 * GAP) if step > zeros)]
    np.testing.assert_array_equal(states[zeros].subspace.refreshes[name], 0)
    np.testing.assert_array_equal(states[zeros].subspace.due[name], 0)
    np.testing.assert_array_equal(basis(states[zeros], name), basis(states[0], name))


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("index", [(..., 0, 0), ...], ids=["one_entry", "all_entries"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_gradient_at_a_refresh_keeps_the_basis_and_the_refresh_due(value, index, name):
    gradients = good(GAP + 2)
    gradients[GAP] = with_bad_value(gradients[GAP], name, value, index)
    *_, before, after, later = run(gradients)
    np.testing.assert_array_equal(basis(after, name), basis(before, name))
    np.testing.assert_array_equal(after.subspace.refreshes[name], 1)
    np.testing.assert_array_equal(after.subspace.due[name], GAP)
    assert_orthonormal(basis(later, name))
    np.testing.assert_array_equal(later.subspace.refreshes[name], 2)
    np.testing.assert_array_equal(later.subspace.due[name], 2 * GAP)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_bad_layer_of_a_stack_stays_alone(value):
    gradients = good(GAP + 2)
    gradients[GAP] = with_bad_value(gradients[GAP], "stacked", value, 1)
    *_, before, after, later = run(gradients)
    changed = np.any(basis(after, "stacked") != basis(before, "stacked"), axis=(-2, -1))
    np.testing.assert_array_equal(changed, [True, False, True])
    np.testing.assert_array_equal(after.subspace.refreshes["stacked"], [2, 1, 2])
    np.testing.assert_array_equal(after.subspace.due["stacked"], [2 * GAP, GAP, 2 * GAP])
    caught_up = np.any(basis(later, "stacked") != basis(after, "stacked"), axis=(-2, -1))
    np.testing.assert_array_equal(caught_up, [False, True, False])
    np.testing.assert_array_equal(later.subspace.due["stacked"], [2 * GAP] * 3)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_bad_layer_of_a_stack_is_not_factorized_until_it_is_good(value):
    projector, executed = counting_svd()
    tx = galore_optax.galore(
        optax.identity(), rank=2, projector=projector, weight_dimension_numbers=NUMBERS
    )
    gradients = {"stacked": gradients_of(SHAPES, 0)["stacked"]}
    state_after(tx, [with_bad_value(gradients, "stacked", value, 1), gradients, gradients])
    assert executed[6, 9] == 3


def test_bad_gradient_of_another_leaf_does_not_stop_a_refresh():
    gradients = with_bad_value(good(1)[0], "vector", np.nan)
    gradients = with_bad_value(gradients, "stacked", np.nan)
    state = run([gradients])[-1]
    assert state.subspace.refreshes["matrix"] == 1
    np.testing.assert_array_equal(state.subspace.refreshes["stacked"], 0)


@functools.cache
def jitted_projected_only():
    tx = galore_optax.galore(optax.sgd(0.1), rank=RANK, weight_dimension_numbers=NUMBERS)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_tree_of_projected_leaves_alone_survives_bad_gradients_from_the_start(value):
    shapes = {name: SHAPES[name] for name in MATRICES}
    tx, update = jitted_projected_only()
    params = jax.tree.map(np.ones_like, gradients_of(shapes, 0))
    state = tx.init(params)
    for _ in range(2):
        updates, state = update(
            jax.tree.map(lambda x: np.full_like(x, value), params), state, params
        )
    for name in shapes:
        assert np.all(np.isfinite(updates[name])) == (value == 0.0)
        assert_orthonormal(basis(state, name))
        np.testing.assert_array_equal(state.subspace.refreshes[name], 0)
    updates, state = update(gradients_of(shapes, 0), state, params)
    chex.assert_tree_all_finite((updates, state))
    for name in shapes:
        np.testing.assert_array_equal(state.subspace.refreshes[name], 1)


def test_projector_that_fails_leaves_the_basis_and_the_refresh_due():
    def failing(matrix, rank):
        return galore_optax.projectors.svd(matrix, rank) * jnp.nan

    params = {"kernel": jnp.ones((6, 9))}
    tx = galore_optax.galore(optax.identity(), rank=2, projector=failing)
    state = tx.init(params)
    _, after = jax.jit(tx.update)(gradients_of({"kernel": (6, 9)}, 0), state, params)
    chex.assert_trees_all_equal(after.subspace, state.subspace)
