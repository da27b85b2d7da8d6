"""Says what a training step needs of a device's memory, whether it fits, and what to change.

python -m examples.flax_llama.plan --model 7b --optimizer q_galore_adamw --device rtx4060ti_16gb \
    --batch 16 --seq 256

The exit status is 0 if it fits, 3 if it does not, and 2 if a setting cannot work.
"""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Annotated

import tyro

from examples.flax_llama.command import program
from examples.flax_llama.compile_step import Compiled, TooLarge, compile_step
from examples.flax_llama.config import PRESETS, Config, UsageError, at_least_one, one_of
from examples.flax_llama.devices import GIB, Device, device_named
from examples.flax_llama.fit import advice, helpful, largest_batch
from examples.flax_llama.memory import Estimate, estimate
from examples.flax_llama.memory_chart import Bar, draw, picture
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.optimizers import micro_batches_at_rank
from examples.flax_llama.topology import check_needs_driver

MOMENTS = {
    "block": "the backward pass of a block",
    "head": "the backward pass of the head",
    "update": "the optimizer's update of a stacked matrix",
}
DOES_NOT_FIT, ERROR = 3, 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to plan. Settings that a training run has, too, mean the same there."""

    # Shape of the model, and its rank and clipping, as --preset of a training run: 9m, 20m, 35m,
    # 60m, 130m, 250m, 350m, 1b, 3b, 7b or 13b.
    model: Annotated[str, tyro.conf.arg(aliases=["--preset"])] = "7b"
    # rtx4060ti_16gb, rtx4090_24gb, h100_80gb, tpu_v5e or tpu_v6e.
    device: str = "rtx4090_24gb"
    # As in training, such as adamw, galore_adamw, galore_adamw_8bit, q_galore_adamw, apollo_adamw.
    optimizer: str = "q_galore_adamw"
    # Sequences per update.
    batch: int = 16
    # Tokens per sequence.
    seq: int = 256
    # Micro-batches that one update's sequences are computed in, one after the other.
    accumulate: int = 1
    # Vocabulary of the model.
    vocab_size: int = 32_000
    # Hidden size, width of the MLP, number of layers and of attention heads; the model's by
    # default.
    hidden: int | None = None
    intermediate: int | None = None
    layers: int | None = None
    heads: int | None = None
    # float32 or bfloat16, of activations.
    dtype: str = "bfloat16"
    # float32 or bfloat16, of parameters.
    param_dtype: str = "bfloat16"
    # Keep the layers' matrices in 8 bits; by default with q_galore_adamw alone.
    int8_weights: bool | None = None
    # Round bfloat16 parameters at random when they are updated.
    stochastic_rounding: bool = False
    # Update each layer inside the backward pass.
    layerwise: bool = True
    # Without `layerwise`: compute activations again in the backward pass instead of keeping them.
    remat: bool = True
    # xla or cudnn. On an NVIDIA GPU training takes cudnn's by default, which needs less; but only
    # there does it tell its workspace, so that xla's is planned with.
    attention: str = "xla"
    # Largest norm of a gradient; 0 does not clip.
    clip: float | None = None
    # "global", of the whole gradient, or "layer", with `layerwise` alone.
    clip_by: str = "global"
    # Of sgd and adafactor; 0 has none.
    momentum: float = 0.0
    # Rank of GaLore's projected gradients, or a fraction of the hidden size.
    rank: int | float | None = None
    # How GaLore chooses a subspace; a factorization's workspace is not in the figures.
    projector: str | None = None
    # What becomes of the moments when a subspace is chosen again.
    transport: str | None = None
    # What becomes of the gradient outside of the subspace; error_feedback keeps all of it.
    residual: str | None = None
    # What GaLore keeps its subspaces in: float32, bfloat16, int8, int4, float8_e4m3 or
    # float8_e5m2; the default is int4 with q_galore_adamw, float32 otherwise.
    projector_dtype: str | None = None
    # When GaLore chooses: periodic or lazy.
    refresh: str | None = None

    # Compile the step for the device, which need not be here, and show the compiler's figures.
    compile: bool = False
    # Find the largest batch that fits.
    sweep: bool = False
    # Picture of the parts to write, such as memory.png, or a directory for one of that name.
    out: Path | None = None

    def given(self) -> Config:
        """The configuration of a run, with None for what is the preset's.

        Raises:
          UsageError: a setting cannot work.
        """
        names = {field.name for field in dataclasses.fields(Config)} - {"out"}
        same = {k: v for k, v in vars(self).items() if k in names}
        one_of("model", self.model, PRESETS)
        at_least_one("vocab_size", self.vocab_size)
        if self.attention == "auto":
            raise UsageError("attention='auto': expected xla or cudnn, which must be known here.")
        return Config(preset=self.model, **same)


def train_command(given: Config) -> str:
    """The command that trains with a configuration, as it was given."""
    words = ["python", "-m", "examples.flax_llama.train", "--preset", given.preset]
    for field in dataclasses.fields(Config):
        value = getattr(given, field.name)
        if field.name != "preset" and value != field.default:
            words += option(field.name, value, of_bool=isinstance(field.default, bool))
    return shlex.join(words)


def option(name: str, value: object, of_bool: bool) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if of_bool:
        return [flag if value else flag.replace("--", "--no-")]
    return [flag, str(value)]


def table(estimated: Estimate, compiled: Compiled | None) -> str:
    """The parts, and the compiler's sums beside them."""
    notes = {
        "gradients": f"at the fullest moment, which is {MOMENTS[estimated.moment]}",
        "inputs": "of each block, kept by the forward pass",
        "working": "what else is computed with at that moment",
    }
    lines = [f"{'':14}{'estimate':>10}{'XLA' if compiled else '':>10}".rstrip()]

    def row(name: str, size: int, xla: int | None = None, note: str = "") -> None:
        beside = "" if xla is None else f"{xla / GIB:.2f}"
        lines.append(f"{name:14}{size / GIB:10.2f}{beside:>10}  {note}".rstrip())

    for name, size in estimated.parts.items():
        row(name, size, note=notes.get(name, ""))
    row(
        "arguments",
        estimated.arguments,
        compiled.arguments if compiled else None,
        "what stays: the first 3",
    )
    row("temporaries", estimated.temporaries, compiled.temporaries if compiled else None)
    row(
        "total",
        estimated.total,
        compiled.peak if compiled else None,
        "GiB; XLA's is its peak" if compiled else "GiB",
    )
    return "\n".join(lines)


