"""Ranks by role: which they are, and that the state takes the bytes of the uniform rank."""

import copy
import dataclasses
import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_optax
from benchmarks.shapes import RANKS, stacked_llama, unstacked_llama
from examples.flax_llama.config import PRESETS
from examples.flax_llama.model import Llama, dimension_numbers
from galore_optax import MOARA, DimensionNumbers, RankByRole
from tests import layerwise_model as model

STACKED = {"layers": DimensionNumbers(1, 2), "embed": None, "norm": None, "head": None}
# What is in the state of each, beside the counters: bases in another form, or moments in another.
MAKERS = {
    "svd": galore_optax.galore_adamw,
    "rows": functools.partial(galore_optax.galore_adamw, projector="rows"),
    "gaussian": functools.partial(galore_optax.galore_adamw, projector="gaussian"),
    "long": functools.partial(galore_optax.galore_adamw, side="long", accumulation_steps=2),
    "both": functools.partial(galore_optax.galore_adamw, side="both", diagnostics=True),
    "8 bits": galore_optax.galore_adamw_8bit,
    "int4": galore_optax.q_galore_adamw,
    "sgd": galore_optax.galore_sgd,
}


def state_of(tx, params):
    return jax.eval_shape(tx.init, params)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def ranks_of(tx, params):
    """The ranks by the last component of the path; all leaves with the same one have the same."""
    groups = galore_optax.memory_report(tx, params).groups
    found = [(group.path.split("/")[-1], group.rank) for group in groups if group.rank]
    assert len(dict(found)) == len(set(found))
    return dict(found)


def within(tx, uniform, params):
    """Of the bytes of matrices alone, which are less than those of the whole state."""
    layers = {"layers": params["layers"]}
    ratio = nbytes(state_of(tx, layers)) / nbytes(state_of(uniform, layers))
    assert ratio <= 1
    return ratio


SIZES = ("60m", "130m", "250m", "350m", "1b", "3b", "7b")
CASES = [("60m", name, True) for name in MAKERS]
CASES += [("7b", name, True) for name in ("rows", "gaussian", "8 bits", "int4")]
CASES += [(size, "svd", True) for size in SIZES[1:]]
CASES += [("60m", "svd", False), ("7b", "int4", False)]
MORE = [("7b", "rows", False), ("60m", "8 bits", False), ("350m", "gaussian", False)]
CASES += [pytest.param(*case, marks=pytest.mark.ci) for case in MORE]


@pytest.mark.parametrize(("size", "name", "stacked"), CASES)
def test_the_state_takes_the_bytes_of_the_uniform_rank(size, name, stacked):
    """Two layers stand for all, which are alike."""
    config, options = dataclasses.replace(PRESETS[size], layers=2), {}
    if stacked:
        params = stacked_llama(config, 2)
        options = {"weight_dimension_numbers": DimensionNumbers(1, 2)}
    else:
        params = unstacked_llama(config)
    ranks = RankByRole(RANKS[size]), RANKS[size]
    by_role, uniform = (MAKERS[name](1e-3, rank=rank, **options) for rank in ranks)
    assert within(by_role, uniform, params) > 0.99


def test_the_report_of_a_whole_llama_has_the_same_bytes_and_the_ranks():
    params = stacked_llama("1b", PRESETS["1b"].layers)
    of = functools.partial(galore_optax.galore_adamw, 1e-3, weight_dimension_numbers=STACKED)
    found, uniform = (
        galore_optax.memory_report(of(rank=rank), params) for rank in (RankByRole(512), 512)
    )
    assert 0.99 < found.state / uniform.state <= 1
    assert found.moments_without_galore == uniform.moments_without_galore
    ranks = ranks_of(of(rank=RankByRole(512)), params)
    assert ranks.keys() == {"q", "k", "v", "o", "gate", "up", "down"}


def test_the_one_number_is_about_0_90_for_llama_7b():
    tx = galore_optax.galore_adamw(
        1e-3, rank=RankByRole(1024), weight_dimension_numbers=DimensionNumbers(1, 2)
    )
    layers = {"layers": stacked_llama("7b", 32)["layers"]}
    d, f = 4096, 11008
    square, wide = d + 2 * d, d + 2 * f  # elements of basis and moments for each rank
    factor = (4 * square + 3 * wide) / ((0.5 * 2 + 2) * square + (1 + 1 + 2) * wide)
    assert factor == pytest.approx(0.902, abs=1e-3)
    for name, rank in ranks_of(tx, layers).items():
        c = {"q": 0.5, "k": 0.5, "down": 2}.get(name, 1)
        assert abs(rank - factor * c * 1024) < 1.5


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("rank", [1, 3])
def test_few_ranks_are_never_more_bytes(name, rank):
    shapes = {"q": (32, 32), "v": (32, 32), "up": (32, 80), "down": (80, 32)}
    layers = {"layers": {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}}
    of = functools.partial(MAKERS[name], 1e-3)
    within(of(rank=RankByRole(rank)), of(rank=rank), layers)


