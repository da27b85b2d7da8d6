"""That models of which some leaves are trained work: frozen ones, functions, LoRA, tied leaves."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_optax

OPTIONS = {"rank": 2, "update_proj_gap": 3}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "bias", "act", "count", "frozen", "more"],
    meta_fields=[],
)
@dataclasses.dataclass
class Model:
    """A model whose leaves are not all arrays, as one of Equinox is without a filter."""

    kernel: Any
    bias: Any
    act: Any
    count: Any
    frozen: Any
    more: Any


def model():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(6, 10)), jnp.float32)
    return Model(kernel, jnp.ones(10), jax.nn.gelu, 3, jnp.ones((6, 10)), {"flag": True, "b": None})


def trained(whole):
    """The leaves of a model that are trained, with None in the places of the others."""
    nothing = {"flag": None, "b": None}
    return dataclasses.replace(whole, act=None, count=None, frozen=None, more=nothing)


EIGHT_BITS = {"min_size": 0, "block_size": 4}
MAKE = {
    "galore_adamw": functools.partial(galore_optax.galore_adamw, **OPTIONS),
    "accumulation": functools.partial(galore_optax.galore_adamw, accumulation_steps=2, **OPTIONS),
    "fira_adamw_8bit": functools.partial(galore_optax.fira_adamw_8bit, **OPTIONS, **EIGHT_BITS),
    "ldadamw": functools.partial(galore_optax.ldadamw, residual="error_feedback", **OPTIONS),
    "galore_adafactor": functools.partial(
        galore_optax.galore_adafactor, multiply_by_parameter_scale=False, **OPTIONS
    ),
    "galore_muon": functools.partial(galore_optax.galore_muon, **OPTIONS),
    "flora": functools.partial(galore_optax.flora, weight_decay=0.1, **OPTIONS),
    "adamw_8bit": functools.partial(galore_optax.adamw_8bit, **EIGHT_BITS),
    "low_bit": lambda rate: galore_optax.low_bit(optax.adamw(rate), bits=16, min_size=0),
    "chain": lambda rate: galore_optax.chain(
        optax.clip(1.0), galore_optax.galore(**OPTIONS), optax.adamw(rate)
    ),
}


@pytest.mark.parametrize("name", MAKE)
def test_what_has_no_gradient_is_dropped_from_the_parameters(name):
    """The same program as for the trained leaves alone."""
    tx, whole = MAKE[name](0.1), model()
    parts = trained(whole)
    gradients = jax.tree.map(jnp.ones_like, parts)
    state = tx.init(parts)

    def of_whole(gradients, state, parts):
        others = {f.name: getattr(whole, f.name) for f in dataclasses.fields(Model)[2:]}
        return tx.update(gradients, state, dataclasses.replace(parts, **others))

    found, expected = (
        jax.make_jaxpr(update, return_shape=True)(gradients, state, parts)
        for update in (of_whole, tx.update)
    )
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])
    arrays = (gradients, state, parts)
    for one, other in zip(*(x[0].eqns for x in (found, expected)), strict=True):
        assert one.primitive == other.primitive
        assert [v.aval for v in one.outvars] == [v.aval for v in other.outvars]
    if name == "galore_adamw":
        results = [jax.jit(update)(*arrays) for update in (of_whole, tx.update)]
        jax.tree.map(np.testing.assert_array_equal, *results)
        new = galore_optax.apply_updates(whole, results[0][0], None)
        assert new.act is whole.act
        np.testing.assert_allclose(new.bias, whole.bias + results[1][0].bias, rtol=1e-6)


def test_parameters_of_another_structure_are_still_an_error():
    parts = trained(model())
    gradients = jax.tree.map(jnp.ones_like, parts)
    tx = galore_optax.galore_adamw(0.1, **OPTIONS)
    wrong = dataclasses.replace(parts, kernel={"a": parts.kernel})
    with pytest.raises(ValueError, match=r"another structure than params|same shapes"):
        tx.update(gradients, tx.init(parts), wrong)


class Lora(nnx.Module):
    def __init__(self, rngs):
        self.base = nnx.Linear(8, 12, rngs=rngs)
        self.lora = nnx.LoRA(8, 4, 12, rngs=rngs)

    def __call__(self, x):
        return self.base(x) + self.lora(x)


class Tied(nnx.Module):
    """The same variable at two places."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@pytest.mark.parametrize(
    ("make", "wrt", "frozen"),
    [
        (Lora, nnx.LoRAParam, ("base",)),
        (Lora, nnx.All(nnx.Param, nnx.PathContains("base")), ("lora",)),
        (Tied, nnx.Param, ()),
    ],
    ids=["LoRA", "by path", "tied"],
)
@pytest.mark.since(flax="0.12.8")
def test_nnx_trains_what_its_filter_says(make, wrt, frozen):
    module = make(nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, galore_optax.galore_adamw(0.1, rank=2), wrt=wrt)
    before = {
        "/".join(map(str, path)): np.asarray(x[...])
        for path, x in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }

    @nnx.jit
    def step(module, optimizer):
        loss = nnx.value_and_grad(
            lambda m: jnp.sum(m(jnp.ones((2, 8))) ** 2), argnums=nnx.DiffState(0, wrt)
        )
        value, gradients = loss(module)
        optimizer.update(module, gradients)
        return value

    losses = [float(step(module, optimizer)) for _ in range(3)]
    assert losses[-1] < losses[0]
    for path, x in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = "/".join(map(str, path))
        moved = not np.array_equal(np.asarray(x[...]), before[name])
        assert moved == (path[0] not in frozen), name
    if make is Tied:
        assert module.first.kernel is module.second.kernel
        assert len(before) == 1


def test_frozen_leaves_and_donation():
    """The buffers of state and trained leaves are given away, and frozen ones kept."""
    whole = model()
    parts = trained(whole)
    tx = galore_optax.galore_adamw_8bit(0.1, **OPTIONS, **EIGHT_BITS)
    state = tx.init(parts)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parts, state):
        gradients = jax.tree.map(jnp.ones_like, parts)
        updates, state = tx.update(gradients, state, dataclasses.replace(whole, **vars(parts)))
        return optax.apply_updates(parts, updates), state

    given = jax.tree.leaves((parts, state))
    parts = jax.tree.map(jnp.copy, parts)
    for _ in range(2):
        parts, state = step(parts, state)
    assert all(x.is_deleted() for x in given[2:])
    assert not whole.frozen.is_deleted()
    assert np.all(np.isfinite(parts.kernel))
