"""The loss in chunks of the vocabulary, and the embedding's gradient, against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.flax_llama import loss_by_vocabulary
from examples.flax_llama.loss_by_vocabulary import cross_entropy_by_vocabulary, vocabulary_chunk
from examples.flax_llama.tables import look_up

B, S, D, V = 3, 22, 24, 101


def case(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, S, D)).astype(dtype)
    head = rng.standard_normal((D, V)).astype(dtype)
    labels = rng.integers(V, size=(B, S)).astype(np.int32)
    weights = rng.uniform(0.5, 2.0, (B, S)) * (rng.uniform(size=(B, S)) < 0.7)
    # Labels of tokens that do not count, as paddings have them.
    labels = np.where(weights > 0, labels, rng.choice([-100, V, 10**6], (B, S)))
    return tuple(map(jnp.asarray, (x, head, labels, weights.astype(np.float32))))


def plain(x, head, labels, weights):
    logits = jnp.asarray(x, jnp.float32) @ jnp.asarray(head, jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(weights, labels, 0))
    return jnp.sum(losses * weights)


def gradients(loss, x, head, *others):
    # Divided, so that the cotangent is not one.
    scaled = lambda x, head: loss(x, head, *others) / 3  # noqa: E731
    return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(x, head)


@pytest.mark.parametrize("chunk", [1, 7, 60, 100, V])
@pytest.mark.parametrize("scale", [1, 1000])  # of logits; exponentials of a thousand overflow
def test_loss_and_gradients_are_those_of_plain_logits(monkeypatch, chunk, scale):
    monkeypatch.setattr(loss_by_vocabulary, "vocabulary_chunk", lambda *_: chunk)
    x, head, *others = case()
    loss, found = gradients(cross_entropy_by_vocabulary, x, scale * head, *others)
    expected, expected_gradients = gradients(plain, x, scale * head, *others)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    without = jax.jit(lambda *a: cross_entropy_by_vocabulary(*a) / 3)(x, scale * head, *others)
    np.testing.assert_allclose(without, expected, rtol=1e-6)
    for a, b in zip(found, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
def test_sums_of_bfloat16_are_float32(monkeypatch, head_dtype):
    monkeypatch.setattr(loss_by_vocabulary, "vocabulary_chunk", lambda *_: 9)
    x, head, *others = case(jnp.bfloat16)
    loss, (dx, dhead) = gradients(cross_entropy_by_vocabulary, x, head.astype(head_dtype), *others)
    wide = x.astype(jnp.float32), head.astype(jnp.float32)
    expected, (expected_dx, expected_dhead) = gradients(plain, *wide, *others)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert (dx.dtype, dhead.dtype) == (jnp.bfloat16, head_dtype)
    for a, b in ((dx, expected_dx), (dhead, expected_dhead)):
        error = jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel())
        assert error < 5e-3


@pytest.mark.parametrize("tokens", [1, 256, 4096, 10**6])
@pytest.mark.parametrize("vocabulary", [50, 1024, 32_000, 50_257, 128_256])
def test_a_chunk_of_the_vocabulary_makes_few_logits(tokens, vocabulary):
    chunk = vocabulary_chunk(tokens, vocabulary)
    assert chunk == vocabulary or chunk % 128 == 0
    assert chunk <= vocabulary
    assert chunk * tokens <= max(2**23 + 128 * tokens, 1024 * tokens)
    # The chunks are alike: all but the last one, at most, are full.
    assert chunk == vocabulary or -(-vocabulary // chunk) * (chunk - 128) < vocabulary


def test_a_step_has_neither_all_logits_nor_a_float32_gradient_of_the_head():
    B, S, D, V = 16, 256, 64, 65_536
    shapes = [((B, S, D), "float32"), ((D, V), "float32"), ((B, S), "int32"), ((B, S), "float32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def temporary(loss):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * B * S * V
    assert temporary(plain) > logits
    # Three arrays of a chunk's logits: the logits, their exponentials, and those of the label.
    assert temporary(cross_entropy_by_vocabulary) < 3.5 * 4 * 2**23 < 0.25 * logits


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("tokens", [[[3, 3, 3], [3, 3, 3]], [[5, 0, 5], [1, 5, 4]], [[0], [1]]])
def test_the_embeddings_gradient_is_that_of_indexing(alone, tokens):
    tokens = jnp.asarray(tokens)
    table = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    factors = jnp.asarray(np.random.default_rng(1).standard_normal((*tokens.shape, 4)))
    found = jax.jit(jax.grad(lambda t: jnp.sum(factors * look_up(t, tokens, alone))))(table)
    expected = jax.grad(lambda t: jnp.sum(factors * t[tokens]))(table)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(look_up(table, tokens, alone), table[tokens])


def test_a_token_in_many_places_is_added_up_in_float32():
    tokens = jnp.zeros((1, 1000), jnp.int32)
    gradient = jax.grad(lambda t: jnp.sum(look_up(t, tokens, True).astype(jnp.float32)))
    np.testing.assert_array_equal(gradient(jnp.ones((2, 3), jnp.bfloat16))[0], 1000)
