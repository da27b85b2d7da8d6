"""What is compiled for a GPU without one: the rows, the reader of programs, and what fails."""

import json
from pathlib import Path

import jax
import pytest

from benchmarks import hlo
from benchmarks.gpu import compiled
from benchmarks.hlo import Moved
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import Device
from examples.flax_llama.sharding import make_mesh
from examples.flax_llama.topology import cuda_extra
from tests.devices import on_devices

ROOT = Path(__file__).parents[1]
SMALL = {"hidden": 32, "intermediate": 48, "layers": 3, "heads": 2, "rank": 8, "batch": 8}
SMALL |= {"seq": 16, "optimizer": "galore_adamw", "clip": 0.0, "attention": "xla"}
REFRESH, STEP = "refresh 4096x4096 svd", "step 60m layer-wise cudnn 4 GPU"

# An outer loop of 3 trips that holds one of 4 with an all-reduce of 8 floats (32 bytes) each, and a
# branch of either 6 bytes or 2 x 8 bfloat16 (32 bytes); 5 int4 (3 bytes) at the start.
PROGRAM = """
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], /*index=1*/f32[8]{0:T(8,128)}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %start.1 = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add
  %done.1 = f32[8]{0:T(8,128)S(1)} all-reduce-done(%start.1), metadata={op_name="a while (b)"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %done.1)
}

%until (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%small (q: s8[3,2]) -> s8[3,2] {
  %q = s8[3,2]{1,0} parameter(0)
  ROOT %permuted = s8[3,2]{1,0} collective-permute(%q), source_target_pairs={{0,1}}
}

%large (q: bf16[2,4]) -> (bf16[2,4], bf16[8]) {
  %q = bf16[2,4]{1,0} parameter(0)
  %r = bf16[8]{0} parameter(1)
  ROOT %both = (bf16[2,4]{1,0}, bf16[8]{0}) all-reduce(%q, %r), to_apply=%add
}

%wrapped (q: f8e4m3fn[4]) -> f8e4m3fn[2] {
  %q = f8e4m3fn[4]{0} parameter(0)
  ROOT %scattered = f8e4m3fn[2]{0} reduce-scatter(%q), dimensions={0}, to_apply=%add
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %w = (s32[], f32[8]{0}) while(%p), condition=%until, body=%inner, KNOWN4
  %c = (bf16[2,4]{1,0}, bf16[8]{0}) conditional(%i, %q, %q), branch_computations={%small, %large}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %x)
}

ENTRY %main (s: s4[5]) -> f32[8] {
  %s = s4[5]{0:E(4)} parameter(0)
  %gathered = (s4[5]{0:E(4)}, token[]) all-gather(%s), dimensions={0}
  %as = ((f8e4m3fn[4]{0}), f8e4m3fn[2]{0}, u32[]) async-start(%f), calls=%wrapped
  %ad = f8e4m3fn[2]{0} async-done(%as), calls=%wrapped
  %v = f64[2]{0} custom-call(%s), custom_call_target="cusolver_gesvd_ffi", api_version=1
  %w = (s32[], f32[8]{0}) while(%t), condition=%until, body=%outer, KNOWN3
  ROOT %x = f32[8]{0} get-tuple-element(%w), index=1
}
"""
for trips in (3, 4):
    known = f'backend_config={{"known_trip_count":{{"n":"{trips}"}},"dynamic_variable":"0"}}'
    PROGRAM = PROGRAM.replace(f"KNOWN{trips}", known)


def test_collectives_of_a_program_counted_by_hand():
    assert hlo.collectives(PROGRAM) == {
        "all-gather": Moved(1, 3, 3),
        "reduce-scatter": Moved(1, 2, 4),
        "all-reduce": Moved(3 * (4 + 1), 3 * (4 * 32 + 32), 3 * (4 * 32 + 32)),
    }
    assert hlo.custom_calls(PROGRAM) == {"cusolver_gesvd_ffi": 1}


