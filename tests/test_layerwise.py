"""The update inside the backward pass against the ordinary one: same numbers, less memory."""

import collections
import re

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

STEPS, GAP = 20, 8  # refreshes at 0, 8 and 16.


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def galore(inner=None, **arguments):
    settings = {"rank": 4, "update_proj_gap": GAP, "weight_dimension_numbers": model.numbers}
    return galore_optax.galore(inner or optax.adamw(0.01, weight_decay=0.1), **settings | arguments)


def both(tx, layerwise_tx=None, params=None, steps=STEPS, micro_batches=1, **arguments):
    """Parameters, state and metrics of the ordinary and of the layerwise training."""
    params = model.init() if params is None else params
    tokens = model.batches(steps, micro_batches)
    expected = model.train(model.ordinary(tx, micro_batches), params, tx.init(params), tokens)
    training = model.layerwise(layerwise_tx or tx, micro_batches=micro_batches, **arguments)
    found = model.train(training.step, params, training.init(params), tokens)
    return found, expected


def assert_close(found, expected, tolerance=1e-9):
    def check(path, a, b):
        a, b = np.ravel(a), np.ravel(b)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error <= tolerance, (jax.tree_util.keystr(path), error)

    jax.tree.map_with_path(check, found, expected)


def settings(name, **more):
    shape = {"hidden": model.D, "intermediate": model.F, "layers": model.LAYERS, "heads": 2}
    training = {"rank": 4, "update_proj_gap": GAP, "steps": STEPS, "clip": 0.0, "lr": 0.01}
    return Config(optimizer=name, **shape | training | more).resolve()


HIGH_PRECISION = [name for name in optimizers.OPTIMIZERS if "8bit" not in name and name[0] != "q"]


@pytest.mark.parametrize("name", HIGH_PRECISION)
def test_every_optimizer_of_the_application_is_that_of_the_ordinary_step(name):
    tx = optimizers.make_optimizer(settings(name, weight_decay=0.1, momentum=0.9))
    (params, state, metrics), expected = both(tx)
    assert_close(params, expected[0])
    chex.assert_trees_all_close(state, expected[1], rtol=1e-7, atol=1e-10)
    for found, right in zip(metrics, expected[2], strict=True):
        assert found == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("name", [n for n in optimizers.OPTIMIZERS if n not in HIGH_PRECISION])
def test_low_bit_state_trains_to_the_loss_of_the_ordinary_step(name):
    params = jax.tree.map(lambda x: x / 3, model.init(jnp.float32, d=64, f=64))
    shape = {"hidden": 64, "intermediate": 64}
    config = settings(name, **shape, steps=40, lr=0.02, projector="power_iteration")
    tx = optimizers.make_optimizer(config)
    if config.int8_weights:
        params = galore_optax.quantize_params(
            params, rank=4, weight_dimension_numbers=model.numbers
        )
    (found, _, metrics), (expected, _, _) = both(tx, params=params, steps=40)
    held_out = model.batches(1, shape=(16, 16))[0]
    losses = [float(model.loss(x, held_out)) for x in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.005)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1


