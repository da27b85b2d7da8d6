"""The chunked loss against plain logits, their automatic derivatives and NumPy."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_llama_losses import S, V, case, gradients, plain_losses, relative_error

from examples.flax_llama.config import LlamaConfig
from examples.flax_llama.loss import (
    chunk_size,
    cross_entropy_sum,
    loss_sum,
    token_cross_entropy,
    token_losses,
)
from examples.flax_llama.model import Llama

TINY = LlamaConfig(hidden=16, intermediate=40, layers=2, heads=2, vocab_size=64)
CHUNKS = [None, 1, 5, 11, S, 100]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_loss_and_gradients_equal_those_of_plain_logits(chunk):
    x, head, labels, weights = case()

    # Divided by a sum, as training does, so that the cotangent is not one.
    def chunked(x, head):
        return cross_entropy_sum(x, head, labels, weights, chunk=chunk) / weights.sum()

    def plain(x, head):
        return jnp.sum(plain_losses(x, head, labels) * weights) / weights.sum()

    (loss, grads), (expected, expected_grads) = (gradients(f, x, head) for f in (chunked, plain))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert float(jax.jit(chunked)(x, head)) == pytest.approx(float(expected), rel=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("chunk", CHUNKS)
def test_losses_of_tokens_equal_those_of_plain_logits(chunk):
    x, head, labels, _ = case()
    losses = jax.jit(token_cross_entropy, static_argnames="chunk")(x, head, labels, chunk=chunk)
    expected = jax.jit(plain_losses)(x, head, labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padding", [-100, -1, 0, V, 10**6])
def test_a_weight_of_zero_removes_a_token_whatever_its_label(padding):
    x, head, labels, weights = case()
    counted = weights > 0
    padded = jnp.where(counted, labels, padding)
    loss, (dx, dhead) = gradients(
        lambda x, head: cross_entropy_sum(x, head, padded, counted, chunk=4), x, head
    )

    def of_the_others(x, head):
        return plain_losses(x[counted], head, labels[counted]).sum()

    expected, (expected_dx, expected_dhead) = gradients(of_the_others, x, head)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert not dx[~counted].any()
    assert relative_error(dx, expected_dx) < 1e-6
    assert relative_error(dhead, expected_dhead) < 1e-6


def test_logits_of_a_thousand_do_not_overflow():
    x, head, labels, weights = case()
    loss, grads = gradients(lambda *a: cross_entropy_sum(*a, labels, weights), x, 1000 * head)
    expected = jnp.sum(plain_losses(x, 1000 * head, labels) * weights)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
def test_bfloat16_inputs_are_accumulated_in_float32(head_dtype):
    x, head, labels, weights = case(jnp.bfloat16)
    loss, (dx, dhead) = gradients(
        lambda x, head: cross_entropy_sum(x, head, labels, weights, chunk=4),
        x,
        head.astype(head_dtype),
    )
    logits = np.asarray(x, np.float64) @ np.asarray(head, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    label_log_p = np.take_along_axis(log_p, np.asarray(labels)[..., None], -1)[..., 0]
    expected = -float((label_log_p * np.asarray(weights)).sum())
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(expected, rel=1e-5)  # bfloat16 logits are off by 4e-4

    dlogits = np.asarray(weights)[..., None] * (np.exp(log_p) - np.eye(V)[labels])
    assert dx.dtype == jnp.bfloat16
    assert dhead.dtype == head_dtype
    assert relative_error(dx, dlogits @ np.asarray(head, np.float64).T) < 5e-3
    expected = np.einsum("bsd,bsv->dv", np.asarray(x, np.float64), dlogits)
    assert relative_error(dhead, expected) < 4e-3


def temporary_bytes(loss, batch, seq, hidden, vocab):
    """Peak of the temporary memory of loss and gradients, compiled but not run."""
    shapes = [((batch, seq, hidden), "float32"), ((hidden, vocab), "float32")]
    shapes += [((batch, seq), "int32"), ((batch, seq), "float32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_peak_memory_is_at_most_035_of_plain_logits():
    size = (16, 256, 512, 32_000)
    plain = temporary_bytes(lambda x, h, y, w: jnp.sum(plain_losses(x, h, y) * w), *size)
    assert plain > 4 * 16 * 256 * 32_000
    assert temporary_bytes(cross_entropy_sum, *size) <= 0.35 * plain


@pytest.mark.parametrize("batch", [1, 8, 64, 512])
@pytest.mark.parametrize("seq", [16, 255, 256, 2048])
@pytest.mark.parametrize("hidden", [128, 512, 4096])
def test_a_chunk_has_as_many_tokens_as_the_head_has_rows_or_a_sixteenth_of_all(batch, seq, hidden):
    chunk = chunk_size(batch, seq, hidden)
    assert 1 <= chunk <= seq
    assert (chunk - 1) * batch <= max(min(hidden, 1024), batch * seq / 16)
    assert -(-seq // chunk) <= 16
    assert chunk == seq or chunk * batch >= min(hidden, 1024)


def tiny_model(**settings):
    """Parameters of order one, so that no term of a gradient is small."""
    config = dataclasses.replace(TINY, **settings)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef,
        jax.tree.map(
            lambda x: jnp.asarray((0.3 * rng.standard_normal(x.shape)).astype(x.dtype)), shapes
        ),
    )


def test_losses_of_a_model_are_those_of_its_logits():
    model = tiny_model()
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(TINY.vocab_size, size=(4, 33)), jnp.int32)
    mask = jnp.asarray(rng.uniform(size=(4, 32)) < 0.8)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens[:, :-1])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(nnx.jit(token_losses)(model, tokens), expected, rtol=1e-5, atol=1e-5)

    def plain(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(tokens[:, :-1]), tokens[:, 1:]
        )
        return losses.sum(where=mask)

    loss, grads = nnx.jit(nnx.value_and_grad(loss_sum))(model, tokens, mask)
    assert float(loss) == pytest.approx(expected[np.asarray(mask)].sum(), rel=1e-5)
    expected_grads = nnx.jit(nnx.grad(plain))(model)
    errors = jax.tree.map(relative_error, grads, expected_grads)
    assert max(jax.tree.leaves(errors)) < 1e-5


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_gradients_of_a_bfloat16_model_have_the_dtype_of_the_parameters(param_dtype):
    model = tiny_model(dtype="bfloat16", param_dtype=param_dtype)
    tokens = jnp.asarray(np.random.default_rng(1).integers(TINY.vocab_size, size=(2, 9)))
    loss, grads = nnx.eval_shape(
        nnx.value_and_grad(loss_sum), model, tokens, jnp.ones((2, 8), bool)
    )
    assert loss.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(param_dtype)}


SHARDED = """
    import re
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from examples.flax_llama.loss import cross_entropy_sum

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((16, 20, 8)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((8, 50)), jnp.float32)
    labels = jnp.asarray(rng.integers(50, size=(16, 20)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(16, 20)), jnp.float32)
    loss = jax.value_and_grad(
        lambda *arguments: cross_entropy_sum(*arguments, chunk=6), argnums=(0, 1)
    )
    expected = jax.jit(loss)(x, head, labels, weights)
    rows = NamedSharding(mesh, P("data"))
    x, labels, weights = (jax.device_put(a, rows) for a in (x, labels, weights))
    head = jax.device_put(head, NamedSharding(mesh, P()))
    compiled = jax.jit(loss).lower(x, head, labels, weights).compile()
    actual = compiled(x, head, labels, weights)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert actual[1][0].sharding.is_equivalent_to(rows, 3), actual[1][0].sharding

    # Every device has logits of 2 of the 16 rows, and nothing of the others ever reaches it.
    hlo = compiled.as_text()
    assert "f32[2,6,50]" in hlo and "f32[16,6,50]" not in hlo
    moved = set(re.findall(r"(all-[a-z]+|collective-[a-z]+|reduce-scatter)[(]", hlo))
    assert moved == {"all-reduce"}, moved
"""


def test_a_batch_sharded_over_devices_stays_where_it_is():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARDED)],
        cwd=root,
        env=environment,
        check=True,
    )
