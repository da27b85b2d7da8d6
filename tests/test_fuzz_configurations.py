"""The search over configurations finds nothing, and finds what is wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from benchmarks import fuzz_compiled, fuzz_layerwise, fuzz_search
from benchmarks import fuzz_uncompiled as uncompiled
from benchmarks.fuzz_clear import Configuration, check_clear
from benchmarks.fuzz_configurations import KINDS, Kind, try_case
from benchmarks.fuzz_search import Wrong

SEED = 18
CONFIGURATION = Configuration(
    "{'kernel': array(4, 6), 'bias': array(6)}", "galore_optax.galore_adamw(1e-2, rank=2)"
)
LAYERS = fuzz_layerwise.Layers(
    "{'blocks': {'scale': array(2, 4), 'up': array(2, 4, 4), 'down': array(2, 4, 4)}, "
    "'embed': array(7, 4), 'norm': array(4)}",
    "galore_optax.galore_adamw(1e-2, rank=2, weight_dimension_numbers=DimensionNumbers(-2, -1))",
)


@pytest.mark.parametrize("number", range(25))
def test_a_configuration_trains_or_is_refused_in_one_clear_error(number):
    assert not try_case(SEED, number)[1]


@pytest.mark.plain
@pytest.mark.parametrize(("kind", "count"), [("arguments", 80), ("wrappers", 25), ("views", 100)])
def test_what_is_not_compiled_is_right_or_refused_in_one_clear_error(kind, count):
    wrong = {number: try_case(SEED, number, [kind])[1] for number in range(count)}
    assert not {number: said for number, said in wrong.items() if said}


def faulty(monkeypatch, change_init=lambda state: state, change_update=lambda u, s: (u, s)):
    """Plants a fault in all transformations that configurations make."""
    make = Configuration.make_tx

    def make_tx(self, params):
        tx = make(self, params)
        return optax.GradientTransformationExtraArgs(
            lambda params: change_init(tx.init(params)),
            lambda *args, **extra: change_update(*tx.update(*args, **extra)),
        )

    monkeypatch.setattr(Configuration, "make_tx", make_tx)


def test_the_planted_faults_are_the_only_ones():
    assert fuzz_compiled.check(CONFIGURATION) == "trained"
    assert fuzz_layerwise.check(LAYERS) == "trained, and compared"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda u, s: (jax.tree.map(lambda x: x.astype(jnp.float16), u), s), "float16"),
        (lambda u, s: (jax.tree.map(lambda x: x[None], u), s), "right"),
        (lambda u, s: (jax.tree.map(lambda x: x * jnp.nan, u), s), "finite"),
        (lambda u, s: (list(u.values()), s), "structure"),
        (lambda u, s: (u, s._replace(step=s.step.astype(jnp.float32))), "step is float32"),
        (
            lambda u, s: (
                jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else 2 * x, u),
                s,
            ),
            "compiled, and",
        ),
    ],
    ids=["dtype", "shape", "NaN", "structure", "state", "compiled otherwise"],
)
def test_the_search_finds_faults_of_updates(monkeypatch, change, says):
    faulty(monkeypatch, change_update=change)
    with pytest.raises(Wrong, match=says):
        fuzz_compiled.check(CONFIGURATION)


def test_the_search_finds_a_second_compilation(monkeypatch):
    # A number of Python is an array of a weak type, and what an update makes of it is not.
    faulty(
        monkeypatch,
        lambda state: state._replace(step=jnp.asarray(0)),
        lambda updates, state: (updates, state._replace(step=state.step.astype(jnp.int32))),
    )
    with pytest.raises(Wrong, match="compiled 2 times"):
        fuzz_compiled.check(CONFIGURATION)


@pytest.mark.parametrize("way", ["_through_msgpack", "_through_orbax"])
@pytest.mark.parametrize("fault", ["numbers", "error"])
def test_the_search_finds_a_state_that_does_not_come_back(monkeypatch, way, fault):
    def back(state, fresh):
        if fault == "numbers":
            return fresh
        if isinstance(state, galore_optax.GaloreState):
            raise KeyError("subspace")
        return state

    back.__name__ = way
    monkeypatch.setattr(fuzz_compiled, "_through_msgpack", lambda state, fresh: state)
    monkeypatch.setattr(fuzz_compiled, way, back)
    with pytest.raises(Wrong, match=f"not saved {way}" if fault == "error" else "other numbers"):
        fuzz_compiled.check(CONFIGURATION)


def test_the_search_finds_a_layer_that_goes_elsewhere(monkeypatch):
    def twice_in_stacks(updates, state):
        return jax.tree.map(lambda x: 2 * x if x.shape[0] == 2 else x, updates), state

    faulty(monkeypatch, change_update=twice_in_stacks)
    with pytest.raises(Wrong, match="layer by layer, and by"):
        fuzz_layerwise.check(LAYERS)


@pytest.mark.since(jax="0.8")
def test_the_search_finds_layers_that_come_to_another_memory(monkeypatch):
    layers = dataclasses.replace(LAYERS, arguments="offload=('moments', 'weights')")
    assert fuzz_layerwise.check(layers) == "trained, and compared"
    train = fuzz_layerwise._train

    def forgets(*args):
        (params, *rest), device = train(*args), jax.memory.Space.Device
        return jax.device_put(params, device), *rest

    monkeypatch.setattr(fuzz_layerwise, "_train", forgets)
    with pytest.raises(Wrong, match="came to 'device' from 'pinned_host'"):
        fuzz_layerwise.check(layers)


@pytest.mark.plain
@pytest.mark.parametrize("error", [KeyError("kernel"), AssertionError(), ValueError("no words")])
def test_the_search_finds_an_error_that_is_not_in_words_of_ours(monkeypatch, error):
    def fails(state):
        raise error

    faulty(monkeypatch, fails)
    with pytest.raises(Wrong, match=r"a bare (Key|Assertion)Error|not in words of this library"):
        uncompiled.check(CONFIGURATION)


@pytest.mark.plain
def test_the_search_finds_an_argument_of_which_nothing_is_said(monkeypatch):
    monkeypatch.setattr("galore_optax._arguments.RULES", {})
    said = [try_case(SEED, number, ["arguments"])[1] for number in range(60)]
    assert any(wrong and "nothing is said of" in wrong for wrong in said)


@pytest.mark.plain
def test_the_search_finds_an_error_that_names_another_argument():
    with pytest.raises(ValueError, match="rank must be positive") as caught:
        galore_optax.galore(optax.sgd(0.1), rank=0)
    check_clear(caught.value, "rank")
    with pytest.raises(Wrong, match="an error without 'seed'"):
        check_clear(caught.value, "seed")


@pytest.mark.plain
def test_the_search_finds_moments_of_another_shape(monkeypatch):
    axes = "galore_optax._select._axes"
    monkeypatch.setattr(axes, lambda given, ndim: (given,) if isinstance(given, int) else given)
    said = [try_case(SEED, number, ["views"])[1] for number in range(40)]
    assert any(said)


def test_what_goes_wrong_without_galore_as_well_is_none_of_ours():
    around = "optax.inject_hyperparams(lambda rate: optax.chain(TX, optax.scale(rate)))(0.1)"
    # In float16, which the rate is not in, since the other leaf is in float32.
    params = "{'kernel': array(4, 6, dtype='float16'), 'other': array(1)}"
    configuration = Configuration(params, CONFIGURATION.tx, around, plain="optax.adamw(1e-3)")
    assert fuzz_compiled.check(configuration) == "as in Optax"
    with pytest.raises(Wrong, match="float16"):
        fuzz_compiled.check(Configuration(params, CONFIGURATION.tx, around))


@pytest.fixture
def wrong_ranks(monkeypatch):
    """A search in which each configuration with a rank is wrong."""

    def check(configuration):
        if "rank=" in configuration.tx:
            raise Wrong("it has a rank")
        return "taken"

    monkeypatch.setitem(KINDS, "arguments", Kind(uncompiled.calls(), check))


@pytest.mark.plain
@pytest.mark.usefixtures("wrong_ranks")
def test_a_case_is_the_same_in_any_search(tmp_path):
    def case(seed, number):
        return try_case(seed, number, ["arguments"])

    whole = fuzz_search.search(case, 3, 30, tmp_path / "whole.json")
    fuzz_search.search(case, 3, 11, tmp_path / "parts.json")
    parts = fuzz_search.search(case, 3, 30, tmp_path / "parts.json")
    assert whole.failed == parts.failed
    assert 0 < len(whole.failed) < 30
    assert whole.kinds == parts.kinds
    last = whole.failed[-1]
    assert case(3, last["number"]) == (last["kind"], last["wrong"])


@pytest.mark.plain
@pytest.mark.usefixtures("wrong_ranks")
def test_a_failure_says_what_to_run_and_becomes_smaller():
    failed = [
        (number, wrong)
        for number in range(20)
        if (wrong := try_case(SEED, number, ["arguments"])[1])
    ]
    # A configuration that can be made, whose rank is all that is wrong.
    right = [each for each in failed if "is wrong" not in each[1]]
    number, wrong = max(right, key=lambda each: len(each[1]))
    _, smaller = try_case(SEED, number, ["arguments"], shrink=True)
    assert len(smaller) < len(wrong)
    assert "rank=" in smaller
    code = wrong[wrong.index("from benchmarks") :]
    names = {}
    exec(code, names)
    assert callable(names["tx"].init)
