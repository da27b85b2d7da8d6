"""What the memory report says, against real arrays, a closed formula and published figures."""

import functools
import re
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import DimensionNumbers, compare_memory, memory_report

VOCABULARY = 32000


class Llama(NamedTuple):
    """A published LLaMA configuration, and the rank it is trained with."""

    hidden: int
    intermediate: int
    layers: int
    rank: int


LLAMAS = {
    "9m": Llama(128, 352, 4, 32),
    "20m": Llama(256, 688, 4, 64),
    "60m": Llama(512, 1376, 8, 128),
    "130m": Llama(768, 2048, 12, 256),
    "350m": Llama(1024, 2736, 24, 256),
    "1b": Llama(2048, 5461, 24, 512),
    "7b": Llama(4096, 11008, 32, 1024),
}


def shapes_of(llama, dtype, stacked=False):
    """The parameters' shapes: layers on their own, or stacked on a leading axis."""
    h, i = llama.hidden, llama.intermediate
    layer = {
        "attention": {name: (h, h) for name in ("query", "key", "value", "out")},
        "mlp": {"gate": (h, i), "up": (h, i), "down": (i, h)},
        "attention_norm": {"scale": (h,)},
        "mlp_norm": {"scale": (h,)},
    }
    if stacked:
        layers = jax.tree.map(lambda s: (llama.layers, *s), layer, is_leaf=is_shape)
    else:
        layers = [layer] * llama.layers
    tree = {
        "embed": (VOCABULARY, h),
        "layers": layers,
        "norm": {"scale": (h,)},
        "lm_head": (h, VOCABULARY),
    }
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), tree, is_leaf=is_shape)


def is_shape(x):
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)


def adamw_for(llama, stacked=False, **options):
    return galore_optax.galore_adamw(
        1e-3,
        rank=llama.rank,
        weight_dimension_numbers=DimensionNumbers(-2, -1) if stacked else None,
        **options,
    )


def elements(llama):
    """(projectors, two moments of all leaves, matrices) by the formula of the paper."""
    h, i, layers, r = llama
    matrices = 7 * layers
    projectors = matrices * r * h  # the short side of all of them is h
    full_size = 2 * VOCABULARY * h + (2 * layers + 1) * h
    return projectors, 2 * (layers * (4 * r * h + 3 * r * i) + full_size), matrices


def state_bytes(llama, element_bytes):
    projectors, moments, matrices = elements(llama)
    # The steps of galore and of Adam, and the version; refreshes and due of each matrix.
    counters = 3 * 4 + matrices * 2 * 4
    return element_bytes * (projectors + moments) + counters


def real_bytes(state):
    return sum(jnp.asarray(x).nbytes for x in jax.tree.leaves(state))


def zeros_of(shapes):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def real_state(tx, params):
    """The arrays that init makes, of one compiled program."""
    shapes = jax.eval_shape(lambda: params)
    return jax.jit(lambda: tx.init(shapes))()


@pytest.mark.parametrize(("size", "stacked"), [("9m", False), ("9m", True), ("20m", False)])
def test_report_is_the_bytes_of_the_real_state(size, stacked):
    llama = LLAMAS[size]
    params = zeros_of(shapes_of(llama, jnp.bfloat16, stacked))
    tx = adamw_for(llama, stacked)
    report = memory_report(tx, params)
    assert report.state == real_bytes(real_state(tx, params))
    assert report.parameters == sum(x.nbytes for x in jax.tree.leaves(params))
    assert report.total == report.parameters + report.state


# Layers on their own take longer, and are in the published figures too.
@pytest.mark.parametrize(
    ("size", "stacked"),
    [("9m", False), ("20m", False), *((size, True) for size in LLAMAS if size != "7b")],
)
def test_report_is_the_closed_formula(size, stacked):
    llama = LLAMAS[size]
    report = memory_report(adamw_for(llama, stacked), shapes_of(llama, jnp.bfloat16, stacked))
    projectors, moments, _ = elements(llama)
    assert report.projectors == 4 * projectors
    assert report.moments == 4 * moments
    assert report.state == state_bytes(llama, element_bytes=4)


