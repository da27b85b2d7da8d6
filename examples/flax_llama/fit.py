"""What fits into a device's memory, and what to change where a training step does not."""

import dataclasses
import enum
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from examples.flax_llama.compile_step import Compiled
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import Device
from examples.flax_llama.effects import check_effects
from examples.flax_llama.memory import SPREAD, SPREAD_OF_PLAN, Estimate, estimate
from examples.flax_llama.methods import ADAMW, IN_GALORE
from examples.flax_llama.model import attention_implementation
from examples.flax_llama.optimizers import micro_batches_at_rank

# More sequences than any device that is known here has room for.
MOST = 2**20
# No rank below that part of the hidden size is suggested; the published ones are a quarter.
LEAST_RANK = 16
# A change that saves a smaller part of all bytes is not worth telling, unless it is enough.
LEAST_SAVING = 0.01


class Fit(enum.Enum):
    """Whether a step fits, as surely as that can be known beforehand."""

    SURE = "fits"
    CLOSE = "close: try it"
    NOT = "does not fit"


@dataclasses.dataclass(frozen=True)
class Need:
    """The bytes that a step needs, and how surely.

    Attributes:
      stays: between updates, exactly.
      passes: what is needed besides at the fullest moment, by an estimate or by XLA's plan.
      spread: what steps have really needed of that, in parts of it: the least and the most.
    """

    stays: int
    passes: int
    spread: tuple[float, float]

    @classmethod
    def estimated(cls, found: Estimate, device: Device, more: int = 0) -> "Need":
        """That of an estimate, and of `more` bytes that XLA's plans need beyond estimates."""
        spread = SPREAD_OF_PLAN if more else SPREAD[device.platform]
        return cls(found.arguments, found.temporaries + more, spread)

    @classmethod
    def planned(cls, found: Compiled) -> "Need":
        """That of a compiled step."""
        return cls(found.arguments, found.peak - found.arguments, SPREAD_OF_PLAN)

    @staticmethod
    def beyond(size: int, found: Estimate) -> int:
        """The least bytes more than an estimate of a step that surely needs more than a size."""
        passes = math.ceil((size + 1 - found.arguments) / SPREAD_OF_PLAN[0])
        return max(0, passes - found.temporaries)

    @property
    def total(self) -> int:
        return self.stays + self.passes

    @property
    def least(self) -> int:
        return self.stays + round(self.spread[0] * self.passes)

    @property
    def most(self) -> int:
        return self.stays + round(self.spread[1] * self.passes)

    def fit(self, device: Device) -> Fit:
        if self.most <= device.usable:
            return Fit.SURE
        return Fit.CLOSE if self.least <= device.usable else Fit.NOT


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that would need less memory.

    Attributes:
      flags: what to write.
      given: the configuration with them, as it is given; what it says nothing of depends on it.
      same: whether training stays as it is, to round-off.
    """

    flags: str
    given: Config
    same: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
    """What to fit: a configuration as it is given, the model's vocabulary, and a device.

    Attributes:
      more: bytes that the compiled step needs beyond the estimate, taken for those that it will
        need beyond it after any change, too.
    """

    given: Config
    vocab_size: int
    device: Device
    more: int = 0

    def config(self, given: Config | None = None) -> Config:
        """A configuration, this one by default, with all that training would choose on the device.

        Raises:
          UsageError: a setting cannot work.
        """
        given = given or self.given
        check_effects([given], Config())
        config = given.resolve()
        attention = attention_implementation(
            config.shape(self.vocab_size), self.device.capability, self.device.description
        )
        return dataclasses.replace(config, attention=attention)

    def need(self, given: Config | None = None) -> Need:
        found = estimate(self.config(given), self.vocab_size)
        return Need.estimated(found, self.device, self.more)

    def fit(self, given: Config | None = None) -> Fit:
        return self.need(given).fit(self.device)

    def largest_batch(self, *enough: Fit, given: Config | None = None) -> int:
        """The most sequences for which it fits as surely as asked for; 0 if none do."""
        return largest_batch(given or self.given, lambda changed: self.fit(changed) in enough)


def largest_batch(given: Config, fits: Callable[[Config], bool]) -> int:
    """The most sequences that fit, a multiple of `accumulate`; 0 if none do."""

    def with_micro_batches_of(rows: int) -> Config:
        return dataclasses.replace(given, batch=rows * given.accumulate)

    low, high = 0, 1
    while high < MOST and fits(with_micro_batches_of(high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(with_micro_batches_of(middle)) else (low, middle)
    return low * given.accumulate


def alternatives(question: Question) -> Iterator[Change]:
    """Single changes that may need less, those first that leave training as it is."""
    given, config = question.given, question.config()

    def change(flags: str, **settings: Any) -> Change:
        return Change(flags, dataclasses.replace(given, **settings))

    def same(flags: str, **settings: Any) -> Change:
        return dataclasses.replace(change(flags, **settings), same=True)

    if not config.layerwise:
        yield same("--layerwise", layerwise=True)
        if not config.remat:
            yield same("--remat", remat=True)
        yield from fewer_rows_at_a_time(question)
    if config.attention == "xla" and given.attention != "auto":
        yield same("--attention auto", attention="auto")
    if micro_batches_at_rank(config) > 1:
        # No accumulator; nor is there one with clipping, for which they are averaged before.
        yield same("--accumulate 1", accumulate=1)
        yield change("--clip 1", clip=1.0)
    if config.layerwise and config.clip and config.clip_by == "global":
        yield change("--clip-by layer", clip_by="layer")
        yield change("--clip 0", clip=0.0)
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) == "float32":
            yield change(f"--{name.replace('_', '-')} bfloat16", **{name: "bfloat16"})
    if config.optimizer in ("adamw", *ADAMW) and config.moment_dtype is None:
        yield change("--moment-dtype bfloat16", moment_dtype="bfloat16")
    galore = config.optimizer in IN_GALORE
    if galore and config.projector_dtype in (None, "float32"):
        yield change("--projector-dtype bfloat16", projector_dtype="bfloat16")
    if galore and config.projector != "rows":
        yield change("--projector rows", projector="rows")
    if config.residual == "error_feedback":
        yield change("--residual discard", residual="discard")
    if config.optimizer != "q_galore_adamw":
        for name in dict.fromkeys((f"{config.optimizer}_8bit", "galore_adamw_8bit")):
            if name in IN_GALORE and name != config.optimizer and not given.moment_dtype:
                yield change(f"--optimizer {name}", optimizer=name)
        # One that was asked for is no default any more.
        dtype = {"projector_dtype": "int4"} if given.projector_dtype else {}
        flag = " --projector-dtype int4" if given.projector_dtype not in (None, "int4") else ""
        if not given.moment_dtype:
            yield change(f"--optimizer q_galore_adamw{flag}", optimizer="q_galore_adamw", **dtype)
    if galore and not config.int8_weights:
        yield change("--int8-weights True", int8_weights=True)
    if galore and config.rank // 2 >= config.hidden // LEAST_RANK:
        yield change(f"--rank {config.rank // 2}", rank=config.rank // 2)


def fewer_rows_at_a_time(question: Question) -> Iterator[Change]:
    """The fewest micro-batches that an update fits with, or else as many as it has sequences."""
    config = question.config()
    counts = [n for n in range(config.accumulate + 1, config.batch + 1) if config.batch % n == 0]

    def change(count: int) -> Change:
        given = dataclasses.replace(question.given, accumulate=count)
        return Change(f"--accumulate {count}", given, same=True)

    for count in counts[:-1]:
        if question.fit(change(count).given) is Fit.SURE:
            yield change(count)
            return
    if counts:
        yield change(counts[-1])


def helpful(question: Question) -> list[Change]:
    """The single changes that do need less."""
    return [change for change in alternatives(question) if helps(question, change)]


def helps(question: Question, change: Change) -> bool:
    """Whether a change can be made, and needs much less, or so much less that it surely fits."""
    try:
        need, size = question.need(change.given), question.need().total
    except UsageError:  # it cannot go with another setting that was given
        return False
    enough = need.fit(question.device) is Fit.SURE
    return need.total <= (size - 1 if enough else (1 - LEAST_SAVING) * size)


def together(question: Question) -> Change | None:
    """Several changes with which it does fit, as few as may be; None where there are none.

    Those that leave training as it is are taken first, and the batch is made smaller last.
    """
    best, taken = question, list[Change]()
    for kinds in ({True}, {True, False}):
        while best.fit() is not Fit.SURE:
            able = [change for change in helpful(best) if change.same in kinds]
            if not able:
                break
            enough = (c for c in able if question.fit(c.given) is Fit.SURE)
            least = min(able, key=lambda change: question.need(change.given).total)
            found = next(enough, least)
            best, taken = dataclasses.replace(best, given=found.given), [*taken, found]
    # Without those that turned out not to be needed.
    for change in reversed(taken):
        fewer = [other for other in taken if other is not change]
        given = applied(question.given, fewer)
        if works(question, given) and question.fit(given) is Fit.SURE:
            taken, best = fewer, dataclasses.replace(best, given=given)
    flags = merged(taken)
    if best.fit() is not Fit.SURE:
        batch = best.largest_batch(Fit.SURE)
        if not batch:
            return None
        flags.append(f"--batch {batch}")
        best = dataclasses.replace(best, given=dataclasses.replace(best.given, batch=batch))
    return Change(" ".join(flags), best.given, all(change.same for change in taken))


def works(question: Question, given: Config) -> bool:
    try:
        question.config(given)
    except UsageError:
        return False
    return True


def applied(given: Config, changes: Iterable[Change]) -> Config:
    """A configuration with what changes set, one after the other.

    Each of them was made of the configuration that the ones before it had led to.
    """
    fields = [field.name for field in dataclasses.fields(Config)]
    flags = {name: "--" + name.replace("_", "-") for name in fields}
    set_by = {
        name: getattr(change.given, name)
        for change in changes
        for name in fields
        if flags[name] in change.flags.split()
    }
    return dataclasses.replace(given, **set_by)


def merged(changes: Iterable[Change]) -> list[str]:
    """The flags of changes; of a setting that is changed twice, the last."""
    found: dict[str, str] = {}
    for change in changes:
        for flag in change.flags.removeprefix("--").split(" --"):
            found[flag.split()[0]] = f"--{flag}"
    return list(found.values())


def advice(question: Question) -> list[Change]:
    """What to change in a configuration that does not fit surely; what fits comes first.

    Then comes what leaves training as it is, and what needs least. All of it needs less: there are
    the largest batch, single changes, and, unless one of these fits without changing what is
    trained, changes that fit together.
    """
    given, found = question.given, helpful(question)
    batch = question.largest_batch(Fit.SURE) or given.accumulate
    smaller = Change(f"--batch {batch}", dataclasses.replace(given, batch=batch))
    if batch < question.config().batch and helps(question, smaller):
        found.append(smaller)
    if not any(change.same and question.fit(change.given) is Fit.SURE for change in found):
        several = together(question)
        if several is not None and several.flags not in {change.flags for change in found}:
            found.append(several)
    order = list(Fit)

    def place(change: Change) -> tuple[int, bool, int]:
        need = question.need(change.given)
        return order.index(need.fit(question.device)), not change.same, need.total

    return sorted(found, key=place)
