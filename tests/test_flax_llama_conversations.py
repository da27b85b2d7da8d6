"""Conversations out of files: their formats, rows of whole ones, and what becomes of the others."""

import collections
import functools
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from chat_models import SCRIPT, make_model
from flax import nnx
from flax_llama_runs import assert_same_end, tiny, without_checkpoints_after

from examples.flax_llama import conversation_data, evaluate, packing, sharding, step, train
from examples.flax_llama.beginning import begin
from examples.flax_llama.conversation_data import recognise
from examples.flax_llama.data import open_data
from examples.flax_llama.documents import is_held_out, open_shards, texts
from examples.flax_llama.loss import loss_sum
from examples.flax_llama.model import Llama
from examples.flax_llama.reading import Reading
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.tokenizer import load_tokenizer
from examples.flax_llama.usage import UsageError
from examples.flax_llama.validation import Valid

BATCH, SEQ = 4, 60
SEED = 7


def write(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def read(path, **settings):
    """The messages of all conversations."""
    shards = open_shards(path, reading=Reading(**settings))
    return [[(each["role"], each.get("content")) for each in c.messages] for c in texts(shards)]


ASKED = [("user", "2 + 2"), ("assistant", "4")]
IN_WORDS = [("user", "Add.\n\n2 + 2"), ("assistant", "4")]
SHARE_GPT = [{"from": "human", "value": "2 + 2"}, {"from": "gpt", "value": "4"}]
MESSAGES = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("data_format", "example", "expected", "settings"),
    [
        ("prompt", {"prompt": "2 + 2", "response": "4"}, ASKED, {}),
        ("prompt", {"prompt": "2 + 2", "completion": "4"}, ASKED, {}),
        ("prompt", {"instruction": "2 + 2", "output": "4"}, ASKED, {}),
        ("prompt", {"instruction": "2 + 2", "input": "", "output": "4"}, ASKED, {}),
        ("prompt", {"instruction": "Add.", "input": "2 + 2", "output": "4"}, IN_WORDS, {}),
        (
            "prompt",
            {"a": {"q": "2 + 2"}, "response": "4", "prompt": "other"},
            ASKED,
            {"prompt_field": "a.q"},
        ),
        (
            "prompt",
            {"q": "2 + 2", "a": "4", "input": "not of Alpaca"},
            ASKED,
            {"prompt_field": "q", "response_field": "a"},
        ),
        ("prompt", {"instruction": "2 + 2", "input": None, "output": "4"}, ASKED, {}),
        ("chat", {"messages": MESSAGES, "text": "other"}, ASKED, {}),
        ("chat", {"messages": [each | {"name": None} for each in MESSAGES]}, ASKED, {}),
        ("chat", {"conversations": SHARE_GPT}, ASKED, {}),
        ("chat", {"conversations": MESSAGES, "id": 3}, ASKED, {}),
        (
            "chat",
            {"conversations": [{"from": "system", "value": "Be"}, *SHARE_GPT]},
            [("system", "Be"), *ASKED],
            {},
        ),
        ("chat", {"meta": {"turns": MESSAGES}}, ASKED, {"messages_field": "meta.turns"}),
        (
            "chat",
            {"messages": SCRIPT.CONVERSATIONS["tool"]},
            [("user", "Add."), ("assistant", None), ("tool", "4 é"), ("assistant", "It is 4.")],
            {},
        ),
    ],
)
@pytest.mark.plain
def test_all_layouts_of_examples_are_read_and_recognised(
    tmp_path, data_format, example, expected, settings
):
    path = write(tmp_path / "a.jsonl", [example])
    assert read(path, data_format=data_format, **settings) == [expected]
    found = recognise(path, Reading(data_format="auto", **settings))
    assert found.data_format == data_format
    fields = "|".join(["prompt and response", *example, *settings.values(), "prompt"])
    assert f"{path}, line 1 has the format {data_format}, by its" in found.said
    assert any(name in found.said.split("by its")[1] for name in fields.split("|"))


