"""Settings: the shape of a LLaMA, the published shapes and recipes, and a training run."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "cudnn")
ON_NAN = ("stop", "skip")
CLIP_BY = ("global", "layer")


class UsageError(ValueError):
    """A setting that cannot work; the message says what would."""


def one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(choices)}.")


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name}={value}: expected at least 1.")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything that fixes the parameters and the forward pass of a `Llama`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab_size: int = 32_000
    # Longest sequence trained on, and the context that sampling keeps.
    max_seq: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    # Of activations; norms, softmax and loss are computed in float32 whatever it is.
    dtype: str = "float32"
    param_dtype: str = "float32"
    # "auto", "xla" or "cudnn"; auto is cudnn on an NVIDIA GPU with 16-bit activations.
    attention: str = "auto"
    # Keep only the input of each layer and compute the rest again in the backward pass.
    remat: bool = False

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("param_dtype", self.param_dtype, DTYPES)
        one_of("attention", self.attention, ATTENTIONS)
        for name in ("hidden", "intermediate", "layers", "heads", "vocab_size", "max_seq"):
            at_least_one(name, getattr(self, name))
        if self.hidden % (2 * self.heads):
            raise UsageError(
                f"hidden={self.hidden} does not divide into heads={self.heads} heads of an even "
                "size, which rotary embeddings need."
            )

    @property
    def num_params(self) -> int:
        """Number of parameters, embedding, untied head and norms included."""
        norms = (2 * self.layers + 1) * self.hidden
        return self._matrix_entries + self.vocab_size * self.hidden + norms

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward per token of a whole sequence.

        6 for each entry of a matrix that multiplies (the embedding is looked up), and 12 S D in
        each layer for attention, whose causal half is counted too: what PaLM (arXiv:2204.02311,
        appendix B) calls model FLOPs. Rematerialization does not count.
        """
        return 6 * self._matrix_entries + 12 * self.layers * self.hidden * self.max_seq

    @property
    def _matrix_entries(self) -> int:
        """Entries of the attention and MLP kernels and of the head."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab_size * self.hidden


# Zhao et al., "GaLore" (arXiv:2403.03507), and the reference implementation's smaller siblings;
# 13b is LLaMA's (arXiv:2302.13971).
PRESETS = {
    "9m": LlamaConfig(hidden=128, intermediate=352, layers=4, heads=4),
    "20m": LlamaConfig(hidden=256, intermediate=688, layers=4, heads=4),
    "35m": LlamaConfig(hidden=384, intermediate=1024, layers=6, heads=8),
    "60m": LlamaConfig(hidden=512, intermediate=1376, layers=8, heads=8),
    "130m": LlamaConfig(hidden=768, intermediate=2048, layers=12, heads=12),
    "250m": LlamaConfig(hidden=768, intermediate=2560, layers=24, heads=16),
    "350m": LlamaConfig(hidden=1024, intermediate=2736, layers=24, heads=16),
    "1b": LlamaConfig(hidden=2048, intermediate=5461, layers=24, heads=32),
    "3b": LlamaConfig(hidden=2560, intermediate=6848, layers=32, heads=32),
    "7b": LlamaConfig(hidden=4096, intermediate=11008, layers=32, heads=32),
    "13b": LlamaConfig(hidden=5120, intermediate=13824, layers=40, heads=40),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a preset is trained with GaLore, unless a setting says otherwise."""

    rank: int
    steps: int
    batch: int = 512
    lr: float = 0.01
    update_proj_gap: int = 200
    # 0 does not clip.
    clip: float = 0.0
    q_galore_lr: float = 0.015


