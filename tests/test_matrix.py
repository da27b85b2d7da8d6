"""How leaves are seen: shapes and dtypes of the state, axes, ranks, and which are projected."""

import functools
import re
import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import DEFAULT_EXCLUDE, DimensionNumbers

RANK = 4
ABSENT = optax.MaskedNode()


class Leaf(NamedTuple):
    shape: tuple[int, ...]
    numbers: Any
    batch: tuple[int, ...]
    m: int
    n: int
    short: str  # the side that is projected where it is to be the short one


MATRICES = {
    "tall": Leaf((12, 8), (0, 1), (), 12, 8, "right"),
    "wide": Leaf((8, 12), (0, 1), (), 8, 12, "left"),
    "square": Leaf((8, 8), (0, 1), (), 8, 8, "left"),
    "transposed": Leaf((12, 8), (1, 0), (), 8, 12, "left"),
    "stacked": Leaf((3, 8, 12), (1, 2), (3,), 8, 12, "left"),
    "stacked_last": Leaf((12, 8, 3), (0, 1), (3,), 12, 8, "right"),
    "stacked_between": Leaf((12, 3, 8), (2, 0), (3,), 8, 12, "left"),
    "two_batch_axes": Leaf((2, 3, 12, 8), (-2, -1), (2, 3), 12, 8, "right"),
    "queries": Leaf((8, 3, 5), (0, (1, 2)), (), 8, 15, "left"),
    "attention_output": Leaf((3, 5, 8), ((0, 1), 2), (), 15, 8, "right"),
    "stacked_queries": Leaf((2, 8, 3, 5), (1, (2, 3)), (2,), 8, 15, "left"),
}
FULL_SIZE = {
    "embedding": (32, 8),
    "lm_head": (8, 32),
    "bias": (12,),
    "scalar": (),
    "small": (RANK, 30),
    "deselected": (8, 12),
}
SIDES = ("short", "long", "left", "right", "both")
OTHER = {"left": "right", "right": "left"}


def numbers_of_tree():
    numbers = {name: DimensionNumbers(*leaf.numbers) for name, leaf in MATRICES.items()}
    return numbers | {
        name: None if name == "deselected" or len(shape) < 2 else DimensionNumbers()
        for name, shape in FULL_SIZE.items()
    }


def params_of_tree(dtype):
    shapes = {name: leaf.shape for name, leaf in MATRICES.items()} | FULL_SIZE
    return {name: np.ones(shape, dtype) for name, shape in shapes.items()}


def expected_state(side, dtype):
    """The state, leaf by leaf, from the table above."""
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    like = jax.ShapeDtypeStruct
    left, right, counters, low_rank = {}, {}, {}, {}
    for name, leaf in MATRICES.items():
        sides = {
            "short": {leaf.short},
            "long": {OTHER[leaf.short]},
            "left": {"left"},
            "right": {"right"},
            "both": {"left", "right"},
        }[side]
        left[name] = like((*leaf.batch, leaf.m, RANK), wide) if "left" in sides else ABSENT
        right[name] = like((*leaf.batch, leaf.n, RANK), wide) if "right" in sides else ABSENT
        rows = RANK if "left" in sides else leaf.m
        columns = RANK if "right" in sides else leaf.n
        counters[name] = like(leaf.batch, jnp.int32)
        low_rank[name] = like((*leaf.batch, rows, columns), wide)
    for name, shape in FULL_SIZE.items():
        left[name] = right[name] = counters[name] = ABSENT
        low_rank[name] = like(shape, wide)
    absent = dict.fromkeys(left, ABSENT)  # what only lazy refresh and diagnostics keep
    return galore_optax.GaloreState(
        step=like((), jnp.int32),
        subspace=galore_optax.Subspace(left, right, counters, counters, *[absent] * 6),
        inner=jax.eval_shape(optax.adamw(0.1).init, low_rank),
        version=like((), jnp.int32),
    )