@pytest.mark.plain
def test_what_is_text_is_recognised_and_what_is_nothing_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "prompt": "b"}, {"messages": MESSAGES}])
    assert recognise(path, Reading()).data_format == "text"
    (tmp_path / "a.txt").write_text("text")
    for other in ("austen", str(tmp_path / "a.txt")):
        assert recognise(other, Reading()).data_format == "text"
    path = write(tmp_path / "b.jsonl", [{"question": "a", "answer": "b"}])
    message = (
        r"b.jsonl, line 1 says nothing of its format, it has the fields question, answer\. Say"
    )
    with pytest.raises(UsageError, match=message):
        recognise(path, Reading())
    given = Reading(prompt_field="question", response_field="answer")
    assert recognise(path, given).data_format == "prompt"


def say(**turn):
    return {"messages": [MESSAGES[0], turn]}


@pytest.mark.parametrize(
    ("data_format", "example", "message"),
    [
        ("prompt", {"prompt": "a", "response": " \n"}, "an empty response, 'response'"),
        ("prompt", {"instruction": "a", "output": ""}, "an empty response, 'output'"),
        ("prompt", {"prompt": "a", "response": 4}, "expected an object with the strings 'prompt' "),
        (
            "prompt",
            {"q": "a", "a": "b"},
            r"got \{'q'.*prompt_field=NAME and response_field=NAME could name q, a\. on_bad_line=",
        ),
        ("prompt", [1], "expected an object .*; of JSON files each line is read as an object"),
        ("prompt", {"prompt": "a", "response": "\ud83d"}, "half a surrogate pair"),
        (
            "prompt",
            {"instruction": "a", "input": ["x"], "output": "b"},
            r"expected a string as 'input', or none, got \['x'\]",
        ),
        *(
            (
                "chat",
                {"messages": MESSAGES, "tools": tools},
                "expected a list of objects as 'tools'",
            )
            for tools in ("text", '{"name": "f"}', {"name": "f"}, 5, False, ["f"], '["f"]')
        ),
        (
            "chat",
            say(role="assistant", tool_calls="f"),
            "expected a list of objects as 'tool_calls', or the JSON of one, got f",
        ),
        ("chat", {"messages": MESSAGES[:1]}, "a conversation without a turn of the assistant"),
        ("chat", {"messages": []}, "a conversation without a turn of the assistant"),
        ("chat", say(role="assistant", content=" "), "message 2, of the assistant: an empty resp"),
        ("chat", say(role="bot", content="a"), "message 2: the role 'bot' is not known, expected"),
        ("chat", say(role=["user"], content="a"), "message 2: the role .* is not known"),
        ("chat", say(**{"from": "bing", "value": "a"}), "'bing' is not known, expected .*human, g"),
        ("chat", say(content="a"), "message 2: the role None is not known"),
        ("chat", say(role="assistant", content=["a"]), "expected a string as its content, got .'a"),
        ("chat", say(role="user", content=None), "message 2, of the user: expected a string"),
        ("chat", say(role="user", content="\ud83d"), "half a surrogate pair"),
        ("chat", {"messages": [*MESSAGES, "a"]}, "message 3: expected an object with role and co"),
        (
            "chat",
            {"dialog": MESSAGES, "n": 1},
            r"expected an object with a list 'messages' or 'conversations', got .*messages_field="
            r"NAME could name dialog\.",
        ),
    ],
)
@pytest.mark.plain
def test_a_line_without_a_conversation_is_an_error_with_its_place(
    tmp_path, capsys, data_format, example, message
):
    good = {"prompt": "a", "response": "b", "messages": MESSAGES}
    path = write(tmp_path / "a.jsonl", [good, good, example, good])
    with pytest.raises(UsageError, match=rf"a.jsonl, line 3: .*{message}"):
        read(path, data_format=data_format)
    skipping = Reading(data_format=data_format, on_bad_line="skip")
    assert len(list(texts(open_shards(path, reading=skipping)))) == 3
    what = "prompt with a response" if data_format == "prompt" else "conversation"
    assert skipping.summary().startswith(f"Left out 1 line that is no {what}.")
    assert f"left out {path}, line 3: " in capsys.readouterr().err


