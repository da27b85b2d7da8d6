"""What fits into a device's memory, and how surely."""

import dataclasses
import enum
import math
from collections.abc import Callable

from examples.flax_llama.attention import attention_implementation
from examples.flax_llama.compile_step import Compiled
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import Device
from examples.flax_llama.effects import check_effects
from examples.flax_llama.memory import SPREAD, SPREAD_OF_PLAN, Estimate, estimate

# More sequences than any device that is known here has room for.
MOST = 2**20


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
class Question:
    """What to fit: a configuration as it is given, the model's vocabulary, and a device.

    Attributes:
      fixed: settings that cannot be others, since the run goes on, or begins with another one.
      more: bytes that the compiled step needs beyond the estimate, taken for those that it will
        need beyond it after any change, too.
      base: the settings that a command line need not repeat.
    """

    given: Config
    vocab_size: int
    device: Device
    fixed: frozenset[str] = frozenset()
    more: int = 0
    base: Config = dataclasses.field(default_factory=Config)

    def config(self, given: Config | None = None) -> Config:
        """A configuration, this one by default, with all that training would choose on the device.

        Raises:
          UsageError: a setting cannot work, or cannot be another one.
        """
        given = given or self.given
        check_effects([given], self.base)
        config = given.resolve()
        if self.fixed:
            asked = self.given.resolve()
            differ = [name for name in self.fixed if getattr(config, name) != getattr(asked, name)]
            if differ:
                raise UsageError(f"{', '.join(differ)} cannot be changed.")
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
