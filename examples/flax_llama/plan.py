"""Says what a training step needs of a device's memory, whether it fits, and what to change.

python -m examples.flax_llama.plan --preset 7b --vocab-size 32000 --optimizer q_galore_adamw \
    --dtype bfloat16 --param-dtype bfloat16 --layerwise --batch 16 --device rtx4060ti_16gb

All settings of a training run are taken, with the same defaults; `plan` in place of `train` asks
whether that run fits. The exit status is 0 if it surely does, 4 if that is close, 3 if it does not,
and 2 if a setting cannot work.
"""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Annotated

import tyro

from examples.flax_llama.command import program
from examples.flax_llama.compile_step import Compiled, TooLarge, compile_step
from examples.flax_llama.config import Config
from examples.flax_llama.data import vocabulary_size
from examples.flax_llama.devices import FRACTION, FRACTION_VARIABLE, GIB, Device, chosen_device
from examples.flax_llama.fit import Change, Fit, Need, Question, advice
from examples.flax_llama.flags import command_line
from examples.flax_llama.memory import Estimate, estimate
from examples.flax_llama.memory_chart import Bar, draw, picture
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.optimizers import micro_batches_at_rank
from examples.flax_llama.topology import check_needs_driver

MIB = 2**20
MOMENTS = {
    "block": "the backward pass of a layer",
    "head": "the backward pass of the head",
    "update": "the optimizer's update of the layers' matrices",
    "choice": "the choice of how to average micro-batches, for which XLA copies what stays",
}
STATUS = {Fit.SURE: 0, Fit.CLOSE: 4, Fit.NOT: 3}
ERROR = 2
# Alternatives that a picture has: of those that fit, and of the others.
DRAWN = {Fit.SURE: 3, Fit.CLOSE: 2, Fit.NOT: 2}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to plan."""

    # The training run.
    run: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    # What to plan for, by default the device that is here: rtx3060_12gb, rtx4090_24gb, l4_24gb,
    # a100_80gb, h100_80gb, tpu_v5e, ...; a name that is not known gets a list of all.
    device: str | None = None
    # GiB that the device has; without --device, of any NVIDIA GPU.
    memory: float | None = None
    # Compile the step for the device, which need not be here, and show the compiler's figures.
    compile: bool = False
    # Find the largest batch that fits.
    sweep: bool = False
    # Picture of the parts to write, such as memory.png, or a directory for one of that name.
    picture: Path | None = None


def train_command(given: Config, question: Question) -> str:
    """The command that trains with a configuration, as it was given."""
    words = []
    fraction = memory_fraction(question.need(given), question.device)
    if fraction is not None:
        words.append(f"{FRACTION_VARIABLE}={fraction}")
    words += ["python", "-m", "examples.flax_llama.train"]
    for field in dataclasses.fields(Config):
        value = getattr(given, field.name)
        if value != field.default:
            words += option(field.name, value, of_bool=isinstance(field.default, bool))
    return shlex.join(words)


def option(name: str, value: object, of_bool: bool) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if of_bool:
        return [flag if value else flag.replace("--", "--no-")]
    return [flag, str(value)]


def memory_fraction(need: Need, device: Device) -> float | None:
    """The part of a GPU's memory that JAX has to be allowed; None where it takes enough itself."""
    if device.capability is None or need.most <= FRACTION * device.memory:
        return None
    return math.floor(100 * device.usable / device.memory) / 100


def unit_of(size: int) -> tuple[int, str]:
    units = ((GIB, "GiB"), (MIB, "MiB"), (1024, "KiB"))
    return next(unit for unit in units if size >= unit[0] or unit[1] == "KiB")


def shown(size: int, unit: tuple[int, str]) -> str:
    """A size in a unit, of which all but GiB are whole."""
    return f"{size / unit[0]:,.{2 if unit[0] == GIB else 0}f}"


def words(size: int) -> str:
    """A size in a unit of its own."""
    unit = unit_of(size)
    return f"{shown(size, unit)} {unit[1]}"


