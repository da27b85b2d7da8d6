"""What a run's directory refuses, and what damaged or unfitting checkpoints come to."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_llama_runs import (
    assert_same_end,
    finish,
    metrics,
    saved_arrays,
    start,
    tiny,
    write_text,
)

import galore_optax
from examples.flax_llama import (
    changes,
    checkpoint,
    checksums,
    optimizers,
    run_directory,
    run_log,
    step,
    train,
)
from examples.flax_llama.beginning import begin
from examples.flax_llama.checkpoint import CheckpointError, Checkpoints
from examples.flax_llama.config import UsageError
from examples.flax_llama.evaluate import Evaluation
from examples.flax_llama.loading import load_run


def anywhere():
    """Some data, to save a position in."""
    return iter(grain.MapDataset.range(9).to_iter_dataset())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run with checkpoints after 4, 8 and 12 updates."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(text, steps=12, eval_every=4, update_proj_gap=3, keep=3, out=out)
    return config, train.train(config)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run, to damage and to resume."""
    config, _ = finished
    shutil.copytree(config.out, tmp_path / "run")
    return dataclasses.replace(config, out=tmp_path / "run", resume=True)


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def steps(config):
    return sorted(int(path.name) for path in (config.out / "checkpoints").iterdir())


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.fixture(scope="module")
def watched(text, tmp_path_factory):
    """A run whose losses are given, and at each evaluation who has its directory locked."""
    losses, holders = iter([3.0, 2.0, 2.5, 2.7, 2.6]), []
    out = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(text, optimizer="sgd", steps=10, eval_every=2, save_every=3, keep=2, out=out)

    def evaluate(*_):
        with open(out / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holders.append(file.read())
        return Evaluation(loss=next(losses), standard_error=0.1, tokens=9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_evaluate", lambda *_: evaluate)
        train.train(config)
    return config, holders


def test_the_last_checkpoints_and_the_best_are_kept(watched):
    config, _ = watched
    # Saved: 3, 6, 9 as asked, 2 and 4 as the best so far, 10 as the last.
    assert steps(config) == [4, 9, 10]
    with Checkpoints(config.out, read_only=True) as checkpoints:
        assert (checkpoints.find("best"), checkpoints.find("last")) == (4, 10)
        assert checkpoints.find("9") == checkpoints.find(9) == 9


def test_losses_over_other_tokens_are_not_compared(tmp_path):
    """Those before the second update are lower, which says nothing."""
    state = step.State({"p": jax.numpy.ones(2)}, {"m": jax.numpy.ones(2)})
    for since, losses in {0: {1: 2.0}, 1: {2: 3.0, 3: 3.5}}.items():
        with Checkpoints(tmp_path, validated_since=since) as checkpoints:
            for number, loss in losses.items():
                checkpoints.save(number, state, anywhere(), {}, loss)
            checkpoints.wait()
            assert (checkpoints.improves(3.2), checkpoints.improves(1.9)) == (False, True)
    assert checkpoints.steps == [2, 3]
    assert checkpoints.find("best") == 2


def test_a_run_is_locked_while_it_trains_and_no_longer(watched):
    config, holders = watched
    assert holders == [f"{os.getpid()}\n"] * 5
    with run_directory.lock(config.out):
        pass


def test_the_final_checkpoint_is_the_trained_model(finished):
    config, result = finished
    model, tokenizer = load_run(config.out)
    assert model.config == result.model.config
    jax.tree.map(np.testing.assert_array_equal, params_of(model), params_of(result.model))
    assert tokenizer.to_bytes() == result.tokenizer.to_bytes()
    earlier, _ = load_run(config.out, 4)
    expected = saved_arrays(config.out, 4)["params['norm']['scale']"]
    np.testing.assert_array_equal(params_of(earlier)["norm"]["scale"], expected)
    assert (expected != params_of(model)["norm"]["scale"]).any()


@pytest.mark.parametrize("step", [5, "first"])
def test_checkpoints_that_are_not_there_are_listed(finished, step):
    config, _ = finished
    message = rf"^step={step}: there is no such checkpoint in .*run/checkpoints; .* of 4, 8, 12\.$"
    with pytest.raises(UsageError, match=message):
        load_run(config.out, step)


def test_where_there_is_no_checkpoint_or_none_that_was_evaluated_it_is_said(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UsageError, match=rf"^There is no checkpoint in {tmp_path} yet\.$"):
            checkpoints.find("last")
        state = step.State({"p": jax.numpy.ones(2)}, {"m": jax.numpy.ones(2)})
        checkpoints.save(7, state, anywhere(), {})
        checkpoints.wait()
        message = r"^step='best': no checkpoint in .* has a validation loss yet; .*, 7, are named"
        with pytest.raises(UsageError, match=message):
            checkpoints.find("best")


def test_what_is_no_run_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match=r"is not the directory of a run: it has no config.json"):
        load_run(tmp_path)
    with pytest.raises(UsageError, match="holds no run to resume: leave out resume=True"):
        train.train(tiny(text, out=tmp_path, resume=True))


def test_a_finished_run_is_resumed_to_its_end_at_once(copy, finished):
    before = contents(copy.out / "checkpoints")
    result = train.train(copy)
    assert contents(copy.out / "checkpoints") == before
    assert result.train == finished[1].train
    assert result.valid == finished[1].valid


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory):
    """That run resumed after 8 updates, with more records, and with settings that may change."""
    out = shutil.copytree(finished[0].out, tmp_path_factory.mktemp("resumed") / "run")
    (out / "checkpoints" / "12").rename(out / "moved out")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # as a run leaves it that is killed while writing
    changes = {"save_every": 1, "keep": 5, "quiet": False, "tensorboard": True}
    config = dataclasses.replace(finished[0], out=out, resume=True, **changes)
    train.train(config)
    return config


