"""Which leaves are left at full size by their names, and by what lies beside them."""

import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import galore_optax
from galore_optax import DEFAULT_EXCLUDE, DimensionNumbers
from galore_optax._names import is_table
from galore_optax._select import Selection
from galore_optax._view import MatrixView

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "leaves.md"
ROWS = re.findall(r"^\| (.+) \| `(.+)` \| (full size|projected) \|$", PAGE.read_text(), re.M)
LAST = DimensionNumbers(-2, -1)
LAYERS, WIDTH = 12, 32


def projected(params, **options):
    """The paths of the leaves that galore projects, with no warning but of what is ambiguous."""
    tx = galore_optax.galore(optax.sgd(1.0), **{"rank": 4, **options})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "galore (leaves|projects nothing)")
        jax.eval_shape(tx.init, params)
        report = galore_optax.memory_report(tx, params)
    return {group.path for group in report.groups if group.rank is not None}


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


@pytest.mark.parametrize(("where", "path", "expected"), ROWS)
def test_the_page_of_names_says_what_the_default_does(where, path, expected):
    assert where
    params = jax.ShapeDtypeStruct((8, 12), jnp.float32)
    for component in reversed(path.split("/")):
        params = {component: params}
    full_size = re.search(DEFAULT_EXCLUDE, path) is not None
    assert full_size == (expected == "full size")
    assert bool(projected(params)) != full_size


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("embed/embedding", True),
        ("model/lm_head/kernel", True),
        ("transformer/wte", True),
        ("output/weight", True),
        ("layers/output/weight", False),
        ("blocks/up/kernel", False),
        ("blocks/moe/router/kernel", False),
        ("embeddings/norm/scale", False),
        ("lm_head/bias", False),
    ],
)
def test_tables_are_embeddings_and_heads_and_none_of_their_vectors(path, expected):
    assert is_table(path) == expected


def test_the_page_has_both_kinds():
    assert {expected for *_, expected in ROWS} == {"full size", "projected"}
    assert len(ROWS) > 80


@pytest.mark.parametrize("rank", [4, 0.25])
@pytest.mark.parametrize("numbers", [None, LAST], ids=["default", "for all"])
def test_vectors_stacked_like_matrices_beside_them_are_none(numbers, rank):
    stacked = {"first": (LAYERS, WIDTH), "up": (LAYERS, WIDTH, 64), "last": (LAYERS, 64)}
    params = {"blocks": shapes(**stacked, each=(LAYERS,)), "matrix": shapes(m=(WIDTH, 64))}
    found = projected(params, weight_dimension_numbers=numbers, rank=rank)
    assert found == {"matrix/m"} | ({"blocks/up"} if numbers else set())


def test_vectors_stacked_over_two_axes():
    params = shapes(norms=(2, 3, 32), matrices=(2, 3, 32, 64))
    assert projected(params, weight_dimension_numbers=LAST, rank=2) == {"matrices"}


def test_components_inside_of_a_key_make_parts_of_the_tree():
    params = {
        "net/layer_stack/block/linear": shapes(w=(LAYERS, WIDTH, 64), b=(LAYERS, 64)),
        "net/layer_stack/block/gain": shapes(each=(LAYERS, WIDTH)),
        "net/first": shapes(w=(64, WIDTH)),
    }
    assert projected(params) == {"net/first/w"}


@pytest.mark.parametrize(
    "beside",
    [
        {"query": (32, 4, 8), "query_offset": (4, 8)},  # the leading size is not that of all leaves
        {"down": (12, 32), "wide": (12, 64)},  # no leaf has three axes
        {"fused": (3, 32, 64)},  # another leading size
    ],
    ids=str,
)
def test_matrices_beside_other_leaves_stay_matrices(beside):
    assert "matrix" in projected(shapes(matrix=(12 if "down" in beside else 32, 64), **beside))


def test_numbers_given_for_a_leaf_have_the_last_word():
    params = shapes(rows=(12, 32), stack=(12, 32, 64))
    one_by_one = {"rows": DimensionNumbers(0, 1), "stack": DimensionNumbers(1, 2)}
    assert projected(params, weight_dimension_numbers=one_by_one) == {"rows", "stack"}
    by_path = lambda path, shape: DimensionNumbers(len(shape) - 2, len(shape) - 1)  # noqa: E731
    assert projected(params, weight_dimension_numbers=by_path) == {"rows", "stack"}
    # The leading axis of the leaf of three is its matrix', and so no stack.
    assert projected(params, weight_dimension_numbers=DimensionNumbers(0, 1)) == {"rows", "stack"}


