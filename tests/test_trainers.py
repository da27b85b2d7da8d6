"""GaLore in the trainers that people use: replays of each on eight devices, and their packages."""

import ast
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import galore_optax
from galore_optax import DEFAULT_EXCLUDE, DimensionNumbers, trainers
from galore_optax._trees import leaves_with_paths
from tests.devices import on_devices
from tests.trainer_levanter import Axis, LaterNamedArray, NamedArray, axis_mapping
from tests.trainer_models import OUTPUT_FIRST, RANK, STEPS
from tests.trainer_replays import REPLAYS

P = PartitionSpec
ROOT = pathlib.Path(__file__).parents[1]
# The same trainer again, otherwise set up, or one that does as Equinox.
VARIANTS = ("maxtext_linen", "levanter_tensor", "zero_1", "haiku", "numpyro")
TITLE = re.compile("^## (.+)$", re.M)
FULL_SIZE = "embed|norm|head|logits|hidden_2|/b$|bias|z_loc"


@pytest.fixture(scope="module")
def replayed(request):
    """What is seen of replays, by a process of its own for all that are tried at once."""
    found = {}
    calls = [
        item.callspec.params for item in request.session.items if "replayed" in item.fixturenames
    ]
    tried = {call["name"] for call in calls}

    def of(names):
        names = [name for name in names if name in tried]
        if names[0] not in found:
            words = "-W", "error", "-m", "tests.trainer_replays", *names
            found.update(json.loads(on_devices(8, *words, timeout=500)))
        return found

    return of


def cases():
    marks = {name: pytest.mark.ci for name in VARIANTS}
    return [pytest.param(name, marks=marks.get(name, ())) for name in REPLAYS]


@pytest.mark.long("the first case waits for a process that compiles them all")
@pytest.mark.parametrize("name", cases())
def test_state_lies_as_planned_has_the_rank_and_trains(replayed, name):
    together = [other for other in REPLAYS if (other in VARIANTS) == (name in VARIANTS)]
    seen = replayed(together)[name]
    assert len(seen["losses"]) == STEPS
    assert seen["losses"][-1] < 0.5 * seen["losses"][0]
    assert seen["found"] == seen["planned"] < seen["adamw"]
    projected = set()
    for path, shape in seen["shapes"].items():
        moment = seen["moments"][path]
        if re.search(FULL_SIZE, path):
            assert moment == shape, path
        else:
            assert RANK in moment[-2:], path
            assert np.prod(moment) < np.prod(shape), path
            projected.add(path)
    assert projected
    # What the page says of a trainer that is not told how: it has much of the state everywhere.
    if "without" in seen:
        assert seen["without"] > 1.5 * seen["planned"]


def numbers_of(table, path, shape):
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    for component in reversed(path.split("/")):
        params = {component: params}
    (found,) = jax.tree.leaves(table(params), is_leaf=lambda x: x is None or hasattr(x, "_asdict"))
    return found


def matrix(table, path, shape):
    """The sizes of the sides of a leaf's matrices, without embeddings and the like."""
    if re.search(DEFAULT_EXCLUDE, path) or (found := numbers_of(table, path, shape)) is None:
        return None
    sides = (np.atleast_1d(axes) for axes in found)
    return tuple(int(np.prod([shape[i] for i in axes])) for axes in sides)


D, N, K, H, F, E, L = 2, 3, 5, 7, 11, 13, 17  # all sizes tell what they are of


