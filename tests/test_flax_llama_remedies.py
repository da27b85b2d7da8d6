"""What the planner suggests, against all combinations tried one by one."""

import dataclasses
import itertools
import math
import shlex

import numpy as np
import pytest

from examples.flax_llama import plan, remedies
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import Here
from examples.flax_llama.fit import Fit, Question
from examples.flax_llama.remedies import Departure

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

VOCAB = 300
SHAPE = {"hidden": 32, "intermediate": 48, "layers": 3, "heads": 2, "seq": 16, "batch": 2}
STARTS = {
    "galore": {"rank": 3, "clip": 1.0},
    "adamw": {"optimizer": "adamw", "accumulate": 2, "remat": True, "clip": 0.0},
    "q_galore": {
        **{"optimizer": "q_galore_adamw", "rank": 6, "layerwise": True, "clip_by": "layer"},
        **{"dtype": "bfloat16", "clip": 1.0},
    },
}
# Whether it is in GaLore, has 8-bit moments, and is Q-GaLore.
TRAITS = {
    "adamw": (0, 0, 0),
    "adamw_8bit": (0, 1, 0),
    "galore_adamw": (1, 0, 0),
    "galore_adamw_8bit": (1, 1, 0),
    "q_galore_adamw": (1, 1, 1),
}


def question(size=0, **settings):
    device = Here("here", "this one", size, "made up", context=0, platform="cpu")
    return Question(Config(**SHAPE | settings), VOCAB, device)


def times_two(ratio):
    return math.ceil(abs(math.log2(ratio)))


def departure(asked, found):
    """As the documentation says."""
    differs = {
        name
        for name, value in vars(asked.resolve()).items()
        if value != getattr(found.resolve(), name)
    }
    traits = zip(TRAITS[asked.optimizer], TRAITS[found.optimizer], strict=True)
    training = sum(w * (a != b) for w, (a, b) in zip((4, 2, 2), traits, strict=True))
    weights = {"dtype": 1, "param_dtype": 2, "moment_dtype": 1, "inputs_dtype": 1, "tables": 2}
    training += sum(weights.get(n, 0) for n in differs)
    training += 2 if "clip" in differs else 1 if "clip_by" in differs else 0
    if TRAITS[found.optimizer][0]:
        training += 3 * times_two(asked.resolve().rank / found.resolve().rank)
    training += 2 * times_two(asked.batch / found.batch)
    computing = bool(differs & {"layerwise", "remat"}) + times_two(
        found.accumulate / asked.accumulate
    )
    return Departure(training, computing)


def lattice(asked):
    """All that is tried, one by one."""
    config = asked.resolve()
    how = [(config.layerwise, config.remat, None), (False, True, None)]
    how += [(True, config.remat, inputs) for inputs in (None, "int8")]
    clips = [(config.clip, config.clip_by), (1.0, "global"), (1.0, "layer"), (0.0, "global")]
    if config.clip == 0:
        clips = clips[:2]
    ranks = [config.rank >> n for n in range(config.rank.bit_length())]
    counts = {n: [k for k in range(1, n + 1) if n % k == 0] for n in range(1, config.batch + 1)}
    rows = [(n, k) for n, divisors in counts.items() for k in divisors]
    names = [(n, "adam") for n in TRAITS if TRAITS[n][0] or not TRAITS[config.optimizer][0]]
    names += [("q_galore_adamw", "factored")]
    axes = {
        "how": dict.fromkeys(how),
        "clips": dict.fromkeys(clips),
        "dtype": {config.dtype, "bfloat16"},
        "param_dtype": {config.param_dtype, "bfloat16"},
        "moment_dtype": (None, "bfloat16"),
        "optimizer": names,
        "rank": ranks,
        "rows": rows,
    }
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        if not TRAITS[settings["optimizer"][0]][0]:
            if settings["rank"] != config.rank:
                continue
            # A rank that is given has an effect in GaLore only.
            settings["rank"] = asked.rank
        for names, pair in (
            (("layerwise", "remat", "inputs_dtype"), settings.pop("how")),
            (("optimizer", "tables"), settings.pop("optimizer")),
            (("clip", "clip_by"), settings.pop("clips")),
            (("batch", "accumulate"), settings.pop("rows")),
        ):
            settings |= dict(zip(names, pair, strict=True))
        yield dataclasses.replace(asked, **settings)


@pytest.fixture(
    scope="module",
    params=[
        # From which four times as many combinations are tried.
        pytest.param("adamw", marks=pytest.mark.ci),
        "q_galore",
    ],
)
def everything(request):
    """A question, and the need and the departure of all that is tried."""
    asked = question(**STARTS[request.param])
    found = []
    for given in lattice(asked.given):
        try:
            found.append((asked.need(given), departure(asked.given, given)))
        except UsageError:
            continue
    return asked, found


