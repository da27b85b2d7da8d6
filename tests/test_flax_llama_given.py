"""What a command line gives: settings without an effect, and what is by default again."""

import dataclasses

import pytest

from examples.flax_llama.changes import config_of, settings_of
from examples.flax_llama.config import Config
from examples.flax_llama.effects import check_effects, has_effect
from examples.flax_llama.optimizers import OPTIMIZERS
from examples.flax_llama.run_directory import write_settings
from examples.flax_llama.schedules import learning_rate
from examples.flax_llama.train import from_command_line
from examples.flax_llama.usage import UsageError

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain


class Watched:
    """A configuration that knows which of its settings were looked at."""

    def __init__(self, config):
        self.config, self.seen = config, set()

    def __getattr__(self, name):
        self.seen.add(name)
        return getattr(self.config, name)


GALORES = ("rank", "update_proj_gap", "scale", "projector", "projector_dtype", "transport")
GALORES += ("residual", "refresh", "stagger")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_setting_has_an_effect_where_the_optimizer_is_made_with_it(name):
    config = Config(optimizer=name).resolve()
    watched = Watched(config)
    OPTIMIZERS[name](watched, learning_rate(config))
    Config.adapter.fget(watched)
    settings = {*GALORES, "b1", "b2", "eps", "momentum", "moment_dtype"}
    settings |= {"lora_alpha", "lora_targets"}
    assert {n for n in settings if has_effect(config, n)} == settings & watched.seen


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_a_setting_has_an_effect_where_the_schedule_is_made_with_it(name):
    config = Config(schedule=name).resolve()
    watched = Watched(config)
    learning_rate(watched)
    settings = {"cooldown", "final_lr"}
    assert {n for n in settings if has_effect(config, n)} == settings & watched.seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--optimizer adamw --rank 8 --projector svd",
            "rank=8 and projector='svd' have no effect with optimizer='adamw', only with "
            "optimizers in GaLore, such as galore_adamw. Leave it out.",
        ),
        ("--optimizer sgd --stagger", "stagger=True has no effect with optimizer='sgd', only"),
        ("--optimizer lion --eps 0.1", "eps=0.1 has no effect with optimizer='lion', only with"),
        ("--momentum 0.9", "momentum=0.9 has no effect with optimizer='galore_adamw'"),
        ("--init-step best", "init_step='best' has no effect without init_from=RUN."),
        ("--max-bad-lines 3", "max_bad_lines=3 has no effect with on_bad_line='error', only with"),
        ("--text-field body", "text_field='body' has no effect with data='austen', only with"),
        ("--data-format chat", "data_format='chat' has no effect with data='austen', only with"),
        (
            "--data a.jsonl --loss-on all --on-long cut",
            "loss_on='all' and on_long='cut' have no effect with data_format='text', only with "
            "data_format='prompt' or data_format='chat' or data_format='auto'. Leave it out.",
        ),
        (
            "--data a.jsonl --data-format chat --prompt-field q",
            "prompt_field='q' has no effect with data_format='chat', only with data_format='pro",
        ),
        (
            "--data a.jsonl --data-format prompt --messages-field q --text-field t",
            "text_field='t' has no effect with data_format='prompt', only with",
        ),
        ("--stochastic-rounding", "stochastic_rounding=True has no effect with param_dtype='fl"),
        ("--cooldown 0.1", "cooldown=0.1 has no effect with schedule='cosine', only with"),
        ("--clip-by layer", "clip_by='layer' has no effect without layerwise=True."),
        ("--keep 3 --save-every 9", "keep=3 and save_every=9 have no effect without out=RUN."),
        ("--out x --new-data", "new_data=True has no effect without resume=True."),
    ],
)
def test_a_flag_without_an_effect_is_refused(words, message):
    with pytest.raises(UsageError) as found:
        from_command_line(words.split())
    assert str(found.value).startswith(message)


@pytest.mark.parametrize(
    "words",
    [
        "--optimizer galore_lion --rank 8 --b1 0.8",
        "--data text.jsonl --text-field body --on-bad-line skip --max-bad-lines 3",
        "--valid-data text.jsonl --text-field body",
        "--data a.jsonl --data-format auto --text-field a --messages-field b --prompt-field c",
        "--data a.jsonl --data-format chat --messages-field b --loss-on last --on-long skip",
        "--param-dtype bfloat16 --stochastic-rounding --schedule wsd --cooldown 0.1",
        "--optimizer adam --rank 8",  # which is refused for what it is
    ],
)
def test_flags_with_an_effect_are_taken(words):
    from_command_line(words.split())


