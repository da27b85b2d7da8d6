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
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from examples.flax_llama.beginning import begin
from examples.flax_llama.command import program
from examples.flax_llama.compile_step import Compiled, TooLarge, compile_step
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.data import vocabulary_size
from examples.flax_llama.devices import FRACTION, FRACTION_VARIABLE, Device, Here, chosen_device
from examples.flax_llama.fit import Fit, Need, Question
from examples.flax_llama.flags import command_line
from examples.flax_llama.given import as_words, base_of, fixed_settings, settings_given
from examples.flax_llama.memory import check_machine, estimate
from examples.flax_llama.memory_chart import Bar, draw, picture
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.plan_text import (
    in_the_machine,
    kept_inputs,
    on_mesh,
    summary,
    table,
    verdict,
)
from examples.flax_llama.remedies import Change, advice, least_need, names_of_tried
from examples.flax_llama.run_directory import check_contents
from examples.flax_llama.topology import check_needs_driver
from examples.flax_llama.train import own_tokenizer
from examples.flax_llama.units import size

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
    base = base_of(given)
    if base.resume:
        words += ["--resume", "--out", str(given.out)]
    return shlex.join([*words, *as_words(given, base)])


def memory_fraction(need: Need, device: Device) -> float | None:
    """The part of a GPU's memory that JAX has to be allowed; None where it takes enough itself."""
    if device.capability is None or need.most <= FRACTION * device.memory:
        return None
    return math.floor(100 * device.usable / device.memory) / 100


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
    titles = {
        Fit.SURE: "What fits:",
        Fit.CLOSE: "What is close, and worth a try:",
        Fit.NOT: "What needs less, but not enough by itself:",
    }
    width = max((len(change.flags) for change in changes), default=0)
    lines, last = [], None
    for change in changes:
        need = question.need(change.given)
        found = need.fit(question.device)
        if found is not last:
            lines.append(titles[found])
            last = found
        same = "  trains the same" * change.same
        lines.append(f"  {change.flags:{width}}{size(need.total):>14}{same}")
    found = question.fit(changes[0].given) if changes else Fit.NOT
    if found is Fit.NOT:
        return "\n".join([*lines, *nothing_fits(question)])
    best = changes[0]
    if found is Fit.CLOSE:
        lines.append("Nothing that was tried fits surely.")
    lines.append(f"To train with {best.flags}:\n  {train_command(best.given, question)}")
    lines += far_from_published(question.config(best.given))
    return "\n".join(lines)


def nothing_fits(question: Question) -> list[str]:
    """What was tried in vain, and how far from enough the least of it is."""
    least, need = least_need(question)
    names = ", ".join(names_of_tried(question))
    how = "fits surely" if question.fit() is Fit.CLOSE else "is enough"
    return [
        f"Nothing that was tried {how}, in any combination: {names}, lower ranks, smaller batches, "
        "more micro-batches.",
        f"Of all that this needs least, {size(need.total)} of {size(question.device.usable)}:",
        f"  {least}",
        "What is left is another device, a smaller model, or a shorter --seq.",
    ]


def far_from_published(config: Config) -> list[str]:
    """A word of caution about a rank for which there is no published recipe."""
    if config.optimizer in IN_GALORE and 8 * config.rank < config.hidden:
        part = f"1/{config.hidden / config.rank:.0f} of the hidden size"
        return [f"(Rank {config.rank} is {part}; the published recipes have 1/4 to 1/3.)"]
    return []


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
    if estimated.host:
        print(in_the_machine(estimated, compiled))
    if config.mesh is not None:
        print(on_mesh(config, question.vocab_size, config.mesh))
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
        counts = ", counting the machine's memory as the device's," if compiled.host else ""
        for line in compiled.rematerializes:
            print(f"XLA{counts} computes things again to fit, or could not: {line}")
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


def question_of(given: Config, device: Device) -> Question:
    """What to fit, of a run that could begin, or go on, with these settings.

    Raises:
      UsageError: it could not.
    """
    config = given.resolve()
    if config.resume and config.out is not None:
        check_contents(config.out, resume=True)
        # What it has by default is not another optimizer's.
        given = given.unset()
    beginning = begin(config)
    if beginning.finished:
        raise UsageError(
            f"out={config.out} has finished after update {config.steps}: plan more updates, "
            "steps=N."
        )
    named = own_tokenizer(config, beginning)
    vocab_size = vocabulary_size(named.data, named.tokenizer)
    question = Question(given, vocab_size, device, fixed_settings(config), base=base_of(given))
    question.need()
    if isinstance(device, Here):
        check_machine(question.config(), vocab_size)
    return question


def plan(settings: Plan) -> Fit:
    """Prints the plan, and draws it where asked to; returns whether it fits.

    Raises:
      UsageError: a setting cannot work, or the compiler for the device is missing.
    """
    device = chosen_device(settings.device, settings.memory)
    # Whatever raises does so before anything else is done; what loads plugins of JAX comes first.
    if settings.compile:
        device.mesh()
    if settings.picture is not None:
        settings = dataclasses.replace(settings, picture=picture(settings.picture))
    question = question_of(settings.run, device)
    if settings.sweep:
        least = question.given.accumulate
        question = with_batch(question, question.largest_batch(Fit.SURE) or least)
    return answer(question, settings)


def from_command_line(args: Sequence[str] | None = None) -> Plan:
    """What the command line asks for; of a run that goes on with another one, with what is its."""

    def parse(base: Config) -> Plan:
        return command_line(Plan, args, default=Plan(run=base), description=__doc__)

    run = settings_given(lambda base: parse(base).run)
    return dataclasses.replace(parse(base_of(run)), run=run)


def main() -> None:
    with program(Config, Plan, status=ERROR), check_needs_driver():
        found = plan(from_command_line())
    raise SystemExit(STATUS[found])


if __name__ == "__main__":
    main()
