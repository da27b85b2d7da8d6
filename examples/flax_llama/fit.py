"""What fits into a device's memory, and what to change where a training step does not."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import GIB, Device
from examples.flax_llama.memory import estimate
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.optimizers import micro_batches_at_rank

# More sequences than any device that is known here has room for.
MOST = 2**20
# No rank below that part of the hidden size is suggested; the published ones are a quarter.
LEAST_RANK = 16


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting that would need less memory.

    Attributes:
      flags: what to write.
      given: the configuration with it, as it is given; what it says nothing of depends on it.
    """

    flags: str
    given: Config


def alternatives(given: Config, device: Device) -> Iterator[Change]:
    """Single changes that may need less, those first that leave the result as it is."""
    config = given.resolve()

    def change(flags: str, **settings: Any) -> Change:
        return Change(flags, dataclasses.replace(given, **settings))

    if not config.layerwise:
        yield change("--layerwise", layerwise=True)
        if not config.remat:
            yield change("--remat", remat=True)
    rows = config.batch // config.accumulate
    if rows > 1 and not config.layerwise:
        yield change(f"--accumulate {config.batch}", accumulate=config.batch)
    if config.attention == "xla" and config.dtype == "bfloat16" and not device.is_tpu:
        yield change("--attention cudnn", attention="cudnn")
    if micro_batches_at_rank(config) > 1:
        # No accumulator; nor is there one with clipping, for which they are averaged before.
        yield change("--accumulate 1", accumulate=1)
        yield change("--clip 1", clip=1.0)
    if config.layerwise and config.clip and config.clip_by == "global":
        yield change("--clip-by layer", clip_by="layer")
        yield change("--clip 0", clip=0.0)
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) == "float32":
            yield change(f"--{name.replace('_', '-')} bfloat16", **{name: "bfloat16"})
    galore = config.optimizer in IN_GALORE
    if galore and config.projector_dtype in (None, "float32"):
        yield change("--projector-dtype bfloat16", projector_dtype="bfloat16")
    if galore and config.projector != "rows":
        yield change("--projector rows", projector="rows")
    if config.residual == "error_feedback":
        yield change("--residual discard", residual="discard")
    if config.optimizer != "q_galore_adamw":
        for name in dict.fromkeys((f"{config.optimizer}_8bit", "galore_adamw_8bit")):
            if name in IN_GALORE and name != config.optimizer:
                yield change(f"--optimizer {name}", optimizer=name)
        # One that was asked for is no default any more.
        dtype = {"projector_dtype": "int4"} if given.projector_dtype else {}
        flag = " --projector-dtype int4" if given.projector_dtype not in (None, "int4") else ""
        yield change(f"--optimizer q_galore_adamw{flag}", optimizer="q_galore_adamw", **dtype)
    if galore and not config.int8_weights:
        yield change("--int8-weights True", int8_weights=True)
    if galore and config.rank // 2 >= config.hidden // LEAST_RANK:
        yield change(f"--rank {config.rank // 2}", rank=config.rank // 2)


def largest_batch(config: Config, fits: Callable[[Config], bool]) -> int:
    """The most sequences that fit, a multiple of `accumulate`; 0 if none do."""

    def with_micro_batches_of(rows: int) -> Config:
        return dataclasses.replace(config, batch=rows * config.accumulate)

    low, high = 0, 1
    while high < MOST and fits(with_micro_batches_of(high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(with_micro_batches_of(middle)) else (low, middle)
    return low * config.accumulate


def helpful(given: Config, vocab_size: int, device: Device) -> dict[str, Config]:
    """The single changes that do need less, by their flags, as they would be given."""
    size = estimate(given.resolve(), vocab_size).total
    found = {}
    for change in alternatives(given, device):
        try:
            smaller = estimate(change.given.resolve(), vocab_size).total < size
        except UsageError:  # it cannot go with another setting that was given
            continue
        if smaller:
            found[change.flags] = change.given
    return found


def advice(given: Config, vocab_size: int, device: Device, more: int = 0) -> list[str]:
    """What to change in a configuration that does not fit, each with what it would need then.

    Args:
      given: the configuration, as it is given.
      vocab_size: of the model.
      device: that it does not fit into.
      more: bytes that the compiled step needs beyond the estimate, taken for those that it will
        need beyond it after any change, too.
    """

    def total(given: Config) -> int:
        return estimate(given.resolve(), vocab_size).total + more

    def fits(given: Config) -> bool:
        return total(given) <= device.usable

    def line(flags: str, changed: Config) -> str:
        enough = "fits" if fits(changed) else "not enough by itself"
        return f"{flags}: {total(changed) / GIB:.2f} GiB, {enough}"

    lines = []
    smallest = dataclasses.replace(given, batch=given.accumulate)
    if batch := largest_batch(given, fits):
        lines.append(f"--batch {batch}: the largest that fits")
    elif total(smallest) < total(given):
        lines.append(line(f"--batch {smallest.batch}", smallest))
    singles = helpful(given, vocab_size, device)
    lines += [line(*change) for change in singles.items()]
    best, taken = given, {}
    while not fits(best) and (smaller := helpful(best, vocab_size, device)):
        flags = min(smaller, key=lambda flags: total(smaller[flags]))
        best = smaller[flags]
        # By name, so that the last of several ranks stays.
        taken |= {flag.split()[0]: f"--{flag}" for flag in flags.removeprefix("--").split(" --")}
    if not fits(best):
        batch = largest_batch(best, fits) or best.accumulate
        if batch < best.resolve().batch:
            taken["batch"] = f"--batch {batch}"
        best = dataclasses.replace(best, batch=batch)
    together = " ".join(taken.values())
    if not fits(best):
        still = f": {together} still needs {total(best) / GIB:.2f} GiB"
        lines.append(f"another device, or a smaller model{still if taken else ''}")
    elif len(taken) > 1 and together not in singles:
        lines.append(f"{together}: {total(best) / GIB:.2f} GiB, fits")
    return lines
