"""The split, the tokens and the batches."""

import lzma
import math

import numpy as np
import pytest

from examples.flax_llama import data
from examples.flax_llama.config import UsageError


@pytest.fixture
def small_text(monkeypatch):
    """The opening of every novel in place of all of it."""
    train, valid = data.read_split()
    split = [novel[:5000] for novel in train], [novel[:1001] for novel in valid]
    monkeypatch.setattr(data, "read_split", lambda: split)
    data.load_corpus.cache_clear()
    yield split
    data.load_corpus.cache_clear()


def test_split_keeps_the_last_twentieth_of_each_of_six_novels():
    train, valid = data.read_split()
    assert [novel.splitlines()[0] for novel in train] == list(data.TITLES)
    for kept, held_out in zip(train, valid, strict=True):
        assert len(held_out) / (len(kept) + len(held_out)) == pytest.approx(0.05, abs=1e-5)
    whole = "".join(a + b for a, b in zip(train, valid, strict=True)).encode()
    assert whole == lzma.decompress(data.TEXT.read_bytes())
    assert len(whole) == 4_025_039


@pytest.mark.parametrize(("name", "size"), [("bytes", 256), ("bpe:400", 400)])
def test_tokens_decode_to_the_two_parts_of_the_text(small_text, name, size):
    train, valid = map("".join, small_text)
    corpus = data.load_corpus(name)
    assert corpus.tokenizer.get_vocab_size() == size
    assert corpus.train.dtype == corpus.valid.dtype == np.int32
    assert corpus.tokenizer.decode(corpus.train) == train
    assert corpus.tokenizer.decode(corpus.valid[1:]) == valid
    assert corpus.valid[0] == corpus.train[-1]
    assert corpus.bytes_per_token == len(valid.encode()) / (len(corpus.valid) - 1)
    if name == "bytes":
        assert corpus.bytes_per_token == 1


def test_tokenizer_is_trained_on_the_training_part_and_deterministic(small_text):
    train, _ = small_text
    assert data.load_corpus("bpe:400").tokenizer.to_str() == (
        data.train_tokenizer(train, 400).to_str()
    )


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight(small_text):
    scores = data.load_corpus("bytes").scores(math.log(256))
    assert scores["bits_per_byte"] == pytest.approx(8)
    assert scores["perplexity"] == pytest.approx(256)


def test_an_epoch_has_every_window_once_and_the_next_another_order():
    tokens = np.arange(8 * 5 + 1, dtype=np.int32)
    batches = data.train_batches(tokens, batch=4, seq=5, seed=0)
    epochs = [np.concatenate([batches[2 * e], batches[2 * e + 1]]) for e in range(2)]
    for epoch in epochs:
        assert epoch.shape == (8, 6)
        assert epoch.dtype == np.int32
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 40, 5))
        np.testing.assert_array_equal(epoch - epoch[:, :1], np.tile(np.arange(6), (8, 1)))
    assert (epochs[0] != epochs[1]).any()


def test_order_depends_on_the_seed_alone():
    tokens = np.arange(1000, dtype=np.int32)
    one, same, other = (data.train_batches(tokens, 4, 9, seed)[3] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.parametrize("targets", [1, 11, 24, 25, 47, 48, 49])
def test_every_held_out_token_is_a_target_exactly_once(targets):
    batch, seq = 4, 6
    tokens = np.arange(targets + 1, dtype=np.int32)
    tokens_NxBxS1, mask_NxBxS = data.valid_batches(tokens, batch, seq)
    assert tokens_NxBxS1.shape == (math.ceil(targets / 24), batch, seq + 1)
    counted = tokens_NxBxS1[..., 1:][mask_NxBxS]
    np.testing.assert_array_equal(counted, np.arange(1, targets + 1))
    np.testing.assert_array_equal(tokens_NxBxS1[..., :-1][mask_NxBxS], np.arange(targets))


def test_unigram_loss_is_add_one_smoothed_cross_entropy(small_text):
    corpus = data.load_corpus("bytes")
    frequency = {i: 1 for i in range(256)}
    for token in corpus.train.tolist():
        frequency[token] += 1
    total = sum(frequency.values())
    expected = [-math.log(frequency[token] / total) for token in corpus.valid[1:].tolist()]
    assert data.unigram_loss(corpus) == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("tokenizer", ["bpe", "bpe:255", "bpe:x", "words", ""])
def test_unknown_tokenizers_are_refused(tokenizer):
    with pytest.raises(UsageError, match='expected "bytes" or "bpe:SIZE"'):
        data.load_corpus(tokenizer)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UsageError, match=r"batch=5 of seq=10 .* 4 windows"):
        data.train_batches(np.zeros(50, np.int32), batch=5, seq=10, seed=0)