@pytest.mark.plain
@pytest.mark.parametrize("tools", [None, "", [], "[]", "null", [{"name": "f"}], '[{"name": "f"}]'])
def test_tools_are_objects_also_where_a_table_keeps_them_as_text(tmp_path, tools):
    calls = say(role="assistant", tool_calls=tools or None, content="b")["messages"]
    path = write(tmp_path / "a.jsonl", [{"messages": calls, "tools": tools}])
    (found,) = texts(open_shards(path, reading=Reading(data_format="chat")))
    right = [{"name": "f"}] if "name" in str(tools) else None
    assert found.tools == right
    assert (found.messages[1].get("tool_calls") or None) == right


# Of many lengths, in tokens of the template below.
def examples(count=240):
    rng = np.random.default_rng(0)
    for number in range(count):
        turns = [f"{number}." + "a" * int(rng.integers(0, 12)) for _ in range(2)]
        more = [f"+{number}", f"-{number}"] if number % 5 == 0 else []
        yield {"messages": SCRIPT.say(*turns, *more)}


TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if m.role == 'user' }}{{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Settings of `open_data` for conversations in three files, held out ones too."""
    root = tmp_path_factory.mktemp("conversations")
    everything = list(examples())
    for shard in range(3):
        write(root / f"{shard}.jsonl", everything[shard::3])
    model = make_model(root / "model", "chatml")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    reading = Reading(data_format="chat")
    common = {"batch": BATCH, "seq": SEQ, "tokenizer": str(model), "seed": SEED}
    return common | {"data": f"{root}/[0-9].jsonl", "reading": reading}


def expected(source):
    """Of each conversation trained on, the tokens and those that are learnt, by hand."""
    tokenizer = load_tokenizer(source["tokenizer"])
    start, end = (tokenizer.id_of(name) for name in ("<s>", "</s>"))
    shards = open_shards(source["data"], reading=source["reading"])
    for shard, files in enumerate(shards):
        for number, (one, _) in enumerate(files.documents()):
            ids, counts = [], []
            for message in one.messages:
                content = tokenizer.encode(message["content"]).tolist()
                is_answer = message["role"] == "assistant"
                turn = [*content, end] if is_answer else [start, *content]
                ids += turn
                counts += [is_answer] * len(turn)
            yield is_held_out(shard, number), tuple(ids), tuple(counts)


def conversations_of(rows, masks, segments):
    """What rows have, as `expected` has it."""
    for row, mask, segment in zip(rows, masks, segments, strict=True):
        numbers = np.unique(segment[segment > 0])
        assert numbers.tolist() == list(range(1, len(numbers) + 1))
        # In order, and what is left of the row comes last.
        used = np.count_nonzero(segment)
        assert (np.diff(segment[:used]) >= 0).all()
        assert not segment[used:].any()
        assert not row[used:].any()
        assert not mask[max(0, used - 1) :].any()
        counts = np.concatenate([[False], mask])
        for number in numbers:
            part = segment == number
            yield tuple(row[part].tolist()), tuple(counts[part].tolist())


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def epochs(source, count):
    opened = open_data(**source)
    # As many batches as there are whole ones in so many epochs, and rows beyond are cut off.
    taken = take(opened.train, -(-opened.rows * count // source["batch"]))
    arrays = [taken[name] for name in ("tokens", "mask", "segments")]
    return opened, [
        [array[k * opened.rows : (k + 1) * opened.rows] for array in arrays] for k in range(count)
    ]


def test_each_conversation_is_whole_in_one_row_of_each_epoch(source):
    opened, (one, two) = epochs(source, 2)
    trained = collections.Counter(x[1:] for x in expected(source) if not x[0])
    held_out = collections.Counter(x[1:] for x in expected(source) if x[0])
    assert sum(trained.values()) == opened.documents
    for epoch in (one, two):
        assert collections.Counter(conversations_of(*epoch)) == trained
    assert (one[0] != two[0]).any()
    valid = opened.valid
    assert collections.Counter(conversations_of(valid.rows, valid.mask, valid.segments)) == held_out
    assert 0.03 < sum(held_out.values()) / 240 < 0.07
    # As many tokens are learnt as there are, and few places are empty.
    assert one[1].sum() == len(opened.train_tokens) == sum(sum(c) for _, c in trained.elements())
    total = sum(len(ids) for ids, _ in trained.elements())
    assert opened.rows <= 1.1 * total / (SEQ + 1)
    assert valid.num_tokens == sum(
        sum(counts) for is_held, _, counts in expected(source) if is_held
    )
    # Ends of answers are tokens, and have no bytes.
    answers = [
        each["content"]
        for n, example in enumerate(examples())
        if is_held_out(n % 3, n // 3)
        for each in example["messages"]
        if each["role"] == "assistant"
    ]
    num_bytes = sum(map(len, answers))
    assert valid.bytes_per_token == num_bytes / valid.num_tokens
    # What samples can be made for are the first of them.
    shards = open_shards(source["data"], reading=source["reading"])
    first = list(itertools.islice(texts(shards, held_out=True), conversation_data.PROMPTS))
    assert len(first) == len(valid.prompts) == conversation_data.PROMPTS
    for prompt, one in zip(valid.prompts, first, strict=True):
        asked, answer = (each["content"] for each in one.messages[-2:])
        assert prompt.response == answer
        assert opened.tokenizer.decode(prompt.ids).endswith(asked)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_rows_of_each_batch(source, hosts):
    whole = take(open_data(**source).train, 40)
    parts = [
        take(open_data(**source, process_index=k, process_count=hosts).train, 40)
        for k in range(hosts)
    ]
    for name, rows in whole.items():
        split = [part[name].reshape(40, BATCH // hosts, -1) for part in parts]
        together = np.sort(np.concatenate(split, axis=1), axis=1)
        np.testing.assert_array_equal(together, np.sort(rows.reshape(40, BATCH, -1), axis=1))


@pytest.mark.parametrize("packing", [True, False])
def test_reading_goes_on_from_every_position(source, packing):
    settings = source | {"packing": packing}
    opened = open_data(**settings)
    epoch = -(-opened.rows // BATCH)
    states, batches = [], []
    for _ in range(epoch + 3):
        states.append(json.loads(json.dumps(opened.train.get_state())))
        batches.append(next(opened.train))
    opened.train.close()
    again = open_data(**settings).train
    for place in (0, 1, epoch // 2, epoch - 1, epoch, epoch + 2):
        again.set_state(states[place])
        jax.tree.map(np.testing.assert_array_equal, next(again), batches[place])
    again.close()


def test_without_packing_a_row_is_a_conversation(source):
    opened = open_data(**source | {"packing": False})
    taken = take(opened.train, -(-opened.rows // BATCH))
    assert opened.rows == opened.documents
    assert set(taken) == {"tokens", "mask"}
    assert opened.valid.segments is None
    trained = {ids: counts for held_out, ids, counts in expected(source) if not held_out}
    for row, mask in zip(taken["tokens"], taken["mask"], strict=True):
        (counts,) = [c for ids, c in trained.items() if tuple(row[: len(ids)].tolist()) == ids]
        assert tuple(mask[: len(counts) - 1].tolist()) == counts[1:]
        assert not row[len(counts) :].any()
        assert not mask[len(counts) - 1 :].any()


def test_the_order_depends_on_the_seed_alone(source):
    one, same, other = (
        take(open_data(**source | {"seed": seed}).train, 5)["tokens"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    # Other conversations share rows.
    rows = [
        {row.tobytes() for row in take(opened.train, opened.rows // BATCH)["tokens"]}
        for opened in (open_data(**source | {"seed": seed}) for seed in (0, 1))
    ]
    assert len(rows[0] - rows[1]) > len(rows[0]) / 2


def test_the_hub_has_the_conversations_of_its_files(source, tmp_path):
    everything = list(examples(60))
    # Where one message has a field, `datasets` gives it to all, as None.
    everything[3]["messages"][0]["name"] = "someone"
    write(tmp_path / "train-00000-of-00001.jsonl", everything[:40])
    write(tmp_path / "validation-00000-of-00001.jsonl", everything[40:])
    files = {
        name: str(tmp_path / f"{name}-00000-of-00001.jsonl") for name in ("train", "validation")
    }
    one = open_data(**source | {"data": f"hf:{tmp_path}"})
    other = open_data(**source | {"data": files["train"], "valid_data": files["validation"]})
    np.testing.assert_array_equal(one.valid.rows, other.valid.rows)
    jax.tree.map(np.testing.assert_array_equal, *(next(opened.train) for opened in (one, other)))
    assert one.documents == 40
    for opened in (one, other):
        opened.train.close()


@pytest.mark.plain
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_packed_as_by_a_plain_search(monkeypatch, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 31, size=100)
    monkeypatch.setattr(packing, "WINDOW", 40)
    order = rng.permutation(100)
    rows = packing.pack(lengths, 30, order)
    assert sorted(np.concatenate(rows).tolist()) == list(range(100))
    windows = [set(order[k : k + 40].tolist()) for k in (0, 40, 80)]
    assert all(any(set(row.tolist()) <= window for window in windows) for row in rows)
    # The longest first, each into the fullest row that has room, else into a new one.
    expected = []
    for window in (order[:40], order[40:80], order[80:]):
        some = []
        for index in sorted(window, key=lambda k: -lengths[k]):
            fitting = [r for r in some if sum(lengths[r]) + lengths[index] <= 30]
            if fitting:
                max(fitting, key=lambda r: sum(lengths[r])).append(int(index))
            else:
                some.append([int(index)])
        expected += some
    filled = [sorted(int(sum(lengths[row])) for row in each) for each in (rows, expected)]
    assert filled[0] == filled[1]


@pytest.mark.parametrize(
    ("count", "settings"), [(1, {}), (17, {}), (17, {"packing": False}), (40, {})]
)
def test_as_many_tokens_are_held_out_as_asked(source, count, settings):
    some = open_data(**source | settings | {"eval_tokens": count}).valid
    whole = open_data(**source | settings).valid
    assert some.num_tokens == count
    assert some.mask.any(axis=1).all()
    targets = [valid.rows[:, 1:][valid.mask] for valid in (some, whole)]
    np.testing.assert_array_equal(targets[0], targets[1][:count])
    arrays = some.batches(3)
    assert (arrays[2] is None) is (not settings.get("packing", True))
    assert {len(array) for array in arrays if array is not None} == {-(-len(some.rows) // 3)}
    with pytest.raises(UsageError, match=r"only \d+ tokens to validate on, of 99,999 asked for"):
        open_data(**source | settings | {"eval_tokens": 99_999})


def test_no_more_is_read_to_validate_on_than_it_takes(source, monkeypatch):
    monkeypatch.setattr(conversation_data, "GROUP", 2)
    monkeypatch.setattr(conversation_data, "DEFAULT_TOKENS", 20)
    assert 20 <= open_data(**source).valid.num_tokens < 80
    assert open_data(**source | {"eval_tokens": 90}).valid.num_tokens == 90


@pytest.fixture
def long(source, tmp_path):
    """Two conversations among others that are too long for a row, one of them in its last turn."""
    few = list(examples(80))
    words = ["b" * 20, "c" * 20, "d" * 5, "e" * 8]
    few[7] = {"messages": SCRIPT.say(*words, "u", "v", system="S")}
    few[30] = {"messages": SCRIPT.say("f", "g", "h" * 40, "i" * 90)}
    return source | {"data": write(tmp_path / "long.jsonl", few), "seq": 40}


def with_long(source, on_long):
    reading = Reading(data_format="chat", on_long=on_long)
    return open_data(**source | {"reading": reading})


def test_a_conversation_that_is_too_long_is_an_error_by_default(long):
    message = (
        r"^2 of 76 conversations are longer than 41 tokens; the longest, .*long.jsonl, line 31, "
        r"has \d+\. seq=(\d+) is enough for it; on_long='cut' leaves out the oldest .*='skip' l"
    )
    with pytest.raises(UsageError, match=message) as found:
        with_long(long, "error")
    most = int(str(found.value).split("seq=")[1].split()[0])
    assert open_data(**long | {"seq": most}).documents == 76
    with pytest.raises(UsageError, match="1 of 76 conversations is longer"):
        open_data(**long | {"seq": most - 1})


@pytest.mark.parametrize(
    ("on_long", "documents", "told"),
    [
        ("skip", 74, ": left out 2\n"),
        ("cut", 75, ": cut 1 of them to their last exchanges and left out 1\n"),
    ],
)
def test_a_conversation_that_is_too_long_is_left_out_or_cut(long, capsys, on_long, documents, told):
    opened = with_long(long, on_long)
    assert opened.documents == documents
    assert capsys.readouterr().err.endswith(told)
    taken = take(opened.train, opened.rows // BATCH)
    tokenizer = load_tokenizer(long["tokenizer"])
    decoded = {
        tokenizer._tokenizer.decode(ids, skip_special_tokens=False)
        for ids, _ in conversations_of(taken["tokens"], taken["mask"], taken["segments"])
    }
    # The system's message stays, and the text begins with a turn of the user.
    assert ("S<s>dddddeeeeeeee</s><s>uv</s>" in decoded) is (on_long == "cut")


@pytest.mark.plain
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "austen"}, r"data=austen: data_format='chat' needs JSON lines, or data of the"),
        ({"data": "{path}/a.txt"}, r"a.txt: data_format='chat' needs JSON lines, .* this is text"),
        ({"tokenizer": "bytes"}, r"data_format='chat' needs the chat template of a model's direct"),
        ({"batch": 1000}, r"batch=1000 of seq=60 is larger than the data: 228 conversations are"),
        ({"valid_data": "{path}/none.jsonl"}, "valid_data=.*none.jsonl does not exist"),
        ({"valid_data": "{path}/a.txt"}, r"valid_data=.*a.txt: data_format='chat' needs JSON"),
    ],
)
def test_settings_that_do_not_fit_are_refused(source, tmp_path, settings, message):
    (tmp_path / "a.txt").write_text("text")
    given = {
        name: value.format(path=tmp_path) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    with pytest.raises(UsageError, match=message):
        open_data(**source | given)


@pytest.mark.plain
def test_what_a_template_refuses_is_a_bad_line(source, tmp_path, capsys):
    few = list(examples(40))
    few[5]["messages"][0]["content"] = "no"
    template = TEMPLATE.replace(
        "{{ m.content }}", "{{ raise_exception('I said') if m.content == 'no' else m.content }}"
    )
    model = make_model(tmp_path / "model", "chatml")
    (model / "chat_template.jinja").write_text(template)
    given = source | {"data": write(tmp_path / "a.jsonl", few), "tokenizer": str(model)}
    message = r"a.jsonl, line 6: the chat template refuses it: I said\. on_bad_line='skip' leaves"
    with pytest.raises(UsageError, match=message):
        open_data(**given)
    skipping = Reading(data_format="chat", on_bad_line="skip")
    assert open_data(**given | {"reading": skipping}).documents == 37
    assert "left out" in capsys.readouterr().err


@functools.cache
def model():
    """A tiny one with the vocabulary of the tokenizer."""
    shape = LlamaConfig(hidden=16, intermediate=24, layers=2, heads=2, vocab_size=402, max_seq=SEQ)
    return Llama(shape, rngs=nnx.Rngs(0))


@pytest.mark.long("gradients with and without segments, losses and an evaluation")
@pytest.mark.parametrize("of", ["conversations", "text"])
def test_the_loss_of_packed_rows_is_that_of_their_parts(source, tmp_path, of):
    """Each in a row of its own, which needs no segments; in training and in evaluation."""
    if of == "text":
        lines = [{"text": example["messages"][0]["content"]} for example in examples()]
        own = {"data": write(tmp_path / "text.jsonl", lines), "reading": Reading()}
        source = source | own | {"attend_across": False}
    opened = open_data(**source)
    batch = next(opened.train)
    opened.train.close()
    parts = list(conversations_of(batch["tokens"], batch["mask"], batch["segments"]))
    tokens, mask = np.zeros((len(parts), SEQ + 1), np.int32), np.zeros((len(parts), SEQ), bool)
    for row, (ids, counts) in enumerate(parts):
        tokens[row, : len(ids)], mask[row, : len(ids) - 1] = ids, counts[1:]
    assert len(parts) > 2 * BATCH
    alone = float(nnx.jit(loss_sum)(model(), tokens, mask)) / mask.sum()
    graphdef, state = nnx.split(model(), nnx.Param)
    params, mesh = nnx.to_pure_dict(state), sharding.make_mesh()
    gradients = jax.jit(step.make_gradients(graphdef, mesh))
    packed, _ = gradients(params, step.put_batch(batch, 2, mesh))
    assert float(packed) == pytest.approx(alone, rel=1e-5)
    # Which is not what it would be if they saw each other.
    without = step.put_batch({**batch, "segments": None}, 2, mesh)
    assert float(gradients(params, without)[0]) != pytest.approx(alone, rel=1e-4)
    evaluated = evaluate.make_evaluate(graphdef, mesh)
    rows = Valid(batch["tokens"], batch["mask"], 1.0, batch["segments"])
    assert evaluated(params, *rows.batches(3)).loss == pytest.approx(alone, rel=1e-5)


@pytest.mark.long("a run, and one more update")
@pytest.mark.ci
def test_a_run_on_chats_is_packed_and_goes_on(source, tmp_path):
    """With the template that it has kept, wherever the model's directory is now."""
    directory = make_model(tmp_path / "model", "chatml")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    shared = {"optimizer": "sgd", "steps": 3, "seq": SEQ, "save_every": 2, "eval_every": 3}
    shared |= {"data_format": "auto", "tokenizer": str(directory), "eval_tokens": None}
    whole = train.train(tiny(source["data"], out=tmp_path / "whole", **shared))
    train.train(tiny(source["data"], out=tmp_path / "run", **shared))
    without_checkpoints_after(tmp_path / "run", 2)
    shutil.rmtree(directory)
    words = ["--out", str(tmp_path / "run"), "--resume", "--quiet"]
    again = train.train(train.from_command_line(words))
    assert again.valid == whole.valid
    assert_same_end(tmp_path / "whole", tmp_path / "run", 3)
    found = evaluate.evaluate(tmp_path / "run")
    assert found["loss"] == pytest.approx(whole.valid[-1]["valid_loss"], rel=1e-6)
    # Of other conversations, in the format of the run.
    other = write(tmp_path / "other.jsonl", [{"messages": SCRIPT.say("a", "bc")}])
    assert evaluate.evaluate(tmp_path / "run", data=other)["tokens"] == 3


@pytest.mark.long("a run and its evaluation")
def test_a_run_on_prompts_is_evaluated_and_goes_on_with_them_alone(tmp_path, capsys):
    """Its format is recognised, and from then on the run's own."""
    lines = [{"prompt": f"{k} + 1 =", "response": str(k + 1)} for k in range(80)]
    path = write(tmp_path / "sums.jsonl", lines)
    shared = {"optimizer": "sgd", "steps": 2, "seq": 30, "packing": False, "eval_tokens": 8}
    shared |= {"out": tmp_path / "run", "quiet": False, "data_format": "auto"}
    result = train.train(tiny(path, **shared))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{path}, line 1 has the format prompt, by its prompt and response." in said
    kept = [len(line["response"]) + 1 for k, line in enumerate(lines) if k % 20 != 19]
    extent = f"76 conversations, {sum(kept)} tokens to train on (0.21 epochs), and 8 to validate on"
    assert extent in said
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert stored["data_format"] == "prompt"
    again = evaluate.evaluate(tmp_path / "run", tokens=8)
    assert again["loss"] == pytest.approx(result.valid[-1]["valid_loss"], rel=1e-6)
    other = write(tmp_path / "other.jsonl", [{"prompt": "9 + 1 =", "response": "10"}])
    assert evaluate.evaluate(tmp_path / "run", data=other)["tokens"] == 3
    with pytest.raises(UsageError, match="text_field='q' has no effect with a run on data_format="):
        evaluate.evaluate(tmp_path / "run", data=other, text_field="q")

    def resumed(*given):
        words = ["--out", str(tmp_path / "run"), "--resume", "--steps", "4", *given]
        return begin(train.from_command_line(words).resolve())

    assert resumed().config.data_format == "prompt"
    for given, message in (
        (("--loss-on", "all"), r"loss_on='all', which was 'responses' \(losses before and after"),
        (("--data-format", "text"), r"data_format='text', which was 'prompt' \(the position in"),
        (("--on-long", "cut"), r"on_long='cut', which was 'error' \(the position in the data"),
        (("--prompt-field", "q"), r"the fields given were none and are prompt_field=q"),
    ):
        with pytest.raises(UsageError, match=message):
            resumed(*given)
