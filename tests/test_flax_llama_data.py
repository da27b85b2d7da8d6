"""Batches to train on and tokens to validate on, from every kind of source."""

import contextlib
import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.flax_llama import data, documents, stream, validation
from examples.flax_llama.config import UsageError
from examples.flax_llama.data import open_data
from examples.flax_llama.interleaved import merged
from examples.flax_llama.reading import Reading
from examples.flax_llama.rows import TokenRows
from examples.flax_llama.stream import DocumentGroups
from examples.flax_llama.tokenizer import train_tokenizer
from examples.flax_llama.tokens import Tokens, write_tokens

BATCH, SEQ = 4, 20
# Different lengths, none a multiple of another, and one document that is longer than some rows.
TEXTS = [f"<{i}>" + "word " * (i % 9) for i in range(190)] + ["long " * 30]
VALID_TEXTS = [f"held out {i}" for i in range(30)]
TOKENIZER = train_tokenizer(TEXTS, "bytes", eos=True)


@pytest.fixture
def small_text(monkeypatch):
    """The opening of every novel in place of all of it."""
    train, valid = documents.read_split()
    split = [novel[:5000] for novel in train], [novel[:1001] for novel in valid]
    monkeypatch.setattr(data, "read_split", lambda: split)
    data.load_corpus.cache_clear()
    yield split
    data.load_corpus.cache_clear()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Settings of `open_data` for the same documents from every kind of source."""
    root = tmp_path_factory.mktemp("sources")
    (root / "hub").mkdir()
    (root / "tokenizer").mkdir()
    TOKENIZER.save(root / "tokenizer")
    for shard in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[shard::3])
        (root / f"{shard}.jsonl").write_text(lines)
        (root / "hub" / f"train-{shard:05}-of-00003.jsonl").write_text(lines)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in VALID_TEXTS)
    (root / "valid.jsonl").write_text(lines)
    (root / "hub" / "validation-00000-of-00001.jsonl").write_text(lines)
    write_tokens(root / "tokens", [TEXTS], TOKENIZER)
    kinds = {
        "tokens": {"data": str(root / "tokens"), "valid_data": str(root / "valid.jsonl")},
        "files": {"data": f"{root}/[0-9].jsonl", "valid_data": str(root / "valid.jsonl")},
        "hub": {"data": f"hf:{root}/hub"},
    }
    common = {"batch": BATCH, "seq": SEQ, "tokenizer": str(root / "tokenizer")}
    return {kind: common | settings for kind, settings in kinds.items()}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Several groups in an epoch."""
    monkeypatch.setattr(stream, "GROUP_DOCUMENTS", 30)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def tokens_of(settings, count):
    opened = open_data(**settings)
    batches = take(opened.train, count)
    opened.train.close()
    return np.stack([batch["tokens"] for batch in batches])


def texts_of(targets):
    """The documents of some tokens, in order, up to the last that is whole."""
    (ends,) = np.nonzero(targets == TOKENIZER.eos_id)
    return [TOKENIZER.decode(ids) for ids in np.split(targets, ends)[:-1]]


def texts_of_rows(rows):
    return texts_of(rows[..., 1:].ravel())


NUM_TOKENS = sum(len(text.encode()) + 1 for text in TEXTS)
EPOCH = math.ceil(NUM_TOKENS / (BATCH * SEQ))
KINDS = ["tokens", "files", "hub"]
STREAMS = ["files", "hub"]


@pytest.mark.parametrize(("name", "size"), [("bytes", 256), ("bpe:400", 400)])
def test_built_in_tokens_decode_to_the_two_parts_of_the_text(small_text, name, size):
    train, valid = map("".join, small_text)
    opened = open_data(tokenizer=name, batch=BATCH, seq=SEQ)
    assert opened.tokenizer.vocab_size == size
    assert opened.tokenizer.decode(opened.train_tokens) == train
    targets = opened.valid.rows[:, 1:][opened.valid.mask]
    assert opened.tokenizer.decode(targets) == valid
    assert opened.valid.rows[0, 0] == opened.train_tokens[-1]
    assert opened.valid.bytes_per_token == len(valid.encode()) / len(targets)


