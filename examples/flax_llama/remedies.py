"""What to change in a training run that does not fit: single changes, and the least that is enough.

The remedies that are known are settings on a few axes, such as the optimizer, or how a step is
computed. All combinations of them are searched, so that the answer does not depend on where a
search begins: it is the combination that fits and departs least from what was asked.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from examples.flax_llama.command import as_flags
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.fit import Fit, Need, Question, largest_batch
from examples.flax_llama.given import as_words
from examples.flax_llama.methods import IN_GALORE, in_8_bits
from examples.flax_llama.optimizers import OPTIMIZERS

# How far a change departs from the training that was asked for: judgements, which add up.
# Activations, moments or projectors in bfloat16, layers' inputs in 8 bits; clipping by other norms.
MILD = 1
# Parameters in bfloat16, anything else in 8 bits or fewer, second moments of the embedding and the
# head from their rows and columns, half the batch, clipping or not.
CLEAR = 2
# Half the rank.
HALF_THE_RANK = 3
# Another optimizer.
OTHER_OPTIMIZER = 4
Q_GALORE = "q_galore_adamw"
# No rank below that part of the hidden size is tried; the published ones are a quarter to a third.
LEAST_RANK = 64
# A change that saves a smaller part of all bytes is not worth telling, unless it is enough.
LEAST_SAVING = 0.01


class Departure(NamedTuple):
    """How far settings are from those that were asked for: the less, the earlier in order.

    Attributes:
      training: the sum over what trains otherwise, of judgements.
      computing: how many settings are others that train the same, to round-off; each halving of a
        micro-batch is one.
    """

    training: int = 0
    computing: int = 0

    def plus(self, other: "Departure") -> "Departure":
        return Departure(self.training + other.training, self.computing + other.computing)


class Remedy(NamedTuple):
    """Settings that may need less memory, and how far they depart."""

    settings: dict[str, Any]
    departure: Departure


AS_ASKED = Remedy({}, Departure())


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that would need less memory than those of a question.

    Attributes:
      flags: what to write.
      given: the configuration with them, as it is given; what it says nothing of depends on it.
      departure: how far that is from the question's.
    """

    flags: str
    given: Config
    departure: Departure

    @classmethod
    def of(cls, question: Question, given: Config, departure: Departure) -> "Change":
        return cls(" ".join(as_words(given, question.given)), given, departure)

    @property
    def same(self) -> bool:
        """Whether training stays as it is, to round-off."""
        return self.departure.training == 0


def remedies(question: Question) -> list[list[Remedy]]:
    """Axes of settings that can be chosen independently of each other; on each, what is not so yet.

    Ranks, batches and micro-batches are not among them: what is tried of these depends on the rest.
    """
    given, config = question.given, question.config()
    same = Departure(computing=1)
    kept = Departure(MILD, computing=int(not config.layerwise))
    axes = [
        [
            Remedy({"layerwise": False, "remat": True}, same),
            Remedy({"layerwise": True}, same),
            Remedy({"layerwise": True, "inputs_dtype": "int8"}, kept),
        ],
        [Remedy({"attention": "auto"}, same)] * (given.attention == config.attention == "xla"),
        [Remedy({"dtype": "bfloat16"}, Departure(MILD))],
        [Remedy({"param_dtype": "bfloat16"}, Departure(CLEAR))],
        [Remedy({"moment_dtype": "bfloat16"}, Departure(MILD))],
        optimizers(given, config),
        [Remedy({"residual": "discard"}, Departure(CLEAR))] * (config.residual == "error_feedback"),
        clippings(config),
    ]
    return [[remedy for remedy in axis if differs(remedy, config)] for axis in axes]


def differs(remedy: Remedy, config: Config) -> bool:
    return any(getattr(config, name) != value for name, value in remedy.settings.items())


def optimizers(given: Config, config: Config) -> list[Remedy]:
    """The same optimizer with moments in 8 bits, and GaLore's AdamW in its forms."""
    found = []
    names = (f"{config.optimizer}_8bit", "galore_adamw", "galore_adamw_8bit", Q_GALORE)
    for name in dict.fromkeys(name for name in names if name in OPTIMIZERS):
        settings: dict[str, Any] = {"optimizer": name}
        # What was asked for is no default any more.
        if in_8_bits(name) and given.moment_dtype:
            settings["moment_dtype"] = None
        if name == Q_GALORE:
            asked = {"projector_dtype": "int4", "int8_weights": True}
            settings |= {k: v for k, v in asked.items() if getattr(given, k) is not None}
        training = OTHER_OPTIMIZER * (family(name) != family(config.optimizer))
        training += CLEAR * (in_8_bits(name) != in_8_bits(config.optimizer))
        training += CLEAR * ((name == Q_GALORE) != (config.optimizer == Q_GALORE))
        found.append(Remedy(settings, Departure(training)))
    # The last step: the embedding and the head, whose moments are the greater part of what is left.
    if config.tables != "factored":
        settings, departure = found[-1]
        factored = departure.plus(Departure(CLEAR))
        found.append(Remedy(settings | {"tables": "factored"}, factored))
    return found