PARAMS = {
    "q": np.ones((64, 64), np.float32),
    "v": np.ones((64, 64), np.float32),
    "down": np.ones((192, 64), np.float32),
    "small": np.ones((8, 64), np.float32),
    "embed": np.ones((100, 64), np.float32),
}


def adam(rank, **arguments):
    return galore_optax.galore(optax.adam(1e-3), rank=rank, **arguments)


def test_what_the_uniform_rank_leaves_at_full_size_stays_so():
    """Half of 8 would fit a short side of 8."""
    ranks = ranks_of(adam(RankByRole(8, {"small": 0.5, "q": 0.5})), PARAMS)
    assert ranks.keys() == {"q", "v", "down"}
    quantized = galore_optax.quantize_params(PARAMS, rank=RankByRole(8))
    assert {n for n, x in quantized.items() if isinstance(x, galore_optax.QuantizedArray)} == {
        *ranks
    }


@pytest.mark.parametrize("rank", [50, 60, 63])
def test_a_rank_stays_below_the_short_side(rank):
    ranks = ranks_of(adam(RankByRole(rank)), PARAMS)
    assert ranks["down"] == 63
    # What the cap leaves goes to the others, whose ratio stays.
    assert ranks["v"] == pytest.approx(2 * ranks["q"], abs=2) or ranks["v"] == 63


def test_every_matrix_keeps_a_rank():
    ranks = ranks_of(adam(RankByRole(4, {"q": 1e-9, "v": 1e-9})), PARAMS)
    assert ranks["q"] == ranks["v"] == 1
    assert ranks["down"] > 4


def test_the_number_makes_up_for_small_factors_too():
    some, all_of_them = {"q": 0.5, "v": 0.5, "down": 0.5}, {"": 0.5}
    for factors in (some, all_of_them):
        assert set(
            ranks_of(adam(RankByRole(8, factors), exclude="small|embed"), PARAMS).values()
        ) == {8}


def test_where_no_byte_depends_on_the_rank_only_the_factors_count():
    tx = galore_optax.galore(optax.sgd(1e-3), rank=RankByRole(8), projector="gaussian")
    assert ranks_of(tx, PARAMS) == {"q": 4, "v": 8, "down": 16}


def test_a_fraction_and_a_callable_are_uniform_ranks():
    expected = ranks_of(adam(RankByRole(16)), PARAMS)
    by_path = RankByRole(lambda path, shape: 16)
    assert ranks_of(adam(by_path), PARAMS) == expected
    assert ranks_of(adam(RankByRole(0.25), exclude="embed|small"), PARAMS) == expected


def test_inner_transformations_that_differ_by_path():
    """One more rank of v, which has no moments, costs a third of one of q, of the same shape."""
    inner = model.partition(v=optax.sgd(0.1), rest=optax.adam(0.1))
    layers = {"layers": {n: PARAMS[n] for n in ("q", "v", "down")}}
    txs = [galore_optax.galore(inner, rank=rank) for rank in (RankByRole(16, {"q": 0.5}), 16)]
    assert within(*txs, layers) > 0.97


def test_a_mask_of_the_structure_of_all_parameters():
    """The inner transformation cannot be asked about a leaf alone: two moments are presumed."""
    params = {n: PARAMS[n] for n in ("q", "v", "down")}
    mask = dict.fromkeys(params, True)
    tx = galore_optax.galore(optax.masked(optax.adam(0.1), mask), rank=RankByRole(16))
    assert ranks_of(tx, params) == ranks_of(adam(RankByRole(16)), params)