def table(estimated: Estimate, compiled: Compiled | None) -> str:
    """The parts, and the compiler's sums beside them."""
    notes = {
        "gradients": f"at the fullest moment, which is {MOMENTS[estimated.moment]}",
        "inputs": "of each layer, kept by the forward pass",
        "working": "what else is computed with at that moment",
    }
    unit = unit_of(estimated.total)
    lines = [f"{unit[1]:14}{'estimate':>10}{'XLA' if compiled else '':>10}".rstrip()]

    def row(name: str, size: int, xla: int | None = None, note: str = "") -> None:
        beside = "" if xla is None else shown(xla, unit)
        lines.append(f"{name:14}{shown(size, unit):>10}{beside:>10}  {note}".rstrip())

    for name, size in estimated.parts.items():
        row(name, size, note=notes.get(name, ""))
    row(
        "stays",
        estimated.arguments,
        compiled.arguments if compiled else None,
        "between updates: weights, projectors and moments",
    )
    row("passes", estimated.temporaries, compiled.temporaries if compiled else None, "the rest")
    row(
        "total",
        estimated.total,
        compiled.peak if compiled else None,
        "XLA's is what it needs at its fullest moment" if compiled else "",
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


def verdict(need: Need, device: Device, whose: str) -> str:
    """Whether it fits, by how much, and within which bounds that is known."""
    found = need.fit(device)
    by = {
        Fit.SURE: f", with at least {words(device.usable - need.most)} to spare",
        Fit.CLOSE: "",
        Fit.NOT: f", by at least {words(need.least - device.usable)}",
    }
    low, high = need.spread
    basis = "XLA's plan" if whose == "XLA" else "the estimate"
    return (
        f"{whose}: {words(need.total)} of {words(device.usable)}: {found.value}{by[found]}\n"
        f"({words(need.least)} to {words(need.most)}: what stays is exact; of what passes, other "
        f"steps needed {low:g} to {high:g} times {basis})"
    )


def summary(config: Config, vocab_size: int, device: Device) -> str:
    rank = f", rank {config.rank}" if config.optimizer in IN_GALORE else ""
    how = "layers updated inside the backward pass" if config.layerwise else "ordinary updates"
    how += ", activations computed again" * (config.remat and not config.layerwise)
    shape = config.shape(vocab_size)
    return (
        f"LLaMA of {shape.num_params:,} parameters ({config.preset}), vocabulary "
        f"{shape.vocab_size:,}; {config.optimizer}{rank}; {how}\n"
        f"{config.batch} x {config.seq} tokens per update"
        f"{f' in {config.accumulate} micro-batches' if config.accumulate > 1 else ''}; activations "
        f"{config.dtype}, parameters {config.param_dtype}, attention of "
        f"{'cuDNN' if config.attention == 'cudnn' else 'XLA'}\n"
        f"{device.description}: {device.memory / GIB:.2f} GiB ({device.source})"
        f"{f', {device.context / GIB:.2f} of them for the driver' if device.context else ''}"
    )


def compiled_to_fit(question: Question) -> tuple[Question, Compiled | None]:
    """The question with the largest batch, not larger than it has, whose compiled step fits.

    None where not even one sequence in each micro-batch does.
    """
    config, device = question.config(), question.device
    batch = config.batch
    while batch > 0:
        question = with_batch(question, batch)
        try:
            compiled = compile_step(question.config(), question.vocab_size, device)
        except TooLarge as error:
            print(f"batch {batch}: {error}", flush=True)
            over = 1
        else:
            need = Need.planned(compiled)
            print(f"batch {batch}, {verdict(need, device, 'XLA')}", flush=True)
            if need.fit(device) is Fit.SURE:
                return question, compiled
            # At most so much for each sequence, so that no batch that fits is left out.
            over = (need.most - device.usable) * batch // max(1, need.most - need.stays)
        batch -= max(1, over // config.accumulate) * config.accumulate
    return question, None


def with_batch(question: Question, batch: int) -> Question:
    return dataclasses.replace(question, given=dataclasses.replace(question.given, batch=batch))


def compiled_step(question: Question, sweep: bool) -> tuple[Question, Compiled | None]:
    """The step as XLA compiles it, None where that is refused; of a sweep, with its batch."""
    if sweep:
        return compiled_to_fit(question)
    try:
        return question, compile_step(question.config(), question.vocab_size, question.device)
    except TooLarge as error:
        print(f"XLA: {error}")
        return question, None


def suggestions(question: Question, changes: list[Change]) -> str:
    """What to change, in groups, with what it would need then; the first that fits as a command."""
    if not changes:
        return "Nothing that is known here would help: take another device, or a smaller model."
    titles = {
        Fit.SURE: "What fits:",
        Fit.CLOSE: "What is close, and worth a try:",
        Fit.NOT: "What needs less, but not enough by itself:",
    }
    width = max(len(change.flags) for change in changes)
    lines, last = [], None
    for change in changes:
        need = question.need(change.given)
        found = need.fit(question.device)
        if found is not last:
            lines.append(titles[found])
            last = found
        unit = unit_of(need.total)
        same = "  trains the same" * change.same
        lines.append(f"  {change.flags:{width}}{shown(need.total, unit):>10} {unit[1]}{same}")
    best = changes[0]
    if question.fit(best.given) is Fit.SURE:
        lines.append(f"To train with {best.flags}:\n  {train_command(best.given, question)}")
    else:
        lines.append("Nothing that is known here is enough: another device, or a smaller model.")
    return "\n".join(lines)


def bars(
    question: Question, fit: Fit, compiled: Compiled | None, changes: list[Change]
) -> list[Bar]:
    """The bars of a picture: as it was asked, and then what to change, if it does not fit."""
    config = question.config()
    name = f"as asked: {config.preset}, {config.optimizer}, {config.batch} x {config.seq}"
    parts = estimate(config, question.vocab_size).parts
    found = [Bar(name, parts, compiled.peak if compiled else None, fit)]
    left = dict(DRAWN)
    for change in changes:
        fit = question.fit(change.given)
        left[fit] -= 1
        if left[fit] >= 0:
            parts = estimate(question.config(change.given), question.vocab_size).parts
            found.append(Bar(change.flags, parts, None, fit))
    return found


def answer(question: Question, settings: Plan) -> Fit:
    """Prints what is needed, compiled where that was asked for, and what to do; draws the picture.

    Where a sweep found a batch, the question is of that one.
    """
    device, compiled = question.device, None
    need = question.need()
    print(summary(question.config(), question.vocab_size, device), flush=True)
    # What stays is exact: there is no use in compiling what it leaves no room for.
    if settings.compile and need.stays > device.usable:
        print("XLA: not compiled, since what stays between updates is too much by itself")
    elif settings.compile:
        question, compiled = compiled_step(question, settings.sweep)
    config = question.config()
    estimated = estimate(config, question.vocab_size)
    print(f"\n{table(estimated, compiled)}\n")
    if config.layerwise and config.accumulate > 1:
        print(kept_inputs(config))
    need = Need.estimated(estimated, device)
    print(verdict(need, device, "estimate"))
    found = need.fit(device)
    if compiled:
        need = Need.planned(compiled)
        found = need.fit(device)
        print(verdict(need, device, "XLA"))
        print(f"(compiled in {compiled.seconds:.0f} s)")
        for line in compiled.rematerializes:
            print(f"XLA computes things again to fit, or could not: {line}")
    elif settings.compile:
        found = Fit.NOT
    if settings.sweep:
        print(batches(question, compiled, found))
    more = 0
    if compiled:
        more = max(0, need.total - estimated.total)
    elif found is Fit.NOT:
        # What is refused needs more than there is, at least.
        more = Need.beyond(device.usable, estimated)
    question = dataclasses.replace(question, more=more)
    changes = [] if found is Fit.SURE else advice(question)
    if found is not Fit.NOT:
        print(f"To train so:\n  {train_command(question.given, question)}")
    if found is not Fit.SURE:
        print(suggestions(question, changes))
    if settings.picture is not None:
        draw(bars(question, found, compiled, changes), [device], settings.picture)
        print(f"wrote {settings.picture}")
    return found


def batches(question: Question, compiled: Compiled | None, found: Fit) -> str:
    """The largest batch that a sweep found, and up to where it is worth a try."""
    batch = question.config().batch
    if found is not Fit.SURE:
        return f"no batch surely fits, not even {batch}"
    line = f"largest batch that fits: {batch}"
    if compiled is None:
        close = question.largest_batch(Fit.SURE, Fit.CLOSE)
        line += f"; up to {close} it is close" * (close > batch)
    return line


def plan(settings: Plan) -> Fit:
    """Prints the plan, and draws it where asked to; returns whether it fits.

    Raises:
      UsageError: a setting cannot work, or the compiler for the device is missing.
    """
    given, device = settings.run, chosen_device(settings.device, settings.memory)
    # Whatever raises does so before anything else is done; what loads plugins of JAX comes first.
    if settings.compile:
        device.mesh()
    if settings.picture is not None:
        settings = dataclasses.replace(settings, picture=picture(settings.picture))
    question = Question(given, vocabulary_size(given.data, given.tokenizer), device)
    question.need()
    if settings.sweep:
        question = with_batch(question, question.largest_batch(Fit.SURE) or given.accumulate)
    return answer(question, settings)


def main() -> None:
    with program(Config, Plan, status=ERROR), check_needs_driver():
        found = plan(command_line(Plan, description=__doc__))
    raise SystemExit(STATUS[found])


if __name__ == "__main__":
    main()