def test_the_built_in_tokenizer_is_trained_on_the_training_part(small_text):
    trained = open_data(tokenizer="bpe:400", batch=BATCH, seq=SEQ).tokenizer
    expected = train_tokenizer(small_text[0], "bpe:400", eos=False)
    assert trained.to_bytes() == expected.to_bytes()


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight(small_text):
    scores = open_data(tokenizer="bytes", batch=BATCH, seq=SEQ).valid.scores(math.log(256))
    assert scores["bits_per_byte"] == pytest.approx(8)
    assert scores["perplexity"] == pytest.approx(256)
    assert validation.perplexity(1e4) == math.inf
    assert math.isnan(validation.perplexity(math.nan))


def test_unigram_loss_is_add_one_smoothed_cross_entropy(small_text):
    opened = open_data(tokenizer="bytes", batch=BATCH, seq=SEQ)
    corpus = data.load_corpus("bytes")
    frequency = {i: 1 for i in range(256)}
    for token in corpus.train.ids.tolist():
        frequency[token] += 1
    total = sum(frequency.values())
    expected = [-math.log(frequency[token] / total) for token in corpus.valid.ids.tolist()]
    assert data.unigram_loss(opened) == pytest.approx(sum(expected) / len(expected))


def test_an_epoch_of_tokens_has_every_row_once_and_the_next_another_order():
    tokens = Tokens.join([np.arange(8 * 5 + 1, dtype=np.uint16)], num_bytes=1)
    batches = take(data.token_batches(tokens, batch=4, seq=5), 4)
    epochs = [np.concatenate([b["tokens"] for b in batches[i : i + 2]]) for i in (0, 2)]
    for epoch in epochs:
        assert epoch.shape == (8, 6)
        assert epoch.dtype == np.int32
        np.testing.assert_array_equal(np.sort(epoch[:, 0]), np.arange(0, 40, 5))
        np.testing.assert_array_equal(epoch - epoch[:, :1], np.tile(np.arange(6), (8, 1)))
    assert (epochs[0] != epochs[1]).any()
    assert all(batch["mask"].all() and batch["mask"].shape == (4, 5) for batch in batches)


@pytest.mark.parametrize("kind", STREAMS)
def test_an_epoch_of_a_stream_has_every_document_once_and_the_next_another_order(sources, kind):
    texts = texts_of_rows(tokens_of(sources[kind], 3 * EPOCH))
    size = len(TEXTS)
    assert len(texts) > 2 * size
    one, two = texts[:size], texts[size : 2 * size]
    assert sorted(one) == sorted(two) == sorted(TEXTS)
    assert one != two
    assert one != TEXTS


@pytest.mark.parametrize("kind", STREAMS)
def test_a_row_of_a_stream_begins_with_the_last_token_of_the_one_before(sources, kind):
    rows = tokens_of(sources[kind], 2 * EPOCH).reshape(-1, SEQ + 1)
    assert rows.dtype == np.int32
    assert rows[0, 0] == TOKENIZER.eos_id
    np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])


def test_documents_are_shuffled_beyond_the_order_of_the_files(sources):
    settings = sources["files"]
    texts = texts_of_rows(tokens_of(settings, EPOCH))
    in_files = list(documents.texts(documents.open_shards(settings["data"])))
    places = np.array([in_files.index(text) for text in texts[:60]])
    assert np.mean(np.diff(places) == 1) < 0.2


