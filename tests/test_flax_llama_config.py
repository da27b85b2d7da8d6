"""Shapes and recipes against the published tables, and what a configuration refuses."""

import dataclasses
import math

import pytest

from examples.flax_llama.config import PRESETS, Config, LlamaConfig, UsageError
from examples.flax_llama.shapes import RECIPES

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

# lr, rank, update_proj_gap, steps, batch, clip: of the paper, of its script, or a neighbour's.
PUBLISHED = {
    "60m": (0.01, 128, 200, 10_000, 512, 0.0),
    "130m": (0.01, 256, 200, 20_000, 512, 0.0),
    "250m": (0.01, 256, 200, 60_000, 512, 0.0),
    "350m": (0.01, 256, 200, 60_000, 512, 0.0),
    "1b": (0.01, 512, 200, 100_000, 512, 0.0),
    "3b": (0.01, 512, 200, 100_000, 512, 0.0),
    "7b": (0.005, 1024, 500, 150_000, 512, 1.0),
    "13b": (0.005, 1024, 500, 150_000, 512, 1.0),
}
# Tokens of the published runs.
TOKENS = {"60m": 1.1e9, "130m": 2.2e9, "1b": 13.1e9, "7b": 19.7e9}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_is_resolved_to_the_published_recipe(preset):
    config = Config(preset=preset).resolve()
    names = ("lr", "rank", "update_proj_gap", "steps", "batch", "clip")
    assert tuple(getattr(config, name) for name in names) == PUBLISHED[preset]
    assert (config.scale, config.warmup, config.schedule, config.final_lr) == (
        *(0.25, 0.1),
        *("cosine", 0.1),
    )
    assert (config.weight_decay, config.seq) == (0.0, 256)
    tokens = config.steps * config.batch * config.seq
    assert tokens == pytest.approx(TOKENS.get(preset, tokens), rel=0.2)


def test_small_presets_have_a_quarter_of_the_hidden_size_as_rank():
    for preset in PRESETS.keys() - PUBLISHED.keys():
        assert Config(preset=preset).resolve().rank == PRESETS[preset].hidden // 4
    assert PRESETS.keys() == RECIPES.keys()


# Of the 7b preset: rank, update_proj_gap, scale, projector. Only what an optimizer has no default
# of its own for is the recipe's.
RESOLVED = {
    "adamw": (1024, 500, 0.25, "svd"),
    "galore_adamw": (1024, 500, 0.25, "svd"),
    "fira_adamw": (1024, 500, 0.25, "svd"),
    "apollo_adamw": (1024, 500, 1.0, "gaussian"),
    "apollo_mini_adamw_8bit": (1, 500, 128**0.5, "gaussian"),
    "ldadamw": (1024, 1, 1.0, "momentum_iteration"),
    "tracked_adamw": (1024, 1, 0.25, "momentum_iteration"),
    "frugal_adamw": (1024, 500, 1.0, "random_rows"),
    "grass_adamw": (1024, 500, 0.25, "rows"),
    "dct_adamw_8bit": (1024, 1, 1.0, "dct"),
    "flora": (1024, 1000, 1.0, "gaussian"),
    "galore_muon": (1024, 500, 1.0, "svd"),
}


@pytest.mark.parametrize("name", RESOLVED)
def test_an_optimizers_own_defaults_go_before_the_recipe(name):
    names = ("rank", "update_proj_gap", "scale", "projector")
    config = Config(preset="7b", optimizer=name).resolve()
    assert tuple(getattr(config, name) for name in names) == RESOLVED[name]
    assert (config.transport, config.residual) == (None, None)
    assert config.resolve() == config


def test_what_is_given_goes_before_an_optimizers_own_defaults():
    given = {"rank": 8, "update_proj_gap": 7, "scale": 0.5, "projector": "svd"}
    given |= {"transport": "keep", "residual": "discard"}
    config = Config(optimizer="apollo_mini_adamw", **given).resolve()
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "130m"},
        {"preset": "60m", "lr": 0.5, "steps": 30},
        {"hidden": 64, "heads": 4, "rank": 0.5},
        {"optimizer": "frugal_adamw", "eval_every": 7},
        {"optimizer": "q_galore_adamw", "clip": 0.0},
    ],
)
def test_what_nobody_gave_is_known_however_often_it_is_resolved(given):
    config = Config(**given).resolve()
    unset = {field.name for field in dataclasses.fields(Config)}
    unset = {name for name in unset if getattr(Config(**given), name) is None}
    assert set(config.by_default) == {n for n in unset if getattr(config, n) is not None}
    assert config.resolve() == config
    # What is changed by hand is given.
    changed = dataclasses.replace(config, update_proj_gap=3).resolve()
    assert set(config.by_default) - set(changed.by_default) == {"update_proj_gap"}


def test_a_rank_below_one_is_a_fraction_of_the_hidden_size():
    assert Config(preset="60m", rank=0.125).resolve().rank == 64
    assert Config(hidden=64, heads=4, rank=0.001).resolve().rank == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_the_shape_of_its_name(preset):
    shape = Config(preset=preset).resolve().shape(32_000)
    assert shape == PRESETS[preset]
    millions = float(preset[:-1]) * (1000 if preset.endswith("b") else 1)
    assert shape.num_params / 1e6 == pytest.approx(millions, rel=0.35)


