"""How each preset of the application is trained here."""

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.quality.contenders import ADAM, GAP
from benchmarks.quality.corpus import prepare
from examples.flax_llama.config import Config

STEPS = 500


@dataclasses.dataclass(frozen=True)
class Size:
    """How a preset is trained here.

    Attributes:
      batch: sequences of an update.
      seq: tokens of a sequence.
      tokenizer: to train, where the text is not tokenized.
      characters: of the large corpus, more than one run reads.
      workers: that are quickest.
      seconds: of a run with so many, to plan with.
      rate: factor of the learning rates that sweeps begin with: the wider a model, the lower.
      dtype: of the products.
    """

    batch: int
    seq: int
    tokenizer: str
    characters: int
    workers: int
    seconds: float
    rate: float = 1.0
    dtype: str = "float32"


SIZES = {
    # The demo's.
    "9m": Size(8, 128, "bpe:2048", 3_000_000, workers=2, seconds=100),
    "60m": Size(
        64, 256, "bpe:16384", 40_000_000, workers=1, seconds=60, rate=0.25, dtype="bfloat16"
    ),
}


def base_of(
    model: str, steps: int, directory: Path | None, cache: Path
) -> tuple[Config, dict[str, Any]]:
    """The application's settings that all runs share, and what the record says of them.

    Args:
      model: a preset of SIZES.
      steps: updates of each run.
      directory: of the text, as `prepare` takes it.
      cache: for what is tokenized.
    """
    size = SIZES[model]
    text = prepare(directory, size.tokenizer, size.characters, cache)
    base = Config(
        preset=model,
        steps=steps,
        batch=size.batch,
        seq=size.seq,
        dtype=size.dtype,
        clip=1.0,
        eval_every=steps,
        quiet=True,
        **text.settings,
    ).resolve()
    about = {"model": model, "steps": steps, "batch": size.batch, "seq": size.seq}
    about |= {"tokenizer": size.tokenizer, "update_proj_gap": GAP, "adam": ADAM, "data": text.about}
    # What a record of other sizes does not say.
    about |= {} if size.dtype == "float32" else {"dtype": size.dtype}
    return base, about