@pytest.mark.parametrize(
    ("size", "gigabytes"), [("60m", 0.164), ("130m", 0.343), ("350m", 0.653), ("1b", 2.085)]
)
def test_published_state_in_bfloat16_is_that_of_a_real_optimizer(size, gigabytes):
    llama = LLAMAS[size]
    tx = adamw_for(llama, stacked=True, moment_dtype="bfloat16", projector_dtype="bfloat16")
    params = shapes_of(llama, jnp.bfloat16, stacked=True)
    held = bytes_of_state(tx, params)
    assert round(held / 1e9, 3) == gigabytes
    report = memory_report(tx, params)
    assert report.state == held == state_bytes(llama, element_bytes=2) + 4  # `rounds`
    assert (report.moment_dtype, report.moment_dtype_without_galore) == ("bfloat16", "bfloat16")
    assert "compare what is kept alike" not in str(report)


def test_a_report_says_in_what_moments_are_held_where_that_differs():
    llama = LLAMAS["9m"]
    params = shapes_of(llama, jnp.bfloat16)
    text = str(memory_report(adamw_for(llama), params))
    assert "(moments are float32 with galore, and would be bfloat16 without: compare" in text
    in_codes = memory_report(galore_optax.galore_adamw_8bit(1e-3, rank=llama.rank), params)
    assert in_codes.moment_dtype == in_codes.moment_dtype_without_galore == "8-bit codes"
    assert memory_report(optax.sgd(0.1), params).moment_dtype is None


@pytest.mark.parametrize(("size", "dtype"), [("9m", jnp.bfloat16), ("20m", jnp.float32)])
def test_without_galore_is_the_state_of_plain_adamw(size, dtype):
    llama = LLAMAS[size]
    params = zeros_of(shapes_of(llama, dtype))
    expected = real_bytes(real_state(optax.adamw(1e-3), params))
    report = memory_report(adamw_for(llama), params)
    assert report.state_without_galore == expected
    in_parameters = sum(x.nbytes for x in jax.tree.leaves(params))
    assert report.total_without_galore == expected + in_parameters


def small_params():
    """Sizes that no two leaves share, so that a leaf counted for another shows."""
    return {
        "embed": {"embedding": jnp.ones((50, 7))},
        "blocks": {"kernel": jnp.ones((3, 9, 14)), "bias": jnp.ones((3, 14))},
        "dense": {"kernel": jnp.ones((13, 8)), "bias": jnp.ones(8)},
        "small": jnp.ones((2, 21)),
    }


NUMBERS = DimensionNumbers(-2, -1)
ARGUMENTS = {"rank": 4, "weight_dimension_numbers": NUMBERS}
STATIC = ("rank", "weight_dimension_numbers", "exclude", "side", "projector")


LABELS = {"embed": "sgd", "blocks": "galore", "dense": "galore", "small": "sgd"}


def bare_galore():
    return galore_optax.galore(**ARGUMENTS)


def galore_adamw():
    return galore_optax.galore_adamw(1e-3, **ARGUMENTS)


WRAPPERS = {
    "chain": lambda: galore_optax.chain(
        optax.clip_by_global_norm(1.0), bare_galore(), optax.adamw(1e-3)
    ),
    "optax_chain": lambda: optax.chain(optax.trace(0.9), galore_adamw()),
    "schedule": lambda: galore_optax.galore_adamw(optax.constant_schedule(1e-3), **ARGUMENTS),
    "multi_steps": lambda: optax.MultiSteps(galore_adamw(), 4).gradient_transformation(),
    "partition": lambda: optax.partition(
        {"galore": galore_adamw(), "sgd": optax.sgd(0.1, momentum=0.9)}, LABELS
    ),
    "two_galores": lambda: optax.partition(
        {"galore": galore_adamw(), "sgd": galore_optax.galore_sgd(0.1, 0.9, rank=1)}, LABELS
    ),
    "masked": lambda: optax.masked(
        galore_adamw(), lambda params: {name: name != "dense" for name in params}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        galore_optax.galore_adamw, static_args=STATIC
    )(1e-3, **ARGUMENTS),
    "apply_if_finite": lambda: optax.apply_if_finite(galore_adamw(), 3),
    "both_sides": lambda: galore_optax.galore_adamw(1e-3, side="both", **ARGUMENTS),
    "long_side": lambda: galore_optax.galore_adamw(1e-3, side="long", **ARGUMENTS),
    "lion": lambda: galore_optax.galore_lion(1e-3, **ARGUMENTS),
    "sgd": lambda: galore_optax.galore_sgd(0.1, **ARGUMENTS),
    "adafactor": lambda: galore_optax.galore_adafactor(
        1e-3,
        min_dim_size_to_factor=4,
        multiply_by_parameter_scale=False,
        momentum=0.9,
        **ARGUMENTS,
    ),
    "moments_in_bfloat16": lambda: galore_optax.galore_adamw(
        1e-3, mu_dtype=jnp.bfloat16, **ARGUMENTS
    ),
    "no_galore": lambda: optax.adamw(1e-3),
}


