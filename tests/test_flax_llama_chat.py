"""Chats in tokens: by templates as `transformers` has them, and what of them is learnt."""

import datetime
import io
import itertools
import json
import re

import numpy as np
import pytest
import sentencepiece
from chat_models import DATA, SCRIPT, make_model

from examples.flax_llama.conversations import Conversation
from examples.flax_llama.fields import BadLine
from examples.flax_llama.responses import chat_format
from examples.flax_llama.tokenizer import JsonTokenizer, load_tokenizer, train_tokenizer
from examples.flax_llama.usage import UsageError

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

GOLDEN = json.loads((DATA / "golden.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name) for name in SCRIPT.TEMPLATES}


def conversation(name):
    tools = [SCRIPT.TOOL] if name == "tool" else None
    return Conversation(SCRIPT.CONVERSATIONS[name], "here", tools)


def format_of(directory, loss_on="responses"):
    return chat_format(load_tokenizer(directory), "chat", loss_on)


def encode(directory, messages, loss_on="responses"):
    some = messages if isinstance(messages, Conversation) else Conversation(messages, "here")
    (found,) = format_of(directory, loss_on).encode_batch([some])
    if isinstance(found, BadLine):
        raise found
    return found


def learnt(directory, found):
    """The text of each run of tokens that is learnt."""
    tokenizer, runs = load_tokenizer(directory)._tokenizer, []
    for counts, run in itertools.groupby(zip(found.ids, found.counts, strict=True), lambda x: x[1]):
        ids = [int(token) for token, _ in run]
        runs += [tokenizer.decode(ids, skip_special_tokens=False)] if counts else []
    return runs


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: f"{e['template']}-{e['conversation']}")
def test_tokens_and_prompts_are_those_of_transformers(models, entry):
    directory, some = models[entry["template"]], conversation(entry["conversation"])
    found = encode(directory, some, "last")
    assert found.ids.tolist() == entry["ids"]
    prompt = format_of(directory).prompt_of(some)
    assert prompt.ids.tolist() == entry["prompt"]
    # Learnt is what comes after the prompt, up to the token that ends an answer.
    (places,) = np.nonzero(found.counts)
    np.testing.assert_array_equal(places, np.arange(len(entry["prompt"]), places[-1] + 1))
    assert found.ids[places[-1]] in prompt.stop_ids
    assert not prompt.stop_ids & set(found.ids[places[:-1]].tolist())
    assert prompt.response == some.messages[some.answers[-1]]["content"]
    if "mask" in entry:
        assert encode(directory, some).counts.tolist() == [x == 1 for x in entry["mask"]]


@pytest.mark.live("transformers")
def test_golden_is_what_transformers_says_now():
    assert SCRIPT.live() == GOLDEN


# What a template writes of an answer that others follow.
WRITTEN = {
    "llama3": lambda text: f"{text.strip()}<|eot_id|>",
    "chatml": lambda text: f"{text}<|im_end|>",
    "tagged": lambda text: f"{text}<|im_end|>",
    "blocks": lambda text: f"{text}<|im_end|>",
    "gemma": lambda text: f"{text.strip()}<end_of_turn>",
    "mistral": lambda text: f" {text}</s>",
}


@pytest.mark.parametrize("name", ["short", "long", "spaces", "open"])
@pytest.mark.parametrize("template", WRITTEN)
def test_what_is_learnt_is_what_the_assistant_says_with_its_end(models, template, name):
    some = conversation(name)
    expected = [WRITTEN[template](some.messages[k]["content"]) for k in some.answers]
    whole = encode(models[template], some)
    assert learnt(models[template], whole) == expected
    assert learnt(models[template], encode(models[template], some, "last")) == expected[-1:]
    everything = encode(models[template], some, "all")
    assert everything.counts[1:].all()
    assert not everything.counts[0]
    np.testing.assert_array_equal(everything.ids, whole.ids)


def test_a_template_that_says_what_is_generated_and_one_that_does_not_agree(models, tmp_path):
    plain = make_model(tmp_path / "plain", "tagged")
    template = (plain / "chat_template.jinja").read_text()
    without = re.sub(r"\{%- (end)?generation %\}", "", template)
    assert without.count("generation") == template.count("generation") - 2
    (plain / "chat_template.jinja").write_text(without)
    for name in ("short", "long", "spaces", "characters", "names", "open"):
        for loss_on in ("responses", "last"):
            one, other = (encode(x, conversation(name), loss_on) for x in (models["tagged"], plain))
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.counts, other.counts)