def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(resumed, finished):
    """Records beyond the checkpoint are made again, not twice."""
    assert_same_end(finished[0].out, resumed.out, 12)


def test_settings_without_a_part_in_the_result_may_change(resumed):
    assert steps(resumed) == [8, 9, 10, 11, 12]


def test_a_run_that_ends_before_its_first_checkpoint_starts_from_the_beginning(
    text, tmp_path, monkeypatch
):
    """Wherever it ends, again and again, with what it leaves then."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    config = tiny(text, optimizer="sgd", steps=2, eval_every=2, out=tmp_path / "run")
    for function in ("write_settings", "Checkpoints", "open_log"):
        monkeypatch.setattr(train, function, killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
        monkeypatch.undo()
        is_run = (config.out / "config.json").exists()
        assert is_run == (function != "write_settings")
        config = dataclasses.replace(config, resume=is_run)
    update = train.RunLog.update

    def killed_after_two(log, step, values):
        update(log, step, values)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.RunLog, "update", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    monkeypatch.undo()
    before = metrics(config.out)
    assert [record["step"] for record in before] == [1]
    train.train(config)
    after = metrics(config.out)
    assert after[:1] == before
    assert [record["step"] for record in after if "loss" in record] == [1, 2]
    assert steps(config) == [2]


HOLD = """
import fcntl, os, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print(os.getpid(), file=file, flush=True)
    print(flush=True)
    sys.stdin.read()
