"""The update inside the backward pass against the ordinary one: same numbers, less memory."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from examples.flax_llama import optimizers
from examples.flax_llama.config import Config
from tests import layerwise_model as model

STEPS, GAP = 10, 4  # refreshes at 0, 4 and 8.


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def galore(inner=None, **arguments):
    settings = {"rank": 4, "update_proj_gap": GAP, "weight_dimension_numbers": model.numbers}
    return galore_optax.galore(inner or optax.adamw(0.01, weight_decay=0.1), **settings | arguments)


# One transformation for all claims that any would do for, and one program of each step with it.
GALORE = galore()
GRADIENT = jax.jit(galore_optax.value_and_grad(model.loss))


@functools.cache
def layerwise_step(tx, **arguments):
    return jax.jit(model.layerwise(tx, **arguments).step)


@functools.cache
def ordinary_step(tx):
    """The gradient, the mean of those of micro-batches where there are several, then the update."""

    @jax.jit
    def update(gradients, params, state, key):
        gradient = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
        updates, state = tx.update(gradient, state, params)
        norms = {"grad_norm": model.norm(gradient), "update_norm": model.norm(updates)}
        return galore_optax.apply_updates(params, updates, key), state, norms

    def step(params, state, tokens, key):
        batches = [tokens] if tokens.ndim == 2 else list(tokens)
        losses, gradients = zip(*(GRADIENT(params, batch) for batch in batches), strict=True)
        params, state, norms = update(gradients, params, state, key)
        return params, state, {"loss": sum(losses) / len(losses)} | norms

    return step


def train(step, params, state, tokens):
    metrics = []
    for i, batch in enumerate(tokens):
        params, state, new = step(params, state, batch, jax.random.key(i))
        metrics.append({name: float(x) for name, x in new.items()})
    return params, state, metrics


def both(tx, layerwise_tx=None, params=None, steps=STEPS, micro_batches=1, **arguments):
    """Parameters, state and metrics of the layerwise and of the ordinary training."""
    params = model.init() if params is None else params
    tokens = model.batches(steps, micro_batches)
    state = jax.jit(tx.init)(params)
    expected = train(ordinary_step(tx), params, state, tokens)
    if layerwise_tx is not None:
        state = jax.jit(layerwise_tx.init)(params)
    step = layerwise_step(layerwise_tx or tx, micro_batches=micro_batches, **arguments)
    return train(step, params, state, tokens), expected


def assert_close(found, expected, tolerance=1e-9):
    def check(path, a, b):
        a, b = np.ravel(a), np.ravel(b)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= tolerance, (jax.tree_util.keystr(path), error)

    jax.tree.map_with_path(check, found, expected)


def assert_all_close(found, expected):
    """Parameters, states and metrics."""
    assert_close(found[0], expected[0])
    chex.assert_trees_all_close(found[1], expected[1], rtol=1e-6, atol=1e-9)
    for one, right in zip(found[2], expected[2], strict=True):
        assert one == pytest.approx(right, rel=1e-9)


def of_the_application(name, **more):
    shape = {"hidden": model.D, "intermediate": model.F, "layers": model.LAYERS, "heads": 2}
    training = {"rank": 4, "update_proj_gap": GAP, "steps": STEPS, "clip": 0.0, "lr": 0.01}
    config = Config(optimizer=name, **shape | training | more).resolve()
    return optimizers.make_optimizer(config)


# By the leaves that each of them updates in one training, which is one program. Names are of leaves
# or of what they are in.
TOGETHER = [
    {
        "up": ("galore_adamw", {"projector": "eigh", "refresh": "lazy"}),
        "down": ("tracked_adamw", {}),
        "rest": ("adamw", {}),
    },
    {
        "up": ("galore_lion", {}),
        "down": ("galore_sgd", {}),
        "embed": ("adamw_8bit", {"tables": "factored"}),
        "rest": ("lion", {}),
    },
    {
        "up": ("galore_adafactor", {"projector": "rows"}),
        "rest": ("adafactor", {}),
    },
    {
        "up": ("fira_adamw", {"transport": "rotate", "stagger": True}),
        "down": ("apollo_adamw", {}),
        "mix": ("galore_muon", {}),
        "rest": ("sgd", {}),
    },
    {
        "up": ("ldadamw", {"residual": "error_feedback"}),
        "down": ("apollo_mini_adamw", {}),
        "mix": ("dct_adamw", {}),
        "rest": ("sgd", {}),
    },
    {
        "up": ("frugal_adamw", {"stagger": True}),
        "down": ("grass_adamw", {"projector": "sampled_rows"}),
        "rest": ("flora", {}),
    },
]


# Of those that a contributor waits for, one refreshes lazily, and one moves its moments.
CASES = [
    pytest.param(together, marks=[pytest.mark.ci] * (i not in (0, 3)))
    for i, together in enumerate(TOGETHER)
]


@pytest.mark.parametrize("together", CASES)
def test_every_optimizer_of_the_application_is_that_of_the_ordinary_step(together):
    more = {"weight_decay": 0.1, "momentum": 0.9}
    transformations = {
        leaf: of_the_application(name, **more | settings)
        for leaf, (name, settings) in together.items()
    }
    assert_all_close(*both(model.partition(**transformations)))


def test_no_optimizer_of_the_application_is_left_out():
    tried = {name for together in TOGETHER for name, _ in together.values()} | {*LOW_BIT}
    # What is beside kernels is AdamW's, and not updated layer by layer.
    every = {*optimizers.OPTIMIZERS} - {*optimizers.WITH_ADAPTER}
    assert tried <= every
    # Others are one of these with 8-bit moments, as galore_adamw_8bit is galore_adamw.
    assert {name.removesuffix("_8bit") for name in every - tried} <= tried


MOMENTUM = optax.sgd(0.1, momentum=0.9)
RANDOM = galore(MOMENTUM, projector="gaussian", stagger=True, seed=3)
BOTH_SIDES = galore(MOMENTUM, projector="power_iteration", side="both")


@pytest.mark.parametrize(
    "tx",
    [RANDOM, BOTH_SIDES, optax.MultiSteps(RANDOM, 2)],
    ids=["random, in turns", "both sides", "of several gradients"],
)
def test_subspaces_are_those_of_the_ordinary_step(tx):
    assert_all_close(*both(tx))


# What trains as the other does, but for what is rounded at random.
LOW_BIT = ["adamw_8bit", "galore_adamw_8bit", "q_galore_adamw"]


@pytest.fixture(scope="module")
def low_bit():
    """A transformation with its state in 8 bits, what starts, some weights in 8 bits, its end."""
    steps, more = 30, {"hidden": 64, "intermediate": 64, "lr": 0.02, "projector": "power_iteration"}
    q_galore, plain, in_galore = (
        of_the_application(name, **more | {"steps": steps})
        for name in ("q_galore_adamw", "adamw_8bit", "galore_adamw_8bit")
    )
    tx = model.partition(mix=plain, down=in_galore, rest=q_galore)
    params = jax.tree.map(lambda x: x / 3, model.init(jnp.float32, d=64, f=64))
    up = {"up": params["blocks"]["up"]}
    params["blocks"] |= galore_optax.quantize_params(
        up, rank=4, weight_dimension_numbers={"up": {"kernel": galore_optax.DimensionNumbers(1, 2)}}
    )
    start = params, jax.jit(tx.init)(params), model.batches(steps)
    return tx, start, train(layerwise_step(tx), *start)


def test_low_bit_state_trains_to_the_loss_of_the_ordinary_step(low_bit):
    tx, start, (found, _, metrics) = low_bit
    expected, _, _ = train(ordinary_step(tx), *start)
    held_out = model.batches(1, shape=(16, 16))[0]
    losses = [float(model.loss(x, held_out)) for x in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    # Each parameter is where the ordinary one is, as far as rounding at random lets it.
    assert_close(*map(galore_optax.dequantize_params, (found, expected)), tolerance=0.1)


def test_two_runs_are_equal_to_the_last_bit(low_bit):
    tx, (params, state, tokens), (*_, metrics) = low_bit
    runs = [train(layerwise_step(tx), params, state, tokens[:5]) for _ in range(2)]
    chex.assert_trees_all_equal(*runs)
    assert runs[0][2] == metrics[:5]
    # As are two programs of one step, made one after the other.
    arguments = params, state, tokens[0], jax.random.key(0)
    texts = [jax.jit(model.layerwise(tx).step).lower(*arguments).as_text() for _ in range(2)]
    assert texts[0] == texts[1]


def test_one_layer_is_enough_with_a_tied_embedding_that_gets_both_of_its_gradients():
    assert_all_close(*both(GALORE, params=model.init(tied=True, layers=1)))


def test_integers_in_what_layers_hand_on_say_which_layer_and_which_tokens():
    """A layer's number and a mask of the batch: with the global norm clipped, and micro-batches."""

    def embed(params, tokens):
        return {"x": model.embed(params, tokens), "layer": jnp.int32(0), "tokens": tokens}

    def block(params, inputs):
        new = model.block(params, inputs["x"]) - inputs["x"]
        counts = (inputs["tokens"] + inputs["layer"]) % 3 > 0
        x = inputs["x"] + (1 + inputs["layer"]) * counts[..., None] * new
        return inputs | {"x": x, "layer": inputs["layer"] + 1}

    def head_loss(params, outputs, tokens):
        return model.head_loss(params, outputs["x"], tokens) + 0 * outputs["layer"]

    def loss(params, tokens):
        rest = {name: x for name, x in params.items() if name != "blocks"}
        inputs = embed(rest, tokens)
        for i in range(model.LAYERS):
            inputs = block(jax.tree.map(lambda x, i=i: x[i], params["blocks"]), inputs)
        return head_loss(rest, inputs, tokens)

    params, tokens, tx = model.init(), model.batches(1, 2)[0], optax.sgd(1.0)
    training = galore_optax.layerwise(
        tx, embed=embed, block=block, head_loss=head_loss, micro_batches=2, clip_norm=0.1
    )
    new, _, metrics = jax.jit(training.step)(params, training.init(params), tokens, None)
    expected, gradient = jax.jit(
        jax.value_and_grad(lambda p: (loss(p, tokens[0]) + loss(p, tokens[1])) / 2)
    )(params)
    norm = model.norm(gradient)
    assert float(norm) > 0.1
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-9)
    right = jax.tree.map(lambda p, g: p - 0.1 * g / norm, params, gradient)
    assert_close(new, right)


