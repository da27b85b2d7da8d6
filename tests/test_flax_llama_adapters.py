"""LoRA beside kernels and products in their place: what they compute, train, cost and become."""

import dataclasses
import math

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_llama_runs import tiny, write_text

import galore_optax
from examples.flax_llama.adapters import TARGETS, Adapter, lora_of, merged, without_lora
from examples.flax_llama.config import Config, LlamaConfig, UsageError
from examples.flax_llama.export_hf import export_hf
from examples.flax_llama.import_hf import import_hf
from examples.flax_llama.loading import load_params, load_run
from examples.flax_llama.memory import estimate
from examples.flax_llama.model import Llama, dimension_numbers
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.step import initial_params
from examples.flax_llama.train import train

LORA = Adapter("lora", 3, alpha=6.0, targets="qv")
SHAPE = LlamaConfig(hidden=16, intermediate=40, layers=2, heads=2, vocab_size=50, max_seq=8)
TOKENS = np.random.default_rng(0).integers(50, size=(2, 8))


def with_adapter(adapter, **changes):
    """A model and parameters that are all of order one."""
    shape = dataclasses.replace(SHAPE, adapter=adapter, **changes)
    graphdef, like = nnx.split(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), nnx.to_pure_dict(like)
    )
    return graphdef, params, shape


def logits(graphdef, params):
    return jax.jit(lambda p: nnx.merge(graphdef, p)(TOKENS))(params)


def size(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "adapter",
    [LORA, Adapter("lora", 2, targets="all"), Adapter("low_rank", 4)],
    ids=["two kernels", "all kernels", "products"],
)
def test_a_model_with_adapters_is_the_plain_one_with_what_they_make_of_its_kernels(adapter):
    graphdef, params, shape = with_adapter(adapter)
    plain, like, _ = with_adapter(None)
    whole = merged(params, adapter)
    assert jax.tree.structure(whole) == jax.tree.structure(like)
    np.testing.assert_allclose(logits(graphdef, params), logits(plain, whole), atol=1e-5)
    assert shape.num_params == size(params)
    trained = size(lora_of(params)) if adapter.kind == "lora" else size(params)
    assert shape.trained_params == trained
    if adapter.kind == "lora":
        names = {path[2].key for path, _ in jax.tree.leaves_with_path(lora_of(params))}
        assert names == set(TARGETS[adapter.targets])
        kernel = params["blocks"]["attention"]["q"]
        a, b = kernel["lora"]["lora_a"], kernel["lora"]["lora_b"]
        expected = kernel["kernel"] + adapter.alpha / adapter.rank * jnp.einsum(
            "lir,lro->lio", a, b
        )
        found = whole["blocks"]["attention"]["q"]["kernel"]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_lora_is_float32_beside_kernels_in_bfloat16():
    _, params, _ = with_adapter(LORA, param_dtype="bfloat16", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(lora_of(params))} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(without_lora(params))} == {jnp.dtype("bfloat16")}
    kernel = merged(params, LORA)["blocks"]["attention"]["q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16


def test_kernels_in_8_bits_are_merged_as_what_they_stand_for():
    params = with_adapter(LORA)[1]
    coded = galore_optax.quantize_params(params, rank=4, weight_dimension_numbers=dimension_numbers)
    found, right = (
        merged(p, LORA)["blocks"]["attention"]["q"]["kernel"]
        for p in (coded, galore_optax.dequantize_params(coded))
    )
    np.testing.assert_array_equal(found, right)
    assert not np.array_equal(found, merged(params, LORA)["blocks"]["attention"]["q"]["kernel"])


def test_at_first_lora_changes_nothing_and_products_have_entries_as_large_as_kernels():
    params = initial_params(Config(), dataclasses.replace(SHAPE, hidden=64, adapter=LORA))
    base = without_lora(params)
    jax.tree.map(np.testing.assert_array_equal, merged(params, LORA), base)
    first = jnp.abs(lora_of(params)["blocks"]["attention"]["q"]["lora"]["lora_a"])
    # Uniform within 1 / sqrt(64), as PEFT draws it.
    assert 0.115 < float(first.max()) <= 0.125
    assert float(first.mean()) == pytest.approx(0.0625, rel=0.1)
    product = Adapter("low_rank", 8)
    params = initial_params(Config(), dataclasses.replace(SHAPE, hidden=64, adapter=product))
    kernel = merged(params, product)["blocks"]["mlp"]["up"]["kernel"]
    assert float(kernel.std()) == pytest.approx(0.02, rel=0.15)


@pytest.mark.live("torch", "peft", "transformers")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_peft_computes():
    """The same matrices beside the same kernels give the same logits."""
    import peft
    import torch
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        decoders.DATA / "llama", dtype=torch.float32
    )
    names = [f"{x}_proj" for x in TARGETS["qv"]]
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, lora_dropout=0.0)
    ).eval()
    golden = np.load(decoders.DATA / "llama" / "golden.npz")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.5)
        expected = theirs(torch.from_numpy(golden["tokens"])).logits.numpy()
    import test_hf_models

    _, params, shape = test_hf_models.model_of(decoders.DATA / "llama")
    weights = {k: v.detach().numpy() for k, v in theirs.named_parameters()}
    for target in "qv":
        pairs = {
            f"lora_{x.lower()}": np.stack(
                [
                    weights[
                        f"base_model.model.model.layers.{i}.self_attn.{target}_proj.lora_{x}.default.weight"
                    ].T
                    for i in range(shape.layers)
                ]
            )
            for x in "AB"
        }
        params["blocks"]["attention"][target]["lora"] = pairs
    shape = dataclasses.replace(shape, adapter=LORA)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    found = jax.jit(lambda p, tokens: nnx.merge(graphdef, p)(tokens))(params, golden["tokens"])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected - golden["logits"]).max() > 0.5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plain run, one of LoRA that begins with its weights, and one that begins with that's."""
    directory = tmp_path_factory.mktemp("adapters")
    text = write_text(directory)
    common = {"steps": 40, "eval_every": 40, "clip": 1.0}
    plain = train(tiny(text, optimizer="adamw", out=directory / "plain", **common))
    begin = {"weights_only": True, "tokenizer": str(directory / "plain")}
    lora = {"optimizer": "lora", "rank": 3, "lora_targets": "all", "lr": 0.05, "accumulate": 2}
    of_lora = train(
        tiny(
            text,
            out=directory / "lora",
            init_from=directory / "plain",
            **common | {"steps": 20, "eval_every": 10} | begin | lora,
        )
    )
    after = train(
        tiny(
            text,
            out=directory / "after",
            init_from=directory / "lora",
            **common | begin | {"optimizer": "sgd", "lr": 1e-30, "steps": 1},
        )
    )
    return directory, text, [run.valid[-1]["valid_loss"] for run in (plain, of_lora, after)]


