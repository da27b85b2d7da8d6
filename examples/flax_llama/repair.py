"""Writes the settings of a run again, whose config.json is lost or damaged.

python -m examples.flax_llama.repair --out runs/galore
"""

from pathlib import Path

from examples.flax_llama.changes import config_of
from examples.flax_llama.checkpoint import open_run
from examples.flax_llama.command import program
from examples.flax_llama.flags import command_line
from examples.flax_llama.run_directory import SETTINGS, lock, write_settings
from examples.flax_llama.tokenizer import load_tokenizer


def repair(out: Path) -> int:
    """Takes the settings of a run's last checkpoint; the old config.json is kept beside them.

    Args:
      out: directory of the run.

    Returns:
      The number of updates of the checkpoint.
    """
    with lock(out), open_run(out) as checkpoints:
        step = checkpoints.find("last")
        config = config_of(checkpoints.settings(step))
        # First, since what reads a tokenizer looks at that name too.
        if (path := out / SETTINGS).exists():
            path.rename(path.with_name(f"{SETTINGS}.damaged"))
        shape = config.shape(load_tokenizer(out, None).vocab_size)
        write_settings(out, config, shape)
    return step


def main() -> None:
    with program(repair):
        step = command_line(repair)()
    print(f"The settings are those of the checkpoint after update {step}.")


if __name__ == "__main__":
    main()