@pytest.mark.parametrize(
    ("table", "path", "shape", "expected"),
    [
        ("GEMMA", "layer_0/attn/q_einsum/w", (N, D, H), (D, N * H)),
        ("GEMMA", "layer_0/attn/qkv_einsum/w", (3, N, D, H), (D, N * H)),
        ("GEMMA", "layer_0/mlp/gating_einsum", (2, D, F), (D, F)),
        ("GEMMA", "PaliGemma/llm/layers/attn/kv_einsum_1/w", (L, 2, K, D, H), (D, K * H)),
        ("GEMMA", "PaliGemma/llm/layers/attn/attn_vec_einsum/w", (L, N, H, D), (N * H, D)),
        ("GEMMA", "PaliGemma/llm/layers/mlp_1/linear", (L, F, D), (F, D)),
        (
            "GEMMA",
            "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel",
            (L, D, N, H),
            (D, N * H),
        ),
        (
            "GEMMA",
            "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out/kernel",
            (N, H, D),
            (N * H, D),
        ),
        ("GEMMA", "PaliGemma/img/embedding/kernel", (14, 14, 3, D), None),
        ("GEMMA", "action_in_proj/kernel", (D, F), (D, F)),
        ("GEMMA", "conv/kernel", (3, 3, D, F), None),
        ("GEMMA", "attn/linear", (F,), None),
        ("TUNIX", "layers/0/attn/k_proj/w", (D, K, H), (D, K * H)),
        ("TUNIX", "layers/0/attn/o_proj/w", (N, H, D), (N * H, D)),
        ("TUNIX", "layers/0/mlp/gate_proj/kernel", (D, F), (D, F)),
        ("TUNIX", "layers/0/mlp/down_proj", (E, F, D), (F, D)),
        ("MAXTEXT", "decoder/layers/self_attention/key/kernel", (D, L, K, H), (D, K * H)),
        ("MAXTEXT", "decoder/layers_0/self_attention/key/kernel", (D, K, H), (D, K * H)),
        ("MAXTEXT", "decoder/layers/self_attention/out/kernel", (N, L, H, D), (N * H, D)),
        ("MAXTEXT", "decoder/layers/self_attention/wq_a/kernel", (D, L, F), (D, F)),
        ("MAXTEXT", "decoder/layers/MoeBlock_0/wi_0", (E, L, D, F), (D, F)),
        ("MAXTEXT", "decoder/layers/MoeBlock_0/gate/kernel", (D, L, E), None),
        ("MAXTEXT", "decoder/layers/mlp/wo/kernel", (F, L, D), (F, D)),
        ("MAXTEXT", "decoder/layers/pre_self_attention_layer_norm/scale", (D, L), None),
        ("layers first", "decoder/layers/mlp/wo/kernel", (L, F, D), (F, D)),
        (
            "layers first",
            "decoder/layers/self_attention/query/kernel",
            (L, D, N, H),
            (D, N * H),
        ),
        ("layers first", "decoder/layers/self_attention/out/kernel", (L, N, H, D), (N * H, D)),
        ("EASYDEL", "model/layers/0/mlp/experts/up_proj/kernel", (E, D, F), (D, F)),
        ("EASYDEL", "model/layers/0/self_attn/q_proj/kernel", (D, F), (D, F)),
        (
            "LEVANTER",
            "transformer/layers/stacked/self_attn/q_proj/weight",
            (L, K, 3, H, D),
            (D, K * 3 * H),
        ),
        (
            "LEVANTER",
            "transformer/layers/stacked/self_attn/o_proj/weight",
            (L, D, N, H),
            (N * H, D),
        ),
        ("LEVANTER", "transformer/layers/stacked/mlp/up_proj/weight", (L, F, D), (D, F)),
        (
            "LEVANTER",
            "transformer/blocks/stacked/attn/c_attn/weight",
            (L, D, 3, N, H),
            (D, N * H),
        ),
        ("LEVANTER", "transformer/blocks/stacked/mlp/c_proj/weight", (L, F, D), (F, D)),
    ],
    ids=str,
)
def test_the_matrices_of_trainers(table, path, shape, expected):
    tables = {**vars(trainers), "layers first": trainers.maxtext(0)}
    assert matrix(tables[table], path, shape) == expected


def test_a_table_of_ones_own_goes_first_and_vectors_beside_matrices_are_none():
    table = trainers.ByPath({r"(^|/)linear$": None, **trainers.GEMMA.rules})
    assert numbers_of(table, "mlp/linear", (F, D)) is None
    assert numbers_of(table, "mlp/gating_einsum", (2, D, F)) == DimensionNumbers(-2, -1)
    params = {"blocks": {"gain": jnp.ones((L, D)), "w": jnp.ones((L, D, F))}}
    assert table(params)["blocks"] == {"gain": None, "w": None}


def test_rules_of_a_state_are_found_before_those_of_parameters():
    params = {"layers": {"0": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}}}
    tx = galore_optax.galore_adamw_8bit(1e-3, rank=8, projector_dtype="int8")
    specs = galore_optax.state_partition_specs(tx, params, P("fsdp", "tp"))
    rules = (*trainers.partition_rules(specs), ("kernel", P("fsdp", "tp")))
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    expected = jax.tree.leaves(specs, is_leaf=is_spec)
    leaves = leaves_with_paths(jax.eval_shape(tx.init, params))
    for (path, _), spec in zip(leaves, expected, strict=True):
        # EasyDeL sees what is in a box behind a further component.
        for seen in (path, f"{path}/value"):
            assert next(spec for rule, spec in rules if re.search(rule, seen)) == spec


@pytest.mark.parametrize("named_array", [NamedArray, LaterNamedArray])
@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"embed": "data"}, "embed"),
        ({"embed": "data", "mlp": "model"}, "embed"),
        ({"embed": "model", "mlp": "data"}, "mlp"),
        ({"embed": "data", "mlp": "model", "both": ("model", "data")}, "both"),
        ({"embed": "nowhere"}, "mlp"),
    ],
    ids=str,
)
@pytest.mark.since(jax="0.7")
def test_an_axis_of_haliax_has_the_one_name_that_divides_most(mapping, expected, named_array):
    axes = (Axis("embed", 64), Axis("mlp", 512))
    params = {"up": named_array(jax.ShapeDtypeStruct((64, 512), jnp.float32), axes)}
    tx = galore_optax.galore_adamw(1e-3, rank=8)
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with axis_mapping(mapping, jax.sharding.use_abstract_mesh(mesh)):
        state = jax.eval_shape(tx.init, params)
    moment, basis = state.inner[0].mu["up"], state.subspace.left["up"]
    assert moment.axes == (Axis("galore_0", 8), Axis(expected, 512))
    assert moment.array.shape == (8, 512)
    assert basis.axes[1] == Axis("galore_1", 8)
    specs = jax.tree.map(lambda _: P("data", "model"), params)  # specs in boxes
    specs = galore_optax.state_partition_specs(tx, params, specs, mesh=mesh)
    assert specs.inner[0].mu["up"] == P(None, ("model", "data"))
    updates, new = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure((updates, new)) == jax.tree.structure((params, state))