# 60m to 7b are published (same paper and its scripts); 250m borrows from 350m, 3b from 1b, 13b from
# 7b. The three smallest have no published recipe: a quarter of the hidden size, and minutes on one
# machine.
RECIPES = {
    "9m": Recipe(rank=32, steps=1000, batch=16, clip=1.0),
    "20m": Recipe(rank=64, steps=1000, batch=16, clip=1.0),
    "35m": Recipe(rank=96, steps=1000, batch=16, clip=1.0),
    "60m": Recipe(rank=128, steps=10_000),
    "130m": Recipe(rank=256, steps=20_000),
    "250m": Recipe(rank=256, steps=60_000, q_galore_lr=0.01),
    "350m": Recipe(rank=256, steps=60_000, q_galore_lr=0.01),
    "1b": Recipe(rank=512, steps=100_000, q_galore_lr=0.01),
    "3b": Recipe(rank=512, steps=100_000, q_galore_lr=0.01),
    "7b": Recipe(
        rank=1024, steps=150_000, lr=0.005, q_galore_lr=0.004, update_proj_gap=500, clip=1.0
    ),
}
RECIPES["13b"] = RECIPES["7b"]

# None in a `Config` as it is given, a value in a resolved one, which a type cannot tell apart.
T = TypeVar("T")
if TYPE_CHECKING:
    FromPreset = T | Any
