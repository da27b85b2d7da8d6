"""How a process goes about a run: from nothing, from its last checkpoint, or from another run.

Everything is checked before any work is done, and nothing in the run's directory is changed before
the first update is: `commit` then writes the settings, the data's fingerprint and the history.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from examples.flax_llama.adapters import LOW_RANK
from examples.flax_llama.changes import (
    DIGESTS,
    MODEL,
    RULES,
    Kind,
    changes,
    check_allowed,
    config_of,
    in_words,
    refuse,
    settings_of,
)
from examples.flax_llama.checkpoint import last_checkpoint, open_run
from examples.flax_llama.config import Config
from examples.flax_llama.fingerprint import (
    Fingerprint,
    differences,
    fingerprint_of,
    read_fingerprint,
    write_fingerprint,
)
from examples.flax_llama.history import (
    Entry,
    add_entry,
    machine_here,
    read_history,
    validated_since,
)
from examples.flax_llama.optimizers import size_of_updates
from examples.flax_llama.pretrained import settings_of_source
from examples.flax_llama.run_directory import (
    imported_from,
    read_settings,
    write_settings,
)
from examples.flax_llama.schedules import learning_rate
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.tokenizer import (
    Tokenizer,
    is_trained_here,
    load_tokenizer,
    tokenizer_files,
)
from examples.flax_llama.usage import UsageError
from examples.hf.configuration import is_model

LEARNING_RATE = {"steps", "lr", "schedule", "warmup", "cooldown", "final_lr"}
# On a GPU, sums come out the same each time only with it.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a process begins with."""

    # The settings that hold from here on, resolved.
    config: Config
    fingerprint: Fingerprint
    # Updates that are done.
    step: int = 0
    # The settings of the last checkpoint, resolved; None where there is none.
    stored: Config | None = None
    # {setting: [what it was, what it is]}
    changes: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    # Sentences about what they come to; restoring adds some.
    notes: list[str] = dataclasses.field(default_factory=list)
    # The data is read from its start, since it is not what the position belongs to.
    new_data: bool = False
    # Validation losses before and after are of other tokens.
    new_validation: bool = False

    @property
    def finished(self) -> bool:
        """Whether no update is left: the run has ended, or is to end where it is."""
        return 0 < self.step == self.config.steps

    @property
    def to_write(self) -> bool:
        """Whether something has changed in a run that has no update left."""
        kinds = [RULES[name].kind for name in self.changes]
        return self.finished and ("steps" in self.changes or Kind.DATA in kinds)

    @property
    def anew(self) -> bool:
        """Whether the optimizer's moments and subspaces begin anew."""
        return any(RULES[name].kind is Kind.ANEW for name in self.changes)

    @property
    def computed(self) -> list[str]:
        """The changes that what is computed depends on."""
        kinds = (Kind.NOW, Kind.ANEW)
        found = [name for name in self.changes if RULES[name].kind in kinds]
        return found + ["data"] * self.new_data + ["valid_data"] * self.new_validation

    @property
    def entry(self) -> Entry:
        """What the history has of it."""
        marked = self.computed
        return Entry(
            self.step,
            self.changes,
            self.notes,
            [name for name in self.changes if name in marked],
            self.new_validation,
        )

    def lines(self) -> list[str]:
        """What there is to tell before it begins."""
        changed = [f"  {line}" for line in self.entry.lines(self.changes)]
        if not self.finished:
            heading = f"Changed from update {self.step + 1} on:"
        elif self.to_write:
            heading = "Changed:"
        else:
            heading = "Not changed, since no update is left that it could hold for:"
        return [heading] * bool(changed) + changed + [f"Note: {note}." for note in self.notes]

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return settings_of(self.config) | {DIGESTS: self.fingerprint.digests}


def begin(config: Config) -> Beginning:
    """Finds out how a resolved configuration begins.

    Raises:
      UsageError: it cannot go on with a run, or with another run's weights, in this way.
    """
    if config.out is not None and config.resume:
        return go_on(config, config.out)
    if config.init_from is not None:
        check_source(config, config.init_from)
    return Beginning(config, fingerprint_of(config))


