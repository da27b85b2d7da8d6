"""Which published model is fine-tuned how on which card: a table, by the planner's estimate.

python -m examples.flax_llama.plan_models --out examples/flax_llama/MODELS.md
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.flax_llama.command import program
from examples.flax_llama.config import Config
from examples.flax_llama.devices import DEVICES, Device
from examples.flax_llama.fit import Fit, Question
from examples.flax_llama.flags import command_line
from examples.flax_llama.usage import one_of
from examples.flax_llama.writing import write_whole
from examples.hf.published import PUBLISHED

SEQ = 2048
# A larger batch is worth nothing.
MOST = 64
MODELS = (
    *("gemma-3-270m", "qwen3-0.6b", "gemma-3-1b", "llama-3.2-1b", "qwen3-1.7b", "llama-3.2-3b"),
    *("qwen3-4b", "gemma-3-4b", "llama-3.1-8b", "qwen3-8b", "gemma-3-12b", "qwen3-14b"),
)
CARDS = (
    *("rtx4060_8gb", "rtx3080_10gb", "rtx4070_12gb", "rtx4080_16gb", "rtx4090_24gb"),
    *("l40s_48gb", "h100_80gb", "tpu_v5e", "tpu_v6e"),
)
# Ways to fine-tune, those first that are nearest to AdamW for all parameters. Weights and
# activations are bfloat16.
IN_LAYERS = {"layerwise": True, "clip_by": "layer", "projector": "power_iteration"}
WAYS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "remat": True},
    "AdamW, 8-bit": {"optimizer": "adamw_8bit", "remat": True},
    "GaLore": {"optimizer": "galore_adamw", "projector_dtype": "bfloat16", **IN_LAYERS},
    "GaLore, 8-bit": {"optimizer": "galore_adamw_8bit", "projector_dtype": "bfloat16", **IN_LAYERS},
    "Q-GaLore": {"optimizer": "q_galore_adamw", **IN_LAYERS},
    "least": {
        **{"optimizer": "galore_adamw_8bit", "int8_weights": True, "inputs_dtype": "int8"},
        **{"tables": "factored", "rank": 256, **IN_LAYERS, "projector": "rows"},
    },
    "LoRA": {"optimizer": "lora", "remat": True, "lora_targets": "all"},
    "LoRA, int8": {
        **{"optimizer": "lora", "remat": True, "lora_targets": "all", "int8_weights": True}
    },
}


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model fits on a card: the nearest way to AdamW, and the most sequences at a time."""

    name: str
    batch: int

    def __str__(self) -> str:
        return f"{self.name}: {'' if self.batch < MOST else '>= '}{self.batch}"


def question(model: str, way: dict[str, Any], device: Device) -> Question:
    common = {"preset": model, "seq": SEQ, "batch": 1, "steps": 1000, "clip": 1.0}
    settings: dict[str, Any] = common | {"dtype": "bfloat16", "param_dtype": "bfloat16"} | way
    config = Config(**settings)
    return Question(config, config.resolve().vocab_size or 0, device)


def nearest(model: str, device: Device) -> Way | None:
    """The first way that surely fits, with how many sequences; None if there is none."""
    for name, settings in WAYS.items():
        asked = question(model, settings, device)
        if asked.fit() is not Fit.SURE:
            continue
        low, high = 1, MOST + 1
        while high - low > 1:
            middle = (low + high) // 2
            changed = dataclasses.replace(asked.given, batch=middle)
            low, high = (middle, high) if asked.fit(changed) is Fit.SURE else (low, middle)
        return Way(name, low)
    return None


def rows(models: Sequence[str], cards: Sequence[str]) -> Iterator[str]:
    names = [DEVICES[card].description.removeprefix("NVIDIA ") for card in cards]
    yield f"| | {' | '.join(names)} |"
    yield f"| --- |{' --- |' * len(cards)}"
    for model in models:
        found = [nearest(model, DEVICES[card]) for card in cards]
        yield f"| {model} | {' | '.join(str(way or '-') for way in found)} |"


def document(models: Sequence[str], cards: Sequence[str]) -> str:
    ways = "\n".join(f"* {name}: `{flags(settings)}`" for name, settings in WAYS.items())
    return f"""# Which model on which card

Made by `python -m examples.flax_llama.plan_models`, from the planner's estimate, with what it may
be off by ([how far that is](README.md#does-it-fit)). A cell is the first of these ways of
fine-tuning that surely fits, and how many sequences of {SEQ:,} tokens fit at a time; all but the
last two train all parameters. A column is for every card with that much memory: 16 GB are an RTX
4060 Ti's and a 4080's.
All with `--dtype bfloat16 --param-dtype bfloat16`, rank a quarter of the hidden size where none is
named; settings in between, such as `--tables factored` or a smaller rank, are not in the table:

{ways}

{chr(10).join(rows(models, cards))}

`python -m examples.flax_llama.plan --preset MODEL ...` says more of each, of other settings, and of
a directory of Hugging Face.
"""


def flags(settings: dict[str, Any]) -> str:
    words = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True and name != "int8_weights" else f"{flag} {value}")
    return " ".join(words)


def plan_models(
    out: Path, models: tuple[str, ...] = MODELS, devices: tuple[str, ...] = CARDS
) -> None:
    """Writes the table, in Markdown.

    Args:
      out: file to write.
      models: published ones, by the names that presets have.
      devices: as plan takes them.
    """
    for model in models:
        one_of("models", model, PUBLISHED)
    for device in devices:
        one_of("devices", device, DEVICES)
    write_whole(out, document(models, devices))


def main() -> None:
    with program(plan_models):
        command_line(plan_models)()


if __name__ == "__main__":
    main()
