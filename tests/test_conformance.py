"""What every Optax optimizer must do, asked of galore around various inner transformations.

The contract is that of Optax's own tests of its contributed optimizers, over matrices, stacked
matrices and tensors, in the containers that parameters come in.
"""

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, PartitionSpec

from galore_optax import (
    DEFAULT_EXCLUDE,
    DimensionNumbers,
    galore,
    galore_adafactor,
    galore_adamw,
)

ADAFACTOR = {"min_dim_size_to_factor": 2, "multiply_by_parameter_scale": False}
INNERS = {
    "adamw": optax.adamw,
    "adafactor": functools.partial(optax.adafactor, **ADAFACTOR),
    "lion": optax.lion,
    "sgd": functools.partial(optax.sgd, momentum=0.9),
    "lamb": optax.lamb,
}
MOMENTS = {
    "adamw": ("mu", "nu"),
    "adafactor": ("v_row", "v_col", "v"),
    "lion": ("mu",),
    "sgd": ("trace",),
    "lamb": ("mu", "nu"),
}
# Those of the others are the programs of galore around their optimizers: see test_presets.
PRESETS = {
    "galore_adamw": galore_adamw,
    "galore_adafactor": functools.partial(galore_adafactor, **ADAFACTOR),
}
LAMB = pytest.param(
    "lamb", marks=pytest.mark.filterwarnings("ignore:the inner transformation of galore uses")
)
INNER_NAMES = [LAMB if name == "lamb" else name for name in INNERS]
ALL_NAMES = [*INNER_NAMES, *PRESETS]
# A preset only forwards its arguments, so one matrix is enough for it, and it for one matrix.
MATRIX_NAMES = [LAMB, *PRESETS]


def optimizer(name, learning_rate, **options):
    if name in PRESETS:
        return PRESETS[name](learning_rate, **options)
    return galore(INNERS[name](learning_rate), **options)


MATRIX = {"bias": (6,), "kernel": (4, 6)}
SHAPES = {
    "attention": {"query": (4, 2, 3)},
    "dense": MATRIX,
    "embed": {"embedding": (7, 4)},
    "layers": {"bias": (3, 4), "kernel": (3, 5, 4)},
}
NUMBERS = {
    "attention/query": DimensionNumbers(0, (1, 2)),
    "layers/bias": DimensionNumbers(0, 1),
    "layers/kernel": DimensionNumbers(1, 2),
}


def path_of(path):
    return "/".join(key.key for key in path)


def numbers_of(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NUMBERS.get(path_of(path), DimensionNumbers()), params
    )


def normal(shapes, seed, dtype=jnp.float32):
    """A tree of arrays of the shapes, drawn from the seed."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape).astype(dtype)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


class Case(NamedTuple):
    """An optimizer, whose update is compiled once, and four steps of it: so two refreshes."""

    tx: optax.GradientTransformationExtraArgs
    update: Callable
    params: Any
    gradients: list
    updates: list
    states: list  # the first is that of init


def make_case(name, shapes):
    tx = optimizer(name, 1e-2, rank=2, update_proj_gap=2, weight_dimension_numbers=numbers_of)
    start = params = normal(shapes, 0)
    case = Case(tx, jax.jit(tx.update), start, [], [], [jax.jit(tx.init)(params)])
    for step in range(4):
        case.gradients.append(normal(shapes, 1 + step))
        updates, state = case.update(case.gradients[-1], case.states[-1], params)
        params = optax.apply_updates(params, updates)
        case.updates.append(updates)
        case.states.append(state)
    return case


@functools.cache
def matrix(name):
    """The optimizer over one matrix and its bias."""
    return make_case(name, MATRIX)


@functools.cache
def mixed(name):
    """The optimizer over all kinds of leaves, or a preset over one matrix."""
    return matrix(name) if name in PRESETS else make_case(name, SHAPES)


def compilations(caplog):
    """The XLA compilations logged so far."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "Finished XLA compilation" in message]


@pytest.mark.parametrize("name", ALL_NAMES)
def test_updates_have_shapes_and_dtypes_of_params(name):
    case = mixed(name)
    for updates in case.updates:
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, case.params)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_state_has_the_same_types_after_every_update(name):
    states = mixed(name).states
    types = jax.tree.map(jax.typeof, states[0])
    for state in states[1:]:
        assert jax.tree.map(jax.typeof, state) == types


