"""The files and services that a run reports to."""

import contextlib
import gc
import json
import math
import resource
import struct
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from examples.flax_llama import run_log, sinks
from examples.flax_llama.config import UsageError
from examples.flax_llama.records import METRICS, TAGS
from examples.flax_llama.run_log import RunLog

FINITE = {"lr": 0.5, "grad_norm": 1.0, "update_norm": 1.0, "tokens": 100}


def log_of(out, start=0, **settings):
    default = {"steps": 9, "flops_per_token": 10, "sinks": [], "quiet": True}
    return RunLog(out, start=start, **default | settings)


def record(log, step, loss, **more):
    log.update(step, {name: jnp.asarray(v) for name, v in {"loss": loss, **FINITE, **more}.items()})


def evaluation(step, loss):
    scores = {"standard_error": 0.1, "perplexity": math.exp(loss), "bits_per_byte": 1.5}
    return {"step": step, "valid_loss": loss} | scores


def lines(out):
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def test_metrics_are_fetched_one_update_late(tmp_path):
    with log_of(tmp_path) as log:
        for step in (1, 2, 3):
            record(log, step, 1 / step)
            assert [r["step"] for r in log.train] == list(range(1, step))
        log.flush()
        log.flush()
    assert [(r["step"], r["loss"]) for r in lines(tmp_path)] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3)
    ]


def test_a_restart_drops_what_comes_after_it_and_half_a_line(tmp_path):
    with log_of(tmp_path) as log:
        for step in range(1, 6):
            record(log, step, 1.0)
            log.flush()
            log.evaluation(evaluation(step, 2.0))
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 6, "los')
    with log_of(tmp_path, start=3) as log:
        assert [r["step"] for r in log.train] == [r["step"] for r in log.valid] == [1, 2, 3]
        record(log, 4, 7.0)
        log.flush()
    assert [r["step"] for r in lines(tmp_path)] == [1, 1, 2, 2, 3, 3, 4]
    assert lines(tmp_path)[-1]["loss"] == 7.0


def test_numbers_that_are_not_finite_are_null_in_json_and_nan_again_when_read(tmp_path):
    with log_of(tmp_path) as log:
        record(log, 1, math.nan, skipped=1, skipped_in_a_row=1)
        log.flush()
    assert lines(tmp_path)[0]["loss"] is None
    with log_of(tmp_path, start=1) as log:
        assert math.isnan(log.train[0]["loss"])


@pytest.mark.parametrize("name", ["loss", "grad_norm", "update_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_whatever_is_not_finite_stops_the_run_after_it_is_written(tmp_path, name, value):
    with log_of(tmp_path) as log:
        record(log, 3, **{"loss": 1.0, name: value})
        with pytest.raises(FloatingPointError, match=rf"{name} is {value} at update 3, where lr"):
            log.flush()
    assert lines(tmp_path)[0][name] is None


def test_model_flops_utilization_is_of_the_peak_of_all_devices(monkeypatch):
    device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with log_of(None, flops_per_token=10**9) as log:
        record(log, 1, 1.0)
        log.flush()
    (only,) = log.train
    assert only["mfu"] == pytest.approx(1e9 * only["tokens_per_second"] / (4 * 989e12))
    assert "flops_per_second" not in only


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind, peak):
    assert run_log.peak_flops(kind) == peak


def events(path):
    """The events of a TensorBoard file: length, its checksum, an event, its checksum."""
    data, position = path.read_bytes(), 0
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        yield Event.FromString(data[position + 12 : position + 12 + length])
        position += length + 16


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a disk with so little room: writing beyond it is an error."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def test_a_record_that_cannot_be_written_names_the_file_which_is_read_all_the_same(tmp_path):
    with log_of(tmp_path) as log:
        record(log, 1, 3.0)
        log.flush()
        record(log, 2, 2.0)
        size = (tmp_path / METRICS).stat().st_size
        with (
            files_of_at_most(size + 10),
            pytest.raises(OSError, match=r"too large.*metrics\.jsonl"),
        ):
            log.flush()
    assert (tmp_path / METRICS).stat().st_size == size + 10
    with log_of(tmp_path, start=1) as log:
        assert [r["step"] for r in log.train] == [1]
    assert [r["step"] for r in lines(tmp_path)] == [1]


def test_tensorboard_that_cannot_be_written_is_an_error_of_this_thread(tmp_path, capfd):
    def fill():
        with sinks.tensorboard(tmp_path, 0) as sink, files_of_at_most(100):
            for step in range(1000):
                sink({"step": step, "loss": 1.0})

    threads = threading.active_count()
    with pytest.raises(OSError, match=r"too large.*tensorboard/events"):
        fill()
    gc.collect()
    assert threading.active_count() == threads
    assert capfd.readouterr() == ("", "")


def test_tensorboard_has_every_number_at_its_update(tmp_path):
    with sinks.tensorboard(tmp_path, 0) as sink, log_of(tmp_path, sinks=[sink]) as log:
        record(log, 1, 3.0)
        record(log, 2, 2.0)
        log.flush()
        log.evaluation(evaluation(2, 2.5))
    (path,) = (tmp_path / "tensorboard").iterdir()
    shown = {
        (event.step, value.tag): value.simple_value
        for event in events(path)
        for value in event.summary.value
    }
    expected = {
        (int(r["step"]), TAGS[name]): pytest.approx(value)
        for r in lines(tmp_path)
        for name, value in r.items()
        if name != "step"
    }
    assert shown == expected


def test_wandb_gets_every_record_of_one_run_and_is_closed(tmp_path, monkeypatch):
    calls = []

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append("finished")

        def log(self, record, step):
            calls.append((step, record["train/loss"]))

    def init(**settings):
        calls.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 1):
        with (
            sinks.wandb("project", tmp_path, {"lr": 1.0}) as sink,
            log_of(tmp_path, start=start, sinks=[sink]) as log,
        ):
            record(log, start + 1, 3.0 + start)
            log.flush()
    first, *rest = calls
    assert first["config"] == {"lr": 1.0}
    assert first["resume"] == "allow"
    assert rest == [(1, 3.0), "finished", first, (2, 4.0), "finished"]


def test_without_wandb_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(UsageError, match=r"wandb='p' needs .* pip install 'galore-optax\[wandb\]'"),
        sinks.wandb("p", tmp_path, {}),
    ):
        pass