def adamw_of_tree(side):
    return galore_optax.galore_adamw(
        0.1, rank=RANK, side=side, weight_dimension_numbers=numbers_of_tree()
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_shapes_and_dtypes_of_the_state_at_init(dtype, side):
    with jax.enable_x64(dtype == jnp.float64):
        tx, params = adamw_of_tree(side), params_of_tree(dtype)
        real = (dtype, side) == (jnp.bfloat16, "both")  # with all bases that there are
        state = tx.init(params) if real else jax.eval_shape(tx.init, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state(side, dtype))


@pytest.mark.parametrize(
    ("dtype", "side"),
    # On the short and the long side each leaf is projected on the left and on the right.
    [(jnp.float32, "both"), (jnp.bfloat16, "long"), (jnp.float64, "short")],
)
def test_shapes_and_dtypes_after_an_update(dtype, side):
    tx = adamw_of_tree(side)
    with jax.enable_x64(dtype == jnp.float64):
        params = jax.eval_shape(lambda: params_of_tree(dtype))
        updates, state = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state(side, dtype))


def test_init_takes_shapes_alone():
    tx = adamw_of_tree("short")
    state = tx.init(jax.eval_shape(lambda: params_of_tree(jnp.bfloat16)))
    chex.assert_trees_all_equal(state, tx.init(params_of_tree(jnp.bfloat16)))