"""


def test_a_directory_in_use_is_refused_with_the_process_that_uses_it(copy):
    command = [sys.executable, "-c", HOLD, copy.out / "lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        before = contents(copy.out)
        for resume in (True, False):
            with pytest.raises(UsageError, match=rf"run is in use by process {process.pid}\."):
                train.train(dataclasses.replace(copy, resume=resume))
        assert contents(copy.out) == before
    with run_directory.lock(copy.out):
        pass


@pytest.mark.long("its run has another rank, which is compiled for it alone")
@pytest.mark.ci
def test_another_rank_keeps_parameters_data_and_schedule_alone(copy, finished):
    shutil.rmtree(copy.out / "checkpoints" / "12")
    train.train(dataclasses.replace(copy, rank=2, save_every=9))
    before, after = metrics(finished[0].out), metrics(copy.out)
    rates = [[r["lr"] for r in records if "lr" in r] for records in (before, after)]
    assert rates[0] == rates[1]
    # The first update's loss and gradient are those of the same parameters on the same tokens.
    ninth = [
        next(r for r in records if r["step"] == 9 and "loss" in r) for records in (before, after)
    ]
    assert ninth[0]["loss"] == pytest.approx(ninth[1]["loss"], rel=1e-6)
    assert ninth[0]["grad_norm"] == pytest.approx(ninth[1]["grad_norm"], rel=1e-5)
    assert ninth[0]["update_norm"] != pytest.approx(ninth[1]["update_norm"], rel=1e-2)
    saved = saved_arrays(copy.out, 9)
    name = next(k for k in saved if "'mu'" in k and "down" in k)
    assert saved[name].shape[-1] == 2 or saved[name].shape[-2] == 2
    moments = saved_arrays(copy.out, 9)
    counts = {k: int(v) for k, v in moments.items() if v.ndim == 0}
    assert sorted(counts.values()) == [1, 2, 9, 9]  # Adam's, a version, the schedule's, GaLore's
    assert json.loads((copy.out / "config.json").read_text())["train"]["rank"] == 2
    # From here on it is a run of rank 2.
    assert begin(dataclasses.replace(copy, rank=2, save_every=9).resolve()).changes == {}


def test_the_command_line_takes_what_is_not_given_from_the_run(copy):
    given = ["--out", str(copy.out), "--resume"]
    assert train.from_command_line(given) == dataclasses.replace(copy, resume=True).resolve()
    assert train.from_command_line([*given, "--keep", "7"]).keep == 7


@pytest.mark.parametrize("item", ["params", "optimizer", "data", "settings"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named_with_what_to_do_and_nothing_is_lost(copy, item, damage):
    broken = copy.out / "checkpoints" / "12"
    if damage == "missing":
        shutil.rmtree(broken / item)
    else:
        for path in (broken / item).rglob("*"):
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
    before = contents(copy.out)
    message = (
        rf"checkpoint {re.escape(str(broken))} cannot be read \(.+\)\. To go on from update 8, "
        "move that directory out of .*checkpoints first; nothing has been changed"
    )
    with pytest.raises(UsageError, match=message):
        train.train(copy)
    assert contents(copy.out) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "uint8", "int32", "bool"])
def test_a_checksum_changes_with_any_bit_and_with_the_order(dtype):
    rng = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        x = np.asarray(jnp.asarray(rng.integers(0, 2, (5, 4)), dtype))
        expected = checksums.checksums({"x": jnp.asarray(x)})
        changed = []
        for place in np.ndindex(x.shape):
            other = x.copy()
            view = other.view(bool if dtype == "bool" else np.uint8)
            width = view.shape[-1] // x.shape[-1]
            view[place[0], place[1] * width + width - 1] ^= 1
            changed.append(checksums.checksums({"x": jnp.asarray(other)}))
        assert expected not in changed
        assert checksums.checksums({"x": jnp.asarray(x[::-1])}) != expected
        with pytest.raises(ValueError, match=r"^x is not what was saved: its checksum is another"):
            checksums.check(checksums.checksums({"x": jnp.asarray(other)}), expected)


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_a_bit_that_flipped_on_disk_is_found_and_its_array_named(copy, item):
    """The files hold compressed numbers, most of whose bits make another number when they flip."""
    broken = copy.out / "checkpoints" / "12"
    largest = max((broken / item).glob("**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    message = (
        rf"checkpoint {re.escape(str(broken))} cannot be read \({item}/\S+ is not what was saved"
        r".*: its checksum is another\). To go on from update 8, move"
    )
    with pytest.raises(UsageError, match=message):
        train.train(copy)
    if item == "params":
        with pytest.raises(UsageError, match="its checksum is another"):
            load_run(copy.out)


def flip_a_digit(path):
    """Makes another number of the last digit of a file, by one bit."""
    content = bytearray(path.read_bytes())
    place = max(i for i, byte in enumerate(content) if chr(byte).isdecimal())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("item", ["data/process_0-of-1.json", "settings/metadata"])
def test_a_number_that_flipped_in_json_is_found_and_named(copy, item):
    broken = copy.out / "checkpoints" / "12"
    flip_a_digit(broken / item)
    name = item.removesuffix("/metadata")
    message = rf"{re.escape(str(broken))} cannot be read \({name} is not what was saved.*update 8,"
    with pytest.raises(UsageError, match=message):
        train.train(copy)


def test_a_damaged_loss_chooses_no_best_checkpoint(copy):
    broken = copy.out / "checkpoints" / "12" / "metrics" / "metrics"
    flip_a_digit(broken)
    with pytest.raises(UsageError, match=r"step='best': .*12/metrics is damaged.*: .*12\."):
        load_run(copy.out, "best")
    load_run(copy.out)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(copy, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "there")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", denied)
    with pytest.raises(
        UsageError, match=r"12 cannot be read: Permission denied .* been changed\.$"
    ):
        train.train(copy)


@pytest.fixture(scope="module")
def eight_bit(text, tmp_path_factory):
    """A checkpoint in few bits, of a vocabulary whose moments are large enough for codes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = tiny(text, optimizer="q_galore_adamw", vocab_size=512, steps=1, out=out).resolve()
    shape = config.shape(512)

    def initial_state():
        params = step.initial_params(config, shape)
        return step.State(params, optimizers.make_optimizer(config).init(params))

    zeros = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), jax.eval_shape(initial_state)
    )
    out.mkdir()
    run_directory.write_settings(out, config, shape)
    dataset = train.open_dataset(config)
    with Checkpoints(out) as checkpoints:
        checkpoints.save(1, zeros, dataset.train, changes.settings_of(config))
    dataset.train.close()
    (out / "lock").touch()  # as any run leaves it
    with run_directory.lock(out):
        return dataclasses.replace(config, resume=True)


