"""The model against counts and forward passes computed another way."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import galore_optax
from examples.flax_llama import attention
from examples.flax_llama.architecture import Architecture, Kind, Rope
from examples.flax_llama.attention import attention_implementation, capability_here
from examples.flax_llama.config import PRESETS, LlamaConfig, UsageError
from examples.flax_llama.loss import token_losses
from examples.flax_llama.model import Llama, dimension_numbers
from examples.flax_llama.rotary import rope, rotation

GOLDEN = Path(__file__).parent / "data" / "llama_logits.npz"
TINY = LlamaConfig(hidden=16, intermediate=40, layers=2, heads=2, vocab_size=256)


def abstract(config):
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def random_forward(config):
    """Forward pass and parameters, all of order one, norms included, so that every term counts."""
    graphdef, shapes = abstract(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes
    )
    return jax.jit(lambda batch: nnx.merge(graphdef, params)(batch)), params


def tokens(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(TINY.vocab_size, size=shape))


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_equals_the_closed_form(name):
    _, shapes = abstract(PRESETS[name])
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == PRESETS[name].num_params


def test_the_published_7b_has_the_published_number_of_parameters():
    assert PRESETS["7b"].num_params == 6_738_415_616


def test_paths_and_stacked_shapes():
    flat = jax.tree.leaves_with_path(abstract(TINY)[1])
    shapes = {"/".join(entry.key for entry in path): leaf.shape for path, leaf in flat}
    attention = {f"blocks/attention/{n}/kernel": (2, 16, 16) for n in "qkvo"}
    mlp = {f"blocks/mlp/{n}/kernel": (2, 16, 40) for n in ("gate", "up")}
    norms = {f"blocks/{n}_norm/scale": (2, 16) for n in ("attention", "mlp")}
    assert shapes == attention | mlp | norms | {
        "blocks/mlp/down/kernel": (2, 40, 16),
        "embed/embedding": (256, 16),
        "norm/scale": (16,),
        "head/kernel": (16, 256),
    }


def test_dimension_numbers_select_the_stacked_kernels_only():
    selected = dimension_numbers(abstract(TINY)[1])
    kernels = jax.tree.leaves(selected, is_leaf=lambda x: not isinstance(x, dict) and x is not None)
    assert kernels == 7 * [galore_optax.DimensionNumbers(reduction_axis=1, output_axis=2)]
    assert selected["embed"]["embedding"] is None
    assert selected["head"]["kernel"] is None
    assert selected["blocks"]["mlp_norm"]["scale"] is None


def reference_logits(params, tokens_S, config):
    """One sequence in float64: loops over layers and heads, rotary pairs as complex numbers."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    S, K = len(tokens_S), config.hidden // config.heads

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.architecture.norm_eps) * scale

    def rotate(x):
        angle = np.arange(S)[:, None] / config.architecture.kinds[0].rope.theta ** (
            2 * np.arange(K // 2) / K
        )
        z = (x[:, : K // 2] + 1j * x[:, K // 2 :]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=1)

    x = params["embed"]["embedding"][tokens_S]
    for i in range(config.layers):
        block = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        weights = {name: leaf["kernel"] for name, leaf in block["attention"].items()}
        y = norm(x, block["attention_norm"]["scale"])
        heads = []
        for h in range(config.heads):
            columns = slice(h * K, (h + 1) * K)
            q, k = (rotate(y @ weights[name][:, columns]) for name in "qk")
            scores = np.where(np.tri(S, dtype=bool), q @ k.T / np.sqrt(K), -np.inf)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ y @ weights["v"][:, columns])
        x = x + np.concatenate(heads, axis=1) @ weights["o"]
        gate, up, down = (block["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        y = norm(x, block["mlp_norm"]["scale"])
        x = x + (y @ gate / (1 + np.exp(-(y @ gate))) * (y @ up)) @ down
    return norm(x, params["norm"]["scale"]) @ params["head"]["kernel"]


def test_scanned_forward_equals_a_loop_in_numpy():
    forward, params = random_forward(TINY)
    batch = tokens((2, 9))
    expected = np.stack([reference_logits(params, row, TINY) for row in np.asarray(batch)])
    np.testing.assert_allclose(forward(batch), expected, rtol=1e-4, atol=1e-4)


def from_hugging_face(weights, layers):
    """Our parameters out of a state dict of `LlamaForCausalLM`, whose matrices are (out, in)."""

    def stacked(name):
        arrays = [weights[f"model.layers.{i}.{name}.weight"] for i in range(layers)]
        return jnp.stack([jnp.asarray(array).T for array in arrays])

    return {
        "embed": {"embedding": jnp.asarray(weights["model.embed_tokens.weight"])},
        "blocks": {
            "attention": {n: {"kernel": stacked(f"self_attn.{n}_proj")} for n in "qkvo"},
            "mlp": {n: {"kernel": stacked(f"mlp.{n}_proj")} for n in ("gate", "up", "down")},
            "attention_norm": {"scale": stacked("input_layernorm")},
            "mlp_norm": {"scale": stacked("post_attention_layernorm")},
        },
        "norm": {"scale": jnp.asarray(weights["model.norm.weight"])},
        "head": {"kernel": jnp.asarray(weights["lm_head.weight"]).T},
    }


def logits_of(config, weights, tokens):
    model = nnx.merge(abstract(config)[0], from_hugging_face(weights, config.layers))
    return jax.jit(lambda tokens: model(tokens))(tokens)


def test_logits_equal_the_stored_ones_of_hugging_face():
    golden = np.load(GOLDEN)
    config = dataclasses.replace(TINY, vocab_size=64)
    logits = logits_of(config, golden, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-5)


@pytest.mark.live("torch", "transformers")
def test_logits_equal_those_of_hugging_face_today():
    import torch
    import transformers

    own = Architecture(norm_eps=1e-3, kinds=(Kind(Rope(500.0)),))
    config = LlamaConfig(96, 250, 3, 6, vocab_size=320, architecture=own)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=own.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 150))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    weights = {name: tensor.detach().numpy() for name, tensor in theirs.named_parameters()}
    np.testing.assert_allclose(logits_of(config, weights, tokens), expected, rtol=0, atol=1e-4)


def test_changing_a_token_changes_no_earlier_logits():
    forward, _ = random_forward(TINY)
    before = tokens((1, 8))
    for t in (0, 3, 7):
        after = before.at[0, t].set((before[0, t] + 1) % TINY.vocab_size)
        same = np.isclose(forward(before), forward(after), rtol=1e-6, atol=1e-6).all(axis=(0, 2))
        assert same[:t].all()
        assert not same[t]


def test_rope_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (np.broadcast_to(rng.standard_normal(16), (1, 12, 1, 16)) for _ in range(2))
    angles = rotation(jnp.arange(12), 16, Rope(100.0))
    q, k = (np.asarray(rope(jnp.asarray(x), angles))[0, :, 0] for x in (q, k))
    scores = q @ k.T
    np.testing.assert_allclose(scores[5, 2], scores[11, 8], rtol=1e-5)
    assert abs(scores[5, 2] - scores[5, 3]) > 1e-3


def test_loss_at_initialization_is_that_of_a_uniform_guess():
    losses = nnx.jit(token_losses)(Llama(TINY, rngs=nnx.Rngs(0)), tokens((4, 65)))
    assert losses.shape == (4, 64)
    assert float(losses.mean()) == pytest.approx(math.log(TINY.vocab_size), abs=0.05)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_activations_leave_parameters_and_losses_as_they_are(param_dtype):
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype=param_dtype)
    forward, params = random_forward(config)
    exact, _ = random_forward(TINY)
    batch = tokens((2, 9))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    assert forward(batch).dtype == jnp.bfloat16
    assert (
        nnx.eval_shape(token_losses, nnx.merge(abstract(config)[0], params), batch).dtype
        == jnp.float32
    )
    np.testing.assert_allclose(forward(batch).astype(jnp.float32), exact(batch), atol=0.1)


def gradient_of(config):
    """Compiled gradient of a weighted sum of logits, with its parameters."""
    graphdef, _ = abstract(config)
    _, params = random_forward(config)
    batch = tokens((2, 64))
    weights = np.random.default_rng(1).standard_normal((2, 64, config.vocab_size))

    def objective(params):
        return jnp.sum(nnx.merge(graphdef, params)(batch) * jnp.asarray(weights, jnp.float32))

    return jax.jit(jax.grad(objective)).lower(params).compile(), params


def test_rematerialization_takes_less_memory_for_the_same_gradients():
    config = dataclasses.replace(TINY, layers=6)
    stored, params = gradient_of(config)
    again, _ = gradient_of(dataclasses.replace(config, remat=True))
    bytes_of = [f.memory_analysis().temp_size_in_bytes for f in (stored, again)]
    assert bytes_of[1] < 0.7 * bytes_of[0]
    for a, b in zip(*(jax.tree.leaves(f(params)) for f in (stored, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(a).max()))


H100 = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
T4 = SimpleNamespace(device_kind="NVIDIA T4", compute_capability="7.5")
CPU = SimpleNamespace(device_kind="cpu")


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        (H100, {"dtype": "bfloat16"}, "cudnn"),
        (H100, {"dtype": "bfloat16", "attention": "cudnn"}, "cudnn"),
        (H100, {"dtype": "bfloat16", "attention": "xla"}, "xla"),
        (H100, {"dtype": "bfloat16", "hidden": 24}, "xla"),
        (H100, {}, "xla"),
        (T4, {"dtype": "bfloat16"}, "xla"),
        (CPU, {"dtype": "bfloat16"}, "xla"),
    ],
)
def test_cudnn_is_chosen_where_it_can_compute_the_attention(
    monkeypatch, device, settings, expected
):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    asked = []
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, *_, implementation, is_causal, **__: (
            asked.append((implementation, is_causal)) or q
        ),
    )
    model = nnx.eval_shape(lambda: Llama(dataclasses.replace(TINY, **settings), rngs=nnx.Rngs(0)))
    nnx.eval_shape(lambda model: model(tokens((1, 4))), model)
    assert set(asked) == {(expected, True)}


