"""Conversations as tokens, and which of them are to be learnt: what the assistant says.

A tokenizer with a chat template writes them by it. One without has a format for a prompt and its
response: the beginning of a text, if it has one (`bos_token`); the prompt; a line break, unless
there is a space or one at that place already; the response; the end of a document.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from examples.flax_llama.chat_template import ChatTemplate, Rendered, Span
from examples.flax_llama.conversations import Conversation
from examples.flax_llama.fields import BadLine
from examples.flax_llama.tokenizer import JsonTokenizer, Tokenizer
from examples.flax_llama.tokenizer_config import DEFAULT, TEMPLATE, WITH_TOOLS, TokenizerConfig
from examples.flax_llama.usage import UsageError

# What an answer is in place of, where the template is asked what it writes around one.
PROBE = "\U000fffff"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation in tokens."""

    # int32 (T,).
    ids: np.ndarray
    # bool (T,): the tokens to be learnt, of which the first is none.
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What an answer is asked for with, and the one that the data has."""

    # int32 (T,): all that comes before the answer.
    ids: np.ndarray
    response: str
    # Tokens that end an answer.
    stop_ids: frozenset[int]


class ChatFormat(Protocol):
    """How conversations are written in tokens."""

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | BadLine]:
        """Each in tokens, or why it cannot be."""
        ...

    def prompt_of(self, conversation: Conversation) -> Prompt:
        """The prompt of its last answer, and that.

        Raises:
          BadLine: it cannot be written.
        """
        ...


def chat_format(tokenizer: Tokenizer, data_format: str, loss_on: str) -> ChatFormat:
    """The template of a tokenizer, or the plain format where it has none.

    Args:
      tokenizer: of the model.
      data_format: "prompt" or "chat".
      loss_on: all "responses", the "last" one, or "all" tokens.

    Raises:
      UsageError: conversations need a template, and there is none that can be used.
    """
    config = tokenizer.config
    if config is not None and config.templates:
        if isinstance(tokenizer, JsonTokenizer):
            return TemplateFormat(tokenizer, config, loss_on)
        raise UsageError(
            f"{config.directory}: a chat template needs a {JsonTokenizer.file_name}, which knows "
            "special tokens by their names, and there is a SentencePiece model alone: transformers "
            "writes one with AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)."
        )
    if data_format == "chat":
        raise UsageError(
            "data_format='chat' needs the chat template of a model's directory, and the tokenizer "
            f"has none: put one beside its tokenizer.json, as {TEMPLATE}; or give prompts and "
            "responses, with data_format='prompt', which need none."
        )
    return PlainFormat(tokenizer, loss_on)


class PlainFormat:
    """A prompt and its response without a template."""

    def __init__(self, tokenizer: Tokenizer, loss_on: str):
        if tokenizer.eos_id is None:
            raise UsageError(
                "data_format='prompt' needs a tokenizer with a token that ends a document, such as "
                "</s>, since a response would have no end: eos_token=NAME says which it is."
            )
        self._tokenizer, self._loss_on, self._end = tokenizer, loss_on, tokenizer.eos_id
        self._start = tokenizer.start_ids

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | BadLine]:
        pairs = [joined(conversation) for conversation in conversations]
        ids = self._tokenizer.encode_batch([text for pair in pairs for text in pair])
        return [
            self._whole(prompt, response)
            for prompt, response in zip(ids[::2], ids[1::2], strict=True)
        ]

    def prompt_of(self, conversation: Conversation) -> Prompt:
        prompt = self._tokenizer.encode(joined(conversation)[0])
        ids = np.concatenate([self._start, prompt]).astype(np.int32)
        stop_ids = frozenset([self._end])
        return Prompt(ids, conversation.messages[-1]["content"], stop_ids)

    def _whole(self, prompt: np.ndarray, response: np.ndarray) -> Encoded:
        ids = np.concatenate([self._start, prompt, response, [self._end]]).astype(np.int32)
        first = len(self._start) + len(prompt) if self._loss_on != "all" else 0
        return Encoded(ids, np.arange(len(ids)) >= max(1, first))


def joined(conversation: Conversation) -> tuple[str, str]:
    """The prompt, with what is between the two, and the response."""
    prompt, response = (each["content"] for each in conversation.messages)
    is_apart = not prompt or prompt[-1].isspace() or response[0].isspace()
    return (prompt if is_apart else f"{prompt}\n"), response


class TemplateFormat:
    """The format of a tokenizer's own chat template."""

    def __init__(self, tokenizer: JsonTokenizer, config: TokenizerConfig, loss_on: str):
        if DEFAULT not in config.templates:
            raise UsageError(
                f"{config.directory} has the chat templates {', '.join(config.templates)}, and "
                f"none that is called {DEFAULT}: put the one to be used there as {TEMPLATE}."
            )
        self._tokenizer, self._loss_on = tokenizer, loss_on
        self._templates = {
            name: ChatTemplate(
                source,
                tokens=config.tokens,
                special=tokenizer.special.values(),
                now=config.now,
                name=str(config.directory),
            )
            for name, source in config.templates.items()
            if name in (DEFAULT, WITH_TOOLS)
        }
        # A model of chats may end a text in another token than an answer.
        ends = (
            tokenizer.eos_id,
            tokenizer.named("eos_token"),
            tokenizer.usual_end,
            *config.end_ids,
        )
        self._ends = frozenset(end for end in ends if end is not None)

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | BadLine]:
        return self._encode(conversations, self._loss_on)

    def prompt_of(self, conversation: Conversation) -> Prompt:
        last = conversation.answers[-1]
        (prompt,) = self._tokenizer.encode_rendered([self._render(conversation, last, ask=True)])
        (whole,) = self._encode([conversation], "last")
        if isinstance(whole, BadLine):
            raise whole
        # Whichever special token the template has an answer end with, at its end or near it.
        learnt = whole.ids[whole.counts].tolist()
        special = [token for token in learnt if token in self._tokenizer.special]
        response = conversation.messages[last].get("content", "")
        return Prompt(prompt.ids, response, self._ends | frozenset(special[-1:]))

    def _encode(
        self, conversations: Sequence[Conversation], loss_on: str
    ) -> list[Encoded | BadLine]:
        laid_out = [self._laid_out(conversation, loss_on) for conversation in conversations]
        rendered = [each[0] for each in laid_out if not isinstance(each, BadLine)]
        marked = iter(self._tokenizer.encode_rendered(rendered))
        found: list[Encoded | BadLine] = []
        for each in laid_out:
            if isinstance(each, BadLine):
                found.append(each)
                continue
            tokens = next(marked)
            counts = overlapping(tokens.spans, each[1], len(each[0].text))
            counts[:1] = False
            found.append(
                Encoded(tokens.ids, counts)
                if counts.any()
                else BadLine("the chat template writes nothing of what the assistant says")
            )
        return found

    def _laid_out(
        self, conversation: Conversation, loss_on: str
    ) -> tuple[Rendered, list[Span]] | BadLine:
        """The text of a conversation, and the parts of it that are to be learnt."""
        try:
            rendered = self._render(conversation, len(conversation.messages))
            if loss_on == "all":
                return rendered, [(0, len(rendered.text))]
            if self._template(conversation).has_tag:
                spans = rendered.generated
                return rendered, spans[-1:] if loss_on == "last" else spans
            answers = conversation.answers[-1:] if loss_on == "last" else conversation.answers
            return rendered, [self._span(conversation, rendered.text, k) for k in answers]
        except BadLine as reason:
            return reason

    def _span(self, conversation: Conversation, text: str, answer: int) -> Span:
        """The part of a text that is an answer, with the token that ends it.

        It begins where the text would end that asks for it, and is as long as if nothing followed.
        """
        before = self._render(conversation, answer, ask=True).text
        is_last = answer + 1 == len(conversation.messages)
        alone = text if is_last else self._render(conversation, answer + 1).text
        start = len(before)
        if not (text.startswith(before) and alone.startswith(before)):
            raise BadLine(
                f"message {answer + 1}: the chat template does not ask for an answer "
                "(add_generation_prompt) with what it writes before one, so that its beginning is "
                "not known; a template says it with {% generation %} ... {% endgeneration %}"
            )
        if text.startswith(alone):
            return start, self._end(alone)
        # Some write an answer that others follow without what comes before a last one.
        content = conversation.messages[answer].get("content", "")
        after = self._after(conversation, answer, before)
        for bare in (content + after, content.strip() + after):
            if text.startswith(bare, start):
                return start, self._end(before + bare)
        raise BadLine(
            f"message {answer + 1}: the chat template writes an answer that others follow in "
            "another way than a last one, so that its end is not known; with loss_on='last' the "
            "last one alone is learnt"
        )

    def _after(self, conversation: Conversation, answer: int, before: str) -> str:
        """What a template writes after an answer."""
        probe = [*conversation.messages[:answer], {"role": "assistant", "content": PROBE}]
        written = self._render(dataclasses.replace(conversation, messages=probe), answer + 1).text
        return written[len(before) :].partition(PROBE)[2]

    def _end(self, text: str) -> int:
        """Where a text ends that may have a line break after the token that ends an answer."""
        stripped = text.rstrip()
        is_end = stripped.endswith(tuple(self._tokenizer.special.values()))
        return len(stripped) if is_end else len(text)

    def _render(self, conversation: Conversation, messages: int, *, ask: bool = False) -> Rendered:
        template, some = self._template(conversation), conversation.messages[:messages]
        return template.render(some, conversation.tools, ask=ask)

    def _template(self, conversation: Conversation) -> ChatTemplate:
        name = WITH_TOOLS if conversation.tools and WITH_TOOLS in self._templates else DEFAULT
        return self._templates[name]


def overlapping(spans: np.ndarray, wanted: Sequence[Span], length: int) -> np.ndarray:
    """Which tokens, by the characters that they are of, have one that is wanted, bool (T,)."""
    is_wanted = np.zeros(length, np.int64)
    for start, end in wanted:
        is_wanted[start:end] = 1
    before = np.concatenate([[0], np.cumsum(is_wanted)])
    return before[spans[:, 1]] > before[spans[:, 0]]


def num_bytes(conversation: Conversation, loss_on: str) -> int:
    """The bytes of UTF-8 of the contents that are to be learnt."""
    learnt = {"responses": conversation.answers, "last": conversation.answers[-1:]}
    places = learnt.get(loss_on, range(len(conversation.messages)))
    contents = (conversation.messages[k].get("content", "") for k in places)
    return sum(len(content.encode()) for content in contents)