@functools.cache
def states_of_wrappers():
    params = small_params()
    return jax.jit(lambda: {name: make().init(params) for name, make in WRAPPERS.items()})()


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_report_the_bytes_of_their_real_state(name):
    params = small_params()
    report = memory_report(WRAPPERS[name](), params)
    assert report.state == real_bytes(states_of_wrappers()[name])
    assert report.parameters == real_bytes(params)


WITHOUT = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation(),
    "partition": optax.partition(
        {"galore": optax.adamw(1e-3), "sgd": optax.sgd(0.1, momentum=0.9)}, LABELS
    ),
    "masked": optax.masked(
        optax.adamw(1e-3), lambda params: {name: name != "dense" for name in params}
    ),
    "apply_if_finite": optax.apply_if_finite(optax.adamw(1e-3), 3),
    "lion": optax.lion(1e-3),
    "no_galore": optax.adamw(1e-3),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_galore_keeps_the_wrappers(name):
    params = small_params()
    report = memory_report(WRAPPERS[name](), params)
    assert report.state_without_galore == real_bytes(WITHOUT[name].init(params))


def labels_by_path(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: LABELS[path[0].key] if path else "sgd", params
    )


def labels_by_name(params):
    return {name: LABELS[name] for name in params}


@pytest.mark.parametrize("labels", [LABELS, labels_by_path, labels_by_name])
def test_partition_counts_each_leaf_in_its_part(labels):
    parts = {"galore": galore_adamw(), "sgd": optax.sgd(0.1, momentum=0.9)}
    report = memory_report(optax.partition(parts, labels), small_params())
    groups = {group.path: group for group in report.groups}
    assert groups["dense/kernel"].projectors == 4 * 8 * 4
    assert groups["dense/kernel"].moments == 4 * 2 * 13 * 4
    assert groups["embed/embedding"].moments == 4 * 50 * 7
    assert "no galore" in groups["embed/embedding"].not_projected


@pytest.mark.parametrize("name", ["chain", "optax_chain", "inject_hyperparams"])
def test_positions_in_a_list_are_not_taken_for_positions_in_the_state(name):
    leaves = {"a": jnp.ones((13, 8)), "b": jnp.ones((9, 14)), "c": jnp.ones(5)}
    tx = optax.chain(optax.clip(1.0), WRAPPERS[name]())
    of_tree, of_list = (memory_report(tx, p) for p in (leaves, list(leaves.values())))
    assert [group.moments for group in of_list.groups] == [g.moments for g in of_tree.groups]
    assert of_list.counters == of_tree.counters


