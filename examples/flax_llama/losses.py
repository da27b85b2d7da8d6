"""Validation losses of checkpoints, as Orbax keeps them, also where one is damaged."""

import math
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_manager

from examples.flax_llama.sealed import is_sound, sealed

NAME = checkpoint_manager.METRIC_ITEM_NAME
# What is known of a checkpoint whose loss cannot be read.
DAMAGED: dict[str, Any] = {"damaged": True}


def metrics_of(step: int, valid_loss: float | None, since: int) -> dict[str, Any] | None:
    """What a checkpoint has of a validation loss; nothing without a finite one.

    Args:
      step: its number of updates, so that it cannot be taken for another one's.
      valid_loss: over all tokens to validate on.
      since: after how many updates the losses began that it can be compared with.
    """
    if valid_loss is None or not math.isfinite(valid_loss):
        return None
    return sealed({"valid_loss": valid_loss, "validated_since": since, "step": step})


def rank(metrics: dict[str, Any]) -> Any:
    """The lower, the better is a checkpoint; one of a damaged loss is the last."""
    return -metrics.get("validated_since", 0), metrics.get("valid_loss", math.inf)


class Manager(ocp.CheckpointManager):
    """Orbax' manager, which has a damaged loss where Orbax raises an error, before all else."""

    def metrics(self, step: int) -> Any:
        """What `metrics_of` made for a checkpoint, `DAMAGED`, or None where it has no loss."""
        directory = Path(self.directory) / str(step) / NAME
        try:
            found = super().metrics(step)
        except (OSError, ValueError):
            return DAMAGED
        if found is None:
            return DAMAGED if directory.exists() else None
        right = isinstance(found, dict) and "valid_loss" in found and is_sound(found)
        return found if right and found.get("step", step) == step else DAMAGED