def test_an_update_finds_the_same_ranks_from_gradients_in_another_dtype():
    tx = adam(RankByRole(8))
    state = tx.init(PARAMS)
    gradients = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.bfloat16), PARAMS)
    fresh = adam(RankByRole(8))  # as after a restart
    updates, new = fresh.update(gradients, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    chex.assert_trees_all_equal_shapes(updates, PARAMS)


def test_inject_hyperparams():
    for static in ((), ("rank",)):
        make = optax.inject_hyperparams(galore_optax.galore_adamw, static_args=static)
        tx = make(1e-3, rank=RankByRole(8))
        state = tx.init(PARAMS)
        _, new = jax.jit(tx.update)(PARAMS, state, PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        assert state.inner_state.subspace.right["down"].shape == (64, 11)


def test_a_migrated_state_goes_on():
    tx = adam(RankByRole(8))
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal(galore_optax.migrate(galore_optax.as_version(state, 1)), state)


def test_a_state_of_another_rule_is_refused():
    state = adam(8).init(PARAMS)
    with pytest.raises(ValueError, match="belongs to another configuration"):
        adam(RankByRole(8)).update(PARAMS, state, PARAMS)


FACTORS = {"mix": 0.5, "down": 2.0}


@pytest.mark.parametrize("projector", ["svd", pytest.param("gaussian", marks=pytest.mark.ci)])
def test_layerwise_is_the_ordinary_step(projector):
    with jax.enable_x64(True):
        params, tokens = model.init(), model.batches(5)
        tx = adam(
            RankByRole(5, FACTORS),
            projector=projector,
            update_proj_gap=3,
            weight_dimension_numbers=model.numbers,
        )
        state = jax.jit(tx.init)(params)
        shape = optax.tree.get(state, "mu")["blocks"]["down"]["kernel"].shape
        assert shape[0] == model.LAYERS
        assert shape[-1] > 5
        expected = model.train(model.ordinary(tx), params, state, tokens)
        found = model.train(model.layerwise(tx).step, params, state, tokens)
        chex.assert_trees_all_close(found[0], expected[0], rtol=1e-9, atol=1e-12)
        chex.assert_trees_all_close(found[1], expected[1], rtol=1e-6, atol=1e-9)


def test_layerwise_where_a_leaf_outside_of_the_blocks_is_projected():
    """Its rank depends on that of the blocks, which its own update does not see."""
    params, tokens = model.init(jnp.float32), model.batches(3)
    numbers = model.numbers(params) | {"head": {"kernel": DimensionNumbers(0, 1)}}
    tx = adam(
        RankByRole(5, {"mix": 0.5, "head": 2.0}),
        exclude="embed|scale",
        weight_dimension_numbers=lambda part: jax.tree.map_with_path(
            lambda path, _: functools.reduce(lambda tree, key: tree[key.key], path, numbers), part
        ),
    )
    state = jax.jit(tx.init)(params)
    assert optax.tree.get(state, "mu")["head"]["kernel"].shape != (5, model.V)
    expected = model.train(model.ordinary(tx), params, state, tokens)
    found = model.train(model.layerwise(tx).step, params, state, tokens)
    chex.assert_trees_all_close(found[0], expected[0], atol=1e-4)


# Paths as the models have them, by their factor.
NAMES = {
    "LLaMA in Flax": {
        0.5: ["model/layers/0/self_attn/q_proj/kernel", "model/layers/0/self_attn/k_proj/kernel"],
        2.0: ["model/layers/0/mlp/down_proj/kernel"],
        1.0: [
            *(f"model/layers/0/self_attn/{name}_proj/kernel" for name in "vo"),
            *(f"model/layers/0/mlp/{name}_proj/kernel" for name in ("gate", "up")),
            "lm_head/kernel",
        ],
    },
    "LLaMA of Meta": {
        0.5: ["transformer/h/0/attention/wq/kernel", "transformer/h/0/attention/wk/kernel"],
        2.0: ["transformer/h/0/feed_forward/w2/kernel"],
        1.0: [
            *("transformer/h/0/attention/wv/kernel", "transformer/h/0/attention/wo/kernel"),
            *("transformer/h/0/feed_forward/w1/kernel", "transformer/h/0/feed_forward/w3/kernel"),
        ],
    },
    "LLaMA of the benchmarks": {
        0.5: ["layers/0/q", "layers/k"],
        2.0: ["layers/0/down"],
        1.0: ["layers/0/v", "layers/o", "layers/gate", "layers/up", "layers/norm_1"],
    },
    "Gemma in Flax": {
        0.5: ["transformer/layer_0/attn/q_einsum/w", "transformer/layer_0/attn/k_einsum/w"],
        2.0: [
            "transformer/layer_0/mlp/linear",
            "layer_0/mlp/linear/w",
            "layers/0/mlp/down_proj/kernel",
        ],
        1.0: [
            *("transformer/layer_0/attn/kv_einsum/w", "transformer/layer_0/attn/qkv_einsum/w"),
            *(
                "transformer/layer_0/attn/attn_vec_einsum/w",
                "transformer/layer_0/mlp/gating_einsum",
            ),
        ],
    },
    "GPT-2 in Flax": {
        0.5: [],
        2.0: ["transformer/h/0/mlp/c_proj/kernel"],
        1.0: [
            *("transformer/h/0/attn/c_attn/kernel", "transformer/h/0/attn/c_proj/kernel"),
            "transformer/h/0/mlp/c_fc/kernel",
        ],
    },
    "MaxText": {
        0.5: [
            "params/decoder/layers/self_attention/query/kernel",
            "params/decoder/layers/self_attention/key/kernel",
        ],
        2.0: ["params/decoder/layers/mlp/wo/kernel", "params/decoder/layers/MoeBlock_0/wo"],
        1.0: [
            "params/decoder/layers/self_attention/value/kernel",
            "params/decoder/layers/self_attention/out/kernel",
            "params/decoder/layers/self_attention/qkv_proj/kernel",
            "params/decoder/layers/mlp/wi_0/kernel",
            "params/decoder/layers/mlp/wi_1/kernel",
            "params/decoder/layers/MoeBlock_0/wi_0",
        ],
    },
}


@pytest.mark.plain
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_the_names_of_moara(names):
    rule = RankByRole(8)
    assert {p: rule.factor(p) for c in names for p in names[c]} == {
        p: c for c in names for p in names[c]
    }


def test_the_names_of_the_application():
    config = PRESETS["9m"]
    params = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))), nnx.Param)
    )
    tx = adam(RankByRole(32), weight_dimension_numbers=dimension_numbers)
    report = galore_optax.memory_report(tx, params)
    ranks = {g.path.split("/")[-2]: g.rank for g in report.groups if g.rank}
    assert ranks["q"] == ranks["k"] < ranks["v"] < ranks["down"]
    assert ranks == {"q": 14, "k": 14} | dict.fromkeys(("v", "o", "gate", "up"), 29) | {"down": 57}