def bytes_of_state(tx, params):
    state = jax.eval_shape(lambda params: tx.init(params), params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def named_like_fields():
    """Names of fields, of labels, of hyperparameters and of positions in a chain; other sizes."""
    return {
        "0": {"mu": jnp.ones((13, 8)), "count": jnp.ones((9, 14))},
        "learning_rate": jnp.ones(3),
        "mu": {"nu": jnp.ones((10, 7))},
        "nu": {"mu": jnp.ones((11, 6)), "0": {"mu": jnp.ones((12, 5))}},
        "trace": jnp.ones((7, 21)),
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.chain(optax.trace(0.9), optax.adamw(1e-3)),
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        lambda: galore_optax.galore(optax.adam(1e-3), rank=4),
        lambda: galore_optax.galore_adamw_8bit(1e-3, rank=4, min_size=16, block_size=4),
        lambda: optax.partition(
            {"mu": galore_optax.galore_adamw(1e-3, rank=4), "nu": optax.sgd(0.1, 0.9)},
            {"0": "nu", "learning_rate": "nu", "mu": "mu", "nu": "mu", "trace": "nu"},
        ),
    ],
    ids=["chain", "inject", "galore", "8 bits", "partition"],
)
def test_parameters_called_like_fields_have_the_bytes_of_their_own_state(make):
    """A parameter has what the state loses when the parameter has no elements."""
    tx, params = make(), named_like_fields()
    groups = {group.path: group for group in memory_report(tx, params).groups}
    leaves, treedef = jax.tree.flatten(params)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    whole = bytes_of_state(tx, params)
    for i, name in enumerate(names):
        without = treedef.unflatten([None if j == i else leaf for j, leaf in enumerate(leaves)])
        group = groups[name.replace("0", "*")]
        of_matrix = 0 if group.rank is None else 2 * 4  # when it was refreshed, and is to be
        kept = whole - bytes_of_state(tx, without)
        assert group.moments + group.projectors == kept - of_matrix, name


def test_groups_have_the_bytes_of_their_leaves():
    groups = {group.path: group for group in memory_report(galore_adamw(), small_params()).groups}
    blocks, dense = groups["blocks/kernel"], groups["dense/kernel"]
    assert (blocks.rank, blocks.parameters) == (4, 4 * 3 * 9 * 14)
    assert (blocks.projectors, blocks.moments) == (4 * 3 * 9 * 4, 4 * 2 * 3 * 4 * 14)
    assert blocks.moments_without_galore == 4 * 2 * 3 * 9 * 14
    assert (dense.projectors, dense.moments) == (4 * 8 * 4, 4 * 2 * 13 * 4)
    assert (groups["small"].projectors, groups["small"].moments) == (0, 4 * 2 * 2 * 21)


def test_leaves_that_differ_in_numbers_are_one_group():
    llama = LLAMAS["9m"]
    report = memory_report(adamw_for(llama), shapes_of(llama, jnp.float32))
    (group,) = [group for group in report.groups if group.path == "layers/*/mlp/gate"]
    h, i, layers, r = llama
    assert (group.leaves, group.shape, group.rank) == (layers, (h, i), r)
    assert (group.projectors, group.moments) == (4 * layers * r * h, 4 * layers * 2 * r * i)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("embed/embedding", "excluded"),
        ("dense/bias", "fewer than two axes"),
        ("blocks/bias", "excluded"),
        ("small", "short side 2 <= rank 4"),
    ],
)
def test_leaves_at_full_size_are_named_with_the_reason(path, reason):
    report = memory_report(galore_adamw(), small_params())
    (group,) = [group for group in report.groups if group.path == path]
    assert (group.rank, group.not_projected, group.projectors) == (None, reason, 0)
    assert re.search(rf"{path}\b.*{re.escape(reason)}", str(report))


def test_leaves_of_ambiguous_axes_are_named_with_the_reason():
    report = memory_report(galore_optax.galore_adamw(1e-3, rank=4), small_params())
    (group,) = [group for group in report.groups if group.path == "blocks/kernel"]
    assert "no dimension numbers" in group.not_projected


def test_leaves_that_no_galore_sees_are_named_with_the_reason():
    groups = memory_report(WRAPPERS["masked"](), small_params()).groups
    reasons = {group.path: group.not_projected for group in groups}
    assert reasons["blocks/kernel"] is None
    assert "no galore" in reasons["dense/kernel"]


def shows(text, size):
    """Whether some number in a text, in some unit, is a size in bytes to the digits shown."""
    for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text):
        value = float(number.replace(",", ""))
        rounding = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
        if len(number.replace(",", "").replace(".", "").lstrip("0")) < 2:
            continue
        for unit in (1, 10**3, 10**6, 10**9, 2**10, 2**20, 2**30):
            if abs(value - size / unit) <= rounding:
                return True
    return False


TOTALS = (
    "parameters",
    "projectors",
    "moments",
    "state",
    "state_without_galore",
    "total",
    "total_without_galore",
)


@pytest.mark.parametrize("size", ["9m", "60m"])
def test_printed_report_contains_the_totals(size):
    llama = LLAMAS[size]
    report = memory_report(adamw_for(llama), shapes_of(llama, jnp.float32))
    missing = [total for total in TOTALS if not shows(str(report), getattr(report, total))]
    assert not missing