def is_stacked(params):
    return jax.tree.map(lambda x: x.ndim > 2, params)


def label(params):
    return jax.tree.map(lambda x: "adam" if x else "sgd", is_stacked(params))


def test_masks_and_labels_are_functions_or_trees():
    params = model.init()
    moments = {"adam": optax.scale_by_adam(), "sgd": optax.identity()}
    rates = {"adam": optax.scale(-0.01), "sgd": optax.scale(-0.1)}
    tx = optax.chain(
        optax.partition(moments, label),
        optax.add_decayed_weights(0.3, is_stacked),
        optax.masked(optax.scale(0.5), is_stacked(params)),
        optax.partition(rates, label(params)),
    )
    assert_all_close(*both(tx, params=params, steps=3))


def test_two_seeds_train_under_vmap_as_each_by_itself():
    tokens, init = model.batches(3), jax.jit(RANDOM.init)
    seeds = model.init(), jax.tree.map(lambda x: x * 1.1, model.init())
    alone = [train(layerwise_step(RANDOM), p, init(p), tokens)[0] for p in seeds]
    params = jax.tree.map(lambda *x: np.stack(x), *seeds)
    state = jax.jit(jax.vmap(RANDOM.init))(params)
    step = jax.jit(jax.vmap(model.layerwise(RANDOM).step, in_axes=(0, 0, None, None)))
    for one in tokens:
        params, state, _ = step(params, state, one, None)
    assert_close(params, jax.tree.map(lambda *x: np.stack(x), *alone))


