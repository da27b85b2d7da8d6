"""What each optimizer trains, projects and keeps of an encoder."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from flax_glue_runs import ENCODERS

import galore_optax
from examples.flax_glue.config import OPTIMIZERS, PRESETS, Config
from examples.flax_glue.finetune import memory_of, trained_and_frozen
from examples.flax_glue.optimizers import in_8_bits, learning_rate, make_optimizer
from examples.flax_glue.weights import Loaded, load_weights, shapes_of
from examples.flax_llama.units import size
from examples.flax_llama.usage import UsageError

README = pathlib.Path(__file__).parents[1] / "examples" / "flax_glue" / "README.md"

KERNELS = {
    *(("blocks", "attention", name, "kernel") for name in "qkvo"),
    *(("blocks", "mlp", name, "kernel") for name in ("up", "down")),
}


def config_of(optimizer="galore_adamw", **settings):
    nowhere = pathlib.Path("nowhere")
    settings = {"model": ENCODERS / "bert_base", "data": nowhere} | settings
    return Config(optimizer=optimizer, **settings).resolve()


@pytest.mark.parametrize(
    ("preset", "rank", "scale"), [("galore_r4", 4, 4.0), ("galore_r8", 8, 2.0)]
)
def test_the_published_settings(preset, rank, scale):
    config = config_of(preset=preset)
    assert (config.optimizer, config.rank, config.scale) == ("galore_adamw", rank, scale)
    assert (config.update_proj_gap, config.projector) == (500, "svd")
    assert (config.epochs, config.batch, config.max_length) == (30, 16, 512)
    assert 1e-5 <= config.lr <= 3e-5
    assert (config.warmup, config.weight_decay, config.eps) == (0, 0, 1e-6)


def test_an_optimizers_own_settings_come_before_the_presets():
    assert (config_of("apollo_adamw").rank, config_of("apollo_adamw").scale) == (0.25, 1.0)
    assert config_of("apollo_mini_adamw").rank == 1
    assert config_of("ldadamw").update_proj_gap == 1
    assert config_of("fira_adamw").scale == 2.0
    assert config_of("fira_adamw", rank=4).scale == 4.0
    assert config_of("fira_adamw", rank=4, scale=1.5).scale == 1.5
    assert config_of("lora").lr == 5e-4
    assert config_of("lora").rank == PRESETS["short"].rank
    assert config_of("adamw").rank is None


@pytest.mark.parametrize(
    ("optimizer", "settings", "said"),
    [
        ("adamw", {"rank": 4}, "rank=4 has no effect with optimizer='adamw', only with optimizers"),
        ("lora", {"scale": 2.0}, "scale=2.0 has no effect with optimizer='lora'"),
        ("galore_adamw", {"lora_alpha": 1.0}, "only with lora. Leave it out."),
        ("galore_adam", {}, "optimizer='galore_adam': expected one of adamw, adamw_8bit,"),
        ("lora", {"lora_targets": "kv"}, "lora_targets='kv': expected one of qv, all."),
        ("galore_adamw", {"lr": 0.0}, "lr=0.0: expected a positive number."),
        ("galore_adamw", {"epochs": 0}, "epochs=0: expected at least 1."),
        ("galore_adamw", {"dropout": 1.0}, "dropout=1.0: expected at least 0 and less than 1."),
        ("galore_adamw", {"seed": -1}, "seed=-1: expected 0 to 2147483647."),
        ("galore_adamw", {"seed": 2**31}, "seed=2147483648: expected 0 to"),
        ("galore_adamw", {"rank": math.nan}, "rank=nan: expected a whole number, or a fraction"),
        ("lora", {"rank": math.inf}, "rank=inf: expected a whole number"),
        ("galore_adamw", {"resume": True}, "resume=True needs the directory of the run"),
        ("galore_adamw", {"preset": "long"}, "preset='long': expected one of short, galore_r4"),
    ],
)
def test_settings_that_cannot_work(optimizer, settings, said):
    with pytest.raises(UsageError) as error:
        config_of(optimizer, **settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 16}, "rank=16: expected 1 to 15, less than the hidden size 16"),
        ({"rank": 0}, "rank=0: expected 1 to 15"),
        ({"rank": -1}, "rank=-1: expected 1 to 15"),
        ({"projector": "qr"}, "projector='qr': expected one of"),
        ({"optimizer": "lora", "rank": 0}, "rank=0: expected 1 to 15"),
        ({"optimizer": "lora", "rank": -1}, "rank=-1: expected 1 to 15"),
        ({"optimizer": "lora", "rank": 0.5}, "rank=0.5: expected 1 to 15"),
        ({"optimizer": "lora", "rank": 16}, "rank=16: expected 1 to 15"),
    ],
)
def test_settings_that_do_not_go_with_the_model(settings, said):
    config = config_of(**settings)
    with pytest.raises(UsageError) as error:
        make_optimizer(config, config.encoder(2), 10)
    assert str(error.value).startswith(said)


def params_of(config):
    """The shapes of what is trained and of what is frozen, as with a checkpoint without a head."""
    encoder = config.encoder(2)
    shapes = shapes_of(encoder)
    drawn = frozenset(path for path in shapes if "lora" in path or path[0] == "head")
    return encoder, trained_and_frozen(config, encoder, Loaded(unflatten_dict(shapes), drawn, ""))


def test_every_optimizer_is_made():
    for optimizer in OPTIMIZERS:
        config = config_of(optimizer)
        assert callable(make_optimizer(config, config.encoder(2), 10).update)


# Of each kind of basis, of moments and of weights.
@pytest.mark.parametrize(
    "optimizer", ["galore_adamw", "apollo_mini_adamw", "fira_adamw_8bit", "q_galore_adamw"]
)
def test_projected_are_the_kernels_of_the_layers_alone(optimizer):
    config = config_of(optimizer, rank=4)
    encoder, (params, frozen) = params_of(config)
    assert not frozen
    report = galore_optax.memory_report(make_optimizer(config, encoder, 10), params)
    projected = {group.path for group in report.groups if group.rank is not None}
    assert projected == {"/".join(path) for path in KERNELS}
    assert {group.rank for group in report.groups} == {4, None}
    # Embeddings, norms, biases, pooler and head have two moments, in float32 where not in codes.
    rest = sum(np.prod(x.shape) for p, x in flatten_dict(params).items() if p not in KERNELS)
    moments = sum(group.moments for group in report.groups if group.rank is None)
    assert moments == 2 * 4 * rest
    kinds = {path: type(x).__name__ for path, x in flatten_dict(params).items()}
    quantized = {path for path, kind in kinds.items() if kind == "QuantizedArray"}
    assert quantized == (KERNELS if optimizer == "q_galore_adamw" else set())


def test_bytes_of_galore_are_those_of_the_formula():
    config = config_of(rank=4)
    encoder, (params, frozen) = params_of(config)
    found = memory_of(make_optimizer(config, encoder, 10), params, frozen)
    rest = sum(np.prod(x.shape) for p, x in flatten_dict(params).items() if p not in KERNELS)
    # Of each of three layers a basis of the short side and two moments of the long one.
    sides = [(16, 16)] * 4 + [(16, 24)] * 2
    kernels = 3 * sum(4 * short + 2 * 4 * long for short, long in sides)
    assert found["parameter_bytes"] == found["trained_bytes"]
    counters = found["state_bytes"] - 4 * (2 * rest + kernels)
    assert 0 < counters < 400


@pytest.mark.parametrize(
    ("targets", "adapted"), [("qv", {"q", "v"}), ("all", {"q", "k", "v", "o", "up", "down"})]
)
@pytest.mark.parametrize("rank", [4, 8])
def test_lora_trains_adapters_and_head_alone(targets, adapted, rank):
    config = config_of("lora", rank=rank, lora_targets=targets)
    encoder, (params, frozen) = params_of(config)
    trained = flatten_dict(params)
    assert {path[2] for path in trained if "lora" in path} == adapted
    assert {path for path in trained if "lora" not in path} == {
        ("head", "out", "kernel"),
        ("head", "out", "bias"),
    }
    assert ("pooler", "kernel") in flatten_dict(frozen)
    widths = [16 + (24 if name in ("up", "down") else 16) for name in adapted]
    count = 3 * rank * sum(widths) + 2 * 16 + 2
    found = memory_of(make_optimizer(config, encoder, 10), params, frozen)
    assert found["trained_bytes"] == 4 * count
    # Two moments and two counters.
    assert found["state_bytes"] == 2 * 4 * count + 8
    every = sum(np.prod(x.shape) for x in shapes_of(encoder).values())
    assert found["parameter_bytes"] == 4 * every


def test_with_lora_a_pooler_that_is_newly_drawn_is_trained():
    config = config_of("lora", model=ENCODERS / "roberta_masked")
    encoder = config.encoder(2)
    params, _ = trained_and_frozen(config, encoder, load_weights(config.model, encoder, 0))
    assert {"dense", "out"} == params["head"].keys()


def test_weights_in_8_bits_stand_for_what_they_were():
    config = config_of("q_galore_adamw", rank=4)
    encoder = config.encoder(2)
    params = load_weights(config.model, encoder, 0).params
    dense = galore_optax.dequantize_params(in_8_bits(config, encoder, params))
    for path, array in flatten_dict(params).items():
        error = np.abs(flatten_dict(dense)[path] - array).max()
        assert (0 < error < np.ptp(array) / 254) if path in KERNELS else error == 0


@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw"])
def test_decayed_are_all_but_norms_and_biases(optimizer):
    config = config_of(optimizer, weight_decay=0.1, lr=0.5, **{"model": ENCODERS / "bert"})
    encoder = config.encoder(3)
    params = load_weights(config.model, encoder, 0).params
    tx = make_optimizer(config, encoder, 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    for path, update in flatten_dict(updates).items():
        decay = 0 if path[-1] in ("bias", "scale") else 0.5 * 0.1
        np.testing.assert_allclose(update, -decay * flatten_dict(params)[path], rtol=1e-5)


def test_the_rate_rises_and_falls_linearly_and_no_update_is_void():
    config = config_of(warmup=0.25, lr=0.8)
    rates = [float(learning_rate(config, 12)(count)) for count in range(12)]
    np.testing.assert_allclose(rates[:4], [0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(rates[3:], 0.8 * (1 - np.arange(9) / 9), rtol=1e-6)
    # Without a warm-up as the reference's scheduler has it.
    plain = dataclasses.replace(config, warmup=0.0)
    rates = [float(learning_rate(plain, 10)(count)) for count in range(10)]
    np.testing.assert_allclose(rates, 0.8 * (1 - np.arange(10) / 10), rtol=1e-6)


def test_clipping_is_of_the_whole_gradient():
    config = config_of("adamw", clip=1.0, b1=0.0, b2=0.0, eps=1e6, lr=1.0)
    tx = make_optimizer(config, config.encoder(2), 10)
    params = {"head": {"bias": np.zeros(4, np.float32)}}
    gradient = {"head": {"bias": np.full(4, 3.0, np.float32)}}
    updates, _ = tx.update(gradient, tx.init(params), params)
    # So large an epsilon leaves the gradient, divided by it.
    np.testing.assert_allclose(optax.tree.norm(updates) * 1e6, 1.0, rtol=1e-4)


# Of MiniLM-L6.
MINILM = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}


@pytest.mark.ci
def test_the_bytes_in_the_readme(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MINILM))
    table = README.read_text().partition("<!-- checked")[2].partition("\n\n")[0]
    lines = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines()[3:]
    ]
    assert len(lines) == 7
    for optimizer, rank, *bytes_said in lines:
        rank = int(rank) if rank else None
        config = config_of(optimizer, rank=rank, model=tmp_path)
        encoder, (params, frozen) = params_of(config)
        tx = make_optimizer(config, encoder, 10)
        found = memory_of(tx, params, frozen)
        groups = galore_optax.memory_report(tx, params).groups
        of_kernels = sum(
            group.projectors + group.moments
            for group in groups
            if group.path.startswith("blocks") and group.path.endswith(("kernel", "_a", "_b"))
        )
        bytes_found = found["trained_bytes"], found["state_bytes"], of_kernels
        assert bytes_said == [size(count) for count in bytes_found]
