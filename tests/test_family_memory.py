"""What the presets of the family cost: bytes of state by formula, and temporaries as compiled."""

import jax
import jax.numpy as jnp
import pytest

import galore_optax
from benchmarks.shapes import RANKS, stacked_llama
from examples.flax_llama.config import PRESETS

FLOAT, INT = 4, 4


def is_matrix(leaf):
    return leaf.ndim == 3


def blocks(size, layers=1, min_size=4096):
    """Bytes of moments in 8 bits: a byte for each element and a scale, in whole blocks of 256."""
    coded = (256 + FLOAT) * -(-size // 256)
    return layers * (coded if layers * size >= min_size else FLOAT * size)


def plain(size, layers=1):
    return FLOAT * layers * size


def of_state(shapes, matrix, moment=plain, moments=2, extra=0):
    """Bytes of a state.

    Args:
      shapes: the parameters.
      matrix: returns the bytes that are kept of a stack of (m, n) matrices, from how many there
        are and their short and long sides.
      moment: the bytes of a moment of so many elements, of leaves that are not projected.
      moments: how many of these there are of each.
      extra: all else.
    """
    total = extra
    for leaf in jax.tree.leaves(shapes):
        if is_matrix(leaf):
            total += matrix(leaf.shape[0], *sorted(leaf.shape[1:]))
        else:
            total += moments * moment(leaf.size)
    return total


COUNTERS = 2 * INT  # of each matrix: how often it was refreshed, and when it is due
OF_ALL = 2 * INT  # galore's step, and the version of its state
COUNT = INT  # of Adam, or of a schedule


def of_adam(basis, more, rank, extra=OF_ALL + COUNT, moment=plain):
    """The formula of a preset of Adam, whose basis and more of a matrix have so many bytes."""

    def formula(shapes, model):
        r = rank(model) if callable(rank) else rank

        def matrix(layers, short, long):
            rows = r(short) if callable(r) else r
            one = basis(rows, short, long) + COUNTERS + more
            return layers * one + 2 * moment(rows * long, layers)

        return of_state(shapes, matrix, moment, extra=extra)

    return formula


def dense(r, short, long):
    return FLOAT * r * short


def numbers(r, short, long):
    return INT * r


def weighted(r, short, long):
    return (INT + FLOAT) * r


def nothing(r, short, long):
    return 0


def with_error(r, short, long):
    return FLOAT * (r * short + short * long)


def int4(r, short, long):
    """Two elements to a byte, in whole blocks of 256, each with a scale and a zero."""
    return (256 // 2 + FLOAT + 1) * -(-r * short // 256)


def second_moment(layers, m, n):
    """Adafactor's: its factors and a number, or all of it and two."""
    return FLOAT * (layers * (m + n) + 1 if min(m, n) >= 128 else layers * m * n + 2)


def layers_rows_columns(leaf):
    return (1, 1, *leaf.shape)[-3:]


def of_flora(shapes, model):
    """The momentum has rank r, and the second moment is that of whole matrices."""
    r = RANKS[model]
    total = OF_ALL + 2 * COUNT
    for leaf in jax.tree.leaves(shapes):
        layers, m, n = layers_rows_columns(leaf)
        low_rank = layers * (COUNTERS + FLOAT * r * max(m, n))
        total += low_rank if is_matrix(leaf) else plain(leaf.size)
        total += second_moment(layers, m, n)
    return total


def of_adafactor(shapes, model):
    """There is no momentum, and the second moment is that of low-rank gradients."""
    r = RANKS[model]
    total = OF_ALL + COUNT
    for leaf in jax.tree.leaves(shapes):
        layers, m, n = layers_rows_columns(leaf)
        if is_matrix(leaf):
            total += layers * (COUNTERS + FLOAT * r * min(m, n))
            m, n = r, max(m, n)
        total += second_moment(layers, m, n)
    return total


def of_one_moment(extra, moments=1):
    """The formula of a preset with one moment of matrices, and so many of other leaves."""

    def formula(shapes, model):
        r = RANKS[model]

        def matrix(layers, short, long):
            return layers * (FLOAT * (r * short + r * long) + COUNTERS)

        return of_state(shapes, matrix, moments=moments, extra=OF_ALL + extra)

    return formula


def own(model):
    return RANKS[model]


def quarter(model):
    return lambda short: round(short / 4)


LIMITER, SINCE = FLOAT, INT
# Of lazy refresh: by how much the gap was doubled, and five similarities.
LAZY = INT + 5 * FLOAT
# Muon's coefficients; it and Adam count, each for its leaves.
OF_MUON = 3 * FLOAT + 2 * COUNT
# By preset: its arguments, and its formula.
FORMULAE = {
    "galore_adamw": ({"rank": own}, of_adam(dense, 0, own)),
    "fira_adamw": ({"rank": own}, of_adam(dense, LIMITER, own)),
    "apollo_adamw": ({}, of_adam(nothing, LIMITER, quarter)),
    "apollo_mini_adamw": ({}, of_adam(nothing, LIMITER, 1)),
    "ldadamw": ({"rank": own}, of_adam(dense, 0, own)),
    "ldadamw, feedback": (
        {"rank": own, "residual": "error_feedback"},
        of_adam(with_error, 0, own),
    ),
    "tracked_adamw": ({"rank": own}, of_adam(dense, LIMITER, own)),
    "frugal_adamw": ({}, of_adam(numbers, SINCE, quarter)),
    "grass_adamw": ({"rank": own}, of_adam(numbers, SINCE, own)),
    "grass_adamw, sampled": (
        {"rank": own, "projector": "sampled_rows"},
        of_adam(weighted, SINCE, own),
    ),
    "dct_adamw": ({"rank": own}, of_adam(numbers, 0, own)),
    "flora": ({"rank": own}, of_flora),
    "galore_muon": ({"rank": own}, of_one_moment(OF_MUON, moments=2)),
    "galore_adafactor": ({"rank": own, "multiply_by_parameter_scale": False}, of_adafactor),
    "galore_lion": ({"rank": own}, of_one_moment(COUNT)),
    "galore_sgd": ({"rank": own, "momentum": 0.9}, of_one_moment(0)),
    "q_galore_adamw": ({"rank": own}, of_adam(int4, LAZY, own, moment=blocks)),
    "galore_adamw_8bit": ({"rank": own}, of_adam(dense, 0, own, moment=blocks)),
    "fira_adamw_8bit": ({"rank": own}, of_adam(dense, LIMITER, own, moment=blocks)),
    "apollo_adamw_8bit": ({}, of_adam(nothing, LIMITER, quarter, moment=blocks)),
    "apollo_mini_adamw_8bit": ({}, of_adam(nothing, LIMITER, 1, moment=blocks)),
    "ldadamw_8bit": ({"rank": own}, of_adam(dense, 0, own, moment=blocks)),
    "tracked_adamw_8bit": ({"rank": own}, of_adam(dense, LIMITER, own, moment=blocks)),
    "frugal_adamw_8bit": ({}, of_adam(numbers, SINCE, quarter, moment=blocks)),
    "grass_adamw_8bit": ({"rank": own}, of_adam(numbers, SINCE, own, moment=blocks)),
    "dct_adamw_8bit": ({"rank": own}, of_adam(numbers, 0, own, moment=blocks)),
}


def preset(name, model):
    arguments, _ = FORMULAE[name]
    filled = {k: v(model) if callable(v) else v for k, v in arguments.items()}
    numbers = {k: galore_optax.DimensionNumbers(1, 2) for k in ("q", "k", "v", "o")}
    numbers |= {k: galore_optax.DimensionNumbers(1, 2) for k in ("gate", "up", "down")}
    others = {"norm_1": None, "norm_2": None}
    filled["weight_dimension_numbers"] = {
        **{"embed": None, "norm": None, "head": None},
        "layers": numbers | others,
    }
    return getattr(galore_optax, name.partition(",")[0])(1e-3, **filled)


# Each at one size, of which the report is compared, too, and at one of the others in turn.
SIZES = ["60m", "350m", "1b", "7b"]
AT = [(name, "130m") for name in FORMULAE]
AT += [(name, SIZES[i % len(SIZES)]) for i, name in enumerate(FORMULAE)]


@pytest.mark.parametrize(("name", "model"), AT)
def test_state_is_as_large_as_the_formula_says(name, model):
    shapes = stacked_llama(model, PRESETS[model].layers)
    tx = preset(name, model)
    state = jax.eval_shape(tx.init, shapes)
    found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert found == FORMULAE[name][1](shapes, model)
    if model == "130m":
        assert galore_optax.memory_report(tx, shapes).state == found


# The larger matrices of the 60m, and as many layers.
ROWS, COLUMNS, RANK, LAYERS = 512, 1376, 128, 8


def temporaries(tx, shapes):
    """Bytes beside arguments and results of one update, whose state is given away."""
    state = jax.eval_shape(tx.init, shapes)
    compiled = jax.jit(tx.update, donate_argnums=1).lower(shapes, state, shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def stack():
    return {"kernel": jax.ShapeDtypeStruct((LAYERS, ROWS, COLUMNS), jnp.float32)}


def of_stack(**options):
    tx = galore_optax.galore_adamw(
        1e-3,
        rank=RANK,
        weight_dimension_numbers=galore_optax.DimensionNumbers(1, 2),
        **{"projector": "power_iteration"} | options,
    )
    return temporaries(tx, stack())


@pytest.mark.optimized
def test_a_refresh_that_rotates_needs_two_moments_of_one_matrix_more():
    two_moments = 2 * FLOAT * RANK * COLUMNS
    assert of_stack(transport="rotate") <= of_stack() + two_moments
    # All else is that of GaLore.
    assert of_stack(transport="project") <= of_stack() + two_moments / 2
    assert of_stack(transport="reset") <= of_stack() + two_moments


@pytest.mark.parametrize("projector", ["power_iteration", "rows"])
@pytest.mark.optimized
def test_what_uses_the_gradient_makes_no_array_of_its_size(projector):
    """Low-rank arrays may be kept a little longer: R, psi and what they are multiplied with."""
    whole, low_rank = (FLOAT * LAYERS * x * COLUMNS for x in (ROWS, RANK))
    plain = of_stack(projector=projector)
    for residual in ("norm_scaled", "scale_gradient"):
        assert of_stack(projector=projector, residual=residual) - plain <= 3.5 * low_rank < whole