def test_what_is_no_mesh_is_refused():
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh .* got \('fsdp',\)"):
        trainers.on_mesh(optax.adam(1e-3), ("fsdp",))


def test_rules_that_are_no_regular_expressions_are_refused():
    with pytest.raises(ValueError, match=r"rules must have regular expressions as keys; got '\('"):
        trainers.ByPath({"(": None})


PAGE = (ROOT / "docs" / "trainers.md").read_text()


@pytest.mark.since(flax="0.12.8")  # before which not all of them run.
def test_the_page_names_the_replays_and_what_there_is():
    """Its code needs the trainers, so that only what it takes from here can be looked up."""
    rows = re.findall(r"^\| \[.+\]\(#(.+?)\) \|.*\| (`.+`) \| [^|]+ \|$", PAGE, re.M)
    assert len(rows) == 9 + 1
    replays = {name for _, names in rows for name in re.findall("`(.+?)`", names)}
    assert replays | {"zero_1"} == set(REPLAYS)
    titles = {re.sub("[^a-z-]", "", t.lower().replace(" ", "-")) for t in TITLE.findall(PAGE)}
    assert {anchor for anchor, _ in rows} == titles
    blocks = re.findall("^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == 11
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "galore_optax":
                assert all(hasattr(galore_optax, name.name) for name in node.names)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = {"galore_optax": galore_optax, "trainers": trainers}.get(node.value.id)
                assert module is None or hasattr(module, node.attr), node.attr


# The packages themselves, where they are installed: do they call things as the replays have it?


def trained(tx, params, loss, steps=STEPS):
    """Trains, and returns the losses and the paths of what is projected."""
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    moments = dict(leaves_with_paths(optax.tree.get(state, "mu")))
    return losses, {path for path, x in leaves_with_paths(params) if moments[path].shape != x.shape}


X = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
Y = np.tanh(X[:, :4])


def test_equinox_itself():
    eqx = pytest.importorskip("equinox")
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))
    norms = eqx.filter_vmap(lambda key: eqx.nn.LayerNorm(16))
    keys = jax.random.split(jax.random.key(0), 3)
    model = {
        "layers": {"up": make(keys), "norm": norms(keys)},
        "lm_head": eqx.nn.Linear(16, 4, key=keys[0]),
    }
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def block(x, arrays):
        layer = eqx.combine(arrays, static["layers"])
        return x + jnp.tanh(jax.vmap(lambda v: layer["up"](layer["norm"](v)))(x)), None

    def loss(params):
        x, _ = jax.lax.scan(block, X, params["layers"])
        head = eqx.combine(params["lm_head"], static["lm_head"])
        return jnp.mean((jax.vmap(head)(x) - Y) ** 2)

    tx = galore_optax.galore_adamw(1e-2, rank=2, weight_dimension_numbers=OUTPUT_FIRST)
    losses, projected = trained(tx, params, loss)
    assert losses[-1] < 0.5 * losses[0]
    assert projected == {"layers/up/weight"}


def test_haiku_itself():
    hk = pytest.importorskip("haiku")

    def forward(x):
        def block(x):
            return x + jnp.tanh(hk.Linear(16)(hk.LayerNorm(-1, True, True)(x)))

        return hk.Linear(4, name="logits")(hk.experimental.layer_stack(3)(block)(x))

    network = hk.without_apply_rng(hk.transform(forward))
    params = network.init(jax.random.key(0), X)
    tx = galore_optax.galore_adamw(1e-2, rank=2, weight_dimension_numbers=DimensionNumbers(-2, -1))
    losses, projected = trained(tx, params, lambda p: jnp.mean((network.apply(p, X) - Y) ** 2))
    assert losses[-1] < 0.5 * losses[0]
    (path,) = projected
    assert re.fullmatch(r".*layer_stack.*/linear/w", path)


def test_numpyro_itself():
    numpyro = pytest.importorskip("numpyro")
    from numpyro.infer import SVI, Trace_ELBO

    def model():
        kernel = numpyro.param("kernel", jnp.full((16, 4), 0.01))
        scale = numpyro.param("scale", 1.0, constraint=numpyro.distributions.constraints.positive)
        numpyro.sample("y", numpyro.distributions.Normal(X @ kernel, scale), obs=Y)

    tx = galore_optax.galore_adamw(1e-2, rank=2)
    svi = SVI(model, lambda: None, tx, Trace_ELBO())
    state = svi.init(jax.random.key(0))
    update, losses = jax.jit(svi.update), []
    for _ in range(STEPS):
        state, loss = update(state)
        losses.append(loss)
    assert losses[-1] < losses[0]
    _, (params, of_optax) = state.optim_state
    assert set(params) == {"kernel", "scale"}
    assert optax.tree.get(of_optax, "mu")["kernel"].shape == (16, 2)
