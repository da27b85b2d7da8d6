"""Goes on training a model that is there, on text, on prompts and responses, or on chats.

python -m examples.flax_llama.finetune --init-from SmolLM2-135M --data chats.jsonl --out runs/chats
python -m examples.flax_llama.finetune --init-from SmolLM2-135M --optimizer lora \
    --data chats.jsonl --out runs/lora
python -m examples.flax_llama.finetune --out runs/chats --resume
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from examples.flax_llama.checkpoint import CheckpointError
from examples.flax_llama.command import program
from examples.flax_llama.config import Config
from examples.flax_llama.data import Data
from examples.flax_llama.distributed import is_first, processes
from examples.flax_llama.effects import Need, check_effects
from examples.flax_llama.flags import command_line
from examples.flax_llama.generate import answer
from examples.flax_llama.given import settings_given
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import size_of_updates
from examples.flax_llama.pretrained import settings_of_source
from examples.flax_llama.progress import print_text, scores
from examples.flax_llama.tokenizer import Tokenizer
from examples.flax_llama.train import Result, open_dataset, recognised, train
from examples.flax_llama.usage import UsageError
from examples.flax_llama.validation import Valid
from examples.flax_llama.writing import write_whole

RESUME = "python -m examples.flax_llama.finetune --resume --out "
# Where --lr says nothing: by how much an update moves an entry of the layers' matrices.
MOVES = 2e-5
SAMPLES = "samples.json"
# Of text, which asks for nothing: the tokens that a sample goes on from.
BEGINNING = 32


@dataclasses.dataclass(frozen=True)
class Settings(Config):
    """The settings of fine-tuning: those of training, with other defaults, and some of its own."""

    GROUPS: ClassVar = Config.GROUPS | {"fine-tuning": "epochs"}

    # Passes over the data, in place of --steps; 3 by default.
    epochs: float | None = None
    # Answers to prompts of the validation data that are made before and after; at most 8.
    samples: int = 3
    # Tokens of such an answer at most.
    sample_tokens: int = 100

    def training(self) -> Config:
        """Those of training alone."""
        names = [field.name for field in dataclasses.fields(Config)]
        return Config(**{name: getattr(self, name) for name in names})


OF_SAMPLES = ("samples", "sample_tokens")
NEEDS = (
    Need(("epochs", *OF_SAMPLES), lambda own: not own.resume, "resume", "resume=False"),
    Need(OF_SAMPLES[1:], lambda own: own.samples > 0, "samples", "samples"),
)
# What a fine-tuning begins with where nobody says otherwise; a batch and a length that fit into
# little memory, and the warm-up and decay that are usual for it.
DEFAULTS: dict[str, Any] = {
    **{"weights_only": True, "data_format": "auto", "batch": 16, "seq": 512, "clip": 1.0},
    **{"warmup": 0.03, "attend_across": False},
}


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A fine-tuned model.

    Attributes:
      result: of the training.
      samples: for each prompt, that, the response that the data has, and the model's before and
        after; empty where the run went on from a checkpoint.
    """

    result: Result
    samples: list[dict[str, str]]


def finetune(settings: Settings) -> Tuned:
    """Fine-tunes one model; see `train`.

    Raises:
      UsageError: a setting cannot work; nothing has been written.
      FloatingPointError: the loss or a gradient is not finite any more; no checkpoint has it.
      CheckpointError: a checkpoint, or another file of the run, could not be written.
    """
    check_effects([settings], Settings(), NEEDS)
    if settings.init_from is None and not settings.resume:
        raise UsageError(
            "init_from=DIRECTORY is missing: a directory of Hugging Face, an imported model, or a "
            "run. From nothing, a model is trained by examples.flax_llama.train."
        )
    if not 0 <= settings.samples <= 8 or settings.sample_tokens < 1:
        raise UsageError(
            f"samples={settings.samples} of sample_tokens={settings.sample_tokens}: expected 0 to "
            "8, and at least 1 token."
        )
    settings, data = in_steps(settings)
    config = settings.training()
    samples: list[dict[str, str]] = []
    make = functools.partial(sampled, count=settings.samples, tokens=settings.sample_tokens)

    def before(model: Llama, data: Data) -> None:
        samples.extend(make(model, data.tokenizer, data.valid))

    go_on = f"{RESUME}{config.out}"
    with contextlib.closing(data.train) if data else contextlib.nullcontext():
        sampling = before if settings.samples and not config.resume else None
        result = train(config, go_on, sampling, data)
    if samples:
        after = make(result.model, result.tokenizer, result.valid_data)
        samples = [a | {"after": b["before"]} for a, b in zip(samples, after, strict=True)]
        if config.out is not None and is_first():
            write_whole(config.out / SAMPLES, json.dumps(samples, indent=2, ensure_ascii=False))
    return Tuned(result, samples)