def test_a_loop_of_unknown_length_is_counted_only_without_collectives():
    unknown = PROGRAM.replace('"known_trip_count":{"n":"4"}', "")
    with pytest.raises(ValueError, match="a loop in outer has collectives, but no known_trip_cou"):
        hlo.collectives(unknown)
    assert hlo.collectives(unknown, [4]) == hlo.collectives(PROGRAM)
    quiet = unknown.replace("all-reduce-done", "negate").replace("body=%inner", "body=%until")
    assert hlo.collectives(quiet)["all-reduce"] == Moved(3, 3 * 32, 3 * 32)
    outer = unknown.replace('"known_trip_count":{"n":"3"}', "")
    assert hlo.collectives(outer, [3, 4]) == hlo.collectives(PROGRAM)


@pytest.mark.parametrize(
    "text", ["", "%f (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}"]
)
def test_a_text_without_a_program(text):
    with pytest.raises(ValueError, match="no ENTRY computation in"):
        hlo.collectives(text)


EIGHT_DEVICES = f"""
import dataclasses, functools, json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from benchmarks import hlo
from examples.flax_llama.compile_step import lower
from examples.flax_llama.config import Config
from examples.flax_llama.sharding import make_mesh

mesh = make_mesh()

@functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
def f(x):
    def inner(x, _):
        return jnp.sin(jax.lax.psum(x, "data")) + x, None
    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, length=5)
        return jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), None
    x, _ = jax.lax.scan(outer, x, length=2)
    return x + jax.lax.all_gather(x, "data").sum(0)

found = [hlo.collectives(jax.jit(f).lower(jnp.ones((8, 3, 7))).compile().as_text())]
for how in ({{}}, {{"layerwise": True}}):
    # Few tokens, so that the head is computed in one piece; XLA for CPUs adds up those of each.
    config = Config(**{SMALL | {"seq": 4, "optimizer": "sgd"}!r}, **how).resolve()
    found.append(hlo.collectives(lower(config, 300, mesh).compile().as_text()))
print(json.dumps([{{k: dataclasses.astuple(v) for k, v in x.items()}} for x in found]))
"""


@pytest.mark.ci
@pytest.mark.long("four programs of the application for eight devices, in a process of their own")
def test_collectives_of_programs_for_eight_devices():
    printed = on_devices(8, "-c", EIGHT_DEVICES)
    program, ordinary, layerwise = json.loads(printed.splitlines()[-1])
    size = 4 * 3 * 7
    assert program == {
        "all-reduce": [2 * 5, 2 * 5 * size, 2 * 5 * size],
        "collective-permute": [2, 2 * size, 2 * size],
        "all-gather": [1, 8 * size, size],
    }
    # All gradients are added up once, in float32, and with them loss and number of targets.
    gradients = 4 * Config(**SMALL).resolve().shape(300).num_params
    for step in (ordinary, layerwise):
        assert step.keys() == {"all-reduce"}
        assert step["all-reduce"][1] == pytest.approx(gradients, abs=64)
    # One layer after the other.
    assert layerwise["all-reduce"][0] >= 3


def test_the_rows_are_what_a_cpu_cannot_show():
    rows = compiled.table()
    assert len(rows) == 4 * 2 + 8 + 8
    for name, row in rows.items():
        given = row["given"]
        assert row["task"] == name.split()[0]
        if row["task"] == "refresh":
            assert (given["rank"], given["shape"][0]) == (1024, 4096)
            continue
        config = Config(**given["settings"]).resolve()
        assert config.batch % given["devices"] == 0
        assert config.layerwise == ("layer-wise" in name)
        assert config.preset in name
        assert config.attention in name
        assert name.endswith(f"{given['devices']} GPU")
    assert {row["given"].get("devices", 1) for row in rows.values()} == {1, 2, 4}


@pytest.fixture
def here(monkeypatch):
    """All is compiled for the devices of the tests."""
    monkeypatch.setattr(Device, "mesh", lambda self, count=1: make_mesh())


