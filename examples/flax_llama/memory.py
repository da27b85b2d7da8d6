"""The memory of a training step, estimated from shapes alone.

Weights, projectors and moments are exact (`galore_optax.memory_report`). What a step needs besides
is a model of a few formulas, all of them here, whose constants were set by steps of 7B and 13B that
were compiled for GPUs (benchmarks/memory_7b.py). `plan --compile` puts the compiler's figures
beside it, and `SPREAD` says how far it has been off.

Sizes: K micro-batches; of one of them B sequences of S tokens, N = B S; D hidden, F intermediate,
H heads, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax

import galore_optax
from examples.flax_llama.attention import attention_parts
from examples.flax_llama.config import Config, LlamaConfig, UsageError
from examples.flax_llama.hosted import as_held, machine_memory, moved, offloaded
from examples.flax_llama.loss import chunk_size
from examples.flax_llama.loss_by_vocabulary import vocabulary_chunk
from examples.flax_llama.methods import IN_GALORE, in_8_bits
from examples.flax_llama.optimizers import (
    galore_arguments,
    make_optimizer,
    micro_batches_at_rank,
)
from examples.flax_llama.step import initial_params
from examples.flax_llama.units import size

BYTES = {"float32": 4, "bfloat16": 2}
# Arrays of (N, D) and of (N, F) that the backward pass of a block has at its fullest moment.
BLOCK_D, BLOCK_F = 8, 4
# Float32 arrays in the update of a leaf: of its size where moments are decoded, of that of the
# projected gradient with GaLore. XLA computes all else in one go.
UPDATE = 2.5
# The same of an embedding whose moments are decoded, and how many of these share a scale.
EMBEDDING, CODES = 4, 256
# Residuals that compute, in float32, the part of the gradient that is outside of the subspace.
OUTSIDE = ("sign", "error_feedback")
# Copies of a layer's weights, and of its state, where they lie in the memory of the machine, set by
# steps of 13B and 30B.
FETCHED, STATES = 1, 1
# Arrays of a chunk's logits, float32.
LOGITS = 2
# What steps needed beyond what stays, in parts of what is estimated, by the kind of device: the
# least and the most, a little further apart. On NVIDIA's some were measured, on a H100; else it is
# what XLA planned. `python -m benchmarks.memory_error` lists them all.
SPREAD = {"cuda": (0.9, 1.3), "tpu": (0.9, 1.45), "cpu": (0.9, 2.3)}
# What the measured ones needed, in parts of what XLA planned.
SPREAD_OF_PLAN = (0.95, 1.07)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of a step at its fullest moment; all but the first three are gone after it.

    Attributes:
      weights: the parameters.
      projectors: of GaLore.
      moments: all else that the optimizer keeps, counters included.
      gradients: those that exist at that moment.
      inputs: what the forward pass keeps of each block.
      working: the rest, of what is computed at that moment.
      host: in the memory of the machine, where some of the weights, projectors, moments and inputs
        may lie; they are not among those above.
      moved: that an update copies between the memories.
      moment: which one that is: "block", the backward pass of a block; "head", that of the head;
        "embedding", the optimizer's update of it; "update", that of a stacked matrix; "choice", of
        how micro-batches are averaged.
    """

    weights: int
    projectors: int
    moments: int
    gradients: int
    inputs: int
    working: int
    moment: str
    host: int = 0
    moved: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by name."""
        others = ("moment", "host", "moved")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in others}

    @property
    def arguments(self) -> int:
        """What is there between steps."""
        return self.weights + self.projectors + self.moments

    @property
    def temporaries(self) -> int:
        """What is not."""
        return self.gradients + self.inputs + self.working

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


def estimate(config: Config, vocab_size: int) -> Estimate:
    """The memory of a step of a resolved configuration on one device."""
    shape = config.shape(vocab_size)
    several = micro_batches_at_rank(config) > 1
    weights, projectors, moments = held(as_held(config), vocab_size)
    moments_of_step = step_layerwise(config, shape) if config.layerwise else step(config, shape)
    if several:
        # Whether a subspace is due decides how micro-batches are averaged. XLA copies what stays
        # for the two ways.
        moments_of_step["choice"] = (0, 0, weights + projectors + moments)
    name, parts = max(moments_of_step.items(), key=lambda item: sum(item[1]))
    hosted, inputs = offloaded(config, vocab_size), inputs_on_host(config, shape)
    stays = (weights - hosted.weights, projectors - hosted.projectors, moments - hosted.moments)
    in_machine = hosted.weights + hosted.state + inputs
    return Estimate(*stays, *parts, name, in_machine, moved(config, vocab_size, inputs))


def check_machine(config: Config, vocab_size: int) -> None:
    """Refuses a step that has more in the memory of this machine than that has.

    Raises:
      UsageError: it does.
    """
    if not config.offload and config.inputs_memory == "device":
        return
    needed, has = estimate(config, vocab_size).host, machine_memory()
    if needed > has:
        raise UsageError(
            f"What is to lie in the memory of the machine takes {size(needed)}, and that has "
            f"{size(has)}: leave a part of offload={' '.join(config.offload)!r} out, or choose "
            "fewer bits (int8_weights=True, an optimizer that ends in _8bit) or a lower rank."
        )


@functools.cache
def held(config: Config, vocab_size: int) -> tuple[int, int, int]:
    """Bytes of weights, projectors and moments."""
    rank = config.rank if config.int8_weights else None
    params = parameters(config.shape(vocab_size), config.int8_weights, rank)
    report = galore_optax.memory_report(make_optimizer(config), params)
    return report.parameters, report.projectors, report.moments + report.counters


@functools.cache
def parameters(shape: LlamaConfig, int8_weights: bool, rank: int | None) -> Any:
    """The shapes of the parameters, which depend on the rank only where they are in 8 bits."""
    return jax.eval_shape(
        lambda: initial_params(Config(int8_weights=int8_weights, rank=rank), shape)
    )


# Bytes of gradients, of kept inputs, and of what else is computed with.
Moment = tuple[int, int, int]


def step(config: Config, shape: LlamaConfig) -> dict[str, Moment]:
    """The full moments of an ordinary step: all gradients, then the update."""
    a, p = BYTES[config.dtype], BYTES[config.param_dtype]
    N = config.batch // config.accumulate * config.seq
    D = shape.hidden
    # Of a micro-batch, and with several of them their float32 sums. LoRA's matrices are float32.
    of_lora = shape.layers * shape.lora_entries
    first = 4 * of_lora + p * (shape.trained_params - of_lora)
    gradients = first if config.accumulate == 1 else first + 4 * shape.trained_params
    inputs = shape.layers * N * a * (D if config.remat else kept_of_layer(shape))
    matrix = shape.layers * shape.hidden * shape.intermediate
    return {
        "head": head(config, shape, inputs),
        "embedding": (0, 0, update_of_embedding(config, shape)),
        "block": (gradients, inputs, block(config, shape)),
        "update": (first, 0, update(config, matrix)),
    }


def step_layerwise(config: Config, shape: LlamaConfig) -> dict[str, Moment]:
    """The full moments of a step with the updates inside the backward pass, small themselves."""
    a, p = BYTES[config.dtype], BYTES[config.param_dtype]
    K = config.accumulate
    N = config.batch // K * config.seq
    groups, every = shape.layers // config.inputs_every, config.inputs_every
    # Of a group, all are there while its layers are gone through.
    again = every if every > 1 else 0
    kept = (
        groups * kept_in(config.inputs_dtype or config.dtype)
        if config.inputs_memory == "device"
        else 0
    )
    # Of a layer in the memory of the machine, beside what an update of one has in any case.
    own = offloaded(config, shape.vocab_size)
    fetched = (FETCHED * own.weights + STATES * own.state) // shape.layers
    inputs = round(K * N * shape.hidden * (kept + again * a))
    layer = shape.layer_matrices * (p if K == 1 else p + 4)
    held_back = 1 if config.clip and config.clip_by == "global" else 0
    dense = shape.vocab_size * shape.hidden
    # Codes are updated some rows at a time, as many as blocks are whole of.
    rows, tied = CODES // math.gcd(shape.hidden, CODES), shape.architecture.tied
    whole = 0 if shape.vocab_size % rows == 0 else update_of_embedding(config, shape)
    return {
        "head": head_by_vocabulary(config, shape, inputs),
        # Where it is the head too, the gradients of both are added up slice by slice, or as a whole
        # if the sum is kept.
        "embedding": ((3 if held_back or whole else 2) * p * dense * tied, 0, whole),
        # Of the layer, and with clipping by the global norm of the embedding, since it has been
        # measured before any layer is updated.
        "block": (layer + held_back * p * dense, inputs, block(config, shape) + fetched),
    }


def inputs_on_host(config: Config, shape: LlamaConfig) -> int:
    """Bytes of the layers' inputs that are kept in the memory of the machine."""
    if not config.layerwise or config.inputs_memory == "device":
        return 0
    groups = shape.layers // config.inputs_every
    return round(
        groups
        * config.batch
        * config.seq
        * shape.hidden
        * kept_in(config.inputs_dtype or config.dtype)
    )