def test_of_several_it_is_enough_that_one_has_it():
    given = [Config(optimizer=name, rank=8) for name in ("adamw", "galore_adamw", "lion")]
    check_effects(given, Config())
    with pytest.raises(UsageError, match="with optimizer='adamw', optimizer='lion', only with"):
        check_effects(given[::2], Config())


@pytest.fixture
def run(tmp_path):
    """Makes the directory of a run with some settings, and resumes it with others."""

    def resumed(given, *words):
        config = Config(out=tmp_path, **given).resolve()
        write_settings(tmp_path, config, config.shape(300))
        return config, from_command_line(["--out", str(tmp_path), "--resume", *words])

    return resumed


def test_a_resumed_run_has_its_own_settings(run):
    stored, config = run({"optimizer": "apollo_adamw", "lr": 0.5})
    assert config.resolve() == dataclasses.replace(stored, resume=True)


@pytest.mark.parametrize(
    ("given", "words", "every"),
    [
        ({}, "--steps 5000", (500, 500)),
        ({"eval_every": 100}, "--steps 5000", (100, 100)),
        ({"save_every": 7}, "--steps 5000", (500, 7)),
        ({}, "--steps 5000 --eval-every 9", (9, 9)),
        ({}, "--eval-every 9 --save-every 100", (9, 100)),
        ({}, "--steps 5000 --save-every 100", (500, 100)),
        ({}, "--lr 0.5", (100, 100)),
    ],
)
def test_a_tenth_of_the_updates_is_one_of_those_that_there_will_be(run, given, words, every):
    _, config = run({"steps": 1000} | given, *words.split())
    config = config.resolve()
    assert (config.eval_every, config.save_every) == every


def test_by_default_it_stays_however_often_a_run_is_resumed(run, tmp_path):
    stored, config = run({"steps": 1000}, "--steps", "2000")
    for steps in (3000, 4000):
        config = config.resolve()
        write_settings(tmp_path, config, config.shape(300))
        words = ["--out", str(tmp_path), "--resume", "--steps", str(steps)]
        config = from_command_line(words)
        assert config.resolve().eval_every == steps // 10
    assert "lr" in config.by_default
    assert "steps" not in config.by_default
    assert stored.lr == config.lr


def test_what_is_given_is_given_though_it_is_the_default(run):
    _, config = run({"steps": 1000}, "--eval-every", "100")
    assert "eval_every" not in config.resolve().by_default
    assert "save_every" in config.resolve().by_default


def test_what_was_by_default_another_optimizers_is_the_new_ones(run):
    _, config = run({"scale": 0.5}, "--optimizer", "apollo_adamw")
    config = config.resolve()
    assert (config.scale, config.projector) == (0.5, "gaussian")
    # A default that was asked for is none.
    _, config = run({}, "--optimizer", "apollo_adamw", "--projector", "svd")
    config = config.resolve()
    assert (config.scale, config.projector) == (1.0, "svd")
    assert "projector" not in config.by_default


def test_a_run_has_no_use_for_some_of_its_settings_with_another_optimizer(run):
    stored, config = run(
        {"transport": "project", "rank": 8, "moment_dtype": "bfloat16"}, "--optimizer", "lion"
    )
    config = config.resolve()
    assert (config.transport, config.rank) == ("project", 8)
    with pytest.raises(UsageError, match="rank=9 has no effect with optimizer='lion'"):
        run({"rank": 8}, "--optimizer", "lion", "--rank", "9")
    assert stored.optimizer == "galore_adamw"


def test_of_a_run_of_an_earlier_version_that_is_by_default_which_looks_so():
    settings = settings_of(Config(preset="130m", lr=0.5, eval_every=9).resolve())
    assert config_of(settings).by_default == tuple(settings["by_default"])
    del settings["by_default"]
    assert set(config_of(settings).by_default) == {
        *("hidden", "intermediate", "layers", "heads", "rank", "update_proj_gap", "scale"),
        *("projector", "refresh", "int8_weights", "steps", "batch", "clip", "save_every"),
    }