def test_of_a_part_of_a_tree_the_whole_tree_says_what_is_projected():
    """As layerwise updates it: beside the last leaf there is nothing then."""
    whole = {"blocks": shapes(kernel=(4, 8, 16)), "last": shapes(gain=(4, 16))}
    selection = Selection(rank=2, weight_dimension_numbers=LAST)
    known = [v.path for v in selection.views(whole) if isinstance(v, MatrixView)]
    assert known == ["blocks/kernel"]
    (of_part,) = selection.views({"last": whole["last"]}, projected=known)
    assert not isinstance(of_part, MatrixView)
    (alone,) = selection.views({"last": whole["last"]})
    assert isinstance(alone, MatrixView)


@pytest.mark.parametrize("name", ["stack", "embed"])
def test_a_warning_names_what_is_taken_for_vectors(name):
    """Also where the matrices beside them are excluded, and so in no warning themselves."""
    params = {"a": shapes(gain=(12, 32), **{name: (12, 32, 64)}), "b": shapes(matrix=(32, 64))}
    says = "leaves a/gain at full" if name == "embed" else "leaves a/stack at full .*and a/gain at"
    with pytest.warns(UserWarning, match=says + r".* they are stacks of vectors.*weight_dimension"):
        jax.eval_shape(galore_optax.galore(optax.sgd(1.0), rank=4).init, params)


def test_a_gate_beside_experts_is_a_router():
    mlp = {"gate": shapes(kernel=(32, 64)), "up": shapes(kernel=(32, 64))}
    assert projected({"mlp": mlp}) == {"mlp/gate/kernel", "mlp/up/kernel"}
    mlp["experts"] = shapes(w=(64, 32, 16))
    assert projected({"mlp": mlp}) == {"mlp/up/kernel"}
    assert projected({"mlp": mlp}, exclude=None) == {"mlp/gate/kernel", "mlp/up/kernel"}


def linen_params():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    return nn.Dense(32, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 16)))["params"]


@pytest.mark.parametrize(
    "params",
    [linen_params(), nnx.state(nnx.Linear(16, 32, rngs=nnx.Rngs(0)))],
    ids=["linen", "nnx"],
)
def test_callables_see_the_same_paths_with_boxes_and_without(params):
    """Flax puts parameters in boxes at init, and may hand them over without at update."""
    seen = []

    def numbers(tree):
        found = jax.tree_util.tree_flatten_with_path(tree)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found[0]]
        seen.append(("numbers", paths))
        return found[1].unflatten(
            [DimensionNumbers() if path == "kernel" else None for path in paths]
        )

    def rank(path, shape):
        seen.append(("rank", path, shape))
        return 4

    def exclude(path, shape):
        seen.append(("exclude", path, shape))
        return False

    tx = galore_optax.galore(
        optax.sgd(1.0), rank=rank, exclude=exclude, weight_dimension_numbers=numbers
    )
    state = tx.init(params)
    at_init, bare = list(seen), {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}
    seen.clear()
    tx.init(bare)
    assert at_init == seen
    assert ("numbers", ["bias", "kernel"]) in seen
    assert ("rank", "kernel", (16, 32)) in seen
    assert jax.tree.leaves(state.subspace.left)[0].shape == (16, 4)


def test_trees_in_boxes_fit_parameters_without_them():
    params = linen_params()
    numbers = jax.tree.map(
        lambda box: box.replace_boxed(DimensionNumbers()) if hasattr(box, "unbox") else None,
        params,
        is_leaf=lambda x: hasattr(x, "unbox"),
    )
    tx = galore_optax.galore(optax.sgd(1.0), rank=4, weight_dimension_numbers=numbers)
    assert jax.tree.leaves(tx.init(params).subspace.left)[0].shape == (16, 4)
    bare = nn.unbox(params)
    assert tx.init(bare).subspace.left["kernel"].shape == (16, 4)


def test_complex_leaves_that_are_excluded_go_through_the_inner_transformation():
    rng = np.random.default_rng(0)
    filters = (rng.normal(size=(8, 12)) + 1j * rng.normal(size=(8, 12))).astype(np.complex64)
    params = {"filters": jnp.asarray(filters), "kernel": jnp.ones((8, 12))}
    inner = optax.adamw(1e-2)
    tx = galore_optax.galore(inner, rank=2, exclude="filters")
    updates, _ = tx.update(params, tx.init(params), params)
    expected, _ = inner.update(params, inner.init(params), params)
    np.testing.assert_allclose(updates["filters"], expected["filters"], rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 12), (12,)], ids=["matrix", "vector"])
def test_other_complex_leaves_are_refused_with_what_to_do(shape):
    params = {"filters": jnp.ones(shape, jnp.complex64), "kernel": jnp.ones((8, 12))}
    with pytest.raises(TypeError, match=r"filters has dtype complex64.*split_real_and_imaginary"):
        galore_optax.galore(optax.sgd(1.0), rank=2).init(params)
    tx = optax.contrib.split_real_and_imaginary(galore_optax.galore(optax.sgd(1.0), rank=2))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["filters"].dtype == jnp.complex64
