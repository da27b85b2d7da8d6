"""The counter of the bytes that kernels move, against programs counted by hand."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from benchmarks import bytes as benchmark
from benchmarks.kernels import kernels
from examples.flax_llama.devices import device_named
from examples.flax_llama.topology import check_needs_driver, cuda_extra

# Fusions as XLA writes them; what each reads and writes is in the table below.
COMPUTATIONS = """
%assign (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %b = f32[] parameter(1)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%elementwise (p0: bf16[8,16], p1: f32[]) -> (f32[8,16], bf16[8,16]) {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = f32[] parameter(1)
  %c = f32[8,16]{1,0} convert(%p0)
  %b = f32[8,16]{1,0} broadcast(%p1), dimensions={}
  %m = f32[8,16]{1,0} multiply(%c, %b)
  ROOT %t = (f32[8,16]{1,0}, bf16[8,16]{1,0}) tuple(%m, %p0)
}

%gathered (p0: bf16[8,16], p1: s32[2]) -> f32[2,16] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = s32[2]{0} parameter(1)
  %c = f32[8,16]{1,0} convert(%p0)
  %g = f32[2,16]{1,0} gather(%c, %p1), offset_dims={1}, slice_sizes={1,16}
  %h = f32[2,16]{1,0} gather(%c, %p1), offset_dims={1}, slice_sizes={1,16}
  ROOT %m = f32[2,16]{1,0} multiply(%g, %h)
}

%two_slices (p0: f32[8,16]) -> f32[2,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %g = f32[2,16]{1,0} slice(%p0), slice={[0:2], [0:16]}
  %h = f32[2,16]{1,0} slice(%p0), slice={[4:6], [0:16]}
  ROOT %m = f32[2,16]{1,0} multiply(%g, %h)
}

%looked_up (p0: f32[2,16], p1: s32[8]) -> f32[8,16] {
  %p0 = f32[2,16]{1,0} parameter(0)
  %p1 = s32[8]{0} parameter(1)
  ROOT %g = f32[8,16]{1,0} gather(%p0, %p1), offset_dims={1}, slice_sizes={1,16}
}

%in_place (p0: f32[8,16], p1: bf16[1,16], p2: s32[]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = bf16[1,16]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %z = s32[] constant(0)
  %old = f32[1,16]{1,0} dynamic-slice(%p0, %p2, %z), dynamic_slice_sizes={1,16}
  %c = f32[1,16]{1,0} convert(%p1)
  %new = f32[1,16]{1,0} add(%old, %c)
  ROOT %d = f32[8,16]{1,0} dynamic-update-slice(%p0, %new, %p2, %z)
}

%not_in_place (p0: bf16[8,16], p1: f32[1,16]) -> f32[8,16] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = f32[1,16]{1,0} parameter(1)
  %z = s32[] constant(0)
  %c = f32[8,16]{1,0} convert(%p0)
  ROOT %d = f32[8,16]{1,0} dynamic-update-slice(%c, %p1, %z, %z)
}