def test_an_answer_that_is_written_otherwise_once_another_follows(models, tmp_path):
    """As with thoughts, of which the template writes those after the last question alone."""
    runs = learnt(models["thinking"], encode(models["thinking"], conversation("long")))
    first = ["Hi there.<|im_end|>", "Now I go.<|im_end|>"]
    assert runs == [*first, "<think>\n\n</think>\n\nHome<|im_end|>"]
    # With and without the spaces around it.
    spaces, trimmed = SCRIPT.say("a", " b ", "c", "d"), make_model(tmp_path / "model", "thinking")
    template = (trimmed / "chat_template.jinja").read_text()
    assert template.count("= message.content %}") == 1
    template = template.replace("= message.content %}", "= message.content | trim %}")
    (trimmed / "chat_template.jinja").write_text(template)
    for directory, written in ((models["thinking"], " b "), (trimmed, "b")):
        assert learnt(directory, encode(directory, spaces))[0] == f"{written}<|im_end|>"
    # What was thought of an earlier answer is not in the text at all.
    with pytest.raises(BadLine, match=r"message 2: .* loss_on='last' the last one alone is learnt"):
        encode(models["thinking"], conversation("thought"))
    (run,) = learnt(models["thinking"], encode(models["thinking"], conversation("thought"), "last"))
    assert run == "<think>\nNo\n</think>\n\nNo.<|im_end|>"


def test_names_of_special_tokens_in_messages_are_no_such_tokens(models):
    """Those of the template are as many as without them."""
    bare = [
        {**each, "content": re.sub(r"<[^ ]*?>", "", each["content"])}
        for each in SCRIPT.CONVERSATIONS["names"]
    ]
    for name, directory in models.items():
        special = set(load_tokenizer(directory).special)
        one, other = (encode(directory, x, "last") for x in (conversation("names"), bare))
        kept, expected = ([i for i in x.ids.tolist() if i in special] for x in (one, other))
        assert kept == expected, name
        assert len(one.ids) > len(other.ids)


def test_what_stands_for_names_may_itself_be_in_a_message(models):
    odd = "\U000f0000\U000f0002<|im_end|>\U000f0001\U000fffff"
    found = encode(models["tagged"], SCRIPT.say(odd, f"{odd} yes"))
    assert learnt(models["tagged"], found) == [f"{odd} yes<|im_end|>"]
    assert len(encode(models["chatml"], SCRIPT.say(odd, odd)).ids) > 30


def test_the_longest_name_is_the_one_that_is_meant(tmp_path):
    directory = make_model(tmp_path / "model", "chatml")
    tokenizer = load_tokenizer(directory)._tokenizer
    tokenizer.add_special_tokens(["<a>", "<a><b>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    found = encode(directory, SCRIPT.say("x <a><b> <a>", "y"))
    assert not {tokenizer.token_to_id(name) for name in ("<a>", "<a><b>")} & set(found.ids.tolist())


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("gemma", SCRIPT.say("a", "b")[::-1], "refuses it: Conversation roles must alternate"),
        ("mistral", [{"role": "tool", "content": "a"}, *SCRIPT.say("a", "b")], "Only user and a"),
        ("llama3", SCRIPT.say("a", "b")[1:], "refuses it: .*has no element 0"),
    ],
)
def test_what_a_template_refuses_is_said_in_its_words(models, template, messages, message):
    with pytest.raises(BadLine, match=message):
        encode(models[template], messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'please:' }}{% endif %}",
            r"message 2: the chat template does not ask .*\{% generation %\}",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ '#' if loop.last and m.role != 'user' }}"
            "{% endfor %}",
            r"message 2: .* in another way than a last one",
        ),
        (
            "{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}nothing",
            "writes nothing of what the assistant says",
        ),
    ],
)
def test_a_template_in_which_answers_cannot_be_told_is_refused(tmp_path, template, message):
    directory = make_model(tmp_path / "model", "chatml")
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(BadLine, match=message):
        encode(directory, SCRIPT.say("a", "b", "c", "d"))


