"""Files by their names: literal ones, globs, lists and directories, and what is compressed."""

import bz2
import gzip
import json
import lzma
import os
import struct

import pytest
import zstandard

from examples.flax_llama import files, paths
from examples.flax_llama.documents import open_shards, texts
from examples.flax_llama.reading import Reading
from examples.flax_llama.tokenizer import load_tokenizer, train_tokenizer
from examples.flax_llama.usage import UsageError
from examples.hf.tensors import open_tensors

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

TEXTS = [f"document {i} " + "abc " * 50 for i in range(200)]


def json_lines(some):
    return "".join(json.dumps({"text": text}) + "\n" for text in some).encode()


def zst(contents, window=None, **given):
    if window:
        given = {"window_log": window, "enable_ldm": True}
    level = zstandard.ZstdCompressionParameters.from_level(1, **given)
    compressor = zstandard.ZstdCompressor(compression_params=level).compressobj()
    return compressor.compress(contents) + compressor.flush()


SKIPPED = struct.pack("<II", 0x184D2A50, 12) + b"x" * 12, struct.pack("<II", 0x184D2A5E, 9)
HALVES = json_lines(TEXTS[:100]), json_lines(TEXTS[100:])
WHOLE = b"".join(HALVES)
XZ = [lzma.compress(half) for half in HALVES]
READABLE = {
    "one.jsonl.zst": zst(WHOLE),
    "long28.jsonl.zst": zst(WHOLE, 28),
    "long31.jsonl.zst": zst(WHOLE, 31),
    "skipped.jsonl.zst": SKIPPED[0] + zst(HALVES[0]) + SKIPPED[0] + zst(HALVES[1]),
    "seekable.jsonl.zstd": zst(HALVES[0]) + zst(HALVES[1]) + SKIPPED[1] + b"y" * 9,
    "two.jsonl.gz": gzip.compress(HALVES[0]) + gzip.compress(HALVES[1]),
    "tape.jsonl.gz": gzip.compress(WHOLE) + b"\0" * 512,
    "two.jsonl.xz": b"".join(XZ),
    "padded.jsonl.xz": (b"\0" * 8).join(XZ) + b"\0" * 4,
    "far.jsonl.xz": (b"\0" * 50_000).join(XZ),
    "one.jsonl.bz2": bz2.compress(WHOLE),
    "two.jsonl.bz2": b"".join(map(bz2.compress, HALVES)),
    "CAPITALS.JSONL.GZ": gzip.compress(WHOLE),
    "Mixed.Json.Zst": zst(WHOLE),
    "plain.NDJSON": WHOLE,
    "mark.jsonl": b"\xef\xbb\xbf" + WHOLE,
    "marks.jsonl": b"".join(b"\xef\xbb\xbf" + half for half in HALVES),
    "windows.jsonl": WHOLE.replace(b"\n", b"\r\n"),
    "no_end.jsonl": WHOLE.rstrip(),
}


def read(data):
    return list(texts(open_shards(str(data))))


@pytest.mark.parametrize("name", READABLE)
def test_what_other_programs_read_is_read_whole(tmp_path, name):
    (tmp_path / name).write_bytes(READABLE[name])
    assert read(tmp_path / name) == TEXTS
    # By the directory that it is in too.
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize(("name", "size"), [("a.txt", 1), ("a.txt.gz", 1), ("a.txt", 9000)])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path, name, size):
    text = "Emma Woodhouse, handsome\n" * size
    contents = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(contents) if name.endswith("gz") else contents)
    assert "".join(read(tmp_path / name)) == text