def params_of(directory):
    return load_params(directory, "last", jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def test_lora_trains_what_is_beside_the_kernels_and_nothing_else(runs):
    directory, _, losses = runs
    before, now = params_of(directory / "plain"), params_of(directory / "lora")
    jax.tree.map(np.testing.assert_array_equal, without_lora(now), before)
    assert all(jnp.abs(x).max() > 1e-4 for x in jax.tree.leaves(lora_of(now)))
    assert losses[1] < losses[0] - 0.02
    # Moments, and a gradient norm, of LoRA's matrices alone.
    config = tiny("x", optimizer="lora", rank=3, lora_targets="all").resolve()
    shape = config.shape(300)
    params = jax.eval_shape(lambda: initial_params(config, shape))
    report = galore_optax.memory_report(make_optimizer(config), params)
    assert report.moments == 2 * 4 * shape.trained_params
    assert report.projectors == 0
    assert estimate(config, 300).moments == report.moments + report.counters


def test_a_run_that_begins_with_lora_begins_with_all_of_it(runs):
    directory, _, losses = runs
    adapter = load_run(directory / "lora")[0].config.adapter
    whole = jax.jit(merged, static_argnums=1)(params_of(directory / "lora"), adapter)
    jax.tree.map(np.testing.assert_array_equal, params_of(directory / "after"), whole)
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)


def test_what_is_exported_has_lora_in_its_kernels(runs, tmp_path):
    directory, _, _ = runs
    said = export_hf(directory / "lora", tmp_path / "exported", quiet=True)
    count = sum(x.size for x in jax.tree.leaves(params_of(directory / "after")))
    assert f" of {count:,} parameters" in said
    import_hf(tmp_path / "exported", tmp_path / "imported", quiet=True)
    jax.tree.map(
        np.testing.assert_array_equal,
        params_of(tmp_path / "imported"),
        params_of(directory / "after"),
    )


def test_lora_goes_on_where_it_was(runs):
    directory, text, _ = runs
    with pytest.raises(UsageError, match=r"rank=4, which was 3 \(the weights would have other"):
        train(tiny(text, out=directory / "lora", resume=True, optimizer="lora", rank=4, steps=30))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_targets": "mlp"}, "lora_targets='mlp': expected one of qv, attention, all"),
        ({"lora_alpha": 0.0}, r"lora_alpha=0\.0: expected a positive number"),
        ({"layerwise": True}, "layerwise=True updates the layers' kernels, which"),
    ],
)
def test_settings_that_cannot_work_with_lora(settings, message):
    with pytest.raises(UsageError, match=message):
        tiny("x", optimizer="lora", **settings).resolve()


@pytest.mark.ci
def test_products_are_trained_from_nothing_only(runs):
    directory, text, _ = runs
    begin = {"weights_only": True, "tokenizer": str(directory / "plain")}
    with pytest.raises(UsageError, match="of which optimizer='low_rank' makes no products"):
        train(tiny(text, init_from=directory / "plain", optimizer="low_rank", **begin))
    losses = [
        [r["loss"] for r in train(tiny(text, optimizer="low_rank", steps=4, layerwise=x)).train]
        for x in (False, True)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][-1] < losses[0][0]