def other_bits(**low_bit):
    def inner(config, schedule):
        return galore_optax.low_bit(optimizers.adamw(config, schedule), **low_bit)

    return other_projectors("int4", inner)


def other_projectors(dtype, inner=optimizers.adamw_8bit):
    def make(config, schedule):
        config = dataclasses.replace(config, projector_dtype=dtype)
        return optimizers.in_galore(inner)(config, schedule)

    return make


OTHERS = {
    "block_size": (other_bits(block_size=64), r"mu/embed/embedding/scales is float32\[.*\], and"),
    "bits": (
        other_bits(bits=16),
        r"mu/embed/embedding is codes uint8.*, scales .*, and should be bfloat16\[512",
    ),
    "projector_bits": (
        other_projectors("int8"),
        r"left/blocks/.*/kernel/codes is uint8\[2, 32\], and should be uint8\[2, 64\]",
    ),
    "projector_dtype": (
        other_projectors("float32"),
        r"left/blocks/.*/kernel is codes uint8.*, zeros .*, and should be float32\[2, 16, 4\]",
    ),
    "names": (
        other_bits(names={"mu": None}),
        r"mu/embed/embedding is codes uint8.*, and should be float32\[512, 16\]",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_other_bits_or_blocks_names_the_leaf(eight_bit, monkeypatch, name):
    """As another version of the library, or of the application, may have them."""
    optimizer, message = OTHERS[name]
    monkeypatch.setitem(optimizers.OPTIMIZERS, "q_galore_adamw", optimizer)
    read = []
    restore = checkpoint.ocp.CheckpointManager.restore

    def counting(self, *arguments, **keywords):
        read.append(keywords["args"].keys())
        return restore(self, *arguments, **keywords)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", counting)
    before = contents(eight_bit.out)
    with pytest.raises(UsageError, match=f"1/optimizer does not fit: .*{message}"):
        train.train(eight_bit)
    assert contents(eight_bit.out) == before
    assert all(keys <= {"settings", "checksums"} for keys in read)


def test_a_model_of_another_shape_names_the_leaf(finished):
    config, result = finished
    params = params_of(result.model)
    like = jax.eval_shape(lambda: params | {"norm": {"scale": np.ones(8)}, "more": np.ones(3)})
    with Checkpoints(config.out, read_only=True) as checkpoints:
        with pytest.raises(UsageError, match=r"params does not fit: more is absent, and should"):
            checkpoints.restore_params(12, like)
        del like["more"]
        with pytest.raises(UsageError, match=r"norm/scale is float32\[16\], and should be .*\[8\]"):
            checkpoints.restore_params(12, like)
        del like["norm"]
        with pytest.raises(UsageError, match=r"norm/scale is float32.*, and should be absent"):
            checkpoints.restore_params(12, like)


@pytest.mark.ci
def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_whole(copy, monkeypatch):
    shutil.rmtree(copy.out / "checkpoints" / "12")
    before = contents(copy.out / "checkpoints")
    config = dataclasses.replace(copy, save_every=1)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", fail)
    message = r"^the checkpoint after update 9 could not be written: the disk is full\. Whole "
    with pytest.raises(
        CheckpointError, match=message + r"checkpoints in .*run/checkpoints: 4, 8\.$"
    ):
        train.train(config)
    assert contents(copy.out / "checkpoints") == before


def test_a_full_disk_is_told_whatever_file_meets_it(copy, monkeypatch):
    """With the checkpoints that there are to go on from, and what is there can be gone on with."""
    shutil.rmtree(copy.out / "checkpoints" / "12")
    write = run_log.RunLog._write

    def full(log, record):
        if record["step"] == 10:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            error.filename = str(log._path)
            raise error
        write(log, record)

    monkeypatch.setattr(run_log.RunLog, "_write", full)
    message = (
        r"run/metrics\.jsonl: the disk is full\. Whole checkpoints in .*run/checkpoints: 4, 8\.$"
    )
    with pytest.raises(CheckpointError, match=message):
        train.train(copy)
    monkeypatch.undo()
    train.train(copy)
    assert steps(copy) == [4, 8, 12]


FULL = pathlib.Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="of Linux")
@pytest.mark.parametrize("name", ["lock", "config.json", "data.json", "history.json"])
def test_a_full_disk_is_told_of_each_file_that_a_resumed_run_writes(copy, tmp_path, name):
    """Each is in turn one that cannot grow; a new place of the data is written to three of them."""
    if name == "lock":
        (copy.out / name).unlink()
    (copy.out / (name if name == "lock" else f"{name}.partial")).symlink_to(FULL)
    text = shutil.copy(copy.data, tmp_path)
    message = (
        rf"^{copy.out}/{name}: the disk is full\. Whole checkpoints in "
        rf"{copy.out}/checkpoints: 4, 8, 12\.$"
    )
    before = (copy.out / "config.json").read_text()
    with pytest.raises(CheckpointError, match=message):
        train.train(dataclasses.replace(copy, data=text))
    assert ((copy.out / "config.json").read_text() == before) == (name != "history.json")


def test_a_directory_that_cannot_be_made_is_named(text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UsageError, match=rf"^out=.*run cannot be made: {tmp_path}/file is no dir"):
        train.train(tiny(text, out=tmp_path / "file" / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: path != tmp_path)
        with pytest.raises(UsageError, match=rf"cannot be written: no permission for {tmp_path}\."):
            train.train(tiny(text, out=tmp_path / "new" / "run"))

    def denied(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted", "there")

    # As a system's own directories do, whatever permissions they show.
    monkeypatch.setattr(pathlib.Path, "mkdir", denied)
    with pytest.raises(UsageError, match=r"^out=.*new cannot be made: Operation not permitted\.$"):
        train.train(tiny(text, out=tmp_path / "new"))


# In the end it does what Orbax' other writes may do, by chance of timing, after the one that fails.
LIMITED = """
import asyncio, resource, signal
import jax
from examples.flax_llama.train import main
# Programs are larger files than these may be, and JAX would say that it could not keep one.
jax.config.update("jax_enable_compilation_cache", False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
class Late:
    def __del__(self):
        loop.call_soon(print)
try:
    main()
finally:
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(OSError("abandoned"))
    loop.close()
    Late()
"""


@pytest.mark.ci
@pytest.mark.long("a process of its own, in which files cannot grow")
def test_a_write_that_fails_in_the_background_is_one_line_too(copy, tmp_path):
    shutil.rmtree(copy.out / "checkpoints" / "12")
    before = contents(copy.out / "checkpoints")
    given = ("--out", copy.out, "--resume", "--tensorboard")
    process = start("-c", LIMITED, *given, cache=tmp_path / "cache")
    output = finish(process, expected=1)
    assert re.fullmatch(
        r"error: the checkpoint after update 12 could not be written: .*File too large.*\. Whole "
        r"checkpoints in .*run/checkpoints: 4, 8\.\n",
        output,
    )
    now = contents(copy.out / "checkpoints")
    assert {path: now[path] for path in before} == before
    assert metrics(copy.out)[-1]["step"] == 12
    train.train(copy)
    assert steps(copy) == [4, 8, 12]