def kept_inputs(config: Config) -> str:
    """Why a layer-wise update keeps the inputs of several micro-batches."""
    line = (
        f"Inputs are those of all {config.accumulate} micro-batches, since one layer's gradient is "
        "averaged over them before the next one's is computed"
    )
    if config.optimizer in IN_GALORE and micro_batches_at_rank(config) > 1:
        line += "; between refreshes, where GaLore averages at rank r, those of one"
    return f"{line}."


def verdict(size: int, device: Device, whose: str) -> str:
    room = device.usable - size
    fits = (
        f"fits, with {room / GIB:.2f} to spare" if room >= 0 else f"too much by {-room / GIB:.2f}"
    )
    return f"{whose}: {size / GIB:.2f} of {device.usable / GIB:.2f} GiB, {fits}"


def summary(config: Config, vocab_size: int, device: Device) -> str:
    rank = f", rank {config.rank}" if config.optimizer in IN_GALORE else ""
    how = "layerwise" if config.layerwise else "ordinary step" + ", remat" * config.remat
    return (
        f"LLaMA of {config.shape(vocab_size).num_params:,} parameters ({config.preset}), "
        f"{config.optimizer}{rank}; {how}, {config.batch} x {config.seq} tokens"
        f"{f' in {config.accumulate} micro-batches' if config.accumulate > 1 else ''}, "
        f"{config.dtype}\n{device.description}: {device.memory / GIB:.2f} GiB ({device.source})"
        f"{f', {device.context / GIB:.2f} of them for the driver' if device.context else ''}"
    )