def family(optimizer: str) -> str:
    """The optimizer of which one is a form with fewer bits."""
    return "galore_adamw" if optimizer == Q_GALORE else optimizer.removesuffix("_8bit")


def clippings(config: Config) -> list[Remedy]:
    """By the other norm, or none; with some, GaLore accumulates no micro-batches."""
    if not config.clip:
        return [Remedy({"clip": 1.0}, Departure(CLEAR))]
    norms = [Remedy({"clip_by": norm}, Departure(MILD)) for norm in ("layer", "global")]
    return [*norms, Remedy({"clip": 0.0, "clip_by": "global"}, Departure(CLEAR))]


class Tried(NamedTuple):
    """A combination of remedies, with a rank.

    Attributes:
      given: the configuration with them, as it is given.
      least: the same with the least rank that is tried, and one sequence.
      departure: how far the first is from what was asked for.
    """

    given: Config
    least: Config
    departure: Departure


def tried(question: Question) -> Iterator[Tried]:
    """All combinations of remedies and ranks that can work, those first that depart least."""
    found = []
    for chosen in itertools.product(*([AS_ASKED, *axis] for axis in remedies(question))):
        settings = {k: v for remedy in chosen for k, v in remedy.settings.items()}
        departure = functools.reduce(Departure.plus, (remedy.departure for remedy in chosen))
        given = dataclasses.replace(question.given, **settings)
        # Some settings do not go with others.
        with contextlib.suppress(UsageError):
            lower = ranks(question, given)
            least = dataclasses.replace(lower[-1][0], batch=1, accumulate=1)
            found += [Tried(g, least, departure.plus(more)) for g, more in lower]
    for combination in sorted(found, key=lambda each: each.departure):
        # That is known of some only when their optimizer is made.
        with contextlib.suppress(UsageError):
            question.need(combination.least)
            yield combination


