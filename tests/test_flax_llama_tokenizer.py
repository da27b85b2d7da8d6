"""Tokenizers of every kind behind one interface."""

import io
import json
import pathlib

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from examples.flax_llama import documents, tokenizer, train_tokenizer
from examples.flax_llama.config import UsageError
from examples.flax_llama.tokenizer import END_OF_TEXT, JsonTokenizer, load_tokenizer

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

TEXTS = [f"Emma Woodhouse, number {i}, handsome,\n\nclever & rich € 😀" for i in range(50)]


@pytest.fixture(scope="module")
def sentencepiece_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=40, minloglevel=2
    )
    return model.getvalue()


def word_tokenizer(*special):
    """A tokenizer.json that asks for all that the data pipeline must not have."""
    vocab = {name: i for i, name in enumerate(["[UNK]", "a", "b", "[CLS]", *special])}
    model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens(["[CLS]", *special])
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [CLS]", special_tokens=[("[CLS]", 3)]
    )
    model.enable_truncation(5)
    model.enable_padding(length=5)
    return model


@pytest.mark.parametrize(
    ("spec", "eos", "size"),
    [("bytes", False, 256), ("bytes", True, 257), ("bpe:300", False, 300), ("bpe:300", True, 300)],
)
def test_bytes_and_bpe_decode_to_the_text(spec, eos, size):
    trained = tokenizer.train_tokenizer(TEXTS, spec, eos=eos)
    assert trained.vocab_size == size
    assert (trained.eos_id is not None) == eos
    encoded = trained.encode_batch(["", *TEXTS])
    assert [trained.decode(ids) for ids in encoded] == ["", *TEXTS]
    assert {ids.dtype for ids in encoded} == {np.dtype("int32")}
    lengths = [len(ids) for ids in encoded[1:]]
    in_bytes = [len(text.encode()) for text in TEXTS]
    assert lengths == in_bytes if spec == "bytes" else sum(lengths) < sum(in_bytes) / 2


def test_documents_end_with_the_end_of_text_and_texts_that_spell_it_do_not():
    trained = tokenizer.train_tokenizer(TEXTS, "bpe:300", eos=True)
    text = f"before{END_OF_TEXT}after"
    (ids,) = trained.encode_documents([text])
    assert np.flatnonzero(ids == trained.eos_id).tolist() == [len(ids) - 1]
    np.testing.assert_array_equal(ids[:-1], trained.encode(text))
    assert trained.decode(ids[:-1]) == text


def test_documents_have_no_end_where_the_tokenizer_has_none():
    trained = tokenizer.train_tokenizer(TEXTS, "bytes", eos=False)
    (ids,) = trained.encode_documents(["abc"])
    np.testing.assert_array_equal(ids, trained.encode("abc"))


def test_more_texts_than_are_encoded_at_a_time_keep_their_order(monkeypatch):
    trained = tokenizer.train_tokenizer(TEXTS, "bpe:300", eos=True)
    whole = trained.encode_batch(TEXTS)
    monkeypatch.setattr(tokenizer, "ENCODE_BATCH", 7)
    for one, same in zip(whole, trained.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize("eos", ["</s>", "<|end_of_text|>", "<eos>", None])
def test_any_tokenizer_json_encodes_the_text_alone(tmp_path, eos):
    special = [] if eos is None else [eos]
    word_tokenizer(*special).save(str(tmp_path / "words.json"))
    loaded = load_tokenizer(tmp_path / "words.json")
    assert loaded.encode("a b a b c a b").tolist() == [1, 2, 1, 2, 0, 1, 2]
    assert loaded.encode("a").tolist() == [1]
    assert loaded.vocab_size == 4 + len(special)
    assert loaded.eos_id == (None if eos is None else 4)


@pytest.mark.parametrize("token", ["<fin>", {"content": "<fin>", "special": True}])
def test_a_directory_says_which_token_ends_a_document_that_has_no_usual_name(tmp_path, token):
    word_tokenizer("<fin>").save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(tmp_path).eos_id == 4
    word_tokenizer("</s>", "<fin>").save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_id == 4


def test_the_vocabulary_ends_after_the_largest_id():
    vocab = {"a": 1, "b": 700}
    model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    assert JsonTokenizer(model.to_str()).vocab_size == 701


def test_sentencepiece_encodes_as_its_own_package_does(tmp_path, sentencepiece_model):
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model)
    loaded = load_tokenizer(tmp_path / "spiece.model")
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    assert loaded.vocab_size == processor.vocab_size() == 40
    assert loaded.eos_id == processor.piece_to_id("</s>") == 2
    encoded = loaded.encode_batch(TEXTS)
    assert [ids.tolist() for ids in encoded] == [processor.encode(text) for text in TEXTS]
    assert loaded.decode(encoded[3]) == processor.decode(processor.encode(TEXTS[3]))
    (ids,) = loaded.encode_documents(["Emma </s>"])
    assert ids.tolist() == [*processor.encode("Emma </s>"), 2]
    assert np.count_nonzero(ids == 2) == 1