def go_on(config: Config, out: Path) -> Beginning:
    """How a run goes on from its last checkpoint; from its start where it has none yet."""
    step, settings = last_checkpoint(out)
    stored = config_of(settings)
    # A run that has no update left is what it says of itself, however its last checkpoint was made.
    written = config_of(read_settings(out)["train"])
    differ = check_allowed(written if 0 < step == config.steps else stored, config, step)
    if "tokenizer" in differ:
        check_tokenizer(config, stored, out)
    now, before = fingerprint_now(config), read_fingerprint(out)
    changed = check_data(config, out, now, before)
    was = settings.get(DIGESTS) or (before or now).digests
    found = Beginning(
        config,
        now,
        step,
        stored if step else None,
        differ,
        new_data=was["train"] != now.train.digest,
        new_validation=was["valid"] != now.of_validation.digest or "eval_tokens" in differ,
    )
    if found.new_data:
        differ["data"] = [stored.data, f"{config.data}: {changed or 'as changed before'}"]
    if found.finished:
        return at_its_end(found, stored)
    notes = [RULES[name].note.format(name=name) for name in differ if RULES[name].note]
    if step:
        found.notes.extend(dict.fromkeys(notes + remarks(found, config, out, before)))
    return found


def at_its_end(found: Beginning, stored: Config) -> Beginning:
    """A run that has no update left, with the settings that it was trained with.

    Raises:
      UsageError: other settings are asked for, which could hold for no update.
    """
    config = found.config
    vain = [name for name in found.computed if name in found.changes.keys() - {"steps"}]
    vain = [name for name in vain if name not in config.by_default]
    vain += ["new_data"] * (not vain and (found.new_data or found.new_validation))
    if vain:
        given = " and ".join(f"{name}={getattr(config, name)!r}" for name in vain)
        raise UsageError(
            f"{given} would hold from the next update on, and out={config.out} has none left after "
            f"{found.step}: give more updates as well, steps=N, or leave it out."
        )
    kinds = (Kind.PROCESS, Kind.FREE, Kind.DATA)
    given = {name: getattr(config, name) for name in RULES if RULES[name].kind in kinds}
    config = dataclasses.replace(stored, **given, steps=found.step)
    return dataclasses.replace(found, config=config)


def fingerprint_now(config: Config) -> Fingerprint:
    """The fingerprint of the data of a run that goes on.

    Raises:
      UsageError: some of it cannot be read; says how to name the place that it has moved to.
    """
    try:
        return fingerprint_of(config)
    except UsageError as error:
        name = "valid_data" if "valid_data=" in str(error) else "data"
        raise UsageError(
            f"{error} If the files of the run have moved, {name}=PLACE names where they are now, "
            "under the same names."
        ) from error


def remarks(found: Beginning, config: Config, out: Path, before: Fingerprint | None) -> list[str]:
    """What the changes of a run that goes on come to, and what cannot be as it would have been."""
    said = []
    if found.stored and found.changes.keys() & LEARNING_RATE:
        was, now = (jnp.asarray(learning_rate(c)(found.step)) for c in (found.stored, config))
        said.append(
            f"the learning rate of update {found.step + 1} would have been {was:.3g} and is "
            f"{now:.3g}"
        )
    if found.stored and "optimizer" in found.changes and "lr" not in found.changes:
        said += of_the_learning_rate(found.stored, config)
    if found.anew:
        said.append(
            "the optimizer's moments and subspaces begin anew; weights, learning-rate schedule and "
            "position in the data go on"
        )
    if found.new_data:
        said.append("the data is not what it was, and is read from its start")
    if found.new_validation:
        said.append(
            "validation losses before and after are of other tokens, and the best checkpoint is "
            "one of those after"
        )
    if before is None:
        said.append(
            "an earlier version made this run, and kept no fingerprint of the data: whether it is "
            "the same is not known"
        )
    history = read_history(out)
    here = machine_here()
    if history and history[-1].machine != here:
        was = history[-1].machine
        others = ", ".join(
            f"{name} {was.get(name)} before and {here[name]} now"
            for name in here
            if was.get(name) != here[name]
        )
        said.append(f"not bit for bit what it would have been: {others}")
    if jax.default_backend() == "gpu" and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        said.append(
            f"not bit for bit what it would have been, which takes XLA_FLAGS={DETERMINISTIC} on a "
            "GPU"
        )
    return said


def of_the_learning_rate(was: Config, now: Config) -> list[str]:
    """What there is to say of a learning rate that was another optimizer's."""
    before, after = size_of_updates(was), size_of_updates(now)
    still = f"the learning rate is still {now.lr:g}, which was one for {was.optimizer}"
    if before is None or after is None:
        return [f"{still}: {now.optimizer} may want another (--lr), of a size that --help gives"]
    if math.isclose(before, after):
        return []
    return [
        f"{still}: {now.optimizer} moves the layers' matrices as far with --lr "
        f"{now.lr * before / after:.2g}, by galore_optax.learning_rate_from_adamw"
    ]


