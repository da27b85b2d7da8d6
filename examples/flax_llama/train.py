"""Trains a LLaMA on the built-in text.

python -m examples.flax_llama.train --preset 9m --optimizer galore_adamw --lr 0.01 --out runs/galore
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from tokenizers import Tokenizer

from examples.flax_llama import data
from examples.flax_llama.config import PRESETS, Config, UsageError
from examples.flax_llama.model import Llama, Params, next_token_losses
from examples.flax_llama.optimizers import learning_rate, make_optimizer
from examples.flax_llama.run_log import Record, RunLog


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run."""

    model: Llama
    tokenizer: Tokenizer
    # One record per update: step (from 1), loss, lr, tokens_per_second.
    train: list[Record]
    # One record per evaluation: step, valid_loss (nats per token), perplexity, bits_per_byte.
    valid: list[Record]


def check_out(out: Path) -> None:
    """Raises UsageError where writing to `out` could overwrite something."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"out={out} is not an empty directory: name another one or delete it.")


def train(config: Config) -> Result:
    """Trains one model; writes only if `config.out` is given, a directory that is new or empty.

    Raises:
      UsageError: a setting cannot work; nothing has been written.
      FloatingPointError: the loss is not finite any more.
    """
    out = config.out
    if out is not None:
        check_out(out)
    optimizer, schedule = make_optimizer(config), learning_rate(config)
    corpus = data.load_corpus(config.tokenizer)
    batches = data.train_batches(corpus.train, config.batch, config.seq, config.seed)
    valid = data.valid_batches(corpus.valid, config.batch, config.seq)
    shape = dataclasses.replace(
        PRESETS[config.preset],
        vocab_size=corpus.tokenizer.get_vocab_size(),
        max_seq=config.seq,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        settings = {"train": dataclasses.asdict(config), "model": dataclasses.asdict(shape)}
        (out / "config.json").write_text(json.dumps(settings, indent=2, default=str))
        corpus.tokenizer.save(str(out / "tokenizer.json"))

    graphdef, state = nnx.split(Llama(shape, rngs=nnx.Rngs(config.seed)), nnx.Param)
    params = nnx.to_pure_dict(state)
    opt_state = jax.jit(optimizer.init)(params)

    def losses(params: Params, tokens_BxS1: jax.Array) -> jax.Array:
        return next_token_losses(nnx.merge(graphdef, params), tokens_BxS1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, tokens_BxS1, count):
        loss, grads = jax.value_and_grad(lambda p: losses(p, tokens_BxS1).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, {"loss": loss, "lr": schedule(count)}

    @jax.jit
    def valid_sums(params, tokens_NxBxS1, mask_NxBxS):
        """Summed losses (N,) of N batches, one after the other."""
        return jax.lax.map(
            lambda batch: jnp.sum(losses(params, batch[0]), where=batch[1]),
            (tokens_NxBxS1, mask_NxBxS),
        )

    def evaluate(params: Params, step: int) -> Record:
        sums = np.asarray(valid_sums(params, *valid), np.float64)
        loss = float(sums.sum() / valid[1].sum())
        return {"step": step, "valid_loss": loss, **corpus.scores(loss)}

    # Compiled ahead, so that the tokens per second of the first update are those of an update.
    compiled_update = update.lower(params, opt_state, batches[0], np.int32(0)).compile()
    with RunLog(
        out and out / "metrics.jsonl",
        steps=config.steps,
        tokens_per_step=config.batch * config.seq,
        quiet=config.quiet,
    ) as log:
        for step in range(1, config.steps + 1):
            count = np.int32(step - 1)
            params, opt_state, metrics = compiled_update(
                params, opt_state, batches[step - 1], count
            )
            log.update(step, metrics)
            if step % config.eval_every == 0 or step == config.steps:
                log.flush()
                log.evaluation(evaluate(params, step))
    if out is not None:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(out.absolute() / "checkpoint", params)
    return Result(nnx.merge(graphdef, params), corpus.tokenizer, log.train, log.valid)


def main() -> None:
    try:
        result = train(tyro.cli(Config))
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    print(" ".join(f"{name} {value:.4g}" for name, value in result.valid[-1].items()))


if __name__ == "__main__":
    main()
