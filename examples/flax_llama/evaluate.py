"""Perplexity of a trained LLaMA, with its standard error.

python -m examples.flax_llama.evaluate --run runs/galore
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from examples.flax_llama.changes import config_of
from examples.flax_llama.command import program
from examples.flax_llama.config import Config
from examples.flax_llama.conversation_data import open_valid_conversations
from examples.flax_llama.data import open_data
from examples.flax_llama.documents import BUILT_IN, is_tokenized
from examples.flax_llama.fingerprint import (
    Marks,
    alike,
    differences,
    marks_of,
    read_fingerprint,
)
from examples.flax_llama.flags import command_line
from examples.flax_llama.loading import load_run
from examples.flax_llama.loss import token_losses
from examples.flax_llama.model import Params
from examples.flax_llama.reading import Reading, reading_of
from examples.flax_llama.run_directory import read_settings
from examples.flax_llama.sharding import ROWS, by_rows, divided, make_mesh, replicated
from examples.flax_llama.tokenizer import load_tokenizer
from examples.flax_llama.usage import UsageError, at_least_one
from examples.flax_llama.validation import Valid, open_valid


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean loss over some tokens."""

    # Nats per token.
    loss: float
    # Of `loss`, from the spread between rows, since the tokens of one depend on each other.
    standard_error: float
    # Number of tokens predicted.
    tokens: int


def summarize(sums_R: np.ndarray, counts_R: np.ndarray) -> Evaluation:
    """The mean over all tokens, from summed losses and numbers of tokens of each row.

    The standard error is that of a ratio of two sums over rows drawn at random, linearized
    (Cochran, Sampling Techniques, 1977, section 6.4); nan for a single row.
    """
    sums_R, counts_R = sums_R[counts_R > 0].astype(np.float64), counts_R[counts_R > 0]
    rows, tokens = len(counts_R), int(counts_R.sum())
    loss = float(sums_R.sum() / tokens)
    squares = float(((sums_R - loss * counts_R) ** 2).sum())
    error = math.sqrt(rows / (rows - 1) * squares) / tokens if rows > 1 else math.nan
    return Evaluation(loss, error, tokens)


def make_evaluate(graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh) -> Callable[..., Evaluation]:
    """Function of parameters, tokens (N, B, S + 1) and mask (N, B, S), the same on all processes.

    The mask marks the targets that count. Segments (N, B, S + 1) may follow. The N batches are
    computed one after the other, the rows of one on all devices.
    """
    whole, rows = PartitionSpec(), PartitionSpec(ROWS)

    def of_rows(
        params: Params,
        tokens_BxS1: jax.Array,
        mask_BxS: jax.Array,
        segments_BxS1: jax.Array | None,
    ) -> jax.Array:
        losses_BxS = token_losses(nnx.merge(graphdef, params), tokens_BxS1, segments_BxS1)
        return jnp.sum(losses_BxS, axis=1, where=mask_BxS)

    row_sums = jax.jit(
        divided(of_rows, mesh, (whole, rows, rows, rows), rows=rows),
        out_shardings=replicated(mesh),
    )

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, by_rows(mesh), array.__getitem__)

    def evaluate(
        params: Params,
        tokens_NxBxS1: np.ndarray,
        mask_NxBxS: np.ndarray,
        segments_NxBxS1: np.ndarray | None = None,
    ) -> Evaluation:
        batches = tokens_NxBxS1, mask_NxBxS, segments_NxBxS1
        sums = [
            row_sums(params, *jax.tree.map(lambda x, n=n: put(x[n]), batches))
            for n in range(len(tokens_NxBxS1))
        ]
        return summarize(np.concatenate(jax.device_get(sums)), mask_NxBxS.sum(axis=-1).reshape(-1))

    return evaluate


def valid_of_run(
    run: Path, data: str | None, tokens: int | None, reading: Reading | None = None
) -> Valid:
    """The validation text of a run, or another one, in the run's tokens and rows.

    Args:
      run: its directory.
      data: the other text.
      tokens: number of targets; by default as `open_data` has it.
      reading: how the text is read; by default as the run's.

    Raises:
      UsageError: the files that the run was validated on are gone, or not what they were.
    """
    config, kept = config_of(read_settings(run)["train"]), read_fingerprint(run)
    reading = reading or reading_of(config)
    rows: dict[str, Any] = {"seq": config.seq, "packing": config.packing, "reading": reading}
    open_it = open_valid if reading.data_format == "text" else open_valid_conversations
    if reading.data_format == "text":
        rows["attend_across"] = config.attend_across
    with reading.told():
        if data is not None:
            other = {"num_tokens": tokens, "name": "data"}
            return open_it(data, load_tokenizer(run, None), **other, **rows)
        if config.valid_data is not None:
            text = kept_files(config.valid_data, kept.valid if kept else None)
            return open_it(text, load_tokenizer(run, None), num_tokens=tokens, **rows)
        own = {"tokenizer": str(run), "batch": config.batch, "eval_tokens": tokens}
        return open_data(kept_files(config.data, kept.train if kept else None), **own, **rows).valid


