"""What layerwise does not take, and what it says then."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from tests import layerwise_model as model

galore = functools.partial(galore_optax.galore, rank=4, weight_dimension_numbers=model.numbers)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def test_error_of_blocks_that_are_not_stacked_alike():
    params = model.init()
    params["blocks"]["up"]["kernel"] = params["blocks"]["up"]["kernel"][:2]
    with pytest.raises(
        ValueError, match=r"stacked alike.*\(3, 24, 16\) and up/kernel of shape \(2,"
    ):
        model.layerwise(optax.sgd(0.1)).init(params)


@pytest.mark.parametrize("params", [{"layers": jnp.ones(3)}, [jnp.ones(3)]])
def test_error_of_parameters_without_blocks(params):
    with pytest.raises(TypeError, match="mapping with the stacked layers under 'blocks'"):
        model.layerwise(optax.sgd(0.1)).init(params)


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_error_of_a_block_that_changes_x(change):
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
def test_error_of_what_needs_all_gradients(tx):
    with pytest.raises(ValueError, match=re.escape("needs all gradients at once")):
        model.layerwise(tx).init(model.init())


def test_error_of_a_state_of_another_transformation():
    params = model.init()
    state = optax.sgd(0.1, momentum=0.9).init(params)
    with pytest.raises(ValueError, match=r"state is not one that tx\.init makes"):
        model.layerwise(optax.adam(0.1)).step(params, state, model.batches(1)[0], None)


def test_error_of_layers_on_another_axis():
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    with pytest.raises(ValueError, match="needs the layers on its leading axis"):
        model.layerwise(tx).init(model.init())


def test_error_of_a_batch_without_micro_batches():
    params, training = model.init(), model.layerwise(optax.sgd(0.1), micro_batches=2)
    with pytest.raises(ValueError, match=r"micro_batches=2.*leading axis of 2.*\(3, 5\)"):
        training.step(params, training.init(params), model.batches(1)[0], None)


def test_error_of_another_number_of_micro_batches_in_galore():
    params, tx = model.init(), galore(optax.sgd(0.1), accumulation_steps=3)
    training = model.layerwise(tx, micro_batches=2)
    with pytest.raises(ValueError, match=r"accumulation_steps of galore is 3.*has 2"):
        training.step(params, training.init(params), model.batches(1, 2)[0], None)


@pytest.mark.parametrize("beside", ["schedule", "leaves"])
def test_error_of_what_is_beside_a_galore_that_accumulates(beside):
    if beside == "schedule":
        rate = optax.scale_by_schedule(lambda count: 0.1 / (1 + count))
        tx = optax.chain(galore(optax.scale_by_adam(), accumulation_steps=2), rate)
    else:
        mask = {"blocks": True, "embed": False, "norm": False, "head": False}
        tx = optax.masked(galore(optax.sgd(0.1), accumulation_steps=2), mask)
    params, training = model.init(), model.layerwise(tx, micro_batches=2)
    with pytest.raises(ValueError, match="galore must be all of the transformation"):
        training.step(params, training.init(params), model.batches(1, 2)[0], None)


def test_error_of_a_loss_that_is_no_scalar():
    training = galore_optax.layerwise(
        optax.sgd(0.1), embed=model.embed, block=model.block, head_loss=lambda p, x, b: x[0, 0]
    )
    with pytest.raises(ValueError, match="head_loss must return a scalar; got"):
        training.step(model.init(), training.init(model.init()), model.batches(1)[0], None)


def test_error_of_a_stack_of_vectors_in_codes():
    tx = galore_optax.adamw_8bit(0.1, min_size=8)
    with pytest.raises(ValueError, match="name the layers by its stacked, raise its min_size"):
        model.layerwise(tx).init(model.init())


def test_error_of_what_is_no_transformation():
    with pytest.raises(
        TypeError, match=r"tx must be an Optax transformation such as .*; got <function adamw"
    ):
        model.layerwise(optax.adamw)


def test_error_of_clipping_what_is_averaged_at_rank_r():
    params, tx = model.init(), galore(optax.sgd(0.1), accumulation_steps=2)
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
def test_error_of_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        model.layerwise(optax.sgd(0.1), **arguments)


def test_error_of_something_that_is_no_function():
    with pytest.raises(TypeError, match="block must be a function"):
        galore_optax.layerwise(optax.sgd(0.1), embed=print, block=3, head_loss=print)
