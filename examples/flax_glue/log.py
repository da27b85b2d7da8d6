"""What a fine-tuning run reports: records kept, written to metrics.jsonl, and shown."""

from examples.flax_glue.config import Config
from examples.flax_glue.shapes import EncoderConfig
from examples.flax_llama.records import Record
from examples.flax_llama.run_log import RunLog

# In a record of an evaluation, beside scores.
OTHERS = ("step", "epoch", "valid_loss")


class Log(RunLog):
    """Context manager that owns the records of one run; see `RunLog`.

    Args:
      config: of the run.
      encoder: the model.
      steps: number of updates in the end.
      start: number of updates done already.
    """

    def __init__(self, config: Config, encoder: EncoderConfig, *, steps: int, start: int):
        super().__init__(
            config.out,
            start=start,
            steps=steps,
            flops_per_token=encoder.flops_per_token,
            sinks=(),
            quiet=config.quiet,
        )

    def evaluation(self, record: Record) -> None:
        """Records an evaluation."""
        self.valid.append(record)
        self._write(record)
        self.progress.say(f"epoch {in_words(record)}")


def in_words(record: Record) -> str:
    """An evaluation in words: the epoch, the loss of dev, and all scores but the one that counts.

    That one is among the others, or their mean.
    """
    scores = [
        f"{name.replace('_', ' ')} {value:.4f}"
        for name, value in record.items()
        if name not in OTHERS and not name.endswith("score")
    ]
    return f"{record['epoch']:g}: loss {record['valid_loss']:.4f}, {', '.join(scores)}"