@pytest.mark.parametrize("projector", compiled.PROJECTORS)
def test_a_refresh_stays_as_large_as_its_state_and_gradient(here, projector):
    given = {"projector": projector, "shape": [24, 40], "rank": 8}
    found = compiled.one({"task": "refresh", "given": given})
    assert "error" not in found, found
    # Gradient in bfloat16; basis and two moments in float32.
    held = 2 * 24 * 40 + 4 * (24 * 8 + 2 * 8 * 40)
    assert found["arguments"] == pytest.approx(held, abs=64)
    assert found["temporaries"] > 0
    assert found["peak"] >= held


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_step_is_that_of_the_application(here, layerwise):
    settings = SMALL | {"layerwise": layerwise, "optimizer": "sgd", "layers": 2}
    found = compiled.step(settings, 1, vocab_size=300)
    assert found["parameters"] == Config(**settings).resolve().shape(300).num_params
    # Weights, and the batch with its mask.
    held = 4 * found["parameters"] + 8 * 17 * 4 + 8 * 16
    assert found["arguments"] == pytest.approx(held, abs=64)
    assert found["temporaries"] > 0


def test_a_row_that_fails_has_its_traceback(monkeypatch):
    def refresh(**given):
        raise RuntimeError("INTERNAL: no such library\nand more")

    monkeypatch.setitem(compiled.TASKS, "refresh", refresh)
    found = compiled.one({"task": "refresh", "given": {}})
    assert found["error"] == "RuntimeError: INTERNAL: no such library"
    assert "and more" in found["traceback"]
    assert "in refresh" in found["traceback"]


def test_a_process_of_its_own_returns_the_row_or_how_it_ended():
    row = {"task": "step", "given": {"settings": {"preset": "8b"}, "devices": 1}}
    assert "preset='8b': expected one of" in compiled.apart(row, 300)["error"]
    ended = compiled.apart({"given": {}}, 300)
    assert ended["error"] == "KeyError: 'task'"
    assert compiled.apart(row, 0.01)["error"] == "not done after 0 seconds"


@pytest.fixture
def command(tmp_path, monkeypatch, here):
    """Runs the benchmark with a compiler that is there, and returns the rows that it wrote."""
    monkeypatch.setattr(compiled, "cuda_extra", lambda: "cuda13")
    out = tmp_path / "gpu" / "compiled.json"

    def run(*words, status=None):
        monkeypatch.setattr("sys.argv", ["compiled", *words, "--out", str(out)])
        if status is None:
            compiled.main()
        else:
            with pytest.raises(SystemExit) as stopped:
                compiled.main()
            assert stopped.value.code == status
        assert not list(out.parent.glob("*.new"))
        return json.loads(out.read_text())["rows"]

    return run


FIGURES = {"arguments": 2**30, "temporaries": 2**29, "peak": 3 * 2**29, "seconds": 1.0}
FIGURES |= {"collectives": {"all-reduce": {"count": 5, "bytes": 2**21}}, "calls": {"gesvd": 2}}