%set_rows (p0: f32[8,16], p1: s32[2,1], p2: f32[2,16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = s32[2,1]{1,0} parameter(1)
  %p2 = f32[2,16]{1,0} parameter(2)
  ROOT %s = f32[8,16]{1,0} scatter(%p0, %p1, %p2), to_apply=%assign
}

%add_rows (p0: f32[8,16], p1: s32[2,1], p2: f32[2,16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = s32[2,1]{1,0} parameter(1)
  %p2 = f32[2,16]{1,0} parameter(2)
  ROOT %s = f32[8,16]{1,0} scatter(%p0, %p1, %p2), to_apply=%sum
}

%reduced (p0: u8[8,16], p1: f32[]) -> f32[8] {
  %p0 = u8[8,16]{1,0} parameter(0)
  %p1 = f32[] parameter(1)
  %c = f32[8,16]{1,0} convert(%p0)
  ROOT %r = f32[8]{0} reduce(%c, %p1), dimensions={1}, to_apply=%sum
}

%product (p0: bf16[8,4], p1: bf16[4,16]) -> f32[8,16] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = bf16[4,16]{1,0} parameter(1)
  ROOT %d = f32[8,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
OPERANDS = """
  %x = f32[8,16]{1,0} parameter(0)
  %h = bf16[8,16]{1,0} parameter(1)
  %one = f32[] parameter(2)
  %i = s32[2]{0} parameter(3)
  %ii = s32[2,1]{1,0} bitcast(%i)
  %r = f32[2,16]{1,0} parameter(4)
  %w = s32[8]{0} parameter(5)
  %row = bf16[1,16]{1,0} parameter(6)
  %frow = f32[1,16]{1,0} parameter(7)
  %k = s32[] parameter(8)
  %u = u8[8,16]{1,0} parameter(9)
  %a = bf16[8,4]{1,0} parameter(10)
  %b = bf16[4,16]{1,0} parameter(11)
"""
FULL, ROW = 8 * 16, 16
# The instruction, the bytes it reads, and those it writes.
CASES = {
    "elementwise": (
        "(f32[8,16]{1,0}, bf16[8,16]{1,0}) fusion(%h, %one), kind=kLoop, calls=%elementwise",
        2 * FULL + 4,
        4 * FULL + 2 * FULL,
    ),
    "rows read once though used twice": (
        "f32[2,16]{1,0} fusion(%h, %i), kind=kLoop, calls=%gathered",
        2 * 2 * ROW + 4 * 2,
        4 * 2 * ROW,
    ),
    "two slices": (
        "f32[2,16]{1,0} fusion(%x), kind=kLoop, calls=%two_slices",
        4 * 4 * ROW,
        4 * 2 * ROW,
    ),
    "more looked up than there is": (
        "f32[8,16]{1,0} fusion(%r, %w), kind=kLoop, calls=%looked_up",
        4 * 2 * ROW + 4 * 8,
        4 * FULL,
    ),
    "a slice in place": (
        "f32[8,16]{1,0} fusion(%x, %row, %k), kind=kLoop, calls=%in_place",
        4 * ROW + 2 * ROW + 4,
        4 * ROW,
    ),
    "a slice in another dtype": (
        "f32[8,16]{1,0} fusion(%h, %frow), kind=kLoop, calls=%not_in_place",
        2 * FULL + 4 * ROW,
        4 * FULL,
    ),
    "rows set in place": (
        "f32[8,16]{1,0} fusion(%x, %ii, %r), kind=kInput, calls=%set_rows",
        4 * 2 + 4 * 2 * ROW,
        4 * 2 * ROW,
    ),
    "rows added in place": (
        "f32[8,16]{1,0} fusion(%x, %ii, %r), kind=kInput, calls=%add_rows",
        4 * 2 + 2 * 4 * 2 * ROW,
        4 * 2 * ROW,
    ),
    "reduced": ("f32[8]{0} fusion(%u, %one), kind=kInput, calls=%reduced", FULL + 4, 4 * 8),
    "a product": (
        "f32[8,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%product",
        2 * 8 * 4 + 2 * 4 * 16,
        4 * FULL,
    ),
    "a library's product without its workspace": (
        '(f32[8,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"',
        2 * 8 * 4 + 2 * 4 * 16,
        4 * FULL,
    ),
    "a copy": ("f32[8,16]{1,0} copy(%x)", 4 * FULL, 4 * FULL),
    "a copy that is started": (
        "(f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]) copy-start(%x)",
        4 * FULL,
        4 * FULL,
    ),
    "rows gathered without a fusion": (
        "f32[2,16]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,16}",
        4 * 2 * ROW + 4 * 2,
        4 * 2 * ROW,
    ),
    "a slice in place without a fusion": (
        "f32[8,16]{1,0} dynamic-update-slice(%x, %frow, %k, %k)",
        4 * ROW + 4,
        4 * ROW,
    ),
}


def program(line):
    return f"{COMPUTATIONS}\nENTRY %main (x: f32[8,16]) -> f32[8,16] {{{OPERANDS}  {line}\n}}\n"


@pytest.mark.plain
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_counted_by_hand(name):
    line, read, written = CASES[name]
    (found,) = kernels(program(f"ROOT %found = {line}"))
    assert (found.name, found.read, found.written, found.times) == ("found", read, written, 1)


CONTROL = """
%body (s: (f32[8,16], s32[])) -> (f32[8,16], s32[]) {
  %s = (f32[8,16]{1,0}, s32[]) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%s), index=0
  %i = s32[] get-tuple-element(%s), index=1
  %moved = f32[8,16]{1,0} copy(%x)
  ROOT %t = (f32[8,16]{1,0}, s32[]) tuple(%moved, %i)
}

%until (s: (f32[8,16], s32[])) -> pred[] {
  %s = (f32[8,16]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=1
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%refreshed (s: (f32[8,16], s32[])) -> (f32[8,16], s32[]) {
  %s = (f32[8,16]{1,0}, s32[]) parameter(0)
  ROOT %loop = (f32[8,16]{1,0}, s32[]) while(%s), condition=%until, body=%body, KNOWN5
}

%kept (s: (f32[8,16], s32[])) -> (f32[8,16], s32[]) {
  %s = (f32[8,16]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=1
  %x = f32[8,16]{1,0} get-tuple-element(%s), index=0
  %small = s32[] copy(%i)
  ROOT %t = (f32[8,16]{1,0}, s32[]) tuple(%x, %small)
}

%called (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %inside = f32[8,16]{1,0} negate(%x)
}

ENTRY %main (x: f32[8,16], i: s32[], p: pred[]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %p = pred[] parameter(2)
  %s = (f32[8,16]{1,0}, s32[]) tuple(%x, %i)
  %c = (f32[8,16]{1,0}, s32[]) conditional(%p, %s, %s), BRANCHES
  %l = (f32[8,16]{1,0}, s32[]) while(%c), condition=%until, body=%body, KNOWN3
  %y = f32[8,16]{1,0} get-tuple-element(%l), index=0
  %a = ((f32[8,16]{1,0}), f32[8,16]{1,0}) async-start(%y), calls=%called
  %d = f32[8,16]{1,0} async-done(%a), calls=%called
  ROOT %z = f32[8,16]{1,0} call(%d), to_apply=%called
}
"""
CONTROL = CONTROL.replace("BRANCHES", "true_computation=%refreshed, false_computation=%kept")
KNOWN = {n: f'backend_config={{"known_trip_count":{{"n":"{n}"}}}}' for n in (3, 5)}


@pytest.mark.plain
def test_loops_count_as_often_as_they_run_and_the_branch_that_moves_least():
    text = CONTROL.replace("KNOWN3", KNOWN[3])
    for refreshed in (KNOWN[5], "metadata={}"):  # how long the other branch runs does not matter
        found = {
            (kernel.name, kernel.times): kernel.bytes
            for kernel in kernels(text.replace("KNOWN5", refreshed))
        }
        assert found == {
            ("small", 1): 8,
            ("moved", 3): 3 * 2 * 4 * FULL,
            ("less", 3): 3 * (4 + 4 + 1),
            ("inside", 1): 2 * 4 * FULL,
        }


@pytest.mark.plain
def test_a_loop_that_may_run_for_ever_cannot_be_counted():
    with pytest.raises(ValueError, match="is in a loop without a known_trip_count"):
        kernels(CONTROL.replace("KNOWN5", KNOWN[5]))


def test_what_a_compiled_program_moves():
    """A loop on the CPU: each trip reads a row of one array, and replaces that of another."""

    def step(rows, total):
        def body(i, total):
            row = jax.lax.dynamic_index_in_dim(rows, i, keepdims=True)
            return jax.lax.dynamic_update_index_in_dim(total, jnp.sin(row), i, 0)

        return jax.lax.fori_loop(0, 6, body, total)

    shape = jax.ShapeDtypeStruct((6, 1000), jnp.float32)
    text = jax.jit(step, donate_argnums=1).lower(shape, shape).compile().as_text()
    found = kernels(text)
    # Beside them there are the counter and its comparison with 6.
    assert sum(kernel.bytes for kernel in found) == pytest.approx(2 * 4 * 6 * 1000, rel=0.02)
    assert max(kernel.times for kernel in found) in (6, 7)


def test_what_must_be_moved_of_a_small_matrix():
    params = {"w": jax.ShapeDtypeStruct((8, 32), jnp.bfloat16)}

    def least(make):
        return benchmark.Step.of(make, params).least

    size, low = 8 * 32, 2 * 32
    assert least(benchmark.OPTIMIZERS["optax.adamw, mu float32, nu bfloat16"]) == 18 * size
    assert least(benchmark.OPTIMIZERS["optax.adamw, float32"]) == 22 * size

    def galore(projector):
        return lambda: galore_optax.galore_adamw(
            1e-3,
            rank=2,
            projector=projector,
            weight_dimension_numbers=lambda _: {"w": galore_optax.DimensionNumbers()},
        )

    rows = 4 * size + 16 * low + 2 * low + 4 * 2
    assert least(galore("rows")) == rows
    products = 4 * size + 16 * low + 2 * size + 8 * low + 4 * 8 * 2
    assert least(galore("power_iteration")) == products


def test_the_step_that_is_compiled_is_an_update_and_its_application():
    tx = optax.sgd(0.5)
    params, gradients = {"w": jnp.arange(4.0)}, {"w": jnp.ones(4)}
    step = benchmark.Step.of(lambda: tx, params)
    new, _ = step(params, tx.init(params), gradients)
    np.testing.assert_array_equal(new["w"], np.arange(4.0) - 0.5)
    found = kernels(step.text(jax.devices()[0]))
    assert sum(kernel.bytes for kernel in found) == 3 * 4 * 4


def test_the_figures_are_of_the_optimizers_and_not_below_what_must_be_moved():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "bytes.json"
    record = json.loads(path.read_text())
    assert list(record["rows"]) == list(benchmark.OPTIMIZERS)
    for name, row in record["rows"].items():
        assert row["bytes_per_parameter"] == pytest.approx(row["read"] + row["written"], abs=0.01)
        assert row["least"] <= row["bytes_per_parameter"] * 1.001, name
        params = benchmark.blocks(record["blocks"])
        step = benchmark.Step.of(benchmark.OPTIMIZERS[name], params)
        count = sum(x.size for x in jax.tree.leaves(params))
        assert row["least"] == pytest.approx(step.least / count, abs=0.001)
    table = benchmark.table(record["rows"])
    assert table.row_count == len(benchmark.OPTIMIZERS)


@pytest.mark.ci
@pytest.mark.long("compiles four steps for a GPU")
@pytest.mark.skipif(cuda_extra() is None, reason="JAX for CUDA is not installed")
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("adamw_8bit", 15),
        ("galore_adamw_8bit, rows", 9),
        ("galore_adamw_8bit, rows, without decay", 8),
        ("galore_adamw, power_iteration, without decay", 17),
    ],
)
def test_bytes_of_a_step_on_a_gpu_that_is_not_here(name, bound):
    with check_needs_driver():
        device = device_named(benchmark.DEVICE).mesh().devices.flat[0]
        shapes = [{k: v for k, v in benchmark.blocks(1)[0].items() if k in ("q", "gate", "down")}]
        text = benchmark.Step.of(benchmark.OPTIMIZERS[name], shapes).text(device)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert sum(kernel.bytes for kernel in kernels(text)) <= bound * count
