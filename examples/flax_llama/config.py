"""The settings of a training run."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import tyro

from examples.flax_llama.adapters import DEFAULTS, LORA, LOW_RANK, RELORA, WITH_LORA, Adapter
from examples.flax_llama.architecture import LLAMA, Architecture
from examples.flax_llama.methods import GALORE, own
from examples.flax_llama.shapes import (
    DIMENSIONS,
    PRESETS,
    LlamaConfig,
    recipe_of,
)
from examples.flax_llama.usage import UsageError
from examples.flax_llama.values import check_choices, check_values, whole_rank
from examples.hf.configuration import named_shape

# None in a `Config` as it is given, a value in a resolved one, which a type cannot tell apart.
T = TypeVar("T")
# A rank may be given as a fraction.
if TYPE_CHECKING:
    FromPreset = T | Any
    Rank = int | Any
else:
    FromPreset = T | None
    Rank = int | float | None

# The settings that say which of several processes this one is.
DISTRIBUTED = ("distributed", "coordinator", "processes", "process", "distributed_timeout")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a training run. What is None is the preset's, until `resolve`."""

    # The first setting of each group that help shows.
    GROUPS: ClassVar = {
        **{"model": "preset", "data": "data", "optimizer": "optimizer", "low rank": "rank"},
        **{"training": "steps", "run": "out"},
    }

    # What no flag is for.
    HIDDEN: ClassVar = ("architecture", "by_default")

    # Shape of the model, and the recipe for what is not given: 9m, 20m, 35m, 60m, 130m, 250m,
    # 350m, 1b, 3b, 7b or 13b. Or another published shape (gemma-3-1b, llama-3.1-8b, qwen3-4b, ...),
    # or the directory or the config.json of a model of Hugging Face, with the recipe of the nearest
    # size.
    preset: str = "9m"
    # Hidden size; the preset's by default.
    hidden: FromPreset[int] = None
    # Width of the MLP; the preset's by default.
    intermediate: FromPreset[int] = None
    # Number of layers; the preset's by default.
    layers: FromPreset[int] = None
    # Number of attention heads; the preset's by default.
    heads: FromPreset[int] = None
    # Vocabulary of the model; the tokenizer's by default, and never smaller.
    vocab_size: int | None = None

    # Text to train on: "austen" (built in); a file, a glob or a directory, several with commas
    # between, of plain text (.txt) or JSON lines (.jsonl), also as .gz, .xz, .zst or .bz2, a path
    # that exists before a glob; a directory made by examples.flax_llama.tokenize; or
    # "hf:NAME[:CONFIG[:SPLIT]]", streamed from Hugging Face. Of a directory all such files in it
    # and below it, but for hidden ones, README* and LICENSE*.
    data: str = "austen"
    # Text to validate on, likewise; by default a part of `data` that is then not trained on.
    valid_data: str | None = None
    # Field of JSON lines, and of Hugging Face data, that has the text; a dot goes into an object,
    # as in meta.content.
    text_field: str = "text"
    # What JSON lines have: "text"; "prompt", with a response; "chat", messages; or "auto", what the
    # first line has. README.md says how each of them is read.
    data_format: str = "text"
    # Field of a prompt; by default "prompt", or Alpaca's "instruction" with its "input".
    prompt_field: str | None = None
    # Field of its response; by default "response", "completion" or "output".
    response_field: str | None = None
    # Field of a list of messages; by default "messages", or "conversations" as in ShareGPT.
    messages_field: str | None = None
    # Of prompts and chats, what is learnt: the "responses", the "last" one of a chat, or "all".
    loss_on: str = "responses"
    # At a conversation longer than `seq`: "error", "cut" its oldest exchanges, or "skip" it.
    on_long: str = "error"
    # At a line that is no JSON, has no text, or is not UTF-8: "error", or "skip" it.
    on_bad_line: str = "error"
    # With --on-bad-line skip, so many are left out; one more is an error.
    max_bad_lines: int = 100
    # "bytes", "bpe:SIZE" for a byte-level BPE trained on the training text, or the path of a
    # tokenizer.json or of a SentencePiece model; by default bpe:2048, or that of tokenized data.
    tokenizer: str | None = None
    # The token that ends a document, by its name, or "none"; by default what the files beside the
    # tokenizer call its eos_token, else a usual one such as </s> or <|endoftext|>.
    eos_token: str | None = None
    # Fill every row with tokens, or with whole conversations; --no-packing has one document per
    # row, cut or padded, as the reference implementation does.
    packing: bool = True
    # Of text: attend also to documents before in a row, as in pre-training; not finetune's default.
    attend_across: bool = True
    # Tokens per sequence, at least 2.
    seq: int = 256
    # Validation tokens per evaluation; by default all there are, of files and of Hugging Face data
    # about the first million.
    eval_tokens: int | None = None

    # adamw, adafactor, lion, sgd, adamw_8bit, or any of them in GaLore: galore_adamw, ...;
    # lora, which is AdamW for matrices of low rank beside kernels that stay as they are; low_rank,
    # which is AdamW for products of two in the place of kernels; relora, which adds to the kernels
    # what lora has trained, time and again;
    # galore_muon; q_galore_adamw, which is galore_adamw_8bit with 4-bit projectors, lazy refresh,
    # int8 weights; fira_adamw, apollo_adamw, apollo_mini_adamw, ldadamw, tracked_adamw,
    # frugal_adamw, grass_adamw or dct_adamw, each also as ..._8bit; or flora. README.md says what
    # each of them is.
    optimizer: str = "galore_adamw"
    # Peak learning rate; the preset's is GaLore's AdamW (0.01; 0.005 for 7b), whose matrices move
    # by `scale` times that, or Q-GaLore's (0.015, 0.01 or 0.004). Plain adamw wants about 0.001 to
    # 0.005, as do optimizers in GaLore whose `scale` is 1; lion a third of adamw's.
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
    # Of everything but norms and biases, multiplied by the learning rate.
    weight_decay: float = 0.0
    # Decay of the first moment of adamw and lion, of which lion's update interpolates.
    b1: float = 0.9
    # Decay of the second moment of adamw (0.999 by default), or of the moment of lion (0.99).
    b2: float | None = None
    # Added to the root of adamw's second moment.
    eps: float = 1e-8
    # Of sgd; also of adafactor, which then has a first moment. 0 has none. Of galore_muon, which
    # takes 0.95 for 0; flora's momentum is b1.
    momentum: float = 0.0
    # Largest norm of a gradient; 0 does not clip. The preset's by default.
    clip: FromPreset[float] = None
    # Whose norm that is: "global", of the whole gradient, for which `layerwise` takes another
    # backward pass; or "layer", of each layer by itself, with `layerwise` alone.
    clip_by: str = "global"

    # Rank of GaLore's projected gradients, or of the matrices of lora, relora and low_rank, or a
    # fraction of the hidden size; by default the preset's, which is a quarter to a third, or the
    # optimizer's (apollo and frugal a quarter, apollo_mini 1, lora 8).
    rank: Rank = None
    # Of lora and relora: what is beside a kernel is multiplied by alpha / rank; 8 by default, of
    # relora 32.
    lora_alpha: FromPreset[float] = None
    # Of lora and relora: the kernels that it is beside: qv (lora's default, as in PEFT), attention,
    # or all (relora's).
    lora_targets: FromPreset[str] = None
    # Of lora and relora: train nothing else (lora's default); or all but the kernels that it is
    # beside, so embeddings, head and norms (relora's), as in pre-training.
    lora_only: FromPreset[bool] = None
    # Of relora: updates after which what is beside the kernels is added to them, and begins again;
    # a fifth of all by default.
    merge_every: FromPreset[int] = None
    # Updates from one choice of GaLore's subspaces to the next; by default the preset's, or the
    # optimizer's (ldadamw, tracked and dct 1, flora 1000).
    update_proj_gap: FromPreset[int] = None
    # Factor of GaLore's projected-back updates; by default 0.25, or the optimizer's (apollo,
    # ldadamw, frugal, dct, flora and galore_muon 1, apollo_mini the root of 128).
    scale: FromPreset[float] = None
    # How GaLore chooses a subspace: svd or eigh, exactly; randomized_svd or power_iteration, nearly
    # as well and faster; momentum_iteration, from the old one and the momentum; rows or dct, out of
    # given vectors, of which it keeps the numbers alone; random_rows or sampled_rows, rows by
    # chance; gaussian or orthonormal, at random. By default svd, or the optimizer's own.
    projector: FromPreset[str] = None
    # What becomes of the moments when a subspace is chosen again: keep, reset, project (the first
    # one) or rotate (both; AdamW's alone). By default keep, or the optimizer's own.
    transport: str | None = None
    # What becomes of the gradient outside of the subspace: discard; norm_scaled, added as it is
    # scaled inside (Fira); scale_gradient, nothing but the scale comes from the subspace (APOLLO);
    # sign, its signs are added (FRUGAL); error_feedback, it is added to the next gradient, for the
    # memory of a whole moment (LDAdam). By default discard, or the optimizer's own. All of them go
    # with AdamW inside, and all but the last with flora and galore_muon.
    residual: str | None = None
    # What GaLore keeps its subspaces in: float32, bfloat16, int8, int4, float8_e4m3 or
    # float8_e5m2; the default is int4 with q_galore_adamw, float32 otherwise.
    projector_dtype: str | None = None
    # bfloat16, rounded at random, for the moments of adamw and of the optimizers in GaLore with
    # AdamW inside; by default float32, and in 8 bits with those that end in _8bit.
    moment_dtype: str | None = None
    # adam, or factored: the embedding and the head then have means of the squared gradients of
    # their rows and columns in place of Adam's two moments. Of adamw_8bit and of the optimizers in
    # GaLore with AdamW inside.
    tables: str = "adam"
    # When it does: periodic, or lazy, which is less and less often where a subspace stands still;
    # lazy by default with q_galore_adamw alone.
    refresh: FromPreset[str] = None
    # Spread the choices for the layers' matrices over the updates from one to the next.
    stagger: bool = False

    # Number of updates; the preset's by default.
    steps: FromPreset[int] = None
    # Sequences per update, over all devices; the preset's by default.
    batch: FromPreset[int] = None
    # Micro-batches that one update's sequences are computed in, one after the other.
    accumulate: int = 1
    # The devices as a mesh, such as "data=2,fsdp=2,tensor=2": over data they have other sequences,
    # over fsdp also a part of all parameters and of the optimizer's state each, over tensor each
    # computes a part of every layer. By default all have other sequences and all parameters.
    mesh: str | None = None
    # Update each layer inside the backward pass, so that no two layers have gradients at a time:
    # much less memory for the time of computing each layer's activations again.
    layerwise: bool = False
    # With `layerwise`, what the inputs of the layers are kept in until their gradients are
    # computed: bfloat16, int8, float8_e4m3 or float8_e5m2; by default as they are.
    inputs_dtype: str | None = None
    # With `layerwise`, of how many layers in a row the first one's input is kept; the others'
    # are computed again.
    inputs_every: int = 1
    # With `layerwise`, where they are kept: device, or pinned_host, the memory of the machine.
    inputs_memory: str = "device"
    # With `layerwise`, what of the layers lies in the memory of the machine, out of which one layer
    # at a time is copied: moments (and subspaces), weights, or both.
    offload: tuple[str, ...] = ()
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
    # Those that are given, such as more `steps`, another `lr`, `batch`, `optimizer` or `rank`, or
    # another place of the same `data`, hold from there on; README.md says what comes of each. As
    # many `steps` as are done end the run where it is.
    resume: bool = False
    # With --resume, go on with data that is not what it was, and read it from its start.
    new_data: bool = False
    # Begin a new run from the weights of another one, the --out directory of that, with the state
    # of its optimizer; the learning rate and the data begin at their start. Model, tokenizer,
    # optimizer, rank and projector are those of the other run, and need not be repeated.
    init_from: Path | None = None
    # With --init-from, its checkpoint: "last", "best", or the number of updates.
    init_step: str = "last"
    # With --init-from, take the weights alone: the optimizer may be another one.
    weights_only: bool = False
    # Write TensorBoard's files to `out` too.
    tensorboard: bool = True
    # Project at Weights & Biases to send metrics to.
    wandb: str | None = None
    # One of several processes that train together, started on every host of a cluster or a pod.
    # JAX finds the others in a job of SLURM, of Open MPI or of a TPU pod; elsewhere `coordinator`,
    # `processes` and `process` say where they are.
    distributed: bool = False
    # HOST:PORT of the first process, which takes that port and the one before it.
    coordinator: str | None = None
    # How many processes there are.
    processes: int | None = None
    # Which one this is, from 0.
    process: int | None = None
    # Seconds within which all processes must have come.
    distributed_timeout: float = 300.0
    # Show no progress bar.
    quiet: bool = False

    # Of a resolved configuration whose preset is a directory: what its model is beyond its
    # dimensions, so that the directory is not needed any more. It is no flag.
    architecture: tyro.conf.Suppress[Architecture | None] = None
    # Of a resolved configuration: the settings above that nobody gave. It is no flag.
    by_default: tyro.conf.Suppress[tuple[str, ...]] = ()

    def resolve(self) -> "Config":
        """The same with values in place of None, and every setting checked.

        They are the preset's, but for what the optimizer has a default of its own for. Only what is
        then still None is for the optimizer to know.

        Raises:
          UsageError: a setting cannot work.
        """
        default = self.defaults()
        unset = [name for name in default if getattr(self, name) is None]
        config = dataclasses.replace(
            self,
            **{name: default[name] for name in unset},
            by_default=tuple(
                name
                for name, value in default.items()
                if name not in self._of_directory
                and (name in unset or (name in self.by_default and getattr(self, name) == value))
            ),
        )
        config = dataclasses.replace(config, rank=whole_rank(config.rank, config.hidden))
        check_values(config)
        return config

    def unset(self) -> "Config":
        """With None for what nobody gave."""
        unset: dict[str, Any] = dict.fromkeys(self.by_default)
        return dataclasses.replace(self, **unset)

    def defaults(self) -> dict[str, Any]:
        """What the settings would be that can be left out, as the others are.

        Raises:
          UsageError: a setting is none of the choices that it has.
        """
        check_choices(self)
        preset = self._published()
        recipe = recipe_of(self.preset, preset)
        filled: dict[str, Any] = {name: getattr(preset, name) for name in DIMENSIONS}
        filled |= dataclasses.asdict(recipe)
        if self._of_directory:
            filled |= {"vocab_size": preset.vocab_size, "architecture": preset.architecture}
        q_galore_lr = filled.pop("q_galore_lr")
        filled |= {name: GALORE[name] for name in ("scale", "projector", "refresh")}
        filled["int8_weights"] = False
        if self.optimizer == "q_galore_adamw":
            filled |= {"lr": q_galore_lr, "int8_weights": True}
        if self.hidden not in (None, preset.hidden):
            filled["rank"] = max(1, self.hidden // 4)
        filled |= DEFAULTS.get(self.optimizer, {})
        if self.optimizer == RELORA:
            filled["merge_every"] = max(1, (self.steps or recipe.steps) // 5)
        # Not transport and residual, which may be objects that no name says all of.
        names = ("rank", "update_proj_gap", "scale", "projector", "projector_dtype", "refresh")
        filled |= {k: v for k, v in own(self.optimizer).items() if k in names}
        filled["rank"] = whole_rank(filled["rank"], self.hidden or preset.hidden)
        filled["eval_every"] = max(1, min((self.steps or recipe.steps) // 10, 1000))
        filled["save_every"] = self.eval_every or filled["eval_every"]
        return filled

    @property
    def adapter(self) -> Adapter | None:
        """What the optimizer trains beside the kernels, or in their place, if it does."""
        if self.optimizer in WITH_LORA:
            # Runs of earlier versions do not name all of them.
            names = ("lora_alpha", "lora_targets", "lora_only")
            given = {name: getattr(self, name) for name in names}
            settings = DEFAULTS[self.optimizer] | {k: v for k, v in given.items() if v is not None}
            return Adapter(LORA, self.rank, *(settings[name] for name in names))
        return Adapter(LOW_RANK, self.rank) if self.optimizer == LOW_RANK else None

    @property
    def _of_directory(self) -> tuple[str, ...]:
        """The settings that say all of a model where the preset is a directory with one."""
        return () if self.preset in PRESETS else (*DIMENSIONS, "vocab_size", "architecture")

    def _published(self) -> LlamaConfig:
        """The shape that the preset names, which is read only where it is not known yet."""
        if self.preset in PRESETS:
            return PRESETS[self.preset]
        if self.architecture is None:
            return named_shape(self.preset)
        same = {name: getattr(self, name) for name in self._of_directory}
        return LlamaConfig(**same, max_seq=self.seq)

    def shape(self, vocab_size: int) -> LlamaConfig:
        """The model of a resolved configuration, for a tokenizer with so many tokens.

        Raises:
          UsageError: the model's vocabulary is smaller than the tokenizer's.
        """
        if self.vocab_size is not None and self.vocab_size < vocab_size:
            own = f"tokenizer={self.tokenizer!r}" if self.tokenizer else "the default tokenizer"
            raise UsageError(
                f"vocab_size={self.vocab_size} is smaller than the {vocab_size} tokens of "
                f"{own}: raise it, leave it out for the tokenizer's, or name the model's own with "
                "tokenizer=PATH."
            )
        same = (*DIMENSIONS, "dtype", "param_dtype")
        return LlamaConfig(
            **{name: getattr(self, name) for name in (*same, "attention", "remat")},
            vocab_size=self.vocab_size or vocab_size,
            max_seq=self.seq,
            architecture=self.architecture or LLAMA,
            adapter=self.adapter,
        )