@pytest.mark.parametrize("with_params", [False, True])
def test_dtype_of_updates_is_that_of_the_parameters_or_else_of_the_gradients(with_params):
    tx = galore_optax.galore(optax.sgd(0.1), rank=RANK)
    params = {"kernel": jnp.ones((8, 12), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    gradients = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    updates, _ = jax.eval_shape(
        tx.update, gradients, jax.eval_shape(tx.init, params), params if with_params else None
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params if with_params else gradients)


def test_moments_of_bfloat16_leaves_at_full_size_are_computed_in_float32():
    tx = galore_optax.galore(optax.scale_by_adam(b2=0.999), rank=RANK)
    params = {"kernel": jnp.ones((8, 12), jnp.bfloat16), "bias": jnp.ones(100, jnp.bfloat16)}
    gradients = {**params, "bias": jnp.linspace(0.1, 3.0, 100, dtype=jnp.bfloat16)}
    _, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    expected = 0.001 * np.asarray(gradients["bias"], np.float64) ** 2
    np.testing.assert_allclose(optax.tree.get(state, "nu")["bias"], expected, rtol=1e-5)


class StateOnDeviceTest(chex.TestCase):
    """Real updates of a 2-D, a stacked and a full-size leaf, jitted or not, on device or host."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_types_of_the_state_stay_as_they_are(self):
        params = {
            "kernel": np.ones((12, 8), np.float32),
            "stacked": np.ones((2, 8, 12), np.float32),
            "bias": np.ones(12, np.float32),
        }
        tx = galore_optax.galore_adamw(
            0.1, rank=RANK, weight_dimension_numbers=DimensionNumbers(-2, -1)
        )
        first = self.variant(tx.init)(params)
        expected = galore_optax.Subspace(
            left={"kernel": ABSENT, "stacked": np.ones((2, 8, RANK)), "bias": ABSENT},
            right={"kernel": np.ones((8, RANK)), "stacked": ABSENT, "bias": ABSENT},
        )
        chex.assert_trees_all_equal_shapes(first.subspace.left, expected.left)
        chex.assert_trees_all_equal_shapes(first.subspace.right, expected.right)
        updates, second = self.variant(tx.update)(params, first, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(second, first)
        chex.assert_tree_all_finite(updates)


def by_hand_on_wide_matrices(leaf):
    """A leaf's matrices, (count, 8, 12), and the inverse, written out for each leaf."""
    views = {
        "wide": (lambda x: x[None], lambda y: y[0]),
        "transposed": (lambda x: x.T[None], lambda y: y[0].T),
        "stacked": (lambda x: x, lambda y: y),
        "stacked_first_of_two": (
            lambda x: x.reshape(6, 8, 12),
            lambda y: y.reshape(2, 3, 8, 12),
        ),
        "stacked_last": (lambda x: np.moveaxis(x, 2, 0), lambda y: np.moveaxis(y, 0, 2)),
        "stacked_between": (
            lambda x: np.transpose(x, (1, 2, 0)),
            lambda y: np.transpose(y, (2, 0, 1)),
        ),
        "queries": (lambda x: x.reshape(1, 8, 12), lambda y: y.reshape(8, 3, 4)),
        "attention_output": (
            lambda x: x.reshape(12, 8).T[None],
            lambda y: y[0].T.reshape(3, 4, 8),
        ),
        "output_axes_exchanged": (
            lambda x: np.swapaxes(x, 1, 2).reshape(1, 8, 12),
            lambda y: np.swapaxes(y.reshape(8, 4, 3), 1, 2),
        ),
    }
    return views[leaf]


ORDERS = {
    "wide": ((8, 12), (0, 1)),
    "transposed": ((12, 8), (1, 0)),
    "stacked": ((3, 8, 12), (1, 2)),
    "stacked_first_of_two": ((2, 3, 8, 12), (-2, -1)),
    "stacked_last": ((8, 12, 3), (0, 1)),
    "stacked_between": ((12, 3, 8), (2, 0)),
    "queries": ((8, 3, 4), (0, (1, 2))),
    "attention_output": ((3, 4, 8), (2, (0, 1))),
    "output_axes_exchanged": ((8, 3, 4), (0, (2, 1))),
}
KEYWORDS = {"rank": RANK, "update_proj_gap": 2, "weight_decay": 0.1}


def updates_of_three_steps(tx, params, gradients):
    update = jax.jit(tx.update)
    state, updates = tx.init(params), []
    for gradient in gradients:
        update_now, state = update(gradient, state, params)
        updates.append(jax.tree.map(np.asarray, update_now))
    return updates


@functools.cache
def problem_of_orders():
    rng = np.random.default_rng(0)
    trees = [
        {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in ORDERS.items()}
        for _ in range(4)
    ]
    return trees[0], trees[1:]


@functools.cache
def updates_of_orders():
    numbers = {name: DimensionNumbers(*axes) for name, (_, axes) in ORDERS.items()}
    tx = galore_optax.galore_adamw(0.1, weight_dimension_numbers=numbers, **KEYWORDS)
    return updates_of_three_steps(tx, *problem_of_orders())


@functools.cache
def adamw_of_one_matrix():
    tx = galore_optax.galore_adamw(0.1, **KEYWORDS)
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


@pytest.mark.parametrize("name", ORDERS)
def test_update_is_that_of_each_matrix_on_its_own(name):
    take, put_back = by_hand_on_wide_matrices(name)
    params, gradients = problem_of_orders()
    separate = [
        updates_of_three_steps(
            adamw_of_one_matrix(), take(params[name])[k], [take(g[name])[k] for g in gradients]
        )
        for k in range(len(take(params[name])))
    ]
    for step, found in enumerate(updates_of_orders()):
        expected = put_back(np.stack([updates[step] for updates in separate]))
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_axes_are_merged_in_the_order_given(order):
    gradient = np.random.default_rng(0).normal(size=(3, 4, 20)).astype(np.float32)
    tx = galore_optax.galore(
        optax.identity(), rank=RANK, weight_dimension_numbers=DimensionNumbers(order, 2)
    )
    _, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    u, _, _ = np.linalg.svd(gradient.transpose(*order, 2).reshape(12, 20), full_matrices=False)
    left = np.asarray(state.subspace.left)
    np.testing.assert_allclose(left @ left.T, u[:, :RANK] @ u[:, :RANK].T, atol=1e-5)


def tree_of(paths):
    """A nested tree of (8, 12) matrices, or of other shapes, from paths."""
    shapes = paths if isinstance(paths, dict) else dict.fromkeys(paths, (8, 12))
    tree = {}
    for path, shape in shapes.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def subspaces(params, **arguments):
    tx = galore_optax.galore(optax.identity(), **{"rank": RANK, **arguments})
    return jax.eval_shape(tx.init, params).subspace


def projected(params, **arguments):
    """Paths of the leaves that have a basis."""
    state = subspaces(params, **arguments)
    leaves = jax.tree_util.tree_leaves_with_path((state.left, state.right))
    return {"/".join(key.key for key in path[1:]) for path, _ in leaves}


def ranks(params, rank):
    state = subspaces(params, rank=rank)
    leaves = jax.tree_util.tree_leaves_with_path((state.left, state.right))
    return {"/".join(key.key for key in path[1:]): leaf.shape[-1] for path, leaf in leaves}


SIZES = {"narrow/kernel": (8, 100), "middle/kernel": (60, 30), "large/kernel": (40, 64)}


def rank_by_path(path, shape):
    if path.startswith("narrow"):
        return 3
    return 0.5 if shape == (40, 64) else 7


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (7, {"narrow/kernel": 7, "middle/kernel": 7, "large/kernel": 7}),
        (np.int64(7), {"narrow/kernel": 7, "middle/kernel": 7, "large/kernel": 7}),
        (10, {"middle/kernel": 10, "large/kernel": 10}),
        (30, {"large/kernel": 30}),
        (0.25, {"narrow/kernel": 2, "middle/kernel": 8, "large/kernel": 10}),
        (0.001, {"narrow/kernel": 1, "middle/kernel": 1, "large/kernel": 1}),
        (rank_by_path, {"narrow/kernel": 3, "middle/kernel": 7, "large/kernel": 20}),
    ],
    ids=["int", "numpy", "short_side_below", "short_side_equal", "fraction", "tiny", "callable"],
)
def test_rank_of_each_matrix(rank, expected):
    assert ranks(tree_of(SIZES), rank) == expected