@pytest.mark.parametrize("name", INNER_NAMES)
def test_matrices_stacks_and_tensors_are_projected_and_nothing_else(name):
    refreshes = mixed(name).states[-1].subspace.refreshes
    counts = {
        path_of(path): np.asarray(count).tolist()
        for path, count in jax.tree_util.tree_leaves_with_path(refreshes)
    }
    assert counts == {  # refreshed at steps 0 and 2, each layer of a stack by itself
        "attention/query": 2,
        "dense/kernel": 2,
        "layers/kernel": [2, 2, 2],
    }


@pytest.mark.parametrize("name", ALL_NAMES)
def test_later_steps_do_not_compile_again(name, caplog):
    case = mixed(name)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for state in case.states:  # due and not due, first and later
            case.update(case.gradients[0], state, case.params)
        assert not compilations(caplog)
        jax.jit(lambda x: x + 1)(case.states[0].step)
        assert compilations(caplog)  # what would have been seen


@pytest.mark.parametrize("name", ALL_NAMES)
def test_abstract_init_has_shapes_and_dtypes_of_the_state(name):
    case = mixed(name)
    shapes = jax.eval_shape(lambda: case.params)
    for abstract in (jax.eval_shape(case.tx.init, shapes), case.tx.init(shapes)):
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, case.states[0])