def in_steps(settings: Settings) -> tuple[Settings, Data | None]:
    """With the number of updates that so many epochs are, and the learning rate, if not given.

    Returns:
      The settings, and the data, where it was opened to know how long an epoch is.

    Raises:
      UsageError: both are given, or nobody knows how long an epoch is.
    """
    if settings.resume:
        return settings, None
    resolved = recognised(settings.resolve())
    settings = dataclasses.replace(settings, data_format=resolved.data_format)
    if settings.lr is None and settings.optimizer != "lora":
        settings = dataclasses.replace(settings, lr=MOVES / (size_of_updates(resolved) or 1.0))
    if settings.steps is not None:
        if settings.epochs is not None:
            raise UsageError(
                f"epochs={settings.epochs} and steps={settings.steps} say how long to train: give "
                "one of them."
            )
        return settings, None
    epochs = 3.0 if settings.epochs is None else settings.epochs
    if not 0 < epochs < math.inf:
        raise UsageError(f"epochs={epochs}: expected a positive number.")
    data = open_dataset(resolved)
    if data.rows is None:
        data.train.close()
        raise UsageError(
            f"data={settings.data} is streamed, and nobody knows how much it is: give steps=N."
        )
    steps = max(1, math.ceil(epochs * data.rows / resolved.batch))
    return dataclasses.replace(settings, steps=steps), data


def sampled(
    model: Llama, tokenizer: Tokenizer, valid: Valid, *, count: int, tokens: int
) -> list[dict[str, str]]:
    """What a model makes of the first prompts to validate on, and what the data has."""
    found = []
    if valid.prompts:
        for prompt in valid.prompts[:count]:
            text = answer(model, tokenizer, prompt.ids, prompt.stop_ids, tokens=tokens)
            shown = tokenizer.decode(prompt.ids)
            found.append({"prompt": shown, "reference": prompt.response, "before": text})
        return found
    for number, row in enumerate(valid.rows[:count]):
        if valid.segments is not None:
            row = row[valid.segments[number] == 1]
        ids = row[: min(BEGINNING, -(-len(row) // 2))]
        text = answer(model, tokenizer, ids, frozenset(), tokens=tokens)
        rest = tokenizer.decode(row[len(ids) : len(ids) + tokens])
        found.append({"prompt": tokenizer.decode(ids), "reference": rest, "before": text})
    return found


def told(samples: Sequence[dict[str, str]]) -> str:
    """Samples, to be read."""
    return "\n\n".join(
        "\n".join(f"{name:>9}: {text.strip()}" for name, text in sample.items())
        for sample in samples
    )


def from_command_line(args: Sequence[str] | None = None) -> Settings:
    """The settings given, and those of the model that they begin with."""
    return settings_given(
        lambda base: command_line(Settings, args, default=base, description=__doc__), with_defaults
    )


def with_defaults(base: Config) -> Settings:
    """The settings that a command line need not repeat, with those of fine-tuning."""
    if base.resume:
        return Settings(**vars(base))
    own = dict(DEFAULTS)
    if base.init_from is not None:
        source = settings_of_source(base.init_from)
        own |= {"param_dtype": source.param_dtype, "dtype": source.dtype}
        # Rounded to the nearest, updates of bfloat16 weights would be lost, as small as they are.
        own["stochastic_rounding"] = source.param_dtype == "bfloat16"
    return Settings(**vars(base) | own)


def main() -> None:
    with program(Settings, errors=(CheckpointError, FloatingPointError)):
        settings = from_command_line()
        with processes(settings):
            tuned = finetune(settings)
            if not is_first():
                return
            if tuned.samples and not settings.quiet:
                print_text(told(tuned.samples))
            last = tuned.result.valid[-1]
            print_text(f"Finished: {scores(last)}" if settings.quiet else "Finished.")


if __name__ == "__main__":
    main()