@functools.cache
def kept_in(dtype: str) -> float:
    """Bytes of an entry of a layer's input as it is kept."""
    if dtype in BYTES:
        return BYTES[dtype]
    entries = jax.ShapeDtypeStruct((CODES,), "float32")
    kept: galore_optax.QuantizedArray = jax.eval_shape(
        lambda x: galore_optax.quantize(x, dtype), entries
    )
    return kept.nbytes / CODES


def head(config: Config, shape: LlamaConfig, inputs: int) -> Moment:
    """Of the backward pass of the head, where the layers have no gradients yet."""
    # Its gradient is float32, if it has one.
    entry = 4 if shape.tables_are_trained else 0
    rows = config.batch // config.accumulate
    chunk = chunk_size(rows, config.seq, shape.hidden) * rows
    logits = LOGITS * 4 * chunk * shape.vocab_size
    return entry * shape.vocab_size * shape.hidden, inputs, logits


def head_by_vocabulary(config: Config, shape: LlamaConfig, inputs: int) -> Moment:
    """The same with the update in the backward pass: the gradient is in the dtype of the head."""
    a, p = BYTES[config.dtype], BYTES[config.param_dtype]
    tokens, D, V = config.batch // config.accumulate * config.seq, shape.hidden, shape.vocab_size
    chunk = vocabulary_chunk(tokens, V)
    # The gradient of the tokens is float32; of the head and of its gradient there is a chunk.
    working = LOGITS * 4 * chunk * tokens + 4 * tokens * D + 2 * a * chunk * D
    # Of micro-batches, float32 sums.
    entry = p if config.accumulate == 1 else p + 4
    return entry * V * D, inputs, working