@pytest.mark.parametrize("name", ALL_NAMES)
def test_map_params_with_the_identity_changes_nothing(name):
    case = mixed(name)
    state = case.states[-1]
    chex.assert_trees_all_equal(optax.tree.map_params(case.tx, lambda x: x, state), state)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_map_params_pairs_every_part_of_the_state_with_its_parameter(name):
    case = mixed(name)
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: PartitionSpec(path_of(path)), case.params
    )
    marked = optax.tree.map_params(
        case.tx,
        lambda _, spec: spec,
        case.states[-1],
        specs,
        transform_non_params=lambda _: "not of a parameter",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    for field in marked.subspace:
        assert field == specs
    assert marked.step == "not of a parameter"
    for moment in MOMENTS[name.removeprefix("galore_")]:
        assert optax.tree.get(marked.inner, moment) == specs


@pytest.mark.parametrize("argument", ["weight_dimension_numbers", "exclude"])
def test_map_params_works_with_options_given_as_trees(argument):
    params = normal(SHAPES["dense"], 0)
    tree = {
        "weight_dimension_numbers": {"bias": None, "kernel": DimensionNumbers(1, 0)},
        "exclude": {"bias": True, "kernel": False},
    }[argument]
    tx = galore(optax.scale_by_adam(), rank=2, **{argument: tree})
    state = tx.init(params)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_extra_args_that_nothing_expects_are_ignored(name):
    case = mixed(name)
    arguments = case.gradients[0], case.states[0], case.params
    extra = jax.eval_shape(functools.partial(case.tx.update, unexpected=1.0), *arguments)
    assert extra == jax.eval_shape(case.tx.update, *arguments)


def test_extra_args_reach_the_inner_transformation():
    def update(updates, state, params=None, *, factor, **extra_args):
        assert extra_args.keys() == {"another"}
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = galore(inner, rank=2)
    params = normal(MATRIX, 0)

    @jax.jit
    def step(factor):
        return tx.update(params, tx.init(params), params, factor=factor, another=None)[0]

    chex.assert_trees_all_close(step(3.0), jax.tree.map(lambda u: 3.0 * u, step(1.0)), rtol=1e-6)


RATES = {"adamw": 0.5, "adafactor": 0.1, "lion": 0.1, "sgd": 0.3, "lamb": 0.3}
TARGETS = {
    "one_matrix": (3, 4),
    "mixed": {"layers_of_tensors": (2, 3, 2, 2), "vector": (3,)},
}


def target_numbers(params):
    return jax.tree.map(
        lambda x: DimensionNumbers() if x.ndim < 3 else DimensionNumbers(1, (2, 3)), params
    )


@pytest.mark.parametrize("name", [*INNER_NAMES, "galore_adamw"])
def test_converges_on_a_parabola_though_each_step_is_of_rank_one(name):
    """Only subspaces that sweep the space reach the minimum: full rank is 3."""
    shapes = TARGETS["one_matrix" if name in PRESETS else "mixed"]
    start, target, steps = normal(shapes, 0), normal(shapes, 1), 1000
    rate = optax.linear_schedule(RATES[name.removeprefix("galore_")], 0.0, steps)
    tx = optimizer(name, rate, rank=1, update_proj_gap=3, weight_dimension_numbers=target_numbers)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    chex.assert_trees_all_close(train(start), target, atol=1e-2)


STATIC = {
    "galore_adamw": ("rank",),
    "galore_adafactor": ("rank", "min_dim_size_to_factor"),
}


@functools.cache
def injected(name):
    """A preset with injected hyperparameters over one matrix, and its compiled ``update``."""
    options = {**PRESETS[name].keywords} if isinstance(PRESETS[name], functools.partial) else {}
    factory = getattr(PRESETS[name], "func", PRESETS[name])
    tx = optax.inject_hyperparams(factory, static_args=STATIC[name])(
        1e-2, rank=2, update_proj_gap=2, **options
    )
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("name", PRESETS)
def test_injected_hyperparams_give_the_same_updates(name):
    tx, update = injected(name)
    case = matrix(name)
    params, state = case.params, tx.init(case.params)
    for step, gradients in enumerate(case.gradients):
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(updates, case.updates[step], rtol=1e-5, atol=1e-8)
        chex.assert_trees_all_close(state.inner_state, case.states[step + 1], rtol=1e-5, atol=1e-6)


def test_galore_itself_can_have_its_hyperparams_injected():
    tx = optax.inject_hyperparams(galore, static_args=("inner", "rank"))(
        optax.sgd(1e-2), rank=2, scale=lambda count: 1.0 + count
    )
    params = normal(MATRIX, 0)
    state, update = tx.init(params), jax.jit(tx.update)
    first, state = update(params, state, params)
    second, state = update(params, state, params)
    chex.assert_trees_all_close(
        second, {"bias": first["bias"], "kernel": 2 * first["kernel"]}, rtol=1e-6
    )


def test_a_changed_injected_learning_rate_takes_effect():
    tx, update = injected("galore_adamw")
    params, gradients = normal(MATRIX, 0), normal(MATRIX, 1)
    state = tx.init(params)
    before, _ = update(gradients, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(3e-2)
    after, _ = update(gradients, state, params)
    chex.assert_trees_all_close(after, jax.tree.map(lambda u: 3 * u, before), rtol=1e-5)


def test_a_changed_injected_gap_takes_effect():
    tx, update = injected("galore_adamw")
    params = normal(MATRIX, 0)
    state, counts = tx.init(params), []
    for step in range(6):
        if step == 1:  # due at step 2 already, from then on at every step
            state.hyperparams["update_proj_gap"] = jnp.asarray(1)
        _, state = update(normal(MATRIX, step), state, params)
        counts.append(int(state.inner_state.subspace.refreshes["kernel"]))
    assert counts == [1, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", MATRIX_NAMES)
def test_multi_steps_is_an_update_on_the_mean_gradient(name):
    case = matrix(name)
    tx = optax.MultiSteps(case.tx, every_k_schedule=2)
    update, params, state = jax.jit(tx.update), case.params, tx.init(case.params)
    for step, mean in enumerate(case.gradients):
        half = normal(MATRIX, 100 + step)
        nothing, state = update(optax.tree.add(mean, half), state, params)
        updates, state = update(optax.tree.sub(mean, half), state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal(nothing, optax.tree.zeros_like(params))
        chex.assert_trees_all_close(updates, case.updates[step], rtol=1e-4, atol=1e-6)


def floating_dtypes(tree):
    return {x.dtype for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


DTYPES = ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize(
    ("name", "dtype", "gradient_dtype"),
    [
        *(("galore_adamw", *dtypes) for dtypes in itertools.product(DTYPES, DTYPES)),
        *((name, "bfloat16", "float32") for name in PRESETS if name != "galore_adamw"),
        pytest.param("lamb", "float32", "bfloat16", marks=LAMB.marks),
    ],
)
def test_updates_have_the_dtype_of_params_and_all_state_is_float32(name, dtype, gradient_dtype):
    tx = matrix(name).tx
    params, gradients = normal(MATRIX, 0, dtype), normal(MATRIX, 1, gradient_dtype)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, gradients, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
    assert floating_dtypes(state) == {jnp.dtype("float32")}


def test_updates_and_state_of_float64_params_are_float64():
    with jax.enable_x64(True):
        tx = galore_adamw(1e-2, rank=2)
        params = normal(MATRIX, 0, "float64")
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
        assert floating_dtypes((updates, state)) == {jnp.dtype("float64")}


def test_bfloat16_updates_are_those_of_float32_up_to_rounding():
    case = make_case("sgd", MATRIX)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (case.params, case.gradients[0]))
    updates, _ = jax.jit(case.tx.update)(narrow[1], case.tx.init(narrow[0]), narrow[0])
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), updates)
    largest = jnp.max(jnp.abs(case.updates[0]["kernel"]))
    chex.assert_trees_all_close(wide, case.updates[0], rtol=0, atol=0.02 * largest)


def test_count_in_the_state_is_that_of_the_inner_transformation():
    state = matrix("galore_adamw").states[-1]
    assert int(optax.tree.get(state, "count")) == int(state.step) == 4


# The model of all Flax containers below: an embedding, a hidden layer and an output layer.
VOCABULARY, WIDTH, HIDDEN, OUTPUT = 7, 4, 6, 5
TOKENS = np.arange(VOCABULARY)
LABELS = np.random.default_rng(0).standard_normal((VOCABULARY, OUTPUT)).astype(np.float32)
MODEL = {
    "embed": {"embedding": (VOCABULARY, WIDTH)},
    "hidden": {"bias": (HIDDEN,), "kernel": (WIDTH, HIDDEN)},
    "readout": {"bias": (OUTPUT,), "kernel": (HIDDEN, OUTPUT)},
}
RANKS = {"hidden/kernel": 2, "readout/kernel": 3}  # by path, which no container may change
STEPS = 4


def with_values_of_model(tree):
    """The tree with the values that all containers start from."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(normal(MODEL, 0)))


def squared_error(predictions):
    return jnp.mean((predictions - LABELS) ** 2)


def model_optimizer(rank=lambda path, shape: RANKS[path], exclude=DEFAULT_EXCLUDE):
    inner = optax.chain(
        optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.3)
    )
    return galore(inner, rank=rank, update_proj_gap=2, scale=1.0, exclude=exclude)


def dict_loss(params):
    hidden = params["embed"]["embedding"][TOKENS] @ params["hidden"]["kernel"]
    hidden = jnp.tanh(hidden + params["hidden"]["bias"])
    return squared_error(hidden @ params["readout"]["kernel"] + params["readout"]["bias"])


def train(loss, params, tx):
    """Parameters and state after some steps of plain Optax."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


@functools.cache
def trained():
    """What the same steps make of a dict: the leaves, in its order, and the state."""
    params, state = train(dict_loss, normal(MODEL, 0), model_optimizer())
    return jax.tree.leaves(params), state


def assert_trained(params):
    """The leaves, whatever holds them, are those of the dict."""
    chex.assert_trees_all_close(jax.tree.leaves(params), trained()[0], rtol=1e-5, atol=1e-5)


def assert_only_kernels_are_projected(state):
    """The embedding is left out by its path, whatever holds it."""
    subspace = optax.tree.get(state, "subspace")
    assert [x.shape for x in jax.tree.leaves(subspace.left)] == [(WIDTH, 2)]
    assert [x.shape for x in jax.tree.leaves(subspace.right)] == [(OUTPUT, 3)]


def test_params_in_a_dict():
    assert_only_kernels_are_projected(trained()[1])


def test_params_in_tuples_and_lists():
    def loss(params):
        (embedding,), [(bias, kernel), (out_bias, out_kernel)] = params
        return dict_loss(
            {
                "embed": {"embedding": embedding},
                "hidden": {"bias": bias, "kernel": kernel},
                "readout": {"bias": out_bias, "kernel": out_kernel},
            }
        )

    leaves = jax.tree.leaves(normal(MODEL, 0))
    params = (leaves[:1], [tuple(leaves[1:3]), tuple(leaves[3:])])
    ranks = {"1/0/1": 2, "1/1/1": 3}
    tx = model_optimizer(lambda path, shape: ranks[path], exclude="^0/0$")
    params, state = train(loss, params, tx)
    assert_trained(params)
    assert_only_kernels_are_projected(state)


class LinenModel(nn.Module):
    """The model, with its matrices in ``nn.Partitioned`` boxes if ``boxed``."""

    boxed: bool = False

    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.zeros
        if self.boxed:
            init = nn.with_partitioning(init, (None, "model"))
        x = nn.Embed(VOCABULARY, WIDTH, embedding_init=init, name="embed")(tokens)
        x = jnp.tanh(nn.Dense(HIDDEN, kernel_init=init, name="hidden")(x))
        return nn.Dense(OUTPUT, kernel_init=init, name="readout")(x)


@pytest.mark.parametrize("boxed", [False, True], ids=["arrays", "partitioned"])
def test_linen_train_state(boxed):
    model = LinenModel(boxed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    params = with_values_of_model(shapes)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=model_optimizer())

    @jax.jit
    def step(state):
        gradients = jax.grad(lambda p: squared_error(state.apply_fn({"params": p}, TOKENS)))(
            state.params
        )
        return state.apply_gradients(grads=gradients)

    for _ in range(STEPS):
        state = step(state)
    assert isinstance(state.params["hidden"]["kernel"], nn.Partitioned) == boxed
    assert_trained(state.params)
    assert_only_kernels_are_projected(state.opt_state)


class NnxModel(nnx.Module):
    """The model, with sharding metadata on the matrices if ``annotated``."""

    def __init__(self, annotated=False):
        init = nnx.initializers.zeros
        if annotated:
            init = nnx.with_partitioning(init, (None, "model"))
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, embedding_init=init, rngs=rngs)
        self.hidden = nnx.Linear(WIDTH, HIDDEN, kernel_init=init, rngs=rngs)
        self.readout = nnx.Linear(HIDDEN, OUTPUT, kernel_init=init, rngs=rngs)
        nnx.update(self, with_values_of_model(nnx.state(self, nnx.Param)))

    def __call__(self, tokens):
        return self.readout(jnp.tanh(self.hidden(self.embed(tokens))))


def train_nnx(model):
    """The ``nnx.Optimizer`` after some steps."""
    optimizer = nnx.Optimizer(model, model_optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: squared_error(model(TOKENS)))(model)
        optimizer.update(model, gradients)

    for _ in range(STEPS):
        step(model, optimizer)
    return optimizer


@pytest.mark.since(flax="0.11")
def test_nnx_optimizer():
    model = NnxModel()
    optimizer = train_nnx(model)
    assert_trained(nnx.state(model, nnx.Param))
    assert_only_kernels_are_projected(optimizer.opt_state)


def test_nnx_split_and_a_functional_step():
    graph, params = nnx.split(NnxModel(), nnx.Param)

    def loss(params):
        return squared_error(nnx.merge(graph, params)(TOKENS))

    params, state = train(loss, params, model_optimizer())
    assert_trained(params)
    assert_only_kernels_are_projected(state)


@pytest.mark.ci  # Of boxed parameters test_linen_train_state is enough before a commit.
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.since(flax="0.12.8")
def test_nnx_params_with_sharding_metadata(axis_type):
    """Flax applies a variable's metadata where it is made, that of optimizer state too."""
    mesh = jax.make_mesh((1,), ("model",), axis_types=(axis_type,))
    with jax.set_mesh(mesh), nnx.use_eager_sharding(True):
        model = NnxModel(annotated=True)
        optimizer = train_nnx(model)
    assert_trained(nnx.state(model, nnx.Param))
    assert_only_kernels_are_projected(optimizer.opt_state)


BOXED = {
    "linen": lambda: jax.eval_shape(LinenModel(True).init, jax.random.key(0), TOKENS)["params"],
    "nnx": lambda: nnx.state(nnx.eval_shape(NnxModel), nnx.Param),
}


@pytest.mark.parametrize("container", BOXED)
def test_map_params_works_on_the_state_of_boxed_params(container):
    tx = model_optimizer()
    state = tx.init(with_values_of_model(BOXED[container]()))
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)
