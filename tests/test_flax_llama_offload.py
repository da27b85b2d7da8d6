"""Runs whose layers lie in the memory of the machine, and what the planner says of them."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax_llama_runs import tiny, write_text

from examples.flax_llama import memory
from examples.flax_llama.checksums import checksum
from examples.flax_llama.compile_step import planned_state
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import device_named
from examples.flax_llama.effects import check_effects
from examples.flax_llama.fit import Question
from examples.flax_llama.hosted import nbytes, offloaded
from examples.flax_llama.memory import check_machine, estimate
from examples.flax_llama.remedies import single_changes
from examples.flax_llama.sharding import make_mesh, replicated
from examples.flax_llama.train import train

pytestmark = pytest.mark.since(jax="0.8")

BOTH = ("moments", "weights")
VOCAB = 257


def config(**settings):
    return tiny("austen", **{"layerwise": True, "clip": 0.0} | settings).resolve()


@pytest.mark.long("four runs")
def test_a_run_goes_on_with_its_layers_in_the_other_memory(tmp_path):
    text = write_text(tmp_path)
    same = {"layerwise": True, "schedule": "constant", "warmup": 0.0, "clip": 1.0, "eval_every": 4}
    same |= {"optimizer": "galore_adamw_8bit", "eps": 1e-5, "update_proj_gap": 3}
    whole = train(tiny(text, steps=4, **same))
    expected = [record["loss"] for record in whole.train]
    for first, then in ((BOTH, ()), ((), BOTH)):
        out = tmp_path / "run"
        train(tiny(text, steps=2, out=out, offload=first, **same))
        result = train(tiny(text, steps=4, out=out, offload=then, resume=True, **same))
        assert [r["loss"] for r in result.train] == pytest.approx(expected, rel=1e-4)
        assert result.valid[-1]["valid_loss"] == pytest.approx(
            whole.valid[-1]["valid_loss"], rel=1e-4
        )
        shutil.rmtree(out)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_checksum_does_not_depend_on_the_memory(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    where = replicated(make_mesh()).with_memory_kind("pinned_host")
    on_host = jax.jit(checksum)(jax.device_put(array, where))
    assert int(on_host) == int(jax.jit(checksum)(array))


@pytest.mark.parametrize("offload", [("moments",), ("weights",), BOTH])
@pytest.mark.parametrize("optimizer", ["galore_adamw", "q_galore_adamw", "apollo_mini_adamw_8bit"])
def test_what_is_said_to_lie_in_the_machine_does(optimizer, offload):
    settings = config(optimizer=optimizer, offload=offload, hidden=64, intermediate=176)
    state = jax.tree.leaves(planned_state(settings, VOCAB, make_mesh()))
    there = [x for x in state if x.sharding.memory_kind == "pinned_host"]
    here = [x for x in state if x.sharding.memory_kind != "pinned_host"]
    found = estimate(settings, VOCAB)
    assert (found.host, found.arguments) == (nbytes(there), nbytes(here))


def test_what_an_update_copies():
    settings = config(offload=BOTH, accumulate=2, layers=4)
    own = offloaded(settings, VOCAB)
    layer = own.weights // 4
    # Two forward passes and one back fetch a layer more than there are; four are written.
    assert estimate(settings, VOCAB).moved == 2 * own.state + (3 * 5 + 4) * layer
    clipped = dataclasses.replace(settings, clip=1.0, inputs_every=2)
    # Another pass back, and in both the first layer of each pair once more.
    assert estimate(clipped, VOCAB).moved == 2 * own.state + (4 * 5 + 4 + 2 * 2) * layer
    kept = dataclasses.replace(settings, offload=(), inputs_memory="pinned_host")
    inputs = settings.batch * settings.seq * settings.hidden * 4 * settings.layers
    found = estimate(kept, VOCAB)
    assert (found.host, found.moved) == (inputs, 2 * inputs)


def test_more_than_the_machine_has_is_refused(monkeypatch):
    settings = config(offload=BOTH)
    check_machine(settings, VOCAB)
    monkeypatch.setattr(memory, "machine_memory", lambda: estimate(settings, VOCAB).host - 1)
    with pytest.raises(UsageError, match="What is to lie in the memory of the machine takes"):
        check_machine(settings, VOCAB)


def test_settings_that_cannot_work():
    with pytest.raises(UsageError, match="offload='moment'"):
        config(offload=("moment",))
    with pytest.raises(UsageError, match="has no effect without layerwise=True"):
        check_effects([Config(offload=BOTH)], Config())
    with pytest.raises(UsageError, match="optimizer='sgd' keeps none of the layers"):
        estimate(config(optimizer="sgd", offload=("moments",)), VOCAB)


def test_offload_is_among_the_changes_that_train_the_same():
    given = tiny("austen", optimizer="q_galore_adamw")
    question = Question(given, VOCAB, device_named("rtx4060ti_16gb"))
    found = [(c.offload, departure) for c, departure in single_changes(question) if c.offload]
    assert [offload for offload, _ in found] == [("moments",), BOTH]
    assert all(departure.training == 0 and departure.computing > 1 for _, departure in found)