else:
    FromPreset = T | None


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a training run. What is None is the preset's, until `resolve`."""

    # Shape of the model, and the recipe that fills the settings left at None: 9m, 20m, 35m, 60m,
    # 130m, 250m, 350m, 1b, 3b, 7b or 13b.
    preset: str = "9m"
    # Hidden size.
    hidden: FromPreset[int] = None
    # Width of the MLP.
    intermediate: FromPreset[int] = None
    # Number of layers.
    layers: FromPreset[int] = None
    # Number of attention heads.
    heads: FromPreset[int] = None
    # Vocabulary of the model; the tokenizer's by default, and never smaller.
    vocab_size: int | None = None

    # Text to train on: "austen" (built in); a file or a glob, several with commas between, of plain
    # text (.txt) or JSON lines (.jsonl, field "text"), also as .gz, .xz or .zst; a directory made
    # by examples.flax_llama.tokenize; "hf:NAME[:CONFIG[:SPLIT]]", streamed from Hugging Face.
    data: str = "austen"
    # Text to validate on, likewise; by default a part of `data` that is then not trained on.
    valid_data: str | None = None
    # "bytes", "bpe:SIZE" for a byte-level BPE trained on the training text, or the path of a
    # tokenizer.json or of a SentencePiece model; by default bpe:2048, or that of tokenized data.
    tokenizer: str | None = None
    # Fill every row with tokens; --no-packing has one document per row, cut or padded, as the
    # reference implementation does.
    packing: bool = True
    # Tokens per sequence.
    seq: int = 256
    # Validation tokens per evaluation; by default all there are, of files and of Hugging Face data
    # about the first million.
    eval_tokens: int | None = None

    # adamw, adafactor, lion, sgd, adamw_8bit, or any of them in GaLore: galore_adamw, ...; or
    # q_galore_adamw, which is galore_adamw_8bit with 4-bit projectors, lazy refresh, int8 weights.
    optimizer: str = "galore_adamw"
    # Peak learning rate; the preset's is GaLore's AdamW (0.01; 0.005 for 7b), whose matrices move
    # by `scale` times that, or Q-GaLore's (0.015, 0.01 or 0.004). Plain adamw wants about 0.001 to
    # 0.005, lion a third of adamw's.
    lr: FromPreset[float] = None
    # Factor of `lr` for the layers' matrices; GaLore's `scale` already is one.
    matrix_lr_ratio: float = 1.0
    # Of the learning rate: cosine, linear, constant, or wsd (warm-up, stable, decay).
    schedule: str = "cosine"
    # Fraction of the updates in which the learning rate rises to its peak.
    warmup: float = 0.1
    # Fraction of the updates in which schedule wsd falls from the peak, linearly.
    cooldown: float = 0.2
    # Fraction of the peak learning rate that the last update has, unless the schedule is constant.
    final_lr: float = 0.1
    # Of everything but the norms, multiplied by the learning rate.
    weight_decay: float = 0.0
    # Decay of the first moment of adamw and lion, of which lion's update interpolates.
    b1: float = 0.9
    # Decay of the second moment of adamw (0.999 by default), or of the moment of lion (0.99).
    b2: float | None = None
    # Added to the root of adamw's second moment.
    eps: float = 1e-8
    # Of sgd; also of adafactor, which then has a first moment. 0 has none.
    momentum: float = 0.0
    # Largest norm of a gradient; 0 does not clip.
    clip: FromPreset[float] = None
    # Whose norm that is: "global", of the whole gradient, for which `layerwise` takes another
    # backward pass; or "layer", of each layer by itself, with `layerwise` alone.
    clip_by: str = "global"

    # Rank of GaLore's projected gradients.
    rank: FromPreset[int] = None
    # Updates from one choice of GaLore's subspaces to the next.
    update_proj_gap: FromPreset[int] = None
    # Factor of GaLore's projected-back updates.
    scale: float = 0.25
    # How GaLore chooses a subspace: svd or eigh, exactly; randomized_svd or power_iteration, nearly
    # as well and faster; rows or dct, out of given vectors, of which it keeps the numbers alone;
    # gaussian or orthonormal, at random.
    projector: str = "svd"
    # What GaLore keeps its subspaces in: float32, bfloat16, int8, int4, float8_e4m3 or
    # float8_e5m2; the default is int4 with q_galore_adamw, float32 otherwise.
    projector_dtype: str | None = None
    # When it does: periodic, or lazy, which is less and less often where a subspace stands still;
    # lazy by default with q_galore_adamw alone.
    refresh: FromPreset[str] = None
    # Spread the choices for the layers' matrices over the updates from one to the next.
    stagger: bool = False

    # Number of updates.
    steps: FromPreset[int] = None
    # Sequences per update, over all devices.
    batch: FromPreset[int] = None
    # Micro-batches that one update's sequences are computed in, one after the other.
    accumulate: int = 1
    # Update each layer inside the backward pass, so that no two layers have gradients at a time:
    # much less memory for the time of computing each layer's activations again.
    layerwise: bool = False
    # float32 or bfloat16, of activations.
    dtype: str = "float32"
    # float32 or bfloat16, of parameters.
    param_dtype: str = "float32"
    # Keep the layers' matrices in 8 bits, with an optimizer in GaLore; by default with
    # q_galore_adamw alone.
    int8_weights: FromPreset[bool] = None
    # Round bfloat16 parameters at random when they are updated, so that small updates are not lost.
    stochastic_rounding: bool = False
    # auto, xla or cudnn; auto is cudnn on an NVIDIA GPU with 16-bit activations.
    attention: str = "auto"
    # Compute activations again in the backward pass instead of keeping them: less memory, slower.
    remat: bool = False
    # Of the initial weights and the order of the data.
    seed: int = 0
    # At a gradient that is not finite: "stop", or "skip" the update (and stop after ten in a row).
    on_nan: str = "stop"

    # Directory for metrics, tokenizer and checkpoints; nothing is written without one.
    out: Path | None = None
    # Updates between evaluations, of which the last update always has one; a tenth of `steps`, at
    # most 1000, by default.
    eval_every: FromPreset[int] = None
    # Updates between checkpoints; as `eval_every` by default. The last update, every evaluation
    # that is the best so far, and a run that is told to stop (SIGTERM, Ctrl-C) have one as well.
    save_every: FromPreset[int] = None
    # Last checkpoints to keep, besides the one of lowest validation loss.
    keep: int = 2
    # Go on with the run in `out`, from its last checkpoint; its settings need not be repeated.
    resume: bool = False
    # With --resume, take another rank, projector, projector_dtype, refresh, stagger,
    # update_proj_gap or scale: moments start anew; parameters, position in the data and
    # learning-rate schedule go on.
    new_subspace: bool = False
    # Write TensorBoard's files to `out` too.
    tensorboard: bool = True
    # Project at Weights & Biases to send metrics to.
    wandb: str | None = None
    # One of several processes that train together, started on every host of a cluster or a pod;
    # JAX finds the others (jax.distributed.initialize).
    distributed: bool = False
    # Show no progress bar.
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, choices in {
            "preset": PRESETS,
            "dtype": DTYPES,
            "param_dtype": DTYPES,
            "attention": ATTENTIONS,
            "on_nan": ON_NAN,
            "clip_by": CLIP_BY,
        }.items():
            one_of(name, getattr(self, name), choices)

    def resolve(self) -> "Config":
        """The same with the preset's values in place of None, every setting checked.

        Raises:
          UsageError: a setting cannot work.
        """
        preset, recipe = PRESETS[self.preset], RECIPES[self.preset]
        filled: dict[str, Any] = {
            name: getattr(preset, name) for name in ("hidden", "intermediate", "layers", "heads")
        } | dataclasses.asdict(recipe)
        filled |= {"refresh": "periodic", "int8_weights": False}
        if self.optimizer.startswith("q_galore"):
            filled |= {"lr": recipe.q_galore_lr, "refresh": "lazy", "int8_weights": True}
            filled["projector_dtype"] = "int4"
        if self.hidden is not None:
            filled["rank"] = max(1, self.hidden // 4)
        filled["eval_every"] = max(1, min((self.steps or recipe.steps) // 10, 1000))
        filled["save_every"] = self.eval_every or filled["eval_every"]
        config = dataclasses.replace(
            self,
            **{name: value for name, value in filled.items() if getattr(self, name, value) is None},
        )
        config._check()
        return config

    def shape(self, vocab_size: int) -> LlamaConfig:
        """The model of a resolved configuration, for a tokenizer with so many tokens.

        Raises:
          UsageError: the model's vocabulary is smaller than the tokenizer's.
        """
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            raise UsageError(
                f"vocab_size={self.vocab_size} is smaller than the {vocab_size} tokens of "
                f"tokenizer={self.tokenizer!r}: raise it, or leave it out for the tokenizer's."
            )
        same = ("hidden", "intermediate", "layers", "heads", "dtype", "param_dtype")
        return LlamaConfig(
            **{name: getattr(self, name) for name in (*same, "attention", "remat")},
            vocab_size=self.vocab_size or vocab_size,
            max_seq=self.seq,
        )

    def _check(self) -> None:
        self.shape(self.vocab_size or 1)
        if not 1 <= self.rank < self.hidden:
            raise UsageError(
                f"rank={self.rank}: expected 1 to {self.hidden - 1}, less than the hidden size "
                f"{self.hidden}."
            )
        for name in (
            *("update_proj_gap", "steps", "batch", "accumulate", "seq"),
            *("eval_every", "save_every", "keep"),
        ):
            at_least_one(name, getattr(self, name))
        if self.eval_tokens is not None:
            at_least_one("eval_tokens", self.eval_tokens)
        if self.batch % self.accumulate:
            raise UsageError(
                f"batch={self.batch} does not divide into accumulate={self.accumulate} "
                "micro-batches: choose a multiple."
            )
        for name in ("lr", "matrix_lr_ratio", "scale", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: expected a positive number.")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: expected 0 or more.")
        for name in ("warmup", "b1", "b2", "momentum"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: expected 0 <= {name} < 1.")
        for name in ("cooldown", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)}: expected 0 <= {name} <= 1.")
        if self.int8_weights and "galore" not in self.optimizer:
            raise UsageError(
                f"int8_weights needs an optimizer in GaLore; optimizer={self.optimizer!r} is none."
            )
        if self.layerwise and self.on_nan == "skip":
            raise UsageError(
                "on_nan='skip' looks at the whole gradient before an update, which layerwise never "
                "has: choose on_nan='stop'."
            )
        if self.clip_by == "layer" and not self.layerwise:
            raise UsageError("clip_by='layer' needs layerwise; clip_by='global' is for any run.")
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise UsageError(
                f"warmup={self.warmup} and cooldown={self.cooldown} are more than all updates."
            )
        if self.out is None:
            for name in ("resume", "wandb"):
                if getattr(self, name):
                    raise UsageError(f"{name} needs the directory of the run: name it by out.")
        if self.new_subspace and not self.resume:
            raise UsageError("new_subspace says how to resume: it needs resume as well.")