def test_what_is_given_goes_before_the_preset():
    config = Config(preset="60m", lr=0.5, hidden=64, heads=4, steps=30, clip=0.0).resolve()
    assert (config.lr, config.hidden, config.heads, config.steps) == (0.5, 64, 4, 30)
    assert (config.layers, config.rank, config.eval_every, config.save_every) == (8, 16, 3, 3)
    assert config.resolve() == config
    assert None not in [
        getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in {"vocab_size", "valid_data", "tokenizer", "eos_token", "eval_tokens"}
        and field.name
        not in {"architecture", "lora_alpha", "lora_targets", "lora_only", "merge_every"}
        and field.name not in {"out", "wandb", "transport", "residual", "init_from"}
        and field.name not in {"moment_dtype", "projector_dtype", "inputs_dtype", "b2"}
        and field.name not in {"prompt_field", "response_field", "messages_field"}
        and field.name not in {"mesh", "coordinator", "processes", "process"}
    ]


def test_flops_are_six_for_each_entry_that_multiplies_and_attention():
    shape = LlamaConfig(hidden=8, intermediate=20, layers=3, heads=2, vocab_size=50, max_seq=16)
    matrices = 3 * (4 * 8 * 8 + 3 * 8 * 20) + 8 * 50
    # Scores and weighted values: two products of (S, head) and (S, S) for each head, done three
    # times (once forward, twice backward), two operations each.
    attention = 3 * 3 * 2 * 2 * 2 * (16 * 16 * 4)
    assert shape.flops_per_token == 6 * matrices + attention / 16
    assert shape.num_params == matrices + 8 * 50 + 7 * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "8m"}, "preset='8m': expected one of 9m, 20m"),
        ({"dtype": "float16"}, "dtype='float16': expected one of float32, bfloat16"),
        ({"attention": "flash"}, "attention='flash': expected one of auto, xla, cudnn"),
        ({"on_nan": "ignore"}, "on_nan='ignore': expected one of stop, skip"),
        ({"rank": 128}, "rank=128: expected 1 to 127, less than the hidden size 128"),
        ({"rank": 0}, "rank=0: expected 1 to 127"),
        ({"hidden": 12, "heads": 4}, "hidden=12 does not divide into heads=4"),
        ({"layers": 0}, "layers=0: expected at least 1"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"eval_every": 0}, "eval_every=0: expected at least 1"),
        ({"save_every": -1}, "save_every=-1: expected at least 1"),
        ({"keep": 0}, "keep=0: expected at least 1"),
        ({"eval_tokens": 0}, "eval_tokens=0: expected at least 1"),
        ({"accumulate": 0}, "accumulate=0: expected at least 1"),
        ({"batch": 16, "accumulate": 3}, "batch=16 does not divide into accumulate=3"),
        ({"lr": -1.0}, "lr=-1.0: expected a positive number"),
        ({"scale": math.inf}, "scale=inf: expected a positive number"),
        ({"clip": math.nan}, "clip=nan: expected 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected 0 or more"),
        ({"warmup": 1.0}, "warmup=1.0: expected at least 0 and less than 1"),
        ({"b2": 1.0}, "b2=1.0: expected at least 0 and less than 1"),
        ({"final_lr": 1.5}, "final_lr=1.5: expected 0 to 1"),
        (
            {"schedule": "wsd", "warmup": 0.5, "cooldown": 0.6},
            "warmup=0.5 and cooldown=0.6 are more than all updates",
        ),
        ({"optimizer": "adamw", "int8_weights": True}, "int8_weights=True needs an optimizer in G"),
        ({"transport": "turn"}, "transport='turn': expected one of keep, reset, project, rotate"),
        ({"residual": "all"}, "residual='all': expected one of discard, norm_scaled"),
        (
            {"rank": 1.5},
            "rank=1.5: expected 1 to 127, less than the hidden size 128, or a fraction",
        ),
        ({"resume": True}, "resume=True needs the directory of the run"),
        ({"data": ""}, "data='' is empty: expected a value, or leave it out"),
        ({"valid_data": ""}, "valid_data='' is empty"),
        ({"tokenizer": ""}, "tokenizer='' is empty"),
        ({"wandb": ""}, "wandb='' is empty"),
        ({"on_bad_line": "ignore"}, "on_bad_line='ignore': expected one of error, skip"),
        ({"max_bad_lines": -1}, "max_bad_lines=-1: expected 0 or more"),
        ({"text_field": "meta..content"}, "text_field='meta..content': expected the name of a"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Config(**settings).resolve()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    config = Config(vocab_size=300).resolve()
    assert config.shape(300).vocab_size == config.shape(256).vocab_size == 300
    assert Config().resolve().shape(257).vocab_size == 257
    with pytest.raises(UsageError, match=r"is smaller than the 301 tokens of the default tok"):
        config.shape(301)