def test_the_same_command_does_what_is_missing_and_a_failing_row_is_kept(
    command, monkeypatch, capsys
):
    done, stop_at = [], STEP

    def apart(row, limit):
        name = next(name for name, known in compiled.table().items() if known == row)
        done.append(name)
        if name == stop_at:
            raise KeyboardInterrupt
        return {"error": "RuntimeError: none", "traceback": "..."} if name == REFRESH else FIGURES

    monkeypatch.setattr(compiled, "apart", apart)
    with pytest.raises(KeyboardInterrupt):
        command()
    first, stop_at = list(done), None
    rows = command()
    assert list(rows) == list(compiled.table())
    assert done == first + list(rows)[len(first) - 1 :]
    assert rows[REFRESH]["error"] == "RuntimeError: none"
    assert rows[STEP]["peak"] == 3 * 2**29
    assert rows[STEP]["packages"]["jax"] == jax.__version__
    assert rows[STEP].keys() >= {"commit", "python", *compiled.table()[STEP]}
    command()
    assert len(done) == len(rows) + 1
    # Again only when asked for, and told by the exit status.
    command("--rows", REFRESH, status=1)
    assert done[-1] == REFRESH
    command("--rows", STEP)
    line = capsys.readouterr().out.splitlines()[-1]
    notes = ["1.00", "0.50", "1.50", "5", "all-reduce,", "2.0", "MiB;", "2", "gesvd"]
    assert line.removeprefix(STEP).split() == notes
    # Figures of other settings are none of this table.
    changed = compiled.table()
    changed[STEP]["given"]["settings"]["seq"] = 512
    monkeypatch.setattr(compiled, "table", lambda: changed)
    assert command()[STEP]["given"]["settings"]["seq"] == 512
    assert done[-1] == STEP


def test_unknown_rows_are_refused(command, capsys):
    with pytest.raises(SystemExit):
        command("--rows", "step 8b")
    assert f"step 8b: expected some of {REFRESH}" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [None, "cuda13"])
def test_without_the_compiler_there_is_one_line(monkeypatch, capsys, tmp_path, extra):
    def mesh(self, count=1):
        raise UsageError("the plugin cannot be loaded")

    monkeypatch.setattr(Device, "mesh", mesh)
    monkeypatch.setattr(compiled, "cuda_extra", lambda: extra)
    monkeypatch.setattr("sys.argv", ["compiled", "--out", str(tmp_path / "compiled.json")])
    if extra is None:
        compiled.main()
        printed = capsys.readouterr().out
        assert printed.startswith("skipped: to compile for a GPU needs pip install 'jax[cuda1")
    else:
        with pytest.raises(SystemExit) as stopped:
            compiled.main()
        assert stopped.value.code == 2
        printed = capsys.readouterr().err
        assert printed == "error: the plugin cannot be loaded\n"
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(cuda_extra() is None, reason="needs JAX for CUDA")
def test_rows_are_compiled_for_a_gpu_that_is_not_here():
    # By QR, not by the polar decomposition, cusolver_gesvdp_ffi, whose directions are wrong.
    given = {"projector": "svd", "shape": [1100, 1200], "rank": 8}
    found = compiled.apart({"task": "refresh", "given": given}, 300)
    assert found["calls"] == {"cusolver_gesvd_ffi": 1}
    settings = SMALL | {"dtype": "bfloat16", "param_dtype": "bfloat16", "attention": "cudnn"}
    settings |= {"optimizer": "sgd", "layerwise": True}
    found = compiled.apart({"task": "step", "given": {"settings": settings, "devices": 2}}, 300)
    assert set(found["calls"]) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert found["collectives"].keys() == {"all-reduce"}
    assert found["collectives"]["all-reduce"]["bytes"] >= 2 * found["parameters"]


def test_the_figures_are_of_the_table_and_all_gradients_are_added_up_once():
    written = ROOT / "benchmarks" / "results" / "gpu" / "compiled.json"
    found, rows = json.loads(written.read_text())["rows"], compiled.table()
    assert found.keys() == rows.keys()
    for name, row in found.items():
        assert rows[name].items() <= row.items(), name
        assert "error" not in row, name
        devices = row["given"].get("devices", 1)
        if devices == 1:
            assert row["collectives"] == {}, name
            continue
        # In bfloat16; but the layer-wise step adds up the head's gradient in float32.
        width = Config(**row["given"]["settings"]).resolve().hidden
        head = 2 * compiled.VOCAB_SIZE * width if "layer-wise" in name else 0
        assert row["collectives"].keys() == {"all-reduce"}, name
        sent = row["collectives"]["all-reduce"]["bytes"]
        assert sent == pytest.approx(2 * row["parameters"] + head, rel=0.003), name
