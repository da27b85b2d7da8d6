"""Documents as they come out of files and of the hub, and what is said of those that cannot."""

import builtins
import errno
import gzip
import json
import lzma
import os
import sys

import pytest
import zstandard

from examples.flax_llama import documents, files, hub
from examples.flax_llama.reading import Reading
from examples.flax_llama.usage import UsageError

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
# Two to four bytes a character, lines of their own, and one document that is empty.
TEXTS = ["Emma Woodhouse,\nhandsome", "", "ß ünï €uro\n\n", "Goth 😀" * 3, "last\r\n"]


def json_lines(texts):
    return "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts).encode()


def write(path, contents):
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](contents))
    return path


def read(path):
    (shard,) = documents.open_shards(str(path))
    return [text for text, _ in shard.documents()]


def resumed(shard):
    """For every position of a shard, the documents before it, and those read on from it."""
    everything = list(shard.documents())
    for count, (_, position) in enumerate(everything, 1):
        position = json.loads(json.dumps(position))
        before = [text for text, _ in everything[:count]]
        yield before, [text for text, _ in shard.documents(position)]


def test_split_keeps_the_last_twentieth_of_each_of_six_novels():
    train, valid = documents.read_split()
    assert [novel.splitlines()[0] for novel in train] == list(documents.TITLES)
    for kept, held_out in zip(train, valid, strict=True):
        assert len(held_out) / (len(kept) + len(held_out)) == pytest.approx(0.05, abs=1e-5)
    whole = "".join(a + b for a, b in zip(train, valid, strict=True)).encode()
    assert whole == lzma.decompress(documents.TEXT.read_bytes())
    assert len(whole) == 4_025_039


@pytest.mark.parametrize("compression", COMPRESS)
def test_json_lines_are_documents_and_blank_lines_are_not(tmp_path, compression):
    contents = json_lines(TEXTS[:2]) + b"\n  \n" + json_lines(TEXTS[2:]).rstrip()
    assert read(write(tmp_path / f"a.jsonl{compression}", contents)) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_short_text_file_is_one_document(tmp_path, compression):
    text = "".join(TEXTS)
    assert read(write(tmp_path / f"a.txt{compression}", text.encode())) == [text]


def test_a_long_text_file_is_cut_at_ends_of_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 50)
    text = "".join(f"line {i} € of the text\n" for i in range(100))
    pieces = read(write(tmp_path / "a.txt", text.encode()))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(50 <= len(piece.encode()) < 50 + 26 for piece in pieces[:-1])


def test_a_line_longer_than_a_piece_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE", 50)
    text = "x" + 200 * "€"
    pieces = read(write(tmp_path / "a.txt", text.encode()))
    assert "".join(pieces) == text
    assert {len(piece.encode()) for piece in pieces[:-1]} <= {50, 51, 52}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_reading_goes_on_from_every_position(tmp_path, monkeypatch, kind, compression):
    monkeypatch.setattr(files, "PIECE", 50)
    text = "".join(f"line {i}\n" for i in range(20)) + 100 * "€" + "\nthe end"
    contents = json_lines(TEXTS) if kind == "jsonl" else text.encode()
    path = write(tmp_path / f"a.{kind}{compression}", contents)
    assert len(read(path)) >= 5
    for before, after in resumed(files.File(path)):
        assert before + after == read(path)


@pytest.mark.parametrize(("kind", "line"), [("jsonl", b"{]"), ("txt", b"\xff")])
def test_lines_are_counted_on_from_a_position(tmp_path, monkeypatch, kind, line):
    monkeypatch.setattr(files, "PIECE", len(json_lines("a")))
    path = write(tmp_path / f"a.{kind}", json_lines("abcde") + line + b"\n")
    stream = files.File(path).documents()
    _, position = [next(stream) for _ in range(3)][-1]
    assert position == [len(json_lines("abc")), 3]
    with pytest.raises(UsageError, match=rf"a.{kind}, line 6: not"):
        list(files.File(path).documents(position))