def test_fraction_of_a_merged_and_stacked_matrix_is_of_its_short_side():
    params = {"queries": jax.ShapeDtypeStruct((2, 40, 4, 5), jnp.float32)}
    numbers = DimensionNumbers(1, (2, 3))
    assert subspaces(params, rank=0.5, weight_dimension_numbers=numbers).right["queries"].shape == (
        2,
        20,
        10,
    )


KERNELS = {
    "blocks/attention/kernel": (3, 8, 12),
    "blocks/mlp/kernel": (3, 8, 12),
    "projection/kernel": (8, 12),
    "projection/offset": (12,),
}
STACKED = DimensionNumbers(1, 2)
ALL_NUMBERS = {
    "blocks": {"attention": {"kernel": STACKED}, "mlp": {"kernel": STACKED}},
    "projection": {"kernel": DimensionNumbers(0, 1), "offset": None},
}
MUON_NUMBERS = jax.tree.map(
    lambda x: optax.contrib.MuonDimensionNumbers(*x),
    ALL_NUMBERS,
    is_leaf=lambda x: isinstance(x, DimensionNumbers),
)
ALL_KERNELS = {path for path in KERNELS if path.endswith("kernel")}


def numbers_from_params(params):
    def of_leaf(leaf):
        return DimensionNumbers(-2, -1) if leaf.ndim > 1 else None

    return jax.tree.map(of_leaf, params)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (DimensionNumbers(-2, -1), ALL_KERNELS),
        (optax.contrib.MuonDimensionNumbers(-2, -1), ALL_KERNELS),
        (STACKED, {"blocks/attention/kernel", "blocks/mlp/kernel"}),
        (ALL_NUMBERS, ALL_KERNELS),
        (MUON_NUMBERS, ALL_KERNELS),
        ({"blocks": STACKED, "projection": DimensionNumbers()}, ALL_KERNELS),
        ({"blocks": STACKED, "projection": None}, ALL_KERNELS - {"projection/kernel"}),
        (
            {"blocks": {"attention": STACKED, "mlp": None}, "projection": DimensionNumbers()},
            ALL_KERNELS - {"blocks/mlp/kernel"},
        ),
        (numbers_from_params, ALL_KERNELS),
        (lambda params: STACKED, {"blocks/attention/kernel", "blocks/mlp/kernel"}),
    ],
    ids=[
        "single",
        "single_of_muon",
        "single_that_fits_some",
        "tree",
        "tree_of_muon",
        "prefix",
        "prefix_with_none",
        "deeper_prefix",
        "callable",
        "callable_that_returns_a_prefix",
    ],
)
def test_dimension_numbers_select_axes(numbers, expected):
    params = tree_of(KERNELS)
    assert projected(params, weight_dimension_numbers=numbers) == expected
    state = subspaces(params, weight_dimension_numbers=numbers)
    for path in expected:
        leaf = functools.reduce(dict.__getitem__, path.split("/"), state.left)
        assert leaf.shape == (*KERNELS[path][:-2], 8, RANK)