def check_data(config: Config, out: Path, now: Fingerprint, before: Fingerprint | None) -> str:
    """What has changed in the data of a run, where that is allowed.

    Raises:
      UsageError: it has changed, and nobody said that it may.
    """
    if before is None:
        return ""
    of_train = differences(before.train, now.train)
    own_valid = before.valid is not None or now.valid is not None
    of_valid = differences(before.of_validation, now.of_validation) if own_valid else ""
    stored = config_of(read_settings(out)["train"])
    if not config.new_data and of_train:
        raise UsageError(
            f"data={config.data} is not what the run was trained on: {of_train}. Bring that "
            "back, or go on with new_data=True, which reads what is there now from its start."
        )
    if not config.new_data and of_valid and config.valid_data == stored.valid_data:
        raise UsageError(
            f"valid_data={config.valid_data} is not what the run was validated on: {of_valid}. "
            "Bring that back, or go on with new_data=True."
        )
    return of_train


def check_tokenizer(config: Config, stored: Config, out: Path) -> None:
    """Refuses another tokenizer than that of a run; the same at another place is none.

    Raises:
      UsageError: it is another one, or cannot be read.
    """
    same = (
        config.tokenizer is not None
        and not is_trained_here(config.tokenizer)
        and tokenizer_files(out)
        and load_tokenizer(config.tokenizer).to_bytes() == load_tokenizer(out, None).to_bytes()
    )
    if not same:
        differ = {"tokenizer": [stored.tokenizer, config.tokenizer]}
        refuse(config, {"tokenizer": "the weights are those of other tokens"}, differ)


def of_the_source(*, weights_only: bool) -> list[str]:
    """The settings that a run has from the one whose weights, and moments, it begins with."""
    if weights_only:
        return list(MODEL)
    of_state = [name for name, rule in RULES.items() if rule.kind is Kind.ANEW]
    return [*MODEL, *of_state, "param_dtype", "int8_weights"]


def check_source(config: Config, source: Path) -> None:
    """Refuses to begin with the weights of a run that has another model, or another optimizer.

    Raises:
      UsageError: says what differs, and what would be right.
    """
    of_no_run = is_model(source) or imported_from(source)
    if of_no_run and not config.weights_only:
        raise UsageError(
            f"init_from={source} is a model, which has no state of an optimizer: give "
            "weights_only=True."
        )
    if of_no_run:
        stored = settings_of_source(source)
    else:
        with open_run(source) as checkpoints:
            step = checkpoints.find(config.init_step, "init_step")
            stored = config_of(checkpoints.settings(step))
    if config.optimizer == LOW_RANK and stored.adapter != config.adapter:
        raise UsageError(
            f"init_from={source} has whole matrices, of which optimizer='low_rank' makes no "
            "products: choose lora, which is beside them."
        )
    differ = changes(stored, config)
    names = of_the_source(weights_only=config.weights_only)
    if found := [name for name in differ if name in names]:
        what = "Leave that out" if set(found) & set(MODEL) else "Give weights_only=True"
        said = in_words(dict.fromkeys(found, ""), differ)
        raise UsageError(f"init_from={source} is of another configuration: {said}. {what}.")


def check_same_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Refuses weights of another run whose tokens are others.

    Raises:
      UsageError: they are.
    """
    source = config.init_from
    if source is not None and load_tokenizer(source, None).to_bytes() != tokenizer.to_bytes():
        raise UsageError(
            f"init_from={source} has another tokenizer than tokenizer={config.tokenizer}: take "
            f"tokenizer={source}."
        )


def commit(beginning: Beginning, shape: LlamaConfig) -> None:
    """Writes, on the first process, that a run has begun or goes on in this way.

    Each file is written whole or not at all. Wherever a process ends in between, a resumed run
    compares with its last checkpoint, and finds the same changes again.
    """
    config = beginning.config
    out = config.out
    if out is None or jax.process_index() > 0:
        return
    write_fingerprint(out, beginning.fingerprint)
    write_settings(out, config, shape)
    add_entry(out, beginning.entry)


def validation_began(out: Path, beginning: Beginning) -> int:
    """After how many updates the validation losses began that can be compared with new ones."""
    if beginning.new_validation:
        return beginning.step
    return validated_since([entry for entry in read_history(out) if entry.step < beginning.step])