def test_seven_billion_parameters_are_reported_in_seconds_from_shapes_alone():
    llama = LLAMAS["7b"]
    shapes = shapes_of(llama, jnp.bfloat16)
    arrays = len(jax.live_arrays())
    start = time.process_time()
    report = memory_report(adamw_for(llama), shapes)
    assert time.process_time() - start < 5
    assert len(jax.live_arrays()) <= arrays  # the collector may have come by
    assert report.state == state_bytes(llama, element_bytes=4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: galore_optax.galore(optax.sgd(0.1), rank=100),
        lambda: galore_optax.galore(optax.sgd(0.1), rank=4),
        lambda: galore_optax.galore(optax.sgd(0.1), rank=4, exclude="nowhere"),
        lambda: galore_optax.galore(rank=4),
        lambda: galore_optax.galore(optax.lamb(0.1), rank=4),
    ],
    ids=["projects_nothing", "ambiguous", "unused_pattern", "no_inner", "not_affine"],
)
def test_report_does_not_warn(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_report(make(), small_params())


def test_warnings_come_after_a_report_too():
    tx = galore_optax.galore(optax.sgd(0.1), rank=100)
    params = {"kernel": np.ones((8, 12), np.float32)}
    memory_report(tx, params)
    with pytest.warns(UserWarning, match="projects nothing"):
        tx.init(params)


def test_report_does_not_change_the_state_of_later_inits():
    tx, params = galore_adamw(), small_params()
    before = jax.eval_shape(lambda: tx.init(params))
    memory_report(tx, params)
    assert jax.eval_shape(lambda: tx.init(params)) == before


def test_quantized_parameters_have_the_moments_of_others():
    def kernels(params):
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    tx = galore_optax.galore(optax.adamw(0.1, mask=kernels), rank=4)
    params = {"kernel": jnp.ones((8, 12)), "scale": jnp.ones(8)}
    quantized = galore_optax.quantize_params(params, rank=4)
    plain, few_bits = (memory_report(tx, p) for p in (params, quantized))
    assert few_bits.parameters < plain.parameters
    assert (few_bits.moments, few_bits.projectors) == (plain.moments, plain.projectors)
    assert few_bits.moments_without_galore == plain.moments_without_galore == 8 * (8 * 12 + 8)


@pytest.mark.parametrize(("size", "unit", "name"), [("9m", 2**20, "MiB"), ("1b", 2**30, "GiB")])
def test_comparison_has_a_line_for_each_report(size, unit, name):
    llama = LLAMAS[size]
    reports = {
        "AdamW": memory_report(optax.adamw(1e-3), shapes_of(llama, jnp.float32)),
        "GaLore, half": memory_report(adamw_for(llama), shapes_of(llama, jnp.bfloat16)),
    }
    header, _, *lines = compare_memory(reports).splitlines()
    assert header.split() == [name, "parameters", "projectors", "moments", "total", "/", "AdamW"]
    projectors, moments, _ = elements(llama)
    h, i = llama.hidden, llama.intermediate
    norms = (2 * llama.layers + 1) * h
    count = llama.layers * (4 * h * h + 3 * h * i) + 2 * VOCABULARY * h + norms
    expected = np.array([[4 * count, 0, 8 * count], [2 * count, 4 * projectors, 4 * moments]])
    for line, row, report in zip(lines, expected, reports, strict=True):
        assert line.startswith(report)
        shown = [float(x) for x in line.removeprefix(report).split()]
        sizes = [*row, row.sum()]
        np.testing.assert_allclose(shown[:4], np.array(sizes) / unit, atol=0.0051)
        np.testing.assert_allclose(shown[4], row.sum() / expected[0].sum(), atol=0.0051)


@pytest.mark.parametrize(
    ("reports", "error", "message"),
    [
        ({}, ValueError, "at least one MemoryReport; got none"),
        ({"AdamW": optax.adamw(1e-3)}, TypeError, r"reports\['AdamW'\] must be what memory_report"),
    ],
)
def test_comparison_of_what_are_no_reports(reports, error, message):
    with pytest.raises(error, match=message):
        compare_memory(reports)