def test_default_dimension_numbers_are_those_of_a_dense_kernel():
    params = tree_of({"kernel": (8, 12)})
    default, named = (
        subspaces(params, side="right", weight_dimension_numbers=numbers)
        for numbers in (None, DimensionNumbers(reduction_axis=0, output_axis=1))
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(default, named)
    assert default.right["kernel"].shape == (12, RANK)


PATHS = ["encoder/query/kernel", "encoder/key/kernel", "decoder/query/kernel"]


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (None, set(PATHS)),
        ("query", {"encoder/key/kernel"}),
        ("^encoder/", {"decoder/query/kernel"}),
        ("encoder/query|decoder", {"encoder/key/kernel"}),
        (re.compile("QUERY", re.IGNORECASE), {"encoder/key/kernel"}),
        (lambda path, shape: path == "decoder/query/kernel", set(PATHS[:2])),
        (lambda path, shape: shape == (8, 12), set()),
        (
            {
                "encoder": {"query": {"kernel": True}, "key": {"kernel": False}},
                "decoder": {"query": {"kernel": False}},
            },
            set(PATHS[1:]),
        ),
        ({"encoder": True, "decoder": False}, {"decoder/query/kernel"}),
        ({"encoder": {"query": True, "key": False}, "decoder": False}, set(PATHS[1:])),
        (False, set(PATHS)),
    ],
    ids=[
        "none",
        "regex",
        "regex_anchored",
        "regex_alternatives",
        "compiled",
        "callable_of_path",
        "callable_of_shape",
        "mask",
        "prefix",
        "deeper_prefix",
        "one_bool",
    ],
)
@pytest.mark.filterwarnings("ignore:galore projects nothing")
def test_exclude_selects_leaves(exclude, expected):
    assert projected(tree_of(PATHS), exclude=exclude) == expected


@pytest.mark.parametrize(
    "path",
    [
        "embed/embedding",
        "token_embedder/embedding",
        "embed_tokens/weight",
        "model/Embed_0/kernel",
        "position_embedding",
        "wte",
        "wte/kernel",
        "transformer/wpe/kernel",
        "lm_head/kernel",
        "model/lm_head",
        "head/kernel",
        "output_head/kernel",
        "mlm_head/kernel",
        "LM_Head/kernel",
        "logits/kernel",
        "decoder/logits_dense/kernel",
        "blocks/norm/scale",
        "blocks/dense/bias",
        "scale",
    ],
)
def test_default_leaves_at_full_size(path):
    assert projected(tree_of([path, "dense/kernel"])) == {"dense/kernel"}


@pytest.mark.parametrize(
    "path",
    [
        "attention/output/kernel",
        "o_proj/kernel",
        "output/kernel",
        "heads/kernel",
        "header/kernel",
        "multi_head_attention/query/kernel",
        "MultiHeadDotProductAttention_0/out/kernel",
        "overhead/kernel",
        "wtext/kernel",
        "wpe2/kernel",
        "newte/kernel",
        "unscaled/kernel",
        "scale/kernel",
        "scale_projection/kernel",
        "bias_network/kernel",
        "rescale",
        "prelogits/kernel",
    ],
)
def test_default_does_not_exclude_what_only_looks_similar(path):
    assert projected(tree_of([path])) == {path}


def test_public_default_is_what_the_default_excludes():
    paths = ["embed/embedding", "lm_head/kernel", "dense/kernel"]
    assert projected(tree_of(paths), exclude=DEFAULT_EXCLUDE) == projected(tree_of(paths))


