"""Tokens of texts, and batches of them."""

import jax
import numpy as np
import pytest
from flax_glue_runs import WORDS, write_model

from examples.flax_glue.batches import LENGTHS, Epochs, Texts
from examples.flax_glue.shapes import read_encoder
from examples.flax_glue.tokens import Tokens, encode, open_tokenizer
from examples.flax_llama.usage import UsageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model")


def test_one_text_and_two_with_their_types(model):
    config = read_encoder(model)
    tokenizer = open_tokenizer(model, config, 16)
    one, two = encode(tokenizer, [("good bad word0",), ("good", "bad nothing")], config)
    assert [WORDS[i] for i in one.ids] == ["[CLS]", "good", "bad", "word0", "[SEP]"]
    assert list(one.types) == [0] * 5
    assert [WORDS[i] for i in two.ids] == ["[CLS]", "good", "[SEP]", "bad", "[UNK]", "[SEP]"]
    assert list(two.types) == [0, 0, 0, 1, 1, 1]


def test_the_longer_of_two_texts_is_cut(model):
    config = read_encoder(model)
    tokenizer = open_tokenizer(model, config, 9)
    long = " ".join(["word1"] * 20)
    (one, two) = encode(tokenizer, [("good", long), (long,)], config)
    assert [WORDS[i] for i in one.ids] == ["[CLS]", "good", "[SEP]", *["word1"] * 5, "[SEP]"]
    assert len(two) == 9


def test_roberta_has_one_type_for_both(tmp_path):
    directory = write_model(tmp_path / "model", "roberta")
    config = read_encoder(directory)
    (pair,) = encode(open_tokenizer(directory, config, 16), [("good", "bad")], config)
    assert len(pair) == 5
    assert not pair.types.any()


def test_texts_too_long_and_tokenizers_too_large_are_refused(model, tmp_path):
    config = read_encoder(model)
    with pytest.raises(UsageError, match="max_length=17: the model has positions for 16 tokens"):
        open_tokenizer(model, config, 17)
    with pytest.raises(UsageError, match="max_length=4: expected at least 5"):
        open_tokenizer(model, config, 4)
    # Two positions of twenty are before RoBERTa's first.
    roberta = write_model(tmp_path / "roberta", "roberta")
    with pytest.raises(UsageError, match="max_length=19: the model has positions for 18 tokens"):
        open_tokenizer(roberta, read_encoder(roberta), 19)
    words = (*WORDS, *(f"other{i}" for i in range(70 - len(WORDS))))
    large = write_model(tmp_path / "large", words=words)
    with pytest.raises(UsageError, match="has 70 tokens, more than the model: 50"):
        open_tokenizer(large, read_encoder(large), 16)


@pytest.mark.parametrize(("contents", "said"), [(None, "has no tokenizer.json"), ("{", "is no")])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, contents, said):
    if contents:
        (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(UsageError, match=said):
        open_tokenizer(tmp_path, None, 16)


def some_texts(count=103, batch=8, max_length=80):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, max_length + 1, size=count)
    tokens = [Tokens(np.full(n, i, np.int32), np.ones(n, np.int32)) for i, n in enumerate(lengths)]
    labels = np.arange(count, dtype=np.int32)
    return Texts(tokens, labels, batch=batch, pad_id=7, max_length=max_length)


def test_an_epoch_has_each_text_once_in_an_order_of_the_seed():
    texts = some_texts()
    epochs = Epochs(texts, 2, seed=0)
    batches = [epochs[i] for i in range(len(epochs))]
    assert len(epochs) == 2 * 13
    orders = []
    for epoch in (batches[:13], batches[13:]):
        order = np.concatenate([b["labels"][b["weights"] > 0] for b in epoch])
        assert sorted(order) == list(range(103))
        orders.append(list(order))
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])
    other = Epochs(texts, 1, seed=1)
    assert any((other[i]["labels"] != batches[i]["labels"]).any() for i in range(13))
    again = Epochs(texts, 2, seed=0)
    jax.tree.map(np.testing.assert_array_equal, [again[i] for i in range(26)], batches)


def test_a_batch_has_its_tokens_and_behind_them_padding():
    texts = some_texts()
    for index in texts.epoch(0, 0):
        batch = texts.collate(index)
        rows, length = batch["tokens"].shape
        assert rows == 8
        assert length in (*LENGTHS, 80)
        longest = texts.lengths[index].max()
        assert longest <= length
        assert not any(longest <= other < length for other in LENGTHS)
        for row in range(8):
            real = row < len(index)
            size = texts.lengths[index[row]] if real else 0
            assert list(batch["mask"][row]) == [True] * size + [False] * (length - size)
            assert set(batch["tokens"][row, :size]) == ({index[row]} if real else set())
            assert (batch["tokens"][row, size:] == 7).all()
            assert batch["types"][row].sum() == size
            assert batch["weights"][row] == real


def test_texts_of_a_batch_are_of_about_the_same_length():
    texts = some_texts(count=800)
    filled = [texts.collate(index)["mask"].mean() for index in texts.epoch(0, 0)]
    alone = texts.lengths.mean() / 80
    assert np.mean(filled) > 0.8 > 0.6 > alone


def test_what_is_evaluated_is_every_text_once():
    texts = some_texts()
    found = [(index, batch["labels"][: len(index)]) for index, batch in texts.in_order()]
    assert sorted(np.concatenate([index for index, _ in found])) == list(range(103))
    for index, labels in found:
        np.testing.assert_array_equal(labels, index)


def test_batches_go_on_from_a_position():
    epochs = Epochs(some_texts(), 2, seed=3)
    batches = epochs.iterator()
    for _ in range(15):
        next(batches)
    position = batches.get_state()
    rest = list(batches)
    again = epochs.iterator()
    again.set_state(position)
    jax.tree.map(np.testing.assert_array_equal, list(again), rest)
    assert len(rest) == 11


def test_the_lengths_of_all_batches_are_known_before():
    epochs = Epochs(some_texts(), 3, seed=0)
    assert epochs.lengths() == sorted({batch["tokens"].shape[1] for batch in epochs.iterator()})