DAMAGED = {
    # What is damaged where a second part begins ended xz and bz2 of Python without a word.
    "a.jsonl.xz": XZ[0] + b"\xfe" + XZ[1][1:],
    "a.jsonl.bz2": bz2.compress(HALVES[0]) + b"X" + bz2.compress(HALVES[1])[1:],
    "a.jsonl.gz": gzip.compress(HALVES[0]) + b"X" + gzip.compress(HALVES[1])[1:],
    "a.jsonl.zst": zst(HALVES[0]) + b"X" + zst(HALVES[1])[1:],
    "garbage.jsonl.bz2": bz2.compress(WHOLE) + b"garbage",
    "zeros.jsonl.xz": b"\0" * 4096,
    "zeros.jsonl.zst": zst(HALVES[0]) + b"\0" * 4096,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_part_is_no_end(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    what = name.rsplit(".")[-1]
    message = rf"{name}: cannot be read after line \d+: it is damaged, or was not compressed as "
    with pytest.raises(UsageError, match=message + what):
        read(tmp_path / name)


@pytest.mark.parametrize("name", [n for n in READABLE if n.startswith(("one", "two", "long31"))])
def test_a_part_that_is_cut_is_called_truncated(tmp_path, name):
    (tmp_path / name).write_bytes(READABLE[name][:-5])
    with pytest.raises(UsageError, match=rf"{name}: cannot be read after line \d+: it is truncate"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", "text".encode("utf-16"), "line 1: it begins with the mark of UTF-16"),
        ("a.txt", "text".encode("utf-16-be") and b"\xfe\xff\0t", "line 1: it begins with the mark"),
        ("a.jsonl", gzip.compress(WHOLE), r"line 1: .* compressed, as \.gz is"),
        ("a.txt", zst(WHOLE), r"line 1: .* compressed, as \.zst is"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "line 1: not"),
        (
            "a.jsonl",
            b"[" * 100_000 + b"\n",
            "line 1: not JSON: too many objects or lists in each other",
        ),
        ("a.jsonl", b'{"a":' * 900 + b"1" + b"}" * 900 + b"\n", "line 1: "),
    ],
)
def test_other_encodings_are_told_by_name(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UsageError, match=f"{name}, {message}"):
        read(tmp_path / name)


NAMES = ("part[1].jsonl", "data [en].jsonl", "what?.jsonl", "star*.jsonl", "a,b.jsonl", ",.jsonl")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_there_is_meant(tmp_path, name):
    for each in (name, "part1.jsonl", "data e.jsonl", "whats.jsonl", "stars.jsonl", "b.jsonl"):
        (tmp_path / each).write_bytes(json_lines([each]))
    assert read(tmp_path / name) == [name]
    assert read(f"{tmp_path}/{name},{tmp_path}/b.jsonl") == [name, "b.jsonl"]
    assert read(f"{tmp_path}/b.jsonl,{tmp_path}/{name}") == ["b.jsonl", name]


@pytest.mark.parametrize("folder", ["data [en]", "a,b", "what?", "x[1]/y[2]"])
@pytest.mark.parametrize("pattern", ["*.jsonl", "part[1]*", "part[0-9]*.jsonl", ""])
def test_a_directory_that_is_there_is_meant_before_a_glob(tmp_path, folder, pattern):
    names = {"*.jsonl": ["part0.jsonl", "part[1].jsonl"], "": ["part0.jsonl", "part[1].jsonl"]}
    expected = names.get(pattern, ["part[1].jsonl"] if pattern == "part[1]*" else ["part0.jsonl"])
    (tmp_path / folder).mkdir(parents=True)
    for each in ("part0.jsonl", "part[1].jsonl"):
        (tmp_path / folder / each).write_bytes(json_lines([each]))
    assert read(f"{tmp_path}/{folder}/{pattern}") == expected


def test_globs_may_have_commas_and_match_what_a_glob_matches(tmp_path):
    for each in ("a,1.jsonl", "a,2.jsonl", "b.jsonl", "part1.jsonl", "part2.jsonl"):
        (tmp_path / each).write_bytes(json_lines([each]))
    assert read(f"{tmp_path}/a,*.jsonl,{tmp_path}/b.jsonl") == ["a,1.jsonl", "a,2.jsonl", "b.jsonl"]
    assert read(f"{tmp_path}/part[12].jsonl") == ["part1.jsonl", "part2.jsonl"]


def test_many_names_are_no_path(tmp_path):
    for number in range(300):
        (tmp_path / f"{number:03}.jsonl").write_bytes(json_lines([str(number)]))
    data = ",".join(f"{tmp_path}/{number:03}.jsonl" for number in range(300))
    assert read(data) == [str(number) for number in range(300)]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UsageError, match=r"pipe.jsonl is no file but a pipe or a device"):
        read(tmp_path / "pipe.jsonl")


def test_a_divided_name_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"one does not exist. Commas are between names"):
        paths.expand(f"{tmp_path}/one, two.txt")


def names_of(tmp_path, how):
    """A file, another name of the same documents, and the settings that name both."""
    one, other = tmp_path / "one.jsonl", tmp_path / "x" / "two.jsonl"
    one.write_bytes(json_lines(TEXTS))
    other.parent.mkdir()
    match how:
        case "same":
            return f"{one},{one}"
        case "dots":
            return f"{one},{tmp_path}/x/../one.jsonl"
        case "glob":
            return f"{tmp_path}/*.jsonl,{one}"
        case "directory":
            return f"{tmp_path},{one}"
        case "link":
            other.symlink_to(one)
        case "hard link":
            os.link(one, other)
        case "copy":
            other.write_bytes(json_lines(TEXTS))
        case "compressed":
            other = other.with_name("two.jsonl.gz")
            other.write_bytes(gzip.compress(json_lines(TEXTS)))
        case "grown":
            other.write_bytes(json_lines([*TEXTS, "more"]))
        case "part":
            other.write_bytes(json_lines(TEXTS[:50]))
    return f"{one},{other}"