def warnings_of(params, count=1, **arguments):
    """Those of galore, which are also those of a preset that shows it the matrices alone."""
    arguments = {"rank": RANK, **arguments}
    found = []
    for tx in (
        galore_optax.galore(optax.identity(), **arguments),
        galore_optax.galore_muon(0.1, **arguments),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                tx.init(params)
        assert {(w.category, w.filename) for w in caught} <= {(UserWarning, __file__)}
        found.append([str(w.message) for w in caught])
    assert found[0] == found[1]
    return found[0]


def test_all_leaves_of_ambiguous_axes_are_named_in_one_warning():
    shapes = {"a/kernel": (3, 8, 12), "b/kernel": (8, 3, 5), "c/kernel": (8, 12), "d": (2, 2, 8, 9)}
    (message,) = warnings_of(tree_of(shapes))
    assert "a/kernel, b/kernel, d" in message
    assert "c/kernel" not in message
    assert "weight_dimension_numbers" in message


def test_excluded_leaves_of_ambiguous_axes_are_not_warned_of():
    shapes = {"embed/embedding": (3, 8, 12), "b/kernel": (8, 12)}
    assert warnings_of(tree_of(shapes)) == []


def test_projecting_nothing_is_warned_of_with_every_reason():
    shapes = {"bias": (8,), "small": (3, 9), "lm_head": (8, 12)}
    (message,) = warnings_of(tree_of(shapes))
    assert "projects nothing" in message
    for path, reason in [
        ("bias", "fewer than two axes"),
        ("small", "short side 3 <= rank 4"),
        ("lm_head", "excluded"),
    ]:
        assert re.search(rf"{path} \([\d, ]*\) \({reason}\)", message)


@pytest.mark.parametrize("exclude", ["^query$", re.compile("^query$")], ids=["text", "compiled"])
def test_pattern_that_matches_nothing_lists_the_leaves(exclude):
    (message,) = warnings_of(tree_of(PATHS), exclude=exclude)
    assert "matches none" in message
    assert "^query$" in message
    for path in PATHS:
        assert path in message


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"exclude": None},
        {"exclude": "key"},
        {"exclude": lambda path, shape: False},
        {"exclude": {"encoder": False, "decoder": False}},
        {"weight_dimension_numbers": DimensionNumbers()},
        {"rank": 0.5},
    ],
    ids=["defaults", "none", "pattern", "callable", "mask", "numbers", "fraction"],
)
def test_no_warning_where_nothing_is_wrong(arguments):
    assert warnings_of(tree_of(PATHS), **arguments) == []


def test_tree_without_leaves_is_not_warned_of():
    assert warnings_of({}) == []


@pytest.mark.parametrize(
    ("shapes", "arguments"),
    [
        ({"a/kernel": (3, 8, 12), "b/kernel": (8, 12)}, {}),
        ({"bias": (8,)}, {}),
        ({"a/kernel": (8, 12)}, {"exclude": "query"}),
    ],
    ids=["ambiguous", "nothing", "pattern"],
)
def test_each_transformation_warns_once(shapes, arguments):
    params = tree_of(shapes)
    assert len(warnings_of(params, count=3, **arguments)) == 1
    assert len(warnings_of(params, **arguments)) == 1  # another transformation warns again


def test_warnings_point_at_the_line_that_calls_init():
    tx = galore_optax.galore(optax.identity(), rank=RANK)
    with pytest.warns(UserWarning, match="projects nothing") as caught:
        tx.init({"bias": jnp.ones(8)})
    assert caught[0].filename == __file__


@pytest.mark.parametrize("bits", [8, 32])
def test_a_new_state_can_be_donated(bits):
    """No array is there twice: XLA refuses to be given a buffer two times."""
    preset = galore_optax.galore_adamw_8bit if bits == 8 else galore_optax.galore_adamw
    options = {"min_size": 0, "projector_dtype": "int4"} if bits == 8 else {}
    tx = preset(0.1, rank=2, side="both", refresh="lazy", diagnostics=True, **options)
    state = tx.init({"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)})
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state) if x.size]
    assert len(set(buffers)) == len(buffers)