def compiled_to_fit(
    config: Config, vocab_size: int, device: Device
) -> tuple[Config, Compiled | None]:
    """The configuration with the largest batch, not larger than it has, whose compiled step fits.

    None where not even one sequence in each micro-batch does.
    """
    batch = config.batch
    while batch > 0:
        config = dataclasses.replace(config, batch=batch)
        try:
            compiled = compile_step(config, vocab_size, device)
        except TooLarge as error:
            print(f"batch {batch}: {error}", flush=True)
            over = 1
        else:
            print(verdict(compiled.peak, device, f"batch {batch}, XLA"), flush=True)
            if compiled.peak <= device.usable:
                return config, compiled
            # At most so much for each sequence, so that no batch that fits is left out.
            over = (compiled.peak - device.usable) * batch // max(1, compiled.temporaries)
        batch -= max(1, over // config.accumulate) * config.accumulate
    return config, None


def plan(settings: Plan) -> bool:
    """Prints the plan, and draws it where asked to; returns whether it fits.

    Raises:
      UsageError: a setting cannot work, or the compiler for the device is missing.
    """
    device, vocab_size = device_named(settings.device), settings.vocab_size
    given = settings.given()
    config = given.resolve()
    if config.attention == "cudnn" and (device.is_tpu or config.dtype != "bfloat16"):
        raise UsageError("attention='cudnn' needs an NVIDIA GPU and dtype='bfloat16'.")
    out = settings.out and picture(settings.out)
    if settings.compile:
        device.mesh()  # raises before anything else is done
    start = time.perf_counter()
    if settings.sweep:
        batch = largest_batch(config, lambda c: estimate(c, vocab_size).total <= device.usable)
        config = dataclasses.replace(config, batch=batch or config.accumulate)
    estimated = estimate(config, vocab_size)
    seconds = time.perf_counter() - start
    peak, compiled = estimated.total, None
    print(summary(config, vocab_size, device), flush=True)
    # What stays is exact: there is no use in compiling what it leaves no room for.
    if settings.compile and estimated.arguments > device.usable:
        print("XLA: not compiled, since what stays between updates is too much by itself")
    elif settings.compile:
        if settings.sweep:
            config, compiled = compiled_to_fit(config, vocab_size, device)
            estimated = estimate(config, vocab_size)
        else:
            try:
                compiled = compile_step(config, vocab_size, device)
            except TooLarge as error:
                print(f"XLA: {error}")
        # What is refused needs more than there is, at least.
        peak = compiled.peak if compiled else device.usable + 1
    fits = peak <= device.usable
    given = dataclasses.replace(given, batch=config.batch)
    print(f"\n{table(estimated, compiled)}\n")
    if config.layerwise and config.accumulate > 1:
        print(kept_inputs(config))
    print(verdict(estimated.total, device, "estimate"))
    print(f"(estimated in {seconds:.2f} s)")
    if compiled:
        print(verdict(compiled.peak, device, "XLA"))
        print(f"(compiled in {compiled.seconds:.0f} s, with attention of {config.attention})")
        for line in compiled.rematerializes:
            print(f"XLA computes things again to fit, or could not: {line}")
    if settings.sweep:
        found = f"largest batch that fits: {config.batch}"
        print(found if fits else f"no batch fits, not even {config.batch}")
    if fits:
        print(f"To train so:\n  {train_command(given)}")
    else:
        more = max(0, peak - estimated.total)
        beyond = f", with the {more / GIB:.2f} GiB that XLA needs beyond the estimate" * bool(more)
        lines = advice(given, vocab_size, device, more)
        print("\n  ".join([f"What would help{beyond}:", *lines]))
    if out is not None:
        name = f"{config.preset} {config.optimizer}, {config.batch} x {config.seq}"
        bars = [Bar(name, estimated.parts, compiled.peak if compiled else None)]
        changes = {} if fits else helpful(given, vocab_size, device)
        bars += [
            Bar(flags, estimate(c.resolve(), vocab_size).parts) for flags, c in changes.items()
        ]
        draw(bars, [device], out)
        print(f"wrote {out}")
    return fits


def main() -> None:
    with program(Plan, status=ERROR), check_needs_driver():
        fits = plan(tyro.cli(Plan, description=__doc__))
    raise SystemExit(0 if fits else DOES_NOT_FIT)


if __name__ == "__main__":
    main()
