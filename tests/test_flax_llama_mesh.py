"""Training on a mesh: where everything lies, and the numbers of one device."""

import json
import re

import jax
import numpy as np
import pytest
from flax_llama_runs import (
    assert_same_losses,
    finish,
    start,
    tiny,
    without_checkpoints_after,
    write_text,
)

from examples.flax_llama import plan, sharding, step, train
from examples.flax_llama.compile_step import planned_state
from examples.flax_llama.config import Config, UsageError

SAVED, STEPS = 2, 4
# Of which each kernel has blocks enough for each device.
IN_BLOCKS = {"optimizer": "q_galore_adamw", "hidden": 32, "intermediate": 64, "rank": 8}
MESH, OTHER = "data=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"
# In a process with eight devices: a run on a mesh, and what goes on with it on another one.
RUNS = """
import sys
from pathlib import Path, PosixPath
import jax
from examples.flax_llama import sharding, train
from examples.flax_llama.config import Config

real = train.make_updates
def make_updates(run, compiled, state):
    own, whole = sharding.share(state.params["blocks"])
    assert own < 0.4 * whole, (own, whole)
    before = jax.tree.map(lambda x: x.sharding, state)
    state, stopped = real(run, compiled, state)
    after = jax.tree.map(lambda x: x.sharding, state)
    assert before == after
    return state, stopped
train.make_updates = make_updates
train.train(eval(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.long("runs on eight devices, and on one")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=[pytest.mark.ci, pytest.mark.both]),
        pytest.param(IN_BLOCKS | {"layerwise": True}, marks=pytest.mark.ci),
    ],
)
def test_a_run_on_a_mesh_has_the_losses_of_one_device_and_goes_on_on_another(
    text, tmp_path, settings
):
    """With a refresh before and after the checkpoint; the last part with layer-wise updates."""
    shared = {"steps": STEPS, "save_every": SAVED, "eval_every": STEPS, "update_proj_gap": SAVED}
    config = tiny(text, **shared, **settings, out=tmp_path / "one")
    train.train(config)
    on_mesh = tiny(text, **shared, **settings, out=tmp_path / "mesh", mesh=MESH)
    cache = tmp_path / "cache"
    finish(start("-c", RUNS, repr(on_mesh), devices=8, cache=cache))
    assert_same_losses(tmp_path / "mesh", tmp_path / "one")
    without_checkpoints_after(tmp_path / "mesh", SAVED)
    words = ["--out", tmp_path / "mesh", "--resume", "--mesh", OTHER, "--layerwise"]
    finish(start("-m", "examples.flax_llama.train", *words, devices=8, cache=cache))
    assert_same_losses(tmp_path / "mesh", tmp_path / "one")
    without_checkpoints_after(tmp_path / "mesh", SAVED)
    # The mesh is that of the run, until another one is given.
    with pytest.raises(UsageError, match=r"mesh='fsdp=4.* is 8 devices, and here are 1: choose"):
        train.train(train.from_command_line(["--out", str(tmp_path / "mesh"), "--resume"]))
    train.train(
        train.from_command_line(["--out", str(tmp_path / "mesh"), "--resume", "--mesh", "data=1"])
    )
    assert_same_losses(tmp_path / "mesh", tmp_path / "one")
    (*_, entry) = json.loads((tmp_path / "mesh" / "history.json").read_text())
    assert entry["changes"]["mesh"] == [MESH, "data=1"]


@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw", "q_galore_adamw", "fira_adamw"])
def test_of_a_large_model_each_device_of_eight_has_an_eighth(optimizer):
    settings = {"preset": "7b", "param_dtype": "bfloat16", "vocab_size": 32000}
    config = Config(optimizer=optimizer, **settings).resolve()
    for mesh in ("fsdp=4,tensor=2", "fsdp=8", "tensor=8"):
        own, whole = sharding.share(planned_state(config, 32000, sharding.planned_mesh(mesh)))
        assert whole / 8 <= own < 1.02 * whole / 8, mesh
    (own, _) = sharding.share(planned_state(config, 32000, sharding.planned_mesh("data=8")))
    assert own == whole


def names_of(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree.leaves_with_path(tree, is_leaf=sharding.is_quantized)
    }


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "lora", "lora_targets": "all"}, {"optimizer": "low_rank"}]
)
def test_every_matrix_of_a_model_is_in_the_table(settings):
    """Of every kernel one axis is divided over fsdp, and the other over tensor."""
    config = tiny("austen", **settings).resolve()
    params = jax.eval_shape(lambda: step.initial_params(config, config.shape(256)))
    mesh = sharding.planned_mesh(MESH)
    specs = names_of(sharding.parameter_specs(params, mesh))
    used = set()
    for name, shape in names_of(params).items():
        spec = specs[name]
        axes = [axis for axis in spec if axis]
        is_matrix = min(shape.shape[-2:]) > 4 and "norm" not in name
        of_low_rank = not is_matrix and "norm" not in name
        wanted = 2 if is_matrix else 1 if of_low_rank else 0
        assert (len(axes), "data" in axes) == (wanted, False), (name, spec)
        used |= {end for end in sharding.PARAMETERS if re.search(f"(^|/){end}$", name)}
    others = {end for end in sharding.PARAMETERS if "bias" in end}
    if settings:
        assert any("lora_a" in end or "a/kernel" in end for end in used)
    else:
        assert used == {end for end in sharding.PARAMETERS if "lora" not in end} - others


def test_what_an_axis_does_not_divide_is_whole():
    config = tiny("austen", hidden=18, heads=3, intermediate=45).resolve()
    params = jax.eval_shape(lambda: step.initial_params(config, config.shape(257)))
    specs = names_of(sharding.parameter_specs(params, sharding.planned_mesh(MESH)))
    P = jax.sharding.PartitionSpec
    assert specs["embed/embedding"] == P(None, "fsdp")
    assert specs["blocks/mlp/up/kernel"] == P(None, "fsdp", None)
    assert specs["blocks/mlp/down/kernel"] == P(None, None, "fsdp")
    assert specs["blocks/attention/q/kernel"] == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            "data=2,model=4",
            r"mesh='data=2,model=4': 'model=4' is not the size of an axis; expected",
        ),
        ("data", r"mesh='data': 'data' is not the size of an axis; expected sizes of data, fsdp"),
        ("data=0", r"'data=0' is not the size of an axis; .*, each at least 1"),
        ("data=2.0", r"'data=2.0' is not the size"),
        ("data=\u0662", r"'data=\u0662' is not the size"),
        ("data=2,", r"mesh='data=2,': '' is not the size"),
        ("data=2,data=2", r"mesh='data=2,data=2' has data twice"),
        ("data=2,fsdp=3", r"mesh='data=2,fsdp=3' is 6 devices, and here are 1: choose sizes whose"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_before_any_work(
    text, tmp_path, monkeypatch, mesh, message
):
    monkeypatch.setattr(train, "open_data", lambda **_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match=message):
        train.train(tiny(text, out=tmp_path / "out", mesh=mesh))
    assert not (tmp_path / "out").exists()


def test_a_batch_divides_over_data_and_fsdp_alone(text, monkeypatch):
    mesh = sharding.planned_mesh(MESH)
    monkeypatch.setattr(step, "make_mesh", lambda _: mesh)
    step.check_divides(tiny(text, batch=4, mesh=MESH).resolve())
    message = r"makes 6 sequences each, which do not divide among the 4 parts of mesh='.*': .* 8\."
    with pytest.raises(UsageError, match=message):
        step.check_divides(tiny(text, batch=12, accumulate=2, mesh=MESH).resolve())


class Device:
    """One of several processes' devices, for where the sequences of a batch lie."""

    def __init__(self, process):
        self.process_index = process


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        # Four processes of two devices.
        ({"data": 8}, 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "tensor": 4}, 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"tensor": 8}, 2, [(0, 1)] * 4),
        # Two of three, of which one device of each computes with the same sequences.
        ({"fsdp": 3, "tensor": 2}, 3, None),
    ],
)
def test_processes_read_what_their_devices_compute_with(monkeypatch, sizes, devices, expected):
    shape = [sizes.get(axis, 1) for axis in sharding.AXES]
    places = np.arange(np.prod(shape)).reshape(shape)
    parts = shape[0] * shape[1]

    class Rows:
        def devices_indices_map(self, counts):
            assert counts == (parts,)
            rows = {d: row for row, of_row in enumerate(places.reshape(parts, -1)) for d in of_row}
            by_process = {d: Device(d // devices) for d in rows}
            return {by_process[d]: (slice(row, row + 1),) for d, row in rows.items()}

    monkeypatch.setattr(sharding, "by_rows", lambda mesh: Rows())
    mesh = sharding.planned_mesh(",".join(f"{axis}={size}" for axis, size in sizes.items()))
    found = []
    for process in range(places.size // devices):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if expected is None:
            with pytest.raises(UsageError, match=r"^mesh='data=1,fsdp=3,tensor=2': the devices of"):
                sharding.part_of_data(mesh)
        else:
            found.append(sharding.part_of_data(mesh))
    assert found == (expected or [])


def test_a_plan_says_what_a_device_of_a_mesh_has(capsys):
    words = ["--preset", "60m", "--vocab-size", "32000", "--device", "t4_16gb"]
    plan.plan(plan.from_command_line([*words, "--mesh", "fsdp=4,tensor=2"]))
    (line,) = re.findall(r"On the mesh .*", capsys.readouterr().out)
    units = {"MiB": 1, "GiB": 1024}
    own, whole = (float(x) * units[unit] for x, unit in re.findall(r"([\d.]+) ([MG]iB)", line))
    assert own == pytest.approx(whole / 8, rel=0.02)