VARIANTS = {
    "lazy": {"refresh": "lazy", "projector": "eigh"},
    "random": {"projector": "gaussian", "stagger": True, "seed": 3},
    "both sides": {"projector": "power_iteration", "stagger": True, "side": "both"},
    "rows": {"projector": "rows"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_subspaces_are_those_of_the_ordinary_step(variant):
    tx = galore(optax.sgd(0.1, momentum=0.9), **VARIANTS[variant])
    (params, state, _), expected = both(tx)
    assert_close(params, expected[0])
    chex.assert_trees_all_close(state, expected[1], rtol=1e-6, atol=1e-9)


def test_one_layer_is_enough():
    (params, _, _), expected = both(galore(), params=model.init(layers=1), steps=10)
    assert_close(params, expected[0])


def is_stacked(params):
    return jax.tree.map(lambda x: x.ndim > 2, params)


def label(params):
    return jax.tree.map(lambda x: "adam" if x else "sgd", is_stacked(params))


@pytest.mark.parametrize(
    "given",
    [lambda function: function, lambda function: function(model.init())],
    ids=["function", "tree"],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda given: optax.adamw(0.01, weight_decay=0.3, mask=given(is_stacked)),
        lambda given: optax.partition(
            {"adam": optax.adam(0.01), "sgd": optax.sgd(0.1)}, given(label)
        ),
    ],
    ids=["mask", "labels"],
)
def test_masks_and_labels_are_functions_or_trees(make, given):
    (params, _, _), expected = both(make(given), steps=5)
    assert_close(params, expected[0])


def test_two_seeds_train_under_vmap_as_each_by_itself():
    training, tokens = model.layerwise(galore()), model.batches(4)
    seeds = model.init(), jax.tree.map(lambda x: x * 1.1, model.init())
    alone = [model.train(training.step, p, training.init(p), tokens)[0] for p in seeds]
    params = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    step = jax.vmap(training.step, in_axes=(0, 0, None, None))
    state = jax.vmap(training.init)(params)
    for one in tokens:
        params, state, _ = jax.jit(step)(params, state, one, None)
    assert_close(params, jax.tree.map(lambda *x: jnp.stack(x), *alone))


def test_a_tied_embedding_gets_both_of_its_gradients():
    (params, _, metrics), expected = both(galore(), params=model.init(tied=True))
    assert_close(params, expected[0])
    assert metrics[-1] == pytest.approx(expected[2][-1])


def test_micro_batches_average_a_layer_at_a_time():
    (params, _, metrics), expected = both(galore(), micro_batches=4)
    assert_close(params, expected[0])
    assert metrics[-1] == pytest.approx(expected[2][-1])


def test_micro_batches_average_at_rank_r_where_galore_does():
    (params, _, metrics), expected = both(
        galore(), galore(accumulation_steps=4), params=model.init(tied=True), micro_batches=4
    )
    assert_close(params, expected[0])
    for found, right in zip(metrics, expected[2], strict=True):
        assert found["loss"] == pytest.approx(right["loss"])
        assert found["update_norm"] == pytest.approx(right["update_norm"])
        # Of single micro-batches, but for the steps with a refresh.
        assert found["grad_norm"] >= right["grad_norm"] * (1 - 1e-12)


@pytest.mark.parametrize(
    ("tx", "micro_batches"), [(optax.adamw(0.01), 1), (galore(), 3)], ids=["whole", "micro-batches"]
)
def test_the_global_norm_is_clipped_as_by_optax(tx, micro_batches):
    limit = 2.2
    clipped = optax.chain(optax.clip_by_global_norm(limit), tx)
    (params, _, metrics), expected = both(clipped, tx, micro_batches=micro_batches, clip_norm=limit)
    norms = [x["grad_norm"] for x in expected[2]]
    assert min(norms) < limit < max(norms)
    assert_close(params, expected[0])
    assert [x["grad_norm"] for x in metrics] == pytest.approx(norms)


def test_each_layer_can_be_clipped_by_its_own_norm():
    limit, tokens, params = 0.05, model.batches(1)[0], model.init()
    training = model.layerwise(optax.sgd(1.0), clip_norm=limit, clip_by="layer")
    new, _, _ = jax.jit(training.step)(params, training.init(params), tokens, None)
    gradient = jax.device_get(jax.jit(jax.grad(model.loss))(params, tokens))

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


ROWS = {
    "adamw": optax.adamw(0.01),
    "8 bit": galore_optax.adamw_8bit(0.01, block_size=4, min_size=100),
    "16 bit": galore_optax.low_bit(optax.lion(0.01), bits=16, min_size=100),
}


@pytest.mark.parametrize(
    ("name", "vocabulary", "slice_size"),
    [("adamw", 20, 256), ("16 bit", 20, 256), ("8 bit", 400, 4096)],
)
def test_large_leaves_are_updated_in_slices_of_their_rows(name, vocabulary, slice_size):
    """Of 128 rows, too, from which on codes of a TPU have a layout of their own."""
    params = model.init(jnp.float32, d=32, f=32, v=vocabulary)
    tokens, results, whiles = model.batches(6), [], []
    for size in (None, slice_size):
        training = model.layerwise(ROWS[name], slice_size=size)
        step, state = jax.jit(training.step), training.init(params)
        results.append(model.train(step, params, state, tokens)[0])
        text = step.lower(params, state, tokens[0], jax.random.key(0)).as_text()
        whiles.append(text.count("stablehlo.while"))
    assert_close(results[1], results[0], tolerance=1e-6 if name != "16 bit" else 2e-2)
    # Of the embedding and of the head; not where random numbers would be the same for all slices.
    assert whiles[1] == whiles[0] + (0 if name == "16 bit" else 2)


def test_what_works_on_a_whole_leaf_is_not_done_in_slices():
    tx = optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(1.0))
    params, tokens = model.init(), model.batches(1)[0]
    training = model.layerwise(tx, slice_size=8)
    new, _, _ = jax.jit(training.step)(params, training.init(params), tokens, None)
    gradient = jax.grad(model.loss)(params, tokens)["embed"]["embedding"]
    rms = jnp.sqrt(jnp.mean(gradient**2))
    expected = gradient / jnp.maximum(1, rms / 0.01)
    assert_close(params["embed"]["embedding"] - new["embed"]["embedding"], expected)