def test_a_template_reaches_nothing_outside_of_it(tmp_path):
    directory = make_model(tmp_path / "model", "chatml")
    for template in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        (directory / "chat_template.jinja").write_text(template)
        with pytest.raises(BadLine, match=r"refuses it: .*(is unsafe|is not safely callable)"):
            encode(directory, SCRIPT.say("a", "b"))


def test_json_in_a_template_is_as_it_is_written(tmp_path):
    directory = make_model(tmp_path / "model", "chatml")
    template = "{{ messages[1].content | tojson(indent=2) }}{{ messages | length | tojson }}"
    (directory / "chat_template.jinja").write_text(template)
    found = encode(directory, SCRIPT.say("a", "<ü'\">"), "all")
    text = load_tokenizer(directory).decode(found.ids)
    assert text == json.dumps("<ü'\">", ensure_ascii=False) + "2"


def test_half_a_character_that_a_template_shows_is_refused(tmp_path):
    directory = make_model(tmp_path / "model", "chatml")
    (directory / "chat_template.jinja").write_text("{{ tools | tojson }}{{ messages }}")
    some = Conversation(SCRIPT.say("a", "b"), "here", [{"name": "\ud83d"}])
    with pytest.raises(BadLine, match="half a surrogate pair"):
        encode(directory, some, "all")


def test_templates_are_found_where_transformers_keeps_them(models, tmp_path):
    """In the file beside, in the configuration, or in a list by names, one of which is of tools."""
    expected = encode(models["llama3"], conversation("long")).ids
    directory = make_model(tmp_path / "model", "llama3", chat_template="none of these")
    np.testing.assert_array_equal(encode(directory, conversation("long")).ids, expected)
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").unlink()
    named = [
        {"name": "default", "template": template},
        {"name": "tool_use", "template": "{% generation %}tools{% endgeneration %}"},
    ]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["bos_token"] = {"content": config["bos_token"], "special": True}
    for chat_template in (template, named):
        written = json.dumps(config | {"chat_template": chat_template})
        (directory / "tokenizer_config.json").write_text(written)
        np.testing.assert_array_equal(encode(directory, conversation("long")).ids, expected)
    ids = encode(directory, conversation("tool"), "all").ids
    assert load_tokenizer(directory).decode(ids) == "tools"
    more = directory / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text(template)
    with pytest.raises(UsageError, match=r"has the chat templates tool_use, and none that is call"):
        format_of(directory)


