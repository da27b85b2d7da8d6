"""Models of Hugging Face: their logits, their files, and what is wrong with a directory."""

import dataclasses
import json
import random
import shutil

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

import galore_optax
from examples.flax_llama import plan
from examples.flax_llama.attention import empty_cache
from examples.flax_llama.config import Config
from examples.flax_llama.export_hf import export_hf
from examples.flax_llama.flags import command_line
from examples.flax_llama.import_hf import import_hf
from examples.flax_llama.loading import load_params, load_run
from examples.flax_llama.model import Llama, is_quantized
from examples.flax_llama.pretrained import open_model
from examples.flax_llama.train import train
from examples.flax_llama.usage import UsageError
from examples.hf.configuration import config_of, read_shape, said_in_full, shape_of
from examples.hf.names import match
from examples.hf.published import PUBLISHED
from examples.hf.tensors import open_tensors
from examples.hf.weights import load


def model_of(directory):
    """The model, in float32, and its parameters."""
    shape = dataclasses.replace(read_shape(directory), max_seq=24)
    graphdef, like = nnx.split(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))), nnx.Param)
    tensors = open_tensors(directory)
    params = load(tensors, match(shape, tensors).entries, nnx.to_pure_dict(like))
    return graphdef, params, shape


@pytest.mark.parametrize("name", decoders.CASES)
def test_logits_are_those_of_transformers(name):
    graphdef, params, shape = model_of(decoders.DATA / name)
    golden = np.load(decoders.DATA / name / "golden.npz")
    logits = jax.jit(lambda p, tokens: nnx.merge(graphdef, p)(tokens))(params, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    assert shape.num_params == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.live("torch", "transformers")
@pytest.mark.parametrize("name", decoders.CASES)
def test_logits_are_those_of_transformers_today(name, tmp_path):
    model, tokens, expected = decoders.build(name, seed=1)
    model.save_pretrained(tmp_path / "model")
    graphdef, params, _ = model_of(tmp_path / "model")
    found = jax.jit(lambda p, tokens: nnx.merge(graphdef, p)(tokens))(params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    with_tokenizer(tmp_path / "model", 40)
    import_hf(tmp_path / "model", tmp_path / "run", quiet=True)
    export_hf(tmp_path / "run", tmp_path / "exported", quiet=True)
    again = decoders.logits_and_save(tmp_path / "exported", tokens, tmp_path / "saved")
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5)
    _, back, _ = model_of(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", ["smollm3", "gemma3"])
def test_token_by_token_out_of_a_cache_is_all_at_once(name):
    """Of layers without positions, and of windows that are shorter than the text."""
    graphdef, params, shape = model_of(decoders.DATA / name)
    golden = np.load(decoders.DATA / name / "golden.npz")

    @jax.jit
    def rest(params, tokens):
        model = nnx.merge(graphdef, params)
        x, cache = model.extend(tokens[:, :9], empty_cache(shape, len(tokens)))

        def step(cache, token):
            x, cache = model.extend(token[:, None], cache)
            return cache, model.logits(x[:, 0])

        _, logits = jax.lax.scan(step, cache, tokens[:, 9:].T)
        return jnp.concatenate([model.logits(x), jnp.moveaxis(logits, 0, 1)], axis=1)

    found = rest(params, golden["tokens"])
    np.testing.assert_allclose(found, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_texts_of_a_sequence_attend_to_themselves_alone(name):
    graphdef, params, _ = model_of(decoders.DATA / name)
    tokens = np.load(decoders.DATA / name / "golden.npz")["tokens"]
    segments = np.repeat([[1, 2, 3, 0], [1, 1, 1, 2]], [7, 8, 4, 5], axis=1)
    forward = jax.jit(lambda p, *inputs: nnx.merge(graphdef, p)(*inputs))
    together = np.asarray(forward(params, tokens, segments))
    for row in range(2):
        for text in np.unique(segments[row]):
            (places,) = np.nonzero(segments[row] == text)
            alone = np.zeros_like(tokens)
            alone[:, : len(places)] = tokens[row, places]
            expected = forward(params, alone, np.ones_like(segments))[0, : len(places)]
            np.testing.assert_allclose(together[row, places], expected, rtol=0, atol=1e-4)


def with_tokenizer(directory, size):
    """One of single characters, and the end of a text."""
    characters = [chr(ord("0") + i) for i in range(size - 1)]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture
def directory(tmp_path):
    """Of a model with everything that is imported, to be spoilt."""
    shutil.copytree(decoders.DATA / "qwen3", tmp_path / "qwen3")
    return with_tokenizer(tmp_path / "qwen3", 40)


@pytest.mark.parametrize("name", decoders.CASES)
def test_what_goes_in_comes_out_bit_for_bit(name, tmp_path):
    """Into a run and out of it, in several files, and back in: tensors and configuration."""
    shutil.copytree(decoders.DATA / name, tmp_path / name)
    with_tokenizer(tmp_path / name, 40)
    said = import_hf(tmp_path / name, tmp_path / "run", quiet=True)
    assert ("Left out" in said) == (name == "gemma3_nested")
    width = 2 if name in decoders.IN_FLOAT32 else 1
    most = width * 1e-5
    export_hf(tmp_path / "run", tmp_path / "exported", shard_gigabytes=most, quiet=True)
    original = load_file(tmp_path / name / "model.safetensors")
    files = sorted((tmp_path / "exported").glob("*.safetensors"))
    assert len(files) > 1 or name == "llama_llama3"
    exported = {k: v for file in files for k, v in load_file(file).items()}
    assert max(file.stat().st_size for file in files) < 1.5e9 * most
    for key, array in exported.items():
        (right,) = (original[k] for k in (key, f"language_model.{key}") if k in original)
        assert array.dtype == right.dtype
        np.testing.assert_array_equal(array, right, err_msg=key)
    exported, model = (said_in_full(read_shape(tmp_path / d)) for d in ("exported", name))
    assert exported == model
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "exported" / file).is_file()


def test_in_8_bits_each_matrix_is_that_of_the_files_quantized(directory):
    dense, coded = open_model(directory, param_dtype="float32"), open_model(directory, int8=True)
    params = [load(m.tensors, m.found.entries, m.like) for m in (dense, coded)]
    leaves = [jax.tree.leaves_with_path(p, is_leaf=is_quantized) for p in params]
    quantized = 0
    for (path, array), (_, found) in zip(*leaves, strict=True):
        if is_quantized(found):
            quantized += 1
            array = np.asarray(array, jnp.bfloat16)
            right = galore_optax.quantize(array, found.scheme, found.block_size, batch_axes=1)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=str(path))
        else:
            np.testing.assert_array_equal(np.asarray(found, np.float32), array)
    assert quantized == 7


def test_an_imported_model_is_trained_evaluated_and_never_resumed(directory, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    import_hf(directory, run, param_dtype="float32", quiet=True)
    texts = tmp_path / "texts.txt"
    texts.write_text("0123" * 400)
    training = {
        **{"data": str(texts), "valid_data": str(texts), "steps": 2, "batch": 2, "seq": 16},
        **{"eval_every": 2, "quiet": True, "tensorboard": False, "optimizer": "sgd"},
    }
    with pytest.raises(UsageError, match="is a model, which has no state"):
        train(Config(init_from=run, preset=str(directory), tokenizer=str(run), **training))
    begun = Config(
        **{"init_from": run, "preset": str(directory), "tokenizer": str(run)},
        **training | {"out": out, "weights_only": True, "lr": 1e-30, "clip": 1.0},
    )
    train(begun)
    with pytest.raises(UsageError, match="is an imported model: name another directory"):
        train(Config(out=run, resume=True))
    # A learning rate of nothing leaves the weights as they were.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    before, after = (load_params(path, "last", device) for path in (run, out))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    model, tokenizer = load_run(out)
    assert (model.config.architecture.qk_norm, tokenizer.vocab_size) == (True, 40)
    # Nothing of the run needs the directory that was imported.
    shutil.rmtree(directory)
    export_hf(out, tmp_path / "exported", quiet=True)
    assert read_shape(tmp_path / "exported").architecture.qk_norm


@pytest.mark.long("two trainings, of which one has the largest program of all")
@pytest.mark.ci
def test_layers_that_alternate_are_updated_inside_the_backward_pass(tmp_path):
    """With a tied head: the losses are those of ordinary updates."""
    texts = tmp_path / "texts.txt"
    # At random: where all tokens see the same, gradients of attention are nothing but rounding, of
    # which Adam makes steps of full size.
    texts.write_text("".join(random.Random(0).choices("abcdefgh ", k=8000)))
    config = Config(
        **{"preset": str(decoders.DATA / "gemma3"), "tokenizer": "bytes", "vocab_size": 300},
        **{"data": str(texts), "valid_data": str(texts), "steps": 3, "batch": 2, "seq": 16},
        **{"rank": 4, "update_proj_gap": 2, "quiet": True, "clip": 0.0, "lr": 0.03},
    )
    losses = [
        [record["loss"] for record in train(dataclasses.replace(config, layerwise=x)).train]
        for x in (False, True)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[0][0] - losses[0][-1] > 0.01


def spoil_config(**changes):
    def spoil(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def spoil_tensors(change):
    def spoil(directory):
        path = directory / "model.safetensors"
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path)

    return spoil


def with_nan(array):
    array = array.copy()
    array[3, 5] = np.nan
    return array


def rename(old, new):
    return spoil_tensors(lambda arrays: arrays.update({new: arrays.pop(old)}))


Q = "model.layers.1.self_attn.q_proj.weight"
SPOILT = {
    "no configuration": (lambda d: (d / "config.json").unlink(), r"config\.json cannot be read"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json is not JSON"),
    "another family": (
        spoil_config(model_type="phi3"),
        r"model_type='phi3' is not supported: expected one of llama, mistral, qwen2",
    ),
    "another rotary embedding": (
        spoil_config(rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        r"rope_type='longrope' is not supported: expected default, linear, dynamic",
    ),
    "a rotary embedding without its factor": (
        spoil_config(rope_parameters={"rope_type": "linear"}),
        r"rope_scaling of type 'linear' lacks",
    ),
    "a part of the head rotates": (
        spoil_config(partial_rotary_factor=0.5),
        r"partial_rotary_factor=0\.5 is not supported, only 1\.0",
    ),
    "another activation": (spoil_config(hidden_act="relu"), r"hidden_act='relu' .* silu"),
    "no layers": (spoil_config(num_hidden_layers=0), r"num_hidden_layers=0: expected a positive"),
    "heads that do not divide": (spoil_config(num_key_value_heads=3), r"heads=4 do not divide"),
    "a text for a number": (spoil_config(rms_norm_eps="small"), r"rms_norm_eps='small'"),
    "missing": (
        spoil_tensors(lambda arrays: arrays.pop(Q)),
        rf"1 tensors are missing: {Q}",
    ),
    "extra": (
        spoil_tensors(lambda arrays: arrays.update({"model.odd": np.ones(2, np.float32)})),
        r"1 tensors belong to nothing in the model of config\.json: model\.odd",
    ),
    "misshapen": (
        spoil_tensors(lambda arrays: arrays.update({Q: arrays[Q][:-1].copy()})),
        rf"{Q} in .* has the shape \(23, 24\), where config\.json makes it \(24, 24\)",
    ),
    "not a number": (
        spoil_tensors(lambda arrays: arrays.update({Q: with_nan(arrays[Q])})),
        rf"{Q} in .* has a number that is not finite",
    ),
    "quantized": (
        spoil_tensors(lambda arrays: arrays.update({Q: np.ones((24, 24), np.int8)})),
        rf"{Q} in .* is I8: expected weights in 16 or 32 bits",
    ),
    "no embedding": (
        rename("model.embed_tokens.weight", "wte.weight"),
        r"no tensor model\.embed_tokens\.weight: the first ones are .* more",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "a tokenizer that is too large": (
        lambda d: with_tokenizer(d, 41),
        r"the tokenizer has 41 tokens, and the model only 40",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_wrong_is_told_before_anything_is_written(directory, tmp_path, case):
    spoil, message = SPOILT[case]
    spoil(directory)
    with pytest.raises(UsageError, match=message):
        import_hf(directory, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "DIRECTORY and --out must be given"),
        (["qwen3"], "--out must be given"),
        (["--out", "run"], "DIRECTORY must be given"),
        (["qwen3", "--outt", "run"], "--outt is not a flag: did you mean --out"),
    ],
)
def test_a_command_line_that_lacks_something(words, message):
    with pytest.raises(UsageError, match=message):
        command_line(import_hf, words)


def test_no_positions_are_refused(directory, tmp_path):
    with pytest.raises(UsageError, match="seq=0: expected at least 1"):
        import_hf(directory, tmp_path / "run", seq=0, quiet=True)


def test_of_several_dtypes_none_is_rounded(directory, tmp_path):
    norm = "model.norm.weight"
    exact = np.linspace(0.9, 1.1, 24, dtype=np.float32)
    spoil_tensors(lambda arrays: arrays.update({norm: exact}))(directory)
    said = import_hf(directory, tmp_path / "run", quiet=True)
    assert "parameters in float32" in said
    export_hf(tmp_path / "run", tmp_path / "exported", quiet=True)
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    np.testing.assert_array_equal(exported[norm], exact)


def test_numbers_of_64_bits_are_those_of_32_or_refused(directory, tmp_path):
    wide = np.linspace(0.9, 1.1, 24)
    spoil_tensors(lambda arrays: arrays.update({"model.norm.weight": wide}))(directory)
    model = open_model(directory)
    params = load(model.tensors, model.found.entries, model.like)
    (found,) = [x for x in jax.tree.leaves(params) if x.shape == (24,)]
    np.testing.assert_array_equal(found, wide.astype(np.float32))
    wide[7] = 1e300
    spoil_tensors(lambda arrays: arrays.update({"model.norm.weight": wide}))(directory)
    with pytest.raises(UsageError, match=r"model\.norm\.weight in .* not finite"):
        import_hf(directory, tmp_path / "other", quiet=True)


def test_a_head_that_the_configuration_does_not_use_is_named(directory, tmp_path):
    spoil_config(tie_word_embeddings=True)(directory)
    said = import_hf(directory, tmp_path / "run", quiet=True)
    assert "Left out 1 tensors of other parts: lm_head.weight" in said


@pytest.mark.parametrize("int8", [False, True])
def test_a_bit_that_flipped_in_an_imported_model_is_found(directory, tmp_path, int8):
    import_hf(directory, tmp_path / "run", int8=int8, quiet=True)
    path = tmp_path / "run" / "weights.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-3] ^= 1
    path.write_bytes(contents)
    with pytest.raises(UsageError, match=r"in .*weights\.safetensors is not what was imported"):
        export_hf(tmp_path / "run", tmp_path / "exported", quiet=True)
    assert not (tmp_path / "exported").exists()


def test_a_directory_and_its_configuration_are_planned_as_they_are_trained(directory, capsys):
    # The tokenizer of the demo, which is the default, has more tokens than this model.
    spoil_config(vocab_size=4096)(directory)
    shape = read_shape(directory)
    for preset in (directory, directory / "config.json"):
        words = ["--preset", str(preset), "--batch", "2", "--seq", "16"]
        found = plan.plan(plan.from_command_line([*words, "--device", "rtx4060_8gb"]))
        assert found is plan.Fit.SURE
        said = capsys.readouterr().out
        assert said.startswith(f"Qwen3 of {shape.num_params:,} parameters ({preset}), vocabulary")


def test_a_model_is_no_run(directory):
    with pytest.raises(UsageError, match=r"is a model of Hugging Face, not of a run: .*import_hf"):
        load_run(directory)


def test_what_fails_on_the_way_leaves_nothing_under_its_name(directory, tmp_path, monkeypatch):
    import_hf(directory, tmp_path / "run", quiet=True)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("examples.flax_llama.import_hf.write_settings", fail)
    monkeypatch.setattr("examples.flax_llama.export_hf.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        import_hf(directory, tmp_path / "other", quiet=True)
    with pytest.raises(OSError, match="No space"):
        export_hf(tmp_path / "run", tmp_path / "exported", quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"qwen3", "run"}
    with pytest.raises(UsageError, match="exists: name another one"):
        import_hf(directory, tmp_path / "run", quiet=True)


# As the models' cards count them; of Qwen3 without the embedding, in units of 10^8.
COUNTS = {
    **{"smollm2-135m": 134_515_008, "smollm3-3b": 3_075_098_624, "llama-3.2-1b": 1_235_814_400},
    **{"llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248},
    **{"mistral-7b-v0.1": 7_241_732_096, "qwen2.5-0.5b": 494_032_768},
    **{"gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952},
}
WITHOUT_EMBEDDING = {"qwen3-0.6b": 4.4, "qwen3-1.7b": 14, "qwen3-4b": 36, "qwen3-8b": 69.5}
WITHOUT_EMBEDDING |= {"qwen3-14b": 132}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_of_older_versions(name):
    """The parameters that the cards count, and the configuration again out of our shape."""
    config = PUBLISHED[name]
    shape = shape_of(config)
    if name in COUNTS:
        assert shape.num_params == COUNTS[name]
    if name in WITHOUT_EMBEDDING:
        tables = shape.vocab_size * shape.hidden * (1 if shape.architecture.tied else 2)
        assert (shape.num_params - tables) / 1e8 == pytest.approx(WITHOUT_EMBEDDING[name], rel=0.01)
    written = config_of(shape)
    names = {"use_sliding_window", "sliding_window_pattern", "sliding_window"}
    names |= {"no_rope_layer_interval"}
    assert {k: written[k] for k in config.keys() - names} == {
        k: v for k, v in config.items() if k not in names
    }
    resolved = Config(preset=name).resolve()
    again = resolved.shape(256).architecture
    assert (again, resolved.vocab_size) == (shape.architecture, shape.vocab_size)


def test_gemmas_layers_are_five_of_a_window_and_one_without():
    shape = shape_of(PUBLISHED["gemma-3-1b"])
    kinds = [shape.architecture.kinds[i] for i in shape.pattern]
    windows = [kind.window for kind in kinds]
    assert windows == ([512] * 5 + [None]) * 4 + [512] * 2
    assert {kind.rope.theta for kind in kinds if kind.window} == {10_000.0}
    assert {kind.rope.theta for kind in kinds if not kind.window} == {1_000_000.0}


def test_what_no_class_of_transformers_has_is_not_exported():
    shape = read_shape(decoders.DATA / "mistral")
    own = dataclasses.replace(shape.architecture, qk_norm=True)
    with pytest.raises(UsageError, match="No MistralForCausalLM of transformers has this"):
        config_of(dataclasses.replace(shape, architecture=own))