def test_a_step_that_was_begun_elsewhere_is_begun_again():
    tx, params, tokens = galore(accumulation_steps=4), model.init(tied=True), model.batches(2, 4)
    training = model.layerwise(tx, micro_batches=4)
    step = jax.jit(training.step)
    params, state, _ = step(params, training.init(params), tokens[0], None)
    # As if one micro-batch had been added, each of its gradients 1.
    begun = state._replace(accumulator=jax.tree.map(jnp.ones_like, state.accumulator))
    assert int(begun.accumulator.count) == 1
    results = [step(params, s, tokens[1], None) for s in (begun, state)]
    chex.assert_trees_all_equal(*results)


def test_numbers_of_each_row_are_not_those_of_the_first_slice():
    """Of noise, and of a learning rate that grows along the vocabulary."""

    def by_row(updates, state, params=None):
        def scaled(path, g):
            rows = jnp.arange(g.shape[0], dtype=g.dtype).reshape(-1, *[1] * (g.ndim - 1))
            return -0.01 * rows * g if path[0].key == "embed" else -0.01 * g

        return jax.tree.map_with_path(scaled, updates), state

    params, tokens = model.init(), model.batches(1)[0]
    tx = optax.GradientTransformation(lambda _: optax.EmptyState(), by_row)
    results = []
    for slice_size in (None, 64):
        training = model.layerwise(tx, slice_size=slice_size)
        results.append(jax.jit(training.step)(params, training.init(params), tokens, None)[0])
    assert_close(*results)


def test_parameters_may_be_any_mapping():
    params = collections.OrderedDict(reversed(model.init().items()))
    (found, _, _), (expected, _, _) = both(optax.adam(0.01), params=params, steps=3)
    assert list(found) == list(params)
    assert_close(found, expected)


def test_the_state_is_the_ordinary_one_and_steps_can_alternate():
    tx, params = galore(), model.init()
    training, ordinary = model.layerwise(tx), model.ordinary(tx)
    chex.assert_trees_all_equal(training.init(params), tx.init(params))
    state, expected = tx.init(params), (params, tx.init(params))
    for i, tokens in enumerate(model.batches(4)):
        step = jax.jit(training.step if i % 2 else ordinary)
        params, state, _ = step(params, state, tokens, None)
        expected = jax.jit(ordinary)(*expected, tokens, None)[:2]
    assert_close(params, expected[0])


def test_two_runs_are_equal_to_the_last_bit():
    params, tx = model.init(jnp.float32), galore(galore_optax.adamw_8bit(0.01, min_size=64))
    runs = []
    for _ in range(2):
        training = model.layerwise(tx)
        runs.append(model.train(training.step, params, training.init(params), model.batches(5)))
    chex.assert_trees_all_equal(*runs)