def test_the_first_pattern_that_matches_counts():
    rule = RankByRole(8, {"mlp/down": 3.0, re.compile("MLP", re.IGNORECASE): 0.25})
    assert [rule.factor(p) for p in ("mlp/down", "mlp/up", "attn/q")] == [3.0, 0.25, 1.0]


def test_a_rule_can_be_copied_pickled_and_compared():
    factors = {"a": 2.0}
    rule = RankByRole(8, factors)
    factors["a"] = 3.0
    assert rule.factors == {"a": 2.0}
    for one in (rule, RankByRole(0.5)):
        for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert same == one
            assert hash(same) == hash(one)
    with pytest.raises(TypeError):
        MOARA["a"] = 1.0


@pytest.mark.plain
@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0,), ValueError, ("rank of RankByRole must be positive", "got 0")),
        ((1.5,), ValueError, ("rank of RankByRole", "fraction of the short side", "1.5")),
        (("8",), TypeError, ("rank of RankByRole", "positive int", "'8'")),
        ((RankByRole(8),), TypeError, ("rank of RankByRole", "positive int")),
        ((8, ["q"]), TypeError, ("factors of RankByRole", "a mapping", "['q']")),
        ((8, {"(": 2.0}), ValueError, ("factors", "valid regular expressions", "'('")),
        ((8, {3: 2.0}), TypeError, ("factors", "regular expressions", "got 3")),
        ((8, {"q": 0}), ValueError, ("factors['q']", "larger than 0", "got 0")),
        ((8, {"q": -1.0}), ValueError, ("factors['q']", "larger than 0", "got -1.0")),
        ((8, {"q": np.inf}), ValueError, ("factors['q']", "finite", "got inf")),
        ((8, {"q": np.nan}), ValueError, ("factors['q']", "finite", "got nan")),
        ((8, {"q": True}), TypeError, ("factors['q']", "a number", "got True")),
        ((8, {"q": "2"}), TypeError, ("factors['q']", "a number", "got '2'")),
    ],
)
def test_errors(arguments, error, says):
    with pytest.raises(error) as caught:
        RankByRole(*arguments)
    for fragment in says:
        assert fragment in str(caught.value)


def test_a_pattern_that_matches_nothing_is_a_warning():
    tx = adam(RankByRole(8, {"q": 0.5, "^query$": 2.0, "embed": 2.0}))
    with pytest.warns(UserWarning, match="matches none of the projected leaves") as caught:
        tx.init(PARAMS)
    assert [re.search("'(.*?)'", str(w.message))[1] for w in caught] == ["^query$", "embed"]


def test_names_that_moara_does_not_know_are_a_warning():
    params = {"a": PARAMS["v"], "b": PARAMS["down"]}
    with pytest.warns(UserWarning, match="matches none of the projected leaves a, b"):
        adam(RankByRole(8)).init(params)
    adam(RankByRole(8)).init({"down": PARAMS["down"], "b": PARAMS["v"]})  # some are enough
