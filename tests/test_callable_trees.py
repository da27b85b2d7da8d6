"""That a tree which can be called, as a model of Equinox, is a tree, and a function a function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import DimensionNumbers

MATRIX = DimensionNumbers()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    kernel: object
    bias: object

    def __call__(self, x):
        return x @ self.kernel + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    """A model of which two arguments could be taken for a path and a shape."""

    first: object
    second: object

    def __call__(self, x, state=None):
        return self.second(jnp.tanh(self.first(x))), state


def net():
    keys = jax.random.split(jax.random.key(0))
    first = Linear(jax.random.normal(keys[0], (8, 12)), jnp.zeros(12))
    return Net(first, Linear(jax.random.normal(keys[1], (12, 8)), jnp.zeros(8)))


def projected(tx):
    """The leaves that a transformation projects, after a step that must agree with its init."""
    params = net()
    x = jnp.ones((3, 8))
    grads = jax.grad(lambda p: jnp.sum(p(x)[0] ** 2))(params)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    assert isinstance(updates, Net)

    def is_galore(x):
        return isinstance(x, galore_optax.GaloreState)

    [found] = filter(is_galore, jax.tree.leaves(state, is_leaf=is_galore))
    leaves = jax.tree_util.tree_leaves_with_path(found.subspace.refreshes)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A function that is a tree too, as one with an array in it would be in Equinox."""

    name: str

    def __call__(self, path, shape):
        return path.startswith(self.name)


jax.tree_util.register_dataclass(Rule, data_fields=["name"], meta_fields=[])

BOTH = {"first/kernel", "second/kernel"}


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (Net(Linear(True, True), Linear(False, True)), {"second/kernel"}),
        (Net(False, True), {"first/kernel"}),
        (Net(Linear(False, False), False), BOTH),
        (Rule("first"), {"second/kernel"}),
        (jax.tree_util.Partial(lambda name, path, shape: name in path, "second"), {"first/kernel"}),
    ],
    ids=["leaves", "prefix", "nothing", "rule", "partial"],
)
def test_exclude(exclude, expected):
    assert projected(galore_optax.galore_sgd(0.1, rank=2, exclude=exclude)) == expected
    params = galore_optax.quantize_params(net(), rank=2, exclude=exclude, block_size=4)
    of_types = {
        f"{name}/kernel"
        for name in ("first", "second")
        if isinstance(getattr(params, name).kernel, galore_optax.QuantizedArray)
    }
    assert of_types == expected


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (Net(Linear(MATRIX, None), Linear(None, None)), {"first/kernel"}),
        (Net(None, MATRIX), {"second/kernel"}),
        (Net(MATRIX, Linear(MATRIX, None)), BOTH),
        (lambda params: Net(MATRIX, None), {"first/kernel"}),
        (lambda path, shape: MATRIX if path == "second/kernel" else None, {"second/kernel"}),
    ],
    ids=["leaves", "prefix", "mixed", "of parameters", "of paths"],
)
def test_weight_dimension_numbers(numbers, expected):
    tx = galore_optax.galore_muon(0.1, rank=2, weight_dimension_numbers=numbers)
    assert projected(tx) == expected


@pytest.mark.parametrize("preset", [galore_optax.galore_adamw, galore_optax.fira_adamw_8bit])
def test_mask_of_the_weight_decay(preset):
    """Of gradients of zeros there is nothing but the decay."""
    mask = Net(Linear(True, False), Linear(False, False))
    tx = preset(0.5, weight_decay=0.5, rank=2, mask=mask)
    params = net()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates.first.kernel, -0.25 * params.first.kernel, rtol=1e-6)
    np.testing.assert_array_equal(updates.second.kernel, 0)


def test_a_tree_of_another_structure_is_an_error_about_structure():
    for options in ({"exclude": Net(True, [False])}, {"weight_dimension_numbers": Net(None, [])}):
        with pytest.raises(ValueError, match="must have the structure of the parameters"):
            galore_optax.galore(optax.sgd(0.1), rank=2, **options).init(net())


@pytest.mark.parametrize(
    "make",
    [
        lambda tree: galore_optax.galore(optax.sgd(0.1), rank=tree),
        lambda tree: galore_optax.galore(optax.sgd(0.1), rank=galore_optax.RankByRole(tree)),
        lambda tree: galore_optax.low_bit(optax.sgd(0.1), stacked=tree),
        lambda tree: galore_optax.flora(0.1, stacked=tree),
        lambda tree: galore_optax.galore(optax.sgd(0.1), rank=2, exclude=tree).init({"a": net()}),
        lambda tree: galore_optax.galore(
            optax.sgd(0.1), rank=2, weight_dimension_numbers=lambda: tree
        ).init(net()),
    ],
    ids=["rank", "RankByRole", "low_bit", "flora", "exclude", "weight_dimension_numbers"],
)
def test_what_cannot_be_called_so_is_refused_by_the_name_of_the_argument(make):
    """A `Linear` is called with one argument, and no such tree is documented for these."""
    with pytest.raises(TypeError, match=r"(rank|stacked|exclude|weight_dim\w+)[\w ]* must be"):
        make(Linear(2, 2))