def kept_of_layer(shape: LlamaConfig) -> int:
    """What a layer keeps of a token: its input, and what kernels return but for the last one."""
    D, F, adapter = shape.hidden, shape.intermediate, shape.adapter
    own = 2 * D + shape.q_width + 2 * shape.kv_width + 2 * F
    return own if adapter is None else own + adapter.kept(shape.kernels)


def block(config: Config, shape: LlamaConfig) -> int:
    """Of the backward pass of one block: activations and attention's weights."""
    a = BYTES[config.dtype]
    B = config.batch // config.accumulate
    activations = B * config.seq * (BLOCK_D * shape.hidden + BLOCK_F * shape.intermediate) * a
    # The softmax in float32 and in `dtype`, of some sequences at a time; cuDNN's kernel never has
    # it. XLA decodes quantized kernels where it multiplies with them.
    sizes = B, config.seq, shape.heads, shape.kv_heads
    parts = attention_parts(*sizes, config.attention)
    some = B * shape.heads * config.seq**2 // (parts.sequences * parts.heads)
    scores = 0 if config.attention == "cudnn" else some * (4 + a)
    return activations + scores


def update(config: Config, entries: int) -> int:
    """Of the update of so many entries of the layers' widest matrices."""
    if config.optimizer not in IN_GALORE:
        return update_in_full(config, entries)
    arguments = galore_arguments(config)
    # Projected back, and at rank r instead of D.
    size = entries * (BYTES[config.param_dtype] + UPDATE * 4 * config.rank / config.hidden)
    if arguments["projector"] in ("gaussian", "orthonormal"):
        # Nothing is kept of them: the bases, D x r each, are made when they are needed.
        size += entries * 4 * config.rank / config.intermediate
    # Rows are taken out of the gradient, whose signs need no product with a basis.
    signs_of_rows = arguments.get("residual") == "sign" and "rows" in arguments["projector"]
    outside = arguments.get("residual", "discard") in OUTSIDE and not signs_of_rows
    # Flora's momentum is taken back before its second moment is that of the whole matrix.
    if outside or config.optimizer == "flora":
        size += entries * 4
    return round(size)


def update_of_embedding(config: Config, shape: LlamaConfig) -> int:
    """Of the update of an embedding with moments in 8 bits, which are decoded as a whole."""
    dense = shape.vocab_size * shape.hidden
    decoded = in_8_bits(config.optimizer) and config.tables == "adam"
    return EMBEDDING * 4 * dense if decoded else 0


def update_in_full(config: Config, entries: int) -> int:
    """The same without GaLore."""
    return round(entries * UPDATE * 4) if in_8_bits(config.optimizer) else 0