def test_a_saved_tokenizer_has_its_template_and_its_day(tmp_path):
    """A run that goes on another day has the same tokens."""
    directory = make_model(tmp_path / "model", "llama3")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["chat_template_now"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(directory)
    assert abs(loaded.config.now - datetime.datetime.now()) < datetime.timedelta(minutes=1)
    (tmp_path / "run").mkdir()
    loaded.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert "chat_template_now" in again.config.settings
    assert again.config.now == loaded.config.now
    assert again.config.templates == loaded.config.templates
    # What has no use for the day is saved as it was.
    other = make_model(tmp_path / "other", "gemma")
    (tmp_path / "copy").mkdir()
    load_tokenizer(other).save(tmp_path / "copy")
    names = ("tokenizer_config.json", "chat_template.jinja")
    assert all((other / n).read_bytes() == (tmp_path / "copy" / n).read_bytes() for n in names)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": "{]"}, r"tokenizer_config.json is not JSON: Expecting"),
        ({"tokenizer_config.json": "[]"}, r"tokenizer_config.json: expected an object"),
        ({"chat_template.jinja": "{% if %}"}, "model: the chat template is none: Expected an exp"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
        (
            {"tokenizer_config.json": '{"chat_template": [1]}', "chat_template.jinja": None},
            "expected a text as its chat_template, or a list of objects with name and template",
        ),
        *(
            (
                {
                    "tokenizer_config.json": json.dumps({"chat_template": template}),
                    "chat_template.jinja": None,
                },
                "expected a text as its chat_template, or a list of objects with name and templ",
            )
            for template in (
                [{"name": "default", "template": 5}],
                [{"name": None, "template": "a"}],
                {"default": "a"},
                5,
            )
        ),
        ({"tokenizer_config.json": '{"eos_token": 5}'}, "name of a token as eos_token, got 5"),
        (
            {"tokenizer_config.json": '{"chat_template_now": "soon"}'},
            "chat_template_now is no time",
        ),
        (
            {"tokenizer_config.json": "{}", "chat_template.jinja": None},
            r"data_format='chat' needs .* beside its tokenizer.json, as chat_template.jinja; or",
        ),
    ],
)
def test_a_directory_without_a_template_that_works_is_refused(tmp_path, files, message):
    directory = make_model(tmp_path / "model", "chatml")
    for name, contents in files.items():
        if contents is None:
            (directory / name).unlink()
        else:
            data = contents if isinstance(contents, bytes) else contents.encode()
            (directory / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        format_of(directory)


def test_a_template_needs_to_know_special_tokens_by_name(tmp_path):
    trained = io.BytesIO()
    texts = iter([f"number {k} of many" for k in range(50)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=trained, vocab_size=25, minloglevel=2
    )
    directory = make_model(tmp_path / "model", "mistral")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(trained.getvalue())
    with pytest.raises(UsageError, match=r"a chat template needs a tokenizer.json, which knows"):
        format_of(directory)
    # Without one it has the format of prompts.
    (directory / "chat_template.jinja").unlink()
    loaded = load_tokenizer(directory)
    config = {"bos_token": "<s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for start, tokenizer in (([], loaded), ([1], load_tokenizer(directory))):
        assert tokenizer.start_ids == start
        formatted = chat_format(tokenizer, "prompt", "responses")
        (found,) = formatted.encode_batch([Conversation(SCRIPT.say("number 2", "of"), "here")])
        prompt, response = tokenizer.encode("number 2\n"), tokenizer.encode("of")
        assert found.ids.tolist() == [*start, *prompt, *response, 2]
        assert found.counts.sum() == len(response) + 1


@pytest.mark.parametrize(
    ("prompt", "response", "between"),
    [("2 + 2", "4", "\n"), ("2 +\n", "4", ""), ("2 + 2 =", " 4", ""), ("", "4", "")],
)
@pytest.mark.parametrize("kind", ["bytes", "prefixed"])
def test_without_a_template_a_prompt_is_followed_by_its_response(kind, prompt, response, between):
    if kind == "bytes":
        tokenizer, start = train_tokenizer([], "bytes", eos=True), []
    else:
        # Whose own file says that a text begins with the first token.
        tokenizer, start = JsonTokenizer((DATA / "prefixed.json").read_text()), [1]
    first, last = (tokenizer.encode(x).tolist() for x in (prompt + between, response))
    some = Conversation(SCRIPT.say(prompt, response), "here")
    for loss_on in ("responses", "last", "all"):
        formatted = chat_format(tokenizer, "prompt", loss_on)
        (found,) = formatted.encode_batch([some])
        assert found.ids.tolist() == [*start, *first, *last, tokenizer.eos_id]
        unlearnt = 0 if loss_on == "all" else len(start + first)
        assert found.counts.tolist() == [k >= max(unlearnt, 1) for k in range(len(found.ids))]
        asked = formatted.prompt_of(some)
        assert asked.ids.tolist() == [*start, *first]
        assert (asked.response, asked.stop_ids) == (response, {tokenizer.eos_id})


def test_a_response_needs_an_end():
    with pytest.raises(UsageError, match="a token that ends a document"):
        chat_format(train_tokenizer([], "bytes", eos=False), "prompt", "responses")
