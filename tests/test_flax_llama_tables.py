"""The loss in chunks of the vocabulary, and the embedding's gradient, against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_llama_losses import V, case, gradients, plain_losses, relative_error

from examples.flax_llama import loss_by_vocabulary
from examples.flax_llama.loss_by_vocabulary import cross_entropy_by_vocabulary, vocabulary_chunk
from examples.flax_llama.tables import look_up


def padded(dtype=jnp.float32):
    """The case with such labels of tokens that do not count as paddings have."""
    x, head, labels, weights = case(dtype)
    paddings = np.random.default_rng(1).choice([-100, V, 10**6], labels.shape)
    return x, head, jnp.where(weights > 0, labels, paddings), weights


def plain(x, head, labels, weights):
    return jnp.sum(plain_losses(x, head, jnp.where(weights > 0, labels, 0)) * weights)


def of_a_third(loss, x, head, *others):
    """Loss and gradients, divided so that the cotangent is not one."""
    return gradients(lambda x, head: loss(x, head, *others) / 3, x, head)


def of_a_table(x, head, *others):
    """The same of a head that lies as an embedding does."""
    return cross_entropy_by_vocabulary(x, head.T, *others, 0)


LOSSES = [cross_entropy_by_vocabulary, of_a_table]


@pytest.mark.parametrize("by_vocabulary", LOSSES, ids=["kernel", "embedding"])
@pytest.mark.parametrize("chunk", [1, 7, 60, 100, V])
@pytest.mark.parametrize("scale", [1, 1000])  # of logits; exponentials of a thousand overflow
def test_loss_and_gradients_are_those_of_plain_logits(monkeypatch, chunk, scale, by_vocabulary):
    monkeypatch.setattr(loss_by_vocabulary, "vocabulary_chunk", lambda *_: chunk)
    x, head, *others = padded()
    loss, found = of_a_third(by_vocabulary, x, scale * head, *others)
    expected, expected_gradients = of_a_third(plain, x, scale * head, *others)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    without = jax.jit(lambda *a: by_vocabulary(*a) / 3)(x, scale * head, *others)
    np.testing.assert_allclose(without, expected, rtol=1e-6)
    for a, b in zip(found, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("by_vocabulary", LOSSES, ids=["kernel", "embedding"])
@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
def test_sums_of_bfloat16_are_float32(monkeypatch, head_dtype, by_vocabulary):
    monkeypatch.setattr(loss_by_vocabulary, "vocabulary_chunk", lambda *_: 9)
    x, head, *others = padded(jnp.bfloat16)
    loss, (dx, dhead) = of_a_third(by_vocabulary, x, head.astype(head_dtype), *others)
    wide = x.astype(jnp.float32), head.astype(jnp.float32)
    expected, (expected_dx, expected_dhead) = of_a_third(plain, *wide, *others)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert (dx.dtype, dhead.dtype) == (jnp.bfloat16, head_dtype)
    for a, b in ((dx, expected_dx), (dhead, expected_dhead)):
        assert relative_error(a, b) < 5e-3


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