def ranks(question: Question, given: Config) -> list[tuple[Config, Departure]]:
    """The same configuration, and with half its rank, and again, as far as that is tried."""
    config = question.config(given)
    found = [(given, Departure())]
    if config.optimizer in IN_GALORE and "rank" not in question.fixed:
        rank = config.rank // 2
        while rank >= max(1, config.hidden // LEAST_RANK):
            halvings = Departure(len(found) * HALF_THE_RANK)
            found.append((dataclasses.replace(given, rank=rank), halvings))
            rank //= 2
    return found


def rows(
    question: Question, given: Config, enough: Collection[Fit]
) -> Iterator[tuple[Config, Departure]]:
    """The same configuration with the batch and the micro-batches that depart least, if any fit.

    A batch is halved as often as it has to be, and then is the largest that fits. It is computed in
    half or twice as many micro-batches as was asked, and so on; the batch as it was asked in any
    number.
    """
    config = question.config(given)
    batch, asked = config.batch, config.accumulate

    def fits(changed: Config) -> bool:
        return question.fit(changed) in enough

    def computed(sequences: int, count: int) -> Config:
        of_batch: dict[str, Any] = {} if sequences == batch else {"batch": sequences}
        return dataclasses.replace(given, accumulate=count, **of_batch)

    for halved in range(halvings(batch) + 1):
        fewest, found = math.ceil(batch / 2**halved), False
        # No other number of micro-batches needs less than one of these.
        if not (fits(computed(fewest, 1)) or fits(computed(fewest, fewest))):
            continue
        for count in divisors(batch) if not halved else doubled(asked, batch):
            sequences = math.ceil(fewest / count) * count
            changed = computed(sequences, count)
            if halvings(batch / sequences) == halved and fits(changed):
                if halved:
                    changed = dataclasses.replace(changed, batch=largest_batch(changed, fits))
                yield changed, Departure(CLEAR * halved, halvings(count / asked))
                found = True
        if found:
            return


@functools.cache
def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@functools.cache
def doubled(number: int, most: int) -> list[int]:
    """A number, half and twice of it, and so on, from 1 to another number."""
    half = [number >> n for n in range(number.bit_length())]
    return half + [number << n for n in range(1, halvings(most) + 1) if number << n <= most]


def halvings(ratio: float) -> int:
    """How often a number is halved, or doubled, until it is the other one or beyond."""
    return math.ceil(abs(math.log2(ratio)))


def least_departure(question: Question, *enough: Fit) -> Change | None:
    """The combination that fits as surely as asked for and departs least; then, that needs least.

    What needs too much with the least rank and one sequence does so with more of them.
    """
    best: tuple[Departure, int, Config] | None = None
    for combination in tried(question):
        if best is not None and combination.departure > best[0]:
            break
        if question.fit(combination.least) not in enough:
            continue
        for given, fewer in rows(question, combination.given, enough):
            found = combination.departure.plus(fewer), question.need(given).total, given
            if best is None or found[:2] < best[:2]:
                best = found
    return None if best is None else Change.of(question, best[2], best[0])


def least_need(question: Question) -> tuple[str, Need]:
    """Of all that is tried, what needs least: its flags, and what that is."""
    found = min(tried(question), key=lambda each: (question.need(each.least).total, each.departure))
    return " ".join(as_words(found.least, question.given)), question.need(found.least)


def names_of_tried(question: Question) -> list[str]:
    """The flags of all remedies that are combined, but for those of rank and batch."""
    return [" ".join(as_flags(given, question.given)) for given, _ in alone(question)]


def alone(question: Question) -> Iterator[tuple[Config, Departure]]:
    """Each of the remedies by itself."""
    for remedy in itertools.chain.from_iterable(remedies(question)):
        yield dataclasses.replace(question.given, **remedy.settings), remedy.departure


def working(question: Question, found: Iterable[tuple[Config, Departure]]) -> Iterator[Change]:
    """Those changes that can be made: some may not go with another setting that was given."""
    for given, departure in found:
        with contextlib.suppress(UsageError):
            question.need(given)
            yield Change.of(question, given, departure)


def single_changes(question: Question) -> Iterator[tuple[Config, Departure]]:
    """Changes of one thing each, some of which are not among the remedies that are combined."""
    given, config = question.given, question.config()
    yield from alone(question)
    if config.optimizer in IN_GALORE:
        if config.projector_dtype in (None, "float32"):
            yield dataclasses.replace(given, projector_dtype="bfloat16"), Departure(MILD)
        yield dataclasses.replace(given, projector="rows"), Departure(CLEAR)
        yield dataclasses.replace(given, int8_weights=True), Departure(CLEAR)
    yield dataclasses.replace(given, tables="factored"), Departure(CLEAR)
    if question.device.platform != "cpu":
        for what in (("moments",), ("weights", "moments")):
            more = Departure(computing=len(what) + (not config.layerwise))
            offload = tuple(sorted({*what, *config.offload}))
            yield dataclasses.replace(given, layerwise=True, offload=offload), more
    yield from ranks(question, given)[1:2]
    if config.accumulate > 1:
        fewer = Departure(computing=halvings(config.accumulate))
        yield dataclasses.replace(given, accumulate=1), fewer
    counts = [count for count in divisors(config.batch) if count > config.accumulate]
    found = [dataclasses.replace(given, accumulate=count) for count in counts]
    if found:
        # The fewest that fit, or else as many as there are sequences.
        first = next((each for each in found if question.fit(each) is Fit.SURE), found[-1])
        more = halvings(first.accumulate / config.accumulate)
        yield first, Departure(computing=more)
    batch = question.largest_batch(Fit.SURE) or given.accumulate
    if batch < config.batch:
        fewer = Departure(CLEAR * halvings(config.batch / batch))
        yield dataclasses.replace(given, batch=batch), fewer


def advice(question: Question) -> list[Change]:
    """What to change in a configuration that does not fit surely.

    First comes what fits, and of that what departs least from what was asked. Of what does not, it
    is what trains the same, and what needs least. All of it needs less: it is the single changes
    that do, and the combination that departs least.
    """
    # The same flags may be a change in two ways: once, as they depart least.
    found: dict[str, Change] = {}
    for change in working(question, single_changes(question)):
        other = found.get(change.flags)
        if helps(question, change) and (other is None or change.departure < other.departure):
            found[change.flags] = change
    whole = least_departure(question, Fit.SURE)
    if whole is None and question.fit() is Fit.NOT:
        whole = least_departure(question, Fit.SURE, Fit.CLOSE)
    if whole is not None:
        found.setdefault(whole.flags, whole)
    order = list(Fit)

    def place(change: Change) -> tuple[int, Departure, int]:
        need = question.need(change.given)
        fit = need.fit(question.device)
        departure = change.departure
        if fit is Fit.NOT:
            departure = Departure(int(not change.same))
        return order.index(fit), departure, need.total

    return sorted(found.values(), key=place)


def helps(question: Question, change: Change) -> bool:
    """Whether a change needs much less, or so much less that it surely fits."""
    need, size = question.need(change.given), question.need().total
    enough = need.fit(question.device) is Fit.SURE
    return need.total <= (size - 1 if enough else (1 - LEAST_SAVING) * size)