def test_micro_batches_average_a_layer_at_a_time():
    assert_all_close(*both(MOMENTUM, micro_batches=4, steps=5))


@pytest.fixture(scope="module")
def at_rank():
    """Averaging at rank r and averaging before, and a step that does the former."""
    tx = galore(MOMENTUM, accumulation_steps=4)
    runs = both(galore(MOMENTUM), tx, params=model.init(tied=True), micro_batches=4)
    return *runs, layerwise_step(tx, micro_batches=4)


def test_micro_batches_average_at_rank_r_where_galore_does(at_rank):
    found, expected, _ = at_rank
    assert_close(found[0], expected[0])
    for one, right in zip(found[2], expected[2], strict=True):
        assert one["loss"] == pytest.approx(right["loss"])
        assert one["update_norm"] == pytest.approx(right["update_norm"])
        # Of single micro-batches, but for the steps with a refresh.
        assert one["grad_norm"] >= right["grad_norm"] * (1 - 1e-12)


def test_a_step_that_was_begun_elsewhere_is_begun_again(at_rank):
    (params, state, _), _, step = at_rank
    # As if one micro-batch had been added, each of its gradients 1.
    begun = state._replace(accumulator=jax.tree.map(jnp.ones_like, state.accumulator))
    assert int(begun.accumulator.count) == 1
    (tokens,) = model.batches(1, 4)
    results = [step(params, s, tokens, jax.random.key(1)) for s in (begun, state)]
    chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize(
    ("tx", "micro_batches"), [(MOMENTUM, 1), (RANDOM, 3)], ids=["whole", "micro-batches"]
)
def test_the_global_norm_is_clipped_as_by_optax(tx, micro_batches):
    limit = 2.2
    clipped = optax.chain(optax.clip_by_global_norm(limit), tx)
    found, expected = both(clipped, tx, micro_batches=micro_batches, clip_norm=limit)
    norms = [x["grad_norm"] for x in expected[2]]
    assert min(norms) < limit < max(norms)
    assert_all_close((found[0], (optax.EmptyState(), found[1]), found[2]), expected)


