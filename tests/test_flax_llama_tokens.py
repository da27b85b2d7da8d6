"""The directory of the tokenize command: what is in it, and that it is whole or not there."""

import errno
import json
import os

import numpy as np
import pytest

from examples.flax_llama import tokenize, tokens
from examples.flax_llama.config import UsageError
from examples.flax_llama.tokenizer import load_tokenizer, train_tokenizer
from examples.flax_llama.tokens import Tokens, load_tokens, write_tokens

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

TEXTS = [f"document {i}: " + "€ and words " * (i % 7) for i in range(50)]
TOKENIZER = train_tokenizer(TEXTS, "bpe:300", eos=True)


@pytest.fixture
def corpus(tmp_path):
    """Two files, one of text."""
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[:-1]]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.txt").write_text(TEXTS[-1])
    return f"{tmp_path}/a.jsonl,{tmp_path}/b.txt"


@pytest.fixture
def written(tmp_path):
    write_tokens(tmp_path / "tokens", [TEXTS[:30], TEXTS[30:]], TOKENIZER)
    return tmp_path / "tokens"


def test_the_command_writes_every_document_in_order(corpus, tmp_path):
    TOKENIZER.save(tmp_path)
    tokenize.tokenize(corpus, str(tmp_path), tmp_path / "new" / "tokens", quiet=True)
    loaded, tokenizer = load_tokens(tmp_path / "new" / "tokens")
    assert tokenizer.to_bytes() == TOKENIZER.to_bytes()
    documents = np.split(loaded.ids, loaded.ends[:-1])
    for ids, text in zip(documents, TEXTS, strict=True):
        assert ids[-1] == TOKENIZER.eos_id
        np.testing.assert_array_equal(ids[:-1], TOKENIZER.encode(text))
    assert loaded.bytes_per_token == sum(len(text.encode()) for text in TEXTS) / len(loaded.ids)
    assert isinstance(loaded.ids, np.memmap)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokens"]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_ids_take_two_bytes_where_they_can(tmp_path, monkeypatch, vocab_size, dtype):
    tokenizer = train_tokenizer(TEXTS, "bpe:300", eos=True)
    tokenizer.vocab_size = vocab_size
    last = np.array([vocab_size - 1], np.int32)
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [last for _ in texts])
    ids = write_tokens(tmp_path / "tokens", [["a"]], tokenizer).ids
    assert ids.dtype == dtype
    assert ids.tolist() == [vocab_size - 1, tokenizer.eos_id]