def test_the_combination_that_departs_least_is_found_whatever_the_size(everything):
    asked, found = everything
    least = min(need.total for need, _ in found)
    most = asked.need().most
    sizes = np.linspace(min(need.most for need, _ in found) - 1, most - 1, 12).astype(int)
    seen = set()
    for size in [*sizes, most]:
        one = dataclasses.replace(asked, device=question(int(size)).device)
        fitting = [far for need, far in found if need.fit(one.device) is Fit.SURE]
        change = remedies.least_departure(one, Fit.SURE)
        if not fitting:
            assert change is None
            assert remedies.least_need(one)[1].total == least
            continue
        assert change.departure == min(fitting) == departure(asked.given, change.given)
        assert one.fit(change.given) is Fit.SURE
        seen.add(change.departure)
    # Not once the same.
    assert len(seen) > 4
    assert Departure() in seen


def test_what_fits_is_found_wherever_the_search_begins(everything):
    asked, _ = everything
    rng = np.random.default_rng(0)
    starts = [given for given in lattice(asked.given) if works(asked, given)]
    change = min(starts, key=lambda given: asked.need(given).total)
    device = question(asked.need(change).most).device
    for i in rng.choice(len(starts), 8, replace=False):
        start = dataclasses.replace(asked, given=starts[i], device=device)
        assert remedies.least_departure(start, Fit.SURE) is not None, starts[i]


def works(asked, given):
    try:
        asked.need(given)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_smaller_batch_is_the_largest_that_fits(accumulate):
    # Of so many layers the inputs need most, whatever the micro-batches are.
    asked = question(layerwise=True, batch=12, accumulate=accumulate, rank=2, layers=64)
    for batch in range(accumulate, 10, accumulate):
        enough = asked.need(dataclasses.replace(asked.given, batch=batch)).most
        one = dataclasses.replace(asked, device=question(enough).device)
        found, far = min(remedies.rows(one, one.given, {Fit.SURE}), key=lambda each: each[1])
        assert found == dataclasses.replace(asked.given, batch=batch)
        assert far == Departure(2 * times_two(12 / batch), 0)


LARGE = [
    pytest.param("--preset 7b --vocab-size 32000 --memory 40", marks=pytest.mark.ci),
    pytest.param("--preset 7b --vocab-size 32000 --device rtx3090_24gb", marks=pytest.mark.ci),
    pytest.param("--preset 7b --vocab-size 32000 --device rtx4090_24gb", marks=pytest.mark.ci),
    "--preset 13b --device t4_16gb",
]


def test_each_change_is_named_once():
    words = "--preset llama-3.1-8b --optimizer q_galore_adamw --layerwise --projector rows"
    asked = plan.from_command_line([*words.split(), "--device", "rtx4060ti_16gb", "--batch", "1"])
    one = plan.question_of(asked.run, plan.chosen_device(asked.device, asked.memory))
    flags = [change.flags for change in remedies.advice(one)]
    assert "--tables factored" in flags
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("words", LARGE)
def test_a_published_recipe_is_made_to_fit_a_small_card(words):
    asked = plan.from_command_line(words.split())
    one = plan.question_of(asked.run, plan.chosen_device(asked.device, asked.memory))
    assert one.fit() is Fit.NOT
    first = remedies.advice(one)[0]
    again = plan.from_command_line([*words.split(), *shlex.split(first.flags)]).run
    assert again == first.given
    assert one.fit(again) is Fit.SURE
    printed = plan.suggestions(one, [first])
    assert "Nothing" not in printed
    far = "(Rank 128 is 1/40 of the hidden size" in printed
    assert far == ("--rank 128" in first.flags) == ("13b" in words)


def test_what_conflicts_with_a_remedy_is_taken_back():
    asked = question(moment_dtype="bfloat16", projector_dtype="float32", int8_weights=False)
    found = [g for g, _ in remedies.alone(asked) if g.optimizer == "q_galore_adamw"]
    for given, tables in zip(found, ("adam", "factored"), strict=True):
        wanted = Config(**SHAPE, optimizer="q_galore_adamw", tables=tables).resolve()
        assert dataclasses.replace(given.resolve(), by_default=wanted.by_default) == wanted


def test_what_is_close_is_not_called_enough():
    asked = question(**STARTS["galore"])
    _, need = remedies.least_need(asked)
    one = dataclasses.replace(asked, device=question((need.least + need.most) // 2).device)
    change = remedies.advice(one)[0]
    assert one.fit(change.given) is Fit.CLOSE
    assert "Nothing that was tried fits surely." in plan.suggestions(one, remedies.advice(one))
    beyond = dataclasses.replace(asked, device=question(need.least - 1).device)
    printed = plan.suggestions(beyond, remedies.advice(beyond))
    assert "Nothing that was tried is enough, in any combination: --remat, --layerwise" in printed