@pytest.mark.parametrize("kind", ["bytes", "bpe:300", "json", "sentencepiece"])
def test_a_saved_tokenizer_is_found_in_its_directory(tmp_path, sentencepiece_model, kind):
    if kind == "sentencepiece":
        original = tokenizer.SentencePieceTokenizer(sentencepiece_model)
    elif kind == "json":
        original = JsonTokenizer(word_tokenizer("</s>").to_str())
    else:
        original = tokenizer.train_tokenizer(TEXTS, kind, eos=True)
    original.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.to_bytes() == original.to_bytes()
    assert (loaded.vocab_size, loaded.eos_id) == (original.vocab_size, original.eos_id)
    for one, same in zip(original.encode_batch(TEXTS), loaded.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize("spec", ["words", "bpe", "", "none/tokenizer.json"])
def test_a_tokenizer_that_is_not_there_is_refused_with_what_could_be(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = r'expected "bytes", "bpe:SIZE"|expected tokenizer.json or tokenizer.model in'
    with pytest.raises(UsageError, match=rf"tokenizer=.*{expected}"):
        tokenizer.shard_tokenizer(spec, [], skip_held_out=False)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:255", 'expected "bytes", "bpe:SIZE" with SIZE at least 256'),
        ("bpe:x", 'expected "bytes"'),
        ("bpe:256", "expected at least 257"),
    ],
)
def test_vocabularies_without_room_for_all_bytes_are_refused(spec, message):
    with pytest.raises(UsageError, match=rf"tokenizer='{spec}': {message}"):
        tokenizer.train_tokenizer(TEXTS, spec, eos=True)


@pytest.mark.parametrize(
    ("name", "contents"),
    [("a.json", b"{]"), ("a.json", b'{"a": 1}'), ("a.json", b"\xff"), ("a.model", b"hello")],
)
def test_files_that_are_no_tokenizers_are_named(tmp_path, name, contents):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UsageError, match=rf"tokenizer='.*{name}' cannot be read as a tokenizer: "):
        load_tokenizer(tmp_path / name)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="of Linux")
def test_a_full_disk_is_told_of_the_tokenizer_in_a_line(corpus, tmp_path, monkeypatch):
    out = tmp_path / "new.json"
    (tmp_path / "new.json.partial").symlink_to("/dev/full")
    words = ["--data", str(corpus), "--out", str(out), "--vocab-size", "300"]
    monkeypatch.setattr("sys.argv", ["train_tokenizer", *words])
    with pytest.raises(SystemExit, match=rf"^error: {out}: the disk is full\.$"):
        train_tokenizer.main()


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(UsageError, match=r"vocab.txt': expected a file called \*.json or \*.model"):
        load_tokenizer(tmp_path / "vocab.txt")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_the_command_writes_the_tokenizer_that_training_would_make(corpus, tmp_path):
    out = tmp_path / "new" / "tokenizer.json"
    trained = train_tokenizer.train(str(corpus), out, vocab_size=300)
    expected = tokenizer.train_tokenizer(TEXTS, "bpe:300", eos=True)
    assert load_tokenizer(out).to_bytes() == trained.to_bytes() == expected.to_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["tokenizer.json"]


def test_a_tokenizer_for_training_has_not_seen_the_held_out_documents(corpus):
    shards = documents.open_shards(str(corpus))
    kept = [text for i, text in enumerate(TEXTS) if i % 20 != 19]
    trained = tokenizer.shard_tokenizer("bpe:400", shards, skip_held_out=True)
    assert trained.to_bytes() == tokenizer.train_tokenizer(kept, "bpe:400", eos=True).to_bytes()
    assert trained.to_bytes() != tokenizer.train_tokenizer(TEXTS, "bpe:400", eos=True).to_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [("kept.json", "kept.json exists"), ("tok.txt", r"tok.txt: expected a file called \*.json")],
)
def test_the_command_overwrites_nothing(corpus, tmp_path, monkeypatch, name, message):
    (tmp_path / "kept.json").write_text("old")
    monkeypatch.setattr("sys.argv", ["x", "--data", str(corpus), "--out", str(tmp_path / name)])
    with pytest.raises(SystemExit, match=f"^error: --out .*{message}"):
        train_tokenizer.main()
    assert (tmp_path / "kept.json").read_text() == "old"
    assert not (tmp_path / "tok.txt").exists()