class TestErrors:
    def test_of_blocks_that_are_not_stacked_alike(self):
        params = model.init()
        params["blocks"]["up"]["kernel"] = params["blocks"]["up"]["kernel"][:2]
        with pytest.raises(
            ValueError, match=r"stacked alike.*\(3, 24, 16\) and up/kernel of shape \(2,"
        ):
            model.layerwise(optax.sgd(0.1)).init(params)

    @pytest.mark.parametrize("params", [{"layers": jnp.ones(3)}, [jnp.ones(3)]])
    def test_of_parameters_without_blocks(self, params):
        with pytest.raises(TypeError, match="mapping with the stacked layers under 'blocks'"):
            model.layerwise(optax.sgd(0.1)).init(params)

    @pytest.mark.parametrize("change", ["shape", "dtype"])
    def test_of_a_block_that_changes_x(self, change):
        def block(layer, x):
            return x[..., :-1] if change == "shape" else x.astype(jnp.float32)

        training = galore_optax.layerwise(
            optax.sgd(0.1), embed=model.embed, block=block, head_loss=model.head_loss
        )
        params = model.init()
        with pytest.raises(ValueError, match="block must return an x of the shape and dtype"):
            training.step(params, training.init(params), model.batches(1)[0], None)

    @pytest.mark.parametrize(
        "tx",
        [
            optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
            galore_optax.chain(galore_optax.galore(rank=4), optax.clip_by_global_norm(1.0)),
            optax.apply_if_finite(optax.sgd(0.1), 3),
            optax.contrib.prodigy(0.1),
        ],
        ids=["clip", "clip in galore", "finite", "prodigy"],
    )
    def test_of_what_needs_all_gradients(self, tx):
        with pytest.raises(ValueError, match=re.escape("needs all gradients at once")):
            model.layerwise(tx).init(model.init())

    def test_of_a_state_of_another_transformation(self):
        params = model.init()
        state = optax.sgd(0.1, momentum=0.9).init(params)
        with pytest.raises(ValueError, match=r"state is not one that tx\.init makes"):
            model.layerwise(optax.adam(0.1)).step(params, state, model.batches(1)[0], None)

    def test_of_layers_on_another_axis(self):
        tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
        with pytest.raises(ValueError, match="needs the layers on its leading axis"):
            model.layerwise(tx).init(model.init())

    def test_of_a_batch_without_micro_batches(self):
        params, training = model.init(), model.layerwise(optax.sgd(0.1), micro_batches=2)
        with pytest.raises(ValueError, match=r"micro_batches=2.*leading axis of 2.*\(3, 5\)"):
            training.step(params, training.init(params), model.batches(1)[0], None)

    def test_of_another_number_of_micro_batches_in_galore(self):
        params, tx = model.init(), galore(accumulation_steps=3)
        training = model.layerwise(tx, micro_batches=2)
        with pytest.raises(ValueError, match=r"accumulation_steps of galore is 3.*has 2"):
            training.step(params, training.init(params), model.batches(1, 2)[0], None)

    @pytest.mark.parametrize("beside", ["schedule", "leaves"])
    def test_of_what_is_beside_a_galore_that_accumulates(self, beside):
        if beside == "schedule":
            rate = optax.scale_by_schedule(lambda count: 0.1 / (1 + count))
            tx = optax.chain(galore(optax.scale_by_adam(), accumulation_steps=2), rate)
        else:
            mask = {"blocks": True, "embed": False, "norm": False, "head": False}
            tx = optax.masked(galore(optax.sgd(0.1), accumulation_steps=2), mask)
        params, training = model.init(), model.layerwise(tx, micro_batches=2)
        with pytest.raises(ValueError, match="galore must be all of the transformation"):
            training.step(params, training.init(params), model.batches(1, 2)[0], None)

    def test_of_a_loss_that_is_no_scalar(self):
        training = galore_optax.layerwise(
            optax.sgd(0.1), embed=model.embed, block=model.block, head_loss=lambda p, x, b: x[0, 0]
        )
        with pytest.raises(ValueError, match="head_loss must return a scalar; got"):
            training.step(model.init(), training.init(model.init()), model.batches(1)[0], None)

    def test_of_a_stack_of_vectors_in_codes(self):
        tx = galore_optax.adamw_8bit(0.1, min_size=8)
        with pytest.raises(ValueError, match="raise its min_size above"):
            model.layerwise(tx).init(model.init())

    def test_of_what_is_no_transformation(self):
        with pytest.raises(TypeError, match="tx must be an Optax transformation; got"):
            model.layerwise(optax.adamw)

    def test_of_clipping_what_is_averaged_at_rank_r(self):
        params, tx = model.init(), galore(accumulation_steps=2)
        training = model.layerwise(tx, micro_batches=2, clip_norm=1.0)
        with pytest.raises(ValueError, match="leave out galore's accumulation_steps"):
            training.step(params, training.init(params), model.batches(1, 2)[0], None)

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"micro_batches": 0}, ValueError, "micro_batches must be at least 1; got 0"),
            ({"micro_batches": 1.5}, TypeError, "micro_batches must be a positive int"),
            ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive"),
            ({"clip_norm": "1"}, TypeError, "clip_norm must be a number, or None; got '1'"),
            ({"clip_by": "layer"}, ValueError, "clip_by='layer' needs clip_norm"),
            ({"slice_size": 1.5}, TypeError, "slice_size must be a positive int"),
            ({"clip_by": "leaf"}, ValueError, 'clip_by must be "global" or "layer"'),
            ({"slice_size": 0}, ValueError, "slice_size must be at least 1"),
        ],
    )
    def test_of_arguments(self, arguments, error, match):
        with pytest.raises(error, match=match):
            model.layerwise(optax.sgd(0.1), **arguments)

    def test_of_something_that_is_no_function(self):
        with pytest.raises(TypeError, match="block must be a function"):
            galore_optax.layerwise(optax.sgd(0.1), embed=print, block=3, head_loss=print)
