"""States that earlier versions saved load, and training goes on from them as it would have."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import galore_optax
from tests import old_states

# An Orbax of the time of older ones restores nothing without shardings.
pytestmark = pytest.mark.since(jax="0.7")
LAYOUTS = {"0.1": 1}
VERSIONS = sorted(path.name for path in old_states.DIRECTORY.iterdir())
# The one that has codes, projectors in codes, and lazy refreshes is for every run of the tests.
QUICK = "Q-GaLore"
# How far off training may be. The round-off of another processor adds up to 6e-5, and of codes one
# may be its neighbour; a state that is lost is off by more than 0.2.
ROUND_OFF = 3e-4
TOLERANCE = {"8-bit": 1e-3, "Q-GaLore": 2e-2}


def restored(directory, case):
    """What an earlier version saved, as a run of this one."""
    target = jax.eval_shape(lambda: old_states.start(case))
    target["state"] = galore_optax.as_version(target["state"], LAYOUTS[directory.parent.name])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore((directory / "checkpoint").absolute(), target)
    return saved | {"state": galore_optax.migrate(saved["state"])}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "case",
    [
        case if case == QUICK else pytest.param(case, marks=pytest.mark.ci)
        for case in old_states.CASES
    ],
)
def test_training_goes_on_from_a_state_that_was_saved_by_an_earlier_version(version, case):
    directory = old_states.DIRECTORY / version / case
    saved = restored(directory, case)
    _, after = old_states.steps(case, saved, old_states.saved_at(case), old_states.STEPS)
    expected = np.load(directory / "after.npz")
    assert sorted(expected) == sorted(after)
    before = jax.device_get(galore_optax.dequantize_params(saved["params"]))
    for name, trajectory in after.items():
        # Relative to how far the parameters moved, which a state that was lost would change.
        moved = np.linalg.norm(expected[name] - before[name])
        assert moved > 0
        error = np.linalg.norm(trajectory - expected[name]) / moved
        assert error <= TOLERANCE.get(case, ROUND_OFF), name


def test_a_state_that_starts_anew_does_not_go_on_likewise():
    """What the test above compares would be far off without the state."""
    directory = old_states.DIRECTORY / VERSIONS[0] / QUICK
    start, saved = old_states.start(QUICK), restored(directory, QUICK)
    lost = {"params": saved["params"], "state": start["state"]}
    _, after = old_states.steps(QUICK, lost, old_states.SAVED_AT, old_states.STEPS)
    expected = np.load(directory / "after.npz")["kernel"]
    before = jax.device_get(saved["params"]["kernel"].dequantize())
    error = np.linalg.norm(after["kernel"] - expected) / np.linalg.norm(expected - before)
    assert error > 0.2