@pytest.mark.parametrize(
    ("device", "settings", "message"),
    [
        (CPU, {"dtype": "bfloat16"}, "needs an NVIDIA GPU .*; here are cpu, .* runs everywhere"),
        (T4, {"dtype": "bfloat16"}, "needs .* capability 8.0 or more; here are NVIDIA T4"),
        (H100, {}, "needs dtype=bfloat16; here are .* dtype=float32"),
        (H100, {"dtype": "bfloat16", "hidden": 24}, "needs heads .* multiple of 8, .* size 12"),
    ],
)
def test_cudnn_where_it_cannot_compute_the_attention_is_refused(
    monkeypatch, device, settings, message
):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with pytest.raises(UsageError, match=f"attention='cudnn' {message}"):
        attention_implementation(
            dataclasses.replace(TINY, attention="cudnn", **settings),
            capability_here(),
            device.device_kind,
        )


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"hidden=24 .* heads=5"):
        LlamaConfig(hidden=24, intermediate=40, layers=1, heads=5)


# Sequences, heads of keys, weights that may exist at a time, and the parts that come of it: one
# sequence of 6 heads has 6 * 8 * 8 weights.
@pytest.mark.parametrize(
    ("batch", "keys", "most", "parts"),
    [
        (1, 6, 2**23, (1, 1)),
        (6, 6, 2 * 384, (3, 1)),
        (6, 6, 100, (6, 6)),
        (2, 3, 200, (2, 3)),
        (1, 2, 1, (1, 2)),
        (1, 6, 128, (1, 3)),
        (4, 1, 1, (4, 1)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_parts_is_that_of_all(monkeypatch, batch, keys, most, parts, masked):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, 8, n, 4)), jnp.float32) for n in (6, keys, keys))
    others = {}
    if masked:
        segments = jnp.asarray(rng.integers(3, size=(batch, 8)).cumsum(1))
        others = {"segments_BxS": segments, "window": jnp.asarray(5)}

    def value_and_gradients():
        def function(*qkv):
            out = attention.attend(*qkv, "xla", **others)
            # Of its place, too.
            return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape) / out.size)

        return jax.jit(jax.value_and_grad(function, (0, 1, 2)))(q, k, v)

    monkeypatch.setattr(attention, "MAX_WEIGHTS", 2**23)
    expected = value_and_gradients()
    monkeypatch.setattr(attention, "MAX_WEIGHTS", most)
    assert attention.attention_parts(batch, 8, 6, keys, "xla") == parts
    chex.assert_trees_all_close(value_and_gradients(), expected, rtol=1e-5, atol=1e-5)


def test_every_device_has_heads_of_every_part(monkeypatch):
    monkeypatch.setattr(attention, "MAX_WEIGHTS", 1)
    assert attention.attention_parts(1, 8, 8, 8, "xla", 2) == (1, 4)
    assert attention.attention_parts(1, 8, 8, 8, "xla", 8) == (1, 1)
    assert attention.attention_parts(1, 8, 8, 2, "xla", 4) == (1, 1)
    assert attention.attention_parts(1, 8, 8, 8, "cudnn") == (1, 1)