NAMED = ["same", "dots", "glob", "directory", "link", "hard link", "copy", "compressed"]


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("how", [*NAMED, "grown", "part"])
def test_what_is_held_out_is_so_by_all_of_its_names(tmp_path, how, place):
    """One in twenty, as of one file, and each once, wherever other files stand in the list."""
    data = names_of(tmp_path, how)
    more = tmp_path / "y"
    more.mkdir()
    (more / "more.jsonl").write_bytes(json_lines(f"more {i}" for i in range(40)))
    shards = open_shards(f"{more},{data}" if place == "first" else f"{data},{more}")
    held_out, trained = (list(texts(shards, held_out=which)) for which in (True, False))
    assert not set(held_out) & set(trained)
    assert len(set(held_out)) == len(held_out) == 10 + 2
    assert set(held_out) | set(trained) >= {*TEXTS, *(f"more {i}" for i in range(40))}


def test_files_that_differ_are_held_out_by_their_places(tmp_path):
    """As in earlier versions, whose runs go on."""
    for number in range(40):
        (tmp_path / f"{number:02}.jsonl").write_bytes(json_lines([f"text {number}"]))
    shards = open_shards(str(tmp_path))
    assert [shard.number for shard in shards] == list(range(40))
    assert list(texts(shards, held_out=True)) == ["text 19", "text 39"]


def test_a_file_that_cannot_be_read_is_told_where_it_is_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "b.jsonl").write_bytes(json_lines(TEXTS))
    shards = open_shards(str(tmp_path))
    assert files.numbers([shard.path for shard in shards]) == [0, 1]
    with pytest.raises(UsageError, match=r"a.jsonl.gz: cannot be read after line 0: it is damaged"):
        list(texts(shards))


@pytest.mark.parametrize("link", [False, True])
def test_files_to_validate_on_are_left_out_of_those_to_train_on(tmp_path, capsys, link):
    for name in ("a", "b", "valid"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([name]))
    valid = tmp_path / "valid.jsonl"
    if link:
        (tmp_path / "other").mkdir()
        valid = tmp_path / "other" / "link.jsonl"
        valid.symlink_to(tmp_path / "valid.jsonl")
    for _ in range(2):
        shards = open_shards(f"{tmp_path}/*.jsonl", valid_data=str(valid))
        assert list(texts(shards)) == ["a", "b"]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"Left out of data, since valid_data has it: {tmp_path}/valid.jsonl"]
    # What is the same is so on purpose, and told.
    paths.say_once.cache_clear()
    assert list(texts(open_shards(str(valid), valid_data=str(valid)))) == ["valid"]
    assert "validated on what was trained on" in capsys.readouterr().err


def test_an_error_that_quotes_a_line_is_one_line(tmp_path):
    lines = [{"te\nxt": "a"}, "a\nb\u2028c\0", {"text": "b"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reading = Reading(on_bad_line="skip")
    (shard,) = open_shards(str(tmp_path), reading=reading)
    assert [text for text, _ in shard.documents()] == ["b"]
    assert all(reason.isprintable() for reason in reading.bad_lines.values())
    assert r"--text-field NAME could name te\nxt." in reading.summary()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_files_beside_a_tokenizer_that_are_too_deep_are_named(tmp_path, name):
    train_tokenizer([], "bytes", eos=True).save(tmp_path)
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(UsageError, match=rf"{name} is not JSON: too many objects or lists in each"):
        load_tokenizer(tmp_path)


def test_an_index_with_a_name_that_no_file_has_is_refused(tmp_path):
    index = {"weight_map": {"a": f"{'a' * 5000}.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"index.json names a+\.safetensors, which is missing"):
        open_tensors(tmp_path)


def test_a_name_that_no_file_has_is_no_tokenizer():
    with pytest.raises(UsageError, match="there is no such file"):
        load_tokenizer("a" * 5000)


def test_a_long_list_is_looked_at_once(tmp_path, monkeypatch):
    files = [tmp_path / f"part{i}" / "text.txt" for i in range(100)]
    for file in files:
        file.parent.mkdir()
        file.write_text("text")
    asked = []
    isdir = paths.os.path.isdir
    monkeypatch.setattr(paths.os.path, "isdir", lambda path: asked.append(path) or isdir(path))
    assert paths.expand(",".join(map(str, files))) == files
    assert len(asked) < 3 * len(files)