def kept_files(data: str, marks: Marks | None) -> str | list[Path]:
    """The files that a run had of some data, whatever others there are now.

    Raises:
      UsageError: they are gone, or not what they were.
    """
    if marks is None or data.startswith("hf:"):
        return data
    paths = [Path(file.path) for file in marks.files]
    gone = [str(path) for path in paths if not path.exists()]
    changed = (
        f"{', '.join(gone[:5])} {'is' if len(gone) == 1 else 'are'} gone"
        if gone
        else differences(
            marks,
            dataclasses.replace(
                marks, files=marks_of(paths), alike=alike(paths) if marks.held_out else ""
            ),
        )
    )
    if changed:
        raise UsageError(
            f"The run was validated on text of other files than there are now: {changed}. Bring "
            "them back; if they have moved, train --resume --data PLACE tells the run so; or name "
            "text to evaluate on with data=PATH."
        )
    return data if data == BUILT_IN or is_tokenized(data) else paths


def evaluate(
    run: Path,
    data: str | None = None,
    tokens: int | None = None,
    step: str = "last",
    batch: int = 16,
    text_field: str | None = None,
    on_bad_line: str | None = None,
    max_bad_lines: int | None = None,
) -> dict[str, float]:
    """Perplexity of a trained LLaMA, with its standard error.

    Args:
      run: the --out directory of a training run.
      data: text to evaluate on, of the kinds that can be trained on. By default, what the run was
        validated on.
      tokens: number of tokens to predict, exactly; by default all there are, of files and of
        Hugging Face data about the first million.
      step: the checkpoint: "last", "best" for the lowest validation loss, or its number of updates.
      batch: rows computed at a time, on each device.
      text_field: with --data, field of JSON lines and of Hugging Face data that has the text; by
        default that of the run.
      on_bad_line: at a line that is no JSON, has no text, or is not UTF-8: error, or skip it; by
        default as the run did.
      max_bad_lines: with --on-bad-line skip, so many are left out; one more is an error.
    """
    at_least_one("batch", batch)
    if tokens is not None:
        at_least_one("tokens", tokens)
    if text_field is not None and data is None:
        raise UsageError(
            f"text_field={text_field!r} has no effect without data=PATH: the text of the run has "
            "its own. Leave it out."
        )
    config = config_of(read_settings(run)["train"])
    if text_field is not None and config.data_format != "text":
        raise UsageError(
            f"text_field={text_field!r} has no effect with a run on data_format="
            f"{config.data_format!r}, in which other data is read too. Leave it out."
        )
    lines = {"on_bad_line": on_bad_line, "max_bad_lines": max_bad_lines}
    reading = reading_of(config, text_field=text_field, **lines)
    if max_bad_lines is not None and reading.on_bad_line != "skip":
        raise UsageError(
            f"max_bad_lines={max_bad_lines} has no effect without on_bad_line='skip'. Leave it out."
        )
    model, _ = load_run(run, step)
    graphdef, params = nnx.split(model, nnx.Param)
    mesh = make_mesh()
    valid = valid_of_run(run, data, tokens, reading)
    result = make_evaluate(graphdef, mesh)(
        jax.device_put(nnx.to_pure_dict(params), replicated(mesh)),
        *valid.batches(batch * jax.device_count()),
    )
    if reading.bad_lines:
        print(reading.summary(), file=sys.stderr)
    scores = valid.scores(result.loss)
    return {
        "tokens": result.tokens,
        "loss": result.loss,
        "loss_standard_error": result.standard_error,
        "perplexity": scores.pop("perplexity"),
        # By the delta method: the derivative of exp(loss) is itself.
        "perplexity_standard_error": math.exp(result.loss) * result.standard_error,
        **scores,
    }


def main() -> None:
    with program(Config, evaluate):
        scores = command_line(evaluate)()
    for name in ("loss", "perplexity"):
        print(f"{name:14} {scores[name]:.4f} +- {scores[f'{name}_standard_error']:.4f}")
    if "bits_per_byte" in scores:
        print(f"{'bits per byte':14} {scores['bits_per_byte']:.4f}")
    print(f"{'tokens':14} {scores['tokens']:,}")


if __name__ == "__main__":
    main()
