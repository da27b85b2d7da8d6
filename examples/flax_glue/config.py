"""The settings of a fine-tuning run."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import tyro

from examples.flax_glue.shapes import LORA_TARGETS, POOLINGS, EncoderConfig, read_encoder
from examples.flax_glue.tasks import TASKS
from examples.flax_llama.methods import ADAMW, ADAMW_8BIT, GALORE, own
from examples.flax_llama.shapes import DTYPES
from examples.flax_llama.usage import UsageError, at_least_one, one_of
from examples.flax_llama.values import whole_rank

LORA = "lora"
IN_GALORE = (*ADAMW, *ADAMW_8BIT)
OPTIMIZERS = ("adamw", "adamw_8bit", *IN_GALORE, LORA)
# Settings of some optimizers, which the others do without: of which, and what those are called.
OF_SOME = {
    **dict.fromkeys(("scale", "update_proj_gap", "projector"), (IN_GALORE, "optimizers in GaLore")),
    "rank": ((*IN_GALORE, LORA), "optimizers in GaLore and lora"),
    **dict.fromkeys(("lora_alpha", "lora_targets"), ((LORA,), LORA)),
}
# Of JAX's random numbers, in a program that takes it as an argument.
LARGEST_SEED = 2**31 - 1

# None in a `Config` as it is given, a value in a resolved one, which a type cannot tell apart.
T = TypeVar("T")
if TYPE_CHECKING:
    FromPreset = T | Any
    Rank = int | Any
else:
    FromPreset = T | None
    Rank = int | float | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to fine-tune, where no setting says otherwise."""

    epochs: int
    max_length: int
    rank: int
    batch: int = 16
    lr: float = 3e-5
    update_proj_gap: int = 500


