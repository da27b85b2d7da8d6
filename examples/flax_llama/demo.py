"""Trains a small LLaMA on six novels with GaLore and with AdamW, and compares the two.

python -m examples.flax_llama.demo
"""

import dataclasses
import math
from datetime import datetime
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table

import galore_optax
from examples.flax_llama.checkpoint import CheckpointError
from examples.flax_llama.command import program
from examples.flax_llama.config import Config
from examples.flax_llama.data import Data, unigram_loss
from examples.flax_llama.flags import command_line
from examples.flax_llama.generate import generate
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.plot import plot
from examples.flax_llama.run_directory import check_directory
from examples.flax_llama.train import Result, open_dataset, train

# The best of the sweeps in benchmarks/results/compare.
GALORE = Config(
    optimizer="galore_adamw",
    tokenizer="bpe:2048",
    lr=0.02,
    update_proj_gap=50,
    steps=300,
    batch=8,
    seq=128,
)
ADAMW = dataclasses.replace(GALORE, optimizer="adamw", lr=0.08, matrix_lr_ratio=0.0625)

PROMPT = "It is a truth universally acknowledged, that"


def comparison(dataset: Data, results: dict[str, Result]) -> Table:
    """Held-out loss in three units, of the unigram baseline and of every run."""
    table = Table("", "loss", "perplexity", "bits per byte", title="The held-out 5 % of each novel")
    losses = {"unigram": unigram_loss(dataset)}
    losses |= {name: result.valid[-1]["valid_loss"] for name, result in results.items()}
    for name, loss in losses.items():
        scores = dataset.valid.scores(loss)
        table.add_row(
            name, f"{loss:.3f}", f"{scores['perplexity']:.1f}", f"{scores['bits_per_byte']:.3f}"
        )
    return table


def demo(out: Path | None = None, steps: int = GALORE.steps) -> None:
    """Trains a LLaMA on the built-in text with GaLore and with AdamW, and compares the two.

    Args:
      out: new directory for the runs and loss.png; one named after the time by default.
      steps: updates of each run.
    """
    out = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    check_directory(out, resume=False)
    console = Console()
    galore, adamw = (
        dataclasses.replace(
            config, steps=steps, eval_every=math.ceil(steps / 4), out=out / config.optimizer
        ).resolve()
        for config in (GALORE, ADAMW)
    )
    results = {}
    for name, config in {"GaLore": galore, "AdamW": adamw}.items():
        console.print(f"{name}: {steps} updates on {jax.devices()[0].device_kind}")
        results[name] = train(config)

    model, tokenizer = results["GaLore"].model, results["GaLore"].tokenizer
    console.print(comparison(open_dataset(galore), results))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    print(galore_optax.memory_report(make_optimizer(galore), params))
    print(f"\nGaLore's model continues:\n{generate(model, tokenizer, PROMPT)}\n")
    plot((out / galore.optimizer, out / adamw.optimizer), out / "loss.png")
    print(f"Wrote {out / 'loss.png'}; sample on with")
    print(f"python -m examples.flax_llama.sample --run {galore.out}")


def main() -> None:
    with program(demo, errors=(CheckpointError, FloatingPointError)):
        command_line(demo)()


if __name__ == "__main__":
    main()