def test_files_are_in_another_order_each_epoch(sources):
    groups = DocumentGroups(documents.open_shards(sources["files"]["data"]), seed=0)
    # Every third text is in the same file.
    orders = {
        tuple(dict.fromkeys(TEXTS.index(text) % 3 for text, _ in groups.documents(epoch)))
        for epoch in range(10)
    }
    assert len(orders) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_order_depends_on_the_seed_alone(sources, kind):
    one, same, other = (tokens_of(sources[kind] | {"seed": seed}, 5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_files_and_the_hub_are_tokenized_and_packed_alike(sources):
    one, other = (tokens_of(sources[kind], 2 * EPOCH) for kind in STREAMS)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_without_packing_a_row_is_a_document_cut_or_padded(sources, kind):
    opened = open_data(**sources[kind] | {"packing": False})
    count = math.ceil(len(TEXTS) / BATCH)
    batches = take(opened.train, count)
    opened.train.close()
    tokens, mask = (np.concatenate([b[name] for b in batches]) for name in ("tokens", "mask"))
    expected = [TOKENIZER.encode_documents([text])[0][: SEQ + 1].tolist() for text in TEXTS]
    rows = [
        row[: 1 + np.count_nonzero(counts)].tolist()
        for row, counts in zip(tokens, mask, strict=True)
    ]
    assert sorted(rows[: len(TEXTS)]) == sorted(expected)
    # The targets that count come first.
    np.testing.assert_array_equal(mask, np.sort(mask, axis=1)[:, ::-1])
    assert tokens.shape == (BATCH * count, SEQ + 1)
    assert mask.dtype == bool


RESUMED = """
import hashlib, json, sys
from examples.flax_llama import stream
from examples.flax_llama.data import open_data
stream.GROUP_DOCUMENTS = 30
digests = []
for settings, state in json.load(sys.stdin):
    opened = open_data(**settings)
    opened.train.set_state(state)
    digest = hashlib.sha256()
    for _ in range(5):
        batch = next(opened.train)
        digest.update(batch["tokens"].tobytes() + batch["mask"].tobytes())
    opened.train.close()
    digests.append(digest.hexdigest())
print(json.dumps(digests))
"""


@pytest.mark.ci
@pytest.mark.long("every kind of source from six positions each, in another process")
def test_a_new_process_goes_on_from_every_position_bit_for_bit(sources):
    cases, expected = [], []
    for kind, packing in itertools.product(KINDS, (True, False)):
        settings = sources[kind] | {"packing": packing}
        opened = open_data(**settings)
        epoch = EPOCH if packing else math.ceil(len(TEXTS) / BATCH)
        batches, states = [], [opened.train.get_state()]
        for batch in itertools.islice(opened.train, 2 * epoch + 5):
            batches.append(batch["tokens"].tobytes() + batch["mask"].tobytes())
            states.append(opened.train.get_state())
        opened.train.close()
        # At the start, within an epoch, across its end, and in the next one.
        for step in (0, 1, epoch // 2, epoch - 2, epoch, 2 * epoch - 3):
            cases.append((settings, states[step]))
            expected.append(hashlib.sha256(b"".join(batches[step : step + 5])).hexdigest())
    result = subprocess.run(
        [sys.executable, "-c", RESUMED],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected


ROWS = [{"packing": True}, {"packing": False}, {"attend_across": False}]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_iterator_goes_back_to_every_position(sources, kind, rows):
    opened = open_data(**sources[kind] | rows)
    states, batches = [], []
    for _ in range(EPOCH + 3):
        states.append(json.loads(json.dumps(opened.train.get_state())))
        batches.append(next(opened.train))
    for step in range(0, len(states), 7):
        opened.train.set_state(states[step])
        batch = next(opened.train)
        assert batch.keys() == batches[step].keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(array, batches[step][name])
    opened.train.close()


def check_apart(rows, masks, segments):
    """Segments go up by one after each end, and no target is in another one than what is before."""
    ended = np.cumsum(rows == TOKENIZER.eos_id, axis=1)
    expected = 1 + np.pad(ended, ((0, 0), (1, 0)))[:, :-1]
    np.testing.assert_array_equal(segments[:, 1:][masks], expected[:, 1:][masks])
    np.testing.assert_array_equal(segments[:, :-1][masks], expected[:, 1:][masks])
    assert segments.dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
def test_documents_apart_are_numbered_and_their_first_tokens_are_no_targets(sources, kind):
    opened = open_data(**sources[kind] | {"attend_across": False})
    batches = take(opened.train, EPOCH)
    opened.train.close()
    rows, masks, segments = (
        np.concatenate([batch[name] for batch in batches])
        for name in ("tokens", "mask", "segments")
    )
    check_apart(rows, masks, segments)
    # All others are.
    np.testing.assert_array_equal(masks, rows[:, :-1] != TOKENIZER.eos_id)
    assert (segments.max(axis=1) > 1).mean() > 0.5
    valid = opened.valid
    check_apart(valid.rows, valid.mask, valid.segments)
    documents = TOKENIZER.encode_documents(VALID_TEXTS)
    targets = np.concatenate([ids[1:] for ids in documents])
    np.testing.assert_array_equal(valid.rows[:, 1:][valid.mask], targets)
    some = open_data(**sources[kind] | {"attend_across": False, "eval_tokens": 30}).valid
    np.testing.assert_array_equal(some.rows[:, 1:][some.mask], targets[:30])


def test_documents_without_an_end_are_apart_too():
    parts = [np.arange(size) for size in (3, 0, 1, 9, 4)]
    tokens = Tokens.join(parts, num_bytes=17)
    rows = TokenRows(tokens, seq=5, packing=True, attend_across=False)
    found = [rows[index] for index in range(len(rows))]
    assert [row["tokens"].tolist() for row in found] == [
        [0, 1, 2, 0, 0, 1],
        [1, 2, 3, 4, 5, 6],
        [6, 7, 8, 0, 1, 2],
    ]
    assert [row["segments"].tolist() for row in found] == [
        [1, 1, 1, 3, 4, 4],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 2, 2, 2],
    ]
    assert [row["mask"].tolist() for row in found] == [
        [True, True, False, False, True],
        [True] * 5,
        [True, True, False, True, True],
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_hosts_share_the_rows_of_each_batch_of_tokens(sources, packing):
    settings = sources["tokens"] | {"packing": packing}
    whole = tokens_of(settings, 2 * EPOCH)
    parts = [
        tokens_of(settings | {"process_index": host, "process_count": 2}, 2 * EPOCH)
        for host in range(2)
    ]
    assert parts[0].shape == (2 * EPOCH, BATCH // 2, SEQ + 1)
    for one, rows in zip(whole, np.concatenate(parts, axis=1), strict=True):
        np.testing.assert_array_equal(np.sort(one, axis=0), np.sort(rows, axis=0))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("kind", STREAMS)
def test_hosts_have_documents_of_their_own_and_together_all(sources, kind, count):
    shards = documents.open_shards(sources[kind]["data"])
    for epoch in range(2):
        parts = [
            [
                text
                for text, _ in DocumentGroups(
                    shards, seed=0, process_index=host, process_count=count
                ).documents(epoch)
            ]
            for host in range(count)
        ]
        assert sorted(itertools.chain(*parts)) == sorted(TEXTS)
        assert min(map(len, parts)) > len(TEXTS) / count / 2


def test_hosts_read_files_of_their_own_where_their_number_allows_it(sources):
    shards = documents.open_shards(sources["files"]["data"])
    groups = DocumentGroups(shards, seed=0, process_index=1, process_count=3)
    texts = [text for text, _ in groups.documents(0)]
    assert sorted(texts) in [sorted(TEXTS[shard::3]) for shard in range(3)]


@pytest.mark.parametrize("kind", STREAMS)
def test_a_host_has_its_part_of_a_batch(sources, kind):
    rows = [
        tokens_of(sources[kind] | {"process_index": host, "process_count": 2}, 10)
        for host in range(2)
    ]
    assert rows[0].shape == rows[1].shape == (10, BATCH // 2, SEQ + 1)
    assert not set(texts_of_rows(rows[0])) & set(texts_of_rows(rows[1]))


@pytest.mark.parametrize("hosts", [1, 2, 4, 6])
def test_streams_of_three_hosts_go_on_on_any_number_of_them(sources, hosts):
    """The position of a part of a batch is one of the whole batch."""
    settings = sources["files"] | {"batch": 12}

    def parts(count):
        found = [
            open_data(**settings | {"process_index": host, "process_count": count}).train
            for host in range(count)
        ]
        for train in found:
            stack.callback(train.close)
        return found

    def next_rows(trains, batches):
        rows = [[next(train)["tokens"] for _ in range(batches)] for train in trains]
        # In any order within a batch.
        return [
            np.sort(np.concatenate(batch), axis=0).tolist() for batch in zip(*rows, strict=True)
        ]

    with contextlib.ExitStack() as stack:
        three, others = parts(3), parts(hosts)
        next_rows(three, EPOCH // 2)
        positions = [json.loads(json.dumps(train.get_state())) for train in three]
        expected = next_rows(three, EPOCH)
        for train in others:
            train.set_state(merged(positions))
        assert next_rows(others, 2) == expected[:2]
        # And on from there, with as many as at first.
        positions = [json.loads(json.dumps(train.get_state())) for train in others]
        for train in three:
            train.set_state(merged(positions))
        assert next_rows(three, EPOCH - 2) == expected[2:]


@pytest.mark.parametrize("targets", [1, 11, 24, 25, 47, 48, 49])
def test_every_held_out_token_is_a_target_exactly_once(targets):
    ids = np.arange(1, targets + 1, dtype=np.int32)
    groups = [([part], 1) for part in np.array_split(ids, 3)]
    valid = validation.read_valid(groups, [0], seq=6, packing=True, num_tokens=None)
    tokens_NxBxS1, mask_NxBxS, segments = valid.batches(4)
    assert segments is None
    assert tokens_NxBxS1.shape == (math.ceil(targets / 24), 4, 7)
    assert valid.num_tokens == targets
    np.testing.assert_array_equal(tokens_NxBxS1[..., 1:][mask_NxBxS], ids)
    np.testing.assert_array_equal(tokens_NxBxS1[..., :-1][mask_NxBxS], ids - 1)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("count", [1, 20, 100, 237])
def test_as_many_tokens_are_held_out_as_asked(sources, packing, count):
    settings = sources["files"] | {"packing": packing, "eval_tokens": count}
    valid, other = (open_data(**settings | {"seed": seed}).valid for seed in (0, 1))
    assert valid.num_tokens == count
    assert valid.mask.any(axis=1).all()
    np.testing.assert_array_equal(valid.rows, other.rows)
    everything = open_data(**settings | {"eval_tokens": None}).valid
    targets = valid.rows[:, 1:][valid.mask]
    np.testing.assert_array_equal(targets, everything.rows[:, 1:][everything.mask][:count])


@pytest.mark.parametrize("kind", KINDS)
def test_text_to_validate_on_may_be_of_another_source(sources, kind):
    valid = open_data(**sources[kind]).valid
    assert texts_of(valid.rows[:, 1:][valid.mask]) == VALID_TEXTS
    assert valid.rows[0, 0] == TOKENIZER.eos_id
    num_bytes = sum(len(text.encode()) for text in VALID_TEXTS)
    assert valid.num_tokens == num_bytes + len(VALID_TEXTS)
    assert valid.bytes_per_token == num_bytes / valid.num_tokens


def test_without_packing_documents_are_validated_one_by_one(sources):
    valid = open_data(**sources["files"] | {"packing": False}).valid
    expected = [TOKENIZER.encode_documents([text])[0].tolist() for text in VALID_TEXTS]
    rows = [
        row[: 1 + mask.sum()].tolist() for row, mask in zip(valid.rows, valid.mask, strict=True)
    ]
    assert rows == expected


@pytest.mark.parametrize("kind", ["files", "tokens"])
def test_what_is_held_out_by_default_is_not_trained_on(sources, kind):
    settings = sources[kind] | {"valid_data": None}
    opened = open_data(**settings)
    held_out = texts_of(opened.valid.rows[:, 1:][opened.valid.mask])
    # Rows of tokens are shuffled, so that their documents cannot be told from batches.
    if kind == "tokens":
        trained = texts_of(opened.train_tokens)
    else:
        trained = texts_of_rows(np.stack([b["tokens"] for b in take(opened.train, EPOCH)]))
    opened.train.close()
    assert not set(held_out) & set(trained)
    assert set(held_out) | set(trained) == set(TEXTS)
    assert 0.02 < len(held_out) / len(TEXTS) < 0.06


def test_a_tokenizer_is_trained_on_files_without_what_is_held_out(sources):
    settings = sources["files"] | {"tokenizer": "bpe:300", "valid_data": None}
    trained = open_data(**settings).tokenizer
    kept = documents.texts(documents.open_shards(settings["data"]), held_out=False)
    assert trained.to_bytes() == train_tokenizer(kept, "bpe:300", eos=True).to_bytes()
    assert trained.to_bytes() != train_tokenizer(TEXTS, "bpe:300", eos=True).to_bytes()


def test_of_streamed_text_a_bounded_number_of_tokens_is_held_out(sources, monkeypatch):
    monkeypatch.setattr(validation, "DEFAULT_TOKENS", 50)
    monkeypatch.setattr(validation, "GROUP", 3)
    assert 50 <= open_data(**sources["files"]).valid.num_tokens < 100
    assert open_data(**sources["files"] | {"eval_tokens": 200}).valid.num_tokens == 200


def test_a_bad_line_deep_in_a_stream_ends_the_iterator_with_its_name(sources, tmp_path):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[100] = "{]"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    train = open_data(**sources["files"] | {"data": str(tmp_path / "bad.jsonl")}).train
    with pytest.raises(UsageError, match=r"bad.jsonl, line 101: not JSON"):
        take(train, EPOCH)
    train.close()


def test_a_position_in_other_files_is_refused(sources):
    opened = open_data(**sources["files"])
    state = opened.train.get_state()
    fewer = open_data(**sources["files"] | {"data": sources["files"]["valid_data"]})
    with pytest.raises(UsageError, match=r"has 1 files, and had 3 .* resume with the same files"):
        fewer.train.set_state(state)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_larger_than_the_data_is_refused(sources, kind, packing):
    rows = NUM_TOKENS // SEQ if packing else len(TEXTS)
    open_data(**sources[kind] | {"packing": packing, "batch": rows})
    message = rf"batch={rows + 1} of seq=20 is larger than the data: {NUM_TOKENS} tokens are {rows}"
    with pytest.raises(UsageError, match=message):
        open_data(**sources[kind] | {"packing": packing, "batch": rows + 1})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("files", {"tokenizer": "words"}, "tokenizer='words': there is no such file"),
        ("files", {"batch": 5, "process_count": 2}, "batch=5: expected a multiple of 2 processes"),
        ("files", {"seed": -1}, "seed=-1: expected 0 to 4294967295"),
        (
            "files",
            {"eval_tokens": 400},
            "There are only 350 tokens to validate on, of 400 asked for: ask for fewer",
        ),
        ("files", {"data": "none.txt"}, "data=none.txt does not exist"),
        ("files", {"valid_data": "none.txt"}, "valid_data=none.txt does not exist"),
        ("hub", {"valid_data": "hf:."}, "valid_data=hf:., split 'validation'"),
        ("tokens", {"tokenizer": "bytes"}, "data=.* was made by another tokenizer than bytes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    sources, tmp_path, monkeypatch, kind, settings, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        open_data(**sources[kind] | settings)


def test_validation_tokens_of_another_tokenizer_are_refused(sources, tmp_path):
    other = train_tokenizer(TEXTS, "bpe:300", eos=True)
    write_tokens(tmp_path / "other", [VALID_TEXTS], other)
    with pytest.raises(UsageError, match=r"valid_data=.*other was made by another tokenizer"):
        open_data(**sources["tokens"] | {"valid_data": str(tmp_path / "other")})


def test_too_few_documents_to_hold_one_out_are_refused(sources, tmp_path):
    (tmp_path / "few.txt").write_text("a few words " * 50)
    settings = sources["files"] | {"data": str(tmp_path / "few.txt"), "valid_data": None}
    with pytest.raises(UsageError, match=r"only 0 tokens to validate on.* one document in twenty"):
        open_data(**settings)


def test_a_batch_of_one_row_is_as_endless_as_any():
    tokens = Tokens.join([np.arange(31, dtype=np.int32)], 31)
    batches = iter(data.token_batches(tokens, batch=1, seq=10))
    starts = [int(next(batches)["tokens"][0, 0]) for _ in range(6)]
    assert sorted(starts[:3]) == sorted(starts[3:]) == [0, 10, 20]


def decoded(encoder, rows):
    """The documents of rows without packing, as far as the rows have them."""
    return {encoder.decode([x for x in row.tolist() if 0 < x < 256]) for row in rows}


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("spec", ["{0}/one.jsonl,{0}/one.jsonl", "{0},{0}/one.jsonl", "{0}"])
def test_what_is_validated_on_is_not_trained_on_however_often_it_is_named(tmp_path, spec, hosts):
    names = [f"text {number}" for number in range(60)]
    lines = "".join(json.dumps({"text": name}) + "\n" for name in names)
    (tmp_path / "one.jsonl").write_text(lines)
    if spec == "{0}":
        (tmp_path / "another.jsonl").write_text(lines)
    settings = {"tokenizer": "bytes", "batch": BATCH, "seq": SEQ, "packing": False}
    held_out, trained = set(), set()
    for host in range(hosts):
        given = {"process_index": host, "process_count": hosts}
        opened = open_data(spec.format(tmp_path), **settings, **given)
        held_out |= decoded(opened.tokenizer, opened.valid.rows)
        assert len(opened.valid.rows) == 3
        for batch in take(opened.train, 120):
            trained |= decoded(opened.tokenizer, batch["tokens"])
        opened.train.close()
    assert len(held_out) == 3
    assert held_out | trained == set(names)
    assert not held_out & trained


def test_conversations_that_are_validated_on_are_not_trained_on(tmp_path):
    lines = [json.dumps({"prompt": f"ask {k}", "response": f"say {k}"}) + "\n" for k in range(60)]
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    settings = {"tokenizer": "bytes", "batch": BATCH, "seq": SEQ, "packing": False}
    opened = open_data(str(tmp_path), reading=Reading(data_format="prompt"), **settings)
    trained = set()
    for batch in take(opened.train, 30):
        trained |= decoded(opened.tokenizer, batch["tokens"])
    opened.train.close()
    held_out = decoded(opened.tokenizer, opened.valid.rows)
    assert (len(held_out), len(trained), opened.documents) == (3, 57, 2 * 57)
    assert not held_out & trained


def test_another_end_of_documents_is_given_by_name(sources, tmp_path):
    """Of files; documents that are tokenized have one."""
    settings = sources["files"] | {"eos_token": "e"}
    opened = open_data(**settings)
    opened.train.close()
    assert opened.tokenizer.eos_id == TOKENIZER.id_of("e")
    assert opened.valid.rows[0, 0] == opened.tokenizer.eos_id
    with pytest.raises(UsageError, match=r"valid_data=.* another tokenizer, or with another end"):
        open_data(**settings | {"valid_data": sources["tokens"]["data"]})
    with pytest.raises(UsageError, match=r"eos_token='e': .* end in <\|endoftext\|>. Leave it out"):
        open_data(**sources["tokens"] | {"eos_token": "e"})


def test_an_end_that_nobody_knows_is_told_where_documents_are_read(sources, tmp_path, capsys):
    none = train_tokenizer([], "bytes", eos=False)
    none.save(tmp_path)
    for _ in range(2):
        settings = sources["files"] | {"tokenizer": str(tmp_path)}
        open_data(**settings).train.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"tokenizer={tmp_path} has no token that is known to end a document" in line
    open_data(**settings | {"eos_token": "none"}).train.close()
    assert not capsys.readouterr().err