# Those of GaLore are its paper's for RoBERTa on GLUE (arXiv:2403.03507, and run_glue.py of its
# repository): ranks 4 and 8, of which `scale` follows, and the largest of the learning rates that
# it tries, 1e-5 to 3e-5, which is that of its example. "short" is for a first look.
PRESETS = {
    "short": Recipe(epochs=3, max_length=128, rank=8),
    "galore_r4": Recipe(epochs=30, max_length=512, rank=4),
    "galore_r8": Recipe(epochs=30, max_length=512, rank=8),
}
# By which the published scales are divided by the rank: 4 at rank 4, 2 at rank 8.
SCALE_TIMES_RANK = 16.0
# Of LoRA's paper for RoBERTa (arXiv:2106.09685).
LORA_LR = 5e-4
# And PEFT's default.
LORA_ALPHA = 8.0


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a fine-tuning run. What is None is the preset's, until `resolve`."""

    # The first setting of each group that help shows.
    GROUPS: ClassVar = {
        **{"data": "model", "optimizer": "preset", "galore": "rank", "lora": "lora_alpha"},
        **{"training": "epochs", "run": "out"},
    }

    # Directory of a BERT or RoBERTa of Hugging Face: config.json, model.safetensors, and
    # tokenizer.json.
    model: Path
    # Directory of the task: train, dev and test, as .tsv in GLUE's format, or as .txt with a label
    # and a text on each line. Of vader and rotten_tomatoes, the file in the package.
    data: Path
    # cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli; text for lines with any labels; vader
    # (ratings) or rotten_tomatoes.
    task: str = "sst2"
    # File to report on in the end, with labels; by default test.txt or test.tsv in `data`, if it
    # has labels, which those of GLUE have not.
    test: Path | None = None
    # Of each file the first examples alone, so many, for a trial.
    limit: int | None = None
    # Tokens of a text, or of two; the longer one is cut. The preset's by default.
    max_length: FromPreset[int] = None
    # What the head sees of a text: its first token, or the mean of all, as sentence embeddings of
    # MiniLM are.
    pooling: str = "first"

    # short; galore_r4 or galore_r8, which are the published settings for RoBERTa on GLUE.
    preset: str = "short"
    # adamw, adamw_8bit; galore_adamw, fira_adamw, apollo_adamw, apollo_mini_adamw, ldadamw,
    # tracked_adamw, frugal_adamw, grass_adamw or dct_adamw, each also as ..._8bit; q_galore_adamw,
    # whose weights are in 8 bits too; lora, which is AdamW for adapters and head alone.
    optimizer: str = "galore_adamw"
    # Peak learning rate; the preset's by default, and 5e-4 for lora.
    lr: FromPreset[float] = None
    # Of all but norms and biases, multiplied by the learning rate.
    weight_decay: float = 0.0
    # Decay of the first moment.
    b1: float = 0.9
    # Decay of the second moment.
    b2: float = 0.999
    # Added to the root of the second moment.
    eps: float = 1e-6
    # Largest norm of a gradient; 0 does not clip.
    clip: float = 0.0

    # Rank of GaLore's projected gradients, or a fraction of the hidden size; or of LoRA's adapters.
    # The optimizer's own by default (apollo and frugal a quarter, apollo_mini 1), or the preset's.
    rank: Rank = None
    # Factor of GaLore's projected-back updates; the optimizer's own by default (1 of apollo,
    # ldadamw, frugal and dct), or 16 / rank.
    scale: FromPreset[float] = None
    # Updates from one choice of GaLore's subspaces to the next; the optimizer's own by default
    # (1 of ldadamw, tracked and dct), or the preset's.
    update_proj_gap: FromPreset[int] = None
    # How GaLore chooses a subspace; the optimizer's own by default, or svd.
    projector: FromPreset[str] = None

    # Of LoRA: the adapters are multiplied by alpha / rank; 8 by default.
    lora_alpha: FromPreset[float] = None
    # The layers that have adapters: qv (query and value, the default), or all linear ones.
    lora_targets: FromPreset[str] = None

    # How often each text is trained on; the preset's by default.
    epochs: FromPreset[int] = None
    # Texts per update; the preset's by default.
    batch: FromPreset[int] = None
    # Fraction of the updates in which the learning rate rises to its peak; then it falls to 0.
    warmup: float = 0.0
    # Of hidden states, attention's weights and the last layer; the model's own by default.
    dropout: float | None = None
    # float32 or bfloat16, of activations.
    dtype: str = "float32"
    # float32 or bfloat16, of parameters.
    param_dtype: str = "float32"
    # Of the new head, the order of the texts, dropout, and random projectors.
    seed: int = 0

    # Directory for metrics, settings and checkpoints; nothing is written without one.
    out: Path | None = None
    # Go on with the run in `out`, from its last checkpoint, with the same settings, which need not
    # be repeated.
    resume: bool = False
    # Show no progress bar.
    quiet: bool = False

    # Of a resolved configuration: the settings above that nobody gave. It is no flag.
    by_default: tyro.conf.Suppress[tuple[str, ...]] = ()

    def resolve(self) -> "Config":
        """The same with values in place of None, and every setting checked.

        What has no effect with the optimizer stays None.

        Raises:
          UsageError: a setting cannot work, or has no effect.
        """
        self._check_choices()
        check_effects(self, [self.optimizer], f"optimizer={self.optimizer!r}")
        if self.rank is not None and not math.isfinite(self.rank):
            raise UsageError(
                f"rank={self.rank}: expected a whole number, or a fraction of the hidden size."
            )
        default = self._defaults()
        unset = tuple(name for name in default if getattr(self, name) is None)
        config = dataclasses.replace(
            self,
            **{name: default[name] for name in unset},
            by_default=unset or self.by_default,
        )
        config._check()
        return config

    def encoder(self, outputs: int) -> EncoderConfig:
        """The model of a resolved configuration.

        Raises:
          UsageError: there is none that can be read, or it does not go with the settings.
        """
        settings: dict[str, Any] = {
            **{name: getattr(self, name) for name in ("pooling", "dtype", "param_dtype")},
            "outputs": outputs,
        }
        if self.dropout is not None:
            parts = ("hidden_dropout", "attention_dropout", "classifier_dropout")
            settings |= dict.fromkeys(parts, self.dropout)
        encoder = read_encoder(self.model, **settings)
        if self.optimizer != LORA:
            return encoder
        return dataclasses.replace(
            encoder,
            lora_rank=self.rank_for(encoder.hidden),
            lora_alpha=self.lora_alpha,
            lora_targets=self.lora_targets,
        )

    def rank_for(self, hidden: int) -> int:
        """The rank, of which a fraction is one of the hidden size; of LoRA it is whole.

        Raises:
          UsageError: there is no such subspace of gradients of that size.
        """
        rank = self.rank if self.optimizer == LORA else whole_rank(self.rank, hidden)
        if not (isinstance(rank, int) and 1 <= rank < hidden):
            raise UsageError(
                f"rank={self.rank}: expected 1 to {hidden - 1}, less than the hidden size {hidden}"
                + (", or a fraction of it." if self.optimizer != LORA else ".")
            )
        return rank

    def _defaults(self) -> dict[str, Any]:
        """The settings that can be left out, where they have an effect."""
        recipe = dataclasses.asdict(PRESETS[self.preset])
        of_galore = {name: recipe.pop(name) for name in ("rank", "update_proj_gap")}
        if self.optimizer == LORA:
            rank = {"rank": of_galore["rank"], "lora_alpha": LORA_ALPHA, "lora_targets": "qv"}
            return recipe | {"lr": LORA_LR} | rank
        if self.optimizer not in IN_GALORE:
            return recipe
        names = ("rank", "scale", "update_proj_gap", "projector")
        theirs = {k: v for k, v in own(self.optimizer).items() if k in names}
        rank = self.rank or theirs.get("rank", of_galore["rank"])
        of_galore |= {"projector": GALORE["projector"], "scale": SCALE_TIMES_RANK / max(rank, 1)}
        return recipe | of_galore | theirs

    def _check_choices(self) -> None:
        for name, choices in {
            "task": TASKS,
            "preset": PRESETS,
            "optimizer": OPTIMIZERS,
            "pooling": POOLINGS,
            "dtype": DTYPES,
            "param_dtype": DTYPES,
        }.items():
            one_of(name, getattr(self, name), choices)
        if self.lora_targets is not None:
            one_of("lora_targets", self.lora_targets, LORA_TARGETS)

    def _check(self) -> None:
        for name in ("epochs", "batch", "max_length", "update_proj_gap", "limit"):
            if getattr(self, name) is not None:
                at_least_one(name, getattr(self, name))
        for name in ("lr", "scale", "eps", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name}={value}: expected a positive number.")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: expected 0 or more.")
        for name in ("warmup", "b1", "b2", "dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UsageError(
                    f"{name}={getattr(self, name)}: expected at least 0 and less than 1."
                )
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UsageError(f"seed={self.seed}: expected 0 to {LARGEST_SEED}.")
        if self.resume and self.out is None:
            raise UsageError("resume=True needs the directory of the run: out=DIRECTORY.")


def check_effects(config: Config, optimizers: Sequence[str], named: str) -> None:
    """Refuses settings that none of the optimizers has.

    Args:
      config: the settings as they are given.
      optimizers: of a run, or of all runs of a comparison.
      named: what to call them.

    Raises:
      UsageError: names the first such setting.
    """
    for name, (some, what) in OF_SOME.items():
        value = getattr(config, name)
        if value is not None and not set(some) & set(optimizers):
            raise UsageError(
                f"{name}={value!r} has no effect with {named}, only with {what}. Leave it out."
            )
