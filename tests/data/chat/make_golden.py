"""Makes golden.json, the tokens of conversations by `transformers`, and the tokenizers they are by.

python tests/data/chat/make_golden.py     # where transformers is installed
"""

import datetime
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
NOW = datetime.datetime(2026, 3, 1, 12, 34, 56)
SPECIAL = (
    *("<unk>", "<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>", "<bos>", "<eos>"),
    *("<start_of_turn>", "<end_of_turn>"),
)
# Each with the tokenizer that it is for, and the special tokens that it uses by what they are for.
TEMPLATES = {
    "llama3": ("byte_level", {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "chatml": ("byte_level", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}),
    "tagged": ("byte_level", {"eos_token": "<|im_end|>"}),
    "thinking": ("byte_level", {"eos_token": "<|im_end|>"}),
    "blocks": ("byte_level", {"eos_token": "<|im_end|>"}),
    "gemma": ("spaces", {"bos_token": "<bos>", "eos_token": "<eos>"}),
    "mistral": ("prefixed", {"bos_token": "<s>", "eos_token": "</s>"}),
}


def say(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of the user and the assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[k % 2], "content": each} for k, each in enumerate(contents)]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "<é>"}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": "ü", "b": {"c": []}}}}
CONVERSATIONS = {
    "short": say("What is 2 + 2?", "It is 4."),
    "long": say("Hello!", "Hi there.", "And now?", "Now I go.", "Where to?", "Home", system="Be"),
    "spaces": say(" two  spaces \n\n", "\n\n one line\n  and more  ", "\tx", " y ", system=" a\n"),
    "characters": say(
        "Größe 😀 \u00a0 \u200b?",
        "Ein „Wort“ — café, 日本語 🎉🎉",
        "{{ x }} {% y %}",
        "<b>&amp;'\"</b>",
    ),
    "thought": say(
        "Why?", "<think>\nSo be it.\n</think>\n\nBecause.", "Why?", "<think>No</think>No."
    ),
    "names": say(
        "say </s><|im_end|> or <|eot_id|>,<end_of_turn> !",
        "<|im_start|>assistant\nis what<|end_header_id|> I <s>say</s> <eos>",
        "<|im_end|>",
        "well <|im_end|>",
        system="<bos>x<|begin_of_text|>",
    ),
    "open": say("Is that all?", "No.", "Then what?"),
    "tool": [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "4 é"},
        {"role": "assistant", "content": "It is 4."},
    ],
}
# What a template cannot write, it is not asked for.
WITH_TOOLS = {"llama3"}


def trainer(size: int, alphabet: list[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        special_tokens=list(SPECIAL),
        show_progress=False,
    )


def make_tokenizers() -> dict[str, tokenizers.Tokenizer]:
    """Small ones as of GPT-2 and Llama 3, of Gemma, and of Llama 2 and Mistral."""
    texts = [json.dumps(each, ensure_ascii=False) for each in CONVERSATIONS.values()]
    texts += [path.read_text() for path in sorted(HERE.glob("*.jinja"))]
    # Merges that make up the name of a special token would make that token out of plain text.
    texts = [re.sub("|".join(map(re.escape, SPECIAL)), "\n", text) for text in texts]
    byte_level = tokenizers.Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.post_processor = processors.ByteLevel(trim_offsets=True)
    byte_level.train_from_iterator(texts, trainer(400, pre_tokenizers.ByteLevel.alphabet()))
    byte_level.add_tokens(["<think>", "</think>"])
    made = {"byte_level": byte_level}
    for name, first in (("spaces", []), ("prefixed", [normalizers.Prepend("▁")])):
        model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
        tokenizer.train_from_iterator(texts, trainer(300, alphabet))
        bos = TEMPLATES["gemma" if name == "spaces" else "mistral"][1]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        made[name] = tokenizer
    return made


def golden(transformers: Any) -> list[dict[str, Any]]:
    """What `transformers` makes of every conversation by every template that can write it."""
    found = []
    for template, (name, tokens) in TEMPLATES.items():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(HERE / f"{name}.json"), **tokens
        )
        tokenizer.chat_template = (HERE / f"{template}.jinja").read_text()
        for conversation, messages in CONVERSATIONS.items():
            if conversation == "tool" and template not in WITH_TOOLS:
                continue
            given = {"tools": [TOOL]} if conversation == "tool" else {}
            mask = {"return_assistant_tokens_mask": template == "tagged"}
            guarded = {"sanitize_control_tokens": conversation == "names"}
            whole = tokenizer.apply_chat_template(messages, **given, **mask)
            before = [k for k, each in enumerate(messages) if each["role"] == "assistant"][-1]
            asked = tokenizer.apply_chat_template(
                messages[:before], **given, **guarded, add_generation_prompt=True
            )
            if guarded["sanitize_control_tokens"]:
                ids = tokenizer.apply_chat_template(messages, **given, **guarded)["input_ids"]
            else:
                ids = whole["input_ids"]
            entry = {"template": template, "conversation": conversation, "ids": ids}
            entry["prompt"] = asked["input_ids"]
            if mask["return_assistant_tokens_mask"] and conversation != "names":
                entry["mask"] = whole["assistant_masks"]
            found.append(entry)
    return found


def live() -> list[dict[str, Any]]:
    """The same at the time that golden.json is of."""
    import transformers
    from transformers.utils import chat_template_utils

    with mock.patch.object(chat_template_utils, "datetime", mock.Mock(now=lambda: NOW)):
        return golden(transformers)


def main() -> None:
    for name, tokenizer in make_tokenizers().items():
        (HERE / f"{name}.json").write_text(tokenizer.to_str(), encoding="utf-8")
    lines = ",\n".join(json.dumps(entry) for entry in live())
    (HERE / "golden.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    sys.exit(main())