@pytest.fixture(scope="module")
def clipped_by_layer():
    """Of a step along gradients that are clipped, of parameters in no order of their names."""
    params = collections.OrderedDict(reversed(model.init().items()))
    tx = optax.sgd(1.0)
    step = layerwise_step(tx, clip_norm=0.05, clip_by="layer")
    new, _, _ = step(params, tx.init(params), model.batches(1)[0], None)
    return params, new


def test_each_layer_can_be_clipped_by_its_own_norm(clipped_by_layer):
    limit, params, new = 0.05, model.init(), dict(clipped_by_layer[1])
    gradient = jax.device_get(GRADIENT(params, model.batches(1)[0])[1])

    def clipped(tree):
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(tree)))
        return jax.tree.map(lambda g: g * min(1, limit / norm), tree)

    layers = [jax.tree.map(lambda x, i=i: x[i], gradient["blocks"]) for i in range(model.LAYERS)]
    expected = {
        "blocks": jax.tree.map(lambda *x: np.stack(x), *map(clipped, layers)),
        **clipped({"embed": gradient["embed"]}),
        **clipped({name: gradient[name] for name in ("norm", "head")}),
    }
    assert_close(jax.tree.map(np.subtract, params, new), expected)


def test_parameters_may_be_any_mapping(clipped_by_layer):
    # That their values are right is what the test above finds.
    params, new = clipped_by_layer
    assert isinstance(new, collections.OrderedDict)
    assert list(new) == list(params) != sorted(params)


def in_codes(inner, **arguments):
    return galore_optax.low_bit(inner, block_size=4, **arguments)