def test_all_frames_of_a_zstd_file_are_read(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(COMPRESS[".zst"](json_lines([text])) for text in TEXTS))
    assert read(path) == TEXTS


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, kind, compression):
    path = write(tmp_path / f"a.{kind}{compression}", json_lines(f"text {i}" for i in range(5000)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match=rf"a.{kind}{compression}: cannot be read after line \d+"):
        read(path)


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_an_error(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(b"plain text")
    with pytest.raises(UsageError, match=rf"a.txt{compression}: cannot be read after line 0"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"text": "a"',
            "not JSON: Expecting .*; of JSON files each line is read as an object of",
        ),
        (b'{"text": "\xff"}', "not UTF-8: .* 0xff"),
        (b'{"content": "a"}', "expected an object with a string 'text', got .*content"),
        (b'{"text": null}', "expected an object with a string 'text'"),
        (b'["text"]', "expected an object with a string 'text', got .*; of JSON files each line"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "a.json.gz", json_lines(["a", "b"]) + line + b"\n" + json_lines(["c"]))
    with pytest.raises(UsageError, match=f"a.json.gz, line 3: {message}"):
        read(path)


@pytest.mark.parametrize("end", [b"", b"\nmore"])
def test_undecodable_text_is_an_error_that_names_file_and_line(tmp_path, end):
    path = write(tmp_path / "a.txt.xz", b"one\ntwo\nthree \xe2\x82" + end)
    with pytest.raises(UsageError, match=r"a.txt.xz, line 3: not UTF-8"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_file_that_has_shrunk_is_no_place_to_go_on(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "PIECE", 5)
    path = write(tmp_path / name, b"one of\ntwo of\nthree\n")
    *_, (_, position) = files.File(path).documents()
    write(path, b"one of\n")
    with pytest.raises(UsageError, match="shorter than when the position was saved"):
        list(files.File(path).documents(position))


def test_globs_and_lists_are_expanded_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        write(tmp_path / name, json_lines([name]))
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "d.txt", b"d")
    data = f"{tmp_path}/c.jsonl,{tmp_path}/*.txt,{tmp_path}/**/d.txt"
    names = [shard.path.name for shard in documents.open_shards(data)]
    assert names == ["c.jsonl", "a.txt", "b.txt", "d.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "none.txt does not exist"),
        ("table.csv,", "data='' is empty, or has nothing before or after a comma"),
        ("*.md", "md' matches no file"),
        ("empty.txt", "empty.txt is empty"),
        ("table.csv", r"table.csv: expected a name that ends in one of .txt, .*.jsonl"),
        ("table.csv.gz", r"table.csv.gz: expected a name"),
        ("folder", r"folder: there is no file in it or below it whose name ends in one of .txt"),
    ],
)
def test_what_is_no_file_of_documents_is_refused(tmp_path, name, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for table in ("table.csv", "table.csv.gz"):
        (tmp_path / table).write_text("a,b")
    with pytest.raises(UsageError, match=message):
        documents.open_shards(f"{tmp_path}/{name}")


def test_one_document_in_twenty_of_every_file_is_held_out(tmp_path):
    for shard in range(3):
        write(tmp_path / f"{shard}.jsonl", json_lines(f"{shard}/{i}" for i in range(100)))
    shards = documents.open_shards(f"{tmp_path}/*.jsonl")
    held_out, kept, everything = (
        list(documents.texts(shards, held_out=which)) for which in (True, False, None)
    )
    assert sorted(held_out + kept) == sorted(everything)
    assert len(everything) == 300
    assert [sum(text.startswith(f"{shard}/") for text in held_out) for shard in range(3)] == 3 * [5]


def test_files_of_one_document_have_held_out_ones_too():
    assert sum(documents.is_held_out(shard, 0) for shard in range(100)) == 5


def test_a_sample_is_of_all_files_and_of_no_held_out_document(tmp_path):
    for shard in range(3):
        write(tmp_path / f"{shard}.jsonl", json_lines(f"{shard}/{i:03}" for i in range(200)))
    shards = documents.open_shards(f"{tmp_path}/*.jsonl")
    texts = list(documents.sample(shards, 3 * 5 * 25, skip_held_out=True))
    for shard in range(3):
        mine = [text for text in texts if text.startswith(f"{shard}/")]
        assert len(mine) == 25
        assert set(mine) < set(documents.texts(shards, held_out=False))


def test_a_sample_opens_a_bounded_number_of_files():
    opened = []

    class Counted:
        def __init__(self, index):
            self.index = index

        def documents(self, position=None):
            opened.append(self.index)
            yield "text", None

    list(documents.sample([Counted(i) for i in range(1000)], 100, skip_held_out=False))
    assert 16 <= len(opened) <= documents.SAMPLED_SHARDS
    assert max(opened) > 900


@pytest.fixture
def c4(tmp_path):
    """A directory in C4's layout: three files to train on and one to validate on."""
    for split, count in {"train": 3, "validation": 1}.items():
        for shard in range(count):
            texts = [f"{split} {shard} {i} €" for i in range(5)]
            name = f"c4-{split}.{shard:05}-of-{count:05}.json.gz"
            write(tmp_path / name, json_lines(texts))
    return tmp_path


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_hub_has_the_documents_of_its_files(c4, split):
    from_hub = documents.open_shards(f"hf:{c4}", split=split)
    from_files = documents.open_shards(f"{c4}/c4-{split}.*.json.gz")
    assert len(from_hub) == len(from_files)
    assert list(documents.texts(from_hub)) == list(documents.texts(from_files))
    named = documents.open_shards(f"hf:{c4}::{split}", split="other")
    assert list(documents.texts(named)) == list(documents.texts(from_files))


def test_the_hub_goes_on_from_every_position(c4):
    shard = documents.open_shards(f"hf:{c4}")[1]
    for before, after in resumed(shard):
        assert before + after == [f"train 1 {i} €" for i in range(5)]


def test_hub_errors_name_the_data_set(c4):
    with pytest.raises(UsageError, match=r"data=hf:.*, split 'test': .*train.*validation"):
        documents.open_shards(f"hf:{c4}", split="test")
    with pytest.raises(UsageError, match=r"data=hf:.*:big, .*big"):
        documents.open_shards(f"hf:{c4}:big")
    for path in c4.glob("*train*"):
        write(path, b'{"content": "a"}\n')
    message = r"hf:.*: shard 0, document 1: .* string 'text', .*text_field=NAME could name content"
    with pytest.raises(UsageError, match=message):
        list(documents.texts(documents.open_shards(f"hf:{c4}")))


def test_a_broken_shard_of_the_hub_is_named(c4):
    path = sorted(c4.glob("*train*"))[1]
    shards = documents.open_shards(f"hf:{c4}")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"hf:.*: shard 1, 0 documents on, cannot be read: EOF"):
        list(documents.texts(shards))


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the extra huggingface: pip install"):
        hub.open_shards("hf:allenai/c4:en", "train", Reading())


def nested(texts):
    return "".join(json.dumps({"meta": {"content": t}, "id": "x"}) + "\n" for t in texts).encode()


def test_the_field_of_the_text_may_be_inside_of_an_object(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", nested(TEXTS))
    (shard,) = documents.open_shards(str(path), reading=Reading("meta.content"))
    assert [text for text, _ in shard.documents()] == TEXTS
    with pytest.raises(UsageError, match=r"line 1: .*'text'.*NAME could name meta\.content, id"):
        read(path)
    with pytest.raises(UsageError, match=r"a string 'meta\.content\.more'"):
        list(files.File(path, Reading("meta.content.more")).documents())


def test_the_hub_has_fields_too(c4):
    for path in c4.glob("*train*"):
        write(path, nested([path.name]))
    shards = documents.open_shards(f"hf:{c4}", reading=Reading("meta.content"))
    assert list(documents.texts(shards)) == sorted(path.name for path in c4.glob("*train*"))


BAD_LINES = [b"{]", b'{"text": 1}', b"\xff", b'{"text": "\\ud83d"}', b"[]", b"{", b"1"]


def test_bad_lines_are_left_out_and_counted_once_where_that_is_asked_for(tmp_path, capsys):
    lines = [b'{"text": "%d"}' % number for number in range(8)]
    mixed = b"\n".join(line for pair in zip(lines, [*BAD_LINES, b""], strict=True) for line in pair)
    reading = Reading(on_bad_line="skip", max_bad_lines=len(BAD_LINES))
    shard = files.File(write(tmp_path / "a.jsonl", mixed), reading)
    for before, after in resumed(shard):
        assert before + after == [str(number) for number in range(8)]
    assert reading.summary() == "Left out 7 lines that are no text."
    # Every other line, and the first ones are shown.
    assert [int(where.split()[-1]) for where in reading.bad_lines] == list(range(2, 15, 2))
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in shown] == [
        f"left out {tmp_path}/a.jsonl, line {number}" for number in (2, 4, 6, 8, 10)
    ]
    few = files.File(shard.path, Reading(on_bad_line="skip", max_bad_lines=6))
    message = r"line 14: .* one more than max_bad_lines=6; the first is .*a.jsonl, line 2\."
    with pytest.raises(UsageError, match=message):
        list(few.documents())


def test_a_field_that_was_meant_is_told_once_and_again_in_the_end(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", nested("abcdefgh"))
    reading = Reading(on_bad_line="skip", max_bad_lines=8)
    assert [*files.File(path, reading).documents()] == []
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 5 + 1
    hint = "--text-field NAME could name meta.content, id."
    assert [line for line in shown if "NAME" in line] == [hint]
    assert reading.summary() == f"Left out 8 lines that are no text. {hint}"
    with pytest.raises(UsageError, match=rf"^Too few\. Left out 8 lines .*{hint}$"), reading.told():
        raise UsageError("Too few.")
    few = files.File(path, Reading(on_bad_line="skip", max_bad_lines=7))
    message = (
        r"text_field=NAME could name meta\.content, id\. That is one more than max_bad_lines=7"
    )
    with pytest.raises(UsageError, match=message):
        list(few.documents())
    # What is enough is not complained of.
    with pytest.raises(UsageError, match=r"^Other\.$"), Reading().told():
        raise UsageError("Other.")


def test_a_bad_line_of_a_text_and_of_the_hub_is_left_out_alone(tmp_path, c4, capsys):
    reading = Reading(on_bad_line="skip")
    path = write(tmp_path / "a.txt", b"one\ntwo \xff\nthree\n")
    for _ in range(2):
        assert [text for text, _ in files.File(path, reading).documents()] == ["one\nthree\n"]
    first, *_ = sorted(c4.glob("*train*"))
    write(first, b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    shard, *_ = documents.open_shards(f"hf:{c4}", reading=reading)
    assert [text for text, _ in shard.documents()] == ["a", "b"]
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert list(reading.bad_lines) == [f"{path}, line 2", f"hf:{c4}: shard 0, document 2"]


def test_a_directory_is_all_documents_in_it_and_below(tmp_path):
    names = ("b.txt", "a/d.jsonl.gz", "a/c.txt", "z.json")
    others = ("README.md", "LICENSE.txt", ".hidden.txt", ".git/e.txt", "table.csv")
    for name in names + others:
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "text" / name, json_lines([name]))
    shards = documents.open_shards(f"{tmp_path}/text")
    found = [str(shard.path.relative_to(tmp_path / "text")) for shard in shards]
    assert found == sorted(names)
    # A glob that finds a directory and what is in it reads nothing twice.
    both = documents.open_shards(f"{tmp_path}/text/a/**")
    assert [shard.path.name for shard in both] == ["c.txt", "d.jsonl.gz"]


def denied(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied", "there")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.txt.zst"])
def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, json_lines("a"))
    monkeypatch.setattr(builtins, "open", denied)
    with pytest.raises(UsageError, match=rf"^data={path} cannot be read: Permission denied\.$"):
        documents.open_shards(str(path))
    with pytest.raises(UsageError, match=rf"^{path}, after line 0, cannot be read: Permission de"):
        list(files.File(path).documents())


def test_directories_that_may_not_be_looked_into_are_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        with pytest.raises(UsageError, match=r"valid_data=there cannot be read: Permission denied"):
            documents.open_shards(str(tmp_path), name="valid_data")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=rf"cannot be read: no permission for {tmp_path}\."):
        documents.open_shards(f"{tmp_path}/*.txt")
