"""Tokenizers of every kind behind one interface."""

import io
import json
import pathlib

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from examples.flax_llama import document_end, documents, tokenizer, train_tokenizer
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


FILES = {
    "tokenizer_config.json": {"eos_token": "<fin>"},
    "special_tokens_map.json": {"eos_token": {"content": "<fin>", "special": True}},
    "generation_config.json": {"eos_token_id": [5, 4]},
    "config.json": {"model_type": "llama", "text_config": {"eos_token_id": 5}},
}


@pytest.fixture
def two_ends(tmp_path):
    """A directory with a tokenizer that has a usual end, and another one; and no other files."""
    (tmp_path / "model").mkdir()
    word_tokenizer("</s>", "<fin>").save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("file", ["", "tokenizer.json"])
def test_what_stands_beside_a_tokenizer_says_which_token_ends_a_document(two_ends, name, file):
    assert load_tokenizer(two_ends / file).eos_id == 4
    (two_ends / name).write_text(json.dumps(FILES[name]))
    loaded = load_tokenizer(two_ends / file)
    assert loaded.eos_id == 5
    assert [ids[-1] for ids in loaded.encode_documents(["a", "b a"])] == [5, 5]


def test_the_files_of_the_tokenizer_go_before_those_of_the_model(two_ends):
    for name, says in FILES.items():
        (two_ends / name).write_text(json.dumps(says))
    names = {"tokenizer_config.json": "</s>", "special_tokens_map.json": "[CLS]"}
    for name, token in names.items():
        (two_ends / name).write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(two_ends).eos_id == 4
    # What is null there is not said there.
    (two_ends / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    assert load_tokenizer(two_ends).eos_id == 3
    (two_ends / "special_tokens_map.json").unlink()
    assert load_tokenizer(two_ends).eos_id == 5
    # Nor is a number that the tokenizer has not, or that is none.
    (two_ends / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, True, -1]}))
    (two_ends / "config.json").unlink()
    assert load_tokenizer(two_ends).eos_id == 4


def test_a_sentencepiece_model_ends_documents_as_its_directory_says(tmp_path, sentencepiece_model):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    assert load_tokenizer(tmp_path).eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert load_tokenizer(tmp_path).eos_id == 1


@pytest.mark.parametrize(
    ("special", "files", "said"),
    [
        (["<fin>"], {}, "has no token that is known to end a document"),
        (["</s>"], {}, ""),
        (["</s>", "<eos>"], {}, "has </s> and <eos>: documents end in </s>"),
        (["</s>"], {"eos_token": "<x>"}, "lacks its own eos_token '<x>' and has </s>"),
        (["<fin>"], {"eos_token": "<x>"}, "lacks its own eos_token '<x>' and has no token"),
        (["</s>", "<eos>"], {"eos_token": "<eos>"}, ""),
        (["</s>"], {"eos_token_id": [99]}, "lacks its own eos_token_id 99 and has </s>: docum"),
        (["</s>"], {"eos_token_id": [99, 4]}, ""),
        (
            ["<fin>"],
            {"eos_token": "<x>", "eos_token_id": 4},
            "lacks its own eos_token '<x>' and has <fin>: documents end in <fin>",
        ),
    ],
)
def test_an_end_that_nobody_knows_is_told_once(tmp_path, capsys, special, files, said):
    word_tokenizer(*special).save(str(tmp_path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "generation_config.json") if files else ():
        (tmp_path / name).write_text(json.dumps(files))
    for _ in range(2):
        document_end.tell_of_end(load_tokenizer(tmp_path), str(tmp_path))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == bool(said)
    assert all(said in line and "--eos-token says which it is" in line for line in told)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"add_bos_token": "false"}, "expected true or false as add_bos_token, got 'false'"),
        ({"add_bos_token": True, "bos_token": "<x>"}, "lacks its own bos_token '<x>'"),
    ],
)
def test_what_cannot_begin_texts_is_refused(two_ends, config, message):
    (two_ends / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        _ = load_tokenizer(two_ends).start_ids


@pytest.mark.parametrize(
    ("template", "eos_token", "said"),
    [(True, "<x>", True), (True, None, False), (False, None, True), (False, "</s>", False)],
)
def test_of_answers_an_end_is_told_that_they_need_or_that_is_named(
    tmp_path, capsys, template, eos_token, said
):
    word_tokenizer("</s>", "<eos>").save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": eos_token, "chat_template": "a" if template else None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    document_end.tell_of_end(load_tokenizer(tmp_path), str(tmp_path), of_answers=True)
    assert bool(capsys.readouterr().err) is said


@pytest.mark.parametrize(("name", "right"), [("<fin>", 5), ("[CLS]", 3), ("none", None)])
def test_another_end_is_given_by_its_name_and_is_kept_with_a_run(two_ends, tmp_path, name, right):
    (two_ends / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    given = tokenizer.shard_tokenizer(str(two_ends), [], skip_held_out=False, eos_token=name)
    assert given.eos_id == right
    (tmp_path / "run").mkdir()
    given.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert again.eos_id == right
    assert again.is_same(given)
    assert not again.is_same(load_tokenizer(two_ends))
    # And with what begins with that run.
    (tmp_path / "next").mkdir()
    again.save(tmp_path / "next")
    assert load_tokenizer(tmp_path / "next").eos_id == right


def test_an_end_that_the_tokenizer_has_not_is_refused(two_ends):
    with pytest.raises(UsageError, match=r"eos_token='<x>': the tokenizer has no such token; exp"):
        tokenizer.shard_tokenizer(str(two_ends), [], skip_held_out=False, eos_token="<x>")


@pytest.mark.parametrize("name", ["meta.json", "config.json"])
def test_what_earlier_versions_wrote_goes_on_with_the_end_that_it_has(two_ends, name):
    """They took a usual token first; what is made now says where it is another one."""
    (two_ends / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<fin>"}))
    assert load_tokenizer(two_ends).eos_id == 5
    (two_ends / name).write_text(json.dumps({"train": {}, "model": {}}))
    assert load_tokenizer(two_ends).eos_id == 4
    # An imported model has no documents yet.
    (two_ends / name).write_text(json.dumps({"train": {}, "model": {}, "imported": "model"}))
    assert load_tokenizer(two_ends).eos_id == (4 if name == "meta.json" else 5)


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