@pytest.mark.parametrize(
    "tx",
    [
        # Of a kernel's 768 or 1152 elements one layer has 256 or 384.
        pytest.param(in_codes(optax.adamw(0.01), min_size=700), marks=pytest.mark.ci),
        # Its low-rank gradients have 192 or 288, and one layer of them 64 or 96.
        galore(in_codes(optax.adam(0.01), min_size=150)),
        # The 16 elements of a norm are few enough by themselves.
        in_codes(optax.adamw(0.01), min_size=40, stacked=lambda path, _: int("blocks" in path)),
        pytest.param(
            in_codes(optax.lion(0.01), min_size=16, stacked=lambda path, _: int("blocks" in path)),
            marks=pytest.mark.ci,
        ),
    ],
    ids=["one layer is small", "in galore", "norms are small", "norms are in codes"],
)
def test_a_stack_in_codes_is_updated_a_layer_at_a_time(tx):
    params, tokens = model.init(jnp.float32), model.batches(2)
    state = jax.jit(tx.init)(params)
    assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))
    found, expected = (
        train(step, params, state, tokens) for step in (layerwise_step(tx), ordinary_step(tx))
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(found[1], expected[1])
    assert_close(found[0], expected[0], tolerance=1e-4)


def test_a_stack_in_bfloat16_is_rounded_at_random_a_layer_at_a_time():
    tx = galore_optax.low_bit(optax.sgd(0.1, 0.9), bits=16, min_size=700)
    params, tokens = model.init(jnp.float32), model.batches(8)
    state = jax.jit(tx.init)(params)
    (_, after, found), (_, _, expected) = (
        train(step, params, state, tokens) for step in (layerwise_step(tx), ordinary_step(tx))
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert after.inner[0].trace["blocks"]["up"]["kernel"].dtype == jnp.bfloat16
    assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("block_size", "sliced"),
    [(4, 2), (64, 2), (96, 1)],
    ids=["blocks in rows", "two rows in a block", "a block in two slices"],
)
def test_large_leaves_are_updated_in_slices_of_their_rows(block_size, sliced):
    """Of 128 rows, too, from which on codes of a TPU have a layout of their own."""
    params, tokens = model.init(jnp.float32, d=32, f=32, v=800), model.batches(4)
    in_8_bit = galore_optax.adamw_8bit(0.01, block_size=block_size, min_size=100)
    tx = model.partition(embed=in_8_bit, head=optax.adamw(0.01), rest=optax.sgd(0.1))
    state, results, whiles = jax.jit(tx.init)(params), [], []
    for size in (None, 8192):
        step = layerwise_step(tx, slice_size=size)
        results.append(train(step, params, state, tokens)[0])
        text = step.lower(params, state, tokens[0], jax.random.key(0)).as_text()
        whiles.append(text.count("stablehlo.while"))
    assert_close(results[1], results[0], tolerance=1e-6)
    # Of the embedding, if it can, and of the head.
    assert whiles[1] == whiles[0] + sliced


def test_no_slices_where_random_numbers_would_be_the_same_for_all_of_them():
    params, tokens = model.init(jnp.float32, d=32, f=32), model.batches(1)[0]
    in_16_bit = galore_optax.low_bit(optax.lion(0.01), bits=16, min_size=100)
    tx = model.partition(embed=in_16_bit, rest=optax.sgd(0.1))
    state = jax.eval_shape(tx.init, params)
    whiles = [
        layerwise_step(tx, slice_size=size)
        .lower(params, state, tokens, jax.random.key(0))
        .as_text()
        .count("stablehlo.while")
        for size in (None, 256)
    ]
    assert whiles[1] == whiles[0] + 1  # Of the head alone.


def test_what_is_not_of_each_row_by_itself_is_not_done_in_slices():
    """The root mean square of a leaf, and a learning rate that grows from row to row."""

    def by_row(updates, state, params=None):
        def scaled(g):
            return -jnp.arange(g.shape[0], dtype=g.dtype)[:, None] * g

        return jax.tree.map(scaled, updates), state

    rms = optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(1.0))
    rows = optax.GradientTransformation(lambda _: optax.EmptyState(), by_row)
    tx = model.partition(embed=rms, head=rows, rest=optax.sgd(0.1))
    params, tokens = model.init(), model.batches(1)[0]
    new, _, _ = layerwise_step(tx, slice_size=64)(params, tx.init(params), tokens, None)
    change = jax.tree.map(np.subtract, params, new)
    gradient = jax.device_get(GRADIENT(params, tokens)[1])
    g = gradient["embed"]["embedding"]
    expected = g / max(1, np.sqrt(np.mean(g**2)) / 0.01)
    assert_close(change["embed"]["embedding"], expected)
    g = gradient["head"]["kernel"]
    assert_close(change["head"]["kernel"], np.arange(model.D)[:, None] * g)


def test_the_state_is_the_ordinary_one_and_steps_can_alternate():
    params = model.init()
    state = GALORE.init(params)
    chex.assert_trees_all_equal(model.layerwise(GALORE).init(params), state)
    steps = [ordinary_step(GALORE), layerwise_step(GALORE)]
    expected = params, state
    for i, tokens in enumerate(model.batches(GAP + 2)):
        key = jax.random.key(i)
        params, state, _ = steps[i % 2](params, state, tokens, key)
        expected = steps[0](*expected, tokens, key)[:2]
    assert_close(params, expected[0])
