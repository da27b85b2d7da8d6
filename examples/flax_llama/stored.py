"""The arrays of a tree as Orbax has saved it, before any of them is read."""

import re
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from examples.flax_llama.optimizer_state import arrays
from examples.flax_llama.usage import UsageError, first_line


def stored_arrays(path: Path) -> dict[str, str]:
    """The dtype and shape of each array of a saved tree, by path.

    Raises:
      ValueError: it has not what says so, or that is damaged.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(path).item_metadata
    if found is None:
        raise ValueError("which arrays it has cannot be read")
    return arrays(found.tree)


def what_is_wrong(error: Exception) -> str:
    """An error in a few words; those of tensorstore end in the file that they are about."""
    if isinstance(error, KeyError | AttributeError):
        return f"what describes it is damaged, at {first_line(error)}"
    files = [each for each in re.findall(r'local file "([^"]+)"', str(error)) if each[-1] != "/"]
    return f"{files[-1]} is missing or damaged" if files else first_line(error)


def has_version(path: Path) -> bool:
    """Whether a saved optimizer state says its version, as those from before 0.1.0 do not."""
    try:
        return any(name.split("/")[-1] == "version" for name in stored_arrays(path))
    except Exception:  # whatever is wrong with it, reading it says so
        return True


def check_arrays(path: Path, like: Any) -> None:
    """Refuses a saved tree with other arrays than `like`, before any of them is read.

    Orbax casts those of another dtype without a word, and does not name those of another shape.

    Raises:
      UsageError: an array has another shape or dtype, is missing, or should not be there.
    """

    def at(name: str, tree: dict[str, str]) -> str:
        parts = [
            f"{key[len(name) + 1 :]} {x}" for key, x in tree.items() if key.startswith(f"{name}/")
        ]
        return tree.get(name) or ", ".join(parts) or "absent"

    stored, wanted = stored_arrays(path), arrays(like)
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise UsageError(
                f"{path} does not fit: {name} is {at(name, stored)}, and should be "
                f"{at(name, wanted)}. Resume with the settings and the version of galore_optax "
                "that it was made with; nothing has been changed."
            )
