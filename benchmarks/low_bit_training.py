"""Validation loss of 8-bit GaLore and of Q-GaLore beside GaLore's, each at its best learning rate.

    python -m benchmarks.low_bit_training --out runs/low_bit

Trains the demo's LLaMA on the same tokens: a sweep of the learning rate for each, then the best
from two more seeds. Writes report.md with its pictures, and goes on where it was interrupted: see
`examples.flax_llama.compare`, whose command this is.
"""

import argparse
import dataclasses
import pathlib

from examples.flax_llama.compare import compare
from examples.flax_llama.demo import GALORE

OPTIMIZERS = ("galore_adamw", "galore_adamw_8bit", "q_galore_adamw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory")
    parser.add_argument("--rates", default="0.01,0.02,0.04", help="learning rates to try")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=GALORE.steps)
    args = parser.parse_args()
    shared = dataclasses.replace(
        GALORE, steps=args.steps, eval_every=args.steps, tensorboard=False, out=args.out
    )
    sweep = tuple(f"{name}={args.rates}" for name in OPTIMIZERS)
    comparison = compare(shared, OPTIMIZERS, sweep, args.seeds)
    losses = {name: runs[0].loss for name, runs in comparison.best.items()}
    for name, loss in losses.items():
        print(f"{name:20} {loss:.4f}  {loss / losses['galore_adamw'] - 1:+.2%} of galore_adamw")


if __name__ == "__main__":
    main()
