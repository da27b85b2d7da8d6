"""Continues a prompt with a trained LLaMA.

python -m examples.flax_llama.sample --run runs/galore --prompt "It is a truth"
"""

from collections.abc import Iterator
from pathlib import Path

from examples.flax_llama.command import program
from examples.flax_llama.flags import command_line
from examples.flax_llama.generate import stream
from examples.flax_llama.loading import load_run


def sample(
    run: Path,
    prompt: str = "It is a truth universally acknowledged, that",
    step: str = "last",
    tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Continues a prompt with a trained LLaMA.

    Args:
      run: the --out directory of a training run.
      prompt: text to continue.
      step: the checkpoint: "last", "best" for the lowest validation loss, or its number of updates.
      tokens: largest number of tokens to add; the end of a document ends the text before.
      temperature: of the softmax; 0 always takes the likeliest token.
      top_p: draw from the likeliest tokens only whose probabilities reach this sum; 1 is all.
      top_k: draw from that many of the likeliest tokens only, before --top-p; by default from all.
      seed: of the drawing.

    Returns:
      Pieces of the text, as they are made.
    """
    model, tokenizer = load_run(run, int(step) if step.isdecimal() else step)
    return stream(
        model,
        tokenizer,
        prompt,
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
    )


def main() -> None:
    with program(sample):
        for piece in command_line(sample)():
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