@pytest.mark.parametrize("error", [UsageError("line 7"), KeyboardInterrupt(), OSError(28, "full")])
def test_an_interrupted_command_leaves_nothing(tmp_path, error):
    def groups():
        yield TEXTS[:5]
        raise error

    with pytest.raises(type(error)):
        write_tokens(tmp_path / "tokens", groups(), TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_are_an_error(tmp_path):
    with pytest.raises(UsageError, match="There are no documents to tokenize"):
        write_tokens(tmp_path / "tokens", [], TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_the_command_overwrites_nothing_and_finds_out_first(corpus, tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(tokenize, "shard_tokenizer", lambda *_, **__: pytest.fail("work was done"))
    monkeypatch.setattr(
        "sys.argv",
        ["x", "--data", corpus, "--tokenizer", "bpe:300", "--out", str(tmp_path / "kept")],
    )
    with pytest.raises(SystemExit, match=r"^error: --out .*kept exists: name another one"):
        tokenize.main()


def test_the_command_says_what_it_wrote(corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "tokens"
    monkeypatch.setattr(
        "sys.argv", ["x", "--data", corpus, "--tokenizer", "bytes", "--out", str(out)]
    )
    tokenize.main()
    count = sum(len(text.encode()) + 1 for text in TEXTS)
    assert f"{count:,} tokens of 50 documents" in capsys.readouterr().out


def change_meta(directory, **changes):
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: truncate(d / "tokens.bin"), r"tokens.bin has \d+ bytes where meta.json says"),
        (lambda d: truncate(d / "ends.bin"), r"ends.bin has \d+ bytes where meta.json says 50 x"),
        (lambda d: (d / "tokens.bin").unlink(), "tokens.bin has 0 bytes"),
        (lambda d: (d / "meta.json").write_text("{"), "meta.json is not .*: JSONDecodeError"),
        (lambda d: (d / "meta.json").write_text("{}"), "meta.json is not .*: KeyError"),
        (lambda d: (d / "tokenizer.json").unlink(), "expected tokenizer.json or tokenizer.model"),
        (lambda d: change_meta(d, dtype="uint8"), "dtype='uint8' cannot hold .* 300 .* uint16"),
        (lambda d: change_meta(d, dtype="int16"), "dtype='int16' cannot hold"),
        (lambda d: change_meta(d, dtype="uint32"), "tokens.bin has .* x uint32"),
        (lambda d: np.zeros(50, np.int64).tofile(d / "ends.bin"), "ends.bin is not of tokens.bin"),
    ],
)
def test_a_damaged_directory_is_refused(written, damage, message):
    damage(written)
    with pytest.raises(UsageError, match=message):
        load_tokens(written)


def test_a_full_disk_is_told_of_the_directory(written, tmp_path, monkeypatch):
    """Which then is not there, nor anything else."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tokens.Tokenizer, "save", full)
    out = tmp_path / "new" / "tokens"
    with pytest.raises(OSError, match=rf"No space left on device: '{out}'"):
        write_tokens(out, [TEXTS], load_tokenizer(written))
    assert [*out.parent.iterdir()] == []


def test_ids_too_small_for_the_tokenizer_are_refused(written, monkeypatch):
    larger = train_tokenizer(TEXTS, "bpe:300", eos=True)
    larger.vocab_size = 65_537
    monkeypatch.setattr(tokens, "load_tokenizer", lambda *_: larger)
    with pytest.raises(UsageError, match=r"dtype='uint16' cannot hold .* 65537 ids: .* uint32"):
        load_tokens(written)


def test_the_last_documents_are_held_out():
    documents = [np.full(10, i) for i in range(100)]
    parts = Tokens.join(documents, num_bytes=1500).split()
    for part, numbers in zip(parts, (range(95), range(95, 100)), strict=True):
        assert part.bytes_per_token == 1.5
        for ids, number in zip(np.split(part.ids, part.ends[:-1]), numbers, strict=True):
            np.testing.assert_array_equal(ids, documents[number])


def test_documents_too_few_to_hold_some_out_are_refused():
    with pytest.raises(UsageError, match=r"last of 2 documents has more than 5% .* valid_data"):
        Tokens.join([np.zeros(90), np.zeros(10)], num_bytes=100).split()


@pytest.mark.parametrize(("twice", "order"), [(True, "a,b,a"), (False, "b,a"), (False, "a,a,b")])
def test_documents_that_are_there_twice_are_not_held_out(tmp_path, twice, order):
    for name in "ab":
        lines = (json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(100))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = ",".join(f"{tmp_path}/{name}.jsonl" for name in order.split(","))
    tokenize.tokenize(data, "bytes", tmp_path / "out", quiet=True)
    written, _ = load_tokens(tmp_path / "out")
    if not twice:
        train, valid = written.split()
        assert len(train.ends) + len(valid.ends) == 100 * len(order.split(","))
        return
    with pytest.raises(UsageError, match=r"last documents are among those before .* valid_data=P"):
        written.split()


def test_the_command_ends_documents_in_the_token_that_is_given(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    written = tokenize.tokenize(
        f"{tmp_path}/a.txt", "bytes", tmp_path / "out", eos_token="z", quiet=True
    )
    found, tokenizer = load_tokens(tmp_path / "out")
    assert tokenizer.decode(found.ids) == tokenizer.decode(written.ids) == "abcz"
    assert tokenizer.eos_id == found.ids[-1]


@pytest.mark.parametrize("name", ["tokens.bin", "ends.bin", "meta.json", "tokenizer.json"])
def test_a_changed_byte_is_found_and_its_file_is_named(written, name):
    """Where what is changed would be read as well: other tokens, ends, sizes, names."""
    contents = (written / name).read_bytes()
    changes = {"meta.json": (b'"bytes": ', b'"bytes": 1'), "tokenizer.json": (b'"q"', b'"QQ"')}
    place = len(contents) // 2
    flipped = contents[:place] + bytes([contents[place] ^ 1]) + contents[place + 1 :]
    changed = contents.replace(*changes[name], 1) if name in changes else flipped
    assert changed != contents
    (written / name).write_bytes(changed)
    with pytest.raises(UsageError, match=rf"{name} is damaged, or was changed"):
        load_tokens(written)


def test_what_earlier_versions_tokenized_has_no_checksums(written):
    meta = json.loads((written / "meta.json").read_text())
    del meta["crc32"]
    (written / "meta.json").write_text(json.dumps(meta))
    assert len(load_tokens(written)[0].ends) == len(TEXTS)
